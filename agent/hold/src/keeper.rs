//! The small protocol by which a child gives descriptors to its supervisor while it runs.
//!
//! One packet (SOCK_SEQPACKET) is one request: `+name` with one descriptor attached, `-name`, or `retire`. Each is
//! answered `ok` or `no: reason`.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

use crate::{HoldError, MAX_HELD, check_name};

const MAX_MESSAGE: usize = 128;
const RETIRE: &str = "retire";

/// What became of a child's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    /// It is open.
    Open,
    /// The child has closed it.
    Closed,
    /// The child wants to be followed by another.
    Retired,
}

/// A child's line to its supervisor.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
}

impl Keeper {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Has the supervisor hold a duplicate of `fd` as `name` from now on, in place of any it held by that name.
    /// Returns when it does.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), HoldError> {
        check_name(name)?;
        self.ask(&format!("+{name}"), Some(fd))
    }

    /// Has the supervisor close what it holds as `name`; nothing happens if it holds no such.
    pub fn release(&self, name: &str) -> Result<(), HoldError> {
        check_name(name)?;
        self.ask(&format!("-{name}"), None)
    }

    /// Has the supervisor start the next child now, and take no notice of this one any more: it may finish what it
    /// began. Its line ends here.
    ///
    /// # Errors
    /// A supervisor of an older release refuses: then the child should end, so that the next one is started.
    pub fn retire(self) -> Result<(), HoldError> {
        self.ask(RETIRE, None)
    }

    fn ask(&self, request: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), HoldError> {
        let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(request.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|e| HoldError::io("reach the supervisor", e))?;
        let mut answer = [0u8; MAX_MESSAGE];
        let n = loop {
            match nix::sys::socket::recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => break other.map_err(|e| HoldError::io("hear from the supervisor", e))?,
            }
        };
        match &answer[..n] {
            b"ok" => Ok(()),
            other => Err(HoldError::Refused(String::from_utf8_lossy(other).into_owned())),
        }
    }
}

/// The supervisor's end and the child's.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd), HoldError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| HoldError::io("create a socket pair", e))
}

/// Answers one request that waits on the supervisor's end.
pub(crate) fn answer(socket: &OwnedFd, held: &mut BTreeMap<String, OwnedFd>) -> Line {
    let mut bytes = [0u8; MAX_MESSAGE];
    let mut control = nix::cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut fds = Vec::new();
    let n = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
        Ok(message) => {
            for item in message.cmsgs().into_iter().flatten() {
                if let ControlMessageOwned::ScmRights(raw) = item {
                    // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            message.bytes
        }
        Err(Errno::EAGAIN | Errno::EINTR) => return Line::Open,
        Err(_) => return Line::Closed,
    };
    if n == 0 {
        return Line::Closed;
    }
    let retires = &bytes[..n] == RETIRE.as_bytes();
    let decided = if retires { Ok(()) } else { decide(&bytes[..n], fds, held) };
    let answer = match decided {
        Ok(()) => "ok".to_owned(),
        Err(e) => format!("no: {e}"),
    };
    let answer = &answer.as_bytes()[..answer.len().min(MAX_MESSAGE)];
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match nix::sys::socket::send(socket.as_raw_fd(), answer, flags) {
        _ if retires => Line::Retired,
        Ok(_) => Line::Open,
        Err(_) => Line::Closed,
    }
}

fn decide(
    request: &[u8],
    mut fds: Vec<OwnedFd>,
    held: &mut BTreeMap<String, OwnedFd>,
) -> Result<(), HoldError> {
    let text = std::str::from_utf8(request).map_err(|_| HoldError::Name(String::new()))?;
    if let Some(name) = text.strip_prefix('+') {
        check_name(name)?;
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return Err(HoldError::Refused("one descriptor goes with a name".into()));
        };
        if held.len() >= MAX_HELD && !held.contains_key(name) {
            return Err(HoldError::TooMany);
        }
        held.insert(name.to_owned(), fd);
        return Ok(());
    }
    let name = text.strip_prefix('-').ok_or_else(|| HoldError::Name(text.to_owned()))?;
    check_name(name)?;
    held.remove(name);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn ask(
        keeper: &Keeper,
        server: &OwnedFd,
        held: &mut BTreeMap<String, OwnedFd>,
        fd: Option<BorrowedFd<'_>>,
        name: &str,
    ) -> Result<(), HoldError> {
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| match fd {
                Some(fd) => keeper.keep(name, fd),
                None => keeper.release(name),
            });
            while !asked.is_finished() {
                answer(server, held);
            }
            asked.join().unwrap()
        })
    }

    #[test]
    fn keeps_replaces_and_releases() {
        let (server, child) = pair().unwrap();
        let keeper = Keeper::new(child);
        let mut held = BTreeMap::new();
        let memory = crate::Memory::create("test").unwrap();
        memory.write(b"through the socket").unwrap();
        ask(&keeper, &server, &mut held, Some(memory.as_fd()), "udp4").unwrap();
        ask(&keeper, &server, &mut held, Some(memory.as_fd()), "udp4").unwrap();
        assert_eq!(held.len(), 1);
        let again = crate::Memory::from(held["udp4"].try_clone().unwrap());
        assert_eq!(again.read().unwrap().as_deref(), Some(&b"through the socket"[..]));
        ask(&keeper, &server, &mut held, None, "udp4").unwrap();
        ask(&keeper, &server, &mut held, None, "never-held").unwrap();
        assert!(held.is_empty());
    }

    #[test]
    fn a_child_that_retires_is_heard() {
        let (server, child) = pair().unwrap();
        let keeper = Keeper::new(child);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| keeper.retire());
            while answer(&server, &mut BTreeMap::new()) != Line::Retired {}
            asked.join().unwrap().unwrap();
        });
    }

    #[test]
    fn refuses_what_is_too_much_or_ill_named() {
        let (server, child) = pair().unwrap();
        let keeper = Keeper::new(child);
        let memory = crate::Memory::create("test").unwrap();
        let mut held = BTreeMap::new();
        for i in 0..MAX_HELD {
            held.insert(format!("n{i}"), memory.try_clone().unwrap().into());
        }
        let more = ask(&keeper, &server, &mut held, Some(memory.as_fd()), "more");
        assert!(matches!(more, Err(HoldError::Refused(_))), "{more:?}");
        assert!(matches!(keeper.keep("../x", memory.as_fd()), Err(HoldError::Name(_))));
        assert!(decide(b"+a", vec![], &mut held).is_err());
        assert!(decide(b"\xff", vec![], &mut held).is_err());
        drop(keeper);
        assert_eq!(answer(&server, &mut held), Line::Closed);
    }
}
