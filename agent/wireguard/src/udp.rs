//! The two UDP sockets of a device, one a family, on one port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// What waits here while a worker is restarted is not lost.
const BUFFER: usize = 8 << 20;

/// How often a free port for both families is looked for.
const ATTEMPTS: usize = 50;

/// Both sockets. A host without IPv6 has only the first.
#[derive(Debug)]
pub struct Udp {
    /// IPv4.
    pub v4: UdpSocket,
    /// IPv6 only.
    pub v6: Option<UdpSocket>,
}

impl Udp {
    /// Binds both to `port`, or to a free one if it is 0, and marks what they send with `mark` if it is not 0.
    pub fn bind(port: u16, mark: u32) -> io::Result<Self> {
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
            let udp = Self { v4, v6 };
            if mark != 0 {
                udp.set_mark(mark)?;
            }
            return Ok(udp);
        }
    }

    /// Takes sockets that were held.
    pub fn from_held(v4: OwnedFd, v6: Option<OwnedFd>) -> Self {
        Self { v4: v4.into(), v6: v6.map(Into::into) }
    }

    /// The port of both.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.v4.local_addr()?.port())
    }

    /// Marks what is sent (SO_MARK).
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        setsockopt(&self.v4, sockopt::Mark, &mark)?;
        self.v6.iter().try_for_each(|v6| setsockopt(v6, sockopt::Mark, &mark))?;
        Ok(())
    }

    /// Sends a datagram. A full buffer is waited for, shortly; what cannot be sent is lost, as on any wire.
    pub fn send(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let socket = match to.ip() {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => {
                self.v6.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))?
            }
        };
        match socket.send_to(datagram, to) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                poll(&mut fds, PollTimeout::from(20u8))?;
                socket.send_to(datagram, to).map(drop)
            }
            other => other.map(drop),
        }
    }
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

    #[test]
    fn both_families_share_a_port_which_is_then_taken() {
        let udp = Udp::bind(0, 0).unwrap();
        let port = udp.port().unwrap();
        assert_eq!(udp.v6.as_ref().map(|s| s.local_addr().unwrap().port()), udp.v6.as_ref().map(|_| port));
        assert_eq!(Udp::bind(port, 0).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        udp.send((Ipv4Addr::LOCALHOST, port).into(), b"hello").unwrap();
        let mut fds = [PollFd::new(udp.v4.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(2000u16)).unwrap(), 1);
        let mut buffer = [0u8; 8];
        assert_eq!(udp.v4.recv_from(&mut buffer).unwrap(), (5, (Ipv4Addr::LOCALHOST, port).into()));
    }
}
