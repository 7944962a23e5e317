//! Observing and writing: round trips, repairs, conflicts, and nothing at rest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tombolo_agent::api::kubernetes::{Access, Kubernetes, Scope};
use tombolo_agent::api::{Applied, ClusterApi, ClusterSet, Error, Lease, Member, Observed};
use tombolo_agent_core::known::{Known, Objects};
use tombolo_agent_core::object::{
    Condition, DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::standing::Standing;
use tombolo_agent_core::world::{Reach, Topology};
use tombolo_proto::model::{
    Backend, Device, DeviceNumber, Family, NodeName, Port, Protocol, Record, RecordKey, ServiceType,
    WireguardKey,
};
use tombolo_proto::testing::{cluster, membership, set};

use crate::server::{PATIENCE, Server, api_of, apply, get};

/// Both roles of node n1.
pub(crate) async fn connect(server: &Server) -> Kubernetes {
    connect_as(server.admin_kubeconfig()).await
}

/// The same as whoever a kubeconfig is of.
pub(crate) async fn connect_as(kubeconfig: PathBuf) -> Kubernetes {
    let scope = Scope { node: node("n1"), is_node: true, controller: true };
    Kubernetes::connect(&Access::Kubeconfig(kubeconfig), &scope).await.unwrap()
}

/// Waits until what is observed is as it should be.
pub(crate) async fn until(
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
    what: &str,
    good: impl Fn(&Observed) -> bool,
) -> std::sync::Arc<Observed> {
    let wait = async {
        loop {
            let now = observed.borrow_and_update().clone();
            if good(&now) {
                return now;
            }
            observed.changed().await.unwrap();
        }
    };
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(now) => now,
        Err(_) => panic!("{what} was not observed; instead: {:#?}", observed.borrow()),
    }
}

pub(crate) fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

pub(crate) fn key(text: &str) -> ServiceKey {
    let (namespace, name) = text.split_once('/').unwrap();
    ServiceKey { namespace: namespace.parse().unwrap(), name: name.parse().unwrap() }
}

fn port(name: &str, port: u16) -> Port {
    Port { name: Some(name.parse().unwrap()), protocol: Protocol::Tcp, port, app_protocol: None }
}

pub(crate) fn import(ips: &[&str]) -> Import {
    Import {
        kind: ServiceType::ClusterSetIP,
        ports: vec![port("http", 80)],
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::from([("team".to_owned(), "blue".to_owned())]),
        annotations: BTreeMap::new(),
        clusters: [cluster("eu"), cluster("us")].into(),
        preferences: Default::default(),
    }
}

pub(crate) fn derived(ips: &[&str], families: &[Family]) -> DerivedService {
    DerivedService {
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        families: families.to_vec(),
        ports: vec![port("http", 80)],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
    }
}

fn slice() -> (SliceKey, Slice) {
    let backend = Backend {
        address: "10.2.0.5".parse().unwrap(),
        hostname: None,
        ready: true,
        serving: true,
        terminating: false,
    };
    let key = SliceKey { service: key("shop/web"), source: cluster("us"), family: Family::V4, index: 0 };
    (key, Slice { ports: vec![port("http", 8080)], backends: vec![backend], derived: true })
}

fn lease(epoch: u64) -> Lease {
    Lease { holder: Some("a".to_owned()), duration: 15, acquired: 1, renewed: 1, transitions: 0, epoch }
}

/// Changes an object as a user would.
async fn edit(client: &Client, api_version: &str, kind: &str, name: &str, patch: Value) {
    let object = json!({ "apiVersion": api_version, "kind": kind, "metadata": { "namespace": "shop" } });
    let api = api_of(client, &object);
    api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
}

