//! The lab's real Kubernetes by itself, and Tombolo on it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tombolo_lab::kubernetes::conformance;
use tombolo_lab::topology::{KUBERNETES, Proxy};
use tombolo_lab::{Lab, Topology, host, scenario_kubernetes, wait_until};

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
