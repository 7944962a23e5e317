//! Own nodes as the cluster states them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{Device, DeviceNumber, Endpoint, Family, NodeName, Prefix, Rank, usable_address};

use super::findings::Findings;
use super::rank;
use super::roster::{self, hosts, is_host};
use crate::object::{Node, TunnelNode};
use crate::world::{ClusterWorld, Topology};

/// Whether other clusters hear of a node: of gateways, and under the topology `mesh` of every node that can be talked to
/// directly. The others are the own cluster's matter: they stand in its own MemberNodes and in no statement, so that a
/// cluster may have thousands of them and nobody else judges any.
pub fn is_stated(endpoint: &Endpoint) -> bool {
    endpoint.rank.is_gateway() || endpoint.mesh
}

/// Plans the own Endpoints: nodes that both the API and their agent know. None while inputs are unknown.
pub(crate) fn endpoints(
    world: &ClusterWorld,
    findings: &mut Findings,
) -> Option<BTreeMap<NodeName, Endpoint>> {
    let nodes = world.nodes.get()?;
    let tunnel_nodes = world.tunnel_nodes.get()?;
    let stated = world.stated.get()?;
    let both: BTreeMap<&NodeName, (&Node, &TunnelNode)> =
        nodes.iter().filter_map(|(name, node)| Some((name, (node, tunnel_nodes.get(name)?)))).collect();

    let ranks = rank::ranks(world, &both, nodes, stated, findings);
    let tunnel = tunnel_addresses(world, &both, stated, findings);
    let mut endpoints = BTreeMap::new();
    for (&name, (node, tunnel_node)) in &both {
        let address = |family| tunnel.get(&(name, family)).copied();
        let endpoint = Endpoint {
            node: name.clone(),
            rank: ranks.get(name).copied().unwrap_or(Rank::NODE),
            devices: devices(tunnel_node),
            candidates: candidates(node, tunnel_node),
            tunnel_v4: match address(Family::V4) {
                Some(IpAddr::V4(a)) => Some(a),
                Some(IpAddr::V6(_)) | None => None,
            },
            tunnel_v6: match address(Family::V6) {
                Some(IpAddr::V6(a)) => Some(a),
                Some(IpAddr::V4(_)) | None => None,
            },
            prefixes: prefixes(world, name, node, tunnel_node, findings),
            mesh: false,
        };
        endpoints.insert(name.clone(), endpoint);
    }
    // What two nodes claim is stated for one: every receiver would decide likewise.
    let claims =
        roster::claims(&world.cluster, &world.own.owned, &world.own.tunnel, endpoints.iter(), findings);
    let prefixes: Vec<(NodeName, BTreeSet<Prefix>)> =
        claims.into_iter().map(|(name, claim)| (name.clone(), claim.prefixes)).collect();
    for (name, prefixes) in prefixes {
        if let Some(endpoint) = endpoints.get_mut(&name) {
            endpoint.prefixes = prefixes;
            endpoint.mesh = world.topology == Topology::Mesh && !endpoint.prefixes.is_empty();
            let count = endpoint.prefixes.len();
            if endpoint.mesh && count > roster::MESH_PREFIXES {
                endpoint.mesh = false;
                let text = format!(
                    "has {count} prefixes, and {} at most are told to nodes of other clusters; it is reached over \
                     gateways",
                    roster::MESH_PREFIXES
                );
                findings.warning("MeshPrefixesTooMany", format!("node {}/{name}", world.cluster), text);
            }
        }
    }
    let meshed = endpoints.values().filter(|e| e.mesh).count();
    if meshed > roster::MESH_NODES {
        let text = format!(
            "it has {meshed} nodes that others could talk to directly, and nobody talks to more than {}: only its gateways \
             are told. Choose topology gateway for a cluster of this size",
            roster::MESH_NODES
        );
        findings.warning("MeshTooLarge", format!("cluster {}", world.cluster), text);
        endpoints.values_mut().for_each(|endpoint| endpoint.mesh = false);
    }
    Some(endpoints)
}

