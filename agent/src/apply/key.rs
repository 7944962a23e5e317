//! The private keys of this node's devices: made at first start, kept in a directory only root reads.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use thiserror::Error;
use tombolo_proto::model::{Device, DeviceFamily, DeviceNumber, Lane, Rank, WireguardKey};
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

/// The keys of all lane-0 devices that a node may have.
pub struct DeviceKeys(BTreeMap<DeviceNumber, DeviceKey>);

impl DeviceKeys {
    /// Reads them from `directory`, a file `tombolo<n>` each, and makes the ones that are missing. A file that is no
    /// key is an error, never overwritten: a key is the node's identity towards its peers.
    pub fn load(directory: &Path) -> Result<Self, KeyError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| KeyError::Io { what: "create", path: directory.to_owned(), source })?;
        let ranks = [Rank::NODE].into_iter().chain(Rank::GATEWAYS);
        let numbers = ranks.flat_map(|rank| {
            [DeviceFamily::Out, DeviceFamily::In].map(|family| DeviceNumber::of(family, rank, Lane::FIRST))
        });
        let keys = numbers.map(|number| Ok((number, read_or_make(directory, number)?)));
        keys.collect::<Result<_, _>>().map(Self)
    }

    /// The key of a device.
    pub fn get(&self, number: DeviceNumber) -> Option<&DeviceKey> {
        self.0.get(&number)
    }

    /// What others are told.
    pub fn public(&self) -> BTreeMap<DeviceNumber, Device> {
        self.0
            .iter()
            .map(|(number, key)| (*number, Device { key: key.public(), port: number.default_port() }))
            .collect()
    }
}

fn read_or_make(directory: &Path, number: DeviceNumber) -> Result<DeviceKey, KeyError> {
    let path = directory.join(number.link());
    let error = |what| {
        let path = path.clone();
        move |source| KeyError::Io { what, path, source }
    };
    match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
        Ok(file) => {
            let mode = file.metadata().map_err(error("examine"))?.mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(KeyError::Open { path, mode });
            }
            let mut text = Zeroizing::new(String::with_capacity(64));
            file.take(64).read_to_string(&mut text).map_err(error("read"))?;
            parse(&text).ok_or(KeyError::Corrupt(path))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let key = DeviceKey::make().map_err(KeyError::Random)?;
            let text = Zeroizing::new(BASE64.encode(key.bytes()));
            // Whole or not at all: a half-written key would be somebody else's after the next start.
            let new = directory.join(format!(".{}.new", number.link()));
            let _ = fs::remove_file(&new);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&new)
                .map_err(error("create"))?;
            file.write_all(text.as_bytes())
                .and_then(|()| file.write_all(b"\n"))
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&new, &path))
                .and_then(|()| fs::File::open(directory)?.sync_all())
                .map_err(error("write"))?;
            Ok(key)
        }
        Err(e) => Err(error("open")(e)),
    }
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
        let first = DeviceKeys::load(&keys).unwrap_or_else(|e| panic!("{e}")).public();
        assert_eq!(first.len(), 8);
        assert_eq!(DeviceKeys::load(&keys).unwrap_or_else(|e| panic!("{e}")).public(), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&keys), mode(&keys.join("tombolo3"))), (0o700, 0o600));
        let different: std::collections::BTreeSet<_> = first.values().map(|d| d.key).collect();
        assert_eq!(different.len(), 8);
    }

    #[test]
    fn a_damaged_or_open_key_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(DeviceKeys::load(dir.path()).is_ok());
        let file = dir.path().join("tombolo2");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, &text[..20]).unwrap();
        assert!(matches!(DeviceKeys::load(dir.path()), Err(KeyError::Corrupt(_))));
        assert_eq!(fs::read_to_string(&file).unwrap(), &text[..20]);
        fs::write(&file, &text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(DeviceKeys::load(dir.path()), Err(KeyError::Open { mode: 0o644, .. })));
    }
}
