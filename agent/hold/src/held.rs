//! The child's side: taking what the supervisor holds.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::keeper::Keeper;
use crate::{ENV, HoldError, check_name};

/// The name under which a child finds its [`Keeper`].
const KEEPER: &str = "_keeper";

/// The descriptors this process was given by its supervisor, by name.
#[derive(Debug)]
pub struct Held {
    fds: BTreeMap<String, OwnedFd>,
    keeper: Keeper,
}

impl Held {
    /// What the supervisor gave, or `None` in a process that has no supervisor. To be called once, first thing.
    ///
    /// # Errors
    /// The variable is damaged or was inherited from a process further up.
    pub fn from_env() -> Result<Option<Self>, HoldError> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let Ok(text) = std::env::var(ENV) else { return Ok(None) };
        let (parent, fds) = parse(&text).ok_or(HoldError::Environment)?;
        if parent != std::os::unix::process::parent_id() {
            return Err(HoldError::Environment);
        }
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(HoldError::Taken);
        }
        let mut owned = BTreeMap::new();
        for (name, fd) in fds {
            // SAFETY: fcntl takes any number; a closed one is an error. Our own children shall not inherit it.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
                return Err(HoldError::Environment);
            }
            // SAFETY: open, as just seen; named by our direct parent for us, and taken once only.
            owned.insert(name, unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let keeper = owned.remove(KEEPER).map(Keeper::new).ok_or(HoldError::Environment)?;
        Ok(Some(Self { fds: owned, keeper }))
    }

    /// Takes the descriptor held as `name`, if there is one.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.fds.remove(name)
    }

    /// The names not taken yet.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fds.keys().map(String::as_str)
    }

    /// The line to the supervisor; what was not taken is closed here (and stays held there).
    pub fn into_keeper(self) -> Keeper {
        self.keeper
    }
}

/// What a supervisor writes into [`ENV`].
pub(crate) fn encode(parent: u32, fds: impl Iterator<Item = (String, RawFd)>, keeper: RawFd) -> String {
    fds.fold(format!("{parent},{KEEPER}={keeper}"), |text, (name, fd)| format!("{text},{name}={fd}"))
}

fn parse(text: &str) -> Option<(u32, BTreeMap<String, RawFd>)> {
    let mut parts = text.split(',');
    let parent = parts.next()?.parse().ok()?;
    let mut fds = BTreeMap::new();
    for part in parts {
        let (name, fd) = part.split_once('=')?;
        let fd: RawFd = fd.parse().ok().filter(|fd| *fd > 2)?;
        check_name(name).ok()?;
        let known = fds.values().any(|other| *other == fd);
        if known || fds.insert(name.to_owned(), fd).is_some() {
            return None;
        }
    }
    Some((parent, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let text = encode(7, [("tun".to_owned(), 5), ("udp4".to_owned(), 9)].into_iter(), 4);
        let (parent, fds) = parse(&text).unwrap();
        assert_eq!(parent, 7);
        assert_eq!(
            fds.into_iter().collect::<Vec<_>>(),
            [("_keeper".to_owned(), 4), ("tun".to_owned(), 5), ("udp4".to_owned(), 9)]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "x", "7,a", "7,a=", "7,a=-1", "7,a=1", "7,a=4,a=5", "7,a=4,b=4", "7,A=4", "7,,"] {
            assert!(parse(text).is_none(), "{text}");
        }
        assert!(parse("7").is_some());
    }
}
