//! Tunnel devices and their peers: ranks and two families (`docs/datapath.md`).
//!
//! The pair (x, y) always talks x.f\[rank of y\] to y.f\[rank of x\], so each side computes the same pairing alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, Family, Lane, NodeName, Prefix};

use super::findings::Findings;
use super::roster::{Station, Stations};
use crate::desired::{Peer, TunnelDevice};
use crate::object::NodeKey;
use crate::world::{MemberNodes, NodeWorld};

/// What a tunnel takes of each packet: IPv6 and UDP headers, WireGuard's own (32) with room for padding.
const OVERHEAD: u16 = 80;
/// The least that IPv6 works with (RFC 8200).
const MIN_MTU: u16 = 1280;

/// MTU inside the tunnels, the same in both families.
pub(crate) fn mtu(world: &NodeWorld, findings: &mut Findings) -> u16 {
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
    members: &BTreeMap<ClusterId, MemberNodes>,
    stations: &BTreeMap<&ClusterId, Stations<'_>>,
    findings: &mut Findings,
) -> BTreeMap<DeviceNumber, TunnelDevice> {
    let Some(own) = stations.get(&world.cluster) else { return BTreeMap::new() };
    let Some(me) = own.get(&world.node) else { return BTreeMap::new() };
    let mtu = mtu(world, findings);
    let mut devices = Devices { world, me, mtu, map: BTreeMap::new() };

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
        devices.add(DeviceFamily::In, &world.cluster, name, station, allowed, findings);
    }
    if me.endpoint.rank.is_gateway() {
        for (&cluster, stations) in stations.iter().filter(|(id, _)| **id != &world.cluster) {
            let Some(member) = members.get(cluster) else { continue };
            for (&name, station) in stations.iter().filter(|(_, s)| s.endpoint.rank.is_gateway()) {
                devices.add(DeviceFamily::Out, cluster, name, station, ranges(member), findings);
            }
        }
    }
    devices.map
}

struct Devices<'a> {
    world: &'a NodeWorld,
    me: &'a Station<'a>,
    mtu: u16,
    map: BTreeMap<DeviceNumber, TunnelDevice>,
}

impl Devices<'_> {
    fn add(
        &mut self,
        family: DeviceFamily,
        cluster: &ClusterId,
        name: &NodeName,
        other: &Station<'_>,
        allowed: BTreeSet<Prefix>,
        findings: &mut Findings,
    ) {
        let node = NodeKey { cluster: cluster.clone(), node: name.clone() };
        let number = DeviceNumber::of(family, other.endpoint.rank, Lane::FIRST);
        let theirs = DeviceNumber::of(family, self.me.endpoint.rank, Lane::FIRST);
        let Some(device) = other.endpoint.devices.get(&theirs) else {
            let text =
                format!("states no device {theirs}, so there is no tunnel to it; is its agent running?");
            findings.error("PeerDeviceMissing", format!("node {node}"), text);
            return;
        };
        // WireGuard itself refuses a peer that bears its own key.
        if self.me.endpoint.devices.get(&number).is_some_and(|mine| mine.key == device.key) {
            let text = format!("states this node's own key for {theirs}; there is no tunnel to it");
            findings.error("KeyTwice", format!("node {node}"), text);
            return;
        }
        let usable = |a: &&std::net::IpAddr| self.world.underlay.contains(&Family::of(**a));
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
        entry.peers.insert(device.key, Peer { node, candidates, allowed, tunnel });
    }
}
