//! Whose initiations are worth the work: one costs its sender nothing, and us a tenth of a millisecond.
//!
//! While few come, all are taken. Above [`CALM`] a second a sender must first prove its address by a cookie (WireGuard
//! paper, 5.3), is then taken only so often ([`EACH`]), and those that are no peer's last address share what is left
//! for strangers. So a flood from forged addresses costs checks and cookies, one from real addresses no more than
//! [`STRANGERS`] handshakes, and peers go on as if there were none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Initiations a second from which on cookies are asked for.
pub const CALM: u32 = 500;

/// How long cookies are asked for after that was the case.
const LOADED: Duration = Duration::from_secs(1);

/// Under load: messages a second of one source that proved its address, in the long run and at once.
pub const EACH: u32 = 20;
const EACH_AT_ONCE: u32 = 5;

/// Under load: messages a second of all strangers that proved their addresses.
pub const STRANGERS: u32 = 500;

/// Under load: messages a second that are answered by a cookie or looked at for one; strangers have so many, and peers.
pub const PROOFS: u32 = 5000;

/// Strangers that are remembered.
pub const SOURCES: usize = 4096;

/// Limits initiations whose first check (MAC1) was right.
#[derive(Debug, Default)]
pub struct Limiter {
    all: Window,
    loaded_until: Option<Instant>,
    /// Last addresses of peers.
    peers: BTreeSet<IpAddr>,
    peer_proofs: Window,
    stranger_proofs: Window,
    strangers: Window,
    /// When each source's messages would be spread evenly up to now.
    sources: BTreeMap<Source, Instant>,
}

/// What to do with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Take it.
    Take,
    /// Take it if it proves its sender's address and [`Limiter::admit`] agrees; answer it by a cookie otherwise.
    Prove,
    /// Pass it over.
    Drop,
}

/// An address, or as much of it as one customer of a network has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    V4([u8; 4]),
    V6([u8; 8]),
}

/// Counts up to a limit in each second.
#[derive(Debug, Default)]
struct Window {
    began: Option<Instant>,
    count: u32,
}

impl Limiter {
    /// Whether cookies are asked for.
    pub fn is_loaded(&self, now: Instant) -> bool {
        self.loaded_until.is_some_and(|until| now < until)
    }

    /// The last addresses of all peers, while cookies are asked for.
    pub fn set_peers(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.peers = addresses.into_iter().collect();
    }

    /// A message has come.
    pub fn handle_message(&mut self, from: IpAddr, now: Instant) -> Verdict {
        if !self.all.take(CALM, now) {
            self.loaded_until = Some(now + LOADED);
        }
        if !self.is_loaded(now) {
            return Verdict::Take;
        }
        let known = self.peers.contains(&from);
        let proofs = if known { &mut self.peer_proofs } else { &mut self.stranger_proofs };
        if proofs.take(PROOFS, now) { Verdict::Prove } else { Verdict::Drop }
    }

    /// Whether a message that proved its sender's address is taken.
    pub fn admit(&mut self, from: IpAddr, now: Instant) -> bool {
        let known = self.peers.contains(&from);
        let source = Source::of(from);
        let interval = Duration::from_secs(1) / EACH;
        if !self.sources.contains_key(&source) && self.sources.len() >= SOURCES {
            // Who has been quiet for long is as one who never came.
            self.sources.retain(|_, even| *even > now);
            if self.sources.len() >= SOURCES && !known {
                return false;
            }
        }
        let even = self.sources.get(&source).map_or(now, |even| (*even).max(now));
        if even > now + interval * (EACH_AT_ONCE - 1) {
            return false;
        }
        if !known && !self.strangers.take(STRANGERS, now) {
            return false;
        }
        self.sources.insert(source, even + interval);
        true
    }
}

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(a) => Self::V4(a.octets()),
            IpAddr::V6(a) => Self::V6(a.octets().first_chunk().copied().unwrap_or_default()),
        }
    }
}

impl Window {
    fn take(&mut self, limit: u32, now: Instant) -> bool {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= Duration::from_secs(1)) {
            (self.began, self.count) = (Some(now), 0);
        }
        self.count = self.count.saturating_add(1);
        self.count <= limit
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(n: u32) -> IpAddr {
        IpAddr::from((0x0a00_0000 + n).to_be_bytes())
    }

    /// Of a flood of a million messages a second, all with proof: what is taken, of strangers and of the peer.
    fn flood(sources: u32) -> (u32, u32, Limiter) {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let peer = address(0xff_ffff);
        let (mut strangers, mut peers) = (0, 0);
        for i in 0..200_000u32 {
            let now = start + Duration::from_micros(u64::from(i) * 10);
            let mut ask = |from| match limiter.handle_message(from, now) {
                Verdict::Take => true,
                Verdict::Prove => limiter.admit(from, now),
                Verdict::Drop => false,
            };
            strangers += u32::from(ask(address(i % sources)));
            if i % 10_000 == 0 {
                peers += u32::from(ask(peer));
            }
            if i % 25_000 == 0 {
                limiter.set_peers([peer]);
            }
        }
        (strangers, peers, limiter)
    }

    #[test]
    fn a_flood_is_cut_down_and_a_peer_is_not() {
        for sources in [1, 1000, 1_000_000] {
            let (strangers, peers, limiter) = flood(sources);
            // Two seconds: the calm share once, then the strangers'.
            assert!(strangers <= CALM + 2 * STRANGERS, "{sources} sources: {strangers}");
            assert!(sources > 1 || strangers <= CALM + 2 * EACH + EACH_AT_ONCE, "{strangers}");
            assert_eq!(peers, 20, "{sources} sources");
            assert!(limiter.sources.len() <= SOURCES + 1);
        }
    }

    #[test]
    fn calm_comes_back() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        for _ in 0..=CALM {
            limiter.handle_message(address(1), start);
        }
        assert!(limiter.is_loaded(start));
        let later = start + LOADED + Duration::from_secs(1);
        assert_eq!(limiter.handle_message(address(2), later), Verdict::Take);
    }

    #[test]
    fn a_customers_addresses_are_one_source_and_neighbours_are_not() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
    }

    proptest! {
        #[test]
        fn nothing_grows_without_bound(steps in prop::collection::vec((any::<u32>(), 0u64..1000), 0..300)) {
            let mut limiter = Limiter::default();
            let mut now = Instant::now();
            for (from, wait) in steps {
                now += Duration::from_millis(wait / 100);
                let from = IpAddr::from(from.to_be_bytes());
                let _ = (limiter.handle_message(from, now), limiter.admit(from, now));
                prop_assert!(limiter.sources.len() <= SOURCES);
            }
        }
    }
}
