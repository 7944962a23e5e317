//! One WireGuard device, without sockets and clocks: packets, datagrams and time go in, packets and datagrams come
//! out at a [`Wire`].

mod traffic;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use traffic::Out;
use zeroize::Zeroizing;

use crate::allowed::AllowedIps;
use crate::identity::{Identities, Lines};
use crate::key::{PresharedKey, PublicKey};
use crate::limiter::Limiter;
use crate::noise::{Identity, Opened, Tick};
use crate::segment::Single;
use crate::stamp::Stamps;
use crate::uapi::{self, AllowedIp, Past, SetDevice, SetPeer, UapiError};

/// How often each peer's timers are looked at.
pub const TICK: Duration = Duration::from_millis(250);
/// Peers whose timers are looked at in one go, about: their packets wait for these 30 us.
const SHARE: usize = 64;
/// A tick is divided into so many parts at most.
const MOST_SHARES: usize = 64;

/// The most peers of one device.
pub const MAX_PEERS: usize = 1 << 16;

/// How long after its handshake a session may still be in use (REJECT_AFTER_TIME of the WireGuard paper, and a
/// margin for what was not yet written down).
const SESSION_LIFE: Duration = Duration::from_secs(200);

/// The device's two sides. What goes out is made in room that they give.
pub trait Wire {
    /// Room for a datagram of so many bytes or more. The same until [`Self::send`].
    fn datagram(&mut self, length: usize) -> &mut [u8];
    /// Sends the first so many bytes of that room to a peer.
    fn send(&mut self, to: SocketAddr, length: usize);
    /// Room for a packet of so many bytes or more. The same until [`Self::deliver`].
    fn packet(&mut self, length: usize) -> &mut [u8];
    /// Hands the first so many bytes of that room, a packet from a peer, to the host.
    fn deliver(&mut self, length: usize);
    /// Whether there is an elder: the worker before this one, which still has its keys.
    fn has_elder(&self) -> bool {
        false
    }
    /// Leaves datagrams that we have no keys for to the elder.
    fn leave_datagrams(&mut self, from: SocketAddr, datagrams: &[u8], size: usize) {
        let _ = (from, datagrams, size);
    }
    /// Leaves a packet of the host to the elder, for a peer that we have no keys with. False if there is none any more.
    fn leave_packet(&mut self, packet: &[u8]) -> bool {
        let _ = packet;
        false
    }
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
    identities: Identities,
    stamps: Stamps,
    /// The last stamp of the key before this process, while the clock is behind it.
    behind: Option<Duration>,
    listen_port: u16,
    fwmark: u32,
    peers: Vec<Option<Peer>>,
    free: Vec<Slot>,
    by_key: BTreeMap<PublicKey, Slot>,
    allowed: AllowedIps<Slot>,
    limiter: Limiter,
    drops: Drops,
    /// The upper bits of the next peer's index, so that messages for one that is gone meet nobody.
    generation: u8,
    seconds: Option<Instant>,
    /// The first peer whose timers are to be looked at next.
    turn: usize,
    changed: bool,
}

struct Peer {
    key: PublicKey,
    preshared: Option<PresharedKey>,
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    lines: Lines,
    past: Past,
    /// When the last handshake of this process was completed.
    handshake: Option<Instant>,
    /// Whether the worker before this one may have had keys.
    elders: bool,
    last_traffic: Instant,
    asleep: bool,
}

impl Device {
    /// A device without key and peers. `seed` should be random.
    pub fn new(seed: u8) -> Self {
        Self {
            identities: Identities::default(),
            stamps: Stamps::default(),
            behind: None,
            listen_port: 0,
            fwmark: 0,
            peers: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            allowed: AllowedIps::new(),
            limiter: Limiter::default(),
            drops: Drops::default(),
            generation: seed,
            seconds: None,
            turn: 0,
            changed: false,
        }
    }

    /// Whether there is a private key.
    pub fn has_key(&self) -> bool {
        self.identities.current().is_some()
    }

    /// When keys last called anybody: to be filled from what an earlier process knew, before a key is set.
    pub fn stamps(&mut self) -> &mut Stamps {
        &mut self.stamps
    }

