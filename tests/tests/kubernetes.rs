//! The lab's real Kubernetes by itself, and Tombolo on it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tombolo_lab::kubernetes::{SYSTEM, conformance, find};
use tombolo_lab::place::words;
use tombolo_lab::topology::{KUBERNETES, Proxy};
use tombolo_lab::{Lab, Topology, host, scenario_kubernetes, strict, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// What a Service of a lab cluster has for addresses.
fn addresses(lab: &Lab, cluster: &str, service: &str) -> Result<Vec<IpAddr>> {
    let path = "jsonpath={.spec.clusterIPs}";
    let text = lab.kubectl(cluster, &["get", "service", service, "-n", "production", "-o", path], "")?;
    let texts: Vec<String> = serde_json::from_str(&text).with_context(|| text.clone())?;
    texts.iter().map(|a| a.parse().with_context(|| a.clone())).collect()
}

/// The backends that answered so many requests.
fn answering(lab: &Lab, place: &str, url: &str, times: usize) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for _ in 0..times {
        let answer = lab.fetch(place, url, &["--timeout", "2"])?;
        ensure!(answer.status == 200, "{url} from {place}: {answer:?}");
        seen.insert(answer.body.trim().to_owned());
    }
    Ok(seen)
}

/// The lab's own ground: real controllers make slices of the lab's pods, kube-proxy balances in both modes and both
/// families, CoreDNS names everything.
#[test]
fn two_real_clusters_balance_and_name_their_own_services() {
    scenario_kubernetes(
        "two_real_clusters_balance_and_name_their_own_services",
        Duration::from_secs(180),
        || {
            let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
            for (cluster, node) in [("eu-west", "eu-w1"), ("us-east", "us-w1")] {
                let nodes = lab.kubectl(cluster, &["get", "nodes", "--no-headers"], "")?;
                let ready = nodes.lines().filter(|line| line.contains(" Ready ")).count();
                ensure!(ready == 2 && nodes.contains(node), "{cluster} has other nodes:\n{nodes}");
            }
            let wanted = |pods: &[&str]| pods.iter().map(|p| format!("ok {p}")).collect::<BTreeSet<_>>();
            for (cluster, pod, service, port, backends) in [
                ("eu-west", "eu-a", "api-service", 8080, wanted(&["eu-a", "eu-b"])),
                ("us-east", "us-b", "web", 80, wanted(&["us-a", "us-b"])),
            ] {
                let addresses = addresses(&lab, cluster, service)?;
                ensure!(addresses.len() == 2, "{service} of {cluster} has {addresses:?}");
                for address in addresses {
                    let url = format!("http://{}:{port}/health", host(address));
                    wait_until(&format!("both backends behind {url}"), SOON, || {
                        let seen = answering(&lab, pod, &url, 12)?;
                        ensure!(seen == backends, "{seen:?} answer");
                        Ok(())
                    })?;
                }
                let name = format!("http://{service}.production.svc.cluster.local:{port}/health");
                answering(&lab, pod, &name, 1)?;
            }
            // What the kubelet says of a pod is what decides.
            lab.set_ready("eu-b", false)?;
            let url = "http://api-service.production.svc.cluster.local:8080/health";
            wait_until("the pod that is not ready to be left out", SOON, || {
                let seen = answering(&lab, "eu-a", url, 12)?;
                ensure!(seen == wanted(&["eu-a"]), "{seen:?} answer");
                Ok(())
            })?;
            // A pod of a headless service has a name of its own.
            let own = answering(&lab, "eu-b", "http://eu-a.db.production.svc.cluster.local:8080/health", 1)?;
            ensure!(own == wanted(&["eu-a"]), "{own:?}");
            Ok(())
        },
    );
}