const MCS: &str = "multicluster.x-k8s.io/v1beta1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_people_write_is_observed_and_what_is_written_is_kept_so() {
    let Some(server) = Server::start().await else { return };
    let client = server.install().await;
    let api = connect(&server).await;
    let mut observed = api.observe();
    let told = |now: &Observed| {
        now.nodes.is_known()
            && now.services.is_known()
            && now.exports.is_known()
            && now.imports.is_known()
            && now.slices.is_known()
            && now.derived.is_known()
            && now.clusterset == Known::Yes(None)
            && !now.service_ranges.is_empty()
    };
    let now = until(&mut observed, "everything", told).await;
    assert_eq!(now.service_ranges.len(), 2, "{:?}", now.service_ranges);

    people(&client, &mut observed).await;
    services(&client, &api, &mut observed).await;
    imports(&client, &api, &mut observed).await;
    adoption(&client, &api, &mut observed).await;
    older_definitions(&server, &client, &api, &mut observed).await;
    statuses(&client, &api, &mut observed).await;
    events(&server, &api, &mut observed).await;
    own_kinds(&server, &api, &mut observed).await;
    properties(&client, &api).await;
    lead(&api).await;
}

/// mcs 44 to 47.
async fn properties(client: &Client, api: &Kubernetes) {
    let wanted = BTreeMap::from([("cluster.clusterset.k8s.io", "eu".to_owned())]);
    let value = async || {
        let found =
            get(client, "about.k8s.io/v1alpha1", "ClusterProperty", "", "cluster.clusterset.k8s.io").await;
        found.map(|object| object["spec"]["value"].as_str().unwrap().to_owned())
    };
    // The kind may not be listed yet, and what was written is told a moment later.
    let start = Instant::now();
    while value().await.as_deref() != Some("eu") || !api.apply_properties(&wanted).await.unwrap().is_nothing()
    {
        api.apply_properties(&wanted).await.unwrap();
        assert!(start.elapsed() < PATIENCE, "the property is not written");
    }
    while value().await.is_some() {
        api.apply_properties(&BTreeMap::new()).await.unwrap();
        assert!(start.elapsed() < PATIENCE, "the property stays");
    }
}

async fn people(client: &Client, observed: &mut watch::Receiver<std::sync::Arc<Observed>>) {
    apply(
        client,
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": "n1", "labels": { "tombolo.dev/gateway": "true" } },
            "spec": { "podCIDRs": ["10.1.1.0/24"] },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] },
        }),
    )
    .await;
    apply(
        client,
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "shop" },
            "spec": { "ports": [{ "name": "http", "port": 80 }] },
        }),
    )
    .await;
    apply(
        client,
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" },
            },
            "ports": [{ "name": "http", "port": 8080 }],
            "endpoints": [{ "addresses": ["10.1.1.5"] }],
        }),
    )
    .await;
    apply(
        client,
        json!({
            "apiVersion": "multicluster.x-k8s.io/v1alpha1", "kind": "ServiceExport",
            "metadata": { "name": "web", "namespace": "shop" },
        }),
    )
    .await;
    let web = key("shop/web");
    let now = until(observed, "an export with its Service, backends and node", |now| {
        let has = |known: Option<bool>| known == Some(true);
        has(now.exports.get().map(|all| all.contains_key(&web)))
            && has(now.services.get().map(|all| all.contains_key(&web)))
            && has(now.backends.get().map(|all| all.contains_key(&web)))
            && has(now.nodes.get().map(|all| all.contains_key(&node("n1"))))
    })
    .await;
    let n1 = &now.nodes.get().unwrap()[&node("n1")];
    assert!(n1.gateway && n1.addresses == ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    assert!(now.exports.get().unwrap()[&web].created > 1_700_000_000);
    assert_eq!(now.backends.get().unwrap()[&web][0].backends.len(), 1);
}

