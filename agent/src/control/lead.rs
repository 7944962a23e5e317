//! Takes and holds the Lease, and runs the controller while it is held.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_agent_core::lease::{Action, Lease, Seen, Timing};
use tracing::{debug, error, info, warn};

use super::cluster::{self, Outcome};
use crate::admin::Shown;
use crate::api::{self, ClusterApi, Version, Versioned};

const READING: usize = 0;
const WRITING: usize = 1;
/// After the controller failed, before it is started again.
const PAUSE: Duration = Duration::from_secs(1);

/// Says whether the lead is held now: asked before every signature and every write.
#[derive(Clone)]
pub struct Fence {
    start: Instant,
    /// Milliseconds after `start`.
    until: Arc<AtomicU64>,
}

impl Fence {
    pub(super) fn new(start: Instant) -> Self {
        Self { start, until: Arc::default() }
    }

    /// Whether the last renewal still holds.
    pub fn holds(&self) -> bool {
        self.start.elapsed().as_millis() < u128::from(self.until.load(Ordering::Acquire))
    }

    pub(super) fn set(&self, until: Duration) {
        self.until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
    }
}

struct Leading {
    epoch: u64,
    task: JoinHandle<Result<Outcome>>,
    _stop: DropGuard,
}

struct Contest {
    api: Arc<dyn ClusterApi>,
    shown: Arc<Shown>,
    lease: Lease,
    timing: Timing,
    start: Instant,
    fence: Fence,
    leading: Option<Leading>,
    /// Not to be started again before.
    not_before: Duration,
    /// The last problem of reading and of writing the Lease that was told, until it is over.
    told: [Option<String>; 2],
    stop: CancellationToken,
    /// Where the controller runs.
    work: Handle,
}

/// Contends for the lead until `stop`. `me` names this node: its next process takes over without waiting.
///
/// The Lease has a thread of its own, with its own few threads for disks: it is renewed however busy the rest is.
pub async fn run(
    api: Arc<dyn ClusterApi>,
    me: String,
    shown: Arc<Shown>,
    stop: CancellationToken,
) -> Result<()> {
    let work = Handle::current();
    let (done, outcome) = oneshot::channel();
    let contend = move || {
        let runtime = Builder::new_current_thread().enable_all().build().context("no runtime for the Lease");
        let result = runtime.and_then(|runtime| runtime.block_on(contend(api, me, shown, work, stop)));
        // Nobody waits for it when the agent ends.
        let _ = done.send(result);
    };
    std::thread::Builder::new().name("lease".to_owned()).spawn(contend).context("no thread for the Lease")?;
    outcome.await.context("the Lease's thread failed")?
}

async fn contend(
    api: Arc<dyn ClusterApi>,
    me: String,
    shown: Arc<Shown>,
    work: Handle,
    stop: CancellationToken,
) -> Result<()> {
    let timing = api.timing();
    let start = Instant::now();
    let mut contest = Contest {
        api,
        shown,
        lease: Lease::new(me, timing),
        timing,
        start,
        fence: Fence::new(start),
        leading: None,
        not_before: Duration::ZERO,
        told: [None, None],
        stop: stop.clone(),
        work,
    };
    contest.shown.metrics.leader.set(0);
    loop {
        contest.turn().await;
        let wait = contest.lease.poll_timeout().saturating_sub(start.elapsed()).min(contest.timing.retry);
        tokio::select! {
            () = stop.cancelled() => break,
            ended = ended(&mut contest.leading) => contest.ended(ended),
            () = tokio::time::sleep(wait.max(Duration::from_millis(1))) => {}
        }
    }
    if let Some(leading) = contest.leading.take() {
        drop(leading._stop);
        let _ = leading.task.await;
    }
    if let Some(action) = contest.lease.release() {
        contest.act(action).await;
    }
    Ok(())
}

async fn ended(leading: &mut Option<Leading>) -> Result<Outcome> {
    match leading {
        Some(leading) => (&mut leading.task).await.unwrap_or_else(|error| Err(error.into())),
        None => std::future::pending().await,
    }
}

impl Contest {
    async fn turn(&mut self) {
        while let Some(action) = self.lease.poll(self.start.elapsed(), unix().as_secs()) {
            self.act(action).await;
        }
        let now = self.start.elapsed();
        match (self.lease.epoch(now), &self.leading) {
            (Some(epoch), Some(leading)) if leading.epoch == epoch => {}
            (Some(epoch), _) if now >= self.not_before => self.lead(epoch).await,
            (None, Some(_)) => self.stop_leading().await,
            _ => {}
        }
    }

