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
