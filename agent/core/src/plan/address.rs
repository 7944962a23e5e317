//! ClusterSetIPs: constant for the life of an import (mcs 12, 13, 15).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tombolo_proto::model::{Family, ServiceType};

use super::findings::Findings;
use super::hash::stable;
use super::vip::is_vip;
use crate::known::Objects;
use crate::object::{Import, ServiceKey};
use crate::world::ClustersetRanges;

/// Fills the imports' `ips`. What an import has it keeps; of two that have one address the lower name does. Others take
/// the address their name hashes to, or the next that is free. Under Kubernetes (no ranges) the derived Services' are
/// taken as they are.
pub(crate) fn assign(
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
            let has = |f: &Family| match f {
                Family::V4 => ranges.v4.is_some(),
                Family::V6 => ranges.v6.is_some(),
            };
            let families: Vec<Family> = import.families.iter().copied().filter(has).collect();
            // Never empty: a service in a family that is not here is shown as it is, without an address.
            if families.is_empty() {
                let text =
                    "this cluster has no ClusterSetIP range in the service's IP families; it has no address";
                findings.error("IPFamilyNotSupported", format!("serviceimport {key}"), text);
            } else {
                import.families = families;
            }
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
    for (key, import) in imports.set.iter_mut().filter(|(_, i)| i.kind == ServiceType::ClusterSetIP) {
        let mut ips = Vec::new();
        for &family in &import.families {
            let free = || ranges.and_then(|ranges| allocate(ranges, key, family, &taken));
            if let Some(ip) = given.get(&(key.clone(), family)).copied().or_else(free) {
                taken.insert(ip);
                ips.push(ip);
            } else if ranges
                .is_some_and(|r| if family == Family::V4 { r.v4.is_some() } else { r.v6.is_some() })
            {
                let text = "the ClusterSetIP range is full; configure a larger one";
                findings.error("ClusterSetIPRangeFull", format!("serviceimport {key}"), text);
            }
        }
        import.ips = ips;
    }
}

fn allocate(
    ranges: &ClustersetRanges,
    key: &ServiceKey,
    family: Family,
    taken: &BTreeSet<IpAddr>,
) -> Option<IpAddr> {
    let hash = u128::from(stable(&[key.namespace.as_str().as_bytes(), key.name.as_str().as_bytes()]));
    let (first, size) = match family {
        Family::V4 => (u128::from(u32::from(ranges.v4?.network())), 1_u128 << (32 - ranges.v4?.prefix_len())),
        // Of a larger range the first 2^64 will do.
        Family::V6 => {
            (u128::from(ranges.v6?.network()), 1_u128 << u32::from(128 - ranges.v6?.prefix_len()).min(64))
        }
    };
    // Those taken and the three that are no VIPs: after so many others one is free, or none is.
    let tries = size.min(taken.len() as u128 + 4);
    (0..tries)
        .filter_map(|step| {
            let number = first + (hash + step) % size;
            match family {
                Family::V4 => u32::try_from(number).ok().map(|n| IpAddr::V4(Ipv4Addr::from(n))),
                Family::V6 => Some(IpAddr::V6(Ipv6Addr::from(number))),
            }
        })
        .find(|ip| is_vip(ranges, *ip) && !taken.contains(ip))
}
