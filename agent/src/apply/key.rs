//! The private keys of this node's devices: made at first start, kept in a directory only root reads, and made anew by
//! command or when the clock went back.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use data_encoding::BASE64;
use thiserror::Error;
use tombolo_proto::model::{Device, DeviceNumber, Lanes, WireguardKey};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// A Curve25519 private key. No Debug, wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct DeviceKey([u8; 32]);

impl DeviceKey {
    /// The public half.
    pub fn public(&self) -> WireguardKey {
        WireguardKey(PublicKey::from(&StaticSecret::from(self.0)).to_bytes())
    }

    /// For the device alone.
    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(64));
        BASE64.encode_append(&self.0, &mut text);
        text.push('\n');
        text
    }

    fn make() -> Result<Self, getrandom::Error> {
        let mut key = Self([0; 32]);
        getrandom::fill(&mut key.0)?;
        Ok(key)
    }
}

/// Why there are no keys.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file system said no.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// A verb.
        what: &'static str,
        /// Of what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a key.
    #[error(
        "{} is not a WireGuard private key (32 bytes in base64); remove it to give this device a new identity", .0.display()
    )]
    Corrupt(PathBuf),
    /// Others could read it.
    #[error("{} can be read by others than its owner (mode {mode:04o}); run `chmod 0600` on it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No randomness.
    #[error("the system has no random numbers: {0}")]
    Random(getrandom::Error),
}

/// A device's keys.
pub struct Pair {
    /// Its identity.
    pub current: DeviceKey,
    /// The one before, while the device answers to it too: peers learn of a rotation at their own time.
    pub previous: Option<DeviceKey>,
    /// The device has the current one, so that others may be told.
    told: bool,
}

/// How a rotation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// It was done before.
    Done,
    /// There are new keys.
    Made,
    /// The rotation before is not over: devices still answer to the keys before. To be tried again.
    Waits,
}

/// The keys of all devices that a node may have. A rotation makes them anew: each new key is on the disk before
/// the device has it, and the device has it before others hear of it.
pub struct DeviceKeys {
    directory: PathBuf,
    pairs: Mutex<BTreeMap<DeviceNumber, Arc<Pair>>>,
}

/// The last rotation that was asked for and made, as a number.
const ROTATED: &str = "rotated";
/// One that is being made.
const ROTATING: &str = "rotating";
/// What the file of a device's previous key ends in.
const PREVIOUS: &str = "previous";

