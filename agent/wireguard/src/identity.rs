//! Who a device is to its peers, and each peer's sessions while keys change.
//!
//! A key that goes is not gone at once. After a rotation the device answers to its previous key too ([`Identities`]),
//! so that peers may learn the new one at their own time; and a peer that has a new key keeps its old session until
//! the new one carries ([`Lines::replace`]). Between two nodes there are so up to four *lines*, one for each pair of an
//! own key and a peer's. What is sent takes the line whose handshake is the newest; what arrives may come by any. Nothing
//! of it is negotiated, and a peer that was removed has no lines.

use std::time::{Duration, Instant};

use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::{Addressee, Identity, Session};

/// How long a previous key is answered to at least: a session under it lives no longer (REJECT_AFTER_TIME of the
/// WireGuard paper).
pub const HOLD: Duration = Duration::from_secs(180);

/// How long at most, while some peer's only session is under it: that peer has not heard of the new key.
pub const HOLD_MOST: Duration = Duration::from_secs(24 * 3600);

/// How long what comes by an old session is still taken, once a newer one carries: until the other end has surely heard
/// by the newer one, be it only by a keepalive.
pub const GRACE: Duration = Duration::from_secs(30);

/// The device's key, and the one before while it is answered to.
#[derive(Default)]
pub struct Identities {
    current: Option<Identity>,
    previous: Option<Previous>,
}

struct Previous {
    identity: Identity,
    age: Duration,
    /// When `age` was right.
    at: Instant,
}

impl Identities {
    /// The one by which the device calls.
    pub fn current(&self) -> Option<&Identity> {
        self.current.as_ref()
    }

    /// The one before, and for how long it has been that.
    pub fn previous(&self) -> Option<(&Identity, Duration)> {
        self.previous.as_ref().map(|p| (&p.identity, p.age))
    }

    /// Both, the current one first.
    pub fn all(&self) -> impl Iterator<Item = &Identity> {
        self.current.iter().chain(self.previous.as_ref().map(|p| &p.identity))
    }

    /// The one with this public key.
    pub fn of(&self, own: &PublicKey) -> Option<&Identity> {
        self.all().find(|identity| identity.public() == *own)
    }

    /// Sets the key (`None`: as it is; `Some(None)`: none from now on), and the previous key with its age. Another key
    /// without word of a previous one ends the previous one, as plain WireGuard has it. True if anything changed.
    pub fn set(
        &mut self,
        key: Option<Option<PrivateKey>>,
        previous: Option<Option<PrivateKey>>,
        age: Duration,
        now: Instant,
    ) -> bool {
        let is =
            |identity: Option<&Identity>, key: Option<&PrivateKey>| identity.map(Identity::private) == key;
        let other = key.as_ref().is_some_and(|key| !is(self.current(), key.as_ref()));
        let mut changed = other;
        let previous = if other { Some(previous.flatten()) } else { previous };
        if let Some(key) = key
            && other
        {
            self.current = key.map(Identity::new);
        }
        if let Some(key) = previous {
            // One that is the current one says nothing.
            let key = key.filter(|key| self.current().is_some() && !is(self.current(), Some(key)));
            if !is(self.previous.as_ref().map(|p| &p.identity), key.as_ref()) {
                changed = true;
                self.previous = key.map(|key| Previous { identity: Identity::new(key), age, at: now });
            }
        }
        changed
    }

    /// Reads whom a datagram that is no data is for, and to which own key.
    pub fn read(&self, datagram: &[u8]) -> Option<(&Identity, Addressee)> {
        // The key stands in a handshake message's first check: it fits one of them, or none.
        self.all().find_map(|own| Some((own, own.read(datagram)?)))
    }

    /// To be called about once a second.
    pub fn handle_second(&mut self, now: Instant) {
        if let Some(previous) = &mut self.previous {
            previous.age += now.saturating_duration_since(previous.at);
            previous.at = now;
        }
    }

    /// The previous key, if its time is over unless a peer still `uses` it.
    pub fn ended(&self, uses: impl FnOnce(&PublicKey) -> bool) -> Option<PublicKey> {
        let (identity, age) = self.previous()?;
        let own = identity.public();
        (age >= HOLD && (age >= HOLD_MOST || !uses(&own))).then_some(own)
    }

    /// Ends the previous key.
    pub fn end_previous(&mut self) {
        self.previous = None;
    }
}

/// A session under one own key and one of the peer's.
pub struct Line {
    own: PublicKey,
    peer: PublicKey,
    /// Tells it from others of the same peer in the index of messages.
    pub generation: u8,
    /// Its handshakes and keys.
    pub session: Session,
    /// The last handshake that was completed.
    established: Option<Instant>,
    /// When it goes.
    ends: Option<Instant>,
}

