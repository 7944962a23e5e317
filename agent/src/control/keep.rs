//! What the controller keeps in the cluster's API: the set's documents, and every member as it was verified.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tombolo_agent_core::keep::{self, Kept, Rewrite};
use tombolo_agent_core::plan::piece::OwnPlan;
use tombolo_agent_core::shelf::Shelf;
use tombolo_proto::model::{ClusterId, Record, RecordKey, Scope};
use tombolo_proto::trust::{Grant, Membership, RootChain, root_hash};
use tombolo_proto::wire::{Documents, MembershipParts, decode_grant, decode_statement};
use tombolo_replica::{Interest, OriginState, Quota, Replica};
use tracing::{info, warn};

use super::cluster::queue::Credit;
use super::lead::Fence;
use super::session::Shared;
use crate::api::{ClusterApi, ClusterSet, Member};
use crate::observe::origin::View;

/// Nodes that one cluster may state: every node of every cluster judges each of them. It states its gateways, and at
/// most 500 meshed nodes.
const MAX_NODES: usize = 600;

/// Writing one node of another cluster is charged at most so much.
const NODE: Duration = Duration::from_millis(2);

/// Writes of one pass: every one is tried, the first problem is told. None is begun once the lead is lost.
pub(super) struct Writes<'a> {
    fence: &'a Fence,
    first: Option<anyhow::Error>,
}

impl<'a> Writes<'a> {
    /// While `fence` holds.
    pub(super) fn new(fence: &'a Fence) -> Self {
        Self { fence, first: None }
    }

    /// Tries one; None if it failed or the lead is lost.
    pub(super) async fn attempt<T>(
        &mut self,
        what: &'static str,
        write: impl Future<Output = Result<T, crate::api::Error>>,
    ) -> Option<T> {
        if !self.fence.holds() {
            return None;
        }
        match write.await.context(what) {
            Ok(value) => Some(value),
            Err(error) => {
                match &self.first {
                    None => self.first = Some(error),
                    Some(_) => warn!("{error:#}"),
                }
                None
            }
        }
    }

    /// The first problem.
    pub(super) fn outcome(self) -> Result<()> {
        self.first.map_or(Ok(()), Err)
    }
}

/// Keeps documents and members.
pub(super) struct Keeper {
    api: Arc<dyn ClusterApi>,
    shared: Arc<Shared>,
    cluster: ClusterId,
    /// What was offered to the replica last.
    heard: Option<(ClusterSet, BTreeMap<ClusterId, Member>)>,
    /// The newest grant of the own cluster that was ever verified.
    own: Option<Grant>,
    /// When each Member was written, since the lead was taken.
    written: BTreeMap<ClusterId, Duration>,
    /// Time that writing other clusters' Members may take.
    credits: BTreeMap<ClusterId, Credit>,
}

impl Keeper {
    /// Nothing heard yet.
    pub(super) fn new(api: Arc<dyn ClusterApi>, shared: Arc<Shared>, cluster: ClusterId) -> Self {
        Self {
            api,
            shared,
            cluster,
            heard: None,
            own: None,
            written: BTreeMap::new(),
            credits: BTreeMap::new(),
        }
    }

    /// Takes what is kept, by whomever it was written: `tombolo join` brings newer grants while this runs. What was
    /// verified of a cluster once is where it never goes back from.
    pub(super) fn hear(&mut self, clusterset: &ClusterSet, members: &BTreeMap<ClusterId, Member>) {
        if self.heard.as_ref().is_some_and(|(set, all)| set == clusterset && all == members) {
            return;
        }
        let last = self.heard.take();
        let news = |cluster: &ClusterId, member: &Member| {
            last.as_ref().and_then(|(_, all)| all.get(cluster)) != Some(member)
        };
        let new: Vec<(&ClusterId, &Member)> = members.iter().filter(|(c, m)| news(c, m)).collect();
        let mut documents = documents_of(clusterset);
        documents.memberships = new.iter().flat_map(|(_, member)| parts_of(member)).collect();
        self.shared.with(|replica| {
            for refusal in replica.offer_documents(&documents) {
                warn!("kept in the cluster's API, but not believed: {refusal}");
            }
            for (cluster, member) in &new {
                let Some(statement) = &member.statement else { continue };
                let held = replica.origin(cluster).is_some_and(|s| s.statement().envelope() == statement);
                if !held && let Err(refusal) = replica.set_floor(statement) {
                    warn!("kept in the cluster's API, but not believed: {refusal}");
                }
            }
            if let Some(membership) = replica.membership(&self.cluster) {
                self.own = Some((**membership.grant()).clone());
            }
        });
        self.heard = Some((clusterset.clone(), members.clone()));
    }

