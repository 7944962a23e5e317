//! A value that counts once it has not changed for a while: what flaps is not told on.

use std::time::Duration;

/// How long a value must have been the same.
pub const HOLD: Duration = Duration::from_secs(1);

/// The last value that was steady for [`HOLD`].
#[derive(Debug)]
pub struct Steady<T> {
    told: Option<T>,
    seen: Option<(T, Duration)>,
}

impl<T> Default for Steady<T> {
    fn default() -> Self {
        Self { told: None, seen: None }
    }
}

impl<T: PartialEq + Clone> Steady<T> {
    /// The value now.
    pub fn handle(&mut self, now: Duration, value: T) {
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != value) {
            self.seen = Some((value, now));
        }
    }

    /// None before anything was steady.
    pub fn value(&mut self, now: Duration) -> Option<&T> {
        if let Some((seen, since)) = &self.seen
            && now >= *since + HOLD
            && self.told.as_ref() != Some(seen)
        {
            self.told = Some(seen.clone());
        }
        self.told.as_ref()
    }

    /// When [`Self::value`] may be another.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let (seen, since) = self.seen.as_ref()?;
        (self.told.as_ref() != Some(seen)).then_some(*since + HOLD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn what_flaps_is_not_told() {
        let mut steady = Steady::default();
        assert_eq!((steady.value(ms(0)).copied(), steady.poll_timeout()), (None, None));
        steady.handle(ms(0), 1);
        assert_eq!((steady.value(ms(999)).copied(), steady.poll_timeout()), (None, Some(ms(1000))));
        assert_eq!((steady.value(ms(1000)).copied(), steady.poll_timeout()), (Some(1), None));
        for now in (1100..9000).step_by(500) {
            steady.handle(ms(now), now % 1000);
            assert_eq!(steady.value(ms(now)), Some(&1));
        }
        steady.handle(ms(9000), 2);
        steady.handle(ms(9500), 2);
        assert_eq!(steady.value(ms(9999)), Some(&1));
        assert_eq!(steady.value(ms(10_000)), Some(&2));
        // Back to what was told before anybody was told otherwise: nothing to tell.
        steady.handle(ms(11_000), 3);
        steady.handle(ms(11_100), 2);
        assert_eq!((steady.poll_timeout(), steady.value(ms(20_000)).copied()), (None, Some(2)));
    }
}
