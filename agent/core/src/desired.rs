//! What should be. Appliers make it so and decide nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU16, NonZeroU32};

use ipnet::IpNet;
use serde::{Serialize, Serializer};
use tombolo_proto::model::{
    DeviceNumber, Endpoint, Family, Lane, Lanes, NodeName, Prefix, Protocol, Record, RecordKey, Scope,
    WireguardKey,
};

use crate::known::{Objects, Section};
use crate::object::{DerivedService, ExportStatus, Import, NodeKey, ServiceKey, Slice, SliceKey};
use crate::shelf::Shelf;
use crate::world::Reach;
use crate::zone::Zone;

/// Mark that tunnel devices send with, so that their own packets are not sent into tunnels again.
pub const MARK: u32 = 0x0100_0000;
/// Bits of [`MARK`].
pub const MARK_MASK: u32 = 0x0f00_0000;
/// Bits of a packet's mark that hold its lane ([`lane_mark`]).
pub const LANE_MASK: u32 = 0x7000_0000;
/// Mark of packets that stay in the lane that their mark bears: the agent's own, which ask for that very tunnel.
pub const LANE_KEPT: u32 = 0x8000_0000;
/// Table of routes to other clusters; those of lane l are in the l-th after it.
pub const TABLE_OUT: u32 = 4510;
/// Table for what came out of a tunnel; of lane l the l-th after it.
pub const TABLE_IN: u32 = 4520;
/// Protocol number of our routes and rules.
pub const ROUTE_PROTOCOL: u8 = 98;
/// Priority of the rule into [`TABLE_OUT`].
pub const PRIORITY_OUT: u32 = 110;
/// Priority of the rules into the tables of the other lanes. What these do not say, [`TABLE_OUT`] does.
pub const PRIORITY_LANE: u32 = 105;
/// Priority of the rules into [`TABLE_IN`].
pub const PRIORITY_IN: u32 = 100;
/// Metric of the route that keeps packets from leaving in clear.
pub const METRIC_UNREACHABLE: u32 = u32::MAX;
/// Metric of the routes that carry.
pub const METRIC: u32 = 100;
/// Metric of those that carry what is bound to their device.
pub const METRIC_BOUND: u32 = 200;
/// Where the resolver listens on a node.
pub const DNS_PORT: u16 = 10053;

/// Mark of packets that go by a lane, within [`LANE_MASK`].
pub fn lane_mark(lane: Lane) -> u32 {
    u32::from(lane.get()) << 28
}

/// Of a table of ours: [`TABLE_OUT`] or [`TABLE_IN`], and the lane.
pub fn table_lane(table: u32) -> Option<(u32, Lane)> {
    [TABLE_OUT, TABLE_IN].into_iter().find_map(|first| {
        let lane = Lane::new(table.checked_sub(first)?.try_into().ok()?)?;
        Some((first, lane))
    })
}

/// What should be on a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeDesired {
    /// Tunnel devices with their peers; a device exists while a peer needs it.
    pub devices: Section<BTreeMap<DeviceNumber, TunnelDevice>>,
    /// Routes of our tables.
    pub routes: Section<BTreeSet<Route>>,
    /// Rules of our priorities.
    pub rules: Section<BTreeSet<Rule>>,
    /// Our nft table.
    pub firewall: Section<Firewall>,
    /// What the resolver answers.
    pub zone: Section<Zone>,
}

/// A device on this node. It listens on [`DeviceNumber::default_port`] and sends with [`MARK`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TunnelDevice {
    /// Bytes.
    pub mtu: u16,
    /// This node's tunnel addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// By key of the peer's device.
    pub peers: BTreeMap<WireguardKey, Peer>,
}

/// The other end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Who it is.
    pub node: NodeKey,
    /// Where it may be, best first. Only for a peer that is new or dead: a live one roams.
    pub candidates: Vec<SocketAddr>,
    /// What it may send.
    pub allowed: BTreeSet<Prefix>,
    /// Its tunnel addresses, for echoes.
    pub tunnel: BTreeSet<IpAddr>,
}

/// A route of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Route {
    /// [`TABLE_OUT`] or [`TABLE_IN`], or one of another lane.
    pub table: u32,
    /// Where to.
    pub prefix: Prefix,
    /// How.
    pub via: Via,
    /// Source of this node's own packets.
    pub source: Option<IpAddr>,
    /// The longest packet, bytes, where that is less than its devices carry; at least 1280 in IPv6 (RFC 8200).
    pub mtu: Option<u16>,
}

