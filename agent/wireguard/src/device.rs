//! One WireGuard device, without sockets and clocks: packets, datagrams and time go in, packets and datagrams come
//! out at a [`Wire`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::allowed::AllowedIps;
use crate::key::{PresharedKey, PublicKey};
use crate::noise::{Addressee, Identity, Opened, Scratch, Session, Sink, Tick};
use crate::packet::Header;
use crate::uapi::{self, AllowedIp, Past, SetDevice, SetPeer, UapiError};

/// How often [`Device::handle_tick`] wants to be called.
pub const TICK: Duration = Duration::from_millis(250);

/// The most peers of one device.
pub const MAX_PEERS: usize = 1 << 16;

/// How long after its handshake a session may still be in use (REJECT_AFTER_TIME of the WireGuard paper, and a
/// margin for what was not yet written down).
const SESSION_LIFE: Duration = Duration::from_secs(200);

/// The device's two sides.
pub trait Wire {
    /// Sends a datagram to a peer.
    fn send(&mut self, to: SocketAddr, datagram: &[u8]);
    /// Hands a packet from a peer to the host.
    fn deliver(&mut self, packet: &[u8]);
}

/// Now, by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// For what lasts.
    pub now: Instant,
    /// Since 1970, for what people read.
    pub wall: Duration,
}

/// Packets that went nowhere, and why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drops {
    /// From the host: no IP packet.
    pub malformed: u64,
    /// From the host: for an address no peer has.
    pub no_peer: u64,
    /// From the host: the peer's address is not known, or we have no key.
    pub no_endpoint: u64,
    /// From the network: no message, or of nobody we know, or not authentic.
    pub refused: u64,
    /// From a peer: it may not use this source address, or no IP packet.
    pub source: u64,
}

type Slot = u16;

/// One device.
pub struct Device {
    identity: Option<Identity>,
    listen_port: u16,
    fwmark: u32,
    peers: Vec<Option<Peer>>,
    free: Vec<Slot>,
    by_key: BTreeMap<PublicKey, Slot>,
    allowed: AllowedIps<Slot>,
    scratch: Scratch,
    drops: Drops,
    /// The upper bits of the next peer's index, so that messages for one that is gone meet nobody.
    generation: u8,
    seconds: Option<Instant>,
    changed: bool,
}

struct Peer {
    key: PublicKey,
    preshared: Option<PresharedKey>,
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    generation: u8,
    session: Option<Session>,
    past: Past,
    last_traffic: Instant,
    asleep: bool,
}

impl Device {
    /// A device without key and peers. `seed` should be random.
    pub fn new(seed: u8) -> Self {
        Self {
            identity: None,
            listen_port: 0,
            fwmark: 0,
            peers: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            allowed: AllowedIps::new(),
            scratch: Scratch::new(),
            drops: Drops::default(),
            generation: seed,
            seconds: None,
            changed: false,
        }
    }

    /// Whether there is a private key.
    pub fn has_key(&self) -> bool {
        self.identity.is_some()
    }

    /// Packets dropped so far.
    pub fn drops(&self) -> Drops {
        self.drops
    }

    /// Whether anything changed, since this was asked last, that should survive our death.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The port and mark that the sockets really have.
    pub fn set_socket(&mut self, listen_port: u16, fwmark: u32) {
        self.changed |= (self.listen_port, self.fwmark) != (listen_port, fwmark);
        (self.listen_port, self.fwmark) = (listen_port, fwmark);
    }

    /// The port and mark last set.
    pub fn socket(&self) -> (u16, u32) {
        (self.listen_port, self.fwmark)
    }

