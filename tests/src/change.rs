//! Changes of a running lab: clusters and nodes that come and go.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};

use crate::directory;
use crate::lab::Lab;
use crate::program;
use crate::topology::{Cluster, Topology};

impl Lab {
    /// Builds what a larger topology has more: clusters behind those there are, nodes behind those of a cluster. No
    /// Tombolo program runs there yet.
    ///
    /// # Errors
    /// If something that is there would have to change, or cannot be made.
    pub fn grow(&mut self, topology: Topology) -> Result<()> {
        for old in &self.topology().clusters {
            let new = topology.cluster(&old.id)?;
            ensure!(new.index == old.index, "cluster {} would move: add behind those there are", old.id);
            for node in &old.nodes {
                let same = new.nodes.iter().any(|n| n.name == node.name && n.v4 == node.v4);
                ensure!(same, "node {} would move or go: add behind those there are", node.name);
            }
        }
        let before = self.replace_topology(topology.clone());
        for cluster in &topology.clusters {
            let Some(old) = before.clusters.iter().find(|old| old.id == cluster.id) else {
                self.add_cluster(cluster)?;
                self.finish_planes(std::slice::from_ref(cluster))?;
                self.serve(cluster, |_| true)?;
                continue;
            };
            if cluster.kubernetes().is_some() {
                ensure!(
                    cluster.nodes.len() == old.nodes.len(),
                    "cluster {} of api: kubernetes cannot grow",
                    cluster.id
                );
                continue;
            }
            let is_new = |name: &str| !old.nodes.iter().any(|n| n.name == name);
            for node in cluster.nodes.iter().filter(|n| is_new(&n.name)) {
                self.add_node(cluster, node)?;
                for other in &old.nodes {
                    self.place(&other.name)?.ip(&format!(
                        "route replace {} via {}\n-6 route replace {} via {}\n",
                        node.pods4, node.v4, node.pods6, node.v6
                    ))?;
                }
            }
            directory::write(&self.cluster_dir(&cluster.id), cluster)?;
            self.serve(cluster, is_new)?;
        }
        Ok(())
    }

    fn serve(&self, cluster: &Cluster, wanted: impl Fn(&str) -> bool) -> Result<()> {
        for pod in cluster.nodes.iter().filter(|n| wanted(&n.name)).flat_map(|n| &n.pods) {
            self.start(&pod.name, "serve", &program::serve(&pod.name)?)?;
        }
        Ok(())
    }

    /// Takes a node out of its cluster, as when its machine is gone for good: first it is silent, then its Node and its
    /// pods go from the API.
    ///
    /// # Errors
    /// If there is no such node, or it is gone already.
    pub fn take_node(&self, name: &str) -> Result<()> {
        let node = self.topology().node(name)?.clone();
        self.lan(&node.cluster)?.ip(&format!("link set n{} down\n", node.number))?;
        self.kill_tree(name, "agent")?;
        self.kill_tree(name, "wireguard")?;
        let manifests = self.cluster_dir(&node.cluster).join("manifests");
        std::fs::remove_file(manifests.join(format!("node-{name}.yaml")))
            .with_context(|| format!("taking node {name} away"))?;
        self.write_services(&node.cluster)
    }

    /// Puts a node that was taken out in again, as a new machine of the same name: it has forgotten everything.
    ///
    /// # Errors
    /// If there is no such node, or its programs do not start.
    pub fn give_node(&self, name: &str) -> Result<()> {
        let node = self.topology().node(name)?.clone();
        let cluster = self.topology().cluster(&node.cluster)?.clone();
        let state = self.state_dir(name);
        for entry in std::fs::read_dir(&state)?.flatten() {
            let path = entry.path();
            if path.is_dir() { std::fs::remove_dir_all(path)? } else { std::fs::remove_file(path)? }
        }
        let place = self.place(name)?;
        let _ = place.output(&["nft", "delete", "table", "inet", "tombolo"])?;
        for family in ["-4", "-6"] {
            let _ = place.output(&["ip", family, "rule", "flush", "protocol", "98"])?;
            let _ = place.output(&["ip", family, "route", "flush", "table", "all", "proto", "98"])?;
        }
        self.lan(&node.cluster)?.ip(&format!("link set n{} up\n", node.number))?;
        // What left with the link, as the CNI would put it back.
        directory::put(
            &self.cluster_dir(&node.cluster).join("manifests"),
            &format!("node-{name}.yaml"),
            &directory::node_manifest(&node),
        )?;
        self.write_services(&cluster.id)?;
        self.start(name, "wireguard", &program::wireguard()?)?;
        self.start(name, "agent", &program::agent(&node)?)
    }

    /// Whether a node is in its cluster's API.
    #[must_use]
    pub fn has_node(&self, name: &str) -> bool {
        self.topology().node(name).is_ok_and(|node| {
            self.cluster_dir(&node.cluster).join("manifests").join(format!("node-{name}.yaml")).is_file()
        })
    }

    /// The services' manifests, with the pods of the nodes that are there.
    fn write_services(&self, cluster: &str) -> Result<()> {
        let cluster = self.topology().cluster(cluster)?;
        let manifests = self.cluster_dir(&cluster.id).join("manifests");
        for service in &cluster.services {
            let pods: Vec<_> =
                directory::backends(cluster, service).filter(|pod| self.has_node(&pod.node)).collect();
            let mut name = String::new();
            let _ = write!(name, "service-{}-{}.yaml", service.namespace, service.name);
            directory::put(
                &manifests,
                &name,
                &directory::service_manifest(cluster, service, &pods, |_| true),
            )?;
        }
        Ok(())
    }
}
