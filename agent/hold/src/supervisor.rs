//! The process that holds and restarts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::keeper::Line;
use crate::{ENV, HoldError, MAX_HELD, Restarts, check_name, held, keeper};

/// What happens to the child, for the log.
#[derive(Debug)]
pub enum Event {
    /// It runs.
    Started {
        /// Its process id.
        pid: i32,
    },
    /// It died and will be started again.
    Died {
        /// How, in words.
        how: String,
        /// When the next one starts.
        restart_in: Duration,
    },
    /// It could not be started; this is tried again.
    Failed {
        /// Why.
        error: HoldError,
        /// When.
        restart_in: Duration,
    },
}

/// Holds descriptors and keeps one child running that uses them.
///
/// The child ends the supervisor by exiting with 0 or with one of [`final_codes`](Self::final_codes); dying in any
/// other way it is restarted at once (after many deaths in a row with a growing delay, see [`Restarts`]). SIGTERM
/// and SIGINT go to the child, and the supervisor ends when it has; SIGHUP is passed on. If the supervisor itself
/// dies the kernel sends the child SIGTERM. A child that retires ([`crate::Keeper::retire`]) is followed by another at
/// once, and is told nothing any more but the supervisor's death. Other children (orphans that fall to a supervisor which is process 1)
/// are reaped.
#[derive(Debug)]
pub struct Supervisor {
    program: PathBuf,
    args: Vec<OsString>,
    held: BTreeMap<String, OwnedFd>,
    final_codes: Vec<i32>,
    grace: Duration,
}

impl Supervisor {
    /// One whose child is this same program, run with `args`. A program file that is replaced meanwhile is
    /// what the next child runs.
    pub fn current_exe(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Self, HoldError> {
        let program = std::env::current_exe().map_err(|e| HoldError::io("find this program's file", e))?;
        Ok(Self::program(program, args))
    }

    /// One whose child is another program.
    pub fn program(program: impl Into<PathBuf>, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            held: BTreeMap::new(),
            final_codes: Vec::new(),
            grace: Duration::from_secs(10),
        }
    }

    /// Holds `fd` as `name`.
    pub fn hold(&mut self, name: &str, fd: impl Into<OwnedFd>) -> Result<&mut Self, HoldError> {
        check_name(name)?;
        if self.held.len() >= MAX_HELD {
            return Err(HoldError::TooMany);
        }
        self.held.insert(name.to_owned(), fd.into());
        Ok(self)
    }

    /// Exit codes, beside 0, that mean the child wants no restart.
    pub fn final_codes(&mut self, codes: impl IntoIterator<Item = i32>) -> &mut Self {
        self.final_codes = codes.into_iter().collect();
        self
    }

    /// How long a child may take to end after SIGTERM before it is killed (10 s unless told).
    pub fn grace(&mut self, grace: Duration) -> &mut Self {
        self.grace = grace;
        self
    }

