//! Sees changes of a directory: by inotify, and by looking every few seconds, since disks of other machines
//! tell nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::watch;
use tombolo_agent_core::finding::{Finding, Severity};

use super::memory::Memory;
use super::reader::{Half, Reader, SETTLED};
use super::{MANIFESTS, STATE};
use crate::api::observed::Observed;

/// People's files: so long after the last change are they read.
const QUIET_MANIFESTS: Duration = Duration::from_millis(20);
/// Ours, which change in one step.
const QUIET_STATE: Duration = Duration::from_millis(3);
/// Changes that never pause are read all the same.
const LONGEST: Duration = Duration::from_millis(100);
/// Everything is looked at so often, whatever inotify says.
const SLOW: Duration = Duration::from_secs(5);
/// The same without inotify.
const SLOW_ALONE: Duration = Duration::from_millis(500);

/// Ends the watching thread when dropped.
pub(super) struct Watching {
    stop: Arc<EventFd>,
    receiver: watch::Receiver<Arc<Observed>>,
}

impl Watching {
    /// Starts a thread that reads `root` whenever it changes, with a memory of good manifests.
    ///
    /// # Errors
    /// If the system gives no thread or descriptor.
    pub(super) fn start(root: PathBuf, memory: Option<Memory>) -> std::io::Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sender, receiver) = watch::channel(Arc::new(Observed::default()));
        let thread_stop = Arc::clone(&stop);
        std::thread::Builder::new()
            .name("directory".to_owned())
            .spawn(move || Watcher::new(root, memory, sender, thread_stop).run())?;
        Ok(Self { stop, receiver })
    }

    /// What is observed.
    pub(super) fn receiver(&self) -> watch::Receiver<Arc<Observed>> {
        self.receiver.clone()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
    }
}

struct Watcher {
    root: PathBuf,
    reader: Reader,
    sender: watch::Sender<Arc<Observed>>,
    stop: Arc<EventFd>,
    inotify: Option<Inotify>,
    watched: BTreeMap<WatchDescriptor, Option<(Half, String)>>,
    refused: Option<Errno>,
}

/// What events said since the last reading.
#[derive(Default)]
struct Dirty {
    closed: BTreeSet<(Half, String)>,
    all: bool,
    people: bool,
    since: Option<Instant>,
    last: Option<Instant>,
}

impl Dirty {
    fn note(&mut self, now: Instant, half: Half) {
        self.people |= half == Half::Manifests;
        self.since.get_or_insert(now);
        self.last = Some(now);
    }

    /// When to read.
    fn due(&self) -> Option<Instant> {
        let quiet = if self.people { QUIET_MANIFESTS } else { QUIET_STATE };
        Some((self.last? + quiet).min(self.since? + LONGEST))
    }
}

