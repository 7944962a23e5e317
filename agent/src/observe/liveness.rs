//! Asks peers' kernels whether they live, at the pace of [`Liveness`], and what their paths carry, at that of [`PathMtu`]:
//! echoes over the devices, counters of the links.
//!
//! While nothing is sent to peers this costs two looks at `/proc/net/dev` a second and two echoes for each peer every 5 s,
//! one of them as long as packets may be.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::{LANE_KEPT, Peer, TunnelDevice, lane_mark};
use tombolo_agent_core::liveness::{Counters, Liveness, PeerHealth, PeerId};
use tombolo_agent_core::object::NodeKey;
use tombolo_agent_core::path_mtu::PathMtu;
use tombolo_proto::model::{ClusterId, DeviceNumber, Family, Lane, Position, Rank, WireguardKey};
use tracing::{debug, info, warn};

use crate::apply::device::TunnelDriver;
use crate::apply::netlink::device_number;

/// Between looks at the links' counters, while they change.
const LOOK: Duration = Duration::from_millis(100);
/// The same while nothing is sent.
const LOOK_IDLE: Duration = Duration::from_millis(500);
/// Nothing was sent for so long: idle.
const IDLE: Duration = Duration::from_secs(5);
/// Peers' counters of a device are read after this many times the time that the last reading took.
const READ_SHARE: u32 = 20;
/// Bytes after an echo's ICMP header. Chosen so that an echo's length (83 in IPv4, 103 in IPv6) is no usual packet's.
const PAYLOAD: usize = 55;
/// What WireGuard adds to a packet.
const WIREGUARD: u64 = 32;

/// Whom this node has tunnels with, as they were applied last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    /// The own cluster.
    pub cluster: ClusterId,
    /// The own rank.
    pub rank: Rank,
    /// The own devices.
    pub devices: BTreeMap<DeviceNumber, TunnelDevice>,
    /// How far this node has heard of each cluster.
    pub positions: BTreeMap<ClusterId, Position>,
}

impl Roster {
    /// With the devices of lane 0 alone, which tell what can be reached.
    pub fn first_lane(self: &Arc<Self>) -> Arc<Self> {
        let first = |number: &DeviceNumber| number.lane() == Lane::FIRST;
        if self.devices.keys().all(first) {
            return self.clone();
        }
        let mut roster = Self::clone(self);
        roster.devices.retain(|number, _| first(number));
        Arc::new(roster)
    }

    /// All peers.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, &TunnelDevice, &Peer)> {
        self.devices.iter().flat_map(|(number, device)| {
            device.peers.iter().map(move |(key, peer)| ((*number, *key), device, peer))
        })
    }
}

/// The pair of tunnel addresses over which two nodes talk: IPv4 if both have it, since a socket bound to a device needs
/// no route there.
pub(super) fn pair(device: &TunnelDevice, peer: &Peer) -> Option<(IpAddr, IpAddr)> {
    Family::ALL.into_iter().find_map(|family| {
        let of = |a: &&IpAddr| Family::of(**a) == family;
        Some((*device.addresses.iter().find(of)?, *peer.tunnel.iter().find(of)?))
    })
}

/// Peers of which something is known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answers {
    /// They answer.
    pub alive: BTreeSet<PeerId>,
    /// They answered once, and do not now.
    pub dead: BTreeSet<PeerId>,
    /// They came lately, to others that have answered for a while.
    pub young: BTreeSet<PeerId>,
    /// All, once one has answered for a while.
    pub known: Option<BTreeSet<PeerId>>,
    /// Those whose path carries less than their device, and how much, bytes.
    pub narrow: BTreeMap<PeerId, u16>,
}

/// What was known of peers before this process, kept over restarts: after one a dead peer must not get traffic again, nor
/// a narrow path long packets.
pub struct Memory {
    health: Kept<PeerHealth>,
    narrow: Kept<u16>,
}

/// One value of each peer, in a file.
struct Kept<V> {
    path: PathBuf,
    known: BTreeMap<PeerId, V>,
}

impl<V: Copy + PartialEq + Serialize + DeserializeOwned> Kept<V> {
    fn load(path: PathBuf) -> Self {
        let read = || -> Option<BTreeMap<PeerId, V>> {
            let list: Vec<(DeviceNumber, WireguardKey, V)> =
                serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
            Some(list.into_iter().map(|(number, key, value)| ((number, key), value)).collect())
        };
        let known = read().unwrap_or_default();
        Self { path, known }
    }