    /// Everything, in the form of a `get=1` answer without its end.
    pub fn state(&self) -> Zeroizing<String> {
        // One allocation: a string that grows would leave copies of the keys behind.
        let prefixes = self.allowed.iter().count();
        let mut out = Zeroizing::new(String::with_capacity(256 + self.by_key.len() * 640 + prefixes * 64));
        uapi::write_device(
            &mut out,
            self.identity.as_ref().map(Identity::private),
            self.listen_port,
            self.fwmark,
        );
        let mut allowed: BTreeMap<Slot, Vec<_>> = BTreeMap::new();
        for (prefix, slot) in self.allowed.iter() {
            allowed.entry(slot).or_default().push(prefix);
        }
        for (key, slot) in &self.by_key {
            let Some(peer) = self.peers[usize::from(*slot)].as_ref() else { continue };
            uapi::write_peer(
                &mut out,
                key,
                peer.preshared.as_ref(),
                peer.endpoint,
                peer.keepalive,
                &peer.past,
            );
            for prefix in allowed.get(slot).into_iter().flatten() {
                uapi::write_allowed_ip(&mut out, *prefix);
            }
        }
        out
    }

    /// Whether [`apply`](Self::apply) can do this; nothing is changed.
    pub fn check(&self, set: &SetDevice) -> Result<(), UapiError> {
        let kept = if set.replace_peers { 0 } else { self.by_key.len() };
        let adds =
            |p: &&SetPeer| !p.remove && (set.replace_peers || !self.by_key.contains_key(&p.public_key));
        let added: BTreeSet<_> = set.peers.iter().filter(adds).map(|p| p.public_key).collect();
        if kept + added.len() > MAX_PEERS {
            return Err(UapiError::Refused {
                what: format!("a device has {MAX_PEERS} peers at most"),
                errno: libc::ENOSPC,
            });
        }
        Ok(())
    }

    /// Applies a change that was checked; port and mark are the caller's.
    pub fn apply(&mut self, set: SetDevice, at: Moment, wire: &mut impl Wire) {
        self.changed = true;
        if let Some(key) = set.private_key {
            let same = match (&self.identity, &key) {
                (Some(identity), Some(key)) => identity.private() == key,
                (None, None) => true,
                _ => false,
            };
            if !same {
                self.identity = key.map(Identity::new);
                if let Some(own) = self.identity.as_ref().map(Identity::public) {
                    self.remove(&own);
                }
                for slot in 0..self.peers.len() {
                    self.renew_session(slot as Slot);
                }
            }
        }
        if set.replace_peers {
            let all: Vec<_> = self.by_key.keys().copied().collect();
            all.iter().for_each(|key| self.remove(key));
        }
        for peer in set.peers {
            self.apply_peer(peer, at, wire);
        }
    }

    /// Takes up what a device before us left, and calls every peer that may still use keys that died with it.
    pub fn resume(&mut self, state: SetDevice, at: Moment, wire: &mut impl Wire) {
        self.apply(state, at, wire);
        for slot in 0..self.peers.len() {
            let Some(peer) = self.peers[slot].as_ref() else { continue };
            let last = peer.past.last_handshake;
            if !last.is_zero() && at.wall.saturating_sub(last) < SESSION_LIFE {
                self.initiate(slot as Slot, at, wire);
            }
        }
    }

    /// A packet from the host.
    pub fn handle_packet(&mut self, packet: &[u8], at: Moment, wire: &mut impl Wire) {
        let Ok(header) = Header::parse(packet) else {
            self.drops.malformed += 1;
            return;
        };
        let Some(slot) = self.allowed.owner(header.destination) else {
            self.drops.no_peer += 1;
            return;
        };
        if !self.seal(slot, &packet[..header.length], at, wire) {
            self.drops.no_endpoint += 1;
        }
    }

