//! Asks peers' kernels whether they live, at the pace of [`Liveness`]: echoes over the devices, counters of the links.
//!
//! While nothing is sent to peers this costs two looks at `/proc/net/dev` a second and an echo for each peer every 5 s.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::{Peer, TunnelDevice};
use tombolo_agent_core::liveness::{Counters, Liveness, PeerHealth, PeerId};
use tombolo_agent_core::object::NodeKey;
use tombolo_proto::model::{ClusterId, DeviceNumber, Family, Position, Rank, WireguardKey};
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
}

/// What was known of peers before this process, kept over restarts: after one a dead peer must not get traffic again.
pub struct Memory {
    path: PathBuf,
    known: BTreeMap<PeerId, PeerHealth>,
}

impl Memory {
    /// Reads it; one that cannot be read is empty.
    pub fn load(state_dir: &Path) -> Self {
        let path = state_dir.join("health.json");
        let read = || -> Option<BTreeMap<PeerId, PeerHealth>> {
            let list: Vec<(DeviceNumber, WireguardKey, PeerHealth)> =
                serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
            Some(list.into_iter().map(|(number, key, health)| ((number, key), health)).collect())
        };
        let known = read().unwrap_or_default();
        Self { path, known }
    }

    /// Who answered last, and who did not.
    pub fn answers(&self) -> Answers {
        let of = |wanted| self.known.iter().filter(|(_, h)| **h == wanted).map(|(id, _)| *id).collect();
        Answers { alive: of(PeerHealth::Alive), dead: of(PeerHealth::Dead), ..Answers::default() }
    }

