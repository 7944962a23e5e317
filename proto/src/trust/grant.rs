//! What a cluster is and owns, and the keys that speak for it.

use std::collections::BTreeSet;

use super::{Context, Envelope, PublicKey, RootChain, SetId, SigningKey, Statement, TrustError, Verified};
use crate::model::{ClusterId, Namespace, NamespacePattern, Prefix};
use crate::wire;

/// The administrator's word on a cluster. Signed by a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Of which set.
    pub set: SetId,
    /// For whom.
    pub cluster: ClusterId,
    /// Counts over the whole set; of a cluster's grants the highest is valid.
    pub serial: u64,
    /// Unix seconds; copied when a grant is renewed.
    pub member_since: u64,
    /// Pod ranges.
    pub owned: BTreeSet<Prefix>,
    /// Where its nodes' tunnel addresses come from; apart from `owned`.
    pub tunnel: BTreeSet<Prefix>,
    /// Namespaces it may export; empty = all but the reserved.
    pub namespaces: Vec<NamespacePattern>,
    /// The key that signs binding 0.
    pub subject: PublicKey,
    /// Unix seconds; a broker refuses a first binding after it. Binds nobody else.
    pub bind_before: Option<u64>,
}

impl Grant {
    /// Prefixes of each kind.
    pub const MAX_PREFIXES: usize = 64;
    /// Namespace patterns.
    pub const MAX_PATTERNS: usize = 256;

    /// Signs it with a root key.
    pub fn sign(&self, root: &SigningKey) -> Envelope {
        root.sign(Context::Grant, wire::encode_grant(self))
    }

    /// Whether it may export in a namespace. Reserved namespaces are nobody's.
    pub fn may_export(&self, namespace: &Namespace) -> bool {
        !namespace.is_reserved()
            && (self.namespaces.is_empty() || self.namespaces.iter().any(|p| p.matches(namespace)))
    }

    /// Pod and tunnel ranges.
    pub fn ranges(&self) -> impl Iterator<Item = &Prefix> {
        self.owned.iter().chain(&self.tunnel)
    }
}

/// Names the key that signs a cluster's statements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Of which set.
    pub set: SetId,
    /// Whose.
    pub cluster: ClusterId,
    /// Under which grant.
    pub serial: u64,
    /// From 0; generation n+1 is signed by key n.
    pub generation: u32,
    /// The key.
    pub key: PublicKey,
}

impl Binding {
    /// Signs it: generation 0 with the grant's subject, others with the key before.
    pub fn sign(&self, key: &SigningKey) -> Envelope {
        key.sign(Context::Binding, wire::encode_binding(self))
    }
}

/// A grant and the bindings under it: a cluster's right to speak, verifiable by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    grant: Verified<Grant>,
    bindings: Vec<Verified<Binding>>,
}

impl Membership {
    /// Bindings of a membership, so that one is always checked in milliseconds: after 63 rotations the cluster
    /// is granted anew, which begins at generation 0 again.
    pub const MAX_BINDINGS: usize = 64;

    /// Checks the whole chain: root, grant, binding 0, 1, ...
    pub fn verify(roots: &RootChain, grant: &Envelope, bindings: &[Envelope]) -> Result<Self, TrustError> {
        let grant = roots.grant(grant)?;
        let mut membership = Self { grant, bindings: Vec::new() };
        if bindings.is_empty() {
            return Err(mismatch("a membership needs a binding".to_owned()));
        }
        for binding in bindings {
            membership.extend(binding)?;
        }
        Ok(membership)
    }

