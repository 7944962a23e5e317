//! What is known of every cluster.

use std::collections::BTreeMap;
use std::sync::Arc;

use tombolo_proto::model::{ClusterId, Position, Record, Scope};
use tombolo_proto::trust::{
    Brokers, Digest, Envelope, Membership, Revocations, RootChain, ScopeDigest, SetId, Statement, Verified,
};
use tombolo_proto::wire::{Documents, MembershipParts};

use crate::document::SetDocuments;
use crate::history::{History, Touched};
use crate::local::LocalStatement;
use crate::origin::{Candidate, OriginState};
use crate::quota::{Interest, Quota};
use crate::records::ScopeRecords;
use crate::refusal::{Object, Reason, Refusal};

/// Something that may be different since a version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Roots, brokers, revocations or memberships.
    Documents,
    /// Which namespaces are wanted.
    Interest,
    /// What a cluster says; it may be gone by revocation.
    Origin(ClusterId),
}

/// Verified documents and, for each cluster, its newest statement with the records of the wanted scopes.
///
/// A position never goes back; what is held goes only by a newer signed statement, by revocation, or because
/// the interest was narrowed.
#[derive(Debug)]
pub struct Replica {
    documents: SetDocuments,
    own: Option<ClusterId>,
    own_seen: Option<Position>,
    interest: Interest,
    quota: Quota,
    origins: BTreeMap<ClusterId, Origin>,
    floors: BTreeMap<ClusterId, Verified<Statement>>,
    version: u64,
    changes: BTreeMap<u64, Change>,
    changed_at: BTreeMap<Change, u64>,
    findings: BTreeMap<Object, Reason>,
}

#[derive(Debug)]
struct Origin {
    state: Arc<OriginState>,
    history: History,
}

/// Findings that are kept.
const MAX_FINDINGS: usize = 256;

impl Replica {
    /// Knows the set and nothing else.
    pub fn new(roots: RootChain, interest: Interest) -> Self {
        Self {
            documents: SetDocuments::new(roots),
            own: None,
            own_seen: None,
            interest,
            quota: Quota::default(),
            origins: BTreeMap::new(),
            floors: BTreeMap::new(),
            version: 0,
            changes: BTreeMap::new(),
            changed_at: BTreeMap::new(),
            findings: BTreeMap::new(),
        }
    }

    /// For a member: what `cluster` says comes from [`Self::publish`] alone, and is held whole.
    #[must_use]
    pub fn with_own(mut self, cluster: ClusterId) -> Self {
        self.own = Some(cluster);
        self
    }

    /// With other bounds.
    #[must_use]
    pub fn with_quota(mut self, quota: Quota) -> Self {
        self.quota = quota;
        self
    }

