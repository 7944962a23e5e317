//! The manifests of deploy/: right by the API server's own judgement, and no right more than listed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;

use kube::api::{Patch, PatchParams};
use kube::core::CustomResourceExt as _;
use serde_json::{Value, json};
use tombolo_agent::api::kind::cluster_set::ClusterSetResource;
use tombolo_agent::api::kind::member::{MemberNodesResource, MemberResource};
use tombolo_agent::api::kind::tunnel_node::TunnelNodeResource;
use tombolo_agent::api::kubernetes::{Access, Kubernetes, Scope};
use tombolo_agent::api::{ClusterApi, Error};
use tombolo_agent_core::object::TunnelNode;
use tombolo_proto::model::Family;

use crate::objects::{derived, import, key, node, until};
use crate::server::{Server, api_of, apply, deploy, get};

/// Documents of a file.
fn documents(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let parts = text.split("\n---\n").map(|part| serde_saphyr::from_str::<Value>(part).unwrap());
    parts.filter(|value| !value.is_null()).collect()
}

/// TOMBOLO_UPDATE=1 writes them.
#[test]
fn definitions_are_those_of_the_types() {
    let definitions = [
        ClusterSetResource::crd(),
        MemberResource::crd(),
        MemberNodesResource::crd(),
        TunnelNodeResource::crd(),
    ];
    for definition in definitions {
        let name = format!("{}_{}.yaml", definition.spec.group, definition.spec.names.plural);
        let body = serde_saphyr::to_string(&serde_json::to_value(&definition).unwrap()).unwrap();
        let text = format!(
            "# Made from the types in agent/src/api/kind: TOMBOLO_UPDATE=1 cargo test -p tombolo-agent --test kubernetes\n{body}"
        );
        let path = deploy("crds").join(&name);
        if std::env::var_os("TOMBOLO_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(there == text, "deploy/crds/{name} is not what the types say: run with TOMBOLO_UPDATE=1");
    }
}

/// Roles of deploy/base, one line for each resource.
#[test]
fn agents_may_do_what_is_listed_and_no_more() {
    let mut rights: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in ["controller-rbac.yaml", "node-rbac.yaml"] {
        for role in documents(&deploy("base").join(file)) {
            let kind = role["kind"].as_str().unwrap();
            if kind != "ClusterRole" && kind != "Role" {
                continue;
            }
            let role_name = format!("{kind}/{}", role["metadata"]["name"].as_str().unwrap());
            let texts = |value: &Value| -> Vec<String> {
                value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
            };
            for rule in role["rules"].as_array().unwrap() {
                let names = rule.get("resourceNames").map(texts).unwrap_or_else(|| vec![String::new()]);
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        for name in &names {
                            let dot = if group.is_empty() { "" } else { "." };
                            let slash = if name.is_empty() { "" } else { "/" };
                            let line = format!("{role_name}  {resource}{dot}{group}{slash}{name}");
                            rights.entry(line).or_default().extend(texts(&rule["verbs"]));
                        }
                    }
                }
            }
        }
    }
    let lines = rights.iter().map(|(line, verbs)| {
        let verbs: Vec<&str> = verbs.iter().map(String::as_str).collect();
        format!("{line}  {}", verbs.join(" "))
    });
    let granted: BTreeSet<String> = lines.collect();
    let allowed = std::fs::read_to_string(deploy("rbac.allow")).unwrap();
    let allowed: BTreeSet<String> =
        allowed.lines().filter(|l| !l.starts_with('#')).map(str::to_owned).collect();
    let more: Vec<_> = granted.difference(&allowed).collect();
    let less: Vec<_> = allowed.difference(&granted).collect();
    assert!(
        more.is_empty() && less.is_empty(),
        "granted and not listed: {more:#?}; listed and not granted: {less:#?}"
    );
    assert!(granted.iter().all(|line| !line.contains('*')));
}

/// A token of a service account, bound to a pod on a node if there is one.
fn token(server: &Server, account: &str, pod: Option<&str>) -> String {
    let mut arguments = vec!["create", "token", account, "-n", "tombolo-system"];
    if let Some(pod) = pod {
        arguments.extend(["--bound-object-kind=Pod", "--bound-object-name", pod]);
    }
    server.kubectl(&arguments).unwrap().trim().to_owned()
}