/// What the conformance suite stands on: pods that the scheduler places, reached at their own addresses, and programs
/// run in them.
#[test]
fn pods_of_kwok_answer_at_their_addresses_and_run_programs() {
    scenario_kubernetes(
        "pods_of_kwok_answer_at_their_addresses_and_run_programs",
        Duration::from_secs(180),
        || {
            let lab = Lab::build(conformance::topology(1, Proxy::Nftables)?)?;
            let kubectl = |words: &[&str]| lab.kubectl("eu-west", words, "");
            kubectl(&["create", "deployment", "hello", "--image=hello", "--replicas=2", "--port=42"])?;
            kubectl(&["expose", "deployment", "hello", "--port=42", "--name=hello"])?;
            kubectl(&["wait", "--for=condition=Available", "deployment/hello", "--timeout=30s"])?;
            let pods = kubectl(&["get", "pods", "-o", "jsonpath={.items[*].status.podIP}"])?;
            let pods: BTreeSet<_> = pods.split_whitespace().map(|ip| format!("pod ip {ip}")).collect();
            ensure!(pods.len() == 2, "{pods:?}");
            let ask =
                ["exec", "deploy/hello", "--", "sh", "-c", "echo hi | nc hello.default.svc.cluster.local 42"];
            let mut seen = BTreeSet::new();
            wait_until("both pods behind the Service", SOON, || {
                seen.insert(kubectl(&ask)?.trim().to_owned());
                ensure!(seen == pods, "{seen:?} answered, of {pods:?}");
                Ok(())
            })?;
            let name = ["exec", "deploy/hello", "--", "nslookup", "hello.default.svc.cluster.local"];
            let address = kubectl(&["get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"])?;
            let answer = kubectl(&name)?;
            ensure!(answer.contains(&address), "{address} is not in: {answer}");
            Ok(())
        },
    );
}

/// deploy/ is taken whole by a real API server.
#[test]
fn the_manifests_are_clean_under_a_server_side_dry_run() {
    scenario_kubernetes(
        "the_manifests_are_clean_under_a_server_side_dry_run",
        Duration::from_secs(120),
        || {
            let mut topology = Topology::parse(KUBERNETES)?;
            topology.clusters.truncate(1);
            let lab = Lab::build(topology)?;
            lab.install("eu-west")?;
            lab.dry_run("eu-west")
        },
    );
}

/// The whole purpose: a ServiceExport of one cluster, applied as anybody applies it, is a name in a pod of another.
#[test]
fn an_export_of_one_real_cluster_is_a_name_in_another() {
    scenario_kubernetes(
        "an_export_of_one_real_cluster_is_a_name_in_another",
        Duration::from_secs(300),
        || {
            let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
            lab.bring_up()?;
            lab.export("eu-west", "production", "api-service")?;
            let name = "api-service.production.svc.clusterset.local";
            let url = format!("http://{name}:8080/health");
            for family in ["-4", "-6"] {
                wait_until(&format!("{url} {family}"), SOON, || {
                    let answer = lab.fetch("us-b", &url, &[family, "--timeout", "2"])?;
                    ensure!(answer.status == 200, "{answer:?}");
                    Ok(())
                })
                .with_context(|| tell(&lab, "us-east"))?;
            }
            // Both backends answer, and see who asks.
            let mut seen = BTreeSet::new();
            wait_until("both backends of the other cluster", SOON, || {
                seen.extend(answering(&lab, "us-b", &url, 4)?);
                ensure!(seen.len() == 2, "{seen:?} answer");
                Ok(())
            })?;
            let own = lab.topology().pod("us-b")?.v4.to_string();
            let source = lab.fetch("us-b", &format!("http://{name}:8080/ip"), &["-4"])?;
            ensure!(source.body.trim() == own, "{own} was seen as {}", source.body.trim());
            let import = ["get", "serviceimport", "api-service", "-n", "production", "-o"];
            let clusters = lab.kubectl(
                "us-east",
                &[&import[..], &["jsonpath={.status.clusters[*].cluster}"]].concat(),
                "",
            )?;
            ensure!(clusters == "eu-west", "the import is of {clusters:?}");
            lab.unexport("eu-west", "production", "api-service")?;
            wait_until("the import to go", SOON, || {
                let left = lab.kubectl(
                    "us-east",
                    &["get", "serviceimports,services", "-n", "production", "-o", "name"],
                    "",
                )?;
                ensure!(left.trim() == "service/web", "{left}");
                Ok(())
            })?;
            Ok(())
        },
    );
}

