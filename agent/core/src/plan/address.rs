//! ClusterSetIPs: constant for the life of an import (mcs 12, 13, 15).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tombolo_proto::model::{ClusterId, Family, ServiceType};

use super::findings::Findings;
use super::hash::stable;
use super::vip::is_vip;
use crate::known::Objects;
use crate::object::{Import, ServiceKey};
use crate::world::ClustersetRanges;

/// Fills the imports' `ips`. What an import has it keeps; of two that have one address the lower name does. Others take
/// the address their name hashes to, or the next that is free. Under Kubernetes (no ranges) the derived Services' are
/// taken as they are.
///
/// What only other clusters export gets an address while one of them has less than half of the range: nobody alone
/// takes all of it from everybody.
pub(crate) fn assign(
    us: &ClusterId,
    ranges: Option<&ClustersetRanges>,
    existing: &BTreeMap<ServiceKey, Import>,
    imports: &mut Objects<ServiceKey, Import>,
    findings: &mut Findings,
) {
    let mut taken: BTreeSet<IpAddr> =
        imports.keep.iter().filter_map(|key| existing.get(key)).flat_map(|i| i.ips.iter().copied()).collect();
    let mut given: BTreeMap<(ServiceKey, Family), IpAddr> = BTreeMap::new();
    for (key, import) in imports.set.iter_mut().filter(|(_, i)| i.kind == ServiceType::ClusterSetIP) {
        if let Some(ranges) = ranges {
            fit_families(ranges, key, import, findings);
        }
        let before = existing.get(key).filter(|i| i.kind == ServiceType::ClusterSetIP);
        for &ip in before.into_iter().flat_map(|i| &i.ips) {
            let family = Family::of(ip);
            let good = ranges.is_none_or(|ranges| is_vip(ranges, ip));
            let place = (key.clone(), family);
            if good && import.families.contains(&family) && !given.contains_key(&place) && taken.insert(ip) {
                given.insert(place, ip);
            }
        }
    }
    let mut pools: BTreeMap<Family, Pool> = BTreeMap::new();
    if let Some(ranges) = ranges {
        for family in Family::ALL {
            pools.extend(Pool::new(ranges, family).map(|pool| (family, pool)));
        }
    }
    for ip in &taken {
        if let Some(pool) = pools.get_mut(&Family::of(*ip)) {
            pool.take(*ip);
        }
    }
    let mut shares: BTreeMap<(Family, ClusterId), u128> = BTreeMap::new();
    let kept = imports.keep.iter().filter_map(|key| existing.get(key));
    for import in kept {
        for &ip in &import.ips {
            charge(&mut shares, us, import, Family::of(ip));
        }
    }
    for (key, import) in &imports.set {
        for family in Family::ALL {
            if given.contains_key(&(key.clone(), family)) {
                charge(&mut shares, us, import, family);
            }
        }
    }
    let mut full: BTreeMap<Family, (usize, ServiceKey)> = BTreeMap::new();
    let mut greedy: BTreeMap<ClusterId, usize> = BTreeMap::new();
    for (key, import) in imports.set.iter_mut().filter(|(_, i)| i.kind == ServiceType::ClusterSetIP) {
        let mut ips = Vec::new();
        for &family in &import.families {
            if let Some(ip) = given.get(&(key.clone(), family)) {
                ips.push(*ip);
                continue;
            }
            let Some(pool) = pools.get_mut(&family) else { continue };
            let share = |cluster: &ClusterId| shares.get(&(family, cluster.clone())).copied().unwrap_or(0);
            let others = !import.clusters.is_empty() && !import.clusters.contains(us);
            if others && import.clusters.iter().all(|cluster| share(cluster) >= pool.half()) {
                for cluster in &import.clusters {
                    *greedy.entry(cluster.clone()).or_default() += 1;
                }
                continue;
            }
            if let Some(ip) = pool.next(wanted(key)) {
                pool.take(ip);
                charge(&mut shares, us, import, family);
                ips.push(ip);
            } else {
                full.entry(family).or_insert((0, key.clone())).0 += 1;
            }
        }
        import.ips = ips;
    }
    for (family, (count, first)) in full {
        let family = match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        let text = format!(
            "the {family} range is full: {count} imports have no ClusterSetIP ({first} is the first); configure a \
             larger one"
        );
        findings.error("ClusterSetIPRangeFull", "clusterset", text);
    }
    for (cluster, count) in greedy {
        let text = format!(
            "its services have half of the ClusterSetIPs here; {count} more of them have none. Configure a larger \
             range, or ask whether it means to export so many"
        );
        findings.error("ClusterSetIPShareFull", format!("cluster {cluster}"), text);
    }
}

