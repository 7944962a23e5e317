//! The controller: while it leads, it alone signs and writes for the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::bucket::Bucket;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::{Known, Objects};
use tombolo_agent_core::object::ServiceKey;
use tombolo_agent_core::plan::piece::{self, OwnPlan};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::speak::{Turn, Voice};
use tombolo_agent_core::world::ClusterWorld;
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Position, Prefix, Record, Scope};
use tombolo_proto::trust::SigningKey;
use tombolo_replica::{Interest, LocalOrigin, OriginState};
use tracing::{info, warn};

use self::desk::Said;
use self::hands::Hands;
use super::keep::{self, Keeper, Writes};
use super::lead::Fence;
use super::session::{self, Shared};
use super::tell;
use crate::admin::Shown;
use crate::api::{ClusterApi, ClusterSet, Observed};
use crate::observe::member::{endpoints, own_ranges};
use crate::observe::origin::{Frame, View};
use crate::tell::Part;

mod desk;
mod hands;
pub(super) mod queue;
mod standing;

/// Changes that come together are planned together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// However long a pass takes, the next begins so long after it at the latest.
const BRAKE: Duration = Duration::from_millis(500);
/// A slow resync heals what no event told.
const RESYNC: Duration = Duration::from_secs(30);
/// So many statements are made at once, and then one so often: half of what brokers take of a member (their `Pace`), so
/// that nothing ever queues before one. What changes meanwhile is said together.
const STATEMENTS: u32 = 50;
const STATEMENT: Duration = Duration::from_millis(100);
/// After a pass that failed in part.
const RETRY: Duration = Duration::from_secs(1);

/// ClusterProperty with the own cluster's id.
const CLUSTER_PROPERTY: &str = "cluster.clusterset.k8s.io";
/// ClusterProperty with the set's id; there only while the cluster is a member.
const SET_PROPERTY: &str = "clusterset.k8s.io";

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
    key: Arc<SigningKey>,
    cluster: ClusterId,
    epoch: u64,
    fence: Fence,
    start: Instant,
    /// Position of the last statement.
    last: Option<Position>,
    /// Something is planned that is not stated yet.
    unsaid: bool,
    /// How often statements are made.
    bucket: Bucket,
    /// In this pass there was something to say that has to wait so long.
    held: Option<Duration>,
    /// Own ranges as last known.
    ours: Option<BTreeSet<Prefix>>,
    /// What was said last, hashed, so that only what changed is hashed anew. There between passes.
    local: Option<LocalOrigin>,
    /// What the own part was planned from, and what it came to.
    planned: Option<(Input, Arc<OwnPlan>)>,
    /// To the hands.
    said: watch::Sender<Option<Arc<Said>>>,
}

/// What the cluster's own words hang on.
struct Input {
    frame: Arc<Frame>,
    observed: Arc<Observed>,
    stated: Known<BTreeMap<NodeName, Endpoint>>,
}

