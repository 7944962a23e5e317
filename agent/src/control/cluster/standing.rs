//! Says on every Member how it stands.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tombolo_agent_core::standing::{Standing, standings};
use tombolo_proto::model::ClusterId;
use tracing::info;

use super::RESYNC;
use crate::api::{ClusterApi, Observed};
use crate::control::keep::Writes;

/// Of one Member no oftener: when a cluster vanishes, node after node says so.
const EVERY: Duration = Duration::from_secs(2);

/// What was said, and when.
#[derive(Debug, Default)]
pub(super) struct Teller {
    told: BTreeMap<ClusterId, (Standing, Duration)>,
}

impl Teller {
    /// Says what is new; when to look again, if something has to wait.
    pub(super) async fn tell(
        &mut self,
        now: Duration,
        us: &ClusterId,
        observed: &Observed,
        api: &dyn ClusterApi,
        writes: &mut Writes<'_>,
    ) -> Option<Duration> {
        let (members, nodes, told) =
            (observed.members.get()?, observed.nodes.get()?, observed.tunnel_nodes.get()?);
        let spoken = members.iter().map(|(c, member)| (c.clone(), member.statement.is_some())).collect();
        self.told.retain(|cluster, _| members.contains_key(cluster));
        let mut due = None;
        for (cluster, standing) in standings(us, &spoken, nodes, told) {
            if let Some((old, at)) = self.told.get(&cluster) {
                let next = if *old == standing { *at + RESYNC } else { *at + EVERY };
                if now < next {
                    due = Some(due.map_or(next, |due: Duration| due.min(next)));
                    continue;
                }
            }
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let write = api.write_standing(&cluster, &standing, unix);
            let Some(applied) = writes.attempt("a Member's status is not written", write).await else {
                continue;
            };
            if !applied.is_nothing() {
                info!(%cluster, reason = standing.reason, "{}", standing.message);
            }
            self.told.insert(cluster, (standing, now));
        }
        due
    }
}
