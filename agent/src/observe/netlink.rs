//! What the kernel tells: that something of ours was changed by somebody, and what lies under the tunnels.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::StreamExt;
use ipnet::IpNet;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use serde::Serialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tombolo_agent_core::desired::{ROUTE_PROTOCOL, table_lane};
use tombolo_proto::model::{Family, Prefix};
use tracing::{debug, warn};

use crate::apply::Writes;
use crate::apply::firewall::event::{self, Event};
use crate::apply::link::address_of;
use crate::apply::netlink::{Links, Netlink, NetlinkError, device_number};

/// Changes that come in a burst are told once.
const COALESCE: Duration = Duration::from_millis(20);
/// After a read that failed.
const RETRY: Duration = Duration::from_millis(500);
/// MTU of a node that has no link to the outside yet.
const MTU: u16 = 1500;
/// Routes and addresses that are kept, at most; a node with full Internet tables has no business here.
const MAX_ROUTES: usize = 100_000;
/// Receive buffer of the multicast socket, bytes; when it overflows we hear of it and read everything.
const BUFFER: usize = 1 << 20;

/// What the tunnels run over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Underlay {
    /// This node's addresses on the links that lead outside, global ones, best first; v4 before v6.
    pub addresses: Vec<IpAddr>,
    /// The smallest MTU of those links, bytes.
    pub mtu: u16,
    /// Routes to ranges on links of this node, without tunnel devices: where its pods may be.
    pub local: BTreeSet<IpNet>,
}

impl Default for Underlay {
    fn default() -> Self {
        Self { addresses: Vec::new(), mtu: MTU, local: BTreeSet::new() }
    }
}

impl Underlay {
    /// The node's own routes that lie in `owned`: the ranges of its pods, as far as the kernel knows.
    pub fn pod_ranges(&self, owned: &BTreeSet<Prefix>) -> BTreeSet<Prefix> {
        let local = self.local.iter().filter_map(|net| Prefix::new(*net).ok());
        local.filter(|prefix| owned.iter().any(|range| range.covers(prefix))).collect()
    }
}

/// Watches the kernel. Stops when dropped.
pub struct Monitor {
    underlay: Arc<ArcSwap<Underlay>>,
    dirty: Arc<Notify>,
    _tasks: JoinSet<()>,
}

impl Monitor {
    /// Starts to watch the network namespace of the calling thread; [`Self::underlay`] is known when this returns.
    pub async fn start() -> io::Result<Self> {
        let netlink = Netlink::open(Arc::new(Writes::default()))?;
        let (mut connection, handle, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])?;
        let _ = connection.socket_mut().socket_mut().set_rx_buf_sz(u32::try_from(BUFFER).unwrap_or(u32::MAX));
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);

        let first = read(&netlink).await.map_err(|e| io::Error::other(e.to_string()))?;
        let underlay = Arc::new(ArcSwap::from_pointee(first));
        let dirty = Arc::new(Notify::new());
        let watch = Watch { netlink, underlay: underlay.clone(), dirty: dirty.clone() };
        tasks.spawn(async move {
            // Its end would end the connection.
            let _handle = handle;
            watch.run(messages).await;
        });
        match netfilter_socket() {
            Ok(socket) => {
                tasks.spawn(watch_netfilter(socket, dirty.clone()));
            }
            Err(error) => warn!("changes of nft tables by others are seen late: {error}"),
        }
        Ok(Self { underlay, dirty, _tasks: tasks })
    }

    /// What is known now.
    pub fn underlay(&self) -> Arc<Underlay> {
        self.underlay.load_full()
    }

    /// Waits until something that bears our marks, or the underlay, may have changed since the last call returned.
    /// Our own changes are told too.
    pub async fn changed(&self) {
        self.dirty.notified().await;
    }
}

struct Watch {
    netlink: Netlink,
    underlay: Arc<ArcSwap<Underlay>>,
    dirty: Arc<Notify>,
}