    async fn lead(&mut self, epoch: u64) {
        self.stop_leading().await;
        info!(epoch, "leading the cluster");
        self.shown.metrics.leader.set(1);
        let stop = self.stop.child_token();
        let guard = stop.clone().drop_guard();
        let task = cluster::lead(self.api.clone(), self.shown.clone(), epoch, self.fence.clone(), stop);
        self.leading = Some(Leading { epoch, task: self.work.spawn(task), _stop: guard });
    }

    async fn stop_leading(&mut self) {
        if let Some(leading) = self.leading.take() {
            info!(epoch = leading.epoch, "no longer leading");
            self.shown.metrics.leader.set(0);
            drop(leading._stop);
            let _ = leading.task.await;
            self.shown.leads_no_more();
        }
    }

    /// The controller ended by itself: whatever comes next is signed under another epoch, since positions
    /// of this one are spent.
    fn ended(&mut self, outcome: Result<Outcome>) {
        let Some(leading) = self.leading.take() else { return };
        self.shown.metrics.leader.set(0);
        let now = self.start.elapsed();
        let floor = match outcome {
            Ok(Outcome::EpochNeeded(epoch)) => epoch.max(leading.epoch),
            Ok(Outcome::Stopped) => leading.epoch,
            Err(problem) => {
                error!("the controller failed and is started again: {problem:#}");
                self.not_before = now + PAUSE;
                leading.epoch
            }
        };
        self.lease.handle_epoch(floor, now);
    }

    async fn act(&mut self, action: Action) {
        let begun = self.start.elapsed();
        let outcome = match action {
            Action::Lost => {
                self.fence.set(Duration::ZERO);
                self.stop_leading().await;
                return;
            }
            Action::Read => {
                match self.api.lease().await {
                    Ok(lease) => {
                        let seen = lease.map(|l| seen(&l));
                        self.lease.handle_read(seen, self.start.elapsed());
                    }
                    Err(problem) => {
                        self.complain(
                            READING,
                            format!("the Lease cannot be read, so nobody can lead: {problem}"),
                        );
                        self.lease.handle_failed(self.start.elapsed());
                        return;
                    }
                }
                self.told[READING] = None;
                return;
            }
            Action::Acquire { epoch, expect } => {
                let me = Some(self.lease.me().to_owned());
                self.write(expect, |lease, now| {
                    if lease.holder != me {
                        lease.acquired = now;
                        lease.transitions = lease.transitions.saturating_add(1);
                    }
                    lease.holder = me;
                    lease.epoch = epoch;
                })
                .await
            }
            Action::Renew { expect } => self.write(Some(expect), |_, _| {}).await,
            Action::Release { expect } => {
                let _ = self.write(Some(expect), |lease, _| lease.holder = None).await;
                return;
            }
        };
        let now = self.start.elapsed();
        match outcome {
            Ok(written) => {
                self.told[WRITING] = None;
                self.lease.handle_written(seen(&written), now);
                self.fence.set(begun + self.timing.renew_deadline);
            }
            Err(api::Error::Conflict { .. }) => self.lease.handle_failed(now),
            Err(problem) => {
                self.complain(WRITING, format!("the Lease cannot be written: {problem}"));
                self.lease.handle_failed(now);
            }
        }
    }

    /// Warns, once for each new problem.
    fn complain(&mut self, of: usize, problem: String) {
        if self.told[of].as_ref() != Some(&problem) {
            warn!("{problem}; retrying");
            self.told[of] = Some(problem);
        } else {
            debug!("{problem}");
        }
    }

    /// Reads, changes and writes the object, if it still is at the version that was decided upon.
    async fn write(
        &self,
        expect: Option<String>,
        change: impl FnOnce(&mut api::Lease, u64),
    ) -> Result<Versioned<api::Lease>, api::Error> {
        let now = u64::try_from(unix().as_micros()).unwrap_or(u64::MAX);
        let expect = expect.map(Version);
        let current = self.api.lease().await?;
        if current.as_ref().map(|l| &l.version) != expect.as_ref() {
            return Err(api::Error::Conflict { object: "the Lease".to_owned() });
        }
        let mut lease = current.map_or_else(
            || api::Lease {
                holder: None,
                duration: 0,
                acquired: now,
                renewed: now,
                transitions: 0,
                epoch: 0,
            },
            |l| l.value,
        );
        change(&mut lease, now);
        lease.renewed = now;
        lease.duration = u32::try_from(self.timing.duration.as_secs()).unwrap_or(u32::MAX);
        let version = self.api.write_lease(&lease, expect.as_ref()).await?;
        Ok(Versioned { value: lease, version })
    }
}

fn seen(lease: &Versioned<api::Lease>) -> Seen {
    Seen {
        holder: lease.value.holder.clone(),
        duration: Duration::from_secs(lease.value.duration.into()),
        renewed: lease.value.renewed.to_string(),
        epoch: lease.value.epoch,
        version: lease.version.0.clone(),
    }
}

fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
