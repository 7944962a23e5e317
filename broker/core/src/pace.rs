//! How fast a member is heard: who says much waits for it alone.

use std::time::Duration;

/// So much is heard at once: 100 statements, or half a second of the broker's work.
const BURST: Duration = Duration::from_secs(5);
/// What a statement costs those who hear it: 20 a second for ever. A controller whose session waits says the newest
/// when it may go on, and leaves out what was in between.
const STATEMENT: Duration = Duration::from_millis(50);
/// Beyond that the member has one part in so many of one processor.
const SHARE: u32 = 10;
/// A message is charged for so much work at most: the machine may be busy with something else.
const LONGEST: Duration = Duration::from_secs(1);

/// A bucket of time of one member, over all its sessions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// All that was said is paid at this time.
    paid: Duration,
}

impl Pace {
    /// When the member may be heard again, by the clock of [`Self::charge`].
    pub fn due(&self) -> Duration {
        self.paid.saturating_sub(BURST)
    }

    /// Whether it is as good as new.
    pub fn is_paid(&self, now: Duration) -> bool {
        self.paid <= now
    }

    /// Takes what a message cost. `now` is any clock that does not go back, `used` how long the message was worked on.
    pub fn charge(&mut self, now: Duration, statement: bool, used: Duration) {
        let fixed = if statement { STATEMENT } else { Duration::ZERO };
        let cost = (used.min(LONGEST) * SHARE).max(fixed);
        self.paid = self.paid.max(now).saturating_add(cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages that are heard until `end` if there is always another.
    fn heard(pace: &mut Pace, end: Duration, statement: bool, used: Duration) -> u32 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        while now < end {
            pace.charge(now, statement, used);
            count += 1;
            now = (now + used).max(pace.due());
        }
        count
    }

    #[test]
    fn a_burst_and_then_twenty_statements_a_second() {
        let count = heard(&mut Pace::default(), Duration::from_secs(60), true, Duration::from_micros(100));
        assert!((1290..=1310).contains(&count), "{count}");
    }

    #[test]
    fn a_tenth_of_a_processor_at_most() {
        let used = Duration::from_millis(50);
        let count = heard(&mut Pace::default(), Duration::from_secs(60), false, used);
        let share = used * count;
        assert!(share <= Duration::from_millis(6600), "{share:?} of a minute");
        // However long one takes, the next is heard soon.
        let mut pace = Pace::default();
        pace.charge(Duration::ZERO, true, Duration::MAX);
        assert_eq!(pace.due(), Duration::from_secs(5));
    }

    #[test]
    fn who_is_quiet_owes_nothing() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.charge(Duration::from_secs(10), true, Duration::ZERO);
        }
        assert_eq!(pace.due(), Duration::from_secs(10));
        assert!(!pace.is_paid(Duration::from_secs(14)));
        assert!(pace.is_paid(Duration::from_secs(15)));
        pace.charge(Duration::from_secs(1000), true, Duration::ZERO);
        assert!(pace.due() < Duration::from_secs(1000));
    }
}
