//! The controller: while it leads, it alone signs and writes for the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::{Known, Objects, Section};
use tombolo_agent_core::plan;
use tombolo_agent_core::world::ClusterWorld;
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Position, Record, RecordKey, Scope};
use tombolo_proto::trust::{RootChain, SigningKey};
use tombolo_proto::wire::{Documents, MembershipParts};
use tombolo_replica::{Interest, LocalOrigin, OriginState, Replica};
use tracing::{error, info, warn};

use super::lead::Fence;
use super::session::{self, Shared};
use crate::admin::Shown;
use crate::api::{ClusterApi, ClusterSet, Member, Observed};
use crate::observe::member::{endpoints, own_ranges};
use crate::observe::origin::{Origins, Reader};

/// Changes that come together are planned together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// A slow resync heals what no event told.
const RESYNC: Duration = Duration::from_secs(30);
/// After a pass that failed in part.
const RETRY: Duration = Duration::from_secs(1);

/// Why the lead was given up.
pub enum Outcome {
    /// It was lost, or the agent ends.
    Stopped,
    /// Somebody has seen a higher position of this cluster: an epoch above this one is needed.
    EpochNeeded(u64),
}

struct Controller {
    api: Arc<dyn ClusterApi>,
    shown: Arc<Shown>,
    shared: Arc<Shared>,
    key: Arc<SigningKey>,
    cluster: ClusterId,
    epoch: u64,
    fence: Fence,
    sequence: u64,
    local: LocalOrigin,
    published: bool,
    reader: Reader,
}

