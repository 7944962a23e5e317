//! The holder: the small first process that opens the DNS sockets and keeps the agent proper running as its child.
//! While no agent lives, queries wait in the kernel's queues; none is refused.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;
use tombolo_hold::{Event, Held, HoldError, Supervisor};

/// UDP sockets of one address: a thread each, the kernel spreads clients over them.
const UDP_SOCKETS: usize = 2;
/// Queue of a UDP socket in bytes. Measured: the kernel's default holds 256 queries.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Connections that wait to be accepted; the kernel cuts it to net.core.somaxconn.
const BACKLOG: i32 = 1024;
const UDP_NAME: &str = "dns-udp";
const TCP_NAME: &str = "dns-tcp";

/// Exit codes of the agent that a restart would not cure (clap's code for wrong usage).
pub const FINAL_CODES: [i32; 1] = [2];

/// Sockets of the resolver.
#[derive(Debug, Default)]
pub struct DnsSockets {
    /// For UDP; several of one address share it (SO_REUSEPORT), each with a queue of its own.
    pub udp: Vec<UdpSocket>,
    /// For TCP, one of an address.
    pub tcp: Vec<TcpListener>,
}

/// Why there are no sockets.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another process has the port.
    #[error(
        "cannot answer names on {address} ({transport}): the port is taken by {holder}; end that process, or have the agent listen elsewhere"
    )]
    Taken {
        /// Where we wanted to listen.
        address: SocketAddr,
        /// UDP or TCP.
        transport: &'static str,
        /// Who it is, or how to find out.
        holder: String,
    },
    /// Something else.
    #[error("cannot listen for names on {address} ({transport}): cannot {what}")]
    Io {
        /// Where we wanted to listen.
        address: SocketAddr,
        /// UDP or TCP.
        transport: &'static str,
        /// The operation.
        what: &'static str,
        /// Its cause.
        #[source]
        source: io::Error,
    },
    /// No address family at all.
    #[error("cannot listen for names: the kernel has neither IPv4 nor IPv6")]
    Nothing,
}

/// All addresses of both families, on `port`.
pub fn everywhere(port: u16) -> [SocketAddr; 2] {
    [(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port).into(), (IpAddr::V6(Ipv6Addr::UNSPECIFIED), port).into()]
}

/// Opens the sockets of the resolver, in the holder. An address of a family that the kernel does not have is left
/// out if there is another.
///
/// Port 0 takes a free one. TCP is opened first and alone does not share its port, so that a second agent on a machine is noticed.
pub fn sockets(listen: &[SocketAddr]) -> Result<DnsSockets, ListenError> {
    let mut sockets = DnsSockets::default();
    for &address in listen {
        let mut opening = Opening { address, transport: "TCP" };
        let tcp = match opening.tcp() {
            Ok(tcp) => tcp,
            Err(ListenError::Io { source, .. }) if no_such_family(&source) => continue,
            Err(error) => return Err(error),
        };
        // Port 0: whichever TCP was given.
        opening.address = opening.done("read its own address", tcp.local_addr())?;
        opening.transport = "UDP";
        sockets.tcp.push(tcp);
        for _ in 0..UDP_SOCKETS {
            sockets.udp.push(opening.udp()?);
        }
    }
    if sockets.tcp.is_empty() { Err(ListenError::Nothing) } else { Ok(sockets) }
}

/// Holds the sockets and runs this same program with `args` as a child, again at once whenever it dies, until it
/// exits with 0 or one of [`FINAL_CODES`], or the holder is told to end (SIGTERM, SIGINT: passed on). Returns the
/// code to exit with. To be called from `main`'s own thread before there is another.
///
/// # Errors
/// Only what fails before the first child runs.
pub fn run_holder(
    sockets: DnsSockets,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    on_event: impl FnMut(Event),
) -> Result<i32, HoldError> {
    let mut supervisor = Supervisor::current_exe(args)?;
    hold(sockets, &mut supervisor)?;
    supervisor.final_codes(FINAL_CODES).run(on_event)
}

/// Has a supervisor hold the sockets.
pub fn hold(sockets: DnsSockets, supervisor: &mut Supervisor) -> Result<(), HoldError> {
    for (at, socket) in sockets.udp.into_iter().enumerate() {
        supervisor.hold(&format!("{UDP_NAME}{at}"), socket)?;
    }
    for (at, socket) in sockets.tcp.into_iter().enumerate() {
        supervisor.hold(&format!("{TCP_NAME}{at}"), socket)?;
    }
    Ok(())
}

/// The sockets that the holder gave this process; `None` in a process without a holder. To be called once.
pub fn take_sockets() -> Result<Option<DnsSockets>, HoldError> {
    Ok(Held::from_env()?.map(|mut held| take_from(&mut held)))
}

/// The same for who takes more out of `held`.
pub fn take_from(held: &mut Held) -> DnsSockets {
    let mut sockets = DnsSockets::default();
    let names: Vec<String> = held.names().map(str::to_owned).collect();
    for name in names {
        if name.starts_with(UDP_NAME) {
            sockets.udp.extend(held.take(&name).map(UdpSocket::from));
        } else if name.starts_with(TCP_NAME) {
            sockets.tcp.extend(held.take(&name).map(TcpListener::from));
        }
    }
    sockets
}

