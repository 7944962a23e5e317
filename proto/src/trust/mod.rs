//! Who may say what. Rules and test vectors: `docs/protocol.md`.
//!
//! A document is believed only as [`Verified`], which nothing outside this module can build: its value
//! was decoded from the very bytes whose signature was checked.

mod brokers;
mod digest;
mod effective;
mod envelope;
mod grant;
mod invitation;
mod key;
mod revocation;
mod roots;
mod statement;

pub use brokers::{Broker, Brokers};
pub use digest::{
    Digest, Leaf, ScopeDigest, leaf_hash, namespaces_hash, record_hash, root_hash, scope_digest,
};
pub use effective::{Effective, Member, Refused, effective};
pub use envelope::{Context, Envelope, TrustError, Verified};
pub use grant::{Binding, Grant, Membership};
pub use invitation::{Invitation, InvitationError};
pub use key::{PublicKey, SigningKey};
pub use revocation::Revocations;
pub use roots::{RootChain, Roots, SetId};
pub use statement::Statement;
