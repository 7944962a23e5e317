//! The process, and the one thread in it, that carries a device's packets.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use tombolo_hold::{Held, HoldError, Keeper, Memory};
use zeroize::Zeroizing;

use crate::daemon;
use crate::device::{Device, Moment, TICK};
use crate::elder::{self, Elder, Left};
use crate::link::Links;
use crate::name::DeviceName;
use crate::noise::BUFFER;
use crate::offload::Offloads;
use crate::server::{self, Answer, Ask};
use crate::stamp;
use crate::tun::Tun;
use crate::uapi::{Request, SetDevice, UapiError, parse_state};
use crate::udp::Udp;

/// The names of what a supervisor holds.
pub mod held {
    /// The TUN.
    pub const TUN: &str = "tun";
    /// The UAPI listener.
    pub const UAPI: &str = "uapi";
    /// The last configuration.
    pub const STATE: &str = "state";
    /// The UDP sockets.
    pub const UDP4: &str = "udp4";
    /// See [`UDP4`].
    pub const UDP6: &str = "udp6";
    /// The line to the worker before, while it lingers.
    pub const ELDER: &str = "elder";
}

/// Calls to one source before the others have their turn, and bytes from the network.
const BURST: usize = 512;
const BURST_BYTES: usize = 256 << 10;

/// How often counters are written down. What configures, handshakes and movements are at once, as long as writing
/// takes no more than one part in [`SAVING`] of the time: then they wait for the next turn.
const COUNTERS: Duration = Duration::from_secs(10);

const SAVING: u32 = 50;

/// Why a worker cannot start or go on.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// It was started by hand.
    #[error("a worker is started by its supervisor: run `tombolo-wireguard {0}`")]
    Alone(DeviceName),
    /// Something held is missing or unusable.
    #[error(transparent)]
    Held(#[from] HoldError),
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The device is over: its interface or its socket was removed, or the supervisor said so.
    Over,
    /// Only this process was told to end: another shall go on.
    Restart,
}

/// Runs the device until it ends.
pub fn run(name: &DeviceName) -> Result<End, WorkerError> {
    let mut held = Held::from_env()?.ok_or_else(|| WorkerError::Alone(name.clone()))?;
    let mut take = |what: &str| held.take(what).ok_or_else(|| WorkerError::Alone(name.clone()));
    let tun = take(held::TUN)?;
    let listener = UnixListener::from(take(held::UAPI)?);
    let memory = Memory::from(take(held::STATE)?);
    let offloads = Offloads::from_env();
    let mut links = Links::new(tun, offloads).map_err(io_error("use the TUN"))?;
    links.udp = take(held::UDP4).ok().map(|v4| Udp::from_held(v4, take(held::UDP6).ok(), offloads));
    links.elder = take(held::ELDER).ok().map(Elder::from_held);
    let has_elder = links.elder.is_some();
    let keeper = held.into_keeper();

    // Before there are threads, so that all of them have it.
    let mask: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    mask.thread_block().map_err(io_error("block signals"))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(io_error("watch signals"))?;
    let eventfd = || {
        let made = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        made.map(Arc::new).map_err(io_error("create an eventfd"))
    };
    let (bell, last_bell) = (eventfd()?, eventfd()?);
    let asks = server::serve(listener, Arc::clone(&bell), Arc::clone(&last_bell))
        .map_err(io_error("start a thread"))?;

    let seed = getrandom::u32()
        .map_err(|e| WorkerError::Io { what: "get random bytes", source: io::Error::other(e) })?;
    let mut worker = Worker {
        name: name.clone(),
        device: Device::new(seed as u8),
        links,
        offloads,
        keeper,
        memory,
        signals,
        bell,
        last_bell,
        asks,
        elder_until: has_elder.then(|| Instant::now() + elder::LINGER),
        buffer: vec![0; BUFFER].into_boxed_slice(),
        stamps: stamp::Keeper::new(name, Instant::now()),
        socket: server::inode(&server::path_of(name)),
        supervisor: std::os::unix::process::parent_id(),
    };
    worker.stamps.load(worker.device.stamps());
    worker.resume();
    let end = worker.carry()?;
    // The supervisor does this too, unless it died.
    if end == End::Over {
        server::remove(&server::path_of(name), worker.socket);
    } else if let Err(error) = worker.retire() {
        tracing::debug!(%error, "not followed while alive");
    }
    Ok(end)
}