/// Leads under `epoch`, which was reserved by the write that took the lead, until `stop`.
pub async fn lead(
    api: Arc<dyn ClusterApi>,
    shown: Arc<Shown>,
    epoch: u64,
    fence: Fence,
    stop: CancellationToken,
) -> Result<Outcome> {
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
    let replica = replica(&clusterset, &members)?;
    let local = LocalOrigin::new(replica.set(), cluster.clone());
    let shared = Shared::new(replica);
    let sessions_stop = stop.child_token();
    let _end_sessions = sessions_stop.clone().drop_guard();
    tokio::spawn(session::run(shared.clone(), key.clone(), shown.clone(), sessions_stop));
    let mut controller = Controller {
        api,
        shown,
        shared,
        key,
        cluster,
        epoch,
        fence,
        sequence: 0,
        local,
        published: false,
        reader: Reader::default(),
    };
    let mut changed = controller.shared.changed();
    changed.mark_changed();
    loop {
        changed.borrow_and_update();
        let now = observed.borrow_and_update().clone();
        let wait = match controller.pass(&now).await {
            Ok(Some(outcome)) => return Ok(outcome),
            Ok(None) => RESYNC,
            Err(error) => {
                warn!("the cluster's objects are not all written, retrying: {error:#}");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(Outcome::Stopped),
            result = observed.changed() => result.context("the cluster's API ended")?,
            result = changed.changed() => result.context("the sessions ended")?,
            () = tokio::time::sleep(wait) => {}
        }
        tokio::time::sleep(DEBOUNCE).await;
    }
}

/// Starts from what the cluster's API keeps: documents, but no statement of others; those come from the session.
fn replica(clusterset: &ClusterSet, members: &BTreeMap<ClusterId, Member>) -> Result<Replica> {
    let roots = RootChain::pinned(clusterset.set, &clusterset.roots)
        .context("the set's roots do not verify: join again with a new token")?;
    let nothing = Interest::Namespaces(BTreeSet::new());
    let mut replica = Replica::new(roots, nothing).with_own(clusterset.cluster.clone());
    let documents = Documents {
        roots: Vec::new(),
        brokers: clusterset.brokers.clone(),
        revocations: clusterset.revocations.clone(),
        memberships: members
            .values()
            .map(|m| MembershipParts { grant: m.grant.clone(), bindings: m.bindings.clone() })
            .collect(),
    };
    for refusal in replica.offer_documents(&documents) {
        warn!("kept in the cluster's API, but not believed: {refusal}");
    }
    Ok(replica)
}

impl Controller {
    /// Observes, plans, signs, writes. None: go on.
    async fn pass(&mut self, observed: &Observed) -> Result<Option<Outcome>> {
        if !self.fence.holds() {
            // The Lease's driver stops us in a moment.
            return Ok(None);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.api.stamp_exports(now).await?;
        let (Known::Yes(Some(clusterset)), Known::Yes(members)) = (&observed.clusterset, &observed.members)
        else {
            return Ok(None);
        };
        if let Some(namespaces) = observed.namespaces.get() {
            let interest = Interest::Namespaces(namespaces.clone());
            self.shared.with(|replica| replica.set_interest(interest));
        }
        let ours = own_ranges(clusterset, observed.nodes.get());
        let reader = &mut self.reader;
        let (origins, own_seen, states) = self.shared.with(|replica| {
            let origins = reader.read(replica, &self.cluster, &ours);
            let states: Vec<(ClusterId, Arc<OriginState>)> =
                replica.origins().map(|(c, s)| (c.clone(), s.clone())).collect();
            (origins, replica.own_seen(), states)
        });
        if let Some(seen) = own_seen
            && (seen.epoch > self.epoch || (seen.epoch == self.epoch && seen.sequence > self.sequence))
        {
            warn!(%seen, epoch = self.epoch, "a higher position of this cluster was seen: taking a higher epoch");
            return Ok(Some(Outcome::EpochNeeded(seen.epoch)));
        }
        self.keep_documents(clusterset, members).await?;
        let Origins { own, foreign, silent, mut findings } = origins;
        let Some(own) = own else {
            findings.push(Finding {
                severity: Severity::Error,
                reason: "NotAMember",
                object: format!("cluster {}", self.cluster),
                message:
                    "this cluster's grant was revoked by the administrator; what it imported is taken down"
                        .to_owned(),
            });
            self.show(findings);
            self.api.apply_slices(&Objects::default()).await?;
            self.api.apply_imports(&Objects::default()).await?;
            return Ok(None);
        };
        let world = ClusterWorld {
            cluster: self.cluster.clone(),
            own,
            clusterset: Some(clusterset.clusterset),
            nodes: observed.nodes.clone(),
            tunnel_nodes: observed.tunnel_nodes.clone(),
            stated: stated(observed, &self.cluster),
            namespaces: observed.namespaces.clone(),
            services: observed.services.clone(),
            exports: observed.exports.clone(),
            backends: observed.backends.clone(),
            imports: observed.imports.clone(),
            slices: match &observed.slices {
                Known::Yes(slices) => Known::Yes(slices.keys().cloned().collect()),
                Known::No => Known::No,
            },
            foreign,
            unknown: silent,
        };
        let (desired, planned) = plan::cluster(&world);
        findings.extend(planned);
        self.show(findings);

        if let Section::Set(records) = &desired.records {
            self.publish(records, world.own.membership.grant().serial)?;
        }
        self.keep_members(observed, &states).await?;
        if let Section::Set(slices) = &desired.slices {
            self.api.apply_slices(slices).await?;
        }
        if let Section::Set(imports) = &desired.imports {
            self.api.apply_imports(imports).await?;
        }
        if let Section::Set(statuses) = &desired.statuses {
            self.api.apply_statuses(statuses, now).await?;
        }
        if let (Some(nodes), Some(tunnel_nodes)) = (observed.nodes.get(), observed.tunnel_nodes.get()) {
            for node in tunnel_nodes.keys().filter(|n| !nodes.contains_key(*n)) {
                self.api.delete_tunnel_node(node).await?;
            }
        }
        Ok(None)
    }

    /// Signs and publishes what is to be said, if it is anything new.
    fn publish(&mut self, records: &BTreeMap<Scope, BTreeMap<RecordKey, Record>>, serial: u64) -> Result<()> {
        if !self.local.set_records(records) && self.published {
            return Ok(());
        }
        let generation = self
            .shared
            .with(|replica| replica.membership(&self.cluster).map(|m| m.bindings().len().saturating_sub(1)));
        let generation = u32::try_from(generation.unwrap_or(0)).unwrap_or(u32::MAX);
        if !self.fence.holds() {
            self.published = false;
            return Ok(());
        }
        self.sequence += 1;
        let position = Position { serial, generation, epoch: self.epoch, sequence: self.sequence };
        let statement = self.local.sign(&self.key, position);
        if let Err(refusal) = self.shared.with(|replica| replica.publish(statement)) {
            // Nothing of it was sent. The next pass tries again, whole.
            self.published = false;
            bail!(
                "the own statement is not valid ({refusal}); is the cluster's key the one that was admitted?"
            );
        }
        self.published = true;
        self.shown.metrics.statements.inc();
        info!(%position, scopes = records.len(), "stated");
        Ok(())
    }

    /// Newer roots, brokers and revocations, and members that were revoked.
    async fn keep_documents(
        &self,
        clusterset: &ClusterSet,
        members: &BTreeMap<ClusterId, Member>,
    ) -> Result<()> {
        let (roots, brokers, revocations) = self.shared.with(|replica| {
            (
                replica.roots().envelopes().cloned().collect::<Vec<_>>(),
                replica.brokers().map(|b| b.envelope().clone()),
                replica.revocations().cloned(),
            )
        });
        let revocations_envelope = revocations.as_ref().map(|r| r.envelope().clone());
        let new = ClusterSet { roots, brokers, revocations: revocations_envelope, ..clusterset.clone() };
        if new != *clusterset
            && let Some(old) = self.api.clusterset().await?
        {
            let new = ClusterSet {
                roots: new.roots,
                brokers: new.brokers,
                revocations: new.revocations,
                ..old.value.clone()
            };
            if new != old.value {
                self.api.write_clusterset(&new, Some(&old.version)).await?;
                info!("the set's documents changed");
            }
        }
        for (cluster, member) in members {
            let grant = tombolo_proto::wire::decode_grant(&member.grant.payload);
            let revoked = match (&grant, &revocations) {
                (Ok(grant), Some(list)) => list.revokes(grant),
                _ => false,
            };
            let newer = self.shared.with(|replica| replica.membership(cluster).is_some());
            if revoked && !newer && *cluster != self.cluster {
                info!(%cluster, "revoked: its Member is removed");
                self.api.delete_member(cluster).await?;
            }
        }
        Ok(())
    }

    /// Keeps what was verified of every cluster, rewritten only when its membership or its nodes change.
    async fn keep_members(
        &self,
        observed: &Observed,
        states: &[(ClusterId, Arc<OriginState>)],
    ) -> Result<()> {
        let (Some(members), Some(member_nodes)) = (observed.members.get(), observed.member_nodes.get())
        else {
            return Ok(());
        };
        // The own state is younger than `states` if something was just published.
        let own = self.shared.with(|replica| replica.origin(&self.cluster).cloned());
        let others = states.iter().filter(|(c, _)| *c != self.cluster).map(|(c, s)| (c, s));
        for (cluster, state) in own.iter().map(|s| (&self.cluster, s)).chain(others) {
            let membership =
                self.shared.with(|replica| replica.membership_of(cluster, state.position().serial).cloned());
            let Some(membership) = membership else { continue };
            let nodes: BTreeMap<RecordKey, Record> = state
                .records(&Scope::Nodes)
                .into_iter()
                .flat_map(|records| records.iter())
                .map(|(key, body)| (key.clone(), Record { key: key.clone(), body: body.clone() }))
                .collect();
            let member = Member {
                grant: membership.grant().envelope().clone(),
                bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
                spoken: None,
                statement: Some(state.statement().envelope().clone()),
                namespaces: Some(state.namespaces_hash()),
            };
            let same = members.get(cluster).is_some_and(|old| {
                old.grant == member.grant && old.bindings == member.bindings && old.statement.is_some()
            });
            let empty = BTreeMap::new();
            if same && *member_nodes.get(cluster).unwrap_or(&empty) == nodes {
                continue;
            }
            self.api.write_member(cluster, &member, &nodes).await?;
            info!(%cluster, nodes = nodes.len(), "verified and kept");
        }
        Ok(())
    }

    fn show(&self, mut findings: Vec<Finding>) {
        findings.sort();
        findings.dedup();
        let old = self.shown.cluster_findings.load();
        for finding in findings.iter().filter(|f| !old.contains(f)) {
            match finding.severity {
                Severity::Error => {
                    error!(reason = finding.reason, object = %finding.object, "{}", finding.message)
                }
                Severity::Warning => {
                    warn!(reason = finding.reason, object = %finding.object, "{}", finding.message)
                }
            }
        }
        self.shown.cluster_findings.store(Arc::new(findings));
    }
}

/// Own nodes as the API keeps them: ranks and tunnel addresses stick to these. Unknown, and hence nothing is
/// stated, while they are.
fn stated(observed: &Observed, cluster: &ClusterId) -> Known<BTreeMap<NodeName, Endpoint>> {
    match &observed.member_nodes {
        Known::No => Known::No,
        Known::Yes(all) => {
            let records = all.get(cluster).into_iter().flat_map(BTreeMap::values);
            Known::Yes(endpoints(cluster, records, &mut Vec::new()))
        }
    }
}
