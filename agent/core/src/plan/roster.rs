//! The members' nodes, as far as their clusters may state them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Prefix, Rank};

use super::findings::Findings;
use crate::world::MemberNodes;

/// What is left of a node's claims.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Its tunnel addresses: within the cluster's tunnel ranges, nobody else's.
    pub(crate) tunnel: BTreeSet<IpAddr>,
    /// Its pod ranges: within the cluster's owned ranges, nobody else's, none within another.
    pub(crate) prefixes: BTreeSet<Prefix>,
}

/// A node with what is left of its claims.
#[derive(Debug)]
pub(crate) struct Station<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) claim: Claim,
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

/// Judges what a cluster says of its nodes. Of another cluster only gateways count (the topology `mesh` is not built
/// yet), so that it cannot make every node here judge thousands.
pub(crate) fn stations<'a>(
    us: &ClusterId,
    cluster: &ClusterId,
    member: &'a MemberNodes,
    findings: &mut Findings,
) -> Stations<'a> {
    let mut ranks: BTreeMap<Rank, &NodeName> = BTreeMap::new();
    let mut count: BTreeMap<&NodeName, &Endpoint> = BTreeMap::new();
    for (name, endpoint) in &member.nodes {
        if endpoint.rank.is_gateway() {
            if let Some(first) = ranks.get(&endpoint.rank) {
                let text = format!(
                    "rank {} is already {first}'s; this node is left out until its cluster states one gateway a rank",
                    endpoint.rank.get()
                );
                findings.error("RankTwice", format!("node {cluster}/{name}"), text);
                continue;
            }
            ranks.insert(endpoint.rank, name);
        } else if cluster != us {
            continue;
        }
        count.insert(name, endpoint);
    }
    let mut claims =
        claims(cluster, &member.owned, &member.tunnel, count.iter().map(|(n, e)| (*n, *e)), findings);
    let station = |(name, endpoint)| {
        let claim = claims.remove(name).unwrap_or_default();
        (name, Station { endpoint, claim })
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