impl DeviceKeys {
    /// Reads those of all `lanes` from `directory`, a file `tombolo<n>` each, and makes the ones that are missing. A file that is no
    /// key is an error, never overwritten: a key is the node's identity towards its peers. A rotation that was cut off
    /// is brought to its end.
    pub fn load(directory: &Path, lanes: Lanes) -> Result<Self, KeyError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| KeyError::Io { what: "create", path: directory.to_owned(), source })?;
        let pair = |number: DeviceNumber| {
            let current = read_or_make(directory, number)?;
            let previous = read(&previous_path(directory, number))?;
            // Cut off between the two: it has not begun.
            let previous = previous.filter(|previous| previous.public() != current.public());
            let told = previous.is_none();
            Ok((number, Arc::new(Pair { current, previous, told })))
        };
        let pairs = DeviceNumber::all(lanes).map(pair).collect::<Result<_, KeyError>>()?;
        let keys = Self { directory: directory.to_owned(), pairs: Mutex::new(pairs) };
        if let Some(wish) = keys.number(ROTATING)? {
            keys.finish(wish)?;
        }
        Ok(keys)
    }

    fn pairs(&self) -> MutexGuard<'_, BTreeMap<DeviceNumber, Arc<Pair>>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keys of a device.
    pub fn get(&self, number: DeviceNumber) -> Option<Arc<Pair>> {
        self.pairs().get(&number).cloned()
    }

    /// What others are told: the key that the device has. `published`: what they were told last, which counts after a
    /// restart in the midst of a rotation.
    pub fn public(
        &self,
        published: Option<&BTreeMap<DeviceNumber, Device>>,
    ) -> BTreeMap<DeviceNumber, Device> {
        let key = |number: &DeviceNumber, pair: &Pair| {
            let current = pair.current.public();
            let before = pair.previous.as_ref().filter(|_| !pair.told).map(DeviceKey::public);
            let published = published.and_then(|devices| devices.get(number)).map(|device| device.key);
            before.filter(|_| published != Some(current)).unwrap_or(current)
        };
        let device = |(number, pair): (&DeviceNumber, &Arc<Pair>)| {
            (*number, Device { key: key(number, pair), port: number.default_port() })
        };
        self.pairs().iter().map(device).collect()
    }

    /// Makes all keys anew, once for each `wish` that is larger than the one before. The previous ones stay, until
    /// [`Self::handle_device`] learns that devices are through with them; no other rotation begins before that.
    pub fn rotate(&self, wish: u64) -> Result<Rotation, KeyError> {
        if self.number(ROTATED)?.is_some_and(|done| done >= wish) {
            return Ok(Rotation::Done);
        }
        if let Some(begun) = self.number(ROTATING)? {
            // The disk was full, say.
            self.finish(begun)?;
            return Ok(Rotation::Made);
        }
        if self.pairs().values().any(|pair| pair.previous.is_some()) {
            return Ok(Rotation::Waits);
        }
        self.write(ROTATING, wish)?;
        self.finish(wish)?;
        Ok(Rotation::Made)
    }

    /// Makes the keys that are not yet made anew, and remembers that it was done.
    fn finish(&self, wish: u64) -> Result<(), KeyError> {
        let left: Vec<_> =
            self.pairs().iter().filter(|(_, pair)| pair.previous.is_none()).map(|(n, _)| *n).collect();
        left.into_iter().try_for_each(|number| self.renew(number))?;
        self.write(ROTATED, wish)?;
        remove(&self.directory.join(ROTATING))
    }

    /// Makes the key of one device anew. What was its previous one is gone.
    pub fn renew(&self, number: DeviceNumber) -> Result<(), KeyError> {
        let Some(pair) = self.get(number) else { return Ok(()) };
        let current = DeviceKey::make().map_err(KeyError::Random)?;
        let path = self.directory.join(number.link());
        let new = self.directory.join(format!(".{}.new", number.link()));
        let old = self.directory.join(format!(".{}.old", number.link()));
        create(&new, current.text().as_bytes())?;
        remove(&old)?;
        // There is a current key at every moment.
        fs::hard_link(&path, &old)
            .and_then(|()| fs::rename(&old, previous_path(&self.directory, number)))
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| fs::File::open(&self.directory)?.sync_all())
            .map_err(|source| KeyError::Io { what: "replace", path, source })?;
        let pair = Pair { current, previous: Some(pair.current.clone()), told: false };
        self.pairs().insert(number, Arc::new(pair));
        Ok(())
    }

    /// What keys a device has: `None` if there is no such device. It has the current one: others may be told. It does
    /// not answer to the previous one any more: that is forgotten.
    pub fn handle_device(
        &self,
        number: DeviceNumber,
        has: Option<(WireguardKey, Option<WireguardKey>)>,
    ) -> Result<(), KeyError> {
        let Some(pair) = self.get(number) else { return Ok(()) };
        let Some(previous) = &pair.previous else { return Ok(()) };
        if has.is_some_and(|(current, _)| current != pair.current.public()) {
            return Ok(());
        }
        let previous = previous.clone();
        let keep = has.is_some_and(|(_, other)| other == Some(previous.public()));
        if keep && pair.told {
            return Ok(());
        }
        if !keep {
            remove(&previous_path(&self.directory, number))?;
        }
        let pair = Pair { current: pair.current.clone(), previous: keep.then_some(previous), told: true };
        self.pairs().insert(number, Arc::new(pair));
        Ok(())
    }

    fn number(&self, name: &str) -> Result<Option<u64>, KeyError> {
        let path = self.directory.join(name);
        match fs::read_to_string(&path) {
            // One that cannot be read asks for nothing, and was nothing.
            Ok(text) => Ok(text.trim_end().parse().ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KeyError::Io { what: "read", path, source }),
        }
    }

    fn write(&self, name: &str, number: u64) -> Result<(), KeyError> {
        let (path, new) = (self.directory.join(name), self.directory.join(format!(".{name}.new")));
        create(&new, format!("{number}\n").as_bytes())?;
        fs::rename(&new, &path)
            .and_then(|()| fs::File::open(&self.directory)?.sync_all())
            .map_err(|source| KeyError::Io { what: "write", path, source })
    }
}