/// What a cluster's own objects say, for an error.
fn tell(lab: &Lab, cluster: &str) -> String {
    let objects = "serviceexports,serviceimports,services,endpointslices,tunnelnodes,members";
    let told = lab.kubectl(cluster, &["get", objects, "-A"], "");
    let agents = lab.topology().nodes().filter(|n| n.cluster == cluster).map(|n| lab.tail(&n.name, "agent"));
    let controllers = (0..2).map(|n| lab.tail(&format!("controller-{cluster}-{n}"), "controller"));
    let logs: Vec<_> = agents.chain(controllers).collect();
    format!("{}\n{}", told.unwrap_or_else(|error| format!("{error:#}")), logs.join("\n"))
}

/// RBAC and policies of deploy/ as the API server holds them against a node's own token.
#[test]
fn a_node_writes_only_its_own_tunnel_node() {
    scenario_kubernetes("a_node_writes_only_its_own_tunnel_node", Duration::from_secs(240), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        let account = "/run/secrets/kubernetes.io/serviceaccount";
        let node = lab.place("eu-gw1")?;
        let token = node.capture(&["cat", &format!("{account}/token")])?;
        let (kubectl, authority) = (find("kubectl")?, format!("--certificate-authority={account}/ca.crt"));
        let token = format!("--token={}", token.trim());
        let as_node = |words: &[&str]| {
            let own = [
                &*kubectl,
                "--kubeconfig=/dev/null",
                "--server=https://10.96.0.1",
                "--cache-dir=/run/lab/state/cache",
            ];
            node.output(&[&own[..], &[&authority, &token], words].concat())
        };
        let patch = |name: &str| {
            let note = "{\"metadata\":{\"annotations\":{\"lab\":\"here\"}}}";
            as_node(&["patch", "tunnelnode", name, "--type=merge", "--patch", note])
        };
        let own = patch("eu-gw1")?;
        ensure!(own.status.success(), "{}", words(&own));
        for (what, output) in [
            ("another's TunnelNode", patch("eu-w1")?),
            ("the cluster's key", as_node(&["get", "secret", "tombolo-cluster-key", "-n", SYSTEM])?),
            ("an import", as_node(&["delete", "serviceimport", "any", "-n", "production"])?),
        ] {
            let said = words(&output);
            ensure!(!output.status.success() && said.contains("orbidden"), "{what}: {said}");
        }
        Ok(())
    });
}

/// While the API server hangs nothing is withdrawn and no packet lost; afterwards what came meanwhile is caught up.
#[test]
fn an_api_server_that_hangs_costs_nothing() {
    scenario_kubernetes("an_api_server_that_hangs_costs_nothing", Duration::from_secs(600), || {
        let lab = Lab::build(Topology::parse(KUBERNETES)?)?;
        lab.bring_up()?;
        lab.export("eu-west", "production", "api-service")?;
        let url = "http://api-service.production.svc.clusterset.local:8080/health";
        wait_until("the name in the other cluster", SOON, || answering(&lab, "us-b", url, 1).map(drop))?;
        let backend = lab.topology().pod("eu-a")?.v4;
        let flow = lab.udp_flow("us-b", backend.into(), 500)?;
        let away = Duration::from_secs(if strict() { 300 } else { 30 });
        lab.stop("api-us-east", "kube-apiserver")?;
        let start = Instant::now();
        while start.elapsed() < away {
            answering(&lab, "us-b", url, 1)
                .with_context(|| format!("{:?} into the outage", start.elapsed()))?;
        }
        let report = flow.stop_udp()?;
        ensure!(report.lost == 0, "{} of {} packets lost: {report:?}", report.lost, report.sent);
        // Said while nobody in us-east could hear it.
        lab.unexport("eu-west", "production", "api-service")?;
        lab.cont("api-us-east", "kube-apiserver")?;
        let caught = wait_until("what came meanwhile to be caught up", SOON, || {
            let left = lab.kubectl("us-east", &["get", "serviceimports", "-A", "-o", "name"], "")?;
            ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })?;
        ensure!(caught < Duration::from_secs(5) || !strict(), "caught up after {caught:?}");
        Ok(())
    });
}
