//! The UAPI socket: clients, their requests, and nothing of what is done with them.
//!
//! Slow or broken clients cost a thread each, never the packets: requests are read and parsed here and handed over
//! whole.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::stat::{Mode, umask};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::name::DeviceName;
use crate::uapi::{Request, UapiError, parse_request};

/// Where `wg` looks for sockets.
pub const DIRECTORY: &str = "/var/run/wireguard";

const MAX_CLIENTS: usize = 64;
const MAX_REQUEST: usize = 16 << 20;
const REQUEST_TIME: Duration = Duration::from_secs(5);
const IDLE_TIME: Duration = Duration::from_secs(60);

/// Why there is no UAPI socket, in a line for people.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error(
        "{0} is in use by another WireGuard device of this name (perhaps in another network namespace): choose another name, or end that one"
    )]
    Taken(PathBuf),
    /// Anything else.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The socket of the device `name`.
pub fn path_of(name: &DeviceName) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{name}.sock"))
}

/// Listens for the device `name`. A socket that nobody answers at is replaced.
pub fn listen(name: &DeviceName) -> Result<UnixListener, SocketError> {
    let path = path_of(name);
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| SocketError::Io { what, path, source }
    };
    // Safe: nothing else runs in the supervisor yet.
    let before = umask(Mode::from_bits_truncate(0o077));
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(DIRECTORY);
    let listener = made.map_err(fail("create", Path::new(DIRECTORY))).and_then(|()| {
        if UnixStream::connect(&path).is_ok() {
            return Err(SocketError::Taken(path.clone()));
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(fail("remove the dead socket", &path)(e));
            }
            _ => {}
        }
        UnixListener::bind(&path).map_err(fail("listen at", &path))
    });
    umask(before);
    listener
}

/// The inode of the socket at `path`, which tells it from one that took its place.
pub fn inode(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    metadata.file_type().is_socket().then(|| (metadata.dev(), metadata.ino()))
}

/// Removes the socket at `path` if it still is the one with this inode.
pub fn remove(path: &Path, inode: Option<(u64, u64)>) {
    if inode.is_some() && self::inode(path) == inode {
        let _ = fs::remove_file(path);
    }
}

/// Whether a device answers at the socket of `name`.
pub fn answers(name: &DeviceName) -> bool {
    UnixStream::connect(path_of(name)).is_ok()
}

/// A request, and where its answer goes.
pub struct Ask {
    /// What is wanted.
    pub request: Request,
    /// The client that waits.
    pub answer: Reply,
}

/// A client that waits for its answer.
pub struct Reply(SyncSender<Answer>);

/// What the device says: on `get` its state, on `set` nothing.
pub type Answer = Result<Zeroizing<String>, UapiError>;

impl Reply {
    /// Answers it.
    pub fn give(self, answer: Answer) {
        // The client may have gone.
        let _ = self.0.send(answer);
    }
}

