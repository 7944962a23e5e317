//! A one-shot client: `http://` and `udp://` (which asks the echo server for the address it sees). Names go through
//! getaddrinfo, hence through the place's own resolv.conf, as any program's would.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Which addresses of a name may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// Whatever the resolver puts first.
    #[default]
    Any,
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
}

/// An answer.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Fetched {
    /// HTTP status; 200 for UDP.
    pub status: u16,
    /// The body.
    pub body: String,
    /// The address that was asked.
    pub peer: IpAddr,
    /// From the start of name resolution to the last byte, in milliseconds.
    pub ms: u64,
}

/// Fetches a URL.
///
/// # Errors
/// Which step failed (name, connection, answer) and how.
pub fn fetch(url: &str, family: Family, timeout: Duration) -> Result<Fetched> {
    let start = Instant::now();
    let (scheme, rest) =
        url.split_once("://").context("a URL is http://HOST[:PORT]/PATH or udp://HOST:PORT")?;
    let (host, path) = rest.split_once('/').map_or((rest, String::new()), |(h, p)| (h, p.to_owned()));
    let target = if has_port(host) { host.to_owned() } else { format!("{host}:80") };
    let addresses: Vec<SocketAddr> = target
        .to_socket_addrs()
        .with_context(|| format!("resolving {host}"))?
        .filter(|a| match family {
            Family::Any => true,
            Family::V4 => a.is_ipv4(),
            Family::V6 => a.is_ipv6(),
        })
        .collect();
    ensure!(!addresses.is_empty(), "{host} has no address of the wanted family");
    let (status, body, peer) = match scheme {
        "http" => http(&addresses, host, &path, timeout)?,
        "udp" => udp(addresses[0], timeout)?,
        _ => bail!("cannot fetch {scheme}://: only http and udp"),
    };
    Ok(Fetched { status, body, peer, ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX) })
}

fn has_port(host: &str) -> bool {
    match host.rsplit_once(':') {
        Some((before, port)) => {
            port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']'))
        }
        None => false,
    }
}

fn http(
    addresses: &[SocketAddr],
    host: &str,
    path: &str,
    timeout: Duration,
) -> Result<(u16, String, IpAddr)> {
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(address, timeout) {
            Ok(stream) => return exchange(stream, host, path, timeout).map(|(s, b)| (s, b, address.ip())),
            Err(error) => last = Some((address, error)),
        }
    }
    match last {
        Some((address, error)) => bail!("connecting to {address}: {error}"),
        None => bail!("no address"),
    }
}

fn exchange(mut stream: TcpStream, host: &str, path: &str, timeout: Duration) -> Result<(u16, String)> {
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut text = Vec::new();
    stream.take(1 << 25).read_to_end(&mut text).context("reading the answer")?;
    let text = String::from_utf8_lossy(&text);
    let (head, body) = text.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status =
        head.split_whitespace().nth(1).and_then(|s| s.parse().ok()).context("the answer has no status")?;
    if let Some(length) = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")) {
        ensure!(
            length.trim().parse::<usize>() == Ok(body.len()),
            "the answer was cut off at {} bytes",
            body.len()
        );
    }
    Ok((status, body.to_owned()))
}

fn udp(address: SocketAddr, timeout: Duration) -> Result<(u16, String, IpAddr)> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address).with_context(|| format!("connecting to {address}"))?;
    socket.set_read_timeout(Some(timeout))?;
    socket.send(b"whoami").with_context(|| format!("sending to {address}"))?;
    let mut buffer = [0; 2048];
    let len = socket.recv(&mut buffer).with_context(|| format!("waiting for {address}"))?;
    Ok((200, format!("{}\n", String::from_utf8_lossy(&buffer[..len])), address.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_told_from_an_address() {
        assert!(has_port("a:80") && has_port("[fd00::1]:80") && has_port("10.0.0.1:80"));
        assert!(!has_port("a") && !has_port("[fd00::1]") && !has_port("fd00::80"));
    }

    #[test]
    fn errors_say_which_step_failed() {
        let error = |url| format!("{:#}", fetch(url, Family::Any, Duration::from_millis(200)).unwrap_err());
        assert!(error("localhost").contains("a URL is"));
        assert!(error("ftp://127.0.0.1/").contains("only http and udp"));
        assert!(error("http://127.0.0.1:1/").contains("connecting to 127.0.0.1:1"));
    }
}
