//! Lanes: more devices of the same scheme, for more processors (`docs/datapath.md`).
//!
//! Lane 0 decides which slots a route has. In the tables of lane l each slot is the device of the lane l mod (lanes of the
//! two ends) that leads to the same node, once that has proved itself: firewalls may let the ports of lane 0 through alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{DeviceNumber, Lane, Lanes, Prefix};

use super::findings::Findings;
use crate::desired::{Route, TABLE_OUT, TunnelDevice, Via};
use crate::liveness::PeerId;
use crate::object::NodeKey;
use crate::world::Health;

/// Adds the routes of the other lanes to those of lane 0. Returns how many lanes this node has with anybody.
pub(crate) fn lanes(
    health: &Health,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    routes: &mut BTreeSet<Route>,
    findings: &mut Findings,
) -> Lanes {
    let last = devices.keys().map(|number| number.lane()).max().unwrap_or(Lane::FIRST);
    let lanes = Lanes::up_to(last);
    if lanes == Lanes::ONE {
        return lanes;
    }
    let ways = Ways::of(health, devices);
    tell(health, devices, findings);
    let others: Vec<Route> =
        routes.iter().flat_map(|route| lanes.iter().skip(1).map(|lane| ways.route(route, lane))).collect();
    routes.extend(others);
    routes.extend(bound(devices));
    lanes
}

/// Echoes ask each lane. Bound to a device, IPv4 goes out there without a route; IPv6 does not.
fn bound(devices: &BTreeMap<DeviceNumber, TunnelDevice>) -> impl Iterator<Item = Route> {
    devices.iter().filter(|(number, _)| number.lane() != Lane::FIRST).flat_map(|(&number, device)| {
        let asked = device.peers.values().filter(|peer| !peer.tunnel.iter().any(IpAddr::is_ipv4));
        let hosts = asked.flat_map(|peer| &peer.tunnel).filter_map(|a| Prefix::host(*a).ok());
        hosts.map(move |prefix| Route {
            table: TABLE_OUT + u32::from(number.lane().get()),
            prefix,
            via: Via::Bound(number),
            source: None,
            mtu: None,
        })
    })
}

/// Tells of lanes whose peers never answer, while the same nodes do in lane 0.
fn tell(health: &Health, devices: &BTreeMap<DeviceNumber, TunnelDevice>, findings: &mut Findings) {
    let peers =
        devices.iter().flat_map(|(n, device)| device.peers.iter().map(move |(key, peer)| ((*n, *key), peer)));
    let answers = |id: &PeerId| health.alive.contains(id);
    let well: BTreeSet<(DeviceNumber, &NodeKey)> =
        peers.clone().filter(|(id, _)| answers(id)).map(|((n, _), peer)| (n, &peer.node)).collect();
    let late =
        |id: &PeerId| health.young.contains(id) || !health.known.as_ref().is_some_and(|k| k.contains(id));
    let mut silent: BTreeMap<&NodeKey, BTreeSet<DeviceNumber>> = BTreeMap::new();
    for (id, peer) in peers.filter(|(id, _)| !answers(id) && !health.dead.contains(id) && !late(id)) {
        if id.0.lane() != Lane::FIRST && well.contains(&(id.0.in_lane(Lane::FIRST), &peer.node)) {
            silent.entry(&peer.node).or_default().insert(id.0);
        }
    }
    for (node, numbers) in silent {
        let names: Vec<_> = numbers.iter().map(|n| format!("{n} (UDP {})", n.default_port())).collect();
        let text = format!(
            "it answers, but not by {}: its flows go by the other lanes; let UDP 4510 to 4573 pass between the two nodes",
            names.join(", ")
        );
        findings.warning("LaneSilent", format!("node {node}"), text);
    }
}

/// The devices that lead to one node, by lane; `None`: that lane has not proved itself, or has died.
type Way = Vec<Option<DeviceNumber>>;

/// The ways to all peers.
struct Ways<'a> {
    /// By the device of lane 0 and the node.
    ways: BTreeMap<(DeviceNumber, &'a NodeKey), Way>,
    /// Which node it is, by the device of lane 0 and the prefix.
    nodes: BTreeMap<(DeviceNumber, Prefix), &'a NodeKey>,
}

impl<'a> Ways<'a> {
    fn of(health: &Health, devices: &'a BTreeMap<DeviceNumber, TunnelDevice>) -> Self {
        let mut all = Self { ways: BTreeMap::new(), nodes: BTreeMap::new() };
        for (&number, device) in devices {
            let first = number.in_lane(Lane::FIRST);
            for (key, peer) in &device.peers {
                let way = all.ways.entry((first, &peer.node)).or_default();
                if number == first {
                    way.push(Some(number));
                    let hosts = peer.tunnel.iter().filter_map(|a| Prefix::host(*a).ok());
                    let prefixes = peer.allowed.iter().copied().chain(hosts);
                    all.nodes.extend(prefixes.map(|prefix| ((first, prefix), &peer.node)));
                } else {
                    way.push(health.alive.contains(&(number, *key)).then_some(number));
                }
            }
        }
        all
    }

    /// A route of lane 0 in another one.
    fn route(&self, route: &Route, lane: Lane) -> Route {
        let device = |&first: &DeviceNumber| {
            let node = self.nodes.get(&(first, route.prefix));
            let way =
                node.and_then(|node| self.ways.get(&(first, *node))).map(Vec::as_slice).unwrap_or_default();
            let place = usize::from(lane.get()).checked_rem(way.len());
            place.and_then(|place| way.get(place).copied().flatten()).unwrap_or(first)
        };
        let via = match &route.via {
            Via::Devices(devices) => Via::Devices(devices.iter().map(device).collect()),
            Via::Bound(number) => Via::Bound(*number),
            Via::Unreachable => Via::Unreachable,
        };
        Route { table: route.table + u32::from(lane.get()), via, ..route.clone() }
    }
}