    fn keep(&mut self, known: BTreeMap<PeerId, V>) {
        if known == self.known {
            return;
        }
        self.known = known;
        let list: Vec<_> = self.known.iter().map(|((number, key), value)| (number, key, value)).collect();
        let new = self.path.with_extension("new");
        let write = || -> io::Result<()> {
            std::fs::write(&new, serde_json::to_vec(&list)?)?;
            std::fs::rename(&new, &self.path)
        };
        if let Err(error) = write() {
            debug!("cannot write {}: {error}; after a restart it is found again", self.path.display());
        }
    }
}

impl Memory {
    /// Reads it; one that cannot be read is empty.
    pub fn load(state_dir: &Path) -> Self {
        Self {
            health: Kept::load(state_dir.join("health.json")),
            narrow: Kept::load(state_dir.join("path-mtu.json")),
        }
    }

    /// Who answered last, and who did not.
    pub fn answers(&self) -> Answers {
        let known = &self.health.known;
        let of = |wanted| known.iter().filter(|(_, h)| **h == wanted).map(|(id, _)| *id).collect();
        Answers {
            alive: of(PeerHealth::Alive),
            dead: of(PeerHealth::Dead),
            narrow: self.narrow.known.clone(),
            ..Answers::default()
        }
    }
}

/// Packets and bytes of a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Link {
    received: u64,
    sent: u64,
}

/// Counters of our links out of `/proc/net/dev`.
fn links(text: &str) -> BTreeMap<DeviceNumber, Link> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let number = device_number(name.trim())?;
        let mut numbers = numbers.split_ascii_whitespace().map(str::parse::<u64>);
        let received = numbers.next()?.ok()?;
        let sent = numbers.nth(7)?.ok()?;
        Some((number, Link { received, sent }))
    };
    text.lines().filter_map(line).collect()
}

/// Runs until `stop`; `answers` follows what is known.
pub async fn run(
    mut roster: watch::Receiver<Option<Arc<Roster>>>,
    driver: Arc<dyn TunnelDriver>,
    memory: Memory,
    answers: watch::Sender<Answers>,
    stop: CancellationToken,
) -> Result<()> {
    let mut task = Task {
        start: Instant::now(),
        liveness: Liveness::new(getrandom::u64().context("no random bytes")?),
        path_mtu: PathMtu::default(),
        echoes: Echoes::open().context("no raw ICMP socket; the agent needs CAP_NET_RAW")?,
        driver,
        memory,
        roster: None,
        links: BTreeMap::new(),
        read: BTreeMap::new(),
        active: Instant::now(),
    };
    let mut look = Instant::now();
    loop {
        task.echoes.receive(|from, lane, kind, sequence| {
            let now = task.start.elapsed();
            let Some(peer) = task.roster.as_ref().and_then(|(_, by)| by.get(&(from, lane))) else { return };
            match kind {
                Kind::Life => task.liveness.handle_echo_reply(now, *peer, sequence),
                Kind::Length => task.path_mtu.handle_answer(now, *peer, sequence),
            }
        });
        if look <= Instant::now() {
            task.look().await;
            look = Instant::now() + if task.active.elapsed() > IDLE { LOOK_IDLE } else { LOOK };
        }
        task.ask();
        task.tell(&answers);
        let now = task.start.elapsed();
        let polls = task.liveness.poll_timeout(now).into_iter().chain(task.path_mtu.poll_timeout());
        let wake = polls.map(|at| task.start + at).fold(look, Instant::min);
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            () = task.echoes.readable() => {}
            changed = roster.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let new = roster.borrow_and_update().clone();
                if let Some(new) = new {
                    task.take(new);
                }
            }
            () = tokio::time::sleep_until(wake.into()) => {}
        }
    }
}

/// Peers by the address that they answer from, and the lane.
type Answerers = BTreeMap<(IpAddr, Lane), PeerId>;

struct Task {
    start: Instant,
    liveness: Liveness,
    path_mtu: PathMtu,
    echoes: Echoes,
    driver: Arc<dyn TunnelDriver>,
    memory: Memory,
    /// With who answers its echoes.
    roster: Option<(Arc<Roster>, Answerers)>,
    links: BTreeMap<DeviceNumber, Link>,
    /// When peers' counters of a device may be read again.
    read: BTreeMap<DeviceNumber, Instant>,
    active: Instant,
}