/// Keys and ports that receivers accept.
fn devices(node: &TunnelNode) -> BTreeMap<DeviceNumber, Device> {
    let good = |(_, d): &(&DeviceNumber, &Device)| d.port > 0 && d.key.0 != [0; 32];
    node.devices.iter().filter(good).map(|(number, device)| (*number, *device)).collect()
}

/// What the node says of itself, else its Node's addresses; then where others see it.
fn candidates(node: &Node, tunnel_node: &TunnelNode) -> Vec<IpAddr> {
    let usable = |list: &[IpAddr]| {
        let mut result: Vec<IpAddr> = Vec::new();
        for &address in list.iter().chain(&tunnel_node.outside).filter(|a| usable_address(**a).is_ok()) {
            let same = result.iter().filter(|r| r.is_ipv4() == address.is_ipv4()).count();
            if same < Endpoint::MAX_CANDIDATES && !result.contains(&address) {
                result.push(address);
            }
        }
        result
    };
    let says = tunnel_node.candidates.iter().any(|a| usable_address(*a).is_ok());
    usable(if says { &tunnel_node.candidates } else { &node.addresses })
}

/// Pod ranges of a node: the API's word, else (a CNI that does not use podCIDRs) the node's own.
fn prefixes(
    world: &ClusterWorld,
    name: &NodeName,
    node: &Node,
    tunnel_node: &TunnelNode,
    findings: &mut Findings,
) -> BTreeSet<Prefix> {
    let object = || format!("node {}/{name}", world.cluster);
    let cut = |stated: &BTreeSet<Prefix>| -> BTreeSet<Prefix> {
        let owned = world.own.owned.iter();
        owned.flat_map(|own| stated.iter().filter_map(move |p| roster::intersection(own, p))).collect()
    };
    let mut prefixes = cut(&node.pod_cidrs);
    if prefixes.is_empty() {
        prefixes = cut(&tunnel_node.prefixes);
    }
    if prefixes.is_empty() {
        let text = if node.pod_cidrs.is_empty() && tunnel_node.prefixes.is_empty() {
            "its pod ranges are not known; pods on it are reached only by the node's own routing".to_owned()
        } else {
            "its pod ranges are outside of what this cluster was granted; grant them, or correct the node"
                .to_owned()
        };
        findings.warning("NodePrefixesUnknown", object(), text);
    }
    if prefixes.len() > Endpoint::MAX_PREFIXES {
        let text = format!("{} prefixes; only {} are stated", prefixes.len(), Endpoint::MAX_PREFIXES);
        findings.error("NodePrefixesTooMany", object(), text);
        prefixes = prefixes.into_iter().take(Endpoint::MAX_PREFIXES).collect();
    }
    prefixes
}

/// One address a family and node, out of the granted ranges: what was stated stays, others take the first that is free.
fn tunnel_addresses<'a>(
    world: &ClusterWorld,
    nodes: &BTreeMap<&'a NodeName, (&Node, &TunnelNode)>,
    stated: &BTreeMap<NodeName, Endpoint>,
    findings: &mut Findings,
) -> BTreeMap<(&'a NodeName, Family), IpAddr> {
    let mut given: BTreeMap<(&NodeName, Family), IpAddr> = BTreeMap::new();
    let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
    for &name in nodes.keys() {
        for address in stated.get(name).into_iter().flat_map(Endpoint::tunnel) {
            if world.own.tunnel.iter().any(|range| is_host(range, address)) && taken.insert(address) {
                given.insert((name, Family::of(address)), address);
            }
        }
    }
    for family in Family::ALL {
        let ranges: Vec<&Prefix> = world.own.tunnel.iter().filter(|p| p.family() == family).collect();
        if ranges.is_empty() {
            continue;
        }
        let mut free = ranges.iter().flat_map(|range| hosts(range)).filter(|a| !taken.contains(a));
        for &name in nodes.keys() {
            if given.contains_key(&(name, family)) {
                continue;
            }
            if let Some(address) = free.next() {
                given.insert((name, family), address);
            } else {
                let text =
                    "the tunnel range has no free address for this node; grant the cluster a larger one";
                findings.error("TunnelRangeFull", format!("node {}/{name}", world.cluster), text);
            }
        }
    }
    given
}
