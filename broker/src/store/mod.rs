//! Where a broker keeps what it knows over a restart. It may lose it: the members bring it back.

mod embedded;

use std::collections::BTreeMap;
use std::sync::Arc;

use tombolo_proto::model::{ClusterId, Record, Scope};
use tombolo_proto::trust::{Digest, Envelope, ScopeDigest};
use tombolo_proto::wire::Documents;
use tombolo_replica::OriginState;

pub use embedded::Embedded;

/// Keeps documents and origins. Each call of [`Store::write`] is one transaction.
pub trait Store: Send {
    /// All that was written. Nothing of it is believed before it is verified again.
    fn load(&mut self) -> Result<Stored, StoreError>;

    /// Writes what changed. After an error nothing of it is written, and the next call tries again.
    fn write(&mut self, batch: &Batch) -> Result<(), StoreError>;
}

/// What changed since the last write.
#[derive(Debug, Default)]
pub struct Batch {
    /// All documents, if any changed.
    pub documents: Option<Documents>,
    /// Origins that changed, with what was written of them before.
    pub origins: BTreeMap<ClusterId, OriginChange>,
}

/// An origin's change; both None is nothing.
#[derive(Debug, Default)]
pub struct OriginChange {
    /// As written last; None if nothing is.
    pub written: Option<Arc<OriginState>>,
    /// As it is now; None if it is gone.
    pub state: Option<Arc<OriginState>>,
}

/// What was found in a store.
#[derive(Debug, Default)]
pub struct Stored {
    /// The set's documents, in bounded parts.
    pub documents: Vec<Documents>,
    /// Statements with their records.
    pub origins: Vec<StoredOrigin>,
    /// Things in it that could not be read, and were passed over.
    pub unreadable: usize,
}

/// An origin as found.
#[derive(Debug)]
pub struct StoredOrigin {
    /// Whose.
    pub cluster: ClusterId,
    /// Its statement.
    pub statement: Envelope,
    /// The second hash.
    pub namespaces_hash: Digest,
    /// All its records.
    pub records: BTreeMap<Scope, Vec<Record>>,
}

impl StoredOrigin {
    /// The leaves that these records make.
    pub fn leaves(&self) -> BTreeMap<Scope, ScopeDigest> {
        let leaf =
            |(scope, records): (&Scope, &Vec<Record>)| Some((scope.clone(), ScopeDigest::of(records)?));
        self.records.iter().filter_map(leaf).collect()
    }
}

/// Why a store cannot be used. Each is one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("the store {0} is in use by another process: stop that one, or give this one another --data")]
    InUse(String),
    /// Not a store, or a broken one.
    #[error(
        "the store {path} is damaged or not a Tombolo broker's ({reason}): move it away and start again, the members bring everything back"
    )]
    Damaged {
        /// The file.
        path: String,
        /// From the engine.
        reason: String,
    },
    /// Of another set.
    #[error(
        "the store {path} belongs to set {found}, this broker serves {ours}: give this one another --data"
    )]
    OtherSet {
        /// The file.
        path: String,
        /// The store's.
        found: String,
        /// The broker's.
        ours: String,
    },
    /// Made by a later version.
    #[error(
        "the store {path} has format {found}, this version knows {known}: run the newer version again, or move the store away and let the members bring everything back"
    )]
    Newer {
        /// The file.
        path: String,
        /// The store's.
        found: u32,
        /// This version's.
        known: u32,
    },
    /// The disk refuses.
    #[error("the store {path} cannot be read or written ({reason}): see to the disk's space and permissions")]
    Disk {
        /// The file.
        path: String,
        /// From the system.
        reason: String,
    },
}
