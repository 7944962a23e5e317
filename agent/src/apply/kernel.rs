//! Devices of the kernel's own WireGuard: links of kind `wireguard`, configured by generic netlink
//! (`include/uapi/linux/wireguard.h`).
//!
//! The kernel keeps one key for each device: while a key is rotated, packets wait for the handshake with the new one.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use genetlink::GenetlinkHandle;
use ipnet::IpNet;
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr as Allowed,
    WireguardAttribute as Device, WireguardCmd, WireguardMessage, WireguardPeer,
    WireguardPeerAttribute as Peer, WireguardPeerFlags as Flags,
};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tombolo_proto::model::{DeviceNumber, WireguardKey};

use super::Writes;
use super::device::{
    DeviceChange, DeviceError, DeviceState, KEEPALIVE, PeerAction, PeerChange, PeerState, TunnelDriver,
};
use super::link::ALIAS;
use super::netlink::{Netlink, NetlinkError, device_number, refused};

/// Allowed IPs of one message, at 40 bytes each: a nested attribute holds 64 KiB.
const BATCH: usize = 500;
/// Peers of one message.
const PEERS: usize = 200;

/// The kernel's WireGuard, of the network namespace in which this was made.
pub struct Kernel {
    netlink: Netlink,
    handle: GenetlinkHandle,
    /// As with other netlink sockets: one dump at a time.
    dumping: Mutex<()>,
    task: AbortHandle,
    writes: Arc<Writes>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kernel {
    /// Needs a tokio runtime. Whether this kernel has WireGuard shows when a device is made.
    ///
    /// # Errors
    /// If there is no netlink socket to be had.
    pub fn open(writes: Arc<Writes>) -> io::Result<Self> {
        let netlink = Netlink::open(writes.clone())?;
        let (mut connection, handle, _) = genetlink::new_connection()?;
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        let task = tokio::spawn(connection).abort_handle();
        Ok(Self { netlink, handle, dumping: Mutex::default(), task, writes })
    }

    /// Fails if this kernel has no WireGuard. Loads its module, if it can.
    ///
    /// # Errors
    /// As [`Kernel::is_missing`] knows it.
    pub async fn require(&self) -> Result<(), DeviceError> {
        let missing = || NetlinkError::Refused { errno: libc::EOPNOTSUPP, message: String::new() };
        let family = self.handle.resolve_family::<WireguardMessage>().await;
        family.map(drop).map_err(|_| DeviceError::Kernel(missing()))
    }

    /// Whether an error says that this kernel has no WireGuard.
    pub fn is_missing(error: &DeviceError) -> bool {
        matches!(error, DeviceError::Kernel(error) if error.errno() == Some(libc::EOPNOTSUPP))
    }

    /// All that the kernel answers to one message; `flags` beside `NLM_F_REQUEST`.
    async fn ask(
        &self,
        command: WireguardCmd,
        attributes: Vec<Device>,
        flags: u16,
    ) -> Result<Vec<WireguardMessage>, NetlinkError> {
        let payload = WireguardMessage { cmd: command, attributes };
        let mut message = NetlinkMessage::from(GenlMessage::from_payload(payload));
        message.header.flags = NLM_F_REQUEST | flags;
        let _one = if flags & NLM_F_DUMP != 0 { Some(self.dumping.lock().await) } else { None };
        let answers = self.handle.clone().request(message).await;
        let mut answers = std::pin::pin!(answers.map_err(|error| match error {
            genetlink::GenetlinkError::NetlinkError(error) => {
                NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(0), message: String::new() }
            }
            _ => NetlinkError::Closed,
        })?);
        let mut all = Vec::new();
        while let Some(answer) = answers.next().await {
            let answer = answer.map_err(|error| NetlinkError::Refused {
                errno: libc::EBADMSG,
                message: error.to_string(),
            })?;
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => all.push(inner.payload),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(all),
                NetlinkPayload::Error(error) => return Err(refused(&error)),
                NetlinkPayload::Done(_) => return Ok(all),
                _ => {}
            }
        }
        if flags & NLM_F_DUMP == 0 { Err(NetlinkError::Closed) } else { Ok(all) }
    }
}