    /// How far the clock is behind the last call of this key by an earlier process: peers ignore its calls so long.
    pub fn behind(&self, wall: Duration) -> Option<Duration> {
        self.behind.and_then(|stamp| stamp.checked_sub(wall)).filter(|behind| !behind.is_zero())
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
    pub fn state(&self, at: Moment) -> Zeroizing<String> {
        // One allocation: a string that grows would leave copies of the keys behind.
        let prefixes = self.allowed.iter().count();
        let mut out = Zeroizing::new(String::with_capacity(512 + self.by_key.len() * 640 + prefixes * 64));
        uapi::write_device(
            &mut out,
            self.identities.current().map(Identity::private),
            self.listen_port,
            self.fwmark,
        );
        if let Some((identity, age)) = self.identities.previous() {
            uapi::write_previous(&mut out, identity.private(), age);
        }
        if let Some(behind) = self.behind(at.wall) {
            uapi::write_behind(&mut out, behind);
        }
        let mut allowed: BTreeMap<Slot, Vec<_>> = BTreeMap::new();
        for (prefix, slot) in self.allowed.iter() {
            allowed.entry(slot).or_default().push(prefix);
        }
        for (key, slot) in &self.by_key {
            let Some(peer) = self.peers[usize::from(*slot)].as_ref() else { continue };
            // So long ago, by a clock that nobody sets, whatever the other one showed then.
            let ago = peer.handshake.map(|when| at.now.saturating_duration_since(when));
            let last_handshake = ago.map_or(peer.past.last_handshake, |ago| at.wall.saturating_sub(ago));
            uapi::write_peer(
                &mut out,
                key,
                peer.preshared.as_ref(),
                peer.endpoint,
                peer.keepalive,
                &Past { last_handshake, ..peer.past },
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
        if self.identities.set(set.private_key, set.previous_key, set.previous_age, at.now) {
            let own: Vec<_> = self.identities.all().map(Identity::public).collect();
            own.iter().for_each(|key| self.remove(key));
            self.stamps.retain(|key| own.contains(key));
            let last = self.identities.current().and_then(|own| self.stamps.last(&own.public()));
            self.behind = last.filter(|stamp| *stamp > at.wall);
            self.arrange_all();
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
                if let Some(peer) = self.peers[slot].as_mut() {
                    peer.elders = true;
                }
                // It may know the one key, or the other.
                self.add_line(slot as Slot, None);
                self.call_all(slot as Slot, at, wire);
            }
        }
    }

    /// In how many goes all peers' timers are looked at.
    fn shares(&self) -> usize {
        self.peers.len().div_ceil(SHARE).clamp(1, MOST_SHARES)
    }

    /// Until [`Self::handle_tick`] is to be called again.
    pub fn pause(&self) -> Duration {
        TICK / u32::try_from(self.shares()).unwrap_or(1)
    }

    /// Time has passed: looks at the timers of the peers whose turn it is.
    pub fn handle_tick(&mut self, at: Moment, wire: &mut impl Wire) {
        let second = Duration::from_secs(1);
        if self.seconds.is_none_or(|last| at.now.saturating_duration_since(last) >= second) {
            self.seconds = Some(at.now);
            self.handle_second(at, wire);
        }
        if self.turn >= self.peers.len() {
            self.turn = 0;
        }
        if self.turn == 0 {
            let addresses = self.limiter.is_loaded(at.now).then_some(self.peers.iter().flatten());
            self.limiter
                .set_peers(addresses.into_iter().flatten().filter_map(|peer| Some(peer.endpoint?.ip())));
        }
        let first = self.turn;
        self.turn = (first + self.peers.len().div_ceil(self.shares())).min(self.peers.len());
        for slot in first..self.turn {
            let Some(peer) = self.peers[slot].as_mut() else { continue };
            let mut asleep = !peer.lines.is_empty();
            for place in peer.lines.handle_tick(at.now) {
                let Some(line) = peer.lines.get(place) else { continue };
                let mut out = Out::new(wire, &self.allowed, slot as Slot, peer.endpoint);
                asleep &= line.session.handle_tick(&mut out) == Tick::Expired;
                out.account(peer, place, &mut self.stamps, at);
            }
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

    fn handle_second(&mut self, at: Moment, wire: &mut impl Wire) {
        self.identities.handle_second(at.now);
        let uses = |own: &PublicKey| self.peers.iter().flatten().any(|p| p.lines.sends_by() == Some(*own));
        if let Some(ended) = self.identities.ended(uses) {
            tracing::info!(key = %ended, "the previous key is not answered to any more");
            self.identities.end_previous();
            self.stamps.retain(|key| *key != ended);
            self.arrange_all();
            self.changed = true;
        }
        if self.behind.is_some_and(|stamp| at.wall > stamp) {
            tracing::info!("the clock has caught up: peers take our handshakes again");
            self.behind = None;
            // A session's clock is the one of its birth.
            for slot in 0..self.peers.len() {
                if self.peers[slot].as_ref().is_some_and(|peer| !peer.lines.carries()) {
                    self.renew(slot as Slot);
                    self.keepalive(slot as Slot, at, wire);
                }
            }
        }
    }

    /// Calls by the line at `place`.
    fn call(&mut self, slot: Slot, place: usize, at: Moment, wire: &mut impl Wire) {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        let (Some(line), Some(endpoint)) = (peer.lines.get(place), peer.endpoint) else { return };
        let mut out = Out::new(wire, &self.allowed, slot, Some(endpoint));
        line.session.initiate(&mut out);
        out.account(peer, place, &mut self.stamps, at);
        peer.last_traffic = at.now;
    }

    /// Calls by all lines.
    fn call_all(&mut self, slot: Slot, at: Moment, wire: &mut impl Wire) {
        let lines = self.peers[usize::from(slot)].as_ref().map_or(0, |peer| peer.lines.len());
        (0..lines).for_each(|place| self.call(slot, place, at, wire));
    }

    /// An empty packet, or a call if there are no keys: unlike a packet it must not wait in a queue.
    fn keepalive(&mut self, slot: Slot, at: Moment, wire: &mut impl Wire) {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        let carries = peer.lines.carries();
        let Some((place, line)) = peer.lines.sending() else { return };
        let stale = line.session.is_stale();
        if carries {
            self.seal(slot, &mut Single::new(&[]), at, wire);
            if stale {
                self.call(slot, place, at, wire);
            }
        } else {
            self.call_all(slot, at, wire);
        }
    }

    fn apply_peer(&mut self, set: SetPeer, at: Moment, wire: &mut impl Wire) {
        if set.remove {
            self.remove(&set.public_key);
            return;
        }
        if self.identities.of(&set.public_key).is_some() {
            return;
        }
        let replaced = set.replaces.is_some_and(|before| self.replace(&before, set.public_key, at));
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
            let carried = self.peers[usize::from(slot)].as_ref().is_some_and(|p| p.lines.carries());
            self.renew(slot);
            if carried {
                self.call(slot, 0, at, wire);
            }
        } else if replaced {
            // The old session carries meanwhile.
            self.call(slot, 0, at, wire);
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
        self.peers[usize::from(slot)] = Some(Peer {
            key: set.public_key,
            preshared: None,
            endpoint: None,
            keepalive: 0,
            lines: Lines::default(),
            past: set.past,
            handshake: None,
            elders: false,
            last_traffic: at.now,
            asleep: false,
        });
        self.by_key.insert(set.public_key, slot);
        self.arrange(slot);
        Some(slot)
    }

    /// Gives a peer another key, unless there is a peer of that key. True if it did.
    fn replace(&mut self, before: &PublicKey, key: PublicKey, at: Moment) -> bool {
        let Some(slot) = self.by_key.get(before).copied().filter(|_| !self.by_key.contains_key(&key)) else {
            return false;
        };
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return false };
        peer.key = key;
        peer.lines.replace(before, at.now);
        self.by_key.remove(before);
        self.by_key.insert(key, slot);
        self.arrange(slot);
        true
    }

    fn remove(&mut self, key: &PublicKey) {
        let Some(slot) = self.by_key.remove(key) else { return };
        self.allowed.remove_owner(slot);
        self.peers[usize::from(slot)] = None;
        self.free.push(slot);
    }

    fn arrange_all(&mut self) {
        (0..self.peers.len()).for_each(|slot| self.arrange(slot as Slot));
    }

    /// Makes the peer's lines fit its key and ours.
    fn arrange(&mut self, slot: Slot) {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        let index = next_index(&mut self.generation, slot);
        peer.lines.arrange(&self.identities, &peer.key, peer.preshared.as_ref(), index);
    }

    /// Makes all its lines anew.
    fn renew(&mut self, slot: Slot) {
        let Some(peer) = self.peers[usize::from(slot)].as_mut() else { return };
        peer.lines.clear();
        self.arrange(slot);
    }

    /// The place of the peer's line under this own key, or under the previous one, made if it is not there.
    fn add_line(&mut self, slot: Slot, own: Option<&PublicKey>) -> Option<usize> {
        let own = match own {
            Some(own) => self.identities.of(own)?,
            None => self.identities.previous()?.0,
        };
        let peer = self.peers[usize::from(slot)].as_mut()?;
        let index = next_index(&mut self.generation, slot);
        Some(peer.lines.line(own, &peer.key, peer.preshared.as_ref(), index))
    }
}

impl Peer {
    /// Whether only the worker before this one has keys.
    fn is_elders(&self) -> bool {
        self.elders && !self.lines.carries()
    }

    /// Authentic messages came by the line at `place`. True if anything changed that should survive our death.
    fn handle_opened(&mut self, opened: Opened, place: usize, from: SocketAddr, at: Moment) -> bool {
        self.past.rx_bytes += opened.bytes;
        self.last_traffic = at.now;
        let moved = self.endpoint != Some(from);
        if moved {
            tracing::debug!(peer = %self.key, %from, "peer has moved");
            self.endpoint = Some(from);
        }
        if opened.handshake {
            tracing::debug!(peer = %self.key, "handshake completed");
            self.lines.handle_handshake(place, at.now);
            (self.past.last_handshake, self.handshake) = (at.wall, Some(at.now));
        }
        moved || opened.handshake
    }
}

/// The index and generation for a new line of a peer: none of its others has it.
fn next_index(generation: &mut u8, slot: Slot) -> impl FnMut(&Lines) -> (u32, u8) {
    move |lines| {
        // It has four lines at most.
        loop {
            *generation = generation.wrapping_add(1);
            if lines.of(*generation).is_none() {
                return (index_of(slot, *generation), *generation);
            }
        }
    }
}

/// 24 bits: generation, slot.
fn index_of(slot: Slot, generation: u8) -> u32 {
    u32::from(generation) << 16 | u32::from(slot)
}
