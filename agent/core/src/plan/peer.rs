//! Tunnel devices and their peers: ranks and two families (`docs/datapath.md`).
//!
//! The pair (x, y) always talks x.f\[rank of y\] to y.f\[rank of x\], so each side computes the same pairing alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use tombolo_proto::model::{
    ClusterId, DeviceFamily, DeviceNumber, Family, Lane, Lanes, NodeName, Prefix, WireguardKey,
};

use super::findings::Findings;
use super::roster::{Station, Stations};
use crate::desired::{Peer, TunnelDevice};
use crate::object::NodeKey;
use crate::world::{MemberNodes, Members, NodeWorld};

/// What a tunnel takes of each packet: IPv6 and UDP headers, WireGuard's own (32) with room for padding.
const OVERHEAD: u16 = 80;
/// The least that IPv6 works with (RFC 8200).
pub(crate) const MIN_MTU: u16 = 1280;

/// MTU inside the tunnels, the same in both families.
fn mtu(world: &NodeWorld, findings: &mut Findings) -> u16 {
    let mtu = world.underlay_mtu.saturating_sub(OVERHEAD);
    if mtu < MIN_MTU {
        let text = format!(
            "its links carry {} bytes; tunnels need {} or packets are cut in pieces: raise the MTU",
            world.underlay_mtu,
            MIN_MTU + OVERHEAD
        );
        findings.warning("MtuTooSmall", format!("node {}/{}", world.cluster, world.node), text);
    }
    mtu.max(MIN_MTU)
}

/// Plans the devices of this node.
pub(crate) fn devices(
    world: &NodeWorld,
    members: &Members,
    stations: &BTreeMap<&ClusterId, Stations<'_>>,
    findings: &mut Findings,
) -> BTreeMap<DeviceNumber, TunnelDevice> {
    let Some(own) = stations.get(&world.cluster) else { return BTreeMap::new() };
    let Some(me) = own.get(&world.node) else { return BTreeMap::new() };
    let mtu = mtu(world, findings);
    let all = members.get(&world.cluster).into_iter().flat_map(|own| own.nodes.values());
    let own_keys = all.flat_map(|e| e.devices.values().map(|d| d.key)).collect();
    let mut inner: BTreeSet<Prefix> = world.inner.clone();
    inner.extend(members.get(&world.cluster).into_iter().flat_map(|own| own.owned.union(&own.tunnel)));
    let mut devices = Devices { world, me, mtu, own_keys, inner, map: BTreeMap::new() };

    let ranges = |member: &MemberNodes| member.owned.union(&member.tunnel).copied().collect::<BTreeSet<_>>();
    let foreign: BTreeSet<Prefix> =
        members.iter().filter(|(id, _)| **id != world.cluster).flat_map(|(_, m)| ranges(m)).collect();

    for (&name, station) in own.iter().filter(|(name, _)| **name != &world.node) {
        let gateway = station.endpoint.rank.is_gateway();
        if !gateway && !me.endpoint.rank.is_gateway() {
            continue;
        }
        let mut allowed: BTreeSet<Prefix> = station.ranges().collect();
        if gateway {
            allowed.extend(&foreign);
        }
        devices.add(DeviceFamily::In, &world.cluster, name, station, &allowed, findings);
    }
    // In the order in which they were admitted: a key that two state is the first one's.
    let mut others: Vec<_> = members.iter().filter(|(id, _)| **id != world.cluster).collect();
    others.sort_by_key(|(id, member)| (member.serial, *id));
    for (cluster, member) in others {
        for (&name, station) in stations.get(cluster).into_iter().flatten() {
            let gateway = station.endpoint.rank.is_gateway();
            let both_gateways = gateway && me.endpoint.rank.is_gateway();
            if !both_gateways && !station.direct {
                continue;
            }
            // A gateway speaks for its whole cluster, to a plain node too: what it carries on for a node whose own way
            // is cut must not be dropped. It is the one peer of its cluster and rank.
            let allowed = if gateway { ranges(member) } else { station.ranges().collect() };
            devices.add(DeviceFamily::Out, cluster, name, station, &allowed, findings);
        }
    }
    devices.map
}

