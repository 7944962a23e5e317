//! The two UDP sockets of a device, one a family, on one port.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, getsockopt, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::offload::Offloads;

/// What waits here while a worker is restarted is not lost.
const BUFFER: usize = 8 << 20;

/// How often a free port for both families is looked for.
const ATTEMPTS: usize = 50;

/// Both sockets. A host without IPv6 has only the first.
#[derive(Debug)]
pub struct Udp {
    v4: Side,
    v6: Option<Side>,
    /// Room for what the kernel says of a datagram.
    control: Vec<u8>,
}

#[derive(Debug)]
struct Side {
    socket: UdpSocket,
    /// Whether the kernel takes many datagrams at once.
    segment: bool,
}

/// Datagrams that were received by one call, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Train {
    /// From where.
    pub from: SocketAddr,
    /// The length of all.
    pub length: usize,
    /// The length of each but the last, which may be shorter.
    pub size: usize,
}

impl Udp {
    /// Binds both to `port`, or to a free one if it is 0, and marks what they send with `mark` if it is not 0.
    pub fn bind(port: u16, mark: u32, offloads: Offloads) -> io::Result<Self> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let v4 = open((Ipv4Addr::UNSPECIFIED, port).into())?;
            let bound = v4.local_addr()?.port();
            let v6 = match open((Ipv6Addr::UNSPECIFIED, bound).into()) {
                Ok(v6) => Some(v6),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => None,
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && port == 0 && attempt < ATTEMPTS => continue,
                Err(e) => return Err(e),
            };
            let udp = Self::new(v4, v6, offloads);
            if mark != 0 {
                udp.set_mark(mark)?;
            }
            return Ok(udp);
        }
    }

    /// Takes sockets that were held.
    pub fn from_held(v4: OwnedFd, v6: Option<OwnedFd>, offloads: Offloads) -> Self {
        Self::new(v4.into(), v6.map(Into::into), offloads)
    }

    fn new(v4: UdpSocket, v6: Option<UdpSocket>, offloads: Offloads) -> Self {
        let side = |socket| Side::new(socket, offloads);
        Self { v4: side(v4), v6: v6.map(side), control: nix::cmsg_space!(libc::c_int) }
    }

    /// The socket of IPv4.
    pub fn v4(&self) -> BorrowedFd<'_> {
        self.v4.socket.as_fd()
    }

    /// The socket of IPv6.
    pub fn v6(&self) -> Option<BorrowedFd<'_>> {
        self.v6.as_ref().map(|side| side.socket.as_fd())
    }

    /// The port of both.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.v4.socket.local_addr()?.port())
    }

    /// Marks what is sent (SO_MARK).
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        setsockopt(&self.v4.socket, sockopt::Mark, &mark)?;
        self.v6.iter().try_for_each(|v6| setsockopt(&v6.socket, sockopt::Mark, &mark))?;
        Ok(())
    }

    /// Sends datagrams of `size` bytes each, the last of which may be shorter; together they fit one. A full buffer is
    /// waited for, shortly; what cannot be sent is lost, as on any wire.
    pub fn send(&mut self, to: SocketAddr, datagrams: &[u8], size: usize) -> io::Result<()> {
        let side = match to.ip() {
            IpAddr::V4(_) => &mut self.v4,
            IpAddr::V6(_) => {
                self.v6.as_mut().ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))?
            }
        };
        if datagrams.len() > size && side.segment {
            match side.send_many(to, datagrams, size) {
                Err(Errno::EIO) => {
                    tracing::info!("an interface takes no groups of datagrams: sending them one by one");
                    side.segment = false;
                }
                // One is larger than the path takes (EINVAL), or the group is: one by one they may be fragmented.
                Err(Errno::EINVAL | Errno::EMSGSIZE) => {}
                other => return Ok(other?),
            }
        }
        datagrams.chunks(size.max(1)).try_for_each(|datagram| side.send_one(to, datagram))
    }

    /// Receives what waits at one of the sockets.
    ///
    /// # Errors
    /// `WouldBlock`: nothing waits.
    pub fn receive(&mut self, v6: bool, buffer: &mut [u8]) -> io::Result<Train> {
        let side = if v6 { self.v6.as_ref() } else { Some(&self.v4) };
        let side = side.ok_or(Errno::EWOULDBLOCK)?;
        let mut parts = [IoSliceMut::new(buffer)];
        let (fd, flags) = (side.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let got = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut self.control), flags)?;
        let from = got.address.as_ref().and_then(address_of).ok_or(Errno::EAFNOSUPPORT)?;
        let mut size = got.bytes;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::UdpGroSegments(each) = message {
                size = usize::try_from(each).unwrap_or(size);
            }
        }
        Ok(Train { from, length: got.bytes, size: size.max(1) })
    }
}

