//! Writes in `state/`: compare-and-swap under a lock, by rename, so that nobody ever reads half an object.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::reader::state_path;
use super::tree::{self, ReadError, Stamp};
use crate::api::kind::{Kind, ObjectId, Problem, time};
use crate::api::{Applied, Error, Version};

/// What a writer holds, and where it makes files before they are renamed into place.
#[derive(Debug, Clone, Copy)]
struct Lane {
    lock: &'static str,
    temporary: &'static str,
}

/// For all objects but the Lease.
const OBJECTS: Lane = Lane { lock: ".lock", temporary: ".tmp" };
/// For the Lease alone: thousands of slices on their way to the disk must not cost the lead.
const LEASE: Lane = Lane { lock: ".lease.lock", temporary: ".lease.tmp" };
/// How long to wait for the lock. Holders need milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// More new files than this are flushed by one call for the whole disk.
const FLUSH_ALL: usize = 8;
/// See the same in `reader.rs`: a file this young may change within the grain of its time.
const GRAIN: Duration = Duration::from_millis(50);

/// The objects in `state/`, for writers.
pub(super) struct Store {
    top: PathBuf,
    cache: Mutex<BTreeMap<String, Cached>>,
}

#[derive(Clone)]
struct Cached {
    stamp: Stamp,
    young: bool,
    value: Option<Arc<Value>>,
}

/// What is there of an object: None if its file is damaged.
pub(super) type Found = Option<Arc<Value>>;

impl Store {
    pub(super) fn new(top: PathBuf) -> Self {
        Self { top, cache: Mutex::new(BTreeMap::new()) }
    }

