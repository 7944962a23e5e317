//! The store in one file, by redb.
//!
//! ```text
//! meta       "magic" -> "tombolo-broker"   "format" -> u32   "set" -> 16 bytes
//! documents  u32 -> pb.Documents           in parts of bounded size
//! origins    cluster -> pb.Update          statement and second hash only
//! records    cluster 0 scope-kind namespace 0 u32-kind part 0 part .. -> body
//! ```
//! Leaves are not written: they are made of the records again, and must fit the statement.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use prost::Message as _;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use tombolo_proto::model::{ClusterId, Namespace, Record, RecordKey, Scope};
use tombolo_proto::pb;
use tombolo_proto::trust::{Digest, SetId};
use tombolo_proto::wire::{self, Documents};
use tombolo_replica::{OriginState, ScopeRecords};

use super::{Batch, OriginChange, Store, StoreError, Stored, StoredOrigin};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const DOCUMENTS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("documents");
const ORIGINS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("origins");
const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

const MAGIC: &[u8] = b"tombolo-broker";
const FORMAT: u32 = 1;
const CACHE: usize = 16 * 1024 * 1024;
/// Memberships in one part of the documents.
const PART: usize = 256;

/// A store in `DIR/broker.redb`.
pub struct Embedded {
    path: PathBuf,
    set: SetId,
    /// None after an error: redb refuses everything after a failed write until it is opened anew.
    database: Option<Database>,
}

