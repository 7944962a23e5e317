//! Whether peers can be reached, from traffic and echoes: a state machine without clock and sockets.
//!
//! Asked is the peer's *kernel*, by an ICMP echo request to its tunnel address over the one device that leads to it. An
//! answer proves the way there and that some way back exists; received bytes prove only the way back, so they keep
//! nobody alive that is being sent to. Never answered is unknown, not dead (law 4): a firewall may drop echoes.
//!
//! How often: idle peers every 5 s; peers that packets are sent to every 200 ms; those that send nothing back, every
//! 100 ms; once an answer is late, every 50 ms. Dead is who left [`LOST`] requests unanswered, the oldest of them
//! at least [`WINDOW`] old; longer while something is received from it (a loaded machine answers late), and longer
//! still while nobody else answers either (then it may be this node). Worst case from the cut to dead, with traffic and a short
//! round trip: 220 ms until the next request, 80 ms until it is late, 7 x 55 ms, 80 ms: 0.77 s; a one-way cut, with
//! something received, 1.0 s; with a round trip of 150 ms, 0.15 s more.
//!
//! False alarms: with 5 % loss each way an echo fails with p = 1 - 0.95^2 = 0.0975. A peer in use is asked 432,000 times
//! a day; 38,000 of these fail after one that did not; the next seven fail too with p^7 = 8.4e-8: one false alarm in
//! 310 days for each peer in use. (With 20 % each way, p = 0.36: one in a quarter of an hour.)
//!
//! Young is who came lately to a node that has known others to live for a while: its way need not be complete yet, and
//! the others' is. That passes with time, since a peer may never answer.
//!
//! Alive again is who answered for 1 s, at least four times, and never missed two in a row. If it dies again within a
//! minute, the time is doubled, up to 16 s.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_proto::model::{DeviceNumber, WireguardKey};

/// A peer of this node: its key is of the device at the other end.
pub type PeerId = (DeviceNumber, WireguardKey);

/// Requests in a row without an answer, after which a peer is dead.
pub const LOST: usize = 8;
/// The oldest of these is at least so old.
pub const WINDOW: Duration = Duration::from_millis(450);
/// The same while something is received: a peer that lives may be slow, so that only a cut of our way remains.
const WINDOW_HEARD: Duration = Duration::from_millis(750);
/// The same while nobody else answers either: then it may be us, and nobody else would carry better.
const WINDOW_ALONE: Duration = Duration::from_secs(3);
/// Nobody answered for so long, and now one does: it was us, and all start anew.
const ALONE: Duration = Duration::from_secs(1);
/// Others that are asked while nobody answers, for comparison.
const WITNESSES: usize = 3;

const IDLE: Duration = Duration::from_secs(5);
/// Between requests to a peer that never answered, at first.
const NEW: Duration = Duration::from_secs(1);
/// How long a peer counts as new.
pub const YOUTH: Duration = Duration::from_secs(30);
/// Who has lived for so long makes others young.
pub const SETTLED: Duration = Duration::from_secs(10);
const BUSY: Duration = Duration::from_millis(200);
const SILENT: Duration = Duration::from_millis(100);
const SUSPECT: Duration = Duration::from_millis(50);
const DEAD: Duration = Duration::from_millis(500);
/// Nothing received for so long while sending: silence.
const SILENCE: Duration = Duration::from_millis(150);
/// Two readings with traffic within this time: in use. One alone is a hello or a keepalive.
const USE: Duration = Duration::from_millis(1500);
/// An answer is late after the round trip and four times its variation (as in RFC 6298), within these.
const PATIENCE_MIN: Duration = Duration::from_millis(80);
const PATIENCE_MAX: Duration = Duration::from_secs(1);
/// What is received lately: since so long ago.
const LATELY: Duration = Duration::from_millis(250);
/// What must be seen before a dead peer is alive.
const ANSWERS: u32 = 4;
const HOLD: Duration = Duration::from_secs(1);
const HOLD_MAX: Duration = Duration::from_secs(16);
/// Dying again within this time doubles the hold.
const FLAP: Duration = Duration::from_secs(60);
/// Requests remembered of one peer.
const MAX_OUTSTANDING: usize = 32;
/// Echoes between two readings that are no traffic.
const MAX_ECHOES: u64 = 64;
/// Padded ones among them: our own, and the answer to the other's.
const MAX_PROBES: u64 = 2;
/// With more peers than this all are asked less often, in proportion.
const CROWD: u32 = 400;
/// This late ourselves, we were not running: it says nothing about peers.
const STALL: Duration = Duration::from_millis(50);

/// What is known of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerHealth {
    /// It never answered.
    Unknown,
    /// It answers.
    Alive,
    /// It answered once, and does not now.
    Dead,
}

