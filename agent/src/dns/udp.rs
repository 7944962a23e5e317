//! One thread, one socket: look at a datagram, answer it, then take it from the queue. Killed in between, it stays
//! there for the next agent; answered twice, it is ignored by who asked.

use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage,
    recv, recvmsg, sendmsg,
};

use super::{Over, Shared};

/// Longer queries do not exist; the rest of such a datagram is cut, and what is left is refused as damaged.
const MAX_QUERY: usize = 4096;

/// The address of ours that was asked, from which the answer must go.
#[derive(Clone, Copy)]
enum Asked {
    V4(libc::in_pktinfo),
    V6(libc::in6_pktinfo),
    Unknown,
}

/// Runs until `stop` is written.
pub(super) fn run(socket: &UdpSocket, shared: &Shared, stop: &EventFd) {
    let mut buffer = [0u8; MAX_QUERY];
    let mut control = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    // Were there a datagram that kills the agent, looking before taking would kill every agent after it: the first
    // one after a start is taken first.
    let mut looked = MsgFlags::empty();
    let mut turn = 0u32;
    loop {
        let flags = MsgFlags::MSG_DONTWAIT | looked;
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let (length, from, asked) =
            match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Ok(message) => {
                    let asked = message.cmsgs().map_or(Asked::Unknown, asked);
                    (message.bytes, message.address.as_ref().and_then(from), asked)
                }
                Err(Errno::EAGAIN) => {
                    if !readable(socket, stop) {
                        return;
                    }
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot read a DNS query");
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
            };
        let started = Instant::now();
        turn = turn.wrapping_add(1);
        if let (Some(from), Some(query)) = (from, buffer.get(..length))
            && let Some(reply) = shared.answer(query, from, Over::Udp, turn)
        {
            // A client that cannot be reached, a full queue: it will ask again.
            let _ = send(socket, &reply.bytes, from, asked);
            shared.metrics.answered(reply.rcode, started.elapsed());
        }
        if looked.is_empty() {
            looked = MsgFlags::MSG_PEEK;
        } else {
            let _ = recv(socket.as_raw_fd(), &mut [0u8; 1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC);
        }
    }
}

/// Waits for a datagram; false when told to stop.
fn readable(socket: &UdpSocket, stop: &EventFd) -> bool {
    let mut fds =
        [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut fds, PollTimeout::NONE);
    !fds[1].any().unwrap_or(false)
}

fn from(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some((*v4).into());
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}

fn asked(messages: impl Iterator<Item = ControlMessageOwned>) -> Asked {
    let mut asked = Asked::Unknown;
    for message in messages {
        match message {
            ControlMessageOwned::Ipv4PacketInfo(mut info) => {
                info.ipi_ifindex = 0;
                asked = Asked::V4(info);
            }
            ControlMessageOwned::Ipv6PacketInfo(mut info) => {
                let address = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
                if !address.is_unicast_link_local() {
                    info.ipi6_ifindex = 0;
                }
                if !address.is_multicast() {
                    asked = Asked::V6(info);
                }
            }
            _ => {}
        }
    }
    asked
}

fn send(socket: &UdpSocket, bytes: &[u8], to: SocketAddr, asked: Asked) -> nix::Result<usize> {
    let control = match &asked {
        Asked::V4(info) => Some(ControlMessage::Ipv4PacketInfo(info)),
        Asked::V6(info) => Some(ControlMessage::Ipv6PacketInfo(info)),
        Asked::Unknown => None,
    };
    match to {
        SocketAddr::V4(to) => send_to(socket, bytes, &SockaddrIn::from(to), control.as_slice()),
        SocketAddr::V6(to) => send_to(socket, bytes, &SockaddrIn6::from(to), control.as_slice()),
    }
}

fn send_to<S: SockaddrLike>(
    socket: &UdpSocket,
    bytes: &[u8],
    to: &S,
    control: &[ControlMessage<'_>],
) -> nix::Result<usize> {
    let parts = [IoSlice::new(bytes)];
    sendmsg(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL, Some(to))
}