    fn extend(&mut self, envelope: &Envelope) -> Result<(), TrustError> {
        if self.bindings.len() >= Self::MAX_BINDINGS {
            return Err(mismatch(format!(
                "its key was rotated {} times under one grant, which is the most there may be; grant the cluster anew",
                Self::MAX_BINDINGS - 1
            )));
        }
        let signer = self.bindings.last().map_or(self.grant.subject, |b| b.key);
        let binding = envelope.verify(Context::Binding, &[signer], wire::decode_binding)?;
        let expected = self.bindings.len();
        let grant = &self.grant;
        if binding.set != grant.set {
            return Err(TrustError::OtherSet(Context::Binding));
        }
        if binding.cluster != grant.cluster || binding.serial != grant.serial {
            return Err(mismatch(format!(
                "it binds {} under serial {}, the grant is for {} under serial {}",
                binding.cluster, binding.serial, grant.cluster, grant.serial
            )));
        }
        if usize::try_from(binding.generation).ok() != Some(expected) {
            return Err(mismatch(format!("generation {expected} was expected, not {}", binding.generation)));
        }
        self.bindings.push(binding);
        Ok(())
    }

    /// The grant.
    pub fn grant(&self) -> &Verified<Grant> {
        &self.grant
    }

    /// Bindings 0, 1, ...
    pub fn bindings(&self) -> &[Verified<Binding>] {
        &self.bindings
    }

    /// Whose.
    pub fn cluster(&self) -> &ClusterId {
        &self.grant.cluster
    }

    /// The key of the newest generation.
    pub fn key(&self) -> PublicKey {
        self.bindings.last().map_or(self.grant.subject, |b| b.key)
    }

    /// Of the newest key: how often it was rotated under this grant.
    pub fn generation(&self) -> u32 {
        u32::try_from(self.bindings.len().saturating_sub(1)).unwrap_or(u32::MAX)
    }

    /// The membership after a rotation: `next` bound by the newest key, which `present` must be. Signatures are
    /// deterministic, so two who do this with the same keys make the same document.
    pub fn rotated(&self, present: &SigningKey, next: PublicKey) -> Result<Self, TrustError> {
        let binding = Binding {
            set: self.grant.set,
            cluster: self.grant.cluster.clone(),
            serial: self.grant.serial,
            generation: self.generation().saturating_add(1),
            key: next,
        };
        let mut membership = self.clone();
        membership.extend(&binding.sign(present))?;
        Ok(membership)
    }

    /// Whether this one says all that `other` says, and perhaps more: the first binding seen of each
    /// (serial, generation) is pinned, so a fork is not an extension. Documents are compared, not their
    /// signatures: whoever may sign can sign one document twice.
    pub fn extends(&self, other: &Self) -> bool {
        self.grant.envelope().same_document(other.grant.envelope())
            && self.bindings.len() >= other.bindings.len()
            && self
                .bindings
                .iter()
                .zip(&other.bindings)
                .all(|(a, b)| a.envelope().same_document(b.envelope()))
    }

    /// Checks a statement: of this cluster and set, under this grant's serial, by the key of its generation.
    pub fn statement(&self, envelope: &Envelope) -> Result<Verified<Statement>, TrustError> {
        if envelope.payload.len() > Context::Statement.max_payload() {
            return Err(TrustError::TooLong(Context::Statement));
        }
        let claimed = wire::decode_statement(&envelope.payload)
            .map_err(|source| TrustError::Decode { context: Context::Statement, source })?;
        let key = usize::try_from(claimed.position.generation).ok().and_then(|g| self.bindings.get(g));
        let Some(key) = key else {
            return Err(TrustError::Mismatch {
                context: Context::Statement,
                reason: format!("no binding of generation {} is known", claimed.position.generation),
            });
        };
        let statement = envelope.verify(Context::Statement, &[key.key], wire::decode_statement)?;
        if statement.set != self.grant.set {
            return Err(TrustError::OtherSet(Context::Statement));
        }
        if statement.cluster != self.grant.cluster || statement.position.serial != self.grant.serial {
            return Err(TrustError::Mismatch {
                context: Context::Statement,
                reason: format!(
                    "it speaks for {} under serial {}, the grant is for {} under serial {}",
                    statement.cluster, statement.position.serial, self.grant.cluster, self.grant.serial
                ),
            });
        }
        Ok(statement)
    }
}

fn mismatch(reason: String) -> TrustError {
    TrustError::Mismatch { context: Context::Binding, reason }
}