/// Leaves the families that the cluster has a range in.
pub(crate) fn fit_families(
    ranges: &ClustersetRanges,
    key: &ServiceKey,
    import: &mut Import,
    findings: &mut Findings,
) {
    let has = |f: &Family| match f {
        Family::V4 => ranges.v4.is_some(),
        Family::V6 => ranges.v6.is_some(),
    };
    let families: Vec<Family> = import.families.iter().copied().filter(has).collect();
    // Never empty: a service in a family that is not here is shown as it is, without an address.
    if families.is_empty() {
        let text = "this cluster has no ClusterSetIP range in the service's IP families; it has no address";
        findings.error("IPFamilyNotSupported", format!("serviceimport {key}"), text);
    } else {
        import.families = families;
    }
}

/// The ranges of all families with what is taken of them, kept from one service to the next.
#[derive(Debug)]
pub(crate) struct Pools {
    pools: BTreeMap<Family, Pool>,
    shares: BTreeMap<(Family, ClusterId), u128>,
}

impl Pools {
    pub(crate) fn new(ranges: &ClustersetRanges) -> Self {
        let pool = |family| Pool::new(ranges, family).map(|pool| (family, pool));
        Self { pools: Family::ALL.into_iter().filter_map(pool).collect(), shares: BTreeMap::new() }
    }

    pub(crate) fn take(&mut self, ip: IpAddr) {
        if let Some(pool) = self.pools.get_mut(&Family::of(ip)) {
            pool.take(ip);
        }
    }

    pub(crate) fn free(&mut self, ip: IpAddr) {
        if let Some(pool) = self.pools.get_mut(&Family::of(ip)) {
            pool.free(ip);
        }
    }

    /// Counts an address for, or against, every other cluster that exports the service.
    pub(crate) fn charge(&mut self, us: &ClusterId, clusters: &BTreeSet<ClusterId>, family: Family, by: i8) {
        for cluster in clusters.iter().filter(|cluster| *cluster != us) {
            let share = self.shares.entry((family, cluster.clone())).or_default();
            *share = share.saturating_add_signed(by.into());
        }
    }

    /// Who exports the service, if only others do and each of them has half of the range.
    pub(crate) fn greedy<'a>(
        &self,
        us: &ClusterId,
        import: &'a Import,
        family: Family,
    ) -> Option<&'a BTreeSet<ClusterId>> {
        let half = self.pools.get(&family)?.half();
        let share = |c: &ClusterId| self.shares.get(&(family, c.clone())).copied().unwrap_or(0);
        let others = !import.clusters.is_empty() && !import.clusters.contains(us);
        (others && import.clusters.iter().all(|cluster| share(cluster) >= half)).then_some(&import.clusters)
    }

    /// The address that a new service gets.
    pub(crate) fn next(&self, key: &ServiceKey, family: Family) -> Option<IpAddr> {
        self.pools.get(&family)?.next(wanted(key))
    }
}

/// Where in a range a service would like its address.
fn wanted(key: &ServiceKey) -> u64 {
    stable(&[key.namespace.as_str().as_bytes(), key.name.as_str().as_bytes()])
}

/// Counts an address for every other cluster that exports the service.
fn charge(shares: &mut BTreeMap<(Family, ClusterId), u128>, us: &ClusterId, import: &Import, family: Family) {
    for cluster in import.clusters.iter().filter(|cluster| *cluster != us) {
        *shares.entry((family, cluster.clone())).or_default() += 1;
    }
}

/// The addresses of a range, and which are taken: as runs, so that the next free one is found at once even in a range
/// that somebody has filled.
#[derive(Debug)]
struct Pool {
    family: Family,
    first: u128,
    size: u128,
    /// First to last of a run; no two touch.
    runs: BTreeMap<u128, u128>,
}