struct Worker {
    name: DeviceName,
    device: Device,
    links: Links,
    offloads: Offloads,
    keeper: Keeper,
    memory: Memory,
    signals: SignalFd,
    bell: Arc<EventFd>,
    /// Ends the acceptance of clients.
    last_bell: Arc<EventFd>,
    asks: Receiver<Ask>,
    /// When the worker before us ends, if there is one.
    elder_until: Option<Instant>,
    buffer: Box<[u8]>,
    stamps: stamp::Keeper,
    /// The UAPI socket's inode.
    socket: Option<(u64, u64)>,
    /// Its process id.
    supervisor: u32,
}

#[derive(Default)]
struct Ready {
    tun: bool,
    udp4: bool,
    udp6: bool,
    asks: bool,
    signals: bool,
}

impl Worker {
    /// Goes on where the worker before us died.
    fn resume(&mut self) {
        let state = match self.memory.read() {
            Ok(Some(state)) => Zeroizing::new(state),
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "the configuration is lost: set it again");
                return;
            }
        };
        let parsed = std::str::from_utf8(&state).ok().map(parse_state);
        let Some(Ok(state)) = parsed else {
            tracing::error!("the configuration that was held is unreadable: set it again");
            return;
        };
        let mark = state.fwmark.unwrap_or(0);
        match &self.links.udp {
            Some(udp) => self.device.set_socket(udp.port().unwrap_or_default(), mark),
            // It died between the two; the same port, if it is still free.
            None if state.private_key.is_some() => {
                if let Err(error) = self.bind(state.listen_port.unwrap_or(0), mark) {
                    tracing::error!(%error, "cannot open the UDP sockets");
                }
            }
            None => {}
        }
        let peers = state.peers.len();
        let at = moment();
        // Where stamps cannot be written, this is the next best.
        let last = state.peers.iter().map(|p| p.past.last_handshake).max().unwrap_or_default();
        if let Some(Some(key)) = &state.private_key {
            self.device.stamps().remember(key.public(), last);
        }
        self.device.resume(state, at, &mut self.links);
        tracing::info!(device = %self.name, peers, "resumed");
        self.tell_behind(at);
    }

    /// The one line for people. An agent reads the same out of the device's state, and gives it a new key.
    fn tell_behind(&self, at: Moment) {
        if let Some(behind) = self.device.behind(at.wall) {
            let text = format!(
                "the clock is {} s behind this key's last handshake: peers ignore our calls until it has caught up. \
                 Waiting for theirs; set the clock, or give the device a new key (an agent does so by itself)",
                behind.as_secs().max(1)
            );
            tracing::warn!(device = %self.name, "{text}");
            daemon::tell_system(&format!("{}: {text}", self.name));
        }
    }

    fn carry(&mut self) -> Result<End, WorkerError> {
        let mut tick = Instant::now();
        let (mut look, mut save_next, mut counted) = (tick, tick, tick);
        loop {
            let ready = self.wait(tick)?;
            let at = moment();
            if ready.signals
                && let Some(end) = self.signalled()
            {
                self.save(at);
                self.stamps.keep(self.device.stamps(), at.now, true);
                return Ok(end);
            }
            if ready.udp4 || ready.udp6 {
                self.receive(&ready, at);
            }
            if ready.tun && !self.transmit(at) {
                tracing::info!(device = %self.name, "the interface was deleted");
                return Ok(End::Over);
            }
            if ready.asks {
                self.answer(at);
            }
            if at.now >= tick {
                tick = at.now + self.device.pause();
                self.device.handle_tick(at, &mut self.links);
            }
            if at.now >= look {
                look = at.now + TICK;
                self.outlive_elder(at.now);
                self.stamps.keep(self.device.stamps(), at.now, false);
                if server::inode(&server::path_of(&self.name)) != self.socket || self.socket.is_none() {
                    tracing::info!(device = %self.name, "the configuration socket was removed");
                    return Ok(End::Over);
                }
            }
            let counters = at.now.saturating_duration_since(counted) >= COUNTERS;
            if at.now >= save_next && (self.device.take_changed() || counters) {
                self.save(at);
                counted = at.now;
                save_next = at.now + at.now.elapsed() * SAVING;
            }
        }
    }

    fn wait(&mut self, tick: Instant) -> Result<Ready, WorkerError> {
        // What was made since, by timers and changes.
        self.links.send_all();
        self.links.deliver_all();
        let left = tick.saturating_duration_since(Instant::now());
        // Rounded up, so as not to spin through the last millisecond.
        let left = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut fds = [
            PollFd::new(self.links.tun.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.bell.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            // In the places of sockets that are not there stands one that is ready only when it is handled anyway.
            PollFd::new(self.bell.as_fd(), PollFlags::empty()),
            PollFd::new(self.bell.as_fd(), PollFlags::empty()),
        ];
        if let Some(udp) = &self.links.udp {
            fds[3] = PollFd::new(udp.v4(), PollFlags::POLLIN);
            if let Some(v6) = udp.v6() {
                fds[4] = PollFd::new(v6, PollFlags::POLLIN);
            }
        }
        match poll(&mut fds, PollTimeout::from(left)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(io_error("poll")(error)),
        }
        let any = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let [tun, asks, signals, udp4, udp6] = fds.each_ref().map(any);
        Ok(Ready { tun, udp4, udp6, asks, signals })
    }

    /// Datagrams from the network.
    fn receive(&mut self, ready: &Ready, at: Moment) {
        for (ready, v6) in [(ready.udp4, false), (ready.udp6, true)] {
            let (mut calls, mut bytes) = (0, 0);
            while ready && calls < BURST && bytes < BURST_BYTES {
                let Some(udp) = &mut self.links.udp else { return };
                match udp.receive(v6, &mut self.buffer) {
                    Ok(train) => {
                        (calls, bytes) = (calls + 1, bytes + train.length);
                        let datagrams = &self.buffer[..train.length];
                        let (from, size) = (train.from, train.size);
                        self.device.handle_datagrams(from, datagrams, size, at, &mut self.links);
                    }
                    Err(e) => {
                        if e.kind() != io::ErrorKind::WouldBlock {
                            tracing::trace!(error = %e, "receive");
                        }
                        break;
                    }
                }
            }
        }
        self.links.deliver_all();
    }

    /// Packets from the host; false when there is no interface any more.
    fn transmit(&mut self, at: Moment) -> bool {
        let mut calls = 0;
        // All that waits, as far as it is sent at once.
        while calls < BURST && !self.links.is_full() {
            match self.links.read(&mut self.buffer) {
                Ok(Some(mut packets)) => {
                    self.device.handle_packets(&mut packets, at, &mut self.links);
                }
                Ok(None) => self.device.handle_malformed(),
                Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return false,
                Err(_) => break,
            }
            calls += 1;
        }
        self.links.send_all();
        true
    }

    fn answer(&mut self, at: Moment) {
        let _ = self.bell.read();
        while let Ok(ask) = self.asks.try_recv() {
            let Ask { request, answer } = ask;
            answer.give(match request {
                Request::Get => Ok(self.device.state(at)),
                Request::Set(set) => self.set(set, at),
            });
        }
    }

    fn set(&mut self, set: SetDevice, at: Moment) -> Answer {
        self.device.check(&set)?;
        let (port, mark) = self.device.socket();
        let wanted_mark = set.fwmark.unwrap_or(mark);
        let gets_key = matches!(set.private_key, Some(Some(_)))
            || (self.device.has_key() && !matches!(set.private_key, Some(None)));
        // What the system may refuse comes first.
        match (set.listen_port, &self.links.udp) {
            (Some(wanted), Some(_)) if wanted != 0 && wanted == port => self.mark(wanted_mark, mark)?,
            (None, Some(_)) => self.mark(wanted_mark, mark)?,
            (Some(wanted), _) => self.bind(wanted, wanted_mark).map_err(refused("open the UDP sockets"))?,
            (None, None) if gets_key => {
                self.bind(port, wanted_mark).map_err(refused("open the UDP sockets"))?
            }
            (None, None) => self.device.set_socket(port, wanted_mark),
        }
        let keyed = set.private_key.is_some();
        self.device.apply(set, at, &mut self.links);
        self.save(at);
        if keyed {
            self.tell_behind(at);
        }
        Ok(Zeroizing::new(String::new()))
    }

    fn mark(&mut self, wanted: u32, before: u32) -> Result<(), UapiError> {
        let Some(udp) = self.links.udp.as_ref().filter(|_| wanted != before) else { return Ok(()) };
        if let Err(error) = udp.set_mark(wanted) {
            // One of the two may have it already.
            let _ = udp.set_mark(before);
            return Err(refused("mark the UDP sockets (is CAP_NET_ADMIN missing?)")(error));
        }
        let (port, _) = self.device.socket();
        self.device.set_socket(port, wanted);
        Ok(())
    }

    /// Opens sockets in place of those there are, and has them held.
    fn bind(&mut self, port: u16, mark: u32) -> io::Result<()> {
        // What is on its way goes by the old ones.
        self.links.send_all();
        let udp = Udp::bind(port, mark, self.offloads)?;
        let bound = udp.port()?;
        let kept = self.keeper.keep(held::UDP4, udp.v4()).and_then(|()| match udp.v6() {
            Some(v6) => self.keeper.keep(held::UDP6, v6),
            None => self.keeper.release(held::UDP6),
        });
        if let Err(error) = kept {
            tracing::error!(%error, "the UDP sockets would not outlive this process");
        }
        self.links.udp = Some(udp);
        self.device.set_socket(bound, mark);
        Ok(())
    }

    fn save(&mut self, at: Moment) {
        self.device.take_changed();
        if let Err(error) = self.memory.write(self.device.state(at).as_bytes()) {
            tracing::error!(%error, "the configuration would not outlive this process");
        }
    }

    /// The worker before us ends when its line does.
    fn outlive_elder(&mut self, now: Instant) {
        if self.elder_until.is_some_and(|until| now >= until || self.links.elder.is_none()) {
            (self.links.elder, self.elder_until) = (None, None);
            if let Err(error) = self.keeper.release(held::ELDER) {
                tracing::debug!(%error, "the line to the worker before stays held");
            }
        }
    }

    /// Has the next worker started, and does for it what only our keys can ([`elder`]), until it wants no more.
    fn retire(mut self) -> Result<(), HoldError> {
        let (elder, line) = elder::pair().map_err(|e| HoldError::Refused(format!("no line: {e}")))?;
        self.keeper.keep(held::ELDER, elder.as_fd())?;
        drop(elder);
        self.last_bell.write(1).map_err(|e| HoldError::Refused(format!("no bell: {e}")))?;
        self.keeper.retire()?;
        self.links.elder = None;
        // It lets go of us; should it die again and again, we end by ourselves.
        let end = Instant::now() + elder::LINGER * 2;
        loop {
            let mut fds = [
                PollFd::new(line.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, PollTimeout::from(1000u16));
            let at = moment();
            if fds[1].any().unwrap_or(false) || at.now >= end {
                return Ok(());
            }
            loop {
                match line.receive(&mut self.buffer) {
                    Ok(Some(Left::Datagrams { from, size, datagrams })) => {
                        self.device.handle_datagrams(from, datagrams, size, at, &mut self.links);
                    }
                    Ok(Some(Left::Packet(packet))) => self.device.handle_left(packet, at, &mut self.links),
                    Ok(None) => return Ok(()),
                    Err(Errno::EPROTO) => {}
                    Err(_) => break,
                }
            }
            self.links.send_all();
            self.links.deliver_all();
        }
    }

    fn signalled(&self) -> Option<End> {
        let mut end = None;
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo == Signal::SIGHUP as u32 {
                continue;
            }
            // From the supervisor, or by the kernel because it died: the device ends. From anybody else: this worker.
            let orphan = std::os::unix::process::parent_id() != self.supervisor;
            let over = info.ssi_pid == self.supervisor || orphan;
            end = Some(if over { End::Over } else { End::Restart });
        }
        end
    }
}

fn moment() -> Moment {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Moment { now: Instant::now(), wall }
}

fn refused(what: &'static str) -> impl Fn(io::Error) -> UapiError {
    move |error| UapiError::Refused {
        what: format!("cannot {what}: {error}"),
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    }
}

fn io_error<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> WorkerError {
    move |error| WorkerError::Io { what, source: error.into() }
}

/// For the supervisor: what it holds at the start.
pub fn holdings(tun: Tun, listener: UnixListener, memory: Memory) -> [(&'static str, OwnedFd); 3] {
    [(held::TUN, tun.into()), (held::UAPI, listener.into()), (held::STATE, memory.into())]
}
