//! ClusterSetIPs that nodes of a directory balance themselves. Under Kubernetes derived Services do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use tombolo_proto::model::{ClusterId, Family, NodeName, ServiceType};

use super::eligible::{Verdict, View, target};
use super::hash::{octets, stable};
use crate::desired::{Balance, Vip};
use crate::object::{Import, Slice, SliceKey};
use crate::world::ClustersetRanges;

/// Entries of a VIP's backends on one node: one nft chain for each count.
const MAX_ENTRIES: usize = 64;

/// Whether a VIP may be this address: within the cluster's own range and no address of another purpose.
pub(crate) fn is_vip(ranges: &ClustersetRanges, address: IpAddr) -> bool {
    let inside = match address {
        IpAddr::V4(a) => ranges.v4.is_some_and(|n| n.contains(&a) && a != n.network() && a != n.broadcast()),
        IpAddr::V6(a) => ranges.v6.is_some_and(|n| n.contains(&a) && a != n.network()),
    };
    inside && !ranges.resolvers().any(|resolver| resolver == address)
}

/// Plans where the connections of a service's VIPs go: to eligible backends of clusters that expose the port (mcs 20,
/// 28). `node` is this one.
pub(crate) fn vips(
    node: &NodeName,
    view: View<'_>,
    import: &Import,
    slices: &[(&SliceKey, &Slice)],
) -> BTreeMap<Vip, Balance> {
    let mut vips = BTreeMap::new();
    if import.kind != ServiceType::ClusterSetIP {
        return vips;
    }
    for &ip in &import.ips {
        for port in &import.ports {
            let verdicts = view.of_port(import, slices, port, Family::of(ip));
            let mut clusters: BTreeMap<&ClusterId, BTreeSet<Target>> = BTreeMap::new();
            for (key, slice) in slices.iter().filter(|(k, _)| k.family == Family::of(ip)) {
                if verdicts.get(&key.source) == Some(&Verdict::Used)
                    && let Some(target) = target(slice, port)
                {
                    let ready = slice.backends.iter().filter(|b| b.ready);
                    let place = clusters.entry(&key.source).or_default();
                    place.extend(ready.map(|b| (b.address, target.port)));
                }
            }
            let vip = Vip { address: ip, protocol: port.protocol, port: port.port };
            let backends = share_out(node, &vip, import, clusters);
            vips.insert(vip, Balance { backends, affinity: import.affinity });
        }
    }
    vips
}

type Target = (IpAddr, u16);

/// Gives each backend its entries, at most [`MAX_ENTRIES`] together: one each, or in proportion to the weights of their
/// clusters.
fn share_out(
    node: &NodeName,
    vip: &Vip,
    import: &Import,
    clusters: BTreeMap<&ClusterId, BTreeSet<Target>>,
) -> BTreeMap<Target, NonZeroU16> {
    let weight = |cluster: &ClusterId| usize::from(import.preferences.share(cluster).weight.get());
    let common = clusters.keys().map(|c| weight(c)).reduce(greatest_common_divisor).unwrap_or(1).max(1);
    let parts: Vec<(usize, BTreeSet<Target>)> =
        clusters.into_iter().map(|(c, list)| (weight(c) / common * list.len(), list)).collect();
    let sum: usize = parts.iter().map(|(part, _)| part).sum();
    let equal = parts.iter().all(|(part, list)| *part == list.len());
    let mut entries = BTreeMap::new();
    if equal || parts.len() > MAX_ENTRIES {
        let all = parts.into_iter().flat_map(|(_, list)| list).collect::<BTreeSet<_>>();
        let count = all.len().min(MAX_ENTRIES);
        give(node, vip, count, all, &mut entries);
        return entries;
    }
    let counts = if sum <= MAX_ENTRIES {
        parts.iter().map(|(part, _)| *part).collect()
    } else {
        apportion(&parts.iter().map(|(part, _)| *part).collect::<Vec<_>>())
    };
    for ((_, list), count) in parts.into_iter().zip(counts) {
        give(node, vip, count, list, &mut entries);
    }
    entries
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// [`MAX_ENTRIES`] in proportion to these parts, none of them without any: one each, the rest by largest remainder.
fn apportion(parts: &[usize]) -> Vec<usize> {
    let sum: usize = parts.iter().sum::<usize>().max(1);
    let rest = MAX_ENTRIES.saturating_sub(parts.len());
    // In units of 1/sum of an entry: what a part still lacks beyond its one.
    let over: Vec<usize> = parts.iter().map(|p| (p * MAX_ENTRIES).saturating_sub(sum)).collect();
    let total: usize = over.iter().sum::<usize>().max(1);
    let mut counts: Vec<usize> = over.iter().map(|o| 1 + o * rest / total).collect();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(over[i] * rest % total), i));
    let left = MAX_ENTRIES.saturating_sub(counts.iter().sum());
    for i in order.into_iter().take(left) {
        counts[i] += 1;
    }
    counts
}

/// Gives `count` entries to backends, as evenly as can be. Where not all get the same, each node prefers others
/// (rendezvous hashing with its name), so that all together use all alike, and one that comes or goes moves no other.
fn give(
    node: &NodeName,
    vip: &Vip,
    count: usize,
    backends: BTreeSet<Target>,
    entries: &mut BTreeMap<Target, NonZeroU16>,
) {
    if backends.is_empty() {
        return;
    }
    let (each, more) = (count / backends.len(), count % backends.len());
    let weigh = |(address, port): &Target| {
        stable(&[
            node.as_str().as_bytes(),
            &octets(vip.address),
            &vip.port.to_be_bytes(),
            &octets(*address),
            &port.to_be_bytes(),
        ])
    };
    let mut weighed: Vec<(u64, Target)> = if more == 0 {
        backends.into_iter().map(|b| (0, b)).collect()
    } else {
        backends.into_iter().map(|b| (weigh(&b), b)).collect()
    };
    weighed.sort_unstable();
    for (place, (_, backend)) in weighed.into_iter().enumerate() {
        let count = each + usize::from(place < more);
        if let Some(count) = u16::try_from(count).ok().and_then(NonZeroU16::new) {
            // Whom two clusters claim gets both parts.
            let old = entries.get(&backend).map_or(0, |n: &NonZeroU16| n.get());
            entries.insert(backend, count.saturating_add(old));
        }
    }
}