impl Embedded {
    /// Opens or makes the store of a set in a directory.
    pub fn open(directory: &Path, set: SetId) -> Result<Self, StoreError> {
        let path = directory.join("broker.redb");
        std::fs::create_dir_all(directory).map_err(|error| StoreError::Disk {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        let mut store = Self { path, set, database: None };
        store.reopen()?;
        Ok(store)
    }

    fn reopen(&mut self) -> Result<&Database, StoreError> {
        if self.database.is_none() {
            let fresh = std::fs::metadata(&self.path).map_or(true, |meta| meta.len() == 0);
            let database =
                self.guarded(|| Ok(Database::builder().set_cache_size(CACHE).create(&self.path)?))?;
            self.check(&database, fresh)?;
            self.database = Some(database);
        }
        self.database.as_ref().ok_or_else(|| self.damaged("not open"))
    }

    fn check(&self, database: &Database, fresh: bool) -> Result<(), StoreError> {
        if fresh {
            return self.guarded(|| {
                let write = database.begin_write()?;
                {
                    let mut meta = write.open_table(META)?;
                    meta.insert("magic", MAGIC)?;
                    meta.insert("format", &FORMAT.to_be_bytes()[..])?;
                    meta.insert("set", &self.set.0[..])?;
                    write.open_table(DOCUMENTS)?;
                    write.open_table(ORIGINS)?;
                    write.open_table(RECORDS)?;
                }
                write.commit()?;
                Ok(())
            });
        }
        let read = |name: &str| {
            self.guarded(|| {
                let meta = database.begin_read()?.open_table(META)?;
                Ok(meta.get(name)?.map(|value| value.value().to_vec()))
            })
        };
        if read("magic")?.as_deref() != Some(MAGIC) {
            return Err(self.damaged("it has no mark of ours"));
        }
        let path = self.path.display().to_string();
        let format = read("format")?.and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        match format {
            Some(FORMAT) => {}
            Some(found) if found > FORMAT => return Err(StoreError::Newer { path, found, known: FORMAT }),
            _ => return Err(self.damaged("it has no format")),
        }
        match read("set")?.and_then(|bytes| bytes.try_into().ok()).map(SetId) {
            Some(set) if set == self.set => Ok(()),
            Some(set) => {
                Err(StoreError::OtherSet { path, found: set.to_string(), ours: self.set.to_string() })
            }
            None => Err(self.damaged("it names no set")),
        }
    }

    fn damaged(&self, reason: &str) -> StoreError {
        StoreError::Damaged { path: self.path.display().to_string(), reason: reason.to_owned() }
    }

    /// Runs something on the engine; its panics on damaged files count as damage.
    fn guarded<T>(&self, run: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let path = || self.path.display().to_string();
        let result = catch_unwind(AssertUnwindSafe(run)).map_err(|_| self.damaged("the engine gave up"))?;
        result.map_err(|error| match error {
            redb::Error::DatabaseAlreadyOpen => StoreError::InUse(path()),
            redb::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                self.damaged(&error.to_string())
            }
            redb::Error::Io(error) => StoreError::Disk { path: path(), reason: error.to_string() },
            redb::Error::PreviousIo => {
                StoreError::Disk { path: path(), reason: "an earlier error".to_owned() }
            }
            other => self.damaged(&other.to_string()),
        })
    }
}

impl Store for Embedded {
    fn load(&mut self) -> Result<Stored, StoreError> {
        self.reopen()?;
        let database = self.database.as_ref().ok_or_else(|| self.damaged("not open"))?;
        self.guarded(|| load(database))
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.reopen()?;
        let database = self.database.as_ref().ok_or_else(|| self.damaged("not open"))?;
        let result = self.guarded(|| {
            let write = database.begin_write()?;
            put(&write, batch)?;
            write.commit()?;
            Ok(())
        });
        if result.is_err() {
            self.database = None;
        }
        result
    }
}

fn load(database: &Database) -> Result<Stored, redb::Error> {
    let read = database.begin_read()?;
    let mut stored = Stored::default();
    for entry in read.open_table(DOCUMENTS)?.iter()? {
        let value = entry?.1;
        let documents = pb::Documents::decode(value.value()).ok();
        match documents.and_then(|value| wire::decode_documents(&value).ok()) {
            Some(documents) => stored.documents.push(documents),
            None => stored.unreadable += 1,
        }
    }
    let mut records: BTreeMap<String, BTreeMap<Scope, Vec<Record>>> = BTreeMap::new();
    for entry in read.open_table(RECORDS)?.iter()? {
        let (key, body) = entry?;
        match read_key(key.value()) {
            Some((cluster, scope, key)) => {
                let record = Record { key, body: body.value().into() };
                records.entry(cluster).or_default().entry(scope).or_default().push(record);
            }
            None => stored.unreadable += 1,
        }
    }
    for entry in read.open_table(ORIGINS)?.iter()? {
        let (name, value) = entry?;
        let records = records.remove(name.value()).unwrap_or_default();
        match read_origin(name.value(), value.value(), records) {
            Some(origin) => stored.origins.push(origin),
            None => stored.unreadable += 1,
        }
    }
    Ok(stored)
}

fn read_origin(name: &str, value: &[u8], records: BTreeMap<Scope, Vec<Record>>) -> Option<StoredOrigin> {
    let update = pb::Update::decode(value).ok()?;
    Some(StoredOrigin {
        cluster: ClusterId::new(name).ok()?,
        statement: wire::decode_envelope(update.statement.as_ref()?).ok()?,
        namespaces_hash: Digest(update.namespaces_hash.as_ref().try_into().ok()?),
        records,
    })
}

fn put(write: &WriteTransaction, batch: &Batch) -> Result<(), redb::Error> {
    if let Some(documents) = &batch.documents {
        let mut table = write.open_table(DOCUMENTS)?;
        table.retain(|_, _| false)?;
        for (index, part) in (0..).zip(split(documents)) {
            table.insert(index, wire::encode_documents(&part).encode_to_vec().as_slice())?;
        }
    }
    let mut origins = write.open_table(ORIGINS)?;
    let mut records = write.open_table(RECORDS)?;
    for (cluster, OriginChange { written, state }) in &batch.origins {
        match state {
            Some(state) => {
                let update = pb::Update {
                    statement: Some(wire::encode_envelope(state.statement().envelope())),
                    namespaces_hash: state.namespaces_hash().0.to_vec().into(),
                    ..pb::Update::default()
                };
                origins.insert(cluster.as_str(), update.encode_to_vec().as_slice())?;
            }
            None => {
                origins.remove(cluster.as_str())?;
            }
        }
        if written.is_none() {
            // Nothing of it should be there; what is left of another life must not mix in.
            let head = [cluster.as_str().as_bytes(), &[0]].concat();
            let end = [cluster.as_str().as_bytes(), &[1]].concat();
            records.retain_in(head.as_slice()..end.as_slice(), |_, _| false)?;
        }
        let empty = ScopeRecords::default();
        let side = |state: &Option<_>, scope: &Scope| -> Option<std::sync::Arc<ScopeRecords>> {
            state.as_ref().and_then(|s: &std::sync::Arc<OriginState>| s.records(scope)).cloned()
        };
        let scopes = written.iter().chain(state).flat_map(|s| s.scopes().keys());
        let scopes: std::collections::BTreeSet<&Scope> = scopes.collect();
        for scope in scopes {
            let (old, new) = (side(written, scope), side(state, scope));
            let (old, new) = (old.as_deref().unwrap_or(&empty), new.as_deref().unwrap_or(&empty));
            if std::ptr::eq(old, new) {
                continue;
            }
            for key in old.changed(new) {
                let bytes = write_key(cluster, scope, &key);
                match new.get(&key) {
                    Some(body) => records.insert(bytes.as_slice(), &**body)?,
                    None => records.remove(bytes.as_slice())?,
                };
            }
        }
    }
    Ok(())
}

/// Parts that decode again, whatever the number of memberships.
fn split(documents: &Documents) -> Vec<Documents> {
    let mut parts = vec![Documents { memberships: Vec::new(), ..documents.clone() }];
    parts.extend(
        documents
            .memberships
            .chunks(PART)
            .map(|chunk| Documents { memberships: chunk.to_vec(), ..Documents::default() }),
    );
    parts
}

/// No part of a key holds a zero byte: names are labels, parts are printable.
fn write_key(cluster: &ClusterId, scope: &Scope, key: &RecordKey) -> Vec<u8> {
    let mut bytes = cluster.as_str().as_bytes().to_vec();
    bytes.push(0);
    match scope {
        Scope::Nodes => bytes.push(1),
        Scope::Namespace(namespace) => {
            bytes.push(2);
            bytes.extend(namespace.as_str().as_bytes());
        }
    }
    bytes.push(0);
    bytes.extend(key.kind().to_be_bytes());
    for (index, part) in key.name().iter().enumerate() {
        if index > 0 {
            bytes.push(0);
        }
        bytes.extend(part.as_bytes());
    }
    bytes
}

fn read_key(bytes: &[u8]) -> Option<(String, Scope, RecordKey)> {
    let (cluster, rest) = bytes.split_at(bytes.iter().position(|&b| b == 0)?);
    let (scope, rest) = rest[1..].split_at(rest[1..].iter().position(|&b| b == 0)?);
    let scope = match scope.split_first()? {
        (1, []) => Scope::Nodes,
        (2, name) => Scope::Namespace(Namespace::new(std::str::from_utf8(name).ok()?).ok()?),
        _ => return None,
    };
    let (kind, name) = rest[1..].split_first_chunk::<4>()?;
    let name = std::str::from_utf8(name).ok()?;
    let parts: Vec<&str> = name.split('\0').collect();
    let key = RecordKey::new(u32::from_be_bytes(*kind), &parts)?;
    Some((std::str::from_utf8(cluster).ok()?.to_owned(), scope, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_through() {
        let cluster = ClusterId::new("east").unwrap();
        let namespace = Scope::Namespace(Namespace::new("prod").unwrap());
        for scope in [Scope::Nodes, namespace] {
            for kind in [1, 256, u32::MAX] {
                for parts in [&["a"][..], &["a", "b.c", "~"]] {
                    let key = RecordKey::new(kind, parts).unwrap();
                    let bytes = write_key(&cluster, &scope, &key);
                    assert_eq!(read_key(&bytes), Some(("east".to_owned(), scope.clone(), key)));
                    for cut in 0..bytes.len() {
                        let _ = read_key(&bytes[..cut]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_foreign_file_is_refused_in_one_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broker.redb");
        let open = || Embedded::open(directory.path(), SetId([1; 16])).err().map(|error| error.to_string());
        assert_eq!(open(), None);
        let good = std::fs::read(&path).unwrap();
        let other = Embedded::open(directory.path(), SetId([2; 16])).err().unwrap();
        assert!(matches!(other, StoreError::OtherSet { .. }), "{other}");
        let garbage: Vec<u8> = (0..20_000u32).map(|n| (n * 7) as u8).collect();
        let mut torn = good.clone();
        torn[..300].fill(0xaa);
        for bad in [b"hello".to_vec(), garbage, good[..good.len() / 2].to_vec(), torn] {
            std::fs::write(&path, &bad).unwrap();
            let error = open().expect("refused");
            assert!(error.contains("broker.redb") && error.contains("move it away"), "{error}");
            assert!(!error.contains('\n'), "{error}");
            assert_eq!(std::fs::read(&path).unwrap().len(), bad.len(), "left as it was");
        }
        std::fs::write(&path, &good).unwrap();
        {
            let database = Database::open(&path).unwrap();
            let write = database.begin_write().unwrap();
            write.open_table(META).unwrap().insert("format", &9u32.to_be_bytes()[..]).unwrap();
            write.commit().unwrap();
        }
        assert!(open().unwrap().contains("format 9"));
        std::fs::write(&path, &good).unwrap();
        let held = Embedded::open(directory.path(), SetId([1; 16])).unwrap();
        assert!(open().unwrap().contains("in use"));
        drop(held);
        assert_eq!(open(), None);
    }
}
