//! The members' nodes, as far as their clusters may state them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Prefix, Rank};

use super::findings::Findings;
use crate::world::{MemberNodes, Members, NodeWorld};

/// What is left of a node's claims.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Its tunnel addresses: within the cluster's tunnel ranges, nobody else's.
    pub(crate) tunnel: BTreeSet<IpAddr>,
    /// Its pod ranges: within the cluster's owned ranges, nobody else's, none within another.
    pub(crate) prefixes: BTreeSet<Prefix>,
}

/// Nodes of other clusters that one node talks to directly (topology `mesh`), at most, in all.
pub(crate) const MESH_NODES: usize = 500;
/// Prefixes of such a node, at most.
pub(crate) const MESH_PREFIXES: usize = 8;

/// A node with what is left of its claims.
#[derive(Debug)]
pub(crate) struct Station<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) claim: Claim,
    /// Of another cluster, and this node talks to it directly whatever their ranks: both are meshed.
    pub(crate) direct: bool,
}

impl Station<'_> {
    /// All it may send as itself.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Prefix> {
        let tunnel = self.claim.tunnel.iter().filter_map(|&a| Prefix::host(a).ok());
        self.claim.prefixes.iter().copied().chain(tunnel)
    }
}

/// The nodes of a cluster that count. Of two gateways of one rank only the lower name does.
pub(crate) type Stations<'a> = BTreeMap<&'a NodeName, Station<'a>>;

/// Judges what all clusters say of their nodes. Of other clusters gateways count, and under the topology `mesh` plain
/// nodes too, as long as there are few: nobody can make every node here judge thousands. Who was admitted first is
/// meshed first.
pub(crate) fn stations<'a>(
    world: &NodeWorld,
    members: &'a Members,
    findings: &mut Findings,
) -> BTreeMap<&'a ClusterId, Stations<'a>> {
    let me = members.get(&world.cluster).and_then(|own| own.nodes.get(&world.node));
    let meshed = me.is_some_and(is_meshed);
    let mut room = MESH_NODES;
    let mut order: Vec<_> = members.iter().collect();
    order.sort_by_key(|(id, member)| (member.serial, *id));
    let mut stations = BTreeMap::new();
    for (cluster, member) in order {
        let mut direct = meshed && *cluster != world.cluster;
        if direct {
            let nodes = member.nodes.values();
            let many = nodes.clone().filter(|e| e.mesh && !is_meshed(e)).count();
            if many > 0 {
                let text = format!(
                    "{many} of its nodes state more than {MESH_PREFIXES} prefixes; they are reached over gateways"
                );
                findings.warning("MeshPrefixesTooMany", format!("cluster {cluster}"), text);
            }
            let count = nodes.filter(|e| is_meshed(e)).count();
            if let Some(left) = room.checked_sub(count) {
                room = left;
            } else {
                let text = format!(
                    "it states {count} nodes to talk to directly; {room} of {MESH_NODES} are left here, so that all of \
                     it is reached over gateways. Choose topology gateway for clusters of this size"
                );
                findings.warning("MeshTooLarge", format!("cluster {cluster}"), text);
                direct = false;
            }
        }
        stations.insert(cluster, of_cluster(&world.cluster, cluster, member, direct, findings));
    }
    stations
}

fn is_meshed(endpoint: &Endpoint) -> bool {
    endpoint.mesh && endpoint.prefixes.len() <= MESH_PREFIXES
}

fn of_cluster<'a>(
    us: &ClusterId,
    cluster: &ClusterId,
    member: &'a MemberNodes,
    direct: bool,
    findings: &mut Findings,
) -> Stations<'a> {
    let mut ranks: BTreeMap<Rank, &NodeName> = BTreeMap::new();
    let mut count: BTreeMap<&NodeName, &Endpoint> = BTreeMap::new();
    let mut twice: Vec<&NodeName> = Vec::new();
    for (name, endpoint) in &member.nodes {
        if endpoint.rank.is_gateway() {
            if ranks.contains_key(&endpoint.rank) {
                twice.push(name);
                continue;
            }
            ranks.insert(endpoint.rank, name);
        } else if cluster != us && !(direct && is_meshed(endpoint)) {
            continue;
        }
        count.insert(name, endpoint);
    }
    if let Some(first) = twice.first() {
        let text = format!(
            "{} of its nodes state a rank that is another's already ({first} is one); they are left out until it states \
             one gateway a rank",
            twice.len()
        );
        findings.error("RankTwice", format!("cluster {cluster}"), text);
    }
    let mut claims =
        claims(cluster, &member.owned, &member.tunnel, count.iter().map(|(n, e)| (*n, *e)), findings);
    let station = |(name, endpoint)| {
        let claim = claims.remove(name).unwrap_or_default();
        (name, Station { endpoint, claim, direct: direct && is_meshed(endpoint) })
    };
    count.into_iter().map(station).collect()
}

