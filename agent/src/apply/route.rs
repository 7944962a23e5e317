//! Routes of our tables, those of every lane. Ours are those with [`ROUTE_PROTOCOL`] in them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags, RouteProtocol,
    RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{IpVersion, RouteNextHopBuilder};
use serde::Serialize;
use tombolo_agent_core::desired::{
    METRIC, METRIC_BOUND, METRIC_UNREACHABLE, ROUTE_PROTOCOL, Route, Via, table_lane,
};
use tombolo_proto::model::{DeviceNumber, Prefix};

use super::netlink::{Links, Netlink, NetlinkError};
use super::{Action, ApplyError, Report, Subject};

/// `RTM_F_CLONED`: a cached exception, not a route somebody made.
const CLONED: u32 = 0x200;
/// `RTNH_F_DEAD` in a route's own flags.
const DEAD: u32 = 1;
/// `1 << RTAX_MTU`
const MTU_LOCK: u32 = 1 << 2;
/// The next hop of our v6 routes: the kernel refuses v6 multipath without one. A TUN asks nobody for it.
const V6_NEXT_HOP: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// What the kernel takes for the same route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct RouteKey {
    /// Table.
    pub table: u32,
    /// Destination.
    pub prefix: IpNet,
    /// Metric.
    pub metric: u32,
}

impl RouteKey {
    fn of(route: &Route) -> Self {
        let metric = match route.via {
            Via::Devices(_) => METRIC,
            Via::Bound(_) => METRIC_BOUND,
            Via::Unreachable => METRIC_UNREACHABLE,
        };
        Self { table: route.table, prefix: route.prefix.net(), metric }
    }
}

impl std::fmt::Display for RouteKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} table {} metric {}", self.prefix, self.table, self.metric)
    }
}

/// Our routes as they are; `None`: ours by its marks, but of no shape that we make.
pub(super) type Actual = BTreeMap<RouteKey, Vec<Option<Route>>>;

/// Reads them.
pub(super) async fn read(netlink: &Netlink, links: &Links) -> Result<Actual, NetlinkError> {
    let mut actual = Actual::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        // The kernel tells those of our protocol alone, whatever tables there are.
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        for message in netlink.dump(RouteNetlinkMessage::GetRoute(request)).await? {
            let RouteNetlinkMessage::NewRoute(message) = message else { continue };
            if let Some((key, route)) = parse(&message, links) {
                actual.entry(key).or_default().push(route);
            }
        }
    }
    Ok(actual)
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Diff {
    /// Not there.
    add: Vec<Route>,
    /// There, but different.
    replace: Vec<Route>,
    /// Not desired, so often.
    remove: Vec<(RouteKey, usize)>,
}

/// Compares. Devices that do not exist carry nothing yet: they are left out and named in the second value.
pub(super) fn diff(
    desired: &BTreeSet<Route>,
    actual: &Actual,
    exists: impl Fn(DeviceNumber) -> bool,
) -> (Diff, Vec<(RouteKey, DeviceNumber)>) {
    let mut diff = Diff::default();
    let mut missing = Vec::new();
    let mut keys = BTreeSet::new();
    for route in desired {
        let key = RouteKey::of(route);
        keys.insert(key);
        let mut route = route.clone();
        if let Via::Bound(number) = route.via
            && !exists(number)
        {
            missing.push((key, number));
            continue;
        }
        if let Via::Devices(devices) = &mut route.via {
            missing.extend(devices.iter().filter(|n| !exists(**n)).map(|n| (key, *n)));
            devices.retain(|n| exists(*n));
            if devices.is_empty() {
                continue;
            }
        }
        match actual.get(&key).map(Vec::as_slice) {
            None | Some([]) => diff.add.push(route),
            Some([Some(one)]) if *one == route => {}
            Some([_]) => diff.replace.push(route),
            Some([_, rest @ ..]) => {
                // Several at one key: somebody appended. Only a removal tells which one is left.
                diff.remove.push((key, rest.len()));
                diff.replace.push(route);
            }
        }
    }
    diff.remove
        .extend(actual.iter().filter(|(key, _)| !keys.contains(key)).map(|(key, all)| (*key, all.len())));
    (diff, missing)
}

impl Diff {
    /// Adds and changes.
    pub(super) async fn add(&self, netlink: &Netlink, links: &Links, report: &mut Report) {
        let all = self.add.iter().map(|route| (route, NLM_F_EXCL, Action::Added));
        for (route, flag, action) in
            all.chain(self.replace.iter().map(|r| (r, NLM_F_REPLACE, Action::Changed)))
        {
            let subject = Subject::Route(RouteKey::of(route));
            let change = RouteNetlinkMessage::NewRoute(message(route, links));
            report.note(
                subject,
                action,
                netlink.change(change, NLM_F_CREATE | flag).await.map_err(ApplyError::Netlink),
            );
        }
    }

