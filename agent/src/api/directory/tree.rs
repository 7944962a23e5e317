//! Files below a directory that others write too: bounded, regular, never through a symbolic link.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::api::kind::Problem;

/// Bytes of a file.
pub(super) const MAX_BYTES: u64 = 4 * 1024 * 1024;
/// Directories below one another.
const MAX_DEPTH: usize = 8;

/// Tells whether a file is still the one that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// How long ago the file was last written; zero if its clock runs ahead of ours.
    pub(super) fn age(&self) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seconds = u64::try_from(self.modified.0).unwrap_or(0);
        let nanos = u32::try_from(self.modified.1).unwrap_or(0);
        now.saturating_sub(Duration::new(seconds, nanos))
    }

    /// Whether its clock runs ahead of ours (another machine's disk).
    pub(super) fn is_ahead(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(self.modified.0).unwrap_or(0) > now.as_secs() + 1
    }
}

/// What lies below a directory.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Regular files with one of the wanted endings, by path below the directory.
    pub(super) files: BTreeMap<String, Stamp>,
    /// Directories, the top ("") too.
    pub(super) dirs: BTreeSet<String>,
    /// Paths that could not be read, below which nothing is known.
    pub(super) unknown: BTreeSet<String>,
    /// What a person should know, by path.
    pub(super) problems: Vec<(String, Problem)>,
}

/// Lists the files below `top` that end in one of `endings`. Names that begin with a dot are passed over.
///
/// # Errors
/// If `top` itself cannot be listed.
pub(super) fn list(top: &Path, endings: &[&str], max_files: usize) -> io::Result<Listing> {
    let mut listing = Listing::default();
    if !fs::symlink_metadata(top)?.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a directory"));
    }
    let mut waiting = vec![(String::new(), 0)];
    while let Some((dir, depth)) = waiting.pop() {
        let entries = match fs::read_dir(top.join(&dir)) {
            Ok(entries) => entries,
            Err(error) if dir.is_empty() => return Err(error),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                let message =
                    format!("the directory cannot be read ({error}); what was in it stays as it was");
                listing.problems.push((dir.clone(), Problem::error("UnreadableFile", message)));
                listing.unknown.insert(dir);
                continue;
            }
        };
        listing.dirs.insert(dir.clone());
        for entry in entries {
            let Ok(entry) = entry else {
                listing.unknown.insert(dir.clone());
                continue;
            };
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let Some(name) = name.to_str() else {
                let path = join(&dir, &name.to_string_lossy());
                listing
                    .problems
                    .push((path, Problem::warning("BadFileName", "the name is not UTF-8; rename it")));
                continue;
            };
            let path = join(&dir, name);
            let wanted = endings.iter().any(|ending| name.ends_with(ending));
            let Ok(meta) = entry.metadata() else {
                continue; // gone since
            };
            if meta.is_dir() {
                if depth + 1 >= MAX_DEPTH {
                    let message = "directories lie too deep here; move it up";
                    // Nobody ever read what is in it, so nothing is withheld.
                    listing.problems.push((path, Problem::error("TooManyFiles", message)));
                } else {
                    waiting.push((path, depth + 1));
                }
            } else if !wanted {
            } else if meta.is_symlink() {
                let message = "it is a symbolic link, which is not followed; put the file itself here";
                listing.problems.push((path, Problem::error("SymbolicLink", message)));
            } else if meta.is_file() {
                if listing.files.len() >= max_files {
                    let message =
                        format!("there are more than {max_files} files; this one and others are not read");
                    listing.problems.push((path.clone(), Problem::error("TooManyFiles", message)));
                    listing.unknown.insert(String::new());
                    return Ok(listing);
                }
                listing.files.insert(path, Stamp::of(&meta));
            }
        }
    }
    Ok(listing)
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

/// Reads a regular file below `top`, following no symbolic link on the way.
pub(super) fn read(top: &Path, path: &str) -> Result<(Stamp, Vec<u8>), ReadError> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let how =
        OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
    let dir = File::open(top).map_err(ReadError::from)?;
    let mut file = match openat2(&dir, path, how) {
        Ok(fd) => File::from(fd),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    let meta = file.metadata().map_err(ReadError::from)?;
    if !meta.is_file() {
        return Err(ReadError::NotAFile);
    }
    if meta.len() > MAX_BYTES {
        return Err(ReadError::TooLarge(meta.len()));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
    file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(ReadError::from)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ReadError::TooLarge(bytes.len() as u64));
    }
    Ok((Stamp::of(&meta), bytes))
}

/// Where a file is now, without reading it.
pub(super) fn stamp(top: &Path, path: &str) -> io::Result<Stamp> {
    fs::symlink_metadata(top.join(path)).map(|meta| Stamp::of(&meta))
}

/// Why a file could not be read.
#[derive(Debug)]
pub(super) enum ReadError {
    Gone,
    NotAFile,
    TooLarge(u64),
    Io(io::Error),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::ENOENT | Errno::ENOTDIR => Self::Gone,
            Errno::ELOOP | Errno::EXDEV => Self::NotAFile,
            _ => Self::Io(error),
        }
    }
}

impl ReadError {
    /// For a person.
    pub(super) fn problem(&self) -> Problem {
        match self {
            Self::Gone => Problem::error("UnreadableFile", "it is gone"),
            Self::NotAFile => Problem::error(
                "SymbolicLink",
                "it is no regular file, or a symbolic link on the way to it; put the file itself here",
            ),
            Self::TooLarge(size) => Problem::error(
                "FileTooLarge",
                format!("it is {size} bytes long, at most {MAX_BYTES} are read; split it into several files"),
            ),
            Self::Io(error) => Problem::error("UnreadableFile", format!("it cannot be read ({error})")),
        }
    }
}
