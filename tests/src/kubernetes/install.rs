//! Tombolo in a cluster of `api: kubernetes`, as deploy/ installs it: its types, accounts, roles and policies as they
//! are; its programs in the places that stand for their pods, each with the token of its own pod.

use std::path::Path;

use anyhow::{Context, Result};

use super::object;
use super::pki;
use crate::lab::Lab;
use crate::program;
use crate::topology::{Cluster, ControlPlane, Node, Pod};

/// The namespace of all that deploy/ makes.
pub const SYSTEM: &str = "tombolo-system";
/// Where a pod finds its account's token, below its /run.
const ACCOUNT: &str = "secrets/kubernetes.io/serviceaccount";

/// A directory of deploy/.
fn deploy(part: &str) -> String {
    format!("{}/../deploy/{part}", env!("CARGO_MANIFEST_DIR"))
}

/// The manifests without what a kubelet would run: the lab runs that itself.
fn without_workloads(manifests: &str) -> String {
    let workload =
        |line: &str| matches!(line, "kind: Deployment" | "kind: DaemonSet" | "kind: PodDisruptionBudget");
    let kept = manifests.split("\n---\n").filter(|document| !document.lines().any(workload));
    kept.collect::<Vec<_>>().join("\n---\n")
}

impl Lab {
    /// Installs types, accounts, roles, policies and the DNS Service of deploy/, and points the cluster's DNS there.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn install(&self, cluster: &str) -> Result<()> {
        self.kubectl(cluster, &["apply", "--server-side", "--kustomize", &deploy("crds")], "")?;
        let established = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"];
        self.kubectl(cluster, &established, "")?;
        let base = self.kubectl(cluster, &["kustomize", &deploy("base")], "")?;
        let apply = ["apply", "--server-side", "--filename=-"];
        self.kubectl(cluster, &apply, &without_workloads(&base))?;
        let address = ["get", "service", "tombolo-dns", "-n", SYSTEM, "-o", "jsonpath={.spec.clusterIP}"];
        let address = self.kubectl(cluster, &address, "")?;
        self.stub_domain(
            cluster,
            address.parse().with_context(|| format!("the DNS Service has {address:?}"))?,
        )
    }

    /// All of deploy/ as the API server would take it: nothing is written.
    ///
    /// # Errors
    /// What it does not take.
    pub fn dry_run(&self, cluster: &str) -> Result<()> {
        for part in ["base", "broker"] {
            let words = ["apply", "--server-side", "--dry-run=server", "--force-conflicts", "--kustomize"];
            self.kubectl(cluster, &[&words[..], &[&deploy(part)]].concat(), "")?;
        }
        Ok(())
    }

    /// Makes a cluster a member with this token: the manifests of `tombolo join --kubernetes`, applied.
    pub(crate) fn join_kubernetes(
        &self,
        cluster: &Cluster,
        control: &ControlPlane,
        token: &str,
    ) -> Result<()> {
        self.install(&cluster.id)?;
        let line = program::join_kubernetes(cluster)?;
        let manifests = crate::member::run(self.command(&control.place, &line)?, token)?;
        self.kubectl(&cluster.id, &["apply", "--server-side", "--filename=-"], &manifests).map(drop)
    }

    /// Starts the controllers, and devices and agent on each node, each in the name of its pod.
    pub(crate) fn start_kubernetes_agents(&self, cluster: &Cluster, control: &ControlPlane) -> Result<()> {
        let nodes: Vec<_> = cluster.nodes.iter().map(|node| (node, node_pod(node))).collect();
        let controllers = control.controllers.iter().map(|pod| (pod, "tombolo-controller", false));
        let all: Vec<_> =
            controllers.chain(nodes.iter().map(|(_, pod)| (pod, "tombolo-node", true))).collect();
        let objects: Vec<_> =
            all.iter().map(|(pod, account, host)| object::agent(pod, account, *host)).collect();
        self.apply(&cluster.id, &[], &object::list(&objects))?;
        let statuses = all.iter().filter_map(|(pod, ..)| {
            let node = cluster.nodes.iter().find(|n| n.name == pod.node)?;
            Some(object::pod_status(node, pod, true))
        });
        let statuses = object::list(&statuses.collect::<Vec<_>>());
        self.apply(&cluster.id, &["--subresource=status"], &statuses)?;
        for (node, pod) in &nodes {
            self.give_account(&cluster.id, &node.name, pod, "tombolo-node")?;
            self.start(&node.name, "wireguard", &program::wireguard()?)?;
            self.start(&node.name, "agent", &agent("node", &node.name)?)?;
        }
        for pod in &control.controllers {
            self.give_account(&cluster.id, &pod.name, pod, "tombolo-controller")?;
            self.start(&pod.name, "controller", &agent("controller", &pod.name)?)?;
        }
        Ok(())
    }

    /// What a kubelet mounts into a pod: a token bound to the pod, and so to its node.
    fn give_account(&self, cluster: &str, place: &str, pod: &Pod, account: &str) -> Result<()> {
        let words = ["create", "token", account, "-n", SYSTEM, "--duration=24h", "--bound-object-kind=Pod"];
        let name = format!("--bound-object-name={}", pod.name);
        let token = self.kubectl(cluster, &[&words[..], &[&name]].concat(), "")?;
        let dir = self.run_dir(place).join(ACCOUNT);
        std::fs::create_dir_all(&dir)?;
        pki::write(&dir, "token", token.trim())?;
        pki::write(&dir, "namespace", SYSTEM)?;
        let authority = std::fs::read_to_string(self.cluster_dir(cluster).join("ca.crt"))?;
        pki::write(&dir, "ca.crt", &authority)
    }

    fn run_dir(&self, place: &str) -> std::path::PathBuf {
        Path::new(crate::sandbox::ROOT).join("node").join(place).join("run")
    }
}

/// The pod of a node's agent: on the node's own network.
fn node_pod(node: &Node) -> Pod {
    Pod {
        name: format!("tombolo-node-{}", node.name),
        namespace: SYSTEM.to_owned(),
        app: "tombolo-node".to_owned(),
        node: node.name.clone(),
        cluster: node.cluster.clone(),
        v4: node.v4,
        v6: node.v6,
    }
}

/// An agent as in deploy/base, with what a kubelet sets.
fn agent(role: &str, name: &str) -> Result<Vec<String>> {
    let line = program::agent_in_cluster(role, name)?;
    Ok(program::with(&["KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_SERVICE_PORT=443"], line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_left_out_whole() {
        let text =
            "kind: Service\nmetadata:\n  name: a\n---\nkind: DaemonSet\nspec:\n  kind: x\n---\nkind: Role\n";
        assert_eq!(without_workloads(text), "kind: Service\nmetadata:\n  name: a\n---\nkind: Role\n");
    }
}
