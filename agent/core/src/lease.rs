//! Who leads: one Lease object of the cluster's API (coordination.k8s.io, in a directory too), taken and held by
//! compare-and-swap.
//!
//! As in client-go nobody's clock is compared with another's: a holder counts as gone when its record has not changed
//! for its duration *as measured here*. A second leader that has not noticed yet does no harm: every write is fenced by
//! the object's version, every statement by the epoch, which is reserved by the very write that takes the Lease.
//!
//! The driver's loop:
//!
//! ```text
//! loop {
//!     while let Some(action) = lease.poll(now, unix) { start it; when it is done call one of
//!         handle_read, handle_written, handle_failed }
//!     wait for poll_timeout, or for a change of the object (then read it and call handle_read)
//! }
//! ```
//!
//! `now` is time since the process started, from a clock that never goes back.

use std::time::Duration;

use crate::plan::stable_hash;

/// How fast leadership passes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Others wait so long after the holder's last write. Whole seconds in Kubernetes.
    pub duration: Duration,
    /// The holder gives up so long after it began its last successful write; less than `duration`.
    pub renew_deadline: Duration,
    /// Between attempts.
    pub retry: Duration,
}

impl Timing {
    /// client-go's defaults.
    pub const KUBERNETES: Self = Self {
        duration: Duration::from_secs(15),
        renew_deadline: Duration::from_secs(10),
        retry: Duration::from_secs(2),
    };
    /// For a directory on one machine, where a write takes no time.
    pub const DIRECTORY: Self = Self {
        duration: Duration::from_secs(3),
        renew_deadline: Duration::from_secs(2),
        retry: Duration::from_millis(500),
    };
}

/// The object as read, or as it came back from a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// `spec.holderIdentity`; empty or absent: nobody's.
    pub holder: Option<String>,
    /// `spec.leaseDurationSeconds`
    pub duration: Duration,
    /// `spec.renewTime`, as written: only compared.
    pub renewed: String,
    /// Annotation `tombolo.dev/epoch`: the highest epoch that was ever reserved; 0 if absent.
    pub epoch: u64,
    /// `metadata.resourceVersion`
    pub version: String,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Read the object; then [`Lease::handle_read`].
    Read,
    /// Take the Lease and reserve an epoch in one write: holder, renewTime, leaseDurationSeconds, and the annotation;
    /// leaseTransitions one more and acquireTime anew if the holder changes.
    Acquire {
        /// To be written into the annotation.
        epoch: u64,
        /// Version that must be there; None: create the object.
        expect: Option<String>,
    },
    /// Write renewTime and nothing else.
    Renew {
        /// Version that must be there.
        expect: String,
    },
    /// Leadership is over: stop signing and writing at once.
    Lost,
    /// Write an empty holder, so that nobody has to wait.
    Release {
        /// Version that must be there.
        expect: String,
    },
}

/// The state machine of one contender.
#[derive(Debug)]
pub struct Lease {
    me: String,
    timing: Timing,
    /// The object (None: there is none) and when it last changed; None: not read yet.
    observed: Option<(Option<Seen>, Duration)>,
    held: Option<Held>,
    /// Highest epoch seen anywhere.
    floor: u64,
    /// Highest epoch that this contender has tried to reserve; 0: none yet.
    tried: u64,
    /// Highest epoch of a signed position beyond our own.
    shown: Option<u64>,
    pending: Option<Pending>,
    stale: bool,
    lost: bool,
    next: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    epoch: u64,
    /// When the last successful write was begun.
    renewed: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    since: Duration,
    /// Epoch that the write bears; None: it is a reading.
    epoch: Option<u64>,
}

impl Lease {
    /// A contender. `me` names a place where one process runs at a time: under the same name a new process takes over
    /// from its predecessor without waiting, with a new epoch.
    pub fn new(me: impl Into<String>, timing: Timing) -> Self {
        Self {
            me: me.into(),
            timing,
            observed: None,
            held: None,
            floor: 0,
            tried: 0,
            shown: None,
            pending: None,
            stale: true,
            lost: false,
            next: Duration::ZERO,
        }
    }