/// Bytes to and from a peer, since some start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// From it.
    pub received: u64,
    /// To it.
    pub sent: u64,
    /// What one echo, request or reply, counts for: whole multiples of it are no traffic.
    pub echo: u64,
    /// What one padded echo counts for ([`crate::path_mtu`]): a few of these are none either.
    pub probe: u64,
}

impl Counters {
    /// Whether so many more bytes are nothing but echoes.
    pub fn is_echoes(&self, bytes: u64) -> bool {
        let plain = |bytes: u64| bytes.is_multiple_of(self.echo) && bytes / self.echo <= MAX_ECHOES;
        let most = if self.probe > 0 { MAX_PROBES } else { 0 };
        self.echo > 0 && (0..=most).any(|count| bytes.checked_sub(count * self.probe).is_some_and(plain))
    }
}

/// An echo request to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo {
    /// To whom.
    pub peer: PeerId,
    /// To be told again with the answer.
    pub sequence: u16,
}

/// The liveness of all peers of this node.
#[derive(Debug)]
pub struct Liveness {
    peers: BTreeMap<PeerId, Peer>,
    random: u64,
    /// When this was to be polled; nothing before the first poll.
    expected: Option<Duration>,
    /// Since when requests are late and nobody answers.
    alone: Option<Duration>,
}

#[derive(Debug)]
struct Peer {
    health: PeerHealth,
    since: Duration,
    /// Until when it is young.
    young: Option<Duration>,
    sequence: u16,
    /// When it was last asked, and what the next interval is multiplied by.
    asked: Option<Duration>,
    jitter: f64,
    /// Ask as soon as may be.
    wake: bool,
    /// Requests since the last that was answered.
    outstanding: VecDeque<(u16, Duration)>,
    /// When the first of them was sent, be it still remembered or not.
    quiet: Option<Duration>,
    /// When the last answer came.
    answered: Option<Duration>,
    /// Smoothed, and how much it varies.
    round_trip: Option<(Duration, Duration)>,
    counters: Option<Counters>,
    /// The last two readings that showed traffic to it.
    used: [Option<Duration>; 2],
    /// The last reading that showed anything from it.
    heard: Option<Duration>,
    /// Answers of a dead peer: the first, and how many.
    good: Option<(Duration, u32)>,
    hold: Duration,
    /// It was dead before.
    revived: bool,
}

impl Peer {
    fn new(now: Duration) -> Self {
        Self {
            health: PeerHealth::Unknown,
            since: now,
            young: None,
            sequence: 0,
            asked: None,
            jitter: 1.0,
            wake: false,
            outstanding: VecDeque::new(),
            quiet: None,
            answered: None,
            round_trip: None,
            counters: None,
            used: [None; 2],
            heard: None,
            good: None,
            hold: HOLD,
            revived: false,
        }
    }

    fn patience(&self) -> Duration {
        self.round_trip
            .map_or(PATIENCE_MIN, |(rtt, varies)| (rtt + varies * 4).clamp(PATIENCE_MIN, PATIENCE_MAX))
    }

    /// Requests that should have been answered by now.
    fn overdue(&self, now: Duration) -> usize {
        let patience = self.patience();
        self.outstanding.iter().take_while(|(_, sent)| *sent + patience <= now).count()
    }

    fn in_use(&self, now: Duration) -> bool {
        self.used[0].is_some_and(|first| now <= first + USE)
    }

    fn interval(&self, now: Duration) -> Duration {
        match self.health {
            PeerHealth::Unknown if now < self.since + YOUTH || self.in_use(now) => NEW,
            PeerHealth::Unknown => IDLE,
            PeerHealth::Dead if self.good.is_some() => BUSY,
            PeerHealth::Dead if self.wake => SILENT,
            PeerHealth::Dead => DEAD,
            PeerHealth::Alive if self.overdue(now) > 0 => SUSPECT,
            PeerHealth::Alive if self.in_use(now) => {
                if self.heard.is_none_or(|heard| heard + SILENCE < now) {
                    SILENT
                } else {
                    BUSY
                }
            }
            PeerHealth::Alive if self.wake => SILENT,
            PeerHealth::Alive => IDLE,
        }
    }

    /// When to ask next, as things are now.
    fn due(&self, now: Duration, crowd: u32) -> Duration {
        let Some(asked) = self.asked else { return self.since };
        asked + self.interval(now).mul_f64(self.jitter) * crowd
    }

    /// When time alone changes something.
    fn timeout(&self, now: Duration, crowd: u32) -> Duration {
        let patience = self.patience();
        let late = self.outstanding.iter().map(|(_, sent)| *sent + patience).find(|at| *at > now);
        // At a window's end there may be enough late ones already.
        let windows = [WINDOW, WINDOW_HEARD, WINDOW_ALONE].map(|window| self.quiet.map(|at| at + window));
        let next = self.due(now, crowd);
        let times = windows.into_iter().flatten().chain(self.young);
        times.filter(|at| *at > now).chain(late).fold(next, Duration::min)
    }

