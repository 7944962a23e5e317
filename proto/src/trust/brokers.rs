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

impl Broker {
    /// Whether a text is `host:port` or `[v6]:port`, port 1 to 65535.
    pub fn is_address(text: &str) -> bool {
        let Some((host, port)) = text.rsplit_once(':') else { return false };
        let host_is_good = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                (1..=253).contains(&host.len())
                    && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
            }
        };
        host_is_good
            && (1..=5).contains(&port.len())
            && port.bytes().all(|b| b.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    }
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
