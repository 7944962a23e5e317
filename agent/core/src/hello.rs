//! The hello: what nodes tell each other over their tunnels (UDP 4509 between tunnel addresses), for failover without
//! the cluster's API. Codec and state, without clock and sockets.
//!
//! On the wire: `TMBH`, version 1, the number (u64), then fields of type (u8), length (u16) and value, big endian. A
//! field of a type that is not known is passed over, so a field can be added without a new version. A hello is not
//! signed: it counts by the tunnel that brought it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use thiserror::Error;
use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, NodeName, Position};

use crate::desired::TunnelDevice;
use crate::liveness::PeerId;
use crate::object::NodeKey;

/// UDP port, on tunnel addresses.
pub const PORT: u16 = 4509;
/// A hello is no longer than this: it passes every tunnel in one piece.
pub const MAX_LEN: usize = 1200;
/// Between hellos while nothing changes.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// What a node said holds so long; then it is unknown again.
pub const VALIDITY: Duration = Duration::from_secs(35);
/// After a change, besides at once: some may be lost.
const AGAIN: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];
/// Between two hellos to one peer, whatever changes.
const PAUSE: Duration = Duration::from_millis(20);

const MAGIC: &[u8; 4] = b"TMBH";
const VERSION: u8 = 1;
const HEAD: usize = 13;
const CANNOT_REACH: u8 = 1;
const POSITION: u8 = 2;
const SEEN: u8 = 3;
const UNTRIED: u8 = 4;
/// Clusters it cannot reach, or has not yet: at most so many are told.
const MAX_CANNOT_REACH: usize = 12;
/// What a cluster's own nodes say it has said is missed here after so long. Nodes learn positions late, since they are
/// kept seldom ([`crate::keep::POSITION_EVERY`]), and say them in intervals.
pub const WITHHELD: Duration = Duration::from_secs(30);
/// Devices of one peer.
const MAX_SEEN: usize = 8;

/// What one node tells another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hello {
    /// Grows from hello to hello of one sender, over its restarts too.
    pub number: u64,
    /// Clusters that the sender has no live tunnel to.
    pub cannot_reach: BTreeSet<ClusterId>,
    /// Clusters to which a tunnel of the sender's has never answered, its own among them.
    pub untried: BTreeSet<ClusterId>,
    /// How far the sender has heard of each cluster; some, if there are many.
    pub positions: BTreeMap<ClusterId, Position>,
    /// From which address each device of the receiver is heard.
    pub seen: BTreeMap<DeviceNumber, SocketAddr>,
}

/// Why bytes are no hello.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HelloError {
    /// Too long, cut off, or something else.
    #[error("no hello, or a damaged one")]
    Malformed,
    /// Of a version that is not known here.
    #[error("a hello of version {0}; this agent knows version {VERSION}")]
    Version(u8),
}