    fn keep(&mut self, known: BTreeMap<PeerId, PeerHealth>) {
        if known == self.known {
            return;
        }
        self.known = known;
        let list: Vec<_> = self.known.iter().map(|((number, key), health)| (number, key, health)).collect();
        let new = self.path.with_extension("new");
        let write = || -> io::Result<()> {
            std::fs::write(&new, serde_json::to_vec(&list)?)?;
            std::fs::rename(&new, &self.path)
        };
        if let Err(error) = write() {
            debug!(
                "cannot write {}: {error}; dead peers are found again after a restart",
                self.path.display()
            );
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
        task.echoes.receive(|from, sequence| {
            let now = task.start.elapsed();
            if let Some(peer) = task.roster.as_ref().and_then(|(_, by)| by.get(&from)) {
                task.liveness.handle_echo_reply(now, *peer, sequence);
            }
        });
        if look <= Instant::now() {
            task.look().await;
            look = Instant::now() + if task.active.elapsed() > IDLE { LOOK_IDLE } else { LOOK };
        }
        task.ask();
        task.tell(&answers);
        let now = task.start.elapsed();
        let poll = task.liveness.poll_timeout(now).map(|at| task.start + at);
        let wake = poll.map_or(look, |poll| poll.min(look));
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

struct Task {
    start: Instant,
    liveness: Liveness,
    echoes: Echoes,
    driver: Arc<dyn TunnelDriver>,
    memory: Memory,
    /// With the peers by the address that they answer from.
    roster: Option<(Arc<Roster>, BTreeMap<IpAddr, PeerId>)>,
    links: BTreeMap<DeviceNumber, Link>,
    /// When peers' counters of a device may be read again.
    read: BTreeMap<DeviceNumber, Instant>,
    active: Instant,
}

impl Task {
    fn take(&mut self, roster: Arc<Roster>) {
        let now = self.start.elapsed();
        let peers: BTreeSet<PeerId> = roster.peers().map(|(id, ..)| id).collect();
        let before: BTreeMap<PeerId, PeerHealth> = self.liveness.all().collect();
        // A node with a new key is as well as it was.
        let nodes: BTreeMap<(DeviceNumber, &NodeKey), PeerHealth> = self
            .roster
            .iter()
            .flat_map(|(old, _)| old.peers())
            .filter_map(|(id, _, peer)| Some(((id.0, &peer.node), *before.get(&id)?)))
            .collect();
        self.liveness.handle_peers(now, &peers);
        for (id, _, peer) in roster.peers().filter(|(id, ..)| !before.contains_key(id)) {
            if let Some(health) = self.memory.known.get(&id).or_else(|| nodes.get(&(id.0, &peer.node))) {
                self.liveness.handle_memory(now, id, *health);
            }
        }
        self.echoes.senders.retain(|(number, _), _| roster.devices.contains_key(number));
        self.links.retain(|number, _| roster.devices.contains_key(number));
        self.read.retain(|number, _| roster.devices.contains_key(number));
        let by = roster.peers().filter_map(|(id, device, peer)| Some((pair(device, peer)?.1, id))).collect();
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
                let v4 =
                    device.peers.get(key).and_then(|peer| pair(device, peer)).is_some_and(|p| p.1.is_ipv4());
                (PAYLOAD + 8 + if v4 { 20 } else { 40 }) as u64
            };
            let sent = old.map_or(0, |old| link.sent.saturating_sub(old.sent));
            let Some((first, _)) = device.peers.first_key_value() else { continue };
            if !sent.is_multiple_of(echo(first)) {
                self.active = Instant::now();
            }
            let now = self.start.elapsed();
            if device.peers.len() == 1 {
                let counters = Counters { received: link.received, sent: link.sent, echo: echo(first) };
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
                let counters =
                    Counters { received: peer.received, sent: peer.sent, echo: echo(&key) + WIREGUARD };
                self.liveness.handle_counters(now, (number, key), counters);
            }
        }
    }

    fn ask(&mut self) {
        let Some((roster, _)) = &self.roster else { return };
        while let Some(echo) = self.liveness.poll_transmit(self.start.elapsed()) {
            let (number, key) = echo.peer;
            let Some(device) = roster.devices.get(&number) else { continue };
            let Some((from, to)) = device.peers.get(&key).and_then(|peer| pair(device, peer)) else {
                continue;
            };
            if let Err(error) = self.echoes.send(number, from, to, echo.sequence) {
                debug!("echo request to {to} by {number}: {error}");
            }
        }
    }

    fn tell(&mut self, answers: &watch::Sender<Answers>) {
        let Some((roster, _)) = &self.roster else { return };
        let now = Answers {
            alive: self.liveness.alive(),
            dead: self.liveness.dead(),
            young: self.liveness.young(self.start.elapsed()),
            known: self.liveness.known(self.start.elapsed()),
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
        answers.send_replace(now);
        self.remember();
    }

    fn remember(&mut self) {
        let known = self.liveness.all().filter(|(_, health)| *health != PeerHealth::Unknown).collect();
        self.memory.keep(known);
    }
}

/// Raw ICMP sockets: one for each family that hears answers, whichever way they come, and one for each device that asks.
struct Echoes {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    senders: BTreeMap<(DeviceNumber, Family), (IpAddr, std::net::UdpSocket)>,
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

    fn send(&mut self, number: DeviceNumber, from: IpAddr, to: IpAddr, sequence: u16) -> io::Result<()> {
        let family = Family::of(to);
        let place = (number, family);
        if self.senders.get(&place).is_none_or(|(bound, _)| *bound != from) {
            let socket = raw(family)?;
            // It asks and never listens.
            socket.set_recv_buffer_size(0)?;
            socket.bind_device(Some(number.link().as_bytes()))?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            self.senders.insert(place, (from, socket.into()));
        }
        let mut packet = [0; 8 + PAYLOAD];
        packet[0] = if family == Family::V4 { 8 } else { 128 };
        packet[4..6].copy_from_slice(&self.id);
        packet[6..8].copy_from_slice(&sequence.to_be_bytes());
        packet[8..].copy_from_slice(&self.secret);
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

    /// Answers that have come.
    fn receive(&self, mut answer: impl FnMut(IpAddr, u16)) {
        let mut buffer = [0; 512];
        for (family, socket) in [(Family::V4, Some(&self.v4)), (Family::V6, self.v6.as_ref())]
            .into_iter()
            .filter_map(|(f, s)| Some((f, s?)))
        {
            // A flood of strangers' packets must not keep us here.
            for _ in 0..10_000 {
                match socket.try_recv_from(&mut buffer) {
                    Ok((length, from)) => {
                        if let Some(sequence) =
                            self.sequence(family, buffer.get(..length).unwrap_or_default())
                        {
                            answer(from.ip(), sequence);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
        }
    }

    /// Of an answer to a request of ours.
    fn sequence(&self, family: Family, packet: &[u8]) -> Option<u16> {
        let (skip, reply) = match family {
            Family::V4 => (usize::from(packet.first()? & 15) * 4, 0),
            Family::V6 => (0, 129),
        };
        let (head, payload) = packet.get(skip..)?.split_first_chunk::<8>()?;
        let ours = head[0] == reply && head[4..6] == self.id && payload == self.secret;
        ours.then(|| u16::from_be_bytes([head[6], head[7]]))
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
        memory.keep(BTreeMap::from([(id, PeerHealth::Dead)]));
        assert_eq!(
            Memory::load(dir.path()).answers(),
            Answers { dead: BTreeSet::from([id]), ..Answers::default() }
        );
        std::fs::write(dir.path().join("health.json"), "nonsense").unwrap();
        assert_eq!(Memory::load(dir.path()).answers(), Answers::default());
    }
}