    /// A datagram from the network.
    pub fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], at: Moment, wire: &mut impl Wire) {
        if self.open(from, datagram, at, wire).is_none() {
            self.drops.refused += 1;
        }
    }

    /// Time has passed; to be called each [`TICK`].
    pub fn handle_tick(&mut self, at: Moment, wire: &mut impl Wire) {
        if let Some(identity) = &self.identity
            && self
                .seconds
                .is_none_or(|last| at.now.saturating_duration_since(last) >= Duration::from_secs(1))
        {
            identity.handle_second();
            self.seconds = Some(at.now);
        }
        for slot in 0..self.peers.len() {
            let Some(peer) = self.peers[slot].as_mut() else { continue };
            let Some(session) = peer.session.as_mut() else { continue };
            let mut out = Out::new(wire, &self.allowed, slot as Slot, peer.endpoint);
            let tick = session.handle_tick(&mut self.scratch, &mut out);
            peer.past.tx_bytes += out.sent;
            if out.sent > 0 {
                peer.last_traffic = at.now;
            }
            let asleep = tick == Tick::Expired;
            if asleep && !peer.asleep {
                tracing::debug!(peer = %peer.key, "no handshake for long: asleep until there is something to send");
            }
            peer.asleep = asleep;
            let due = Duration::from_secs(peer.keepalive.into());
            if !due.is_zero() && at.now.saturating_duration_since(peer.last_traffic) >= due {
                self.keepalive(slot as Slot, at, wire);
            }
        }
    }

    fn open(&mut self, from: SocketAddr, datagram: &[u8], at: Moment, wire: &mut impl Wire) -> Option<()> {
        let identity = self.identity.as_ref()?;
        let to = identity.read(from.ip(), datagram, &mut self.scratch)?;
        let slot = match &to {
            Addressee::Challenge(length) => {
                wire.send(from, Identity::challenge(&self.scratch, *length));
                return Some(());
            }
            Addressee::Initiation(key) => *self.by_key.get(key)?,
            Addressee::Response(index) | Addressee::Cookie(index) | Addressee::Data(index) => *index as Slot,
        };
        let peer = self.peers.get_mut(usize::from(slot))?.as_mut()?;
        if let Addressee::Response(index) | Addressee::Cookie(index) | Addressee::Data(index) = &to
            && *index != index_of(slot, peer.generation)
        {
            return None;
        }
        let session = peer.session.as_mut()?;
        let mut out = Out::new(wire, &self.allowed, slot, Some(from));
        let Opened { authentic, handshake } =
            session.open(from.ip(), datagram, &to, &mut self.scratch, &mut out);
        peer.past.tx_bytes += out.sent;
        self.drops.source += out.foreign;
        if !authentic {
            // A cookie is for the handshake alone; it proves nothing about where the peer is.
            return matches!(to, Addressee::Cookie(_)).then_some(());
        }
        peer.past.rx_bytes += datagram.len() as u64;
        peer.last_traffic = at.now;
        if peer.endpoint != Some(from) {
            tracing::debug!(peer = %peer.key, %from, "peer has moved");
            peer.endpoint = Some(from);
            self.changed = true;
        }
        if handshake {
            tracing::debug!(peer = %peer.key, "handshake completed");
            peer.past.last_handshake = at.wall;
            self.changed = true;
        }
        Some(())
    }

    fn seal(&mut self, slot: Slot, packet: &[u8], at: Moment, wire: &mut impl Wire) -> bool {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return false };
        let (Some(session), Some(endpoint)) = (peer.session.as_mut(), peer.endpoint) else { return false };
        let mut out = Out::new(wire, &self.allowed, slot, Some(endpoint));
        session.seal([packet], &mut self.scratch, &mut out);
        peer.past.tx_bytes += out.sent;
        peer.last_traffic = at.now;
        true
    }

    fn initiate(&mut self, slot: Slot, at: Moment, wire: &mut impl Wire) {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        let (Some(session), Some(endpoint)) = (peer.session.as_mut(), peer.endpoint) else { return };
        let mut out = Out::new(wire, &self.allowed, slot, Some(endpoint));
        session.initiate(&mut self.scratch, &mut out);
        peer.past.tx_bytes += out.sent;
        peer.last_traffic = at.now;
    }

    /// An empty packet, or a call if there are no keys: unlike a packet it must not wait in a queue.
    fn keepalive(&mut self, slot: Slot, at: Moment, wire: &mut impl Wire) {
        let Some(peer) = self.peers[usize::from(slot)].as_ref() else { return };
        let Some(session) = peer.session.as_ref() else { return };
        let (established, stale) = (session.is_established(), session.is_stale());
        if established {
            self.seal(slot, &[], at, wire);
        }
        if !established || stale {
            self.initiate(slot, at, wire);
        }
    }

    fn apply_peer(&mut self, set: SetPeer, at: Moment, wire: &mut impl Wire) {
        if set.remove {
            self.remove(&set.public_key);
            return;
        }
        let own = self.identity.as_ref().map(Identity::public);
        if own == Some(set.public_key) {
            return;
        }
        let slot = match self.by_key.get(&set.public_key) {
            Some(slot) => *slot,
            None if set.update_only => return,
            None => match self.add(&set, at) {
                Some(slot) => slot,
                None => return,
            },
        };
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        if let Some(endpoint) = set.endpoint {
            peer.endpoint = Some(endpoint);
        }
        let kept_awake = peer.keepalive != 0;
        peer.keepalive = set.keepalive.unwrap_or(peer.keepalive);
        let wake = !kept_awake && peer.keepalive != 0;
        let rekey = set.preshared_key.is_some_and(|new| {
            let differs = new != peer.preshared;
            peer.preshared = new;
            differs
        });
        if set.replace_allowed_ips {
            self.allowed.remove_owner(slot);
        }
        for change in set.allowed_ips {
            match change {
                AllowedIp::Add(prefix) => self.allowed.insert(prefix, slot),
                AllowedIp::Remove(prefix) => self.allowed.remove(prefix, slot),
            }
        }
        if rekey {
            // The engine takes a preshared key only at birth.
            let established = self.peers[usize::from(slot)]
                .as_ref()
                .and_then(|p| p.session.as_ref())
                .is_some_and(Session::is_established);
            self.renew_session(slot);
            if established {
                self.initiate(slot, at, wire);
            }
        }
        if wake {
            self.keepalive(slot, at, wire);
        }
    }

    fn add(&mut self, set: &SetPeer, at: Moment) -> Option<Slot> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = Slot::try_from(self.peers.len()).ok()?;
                self.peers.push(None);
                slot
            }
        };
        self.generation = self.generation.wrapping_add(1);
        self.peers[usize::from(slot)] = Some(Peer {
            key: set.public_key,
            preshared: None,
            endpoint: None,
            keepalive: 0,
            generation: self.generation,
            session: None,
            past: set.past,
            last_traffic: at.now,
            asleep: false,
        });
        self.by_key.insert(set.public_key, slot);
        self.renew_session(slot);
        Some(slot)
    }

    fn remove(&mut self, key: &PublicKey) {
        let Some(slot) = self.by_key.remove(key) else { return };
        self.allowed.remove_owner(slot);
        self.peers[usize::from(slot)] = None;
        self.free.push(slot);
    }

    fn renew_session(&mut self, slot: Slot) {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        let index = index_of(slot, peer.generation);
        peer.session =
            self.identity.as_ref().map(|own| Session::new(own, &peer.key, peer.preshared.as_ref(), index));
    }
}