fn previous_path(directory: &Path, number: DeviceNumber) -> PathBuf {
    directory.join(format!("{}.{PREVIOUS}", number.link()))
}

fn remove(path: &Path) -> Result<(), KeyError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(KeyError::Io { what: "remove", path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

/// A new file, on the disk; one that is there was left by somebody who died.
fn create(path: &Path, content: &[u8]) -> Result<(), KeyError> {
    let error = |what| move |source| KeyError::Io { what, path: path.to_owned(), source };
    remove(path)?;
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(error("create"))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(error("write"))
}

fn read_or_make(directory: &Path, number: DeviceNumber) -> Result<DeviceKey, KeyError> {
    let path = directory.join(number.link());
    if let Some(key) = read(&path)? {
        return Ok(key);
    }
    let key = DeviceKey::make().map_err(KeyError::Random)?;
    // Whole or not at all: a half-written key would be somebody else's after the next start.
    let new = directory.join(format!(".{}.new", number.link()));
    create(&new, key.text().as_bytes())?;
    fs::rename(&new, &path)
        .and_then(|()| fs::File::open(directory)?.sync_all())
        .map_err(|source| KeyError::Io { what: "write", path, source })?;
    Ok(key)
}

/// A key from its file, if there is one.
fn read(path: &Path) -> Result<Option<DeviceKey>, KeyError> {
    let error = |what| move |source| KeyError::Io { what, path: path.to_owned(), source };
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(error("open")(e)),
    };
    let mode = file.metadata().map_err(error("examine"))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Open { path: path.to_owned(), mode });
    }
    let mut text = Zeroizing::new(String::with_capacity(64));
    file.take(64).read_to_string(&mut text).map_err(error("read"))?;
    parse(&text).map(Some).ok_or_else(|| KeyError::Corrupt(path.to_owned()))
}