/// The Service of an import, from its first address to the last.
async fn services(
    client: &Client,
    api: &Kubernetes,
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
) {
    let web = key("shop/web");
    let make = |value: DerivedService| {
        let web = web.clone();
        async move {
            api.write_derived([(web.clone(), value)].into(), BTreeSet::new())
                .await
                .map(|all| all[&web].clone())
        }
    };
    let first = make(derived(&[], &[Family::V4])).await.unwrap();
    assert!(first.ips.len() == 1 && first.ips[0].to_string().starts_with("10.96."), "{first:?}");
    let name = tombolo_agent::api::kind::derived::name(&web);
    let there = get(client, "v1", "Service", "shop", &name).await.unwrap();
    assert_eq!(there.pointer("/spec/selector"), None);
    // At rest: nothing is written.
    assert_eq!(make(first.clone()).await.unwrap(), first);
    assert_eq!(get(client, "v1", "Service", "shop", &name).await.unwrap(), there);
    until(observed, "the Service", |now| now.derived.get().and_then(|all| all.get(&web)) == Some(&first))
        .await;
    // Whatever somebody does to it is undone.
    edit(
        client,
        "v1",
        "Service",
        &name,
        json!({ "spec": {
        "selector": { "app": "mine" }, "sessionAffinity": "ClientIP", "externalIPs": ["192.0.2.9"],
        "trafficDistribution": "PreferClose",
    } }),
    )
    .await;
    until(observed, "the edit", |now| now.derived.get().and_then(|all| all.get(&web)) != Some(&first)).await;
    assert_eq!(make(first.clone()).await.unwrap(), first);
    let now = get(client, "v1", "Service", "shop", &name).await.unwrap();
    for field in ["selector", "externalIPs", "trafficDistribution"] {
        assert_eq!(now.pointer(&format!("/spec/{field}")), None, "{now}");
    }
    // Deleted, it comes back with its address.
    let services = api_of(
        client,
        &json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "shop" } }),
    );
    services.delete(&name, &DeleteParams::default()).await.unwrap();
    until(observed, "its end", |now| now.derived.get().is_some_and(Shelf::is_empty)).await;
    assert_eq!(make(first.clone()).await.unwrap(), first);
    // An address that is somebody else's by now, or of no range, gives way to another.
    services.delete(&name, &DeleteParams::default()).await.unwrap();
    until(observed, "its end", |now| now.derived.get().is_some_and(Shelf::is_empty)).await;
    let ip = first.ips[0].to_string();
    apply(
        client,
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "thief", "namespace": "shop" },
            "spec": { "clusterIP": ip, "ports": [{ "port": 80 }] },
        }),
    )
    .await;
    let second = make(first.clone()).await.unwrap();
    assert!(second.ips.len() == 1 && second.ips != first.ips, "{second:?}");
    // A second family joins the first, which stays; another first family makes it anew.
    let both =
        make(DerivedService { families: vec![Family::V4, Family::V6], ..second.clone() }).await.unwrap();
    assert!(both.ips.len() == 2 && both.ips[0] == second.ips[0], "{both:?}");
    let six = make(derived(&[], &[Family::V6])).await.unwrap();
    assert!(six.ips.len() == 1 && six.ips[0].is_ipv6(), "{six:?}");
    api.write_derived(BTreeMap::new(), [web.clone()].into()).await.unwrap();
    assert_eq!(get(client, "v1", "Service", "shop", &name).await, None);
    // A Service of a user's that bears such a name is left alone.
    let users = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "shop" },
        "spec": { "ports": [{ "port": 80 }] },
    });
    apply(client, users.clone()).await;
    until(observed, "the user's", |now| {
        now.derived.get().is_some_and(Shelf::is_empty)
            && now.services.get().is_some_and(|all| all.keys().any(|key| key.name.as_str() == name))
    })
    .await;
    let refused = make(derived(&[], &[Family::V4])).await;
    assert!(matches!(refused, Err(Error::Object { .. })), "{refused:?}");
    services.delete(&name, &DeleteParams::default()).await.unwrap();
    until(observed, "its end", |now| {
        now.services.get().is_some_and(|all| all.keys().all(|key| key.name.as_str() != name))
    })
    .await;
    // What took the place of ours a moment ago, whether or not that was told yet, is not removed.
    for _ in 0..20 {
        make(derived(&[], &[Family::V4])).await.unwrap();
        services.delete(&name, &DeleteParams::default()).await.unwrap();
        apply(client, users.clone()).await;
        api.write_derived(BTreeMap::new(), [web.clone()].into()).await.unwrap();
        services.delete(&name, &DeleteParams::default()).await.expect("the user's Service was removed");
        until(observed, "its end", |now| {
            now.derived.get().is_some_and(Shelf::is_empty)
                && now.services.get().is_some_and(|all| all.keys().all(|key| key.name.as_str() != name))
        })
        .await;
    }
}

