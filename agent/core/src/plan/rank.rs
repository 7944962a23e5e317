//! Who carries the cluster's traffic.

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{Endpoint, NodeName, Rank};

use super::findings::Findings;
use crate::object::{Node, TunnelNode};
use crate::world::ClusterWorld;

/// Gateways when no node is labelled.
const UNLABELLED: usize = 2;

/// Ranks of gateways. Labelled nodes are gateways as long as they exist; with no label at all two Ready nodes, lowest by
/// name, who stay while they are ready. A rank once given stays with its node while that is a gateway.
pub(crate) fn ranks(
    world: &ClusterWorld,
    both: &BTreeMap<&NodeName, (&Node, &TunnelNode)>,
    nodes: &BTreeMap<NodeName, Node>,
    stated: &BTreeMap<NodeName, Endpoint>,
    findings: &mut Findings,
) -> BTreeMap<NodeName, Rank> {
    let object = |name: &NodeName| format!("node {}/{name}", world.cluster);
    let before = |name: &NodeName| stated.get(name).map_or(Rank::NODE, |e| e.rank);
    let labelled: Vec<&NodeName> = nodes.iter().filter(|(_, n)| n.gateway).map(|(name, _)| name).collect();
    let wanted: Vec<&NodeName> = if labelled.is_empty() {
        // In this order: gateways that are ready, others that are, gateways that are not (better than none).
        let place = |name: &NodeName, node: &Node| match (node.ready, before(name).is_gateway()) {
            (true, true) => Some(0),
            (true, false) => Some(1),
            (false, true) => Some(2),
            (false, false) => None,
        };
        let mut order: Vec<(u8, &NodeName)> =
            both.iter().filter_map(|(&name, (node, _))| Some((place(name, node)?, name))).collect();
        order.sort_unstable();
        order.into_iter().take(UNLABELLED).map(|(_, name)| name).collect()
    } else {
        for name in labelled.iter().filter(|name| !both.contains_key(**name)) {
            let text = "is labelled as a gateway, but no agent runs there";
            findings.warning("GatewayWithoutAgent", object(name), text);
        }
        labelled.into_iter().filter(|name| both.contains_key(name)).collect()
    };

    let mut ranks: BTreeMap<NodeName, Rank> = BTreeMap::new();
    let mut free: BTreeSet<Rank> = Rank::GATEWAYS.into_iter().collect();
    for &name in &wanted {
        if free.remove(&before(name)) {
            ranks.insert(name.clone(), before(name));
        }
    }
    for &name in &wanted {
        if ranks.contains_key(name) {
            continue;
        }
        if let Some(rank) = free.pop_first() {
            ranks.insert(name.clone(), rank);
        } else {
            let text = "is labelled as a gateway, but a cluster has three at most; it is a plain node until one of them goes";
            findings.warning("TooManyGateways", object(name), text);
        }
    }
    ranks
}
