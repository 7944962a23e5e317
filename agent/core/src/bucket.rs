//! How often something may be said: a token bucket.

use std::time::Duration;

/// Lets through a few at once and then one at a time. Counts what it holds back.
#[derive(Debug, Clone)]
pub struct Bucket {
    size: u32,
    every: Duration,
    tokens: u32,
    /// When the last token was added.
    filled: Duration,
    held_back: u64,
}

impl Bucket {
    /// Full: `size` at once, `size` a minute.
    pub fn a_minute(size: u32) -> Self {
        let size = size.max(1);
        Self::new(size, Duration::from_secs(60) / size)
    }

    /// Full: `size` at once, then one `every`.
    pub fn new(size: u32, every: Duration) -> Self {
        let size = size.max(1);
        Self { size, every, tokens: size, filled: Duration::ZERO, held_back: 0 }
    }

    /// How long after `now` there is one again; zero if there is.
    pub fn wait(&self, now: Duration) -> Duration {
        if self.tokens > 0 { Duration::ZERO } else { (self.filled + self.every).saturating_sub(now) }
    }

    /// Asks for one more at `now` (time since the process started). Some(how many were held back since the last that
    /// was let through), or None: hold it back.
    pub fn take(&mut self, now: Duration) -> Option<u64> {
        let new = now.saturating_sub(self.filled).as_nanos() / self.every.as_nanos().max(1);
        let room = self.size - self.tokens;
        if new >= u128::from(room) {
            self.tokens = self.size;
            self.filled = now.max(self.filled);
        } else {
            let new = u32::try_from(new).unwrap_or(room);
            self.tokens += new;
            self.filled += self.every * new;
        }
        if self.tokens == 0 {
            self.held_back += 1;
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_count() {
        let mut bucket = Bucket::a_minute(10);
        let said = |bucket: &mut Bucket, from: u64, to: u64| {
            (from..to).filter_map(|ms| bucket.take(Duration::from_millis(ms))).collect::<Vec<_>>()
        };
        let first = said(&mut bucket, 0, 60_000);
        assert_eq!(first.len(), 10 + 9, "ten at once, one every six seconds");
        assert_eq!(first.iter().sum::<u64>() + 19, 54_001, "{first:?}");
        let minute = said(&mut bucket, 60_000, 120_000);
        assert_eq!(minute.len(), 10);
    }

    #[test]
    fn after_a_pause_it_is_full_and_no_fuller() {
        let mut bucket = Bucket::a_minute(3);
        for _ in 0..5 {
            bucket.take(Duration::ZERO);
        }
        let later = Duration::from_secs(100_000);
        let said: Vec<_> = (0..10).map(|_| bucket.take(later)).collect();
        assert_eq!(said[..4], [Some(2), Some(0), Some(0), None]);
    }

    #[test]
    fn who_waits_as_told_gets_one() {
        let mut bucket = Bucket::new(2, Duration::from_millis(100));
        let mut now = Duration::from_millis(5);
        for _ in 0..2 {
            assert_eq!(bucket.wait(now), Duration::ZERO);
            assert!(bucket.take(now).is_some());
        }
        for _ in 0..5 {
            let wait = bucket.wait(now);
            assert!(!wait.is_zero() && wait <= Duration::from_millis(100), "{wait:?}");
            assert!(bucket.take(now).is_none());
            now += wait;
            assert!(bucket.take(now).is_some());
        }
    }
}