#[async_trait]
impl TunnelDriver for Kernel {
    async fn list(&self) -> Result<BTreeSet<DeviceNumber>, DeviceError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let all = self.netlink.dump(request).await.map_err(DeviceError::Kernel)?;
        Ok(all.iter().filter_map(ours).collect())
    }

    async fn create(&self, number: DeviceNumber) -> Result<bool, DeviceError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(number.link()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]));
        let made =
            self.netlink.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await;
        match made {
            // At once: without its alias it is somebody else's, and never removed.
            Ok(()) => {
                let mut message = LinkMessage::default();
                message.attributes.push(LinkAttribute::IfName(number.link()));
                message.attributes.push(LinkAttribute::IfAlias(ALIAS.to_owned()));
                let set = self.netlink.change(RouteNetlinkMessage::SetLink(message), 0).await;
                set.map(|()| true).map_err(DeviceError::Kernel)
            }
            Err(error) if error.errno() == Some(libc::EEXIST) => match self.list().await?.contains(&number) {
                true => Ok(false),
                false => Err(DeviceError::Foreign(number)),
            },
            Err(error) => Err(DeviceError::Kernel(error)),
        }
    }

    async fn remove(&self, number: DeviceNumber) -> Result<(), DeviceError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(number.link()));
        match self.netlink.change(RouteNetlinkMessage::DelLink(message), 0).await {
            Err(error) if error.errno() != Some(libc::ENODEV) => Err(DeviceError::Kernel(error)),
            _ => Ok(()),
        }
    }

    async fn read(&self, number: DeviceNumber) -> Result<DeviceState, DeviceError> {
        let name = vec![Device::IfName(number.link())];
        let answers = self.ask(WireguardCmd::GetDevice, name, NLM_F_DUMP).await;
        Ok(parse(&answers.map_err(DeviceError::Kernel)?))
    }

    async fn write(&self, number: DeviceNumber, change: &DeviceChange<'_>) -> Result<(), DeviceError> {
        // Kernels before 6.16 cannot take a single allowed IP away: what stays is said anew.
        let takes =
            |peer: &PeerChange| matches!(&peer.what, PeerAction::Change { forbid, .. } if !forbid.is_empty());
        let state =
            if change.peers.iter().any(takes) { self.read(number).await? } else { DeviceState::default() };
        self.writes.uapi();
        for attributes in messages(number, change, &state) {
            self.ask(WireguardCmd::SetDevice, attributes, NLM_F_ACK).await.map_err(DeviceError::Kernel)?;
        }
        Ok(())
    }
}

/// The number of one of our devices, if that is what a link is.
fn ours(message: &RouteNetlinkMessage) -> Option<DeviceNumber> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let mut number = None;
    let (mut kind, mut marked) = (false, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => number = device_number(name),
            LinkAttribute::IfAlias(alias) => marked = alias == ALIAS,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Wireguard)));
            }
            _ => {}
        }
    }
    number.filter(|_| kind && marked)
}

/// A state may come in several messages, and one peer in several parts.
fn parse(answers: &[WireguardMessage]) -> DeviceState {
    let mut state = DeviceState::default();
    for attribute in answers.iter().flat_map(|answer| &answer.attributes) {
        match attribute {
            Device::PublicKey(key) => state.key = Some(WireguardKey(*key)),
            Device::ListenPort(port) => state.port = *port,
            Device::Fwmark(mark) => state.mark = *mark,
            Device::Peers(peers) => peers.iter().for_each(|peer| parse_peer(&mut state, peer)),
            _ => {}
        }
    }
    state
}

fn parse_peer(state: &mut DeviceState, attributes: &[Peer]) {
    let key = attributes.iter().find_map(|attribute| match attribute {
        Peer::PublicKey(key) => Some(WireguardKey(*key)),
        _ => None,
    });
    let Some(key) = key else { return };
    let peer: &mut PeerState = state.peers.entry(key).or_default();
    for attribute in attributes {
        match attribute {
            Peer::Endpoint(endpoint) => peer.endpoint = Some(*endpoint),
            Peer::PersistentKeepalive(seconds) => peer.keepalive = *seconds,
            Peer::LastHandshake(at) => {
                let (seconds, nanos) = (u64::try_from(at.seconds), u32::try_from(at.nano_seconds));
                let at = Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0));
                peer.last_handshake = (!at.is_zero()).then_some(at);
            }
            Peer::RxBytes(bytes) => peer.received = *bytes,
            Peer::TxBytes(bytes) => peer.sent = *bytes,
            Peer::AllowedIps(ips) => peer.allowed.extend(ips.iter().filter_map(|ip| parse_allowed(ip))),
            _ => {}
        }
    }
}