impl Task {
    fn take(&mut self, roster: Arc<Roster>) {
        let now = self.start.elapsed();
        let peers: BTreeMap<PeerId, u16> = roster.peers().map(|(id, device, _)| (id, device.mtu)).collect();
        let narrow = self.path_mtu.narrow();
        let before: BTreeMap<PeerId, PeerHealth> = self.liveness.all().collect();
        // A node with a new key is as well as it was, and its path what it was.
        let nodes: BTreeMap<(DeviceNumber, &NodeKey), PeerId> = self
            .roster
            .iter()
            .flat_map(|(old, _)| old.peers())
            .map(|(id, _, peer)| ((id.0, &peer.node), id))
            .collect();
        self.liveness.handle_peers(now, &peers.keys().copied().collect());
        let mut lengths = BTreeMap::new();
        for (id, _, peer) in roster.peers().filter(|(id, ..)| !before.contains_key(id)) {
            let former = nodes.get(&(id.0, &peer.node));
            let health = self.memory.health.known.get(&id).or_else(|| before.get(former?));
            if let Some(health) = health {
                self.liveness.handle_memory(now, id, *health);
            }
            let length = self.memory.narrow.known.get(&id).or_else(|| narrow.get(former?));
            lengths.extend(length.map(|length| (id, *length)));
        }
        // Lanes share their way.
        let peers = peers.into_iter().filter(|((number, _), _)| number.lane() == Lane::FIRST).collect();
        self.path_mtu.handle_peers(now, &peers, &lengths);
        self.echoes.senders.retain(|(number, _), _| roster.devices.contains_key(number));
        self.links.retain(|number, _| roster.devices.contains_key(number));
        self.read.retain(|number, _| roster.devices.contains_key(number));
        let by = |(id, device, peer): (PeerId, &TunnelDevice, &Peer)| {
            Some(((pair(device, peer)?.1, id.0.lane()), id))
        };
        let by = roster.peers().filter_map(by).collect();
        self.roster = Some((roster, by));
    }

    /// Reads counters, and hands them on.
    async fn look(&mut self) {
        let Some((roster, _)) = &self.roster else { return };
        let roster = roster.clone();
        let Ok(text) = std::fs::read_to_string("/proc/net/dev") else { return };
        for (number, link) in links(&text) {
            let Some(device) = roster.devices.get(&number) else { continue };
            let old = self.links.insert(number, link);
            if old == Some(link) {
                continue;
            }
            let echo = |key: &WireguardKey| -> u64 {
                let pair = device.peers.get(key).and_then(|peer| pair(device, peer));
                (PAYLOAD + head(pair.map_or(Family::V6, |(_, to)| Family::of(to)))) as u64
            };
            let probe = |key: &WireguardKey| self.path_mtu.length((number, *key)).map_or(0, u64::from);
            let sent = old.map_or(0, |old| link.sent.saturating_sub(old.sent));
            let Some((first, _)) = device.peers.first_key_value() else { continue };
            let counters =
                Counters { received: link.received, sent: link.sent, echo: echo(first), probe: probe(first) };
            if !counters.is_echoes(sent) {
                self.active = Instant::now();
            }
            let now = self.start.elapsed();
            if device.peers.len() == 1 {
                self.liveness.handle_counters(now, (number, *first), counters);
                continue;
            }
            // Which peer it was only the device knows; asking it costs the packets some time.
            if self.read.get(&number).is_some_and(|at| *at > Instant::now()) {
                continue;
            }
            let begun = Instant::now();
            let state = self.driver.read(number).await;
            self.read.insert(number, Instant::now() + begun.elapsed() * READ_SHARE);
            let now = self.start.elapsed();
            for (key, peer) in state.into_iter().flat_map(|state| state.peers) {
                let probe = Some(probe(&key)).filter(|probe| *probe > 0);
                let counters = Counters {
                    received: peer.received,
                    sent: peer.sent,
                    echo: echo(&key) + WIREGUARD,
                    probe: probe.map_or(0, |probe| probe + WIREGUARD),
                };
                self.liveness.handle_counters(now, (number, key), counters);
            }
        }
    }

    fn ask(&mut self) {
        let Some((roster, _)) = &self.roster else { return };
        let mut send = |(number, key): PeerId, kind, sequence, length| {
            let Some(device) = roster.devices.get(&number) else { return };
            let Some((from, to)) = device.peers.get(&key).and_then(|peer| pair(device, peer)) else { return };
            if let Err(error) = self.echoes.send(number, (from, to), kind, sequence, length) {
                debug!("echo request to {to} by {number}: {error}");
            }
        };
        while let Some(echo) = self.liveness.poll_transmit(self.start.elapsed()) {
            send(echo.peer, Kind::Life, echo.sequence, 0);
        }
        self.path_mtu.handle_alive(self.start.elapsed(), &self.liveness.alive());
        while let Some(probe) = self.path_mtu.poll_transmit(self.start.elapsed()) {
            send(probe.peer, Kind::Length, probe.sequence, usize::from(probe.length));
        }
    }