    /// Reads one object, without the lock: renames are atomic.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub(super) fn read(&self, id: &ObjectId) -> Result<Option<Arc<Value>>, Error> {
        let path = state_path(id);
        match tree::read(&self.top, &path) {
            Ok((_, bytes)) => match serde_json::from_slice(&bytes) {
                Ok(value) => Ok(Some(Arc::new(value))),
                Err(error) => Err(Error::Object {
                    object: id.to_string(),
                    message: format!("state/{path} is damaged ({error}); restore it, or remove it"),
                }),
            },
            Err(ReadError::Gone) => Ok(None),
            Err(error) => Err(object_error(id, &error.problem())),
        }
    }

    /// Reads without the lock: what is prepared so has to be compared with what is there under it.
    ///
    /// # Errors
    /// What `body` returned, or what the system said.
    pub(super) fn look<T>(
        &self,
        body: impl FnOnce(&Transaction<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let top = File::open(&self.top).map_err(Error::io("open", &self.top))?;
        body(&Transaction {
            store: self,
            lane: OBJECTS,
            _lock: top,
            puts: BTreeMap::new(),
            order: Vec::new(),
            deletes: BTreeSet::new(),
        })
    }

    /// Runs `body` under the lock and writes what it put, all or, if this process dies, the first few.
    ///
    /// # Errors
    /// What `body` returned, and then nothing was written; or what the system said.
    pub(super) fn transact(
        &self,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<(), Error>,
    ) -> Result<Applied, Error> {
        self.run(OBJECTS, body)
    }

    /// As [`Self::transact`], for the Lease and nothing else.
    ///
    /// # Errors
    /// As [`Self::transact`].
    pub(super) fn transact_lease(
        &self,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<(), Error>,
    ) -> Result<Applied, Error> {
        self.run(LEASE, body)
    }

    fn run(
        &self,
        lane: Lane,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<(), Error>,
    ) -> Result<Applied, Error> {
        if !self.top.is_dir() {
            return Err(Error::NotADirectory {
                path: self.top.parent().unwrap_or(&self.top).to_owned(),
                problem: "it has no state/".to_owned(),
            });
        }
        let lock = self.lock(lane)?;
        self.clean(lane)?;
        let mut transaction = Transaction {
            store: self,
            lane,
            _lock: lock,
            puts: BTreeMap::new(),
            order: Vec::new(),
            deletes: BTreeSet::new(),
        };
        body(&mut transaction)?;
        transaction.commit()
    }

    fn lock(&self, lane: Lane) -> Result<File, Error> {
        let path = self.top.join(lane.lock);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(Error::io("open the lock", &path))?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if start.elapsed() >= PATIENCE => {
                    return Err(Error::Locked { path, seconds: PATIENCE.as_secs() });
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
            }
        }
    }

    /// Removes what a writer that was killed left behind. Only under the lock, so no writer is alive.
    fn clean(&self, lane: Lane) -> Result<(), Error> {
        let dir = self.top.join(lane.temporary);
        make_dir(&dir, 0o700)?;
        for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))?.flatten() {
            let _ = fs::remove_file(entry.path());
        }
        Ok(())
    }

    fn cache(&self) -> MutexGuard<'_, BTreeMap<String, Cached>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An object as it is now; a file that did not change is not read again.
    fn find(&self, path: &str, stamp: Stamp) -> Result<Option<Found>, ReadError> {
        if let Some(known) = self.cache().get(path)
            && known.stamp == stamp
            && !known.young
        {
            return Ok(Some(known.value.clone()));
        }
        match tree::read(&self.top, path) {
            Ok((stamp, bytes)) => {
                let value: Found = serde_json::from_slice(&bytes).ok().map(Arc::new);
                let young = stamp.age() < GRAIN || stamp.is_ahead();
                self.cache().insert(path.to_owned(), Cached { stamp, young, value: value.clone() });
                Ok(Some(value))
            }
            Err(ReadError::Gone) => {
                self.cache().remove(path);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Reads and writes under the lock.
pub(super) struct Transaction<'a> {
    store: &'a Store,
    lane: Lane,
    _lock: File,
    puts: BTreeMap<ObjectId, Value>,
    order: Vec<ObjectId>,
    deletes: BTreeSet<ObjectId>,
}

impl Transaction<'_> {
    /// An object as it is; the inner None if its file is damaged.
    pub(super) fn get(&self, id: &ObjectId) -> Result<Option<Found>, Error> {
        let path = state_path(id);
        match tree::stamp(&self.store.top, &path) {
            Ok(stamp) => self.store.find(&path, stamp).map_err(|e| object_error(id, &e.problem())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(None),
            Err(error) => Err(Error::io("read", self.store.top.join(path))(error)),
        }
    }

    /// All objects of a kind.
    pub(super) fn list(&self, kind: Kind) -> Result<BTreeMap<ObjectId, Found>, Error> {
        let mut found = BTreeMap::new();
        let top = self.store.top.join(kind.plural());
        let listing = match tree::list(&top, &[".json"], usize::MAX) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(Error::io("list", top)(error)),
        };
        for (path, stamp) in listing.files {
            let path = format!("{}/{path}", kind.plural());
            let Ok(id) = super::reader::state_id(&path) else {
                continue; // not ours; the reader says so
            };
            if let Some(value) = self.store.find(&path, stamp).map_err(|e| object_error(&id, &e.problem()))? {
                found.insert(id, value);
            }
        }
        Ok(found)
    }

    /// Puts an object if it is not there just so. Its uid and creationTimestamp stay; its resourceVersion grows.
    pub(super) fn put(&mut self, id: &ObjectId, mut value: Value) -> Result<(), Error> {
        let known = self.get(id)?.flatten();
        let old = known.as_ref().and_then(|known| known.get("metadata"));
        let kept = |field: &str| old.and_then(|meta| meta.get(field)).cloned();
        let meta = value.get_mut("metadata").and_then(Value::as_object_mut).ok_or_else(|| {
            object_error(id, &Problem::error("BadObject", "an object without metadata is not written"))
        })?;
        for field in ["uid", "creationTimestamp", "resourceVersion"] {
            if let Some(kept) = kept(field) {
                meta.insert(field.to_owned(), kept);
            }
        }
        if known.as_deref() == Some(&value) {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            // Grows over an object's deletion too, so that a version is never met twice.
            let before = kept("resourceVersion").and_then(|v| v.as_str()?.parse::<u64>().ok()).unwrap_or(0);
            let micros = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
            let version = micros.max(before.saturating_add(1));
            meta.insert("resourceVersion".to_owned(), Value::String(version.to_string()));
            meta.entry("uid").or_insert_with(|| Value::String(new_uid()));
            meta.entry("creationTimestamp").or_insert_with(|| crate::api::kind::json(&time(now.as_secs())));
        }
        self.deletes.remove(id);
        if self.puts.insert(id.clone(), value).is_none() {
            self.order.push(id.clone());
        }
        Ok(())
    }

    /// Puts an object that must still be at `expected` (None: not exist).
    pub(super) fn swap(
        &mut self,
        id: &ObjectId,
        value: Value,
        expected: Option<&Version>,
    ) -> Result<Version, Error> {
        let known = self.get(id)?;
        let found =
            known.as_ref().map(|value| value.as_deref().map_or_else(|| Version(String::new()), version));
        if found.as_ref() != expected {
            return Err(Error::Conflict { object: id.to_string() });
        }
        self.put(id, value)?;
        Ok(self.puts.get(id).map(version).or(found).unwrap_or_else(|| Version(String::new())))
    }

    /// Deletes an object if it is there.
    pub(super) fn delete(&mut self, id: &ObjectId) -> Result<(), Error> {
        if self.puts.remove(id).is_some() {
            self.order.retain(|i| i != id);
        }
        if self.get(id)?.is_some() {
            self.deletes.insert(id.clone());
        }
        Ok(())
    }

    fn commit(self) -> Result<Applied, Error> {
        let top = &self.store.top;
        let temporary = top.join(self.lane.temporary);
        let all = self.order.len() > FLUSH_ALL;
        let mut made = Vec::new();
        for (number, id) in self.order.iter().enumerate() {
            let path = temporary.join(number.to_string());
            let Some(value) = self.puts.get(id) else { continue };
            let mode = if id.kind == Kind::Secret { 0o600 } else { 0o644 };
            write_file(&path, value, mode, !all)?;
            made.push((path, id, value));
        }
        if all {
            flush_disk(top)?;
        }
        let mut dirs = BTreeSet::new();
        for (path, id, value) in &made {
            let relative = state_path(id);
            let target = top.join(&relative);
            let dir = target.parent().unwrap_or(top).to_owned();
            if !dirs.contains(&dir) {
                let mode = if id.kind == Kind::Secret { 0o700 } else { 0o755 };
                make_dir(&dir, mode)?;
                dirs.insert(dir);
            }
            fs::rename(path, &target).map_err(Error::io("write", &target))?;
            if let Ok(stamp) = tree::stamp(top, &relative)
                && id.kind != Kind::Secret
            {
                let value = Some(Arc::new((*value).clone()));
                self.store.cache().insert(relative, Cached { stamp, young: true, value });
            }
        }
        for id in &self.deletes {
            let relative = state_path(id);
            let target = top.join(&relative);
            match fs::remove_file(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("delete", target)(error));
                }
                _ => {}
            }
            self.store.cache().remove(&relative);
            dirs.extend(target.parent().map(Path::to_owned));
        }
        if dirs.len() > FLUSH_ALL {
            flush_disk(top)?;
        } else {
            for dir in dirs {
                let flushed = File::open(&dir).and_then(|dir| dir.sync_all());
                flushed.map_err(Error::io("flush", &dir))?;
            }
        }
        Ok(Applied { written: made.len(), deleted: self.deletes.len() })
    }
}