impl Watch {
    async fn run(
        self,
        mut messages: impl futures::Stream<Item = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr)> + Unpin,
    ) {
        while let Some((message, _)) = messages.next().await {
            let mut concern = concern(&message);
            // What comes with it, is told with it.
            let more = tokio::time::sleep(COALESCE);
            tokio::pin!(more);
            loop {
                tokio::select! {
                    biased;
                    next = messages.next() => match next {
                        Some((message, _)) => concern = concern.max(self::concern(&message)),
                        None => break,
                    },
                    () = &mut more => break,
                }
            }
            match concern {
                Concern::None => {}
                Concern::Ours => self.dirty.notify_one(),
                Concern::Underlay => {
                    self.refresh().await;
                    self.dirty.notify_one();
                }
            }
        }
        warn!("the kernel tells nothing any more; changes by others are seen late");
    }

    async fn refresh(&self) {
        loop {
            match read(&self.netlink).await {
                Ok(new) => {
                    if **self.underlay.load() != new {
                        debug!(addresses = ?new.addresses, mtu = new.mtu, "the underlay changed");
                        self.underlay.store(Arc::new(new));
                    }
                    return;
                }
                Err(NetlinkError::Closed) => return,
                Err(error) => warn!("cannot read links and addresses, retrying: {error}"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Whom a message concerns; the greater includes the lesser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Concern {
    None,
    Ours,
    Underlay,
}

fn concern(message: &NetlinkMessage<RouteNetlinkMessage>) -> Concern {
    let NetlinkPayload::InnerMessage(inner) = &message.payload else {
        // An overrun: anything may have happened.
        return Concern::Underlay;
    };
    match inner {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            if is_ours(link) {
                Concern::Ours
            } else {
                Concern::Underlay
            }
        }
        // Addresses name no link: ours and others are looked at together.
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Concern::Underlay,
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => route_concern(route),
        RouteNetlinkMessage::NewRule(rule) | RouteNetlinkMessage::DelRule(rule) => rule_concern(rule),
        _ => Concern::None,
    }
}

fn is_ours(link: &LinkMessage) -> bool {
    let mut names = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    names.any(|name| device_number(name).is_some())
}

fn route_concern(route: &RouteMessage) -> Concern {
    match table(route) {
        ours if table_lane(ours).is_some() => Concern::Ours,
        main if main == u32::from(RouteHeader::RT_TABLE_MAIN) => Concern::Underlay,
        _ => Concern::None,
    }
}

fn rule_concern(rule: &RuleMessage) -> Concern {
    let ours = rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)));
    if ours { Concern::Ours } else { Concern::None }
}

fn table(route: &RouteMessage) -> u32 {
    let attribute = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(number) => Some(*number),
        _ => None,
    });
    attribute.unwrap_or(u32::from(route.header.table))
}

async fn read(netlink: &Netlink) -> Result<Underlay, NetlinkError> {
    let links = netlink.links().await?;
    let mut addresses: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    for message in netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await? {
        let RouteNetlinkMessage::NewAddress(message) = message else { continue };
        if let Some(address) = address_of(&message).filter(|_| is_lasting(&message)) {
            addresses.entry(message.header.index).or_default().push(address);
        }
    }
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.attributes.push(RouteAttribute::Table(u32::from(RouteHeader::RT_TABLE_MAIN)));
        for message in netlink.dump(RouteNetlinkMessage::GetRoute(request)).await? {
            let RouteNetlinkMessage::NewRoute(message) = message else { continue };
            if routes.len() < MAX_ROUTES && table(&message) == u32::from(RouteHeader::RT_TABLE_MAIN) {
                routes.extend(MainRoute::parse(&message));
            }
        }
    }
    Ok(underlay(&links, &addresses, &routes))
}

/// Neither temporary nor on its way out.
fn is_lasting(message: &AddressMessage) -> bool {
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = flags.unwrap_or(AddressFlags::empty());
    let v6 = message.header.family == AddressFamily::Inet6;
    // IFA_F_SECONDARY means "temporary" for v6 (RFC 8981), and merely "not the first" for v4.
    let bad = AddressFlags::Deprecated | AddressFlags::Dadfailed | AddressFlags::Tentative;
    let bad = if v6 { bad | AddressFlags::Secondary } else { bad };
    !flags.intersects(bad)
}

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MainRoute {
    net: IpNet,
    metric: u32,
    links: Vec<u32>,
    has_gateway: bool,
    source: Option<IpAddr>,
}

