//! The controller: while it leads, it alone signs and writes for the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::ClusterDesired;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::{Known, Objects, Section};
use tombolo_agent_core::object::{Import, ServiceKey, SliceKey};
use tombolo_agent_core::plan;
use tombolo_agent_core::speak::{Turn, Voice};
use tombolo_agent_core::world::ClusterWorld;
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Position, Prefix, Record, Scope};
use tombolo_proto::trust::SigningKey;
use tombolo_replica::{Interest, LocalOrigin, OriginState};
use tracing::{info, warn};

use super::keep::{self, Keeper, Writes};
use super::lead::Fence;
use super::session::{self, Shared};
use super::tell::{self, Teller};
use crate::admin::Shown;
use crate::api::{ClusterApi, ClusterSet, Observed};
use crate::observe::member::{endpoints, own_ranges};
use crate::observe::origin::{Origins, Reader, View};

/// Changes that come together are planned together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// However long a pass takes, the next begins so long after it at the latest.
const BRAKE: Duration = Duration::from_millis(500);
/// A slow resync heals what no event told.
const RESYNC: Duration = Duration::from_secs(30);
/// After a pass that failed in part.
const RETRY: Duration = Duration::from_secs(1);

/// Why the lead was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was lost, or the agent ends.
    Stopped,
    /// Another epoch, above this one, is needed: somebody has seen a higher position of this cluster, or its key is
    /// another now.
    EpochNeeded(u64),
}

struct Controller {
    api: Arc<dyn ClusterApi>,
    shown: Arc<Shown>,
    shared: Arc<Shared>,
    keeper: Keeper,
    teller: Teller,
    key: Arc<SigningKey>,
    cluster: ClusterId,
    epoch: u64,
    fence: Fence,
    start: Instant,
    /// Position of the last statement.
    last: Option<Position>,
    /// Something is planned that is not stated yet.
    unsaid: bool,
    /// Own ranges as last known.
    ours: Option<BTreeSet<Prefix>>,
    /// What a pass works with off the runtime's threads; there between passes.
    desk: Option<Desk>,
    planned: Planned,
}

/// Remembers what was read and hashed, so that only what changed is read and hashed anew.
struct Desk {
    reader: Reader,
    local: LocalOrigin,
}

/// What this leader planned last: the API shows it a little later. Only the leader writes these, so until it shows
/// them they are as planned; planned again from what is shown now, an address could go to another.
#[derive(Default)]
struct Planned {
    imports: BTreeMap<ServiceKey, Import>,
    slices: BTreeSet<SliceKey>,
}

/// Leads under `epoch`, which was reserved by the write that took the lead, until `stop`.
pub async fn lead(
    api: Arc<dyn ClusterApi>,
    shown: Arc<Shown>,
    epoch: u64,
    fence: Fence,
    stop: CancellationToken,
) -> Result<Outcome> {
    api.lead_as(epoch);
    let mut observed = api.observe();
    // Nothing is signed and nothing removed before the set and all members are known.
    let (clusterset, members) = loop {
        let now = observed.borrow_and_update().clone();
        if let (Known::Yes(Some(clusterset)), Known::Yes(members)) = (&now.clusterset, &now.members) {
            break (clusterset.clone(), members.clone());
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(Outcome::Stopped),
            result = observed.changed() => result.context("the cluster's API ended")?,
        }
    };
    let key = api
        .cluster_key()
        .await?
        .context("the cluster's key is missing from its API: run `tombolo join` again with a new token")?;
    let key = Arc::new(key);
    let cluster = clusterset.cluster.clone();
    let replica = keep::replica(&clusterset)?;
    let local = LocalOrigin::new(replica.set(), cluster.clone());
    let shared = Shared::new(replica);
    let mut controller = Controller {
        keeper: Keeper::new(api.clone(), shared.clone(), cluster.clone()),
        teller: Teller::new(shown.clone()),
        api,
        shown,
        shared,
        key,
        cluster,
        epoch,
        fence,
        start: Instant::now(),
        last: None,
        unsaid: true,
        ours: None,
        desk: Some(Desk { reader: Reader::default(), local }),
        planned: Planned::default(),
    };
    // Before any session: who listens must know below which positions nothing counts.
    controller.keeper.hear(&clusterset, &members);
    let sessions_stop = stop.child_token();
    let _end_sessions = sessions_stop.clone().drop_guard();
    let (shared, key, shown) = (controller.shared.clone(), controller.key.clone(), controller.shown.clone());
    let mut sessions = tokio::spawn(session::run(shared, key, shown, sessions_stop));
    let mut changed = controller.shared.changed();
    changed.mark_changed();
    loop {
        changed.borrow_and_update();
        let now = observed.borrow_and_update().clone();
        let begun = Instant::now();
        let wait = match controller.pass(&now).await {
            Ok(Next::End(outcome)) => return Ok(outcome),
            Ok(Next::Look(wait)) => wait,
            Err(error) => {
                warn!("the cluster's objects are not all written, retrying: {error:#}");
                RETRY
            }
        };
        let brake = begun.elapsed().clamp(DEBOUNCE, BRAKE);
        tokio::select! {
            // The stop first: it ends the sessions too.
            biased;
            () = stop.cancelled() => return Ok(Outcome::Stopped),
            ended = &mut sessions => {
                ended.context("the sessions with the brokers failed")?;
                bail!("the sessions with the brokers ended");
            }
            result = observed.changed() => result.context("the cluster's API ended")?,
            result = changed.changed() => result.context("the sessions ended")?,
            () = tokio::time::sleep(wait) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(Outcome::Stopped),
            () = tokio::time::sleep(brake) => {}
        }
    }
}