/// Starts to serve clients; requests arrive at the receiver, and `bell` rings for each. Once `end` rings no more are
/// accepted.
pub fn serve(listener: UnixListener, bell: Arc<EventFd>, end: Arc<EventFd>) -> io::Result<Receiver<Ask>> {
    // Another process may accept at the same time.
    listener.set_nonblocking(true)?;
    let (asks, receiver) = sync_channel(MAX_CLIENTS);
    let clients = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("uapi".into()).spawn(move || {
        loop {
            let mut fds = [
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(end.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds[1].any().unwrap_or(false) {
                return;
            }
            let Ok((stream, _)) = listener.accept() else {
                // Out of descriptors, at worst: not a reason to spin.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            let seat = Seat::take(&clients);
            let (asks, bell) = (asks.clone(), Arc::clone(&bell));
            let Some(seat) = seat else {
                let _ = (&stream).write_all(format!("errno={}\n\n", -libc::EBUSY).as_bytes());
                continue;
            };
            let started = std::thread::Builder::new().name("uapi-client".into()).spawn(move || {
                let _seat = seat;
                if let Err(error) = converse(&stream, &asks, &bell) {
                    tracing::debug!(%error, "configuration client");
                }
            });
            if let Err(error) = started {
                tracing::warn!(%error, "cannot serve a configuration client");
            }
        }
    })?;
    Ok(receiver)
}

/// One of the places for clients.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let free = |n: usize| (n < MAX_CLIENTS).then_some(n + 1);
        taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, free).ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn converse(stream: &UnixStream, asks: &SyncSender<Ask>, bell: &EventFd) -> io::Result<()> {
    stream.set_write_timeout(Some(REQUEST_TIME))?;
    let mut reader = Reader { stream, buffer: Zeroizing::new(Vec::with_capacity(1 << 16)) };
    while let Some(text) = reader.request()? {
        let answer =
            match std::str::from_utf8(&text).map_err(|_| None).and_then(|t| parse_request(t).map_err(Some)) {
                Ok(request) => {
                    let (answer, answered) = sync_channel(1);
                    asks.send(Ask { request, answer: Reply(answer) })
                        .map_err(|_| io::ErrorKind::BrokenPipe)?;
                    bell.write(1)?;
                    answered.recv().map_err(|_| io::ErrorKind::BrokenPipe)?
                }
                Err(Some(error)) => Err(error),
                Err(None) => {
                    Err(UapiError::Refused { what: "a request is UTF-8 text".into(), errno: libc::EPROTO })
                }
            };
        let errno = match answer {
            Ok(state) => {
                { stream }.write_all(state.as_bytes())?;
                0
            }
            Err(error) => {
                tracing::warn!(%error, "configuration refused, nothing changed");
                -error.errno()
            }
        };
        { stream }.write_all(format!("errno={errno}\n\n").as_bytes())?;
    }
    Ok(())
}

struct Reader<'s> {
    stream: &'s UnixStream,
    buffer: Zeroizing<Vec<u8>>,
}

impl Reader<'_> {
    /// The next request without its blank line; `None` when the client has said all. One that breaks off is an
    /// error: half a request is none.
    fn request(&mut self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let mut deadline = None;
        let mut searched = 0;
        let mut chunk = Zeroizing::new([0u8; 16384]);
        loop {
            if let Some(at) = self.buffer[searched..].windows(2).position(|w| w == b"\n\n") {
                let rest = Zeroizing::new(self.buffer[searched + at + 2..].to_vec());
                self.buffer.truncate(searched + at);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            searched = self.buffer.len().saturating_sub(1);
            if self.buffer.len() > MAX_REQUEST {
                return Err(io::Error::other("request too long"));
            }
            if !self.buffer.is_empty() {
                deadline.get_or_insert_with(|| Instant::now() + REQUEST_TIME);
            }
            let left = deadline.map_or(IDLE_TIME, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut chunk[..]) {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && self.buffer.is_empty() => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
        let (client, server) = UnixStream::pair().unwrap();
        let (asks, receiver) = sync_channel::<Ask>(1);
        std::thread::spawn(move || {
            for ask in receiver {
                let text = if matches!(ask.request, Request::Get) { "listen_port=7\n" } else { "" };
                ask.answer.give(Ok(Zeroizing::new(text.to_owned())));
            }
        });
        let bell = EventFd::new().unwrap();
        (client, std::thread::spawn(move || converse(&server, &asks, &bell)))
    }

    #[test]
    fn several_requests_in_any_pieces_are_answered_in_order() {
        let (mut client, served) = start();
        for piece in ["ge", "t=1\n", "\nset=1\nlisten_port=5\n\nset=1\nnonsense\n", "\n"] {
            client.write_all(piece.as_bytes()).unwrap();
        }
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("listen_port=7\nerrno=0\n\nerrno=0\n\nerrno={}\n\n", -libc::EPROTO));
        served.join().unwrap().unwrap();
    }

    #[test]
    fn half_a_request_is_none() {
        let (mut client, served) = start();
        client.write_all(b"set=1\nlisten_port=5\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "");
        assert_eq!(served.join().unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_long_request_ends_the_conversation() {
        let (mut client, served) = start();
        let line = [b'x'; 1 << 16];
        // It stops reading at some point.
        while client.write_all(&line).is_ok() {}
        assert!(served.join().unwrap().is_err());
    }
}
