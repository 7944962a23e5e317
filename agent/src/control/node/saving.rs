//! What was verified is kept for a start without the API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinHandle};
use tracing::warn;

use super::{DEBOUNCE, Node, RESYNC, heavy};
use crate::api::Observed;
use crate::api::cache::Cache;
use crate::observe::member::Verifier;

/// The cache is written so often at most.
const SAVE: Duration = Duration::from_secs(5);
/// After it took long, so many times as long is waited.
const SAVE_PAUSE: u32 = 50;

/// The cache on its way to the disk.
#[derive(Default)]
pub(super) struct Saving {
    pub(super) task: Option<JoinHandle<(Cache, Option<Duration>)>>,
    /// What was given to it last.
    of: Option<Arc<Observed>>,
    /// Not before.
    next: Option<Instant>,
}

impl Saving {
    /// Waits for its end; None if it was not begun.
    pub(super) async fn done(&mut self) -> Option<Result<(Cache, Option<Duration>), JoinError>> {
        match &mut self.task {
            Some(task) => Some(task.await),
            None => None,
        }
    }
}

impl Node {
    /// Begins to keep what was verified, for a start without the API, if it is time. When to ask again.
    pub(super) fn save(
        &mut self,
        saving: &mut Saving,
        verifier: &Verifier,
        observed: &Arc<Observed>,
    ) -> Duration {
        let due = saving.next.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        if saving.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, observed)) || self.cache.is_none() {
            return RESYNC;
        }
        if due.is_zero()
            && let Some(good) = heavy(|| verifier.good(observed))
            && let Some(mut cache) = self.cache.take()
        {
            saving.of = Some(observed.clone());
            saving.task = Some(tokio::task::spawn_blocking(move || {
                let begun = Instant::now();
                let written = cache.keep(&good);
                (cache, written.then(|| begun.elapsed()))
            }));
            return RESYNC;
        }
        due.max(DEBOUNCE)
    }

    /// The cache was written.
    pub(super) fn saved(&mut self, saving: &mut Saving, done: Result<(Cache, Option<Duration>), JoinError>) {
        saving.task = None;
        match done {
            Ok((cache, took)) => {
                self.cache = Some(cache);
                if let Some(took) = took {
                    saving.next = Some(Instant::now() + SAVE.max(took * SAVE_PAUSE));
                }
            }
            Err(error) => {
                warn!("what was verified is not kept for a start without the API any more: {error}")
            }
        }
    }
}
