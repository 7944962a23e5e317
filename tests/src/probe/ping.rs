//! One ICMP echo, by a raw socket: no tool needed.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

/// What became of an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Echo {
    /// Answered, after so many milliseconds.
    Answered(f64),
    /// Somebody said that there is no way (our own kernel included).
    Unreachable,
    /// Nothing came.
    Silent,
}

impl Echo {
    /// Whether it was answered.
    #[must_use]
    pub fn is_answered(self) -> bool {
        matches!(self, Self::Answered(_))
    }
}

/// Sends one echo request and waits.
///
/// # Errors
/// If the raw socket cannot be made.
pub fn ping(to: IpAddr, timeout: Duration) -> Result<Echo> {
    let (domain, protocol) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).context("a raw ICMP socket (root only)")?;
    let start = Instant::now();
    // Unique enough: a reply is matched by both.
    let id = (std::process::id() & 0xffff) as u16;
    let sequence =
        std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| (t.subsec_nanos() >> 8 & 0xffff) as u16);
    let request = message(to.is_ipv4(), id, sequence);
    if socket.send_to(&request, &SocketAddr::from((to, 0)).into()).is_err() {
        return Ok(Echo::Unreachable);
    }
    let mut buffer = [0; 2048];
    while let Some(left) = timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
        socket.set_read_timeout(Some(left))?;
        let Ok(len) = (&socket).read(&mut buffer) else { continue };
        let bytes = &buffer[..len];
        let (skip, reply, errors) = match to {
            IpAddr::V4(_) => (usize::from(bytes.first().unwrap_or(&0) & 15) * 4, 0, [3, 11]),
            IpAddr::V6(_) => (0, 129, [1, 3]),
        };
        let icmp = bytes.get(skip..).unwrap_or_default();
        let [kind, _, _, _, rest @ ..] = icmp else { continue };
        let mine = |echo: &[u8]| echo.starts_with(&[id.to_be_bytes(), sequence.to_be_bytes()].concat());
        if *kind == reply && mine(rest) {
            return Ok(Echo::Answered(super::ms(start.elapsed())));
        }
        // An error quotes our packet: behind 4 bytes, its header and the echo's first 4 bytes.
        let quoted = rest.get(4 + if to.is_ipv4() { 20 } else { 40 } + 4..).unwrap_or_default();
        if errors.contains(kind) && mine(quoted) {
            return Ok(Echo::Unreachable);
        }
    }
    Ok(Echo::Silent)
}

fn message(v4: bool, id: u16, sequence: u16) -> Vec<u8> {
    let mut bytes = vec![if v4 { 8 } else { 128 }, 0, 0, 0];
    bytes.extend(id.to_be_bytes());
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(b"tombolo echo");
    if v4 {
        let sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let sum = !((folded & 0xffff) + (folded >> 16)) as u16;
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}
