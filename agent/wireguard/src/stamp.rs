//! When each key last called anybody, kept over restarts.
//!
//! An initiation carries the wall clock, and a peer takes none that is not newer than the last (WireGuard paper, 5.1). So
//! a device that starts with its clock behind calls in vain until the clock has caught up; it may still be called, since
//! an answer needs no stamp. It notices by these stamps: an agent then gives it a new key, for which peers remember
//! nothing; without one it says so, and waits to be called.
//!
//! A stamp is written down some seconds late ([`EVERY`]): a smaller step back goes unnoticed, and heals in that time.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use data_encoding::BASE64;

use crate::device::Moment;
use crate::key::PublicKey;
use crate::name::DeviceName;

/// How often stamps are written down at most.
pub const EVERY: Duration = Duration::from_secs(30);

/// Where they are, if nothing else is said.
pub const DIRECTORY: &str = "/var/lib/tombolo/wireguard";

/// The variable that says something else.
pub const VARIABLE: &str = "TOMBOLO_WIREGUARD_STATE_DIR";

/// Keys that one file may name; a device has two.
const MOST: usize = 8;

/// The last initiation of each key, since 1970.
#[derive(Default)]
pub struct Stamps(BTreeMap<PublicKey, (Duration, Option<Instant>)>);

impl Stamps {
    /// What was written down, or known otherwise, of a key.
    pub fn remember(&mut self, key: PublicKey, stamp: Duration) {
        let (last, _) = self.0.entry(key).or_default();
        *last = (*last).max(stamp);
    }

    /// A key called somebody. A clock that is set back meanwhile does not set back the stamps of sessions that are
    /// there: they count on.
    pub fn note(&mut self, key: PublicKey, at: Moment) {
        let (last, when) = self.0.entry(key).or_default();
        let on = when.map_or(Duration::ZERO, |when| at.now.saturating_duration_since(when));
        (*last, *when) = ((*last + on).max(at.wall), Some(at.now));
    }

    /// Of one key.
    pub fn last(&self, key: &PublicKey) -> Option<Duration> {
        self.0.get(key).map(|(last, _)| *last)
    }

    /// Forgets keys.
    pub fn retain(&mut self, keep: impl Fn(&PublicKey) -> bool) {
        self.0.retain(|key, _| keep(key));
    }

    /// As text: a line for each key, which is public.
    pub fn text(&self) -> String {
        self.0.iter().map(|(key, (last, _))| format!("{key} {}\n", last.as_secs())).collect()
    }

    /// Remembers what [`Self::text`] wrote; lines that are none are passed over.
    pub fn read(&mut self, text: &str) {
        for line in text.lines().take(MOST) {
            let Some((key, seconds)) = line.split_once(' ') else { continue };
            let (Ok(key), Ok(seconds)) = (BASE64.decode(key.as_bytes()), seconds.parse()) else { continue };
            if let Ok(key) = <[u8; 32]>::try_from(key) {
                self.remember(PublicKey::new(key), Duration::from_secs(seconds));
            }
        }
    }
}

/// Writes stamps down, on a thread of its own: a slow disk must not hold up packets.
pub struct Keeper {
    path: PathBuf,
    texts: Option<SyncSender<String>>,
    written: String,
    due: Instant,
}

impl Keeper {
    /// For a device, in the directory that [`VARIABLE`] names, else [`DIRECTORY`].
    pub fn new(device: &DeviceName, now: Instant) -> Self {
        let directory = std::env::var_os(VARIABLE).map_or_else(|| DIRECTORY.into(), PathBuf::from);
        Self { path: directory.join(device.as_str()), texts: None, written: String::new(), due: now }
    }

    /// What an earlier process wrote down.
    pub fn load(&mut self, stamps: &mut Stamps) {
        let mut text = String::new();
        let read = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&self.path);
        match read.and_then(|file| file.take(4096).read_to_string(&mut text)) {
            Ok(_) => stamps.read(&text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %self.path.display(), %error, "stamps cannot be read"),
        }
        self.written = text;
    }

    /// Writes them if they changed and it is time, or the last time.
    pub fn keep(&mut self, stamps: &Stamps, now: Instant, last: bool) {
        if now < self.due && !last {
            return;
        }
        let text = stamps.text();
        if text == self.written || text.is_empty() {
            return;
        }
        self.due = now + EVERY;
        if last {
            if let Err(error) = write(&self.path, &text) {
                tracing::debug!(path = %self.path.display(), %error, "stamps not written");
            }
            return;
        }
        if self.texts.is_none() {
            self.texts = start(self.path.clone());
        }
        // If the disk is still busy with the one before, the next time will do.
        if self.texts.as_ref().is_some_and(|texts| texts.try_send(text.clone()).is_ok()) {
            self.written = text;
        }
    }
}

fn start(path: PathBuf) -> Option<SyncSender<String>> {
    let (texts, receiver) = sync_channel::<String>(1);
    let work = move || {
        let mut told = false;
        for text in receiver {
            let result = write(&path, &text);
            if let Err(error) = &result
                && !told
            {
                tracing::warn!(
                    path = %path.display(), %error,
                    "stamps cannot be written: after a restart a clock that went back would not be noticed; \
                     make the directory writable, or name another in {VARIABLE}"
                );
            }
            told = result.is_err();
        }
    };
    std::thread::Builder::new().name("stamps".into()).spawn(work).ok().map(|_| texts)
}

/// Whole or not at all.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = directory.join(format!(".{name}.new"));
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_read_back_and_never_go_back() {
        let (a, b) = (PublicKey::new([1; 32]), PublicKey::new([2; 32]));
        let mut stamps = Stamps::default();
        let at = |wall: u64, now| Moment { now, wall: Duration::from_secs(wall) };
        let start = Instant::now();
        stamps.note(a, at(1000, start));
        // The clock is set back by 900 s; ten seconds pass.
        stamps.note(a, at(110, start + Duration::from_secs(10)));
        stamps.remember(b, Duration::from_secs(5));
        assert_eq!(stamps.last(&a), Some(Duration::from_secs(1010)));
        let mut again = Stamps::default();
        again.read(&format!("nonsense\nAAAA 7\n{}", stamps.text()));
        assert_eq!((again.last(&a), again.last(&b)), (stamps.last(&a), stamps.last(&b)));
        again.remember(a, Duration::from_secs(3));
        assert_eq!(again.last(&a), Some(Duration::from_secs(1010)));
        again.retain(|key| *key == b);
        assert_eq!(again.last(&a), None);
    }

    #[test]
    fn a_file_keeps_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/wg0");
        let now = Instant::now();
        let mut keeper = Keeper { path: path.clone(), texts: None, written: String::new(), due: now };
        let mut stamps = Stamps::default();
        stamps.remember(PublicKey::new([1; 32]), Duration::from_secs(1000));
        keeper.keep(&stamps, now, true);
        let mut read = Stamps::default();
        keeper.load(&mut read);
        assert_eq!(read.text(), stamps.text());
    }
}
