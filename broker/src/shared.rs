//! What all tasks of a broker share.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_broker_core::{Admission, Admitted, Limiter, Pace};
use tombolo_proto::model::ClusterId;
use tombolo_proto::wire::Message;
use tombolo_replica::Replica;

use crate::metrics::Metrics;

/// Lets a test make a broker that lies: every message to a peer goes through it, and what it returns is sent.
pub type Outbound = dyn Fn(&Admitted, Message) -> Vec<Message> + Send + Sync;

/// Where a test can reach in. Empty in every real broker.
#[derive(Clone, Default)]
pub struct Hooks {
    /// See [`Outbound`].
    pub outbound: Option<Arc<Outbound>>,
}

pub(crate) struct Shared {
    replica: Mutex<Replica>,
    /// The replica's version, for waking sessions and the store.
    pub(crate) version: watch::Sender<u64>,
    /// The replica's version that is in the store.
    pub(crate) stored: AtomicU64,
    pub(crate) admission: Admission,
    pub(crate) limiter: Mutex<Limiter>,
    pub(crate) sessions: Mutex<BTreeMap<ClusterId, usize>>,
    pub(crate) addresses: Mutex<BTreeMap<IpAddr, usize>>,
    /// Of members that said something lately.
    paces: Mutex<BTreeMap<ClusterId, Pace>>,
    pub(crate) metrics: Metrics,
    pub(crate) hooks: Hooks,
    pub(crate) stop: CancellationToken,
    start: Instant,
}

/// A panic elsewhere does not stop the broker: what is behind these locks is whole at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unix seconds.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Shared {
    pub(crate) fn new(replica: Replica, admission: Admission, hooks: Hooks) -> Self {
        Self {
            version: watch::Sender::new(replica.version()),
            replica: Mutex::new(replica),
            stored: AtomicU64::new(0),
            admission,
            // A person at a terminal and a controller that starts need a handful; 4096 addresses are a few
            // hundred KiB.
            limiter: Mutex::new(Limiter::new(20, Duration::from_millis(500), 4096)),
            sessions: Mutex::default(),
            addresses: Mutex::default(),
            paces: Mutex::default(),
            metrics: Metrics::default(),
            hooks,
            stop: CancellationToken::new(),
            start: Instant::now(),
        }
    }

    pub(crate) fn replica(&self) -> MutexGuard<'_, Replica> {
        lock(&self.replica)
    }

    /// Wakes everybody if the replica changed.
    pub(crate) fn announce(&self, replica: &Replica) {
        let now = replica.version();
        self.version.send_if_modified(|version| std::mem::replace(version, now) != now);
    }

    /// Charges a member for a message that was worked on for so long; how long its next one has to wait.
    pub(crate) fn charge(&self, cluster: &ClusterId, statement: bool, used: Duration) -> Duration {
        let now = self.now();
        let mut paces = lock(&self.paces);
        if !paces.contains_key(cluster) {
            paces.retain(|_, pace| !pace.is_paid(now));
        }
        let pace = paces.entry(cluster.clone()).or_default();
        pace.charge(now, statement, used);
        pace.due().saturating_sub(now)
    }

    /// A clock that does not go back.
    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Counts something under a key for as long as it lives.
pub(crate) struct Counted<K: Ord + Clone, F: Fn(&Shared) -> &Mutex<BTreeMap<K, usize>>> {
    shared: Arc<Shared>,
    key: K,
    table: F,
}

impl<K: Ord + Clone, F: Fn(&Shared) -> &Mutex<BTreeMap<K, usize>>> Counted<K, F> {
    /// None if `max` are counted already.
    pub(crate) fn take(shared: &Arc<Shared>, key: K, max: usize, table: F) -> Option<Self> {
        {
            let mut counts = lock(table(shared));
            let count = counts.entry(key.clone()).or_default();
            if *count >= max {
                return None;
            }
            *count += 1;
        }
        Some(Self { shared: shared.clone(), key, table })
    }
}

impl<K: Ord + Clone, F: Fn(&Shared) -> &Mutex<BTreeMap<K, usize>>> Drop for Counted<K, F> {
    fn drop(&mut self) {
        let mut counts = lock((self.table)(&self.shared));
        if let Some(count) = counts.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}