impl Input {
    fn is(&self, other: &Self) -> bool {
        let (old, new) = (&self.observed, &other.observed);
        let same = Arc::ptr_eq(old, new)
            || (old.nodes == new.nodes
                && old.tunnel_nodes == new.tunnel_nodes
                && old.namespaces == new.namespaces
                && old.exports == new.exports
                && is_same_exported(&old.services, &new.services, &new.exports)
                && old.backends == new.backends
                && old.clusterset == new.clusterset);
        same && self.frame.own == other.frame.own && self.stated == other.stated
    }
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
        bucket: Bucket::new(STATEMENTS, STATEMENT),
        held: None,
        ours: None,
        local: Some(local),
        planned: None,
        said: watch::Sender::new(None),
    };
    // Before any session: who listens must know below which positions nothing counts.
    controller.keeper.hear(&clusterset, &members);
    let sessions_stop = stop.child_token();
    let _end_sessions = sessions_stop.clone().drop_guard();
    let (shared, key, shown) = (controller.shared.clone(), controller.key.clone(), controller.shown.clone());
    let mut sessions = tokio::spawn(session::run(shared, key, shown, sessions_stop.clone()));
    let hands = Hands {
        api: controller.api.clone(),
        shown: controller.shown.clone(),
        shared: controller.shared.clone(),
        cluster: controller.cluster.clone(),
        fence: controller.fence.clone(),
        said: controller.said.subscribe(),
    };
    let mut hands = Aborting(tokio::spawn(hands::run(hands, sessions_stop)));
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
            ended = &mut hands.0 => {
                ended.context("writing imports failed")??;
                bail!("writing imports ended");
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

/// Never outlives the lead.
struct Aborting<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Aborting<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What comes after a pass.
enum Next {
    End(Outcome),
    /// Look again after this at the latest.
    Look(Duration),
}

impl Controller {
    /// Observes, plans, signs, writes. What fails does not keep the rest from being done.
    async fn pass(&mut self, observed: &Arc<Observed>) -> Result<Next> {
        if !self.fence.holds() {
            // The Lease's driver stops us in a moment.
            return Ok(Next::Look(RESYNC));
        }
        let (Known::Yes(Some(clusterset)), Known::Yes(members)) = (&observed.clusterset, &observed.members)
        else {
            return Ok(Next::Look(RESYNC));
        };
        self.held = None;
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
        let frame = Arc::new(Frame::of(&view, &self.cluster, &ours));
        findings.extend(frame.findings.iter().cloned());
        if frame.own.is_none() {
            self.planned = None;
            self.said.send_replace(None);
            self.documents(&view, observed, &mut writes).await;
            self.not_a_member(&view, observed, findings, &mut writes).await;
            writes.outcome()?;
            return Ok(Next::Look(RESYNC));
        }
        if clusterset.leaving {
            self.leave(turn, &view, observed, findings, &mut writes).await?;
            writes.outcome()?;
            return Ok(Next::Look(self.held.unwrap_or(RESYNC)));
        }
        let own = self.own(&view, observed, clusterset, frame.clone()).await?;
        // Before anything is written: what is said must not wait for disks.
        let said = match (&own, turn) {
            (Some(_), Some(turn)) => self.publish(turn, &mut findings),
            _ => Ok(()),
        };
        findings.extend(own.iter().flat_map(|own| own.findings.iter().cloned()));
        self.shown.tell(Part::Voice, findings);
        if let Some(own) = own {
            self.hand_on(frame, clusterset, own);
        }
        self.documents(&view, observed, &mut writes).await;
        let properties = BTreeMap::from([
            (CLUSTER_PROPERTY, self.cluster.to_string()),
            (SET_PROPERTY, clusterset.set.to_string()),
        ]);
        self.properties(&properties, &mut writes).await;
        if let (Some(nodes), Some(tunnel_nodes)) = (observed.nodes.get(), observed.tunnel_nodes.get()) {
            for node in tunnel_nodes.keys().filter(|n| !nodes.contains_key(*n)) {
                let delete = self.api.delete_tunnel_node(node);
                writes.attempt("a TunnelNode without a Node stays", delete).await;
            }
        }
        said?;
        writes.outcome()?;
        Ok(Next::Look(self.held.unwrap_or(RESYNC)))
    }

    /// Lets the hands know what the services hang on.
    fn hand_on(&self, frame: Arc<Frame>, clusterset: &ClusterSet, own: Arc<OwnPlan>) {
        let new = Said { frame, ranges: clusterset.clusterset, topology: clusterset.topology, own };
        self.said.send_if_modified(|old| {
            let same = old.as_ref().is_some_and(|old| {
                old.frame == new.frame
                    && old.ranges == new.ranges
                    && old.topology == new.topology
                    && Arc::ptr_eq(&old.own, &new.own)
            });
            if !same {
                *old = Some(Arc::new(new));
            }
            !same
        });
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
                 restore the newest Secret, or run `tombolo join --new-key` with a new token (at once, if nobody here \
                 has rotated the key: then somebody else has it)",
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

    /// Plans and hashes what the cluster says of itself, if anything of it may be new, where it holds up nobody.
    /// None while something is unknown.
    async fn own(
        &mut self,
        view: &View,
        observed: &Arc<Observed>,
        clusterset: &ClusterSet,
        frame: Arc<Frame>,
    ) -> Result<Option<Arc<OwnPlan>>> {
        let Some(own) = frame.own.clone() else { return Ok(None) };
        let planned = self.planned.as_ref().map(|(_, own)| &**own);
        let stated = stated(observed, &self.cluster, view.states.get(&self.cluster), planned);
        let input = Input { frame, observed: observed.clone(), stated };
        if let Some((old, planned)) = &mut self.planned
            && old.is(&input)
        {
            // Equal, and compared at once the next time.
            *old = input;
            return Ok(Some(planned.clone()));
        }
        let (cluster, ranges, topology) = (self.cluster.clone(), clusterset.clusterset, clusterset.topology);
        let mut local = self.local.take().ok_or_else(|| anyhow!("the last plan was never finished"))?;
        let before = self.planned.as_ref().map(|(_, own)| own.clone());
        let work = move || {
            let shown = &input.observed;
            let world = ClusterWorld {
                cluster,
                own,
                clusterset: ranges,
                topology,
                nodes: shown.nodes.clone(),
                tunnel_nodes: shown.tunnel_nodes.clone(),
                stated: input.stated.clone(),
                namespaces: shown.namespaces.clone(),
                services: shown.services.clone(),
                exports: shown.exports.clone(),
                backends: shown.backends.clone(),
                imports: Known::No,
                slices: Known::No,
                derived: Known::No,
                service_families: BTreeSet::new(),
                foreign: BTreeMap::new(),
                unknown: BTreeSet::new(),
            };
            let own = piece::own(&world, before.as_deref()).map(Arc::new);
            let changed = own.as_ref().is_some_and(|own| local.set_records(&own.records));
            (local, input, own, changed)
        };
        let (local, input, own, changed) =
            tokio::task::spawn_blocking(work).await.context("the plan failed")?;
        self.local = Some(local);
        self.unsaid |= changed;
        self.planned = own.clone().map(|own| (input, own));
        Ok(own)
    }

    /// Signs and publishes what is to be said, if it is anything new or was not said under this membership yet.
    fn publish(&mut self, position: Position, findings: &mut Vec<Finding>) -> Result<()> {
        let voice = Voice { epoch: self.epoch, last: self.last, seen: None };
        if !self.unsaid && voice.is_under(position.serial, position.generation) {
            return Ok(());
        }
        let Some(local) = self.local.as_ref().filter(|_| self.fence.holds()) else { return Ok(()) };
        let now = self.start.elapsed();
        if self.bucket.take(now).is_none() {
            self.unsaid = true;
            self.held = Some(self.bucket.wait(now));
            return Ok(());
        }
        let statement = local.sign(&self.key, position);
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

    /// Says, as others than us may ask, which cluster this is, and of which set (KEP-2149).
    async fn properties(&self, properties: &BTreeMap<&'static str, String>, writes: &mut Writes<'_>) {
        let write = self.api.apply_properties(properties);
        writes.attempt("ClusterProperties are not written", write).await;
    }

    async fn documents(&self, view: &View, observed: &Observed, writes: &mut Writes<'_>) {
        if let (Known::Yes(Some(clusterset)), Known::Yes(members)) = (&observed.clusterset, &observed.members)
        {
            self.keeper.documents(view, clusterset, members, writes).await;
        }
    }

    /// Says nothing any more, by a statement as good as any other, and takes down what was imported.
    async fn leave(
        &mut self,
        turn: Option<Position>,
        view: &View,
        observed: &Observed,
        mut findings: Vec<Finding>,
        writes: &mut Writes<'_>,
    ) -> Result<()> {
        self.planned = None;
        self.said.send_replace(None);
        if let Some(local) = &mut self.local {
            self.unsaid |= local.set_records::<BTreeMap<_, _>>([]);
        }
        let said = turn.map_or(Ok(()), |turn| self.publish(turn, &mut findings));
        self.shown.tell(Part::Voice, findings);
        said?;
        if let (Some(members), Some(nodes)) = (observed.members.get(), observed.member_nodes.get()) {
            self.keeper.members(self.start.elapsed(), None, members, nodes, writes).await;
        }
        let (slices, imports) = (Objects::default(), Objects::default());
        writes.attempt("imported EndpointSlices stay", self.api.apply_slices(&slices)).await;
        writes.attempt("ServiceImports stay", self.api.apply_imports(&imports)).await;
        self.properties(&BTreeMap::new(), writes).await;
        self.documents(view, observed, writes).await;
        Ok(())
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
        self.shown.tell(Part::Voice, findings);
        if revoked {
            let (slices, imports) = (Objects::default(), Objects::default());
            writes.attempt("imported EndpointSlices stay", self.api.apply_slices(&slices)).await;
            writes.attempt("ServiceImports stay", self.api.apply_imports(&imports)).await;
            self.properties(&BTreeMap::new(), writes).await;
        }
    }

    fn finding(&self, reason: &'static str, message: &str) -> Finding {
        let object = format!("cluster {}", self.cluster);
        Finding { severity: Severity::Error, reason, object, message: message.to_owned() }
    }
}

/// Whether no exported service is another: of all others nothing is said, and those that carry imports come by the thousand.
fn is_same_exported<V: PartialEq, E>(
    old: &Known<Shelf<ServiceKey, V>>,
    new: &Known<Shelf<ServiceKey, V>>,
    exports: &Known<Shelf<ServiceKey, E>>,
) -> bool {
    match (old, new, exports) {
        (Known::Yes(old), Known::Yes(new), Known::Yes(exports)) => {
            new.changed(old).into_iter().all(|key| !exports.contains_key(key))
        }
        _ => old == new,
    }
}

/// Own nodes as they are: ranks and tunnel addresses stick to these. What this leader planned last counts; before it has
/// planned, what the API keeps, and above that what it said. Unknown, and hence nothing is stated, while that is.
fn stated(
    observed: &Observed,
    cluster: &ClusterId,
    said: Option<&Arc<OriginState>>,
    planned: Option<&OwnPlan>,
) -> Known<BTreeMap<NodeName, Endpoint>> {
    if let Some(own) = planned {
        return Known::Yes(own.nodes.clone());
    }
    let Some(all) = observed.member_nodes.get() else { return Known::No };
    let kept = all.get(cluster).into_iter().flat_map(BTreeMap::values);
    let mut nodes = endpoints(cluster, kept, &mut Vec::new());
    let said = said.and_then(|said| said.records(&Scope::Nodes)).into_iter().flat_map(|said| said.iter());
    let said: Vec<Record> = said.map(|(key, body)| Record { key: key.clone(), body: body.clone() }).collect();
    nodes.extend(endpoints(cluster, &said, &mut Vec::new()));
    Known::Yes(nodes)
}

#[cfg(test)]
mod tests;
