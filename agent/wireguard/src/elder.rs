//! A planned change of workers: the one before keeps its keys, and goes on with them until the next has its own.
//!
//! Keys cannot be handed over. So a worker that is told to end has the supervisor start the next, and lingers. Only the
//! next one reads from sockets and TUN; what it has no keys for, either way, it leaves to its elder by a line that the
//! supervisor held for it.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, setsockopt, socketpair, sockopt,
};

/// How long an elder lingers: until every peer that answers has surely done so, lost packets included.
pub const LINGER: Duration = Duration::from_secs(10);

/// Bytes of a message before what is left: what it is, family, address, port, size.
const HEADER: usize = 1 + 1 + 16 + 2 + 2;

/// The most that waits on the line.
const BUFFER: usize = 4 << 20;

/// The next worker's end of the line.
#[derive(Debug)]
pub struct Elder(OwnedFd);

/// The elder's own end.
#[derive(Debug)]
pub struct Line(OwnedFd);

/// What the next worker leaves to its elder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left<'b> {
    /// Datagrams of one peer, of `size` bytes each but for the last.
    Datagrams {
        /// From where.
        from: SocketAddr,
        /// The length of each.
        size: usize,
        /// One behind the other.
        datagrams: &'b [u8],
    },
    /// A packet of the host.
    Packet(&'b [u8]),
}

/// Both ends.
pub fn pair() -> nix::Result<(Elder, Line)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (elder, line) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    // Up to the system's limit without CAP_NET_ADMIN.
    if setsockopt(&elder, sockopt::SndBufForce, &BUFFER).is_err() {
        setsockopt(&elder, sockopt::SndBuf, &BUFFER)?;
    }
    Ok((Elder(elder), Line(line)))
}

impl Elder {
    /// Takes the end that was held.
    pub fn from_held(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Leaves something to it. A full line is waited for, shortly; what it does not take then is lost.
    ///
    /// # Errors
    /// It is gone.
    pub fn leave(&self, left: Left<'_>) -> nix::Result<()> {
        let (header, bytes) = left.write();
        let parts = [IoSlice::new(&header), IoSlice::new(bytes)];
        let send = || {
            sendmsg::<()>(
                self.0.as_raw_fd(),
                &parts,
                &[],
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                None,
            )
        };
        let full = |error| matches!(error, Errno::EAGAIN | Errno::ENOBUFS | Errno::EMSGSIZE);
        match send() {
            Err(error) if full(error) => {
                let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
                poll(&mut fds, PollTimeout::from(20u8))?;
                send().map(drop).or_else(|error| if full(error) { Ok(()) } else { Err(error) })
            }
            other => other.map(drop),
        }
    }
}

impl AsFd for Elder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Line {
    /// What was left next; `None` once nobody leaves anything any more.
    ///
    /// # Errors
    /// EAGAIN: nothing now. EPROTO: it cannot be read.
    pub fn receive<'b>(&self, buffer: &'b mut [u8]) -> nix::Result<Option<Left<'b>>> {
        let length = {
            let mut parts = [IoSliceMut::new(buffer)];
            recvmsg::<()>(self.0.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT)?.bytes
        };
        match buffer.get(..length).unwrap_or_default() {
            [] => Ok(None),
            message => Left::read(message).map(Some).ok_or(Errno::EPROTO),
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl<'b> Left<'b> {
    fn write(self) -> ([u8; HEADER], &'b [u8]) {
        let mut header = [0; HEADER];
        match self {
            Self::Datagrams { from, size, datagrams } => {
                header[0] = 1;
                match from.ip() {
                    IpAddr::V4(a) => header[2..6].copy_from_slice(&a.octets()),
                    IpAddr::V6(a) => {
                        header[1] = 1;
                        header[2..18].copy_from_slice(&a.octets());
                    }
                }
                header[18..20].copy_from_slice(&from.port().to_be_bytes());
                // One of more than 65535 bytes stands alone.
                header[20..22].copy_from_slice(&u16::try_from(size).unwrap_or(u16::MAX).to_be_bytes());
                (header, datagrams)
            }
            Self::Packet(packet) => (header, packet),
        }
    }

    fn read(message: &'b [u8]) -> Option<Self> {
        let (header, bytes) = message.split_first_chunk::<HEADER>()?;
        let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        match header[..2] {
            [0, 0] => Some(Self::Packet(bytes)),
            [1, family] => {
                let ip = if family == 0 {
                    IpAddr::V4(Ipv4Addr::from(*header[2..].first_chunk::<4>()?))
                } else {
                    IpAddr::V6(Ipv6Addr::from(*header[2..].first_chunk::<16>()?))
                };
                let from = SocketAddr::new(ip, number(18));
                Some(Self::Datagrams { from, size: number(20).max(1).into(), datagrams: bytes })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_received_until_the_end() {
        let (elder, line) = pair().unwrap();
        let mut buffer = vec![0; 1 << 17];
        assert_eq!(line.receive(&mut buffer), Err(Errno::EAGAIN));
        let bytes = vec![7; 65_000];
        for from in ["192.0.2.1:9", "[2001:db8::1]:65535"] {
            let left = Left::Datagrams { from: from.parse().unwrap(), size: 1452, datagrams: &bytes };
            elder.leave(left).unwrap();
            assert_eq!(line.receive(&mut buffer), Ok(Some(left)));
        }
        elder.leave(Left::Packet(&bytes[..100])).unwrap();
        assert_eq!(line.receive(&mut buffer), Ok(Some(Left::Packet(&bytes[..100]))));
        // A line that nobody empties is full one day, and holds nobody up.
        for _ in 0..200 {
            elder.leave(Left::Packet(&bytes)).unwrap();
        }
        drop(elder);
        while let Ok(Some(left)) = line.receive(&mut buffer) {
            assert_eq!(left, Left::Packet(&bytes));
        }
        assert_eq!(line.receive(&mut buffer), Ok(None));
        let (elder, line) = pair().unwrap();
        drop(line);
        assert!(elder.leave(Left::Packet(&[1])).is_err());
    }
}
