//! Who may be a broker.

use super::{Context, Envelope, PublicKey, SetId, SigningKey};
use crate::wire;

/// A broker as the administrator names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Broker {
    /// `host:port` or `[v6]:port`
    pub address: String,
    /// Of its TLS certificate.
    pub key: PublicKey,
}

/// The whole list. Signed by a root; the highest version counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brokers {
    /// Of which set.
    pub set: SetId,
    /// Only grows.
    pub version: u64,
    /// In order of preference.
    pub brokers: Vec<Broker>,
}

impl Brokers {
    /// Brokers of a list.
    pub const MAX_BROKERS: usize = 32;

    /// Signs it with a root key.
    pub fn sign(&self, root: &SigningKey) -> Envelope {
        root.sign(Context::Brokers, wire::encode_brokers(self))
    }
}
