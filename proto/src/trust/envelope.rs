//! What every signed document is wrapped in.

use std::sync::Arc;

use super::PublicKey;
use crate::model::ClusterId;
use crate::wire::WireError;

/// What a signature is for: no document passes for one of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Context {
    /// The set's root keys.
    Roots,
    /// What a cluster is and owns.
    Grant,
    /// The key that signs for a cluster.
    Binding,
    /// All that a cluster says.
    Statement,
    /// Grants that ended.
    Revocations,
    /// Who may be a broker.
    Brokers,
}

impl Context {
    /// Its name, as in the signed prefix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Roots => "roots",
            Self::Grant => "grant",
            Self::Binding => "binding",
            Self::Statement => "statement",
            Self::Revocations => "revocations",
            Self::Brokers => "brokers",
        }
    }

    /// Bytes of a payload. Small where a member signs, since everybody keeps and passes on what it signed.
    pub const fn max_payload(self) -> usize {
        match self {
            Self::Binding | Self::Statement => 1024,
            Self::Roots => 4 * 1024,
            Self::Brokers => 16 * 1024,
            Self::Grant => 32 * 1024,
            Self::Revocations => Envelope::MAX_PAYLOAD,
        }
    }

    /// The bytes that are signed: `tombolo.dev/v1/NAME`, a zero byte, the payload.
    pub(crate) fn signed_bytes(self, payload: &[u8]) -> Vec<u8> {
        [b"tombolo.dev/v1/", self.name().as_bytes(), b"\0", payload].concat()
    }
}

/// A document nobody has checked yet. Never re-encoded: the payload is kept byte for byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Envelope {
    /// What it claims to be.
    pub context: Context,
    /// The document.
    pub payload: Arc<[u8]>,
    /// Ed25519 over [`Context`]'s prefix and the payload.
    pub signature: [u8; 64],
}

impl Envelope {
    /// Bytes of the longest payload; see [`Context::max_payload`].
    pub const MAX_PAYLOAD: usize = 96 * 1024;

    /// Whether both hold the same document. Signatures may differ: whoever signs can sign twice.
    pub fn same_document(&self, other: &Self) -> bool {
        self.context == other.context && self.payload == other.payload
    }

    /// Decodes the payload if `key` signed it under `context`.
    pub(crate) fn verify<T>(
        &self,
        context: Context,
        keys: &[PublicKey],
        decode: impl FnOnce(&[u8]) -> Result<T, WireError>,
    ) -> Result<Verified<T>, TrustError> {
        if self.context != context {
            return Err(TrustError::Context { expected: context, found: self.context });
        }
        if self.payload.len() > context.max_payload() {
            return Err(TrustError::TooLong(context));
        }
        let message = context.signed_bytes(&self.payload);
        if !keys.iter().any(|key| key.verify(&message, &self.signature)) {
            return Err(TrustError::Signature(context));
        }
        let value = decode(&self.payload).map_err(|source| TrustError::Decode { context, source })?;
        Ok(Verified { value, envelope: self.clone() })
    }
}

impl std::fmt::Debug for Envelope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.context.name(), self.payload.len())
    }
}

/// A document whose signature was checked, with the bytes it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T> {
    value: T,
    envelope: Envelope,
}

impl<T> Verified<T> {
    /// As it was signed, for passing on.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }
}

impl<T> std::ops::Deref for Verified<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// Why a document is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// Another kind of document.
    #[error("expected a {} document, found {}", expected.name(), found.name())]
    Context {
        /// What was needed.
        expected: Context,
        /// What came.
        found: Context,
    },
    /// Not signed by who may sign it.
    #[error("the signature of the {} document is not by a key that may sign it", .0.name())]
    Signature(Context),
    /// Longer than a document of its kind may be.
    #[error("the {} document is longer than {} bytes", .0.name(), .0.max_payload())]
    TooLong(Context),
    /// Signed, but not readable.
    #[error("the {} document is signed but malformed", context.name())]
    Decode {
        /// Which.
        context: Context,
        /// Why.
        source: WireError,
    },
    /// Of another set.
    #[error("the {} document belongs to another set", .0.name())]
    OtherSet(Context),
    /// About another cluster, serial or generation than it should be.
    #[error("the {} document does not fit: {reason}", context.name())]
    Mismatch {
        /// Which.
        context: Context,
        /// What does not fit.
        reason: String,
    },
    /// The grant was revoked.
    #[error("cluster {cluster} was revoked up to serial {serial}")]
    Revoked {
        /// Whose.
        cluster: ClusterId,
        /// Up to which grant.
        serial: u64,
    },
}