impl Watcher {
    fn new(
        root: PathBuf,
        memory: Option<Memory>,
        sender: watch::Sender<Arc<Observed>>,
        stop: Arc<EventFd>,
    ) -> Self {
        let mut reader = Reader::new(&root);
        if let Some(memory) = memory {
            reader.remember(memory);
        }
        let (inotify, refused) = match Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK) {
            Ok(inotify) => (Some(inotify), None),
            Err(error) => (None, Some(error)),
        };
        Self { root, reader, sender, stop, inotify, watched: BTreeMap::new(), refused }
    }

    fn run(mut self) {
        let mut dirty = Dirty::default();
        let mut slow = self.scan(&BTreeSet::new());
        loop {
            let now = Instant::now();
            let due = dirty.due();
            if due.is_some_and(|due| due <= now) {
                let work = std::mem::take(&mut dirty);
                if work.all {
                    slow = self.scan(&work.closed);
                } else {
                    self.reader.refresh(&work.closed);
                    self.publish();
                }
                continue;
            }
            if slow <= now {
                slow = self.scan(&BTreeSet::new());
                continue;
            }
            let until = due.map_or(slow, |due| due.min(slow));
            match self.wait(until.saturating_duration_since(now)) {
                Wake::Stop => return,
                Wake::Time => {}
                Wake::Events => {
                    if self.events(&mut dirty) {
                        slow = slow.min(Instant::now() + SETTLED + QUIET_MANIFESTS);
                    }
                }
            }
            if self.sender.is_closed() {
                return;
            }
        }
    }

    fn wait(&self, time: Duration) -> Wake {
        let mut fds = vec![PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.inotify.as_ref().map(|i| PollFd::new(i.as_fd(), PollFlags::POLLIN)));
        let millis = u16::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        if poll(&mut fds, PollTimeout::from(millis)).is_err() {
            return Wake::Time; // a signal; the loop looks at the clock
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
        match (fds.first().is_some_and(ready), fds.get(1).is_some_and(ready)) {
            (true, _) => Wake::Stop,
            (_, true) => Wake::Events,
            _ => Wake::Time,
        }
    }

    /// Takes what inotify has. True if a file is being written, and nobody may tell when it is done.
    fn events(&mut self, dirty: &mut Dirty) -> bool {
        let Some(inotify) = &self.inotify else { return false };
        let mut open = false;
        // Bounded: a stream of events without end is taken in turns.
        for _ in 0..64 {
            let Ok(events) = inotify.read_events() else { break };
            let now = Instant::now();
            for event in events {
                let mask = event.mask;
                if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    dirty.all = true;
                    dirty.note(now, Half::State);
                    continue;
                }
                let Some(place) = self.watched.get(&event.wd).cloned() else { continue };
                let half = place.as_ref().map_or(Half::State, |(half, _)| *half);
                let structure = AddWatchFlags::IN_ISDIR
                    | AddWatchFlags::IN_DELETE_SELF
                    | AddWatchFlags::IN_MOVE_SELF
                    | AddWatchFlags::IN_IGNORED
                    | AddWatchFlags::IN_UNMOUNT;
                let name = event.name.as_deref().and_then(|name| name.to_str());
                if name.is_some_and(|name| name.starts_with('.')) {
                    continue;
                }
                if mask.contains(AddWatchFlags::IN_IGNORED) {
                    self.watched.remove(&event.wd);
                }
                if mask.intersects(structure) {
                    dirty.all = true;
                    dirty.note(now, half);
                    continue;
                }
                let (Some((half, dir)), Some(name)) = (place, name) else { continue };
                let path = if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") };
                let done = AddWatchFlags::IN_CLOSE_WRITE
                    | AddWatchFlags::IN_MOVED_TO
                    | AddWatchFlags::IN_MOVED_FROM
                    | AddWatchFlags::IN_DELETE;
                if mask.intersects(done) {
                    dirty.closed.insert((half, path));
                    dirty.note(now, half);
                } else {
                    open = true;
                }
            }
        }
        open
    }

    /// Looks at everything; returns when to do it again.
    fn scan(&mut self, closed: &BTreeSet<(Half, String)>) -> Instant {
        let mut again = self.reader.scan(closed);
        // A directory that came between listing and watching may hold what nobody told of: look again.
        for _ in 0..3 {
            if !self.watch_all() {
                break;
            }
            again |= self.reader.scan(closed);
        }
        self.publish();
        let pause = match (&self.inotify, self.refused) {
            (Some(_), None) => SLOW,
            _ => SLOW_ALONE,
        };
        Instant::now() + if again { pause.min(SETTLED + QUIET_MANIFESTS) } else { pause }
    }

    /// Watches every directory that is there. True if one is new.
    fn watch_all(&mut self) -> bool {
        let Some(inotify) = &self.inotify else { return false };
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR
            | AddWatchFlags::IN_DONT_FOLLOW;
        let mut watched = BTreeMap::new();
        self.refused = None;
        let mut add = |path: &Path, place: Option<(Half, String)>, flags| match inotify.add_watch(path, flags)
        {
            Ok(descriptor) => {
                watched.insert(descriptor, place);
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(error) => self.refused = Some(error),
        };
        add(&self.root, None, flags.difference(AddWatchFlags::IN_DONT_FOLLOW));
        for (half, dir) in self.reader.dirs() {
            let top = match half {
                Half::Manifests => self.root.join(MANIFESTS),
                Half::State => self.root.join(STATE),
            };
            add(&top.join(dir), Some((half, dir.to_owned())), flags);
        }
        let new = watched.keys().any(|descriptor| !self.watched.contains_key(descriptor));
        self.watched = watched;
        new
    }

    fn publish(&mut self) {
        let mut observed = self.reader.observed();
        if let Some(error) = self.refused {
            observed.findings.push(Finding {
                severity: Severity::Warning,
                reason: "NoInotify",
                object: format!("directory {}", self.root.display()),
                message: format!(
                    "changes are seen late, since inotify refuses ({}); raise fs.inotify.max_user_instances and fs.inotify.max_user_watches",
                    error.desc()
                ),
            });
            observed.findings.sort();
        }
        self.sender.send_if_modified(|known| {
            let new = **known != observed;
            if new {
                *known = Arc::new(observed);
            }
            new
        });
    }
}

enum Wake {
    Stop,
    Time,
    Events,
}
