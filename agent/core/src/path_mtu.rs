//! How long packets may be that each tunnel carries, found by padded echoes alone (packetization layer path MTU
//! discovery, RFC 8899): a state machine without clock and sockets. No ICMP of the network between is needed.
//!
//! A tunnel is taken to carry what its device does until a probe of the present length stays away [`TRIES`] times while
//! short ones are answered. Then all lengths of the ladder are tried at once, a few times, and the longest that was
//! answered counts. Once it is less than the device carries, all greater lengths are tried again now and then.
//!
//! Worst case from a path that narrows to the new length: 5 s until the next probe, 6 tries of 0.2 to 1 s, 3 volleys of
//! the same: 7 s with a round trip below 50 ms. False alarms: with 5 % loss each way a probe fails with
//! p = 0.0975, six of them with 8.6e-7: once in two months for each peer, and the volley then finds the old length again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::liveness::PeerId;

/// No tunnel is taken to carry less, bytes: what carries less is no path for anybody's traffic.
pub const LEAST: u16 = 1200;
/// Between two probes of the present length, at most: by key somewhat less, so that peers are not asked all at once.
const CONFIRM: Duration = Duration::from_secs(5);
/// After the path was found to have narrowed, and then between attempts to have more again.
const RAISE: Duration = Duration::from_secs(60);
/// So many probes of the present length stay away before it is doubted.
const TRIES: u32 = 6;
/// So many volleys are sent of all lengths.
const VOLLEYS: u32 = 3;
/// An answer is awaited for four round trips, within these.
const PATIENCE_MIN: Duration = Duration::from_millis(200);
const PATIENCE_MAX: Duration = Duration::from_secs(1);
/// Before any round trip is known.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between lengths of the ladder up to [`FINE`], bytes: the common overheads (PPPoE, GRE, VXLAN, another tunnel) differ
/// by about as much.
const STEP: u16 = 20;
const FINE: u16 = 1420;
/// Above that, eighths.
const COARSE: u16 = 8;
/// Length of a probe that passes everywhere, bytes: while it is not answered, nothing is told from those that are not.
const SHORT: u16 = 128;
/// With more peers than this all are asked less often, in proportion.
const CROWD: u32 = 400;

/// A padded echo to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// To whom.
    pub peer: PeerId,
    /// To be told again with the answer.
    pub sequence: u16,
    /// Of the whole IP packet inside of the tunnel, bytes.
    pub length: u16,
}

/// The path MTU of all peers of this node.
#[derive(Debug, Default)]
pub struct PathMtu {
    peers: BTreeMap<PeerId, Peer>,
    /// Of the next probe: no two that are under way have the same.
    sequence: u16,
}

#[derive(Debug)]
struct Peer {
    /// What its device carries.
    longest: u16,
    /// In 1/1024 of [`CONFIRM`].
    pace: u32,
    /// What the path carries, as far as is known.
    length: u16,
    /// It answers short echoes: others are not asked.
    alive: bool,
    /// When the present length is to be confirmed.
    confirm: Duration,
    /// When more is tried, if there is more.
    raise: Duration,
    round_trip: Option<Duration>,
    round: Option<Round>,
}

/// Probes that are sent together, some times.
#[derive(Debug)]
struct Round {
    kind: Kind,
    /// Lengths that are not answered yet.
    lengths: BTreeSet<u16>,
    /// The longest that was answered, besides the short one.
    best: Option<u16>,
    /// The short one was answered.
    short: bool,
    /// To be sent now.
    queue: Vec<u16>,
    sent: BTreeMap<u16, (u16, Duration)>,
    tries: u32,
    /// When the next try begins.
    next: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Whether the present length still passes.
    Confirm,
    /// What passes at all.
    Search,
    /// Whether more passes than now.
    Raise,
}

/// Lengths that are tried, the longest being `longest`.
fn ladder(longest: u16) -> BTreeSet<u16> {
    let fine = (LEAST..=FINE).step_by(usize::from(STEP)).take_while(|length| *length < longest);
    let coarse = (1..COARSE).map(|part| longest / COARSE * part).filter(|length| *length > FINE);
    fine.chain(coarse).chain([longest]).collect()
}

impl Round {
    fn new(kind: Kind, mut lengths: BTreeSet<u16>) -> Self {
        lengths.insert(SHORT);
        Self {
            kind,
            lengths,
            best: None,
            short: false,
            queue: Vec::new(),
            sent: BTreeMap::new(),
            tries: 0,
            next: Duration::ZERO,
        }
    }

    /// How often it is sent at most.
    fn most(&self) -> u32 {
        if self.kind == Kind::Confirm { TRIES } else { VOLLEYS }
    }

    /// There is nothing more to hear.
    fn is_over(&self, now: Duration) -> bool {
        let all = self.lengths.iter().all(|length| *length == SHORT);
        self.queue.is_empty() && (all || (self.tries >= self.most() && now >= self.next))
    }
}

impl Peer {
    fn patience(&self) -> Duration {
        self.round_trip.map_or(PATIENCE, |rtt| (rtt * 4).clamp(PATIENCE_MIN, PATIENCE_MAX))
    }

