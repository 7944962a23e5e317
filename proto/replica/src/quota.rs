//! How much is taken, and of what.

use std::collections::BTreeSet;

use tombolo_proto::model::{Namespace, Scope};

/// Whose records are held, beside every cluster's nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interest {
    /// All: brokers and relays.
    All,
    /// Those in these namespaces: members.
    Namespaces(BTreeSet<Namespace>),
}

impl Interest {
    /// Whether records of a scope are wanted.
    pub fn wants(&self, scope: &Scope) -> bool {
        match (self, scope) {
            (Self::All, _) | (_, Scope::Nodes) => true,
            (Self::Namespaces(list), Scope::Namespace(namespace)) => list.contains(namespace),
        }
    }
}

/// Bounds of what is held. What goes beyond is refused, and what was held before stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Clusters with a membership.
    pub clusters: usize,
    /// Scopes of one origin.
    pub scopes: usize,
    /// Nodes of one origin.
    pub nodes: usize,
    /// Records of one origin, of the scopes that are held.
    pub records: usize,
    /// Bytes of one origin's records, of the scopes that are held.
    pub bytes: usize,
}

impl Default for Quota {
    fn default() -> Self {
        Self { clusters: 1024, scopes: 16_384, nodes: 10_000, records: 100_000, bytes: 128 * 1024 * 1024 }
    }
}