struct Opening {
    address: SocketAddr,
    transport: &'static str,
}

impl Opening {
    fn tcp(&self) -> Result<TcpListener, ListenError> {
        let socket = self.socket(Type::STREAM, Protocol::TCP)?;
        self.done("set SO_REUSEADDR", socket.set_reuse_address(true))?;
        self.bind(&socket)?;
        self.done("listen", socket.listen(BACKLOG))?;
        self.done("set O_NONBLOCK", socket.set_nonblocking(true))?;
        Ok(socket.into())
    }

    fn udp(&self) -> Result<UdpSocket, ListenError> {
        let socket = self.socket(Type::DGRAM, Protocol::UDP)?;
        self.done("set SO_REUSEPORT", socket.set_reuse_port(true))?;
        // Beyond net.core.rmem_max only with CAP_NET_ADMIN; without, as much as there is.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            self.done("set SO_RCVBUF", socket.set_recv_buffer_size(RECEIVE_BUFFER))?;
        }
        let told = match self.address {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true),
            SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true),
        };
        self.done("learn the address that is asked", told.map_err(io::Error::from))?;
        self.bind(&socket)?;
        Ok(socket.into())
    }

    fn socket(&self, kind: Type, protocol: Protocol) -> Result<Socket, ListenError> {
        let domain = Domain::for_address(self.address);
        let socket = self.done("open a socket", Socket::new(domain, kind, Some(protocol)))?;
        if self.address.is_ipv6() {
            self.done("set IPV6_V6ONLY", socket.set_only_v6(true))?;
        }
        Ok(socket)
    }

    fn bind(&self, socket: &Socket) -> Result<(), ListenError> {
        let bound = socket.bind(&self.address.into());
        if bound.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::AddrInUse) {
            let Self { address, transport } = *self;
            return Err(ListenError::Taken { address, transport, holder: holder(transport, address.port()) });
        }
        self.done("bind", bound)
    }

    fn done<T>(&self, what: &'static str, result: io::Result<T>) -> Result<T, ListenError> {
        let Self { address, transport } = *self;
        result.map_err(|source| ListenError::Io { address, transport, what, source })
    }
}

fn no_such_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

/// Who has a local port, as far as /proc tells.
fn holder(transport: &str, port: u16) -> String {
    let transport = transport.to_lowercase();
    let inodes: Vec<String> = ["", "6"]
        .iter()
        .filter_map(|family| std::fs::read_to_string(format!("/proc/self/net/{transport}{family}")).ok())
        .flat_map(|table| table.lines().filter_map(|line| inode(line, port)).collect::<Vec<_>>())
        .collect();
    process(&inodes).unwrap_or_else(|| {
        let flag = if transport == "udp" { "u" } else { "t" };
        format!("another process (`ss -ln{flag}p sport = :{port}` as root names it)")
    })
}

/// Inode of the socket in a line of /proc/net/{tcp,udp}, if it waits on `port`.
fn inode(line: &str, port: u16) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let local = fields.get(1)?.rsplit_once(':')?.1;
    // 0A: listening; 07: an unconnected UDP socket.
    let waits = matches!(*fields.get(3)?, "0A" | "07");
    (waits && u16::from_str_radix(local, 16).ok()? == port).then(|| fields.get(9).map(|i| (*i).to_owned()))?
}

/// A process that has one of these sockets open.
fn process(inodes: &[String]) -> Option<String> {
    let wanted: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(fds) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let has = |fd: &Path| {
            std::fs::read_link(fd).is_ok_and(|link| wanted.iter().any(|w| link.as_os_str() == w.as_str()))
        };
        if fds.flatten().any(|fd| has(&fd.path())) {
            let comm = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", comm.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_both_families_and_names_who_has_the_port() {
        let any: Vec<SocketAddr> = vec!["127.0.0.1:0".parse().unwrap()];
        let first = sockets(&any).unwrap();
        assert_eq!((first.udp.len(), first.tcp.len()), (UDP_SOCKETS, 1));
        let taken = first.tcp[0].local_addr().unwrap();
        let error = sockets(&[taken]).unwrap_err().to_string();
        assert!(error.contains(&taken.to_string()), "{error}");
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(!error.contains('\n'));
    }

    #[test]
    fn queues_are_deep() {
        let sockets = sockets(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        let size = socket2::SockRef::from(&sockets.udp[0]).recv_buffer_size().unwrap();
        // Without CAP_NET_ADMIN the kernel's limit holds.
        let limit: usize =
            std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap().trim().parse().unwrap();
        assert!(size >= RECEIVE_BUFFER.min(limit), "{size}");
    }

    #[test]
    fn the_table_of_sockets_is_understood() {
        let line = "  12: 00000000:2745 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 x";
        assert_eq!(inode(line, 10053).as_deref(), Some("4242"));
        assert_eq!(inode(line, 10054), None);
        for bad in ["", "sl local_address", "1: zz 0 0A", "1: 0:FFFFF 0 0A 0 0 0 0 0 9"] {
            assert_eq!(inode(bad, 1), None);
        }
    }
}
