//! One device for each file in a directory.
//!
//! A file's name is the device's name; its content means nothing yet. Devices are processes of their own and outlive
//! `serve`, whatever ends it: packets depend on it in nothing. A `serve` that starts adopts devices that are there
//! (their UAPI socket answers and their interface exists in this network namespace). A device ends when its file
//! goes, also while no `serve` runs, if a `serve` had kept it: that is remembered, by the inode of its socket, in the
//! hidden directory `.kept`. Devices that were made by others and have no file are left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use thiserror::Error;

use crate::name::DeviceName;
use crate::server;

/// Devices of one directory at most; more files are named in the log and left alone.
pub const MAX_DEVICES: usize = 128;

const KEPT: &str = ".kept";

/// How often everything is looked at, if nothing tells of a change.
const SLOW: Duration = Duration::from_secs(5);

/// While something is under way.
const SOON: Duration = Duration::from_millis(100);

const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How long a device may take to end before it is asked again.
const PATIENCE: Duration = Duration::from_secs(15);

/// Why devices cannot be kept.
#[derive(Debug, Error)]
#[error("cannot {what} {path}: {source}")]
pub struct ServeError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Keeps a device for each file in `directory`, which is made if it does not exist, until SIGTERM or SIGINT; the
/// devices live on.
pub fn run(directory: &Path) -> Result<(), ServeError> {
    let fail = |what| move |source: io::Error| ServeError { what, path: directory.to_owned(), source };
    fs::create_dir_all(directory.join(KEPT)).map_err(fail("create"))?;
    let mask: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    mask.thread_block().map_err(io::Error::from).map_err(fail("block signals for"))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(io::Error::from)
        .map_err(fail("watch signals for"))?;
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .map_err(io::Error::from)
        .map_err(fail("watch"))?;
    let interest = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_ONLYDIR;
    watch.add_watch(directory, interest).map_err(io::Error::from).map_err(fail("watch"))?;

    let mut keeper = Keeper::new(directory);
    tracing::info!(directory = %directory.display(), "keeping devices");
    loop {
        let wait = if keeper.reconcile(Instant::now()) { SLOW } else { SOON };
        let mut fds =
            [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX));
        // What happened is seen by looking; that it did is enough.
        while watch.read_events().is_ok_and(|events| !events.is_empty()) {}
        while let Ok(Some(info)) = signals.read_signal() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                tracing::info!("ending; the devices live on");
                return Ok(());
            }
        }
        keeper.reap();
    }
}

struct Keeper {
    directory: PathBuf,
    /// Devices we started, by process.
    children: BTreeMap<i32, DeviceName>,
    /// Starts that failed: how often, and when to try again.
    failed: BTreeMap<DeviceName, (u32, Instant)>,
    /// Devices asked to end, and when.
    asked: BTreeMap<DeviceName, Instant>,
    /// File names complained about.
    odd: BTreeSet<String>,
}