    fn tell(&mut self, answers: &watch::Sender<Answers>) {
        let Some((roster, _)) = &self.roster else { return };
        let now = Answers {
            alive: self.liveness.alive(),
            dead: self.liveness.dead(),
            young: self.liveness.young(self.start.elapsed()),
            known: self.liveness.known(self.start.elapsed()),
            narrow: self.path_mtu.narrow(),
        };
        let before = answers.borrow().clone();
        if now == before {
            return;
        }
        let name = |id: &PeerId| {
            let peer = roster.devices.get(&id.0).and_then(|device| device.peers.get(&id.1));
            peer.map_or_else(|| "a former peer".to_owned(), |peer| peer.node.to_string())
        };
        for id in now.dead.difference(&before.dead) {
            warn!(device = %id.0, "{} does not answer any more; routes avoid it", name(id));
        }
        for id in before.dead.difference(&now.dead) {
            info!(device = %id.0, "{} answers again", name(id));
        }
        for (id, length) in now.narrow.iter().filter(|(id, length)| before.narrow.get(*id) != Some(*length)) {
            info!(device = %id.0, "the path to {} carries {length} bytes", name(id));
        }
        for id in before.narrow.keys().filter(|id| !now.narrow.contains_key(*id)) {
            info!(device = %id.0, "the path to {} carries all that its device does", name(id));
        }
        answers.send_replace(now);
        self.remember();
    }

    fn remember(&mut self) {
        let known = self.liveness.all().filter(|(_, health)| *health != PeerHealth::Unknown).collect();
        self.memory.health.keep(known);
        self.memory.narrow.keep(self.path_mtu.narrow());
    }
}

/// What an echo is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Whether the peer lives.
    Life,
    /// Whether a packet so long arrives.
    Length,
}

/// Headers before an echo's payload, bytes.
fn head(family: Family) -> usize {
    8 + if family == Family::V4 { 20 } else { 40 }
}

/// Raw ICMP sockets: one for each family that hears answers, whichever way they come, and one for each device that asks.
struct Echoes {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    senders: BTreeMap<(DeviceNumber, Family), (IpAddr, std::net::UdpSocket)>,
    /// Identifier of [`Kind::Life`] in lane 0. [`Kind::Length`] flips its last bit, a lane the three before it.
    id: [u8; 2],
    /// Comes back with each answer: nobody else can make one.
    secret: [u8; PAYLOAD],
}

impl Echoes {
    fn open() -> Result<Self> {
        let mut secret = [0; PAYLOAD];
        getrandom::fill(&mut secret).context("no random bytes")?;
        let mut id = [0; 2];
        getrandom::fill(&mut id).context("no random bytes")?;
        let hear = |family| -> io::Result<UdpSocket> {
            let socket = raw(family)?;
            socket.set_recv_buffer_size(1 << 20)?;
            UdpSocket::from_std(socket.into())
        };
        Ok(Self { v4: hear(Family::V4)?, v6: hear(Family::V6).ok(), senders: BTreeMap::new(), id, secret })
    }