impl Pool {
    fn new(ranges: &ClustersetRanges, family: Family) -> Option<Self> {
        let (first, size) = match family {
            Family::V4 => {
                (u128::from(u32::from(ranges.v4?.network())), 1_u128 << (32 - ranges.v4?.prefix_len()))
            }
            // Of a larger range the first 2^64 will do.
            Family::V6 => {
                (u128::from(ranges.v6?.network()), 1_u128 << u32::from(128 - ranges.v6?.prefix_len()).min(64))
            }
        };
        let mut pool = Self { family, first, size, runs: BTreeMap::new() };
        // Network, resolver, broadcast.
        for offset in [0, 1, size - 1] {
            if let Some(ip) = pool.address(offset).filter(|ip| !is_vip(ranges, *ip)) {
                pool.take(ip);
            }
        }
        Some(pool)
    }

    /// What one other cluster may have.
    fn half(&self) -> u128 {
        self.size / 2
    }

    fn address(&self, offset: u128) -> Option<IpAddr> {
        let number = self.first + offset;
        match self.family {
            Family::V4 => u32::try_from(number).ok().map(|n| IpAddr::V4(Ipv4Addr::from(n))),
            Family::V6 => Some(IpAddr::V6(Ipv6Addr::from(number))),
        }
    }

    fn take(&mut self, ip: IpAddr) {
        let number = match ip {
            IpAddr::V4(a) => u128::from(u32::from(a)),
            IpAddr::V6(a) => u128::from(a),
        };
        let Some(offset) = number.checked_sub(self.first).filter(|offset| *offset < self.size) else {
            return;
        };
        let before = self.runs.range(..=offset).next_back().map(|(a, b)| (*a, *b));
        if before.is_some_and(|(_, last)| last >= offset) {
            return;
        }
        let start = before.filter(|(_, last)| last + 1 == offset).map_or(offset, |(start, _)| start);
        let end = self.runs.remove(&(offset + 1)).unwrap_or(offset);
        self.runs.insert(start, end);
    }

    /// Gives back what was taken.
    fn free(&mut self, ip: IpAddr) {
        let number = match ip {
            IpAddr::V4(a) => u128::from(u32::from(a)),
            IpAddr::V6(a) => u128::from(a),
        };
        let Some(offset) = number.checked_sub(self.first) else { return };
        let Some((&start, &last)) =
            self.runs.range(..=offset).next_back().filter(|(_, last)| **last >= offset)
        else {
            return;
        };
        self.runs.remove(&start);
        if start < offset {
            self.runs.insert(start, offset - 1);
        }
        if offset < last {
            self.runs.insert(offset + 1, last);
        }
    }

    /// The free address at `hash`, or the first after it, around the end.
    fn next(&self, hash: u64) -> Option<IpAddr> {
        let wanted = u128::from(hash) % self.size;
        let free = |offset: u128| match self.runs.range(..=offset).next_back() {
            Some((_, &last)) if last >= offset => Some(last + 1).filter(|next| *next < self.size),
            Some(_) | None => Some(offset),
        };
        free(wanted).or_else(|| free(0)).and_then(|offset| self.address(offset))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pool_finds_the_next_that_is_free(taken in prop::collection::vec(0_u8..64, 0..80), hash in any::<u64>()) {
            let ranges = ClustersetRanges { v4: Some("198.19.0.64/26".parse().unwrap()), v6: None };
            let mut pool = Pool::new(&ranges, Family::V4).unwrap();
            let ip = |n: u8| IpAddr::from([198, 19, 0, 64 + n]);
            taken.iter().for_each(|n| pool.take(ip(*n)));
            // What is given back is free again.
            for n in [taken.first(), taken.last()].into_iter().flatten().filter(|n| (2..63).contains(*n)) {
                pool.free(ip(*n));
                prop_assert_eq!(pool.next((*n).into()), Some(ip(*n)));
                pool.take(ip(*n));
            }
            let wanted = (0..64_u64).map(|step| ip(u8::try_from((hash % 64 + step) % 64).unwrap()));
            let free = |a: &IpAddr| is_vip(&ranges, *a) && !taken.iter().any(|n| ip(*n) == *a);
            prop_assert_eq!(pool.next(hash), wanted.into_iter().find(free));
        }
    }
}