impl Side {
    fn new(socket: UdpSocket, offloads: Offloads) -> Self {
        // A kernel that does not know the option does not know the message either.
        let segment = offloads.segment && getsockopt(&socket, sockopt::UdpGsoSegment).is_ok();
        let gro = setsockopt(&socket, sockopt::UdpGroSegment, &offloads.gro);
        tracing::debug!(segment, ?gro, "offloads of the socket");
        Self { socket, segment }
    }

    fn send_many(&self, to: SocketAddr, datagrams: &[u8], size: usize) -> nix::Result<()> {
        let size = u16::try_from(size).map_err(|_| Errno::EINVAL)?;
        let (to, parts) = (SockaddrStorage::from(to), [IoSlice::new(datagrams)]);
        let message = [ControlMessage::UdpGsoSegments(&size)];
        self.patiently(|| {
            sendmsg(self.socket.as_raw_fd(), &parts, &message, MsgFlags::MSG_DONTWAIT, Some(&to)).map(drop)
        })
    }

    fn send_one(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let send = || self.socket.send_to(datagram, to).map(drop).map_err(errno);
        Ok(self.patiently(send)?)
    }

    fn patiently(&self, send: impl Fn() -> nix::Result<()>) -> nix::Result<()> {
        match send() {
            Err(Errno::EWOULDBLOCK) => {
                let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                poll(&mut fds, PollTimeout::from(20u8))?;
                send()
            }
            other => other,
        }
    }
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn address_of(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from(SocketAddrV4::from(*v4)));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from(SocketAddrV6::from(*v6))))
}

fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Beyond the system's limit with CAP_NET_ADMIN, else up to it.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
        socket.set_send_buffer_size(BUFFER)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(udp: &mut Udp, v6: bool, all: usize) -> Vec<Train> {
        let mut buffer = vec![0; 65536];
        let mut trains = Vec::new();
        while trains.iter().map(|train: &Train| train.length).sum::<usize>() < all {
            let fd = if v6 { udp.v6().unwrap() } else { udp.v4() };
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(2000u16)).unwrap(), 1);
            trains.push(udp.receive(v6, &mut buffer).unwrap());
        }
        trains
    }

    #[test]
    fn both_families_share_a_port_which_is_then_taken() {
        let mut udp = Udp::bind(0, 0, Offloads::ALL).unwrap();
        let port = udp.port().unwrap();
        let v6 = udp.v6.as_ref().map(|side| side.socket.local_addr().unwrap().port());
        assert_eq!(v6, udp.v6.as_ref().map(|_| port));
        assert_eq!(Udp::bind(port, 0, Offloads::ALL).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let to = (Ipv4Addr::LOCALHOST, port).into();
        udp.send(to, b"hello", 5).unwrap();
        assert_eq!(receive(&mut udp, false, 5), [Train { from: to, length: 5, size: 5 }]);
        assert_eq!(udp.receive(false, &mut [0; 9]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn many_at_once_arrive_by_one_call_or_by_many() {
        let ways = [(true, true), (true, false), (false, true), (false, false)];
        for (segment, gro) in ways {
            let mut udp = Udp::bind(0, 0, Offloads { segment, gro, ..Offloads::ALL }).unwrap();
            let to: SocketAddr = (Ipv4Addr::LOCALHOST, udp.port().unwrap()).into();
            udp.send(to, &[7; 10 * 1000 + 3], 1000).unwrap();
            let trains = receive(&mut udp, false, 10_003);
            let datagrams: usize = trains.iter().map(|train| train.length.div_ceil(train.size)).sum();
            assert_eq!(datagrams, 11, "{trains:?}");
            assert_eq!(trains.len() == 1, segment && gro, "{trains:?}");
            // Larger than the path takes at once: the kernel fragments.
            udp.send(to, &[7; 60_000], 60_000).unwrap();
            assert_eq!(receive(&mut udp, false, 60_000).len(), 1);
        }
    }
}