    /// `length`: of the whole packet, if it is to be longer than it need be.
    fn send(
        &mut self,
        number: DeviceNumber,
        (from, to): (IpAddr, IpAddr),
        kind: Kind,
        sequence: u16,
        length: usize,
    ) -> io::Result<()> {
        let family = Family::of(to);
        let place = (number, family);
        if self.senders.get(&place).is_none_or(|(bound, _)| *bound != from) {
            let socket = raw(family)?;
            // It asks and never listens.
            socket.set_recv_buffer_size(0)?;
            socket.bind_device(Some(number.link().as_bytes()))?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            if number.lane() != Lane::FIRST {
                // IPv6 goes nowhere without a route by this very device.
                socket.set_mark(LANE_KEPT | lane_mark(number.lane()))?;
            }
            whole(&socket, family)?;
            self.senders.insert(place, (from, socket.into()));
        }
        let mut packet = vec![0; (8 + PAYLOAD).max(length.saturating_sub(head(family) - 8))];
        packet[0] = if family == Family::V4 { 8 } else { 128 };
        let lane = number.lane();
        packet[4] = self.id[0];
        packet[5] = self.id[1] ^ (lane.get() << 1 | u8::from(kind == Kind::Length));
        packet[6..8].copy_from_slice(&sequence.to_be_bytes());
        packet[8..8 + PAYLOAD].copy_from_slice(&self.secret);
        if family == Family::V4 {
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let Some((_, socket)) = self.senders.get(&place) else { return Ok(()) };
        let sent = socket.send_to(&packet, SocketAddr::new(to, 0));
        if sent.is_err() {
            // The device may have been made anew.
            self.senders.remove(&place);
        }
        sent.map(drop)
    }

    async fn readable(&self) {
        let v6 = async {
            match &self.v6 {
                Some(socket) => socket.readable().await,
                None => std::future::pending().await,
            }
        };
        let failed = tokio::select! {
            ready = self.v4.readable() => ready.is_err(),
            ready = v6 => ready.is_err(),
        };
        if failed {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Answers that have come. Of long ones the beginning is enough.
    fn receive(&self, mut answer: impl FnMut(IpAddr, Lane, Kind, u16)) {
        let mut buffer = [0; 512];
        for (family, socket) in [(Family::V4, Some(&self.v4)), (Family::V6, self.v6.as_ref())]
            .into_iter()
            .filter_map(|(f, s)| Some((f, s?)))
        {
            // A flood of strangers' packets must not keep us here.
            for _ in 0..10_000 {
                match socket.try_recv_from(&mut buffer) {
                    Ok((length, from)) => {
                        if let Some((lane, kind, sequence)) =
                            self.sequence(family, buffer.get(..length).unwrap_or_default())
                        {
                            answer(from.ip(), lane, kind, sequence);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
        }
    }

    /// Of an answer to a request of ours.
    fn sequence(&self, family: Family, packet: &[u8]) -> Option<(Lane, Kind, u16)> {
        let (skip, reply) = match family {
            Family::V4 => (usize::from(packet.first()? & 15) * 4, 0),
            Family::V6 => (0, 129),
        };
        let (head, payload) = packet.get(skip..)?.split_first_chunk::<8>()?;
        let difference = head[5] ^ self.id[1];
        let kind = if difference & 1 == 0 { Kind::Life } else { Kind::Length };
        let lane = Lane::new(difference >> 1)?;
        let ours = head[0] == reply && head[4] == self.id[0] && payload.starts_with(&self.secret);
        ours.then(|| (lane, kind, u16::from_be_bytes([head[6], head[7]])))
    }
}

fn raw(family: Family) -> io::Result<Socket> {
    let (domain, protocol) = match family {
        Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
        Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Packets leave in one piece or not at all, whatever is known of the path.
fn whole(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::PROBE),
        Family::V6 => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::PROBE),
    }
    .map_err(io::Error::from)
}

/// RFC 1071.
fn checksum(packet: &[u8]) -> u16 {
    let mut sum: u32 =
        packet.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n\
                    \x20   lo:     100       1    0    0    0     0          0         0      100       1    0\n\
                    tombolo1: 4000      40    0    0    0     0          0         0    5000      50    0    0\n\
                    tombolo99: 4000      40    0    0    0     0          0         0    5000      50    0    0\n";
        let number = DeviceNumber::new(1).unwrap();
        assert_eq!(links(text), BTreeMap::from([(number, Link { received: 4000, sent: 5000 })]));
        assert!(links("tombolo1: 1 2\ntombolo2 x: y\n").is_empty());
    }

    #[test]
    fn a_checksum_is_zero_with_itself() {
        let mut packet = [8, 0, 0, 0, 1, 2, 3, 4, 5];
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&packet), 0);
    }

    #[test]
    fn memory_survives() {
        let dir = tempfile::tempdir().unwrap();
        let id = (DeviceNumber::new(1).unwrap(), WireguardKey([1; 32]));
        let mut memory = Memory::load(dir.path());
        assert_eq!(memory.answers(), Answers::default());
        memory.health.keep(BTreeMap::from([(id, PeerHealth::Dead)]));
        memory.narrow.keep(BTreeMap::from([(id, 1240)]));
        let narrow = BTreeMap::from([(id, 1240)]);
        assert_eq!(
            Memory::load(dir.path()).answers(),
            Answers { dead: BTreeSet::from([id]), narrow: narrow.clone(), ..Answers::default() }
        );
        std::fs::write(dir.path().join("health.json"), "nonsense").unwrap();
        assert_eq!(Memory::load(dir.path()).answers(), Answers { narrow, ..Answers::default() });
        std::fs::write(dir.path().join("path-mtu.json"), "[[1]]").unwrap();
        assert_eq!(Memory::load(dir.path()).answers(), Answers::default());
    }
}