    /// The own name.
    pub fn me(&self) -> &str {
        &self.me
    }

    /// Who holds the Lease as far as is known.
    pub fn holder(&self) -> Option<&str> {
        self.observed.as_ref()?.0.as_ref()?.holder.as_deref()
    }

    /// The epoch to sign under, if this contender leads and may sign. Ask before every signature and every write.
    pub fn epoch(&self, now: Duration) -> Option<u64> {
        let held = self.held.filter(|held| now < held.renewed + self.timing.renew_deadline)?;
        self.shown.is_none_or(|shown| shown < held.epoch).then_some(held.epoch)
    }

    /// Takes what was read, asked for or not. None: there is no such object.
    pub fn handle_read(&mut self, seen: Option<Seen>, now: Duration) {
        if self.pending.is_some_and(|p| p.epoch.is_none()) {
            self.pending = None;
        }
        self.stale = false;
        self.next = now;
        self.observe(seen, now);
        let other = self.observed.as_ref().and_then(|(seen, _)| seen.as_ref()).is_some_and(|seen| {
            // A higher epoch under the own name: a successor runs already.
            let writing = self.pending.and_then(|p| p.epoch);
            seen.holder.as_deref() != Some(&self.me)
                || self.held.is_some_and(|held| seen.epoch > held.epoch && writing != Some(seen.epoch))
        });
        if other && self.held.take().is_some() {
            self.lost = true;
        }
    }

    /// The write succeeded; `seen` is the object it made.
    pub fn handle_written(&mut self, seen: Seen, now: Duration) {
        let Some(Pending { since, epoch: Some(epoch) }) = self.pending.take() else {
            self.stale = true;
            return;
        };
        self.observe(Some(seen), now);
        self.held = Some(Held { epoch, renewed: since });
        self.stale = false;
        self.next = now + self.timing.retry;
    }

    /// The reading or write failed or clashed with another's.
    pub fn handle_failed(&mut self, now: Duration) {
        self.pending = None;
        self.stale = true;
        self.next = now + self.pause();
    }

    /// A signed position of the own cluster beyond what this contender has signed bears this epoch: another epoch
    /// must be reserved before anything more is signed.
    pub fn handle_epoch(&mut self, epoch: u64, now: Duration) {
        self.floor = self.floor.max(epoch);
        self.shown = self.shown.max(Some(epoch));
        self.next = self.next.min(now);
    }

    /// What to do now. `unix`: seconds, a floor of epochs and nothing more.
    pub fn poll(&mut self, now: Duration, unix: u64) -> Option<Action> {
        if self.held.is_some_and(|held| now >= held.renewed + self.timing.renew_deadline) {
            self.held = None;
            self.lost = true;
        }
        if std::mem::take(&mut self.lost) {
            return Some(Action::Lost);
        }
        // An answer that never comes must not end the contest.
        if self.pending.is_some_and(|p| now >= p.since + self.timing.renew_deadline) {
            self.handle_failed(now);
        }
        if self.pending.is_some() || now < self.next {
            return None;
        }
        let (seen, changed) = match &self.observed {
            Some((seen, changed)) if !self.stale => (seen.as_ref(), *changed),
            Some(_) | None => {
                self.pending = Some(Pending { since: now, epoch: None });
                return Some(Action::Read);
            }
        };
        if let (Some(held), Some(seen)) = (self.held, seen)
            && self.shown.is_none_or(|shown| shown < held.epoch)
        {
            let expect = seen.version.clone();
            self.pending = Some(Pending { since: now, epoch: Some(held.epoch) });
            return Some(Action::Renew { expect });
        }
        let free = seen.is_none_or(|seen| match seen.holder.as_deref() {
            None | Some("") => true,
            // A predecessor's, or our own after a pause; not a successor's.
            Some(holder) if holder == self.me && (self.tried == 0 || seen.epoch <= self.tried) => true,
            Some(_) => now >= changed + seen.duration,
        });
        if free {
            let expect = seen.map(|seen| seen.version.clone());
            let written = seen.map_or(0, |seen| seen.epoch);
            let epoch = self.next_epoch(written, unix);
            self.floor = epoch;
            self.tried = epoch;
            self.pending = Some(Pending { since: now, epoch: Some(epoch) });
            return Some(Action::Acquire { epoch, expect });
        }
        let expiry = seen.map_or(now, |seen| changed + seen.duration);
        self.stale = true;
        self.next = (now + self.pause()).min(expiry.max(now + Duration::from_millis(1)));
        None
    }

