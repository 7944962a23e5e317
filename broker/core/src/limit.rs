//! How often an address may ask for what needs no membership.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// A token bucket for each address (each /64 of IPv6), in a table of bounded size.
#[derive(Debug)]
pub struct Limiter {
    burst: u32,
    every: Duration,
    max: usize,
    buckets: BTreeMap<IpAddr, Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: u32,
    /// When the tokens were counted last.
    at: Duration,
}

impl Limiter {
    /// `burst` at once, then one `every`; at most `max` addresses are remembered.
    pub fn new(burst: u32, every: Duration, max: usize) -> Self {
        Self { burst, every, max, buckets: BTreeMap::new() }
    }

    /// Whether `address` may ask now. `now` is any clock that does not go back.
    pub fn take(&mut self, address: IpAddr, now: Duration) -> bool {
        let key = bucket_key(address);
        if !self.buckets.contains_key(&key) && self.buckets.len() >= self.max {
            self.make_room(now);
        }
        let mut bucket = self.buckets.get(&key).copied().unwrap_or(Bucket { tokens: self.burst, at: now });
        self.fill(&mut bucket, now);
        let allowed = bucket.tokens > 0;
        bucket.tokens = bucket.tokens.saturating_sub(1);
        self.buckets.insert(key, bucket);
        allowed
    }

    fn fill(&self, bucket: &mut Bucket, now: Duration) {
        let passed = now.saturating_sub(bucket.at).as_nanos() / self.every.as_nanos().max(1);
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        bucket.tokens = bucket.tokens.saturating_add(passed).min(self.burst);
        bucket.at = if bucket.tokens == self.burst {
            now
        } else {
            bucket.at.saturating_add(self.every.saturating_mul(passed))
        };
    }

    /// Forgets who has a full bucket again; if nobody has, who asked longest ago.
    fn make_room(&mut self, now: Duration) {
        let mut buckets = std::mem::take(&mut self.buckets);
        buckets.retain(|_, bucket| {
            self.fill(bucket, now);
            bucket.tokens < self.burst
        });
        if buckets.len() >= self.max
            && let Some(oldest) = buckets.iter().min_by_key(|(_, bucket)| bucket.at).map(|(key, _)| *key)
        {
            buckets.remove(&oldest);
        }
        self.buckets = buckets;
    }
}

fn bucket_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn bursts_then_drips() {
        let mut limiter = Limiter::new(3, ms(100), 10);
        let a = "192.0.2.1".parse().unwrap();
        let taken = |limiter: &mut Limiter, now| (0..10).filter(|_| limiter.take(a, ms(now))).count();
        assert_eq!(taken(&mut limiter, 0), 3);
        assert_eq!((taken(&mut limiter, 99), taken(&mut limiter, 100), taken(&mut limiter, 150)), (0, 1, 0));
        assert_eq!(taken(&mut limiter, 10_000), 3);
        assert!(limiter.take("::ffff:192.0.2.2".parse().unwrap(), ms(10_000)));
        assert!((0..3).all(|_| limiter.take("2001:db8::1".parse().unwrap(), ms(10_000))));
        assert!(!limiter.take("2001:db8::2".parse().unwrap(), ms(10_000)), "one /64, one bucket");
    }

    proptest! {
        #[test]
        fn bounded_in_rate_and_size(asks in prop::collection::vec((0..40u8, 0..50u64), 1..400)) {
            let mut limiter = Limiter::new(5, ms(100), 64);
            let mut small = Limiter::new(5, ms(100), 8);
            let mut now = 0;
            let mut allowed = [0u64; 40];
            for (who, pause) in asks {
                now += pause;
                let address = IpAddr::from([10, 0, 0, who]);
                allowed[usize::from(who)] += u64::from(limiter.take(address, ms(now)));
                small.take(address, ms(now));
                prop_assert!(small.buckets.len() <= 8);
            }
            for count in allowed {
                prop_assert!(count <= 5 + now / 100);
            }
        }
    }
}
