//! What the controller finds, shown and logged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use tombolo_agent_core::bucket::Bucket;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_proto::model::ClusterId;
use tombolo_replica::{Object, Reason, Replica};
use tracing::{error, warn};

use crate::admin::Shown;

/// Lines a minute: others cause some of them.
const LINES: u32 = 60;

/// Shows findings, and logs the new ones.
pub(super) struct Teller {
    shown: Arc<Shown>,
    start: Instant,
    bucket: Bucket,
}

impl Teller {
    /// To these pages.
    pub(super) fn new(shown: Arc<Shown>) -> Self {
        Self { shown, start: Instant::now(), bucket: Bucket::a_minute(LINES) }
    }

    /// Replaces what is shown.
    pub(super) fn show(&mut self, mut findings: Vec<Finding>) {
        findings.sort();
        findings.dedup();
        let old = self.shown.cluster_findings.load();
        for finding in findings.iter().filter(|f| old.binary_search(f).is_err()) {
            let Some(held_back) = self.bucket.take(self.start.elapsed()) else { continue };
            if held_back > 0 {
                warn!("{held_back} more findings came and went; see /debug/findings");
            }
            match finding.severity {
                Severity::Error => {
                    error!(reason = finding.reason, object = %finding.object, "{}", finding.message)
                }
                Severity::Warning => {
                    warn!(reason = finding.reason, object = %finding.object, "{}", finding.message)
                }
            }
        }
        self.shown.cluster_findings.store(Arc::new(findings));
    }
}

/// What was refused of members and of the set's own documents. What is said of anybody else, or of nobody, is noise
/// that anyone can make.
pub(super) fn refused(replica: &Replica) -> Vec<Finding> {
    let members: BTreeSet<&ClusterId> = replica.memberships().map(|m| m.cluster()).collect();
    let finding = |(object, reason): (&Object, &Reason)| {
        let place = match object {
            Object::Statement(cluster) | Object::Membership(Some(cluster)) => {
                members.contains(cluster).then(|| format!("cluster {cluster}"))?
            }
            Object::Roots | Object::Brokers | Object::Revocations => "clusterset".to_owned(),
            Object::Membership(None) | Object::UnreadableStatement => return None,
        };
        let (severity, reason_name) = match reason {
            Reason::Equivocation(_) => (Severity::Error, "Equivocation"),
            Reason::Fork { .. } => (Severity::Error, "Fork"),
            Reason::Quota { .. } => (Severity::Error, "QuotaExceeded"),
            Reason::Stale { .. } => (Severity::Warning, "StatementStale"),
            // The rest of what was ended; the members themselves say so where it matters.
            Reason::Revoked { .. } => return None,
            Reason::Trust(_) | Reason::NoMembership { .. } | Reason::Content(_) => {
                (Severity::Warning, "Refused")
            }
        };
        let message = format!("{object} is refused, what was verified before stays in use: {reason}");
        Some(Finding { severity, reason: reason_name, object: place, message })
    };
    replica.findings().iter().filter_map(finding).collect()
}