async fn imports(
    client: &Client,
    api: &Kubernetes,
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
) {
    let web = key("shop/web");
    let wanted = import(&["10.96.0.77"]);
    let write = |import: Import| api.write_imports([(key("shop/web"), import)].into(), BTreeSet::new());
    assert_eq!(write(wanted.clone()).await.unwrap(), Applied { written: 1, deleted: 0 });
    until(observed, "the import", |now| now.imports.get().and_then(|all| all.get(&web)) == Some(&wanted))
        .await;
    let there = get(client, MCS, "ServiceImport", "shop", "web").await.unwrap();
    assert_eq!(there.pointer("/status/conditions/0/type"), Some(&json!("Ready")));
    assert_eq!(there.pointer("/status/conditions/0/status"), Some(&json!("True")));
    assert_eq!(there.pointer("/status/clusters"), Some(&json!([{ "cluster": "eu" }, { "cluster": "us" }])));
    assert_eq!(there.pointer("/status/endpointSliceObjects"), Some(&json!("Present")));
    // At rest: nothing is written.
    assert!(write(wanted.clone()).await.unwrap().is_nothing());
    assert_eq!(get(client, MCS, "ServiceImport", "shop", "web").await.unwrap(), there);
    // mcs 8: whatever somebody does to it is undone, labels too.
    edit(client, MCS, "ServiceImport", "web", json!({
        "metadata": { "labels": { "foreign": "label", "team": "red" } },
        "spec": { "ports": [{ "name": "x", "protocol": "TCP", "port": 99 }], "sessionAffinity": "ClientIP" },
    }))
    .await;
    let status = json!({ "status": { "clusters": [{ "cluster": "mallory" }] } });
    let imports = api_of(
        client,
        &json!({ "apiVersion": MCS, "kind": "ServiceImport", "metadata": { "namespace": "shop" } }),
    );
    imports.patch_status("web", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    until(observed, "the edits", |now| {
        now.imports.get().and_then(|all| all.get(&web)).is_some_and(|import| {
            import.clusters == [cluster("mallory")].into() && import.labels.contains_key("foreign")
        })
    })
    .await;
    assert_eq!(write(wanted.clone()).await.unwrap().written, 1);
    until(observed, "the repair", |now| now.imports.get().and_then(|all| all.get(&web)) == Some(&wanted))
        .await;

    let (slice_key, value) = slice();
    let slices = || BTreeMap::from([(slice_key.clone(), value.clone())]);
    assert_eq!(api.write_slices(slices(), BTreeSet::new()).await.unwrap().written, 1);
    until(observed, "the slice", |now| now.slices.get() == Some(&slices().into())).await;
    assert!(api.write_slices(slices(), BTreeSet::new()).await.unwrap().is_nothing());
    let name = tombolo_agent::api::kind::slice::name(&slice_key);
    let there = get(client, "discovery.k8s.io/v1", "EndpointSlice", "shop", &name).await.unwrap();
    let labels = there.pointer("/metadata/labels").unwrap();
    let service = tombolo_agent::api::kind::derived::name(&web);
    assert_eq!(labels["kubernetes.io/service-name"], json!(service), "mcs 27");
    assert_eq!(labels["multicluster.kubernetes.io/source-cluster"], "us", "mcs 24");
    // Names that nobody has are no error; all go at once.
    api.write_slices(BTreeMap::new(), [slice_key.clone()].into()).await.unwrap();
    assert!(api.write_slices(BTreeMap::new(), [slice_key].into()).await.unwrap().is_nothing());
    assert_eq!(api.apply_imports(&Objects::default()).await.unwrap().deleted, 1);
    until(observed, "no import", |now| now.imports.get().is_some_and(|imports| imports.is_empty())).await;
}

/// mcs 8 as we read it: an import that somebody else made is left alone until the set exports its name.
async fn adoption(
    client: &Client,
    api: &Kubernetes,
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
) {
    let by_hand = json!({
        "apiVersion": MCS, "kind": "ServiceImport", "metadata": { "name": "hand", "namespace": "shop" },
        "spec": { "type": "ClusterSetIP", "ips": ["198.51.100.7"], "ports": [{ "port": 1 }], "ipFamilies": ["IPv4"] },
    });
    apply(client, by_hand).await;
    let now = until(observed, "a finding on it", |now| {
        now.findings.iter().any(|f| f.reason == "ServiceImportByHand" && f.object.contains("shop/hand"))
    })
    .await;
    assert!(now.imports.get().unwrap().is_empty());
    let hand = key("shop/hand");
    assert!(api.write_imports(BTreeMap::new(), [hand.clone()].into()).await.unwrap().is_nothing());
    assert!(get(client, MCS, "ServiceImport", "shop", "hand").await.is_some());
    let wanted = import(&["10.96.0.78"]);
    api.write_imports([(hand.clone(), wanted.clone())].into(), BTreeSet::new()).await.unwrap();
    until(observed, "it adopted", |now| {
        now.imports.get().and_then(|all| all.get(&hand)) == Some(&wanted)
            && !now.findings.iter().any(|f| f.reason == "ServiceImportByHand")
    })
    .await;
    assert_eq!(api.write_imports(BTreeMap::new(), [hand].into()).await.unwrap().deleted, 1);
}

/// Definitions of ServiceImports before mcs-api v0.5.2, which another implementation may have installed.
async fn older_definitions(
    server: &Server,
    client: &Client,
    api: &Kubernetes,
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
) {
    let of = |version| {
        let field = "schema/openAPIV3Schema/properties/status/properties/endpointSliceObjects";
        json!({ "op": "remove", "path": format!("/spec/versions/{version}/{field}") })
    };
    let patch = json!([of(0), of(1)]).to_string();
    let name = "serviceimports.multicluster.x-k8s.io";
    server.kubectl(&["patch", "crd", name, "--type=json", "-p", &patch]).unwrap();
    let probe = json!({
        "apiVersion": MCS, "kind": "ServiceImport", "metadata": { "name": "probe", "namespace": "shop" },
        "spec": { "type": "Headless" }, "status": { "endpointSliceObjects": "Present" },
    });
    let imports = api_of(client, &probe);
    let params = PatchParams { dry_run: true, ..PatchParams::apply("somebody") };
    let start = Instant::now();
    while imports.patch("probe", &params, &Patch::Apply(&probe)).await.is_ok() {
        assert!(start.elapsed() < PATIENCE, "the older definition is not served");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (old, wanted) = (key("shop/old"), import(&["10.96.0.79"]));
    let write = || api.write_imports([(old.clone(), wanted.clone())].into(), BTreeSet::new());
    assert_eq!(write().await.unwrap().written, 1);
    until(observed, "the import", |now| now.imports.get().and_then(|all| all.get(&old)) == Some(&wanted))
        .await;
    assert!(write().await.unwrap().is_nothing());
    let there = get(client, MCS, "ServiceImport", "shop", "old").await.unwrap();
    assert_eq!(there.pointer("/status/endpointSliceObjects"), None);
    assert_eq!(there.pointer("/status/conditions/0/type"), Some(&json!("Ready")));
    assert_eq!(api.write_imports(BTreeMap::new(), [old].into()).await.unwrap().deleted, 1);
}

async fn statuses(
    client: &Client,
    api: &Kubernetes,
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
) {
    let web = key("shop/web");
    let condition =
        |status, reason: &str| Condition { status, reason: reason.to_owned(), message: "m".to_owned() };
    let status = |list: &[(&str, Condition)]| {
        let conditions = list.iter().map(|(kind, c)| ((*kind).to_owned(), c.clone())).collect();
        BTreeMap::from([(web.clone(), ExportStatus { conditions })])
    };
    let first = status(&[("Valid", condition(true, "Valid")), ("Conflict", condition(false, "NoConflicts"))]);
    assert_eq!(api.apply_statuses(&first, 1_700_000_000).await.unwrap().written, 1);
    assert!(api.apply_statuses(&first, 1_800_000_000).await.unwrap().is_nothing());
    // What is not judged now stays; what keeps its status keeps its time.
    let second = status(&[("Valid", condition(true, "Other"))]);
    assert_eq!(api.apply_statuses(&second, 1_800_000_000).await.unwrap().written, 1);
    let now = until(observed, "both conditions", |now| {
        let known = now.statuses.get().and_then(|all| all.get(&web));
        known.is_some_and(|s| s.conditions.get("Valid").is_some_and(|c| c.reason == "Other"))
    })
    .await;
    assert!(now.statuses.get().unwrap()[&web].conditions.contains_key("Conflict"));
    let there = get(client, MCS, "ServiceExport", "shop", "web").await.unwrap();
    let conditions = there["status"]["conditions"].as_array().unwrap();
    assert_eq!(conditions.len(), 2);
    assert!(conditions.iter().all(|c| c["lastTransitionTime"] == "2023-11-14T22:13:20Z"), "{conditions:?}");
    // Of an export that is gone nothing is written.
    let gone = BTreeMap::from([(key("shop/nobody"), ExportStatus::default())]);
    assert!(api.apply_statuses(&gone, 0).await.unwrap().is_nothing());
}

/// What changed is told beside the object, and a Member says how its cluster stands.
async fn events(server: &Server, api: &Kubernetes, observed: &mut watch::Receiver<std::sync::Arc<Observed>>) {
    let torn =
        Condition { status: true, reason: "PortConflict".to_owned(), message: "ports differ".to_owned() };
    let conditions = [("Conflict".to_owned(), torn)].into();
    let status = BTreeMap::from([(key("shop/web"), ExportStatus { conditions })]);
    for _ in 0..2 {
        api.apply_statuses(&status, 1_800_000_000).await.unwrap();
    }
    let told = server.kubectl(&["describe", "serviceexport", "web", "-n", "shop"]).unwrap();
    let lines: Vec<&str> = told.lines().skip_while(|line| !line.starts_with("Events:")).collect();
    let count = |word: &str| lines.iter().filter(|line| line.contains(word)).count();
    assert_eq!((count("Warning"), count("PortConflict"), count("ports differ")), (1, 1, 1), "{told}");
    assert!(lines.iter().any(|line| line.contains("Normal") && line.contains("Valid")), "{told}");

    let us = cluster("us");
    api.write_member(&us, &member(2), &BTreeMap::new()).await.unwrap();
    until(observed, "the member", |now| now.members.get().is_some_and(|all| all.contains_key(&us))).await;
    let standing =
        |reached, reason| Standing { reached: Some(reached), reason, message: format!("{reason}.") };
    for (standing, written) in
        [(standing(false, "Unreached"), 1), (standing(false, "Unreached"), 0), (standing(true, "Reached"), 1)]
    {
        assert_eq!(api.write_standing(&us, &standing, 1_800_000_000).await.unwrap().written, written);
    }
    let told = server.kubectl(&["describe", "member", "us"]).unwrap();
    let shown =
        |kind: &str, reason: &str| told.lines().any(|line| line.contains(kind) && line.contains(reason));
    assert!(shown("Warning", "Unreached") && shown("Normal", "Reached"), "{told}");
    let table = server.kubectl(&["get", "members"]).unwrap();
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0][..4], ["NAME", "REACHED", "REASON", "PODS"], "{table}");
    assert_eq!(words[1][..3], ["us", "True", "Reached"], "{table}");
    api.delete_member(&us).await.unwrap();
}