/// 24 bits: generation, slot.
fn index_of(slot: Slot, generation: u8) -> u32 {
    u32::from(generation) << 16 | u32::from(slot)
}

/// Where a session's messages go.
struct Out<'a, W> {
    wire: &'a mut W,
    allowed: &'a AllowedIps<Slot>,
    slot: Slot,
    to: Option<SocketAddr>,
    sent: u64,
    foreign: u64,
}

impl<'a, W> Out<'a, W> {
    fn new(wire: &'a mut W, allowed: &'a AllowedIps<Slot>, slot: Slot, to: Option<SocketAddr>) -> Self {
        Self { wire, allowed, slot, to, sent: 0, foreign: 0 }
    }

    fn may_use(&self, source: IpAddr) -> bool {
        self.allowed.owner(source) == Some(self.slot)
    }
}

impl<W: Wire> Sink for Out<'_, W> {
    fn network(&mut self, datagram: &[u8]) {
        if let Some(to) = self.to {
            self.wire.send(to, datagram);
            self.sent += datagram.len() as u64;
        }
    }

    fn tunnel(&mut self, packet: &[u8]) {
        match Header::parse(packet) {
            Ok(header) if self.may_use(header.source) => self.wire.deliver(&packet[..header.length]),
            _ => self.foreign += 1,
        }
    }
}
