//! Collects what a person should know while a plan is made.

use std::collections::BTreeSet;

use crate::finding::{Finding, Severity};

/// Findings of one plan: in order, without repetition, bounded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Findings(BTreeSet<Finding>);

impl Findings {
    /// Findings of one plan; whoever reads more reads none.
    const MAX: usize = 500;

    pub(crate) fn error(&mut self, reason: &'static str, object: impl ToString, message: impl Into<String>) {
        self.add(Severity::Error, reason, object.to_string(), message.into());
    }

    pub(crate) fn warning(
        &mut self,
        reason: &'static str,
        object: impl ToString,
        message: impl Into<String>,
    ) {
        self.add(Severity::Warning, reason, object.to_string(), message.into());
    }

    fn add(&mut self, severity: Severity, reason: &'static str, object: String, message: String) {
        self.0.insert(Finding { severity, reason, object, message });
        // Which ones stay does not depend on the order in which they came.
        if self.0.len() > Self::MAX {
            self.0.pop_last();
        }
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        for finding in &other.0 {
            // Most of very many are not even copied.
            let full = self.0.len() >= Self::MAX;
            if full && self.0.last().is_some_and(|last| finding >= last) {
                continue;
            }
            self.0.insert(finding.clone());
            if self.0.len() > Self::MAX {
                self.0.pop_last();
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn into_vec(self) -> Vec<Finding> {
        self.0.into_iter().collect()
    }
}