fn member(serial: u64) -> Member {
    let (membership, _) = membership("us", serial, &["10.2.0.0/16"]);
    Member {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
        spoken: None,
        statement: None,
        namespaces: None,
    }
}

async fn own_kinds(
    server: &Server,
    api: &Kubernetes,
    observed: &mut watch::Receiver<std::sync::Arc<Observed>>,
) {
    let us = cluster("us");
    // More records than one shard takes.
    let record = |n: usize| {
        let key = RecordKey::new(1, &[&format!("n{n}")]).unwrap();
        (key.clone(), Record { key, body: vec![7; 3].into() })
    };
    let nodes: BTreeMap<RecordKey, Record> = (0..130).map(record).collect();
    assert_eq!(api.write_member(&us, &member(2), &nodes).await.unwrap().written, 3);
    assert!(api.write_member(&us, &member(2), &nodes).await.unwrap().is_nothing());
    until(observed, "the member", |now| {
        now.members.get().is_some_and(|all| all.get(&us) == Some(&member(2)))
            && now.member_nodes.get().and_then(|all| all.get(&us)) == Some(&nodes)
    })
    .await;
    // Nobody goes back to an older grant.
    let older = api.write_member(&us, &member(1), &nodes).await;
    assert!(matches!(older, Err(Error::Conflict { .. })), "{older:?}");
    // The first by key: all of them in the first shard.
    let few: BTreeMap<RecordKey, Record> =
        nodes.iter().take(10).map(|(k, r)| (k.clone(), r.clone())).collect();
    assert_eq!(api.write_member(&us, &member(2), &few).await.unwrap().deleted, 1);
    until(observed, "fewer nodes", |now| now.member_nodes.get().and_then(|all| all.get(&us)) == Some(&few))
        .await;
    assert_eq!(api.delete_member(&us).await.unwrap().deleted, 2);

    let device = Device { key: WireguardKey([3; 32]), port: 4510 };
    let value = TunnelNode {
        devices: [(DeviceNumber::new(0).unwrap(), device)].into(),
        candidates: vec!["192.0.2.1".parse().unwrap()],
        outside: BTreeSet::new(),
        prefixes: ["10.1.1.0/24".parse().unwrap()].into(),
        unreached: [us].into(),
    };
    // It, and its status.
    assert_eq!(api.write_tunnel_node(&node("n1"), &value).await.unwrap().written, 2);
    assert!(api.write_tunnel_node(&node("n1"), &value).await.unwrap().is_nothing());
    let reached = server.kubectl(&["get", "tunnelnode", "n1"]).unwrap();
    assert!(reached.contains("REACHED") && reached.contains("False"), "{reached}");
    server.kubectl(&["wait", "--for=condition=Reached=False", "tunnelnode/n1", "--timeout=5s"]).unwrap();
    until(observed, "the node's word", |now| {
        now.tunnel_nodes.get().and_then(|all| all.get(&node("n1"))) == Some(&value)
    })
    .await;

    let (_, roots) = set();
    let wanted = ClusterSet {
        set: roots.set(),
        cluster: cluster("eu"),
        roots: roots.envelopes().cloned().collect(),
        brokers: None,
        revocations: None,
        reach: Reach::Exports,
        topology: Topology::Gateway,
        clusterset: None,
        reserved: BTreeSet::new(),
        rotations: BTreeMap::new(),
        leaving: false,
    };
    assert_eq!(api.clusterset().await.unwrap(), None);
    let first = api.write_clusterset(&wanted, None).await.unwrap();
    let meshed = ClusterSet { topology: Topology::Mesh, ..wanted.clone() };
    let second = api.write_clusterset(&meshed, Some(&first)).await.unwrap();
    let stale = api.write_clusterset(&wanted, Some(&first)).await;
    assert!(matches!(stale, Err(Error::Conflict { .. })), "{stale:?}");
    let read = api.clusterset().await.unwrap().unwrap();
    assert_eq!((read.value, read.version), (meshed, second.clone()));
    // The API server itself refuses another set.
    let other = ClusterSet { cluster: cluster("ap"), ..wanted };
    let refused = api.write_clusterset(&other, Some(&second)).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    let now = until(observed, "the set", |now| matches!(&now.clusterset, Known::Yes(Some(_)))).await;
    let Known::Yes(Some(set)) = &now.clusterset else { panic!("unknown") };
    assert!(set.reserved.is_superset(&now.service_ranges), "nobody may own the addresses of our Services");
}

