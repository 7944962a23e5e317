//! Routes of our two tables (`docs/datapath.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, Family, Lane, Prefix};

use super::findings::Findings;
use super::peer::MIN_MTU;
use super::roster::Stations;
use crate::desired::{Peer, Route, TABLE_IN, TABLE_OUT, TunnelDevice, Via};
use crate::liveness::PeerId;
use crate::world::{Health, Members, NodeWorld};

/// Plans the routes of this node over the slots that are not known to be dead. Also told: IPv6 destinations whose path
/// carries less than IPv6 asks for, none of them within another.
pub(crate) fn routes(
    world: &NodeWorld,
    members: &Members,
    stations: &BTreeMap<&ClusterId, Stations<'_>>,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    findings: &mut Findings,
) -> (BTreeSet<Route>, BTreeSet<Prefix>) {
    let Some(own) = members.get(&world.cluster) else { return Default::default() };
    let me = stations.get(&world.cluster).and_then(|own| own.get(&world.node));
    let gateway = me.is_some_and(|me| me.endpoint.rank.is_gateway());
    let source = |family: Family| -> Option<IpAddr> {
        me.and_then(|me| me.claim.tunnel.iter().copied().find(|a| Family::of(*a) == family))
    };
    let mut narrow = Narrow { devices, lengths: &world.health.narrow, found: BTreeSet::new() };
    let mut out = |prefix: Prefix, via: Via| {
        let source = if via == Via::Unreachable { None } else { source(prefix.family()) };
        let mtu = narrow.mtu(prefix, &via);
        Route { table: TABLE_OUT, prefix, via, source, mtu }
    };
    let mut routes = BTreeSet::new();
    let mut direct = direct(world, stations, devices);

    for (cluster, member) in members.iter().filter(|(id, _)| **id != world.cluster) {
        for &prefix in member.owned.union(&member.tunnel) {
            let ways: Vec<Way<'_>> =
                devices.iter().filter_map(|(n, d)| Way::find(*n, d, prefix, &world.health)).collect();
            let slots = if gateway { Way::of_gateway(&ways, cluster) } else { Way::of_node(&ways, cluster) };
            if let Some(trouble) = slots.trouble {
                findings.warning("NoLiveTunnel", format!("cluster {cluster}"), trouble);
            }
            // A node may have all that its cluster has.
            let slots = direct.remove(&prefix).map_or(slots.devices, |number| BTreeSet::from([number]));
            if !slots.is_empty() {
                routes.insert(out(prefix, Via::Devices(slots)));
            }
            routes.insert(out(prefix, Via::Unreachable));
        }
    }
    routes.extend(direct.into_iter().map(|(prefix, number)| out(prefix, Via::Devices([number].into()))));
    // A foreign gateway itself is reached by its own tunnel while that lives: echoes and their answers then tell of this
    // one path, whatever becomes of the others. A meshed node is, once its path has proved itself.
    let granted = |prefix: &Prefix| {
        members
            .iter()
            .any(|(id, m)| *id != world.cluster && (m.owned.contains(prefix) || m.tunnel.contains(prefix)))
    };
    for (&number, device) in devices.iter().filter(|(n, _)| n.family() == DeviceFamily::Out) {
        for (key, peer) in &device.peers {
            let id = (number, *key);
            let v4 = peer.tunnel.iter().any(IpAddr::is_ipv4);
            let carries = if gateway && number.rank().is_gateway() {
                !world.health.dead.contains(&id)
            } else {
                world.health.alive.contains(&id)
            };
            // Bound to a device, IPv4 goes out there without a route; IPv6 does not, and who is only there must be asked.
            let asked = peer.tunnel.iter().filter(|a| carries || (a.is_ipv6() && !v4));
            for prefix in asked.filter_map(|a| Prefix::host(*a).ok()).filter(|prefix| !granted(prefix)) {
                routes.insert(out(prefix, Via::Devices(BTreeSet::from([number]))));
            }
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
                let route = |&prefix: &Prefix| Route { table: TABLE_IN, source: None, ..out(prefix, via()) };
                routes.extend(peer.allowed.iter().filter(inside).map(route));
            }
        }
    }
    let found = std::mem::take(&mut narrow.found);
    for ((number, key), length) in world.health.narrow.iter().filter(|(_, length)| **length < MIN_MTU) {
        let Some(peer) = devices.get(number).and_then(|device| device.peers.get(key)) else { continue };
        let text = format!(
            "the path to it carries packets of {length} bytes inside of the tunnel, and IPv6 needs {MIN_MTU}: TCP goes on \
             with shorter segments, longer IPv6 packets of other protocols are lost; raise the MTU between the nodes"
        );
        findings.warning("PathTooNarrow", format!("node {}", peer.node), text);
    }
    let within = |prefix: &Prefix| found.iter().any(|other| other != prefix && other.covers(prefix));
    (routes, found.iter().filter(|prefix| !within(prefix)).copied().collect())
}

