//! Watches the wire: an `AF_PACKET` socket that counts what kind of packets pass between clusters.
//!
//! Each packet is judged once, as it arrives at the wire (so also one that a fault drops there). Only underlay
//! addresses have business here, in tunnels, with a broker, or for housekeeping; whatever else has an address of a
//! pod, a tunnel or a virtual service travels in clear, and that must never happen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};
use serde::{Deserialize, Serialize};

use crate::place::Place;
use crate::topology::Topology;

/// UDP ports of tunnels: 4510 and the device number up.
const TUNNEL_PORTS: std::ops::RangeInclusive<u16> = 4510..=4600;

/// What a packet on the wire is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// WireGuard between nodes.
    Wireguard,
    /// TCP with a broker.
    Broker,
    /// ARP, neighbour discovery, ICMP between underlay addresses.
    Housekeeping,
    /// Anything else between underlay addresses.
    Other,
    /// Traffic of pods, tunnels or services that nothing protects.
    Clear,
}

/// What was seen so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Packets of each kind.
    pub packets: BTreeMap<Kind, u64>,
    /// Bytes of each kind.
    pub bytes: BTreeMap<Kind, u64>,
    /// The first packets in clear, described.
    pub clear: Vec<String>,
    /// The first packets of kind `other`, described.
    pub other: Vec<String>,
    /// Packets the socket had no room for: if not 0, the counts prove nothing.
    pub missed: u64,
}

impl Seen {
    /// Packets of a kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> u64 {
        self.packets.get(&kind).copied().unwrap_or(0)
    }

    /// Fails unless something was seen, nothing was missed and nothing was in clear.
    ///
    /// # Errors
    /// What was seen in clear.
    pub fn assert_protected(&self) -> Result<()> {
        ensure!(self.missed == 0, "the capture missed {} packets: its counts prove nothing", self.missed);
        ensure!(self.count(Kind::Wireguard) > 0, "the capture saw no tunnel packet: it looked at nothing");
        ensure!(self.count(Kind::Clear) == 0, "seen in clear on the wire:\n{}", self.clear.join("\n"));
        Ok(())
    }
}

/// A watch of the wire; ends when dropped.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    socket: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Watches every link of a place.
    ///
    /// # Errors
    /// If the packet socket cannot be opened.
    pub fn start(wire: &Place, topology: &Topology) -> Result<Self> {
        let socket = wire.run(open)??;
        let judge = Judge::new(topology);
        let mut capture =
            Self { seen: Arc::default(), stop: Arc::default(), socket: Arc::new(socket), thread: None };
        let (seen, stop, socket) = (capture.seen.clone(), capture.stop.clone(), capture.socket.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !stop.load(Ordering::Relaxed) {
                let Ok((len, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else {
                    continue;
                };
                if from.pkttype() == libc::PACKET_OUTGOING {
                    continue;
                }
                let packet = &buffer[..len];
                let kind = judge.kind(u16::from_be(from.protocol()), packet);
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                *seen.packets.entry(kind).or_default() += 1;
                *seen.bytes.entry(kind).or_default() += len as u64;
                let list = match kind {
                    Kind::Clear => &mut seen.clear,
                    Kind::Other => &mut seen.other,
                    _ => continue,
                };
                if list.len() < 16 {
                    list.push(describe(packet));
                }
            }
        });
        capture.thread = Some(thread);
        Ok(capture)
    }

    /// What was seen so far.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.missed += missed(&self.socket);
        seen.clone()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open() -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("a packet socket on the wire")?;
    let socket = socket2::Socket::from(fd);
    socket.set_read_timeout(Some(std::time::Duration::from_millis(50)))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20))?;
    Ok(socket.into())
}

/// Packets dropped since the last call.
fn missed(socket: &OwnedFd) -> u64 {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the pointers are to locals of the length given.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut len,
        )
    };
    if done == 0 { stats.tp_drops.into() } else { 0 }
}

/// Knows whose addresses are whose.
#[derive(Debug)]
struct Judge {
    nodes: BTreeSet<IpAddr>,
    brokers: BTreeSet<IpAddr>,
    routers: BTreeSet<IpAddr>,
}

