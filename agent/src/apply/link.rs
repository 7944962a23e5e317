//! The link of a tunnel device and its addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecUnspec, InetDevConf, LinkAttribute, LinkFlags, LinkMessage,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{Link, Netlink, NetlinkError};

/// Alias of our links: with the name it makes them ours.
pub const ALIAS: &str = "tombolo";
/// Loose: paths are asymmetric. The larger of this and `all.rp_filter` holds.
const RP_FILTER: i32 = 2;

/// Addresses by link, without link-local ones: the kernel's own.
pub(super) type Addresses = BTreeMap<u32, BTreeSet<(IpAddr, u8)>>;

/// Reads all addresses.
pub(super) async fn addresses(netlink: &Netlink) -> Result<Addresses, NetlinkError> {
    let mut all = Addresses::new();
    for message in netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await? {
        let RouteNetlinkMessage::NewAddress(message) = message else { continue };
        if let Some(address) = address_of(&message) {
            all.entry(message.header.index).or_default().insert((address, message.header.prefix_len));
        }
    }
    Ok(all)
}

/// The address of a message, unless it is link-local.
pub(crate) fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => address = Some(*ip),
            AddressAttribute::Address(ip) => address = address.or(Some(*ip)),
            _ => {}
        }
    }
    address.filter(|a| match a {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    })
}

/// Sets what differs, in one message; whether there was anything.
pub(super) async fn configure(netlink: &Netlink, link: &Link, mtu: u16) -> Result<bool, NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    let attributes = &mut message.attributes;
    if link.alias.as_deref() != Some(ALIAS) {
        attributes.push(LinkAttribute::IfAlias(ALIAS.to_owned()));
    }
    if link.mtu != u32::from(mtu) {
        attributes.push(LinkAttribute::Mtu(u32::from(mtu)));
    }
    if link.rp_filter != Some(RP_FILTER) {
        let mut conf = InetDevConf::default();
        conf.rp_filter = RP_FILTER;
        let inet = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)]);
        attributes.push(LinkAttribute::AfSpecUnspec(vec![inet]));
    }
    if link.up && attributes.is_empty() {
        return Ok(false);
    }
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink.change(RouteNetlinkMessage::SetLink(message), 0).await?;
    Ok(true)
}

/// Adds an address.
pub(super) async fn add(netlink: &Netlink, index: u32, address: IpAddr) -> Result<(), NetlinkError> {
    let change = RouteNetlinkMessage::NewAddress(message(index, address, host_length(address)));
    netlink.change(change, NLM_F_CREATE | NLM_F_REPLACE).await
}

/// Removes an address.
pub(super) async fn remove(
    netlink: &Netlink,
    index: u32,
    (address, length): (IpAddr, u8),
) -> Result<(), NetlinkError> {
    match netlink.change(RouteNetlinkMessage::DelAddress(message(index, address, length)), 0).await {
        Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        other => other,
    }
}

/// /32 or /128.
pub(super) fn host_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn message(index: u32, address: IpAddr, length: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = length;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    if address.is_ipv6() {
        // Nobody to ask; and the address must serve at once.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}
