//! What one cluster says, and the way from one of its statements to the next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_proto::model::{Position, Record, Scope};
use tombolo_proto::trust::{Digest, ScopeDigest, Statement, Verified, namespaces_hash, root_hash};
use tombolo_proto::wire::{ScopeDelta, Update};

use crate::history::Touched;
use crate::quota::Quota;
use crate::records::ScopeRecords;
use crate::refusal::Reason;

/// A cluster's verified statement with what is held of its records. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginState {
    statement: Arc<Verified<Statement>>,
    leaves: Arc<BTreeMap<Scope, ScopeDigest>>,
    namespaces_hash: Digest,
    scopes: BTreeMap<Scope, Arc<ScopeRecords>>,
}

impl OriginState {
    /// As it was signed.
    pub fn statement(&self) -> &Verified<Statement> {
        &self.statement
    }

    /// How far it has spoken.
    pub fn position(&self) -> Position {
        self.statement.position
    }

    /// Count and digest of every scope that is not empty, held or not.
    pub fn leaves(&self) -> &BTreeMap<Scope, ScopeDigest> {
        &self.leaves
    }

    /// The second hash.
    pub fn namespaces_hash(&self) -> Digest {
        self.namespaces_hash
    }

    /// The scopes whose records are held.
    pub fn scopes(&self) -> &BTreeMap<Scope, Arc<ScopeRecords>> {
        &self.scopes
    }

    /// Records of a scope, if they are held.
    pub fn records(&self, scope: &Scope) -> Option<&Arc<ScopeRecords>> {
        self.scopes.get(scope)
    }

    /// Scopes with records that `wanted` picks and that are not held.
    pub(crate) fn missing(&self, wanted: impl Fn(&Scope) -> bool) -> BTreeSet<Scope> {
        self.leaves.keys().filter(|s| wanted(s) && !self.scopes.contains_key(s)).cloned().collect()
    }

    /// Forgets the records of scopes that `wanted` does not pick. None if there are none.
    pub(crate) fn narrowed(&self, wanted: impl Fn(&Scope) -> bool) -> Option<Self> {
        if self.scopes.keys().all(&wanted) {
            return None;
        }
        let mut new = self.clone();
        new.scopes.retain(|scope, _| wanted(scope));
        Some(new)
    }

    /// What changed from this state to `new`.
    pub(crate) fn touched(&self, new: &Self) -> Touched {
        let mut touched = Touched::new();
        let scopes: BTreeSet<&Scope> = self.leaves.keys().chain(new.leaves.keys()).collect();
        let empty = ScopeRecords::default();
        for scope in scopes {
            let (old_leaf, new_leaf) = (self.leaves.get(scope), new.leaves.get(scope));
            if old_leaf == new_leaf {
                continue;
            }
            let side = |state: &Self, leaf: Option<&ScopeDigest>| match leaf {
                None => Some(None),
                Some(_) => state.scopes.get(scope).map(|records| Some(records.clone())),
            };
            let keys = match (side(self, old_leaf), side(new, new_leaf)) {
                (Some(old), Some(new)) => {
                    let (old, new) = (old.as_deref().unwrap_or(&empty), new.as_deref().unwrap_or(&empty));
                    Some(old.changed(new).into_iter().collect())
                }
                _ => None,
            };
            touched.insert(scope.clone(), keys);
        }
        touched
    }
}

/// Checks the nodes of a cluster with nothing but its verified statement and the second hash.
pub fn verify_nodes<'a>(
    statement: &Statement,
    namespaces_hash: &Digest,
    nodes: impl IntoIterator<Item = &'a Record>,
) -> bool {
    root_hash(ScopeDigest::of(nodes).as_ref(), namespaces_hash) == statement.root
}

/// A state that is verified, but of which records may still be missing. It counts only when it is complete.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    state: OriginState,
    pending: BTreeSet<Scope>,
    quota: Quota,
}

impl Candidate {
    /// From a statement and all its leaves; records are taken from `sources` where they are the same.
    pub(crate) fn whole(
        statement: Verified<Statement>,
        leaves: BTreeMap<Scope, ScopeDigest>,
        namespaces_hash: Digest,
        wanted: impl Fn(&Scope) -> bool,
        sources: &[&OriginState],
        quota: Quota,
    ) -> Result<Self, Reason> {
        let state = OriginState {
            statement: Arc::new(statement),
            leaves: Arc::new(leaves),
            namespaces_hash,
            scopes: BTreeMap::new(),
        };
        let mut candidate = Self { state, pending: BTreeSet::new(), quota };
        candidate.check(&wanted)?;
        candidate.refocus(wanted, sources);
        candidate.check_bytes()?;
        Ok(candidate)
    }

    /// From a state that is held, to have more of its scopes.
    pub(crate) fn fill(state: &OriginState, wanted: impl Fn(&Scope) -> bool, quota: Quota) -> Self {
        let mut candidate = Self { state: state.clone(), pending: BTreeSet::new(), quota };
        candidate.refocus(wanted, &[]);
        candidate
    }