/// What comes after a pass.
enum Next {
    End(Outcome),
    /// Look again after this at the latest.
    Look(Duration),
}

/// A pass's work off the runtime's threads.
enum Work {
    NotAMember(Vec<Finding>),
    Planned { desired: Box<ClusterDesired>, findings: Vec<Finding>, changed: bool },
}

impl Controller {
    /// Observes, plans, signs, writes. What fails does not keep the rest from being done.
    async fn pass(&mut self, observed: &Observed) -> Result<Next> {
        if !self.fence.holds() {
            // The Lease's driver stops us in a moment.
            return Ok(Next::Look(RESYNC));
        }
        let (Known::Yes(Some(clusterset)), Known::Yes(members)) = (&observed.clusterset, &observed.members)
        else {
            return Ok(Next::Look(RESYNC));
        };
        self.keeper.hear(clusterset, members);
        if let Some(namespaces) = observed.namespaces.get() {
            let interest = Interest::Namespaces(namespaces.clone());
            self.shared.with(|replica| replica.set_interest(interest));
        }
        // Which addresses are ours decides what others may claim.
        if let Some(nodes) = observed.nodes.get() {
            self.ours = Some(own_ranges(clusterset, Some(nodes)));
        }
        let Some(ours) = self.ours.clone() else { return Ok(Next::Look(RESYNC)) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let fence = self.fence.clone();
        let mut writes = Writes::new(&fence);
        writes.attempt("new ServiceExports have no creation time", self.api.stamp_exports(now)).await;

        let (view, seen, mut findings) =
            self.shared.with(|replica| (View::of(replica), replica.own_seen(), tell::refused(replica)));
        let turn = match self.turn(&view, seen, &mut findings).await {
            Ok(turn) => turn,
            Err(outcome) => return Ok(Next::End(outcome)),
        };
        match self.work(view.clone(), observed, clusterset, ours).await? {
            Work::NotAMember(found) => {
                findings.extend(found);
                self.documents(&view, observed, &mut writes).await;
                self.not_a_member(&view, observed, findings, &mut writes).await;
                writes.outcome()?;
                Ok(Next::Look(RESYNC))
            }
            Work::Planned { desired, findings: found, changed } => {
                findings.extend(found);
                self.unsaid |= changed;
                // Before anything is written: what is said must not wait for disks.
                let said = match (&desired.records, turn) {
                    (Section::Set(_), Some(turn)) => self.publish(turn, &mut findings),
                    _ => Ok(()),
                };
                self.teller.show(findings);
                self.documents(&view, observed, &mut writes).await;
                let due = self.members(observed, &mut writes).await;
                self.write(&desired, observed, now, &mut writes).await;
                said?;
                writes.outcome()?;
                let due = due.map(|due| due.saturating_sub(self.start.elapsed()));
                Ok(Next::Look(due.map_or(RESYNC, |due| due.min(RESYNC))))
            }
        }
    }

    /// Where the cluster speaks next; None: not at all, and a finding says why. Err: another epoch, or another key.
    async fn turn(
        &self,
        view: &View,
        seen: Option<Position>,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<Position>, Outcome> {
        let Some(membership) = view.newest(&self.cluster) else { return Ok(None) };
        if membership.key() != self.key.public() {
            // Joined anew with another key: all that hangs on the old one starts again.
            let secret = self.api.cluster_key().await;
            if let Ok(Some(key)) = &secret
                && key.public() == membership.key()
            {
                info!("the cluster's key is another now");
                return Err(Outcome::EpochNeeded(self.epoch));
            }
            findings.push(self.finding(
                "KeyMismatch",
                "the key in the cluster's API is not the one that its membership binds, so nothing is stated: \
                 restore the Secret, or run `tombolo join` with a new token",
            ));
            return Ok(None);
        }
        let (serial, generation) = (membership.grant().serial, membership.generation());
        match (Voice { epoch: self.epoch, last: self.last, seen }).turn(serial, generation) {
            Turn::Speak(position) => Ok(Some(position)),
            Turn::Reserve(floor) => {
                warn!(
                    epoch = self.epoch,
                    floor, "a higher position of this cluster was seen: taking a higher epoch"
                );
                Err(Outcome::EpochNeeded(floor))
            }
            Turn::Exhausted(seen) => {
                findings.push(self.finding(
                    "EpochsExhausted",
                    &format!(
                        "position {seen} of this cluster was seen, and no epoch is above it, so nothing is stated: \
                         ask the administrator for a new grant (`tombolo invite --renew`)"
                    ),
                ));
                Ok(None)
            }
        }
    }

    /// Reads, plans and hashes where it holds up nobody.
    async fn work(
        &mut self,
        view: View,
        observed: &Observed,
        clusterset: &ClusterSet,
        ours: BTreeSet<Prefix>,
    ) -> Result<Work> {
        let stated = stated(observed, &self.cluster, view.states.get(&self.cluster));
        let (imports, slices) = (self.planned.imports(observed), self.planned.slices(observed));
        let (cluster, ranges) = (self.cluster.clone(), clusterset.clusterset);
        let observed = observed.clone();
        let mut desk = self.desk.take().ok_or_else(|| anyhow!("the last plan was never finished"))?;
        let work = move || {
            let Origins { own, foreign, silent, mut findings } = desk.reader.read(&view, &cluster, &ours);
            let Some(own) = own else { return (desk, Work::NotAMember(findings)) };
            let world = ClusterWorld {
                cluster,
                own,
                clusterset: Some(ranges),
                nodes: observed.nodes,
                tunnel_nodes: observed.tunnel_nodes,
                stated,
                namespaces: observed.namespaces,
                services: observed.services,
                exports: observed.exports,
                backends: observed.backends,
                imports,
                slices,
                foreign,
                unknown: silent,
            };
            let (desired, planned) = plan::cluster(&world);
            findings.extend(planned);
            let changed = match &desired.records {
                Section::Set(records) => desk.local.set_records(records),
                Section::Keep => false,
            };
            (desk, Work::Planned { desired: Box::new(desired), findings, changed })
        };
        let (desk, work) = tokio::task::spawn_blocking(work).await.context("the plan failed")?;
        self.desk = Some(desk);
        Ok(work)
    }

    /// Signs and publishes what is to be said, if it is anything new or was not said under this membership yet.
    fn publish(&mut self, position: Position, findings: &mut Vec<Finding>) -> Result<()> {
        let voice = Voice { epoch: self.epoch, last: self.last, seen: None };
        if !self.unsaid && voice.is_under(position.serial, position.generation) {
            return Ok(());
        }
        let Some(desk) = self.desk.as_ref().filter(|_| self.fence.holds()) else { return Ok(()) };
        let statement = desk.local.sign(&self.key, position);
        // Never signed twice, whatever becomes of it.
        self.last = Some(position);
        if let Err(refusal) = self.shared.with(|replica| replica.publish(statement)) {
            // Nothing of it was sent. The next pass tries again, whole.
            self.unsaid = true;
            findings.push(
                self.finding("StatementRefused", &format!("what it wants to say is not valid: {refusal}")),
            );
            bail!("the own statement is not valid: {refusal}");
        }
        self.unsaid = false;
        self.shown.metrics.statements.inc();
        info!(%position, "stated");
        Ok(())
    }

    async fn documents(&self, view: &View, observed: &Observed, writes: &mut Writes<'_>) {
        if let (Known::Yes(Some(clusterset)), Known::Yes(members)) = (&observed.clusterset, &observed.members)
        {
            self.keeper.documents(view, clusterset, members, writes).await;
        }
    }

    async fn members(&mut self, observed: &Observed, writes: &mut Writes<'_>) -> Option<Duration> {
        let (members, nodes) = (observed.members.get()?, observed.member_nodes.get()?);
        self.keeper.members(self.start.elapsed(), members, nodes, writes).await
    }

    async fn write(
        &mut self,
        desired: &ClusterDesired,
        observed: &Observed,
        now: u64,
        writes: &mut Writes<'_>,
    ) {
        // Remembered whether or not they get written: an address that was given once is not given to another.
        if let Section::Set(slices) = &desired.slices {
            self.planned.slices = slices.set.keys().chain(&slices.keep).cloned().collect();
            writes.attempt("imported EndpointSlices are not written", self.api.apply_slices(slices)).await;
        }
        if let Section::Set(imports) = &desired.imports {
            self.planned.take_imports(imports);
            writes.attempt("ServiceImports are not written", self.api.apply_imports(imports)).await;
        }
        if let Section::Set(statuses) = &desired.statuses {
            let write = self.api.apply_statuses(statuses, now);
            writes.attempt("statuses of ServiceExports are not written", write).await;
        }
        if let (Some(nodes), Some(tunnel_nodes)) = (observed.nodes.get(), observed.tunnel_nodes.get()) {
            for node in tunnel_nodes.keys().filter(|n| !nodes.contains_key(*n)) {
                let delete = self.api.delete_tunnel_node(node);
                writes.attempt("a TunnelNode without a Node stays", delete).await;
            }
        }
    }

    /// Takes down what was imported, but only by the administrator's word.
    async fn not_a_member(
        &mut self,
        view: &View,
        observed: &Observed,
        mut findings: Vec<Finding>,
        writes: &mut Writes<'_>,
    ) {
        let nobody = BTreeMap::new();
        let revoked = self.keeper.is_revoked(view, observed.members.get().unwrap_or(&nobody));
        findings.push(self.finding(
            "NotAMember",
            if revoked {
                "this cluster's grant was revoked by the administrator; what it imported is taken down"
            } else {
                "its own membership is not here or does not verify, and was not revoked: nothing is stated and \
                 nothing changes until it is back; restore state/ from a backup, or join again with a new token"
            },
        ));
        self.teller.show(findings);
        if revoked {
            self.planned = Planned::default();
            let (slices, imports) = (Objects::default(), Objects::default());
            writes.attempt("imported EndpointSlices stay", self.api.apply_slices(&slices)).await;
            writes.attempt("ServiceImports stay", self.api.apply_imports(&imports)).await;
        }
    }

    fn finding(&self, reason: &'static str, message: &str) -> Finding {
        let object = format!("cluster {}", self.cluster);
        Finding { severity: Severity::Error, reason, object, message: message.to_owned() }
    }
}

impl Planned {
    fn take_imports(&mut self, planned: &Objects<ServiceKey, Import>) {
        self.imports.retain(|key, _| planned.keep.contains(key));
        self.imports.extend(planned.set.iter().map(|(key, import)| (key.clone(), import.clone())));
    }

    fn imports(&self, observed: &Observed) -> Known<BTreeMap<ServiceKey, Import>> {
        match &observed.imports {
            Known::No => Known::No,
            Known::Yes(shown) => {
                let mut imports = shown.clone();
                imports.extend(self.imports.iter().map(|(key, import)| (key.clone(), import.clone())));
                Known::Yes(imports)
            }
        }
    }

    fn slices(&self, observed: &Observed) -> Known<BTreeSet<SliceKey>> {
        match &observed.slices {
            Known::No => Known::No,
            Known::Yes(shown) => Known::Yes(shown.keys().chain(&self.slices).cloned().collect()),
        }
    }
}

/// Own nodes as last stated: ranks and tunnel addresses stick to these. What this leader said counts; before it has
/// spoken, what the API keeps. Unknown, and hence nothing is stated, while neither is known.
fn stated(
    observed: &Observed,
    cluster: &ClusterId,
    said: Option<&Arc<OriginState>>,
) -> Known<BTreeMap<NodeName, Endpoint>> {
    if let Some(said) = said {
        let records: Vec<Record> = said
            .records(&Scope::Nodes)
            .into_iter()
            .flat_map(|records| records.iter())
            .map(|(key, body)| Record { key: key.clone(), body: body.clone() })
            .collect();
        return Known::Yes(endpoints(cluster, &records, &mut Vec::new()));
    }
    match &observed.member_nodes {
        Known::No => Known::No,
        Known::Yes(all) => {
            let records = all.get(cluster).into_iter().flat_map(BTreeMap::values);
            Known::Yes(endpoints(cluster, records, &mut Vec::new()))
        }
    }
}

#[cfg(test)]
mod tests;
