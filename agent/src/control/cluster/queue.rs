//! Which services are to be planned, in fair turns: what the own cluster caused comes first, then every other cluster
//! by turns, each within its own share of the time. Who causes more waits for it alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use tombolo_agent_core::object::ServiceKey;
use tombolo_proto::model::ClusterId;

/// So much work of one other cluster is done without a pause.
const BURST: Duration = Duration::from_millis(250);
/// One part in so many of the time is one cluster's; what nodes then do with it costs them more than us.
const SHARE: u32 = 20;

/// Who caused work; None: the own cluster.
pub(super) type Cause = Option<ClusterId>;

/// Services that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    own: BTreeSet<ServiceKey>,
    others: BTreeMap<ClusterId, Turn>,
    /// Whose turn was last.
    last: Option<ClusterId>,
}

#[derive(Debug)]
struct Turn {
    keys: BTreeSet<ServiceKey>,
    credit: Credit,
}

/// Time that somebody may use: a bucket of time.
#[derive(Debug, Clone, Copy)]
pub(in crate::control) struct Credit {
    /// All that was used is paid at this time.
    paid: Duration,
}

impl Credit {
    pub(in crate::control) fn new() -> Self {
        Self { paid: Duration::ZERO }
    }

    /// When there is some.
    pub(in crate::control) fn due(&self) -> Duration {
        self.paid.saturating_sub(BURST * SHARE)
    }

    /// Takes what was used until `now`.
    pub(in crate::control) fn charge(&mut self, now: Duration, used: Duration) {
        self.paid = self.paid.max(now) + used * SHARE;
    }
}

impl Queue {
    /// Adds services.
    pub(super) fn add(&mut self, cause: Cause, keys: impl IntoIterator<Item = ServiceKey>) {
        let Some(cluster) = cause else { return self.own.extend(keys) };
        let turn = self.others.entry(cluster);
        turn.or_insert(Turn { keys: BTreeSet::new(), credit: Credit::new() }).keys.extend(keys);
    }

    /// Whether a service waits on the own cluster's account, which is never for long.
    pub(super) fn is_own(&self, key: &ServiceKey) -> bool {
        self.own.contains(key)
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.own.len() + self.others.values().map(|turn| turn.keys.len()).sum::<usize>()
    }

    /// Whose turn it is.
    pub(super) fn next(&mut self, now: Duration) -> Option<Cause> {
        if !self.own.is_empty() {
            return Some(None);
        }
        let after = self.last.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let ready = |(_, turn): &(&ClusterId, &Turn)| !turn.keys.is_empty() && turn.credit.due() <= now;
        let next = self
            .others
            .range::<ClusterId, _>((after, Bound::Unbounded))
            .chain(&self.others)
            .find(ready)
            .map(|(cluster, _)| cluster.clone())?;
        self.last = Some(next.clone());
        Some(Some(next))
    }

    /// Takes one service of somebody whose turn it is.
    pub(super) fn take(&mut self, cause: &Cause) -> Option<ServiceKey> {
        let key = match cause {
            None => self.own.pop_first(),
            Some(cluster) => self.others.get_mut(cluster)?.keys.pop_first(),
        }?;
        // Planned once is planned for all.
        self.own.remove(&key);
        for turn in self.others.values_mut() {
            turn.keys.remove(&key);
        }
        Some(key)
    }

    /// What somebody's turn took.
    pub(super) fn charge(&mut self, cause: &Cause, now: Duration, used: Duration) {
        if let Some(turn) = cause.as_ref().and_then(|cluster| self.others.get_mut(cluster)) {
            turn.credit.charge(now, used);
        }
    }

    /// When the next one's turn is, if anybody waits.
    pub(super) fn due(&self) -> Option<Duration> {
        if !self.own.is_empty() {
            return Some(Duration::ZERO);
        }
        self.others.values().filter(|t| !t.keys.is_empty()).map(|t| t.credit.due()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey { namespace: "a".parse().unwrap(), name: name.parse().unwrap() }
    }

    fn id(name: &str) -> Cause {
        Some(name.parse().unwrap())
    }

    #[test]
    fn who_causes_much_waits_alone() {
        let mut queue = Queue::default();
        let ms = Duration::from_millis;
        let mut now = ms(1000);
        queue.add(id("mallory"), (0..1000).map(|n| key(&format!("flood-{n}"))));
        let mut turns = 0;
        while let Some(cause) = queue.next(now) {
            queue.take(&cause).unwrap();
            now += ms(10);
            queue.charge(&cause, now, ms(10));
            turns += 1;
        }
        assert!((20..=30).contains(&turns), "a burst and no more: {turns}");
        // Others and the own cluster do not wait, and the own comes first.
        queue.add(id("honest"), [key("web")]);
        queue.add(None, [key("own")]);
        assert_eq!(queue.next(now), Some(None));
        assert_eq!(queue.take(&None), Some(key("own")));
        assert_eq!(queue.next(now), Some(id("honest")));
        assert_eq!(queue.take(&id("honest")), Some(key("web")));
        assert_eq!(queue.next(now), None);
        // A twentieth of the time is the liar's.
        let (begin, mut used) = (now, ms(0));
        while now - begin < ms(10_000) {
            now = now.max(queue.due().unwrap());
            let cause = queue.next(now).unwrap();
            queue.take(&cause).unwrap();
            now += ms(10);
            used += ms(10);
            queue.charge(&cause, now, ms(10));
        }
        assert!(used <= ms(700), "{used:?} of {:?}", now - begin);
    }

    #[test]
    fn clusters_take_turns_and_nothing_is_planned_twice() {
        let mut queue = Queue::default();
        for name in ["a", "b", "c"] {
            queue.add(id(name), [key("x"), key(name)]);
        }
        let mut order = Vec::new();
        while let Some(cause) = queue.next(Duration::ZERO) {
            if let Some(key) = queue.take(&cause) {
                order.push((cause.unwrap().to_string(), key.name.to_string()));
            }
        }
        let text: Vec<String> = order.iter().map(|(c, k)| format!("{c}:{k}")).collect();
        assert_eq!(text, ["a:a", "b:b", "c:c", "a:x"]);
        assert_eq!(queue.len(), 0);
    }
}
