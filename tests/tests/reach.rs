//! What a foreign pod sees of a cluster: what is exported, and nothing else; not even that there is something.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};
use std::os::fd::AsFd as _;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, host, program, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);
/// How long answers are waited for: what is closed is silent.
const PATIENCE: Duration = Duration::from_millis(700);
/// Sockets at once.
const AT_ONCE: usize = 1024;

/// The ports that are asked: the low ones, ours, and those of what runs on nodes.
fn ports() -> impl Iterator<Item = u16> {
    let few = [2379, 3306, 4500, 4501, 5432, 6379, 6443, 7000, 8080, 8443, 9090, 10053, 10250, 10256, 30000];
    (1..=1024).chain(4505..=4580).chain(few)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    open: BTreeSet<u16>,
    /// Answered by a refusal: closed, but seen.
    refused: BTreeSet<u16>,
}

/// What answers to TCP.
fn tcp(target: IpAddr) -> Result<Seen> {
    let mut seen = Seen::default();
    let all: Vec<u16> = ports().collect();
    for some in all.chunks(AT_ONCE) {
        let mut waiting: Vec<(u16, Socket)> = Vec::new();
        for &port in some {
            let socket = Socket::new(Domain::for_address((target, 0).into()), Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            match socket.connect(&SocketAddr::new(target, port).into()) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => waiting.push((port, socket)),
                Ok(()) => drop(seen.open.insert(port)),
                Err(_) => drop(seen.refused.insert(port)),
            }
        }
        let end = Instant::now() + PATIENCE;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let mut fds: Vec<PollFd<'_>> =
                waiting.iter().map(|(_, s)| PollFd::new(s.as_fd(), PollFlags::POLLOUT)).collect();
            poll(&mut fds, PollTimeout::try_from(left.min(Duration::from_millis(100)))?)?;
            let done: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|r| !r.is_empty())).collect();
            let mut done = done.into_iter();
            waiting.retain(|(port, socket)| {
                let ready = done.next().unwrap_or(false);
                if ready {
                    match socket.take_error() {
                        Ok(None) => drop(seen.open.insert(*port)),
                        _ => drop(seen.refused.insert(*port)),
                    }
                }
                !ready
            });
        }
    }
    Ok(seen)
}

