//! What the leader writes for the other clusters: their Members, imports and slices. Beside the voice, which waits for
//! none of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::object::{ExportStatus, ServiceKey};
use tombolo_agent_core::plan::piece::OwnPlan;
use tombolo_agent_core::shelf::Shelf;
use tombolo_proto::model::ClusterId;
use tracing::{debug, warn};

use super::desk::{Batch, Desk, Said};
use super::standing::Teller;
use super::{DEBOUNCE, RESYNC, RETRY};
use crate::admin::Shown;
use crate::api::{ClusterApi, Observed};
use crate::control::keep::{Keeper, Writes};
use crate::control::lead::Fence;
use crate::control::session::Shared;
use crate::observe::origin::View;
use crate::tell::Part;

/// Writing an object is charged as so much work: what it costs the API's server and the nodes that read it.
const OBJECT: Duration = Duration::from_micros(100);
/// Findings of services that are shown.
const FINDINGS: usize = 300;

/// What the hands work with.
#[derive(Clone)]
pub(super) struct Hands {
    pub(super) api: Arc<dyn ClusterApi>,
    pub(super) shown: Arc<Shown>,
    pub(super) shared: Arc<Shared>,
    pub(super) cluster: ClusterId,
    pub(super) fence: Fence,
    /// None: there is nothing to do, since nothing is known or the cluster is no member.
    pub(super) said: watch::Receiver<Option<Arc<Said>>>,
}

struct Work {
    hands: Hands,
    start: Instant,
    /// There between batches.
    desk: Option<Desk>,
    statuses: Statuses,
    scrubbed: Instant,
}

/// What the statuses of ServiceExports were looked at with last.
#[derive(Default)]
struct Statuses {
    own: Option<Arc<OwnPlan>>,
    shown: Shelf<ServiceKey, ExportStatus>,
    /// Those that may be others now.
    odd: BTreeSet<ServiceKey>,
}

/// Works until `stop`.
pub(super) async fn run(hands: Hands, stop: CancellationToken) -> Result<()> {
    let members = members(&hands, &stop);
    let services = services(&hands, &stop);
    tokio::try_join!(members, services).map(drop)
}

/// What both works wait for.
struct News {
    observed: watch::Receiver<Arc<Observed>>,
    changed: watch::Receiver<u64>,
    said: watch::Receiver<Option<Arc<Said>>>,
}

impl News {
    fn of(hands: &Hands) -> Self {
        Self { observed: hands.api.observe(), changed: hands.shared.changed(), said: hands.said.clone() }
    }

    /// What the cluster's API holds now, and whether the cluster speaks as a member.
    fn take(&mut self) -> (Arc<Observed>, bool) {
        self.changed.borrow_and_update();
        let member = self.said.borrow_and_update().is_some();
        (self.observed.borrow_and_update().clone(), member)
    }

    /// Until there is something new, or `most` is over; several at once are one. False: to stop.
    async fn wait(&mut self, most: Duration, stop: &CancellationToken) -> Result<bool> {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(false),
            result = self.observed.changed() => result.context("the cluster's API ended")?,
            result = self.changed.changed() => result.context("the sessions ended")?,
            result = self.said.changed() => result.context("the voice ended")?,
            () = tokio::time::sleep(most) => {}
        }
        tokio::select! {
            () = stop.cancelled() => Ok(false),
            () = tokio::time::sleep(DEBOUNCE) => Ok(true),
        }
    }
}

/// Keeps what was verified of every cluster.
async fn members(hands: &Hands, stop: &CancellationToken) -> Result<()> {
    let mut keeper = Keeper::new(hands.api.clone(), hands.shared.clone(), hands.cluster.clone());
    let mut news = News::of(hands);
    let mut teller = Teller::default();
    let start = Instant::now();
    loop {
        let (now, member) = news.take();
        let mut wait = RESYNC;
        if let (Some(members), Some(nodes)) = (now.members.get(), now.member_nodes.get())
            && member
            && hands.fence.holds()
        {
            let mut writes = Writes::new(&hands.fence);
            let said = hands.said.borrow().clone();
            let own = said.as_ref().map(|said| &*said.own);
            if let Some(due) = keeper.members(start.elapsed(), own, members, nodes, &mut writes).await {
                wait = wait.min(due.saturating_sub(start.elapsed()));
            }
            let api = &*hands.api;
            let due = teller.tell(start.elapsed(), &hands.cluster, &now, api, &mut writes).await;
            wait = due.map_or(wait, |due| wait.min(due.saturating_sub(start.elapsed())));
            wait = told(writes, wait);
        }
        if !news.wait(wait, stop).await? {
            return Ok(());
        }
    }
}

/// Writes imports, slices and statuses.
async fn services(hands: &Hands, stop: &CancellationToken) -> Result<()> {
    let mut news = News::of(hands);
    let now = Instant::now();
    let mut work =
        Work { hands: hands.clone(), start: now, desk: None, statuses: Statuses::default(), scrubbed: now };
    loop {
        let (now, _) = news.take();
        let wait = work.round(&now).await?;
        if !news.wait(wait, stop).await? {
            return Ok(());
        }
    }
}

/// How long to wait, after this came of writing.
fn told(writes: Writes<'_>, wait: Duration) -> Duration {
    match writes.outcome() {
        Ok(()) => wait,
        Err(error) => {
            warn!("the cluster's objects are not all written, retrying: {error:#}");
            wait.clamp(RETRY / 10, RETRY)
        }
    }
}

