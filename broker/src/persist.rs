//! Writes what changed to the store, behind the sessions' backs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tombolo_proto::model::ClusterId;
use tombolo_replica::{Change, OriginState, Replica};
use tracing::{error, info};

use crate::metrics::ResultLabel;
use crate::shared::Shared;
use crate::store::{Batch, OriginChange, Store, StoreError};

/// Between two writes: changes that come together are written together.
const PAUSE: Duration = Duration::from_millis(100);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(2);

/// What is in the store, and up to which version of the replica.
pub(crate) struct Persister {
    store: Box<dyn Store>,
    version: u64,
    written: BTreeMap<ClusterId, Arc<OriginState>>,
    /// In the store, of no use, to be removed.
    stale: BTreeSet<ClusterId>,
    healthy: bool,
}

impl Persister {
    /// A store of which `written` was just loaded, and `stale` not taken.
    pub(crate) fn new(
        store: Box<dyn Store>,
        written: BTreeMap<ClusterId, Arc<OriginState>>,
        stale: BTreeSet<ClusterId>,
    ) -> Self {
        Self { store, version: 0, written, stale, healthy: true }
    }

    /// Runs until the broker stops, and writes once more then.
    pub(crate) async fn run(mut self, shared: Arc<Shared>) {
        let mut changed = shared.version.subscribe();
        changed.mark_changed();
        shared.metrics.store_healthy.set(1);
        loop {
            let stopping = tokio::select! {
                result = changed.changed() => result.is_err(),
                () = shared.stop.cancelled() => true,
            };
            changed.mark_unchanged();
            let writer = shared.clone();
            let done = tokio::task::spawn_blocking(move || {
                let healthy = self.write(&writer);
                (self, healthy)
            });
            let Ok((persister, healthy)) = done.await else {
                error!("the store's writer failed; what comes now is kept in memory only");
                shared.metrics.store_healthy.set(0);
                return;
            };
            self = persister;
            if stopping {
                return;
            }
            if !healthy {
                changed.mark_changed();
            }
            let pause = if healthy { PAUSE } else { RETRY };
            let _ = tokio::time::timeout(pause, shared.stop.cancelled()).await;
        }
    }

    fn write(&mut self, shared: &Shared) -> bool {
        let (batch, version) = {
            let replica = shared.replica();
            (self.batch(&replica), replica.version())
        };
        let start = shared.now();
        let result = self.store.write(&batch);
        shared.metrics.store_seconds.inc_by((shared.now().saturating_sub(start)).as_secs_f64());
        let label = if result.is_ok() { "written" } else { "failed" };
        shared.metrics.store_writes.get_or_create(&ResultLabel { result: label }).inc();
        shared.metrics.store_healthy.set(i64::from(result.is_ok()));
        self.tell(&result);
        if result.is_ok() {
            self.version = version;
            self.stale.clear();
            shared.stored.store(version, Ordering::Relaxed);
            for (cluster, change) in batch.origins {
                match change.state {
                    Some(state) => self.written.insert(cluster, state),
                    None => self.written.remove(&cluster),
                };
            }
        }
        self.healthy
    }

    fn batch(&self, replica: &Replica) -> Batch {
        let mut batch = Batch::default();
        for change in replica.changes_since(self.version) {
            match change {
                Change::Documents => batch.documents = Some(replica.documents()),
                Change::Origin(cluster) => {
                    let written = self.written.get(cluster).cloned();
                    let state = replica.origin(cluster).cloned();
                    batch.origins.insert(cluster.clone(), OriginChange { written, state });
                }
                Change::Interest => {}
            }
        }
        for cluster in &self.stale {
            batch.origins.entry(cluster.clone()).or_default();
        }
        batch
    }

    /// One line when it begins to fail and one when it is well again.
    fn tell(&mut self, result: &Result<(), StoreError>) {
        match result {
            Err(reason) if self.healthy => {
                error!("{reason}; the broker serves on from memory and tries again every {RETRY:?}");
            }
            Ok(()) if !self.healthy => info!("the store is written again"),
            Ok(()) | Err(_) => {}
        }
        self.healthy = result.is_ok();
    }
}
