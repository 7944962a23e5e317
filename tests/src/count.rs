//! Counts what programs do to the world outside: changes of the kernel's network, writes to a cluster's API.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::Lab;

/// The most that is remembered.
const MOST: usize = 100_000;

/// Something that happened, and when.
type Seen = Arc<Mutex<Vec<(Instant, String)>>>;

fn note(seen: &Seen, what: String) {
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.len() < MOST {
        seen.push((Instant::now(), what));
    }
}

fn all(seen: &Seen) -> Vec<(Instant, String)> {
    seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Watches our links, and all addresses, routes, rules and nftables of nodes, as the kernel announces their changes.
#[derive(Debug)]
pub struct Netlink {
    monitors: Vec<Child>,
    seen: Seen,
}

impl Netlink {
    /// On all nodes but some.
    ///
    /// # Errors
    /// If a monitor cannot be started.
    pub fn watch(lab: &Lab, except: &[&str]) -> Result<Self> {
        let mut watch = Self { monitors: Vec::new(), seen: Seen::default() };
        for node in lab.topology().nodes().filter(|n| !except.contains(&n.name.as_str())) {
            watch.monitor(lab, &node.name, &["ip", "-o", "monitor", "link", "address", "route", "rule"])?;
            watch.monitor(lab, &node.name, &["nft", "monitor"])?;
        }
        Ok(watch)
    }

    fn monitor(&mut self, lab: &Lab, node: &str, args: &[&str]) -> Result<()> {
        let mut command = lab.place(node)?.command(args[0]);
        let mut monitor = command.args(&args[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let out = monitor.stdout.take().context("no output")?;
        self.monitors.push(monitor);
        let (seen, node) = (self.seen.clone(), node.to_owned());
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                // nft ends each transaction with its number and its program. A bridge announces its ports now and then.
                let foreign = line.contains(": <") && !line.contains(": tombolo");
                if !foreign && !line.starts_with("# new generation") {
                    note(&seen, format!("{node}: {line}"));
                }
            }
        });
        Ok(())
    }

    /// Every change so far, as `NODE: WHAT`.
    #[must_use]
    pub fn changes(&self) -> Vec<(Instant, String)> {
        all(&self.seen)
    }

    /// Those of our routes alone.
    #[must_use]
    pub fn routes(&self) -> Vec<(Instant, String)> {
        let ours = |line: &str| line.contains("table 451") || line.contains("table 452");
        self.changes().into_iter().filter(|(_, line)| ours(line)).collect()
    }

    /// Those of the route to a prefix that carries, on a node.
    #[must_use]
    pub fn of(&self, node: &str, prefix: &str) -> Vec<String> {
        let wanted = |line: &String| {
            line.starts_with(&format!("{node}: ")) && line.contains(prefix) && !line.contains("unreachable")
        };
        self.routes().into_iter().map(|(_, line)| line).filter(wanted).collect()
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        for monitor in &mut self.monitors {
            let _ = monitor.kill();
            let _ = monitor.wait();
        }
    }
}

/// Watches what is written to a cluster's API: objects that come, change and go below `state/` and `manifests/`.
#[derive(Debug)]
pub struct Writes {
    seen: Seen,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writes {
    /// Starts counting.
    ///
    /// # Errors
    /// If the directory cannot be watched.
    pub fn watch(lab: &Lab, cluster: &str) -> Result<Self> {
        let root = lab.cluster_dir(cluster);
        let mut tree = Tree { inotify: Inotify::init(InitFlags::IN_NONBLOCK)?, dirs: BTreeMap::new() };
        tree.add(&root)?;
        let (seen, ended) = (Seen::default(), Arc::new(AtomicBool::new(false)));
        let (notes, stop) = (seen.clone(), ended.clone());
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                tree.wait();
                tree.read(&root, &notes);
            }
            tree.read(&root, &notes);
        });
        Ok(Self { seen, ended, thread: Some(thread) })
    }

    /// Every write so far: the path below the cluster's directory.
    #[must_use]
    pub fn writes(&self) -> Vec<(Instant, String)> {
        all(&self.seen)
    }
}

impl Drop for Writes {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Tree {
    inotify: Inotify,
    dirs: BTreeMap<WatchDescriptor, PathBuf>,
}

impl Tree {
    fn add(&mut self, dir: &Path) -> Result<()> {
        // An object is written by renaming a file into its place; what is written in place counts too.
        let flags = AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_CREATE;
        let watch =
            self.inotify.add_watch(dir, flags).with_context(|| format!("watching {}", dir.display()))?;
        self.dirs.insert(watch, dir.to_owned());
        for entry in std::fs::read_dir(dir)?.flatten().filter(|e| e.path().is_dir()) {
            // Where files wait for their rename.
            if !entry.file_name().to_string_lossy().starts_with('.') {
                self.add(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Until there is something to read, or a moment is over.
    fn wait(&self) {
        let mut readable = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut readable, PollTimeout::from(50_u8));
    }

    fn read(&mut self, root: &Path, seen: &Seen) {
        for event in self.inotify.read_events().unwrap_or_default() {
            let (Some(dir), Some(name)) = (self.dirs.get(&event.wd), event.name) else { continue };
            let path = dir.join(&name);
            if event.mask.contains(AddWatchFlags::IN_ISDIR) {
                if event.mask.contains(AddWatchFlags::IN_CREATE) && !name.to_string_lossy().starts_with('.') {
                    // It may be gone again.
                    let _ = self.add(&path);
                }
                continue;
            }
            // Locks and files on their way to their place begin with a dot.
            if event.mask.contains(AddWatchFlags::IN_CREATE) || name.to_string_lossy().starts_with('.') {
                continue;
            }
            note(seen, path.strip_prefix(root).unwrap_or(&path).display().to_string());
        }
    }
}