    /// Takes documents from anywhere; each proves itself. What is not new is passed over, what is not to be
    /// believed is returned.
    pub fn offer_documents(&mut self, documents: &Documents) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut new = false;
        let mut mended = Vec::new();
        let mut note = |object: Object, result: Result<bool, Refusal>| match result {
            Ok(true) => {
                new = true;
                mended.push(object);
            }
            Ok(false) => {}
            Err(refusal) => refusals.push(refusal),
        };
        for envelope in &documents.roots {
            note(Object::Roots, self.documents.offer_root(envelope));
        }
        if let Some(envelope) = &documents.brokers {
            note(Object::Brokers, self.documents.offer_brokers(envelope));
        }
        if let Some(envelope) = &documents.revocations {
            note(Object::Revocations, self.documents.offer_revocations(envelope));
        }
        for parts in &documents.memberships {
            let origins = &self.origins;
            let spoken = |cluster: &ClusterId| origins.get(cluster).map(|o| o.state.position().serial);
            let max = self.quota.clusters;
            let offered = self.documents.offer_membership(parts, spoken, max);
            let cluster = offered.as_ref().ok().cloned().flatten();
            note(Object::Membership(cluster), offered.map(|cluster| cluster.is_some()));
        }
        mended.iter().for_each(|object| self.mend(object));
        if new {
            self.mark(Change::Documents);
            self.drop_revoked();
        }
        refusals.iter().for_each(|refusal| self.find(refusal));
        refusals
    }

    /// Takes one membership.
    pub fn offer_membership(&mut self, parts: &MembershipParts) -> Result<(), Refusal> {
        let documents = Documents { memberships: vec![parts.clone()], ..Documents::default() };
        self.offer_documents(&documents).pop().map_or(Ok(()), Err)
    }

    fn drop_revoked(&mut self) {
        let documents = &self.documents;
        let gone: Vec<ClusterId> = self
            .origins
            .iter()
            .filter(|(cluster, origin)| {
                documents.membership(cluster, origin.state.position().serial).is_none()
            })
            .map(|(cluster, _)| cluster.clone())
            .collect();
        for cluster in gone {
            self.origins.remove(&cluster);
            self.mark(Change::Origin(cluster));
        }
    }

    /// All documents, for passing on and storing.
    pub fn documents(&self) -> Documents {
        self.documents.all()
    }

    /// The root keys.
    pub fn roots(&self) -> &RootChain {
        &self.documents.roots
    }

    /// Which set.
    pub fn set(&self) -> SetId {
        self.documents.roots.set()
    }

    /// The newest list of brokers.
    pub fn brokers(&self) -> Option<&Verified<Brokers>> {
        self.documents.brokers.as_ref()
    }

    /// The newest list of revocations.
    pub fn revocations(&self) -> Option<&Verified<Revocations>> {
        self.documents.revocations.as_ref()
    }

    /// All memberships that are not revoked: of each cluster the newest, and while its statements are still
    /// under an older serial, that one.
    pub fn memberships(&self) -> impl Iterator<Item = &Membership> {
        self.documents.memberships.values().flat_map(BTreeMap::values)
    }

    /// The newest membership of a cluster: its ranges count, whatever serial it speaks under.
    pub fn membership(&self, cluster: &ClusterId) -> Option<&Membership> {
        self.documents.memberships.get(cluster)?.values().next_back()
    }

    /// A membership by its serial.
    pub fn membership_of(&self, cluster: &ClusterId, serial: u64) -> Option<&Membership> {
        self.documents.membership(cluster, serial)
    }

    /// What every cluster says.
    pub fn origins(&self) -> impl Iterator<Item = (&ClusterId, &Arc<OriginState>)> {
        self.origins.iter().map(|(cluster, origin)| (cluster, &origin.state))
    }

    /// What a cluster says.
    pub fn origin(&self, cluster: &ClusterId) -> Option<&Arc<OriginState>> {
        self.origins.get(cluster).map(|origin| &origin.state)
    }

    /// Whether the records of all wanted scopes of a cluster are held. False for a while after the interest
    /// grew; what is absent then is unknown, not gone.
    pub fn is_complete(&self, cluster: &ClusterId) -> bool {
        self.origin(cluster).is_some_and(|state| state.missing(self.wanted(cluster)).is_empty())
    }

    /// The highest position of the own cluster that anybody showed, signed. Above the own newest one: take a
    /// higher epoch and publish again.
    pub fn own_seen(&self) -> Option<Position> {
        self.own_seen
    }

    /// The own cluster.
    pub fn own(&self) -> Option<&ClusterId> {
        self.own.as_ref()
    }

    /// What was refused and is worth an administrator's look; the last reason for each object.
    pub fn findings(&self) -> &BTreeMap<Object, Reason> {
        &self.findings
    }

    /// Takes the own cluster's newest statement. Its membership must have been offered before.
    pub fn publish(&mut self, local: LocalStatement) -> Result<(), Refusal> {
        let statement = self.documents.statement(&local.envelope)?;
        let cluster = statement.cluster.clone();
        let refuse = |reason| Refusal::new(Object::Statement(cluster.clone()), reason);
        let offered = statement.position;
        let held = self.origin(&cluster).map(|state| state.position()).max(self.floor(&cluster));
        if let Some(held) = held.filter(|&held| held >= offered) {
            return Err(refuse(Reason::Stale { offered, held }));
        }
        self.own = Some(cluster.clone());
        let (leaves, hash) = (local.leaves, local.namespaces_hash);
        let mut candidate =
            Candidate::whole(statement, leaves, hash, |_| true, &[], self.quota).map_err(refuse)?;
        for (scope, records) in local.scopes {
            candidate.take(&scope, records).map_err(refuse)?;
        }
        let state = candidate.complete().ok_or_else(|| refuse(Reason::Content("scopes".to_owned())))?;
        self.commit(state);
        Ok(())
    }

    /// Takes back what was stored, verified like anything from outside. Documents must be offered before.
    /// Records of wanted scopes that are not given are fetched by the next session.
    pub fn restore(
        &mut self,
        statement: &Envelope,
        leaves: BTreeMap<Scope, ScopeDigest>,
        namespaces_hash: Digest,
        records: impl IntoIterator<Item = (Scope, Vec<Record>)>,
    ) -> Result<(), Refusal> {
        let statement = self.documents.statement(statement)?;
        let cluster = statement.cluster.clone();
        let refuse = |reason| Refusal::new(Object::Statement(cluster.clone()), reason);
        if self.own.as_ref() == Some(&cluster) {
            self.own_seen = self.own_seen.max(Some(statement.position));
        }
        let wanted = self.wanted(&cluster);
        let mut candidate =
            Candidate::whole(statement, leaves, namespaces_hash, wanted, &[], self.quota).map_err(refuse)?;
        for (scope, records) in records {
            let records: ScopeRecords = records.into_iter().collect();
            candidate.take(&scope, Arc::new(records)).map_err(refuse)?;
        }
        self.commit(candidate.partial());
        Ok(())
    }

    /// Remembers a statement that was verified once and whose records are not at hand: from now on nothing
    /// older of that cluster is taken, whoever brings it, so that no forwarder can roll a cluster back over a
    /// restart. Its membership must be offered before. For the own cluster it counts as seen
    /// ([`Self::own_seen`]).
    pub fn set_floor(&mut self, statement: &Envelope) -> Result<Position, Refusal> {
        let statement = self.documents.statement(statement)?;
        let (cluster, position) = (statement.cluster.clone(), statement.position);
        if self.own.as_ref() == Some(&cluster) {
            self.note_own(position);
        }
        if self.floors.get(&cluster).is_none_or(|held| held.position < position) {
            self.floors.insert(cluster, statement);
        }
        Ok(position)
    }

    /// Below which position nothing of a cluster is taken.
    pub fn floor(&self, cluster: &ClusterId) -> Option<Position> {
        self.floors.get(cluster).map(|statement| statement.position)
    }

    /// Whether a statement is behind its cluster's floor, or another one at that position.
    pub(crate) fn below_floor(&self, statement: &Statement) -> Option<Reason> {
        let floor = self.floors.get(&statement.cluster)?;
        let (offered, held) = (statement.position, floor.position);
        if offered < held {
            Some(Reason::Stale { offered, held })
        } else if offered == held && statement.root != floor.root {
            Some(Reason::Equivocation(format!("position {offered}")))
        } else {
            None
        }
    }

    /// Which namespaces are wanted now. Records of others are dropped, those of new ones are fetched by the
    /// sessions.
    pub fn set_interest(&mut self, interest: Interest) {
        if interest == self.interest {
            return;
        }
        self.interest = interest;
        self.mark(Change::Interest);
        let clusters: Vec<ClusterId> = self.origins.keys().cloned().collect();
        for cluster in clusters {
            let narrowed = self.origin(&cluster).and_then(|state| state.narrowed(self.wanted(&cluster)));
            if let (Some(state), Some(origin)) = (narrowed, self.origins.get_mut(&cluster)) {
                origin.state = Arc::new(state);
                self.mark(Change::Origin(cluster));
            }
        }
    }

    /// What is wanted.
    pub fn interest(&self) -> &Interest {
        &self.interest
    }

    /// Grows with every change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What changed after a version, each once.
    pub fn changes_since(&self, version: u64) -> impl Iterator<Item = &Change> {
        self.changes.range(version.saturating_add(1)..).map(|(_, change)| change)
    }

    /// Verifies a statement by the membership of its serial.
    pub(crate) fn statement(&self, envelope: &Envelope) -> Result<Verified<Statement>, Refusal> {
        self.documents.statement(envelope)
    }

    pub(crate) fn wanted(&self, cluster: &ClusterId) -> impl Fn(&Scope) -> bool {
        let own = self.own.as_ref() == Some(cluster);
        move |scope| own || self.interest.wants(scope)
    }

    pub(crate) fn quota(&self) -> Quota {
        self.quota
    }

    pub(crate) fn note_own(&mut self, position: Position) {
        self.own_seen = self.own_seen.max(Some(position));
    }

    pub(crate) fn find(&mut self, refusal: &Refusal) {
        if self.findings.get(&refusal.object).is_some_and(is_lasting) && !is_lasting(&refusal.reason) {
            return;
        }
        if self.findings.len() >= MAX_FINDINGS && !self.findings.contains_key(&refusal.object) {
            // Anybody can bring something unsigned; that must not push out what only a key's holder can cause.
            let least = self.findings.iter().find(|(_, reason)| !is_lasting(reason));
            match least.map(|(object, _)| object.clone()) {
                Some(object) => self.findings.remove(&object),
                None => self.findings.pop_first().map(|(_, reason)| reason),
            };
        }
        self.findings.insert(refusal.object.clone(), refusal.reason.clone());
    }

    /// Something good came for an object: what was wrong before is over, unless it tells of a misused key.
    fn mend(&mut self, object: &Object) {
        if self.findings.get(object).is_some_and(|reason| !is_lasting(reason)) {
            self.findings.remove(object);
        }
    }

    pub(crate) fn touched_since(&self, cluster: &ClusterId, position: Position) -> Option<Touched> {
        self.origins.get(cluster)?.history.since(position)
    }

    /// Makes a verified state the current one. Nothing happens if it is behind, or its membership is gone.
    pub(crate) fn commit(&mut self, state: OriginState) {
        let cluster = state.statement().cluster.clone();
        let position = state.position();
        let member = self.documents.membership(&cluster, position.serial).is_some();
        if !member || self.below_floor(state.statement()).is_some() {
            return;
        }
        let state = state.narrowed(self.wanted(&cluster)).unwrap_or(state);
        match self.origins.get_mut(&cluster) {
            None => {
                let origin = Origin { state: Arc::new(state), history: History::default() };
                self.origins.insert(cluster.clone(), origin);
            }
            Some(origin) => {
                let held = origin.state.position();
                if position < held {
                    return;
                }
                if position == held {
                    // The same statement with more of its scopes; another one at this position is refused
                    // before it comes here, and must not pass here either.
                    let fills = origin.state.statement().root == state.statement().root
                        && origin.state.scopes().keys().all(|scope| state.scopes().contains_key(scope))
                        && origin.state.scopes().len() < state.scopes().len();
                    if !fills {
                        return;
                    }
                } else {
                    origin.history.push(held, position, origin.state.touched(&state));
                }
                origin.state = Arc::new(state);
            }
        }
        self.documents.prune(&cluster, position.serial);
        self.mend(&Object::Statement(cluster.clone()));
        self.mark(Change::Origin(cluster));
    }

    fn mark(&mut self, change: Change) {
        self.version += 1;
        if let Some(old) = self.changed_at.insert(change.clone(), self.version) {
            self.changes.remove(&old);
        }
        self.changes.insert(self.version, change);
    }
}

/// Whether a reason stays worth a look after things went on: somebody's key signed two different things.
fn is_lasting(reason: &Reason) -> bool {
    matches!(reason, Reason::Equivocation(_) | Reason::Fork { .. })
}