impl MainRoute {
    fn parse(message: &RouteMessage) -> Option<Self> {
        if message.header.kind != RouteType::Unicast {
            return None;
        }
        let mut destination = match message.header.address_family {
            AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let (mut metric, mut links, mut has_gateway, mut source) = (0, Vec::new(), false, None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => destination = ip(address)?,
                RouteAttribute::Priority(number) => metric = *number,
                RouteAttribute::Oif(index) => links.push(*index),
                RouteAttribute::MultiPath(hops) => {
                    links.extend(hops.iter().map(|hop| hop.interface_index));
                    has_gateway = true;
                }
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => has_gateway = true,
                RouteAttribute::PrefSource(address) => source = ip(address),
                _ => {}
            }
        }
        let net = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
        Some(Self { net, metric, links, has_gateway, source })
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn underlay(links: &Links, addresses: &BTreeMap<u32, Vec<IpAddr>>, routes: &[MainRoute]) -> Underlay {
    let usable = |index: &u32| {
        links.0.get(index).is_some_and(|link| link.up && !link.loopback && link.device().is_none())
    };
    let mut all = Vec::new();
    let mut outside = BTreeSet::new();
    for family in Family::ALL {
        let of_family: Vec<&MainRoute> =
            routes.iter().filter(|r| Family::of(r.net.addr()) == family).collect();
        let mut leading: Vec<&MainRoute> =
            of_family.iter().filter(|r| r.net.prefix_len() == 0).copied().collect();
        if leading.is_empty() {
            // No default route: what leads through a router leads outside too.
            leading = of_family.iter().filter(|r| r.has_gateway).copied().collect();
        }
        leading.sort_by_key(|route| (route.metric, route.links.clone()));
        for route in leading {
            for index in route.links.iter().filter(|index| usable(index)) {
                outside.insert(*index);
                let own = addresses.get(index).into_iter().flatten().copied();
                let own = own.filter(|address| Family::of(*address) == family);
                for address in route.source.into_iter().chain(own) {
                    if !all.contains(&address) {
                        all.push(address);
                    }
                }
            }
        }
    }
    let mtus = outside.iter().filter_map(|index| u16::try_from(links.0.get(index)?.mtu).ok());
    let direct =
        routes.iter().filter(|r| !r.has_gateway && r.net.prefix_len() > 0 && r.links.iter().all(usable));
    Underlay {
        addresses: all,
        mtu: mtus.min().unwrap_or(MTU),
        local: direct.map(|route| route.net).collect(),
    }
}

fn netfilter_socket() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    event::join(socket.socket_mut())?;
    Ok(socket)
}

/// Tells when something in our nft table changed.
async fn watch_netfilter(socket: TokioSocket, dirty: Arc<Notify>) {
    loop {
        match socket.recv_from_full().await {
            Ok((datagram, _)) => {
                if event::events(&datagram).contains(&Event::Ours) {
                    dirty.notify_one();
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => dirty.notify_one(),
            Err(error) => return warn!("changes of nft tables by others are seen late: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::netlink::Link;

    fn links(all: &[(u32, &str, u32)]) -> Links {
        let link = |(index, name, mtu): &(u32, &str, u32)| Link {
            index: *index,
            name: (*name).to_owned(),
            alias: None,
            mtu: *mtu,
            up: true,
            loopback: *name == "lo",
            rp_filter: None,
        };
        Links(all.iter().map(|l| (l.0, link(l))).collect())
    }

    fn route(net: &str, link: u32, has_gateway: bool) -> MainRoute {
        MainRoute { net: net.parse().unwrap(), metric: 0, links: vec![link], has_gateway, source: None }
    }

    #[test]
    fn the_underlay_is_what_leads_outside() {
        let links = links(&[(1, "lo", 65536), (2, "eth0", 1450), (3, "cni0", 1500), (4, "tombolo1", 1380)]);
        let addresses = BTreeMap::from([
            (1, vec!["127.0.0.1".parse().unwrap()]),
            (2, vec!["2001:db8::5".parse().unwrap(), "192.0.2.5".parse().unwrap()]),
            (3, vec!["10.1.3.1".parse().unwrap()]),
            (4, vec!["198.18.1.3".parse().unwrap()]),
        ]);
        let routes = [
            route("0.0.0.0/0", 2, true),
            route("::/0", 2, true),
            route("10.1.3.0/24", 3, false),
            route("198.18.9.0/24", 4, false),
            route("10.1.4.0/24", 2, true),
        ];
        let underlay = underlay(&links, &addresses, &routes);
        let expected: Vec<IpAddr> = ["192.0.2.5", "2001:db8::5"].iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!((underlay.addresses.clone(), underlay.mtu), (expected, 1450));
        let owned = BTreeSet::from(["10.1.0.0/16".parse().unwrap()]);
        assert_eq!(underlay.pod_ranges(&owned), BTreeSet::from(["10.1.3.0/24".parse().unwrap()]));
    }
}