async fn connect(server: &Server, name: &str, token: &str, is_node: bool) -> Kubernetes {
    let scope = Scope { node: node("n1"), is_node, controller: !is_node };
    Kubernetes::connect(&Access::Kubeconfig(server.kubeconfig(name, token)), &scope).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manifests_are_clean_and_grant_what_is_needed_and_nothing_else() {
    let Some(server) = Server::start().await else { return };
    let client = server.install().await;
    for name in ["base", "broker"] {
        let path = deploy(name);
        let arguments = ["apply", "--server-side", "--dry-run=server", "-k", path.to_str().unwrap()];
        let output = server.kubectl(&arguments).unwrap();
        assert!(output.contains("serverside-applied"), "{output}");
    }
    server.kubectl(&["apply", "--server-side", "-k", deploy("base").to_str().unwrap()]).unwrap();
    for name in ["n1", "n2"] {
        apply(&client, json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } })).await;
    }
    apply(
        &client,
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "agent-n1", "namespace": "tombolo-system" },
            "spec": {
                "serviceAccountName": "tombolo-node", "nodeName": "n1",
                "containers": [{ "name": "node", "image": "tombolo-agent" }],
            },
        }),
    )
    .await;

    // A node reads what it needs, and says what itself is.
    let api = connect(&server, "n1", &token(&server, "tombolo-node", Some("agent-n1")), true).await;
    let mut observed = api.observe();
    let now = until(&mut observed, "what a node needs", |now| {
        now.nodes.is_known()
            && now.members.is_known()
            && now.member_nodes.is_known()
            && now.tunnel_nodes.is_known()
            && now.imports.is_known()
            && now.slices.is_known()
            && now.clusterset.is_known()
            && !now.service_ranges.is_empty()
            // None of it was refused. (For a moment after its start an API server serves not all kinds.)
            && now.findings.is_empty()
    })
    .await;
    assert!(!now.services.is_known());
    let value = TunnelNode {
        devices: BTreeMap::new(),
        candidates: vec!["192.0.2.1".parse().unwrap()],
        outside: BTreeSet::new(),
        prefixes: BTreeSet::new(),
        unreached: BTreeSet::new(),
    };
    // The policy counts a moment after it was applied. Another value each time: one that is there is not written.
    let foreign = async {
        for number in 1..u32::MAX {
            let value = TunnelNode {
                candidates: vec![Ipv4Addr::from(0xc000_0200 + number % 256).into()],
                ..value.clone()
            };
            match api.write_tunnel_node(&node("n2"), &value).await {
                Err(Error::Refused { cause, .. }) => return cause,
                other => assert!(other.is_ok(), "{other:?}"),
            }
            server.kubectl(&["delete", "tunnelnode", "n2", "--ignore-not-found"]).unwrap();
        }
        unreachable!()
    };
    let cause = tokio::time::timeout(crate::server::PATIENCE, foreign).await.expect("another's is refused");
    assert!(cause.contains("only the TunnelNode of its own node") && cause.contains("n1"), "{cause}");
    assert_eq!(api.write_tunnel_node(&node("n1"), &value).await.unwrap().written, 2);
    assert!(get(&client, "tombolo.dev/v1alpha1", "TunnelNode", "", "n2").await.is_none());
    // Nor what another node reaches.
    let n2 = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "TunnelNode",
        "metadata": { "name": "n2" }, "spec": { "devices": [] },
    });
    apply(&client, n2.clone()).await;
    let own = token(&server, "tombolo-node", Some("agent-n1"));
    let own = server.client(server.kubeconfig("n1-again", &own)).await;
    let status = json!({ "status": { "conditions": [] } });
    let patch = Patch::Merge(&status);
    let refused = api_of(&own, &n2).patch_status("n2", &PatchParams::default(), &patch).await;
    let refused = refused.expect_err("another's status is refused").to_string();
    assert!(refused.contains("only the TunnelNode of its own node"), "{refused}");
    api_of(&own, &n2).patch_status("n1", &PatchParams::default(), &patch).await.unwrap();
    // A token that was stolen off no pod is no node's.
    let loose = connect(&server, "loose", &token(&server, "tombolo-node", None), true).await;
    until(&mut loose.observe(), "what there is", |now| now.tunnel_nodes.is_known()).await;
    let other = TunnelNode { candidates: Vec::new(), ..value.clone() };
    let refused = loose.write_tunnel_node(&node("n1"), &other).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    // It is no controller.
    let refused = api.cluster_key().await.err().expect("the key is not a node's");
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    let refused =
        api.write_imports([(key("shop/web"), import(&["10.96.0.9"]))].into(), BTreeSet::new()).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");

    // The controller writes what is ours, and no Service of a user's.
    let api = connect(&server, "controller", &token(&server, "tombolo-controller", None), false).await;
    let mut observed = api.observe();
    until(&mut observed, "what a controller needs", |now| {
        now.exports.is_known()
            && now.services.is_known()
            && now.derived.is_known()
            && now.imports.is_known()
            && now.slices.is_known()
            && now.namespaces.is_known()
            && now.members.is_known()
            && now.member_nodes.is_known()
            && now.nodes.is_known()
            && now.tunnel_nodes.is_known()
            && now.clusterset.is_known()
            && now.findings.is_empty()
    })
    .await;
    let web = key("shop/web");
    let services = || BTreeMap::from([(web.clone(), derived(&[], &[Family::V4]))]);
    let made = api.write_derived(services(), BTreeSet::new()).await.unwrap();
    let ip = made[&web].ips[0].to_string();
    api.write_imports([(web.clone(), import(&[&ip]))].into(), BTreeSet::new()).await.unwrap();
    assert!(api.cluster_key().await.unwrap().is_none());
    assert!(api.lease().await.unwrap().is_none());
    assert_eq!(api.delete_tunnel_node(&node("n1")).await.unwrap().deleted, 1);
    api.write_derived(BTreeMap::new(), [web.clone()].into()).await.unwrap();
    apply(
        &client,
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "users", "namespace": "shop" },
            "spec": { "ports": [{ "port": 80 }] },
        }),
    )
    .await;
    let as_controller = server.kubeconfig("controller", &token(&server, "tombolo-controller", None));
    let refused = server.kubectl(&[
        "--kubeconfig",
        as_controller.to_str().unwrap(),
        "delete",
        "service",
        "users",
        "-n",
        "shop",
    ]);
    assert!(refused.as_ref().is_err_and(|text| text.contains("made itself")), "{refused:?}");
}
