//! Copies of manifests as they were when last good, in a node's private directory: a broken file must not take an
//! export away just because an agent restarts.

use std::fs;
use std::path::PathBuf;

use super::tree;

/// Copies, at the paths of their originals.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    top: PathBuf,
}

impl Memory {
    pub(super) fn new(top: PathBuf) -> Self {
        Self { top }
    }

    /// Copies a good file. Without a copy nothing is lost but this service, so errors are passed over.
    pub(super) fn keep(&self, path: &str, bytes: &[u8]) {
        if self.recall(path).is_some_and(|known| known == bytes) {
            return;
        }
        let target = self.top.join(path);
        let temporary = self.top.join(".tmp");
        let made = target.parent().map_or(Ok(()), fs::create_dir_all);
        if made.and_then(|()| fs::write(&temporary, bytes)).is_ok() {
            let _ = fs::rename(&temporary, &target);
        }
    }

    /// The copy of a file.
    pub(super) fn recall(&self, path: &str) -> Option<Vec<u8>> {
        tree::read(&self.top, path).ok().map(|(_, bytes)| bytes)
    }

    /// Forgets a file that is gone.
    pub(super) fn forget(&self, path: &str) {
        let _ = fs::remove_file(self.top.join(path));
    }

    /// Forgets all but some files.
    pub(super) fn retain(&self, stays: impl Fn(&str) -> bool) {
        let Ok(listing) = tree::list(&self.top, &[""], usize::MAX) else { return };
        for path in listing.files.keys().filter(|path| !stays(path)) {
            self.forget(path);
        }
    }
}