struct Devices<'a> {
    world: &'a NodeWorld,
    me: &'a Station<'a>,
    mtu: u16,
    /// Of all nodes of this cluster, for all their devices.
    own_keys: BTreeSet<WireguardKey>,
    /// Where no other cluster's node can be.
    inner: BTreeSet<Prefix>,
    map: BTreeMap<DeviceNumber, TunnelDevice>,
}

impl Devices<'_> {
    /// In every lane that both have.
    fn add(
        &mut self,
        family: DeviceFamily,
        cluster: &ClusterId,
        name: &NodeName,
        other: &Station<'_>,
        allowed: &BTreeSet<Prefix>,
        findings: &mut Findings,
    ) {
        let node = NodeKey { cluster: cluster.clone(), node: name.clone() };
        for lane in Lanes::MOST.iter() {
            let number = DeviceNumber::of(family, other.endpoint.rank, lane);
            let theirs = DeviceNumber::of(family, self.me.endpoint.rank, lane);
            let both = self.me.endpoint.devices.contains_key(&number)
                && other.endpoint.devices.contains_key(&theirs);
            if both || lane == Lane::FIRST {
                self.add_peer(&node, other, (number, theirs), allowed.clone(), findings);
            }
        }
    }

    fn add_peer(
        &mut self,
        node: &NodeKey,
        other: &Station<'_>,
        (number, theirs): (DeviceNumber, DeviceNumber),
        allowed: BTreeSet<Prefix>,
        findings: &mut Findings,
    ) {
        let Some(device) = other.endpoint.devices.get(&theirs) else {
            let text =
                format!("states no device {theirs}, so there is no tunnel to it; is its agent running?");
            findings.error("PeerDeviceMissing", format!("node {node}"), text);
            return;
        };
        // WireGuard itself refuses a peer that bears its own key; and what is ours nobody else speaks with.
        let foreign = node.cluster != self.world.cluster;
        if self.me.endpoint.devices.values().any(|mine| mine.key == device.key)
            || (foreign && self.own_keys.contains(&device.key))
        {
            let text = format!("states a key of this cluster's own for {theirs}; there is no tunnel to it");
            findings.error("KeyTwice", format!("node {node}"), text);
            return;
        }
        // Handshakes go where others say: not to our own pods, services and nodes.
        let ours = |a: IpAddr| foreign && self.inner.iter().any(|p| p.contains(a));
        if let Some(address) = other.endpoint.candidates.iter().find(|a| ours(**a))
            && number.lane() == Lane::FIRST
        {
            let text =
                format!("states that it is at {address}, which is this cluster's own; it is not tried there");
            findings.warning("CandidateIsOurs", format!("node {node}"), text);
        }
        let usable = |a: &&IpAddr| self.world.underlay.contains(&Family::of(**a)) && !ours(**a);
        let candidates: Vec<SocketAddr> = other
            .endpoint
            .candidates
            .iter()
            .filter(usable)
            .map(|a| SocketAddr::new(*a, device.port))
            .collect();
        let tunnel = other.claim.tunnel.clone();
        let entry = self.map.entry(number).or_insert_with(|| TunnelDevice {
            mtu: self.mtu,
            addresses: self.me.claim.tunnel.clone(),
            peers: BTreeMap::new(),
        });
        // A device has one peer a key. Whoever copies another's key shares its tunnel with the key's true holder,
        // instead of cutting that one off: all that the copier states, the holder may now send.
        if let Some(peer) = entry.peers.get_mut(&device.key) {
            let text =
                format!("states the key of {} for {theirs}; the key's holder speaks for both", peer.node);
            findings.error("KeyTwice", format!("node {node}"), text);
            peer.allowed.extend(allowed);
            peer.tunnel.extend(tunnel);
            for (place, candidate) in candidates.into_iter().enumerate() {
                if !peer.candidates.contains(&candidate) {
                    peer.candidates.insert((2 * place + 1).min(peer.candidates.len()), candidate);
                }
            }
            return;
        }
        entry.peers.insert(device.key, Peer { node: node.clone(), candidates, allowed, tunnel });
    }
}