/// What answers to UDP, by an echo or a refusal. `size` above the MTU is sent in fragments.
fn udp(target: IpAddr, size: usize) -> Result<Seen> {
    let mut seen = Seen::default();
    let unspecified: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let mut sockets = Vec::new();
    for port in ports() {
        let socket = UdpSocket::bind((unspecified, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect((target, port))?;
        socket.send(&vec![0; size])?;
        sockets.push((port, socket));
    }
    std::thread::sleep(PATIENCE);
    let mut buffer = vec![0; size + 1];
    for (port, socket) in sockets {
        match socket.recv(&mut buffer) {
            Ok(_) => drop(seen.open.insert(port)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => drop(seen.refused.insert(port)),
        }
    }
    Ok(seen)
}

/// Sends what is neither TCP nor UDP, and says what came back by ICMP: (type, code) of everything from the target.
fn others(target: IpAddr) -> Result<BTreeSet<(u8, u8)>> {
    let v4 = target.is_ipv4();
    let (domain, icmp) = if v4 { (Domain::IPV4, 1) } else { (Domain::IPV6, 58) };
    let raw = |protocol: i32| {
        Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).context("a raw socket (root only)")
    };
    let to = SocketAddr::from((target, 0)).into();
    let listener = raw(icmp)?;
    // Timestamp, address mask, information, router solicitation; node information, multicast listener, redirect.
    let kinds: &[u8] = if v4 { &[13, 17, 15, 10, 5] } else { &[139, 130, 137, 133] };
    for kind in kinds {
        let mut message = [0_u8; 20];
        message[0] = *kind;
        message[4] = 7;
        if v4 {
            let sum = message.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>();
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let _ = listener.send_to(&message, &to);
    }
    // IP in IP, GRE, ESP, SCTP, UDP-Lite, nothing that is in use.
    for protocol in [4, 47, 50, 132, 136, 253] {
        let _ = raw(protocol)?.send_to(&[0; 40], &to);
    }
    let mut seen = BTreeSet::new();
    let end = Instant::now() + PATIENCE;
    let mut buffer = [0; 2048];
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        listener.set_read_timeout(Some(left))?;
        let Ok(length) = (&listener).read(&mut buffer) else { continue };
        let bytes = &buffer[..length];
        let from = if v4 { bytes.get(12..16) == Some(&octets(target)[..]) } else { true };
        let icmp = if v4 { bytes.get(20..) } else { Some(bytes) };
        if let (true, Some([kind, code, ..])) = (from, icmp) {
            // Neighbour discovery on the own link.
            if v4 || !(133..=137).contains(kind) {
                seen.insert((*kind, *code));
            }
        }
    }
    Ok(seen)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// What is open is seen, sooner or later on a busy machine; nothing else ever is.
fn only(what: &str, open: &BTreeSet<u16>, scan: impl Fn() -> Result<Seen>) -> Result<()> {
    let start = Instant::now();
    loop {
        let seen = scan()?;
        ensure!(seen.refused.is_empty() && seen.open.is_subset(open), "{what}: {seen:?}");
        if seen.open == *open {
            return Ok(());
        }
        ensure!(start.elapsed() < SOON, "{what}: only {seen:?}");
    }
}

fn dropped(lab: &Lab, cluster: &str) -> Result<f64> {
    let mut sum = 0.0;
    for node in &lab.topology().cluster(cluster)?.nodes {
        let url = format!("http://{}/metrics", program::AGENT_ADMIN);
        let text = lab.fetch(&node.name, &url, &[])?.body;
        let line = "tombolo_dropped_packets{reason=\"reach_dropped\"} ";
        sum += text.lines().filter_map(|l| l.strip_prefix(line)?.parse::<f64>().ok()).sum::<f64>();
    }
    Ok(sum)
}

/// Nodes have their addresses inside the grant here, so that a foreign pod's packets reach them by the tunnels too.
#[test]
fn a_scan_sees_exported_ports_only() {
    scenario("a_scan_sees_exported_ports_only", LIMIT, || {
        let text = TWO.replace("  - id: eu-west\n", "  - id: eu-west\n    flat: true\n");
        ensure!(text != TWO, "the topology is another");
        let lab = Lab::build(Topology::parse(&text)?)?;
        lab.bring_up()?;
        lab.export("eu-west", "production", "api-service")?;
        let scanner = lab.place("us-c")?;
        let pods = |name: &str| -> Result<[IpAddr; 2]> {
            let pod = lab.topology().pod(name)?;
            Ok([pod.v4.into(), pod.v6.into()])
        };
        for backend in pods("eu-c")? {
            wait_until("the exported port", SOON, || {
                let url = format!("http://{}:8080/health", host(backend));
                lab.fetch("us-c", &url, &["--timeout", "2"]).map(drop)
            })?;
        }
        let before = dropped(&lab, "eu-west")?;
        let (tcp_open, udp_open) = (BTreeSet::from([8080]), BTreeSet::from([7000]));
        for backend in pods("eu-c")? {
            only(&format!("TCP of {backend}"), &tcp_open, || scanner.run(|| tcp(backend))?)?;
            // Whole, and in fragments.
            for size in [8, 3000] {
                let what = format!("UDP of {size} bytes to {backend}");
                only(&what, &udp_open, || scanner.run(|| udp(backend, size))?)?;
            }
            let seen = scanner.run(|| others(backend))??;
            ensure!(seen.is_empty(), "other packets to {backend} are answered by ICMP {seen:?}");
            ensure!(lab.ping("us-c", backend, SOON)?.is_answered(), "an exported address answers an echo");
        }
        // A pod that backs nothing, nodes with all that listens on them, and the nodes' tunnel addresses.
        let mut closed: Vec<(IpAddr, bool)> = pods("eu-d")?.map(|a| (a, false)).into();
        for node in ["eu-gw1", "eu-w1"] {
            closed.extend(lab.topology().underlay(node)?.into_iter().map(|a| (a, false)));
        }
        let devices = lab.place("eu-w1")?.capture(&["ip", "-o", "address", "show"])?;
        let tunnel: BTreeSet<IpAddr> = devices
            .lines()
            .filter(|line| line.contains(": tombolo"))
            .filter_map(|line| line.split_whitespace().nth(3)?.split('/').next()?.parse().ok())
            .filter(|a: &IpAddr| !a.to_string().starts_with("fe80"))
            .collect();
        ensure!(tunnel.len() == 2, "the tunnel addresses of eu-w1: {devices}");
        closed.extend(tunnel.into_iter().map(|a| (a, true)));
        for (target, echoes) in closed {
            let seen = scanner.run(|| tcp(target))??;
            ensure!(seen == Seen::default(), "TCP of {target}: {seen:?}");
            for size in [8, 3000] {
                let seen = scanner.run(|| udp(target, size))??;
                ensure!(seen == Seen::default(), "UDP of {size} bytes to {target}: {seen:?}");
            }
            let seen = scanner.run(|| others(target))??;
            ensure!(seen.is_empty(), "other packets to {target} are answered by ICMP {seen:?}");
            let patience = if echoes { SOON } else { PATIENCE };
            let echo = lab.ping("us-c", target, patience)?;
            ensure!(echo.is_answered() == echoes, "{target} is pinged: {echo:?}");
        }
        // Each packet was counted, and people are shown it.
        let now = dropped(&lab, "eu-west")?;
        ensure!(now - before > 5000.0, "{now} packets are counted, {before} before");
        let status = lab.tombolo("eu-w1", &["status"])?;
        ensure!(status.contains("reach_dropped"), "status does not tell: {status}");
        Ok(())
    });
}
