//! A place: a network namespace with a mount namespace of its own. Nodes, pods, brokers and the wire are places.
//!
//! Places are held by descriptors, not by names or processes: they end with the lab.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::sandbox::ROOT;

/// A network namespace and a mount namespace.
#[derive(Debug)]
pub struct Place {
    name: String,
    net: OwnedFd,
    mnt: OwnedFd,
}

/// Files of a place that stand in for the machine's.
#[derive(Debug, Default, Clone)]
pub struct Mounts {
    /// What lies at /run there.
    pub run: Option<PathBuf>,
    /// (file of ours, path it stands in for).
    pub files: Vec<(PathBuf, PathBuf)>,
}

impl Place {
    /// Makes a place. Its loopback is up and IPv6 addresses are usable at once (no duplicate detection).
    ///
    /// # Errors
    /// If a namespace or a mount fails.
    pub fn create(name: &str, mounts: &Mounts) -> Result<Self> {
        let make = || -> Result<Self> {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                .context("a namespace")?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            let bind = |from: &Path, to: &Path| {
                mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                    .with_context(|| format!("mounting {} at {}", from.display(), to.display()))
            };
            for (from, to) in &mounts.files {
                // A link into /run (systemd's resolv.conf) dangles once /run is replaced: replace its target.
                let target = std::fs::canonicalize(to).unwrap_or_else(|_| to.clone());
                if target.exists() {
                    bind(from, &target)?;
                } else if let Some(dir) = target.parent() {
                    std::fs::create_dir_all(dir)?;
                    File::create(&target)?;
                    bind(from, &target)?;
                }
            }
            if let Some(run) = &mounts.run {
                bind(run, Path::new("/run"))?;
            }
            let open = |kind: &str| File::open(format!("/proc/thread-self/ns/{kind}")).map(OwnedFd::from);
            for (key, value) in [("all/accept_dad", "0"), ("default/accept_dad", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/{key}"), value)?;
            }
            Ok(Self { name: name.to_owned(), net: open("net")?, mnt: open("mnt")? })
        };
        let place = std::thread::scope(|scope| {
            scope.spawn(make).join().unwrap_or_else(|_| bail!("the thread that makes namespaces panicked"))
        })
        .with_context(|| format!("making {name}"))?;
        place.ip("link set lo up")?;
        Ok(place)
    }

    /// Its name in the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network and the mount namespace, for who wants to enter.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.net.as_fd(), self.mnt.as_fd()]
    }

    /// The network namespace as `ip link ... netns` takes it.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.net.as_raw_fd())
    }

    /// A command that will run here.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        enter(&mut command, self.net.as_raw_fd(), self.mnt.as_raw_fd());
        command
    }

    /// Runs code on a thread of its own in the place's network namespace (the lab's mounts): a socket opened
    /// there stays there.
    ///
    /// # Errors
    /// If the namespace cannot be entered; a panic is passed on as an error.
    pub fn run<T: Send>(&self, code: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                setns(&self.net, CloneFlags::CLONE_NEWNET)?;
                Ok(code())
            });
            thread.join().unwrap_or_else(|_| bail!("code run in {} panicked", self.name))
        })
    }

    /// The same on a thread that goes on; it ends with the lab's process at the latest.
    ///
    /// # Errors
    /// If the thread cannot be made.
    pub fn spawn(&self, code: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>> {
        let net = self.net.try_clone()?;
        let thread = std::thread::Builder::new().name(self.name.clone());
        Ok(thread.spawn(move || {
            if setns(&net, CloneFlags::CLONE_NEWNET).is_ok() {
                code();
            }
        })?)
    }

    /// Runs lines of `ip` as one batch; those that start with `-6` as a second one, after the others.
    ///
    /// # Errors
    /// What `ip` said, with the line that failed.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let (six, rest): (Vec<_>, Vec<_>) =
            batch.lines().partition(|line| line.trim_start().starts_with("-6 "));
        if !rest.is_empty() {
            self.feed(&["ip", "-batch", "-"], &(rest.join("\n") + "\n"))?;
        }
        let six: Vec<_> = six.iter().map(|line| line.trim_start().trim_start_matches("-6 ")).collect();
        if six.is_empty() {
            Ok(())
        } else {
            self.feed(&["ip", "-6", "-batch", "-"], &(six.join("\n") + "\n"))
        }
    }

    /// Runs an nft script.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.feed(&["nft", "-f", "-"], script)
    }

    /// Sets `net.*` keys, given as below /proc/sys/net with slashes.
    ///
    /// # Errors
    /// If a key does not exist or is not ours to write.
    pub fn sysctl(&self, keys: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in keys {
                std::fs::write(format!("/proc/sys/net/{key}"), value)
                    .with_context(|| format!("setting net/{key}"))?;
            }
            Ok(())
        })?
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// If it cannot be started (not if it fails).
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        let (program, rest) = args.split_first().context("an empty command")?;
        self.command(program)
            .args(rest)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{}: {}", self.name, args.join(" ")))
    }

    /// What a command prints.
    ///
    /// # Errors
    /// If it fails: its words.
    pub fn capture(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?;
        ensure!(output.status.success(), "{}: {}: {}", self.name, args.join(" "), words(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether a command succeeds.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn succeeds(&self, args: &[&str]) -> Result<bool> {
        Ok(self.output(args)?.status.success())
    }

    fn feed(&self, args: &[&str], text: &str) -> Result<()> {
        let mut child = self
            .command(args[0])
            .args(&args[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", args[0]))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that fails early closes its end: its own words are the better error.
            let _ = stdin.write_all(text.as_bytes());
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = words(&output);
        let line = said
            .rsplit_once(":-")
            .or_else(|| said.rsplit_once("-:"))
            .and_then(|(_, n)| n.trim().parse::<usize>().ok())
            .and_then(|n| text.lines().nth(n - 1))
            .unwrap_or_default();
        bail!("{}: {}: {said}\n{line}", self.name, args.join(" "))
    }
}

/// Makes a command run in these namespaces.
pub(crate) fn enter(command: &mut Command, net: i32, mnt: i32) {
    // SAFETY: runs between fork and exec; two system calls on descriptors that the parent holds open, and the new
    // process has a single thread, as setns of a mount namespace demands.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(net, libc::CLONE_NEWNET) < 0 || libc::setns(mnt, libc::CLONE_NEWNS) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Both streams of a finished command, for an error.
#[must_use]
pub fn words(output: &Output) -> String {
    let text = [&output.stdout, &output.stderr].map(|s| String::from_utf8_lossy(s).trim().to_owned());
    format!("{}{}{}", text[0], if text[0].is_empty() || text[1].is_empty() { "" } else { "\n" }, text[1])
}

/// The directory of the lab's log files.
#[must_use]
pub fn log_dir() -> PathBuf {
    std::env::var_os("TOMBOLO_LAB_LOGS").map_or_else(|| Path::new(ROOT).join("log"), PathBuf::from)
}
