//! The lab's own PID, mount and network namespaces.
//!
//! A program that wants a lab runs itself again inside ([`Sandbox::spawn`]). Between the two stands a pair of
//! tiny processes: a keeper outside, which passes the exit status on, and an init inside, which reaps. Each dies
//! with the one before it, and with the init the kernel kills every process of the lab; namespaces, mounts and
//! files (a tmpfs) go with the last of them. So SIGKILL of any of the three leaves nothing.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigHandler, Signal};

/// Set inside the sandbox.
const INSIDE: &str = "TOMBOLO_LAB_INSIDE";
/// Number of the descriptor that [`Sandbox::spawn`] passed on.
const PASSED: &str = "TOMBOLO_LAB_FD";
/// Where the lab keeps its files; a tmpfs that exists only inside.
pub const ROOT: &str = "/run/lab";

/// What the lab's process is told: run inside, or make an inside first.
pub struct Sandbox;

impl Sandbox {
    /// Whether this process runs inside a sandbox.
    #[must_use]
    pub fn inside() -> bool {
        std::env::var_os(INSIDE).is_some()
    }

    /// Checks what a lab needs of the machine.
    ///
    /// # Errors
    /// One line that says what to do.
    pub fn check() -> Result<()> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab makes network namespaces: run it as root (sudo)");
        let missing: Vec<_> = [("ip", "iproute2"), ("nft", "nftables")]
            .into_iter()
            .filter(|(program, _)| which(program).is_none())
            .collect();
        if !missing.is_empty() {
            let programs: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
            let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
            bail!("{} not found: apt-get install {}", programs.join(" and "), packages.join(" "));
        }
        ensure!(Path::new("/dev/net/tun").exists(), "/dev/net/tun is missing: modprobe tun");
        Ok(())
    }

    /// Starts this program again, with these arguments, inside new namespaces. A descriptor may be passed, to be
    /// taken there by [`Sandbox::passed`].
    ///
    /// # Errors
    /// If the namespaces cannot be made.
    pub fn spawn(args: Vec<OsString>, pass: Option<OwnedFd>) -> Result<Child> {
        Self::check()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(args).env(INSIDE, "1");
        let pass = pass.inspect(|fd| {
            command.env(PASSED, fd.as_raw_fd().to_string());
        });
        let raw = pass.as_ref().map(AsRawFd::as_raw_fd);
        let parent = nix::unistd::getpid();
        // SAFETY: the closure runs between fork and exec and makes system calls only: no allocation, no lock.
        unsafe {
            command.pre_exec(move || enter(parent, raw));
        }
        command.spawn().context("making the lab's namespaces")
    }

    /// Prepares the inside: called once, before anything else, by the program that runs there.
    ///
    /// # Errors
    /// If a mount fails.
    pub fn prepare() -> Result<()> {
        ensure!(Self::inside(), "this runs only inside a lab");
        if Path::new(ROOT).join("log").exists() {
            return Ok(());
        }
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .context("making mounts private")?;
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mounting /proc")?;
        mount(Some("lab"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .context("mounting /run")?;
        for dir in ["log", "cluster", "node", "broker", "etc"] {
            std::fs::create_dir_all(Path::new(ROOT).join(dir))?;
        }
        Ok(())
    }

    /// The descriptor that the starter passed.
    ///
    /// # Errors
    /// If it passed none.
    pub fn passed() -> Result<OwnedFd> {
        use std::os::fd::FromRawFd;
        let text = std::env::var(PASSED).context("the lab was started without its control socket")?;
        let raw: i32 = text.parse().context("the number of the control socket")?;
        // SAFETY: the starter left this descriptor open for us alone and nobody else in this process knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        Ok(fd)
    }
}

/// Set when an interrupt or a request to end has come.
static ENDED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM only set a mark, which [`interrupted`] reads. (Programs started later have their
/// default back: exec resets handlers.)
pub fn catch_interrupts() {
    extern "C" fn mark(_: i32) {
        ENDED.store(true, Ordering::Relaxed);
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is allowed in a handler.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::Handler(mark)) };
    }
}

/// Whether an interrupt has come since [`catch_interrupts`].
#[must_use]
pub fn interrupted() -> bool {
    ENDED.load(Ordering::Relaxed)
}

/// Between fork and exec: becomes keeper and init, and returns in the process that is to run the lab.
fn enter(parent: nix::unistd::Pid, pass: Option<i32>) -> std::io::Result<()> {
    die_with(parent)?;
    nix::sched::unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
    // SAFETY: still a single thread, which only makes system calls.
    let init = unsafe { libc::fork() };
    if init < 0 {
        return Err(std::io::Error::last_os_error());
    }
    if init > 0 {
        keep(init);
    }
    // (Whether the keeper still lives cannot be asked: its number is 0 in here, as it lies outside.)
    // SAFETY: plain system calls.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    // SAFETY: as above.
    let lab = unsafe { libc::fork() };
    if lab < 0 {
        return Err(std::io::Error::last_os_error());
    }
    if lab > 0 {
        reap(lab);
    }
    if let Some(fd) = pass {
        // SAFETY: clears close-on-exec of a descriptor we own.
        unsafe {
            libc::fcntl(fd, libc::F_SETFD, 0);
        }
    }
    Ok(())
}

fn die_with(parent: nix::unistd::Pid) -> std::io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if nix::unistd::getppid() != parent {
        return Err(std::io::Error::other("the starter is gone"));
    }
    Ok(())
}

/// The keeper outside: waits for the init and ends as it ended. Interrupts are the lab's to handle.
fn keep(init: i32) -> ! {
    quiet();
    loop {
        let mut status = 0;
        // SAFETY: plain system calls; `_exit` ends the process without running anything of the parent's.
        unsafe {
            let pid = libc::waitpid(init, &raw mut status, 0);
            if pid == init {
                libc::_exit(code(status));
            }
        }
    }
}

/// Process 1 inside: reaps whatever dies and ends, with everything, as soon as the lab's process does.
fn reap(lab: i32) -> ! {
    quiet();
    loop {
        let mut status = 0;
        // SAFETY: as in `keep`.
        unsafe {
            let pid = libc::waitpid(-1, &raw mut status, 0);
            if pid == lab {
                libc::_exit(code(status));
            }
        }
    }
}

/// Closes what a process that never execs would hold open for ever, and leaves interrupts to the lab.
fn quiet() {
    // SAFETY: plain system calls in a process that does nothing else.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
    }
}

fn code(status: i32) -> i32 {
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) }
}

/// The path of a program, if it is installed.
#[must_use]
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}
