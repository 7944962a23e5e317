//! The keys that may sign for the set.

use std::fmt;
use std::str::FromStr;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{Brokers, Context, Envelope, Grant, PublicKey, Revocations, SigningKey, TrustError, Verified};
use crate::model::SetName;
use crate::wire;

/// Names a set by the hash of its first roots: whoever pins it needs no other trust to read the rest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SetId(pub [u8; 16]);

impl SetId {
    fn of(payload: &[u8]) -> Self {
        let hash = digest(&SHA256, &[b"tombolo.dev/v1/set\0", payload].concat());
        let mut id = [0; 16];
        id.copy_from_slice(&hash.as_ref()[..16]);
        Self(id)
    }
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SetId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        data_encoding::HEXLOWER
            .decode(text.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| "not a set id: 32 hexadecimal digits are expected".to_owned())
    }
}

impl TryFrom<String> for SetId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SetId> for String {
    fn from(id: SetId) -> Self {
        id.to_string()
    }
}

/// One version of the set's root keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// From 1.
    pub version: u64,
    /// What people call the set.
    pub name: SetName,
    /// 1 to [`Self::MAX_KEYS`]; any of them may sign.
    pub keys: Vec<PublicKey>,
    /// SHA-256 of the version before; none in the first.
    pub previous: Option<[u8; 32]>,
}

impl Roots {
    /// Keys of a version.
    pub const MAX_KEYS: usize = 8;

    /// Signs this version. The first by one of its own keys, others by one of the version before.
    pub fn sign(&self, key: &SigningKey) -> Envelope {
        key.sign(Context::Roots, wire::encode_roots(self))
    }
}

/// The set's roots from the first version to the newest known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootChain {
    set: SetId,
    versions: Vec<Verified<Roots>>,
}

impl RootChain {
    /// Versions of a chain.
    pub const MAX_VERSIONS: usize = 64;

    /// Starts from the first version, whoever it is; what it names must be compared with a pinned id.
    pub fn first(envelope: &Envelope) -> Result<Self, TrustError> {
        if envelope.payload.len() > Context::Roots.max_payload() {
            return Err(TrustError::TooLong(Context::Roots));
        }
        let roots = wire::decode_roots(&envelope.payload)
            .map_err(|source| TrustError::Decode { context: Context::Roots, source })?;
        if roots.version != 1 || roots.previous.is_some() {
            return Err(mismatch("a chain of roots starts at version 1"));
        }
        let first = envelope.verify(Context::Roots, &roots.keys, wire::decode_roots)?;
        Ok(Self { set: SetId::of(&envelope.payload), versions: vec![first] })
    }

    /// Builds a chain from versions 1, 2, ... and checks that it is the set `pin`.
    pub fn pinned(pin: SetId, envelopes: &[Envelope]) -> Result<Self, TrustError> {
        let (first, rest) = envelopes.split_first().ok_or_else(|| mismatch("no roots"))?;
        let mut chain = Self::first(first)?;
        if chain.set != pin {
            return Err(TrustError::OtherSet(Context::Roots));
        }
        for envelope in rest {
            chain.advance(envelope)?;
        }
        Ok(chain)
    }

    /// Takes the next version if the current one signed it. True if it was new.
    pub fn advance(&mut self, envelope: &Envelope) -> Result<bool, TrustError> {
        if self.versions.iter().any(|v| v.envelope().same_document(envelope)) {
            return Ok(false);
        }
        if self.is_fork(envelope) {
            return Err(mismatch(
                "a root key has signed two versions of one number; if that was not the administrator, \
                 the key is stolen",
            ));
        }
        let current = self.current();
        let next = envelope.verify(Context::Roots, &current.keys, wire::decode_roots)?;
        let hash = digest(&SHA256, &current.envelope().payload);
        if next.version != current.version + 1
            || next.previous.as_ref().map(<[u8; 32]>::as_slice) != Some(hash.as_ref())
        {
            return Err(mismatch("this is not the version after the newest known"));
        }
        if self.versions.len() >= Self::MAX_VERSIONS {
            return Err(mismatch("too many versions of the roots"));
        }
        self.versions.push(next);
        Ok(true)
    }

    /// Whether this is another version of a number that is known, by a key that could have made it.
    fn is_fork(&self, envelope: &Envelope) -> bool {
        self.versions.windows(2).any(|pair| {
            envelope
                .verify(Context::Roots, &pair[0].keys, wire::decode_roots)
                .is_ok_and(|other| other.version == pair[1].version)
        })
    }

    /// The version that signs now.
    pub fn current(&self) -> &Verified<Roots> {
        self.versions.last().unwrap_or_else(|| unreachable!("a chain has a first version"))
    }

    /// Which set.
    pub fn set(&self) -> SetId {
        self.set
    }

    /// All versions, for passing on.
    pub fn envelopes(&self) -> impl Iterator<Item = &Envelope> {
        self.versions.iter().map(Verified::envelope)
    }

    /// Only the newest version's: a key that was taken off the list signs nothing any more, and what it
    /// signed is to be signed anew before it goes. A lost key harms nobody and may stay (docs/security.md).
    fn keys(&self) -> &[PublicKey] {
        &self.current().keys
    }

    /// Checks a grant.
    pub fn grant(&self, envelope: &Envelope) -> Result<Verified<Grant>, TrustError> {
        let grant = envelope.verify(Context::Grant, self.keys(), wire::decode_grant)?;
        self.same_set(grant.set, Context::Grant)?;
        Ok(grant)
    }

    /// Checks a list of revocations.
    pub fn revocations(&self, envelope: &Envelope) -> Result<Verified<Revocations>, TrustError> {
        let list = envelope.verify(Context::Revocations, self.keys(), wire::decode_revocations)?;
        self.same_set(list.set, Context::Revocations)?;
        Ok(list)
    }

    /// Checks the list of brokers.
    pub fn brokers(&self, envelope: &Envelope) -> Result<Verified<Brokers>, TrustError> {
        let brokers = envelope.verify(Context::Brokers, self.keys(), wire::decode_brokers)?;
        self.same_set(brokers.set, Context::Brokers)?;
        Ok(brokers)
    }

    fn same_set(&self, set: SetId, context: Context) -> Result<(), TrustError> {
        if set == self.set { Ok(()) } else { Err(TrustError::OtherSet(context)) }
    }
}

fn mismatch(reason: &str) -> TrustError {
    TrustError::Mismatch { context: Context::Roots, reason: reason.to_owned() }
}
