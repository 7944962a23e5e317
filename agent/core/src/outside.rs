//! Where other clusters see this node. Behind a NAT that gives a node an address of its own, as clouds do, that address
//! is how those find it who have not heard from it: it becomes a candidate ("What a peer sees us as", hello).
//!
//! Who says it may lie: then others' handshakes go where the liar likes, once nothing better answers. So it is one address
//! a family, the last candidate, what most clusters say, and it changes seldom.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tombolo_proto::model::{ClusterId, Family, usable_address};

/// An address must have been the one most named for so long before it is told.
pub const HOLD: Duration = Duration::from_secs(30);

/// One address a family, told once it was steady. What nobody names any more stays until another is named, or one that
/// the node has itself: who is silent says nothing.
#[derive(Debug, Default)]
pub struct Outside {
    told: BTreeMap<Family, IpAddr>,
    next: BTreeMap<Family, (IpAddr, Duration)>,
}

impl Outside {
    /// Goes on from what was told before a restart.
    pub fn new(told: &BTreeSet<IpAddr>) -> Self {
        Self { told: told.iter().map(|a| (Family::of(*a), *a)).collect(), next: BTreeMap::new() }
    }

    /// By cluster: at which addresses nodes of it see this node. `own`: addresses that it has itself.
    pub fn handle(
        &mut self,
        now: Duration,
        named: &BTreeMap<ClusterId, BTreeSet<IpAddr>>,
        own: &BTreeSet<IpAddr>,
    ) {
        let mut votes: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for address in named.values().flatten().filter(|a| usable_address(**a).is_ok()) {
            *votes.entry(*address).or_default() += 1;
        }
        for family in Family::ALL {
            let told = self.told.get(&family).copied();
            let of = votes.iter().filter(|(address, _)| Family::of(**address) == family);
            let best =
                of.max_by_key(|(address, votes)| (**votes, Some(**address) == told, Reverse(**address)));
            match best.map(|(address, _)| *address) {
                Some(best) if own.contains(&best) => {
                    self.told.remove(&family);
                    self.next.remove(&family);
                }
                Some(best) if told != Some(best) => {
                    let next = self.next.entry(family).or_insert((best, now));
                    if next.0 != best {
                        *next = (best, now);
                    }
                }
                Some(_) | None => {
                    self.next.remove(&family);
                }
            }
        }
    }

    /// What is to be told now.
    pub fn value(&mut self, now: Duration) -> BTreeSet<IpAddr> {
        for (family, (address, _)) in self.next.extract_if(.., |_, (_, since)| now >= *since + HOLD) {
            self.told.insert(family, address);
        }
        self.told.values().copied().collect()
    }

    /// When [`Self::value`] may be another.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.next.values().map(|(_, since)| *since + HOLD).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(list: &[(&str, &[&str])]) -> BTreeMap<ClusterId, BTreeSet<IpAddr>> {
        let addresses = |all: &[&str]| all.iter().map(|a| a.parse().unwrap()).collect();
        list.iter().map(|(id, all)| (ClusterId::new(id).unwrap(), addresses(all))).collect()
    }

    fn value(outside: &mut Outside, seconds: u64) -> Vec<String> {
        outside.value(s(seconds)).iter().map(ToString::to_string).collect()
    }

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn what_most_clusters_see_is_told_once_it_is_steady() {
        let mut outside = Outside::default();
        let own = ["10.0.0.5".parse().unwrap()].into();
        let first = named(&[("a", &["203.0.113.7"]), ("b", &["203.0.113.7"]), ("c", &["203.0.113.1"])]);
        outside.handle(s(0), &first, &own);
        assert_eq!(outside.poll_timeout(), Some(HOLD));
        assert!(value(&mut outside, 29).is_empty());
        outside.handle(s(29), &first, &own);
        assert_eq!(value(&mut outside, 30), ["203.0.113.7"]);
        assert_eq!(outside.poll_timeout(), None);
        // As many for another: what was told stays. Nobody says anything: likewise.
        outside.handle(s(40), &named(&[("a", &["203.0.113.7"]), ("b", &["203.0.113.1"])]), &own);
        outside.handle(s(50), &BTreeMap::new(), &own);
        assert_eq!((value(&mut outside, 99), outside.poll_timeout()), (vec!["203.0.113.7".to_owned()], None));
        // The NAT got another address.
        outside.handle(s(100), &named(&[("a", &["203.0.113.9", "2001:db8::9"])]), &own);
        assert_eq!(value(&mut outside, 130), ["203.0.113.9", "2001:db8::9"]);
        // A restart forgets nothing; and without a NAT there is nothing to tell.
        let mut outside = Outside::new(&outside.value(s(130)));
        assert_eq!(value(&mut outside, 0), ["203.0.113.9", "2001:db8::9"]);
        outside.handle(s(1), &named(&[("a", &["10.0.0.5"])]), &own);
        assert_eq!(value(&mut outside, 1), ["2001:db8::9"]);
    }

    #[test]
    fn who_names_another_each_time_is_told_nowhere_and_nonsense_never() {
        let mut outside = Outside::default();
        let own = BTreeSet::new();
        for second in 0..200_u64 {
            let address = format!("203.0.113.{}", second % 5);
            outside.handle(s(second * 10), &named(&[("liar", &[&address])]), &own);
            assert!(value(&mut outside, second * 10).is_empty());
        }
        outside.handle(
            s(5000),
            &named(&[("liar", &["127.0.0.1", "169.254.169.254", "224.0.0.1", "::1"])]),
            &own,
        );
        assert!(value(&mut outside, 9000).is_empty());
    }
}