fn parse_allowed(attributes: &[Allowed]) -> Option<IpNet> {
    let (mut address, mut length) = (None, None);
    for attribute in attributes {
        match attribute {
            Allowed::IpAddr(ip) => address = Some(*ip),
            Allowed::Cidr(bits) => length = Some(*bits),
            _ => {}
        }
    }
    IpNet::new(address?, length?).ok()
}

/// The change as messages, each no larger than the kernel takes. `state`: the device as it is, if anything is forbidden.
fn messages(number: DeviceNumber, change: &DeviceChange<'_>, state: &DeviceState) -> Vec<Vec<Device>> {
    let name = || Device::IfName(number.link());
    let mut first = vec![name()];
    first.extend(change.key.map(|key| Device::PrivateKey(*key.bytes())));
    first.extend(change.port.map(Device::ListenPort));
    first.extend(change.mark.map(Device::Fwmark));
    let mut messages = Vec::new();
    let (mut peers, mut room) = (Vec::new(), BATCH);
    for part in change.peers.iter().flat_map(|peer| parts(peer, state)) {
        if !peers.is_empty() && (peers.len() >= PEERS || part.1 > room) {
            first.push(Device::Peers(std::mem::take(&mut peers)));
            messages.push(std::mem::replace(&mut first, vec![name()]));
            room = BATCH;
        }
        room = room.saturating_sub(part.1);
        peers.push(part.0);
    }
    if !peers.is_empty() {
        first.push(Device::Peers(peers));
    }
    if first.len() > 1 {
        messages.push(first);
    }
    messages
}

/// A peer's change in parts, and how many allowed IPs each bears.
fn parts(change: &PeerChange, state: &DeviceState) -> Vec<(WireguardPeer, usize)> {
    let key = || Peer::PublicKey(change.key.0);
    let (mut attributes, mut allowed) = (vec![key()], Vec::new());
    match &change.what {
        PeerAction::Add { endpoint, allowed: all, replaces: _ } => {
            attributes.push(Peer::Flags(Flags::ReplaceAllowedIps));
            attributes.extend(endpoint.map(Peer::Endpoint));
            attributes.push(Peer::PersistentKeepalive(KEEPALIVE));
            allowed.extend(all.iter().copied());
        }
        PeerAction::Change { endpoint, keepalive, allow, forbid } => {
            let mut flags = Flags::UpdateOnly;
            if forbid.is_empty() {
                allowed.extend(allow.iter().copied());
            } else {
                flags |= Flags::ReplaceAllowedIps;
                let there = state.peers.get(&change.key).map(|peer| &peer.allowed);
                let stays = there.into_iter().flatten().filter(|net| !forbid.contains(*net));
                allowed.extend(stays.chain(allow).copied().collect::<BTreeSet<IpNet>>());
            }
            attributes.push(Peer::Flags(flags));
            attributes.extend(endpoint.map(Peer::Endpoint));
            attributes.extend(keepalive.then_some(Peer::PersistentKeepalive(KEEPALIVE)));
        }
        PeerAction::Remove => attributes.push(Peer::Flags(Flags::RemoveMe)),
    }
    let mut parts = Vec::new();
    let mut chunks = allowed.chunks(BATCH);
    let first = chunks.next().unwrap_or_default();
    attributes.push(Peer::AllowedIps(first.iter().map(write_allowed).collect()));
    parts.push((WireguardPeer(attributes), first.len()));
    for chunk in chunks {
        // What stands in the parts before stays.
        let more = vec![
            key(),
            Peer::Flags(Flags::UpdateOnly),
            Peer::AllowedIps(chunk.iter().map(write_allowed).collect()),
        ];
        parts.push((WireguardPeer(more), chunk.len()));
    }
    parts
}

