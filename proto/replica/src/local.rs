//! What the own cluster says, made into a signed statement.

use std::collections::BTreeMap;
use std::sync::Arc;

use tombolo_proto::model::{ClusterId, Position, Record, RecordKey, Scope};
use tombolo_proto::trust::{
    Digest, Envelope, ScopeDigest, SetId, SigningKey, Statement, namespaces_hash, root_hash,
};

use crate::records::ScopeRecords;

/// The own cluster's records with their hashes; only what changed is hashed anew.
#[derive(Debug, Clone)]
pub struct LocalOrigin {
    set: SetId,
    cluster: ClusterId,
    scopes: BTreeMap<Scope, Arc<ScopeRecords>>,
    leaves: BTreeMap<Scope, ScopeDigest>,
    namespaces_hash: Digest,
}

impl LocalOrigin {
    /// Nothing said yet.
    pub fn new(set: SetId, cluster: ClusterId) -> Self {
        let leaves = BTreeMap::new();
        let namespaces_hash = namespaces_hash(&leaves);
        Self { set, cluster, scopes: BTreeMap::new(), leaves, namespaces_hash }
    }

    /// Replaces all records: of each scope a map of them by key. True if anything is different, and hence to be signed.
    pub fn set_records<'a, M: 'a>(&mut self, records: impl IntoIterator<Item = (&'a Scope, &'a M)>) -> bool
    where
        &'a M: IntoIterator<Item = (&'a RecordKey, &'a Record)>,
    {
        let mut scopes = BTreeMap::new();
        let mut leaves = BTreeMap::new();
        let empty = ScopeRecords::default();
        for (scope, records) in records {
            let old = self.scopes.get(scope);
            let new = old.map_or(&empty, |old| old).rebuilt(records.into_iter().map(|(_, record)| record));
            let unchanged = old.filter(|old| ***old == new).cloned();
            let leaf = match (&unchanged, self.leaves.get(scope)) {
                (Some(_), Some(leaf)) => Some(*leaf),
                _ => new.digest(),
            };
            if let Some(leaf) = leaf {
                leaves.insert(scope.clone(), leaf);
                scopes.insert(scope.clone(), unchanged.unwrap_or_else(|| Arc::new(new)));
            }
        }
        let changed = leaves != self.leaves;
        if changed {
            self.namespaces_hash = namespaces_hash(&leaves);
        }
        (self.scopes, self.leaves) = (scopes, leaves);
        changed
    }

    /// Hash over everything said.
    pub fn root(&self) -> Digest {
        root_hash(self.leaves.get(&Scope::Nodes), &self.namespaces_hash)
    }

    /// Signs what is said now, at `position`, which must be above every one signed before.
    pub fn sign(&self, key: &SigningKey, position: Position) -> LocalStatement {
        let statement =
            Statement { set: self.set, cluster: self.cluster.clone(), position, root: self.root() };
        LocalStatement {
            envelope: statement.sign(key),
            leaves: self.leaves.clone(),
            namespaces_hash: self.namespaces_hash,
            scopes: self.scopes.clone(),
        }
    }
}

/// A signed statement with all it covers, for [`crate::Replica::publish`].
#[derive(Debug, Clone)]
pub struct LocalStatement {
    pub(crate) envelope: Envelope,
    pub(crate) leaves: BTreeMap<Scope, ScopeDigest>,
    pub(crate) namespaces_hash: Digest,
    pub(crate) scopes: BTreeMap<Scope, Arc<ScopeRecords>>,
}

impl LocalStatement {
    /// As signed.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// The second hash.
    pub fn namespaces_hash(&self) -> Digest {
        self.namespaces_hash
    }
}
