//! A backend on its node's own network: reached by name from every cluster, its own too.

use std::time::Duration;

use anyhow::ensure;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, directory, program, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(20);
const URL: &str = "http://api-service.production.svc.clusterset.local:8080";

#[test]
fn a_backend_on_the_host_network_is_reached_from_everywhere() {
    scenario("a_backend_on_the_host_network_is_reached_from_everywhere", LIMIT, || {
        // A second worker: between plain nodes of one cluster there is no tunnel.
        let worker =
            "      - { name: eu-w2, pods: [{ name: eu-e, namespace: staging, app: other }] }\n    services:";
        let lab = Lab::build(Topology::parse(&TWO.replacen("    services:", worker, 1))?)?;
        lab.bring_up()?;
        let cluster = lab.topology().cluster("eu-west")?;
        let service = &cluster.services[0];
        let mut pod = lab.topology().pod("eu-c")?.clone();
        let node = lab.topology().node("eu-w1")?;
        (pod.v4, pod.v6) = (node.v4, node.v6);
        let manifest = directory::service_manifest(cluster, service, &[&pod], |_| true);
        let name = format!("service-{}-{}.yaml", service.namespace, service.name);
        directory::put(&lab.cluster_dir("eu-west").join("manifests"), &name, &manifest)?;
        lab.start("eu-w1", "serve", &program::serve("on-the-host")?)?;
        lab.export("eu-west", "production", "api-service")?;
        for place in ["us-a", "us-c", "eu-a", "eu-d", "eu-e", "eu-w2", "us-w1"] {
            for family in ["-4", "-6"] {
                wait_until(&format!("{place} to be answered {family}"), SOON, || {
                    let answer = lab.fetch(place, &format!("{URL}/health"), &[family, "--timeout", "2"])?;
                    ensure!(answer.body.contains("on-the-host"), "{place} was answered {}", answer.body);
                    Ok(())
                })?;
            }
        }
        Ok(())
    });
}