impl Judge {
    fn new(topology: &Topology) -> Self {
        let nodes = topology.nodes().flat_map(|n| [IpAddr::from(n.v4), n.v6.into()]).collect();
        let brokers = topology.brokers.iter().flat_map(|b| [IpAddr::from(b.v4), b.v6.into()]).collect();
        let mut routers: BTreeSet<_> =
            topology.clusters.iter().flat_map(|c| [IpAddr::from(c.router4), c.router6.into()]).collect();
        routers.insert(Ipv4Addr::new(172, 30, 0, 254).into());
        routers.insert(Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 0xfe).into());
        Self { nodes, brokers, routers }
    }

    fn kind(&self, ethertype: u16, packet: &[u8]) -> Kind {
        let Some(header) = Header::read(packet) else {
            return if ethertype == 0x0806 { Kind::Housekeeping } else { Kind::Other };
        };
        let Header { from, to, protocol, ports } = header;
        let local = |a: &IpAddr| match a {
            IpAddr::V4(a) => a.is_multicast() || a.is_broadcast() || a.is_link_local() || a.is_unspecified(),
            IpAddr::V6(a) => a.is_multicast() || a.is_unicast_link_local() || a.is_unspecified(),
        };
        let known = |a: &IpAddr| {
            self.nodes.contains(a) || self.brokers.contains(a) || self.routers.contains(a) || local(a)
        };
        if !known(&from) || !known(&to) {
            return Kind::Clear;
        }
        match (protocol, ports) {
            (17, Some((a, b)))
                if self.nodes.contains(&from)
                    && self.nodes.contains(&to)
                    && (TUNNEL_PORTS.contains(&a) || TUNNEL_PORTS.contains(&b)) =>
            {
                Kind::Wireguard
            }
            (6, _) if self.brokers.contains(&from) || self.brokers.contains(&to) => Kind::Broker,
            (1 | 2 | 58 | 0, _) => Kind::Housekeeping,
            _ => Kind::Other,
        }
    }
}

struct Header {
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    ports: Option<(u16, u16)>,
}

impl Header {
    fn read(packet: &[u8]) -> Option<Self> {
        let (from, to, protocol, payload) = match packet.first()? >> 4 {
            4 => {
                let head = packet.first_chunk::<20>()?;
                let address = |at: usize| Ipv4Addr::new(head[at], head[at + 1], head[at + 2], head[at + 3]);
                let first = u16::from_be_bytes([head[6], head[7]]) & 0x1fff == 0;
                let payload = packet.get(usize::from(head[0] & 15) * 4..).filter(|_| first);
                (address(12).into(), address(16).into(), head[9], payload)
            }
            6 => {
                let head = packet.first_chunk::<40>()?;
                let address = |at: usize| {
                    let mut bytes = [0; 16];
                    bytes.copy_from_slice(&head[at..at + 16]);
                    IpAddr::from(bytes)
                };
                (address(8), address(24), head[6], packet.get(40..))
            }
            _ => return None,
        };
        let ports = payload
            .and_then(|p| p.first_chunk::<4>())
            .map(|p| (u16::from_be_bytes([p[0], p[1]]), u16::from_be_bytes([p[2], p[3]])))
            .filter(|_| matches!(protocol, 6 | 17));
        Some(Self { from, to, protocol, ports })
    }
}

fn describe(packet: &[u8]) -> String {
    match Header::read(packet) {
        Some(Header { from, to, protocol, ports }) => {
            let ports = ports.map(|(a, b)| format!(" ports {a} -> {b}")).unwrap_or_default();
            format!("{from} -> {to} protocol {protocol}{ports}, {} bytes", packet.len())
        }
        None => format!("no IP packet: {:02x?}", &packet[..packet.len().min(16)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::TWO;

    fn packet(from: &str, to: &str, protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut p = match (from, to) {
            (IpAddr::V4(f), IpAddr::V4(t)) => {
                let mut p = vec![0x45, 0, 0, 24, 0, 0, 0, 0, 64, protocol, 0, 0];
                p.extend(f.octets());
                p.extend(t.octets());
                p
            }
            (IpAddr::V6(f), IpAddr::V6(t)) => {
                let mut p = vec![0x60, 0, 0, 0, 0, 4, protocol, 64];
                p.extend(f.octets());
                p.extend(t.octets());
                p
            }
            _ => panic!("mixed"),
        };
        p.extend(ports.iter().flat_map(|n| n.to_be_bytes()));
        p
    }

    #[test]
    fn only_tunnels_brokers_and_housekeeping_belong_on_the_wire() {
        let judge = Judge::new(&Topology::parse(TWO).unwrap());
        let kind = |from, to, protocol, ports| judge.kind(0x0800, &packet(from, to, protocol, ports));
        assert_eq!(kind("172.30.1.1", "172.30.2.1", 17, [4511, 4511]), Kind::Wireguard);
        assert_eq!(kind("fd00:30:1::1", "fd00:30:2::1", 17, [4511, 4512]), Kind::Wireguard);
        assert_eq!(kind("172.30.1.1", "172.30.0.10", 6, [50000, 4500]), Kind::Broker);
        assert_eq!(kind("172.30.1.1", "172.30.2.1", 1, [0, 0]), Kind::Housekeeping);
        assert_eq!(kind("172.30.1.1", "172.30.2.1", 6, [50000, 8080]), Kind::Other);
        assert_eq!(kind("10.1.3.10", "10.2.3.10", 6, [50000, 8080]), Kind::Clear);
        assert_eq!(kind("172.30.1.1", "10.2.3.10", 17, [4511, 4511]), Kind::Clear);
        assert_eq!(kind("fd00:10:1:3::a", "fd00:30:2::1", 58, [0, 0]), Kind::Clear);
        assert_eq!(kind("172.30.1.1", "198.19.0.1", 17, [5000, 53]), Kind::Clear);
        assert_eq!(judge.kind(0x0806, &[0; 28]), Kind::Housekeeping);
        assert_eq!(judge.kind(0x0800, &[0x45, 0, 0]), Kind::Other);
    }
}
