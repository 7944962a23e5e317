//! The server of the conformance suite's pods: whoever connects, or sends a datagram, learns which pod it reached, by the
//! first address of that.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, sendmsg, setsockopt, sockopt,
};

use crate::kubernetes::find;
use crate::program::STATE_DIR;
use crate::serve::plain;

/// A client says no more for so long: it is through.
const PATIENCE: Duration = Duration::from_secs(2);
/// What a client says is read so far, bytes.
const MOST: u64 = 1 << 16;

/// Serves on this port, TCP and UDP, until killed.
///
/// # Errors
/// If the port cannot be bound.
pub fn hello(port: u16) -> Result<()> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let tcp = TcpListener::bind(any).with_context(|| format!("TCP port {port}"))?;
    let udp = UdpSocket::bind(any).with_context(|| format!("UDP port {port}"))?;
    setsockopt(&udp, sockopt::Ipv6RecvPacketInfo, &true).context("asking for addresses")?;
    std::thread::spawn(move || {
        loop {
            // Who went away before the answer is no matter.
            let _ = datagram(&udp);
        }
    });
    for stream in tcp.incoming().flatten() {
        std::thread::spawn(move || answer(stream));
    }
    bail!("the server on port {port} ended")
}

/// Answers one connection. Closed with something unread, it would be reset, and the answer lost with it.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(said(stream.local_addr()?.ip()).as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    io::copy(&mut stream.take(MOST), &mut io::sink()).map(drop)
}

fn said(reached: IpAddr) -> String {
    let reached = plain(reached);
    format!("pod ip {}\n", first_of(reached).unwrap_or(reached))
}

/// The first address of the pod that has this one, as the API server has it. That a pod has two it alone knows.
fn first_of(address: IpAddr) -> Option<IpAddr> {
    if address.is_ipv4() {
        return None;
    }
    let kubeconfig = format!("--kubeconfig={STATE_DIR}/kubeconfig");
    let list = "jsonpath={range .items[*]}{.status.podIPs[*].ip}{\"\\n\"}{end}";
    let mut kubectl = Command::new(find("kubectl").ok()?);
    let output =
        kubectl.args([&kubeconfig, "get", "pods", "--all-namespaces", "--output", list]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let wanted = address.to_string();
    let pod = text.lines().find(|line| line.split_whitespace().any(|ip| ip == wanted))?;
    pod.split_whitespace().next()?.parse().ok()
}

/// Answers one datagram, from the address that it was sent to.
fn datagram(socket: &UdpSocket) -> nix::Result<()> {
    let mut buffer = [0u8; 1500];
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message =
        recvmsg::<SockaddrIn6>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let asked = message.cmsgs()?.find_map(|c| match c {
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
        _ => None,
    });
    let (Some(from), Some(mut info)) = (message.address, asked) else { return Ok(()) };
    info.ipi6_ifindex = 0;
    let answer = said(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
    let parts = [IoSlice::new(answer.as_bytes())];
    let control = [ControlMessage::Ipv6PacketInfo(&info)];
    sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&from)).map(drop)
}