impl Keeper {
    fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            children: BTreeMap::new(),
            failed: BTreeMap::new(),
            asked: BTreeMap::new(),
            odd: BTreeSet::new(),
        }
    }

    /// Starts what should be there and is not, ends what was kept and should not be. True if nothing is left to do.
    fn reconcile(&mut self, now: Instant) -> bool {
        // A directory that cannot be read says nothing about what is wanted.
        let Ok(wanted) = self.wanted() else { return true };
        let mut settled = true;
        for name in &wanted {
            self.asked.remove(name);
            if let Some(inode) = alive(name) {
                self.failed.remove(name);
                self.remember(name, inode);
                continue;
            }
            settled &= self.failed.get(name).is_some_and(|(_, at)| *at > now + SLOW);
            let waits = self.failed.get(name).is_some_and(|(_, at)| *at > now);
            if !waits && !self.children.values().any(|child| child == name) {
                self.start(name, now);
            }
        }
        self.failed.retain(|name, _| wanted.contains(name));
        let unwanted: Vec<_> = self
            .children
            .iter()
            .filter(|(_, name)| !wanted.contains(name))
            .map(|(p, n)| (*p, n.clone()))
            .collect();
        for (pid, name) in unwanted {
            settled = false;
            if self.ask(&name, now) {
                // Our own child, not reaped yet: the number is still its.
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
        }
        for (name, inode) in self.kept() {
            if wanted.contains(&name) || self.children.values().any(|child| *child == name) {
                continue;
            }
            if server::inode(&server::path_of(&name)) == Some(inode) && server::answers(&name) {
                settled = false;
                if self.ask(&name, now) {
                    end(&name);
                }
            } else {
                tracing::info!(device = %name, "ended, as its file is gone");
                self.asked.remove(&name);
                let _ = fs::remove_file(self.mark(&name));
            }
        }
        settled
    }

    /// Whether it is time to ask a device to end, for the first time or again.
    fn ask(&mut self, name: &DeviceName, now: Instant) -> bool {
        let due = self.asked.get(name).is_none_or(|at| now.saturating_duration_since(*at) > PATIENCE);
        if due {
            self.asked.insert(name.clone(), now);
        }
        due
    }

    fn wanted(&mut self) -> io::Result<BTreeSet<DeviceName>> {
        let mut wanted = BTreeSet::new();
        for entry in fs::read_dir(&self.directory)? {
            let file = entry?.file_name().to_string_lossy().into_owned();
            if file.starts_with('.') {
                continue;
            }
            match file.parse::<DeviceName>() {
                Ok(name) if wanted.len() < MAX_DEVICES => {
                    wanted.insert(name);
                }
                Ok(_) if self.odd.insert(file.clone()) => {
                    tracing::warn!(file, "more than {MAX_DEVICES} devices: this one is left out");
                }
                Err(error) if self.odd.insert(file) => tracing::warn!(%error, "file left alone"),
                _ => {}
            }
        }
        // Bounded: a complaint may be repeated.
        if self.odd.len() > 1000 {
            self.odd.clear();
        }
        Ok(wanted)
    }

    fn start(&mut self, name: &DeviceName, now: Instant) {
        // Until it answers this start counts as failed.
        let (times, at) = self.failed.entry(name.clone()).or_insert((0, now));
        *at = now + Duration::from_secs(1 << (*times).min(5)).min(LONGEST_WAIT);
        *times += 1;
        if *times == 1 && nix::net::if_::if_nametoindex(name.as_str()).is_ok() {
            // A device that is about to end, it may be; else the next start says what is wrong.
            return;
        }
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
        let started = Command::new(program)
            .args(["--foreground", name.as_str()])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        match started {
            Ok(child) => {
                tracing::info!(device = %name, pid = child.id(), "started");
                self.children.insert(child.id() as i32, name.clone());
            }
            Err(error) => tracing::error!(device = %name, %error, "cannot be started"),
        }
    }

    /// Ours, and, for one that is process 1, everybody's.
    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return,
                Ok(status) => {
                    let name = status.pid().and_then(|pid| self.children.remove(&pid.as_raw()));
                    if let Some(name) = name {
                        tracing::info!(device = %name, ?status, "its process ended");
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn mark(&self, name: &DeviceName) -> PathBuf {
        self.directory.join(KEPT).join(name.as_str())
    }

    fn remember(&self, name: &DeviceName, (device, inode): (u64, u64)) {
        let (mark, text) = (self.mark(name), format!("{device}:{inode}"));
        if fs::read_to_string(&mark).is_ok_and(|old| old == text) {
            return;
        }
        tracing::info!(device = %name, "kept");
        if let Err(error) = fs::write(&mark, text) {
            tracing::warn!(device = %name, %error, "cannot be remembered: it will have to be ended by hand");
        }
    }

    fn kept(&self) -> Vec<(DeviceName, (u64, u64))> {
        let entries = fs::read_dir(self.directory.join(KEPT)).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let name = entry.file_name().to_str()?.parse().ok()?;
                let text = fs::read_to_string(entry.path()).ok()?;
                let (device, inode) = text.split_once(':')?;
                Some((name, (device.parse().ok()?, inode.parse().ok()?)))
            })
            .collect()
    }
}

/// The socket's inode, if the device runs here.
fn alive(name: &DeviceName) -> Option<(u64, u64)> {
    nix::net::if_::if_nametoindex(name.as_str()).ok()?;
    server::answers(name).then(|| server::inode(&server::path_of(name)))?
}

/// Tells the process that listens at the device's socket, its supervisor, to end.
fn end(name: &DeviceName) {
    let path = server::path_of(name);
    let pid = UnixStream::connect(&path)
        .ok()
        .and_then(|stream| getsockopt(&stream, sockopt::PeerCredentials).ok())
        .map(|peer| peer.pid());
    // Zero: it lives in another process namespace; a device whose socket goes ends too.
    let told =
        pid.filter(|pid| *pid > 1).is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok());
    if !told {
        let _ = fs::remove_file(&path);
    }
}
