//! The hash tree under a statement. SHA-256 with a first byte that tells the level.
//!
//! ```text
//! record hash = H(01, body)
//! digest      = H(02, for each record by key: u32 length of key, key, record hash)
//! leaf        = H(03, scope, u64 count, digest)          an empty scope has no leaf
//! second      = H(04, leaves of the namespaces in order of name)
//! root        = H(05, leaf of nodes or 32 zero bytes, second)
//! key         = u32 kind, u8 parts, for each part: u16 length, bytes
//! scope       = u8 kind (1 nodes, 2 namespace), u16 length, name
//! ```
//! Numbers are big-endian.

use std::collections::BTreeMap;
use std::fmt;

use ring::digest::{Context as Hasher, SHA256};

use crate::model::{Record, RecordKey, Scope};

/// SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0[..8]))
    }
}

fn hash(level: u8, parts: &[&[u8]]) -> Digest {
    let mut hasher = Hasher::new(&SHA256);
    hasher.update(&[level]);
    for part in parts {
        hasher.update(part);
    }
    finish(hasher)
}

fn finish(hasher: Hasher) -> Digest {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(hasher.finish().as_ref());
    Digest(bytes)
}

fn key_bytes(key: &RecordKey) -> Vec<u8> {
    // RecordKey bounds its parts: at most 8 of at most 253 bytes.
    let mut bytes = key.kind().to_be_bytes().to_vec();
    bytes.push(u8::try_from(key.name().len()).unwrap_or(u8::MAX));
    for part in key.name() {
        bytes.extend(u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(part.as_bytes());
    }
    bytes
}

fn scope_bytes(scope: &Scope) -> Vec<u8> {
    let (kind, name) = match scope {
        Scope::Nodes => (1, ""),
        Scope::Namespace(namespace) => (2, namespace.as_str()),
    };
    let mut bytes = vec![kind];
    bytes.extend(u16::try_from(name.len()).unwrap_or(u16::MAX).to_be_bytes());
    bytes.extend(name.as_bytes());
    bytes
}

/// Hash of a record's body.
pub fn record_hash(body: &[u8]) -> Digest {
    hash(1, &[body])
}

/// Count and digest of a scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScopeDigest {
    /// Records in it.
    pub count: u64,
    /// Hash over them.
    pub digest: Digest,
}

/// A scope's entry in an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Which.
    pub scope: Scope,
    /// Its content.
    pub content: ScopeDigest,
}

/// Count and digest of records; none for an empty scope. Record hashes may come from a cache.
pub fn scope_digest<'a>(records: impl IntoIterator<Item = (&'a RecordKey, Digest)>) -> Option<ScopeDigest> {
    let sorted: BTreeMap<_, _> = records.into_iter().collect();
    let mut hasher = Hasher::new(&SHA256);
    hasher.update(&[2]);
    for (key, hash) in &sorted {
        let key = key_bytes(key);
        hasher.update(&u32::try_from(key.len()).unwrap_or(u32::MAX).to_be_bytes());
        hasher.update(&key);
        hasher.update(&hash.0);
    }
    let count = sorted.len() as u64;
    (count > 0).then(|| ScopeDigest { count, digest: finish(hasher) })
}

impl ScopeDigest {
    /// Of whole records.
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Option<Self> {
        scope_digest(records.into_iter().map(|r| (&r.key, record_hash(&r.body))))
    }
}

/// The leaf of a scope.
pub fn leaf_hash(scope: &Scope, content: &ScopeDigest) -> Digest {
    hash(3, &[&scope_bytes(scope), &content.count.to_be_bytes(), &content.digest.0])
}

/// The second hash: over the leaves of all namespaces.
pub fn namespaces_hash(leaves: &BTreeMap<Scope, ScopeDigest>) -> Digest {
    let mut hasher = Hasher::new(&SHA256);
    hasher.update(&[4]);
    for (scope, content) in leaves {
        if matches!(scope, Scope::Namespace(_)) {
            hasher.update(&leaf_hash(scope, content).0);
        }
    }
    finish(hasher)
}

/// The root that a statement bears: who has one scope and the second hash can check that scope.
pub fn root_hash(nodes: Option<&ScopeDigest>, namespaces: &Digest) -> Digest {
    let nodes = nodes.map_or(Digest([0; 32]), |content| leaf_hash(&Scope::Nodes, content));
    hash(5, &[&nodes.0, &namespaces.0])
}
