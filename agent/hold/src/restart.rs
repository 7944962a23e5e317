//! How long to wait before a dead child is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Deaths within [`WINDOW`] that are answered at once.
const FREE: usize = 12;
const WINDOW: Duration = Duration::from_secs(10);
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);

/// Restarts at once, until a child dies so often within seconds that it is plainly broken; then waits longer and
/// longer, to a bound. Quiet for ten seconds, it forgets.
#[derive(Debug, Default)]
pub struct Restarts {
    deaths: VecDeque<Instant>,
    wait: Duration,
}

impl Restarts {
    /// A child died at `now`: how long to wait before the next.
    pub fn died(&mut self, now: Instant) -> Duration {
        while self.deaths.front().is_some_and(|then| now.saturating_duration_since(*then) > WINDOW) {
            self.deaths.pop_front();
        }
        if self.deaths.is_empty() {
            self.wait = Duration::ZERO;
        }
        if self.deaths.len() == FREE {
            self.deaths.pop_front();
            self.deaths.push_back(now);
            self.wait = (self.wait * 2).clamp(FIRST, LONGEST);
            return self.wait;
        }
        self.deaths.push_back(now);
        self.wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_deaths_cost_nothing_and_the_wait_is_bounded() {
        let mut restarts = Restarts::default();
        let mut now = Instant::now();
        for _ in 0..FREE {
            now += Duration::from_millis(5);
            assert_eq!(restarts.died(now), Duration::ZERO);
        }
        let mut last = Duration::ZERO;
        for _ in 0..20 {
            now += last;
            let wait = restarts.died(now);
            assert!(wait >= last || wait == Duration::ZERO, "{wait:?} after {last:?}");
            assert!(wait <= LONGEST);
            last = wait;
        }
    }

    #[test]
    fn a_quiet_time_is_forgiven() {
        let mut restarts = Restarts::default();
        let mut now = Instant::now();
        for _ in 0..FREE + 5 {
            restarts.died(now);
        }
        now += WINDOW + Duration::from_secs(1);
        assert_eq!(restarts.died(now), Duration::ZERO);
    }
}
