//! Disks of places: each a small tmpfs, so that one can be full while the others are not.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;

use crate::Lab;

const SIZE: &str = "size=1g,mode=755";
/// Takes the last free page, as an other program's data would.
const FILLER: &str = ".full";

/// Makes a directory a disk of its own.
pub(crate) fn make(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    mount(Some("disk"), dir, Some("tmpfs"), MsFlags::empty(), Some(SIZE))
        .with_context(|| format!("mounting {}", dir.display()))
}

/// The disk of a node, a broker or a cluster's API.
pub(super) fn of(lab: &Lab, name: &str) -> Result<PathBuf> {
    if lab.topology().clusters.iter().any(|c| c.id == name) {
        return Ok(lab.cluster_dir(name));
    }
    lab.place(name)
        .with_context(|| format!("{name} is no cluster either: whose disk is it?"))
        .map(|place| lab.state_dir(place.name()))
}

/// Leaves no room: the file system becomes as small as what is in it.
pub(super) fn fill(dir: &Path) -> Result<()> {
    std::fs::write(dir.join(FILLER), [0; 4096])?;
    let space = statvfs(dir)?;
    let used = (space.blocks() - space.blocks_free()) * space.fragment_size();
    resize(dir, &format!("size={used}"))
}

/// There is room again.
pub(super) fn free(dir: &Path) -> Result<()> {
    resize(dir, SIZE)?;
    Ok(std::fs::remove_file(dir.join(FILLER))?)
}

fn resize(dir: &Path, options: &str) -> Result<()> {
    mount(None::<&str>, dir, None::<&str>, MsFlags::MS_REMOUNT, Some(options))
        .with_context(|| format!("changing the size of {}", dir.display()))
}