impl Hello {
    /// As bytes, at most [`MAX_LEN`]. Positions are told as far as they fit, beginning at `first` in order.
    pub fn encode(&self, first: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAX_LEN);
        out.extend_from_slice(MAGIC);
        out.push(VERSION);
        out.extend_from_slice(&self.number.to_be_bytes());
        for cluster in self.cannot_reach.iter().take(MAX_CANNOT_REACH) {
            field(&mut out, CANNOT_REACH, cluster.as_str().as_bytes());
        }
        let left = MAX_CANNOT_REACH.saturating_sub(self.cannot_reach.len());
        for cluster in self.untried.iter().take(left) {
            field(&mut out, UNTRIED, cluster.as_str().as_bytes());
        }
        for (number, address) in self.seen.iter().take(MAX_SEEN) {
            let mut value = vec![number.get()];
            value.extend_from_slice(&address.port().to_be_bytes());
            match address.ip() {
                IpAddr::V4(ip) => value.extend_from_slice(&ip.octets()),
                IpAddr::V6(ip) => value.extend_from_slice(&ip.octets()),
            }
            field(&mut out, SEEN, &value);
        }
        let count = self.positions.len();
        for (cluster, position) in self.positions.iter().cycle().skip(first % count.max(1)).take(count) {
            let mut value = Vec::with_capacity(28 + 63);
            value.extend_from_slice(&position.serial.to_be_bytes());
            value.extend_from_slice(&position.generation.to_be_bytes());
            value.extend_from_slice(&position.epoch.to_be_bytes());
            value.extend_from_slice(&position.sequence.to_be_bytes());
            value.extend_from_slice(cluster.as_str().as_bytes());
            if !field(&mut out, POSITION, &value) {
                break;
            }
        }
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        if bytes.len() > MAX_LEN {
            return Err(HelloError::Malformed);
        }
        let mut rest = Reader(bytes);
        if rest.take(4) != Some(MAGIC) {
            return Err(HelloError::Malformed);
        }
        match rest.number(1) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => return Err(HelloError::Version(u8::try_from(version).unwrap_or(u8::MAX))),
            None => return Err(HelloError::Malformed),
        }
        let mut hello = Self { number: rest.number(8).ok_or(HelloError::Malformed)?, ..Self::default() };
        while !rest.0.is_empty() {
            hello.read_field(&mut rest).ok_or(HelloError::Malformed)?;
        }
        Ok(hello)
    }

    fn read_field(&mut self, rest: &mut Reader<'_>) -> Option<()> {
        let kind = rest.number(1)?;
        let length = usize::try_from(rest.number(2)?).ok()?;
        let mut value = Reader(rest.take(length)?);
        match u8::try_from(kind).ok()? {
            CANNOT_REACH => drop(self.cannot_reach.insert(value.cluster()?)),
            UNTRIED => drop(self.untried.insert(value.cluster()?)),
            POSITION => {
                let position = Position {
                    serial: value.number(8)?,
                    generation: u32::try_from(value.number(4)?).ok()?,
                    epoch: value.number(8)?,
                    sequence: value.number(8)?,
                };
                self.positions.insert(value.cluster()?, position);
            }
            SEEN => {
                let number = DeviceNumber::new(u8::try_from(value.number(1)?).ok()?)?;
                let port = u16::try_from(value.number(2)?).ok()?;
                let ip = match value.0.len() {
                    4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(value.0).ok()?)),
                    16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(value.0).ok()?)),
                    _ => return None,
                };
                self.seen.insert(number, SocketAddr::new(ip, port));
            }
            _ => {}
        }
        Some(())
    }

    fn says_the_same(&self, other: &Self) -> bool {
        self.cannot_reach == other.cannot_reach && self.untried == other.untried && self.seen == other.seen
    }
}