    /// Removes.
    pub(super) async fn remove(&self, netlink: &Netlink, report: &mut Report) {
        for (key, times) in &self.remove {
            for _ in 0..*times {
                let change = RouteNetlinkMessage::DelRoute(removal(key));
                let result = match netlink.change(change, 0).await {
                    // It went by itself, as routes do with their link.
                    Err(error) if error.errno() == Some(libc::ESRCH) => continue,
                    other => other.map_err(ApplyError::Netlink),
                };
                report.note(Subject::Route(*key), Action::Removed, result);
            }
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn header(key: &RouteKey) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(key.prefix.addr());
    message.header.destination_prefix_length = key.prefix.prefix_len();
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.attributes = vec![
        RouteAttribute::Table(key.table),
        RouteAttribute::Priority(key.metric),
        RouteAttribute::Destination(RouteAddress::from(key.prefix.addr())),
    ];
    message
}

fn message(route: &Route, links: &Links) -> RouteMessage {
    let mut message = header(&RouteKey::of(route));
    let v4 = route.prefix.net().addr().is_ipv4();
    message.header.scope = RouteScope::Universe;
    message.attributes.extend(route.source.map(|s| RouteAttribute::PrefSource(RouteAddress::from(s))));
    let devices = match &route.via {
        Via::Devices(devices) => devices.clone(),
        Via::Bound(number) => BTreeSet::from([*number]),
        Via::Unreachable => {
            message.header.kind = RouteType::Unreachable;
            return message;
        }
    };
    message.header.kind = RouteType::Unicast;
    if v4 {
        message.header.scope = RouteScope::Link;
    }
    if let Some(mtu) = route.mtu {
        let mut metrics = vec![RouteMetric::Mtu(u32::from(mtu))];
        // What is only forwarded heeds a v6 route's MTU if it is locked; a locked v4 one takes DF from own packets.
        metrics.extend((!v4).then_some(RouteMetric::Lock(MTU_LOCK)));
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    let indexes: Vec<u32> = devices.iter().filter_map(|n| links.device(*n)).map(|link| link.index).collect();
    let gateway = RouteAttribute::Gateway(RouteAddress::Inet6(V6_NEXT_HOP));
    match *indexes.as_slice() {
        [index] => {
            message.attributes.push(RouteAttribute::Oif(index));
            // Also for one: only v6 routes with a next hop replace, and are replaced by, multipath.
            message.attributes.extend((!v4).then_some(gateway));
        }
        _ => message.attributes.push(RouteAttribute::MultiPath(
            indexes.iter().map(|index| next_hop(*index, (!v4).then(|| gateway.clone()))).collect(),
        )),
    }
    message
}

fn next_hop(index: u32, gateway: Option<RouteAttribute>) -> RouteNextHop {
    let mut hop = RouteNextHopBuilder::new_ipv4().interface(index).build();
    hop.attributes.extend(gateway);
    hop
}

fn removal(key: &RouteKey) -> RouteMessage {
    let mut message = header(key);
    message.header.scope = RouteScope::NoWhere;
    message.header.kind = RouteType::Unspec;
    message
}

fn parse(message: &RouteMessage, links: &Links) -> Option<(RouteKey, Option<Route>)> {
    if message.header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL)
        || message.header.flags.bits() & CLONED != 0
    {
        return None;
    }
    let version =
        if message.header.address_family == AddressFamily::Inet { IpVersion::V4 } else { IpVersion::V6 };
    let mut table = u32::from(message.header.table);
    let mut metric = 0;
    let mut destination = unspecified(&version);
    let mut source = None;
    let mut hops: BTreeSet<Option<DeviceNumber>> = BTreeSet::new();
    let mut odd = message.header.tos != 0 || message.header.source_prefix_length != 0;
    let dead = message.header.flags.bits() & DEAD != 0;
    let (mut mtu, mut lock) = (None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::PrefSource(address) => source = Some(ip(address)?),
            RouteAttribute::Oif(index) => {
                hops.insert(links.number(*index).filter(|_| !dead));
            }
            RouteAttribute::MultiPath(all) => hops.extend(all.iter().map(|hop| {
                links.number(hop.interface_index).filter(|_| !hop.flags.contains(RouteNextHopFlags::Dead))
            })),
            RouteAttribute::Gateway(address) => odd |= ip(address) != Some(IpAddr::V6(V6_NEXT_HOP)),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(bytes) => mtu = Some(*bytes),
                        RouteMetric::Lock(bits) => lock = *bits,
                        _ => {}
                    }
                }
            }
            RouteAttribute::Via(_) | RouteAttribute::Encap(_) | RouteAttribute::NhId(_) => odd = true,
            _ => {}
        }
    }
    table_lane(table)?;
    let prefix = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    let locked = mtu.is_some() && version == IpVersion::V6;
    odd |= lock & MTU_LOCK != if locked { MTU_LOCK } else { 0 };
    let mtu = match mtu.map(u16::try_from).transpose() {
        Ok(mtu) => mtu,
        Err(_) => {
            odd = true;
            None
        }
    };
    let key = RouteKey { table, prefix, metric };
    let via = match message.header.kind {
        RouteType::Unreachable => Some(Via::Unreachable),
        RouteType::Unicast => hops.into_iter().collect::<Option<BTreeSet<_>>>().and_then(|devices| {
            if metric == METRIC_BOUND {
                devices.first().copied().map(Via::Bound)
            } else {
                Some(Via::Devices(devices))
            }
        }),
        _ => None,
    };
    let route = via
        .filter(|_| !odd)
        .zip(Prefix::new(prefix).ok())
        .map(|(via, prefix)| Route { table, prefix, via, source, mtu })
        .filter(|route| RouteKey::of(route) == key);
    Some((key, route))
}