/// The Lease, and the end of a lead.
async fn lead(api: &Kubernetes) {
    assert_eq!(api.lease().await.unwrap(), None);
    let first = api.write_lease(&lease(5), None).await.unwrap();
    assert!(matches!(api.write_lease(&lease(6), None).await, Err(Error::Conflict { .. })));
    let second = api.write_lease(&lease(6), Some(&first)).await.unwrap();
    assert!(matches!(api.write_lease(&lease(7), Some(&first)).await, Err(Error::Conflict { .. })));
    let read = api.lease().await.unwrap().unwrap();
    assert_eq!((read.value, read.version.clone()), (lease(6), second));
    let (slice_key, value) = slice();
    let write = || api.write_slices([(slice_key.clone(), value.clone())].into(), BTreeSet::new());
    api.lead_as(6);
    assert_eq!(write().await.unwrap().written, 1);
    // Another takes it: within a second nothing more is written.
    api.write_lease(&lease(8), Some(&read.version)).await.unwrap();
    let gone = || api.write_slices(BTreeMap::new(), [slice_key.clone()].into());
    let taken = Instant::now();
    while !matches!(write().await, Err(Error::NotLeading)) {
        assert!(taken.elapsed() < Duration::from_secs(5), "who leads no more still writes");
    }
    api.lead_as(8);
    assert_eq!(gone().await.unwrap().deleted, 1);
}