/// How a route carries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Via {
    /// By these devices, flows spread evenly; [`METRIC`].
    Devices(BTreeSet<DeviceNumber>),
    /// By this device what is bound to it, and nothing else; [`METRIC_BOUND`].
    Bound(DeviceNumber),
    /// Not at all, and never in clear; [`METRIC_UNREACHABLE`].
    Unreachable,
}

/// A rule of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Rule {
    /// One rule a family.
    pub family: Family,
    /// Lower comes first.
    pub priority: u32,
    /// What it applies to.
    pub selector: Selector,
    /// Where to look.
    pub table: u32,
}

/// What a rule applies to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Selector {
    /// `not fwmark MARK/MARK_MASK`
    NotMark,
    /// `iif tombolo<n>`
    Device(DeviceNumber),
    /// `fwmark` of this lane, and not [`MARK`].
    Lane(Lane),
}

/// The data of our nft table; its chains are static.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Firewall {
    /// What may come in to own pods.
    pub reach: Reach,
    /// Own pod ranges.
    pub own: BTreeSet<Prefix>,
    /// Pod ranges on this node: the rest of `own` is transit here.
    pub local: BTreeSet<Prefix>,
    /// Foreign pod and tunnel ranges.
    pub remote: BTreeSet<Prefix>,
    /// This node's tunnel addresses.
    pub tunnel: BTreeSet<IpAddr>,
    /// Own tunnel ranges: echo requests to them may come in.
    pub own_tunnel: BTreeSet<Prefix>,
    /// Devices to other clusters that may exist.
    pub out_devices: BTreeSet<DeviceNumber>,
    /// Devices to own nodes that may exist.
    pub in_devices: BTreeSet<DeviceNumber>,
    /// Own exported (address, protocol, port), only of backends on this node's `local` ranges.
    pub exported: BTreeSet<(IpAddr, Protocol, u16)>,
    /// ClusterSetIPs balanced here (a directory's); empty under Kubernetes.
    pub vips: Shelf<Vip, Balance>,
    /// Where a directory's ClusterSetIPs come from. What nothing answers there is refused and never leaves the node,
    /// also before a VIP is known and after it is gone.
    pub clusterset: BTreeSet<IpNet>,
    /// Addresses on which pods ask for names; sent to [`DNS_PORT`] of this node.
    pub resolvers: BTreeSet<IpAddr>,
    /// IPv6 destinations whose path carries less than IPv6 asks for: TCP there is told of shorter segments. Disjoint.
    pub narrow: BTreeSet<Prefix>,
    /// Lanes that flows to other clusters are spread over.
    pub lanes: Lanes,
}

/// A virtual address and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Vip {
    /// A ClusterSetIP.
    pub address: IpAddr,
    /// Transport.
    pub protocol: Protocol,
    /// The service's port.
    pub port: u16,
}

/// Where a VIP's connections go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Eligible backends, and how many of all entries each has: a connection takes any entry. None refuses connections;
    /// at most 64 entries are used.
    #[serde(serialize_with = "entries")]
    pub backends: BTreeMap<(IpAddr, u16), NonZeroU16>,
    /// A client stays with a backend for so many seconds.
    pub affinity: Option<NonZeroU32>,
}

impl Balance {
    /// Entries of all backends: of how many a connection takes one.
    pub fn entries(&self) -> usize {
        self.backends.values().map(|count| usize::from(count.get())).sum()
    }
}

fn entries<S: Serializer>(
    backends: &BTreeMap<(IpAddr, u16), NonZeroU16>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(backends.iter().map(|((address, port), entries)| (address, port, entries)))
}

/// What should be in the cluster, as its controller writes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterDesired {
    /// What the cluster states. Keep: state nothing new.
    pub records: Section<BTreeMap<Scope, Shelf<RecordKey, Record>>>,
    /// Own nodes as in `records`, for the own MemberNodes.
    pub nodes: Section<BTreeMap<NodeName, Endpoint>>,
    /// ServiceImports.
    pub imports: Section<Objects<ServiceKey, Import>>,
    /// Imported EndpointSlices.
    pub slices: Section<Objects<SliceKey, Slice>>,
    /// Services that carry ClusterSetIPs; a directory has none.
    pub derived: Section<Objects<ServiceKey, DerivedService>>,
    /// Statuses of the users' ServiceExports.
    pub statuses: Section<BTreeMap<ServiceKey, ExportStatus>>,
}