fn write_allowed(net: &IpNet) -> WireguardAllowedIp {
    let family = match net {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        Allowed::Family(family),
        Allowed::IpAddr(net.network()),
        Allowed::Cidr(net.prefix_len()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn count(message: &[Device]) -> (usize, usize) {
        let mut counts = (0, 0);
        for attribute in message {
            let Device::Peers(peers) = attribute else { continue };
            counts.0 += peers.len();
            for attribute in peers.iter().flat_map(|peer| peer.iter()) {
                if let Peer::AllowedIps(ips) = attribute {
                    counts.1 += ips.len();
                }
            }
        }
        counts
    }

    #[test]
    fn what_is_too_much_for_one_message_is_several() {
        let number = DeviceNumber::new(3).unwrap();
        let many: BTreeSet<IpNet> =
            (0..1201_u32).map(|n| IpNet::V4(ipnet::Ipv4Net::new(n.into(), 32).unwrap())).collect();
        let add = |n: u8, allowed: &BTreeSet<IpNet>| PeerChange {
            key: WireguardKey([n; 32]),
            what: PeerAction::Add { endpoint: None, allowed: allowed.clone(), replaces: None },
        };
        let few = BTreeSet::from([net("10.1.0.0/16")]);
        let change = DeviceChange {
            port: Some(4513),
            peers: vec![add(1, &few), add(2, &many), add(3, &few)],
            ..DeviceChange::default()
        };
        let all = messages(number, &change, &DeviceState::default());
        let counts: Vec<_> = all.iter().map(|message| count(message)).collect();
        assert_eq!(counts, [(1, 1), (1, 500), (1, 500), (2, 202)]);
        assert!(all.iter().all(|message| message.contains(&Device::IfName("tombolo3".to_owned()))));
        assert!(all[0].contains(&Device::ListenPort(4513)) && !all[1].contains(&Device::ListenPort(4513)));
        let peers =
            DeviceChange { peers: (0..=250).map(|n| add(n, &few)).collect(), ..DeviceChange::default() };
        let counts: Vec<_> =
            messages(number, &peers, &DeviceState::default()).iter().map(|m| count(m)).collect();
        assert_eq!(counts, [(200, 200), (51, 51)]);
        assert_eq!(messages(number, &DeviceChange::default(), &DeviceState::default()).len(), 0);
    }

    #[test]
    fn what_is_forbidden_leaves_the_rest() {
        let key = WireguardKey([1; 32]);
        let mut state = DeviceState::default();
        state.peers.entry(key).or_default().allowed = [net("10.1.0.0/16"), net("10.2.0.0/16")].into();
        let what = PeerAction::Change {
            endpoint: None,
            keepalive: false,
            allow: [net("fd00::/8")].into(),
            forbid: [net("10.2.0.0/16")].into(),
        };
        let change = DeviceChange { peers: vec![PeerChange { key, what }], ..DeviceChange::default() };
        let all = messages(DeviceNumber::new(0).unwrap(), &change, &state);
        let [message] = &all[..] else { panic!("{all:?}") };
        let answer = WireguardMessage { cmd: WireguardCmd::GetDevice, attributes: message.clone() };
        let read = parse(&[answer]);
        assert_eq!(read.peers[&key].allowed, [net("10.1.0.0/16"), net("fd00::/8")].into());
    }

    #[test]
    fn a_peer_in_parts_is_one() {
        let part = |ips: &[&str]| {
            let ips = ips.iter().map(|ip| write_allowed(&net(ip))).collect();
            WireguardPeer(vec![Peer::PublicKey([7; 32]), Peer::AllowedIps(ips)])
        };
        let message = |peer| WireguardMessage {
            cmd: WireguardCmd::GetDevice,
            attributes: vec![Device::IfName("tombolo0".to_owned()), Device::Peers(vec![peer])],
        };
        let state = parse(&[message(part(&["10.1.0.0/16"])), message(part(&["10.2.0.0/16"]))]);
        assert_eq!(state.peers.len(), 1);
        assert_eq!(state.peers[&WireguardKey([7; 32])].allowed.len(), 2);
    }
}