/// What paths carry less than their devices.
struct Narrow<'a> {
    devices: &'a BTreeMap<DeviceNumber, TunnelDevice>,
    lengths: &'a BTreeMap<PeerId, u16>,
    /// IPv6 destinations whose path carries less than IPv6 asks for.
    found: BTreeSet<Prefix>,
}

impl Narrow<'_> {
    /// The longest packet that a route's every path carries.
    fn mtu(&mut self, prefix: Prefix, via: &Via) -> Option<u16> {
        let Via::Devices(numbers) = via else { return None };
        // Hardly ever is there any.
        let of = self.lengths.iter().filter(|((number, key), _)| {
            let peer = self.devices.get(number).and_then(|device| device.peers.get(key));
            numbers.contains(number)
                && peer.is_some_and(|peer| {
                    let host = |a: &IpAddr| Prefix::host(*a).is_ok_and(|host| host == prefix);
                    peer.allowed.contains(&prefix) || peer.tunnel.iter().any(host)
                })
        });
        let least = of.map(|(_, length)| *length).min()?;
        if prefix.family() == Family::V6 && least < MIN_MTU {
            self.found.insert(prefix);
            return Some(MIN_MTU);
        }
        Some(least)
    }
}

/// What meshed nodes of other clusters have, by the device that leads to them: those whose path has proved itself. Unlike
/// a gateway's, a path that never answered is not used: firewalls often let gateways through alone.
fn direct(
    world: &NodeWorld,
    stations: &BTreeMap<&ClusterId, Stations<'_>>,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
) -> BTreeMap<Prefix, DeviceNumber> {
    let mut direct = BTreeMap::new();
    let me = stations.get(&world.cluster).and_then(|own| own.get(&world.node));
    let Some(me) = me else { return direct };
    for station in stations.values().flat_map(BTreeMap::values).filter(|station| station.direct) {
        let number = DeviceNumber::of(DeviceFamily::Out, station.endpoint.rank, Lane::FIRST);
        let theirs = DeviceNumber::of(DeviceFamily::Out, me.endpoint.rank, Lane::FIRST);
        let Some(key) = station.endpoint.devices.get(&theirs).map(|device| device.key) else { continue };
        let there = devices.get(&number).is_some_and(|device| device.peers.contains_key(&key));
        if there && world.health.alive.contains(&(number, key)) {
            direct.extend(station.ranges().map(|prefix| (prefix, number)));
        }
    }
    direct
}

/// A device with the peer that carries a prefix.
struct Way<'a> {
    number: DeviceNumber,
    peer: &'a Peer,
    alive: bool,
    /// It answers.
    proved: bool,
    /// It came lately.
    young: bool,
    /// Clusters that this own gateway cannot reach, if it said anything lately.
    told: Option<&'a BTreeSet<ClusterId>>,
    /// Clusters that it has not reached yet.
    untried: Option<&'a BTreeSet<ClusterId>>,
}

/// The slots of a route, and what is wrong with them.
struct Slots {
    devices: BTreeSet<DeviceNumber>,
    trouble: Option<String>,
}