fn field(out: &mut Vec<u8>, kind: u8, value: &[u8]) -> bool {
    let Ok(length) = u16::try_from(value.len()) else { return false };
    if out.len() + 3 + value.len() > MAX_LEN {
        return false;
    }
    out.push(kind);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(value);
    true
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    /// Of at most eight bytes.
    fn number(&mut self, length: usize) -> Option<u64> {
        Some(self.take(length)?.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }

    fn cluster(&mut self) -> Option<ClusterId> {
        let text = std::str::from_utf8(self.take(self.0.len())?).ok()?;
        ClusterId::new(text).ok()
    }
}

/// Clusters to whose gateways this node has tunnels of its own, all of them dead. Of a cluster without any nothing is
/// known, and a plain node of it (topology `mesh`) carries nothing for others.
pub fn cannot_reach(
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    dead: &BTreeSet<PeerId>,
) -> BTreeSet<ClusterId> {
    let mut lives: BTreeMap<&ClusterId, bool> = BTreeMap::new();
    let carries = |n: &DeviceNumber| n.family() == DeviceFamily::Out && n.rank().is_gateway();
    for (number, device) in devices.iter().filter(|(n, _)| carries(n)) {
        for (key, peer) in &device.peers {
            *lives.entry(&peer.node.cluster).or_default() |= !dead.contains(&(*number, *key));
        }
    }
    lives.into_iter().filter(|(_, lives)| !lives).map(|(cluster, _)| cluster.clone()).collect()
}

/// Clusters to one of whose gateways this node has a tunnel of its own that has never answered; the own one, if a tunnel
/// to a node of it never has. Until a new gateway knows better it uses all of them.
pub fn untried(
    own: &ClusterId,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    dead: &BTreeSet<PeerId>,
    alive: &BTreeSet<PeerId>,
) -> BTreeSet<ClusterId> {
    let mut untried = BTreeSet::new();
    for (number, device) in devices {
        let inward = number.family() == DeviceFamily::In;
        if !inward && !number.rank().is_gateway() {
            continue;
        }
        for (key, peer) in &device.peers {
            let id = (*number, *key);
            if !dead.contains(&id) && !alive.contains(&id) {
                untried.insert(if inward { own.clone() } else { peer.node.cluster.clone() });
            }
        }
    }
    untried
}

/// What was said and heard: to whom a hello is due, and what others' hellos tell.
#[derive(Debug)]
pub struct Hellos {
    cluster: ClusterId,
    /// Of the last hello.
    number: u64,
    common: Hello,
    turn: usize,
    peers: BTreeMap<PeerId, Peer>,
    heard: BTreeMap<NodeKey, (Duration, Hello)>,
    /// By other cluster: the position that it says it has come to and that is not here, and since when.
    ahead: BTreeMap<ClusterId, (Position, Duration)>,
}

#[derive(Debug)]
struct Peer {
    node: NodeKey,
    seen: BTreeMap<DeviceNumber, SocketAddr>,
    sent: Option<Duration>,
    /// When the next ones are due, soonest last; never empty.
    due: Vec<Duration>,
}

impl Peer {
    /// At once, again soon, and then in intervals.
    fn hurry(&mut self, now: Duration) {
        let soon = self.sent.map_or(now, |sent| now.max(sent + PAUSE));
        self.due = AGAIN.iter().rev().map(|after| soon + *after).chain([soon]).collect();
    }
}

impl Hellos {
    /// `number`: larger than any that this node has used before, as microseconds since 1970 are.
    pub fn new(cluster: ClusterId, number: u64) -> Self {
        Self {
            cluster,
            number,
            common: Hello::default(),
            turn: 0,
            peers: BTreeMap::new(),
            heard: BTreeMap::new(),
            ahead: BTreeMap::new(),
        }
    }

    /// Who there is to talk to. A new one gets a hello at once; of one that is gone nothing stays.
    pub fn handle_peers(&mut self, now: Duration, peers: &BTreeMap<PeerId, NodeKey>) {
        self.peers.retain(|id, peer| peers.get(id) == Some(&peer.node));
        for (id, node) in peers {
            self.peers.entry(*id).or_insert_with(|| {
                let mut peer =
                    Peer { node: node.clone(), seen: BTreeMap::new(), sent: None, due: Vec::new() };
                peer.hurry(now);
                peer
            });
        }
        let nodes: BTreeSet<&NodeKey> = peers.values().collect();
        self.heard.retain(|node, _| nodes.contains(node));
        self.ahead.retain(|cluster, _| nodes.iter().any(|node| node.cluster == *cluster));
    }

    /// What all are told. News of reach is told at once, positions with the next hello.
    pub fn handle_content(
        &mut self,
        now: Duration,
        (cannot_reach, untried): (BTreeSet<ClusterId>, BTreeSet<ClusterId>),
        positions: BTreeMap<ClusterId, Position>,
    ) {
        self.ahead.retain(|cluster, (said, _)| positions.get(cluster).is_none_or(|here| *here < *said));
        self.common.positions = positions;
        if self.common.cannot_reach != cannot_reach || self.common.untried != untried {
            self.common.cannot_reach = cannot_reach;
            self.common.untried = untried;
            self.peers.values_mut().for_each(|peer| peer.hurry(now));
        }
    }

    /// Where a peer's device is heard from; `theirs` is the number that the peer gives it. The peer is told at once if it
    /// is new.
    pub fn handle_seen(&mut self, now: Duration, peer: PeerId, theirs: DeviceNumber, address: SocketAddr) {
        if let Some(peer) = self.peers.get_mut(&peer)
            && peer.seen.insert(theirs, address) != Some(address)
        {
            peer.hurry(now);
        }
    }

    /// A hello that this peer's tunnel brought. Whether it says anything new.
    pub fn handle_hello(&mut self, now: Duration, peer: PeerId, hello: Hello) -> bool {
        let Some(peer) = self.peers.get(&peer) else { return false };
        if let Some((at, before)) = self.heard.get(&peer.node)
            && hello.number <= before.number
            && now < *at + VALIDITY
        {
            return false;
        }
        // A cluster is believed about itself alone: nobody can raise an alarm about another. The first position that is
        // missed counts until it is here.
        let cluster = &peer.node.cluster;
        if *cluster != self.cluster
            && let Some(said) = hello.positions.get(cluster)
            && self.common.positions.get(cluster).is_none_or(|here| here < said)
        {
            self.ahead.entry(cluster.clone()).or_insert((*said, now));
        }
        let before = self.heard.insert(peer.node.clone(), (now, hello.clone()));
        before.is_none_or(|(at, before)| now >= at + VALIDITY || !before.says_the_same(&hello))
    }

    /// The next hello to be sent; to be called until there is none.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<(PeerId, Vec<u8>)> {
        let (id, peer) = self.peers.iter_mut().find(|(_, p)| p.due.last().is_none_or(|at| *at <= now))?;
        peer.due.retain(|at| *at > now);
        if peer.due.is_empty() {
            peer.due.push(now + INTERVAL);
        }
        peer.sent = Some(now);
        self.number += 1;
        let hello = Hello { number: self.number, seen: peer.seen.clone(), ..self.common.clone() };
        self.turn = self.turn.wrapping_add(1);
        Some((*id, hello.encode(self.turn)))
    }

    /// When to poll again: for a hello, or because what somebody said expires.
    pub fn poll_timeout(&self, now: Duration) -> Option<Duration> {
        let due = self.peers.values().filter_map(|peer| peer.due.last().copied());
        let expiry = self.heard.values().map(|(at, _)| *at + VALIDITY).filter(|at| *at > now);
        let late = self.ahead.values().map(|(_, since)| *since + WITHHELD).filter(|at| *at > now);
        due.chain(expiry).chain(late).min()
    }

    /// What clusters say they have said and what is not here after [`WITHHELD`].
    pub fn withheld(&self, now: Duration) -> BTreeMap<ClusterId, Position> {
        let late = |(_, since): &(Position, Duration)| now >= *since + WITHHELD;
        self.ahead.iter().filter(|(_, ahead)| late(ahead)).map(|(c, (said, _))| (c.clone(), *said)).collect()
    }

    /// What own nodes with a hello not older than [`VALIDITY`] say that they cannot reach. One without is not in here:
    /// unknown is not "nothing".
    pub fn unreachable(&self, now: Duration) -> BTreeMap<NodeName, BTreeSet<ClusterId>> {
        self.own(now).map(|(node, hello)| (node, hello.cannot_reach.clone())).collect()
    }

    /// The same for clusters to which a tunnel of theirs has never answered.
    pub fn untried(&self, now: Duration) -> BTreeMap<NodeName, BTreeSet<ClusterId>> {
        self.own(now).map(|(node, hello)| (node, hello.untried.clone())).collect()
    }

    /// Of peers that came lately: those that get no packets yet. A gateway of another cluster does once it answers and has
    /// said that it reaches its own nodes; what own ones reach is the plan's to judge.
    pub fn early(
        &self,
        now: Duration,
        young: &BTreeSet<PeerId>,
        alive: &BTreeSet<PeerId>,
    ) -> BTreeSet<PeerId> {
        let is = |id: &PeerId| {
            let Some(Peer { node, .. }) = self.peers.get(id).filter(|peer| peer.node.cluster != self.cluster)
            else {
                return true;
            };
            let heard = self.heard.get(node).filter(|(at, _)| now < *at + VALIDITY);
            !alive.contains(id) || heard.is_none_or(|(_, hello)| hello.untried.contains(&node.cluster))
        };
        young.iter().filter(|id| is(id)).copied().collect()
    }

    /// By other cluster: the addresses that its nodes see this node's devices at.
    pub fn seen(&self, now: Duration) -> BTreeMap<ClusterId, BTreeSet<IpAddr>> {
        let mut seen: BTreeMap<ClusterId, BTreeSet<IpAddr>> = BTreeMap::new();
        for (node, hello) in self.heard(now).filter(|(node, _)| node.cluster != self.cluster) {
            seen.entry(node.cluster.clone()).or_default().extend(hello.seen.values().map(SocketAddr::ip));
        }
        seen
    }

    fn own(&self, now: Duration) -> impl Iterator<Item = (NodeName, &Hello)> {
        let own = self.heard(now).filter(|(node, _)| node.cluster == self.cluster);
        own.map(|(node, hello)| (node.node.clone(), hello))
    }

    /// What was heard and still holds.
    pub fn heard(&self, now: Duration) -> impl Iterator<Item = (&NodeKey, &Hello)> {
        self.heard
            .iter()
            .filter(move |(_, (at, _))| now < *at + VALIDITY)
            .map(|(node, (_, hello))| (node, hello))
    }
}