    /// What a round has shown.
    fn conclude(&mut self, now: Duration, crowd: u32) {
        let Some(round) = self.round.take() else { return };
        self.confirm = now + CONFIRM * crowd * self.pace / 1024;
        match (round.kind, round.best) {
            (Kind::Raise, best) => {
                self.length = best.map_or(self.length, |best| best.max(self.length));
                self.raise = now + RAISE * crowd;
            }
            (Kind::Confirm, Some(_)) => {}
            // Nothing passes, or nobody lives: liveness judges that.
            (Kind::Confirm | Kind::Search, _) if !round.short => {}
            (Kind::Confirm, None) => self.round = Some(Round::new(Kind::Search, ladder(self.longest))),
            (Kind::Search, best) => {
                self.length = best.unwrap_or(LEAST).min(self.longest);
                self.raise = now + RAISE * crowd;
            }
        }
    }

    /// Begins what is due.
    fn begin(&mut self, now: Duration) {
        if self.round.is_some() || !self.alive {
            return;
        }
        if self.length < self.longest && self.raise <= now {
            let more = ladder(self.longest).into_iter().filter(|length| *length > self.length).collect();
            self.round = Some(Round::new(Kind::Raise, more));
        } else if self.confirm <= now {
            self.round = Some(Round::new(Kind::Confirm, BTreeSet::from([self.length])));
        }
    }

    fn poll(&mut self, now: Duration, crowd: u32) -> Option<u16> {
        if self.round.as_ref().is_some_and(|round| round.is_over(now)) {
            self.conclude(now, crowd);
        }
        self.begin(now);
        let patience = self.patience();
        let round = self.round.as_mut()?;
        if round.queue.is_empty() && round.next <= now && round.tries < round.most() {
            // While all is well nobody needs the short one.
            let plain = round.kind == Kind::Confirm && round.tries == 0;
            round.queue = round.lengths.iter().copied().filter(|length| !plain || *length != SHORT).collect();
            round.tries += 1;
            round.next = now + patience;
        }
        round.queue.pop()
    }

    fn timeout(&self) -> Option<Duration> {
        match &self.round {
            Some(round) => Some(round.next),
            None if !self.alive => None,
            None if self.length < self.longest => Some(self.confirm.min(self.raise)),
            None => Some(self.confirm),
        }
    }

    fn handle_answer(&mut self, now: Duration, sequence: u16) {
        let Some(round) = &mut self.round else { return };
        let Some((length, sent)) = round.sent.remove(&sequence) else { return };
        let took = now.saturating_sub(sent);
        self.round_trip = Some(self.round_trip.map_or(took, |rtt| (rtt * 7 + took) / 8));
        if length == SHORT {
            round.short = true;
            return;
        }
        round.best = round.best.max(Some(length));
        // What is shorter passes too.
        round.lengths.retain(|other| *other > length || *other == SHORT);
        round.queue.retain(|other| *other > length || *other == SHORT);
    }
}

impl PathMtu {
    /// The peers that there are, with what their devices carry, and whether they answer; what is known of others is
    /// forgotten. `memory`: what a predecessor knew.
    pub fn handle_peers(
        &mut self,
        now: Duration,
        peers: &BTreeMap<PeerId, u16>,
        memory: &BTreeMap<PeerId, u16>,
    ) {
        self.peers.retain(|id, peer| peers.get(id) == Some(&peer.longest));
        for (id, &longest) in peers {
            self.peers.entry(*id).or_insert_with(|| Peer {
                longest,
                pace: 768 + u32::from(id.1.0[0]),
                length: memory.get(id).map_or(longest, |length| (*length).clamp(LEAST.min(longest), longest)),
                alive: false,
                confirm: now,
                raise: now + RAISE,
                round_trip: None,
                round: None,
            });
        }
    }

    /// Who answers short echoes.
    pub fn handle_alive(&mut self, now: Duration, alive: &BTreeSet<PeerId>) {
        for (id, peer) in &mut self.peers {
            let was = std::mem::replace(&mut peer.alive, alive.contains(id));
            if peer.alive && !was {
                // It may have come back by another path.
                peer.confirm = now;
            }
            if !peer.alive {
                peer.round = None;
            }
        }
    }

    /// An answer. One to no probe of ours is passed over.
    pub fn handle_answer(&mut self, now: Duration, peer: PeerId, sequence: u16) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.handle_answer(now, sequence);
        }
    }

    /// The next probe to be sent; to be called until there is none.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Probe> {
        let crowd = u32::try_from(self.peers.len()).unwrap_or(u32::MAX).div_ceil(CROWD).max(1);
        let sequence = self.sequence;
        let (peer, length) = self.peers.iter_mut().find_map(|(id, peer)| {
            let length = peer.poll(now, crowd)?;
            peer.round.as_mut()?.sent.insert(sequence, (length, now));
            Some((*id, length))
        })?;
        self.sequence = sequence.wrapping_add(1);
        Some(Probe { peer, sequence, length })
    }

    /// When to poll again, unless something is handled before.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.peers.values().filter_map(Peer::timeout).min()
    }

    /// What a peer's path carries, bytes.
    pub fn length(&self, peer: PeerId) -> Option<u16> {
        self.peers.get(&peer).map(|peer| peer.length)
    }

    /// Peers whose path carries less than their device, and how much.
    pub fn narrow(&self) -> BTreeMap<PeerId, u16> {
        let narrow = self.peers.iter().filter(|(_, peer)| peer.length < peer.longest);
        narrow.map(|(id, peer)| (*id, peer.length)).collect()
    }
}

#[cfg(test)]
mod tests;