    /// When to poll again.
    pub fn poll_timeout(&self) -> Duration {
        let patience = self.pending.map(|p| p.since + self.timing.renew_deadline);
        let deadline = self.held.map(|held| held.renewed + self.timing.renew_deadline);
        patience.unwrap_or(self.next).min(deadline.unwrap_or(Duration::MAX))
    }

    /// Gives the Lease up. After this the contender is to be dropped.
    pub fn release(&mut self) -> Option<Action> {
        self.held.take()?;
        let expect = self.observed.as_ref()?.0.as_ref()?.version.clone();
        Some(Action::Release { expect })
    }

    /// Above all that were seen. At the end of the range it starts again from the clock: under the old serial the
    /// controller then says nothing (its position would go back), under a new one every epoch is good.
    fn next_epoch(&mut self, written: u64, unix: u64) -> u64 {
        if let Some(epoch) = self.floor.max(unix).checked_add(1) {
            return epoch;
        }
        self.shown = None;
        let floor = [written, self.tried, unix].into_iter().filter(|epoch| *epoch < u64::MAX).max();
        floor.unwrap_or(0) + 1
    }

    fn observe(&mut self, seen: Option<Seen>, now: Duration) {
        if let Some(seen) = &seen {
            self.floor = self.floor.max(seen.epoch);
        }
        // The version alone does not tell that the holder lives: anybody may annotate the object.
        let content =
            |s: &Option<Seen>| s.as_ref().map(|s| (s.holder.clone(), s.duration, s.renewed.clone(), s.epoch));
        match &mut self.observed {
            Some((before, _)) if content(before) == content(&seen) => *before = seen,
            place => *place = Some((seen, now)),
        }
    }