impl Line {
    fn carries(&self) -> bool {
        self.established.is_some() && self.session.is_established()
    }
}

/// A peer's lines.
#[derive(Default)]
pub struct Lines {
    /// The first is the one under the current keys of both ends, if the device has a key.
    list: Vec<Line>,
    sending: usize,
}

impl Lines {
    /// Makes the list fit: lines of own keys that are gone go, and there is one under the current keys. `index` gives
    /// a session's index and generation.
    pub fn arrange(
        &mut self,
        own: &Identities,
        peer: &PublicKey,
        preshared: Option<&PresharedKey>,
        index: impl FnMut(&Self) -> (u32, u8),
    ) {
        self.list.retain(|line| own.of(&line.own).is_some());
        match own.current() {
            Some(current) => {
                let at = self.line(current, peer, preshared, index);
                let line = self.list.remove(at);
                self.list.insert(0, line);
            }
            None => self.list.clear(),
        }
        self.choose();
    }

    /// The place of the line of this pair of keys, which is made if it is not there.
    pub fn line(
        &mut self,
        own: &Identity,
        peer: &PublicKey,
        preshared: Option<&PresharedKey>,
        mut index: impl FnMut(&Self) -> (u32, u8),
    ) -> usize {
        if let Some(at) = self.list.iter().position(|l| l.own == own.public() && l.peer == *peer) {
            return at;
        }
        let (index, generation) = index(self);
        let session = Session::new(own, peer, preshared, index);
        let (own, peer) = (own.public(), *peer);
        self.list.push(Line { own, peer, generation, session, established: None, ends: None });
        self.list.len() - 1
    }

    /// Ends them all.
    pub fn clear(&mut self) {
        self.list.clear();
        self.sending = 0;
    }

    /// The peer has another key from now on ([`Self::arrange`] follows): lines under the one before carry on until a
    /// new one does, and no longer than a session lives. Lines under still older keys go.
    pub fn replace(&mut self, before: &PublicKey, now: Instant) {
        self.list.retain(|line| line.peer == *before);
        for line in &mut self.list {
            line.ends = Some(line.ends.map_or(now + HOLD, |ends| ends.min(now + HOLD)));
        }
    }

    /// The line at a place.
    pub fn get(&mut self, at: usize) -> Option<&mut Line> {
        self.list.get_mut(at)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The place of the line that messages with this generation are for.
    pub fn of(&self, generation: u8) -> Option<usize> {
        self.list.iter().position(|line| line.generation == generation)
    }

    /// The one to send by, and its place.
    pub fn sending(&mut self) -> Option<(usize, &mut Line)> {
        let at = self.sending;
        self.list.get_mut(at).map(|line| (at, line))
    }

    /// The own key of the one to send by, if it carries.
    pub fn sends_by(&self) -> Option<PublicKey> {
        self.list.get(self.sending).filter(|line| line.carries()).map(|line| line.own)
    }

    /// Whether the one to send by carries.
    pub fn carries(&self) -> bool {
        self.sends_by().is_some()
    }

    /// The own key of the line at a place.
    pub fn own(&self, at: usize) -> Option<PublicKey> {
        self.list.get(at).map(|line| line.own)
    }

    /// A handshake of the line at this place was completed: it carries, and the others have their last moments.
    pub fn handle_handshake(&mut self, at: usize, now: Instant) {
        for (place, line) in self.list.iter_mut().enumerate() {
            if place == at {
                line.established = Some(now);
            } else if place != 0 {
                line.ends = Some(line.ends.map_or(now + GRACE, |ends| ends.min(now + GRACE)));
            }
        }
        self.choose();
    }

    /// Time has passed. Says which lines need their timers looked at: one that only waits for its end must not call.
    pub fn handle_tick(&mut self, now: Instant) -> impl Iterator<Item = usize> + use<> {
        let mut place = 0;
        self.list.retain(|line| {
            place += 1;
            place == 1 || line.ends.is_none_or(|ends| ends > now)
        });
        self.choose();
        let (all, sending) = (!self.carries(), self.sending);
        (0..self.list.len()).filter(move |at| all || *at == 0 || *at == sending)
    }

    fn choose(&mut self) {
        let mut best = 0;
        for (at, line) in self.list.iter().enumerate() {
            let rank = |line: &Line| (line.carries(), line.established);
            if rank(line) > rank(&self.list[best]) {
                best = at;
            }
        }
        self.sending = best;
    }
}
