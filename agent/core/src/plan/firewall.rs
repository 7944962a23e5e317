//! The data of our nft table (`docs/datapath.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, Lane, NodeName, Prefix, Protocol, Rank};

use super::eligible::View;
use super::findings::Findings;
use super::roster::Stations;
use super::{peer, vip};
use crate::desired::Firewall;
use crate::object::{Import, ServiceKey, Slice, SliceKey};
use crate::world::{MemberNodes, NodeWorld};

/// Plans the table's data.
pub(crate) fn firewall(
    world: &NodeWorld,
    members: &BTreeMap<ClusterId, MemberNodes>,
    stations: &BTreeMap<&ClusterId, Stations<'_>>,
    hosts: &BTreeMap<IpAddr, NodeName>,
    view: View<'_>,
    (imports, slices): (&BTreeMap<ServiceKey, Import>, &BTreeMap<SliceKey, Slice>),
    findings: &mut Findings,
) -> Firewall {
    let own = members.get(&world.cluster);
    let claim = stations
        .get(&world.cluster)
        .and_then(|own| own.get(&world.node))
        .map(|me| me.claim.clone())
        .unwrap_or_default();
    let remote: BTreeSet<Prefix> = members
        .iter()
        .filter(|(id, _)| own.is_some() && **id != world.cluster)
        .flat_map(|(_, m)| m.owned.union(&m.tunnel).copied())
        .collect();
    let here = |address: IpAddr| {
        claim.tunnel.contains(&address) || claim.prefixes.iter().any(|p| p.contains(address))
    };
    // Others reach what is on this host's network by its tunnel address.
    let stated = |address: IpAddr| match hosts.get(&address) {
        Some(node) if *node == world.node => {
            claim.tunnel.iter().copied().find(|t| t.is_ipv4() == address.is_ipv4()).unwrap_or(address)
        }
        Some(_) | None => address,
    };
    // Whatever its readiness: that one changes often, and who may not have traffic is not sent any.
    let exported: BTreeSet<(IpAddr, Protocol, u16)> = slices
        .iter()
        .filter(|(key, _)| key.source == world.cluster)
        .flat_map(|(_, slice)| slice.ports.iter().map(move |port| (slice, port)))
        .flat_map(|(slice, port)| {
            slice.backends.iter().map(|b| (stated(b.address), port.protocol, port.port))
        })
        .filter(|(address, ..)| here(*address))
        .collect();
    let devices = |family: DeviceFamily| -> BTreeSet<DeviceNumber> {
        let ranks = [Rank::NODE].into_iter().chain(Rank::GATEWAYS);
        ranks.map(|rank| DeviceNumber::of(family, rank, Lane::FIRST)).collect()
    };
    Firewall {
        reach: world.reach,
        own: own.map(|m| m.owned.clone()).unwrap_or_default(),
        local: claim.prefixes.clone(),
        remote,
        own_tunnel: own.map(|m| m.tunnel.clone()).unwrap_or_default(),
        out_devices: devices(DeviceFamily::Out),
        in_devices: devices(DeviceFamily::In),
        exported,
        vips: vip::vips(world, view, imports, slices),
        clusterset: world.clusterset.map(|ranges| ranges.nets().collect()).unwrap_or_default(),
        resolvers: world.clusterset.map(|ranges| ranges.resolvers().collect()).unwrap_or_default(),
        mtu: peer::mtu(world, findings),
        tunnel: claim.tunnel,
    }
}