    /// Whether the administrator ended the own membership. If it merely is not there, or does not verify, something
    /// is damaged, which ends nothing.
    pub(super) fn is_revoked(&self, view: &View, members: &BTreeMap<ClusterId, Member>) -> bool {
        let stored = members
            .get(&self.cluster)
            .and_then(|member| self.shared.with(|replica| replica.roots().grant(&member.grant)).ok())
            .map(|grant| (*grant).clone())
            .filter(|grant| grant.cluster == self.cluster);
        let newest = stored.into_iter().chain(self.own.clone()).max_by_key(|grant| grant.serial);
        newest.is_some_and(|grant| view.revokes(&grant))
    }

    /// Newer roots, brokers and revocations, and members that were revoked.
    pub(super) async fn documents(
        &self,
        view: &View,
        clusterset: &ClusterSet,
        members: &BTreeMap<ClusterId, Member>,
        writes: &mut Writes<'_>,
    ) {
        if self.shared.with(|replica| newer(replica, clusterset)).is_some()
            && let Some(Some(old)) = writes.attempt("the set is not read", self.api.clusterset()).await
            && let Some(new) = self.shared.with(|replica| newer(replica, &old.value))
        {
            let write = self.api.write_clusterset(&new, Some(&old.version));
            if writes.attempt("the set's documents are not kept", write).await.is_some() {
                info!("the set's documents changed");
            }
        }
        for (cluster, member) in members {
            let revoked = decode_grant(&member.grant.payload).is_ok_and(|grant| view.revokes(&grant));
            if revoked && view.newest(cluster).is_none() && *cluster != self.cluster {
                let deleted = writes.attempt("a Member stays", self.api.delete_member(cluster)).await;
                if deleted.is_some() {
                    info!(%cluster, "revoked: its Member is removed");
                }
            }
        }
    }