    fn handle_counters(&mut self, now: Duration, new: Counters) {
        let Some(old) = self.counters.replace(new) else { return };
        let grown = |new: u64, old: u64| new.saturating_sub(old);
        let (sent, received) = (grown(new.sent, old.sent), grown(new.received, old.received));
        if sent > 0 && !new.is_echoes(sent) {
            self.used = [self.used[1], Some(now)];
        }
        if received > 0 {
            self.heard = Some(now);
            // It lives, or somebody there does; ask whether it hears us.
            self.wake |= self.health == PeerHealth::Dead;
        }
    }

    /// Whether it was one to a request that is remembered.
    fn handle_answer(&mut self, now: Duration, sequence: u16) -> bool {
        let Some(place) = self.outstanding.iter().position(|(s, _)| *s == sequence) else { return false };
        let Some((_, sent)) = self.outstanding.drain(..=place).next_back() else { return false };
        let took = now.saturating_sub(sent);
        self.round_trip = Some(match self.round_trip {
            // Half of what was thought: that had waited for something else, such as the tunnel's handshake.
            Some((rtt, _)) if took < rtt / 2 => (took, took / 2),
            None => (took, took / 2),
            Some((rtt, varies)) => ((rtt * 7 + took) / 8, (varies * 3 + rtt.abs_diff(took)) / 4),
        });
        self.wake = false;
        self.answered = Some(now);
        self.quiet = self.outstanding.front().map(|(_, sent)| *sent);
        match self.health {
            PeerHealth::Unknown => self.turn(PeerHealth::Alive, now),
            PeerHealth::Alive => {}
            PeerHealth::Dead => {
                let (first, count) = self.good.map_or((now, 1), |(first, count)| (first, count + 1));
                self.good = Some((first, count));
                if count >= ANSWERS && now >= first + self.hold {
                    self.revived = true;
                    self.turn(PeerHealth::Alive, now);
                }
            }
        }
        true
    }

    /// What the passing of time has shown. `witness`: when anybody else answered last.
    fn judge(&mut self, now: Duration, witness: Option<Duration>) {
        let overdue = self.overdue(now);
        match self.health {
            PeerHealth::Unknown => {}
            PeerHealth::Alive => {
                let Some(quiet) = self.quiet else { return };
                let window = if witness.is_none_or(|at| at < quiet) {
                    WINDOW_ALONE
                } else if self.heard.is_some_and(|heard| now <= heard + LATELY) {
                    WINDOW_HEARD
                } else {
                    WINDOW
                };
                if overdue >= LOST && quiet + window <= now {
                    let again = self.revived && now < self.since + FLAP;
                    self.hold = if again { (self.hold * 2).min(HOLD_MAX) } else { HOLD };
                    self.turn(PeerHealth::Dead, now);
                }
            }
            PeerHealth::Dead => {
                if overdue >= 2 {
                    self.good = None;
                }
            }
        }
    }

    fn turn(&mut self, health: PeerHealth, now: Duration) {
        self.health = health;
        self.since = now;
        self.good = None;
        self.wake = false;
    }

    fn shift(&mut self, by: Duration) {
        self.outstanding.iter_mut().for_each(|(_, sent)| *sent += by);
        let times = [&mut self.heard, &mut self.quiet, &mut self.answered];
        for time in times.into_iter().chain(&mut self.used).flatten() {
            *time += by;
        }
        if let Some((first, _)) = &mut self.good {
            *first += by;
        }
    }
}

impl Liveness {
    /// Nobody yet. `seed` spreads the requests of different nodes.
    pub fn new(seed: u64) -> Self {
        Self { peers: BTreeMap::new(), random: seed | 1, expected: None, alone: None }
    }

    /// The peers that there are; what is known of others is forgotten.
    pub fn handle_peers(&mut self, now: Duration, peers: &BTreeSet<PeerId>) {
        self.peers.retain(|id, _| peers.contains(id));
        let young = self.is_settled(now).then(|| now + YOUTH);
        for id in peers {
            self.peers.entry(*id).or_insert_with(|| Peer { young, ..Peer::new(now) });
        }
    }

    /// What a predecessor knew of a peer that is still unknown here. A live one is asked at once.
    pub fn handle_memory(&mut self, now: Duration, peer: PeerId, health: PeerHealth) {
        if let Some(peer) = self.peers.get_mut(&peer).filter(|p| p.health == PeerHealth::Unknown) {
            peer.turn(health, now);
            peer.young = None;
        }
    }

