//! ClusterSetIPs that nodes of a directory balance themselves. Under Kubernetes derived Services do.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{Family, ServiceType};

use super::findings::Findings;
use super::hash::{octets, stable};
use crate::desired::{Balance, Vip};
use crate::object::{Import, ServiceKey, Slice, SliceKey};
use crate::world::{ClustersetRanges, NodeWorld};

/// Backends of a VIP on one node: one nft chain for each count.
const MAX_BACKENDS: usize = 64;

/// Whether a VIP may be this address: within the cluster's own range and no address of another purpose.
pub(crate) fn is_vip(ranges: &ClustersetRanges, address: IpAddr) -> bool {
    let inside = match address {
        IpAddr::V4(a) => ranges.v4.is_some_and(|n| n.contains(&a) && a != n.network() && a != n.broadcast()),
        IpAddr::V6(a) => ranges.v6.is_some_and(|n| n.contains(&a) && a != n.network()),
    };
    inside && !ranges.resolvers().any(|resolver| resolver == address)
}

/// The imports with only those ClusterSetIPs that are one: in this cluster's range, and of two imports that bear one
/// address the lower name's. VIPs and names use the result (law 2). Under Kubernetes the API sees to that.
pub(crate) fn honest<'a>(
    world: &NodeWorld,
    imports: &'a BTreeMap<ServiceKey, Import>,
    findings: &mut Findings,
) -> Cow<'a, BTreeMap<ServiceKey, Import>> {
    let mut result = Cow::Borrowed(imports);
    let Some(ranges) = &world.clusterset else { return result };
    let mut holders: BTreeMap<IpAddr, &ServiceKey> = BTreeMap::new();
    for (key, import) in imports.iter().filter(|(_, i)| i.kind == ServiceType::ClusterSetIP) {
        let mut good = |&ip: &IpAddr| {
            if !is_vip(ranges, ip) {
                let text = format!("{ip} is not in this cluster's ClusterSetIP range; it is not used");
                findings.error("ClusterSetIPOutsideRange", format!("serviceimport {key}"), text);
                return false;
            }
            let holder = *holders.entry(ip).or_insert(key);
            if holder != key {
                let text = format!("{ip} is already {holder}'s; it stays there");
                findings.error("ClusterSetIPTwice", format!("serviceimport {key}"), text);
            }
            holder == key
        };
        let ips: Vec<IpAddr> = import.ips.iter().copied().filter(&mut good).collect();
        if ips.len() < import.ips.len()
            && let Some(import) = result.to_mut().get_mut(key)
        {
            import.ips = ips;
        }
    }
    result
}

/// Plans where the connections of every VIP go: to ready backends of clusters that expose the port (mcs 20, 28).
pub(crate) fn vips(
    world: &NodeWorld,
    imports: &BTreeMap<ServiceKey, Import>,
    slices: &BTreeMap<SliceKey, Slice>,
) -> BTreeMap<Vip, Balance> {
    let mut vips = BTreeMap::new();
    if world.clusterset.is_none() {
        return vips;
    }
    let mut by_service: BTreeMap<&ServiceKey, Vec<(&SliceKey, &Slice)>> = BTreeMap::new();
    for (key, slice) in slices {
        by_service.entry(&key.service).or_default().push((key, slice));
    }
    for (key, import) in imports.iter().filter(|(_, i)| i.kind == ServiceType::ClusterSetIP) {
        let slices = by_service.get(key).map(Vec::as_slice).unwrap_or_default();
        for &ip in &import.ips {
            for port in &import.ports {
                let mut backends: BTreeSet<(IpAddr, u16)> = BTreeSet::new();
                for (_, slice) in slices.iter().filter(|(k, _)| k.family == Family::of(ip)) {
                    let same = |p: &&_| {
                        let p: &tombolo_proto::model::Port = p;
                        p.name == port.name && p.protocol == port.protocol
                    };
                    if let Some(target) = slice.ports.iter().find(same) {
                        let ready = slice.backends.iter().filter(|b| b.ready);
                        backends.extend(ready.map(|b| (b.address, target.port)));
                    }
                }
                let vip = Vip { address: ip, protocol: port.protocol, port: port.port };
                let backends = fair(world, &vip, backends);
                vips.insert(vip, Balance { backends, affinity: import.affinity });
            }
        }
    }
    vips
}

/// At most [`MAX_BACKENDS`]. Each node takes others of them (rendezvous hashing with its name), so that all together
/// use all, and one that comes or goes moves no other.
fn fair(world: &NodeWorld, vip: &Vip, backends: BTreeSet<(IpAddr, u16)>) -> BTreeSet<(IpAddr, u16)> {
    if backends.len() <= MAX_BACKENDS {
        return backends;
    }
    let weigh = |(address, port): &(IpAddr, u16)| {
        stable(&[
            world.node.as_str().as_bytes(),
            &octets(vip.address),
            &vip.port.to_be_bytes(),
            &octets(*address),
            &port.to_be_bytes(),
        ])
    };
    let mut weighed: Vec<(u64, (IpAddr, u16))> = backends.into_iter().map(|b| (weigh(&b), b)).collect();
    weighed.sort_unstable();
    weighed.into_iter().take(MAX_BACKENDS).map(|(_, backend)| backend).collect()
}
