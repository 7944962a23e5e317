//! What runs in a pod: a small HTTP server and echo servers, by threads and the standard library alone.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::probe::{PROBE_LEN, ProbePacket};

/// Port of the echo servers, UDP and TCP.
pub const ECHO_PORT: u16 = 7000;
/// Connections served at once.
const CONNECTIONS: usize = 512;
/// Probe flows counted at once.
const FLOWS: usize = 256;

/// Serves until killed: HTTP on `port` (`/health`, `/ip`, `/bytes/N`), echo on [`ECHO_PORT`].
///
/// # Errors
/// If a port cannot be bound.
pub fn serve(name: &str, port: u16) -> Result<()> {
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let http = TcpListener::bind(any(port)).with_context(|| format!("TCP port {port}"))?;
    let echo = TcpListener::bind(any(ECHO_PORT)).with_context(|| format!("TCP port {ECHO_PORT}"))?;
    let udp = UdpSocket::bind(any(ECHO_PORT)).with_context(|| format!("UDP port {ECHO_PORT}"))?;
    let name: Arc<str> = name.into();
    std::thread::spawn(move || accept(&echo, echo_stream));
    crate::probe::make_room(&udp)?;
    std::thread::spawn(move || echo_udp(&udp));
    accept(&http, move |stream| answer(stream, &name));
    Ok(())
}

/// The address without the v4-in-v6 form that a dual-stack socket shows.
#[must_use]
pub fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

fn accept(listener: &TcpListener, handle: impl Fn(TcpStream) -> std::io::Result<()> + Send + Sync + 'static) {
    let handle = Arc::new(handle);
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (handle, open) = (handle.clone(), open.clone());
        std::thread::spawn(move || {
            let _ = handle(stream);
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn echo_stream(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 16384];
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..len])?;
    }
}

/// Echoes; a probe's packet with the number of its flow's packets seen so far; `whoami` with the sender's address.
fn echo_udp(socket: &UdpSocket) {
    let mut flows: BTreeMap<u64, u64> = BTreeMap::new();
    let mut buffer = [0; 65536];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        let packet = &mut buffer[..len];
        if packet == b"whoami" {
            let _ = socket.send_to(plain(from.ip()).to_string().as_bytes(), from);
        } else if let Some(mut probe) = ProbePacket::read(packet) {
            if flows.len() >= FLOWS && !flows.contains_key(&probe.flow) {
                flows.pop_first();
            }
            let count = flows.entry(probe.flow).or_default();
            *count += 1;
            probe.count = *count;
            packet[..PROBE_LEN].copy_from_slice(&probe.write());
            let _ = socket.send_to(packet, from);
        } else {
            let _ = socket.send_to(packet, from);
        }
    }
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let peer = plain(stream.peer_addr()?.ip());
    let mut reader = BufReader::new(stream.try_clone()?.take(16384));
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split_whitespace().nth(1).unwrap_or("/");
    let (status, body) = match path.strip_prefix("/bytes/").map(str::parse::<usize>) {
        Some(Ok(len)) if len <= 1 << 24 => ("200 OK", "x".repeat(len)),
        Some(_) => ("400 Bad Request", "how many bytes, at most 16777216?\n".to_owned()),
        None => match path {
            "/health" => ("200 OK", format!("ok {name}\n")),
            "/ip" => ("200 OK", format!("{peer}\n")),
            _ => ("404 Not Found", "try /health, /ip or /bytes/N\n".to_owned()),
        },
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