/// The version of an object.
pub(super) fn version(value: &Value) -> Version {
    let text = value.pointer("/metadata/resourceVersion").and_then(Value::as_str);
    Version(text.unwrap_or_default().to_owned())
}

pub(super) fn object_error(id: &ObjectId, problem: &Problem) -> Error {
    Error::Object { object: id.to_string(), message: problem.message.clone() }
}

/// A directory that may be there already, with those above it. Only a new one gets the mode.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<(), Error> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(Error::io("make the directory", path))
}

fn write_file(path: &Path, value: &Value, mode: u32, flush: bool) -> Result<(), Error> {
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(Error::io("make", path))?;
    // Pretty, since people look into these files.
    serde_json::to_writer_pretty(&mut *bytes, value).map_err(|e| Error::io("encode", path)(e.into()))?;
    bytes.push(b'\n');
    if bytes.len() as u64 > tree::MAX_BYTES {
        return Err(Error::io("write", path)(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "the object is too large",
        )));
    }
    file.write_all(&bytes).map_err(Error::io("write", path))?;
    if flush { file.sync_all().map_err(Error::io("flush", path)) } else { Ok(()) }
}

fn flush_disk(path: &Path) -> Result<(), Error> {
    let dir = File::open(path).map_err(Error::io("open", path))?;
    nix::unistd::syncfs(&dir).map_err(|error| Error::io("flush", path)(error.into()))
}

/// A random UUID (version 4); of zeros if the system has no randomness, since it only tells objects apart.
fn new_uid() -> String {
    let mut bytes = [0_u8; 16];
    let _ = getrandom::fill(&mut bytes);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = data_encoding::HEXLOWER.encode(&bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