fn unspecified(version: &IpVersion) -> IpAddr {
    match version {
        IpVersion::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        IpVersion::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tombolo_agent_core::desired::TABLE_OUT;

    use super::super::netlink::Link;
    use super::*;

    fn number(n: u8) -> DeviceNumber {
        DeviceNumber::new(n).unwrap()
    }

    fn links() -> Links {
        let link = |n: u8| Link {
            index: u32::from(n) + 100,
            name: number(n).link(),
            alias: None,
            mtu: 1420,
            up: true,
            loopback: false,
            rp_filter: None,
        };
        Links((0..4).map(|n| (u32::from(n) + 100, link(n))).collect())
    }

    fn route(prefix: &str, devices: &[u8]) -> Route {
        let via = if devices.is_empty() {
            Via::Unreachable
        } else {
            Via::Devices(devices.iter().map(|n| number(*n)).collect())
        };
        Route { table: TABLE_OUT, prefix: prefix.parse().unwrap(), via, source: None, mtu: None }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let links = links();
        for prefix in ["10.2.0.0/16", "fd00:2::/48"] {
            for devices in [&[][..], &[1], &[1, 2], &[0, 1, 2]] {
                let mut route = route(prefix, devices);
                route.source = (!devices.is_empty()).then(|| "198.18.1.1".parse().unwrap());
                route.mtu = (devices.len() > 1).then_some(1280);
                let (key, read) = parse(&message(&route, &links), &links).unwrap();
                assert_eq!(read, Some(route.clone()), "{route:?}");
                assert_eq!(key, RouteKey::of(&route));
            }
            let bound = Route { table: TABLE_OUT + 2, via: Via::Bound(number(3)), ..route(prefix, &[]) };
            let (key, read) = parse(&message(&bound, &links), &links).unwrap();
            assert_eq!((key, read), (RouteKey::of(&bound), Some(bound)));
        }
    }

    #[test]
    fn foreign_routes_are_not_seen() {
        let mut foreign = message(&route("10.2.0.0/16", &[1]), &links());
        foreign.header.protocol = RouteProtocol::Static;
        assert_eq!(parse(&foreign, &links()), None);
        let mut elsewhere = message(&route("10.2.0.0/16", &[1]), &links());
        elsewhere.attributes[0] = RouteAttribute::Table(254);
        assert_eq!(parse(&elsewhere, &links()), None);
    }

    #[test]
    fn a_dead_or_unknown_device_is_a_difference() {
        let wanted = route("10.2.0.0/16", &[1, 2]);
        let mut message = message(&wanted, &links());
        let Some(RouteAttribute::MultiPath(hops)) = message.attributes.last_mut() else { panic!() };
        hops[0].flags = RouteNextHopFlags::Dead;
        let (key, read) = parse(&message, &links()).unwrap();
        assert_eq!(read, None);
        let actual = Actual::from([(key, vec![read])]);
        let (diff, _) = diff(&BTreeSet::from([wanted.clone()]), &actual, |_| true);
        assert_eq!(diff, Diff { replace: vec![wanted], ..Diff::default() });
    }

    #[test]
    fn differences_and_nothing_else() {
        let a = route("10.2.0.0/16", &[1, 2]);
        let b = route("10.3.0.0/16", &[1]);
        let gone = route("10.4.0.0/16", &[1]);
        let of = |r: &Route| (RouteKey::of(r), vec![Some(r.clone())]);
        let actual = Actual::from([of(&a), of(&route("10.3.0.0/16", &[2])), of(&gone)]);
        let desired = BTreeSet::from([a.clone(), b.clone(), route("10.2.0.0/16", &[])]);
        let (diff_, missing) = diff(&desired, &actual, |_| true);
        assert_eq!(diff_.add, vec![route("10.2.0.0/16", &[])]);
        assert_eq!(diff_.replace, vec![b]);
        assert_eq!(diff_.remove, vec![(RouteKey::of(&gone), 1)]);
        assert!(missing.is_empty());
        let after = Actual::from_iter(desired.iter().map(of));
        assert_eq!(diff(&desired, &after, |_| true), (Diff::default(), vec![]));
    }

    #[test]
    fn a_device_that_is_missing_is_left_out_and_named() {
        let wanted = BTreeSet::from([route("10.2.0.0/16", &[1, 2]), route("10.3.0.0/16", &[2])]);
        let (diff, missing) = diff(&wanted, &Actual::new(), |n| n != number(2));
        assert_eq!(diff.add, vec![route("10.2.0.0/16", &[1])]);
        assert_eq!(missing.len(), 2);
    }
}