    /// Contenders retry at moments of their own.
    fn pause(&self) -> Duration {
        let spread = stable_hash(&[self.me.as_bytes()]) % 256;
        self.timing.retry + self.timing.retry.mul_f64(spread as f64 / 1280.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNIX: u64 = 1_800_000_000;

    /// A Lease object with compare-and-swap.
    #[derive(Default)]
    struct Store {
        object: Option<Seen>,
        writes: u64,
    }

    impl Store {
        fn write(&mut self, expect: Option<&str>, change: impl FnOnce(&mut Seen)) -> Option<Seen> {
            if self.object.as_ref().map(|o| o.version.as_str()) != expect {
                return None;
            }
            self.writes += 1;
            let mut object = self.object.clone().unwrap_or(Seen {
                holder: None,
                duration: Timing::DIRECTORY.duration,
                renewed: String::new(),
                epoch: 0,
                version: String::new(),
            });
            change(&mut object);
            object.renewed = format!("{}", self.writes);
            object.version = format!("v{}", self.writes);
            self.object = Some(object.clone());
            Some(object)
        }

        fn act(&mut self, lease: &mut Lease, action: Action, now: Duration) {
            let me = lease.me().to_owned();
            let done = match action {
                Action::Read => return lease.handle_read(self.object.clone(), now),
                Action::Lost => return,
                Action::Acquire { epoch, expect } => self.write(expect.as_deref(), |o| {
                    o.holder = Some(me);
                    o.epoch = epoch;
                }),
                Action::Renew { expect } => self.write(Some(&expect), |_| {}),
                Action::Release { expect } => self.write(Some(&expect), |o| o.holder = None),
            };
            match done {
                Some(seen) => lease.handle_written(seen, now),
                None => lease.handle_failed(now),
            }
        }

        fn run(&mut self, lease: &mut Lease, now: Duration) -> Vec<Action> {
            let mut done = Vec::new();
            while let Some(action) = lease.poll(now, UNIX) {
                done.push(action.clone());
                self.act(lease, action, now);
                assert!(done.len() < 10, "it never rests: {done:?}");
            }
            done
        }
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn takes_renews_and_releases() {
        let mut store = Store::default();
        let (mut a, mut b) = (Lease::new("a", Timing::DIRECTORY), Lease::new("b", Timing::DIRECTORY));
        let first = store.run(&mut a, ms(0));
        assert_eq!(first, [Action::Read, Action::Acquire { epoch: UNIX + 1, expect: None }]);
        assert_eq!(a.epoch(ms(0)), Some(UNIX + 1));
        assert_eq!(store.run(&mut b, ms(10)), [Action::Read]);
        assert_eq!(store.run(&mut a, ms(500)), [Action::Renew { expect: "v1".into() }]);
        assert_eq!(a.poll_timeout(), ms(1000));
        let release = a.release().unwrap();
        store.act(&mut a, release, ms(900));
        let after = store.run(&mut b, ms(1200));
        assert_eq!(after[1], Action::Acquire { epoch: UNIX + 2, expect: Some("v3".into()) });
    }

    #[test]
    fn a_holder_that_is_cut_off_stops_before_others_start() {
        let mut store = Store::default();
        let (mut a, mut b) = (Lease::new("a", Timing::DIRECTORY), Lease::new("b", Timing::DIRECTORY));
        store.run(&mut a, ms(0));
        store.run(&mut b, ms(1));
        let mut started = None;
        let mut stopped = None;
        for t in (10..10_000).step_by(10) {
            // All of a's calls fail.
            if let Some(action) = a.poll(ms(t), UNIX) {
                if action == Action::Lost {
                    stopped = stopped.or(Some(t));
                }
                a.handle_failed(ms(t));
            }
            store.run(&mut b, ms(t));
            assert!(a.epoch(ms(t)).is_none() || b.epoch(ms(t)).is_none(), "two lead at {t}");
            if b.epoch(ms(t)).is_some() {
                started = started.or(Some(t));
            }
        }
        assert_eq!(stopped, Some(2000));
        assert!((3000..=3010).contains(&started.unwrap()), "{started:?}");
    }

    #[test]
    fn a_write_counts_from_when_it_was_begun() {
        let mut store = Store::default();
        let mut a = Lease::new("a", Timing::DIRECTORY);
        store.run(&mut a, ms(0));
        let renew = a.poll(ms(500), UNIX).unwrap();
        // It is done at once, but the answer takes 1.4 s: others count from the former, so the leader must too.
        store.act(&mut a, renew, ms(1900));
        assert!(a.epoch(ms(2499)).is_some());
        assert!(a.epoch(ms(2500)).is_none());
    }

    #[test]
    fn a_new_process_of_the_holder_does_not_wait_and_takes_a_new_epoch() {
        let mut store = Store::default();
        let mut old = Lease::new("a", Timing::KUBERNETES);
        store.run(&mut old, ms(0));
        let mut new = Lease::new("a", Timing::KUBERNETES);
        store.run(&mut new, ms(5));
        assert_eq!(new.epoch(ms(5)), Some(UNIX + 2));
        // The old one, if it still runs, clashes, reads, and stops.
        let mut saw = Vec::new();
        for t in (0..6000).step_by(100) {
            saw.extend(store.run(&mut old, ms(t)));
        }
        assert!(saw.contains(&Action::Lost) && old.epoch(ms(6000)).is_none(), "{saw:?}");
    }

    #[test]
    fn a_shown_position_makes_it_reserve_again() {
        let mut store = Store::default();
        let mut a = Lease::new("a", Timing::DIRECTORY);
        store.run(&mut a, ms(0));
        a.handle_epoch(UNIX + 50, ms(100));
        assert_eq!(a.epoch(ms(100)), None);
        let done = store.run(&mut a, ms(100));
        assert_eq!(done, [Action::Acquire { epoch: UNIX + 51, expect: Some("v1".into()) }]);
        assert_eq!(a.epoch(ms(100)), Some(UNIX + 51));
        // Shown an older one: nothing changes.
        a.handle_epoch(UNIX + 20, ms(200));
        assert_eq!(a.epoch(ms(200)), Some(UNIX + 51));
    }

    #[test]
    fn at_the_end_of_the_range_it_starts_again() {
        let mut store = Store::default();
        let mut a = Lease::new("a", Timing::DIRECTORY);
        store.run(&mut a, ms(0));
        a.handle_epoch(u64::MAX - 1, ms(100));
        store.run(&mut a, ms(100));
        assert_eq!(a.epoch(ms(100)), Some(u64::MAX));
        a.handle_epoch(u64::MAX, ms(200));
        let done = store.run(&mut a, ms(200));
        assert_eq!(done, [Action::Acquire { epoch: UNIX + 1, expect: Some("v2".into()) }]);
        assert_eq!(a.epoch(ms(200)), Some(UNIX + 1));
        // It is held like any other, and the next one is above it.
        assert_eq!(store.run(&mut a, ms(700)), [Action::Renew { expect: "v3".into() }]);
        let mut b = Lease::new("a", Timing::DIRECTORY);
        store.run(&mut b, ms(800));
        assert_eq!(b.epoch(ms(800)), Some(UNIX + 2));
    }

    #[test]
    fn a_deleted_object_is_made_again_with_a_new_epoch() {
        let mut store = Store::default();
        let mut a = Lease::new("a", Timing::DIRECTORY);
        store.run(&mut a, ms(0));
        store.object = None;
        let mut saw = Vec::new();
        for t in (0..4000).step_by(100) {
            saw.extend(store.run(&mut a, ms(t)));
        }
        assert!(saw.contains(&Action::Acquire { epoch: UNIX + 2, expect: None }), "{saw:?}");
        assert!(!saw.contains(&Action::Lost), "{saw:?}");
    }

    proptest! {
        /// Contenders stop and go, calls fail or are late: never two leaders, epochs only grow, and somebody leads again
        /// once things are quiet.
        #[test]
        fn one_leads(steps in prop::collection::vec((0_usize..3, 0_u8..10, 1_u64..400), 1..400)) {
            let mut store = Store::default();
            let mut all: Vec<Lease> =
                ["a", "b", "c"].into_iter().map(|n| Lease::new(n, Timing::DIRECTORY)).collect();
            let mut now = ms(0);
            let mut highest = 0;
            let mut led: std::collections::BTreeMap<u64, usize> = Default::default();
            let mut late: Vec<(usize, Action)> = Vec::new();
            for (who, luck, wait) in steps {
                now += ms(wait);
                let action = all[who].poll(now, UNIX);
                match (action, luck) {
                    (None, _) => {}
                    (Some(Action::Lost), _) => {}
                    (Some(_), 0) => all[who].handle_failed(now),
                    (Some(action), 1) => late.push((who, action)),
                    (Some(action), _) => store.act(&mut all[who], action, now),
                }
                if luck == 9 && let Some((who, action)) = late.pop() {
                    store.act(&mut all[who], action, now);
                }
                let leaders: Vec<(usize, u64)> =
                    all.iter().enumerate().filter_map(|(i, l)| Some((i, l.epoch(now)?))).collect();
                prop_assert!(leaders.len() <= 1, "{leaders:?}");
                for (i, epoch) in leaders {
                    prop_assert_eq!(*led.entry(epoch).or_insert(i), i);
                    prop_assert!(epoch >= highest, "{} after {}", epoch, highest);
                    highest = epoch;
                }
            }
            for _ in 0..100 {
                now += ms(100);
                for lease in &mut all {
                    store.run(lease, now);
                }
            }
            prop_assert_eq!(all.iter().filter(|l| l.epoch(now).is_some()).count(), 1);
        }
    }
}
