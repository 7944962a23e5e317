//! All that a cluster says, by one hash.

use super::{Context, Digest, Envelope, SetId, SigningKey};
use crate::model::{ClusterId, Position};
use crate::wire;

/// Signed by the cluster's key; covers every record through [`super::root_hash`]. It bears no time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// Of which set.
    pub set: SetId,
    /// Who speaks.
    pub cluster: ClusterId,
    /// How far it has spoken.
    pub position: Position,
    /// Hash over all scopes.
    pub root: Digest,
}

impl Statement {
    /// Signs it.
    pub fn sign(&self, key: &SigningKey) -> Envelope {
        key.sign(Context::Statement, wire::encode_statement(self))
    }
}
