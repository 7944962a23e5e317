//! This node and its cluster as the agent sees them: the same world, planned again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use tombolo_agent::api::{ClusterSet, Observed};
use tombolo_agent::control::node::Node;
use tombolo_agent::observe::member::{Members, Verifier, verified_revocations};
use tombolo_agent::observe::netlink::Underlay;
use tombolo_agent_core::desired::{NodeDesired, TunnelDevice};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::plan;
use tombolo_agent_core::plan::eligible::unreached;
use tombolo_agent_core::world::{Health, MemberNodes, NodeWorld};
use tombolo_proto::model::{ClusterId, DeviceNumber, NodeName};
use tombolo_proto::trust::RootChain;

/// What is known on this node, and what it should do.
pub(in crate::command) struct Here {
    pub(in crate::command) observed: Observed,
    pub(in crate::command) set: ClusterSet,
    pub(in crate::command) members: Arc<Members>,
    pub(in crate::command) world: NodeWorld,
    pub(in crate::command) desired: NodeDesired,
    /// Clusters whose grants up to a serial were taken back.
    pub(in crate::command) revoked: BTreeMap<ClusterId, u64>,
}

impl Here {
    /// Plans as the agent of `node` does. `found`: what that agent found out of its peers, if it could be asked.
    pub(in crate::command) fn of(
        observed: Observed,
        node: Option<&NodeName>,
        underlay: &Underlay,
        found: Option<Health>,
    ) -> Result<Self> {
        let set = match &observed.clusterset {
            Known::Yes(Some(set)) => set.clone(),
            Known::Yes(None) => bail!("it is no member of a set yet: tombolo join @TOKEN"),
            Known::No => bail!("state/ cannot be read: tombolo status tells why"),
        };
        let mut verifier = Verifier::default();
        verifier.set_addresses(&underlay.addresses);
        let members = verifier.verify(&observed);
        let Known::Yes(known) = &members else { bail!("the members of the set cannot be read") };
        let node = match node {
            Some(node) => node.clone(),
            // What is asked for then is the same for every node.
            None => NodeName::new("localhost").context("a node's name")?,
        };
        let (mut world, _) = Node::world(&node, &observed, underlay, &members).context("it is no member")?;
        let asked = found.is_some();
        world.health = found.unwrap_or_default();
        let (mut desired, _) = plan::node(&world);
        let told = observed.tunnel_nodes.get().and_then(|nodes| nodes.get(&node));
        let unreached = told.map(|told| told.unreached.clone()).unwrap_or_default();
        if let Some(devices) = desired.devices.get().filter(|_| !asked && !unreached.is_empty()) {
            world.health = health(&world, devices, &unreached);
            (desired, _) = plan::node(&world);
        }
        let revoked = RootChain::pinned(set.set, &set.roots)
            .ok()
            .and_then(|roots| verified_revocations(&roots, &set, &mut Vec::new()))
            .map(|list| list.up_to.clone())
            .unwrap_or_default();
        Ok(Self { set, members: known.clone(), world, desired, revoked, observed })
    }

    /// The own cluster's ranges and nodes, as stated.
    pub(super) fn own(&self) -> Option<&MemberNodes> {
        self.members.nodes.get(&self.set.cluster)
    }

    /// Clusters that no way from this node leads to, as far as is known.
    pub(super) fn unreached(&self) -> BTreeSet<ClusterId> {
        let none = BTreeMap::new();
        unreached(&self.world, self.desired.devices.get().unwrap_or(&none))
    }

    /// Whose ranges an address lies in.
    pub(super) fn owner(&self, address: IpAddr) -> Option<(&ClusterId, &MemberNodes)> {
        let has = |m: &MemberNodes| m.owned.iter().chain(&m.tunnel).any(|p| p.contains(address));
        self.members.nodes.iter().find(|(_, m)| has(m))
    }

    /// Clusters that were taken out and are not members (again).
    pub(super) fn taken_out(&self) -> Vec<String> {
        let gone = |id: &&ClusterId| !self.members.nodes.contains_key(*id);
        self.revoked.keys().filter(gone).map(|id| format!("{id} was revoked")).collect()
    }

    /// Why a cluster does not count here; None if it does.
    pub(super) fn refused(&self, cluster: &ClusterId) -> Option<String> {
        if self.members.nodes.contains_key(cluster) {
            return None;
        }
        Some(if self.revoked.contains_key(cluster) {
            format!("cluster {cluster} was revoked by the administrator")
        } else if self.observed.members.get().is_some_and(|members| members.contains_key(cluster)) {
            format!("cluster {cluster} is refused here: tombolo status tells why")
        } else {
            format!("cluster {cluster} is not known here")
        })
    }
}

/// Such that these clusters are not reached: what the node found out itself is known to its agent alone.
fn health(
    world: &NodeWorld,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    unreached: &BTreeSet<ClusterId>,
) -> Health {
    let mut health = Health::default();
    for (number, device) in devices {
        for (key, peer) in &device.peers {
            if unreached.contains(&peer.node.cluster) {
                health.dead.insert((*number, *key));
            } else if peer.node.cluster == world.cluster {
                health.unreachable.insert(peer.node.node.clone(), unreached.clone());
            }
        }
    }
    health
}
