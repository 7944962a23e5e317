//! Records as everybody but their readers sees them: a key and bytes.

use std::fmt;
use std::sync::Arc;

use super::Namespace;

/// What a leaf of a statement covers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The cluster's nodes.
    Nodes,
    /// What it exports in a namespace.
    Namespace(Namespace),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes => f.write_str("nodes"),
            Self::Namespace(namespace) => write!(f, "namespace {namespace}"),
        }
    }
}

/// Kinds of records that this version reads.
pub mod record_kind {
    /// `Endpoint`, name: [node].
    pub const ENDPOINT: u32 = 1;
    /// `Export`, name: [service].
    pub const EXPORT: u32 = 2;
    /// `Backends`, name: [service, shard].
    pub const BACKENDS: u32 = 3;
}

/// Names a record within its scope. A tuple; unknown kinds are carried all the same.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordKey {
    kind: u32,
    name: Vec<Arc<str>>,
}

impl RecordKey {
    /// Parts of a key.
    pub const MAX_PARTS: usize = 8;
    /// Bytes of a part.
    pub const MAX_PART: usize = 253;

    /// At most [`Self::MAX_PARTS`] parts of 1 to [`Self::MAX_PART`] bytes, printable ASCII.
    pub fn new(kind: u32, name: &[&str]) -> Option<Self> {
        let good = |part: &&str| {
            (1..=Self::MAX_PART).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_graphic())
        };
        if kind == 0 || name.is_empty() || name.len() > Self::MAX_PARTS || !name.iter().all(good) {
            return None;
        }
        Some(Self { kind, name: name.iter().map(|&part| Arc::from(part)).collect() })
    }

    /// See [`record_kind`].
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// The parts.
    pub fn name(&self) -> &[Arc<str>] {
        &self.name
    }
}

impl fmt::Debug for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.kind, self.name)
    }
}

/// A record: its body is opaque here. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub key: RecordKey,
    /// Its encoded body, at most [`Self::MAX_BODY`] bytes.
    pub body: Arc<[u8]>,
}

impl Record {
    /// Bytes of a body.
    pub const MAX_BODY: usize = 64 * 1024;
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({} bytes)", self.key, self.body.len())
    }
}