/// Cuts nodes' claims to their cluster's ranges. What two nodes claim, or claim parts of, stays with the lower name:
/// no prefix ever has two peers (law 2).
pub(crate) fn claims<'a>(
    cluster: &ClusterId,
    owned: &BTreeSet<Prefix>,
    tunnel: &BTreeSet<Prefix>,
    nodes: impl Iterator<Item = (&'a NodeName, &'a Endpoint)>,
    findings: &mut Findings,
) -> BTreeMap<&'a NodeName, Claim> {
    let mut taken: BTreeMap<Prefix, &NodeName> = BTreeMap::new();
    let mut claims = BTreeMap::new();
    for (name, endpoint) in nodes {
        let object = || format!("node {cluster}/{name}");
        let mut claim = Claim::default();
        for address in endpoint.tunnel() {
            let Some(prefix) =
                Prefix::host(address).ok().filter(|_| tunnel.iter().any(|p| p.contains(address)))
            else {
                let text =
                    format!("tunnel address {address} is not in its cluster's tunnel ranges; it is not used");
                findings.error("TunnelAddressOutsideGrant", object(), text);
                continue;
            };
            if let Some(owner) = overlapping(&taken, &prefix) {
                let text = format!("tunnel address {address} is already {owner}'s; it stays there");
                findings.error("TunnelAddressTwice", object(), text);
                continue;
            }
            taken.insert(prefix, name);
            claim.tunnel.insert(address);
        }
        for stated in &endpoint.prefixes {
            let parts: BTreeSet<Prefix> = owned.iter().filter_map(|own| intersection(own, stated)).collect();
            if parts.len() != 1 || !parts.contains(stated) {
                let text =
                    format!("prefix {stated} is not wholly in what its cluster owns; the rest is not used");
                findings.error("PrefixOutsideGrant", object(), text);
            }
            for part in parts {
                match overlapping(&taken, &part) {
                    None => {
                        taken.insert(part, name);
                        claim.prefixes.insert(part);
                    }
                    Some(owner) if owner == name => {}
                    Some(owner) => {
                        let text = format!("prefix {part} overlaps one of {owner}; it stays there");
                        findings.error("PrefixTwice", object(), text);
                    }
                }
            }
        }
        claims.insert(name, claim);
    }
    claims
}

/// What two prefixes share.
pub(crate) fn intersection(a: &Prefix, b: &Prefix) -> Option<Prefix> {
    if a.covers(b) {
        Some(*b)
    } else if b.covers(a) {
        Some(*a)
    } else {
        None
    }
}

/// Whose prefix shares an address with `prefix`. Of prefixes apart from each other only the two neighbours in order
/// can.
fn overlapping<'a>(taken: &BTreeMap<Prefix, &'a NodeName>, prefix: &Prefix) -> Option<&'a NodeName> {
    let before = taken.range(..prefix).next_back();
    let after = taken.range(prefix..).next();
    before.into_iter().chain(after).find(|(p, _)| p.overlaps(prefix)).map(|(_, name)| *name)
}

/// Addresses of a range that a node may bear: neither its first nor, in IPv4, its last.
pub(crate) fn hosts(range: &Prefix) -> impl Iterator<Item = IpAddr> + use<> {
    let skip = usize::from(matches!(range.net(), IpNet::V6(net) if net.prefix_len() < 127));
    range.net().hosts().skip(skip)
}

/// Whether a node may bear the address out of this range.
pub(crate) fn is_host(range: &Prefix, address: IpAddr) -> bool {
    let edge = match range.net() {
        IpNet::V4(net) if net.prefix_len() < 31 => {
            address == IpAddr::V4(net.network()) || address == IpAddr::V4(net.broadcast())
        }
        IpNet::V6(net) if net.prefix_len() < 127 => address == IpAddr::V6(net.network()),
        IpNet::V4(_) | IpNet::V6(_) => false,
    };
    range.contains(address) && !edge
}