fn parse(text: &str) -> Option<DeviceKey> {
    let bytes = Zeroizing::new(BASE64.decode(text.trim_end().as_bytes()).ok()?);
    let mut key = DeviceKey([0; 32]);
    if bytes.len() != 32 {
        return None;
    }
    key.0.copy_from_slice(&bytes);
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_once_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let first = DeviceKeys::load(&keys, Lanes::ONE).unwrap_or_else(|e| panic!("{e}")).public(None);
        assert_eq!(first.len(), 8);
        assert_eq!(DeviceKeys::load(&keys, Lanes::ONE).unwrap_or_else(|e| panic!("{e}")).public(None), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&keys), mode(&keys.join("tombolo3"))), (0o700, 0o600));
        let more =
            DeviceKeys::load(&keys, Lanes::new(3).unwrap()).unwrap_or_else(|e| panic!("{e}")).public(None);
        let different: std::collections::BTreeSet<_> = more.values().map(|d| d.key).collect();
        assert_eq!(different.len(), 24);
        assert!(first.iter().all(|(number, device)| more[number] == *device));
        assert_eq!(DeviceKeys::load(&keys, Lanes::ONE).unwrap_or_else(|e| panic!("{e}")).public(None), first);
    }

    #[test]
    fn a_rotation_is_made_once_and_others_hear_of_it_when_the_device_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let load = || DeviceKeys::load(dir.path(), Lanes::ONE).unwrap_or_else(|e| panic!("{e}"));
        let number = DeviceNumber::new(1).unwrap();
        let keys = load();
        let first = keys.public(None);
        assert_eq!(keys.rotate(7).unwrap(), Rotation::Made);
        assert_eq!(keys.rotate(7).unwrap(), Rotation::Done);
        assert_eq!(keys.rotate(6).unwrap(), Rotation::Done);
        assert_eq!(keys.rotate(8).unwrap(), Rotation::Waits);
        let pair = keys.get(number).unwrap();
        let (old, new) = (pair.previous.as_ref().unwrap().public(), pair.current.public());
        assert_eq!((first[&number].key, keys.public(None)), (old, first.clone()));
        keys.handle_device(number, Some((old, None))).unwrap();
        assert_eq!(keys.public(None), first);
        // The device has it, and answers to the one before.
        keys.handle_device(number, Some((new, Some(old)))).unwrap();
        let published = keys.public(Some(&first));
        assert_eq!(published[&number].key, new);
        // A restart in the midst takes nothing back.
        let keys = load();
        assert_eq!(keys.rotate(7).unwrap(), Rotation::Done);
        assert_eq!((keys.public(None), keys.public(Some(&published))), (first, published));
        assert_eq!(keys.get(number).unwrap().previous.as_ref().map(DeviceKey::public), Some(old));
        keys.handle_device(number, Some((new, None))).unwrap();
        assert!(!dir.path().join("tombolo1.previous").exists());
        // Of devices that are not there nobody uses the key before.
        let numbers: Vec<_> = keys.pairs().keys().copied().collect();
        numbers.into_iter().for_each(|number| keys.handle_device(number, None).unwrap());
        assert_eq!(keys.rotate(8).unwrap(), Rotation::Made);
        assert_eq!(load().get(number).unwrap().previous.as_ref().map(DeviceKey::public), Some(new));
    }

    #[test]
    fn a_rotation_that_is_cut_off_is_brought_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let load = || DeviceKeys::load(dir.path(), Lanes::ONE).unwrap_or_else(|e| panic!("{e}"));
        let keys = load();
        let first = keys.public(None);
        // It died after the third key, and in the midst of the fourth.
        keys.write(ROTATING, 5).unwrap();
        let numbers: Vec<_> = first.keys().copied().collect();
        numbers[..3].iter().for_each(|number| keys.renew(*number).unwrap());
        let current: Vec<_> = numbers[..3].iter().map(|n| keys.get(*n).unwrap().current.public()).collect();
        fs::hard_link(dir.path().join(numbers[3].link()), previous_path(dir.path(), numbers[3])).unwrap();
        let keys = load();
        for (at, number) in numbers.iter().enumerate() {
            let pair = keys.get(*number).unwrap();
            assert_eq!(pair.previous.as_ref().map(DeviceKey::public), Some(first[number].key));
            assert!(pair.current.public() != first[number].key);
            assert!(at >= 3 || current[at] == pair.current.public());
        }
        assert_eq!(keys.rotate(5).unwrap(), Rotation::Done);
        assert!(!dir.path().join(ROTATING).exists());
    }

    #[test]
    fn a_damaged_or_open_key_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(DeviceKeys::load(dir.path(), Lanes::ONE).is_ok());
        let file = dir.path().join("tombolo2");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, &text[..20]).unwrap();
        assert!(matches!(DeviceKeys::load(dir.path(), Lanes::ONE), Err(KeyError::Corrupt(_))));
        assert_eq!(fs::read_to_string(&file).unwrap(), &text[..20]);
        fs::write(&file, &text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(DeviceKeys::load(dir.path(), Lanes::ONE), Err(KeyError::Open { mode: 0o644, .. })));
    }
}
