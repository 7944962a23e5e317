//! Records as everybody but their readers sees them: a key and bytes.

use std::fmt;
use std::sync::Arc;

use super::{Backends, Namespace, NodeName, ServiceName};

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
    /// `Endpoint`, name: `[node]`.
    pub const ENDPOINT: u32 = 1;
    /// `Export`, name: `[service]`.
    pub const EXPORT: u32 = 2;
    /// `Backends`, name: `[service, shard]`.
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

    /// Of a node's Endpoint.
    pub fn endpoint(node: &NodeName) -> Self {
        Self { kind: record_kind::ENDPOINT, name: vec![Arc::from(node.as_str())] }
    }

    /// Of a service's Export.
    pub fn export(service: &ServiceName) -> Self {
        Self { kind: record_kind::EXPORT, name: vec![Arc::from(service.as_str())] }
    }

    /// Of a shard of a service's Backends. None from [`Backends::MAX_SHARDS`] on.
    pub fn backends(service: &ServiceName, shard: u32) -> Option<Self> {
        (shard < Backends::MAX_SHARDS).then(|| Self {
            kind: record_kind::BACKENDS,
            name: vec![Arc::from(service.as_str()), Arc::from(shard.to_string())],
        })
    }

    /// What it names in a scope. None: not the only spelling of a key of a known kind, or in a scope where
    /// that kind has no place; such a record counts for nothing.
    pub fn subject(&self, scope: &Scope) -> Option<Subject> {
        let part = |n: usize| self.name.get(n).map(AsRef::as_ref);
        let subject = match (self.kind, scope, self.name.len()) {
            (record_kind::ENDPOINT, Scope::Nodes, 1) => Subject::Endpoint(NodeName::new(part(0)?).ok()?),
            (record_kind::EXPORT, Scope::Namespace(_), 1) => {
                Subject::Export(ServiceName::new(part(0)?).ok()?)
            }
            (record_kind::BACKENDS, Scope::Namespace(_), 2) => {
                let shard: u32 = part(1)?.parse().ok()?;
                Subject::Backends(ServiceName::new(part(0)?).ok()?, shard)
            }
            (record_kind::ENDPOINT | record_kind::EXPORT | record_kind::BACKENDS, _, _) => return None,
            (kind, _, _) => return Some(Subject::Unknown(kind)),
        };
        let canonical = match &subject {
            Subject::Backends(service, shard) => Self::backends(service, *shard).as_ref() == Some(self),
            Subject::Endpoint(_) | Subject::Export(_) | Subject::Unknown(_) => true,
        };
        canonical.then_some(subject)
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

/// What a record is about, read from its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A node.
    Endpoint(NodeName),
    /// A service.
    Export(ServiceName),
    /// A service, and which of its shards.
    Backends(ServiceName, u32),
    /// Of a kind that this version does not read.
    Unknown(u32),
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
