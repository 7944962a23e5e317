//! What the controller refuses, as findings.

use std::collections::BTreeSet;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_proto::model::ClusterId;
use tombolo_replica::{Object, Reason, Replica};

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
        let message = format!("{object} is refused, what was verified before stays in use: {reason}");
        let finding = |reason, severity| Some(Finding { severity, reason, object: place, message });
        match reason {
            Reason::Equivocation(_) => finding("Equivocation", Severity::Error),
            Reason::Fork { .. } => finding("Fork", Severity::Error),
            Reason::Quota { .. } => finding("QuotaExceeded", Severity::Error),
            Reason::Stale { .. } => finding("StatementStale", Severity::Warning),
            // The rest of what was ended; the members themselves say so where it matters.
            Reason::Revoked { .. } => None,
            Reason::Trust(_) | Reason::NoMembership { .. } | Reason::Content(_) => {
                finding("Refused", Severity::Warning)
            }
        }
    };
    replica.findings().iter().filter_map(finding).collect()
}
