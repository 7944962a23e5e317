//! The records of one scope, with their hashes.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use tombolo_proto::model::{Record, RecordKey};
use tombolo_proto::trust::{Digest, ScopeDigest, record_hash, scope_digest};

/// Records of a scope by key. Bodies are shared, hashes are made once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScopeRecords {
    bodies: BTreeMap<RecordKey, Body>,
    bytes: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Body {
    bytes: Arc<[u8]>,
    hash: Digest,
}

fn size(key: &RecordKey, body: &[u8]) -> usize {
    key_size(key) + body.len()
}

/// Bytes of a key on the wire, rounded up.
pub(crate) fn key_size(key: &RecordKey) -> usize {
    16 + key.name().iter().map(|part| part.len() + 4).sum::<usize>()
}

impl ScopeRecords {
    /// How many.
    pub fn len(&self) -> usize {
        self.bodies.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bodies.is_empty()
    }

    /// Bytes of all keys and bodies.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The body of a record.
    pub fn get(&self, key: &RecordKey) -> Option<&Arc<[u8]>> {
        self.bodies.get(key).map(|body| &body.bytes)
    }

    /// All keys and bodies, in order of key.
    pub fn iter(&self) -> impl Iterator<Item = (&RecordKey, &Arc<[u8]>)> {
        self.bodies.iter().map(|(key, body)| (key, &body.bytes))
    }

    /// Keys and bodies of one kind whose keys begin with this part, in order.
    pub fn of<'a>(
        &'a self,
        kind: u32,
        first: &'a str,
    ) -> impl Iterator<Item = (&'a RecordKey, &'a Arc<[u8]>)> {
        let start = RecordKey::new(kind, &[first]);
        let range = start.map(|start| self.bodies.range(start..));
        range
            .into_iter()
            .flatten()
            .take_while(move |(key, _)| {
                key.kind() == kind && key.name().first().is_some_and(|p| **p == *first)
            })
            .map(|(key, body)| (key, &body.bytes))
    }

    pub(crate) fn after<'a>(
        &'a self,
        key: Option<&'a RecordKey>,
    ) -> impl Iterator<Item = (&'a RecordKey, &'a Arc<[u8]>)> {
        let start = key.map_or(Bound::Unbounded, Bound::Excluded);
        self.bodies.range::<RecordKey, _>((start, Bound::Unbounded)).map(|(key, body)| (key, &body.bytes))
    }

    /// Adds or replaces a record.
    pub(crate) fn insert(&mut self, record: Record) {
        let hash = record_hash(&record.body);
        self.insert_hashed(record, hash);
    }

    fn insert_hashed(&mut self, record: Record, hash: Digest) {
        self.remove(&record.key);
        self.bytes += size(&record.key, &record.body);
        self.bodies.insert(record.key, Body { bytes: record.body, hash });
    }

    /// Takes a record away.
    pub(crate) fn remove(&mut self, key: &RecordKey) {
        if let Some(old) = self.bodies.remove(key) {
            self.bytes -= size(key, &old.bytes);
        }
    }

    /// Count and digest; None if empty.
    pub(crate) fn digest(&self) -> Option<ScopeDigest> {
        scope_digest(self.bodies.iter().map(|(key, body)| (key, body.hash)))
    }

    /// The records `new`, with the hashes that are already known here.
    pub(crate) fn rebuilt<'a>(&self, new: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut result = Self::default();
        for record in new {
            let hash = match self.bodies.get(&record.key) {
                Some(old) if old.bytes == record.body => old.hash,
                _ => record_hash(&record.body),
            };
            result.insert_hashed(record.clone(), hash);
        }
        result
    }

    /// Keys whose records differ between two.
    pub fn changed(&self, new: &Self) -> Vec<RecordKey> {
        let differs = |a: &Self, b: &Self| {
            let mut keys = Vec::new();
            for (key, body) in &a.bodies {
                if b.bodies.get(key).is_none_or(|other| other.hash != body.hash) {
                    keys.push(key.clone());
                }
            }
            keys
        };
        let mut keys = differs(self, new);
        keys.extend(new.bodies.keys().filter(|key| !self.bodies.contains_key(key)).cloned());
        keys
    }
}

impl FromIterator<Record> for ScopeRecords {
    fn from_iter<I: IntoIterator<Item = Record>>(records: I) -> Self {
        let mut result = Self::default();
        records.into_iter().for_each(|record| result.insert(record));
        result
    }
}