const _: () = assert!(HEAD + MAX_CANNOT_REACH * 66 + MAX_SEEN * 22 + 94 <= MAX_LEN);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tombolo_proto::model::WireguardKey;

    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn cluster(name: &str) -> ClusterId {
        ClusterId::new(name).unwrap()
    }

    fn clusters(names: &[&str]) -> BTreeSet<ClusterId> {
        names.iter().map(|n| cluster(n)).collect()
    }

    fn id(n: u8) -> PeerId {
        (DeviceNumber::new(5).unwrap(), WireguardKey([n; 32]))
    }

    fn node(c: &str, n: &str) -> NodeKey {
        NodeKey { cluster: cluster(c), node: NodeName::new(n).unwrap() }
    }

    fn hellos() -> Hellos {
        let mut hellos = Hellos::new(cluster("a"), 100);
        let peers =
            BTreeMap::from([(id(1), node("a", "gw1")), (id(2), node("a", "gw2")), (id(3), node("b", "gw1"))]);
        hellos.handle_peers(ms(0), &peers);
        hellos
    }

    fn sent(hellos: &mut Hellos, now: Duration) -> Vec<(PeerId, Hello)> {
        let mut list = Vec::new();
        while let Some((id, bytes)) = hellos.poll_transmit(now) {
            list.push((id, Hello::decode(&bytes).unwrap()));
            assert!(list.len() < 100, "it never rests");
        }
        list
    }

    fn any_hello() -> impl Strategy<Value = Hello> {
        let name = prop::string::string_regex("[a-z]([a-z0-9]{0,61}[a-z0-9])?").unwrap();
        let name = name.prop_map(|n| cluster(&n)).boxed();
        let position = any::<(u64, u32, u64, u64)>().prop_map(|(serial, generation, epoch, sequence)| {
            Position { serial, generation, epoch, sequence }
        });
        let device = (0_u8..64).prop_map(|n| DeviceNumber::new(n).unwrap());
        (
            any::<u64>(),
            prop::collection::btree_set(name.clone(), 0..MAX_CANNOT_REACH),
            prop::collection::btree_set(name.clone(), 0..MAX_CANNOT_REACH),
            prop::collection::btree_map(name, position, 0..40),
            prop::collection::btree_map(
                device,
                any::<SocketAddr>().prop_map(|a| SocketAddr::new(a.ip(), a.port())),
                0..MAX_SEEN,
            ),
        )
            .prop_map(|(number, cannot_reach, untried, positions, seen)| Hello {
                number,
                cannot_reach,
                untried,
                positions,
                seen,
            })
    }

    #[test]
    fn what_a_cluster_says_of_itself_is_missed_after_a_while() {
        let at = |sequence| Position { serial: 1, generation: 0, epoch: 1, sequence };
        let mut hellos = hellos();
        let mut number = 0;
        let mut says = |hellos: &mut Hellos, now, peer, about: &str, sequence| {
            number += 1;
            let positions = BTreeMap::from([(cluster(about), at(sequence))]);
            hellos.handle_hello(now, peer, Hello { number, positions, ..Hello::default() });
        };
        let here = |hellos: &mut Hellos, now, sequence| {
            let positions = BTreeMap::from([(cluster("b"), at(sequence))]);
            hellos.handle_content(now, Default::default(), positions);
        };
        let withheld = |hellos: &Hellos, now| hellos.withheld(now).get(&cluster("b")).copied();
        here(&mut hellos, ms(0), 5);
        says(&mut hellos, ms(0), id(3), "b", 5);
        assert_eq!(withheld(&hellos, ms(1_000_000)), None, "it is here");
        says(&mut hellos, ms(1_000), id(3), "b", 6);
        says(&mut hellos, ms(20_000), id(3), "b", 9);
        assert_eq!(withheld(&hellos, ms(30_999)), None);
        assert!(hellos.poll_timeout(ms(30_999)).is_some_and(|at| at <= ms(31_000)));
        assert_eq!(withheld(&hellos, ms(31_000)), Some(at(6)), "the first that is missed");
        // Something newer came: what is newer still is waited for anew.
        here(&mut hellos, ms(32_000), 7);
        assert_eq!(withheld(&hellos, ms(32_000)), None);
        says(&mut hellos, ms(33_000), id(3), "b", 9);
        assert_eq!(withheld(&hellos, ms(62_999)), None);
        here(&mut hellos, ms(62_999), 9);
        assert_eq!(withheld(&hellos, ms(100_000)), None);
        // Nobody is believed about another.
        says(&mut hellos, ms(101_000), id(3), "c", 99);
        says(&mut hellos, ms(101_000), id(1), "b", 99);
        assert!(hellos.withheld(ms(1_000_000)).is_empty());
        says(&mut hellos, ms(102_000), id(3), "b", 99);
        hellos.handle_peers(ms(103_000), &BTreeMap::new());
        assert!(hellos.withheld(ms(1_000_000)).is_empty(), "it is gone");
    }

    proptest! {
        #[test]
        fn reads_back(hello in any_hello(), first in 0_usize..100) {
            let bytes = hello.encode(first);
            prop_assert!(bytes.len() <= MAX_LEN);
            let read = Hello::decode(&bytes).unwrap();
            prop_assert_eq!(read.number, hello.number);
            prop_assert_eq!(&read.cannot_reach, &hello.cannot_reach);
            prop_assert!(read.untried.is_subset(&hello.untried));
            let room = MAX_CANNOT_REACH - hello.cannot_reach.len();
            prop_assert_eq!(read.untried.len(), hello.untried.len().min(room));
            prop_assert_eq!(&read.seen, &hello.seen);
            prop_assert!(read.positions.iter().all(|(c, p)| hello.positions.get(c) == Some(p)));
            prop_assert!(hello.positions.is_empty() || !read.positions.is_empty());
        }

        #[test]
        fn damage_never_panics(hello in any_hello(), cut in any::<usize>(), flips in prop::collection::vec(any::<(usize, u8)>(), 0..8)) {
            let mut bytes = hello.encode(0);
            for (at, bits) in flips {
                let at = at % bytes.len();
                bytes[at] ^= bits;
            }
            let _ = Hello::decode(&bytes[..cut % (bytes.len() + 1)]);
        }

        #[test]
        fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1400)) {
            let _ = Hello::decode(&bytes);
            let mut framed = b"TMBH\x01\0\0\0\0\0\0\0\x07".to_vec();
            framed.extend(bytes);
            let _ = Hello::decode(&framed);
        }
    }

    #[test]
    fn unknown_fields_are_passed_over_and_versions_are_not() {
        let mut bytes = Hello { number: 7, cannot_reach: clusters(&["b"]), ..Hello::default() }.encode(0);
        bytes.extend([200, 0, 2, 1, 1]);
        assert_eq!(Hello::decode(&bytes).unwrap().cannot_reach, clusters(&["b"]));
        bytes[4] = 2;
        assert_eq!(Hello::decode(&bytes), Err(HelloError::Version(2)));
    }

    #[test]
    fn a_change_is_told_at_once_and_again() {
        let mut hellos = hellos();
        assert_eq!(sent(&mut hellos, ms(0)).len(), 3);
        assert_eq!(sent(&mut hellos, ms(500)).len(), 3);
        assert_eq!(hellos.poll_timeout(ms(500)), Some(ms(10_500)));
        hellos.handle_content(ms(2000), (clusters(&["b"]), BTreeSet::new()), BTreeMap::new());
        for now in [2000, 2100, 2400, 12_400] {
            assert_eq!(hellos.poll_timeout(ms(now) - ms(1)), Some(ms(now)));
            let list = sent(&mut hellos, ms(now));
            assert!(
                list.len() == 3 && list.iter().all(|(_, h)| h.cannot_reach == clusters(&["b"])),
                "{list:?}"
            );
        }
        hellos.handle_content(ms(13_000), (clusters(&["b"]), BTreeSet::new()), BTreeMap::new());
        assert_eq!(sent(&mut hellos, ms(13_000)).len(), 0);
    }

    #[test]
    fn a_storm_of_changes_is_no_storm_of_hellos() {
        let mut hellos = hellos();
        let mut count = 0;
        for now in 0..1000 {
            hellos.handle_content(
                ms(now),
                (clusters(if now % 2 == 0 { &["b"] } else { &[] }), BTreeSet::new()),
                BTreeMap::new(),
            );
            count += sent(&mut hellos, ms(now)).len();
        }
        assert!(count <= 3 * 51, "{count}");
    }

    #[test]
    fn a_foreign_gateway_that_came_lately_waits_until_it_reaches_its_own_nodes() {
        let mut hellos = hellos();
        let (own, foreign) = (id(1), id(3));
        let young = BTreeSet::from([own, foreign]);
        let early = |hellos: &Hellos, alive: &[PeerId]| {
            hellos.early(ms(10), &young, &alive.iter().copied().collect())
        };
        assert_eq!(early(&hellos, &[own, foreign]), young, "it has said nothing");
        let hello = |number, c: &[&str]| Hello { number, untried: clusters(c), ..Hello::default() };
        hellos.handle_hello(ms(0), foreign, hello(1, &["b"]));
        assert_eq!(early(&hellos, &[foreign]), young);
        hellos.handle_hello(ms(0), foreign, hello(2, &["a"]));
        assert_eq!(early(&hellos, &[]), young, "it does not answer");
        assert_eq!(early(&hellos, &[foreign]), BTreeSet::from([own]), "own ones the plan judges");
    }

    #[test]
    fn what_was_heard_expires_to_unknown() {
        let mut hellos = hellos();
        let hello = |number, c: &[&str]| Hello { number, cannot_reach: clusters(c), ..Hello::default() };
        assert!(hellos.handle_hello(ms(0), id(1), hello(5, &["b"])));
        assert!(hellos.handle_hello(ms(0), id(2), hello(5, &[])));
        // Another cluster's says nothing of own gateways; a stranger nothing at all.
        assert!(hellos.handle_hello(ms(0), id(3), hello(5, &["c"])));
        assert!(!hellos.handle_hello(ms(0), id(9), hello(5, &["c"])));
        let wanted = |b: &[&str]| {
            BTreeMap::from([
                (NodeName::new("gw1").unwrap(), clusters(b)),
                (NodeName::new("gw2").unwrap(), BTreeSet::new()),
            ])
        };
        assert_eq!(hellos.unreachable(ms(10)), wanted(&["b"]));
        // Late and doubled ones change nothing.
        assert!(!hellos.handle_hello(ms(20), id(1), hello(4, &[])));
        assert!(!hellos.handle_hello(ms(20), id(1), hello(5, &[])));
        assert!(hellos.handle_hello(ms(30), id(1), hello(6, &[])));
        assert_eq!(hellos.unreachable(ms(40)), wanted(&[]));
        assert!(!hellos.handle_hello(ms(20_000), id(1), hello(7, &[])));
        assert_eq!(hellos.unreachable(ms(35_000)).len(), 1);
        assert_eq!(hellos.unreachable(ms(55_000)).len(), 0);
        // A sender whose clock went back is heard once its last word has expired.
        assert!(hellos.handle_hello(ms(55_000), id(1), hello(1, &["b"])));
    }
}