impl Work {
    /// One batch, and whatever else is due; when to look again.
    async fn round(&mut self, observed: &Arc<Observed>) -> Result<Duration> {
        if !self.hands.fence.holds() {
            return Ok(RESYNC);
        }
        let Some(said) = self.hands.said.borrow().clone() else {
            (self.desk, self.statuses) = (None, Statuses::default());
            self.hands.shown.tell(Part::Services, Vec::new());
            return Ok(RESYNC);
        };
        let known = observed.namespaces.is_known()
            && observed.imports.is_known()
            && observed.derived.is_known()
            && observed.slices.is_known();
        if !known {
            return Ok(RESYNC);
        }
        let fence = self.hands.fence.clone();
        let mut writes = Writes::new(&fence);
        let wait = self.services(observed, said, &mut writes).await?;
        let wait = told(writes, wait);
        Ok(wait)
    }

    async fn services(
        &mut self,
        observed: &Arc<Observed>,
        said: Arc<Said>,
        writes: &mut Writes<'_>,
    ) -> Result<Duration> {
        let now = self.start.elapsed();
        let mut desk = match self.desk.take() {
            Some(desk) => desk,
            None => Desk::new(self.hands.cluster.clone()),
        };
        let scrub = self.scrubbed.elapsed() >= RESYNC && desk.waiting() == 0;
        if scrub {
            self.scrubbed = Instant::now();
        }
        let view = self.hands.shared.with(|replica| View::of(replica));
        let (shown, own) = (observed.clone(), said.clone());
        let plan = move || {
            desk.gather(&view, &shown, &own, now);
            if scrub {
                desk.scrub();
            }
            let begun = Instant::now();
            let batch = desk.batch(&view, &shown, now);
            let batch = batch.map(|batch| (batch, begun.elapsed()));
            let findings = desk.findings(FINDINGS);
            (desk, batch, findings)
        };
        let (mut desk, batch, findings) =
            tokio::task::spawn_blocking(plan).await.context("the plan failed")?;
        self.hands.shown.tell(Part::Services, findings);
        if let Some((mut batch, planned)) = batch {
            let mut carried = BTreeMap::new();
            let begun = Instant::now();
            let objects = batch.objects();
            let (set, gone) = std::mem::take(&mut batch.derived);
            let mut good = true;
            if !(set.is_empty() && gone.is_empty()) {
                let write = self.hands.api.write_derived(set, gone);
                match writes.attempt("Services of imports are not written", write).await {
                    Some(services) => carried = services,
                    None => good = false,
                }
            }
            good &= self.write(&mut batch, writes).await;
            let (took, services) = (planned + begun.elapsed(), batch.keys.len());
            debug!(cause = ?batch.cause, services, objects, ?took, waiting = desk.waiting(), "planned");
            self.statuses.odd.extend(batch.keys.iter().cloned());
            // Waiting for the API costs nobody anything.
            let used = planned.saturating_add(OBJECT * objects);
            desk.settle(batch, good, self.start.elapsed(), used);
            desk.carried(carried);
        }
        self.statuses(observed, &said, &desk, writes).await;
        let now = self.start.elapsed();
        let due = desk.due().into_iter().chain(desk.compare_due(observed)).min();
        self.desk = Some(desk);
        Ok(due.map_or(RESYNC, |due| due.saturating_sub(now)))
    }

    async fn write(&self, batch: &mut Batch, writes: &mut Writes<'_>) -> bool {
        let mut good = true;
        let (set, gone) = std::mem::take(&mut batch.slices);
        if !(set.is_empty() && gone.is_empty()) {
            let write = self.hands.api.write_slices(set, gone);
            good &= writes.attempt("imported EndpointSlices are not written", write).await.is_some();
        }
        let (set, gone) = std::mem::take(&mut batch.imports);
        if !(set.is_empty() && gone.is_empty()) {
            let write = self.hands.api.write_imports(set, gone);
            good &= writes.attempt("ServiceImports are not written", write).await.is_some();
        }
        good
    }

    /// Those that are shown otherwise than they should be.
    async fn statuses(&mut self, observed: &Observed, said: &Said, desk: &Desk, writes: &mut Writes<'_>) {
        let Some(shown) = observed.statuses.get() else { return };
        let Statuses { own, shown: before, odd } = &mut self.statuses;
        if own.as_ref().is_none_or(|own| !Arc::ptr_eq(own, &said.own)) {
            let nothing = Shelf::new();
            let old = own.as_ref().map_or(&nothing, |own| own.statuses());
            odd.extend(said.own.statuses().changed(old).into_iter().cloned());
            *own = Some(said.own.clone());
        }
        odd.extend(shown.changed(before).into_iter().cloned());
        *before = shown.clone();
        let mut changed: BTreeMap<ServiceKey, ExportStatus> = BTreeMap::new();
        for key in std::mem::take(odd) {
            // Looked at again when it was planned: one write then tells all of it.
            if desk.is_waiting(&key) {
                continue;
            }
            // Not stamped yet, or gone.
            let (Some(status), Some(there)) = (said.own.statuses().get(&key), shown.get(&key)) else {
                continue;
            };
            let mut status = status.clone();
            let conflict = desk.conflict(&key).map(|conflict| ("Conflict".to_owned(), conflict.clone()));
            status.conditions.extend(conflict);
            if status.conditions.iter().any(|(kind, value)| there.conditions.get(kind) != Some(value)) {
                changed.insert(key, status);
            }
        }
        if !changed.is_empty() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let write = self.hands.api.apply_statuses(&changed, now);
            let written = writes.attempt("statuses of ServiceExports are not written", write).await;
            if written.is_none() {
                self.statuses.odd.extend(changed.into_keys());
            }
        }
    }
}