    /// A reading of what went to and came from a peer.
    pub fn handle_counters(&mut self, now: Duration, peer: PeerId, counters: Counters) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.handle_counters(now, counters);
        }
    }

    /// An answer. One to no request of ours, or to one answered before, is passed over.
    pub fn handle_echo_reply(&mut self, now: Duration, peer: PeerId, sequence: u16) {
        let answered = self.peers.get_mut(&peer).is_some_and(|peer| peer.handle_answer(now, sequence));
        if answered && self.alone.take().is_some_and(|since| now >= since + ALONE) {
            for peer in self.peers.values_mut() {
                peer.outstanding.clear();
                peer.quiet = None;
            }
        }
    }

    /// Judges all peers. The next request to be sent; to be called until there is none. Answers that have come must have
    /// been handled before.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Echo> {
        if let Some(expected) = self.expected.take()
            && now > expected + STALL
        {
            let late = now - expected;
            self.peers.values_mut().for_each(|peer| peer.shift(late));
        }
        let crowd = self.crowd();
        let last = self.last_two();
        let mut ready = None;
        let mut alone = false;
        for (id, peer) in &mut self.peers {
            let witness = last.iter().flatten().find(|(_, of)| of != id).map(|(at, _)| *at);
            peer.judge(now, witness);
            alone |= peer.health == PeerHealth::Alive
                && peer.overdue(now) > 1
                && witness.is_none_or(|at| peer.quiet.is_some_and(|quiet| at < quiet));
            if ready.is_none() && peer.due(now, crowd) <= now {
                ready = Some(*id);
            }
        }
        self.alone = if alone { self.alone.or(Some(now)) } else { None };
        if alone && ready.is_none() {
            let calm = |peer: &&mut Peer| peer.health == PeerHealth::Alive && peer.quiet.is_none();
            self.peers.values_mut().filter(calm).take(WITNESSES).for_each(|peer| peer.wake = true);
        }
        let Some(id) = ready else {
            self.expected = self.poll_timeout(now).map(|at| at.max(now));
            return None;
        };
        let jitter = 0.9 + 0.2 * self.draw();
        let peer = self.peers.get_mut(&id)?;
        peer.jitter = jitter;
        peer.asked = Some(now);
        peer.sequence = peer.sequence.wrapping_add(1);
        if peer.outstanding.len() == MAX_OUTSTANDING {
            peer.outstanding.pop_front();
        }
        peer.outstanding.push_back((peer.sequence, now));
        peer.quiet = peer.quiet.or(Some(now));
        Some(Echo { peer: id, sequence: peer.sequence })
    }

    /// When to poll again, unless something is handled before.
    pub fn poll_timeout(&self, now: Duration) -> Option<Duration> {
        let crowd = self.crowd();
        self.peers.values().map(|peer| peer.timeout(now, crowd)).min()
    }

    /// What is known of a peer.
    pub fn health(&self, peer: PeerId) -> PeerHealth {
        self.peers.get(&peer).map_or(PeerHealth::Unknown, |peer| peer.health)
    }

    /// What is known of all.
    pub fn all(&self) -> impl Iterator<Item = (PeerId, PeerHealth)> {
        self.peers.iter().map(|(id, peer)| (*id, peer.health))
    }

    /// The dead ones.
    pub fn dead(&self) -> BTreeSet<PeerId> {
        self.all().filter(|(_, health)| *health == PeerHealth::Dead).map(|(id, _)| id).collect()
    }

    /// Those that came lately, to others that have lived for a while.
    pub fn young(&self, now: Duration) -> BTreeSet<PeerId> {
        let is = |peer: &Peer| peer.young.is_some_and(|until| now < until);
        self.peers.iter().filter(|(_, peer)| is(peer)).map(|(id, _)| *id).collect()
    }

    /// All peers, once one of them has lived for a while: who is not among them came just now, and will be young.
    pub fn known(&self, now: Duration) -> Option<BTreeSet<PeerId>> {
        self.is_settled(now).then(|| self.peers.keys().copied().collect())
    }

    fn is_settled(&self, now: Duration) -> bool {
        self.peers.values().any(|p| p.health == PeerHealth::Alive && now >= p.since + SETTLED)
    }

    /// Those that answer.
    pub fn alive(&self) -> BTreeSet<PeerId> {
        self.all().filter(|(_, health)| *health == PeerHealth::Alive).map(|(id, _)| id).collect()
    }

    /// The two that answered last, and when.
    fn last_two(&self) -> [Option<(Duration, PeerId)>; 2] {
        let mut last = [None; 2];
        for (id, peer) in &self.peers {
            let this = peer.answered.map(|at| (at, *id));
            if this > last[0] {
                last = [this, last[0]];
            } else if this > last[1] {
                last[1] = this;
            }
        }
        last
    }

    fn crowd(&self) -> u32 {
        u32::try_from(self.peers.len()).unwrap_or(u32::MAX).div_ceil(CROWD).max(1)
    }

    /// 0 to 1 (xorshift64*).
    fn draw(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests;
