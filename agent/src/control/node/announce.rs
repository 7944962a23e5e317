//! What a node says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::TunnelNode;
use tombolo_agent_core::outside::Outside;
use tombolo_agent_core::world::MemberNodes;
use tombolo_proto::model::{ClusterId, Device, DeviceNumber, Endpoint, Family, Prefix};
use tracing::{info, warn};

use super::Node;
use crate::api::Observed;
use crate::observe::member::Members;
use crate::observe::netlink::Underlay;

impl Node {
    /// Where other clusters see this node; it goes on from what was told before this agent's start.
    pub(super) fn outside(
        &mut self,
        state: &mut Option<Outside>,
        now: Duration,
        observed: &Observed,
        underlay: &Underlay,
    ) -> BTreeSet<IpAddr> {
        let Some(tunnel_nodes) = observed.tunnel_nodes.get() else { return BTreeSet::new() };
        let state = state.get_or_insert_with(|| {
            tunnel_nodes.get(&self.name).map(|told| Outside::new(&told.outside)).unwrap_or_default()
        });
        let node = observed.nodes.get().and_then(|nodes| nodes.get(&self.name));
        let own = underlay.addresses.iter().chain(node.into_iter().flat_map(|node| &node.addresses));
        state.handle(now, &self.seen.borrow_and_update(), &own.copied().collect());
        state.value(now)
    }

    /// Says what this node is, where the cluster's controller reads it. False if that failed.
    pub(super) async fn announce(
        &mut self,
        observed: &Observed,
        underlay: &Underlay,
        members: Option<&Arc<Members>>,
        unreached: Option<&BTreeSet<ClusterId>>,
        outside: &BTreeSet<IpAddr>,
    ) -> bool {
        let Some(tunnel_nodes) = observed.tunnel_nodes.get() else { return true };
        let Known::Yes(Some(clusterset)) = &observed.clusterset else { return true };
        let Some(nodes) = observed.nodes.get() else { return true };
        // The controller removes what a node says that is not there; it would be said again, without end.
        let Some(node) = nodes.get(&self.name) else {
            let problem =
                format!("there is no Node object named {}: make one, or correct --node-name", self.name);
            self.shown.check("node", Some(problem));
            return true;
        };
        self.shown.check("node", None);
        let own = members.and_then(|members| members.nodes.get(&clusterset.cluster));
        let published = tunnel_nodes.get(&self.name);
        let devices = self.keys.public(published.map(|published| &published.devices));
        let mut value = tunnel_node(node, underlay, own, devices);
        // What is not steady yet stays as it was told.
        let before = || published.map(|published| &published.unreached);
        value.unreached = unreached.or_else(before).cloned().unwrap_or_default();
        value.outside = outside.clone();
        if published != Some(&value) || self.untold {
            self.untold = true;
            match self.api.write_tunnel_node(&self.name, &value).await {
                Ok(written) if written.is_nothing() => self.untold = false,
                Ok(_) => {
                    self.untold = false;
                    info!(candidates = ?value.candidates, outside = ?value.outside, "told what this node is")
                }
                Err(error) => {
                    warn!("cannot tell what this node is, retrying: {error}");
                    return false;
                }
            }
        }
        true
    }
}

/// What a node says of itself. Without `spec.podCIDRs` its pods are where its own routes lead, but a subnet that it
/// shares with other nodes is not its own.
fn tunnel_node(
    node: &tombolo_agent_core::object::Node,
    underlay: &Underlay,
    own: Option<&MemberNodes>,
    devices: BTreeMap<DeviceNumber, Device>,
) -> TunnelNode {
    let mut candidates = node.addresses.clone();
    for address in &underlay.addresses {
        if !candidates.contains(address) {
            candidates.push(*address);
        }
    }
    for family in Family::ALL {
        let mut count = 0;
        candidates.retain(|a| {
            count += usize::from(Family::of(*a) == family);
            Family::of(*a) != family || count <= Endpoint::MAX_CANDIDATES
        });
    }
    let mut prefixes = node.pod_cidrs.clone();
    if prefixes.is_empty()
        && let Some(own) = own
    {
        let shared = |p: &Prefix| underlay.addresses.iter().chain(&node.addresses).any(|a| p.contains(*a));
        let ranges = underlay.pod_ranges(&own.owned).into_iter().filter(|p| !shared(p));
        // One more than is stated, so that the controller says that it is too many.
        prefixes = ranges.take(Endpoint::MAX_PREFIXES + 1).collect();
    }
    TunnelNode { devices, candidates, outside: BTreeSet::new(), prefixes, unreached: BTreeSet::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_pod_cidrs_tells_where_its_routes_lead() {
        let node = |cidrs: &[&str]| tombolo_agent_core::object::Node {
            gateway: false,
            ready: true,
            pod_cidrs: cidrs.iter().map(|p| p.parse().unwrap()).collect(),
            addresses: vec!["10.1.0.5".parse().unwrap()],
        };
        let nets = |list: &[&str]| list.iter().map(|p| p.parse().unwrap()).collect::<BTreeSet<Prefix>>();
        let underlay = Underlay {
            addresses: vec!["10.1.0.5".parse().unwrap()],
            mtu: 1500,
            // The nodes' subnet, this node's pods, and something that is nobody's pods.
            local: ["10.1.0.0/24", "10.1.3.0/24", "192.168.0.0/24"].map(|n| n.parse().unwrap()).into(),
        };
        let own = MemberNodes {
            serial: 1,
            owned: nets(&["10.1.0.0/16"]),
            tunnel: BTreeSet::new(),
            nodes: BTreeMap::new(),
        };
        let told = |cidrs: &[&str], own| tunnel_node(&node(cidrs), &underlay, own, BTreeMap::new()).prefixes;
        assert_eq!(told(&[], Some(&own)), nets(&["10.1.3.0/24"]));
        assert_eq!(told(&["10.1.9.0/24"], Some(&own)), nets(&["10.1.9.0/24"]));
        assert_eq!(told(&[], None), nets(&[]));
    }
}