    /// From an older state and the changes since.
    pub(crate) fn delta(
        from: &OriginState,
        statement: Verified<Statement>,
        update: Update,
        wanted: impl Fn(&Scope) -> bool,
        quota: Quota,
    ) -> Result<Self, Reason> {
        let mut leaves = from.leaves.clone();
        let changed = Arc::make_mut(&mut leaves);
        for (scope, leaf) in &update.leaves {
            match leaf {
                Some(leaf) => changed.insert(scope.clone(), *leaf),
                None => changed.remove(scope),
            };
        }
        let state = OriginState {
            statement: Arc::new(statement),
            leaves,
            namespaces_hash: update.namespaces_hash,
            scopes: from.scopes.clone(),
        };
        let mut candidate = Self { state, pending: BTreeSet::new(), quota };
        candidate.check(&wanted)?;
        let mut deltas: BTreeMap<Scope, ScopeDelta> =
            update.deltas.into_iter().map(|delta| (delta.scope.clone(), delta)).collect();
        for (scope, _) in update.leaves {
            let old_leaf = from.leaves.get(&scope);
            let old = candidate.state.scopes.remove(&scope);
            let Some(leaf) = candidate.state.leaves.get(&scope).copied() else { continue };
            if old_leaf == Some(&leaf) {
                // Changed and changed back: what is held still fits.
                candidate.state.scopes.extend(old.map(|old| (scope, old)));
                continue;
            }
            let base = match (old, old_leaf) {
                (Some(old), _) => old,
                (None, None) => Arc::default(),
                (None, Some(_)) => continue,
            };
            let Some(delta) = deltas.remove(&scope) else { continue };
            if wanted(&scope) {
                let mut records = Arc::unwrap_or_clone(base);
                delta.removed.iter().for_each(|key| records.remove(key));
                delta.upserts.into_iter().for_each(|record| records.insert(record));
                if records.digest() == Some(leaf) {
                    candidate.state.scopes.insert(scope, Arc::new(records));
                }
            }
        }
        candidate.refocus(wanted, &[]);
        candidate.check_bytes()?;
        Ok(candidate)
    }

    fn check(&self, wanted: impl Fn(&Scope) -> bool) -> Result<(), Reason> {
        let state = &self.state;
        if state.leaves.len() > self.quota.scopes {
            return Err(Reason::Quota { what: "scopes", max: self.quota.scopes });
        }
        let nodes = state.leaves.get(&Scope::Nodes).map_or(0, |leaf| leaf.count);
        if nodes > self.quota.nodes as u64 {
            return Err(Reason::Quota { what: "nodes", max: self.quota.nodes });
        }
        let count = |(scope, leaf): (&Scope, &ScopeDigest)| if wanted(scope) { leaf.count } else { 0 };
        let records = state.leaves.iter().map(count).fold(0, u64::saturating_add);
        if records > self.quota.records as u64 {
            return Err(Reason::Quota { what: "records", max: self.quota.records });
        }
        let fits = namespaces_hash(&state.leaves) == state.namespaces_hash
            && root_hash(state.leaves.get(&Scope::Nodes), &state.namespaces_hash) == state.statement.root;
        if fits { Ok(()) } else { Err(Reason::Content("leaves".to_owned())) }
    }

    /// Bytes of the records that are there.
    pub(crate) fn bytes(&self) -> usize {
        self.state.scopes.values().map(|records| records.bytes()).sum()
    }

    fn check_bytes(&self) -> Result<(), Reason> {
        if self.bytes() > self.quota.bytes {
            return Err(Reason::Quota { what: "bytes of records", max: self.quota.bytes });
        }
        Ok(())
    }

    /// Holds what `wanted` picks and nothing else; takes from `sources` what is the same there.
    pub(crate) fn refocus(&mut self, wanted: impl Fn(&Scope) -> bool, sources: &[&OriginState]) {
        self.state.scopes.retain(|scope, _| wanted(scope));
        for scope in self.state.missing(&wanted) {
            let leaf = self.state.leaves.get(&scope);
            let same = sources
                .iter()
                .find_map(|source| source.scopes.get(&scope).filter(|_| source.leaves.get(&scope) == leaf));
            if let Some(records) = same {
                self.state.scopes.insert(scope, records.clone());
            }
        }
        self.pending = self.state.missing(wanted);
    }

    pub(crate) fn state(&self) -> &OriginState {
        &self.state
    }

    pub(crate) fn position(&self) -> Position {
        self.state.position()
    }

    pub(crate) fn pending(&self) -> &BTreeSet<Scope> {
        &self.pending
    }

    /// The leaf of a scope that is still missing.
    pub(crate) fn awaited(&self, scope: &Scope) -> Option<ScopeDigest> {
        self.pending.get(scope).and_then(|scope| self.state.leaves.get(scope)).copied()
    }

    /// Takes the records of a missing scope if they are what was signed.
    pub(crate) fn take(&mut self, scope: &Scope, records: Arc<ScopeRecords>) -> Result<(), Reason> {
        let Some(leaf) = self.awaited(scope) else { return Ok(()) };
        if records.digest() != Some(leaf) {
            return Err(Reason::Content(format!("records of {scope}")));
        }
        self.pending.remove(scope);
        self.state.scopes.insert(scope.clone(), records);
        self.check_bytes()
    }

    /// The state, if nothing is missing.
    pub(crate) fn complete(self) -> Option<OriginState> {
        self.pending.is_empty().then_some(self.state)
    }

    /// The state with whatever there is of it, for one's own store.
    pub(crate) fn partial(self) -> OriginState {
        self.state
    }
}