    /// What was verified of every cluster that has spoken, and beside what the own one states, as in `own`, its other
    /// nodes. When to look again, if one is to be written later.
    pub(super) async fn members(
        &mut self,
        now: Duration,
        own_plan: Option<&OwnPlan>,
        members: &BTreeMap<ClusterId, Member>,
        member_nodes: &BTreeMap<ClusterId, BTreeMap<RecordKey, Record>>,
        writes: &mut Writes<'_>,
    ) -> Option<Duration> {
        let (view, floors) = self.shared.with(|replica| {
            let floors: BTreeMap<_, _> =
                replica.origins().map(|(c, _)| (c.clone(), replica.floor(c))).collect();
            (View::of(replica), floors)
        });
        self.written.retain(|cluster, _| view.states.contains_key(cluster));
        self.credits.retain(|cluster, _| view.states.contains_key(cluster));
        let empty = BTreeMap::new();
        let mut due = None;
        // Who has not spoken yet owns its ranges all the same: nodes must know that nothing goes there in clear.
        for cluster in view.clusters().into_iter().filter(|cluster| !view.states.contains_key(*cluster)) {
            let Some(newest) = view.newest(cluster) else { continue };
            let MembershipParts { grant, bindings } = parts(newest);
            let member = Member { grant, bindings, spoken: None, statement: None, namespaces: None };
            // What it said once is kept until it speaks again.
            let keeps = |old: &Member| old.statement.is_some() || *old == member;
            if *cluster == self.cluster || members.get(cluster).is_some_and(keeps) {
                continue;
            }
            let write = self.api.write_member(cluster, &member, &empty);
            if let Some(applied) = writes.attempt("a Member is not kept", write).await
                && !applied.is_nothing()
            {
                info!(%cluster, "a member that has not spoken yet");
            }
        }
        // The own one first; of others nobody takes more than a share of the time.
        let own = view.states.get_key_value(&self.cluster);
        let others = view.states.iter().filter(|(cluster, _)| **cluster != self.cluster);
        for (cluster, state) in own.into_iter().chain(others) {
            if let Some(credit) = self.credits.get(cluster).filter(|credit| credit.due() > now) {
                due = Some(due.map_or(credit.due(), |due: Duration| due.min(credit.due())));
                continue;
            }
            let mut unstated = &empty;
            if let Some(own) = own_plan.filter(|_| *cluster == self.cluster) {
                // Planned anew and not said yet, or the reverse: a node that becomes a gateway, or is one no longer,
                // would be in neither part. The other half comes in a moment.
                if !is_said(own, state) {
                    continue;
                }
                unstated = &own.unstated;
            }
            let Some(member) = member_of(&view, cluster, state) else { continue };
            let stored_nodes = member_nodes.get(cluster).unwrap_or(&empty);
            let written = self.written.get(cluster).copied();
            let kept =
                members.get(cluster).map(|old| kept(old, &member, (state, unstated), stored_nodes, written));
            let floor = floors.get(cluster).copied().flatten();
            match keep::rewrite(kept.as_ref(), state.position(), floor, now) {
                Rewrite::No => continue,
                Rewrite::At(time) => {
                    due = Some(due.map_or(time, |due: Duration| due.min(time)));
                    continue;
                }
                Rewrite::Now => {}
            }
            let nodes: BTreeMap<RecordKey, Record> = state
                .records(&Scope::Nodes)
                .into_iter()
                .flat_map(|records| records.iter())
                .map(|(key, body)| (key.clone(), Record { key: key.clone(), body: body.clone() }))
                .chain(unstated.iter().map(|(key, record)| (key.clone(), record.clone())))
                .collect();
            let begun = Instant::now();
            let write = self.api.write_member(cluster, &member, &nodes);
            let written = writes.attempt("a Member is not kept", write).await;
            let used = begun.elapsed();
            if *cluster != self.cluster {
                // On a machine that is busy with something else all takes long, which is nobody's fault.
                let most = NODE * (u32::try_from(nodes.len()).unwrap_or(u32::MAX - 1) + 1);
                let credit = self.credits.entry(cluster.clone()).or_insert_with(Credit::new);
                credit.charge(now + used, used.min(most));
            }
            let Some(applied) = written else { continue };
            self.written.insert(cluster.clone(), now);
            if !applied.is_nothing() {
                info!(%cluster, position = %state.position(), nodes = nodes.len(), "verified and kept");
            }
        }
        due
    }
}

fn documents_of(clusterset: &ClusterSet) -> Documents {
    Documents {
        roots: clusterset.roots.clone(),
        brokers: clusterset.brokers.clone(),
        revocations: clusterset.revocations.clone(),
        memberships: Vec::new(),
    }
}

fn parts_of(member: &Member) -> impl Iterator<Item = MembershipParts> {
    let newest = MembershipParts { grant: member.grant.clone(), bindings: member.bindings.clone() };
    member.spoken.clone().into_iter().chain([newest])
}

fn parts(membership: &Membership) -> MembershipParts {
    MembershipParts {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
    }
}

