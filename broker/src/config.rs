//! What a broker starts from.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use data_encoding::BASE64;
use tombolo_proto::trust::SigningKey;
use tombolo_replica::{Quota, SetFile, SetFileError};
use zeroize::Zeroizing;

/// Everything a broker needs beside its store.
pub struct Config {
    /// Where members come.
    pub listen: SocketAddr,
    /// Health, metrics and debugging; plain HTTP, for the own machine or pod network only.
    pub admin: Option<SocketAddr>,
    /// The broker's key.
    pub identity: SigningKey,
    /// Its set.
    pub set: SetFile,
    /// Bounds of what is held.
    pub quota: Quota,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not there, or not ours.
    #[error("{what} {path} cannot be read: {reason}")]
    Read {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: String,
        /// From the system.
        reason: String,
    },
    /// Open to everybody.
    #[error(
        "the identity {path} can be read by everybody on this machine (mode {mode:04o}): run `chmod 600 {path}`, and if others were here, make a new one (tombolo init)"
    )]
    Open {
        /// The file.
        path: String,
        /// Its permissions.
        mode: u32,
    },
    /// Not a key.
    #[error(
        "the identity {path} is not an Ed25519 seed (32 bytes in base64): use the file that `tombolo init` wrote"
    )]
    Identity {
        /// The file.
        path: String,
    },
    /// Not a set file.
    #[error("{path}: {source}")]
    Set {
        /// The file.
        path: String,
        /// Why.
        source: SetFileError,
    },
}

fn read(what: &'static str, path: &Path) -> Result<String, FileError> {
    let fail = |reason: String| FileError::Read { what, path: path.display().to_string(), reason };
    let size = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.len();
    if size > 1024 * 1024 {
        return Err(fail(format!("it has {size} bytes, far more than it should")));
    }
    std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))
}

/// Reads the broker's key: an Ed25519 seed in base64, in a file that not everybody can read. (The group may:
/// Kubernetes gives secrets to a pod by group.)
pub fn read_identity(path: &Path) -> Result<SigningKey, FileError> {
    let text = Zeroizing::new(read("the identity", path)?);
    let mode = std::fs::metadata(path).map(|meta| meta.permissions().mode()).unwrap_or_default() & 0o7777;
    if mode & 0o007 != 0 {
        return Err(FileError::Open { path: path.display().to_string(), mode });
    }
    let bytes = BASE64.decode(text.trim().as_bytes()).ok().map(Zeroizing::new);
    match bytes.as_ref().and_then(|bytes| <&[u8; 32]>::try_from(bytes.as_slice()).ok()) {
        Some(seed) => Ok(SigningKey::from_seed(seed)),
        None => Err(FileError::Identity { path: path.display().to_string() }),
    }
}

/// Reads the set file.
pub fn read_set(path: &Path) -> Result<SetFile, FileError> {
    let text = read("the set file", path)?;
    SetFile::parse(&text).map_err(|source| FileError::Set { path: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_private_and_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity");
        let write = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            read_identity(&path).map(|key| key.public()).map_err(|error| error.to_string())
        };
        let text = BASE64.encode(&[5; 32]);
        assert_eq!(write(&format!("{text}\n"), 0o600), Ok(SigningKey::from_seed(&[5; 32]).public()));
        assert!(write(&text, 0o640).is_ok());
        assert!(write(&text, 0o604).unwrap_err().contains("chmod 600"));
        for bad in ["", "AAAA", "not base64 at all", &BASE64.encode(&[5; 33])] {
            let error = write(bad, 0o600).unwrap_err();
            assert!(error.contains("tombolo init") && !error.contains(&text), "{error}");
        }
    }
}
