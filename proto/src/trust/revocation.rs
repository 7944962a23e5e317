//! Grants that ended.

use std::collections::BTreeMap;

use super::{Context, Envelope, Grant, SetId, SigningKey};
use crate::model::ClusterId;
use crate::wire;

/// The whole list. Signed by a root; the highest version counts, from whatever source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocations {
    /// Of which set.
    pub set: SetId,
    /// Only grows.
    pub version: u64,
    /// Of each cluster, all grants up to this serial.
    pub up_to: BTreeMap<ClusterId, u64>,
}

impl Revocations {
    /// Entries of a list.
    pub const MAX_ENTRIES: usize = 1024;

    /// Signs it with a root key.
    pub fn sign(&self, root: &SigningKey) -> Envelope {
        root.sign(Context::Revocations, wire::encode_revocations(self))
    }

    /// Whether it ends a grant.
    pub fn revokes(&self, grant: &Grant) -> bool {
        self.up_to.get(&grant.cluster).is_some_and(|&serial| grant.serial <= serial)
    }
}