/// The set's object with whatever the replica knows better; None if that is nothing. A document in it that does not
/// verify is worse than any that does.
fn newer(replica: &Replica, old: &ClusterSet) -> Option<ClusterSet> {
    let mut new = old.clone();
    let held = replica.roots();
    let version = |envelope: &_| held.brokers(envelope).ok().map(|list| list.version);
    if let Some(list) = replica.brokers()
        && old.brokers.as_ref().and_then(version) < Some(list.version)
    {
        new.brokers = Some(list.envelope().clone());
    }
    let version = |envelope: &_| held.revocations(envelope).ok().map(|list| list.version);
    if let Some(list) = replica.revocations()
        && old.revocations.as_ref().and_then(version) < Some(list.version)
    {
        new.revocations = Some(list.envelope().clone());
    }
    let roots: Vec<_> = held.envelopes().cloned().collect();
    let stored = RootChain::pinned(old.set, &old.roots);
    if stored.map_or(0, |chain| chain.current().version) < held.current().version {
        new.roots = roots;
    }
    (new != *old).then_some(new)
}

/// The object of a cluster: its newest membership, and the older one if it still speaks under that.
fn member_of(view: &View, cluster: &ClusterId, state: &OriginState) -> Option<Member> {
    let newest = view.newest(cluster)?;
    let serial = state.position().serial;
    let spoken =
        view.membership(cluster, serial).filter(|spoken| spoken.grant().serial != newest.grant().serial);
    let MembershipParts { grant, bindings } = parts(newest);
    Some(Member {
        grant,
        bindings,
        spoken: spoken.map(parts),
        statement: Some(state.statement().envelope().clone()),
        namespaces: Some(state.namespaces_hash()),
    })
}

/// Whether what the own cluster said of its nodes is what it plans to say.
fn is_said(own: &OwnPlan, state: &OriginState) -> bool {
    let planned = own.records.get(&Scope::Nodes);
    let said = state.records(&Scope::Nodes);
    planned.map_or(0, Shelf::len) == said.map_or(0, |records| records.len())
        && planned
            .into_iter()
            .flatten()
            .all(|(key, record)| said.and_then(|said| said.get(key)) == Some(&record.body))
}

/// What is kept, against what is held. Whether the kept statement is signed as it should be was seen when it was
/// heard.
fn kept(
    old: &Member,
    new: &Member,
    (state, unstated): (&OriginState, &BTreeMap<RecordKey, Record>),
    stored: &BTreeMap<RecordKey, Record>,
    written: Option<Duration>,
) -> Kept {
    let held = state.records(&Scope::Nodes);
    let nodes = stored.len() == held.map_or(0, |records| records.len()) + unstated.len()
        && unstated.iter().all(|(k, record)| stored.get(k) == Some(record))
        && held
            .into_iter()
            .flat_map(|r| r.iter())
            .all(|(k, body)| stored.get(k).is_some_and(|r| r.body == *body));
    let statement = old.statement.as_ref().and_then(|s| decode_statement(&s.payload).ok());
    let leaf = state.leaves().get(&Scope::Nodes);
    let whole = nodes
        && match (&statement, &old.namespaces) {
            (Some(statement), Some(namespaces)) => root_hash(leaf, namespaces) == statement.root,
            _ => false,
        };
    Kept {
        memberships: old.grant == new.grant && old.bindings == new.bindings && old.spoken == new.spoken,
        nodes,
        whole,
        position: statement.map(|statement| statement.position),
        written,
    }
}

/// A replica that knows the set, with bounds for what a member takes of another.
pub(super) fn replica(clusterset: &ClusterSet) -> Result<Replica> {
    let Ok(roots) = RootChain::pinned(clusterset.set, &clusterset.roots) else {
        bail!(
            "the set's roots in the cluster's API do not verify: restore state/ from a backup, or join again with a new token"
        );
    };
    let nothing = Interest::Namespaces(Default::default());
    let quota = Quota { nodes: MAX_NODES, records: 40_000, bytes: 16 * 1024 * 1024, ..Quota::default() };
    Ok(Replica::new(roots, nothing).with_own(clusterset.cluster.clone()).with_quota(quota))
}