impl<'a> Way<'a> {
    fn find(
        number: DeviceNumber,
        device: &'a TunnelDevice,
        prefix: Prefix,
        health: &'a Health,
    ) -> Option<Self> {
        let (key, peer) = device.peers.iter().find(|(_, p)| p.allowed.contains(&prefix))?;
        let (told, untried) = match number.family() {
            // A plain node has what it has; the rest of its cluster is not behind it.
            DeviceFamily::Out if !number.rank().is_gateway() => return None,
            DeviceFamily::Out => (None, None),
            // A plain node carries nothing for others.
            DeviceFamily::In if !number.rank().is_gateway() => return None,
            DeviceFamily::In => {
                (health.unreachable.get(&peer.node.node), health.untried.get(&peer.node.node))
            }
        };
        let id = (number, *key);
        Some(Self {
            number,
            peer,
            alive: !health.dead.contains(&id),
            proved: health.alive.contains(&id),
            young: health.young.contains(&id)
                || health.known.as_ref().is_some_and(|known| !known.contains(&id)),
            told,
            untried,
        })
    }

    fn slots(ways: &[Self], wanted: impl Fn(&Self) -> bool) -> BTreeSet<DeviceNumber> {
        ways.iter().filter(|way| wanted(way)).map(|way| way.number).collect()
    }

    /// A gateway uses its own tunnels; when all of them are dead, another gateway that says that it can reach the cluster,
    /// for its own packets (tunnels between own gateways carry no others').
    fn of_gateway(ways: &[Self], cluster: &ClusterId) -> Slots {
        let out = |way: &Self| way.number.family() == DeviceFamily::Out;
        let all = Self::slots(ways, out);
        let live = Self::slots(ways, |way| out(way) && way.alive);
        let ready = Self::slots(ways, |way| out(way) && way.alive && !way.young);
        if !ready.is_empty() {
            return Slots { devices: ready, trouble: None };
        }
        if !live.is_empty() || all.is_empty() {
            return Slots { devices: live, trouble: None };
        }
        let able = |way: &Self| way.told.is_some_and(|told| !told.contains(cluster));
        let others = Self::slots(ways, |way| !out(way) && way.alive && able(way));
        if others.is_empty() {
            let text = "no gateway of it answers any more; its routes stay as they were. Is it up, and does UDP pass?";
            return Slots { devices: all, trouble: Some(text.to_owned()) };
        }
        let names: Vec<_> =
            ways.iter().filter(|w| others.contains(&w.number)).map(|w| w.peer.node.to_string()).collect();
        let text =
            format!("no gateway of it answers this one any more; own packets go by {}", names.join(", "));
        Slots { devices: others, trouble: Some(text) }
    }

    /// A plain node uses the own gateways that live and do not say that they cannot reach the cluster; if there is none
    /// and it is meshed, the gateways at the other end.
    fn of_node(ways: &[Self], cluster: &ClusterId) -> Slots {
        let own = |way: &Self| way.number.family() == DeviceFamily::In;
        let refuses = |way: &Self| way.told.is_some_and(|told| told.contains(cluster));
        // A gateway that came lately gets packets once it answers and says that its own tunnels do.
        let early = |way: &Self| {
            let tried =
                |_: &BTreeSet<ClusterId>| way.untried.is_none_or(|untried| !untried.contains(cluster));
            way.young && !(way.proved && way.told.is_some_and(tried))
        };
        let ready = Self::slots(ways, |way| own(way) && way.alive && !refuses(way) && !early(way));
        if !ready.is_empty() {
            return Slots { devices: ready, trouble: None };
        }
        let best = Self::slots(ways, |way| own(way) && way.alive && !refuses(way));
        let all = Self::slots(ways, own);
        if !best.is_empty() || all.is_empty() {
            return Slots { devices: best, trouble: None };
        }
        let theirs = Self::slots(ways, |way| !own(way) && way.proved);
        if !theirs.is_empty() {
            return Slots { devices: theirs, trouble: None };
        }
        let live = Self::slots(ways, |way| own(way) && way.alive);
        if live.is_empty() {
            let text = "no own gateway answers any more; the routes stay as they were. Are they up?";
            return Slots { devices: all, trouble: Some(text.to_owned()) };
        }
        let text = "every own gateway that answers says that it cannot reach it; packets still go there";
        Slots { devices: live, trouble: Some(text.to_owned()) }
    }
}
