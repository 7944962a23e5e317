//! Condition `Conflict` of the users' ServiceExports (mcs 18, 19).

use std::collections::BTreeMap;

use super::service::{Derived, Sources};
use crate::object::{Condition, ExportStatus, ServiceKey};

/// Adds the condition to every export that counts. While somebody who may take part is unknown it is left out, and so
/// stays as it is.
pub(crate) fn conflicts(
    sources: &Sources<'_>,
    services: &BTreeMap<ServiceKey, Derived<'_>>,
    statuses: &mut BTreeMap<ServiceKey, ExportStatus>,
) {
    for (key, status) in statuses {
        if sources.own.is_none_or(|own| !own.contains_key(key)) || sources.somebody_unknown(&key.namespace) {
            continue;
        }
        let Some(merged) = services.get(key).and_then(|d| d.merged.as_ref()) else { continue };
        let condition = if merged.conflicts.is_empty() {
            Condition {
                status: false,
                reason: "NoConflicts".to_owned(),
                message: "all clusters that export this service agree".to_owned(),
            }
        } else {
            let join = |list: &mut dyn Iterator<Item = String>, by: &str| list.collect::<Vec<_>>().join(by);
            let differ = merged.conflicts.iter().map(|(conflict, clusters)| {
                format!("{conflict} with {}", join(&mut clusters.iter().map(ToString::to_string), ", "))
            });
            let differ = join(&mut { differ }, "; ");
            Condition {
                status: true,
                reason: join(&mut merged.conflicts.keys().map(ToString::to_string), ","),
                message: format!("{differ}; the values of {}, which exported first, count", merged.oldest),
            }
        };
        status.conditions.insert("Conflict".to_owned(), condition);
    }
}
