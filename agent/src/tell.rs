//! What is found wrong: shown, counted, and logged in bounds, since others cause some of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tombolo_agent_core::bucket::Bucket;
use tombolo_agent_core::finding::{Finding, Severity};
use tracing::{error, warn};

use crate::metrics::FindingLabel;

/// Lines a minute about one reason, so that much of one hides nothing of another.
const LINES: u32 = 20;

/// Who finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The node's plan.
    Node,
    /// The controller, of what the cluster says and hears.
    Voice,
    /// The controller, of the services that it imports.
    Services,
}

impl Part {
    /// Label `by`.
    fn label(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Voice | Self::Services => "controller",
        }
    }
}

/// Shows, counts and logs findings.
pub struct Teller {
    start: Instant,
    state: Mutex<State>,
    gauge: Family<FindingLabel, Gauge>,
}

#[derive(Default)]
struct State {
    now: BTreeMap<Part, Arc<Vec<Finding>>>,
    buckets: BTreeMap<(&'static str, &'static str), Bucket>,
}

impl Teller {
    /// Counts in this gauge.
    pub fn new(gauge: Family<FindingLabel, Gauge>) -> Self {
        Self { start: Instant::now(), state: Mutex::default(), gauge }
    }

    /// Replaces what one part finds; returns all of its label.
    pub fn tell(&self, part: Part, mut findings: Vec<Finding>) -> Arc<Vec<Finding>> {
        findings.sort();
        findings.dedup();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let old = state.now.get(&part).cloned().unwrap_or_default();
        if *old != findings {
            for finding in findings.iter().filter(|f| old.binary_search(f).is_err()) {
                let bucket = state.buckets.entry((part.label(), finding.reason));
                let bucket = bucket.or_insert_with(|| Bucket::a_minute(LINES));
                let Some(held_back) = bucket.take(self.start.elapsed()) else { continue };
                log(finding, held_back);
            }
            state.now.insert(part, Arc::new(findings));
            self.count(&state, &old, part.label());
        }
        let of = state.now.iter().filter(|(other, _)| other.label() == part.label());
        let mut all: Vec<Finding> = of.flat_map(|(_, findings)| findings.iter().cloned()).collect();
        all.sort();
        all.dedup();
        Arc::new(all)
    }

    fn count(&self, state: &State, gone: &[Finding], by: &'static str) {
        let mut counts: BTreeMap<&'static str, i64> = gone.iter().map(|f| (f.reason, 0)).collect();
        for (_, findings) in state.now.iter().filter(|(part, _)| part.label() == by) {
            for finding in findings.iter() {
                *counts.entry(finding.reason).or_default() += 1;
            }
        }
        for (reason, count) in counts {
            self.gauge.get_or_create(&FindingLabel { reason, by }).set(count);
        }
    }
}

fn log(finding: &Finding, held_back: u64) {
    let Finding { reason, object, message, .. } = finding;
    if held_back > 0 {
        warn!(reason, "{held_back} more findings of this reason came and went; see /debug/findings");
    }
    match finding.severity {
        Severity::Error => error!(reason, %object, "{message}"),
        Severity::Warning => warn!(reason, %object, "{message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(reason: &'static str, object: String) -> Finding {
        Finding { severity: Severity::Error, reason, object, message: "m".to_owned() }
    }

    #[test]
    fn what_is_found_is_counted_by_reason_and_by_who_found_it() {
        let gauge = Family::default();
        let teller = Teller::new(gauge.clone());
        let at = |reason, by| gauge.get_or_create(&FindingLabel { reason, by }).get();
        teller.tell(Part::Node, vec![finding("A", "x".into()), finding("A", "y".into())]);
        teller.tell(Part::Voice, vec![finding("A", "x".into())]);
        let all = teller.tell(Part::Services, vec![finding("B", "z".into())]);
        assert_eq!(all.len(), 2);
        assert_eq!((at("A", "node"), at("A", "controller"), at("B", "controller")), (2, 1, 1));
        teller.tell(Part::Node, Vec::new());
        assert_eq!((at("A", "node"), at("A", "controller")), (0, 1));
    }
}
