//! Routes of our two tables (`docs/datapath.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, Family, Prefix};

use super::roster::Stations;
use crate::desired::{Route, TABLE_IN, TABLE_OUT, TunnelDevice, Via};
use crate::world::{MemberNodes, NodeWorld};

/// Plans the routes of this node. Every slot counts as live.
pub(crate) fn routes(
    world: &NodeWorld,
    members: &BTreeMap<ClusterId, MemberNodes>,
    stations: &BTreeMap<&ClusterId, Stations<'_>>,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
) -> BTreeSet<Route> {
    let Some(own) = members.get(&world.cluster) else { return BTreeSet::new() };
    let me = stations.get(&world.cluster).and_then(|own| own.get(&world.node));
    let gateway = me.is_some_and(|me| me.endpoint.rank.is_gateway());
    let source = |family: Family| -> Option<IpAddr> {
        me.and_then(|me| me.claim.tunnel.iter().copied().find(|a| Family::of(*a) == family))
    };
    let out = |prefix: Prefix, via: Via| {
        let source = if via == Via::Unreachable { None } else { source(prefix.family()) };
        Route { table: TABLE_OUT, prefix, via, source }
    };
    let mut routes = BTreeSet::new();

    for (_, member) in members.iter().filter(|(id, _)| **id != world.cluster) {
        for &prefix in member.owned.union(&member.tunnel) {
            // A gateway uses its own tunnels only; its own nodes see two hops at most.
            let wanted = |number: &DeviceNumber| match number.family() {
                DeviceFamily::Out => gateway,
                DeviceFamily::In => !gateway && number.rank().is_gateway(),
            };
            let carries = |device: &TunnelDevice| device.peers.values().any(|p| p.allowed.contains(&prefix));
            let slots: BTreeSet<DeviceNumber> =
                devices.iter().filter(|(n, d)| wanted(n) && carries(d)).map(|(n, _)| *n).collect();
            if !slots.is_empty() {
                routes.insert(out(prefix, Via::Devices(slots)));
            }
            routes.insert(out(prefix, Via::Unreachable));
        }
    }
    // Between own plain nodes there is no tunnel, and tunnel addresses mean nothing outside of tunnels.
    routes.extend(own.tunnel.iter().map(|&range| out(range, Via::Unreachable)));

    for (&number, device) in devices.iter().filter(|(n, _)| n.family() == DeviceFamily::In) {
        let via = || Via::Devices(BTreeSet::from([number]));
        for peer in device.peers.values() {
            let tunnel: BTreeSet<Prefix> = peer.tunnel.iter().filter_map(|&a| Prefix::host(a).ok()).collect();
            routes.extend(tunnel.iter().map(|&prefix| out(prefix, via())));
            if gateway {
                let inside = |p: &&Prefix| tunnel.contains(*p) || own.owned.iter().any(|own| own.covers(p));
                let route = |&prefix: &Prefix| Route { table: TABLE_IN, prefix, via: via(), source: None };
                routes.extend(peer.allowed.iter().filter(inside).map(route));
            }
        }
    }
    routes
}