    /// Runs until the child has ended for good and returns its exit code (128 + the signal if it died of one).
    ///
    /// To be called from a thread that lives as long as the process, before there are others: it blocks signals,
    /// and the child is told to end when this *thread* does.
    ///
    /// # Errors
    /// Only what fails before the first child runs.
    pub fn run(&mut self, mut on_event: impl FnMut(Event)) -> Result<i32, HoldError> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().map_err(|e| HoldError::io("block signals", e))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|e| HoldError::io("watch signals", e))?;

        let mut restarts = Restarts::default();
        let mut child = Some(self.spawn()?);
        let mut start_at = None;
        let mut kill_at = None;
        let mut stopping = false;
        if let Some(child) = &child {
            on_event(Event::Started { pid: child.pid.as_raw() });
        }
        loop {
            if self.wait(&signals, child.as_mut(), [start_at, kill_at].into_iter().flatten().min())
                && !stopping
            {
                (child, start_at) = (None, Some(Instant::now()));
            }

            while let Ok(Some(info)) = signals.read_signal() {
                let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else { continue };
                match (signal, &child) {
                    (Signal::SIGCHLD, _) => {}
                    (Signal::SIGHUP, child) => child.iter().for_each(|c| c.signal(signal)),
                    (_, None) => return Ok(0),
                    (_, Some(child)) => {
                        stopping = true;
                        kill_at.get_or_insert(Instant::now() + self.grace);
                        child.signal(signal);
                    }
                }
            }
            if kill_at.is_some_and(|at| Instant::now() >= at) {
                child.iter().for_each(|c| c.signal(Signal::SIGKILL));
                kill_at = None;
            }
            if let Some(status) = reap(child.as_ref().map(|c| c.pid)) {
                // What it asked for with its last breath still counts.
                if let Some(Child { keeper: Some(socket), .. }) = child.take() {
                    while keeper::answer(&socket, &mut self.held) == Line::Open && readable(&socket) {}
                }
                let (code, how) = describe(status);
                if stopping || code == 0 || self.final_codes.contains(&code) {
                    return Ok(code);
                }
                let restart_in = restarts.died(Instant::now());
                on_event(Event::Died { how, restart_in });
                start_at = Some(Instant::now() + restart_in);
            }
            if start_at.is_some_and(|at| Instant::now() >= at) {
                start_at = None;
                match self.spawn() {
                    Ok(new) => {
                        on_event(Event::Started { pid: new.pid.as_raw() });
                        child = Some(new);
                    }
                    Err(error) => {
                        let restart_in = restarts.died(Instant::now()).max(Duration::from_millis(100));
                        on_event(Event::Failed { error, restart_in });
                        start_at = Some(Instant::now() + restart_in);
                    }
                }
            }
        }
    }

    /// True if the child retires.
    fn wait(&mut self, signals: &SignalFd, child: Option<&mut Child>, until: Option<Instant>) -> bool {
        let timeout = until.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(socket) = child.as_ref().and_then(|c| c.keeper.as_ref()) {
            fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        }
        if let Some(end) = child.as_ref().and_then(|c| c.end.as_ref()) {
            fds.push(PollFd::new(end.as_fd(), PollFlags::POLLIN));
        }
        let _ = poll(&mut fds, timeout);
        let asked = fds.get(1).and_then(PollFd::any).unwrap_or(false);
        if let (true, Some(child)) = (asked, child) {
            let line = child.keeper.as_ref().map(|socket| keeper::answer(socket, &mut self.held));
            if line != Some(Line::Open) {
                child.keeper = None;
            }
            return line == Some(Line::Retired);
        }
        false
    }

    fn spawn(&self) -> Result<Child, HoldError> {
        let (ours, theirs) = keeper::pair()?;
        let parent = std::process::id();
        let names = self.held.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd()));
        let inherit: Vec<RawFd> = self.held.values().chain([&theirs]).map(AsRawFd::as_raw_fd).collect();
        let program =
            if self.program.exists() { self.program.clone() } else { PathBuf::from("/proc/self/exe") };
        let mut command = Command::new(program);
        command.args(&self.args).env(ENV, held::encode(parent, names, theirs.as_raw_fd()));
        // SAFETY: between fork and exec: only system calls that are safe there, no allocation, no lock.
        unsafe {
            command.pre_exec(move || prepare_child(parent, &inherit));
        }
        let child = command.spawn().map_err(|e| HoldError::io("start the child process", e))?;
        // Reaped by pid in `reap`, with everything else that may fall to us.
        let pid = Pid::from_raw(child.id() as i32);
        Ok(Child { pid, keeper: Some(ours), end: pidfd(pid) })
    }
}

struct Child {
    pid: Pid,
    /// Our end of its line, until it closes its own.
    keeper: Option<OwnedFd>,
    /// Readable when it has ended: SIGCHLD alone is lost where another thread of the process takes it. None on a
    /// kernel older than 5.3.
    end: Option<OwnedFd>,
}

impl Child {
    fn signal(&self, signal: Signal) {
        // It may have gone this instant; SIGCHLD tells.
        let _ = kill(self.pid, signal);
    }
}

fn pidfd(pid: Pid) -> Option<OwnedFd> {
    // SAFETY: a system call on two numbers; it returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    // SAFETY: the descriptor is new and nobody else's.
    RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs in the child between fork and exec.
fn prepare_child(parent: u32, inherit: &[RawFd]) -> io::Result<()> {
    // SAFETY: plain system calls on numbers and on a set initialised here.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) != 0
            || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0
        {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the line above.
        if libc::getppid() as u32 != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        for fd in inherit {
            if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Reaps all that ended; the status of `child` if it is among them.
fn reap(child: Option<Pid>) -> Option<WaitStatus> {
    let mut status = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return status,
            Ok(ended) if ended.pid() == child && child.is_some() => status = Some(ended),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return status,
        }
    }
}

fn describe(status: WaitStatus) -> (i32, String) {
    match status {
        WaitStatus::Exited(_, code) => (code, format!("exited with {code}")),
        WaitStatus::Signaled(_, signal, _) => (128 + signal as i32, format!("was ended by {signal}")),
        other => (1, format!("{other:?}")),
    }
}

fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}
