//! Which keys the last statements of an origin touched, so that a peer that is a little behind gets a delta.
//! Values are not kept: a delta always leads to the newest statement, which is at hand.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tombolo_proto::model::{Position, RecordKey, Scope};

/// Touched keys of the scopes that changed; None where the records are not known, only that the leaf changed.
pub(crate) type Touched = BTreeMap<Scope, Option<BTreeSet<RecordKey>>>;

#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    steps: VecDeque<Step>,
    keys: usize,
}

#[derive(Debug, Clone)]
struct Step {
    base: Position,
    target: Position,
    touched: Touched,
    keys: usize,
}

impl History {
    const MAX_STEPS: usize = 256;
    const MAX_KEYS: usize = 20_000;

    pub(crate) fn push(&mut self, base: Position, target: Position, touched: Touched) {
        let keys = touched.values().flatten().map(BTreeSet::len).sum::<usize>() + touched.len();
        self.keys += keys;
        self.steps.push_back(Step { base, target, touched, keys });
        while self.steps.len() > Self::MAX_STEPS || self.keys > Self::MAX_KEYS {
            let Some(old) = self.steps.pop_front() else { break };
            self.keys -= old.keys;
        }
    }

    /// What was touched since `position`; None if that is too long ago. A position between two steps gets
    /// the whole step: more than it needs, never less.
    pub(crate) fn since(&self, position: Position) -> Option<Touched> {
        let later: Vec<&Step> = self.steps.iter().filter(|step| step.target > position).collect();
        if later.first().is_none_or(|step| step.base > position) {
            return None;
        }
        let mut merged = Touched::new();
        for step in later {
            for (scope, keys) in &step.touched {
                let slot = merged.entry(scope.clone()).or_insert_with(|| Some(BTreeSet::new()));
                match (slot.as_mut(), keys) {
                    (Some(all), Some(keys)) => all.extend(keys.iter().cloned()),
                    _ => *slot = None,
                }
            }
        }
        Some(merged)
    }
}
