//! What this node's kernel, devices and resolver really have. Looks, and changes nothing.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tombolo_agent::apply::device::{DeviceState, TunnelDriver as _};
use tombolo_agent::apply::driver::Drivers;
use tombolo_agent::apply::{Options, Writes};
use tombolo_agent_core::desired::{DNS_PORT, Vip};
use tombolo_proto::model::{DeviceNumber, Family, Protocol};

use crate::output::plain;

/// How long an answer over a tunnel may take.
const ANSWER: Duration = Duration::from_secs(1);

/// A tunnel device's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) up: bool,
    pub(super) mtu: u64,
}

/// Where the kernel sends a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// By this link.
    Link(String),
    /// Nowhere.
    Refused(String),
}

/// What became of a question over the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Answered(Duration),
    /// Somebody said no: a reset, or "unreachable".
    Refused,
    Silent,
}

/// What a walk looks at.
pub(super) trait Kernel {
    /// What the resolver of this node answers; empty: no such name or records.
    fn resolve(&self, name: &str, family: Family) -> Result<Vec<IpAddr>, String>;
    /// Over how many backends the firewall spreads a ClusterSetIP; None: it does not know it.
    fn vip(&self, vip: &Vip) -> Result<Option<usize>, String>;
    /// By which link; `from`: a packet of this pod, else the node's own.
    fn route(&self, to: IpAddr, from: Option<IpAddr>) -> Result<Way, String>;
    fn links(&self) -> Result<BTreeMap<DeviceNumber, Link>, String>;
    fn device(&self, number: DeviceNumber) -> Result<DeviceState, String>;
    /// An ICMP echo of so many bytes, IP header and all.
    fn echo(&self, to: IpAddr, by: Option<DeviceNumber>, bytes: usize) -> Result<Reply, String>;
    /// Opens a TCP connection and closes it.
    fn connect(&self, to: SocketAddr) -> Reply;
}

/// This machine's.
pub(super) struct Machine {
    runtime: tokio::runtime::Runtime,
    driver: Drivers,
}

impl Machine {
    pub(super) fn new(runtime: tokio::runtime::Runtime) -> std::io::Result<Self> {
        let Options { devices, sockets, driver, .. } = Options::default();
        let driver = {
            let _inside = runtime.enter();
            Drivers::open(driver, devices, sockets, Arc::new(Writes::default()))?
        };
        Ok(Self { runtime, driver })
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<Vec<u8>, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("the program {program} does not run: {error}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(plain(text.lines().next().unwrap_or("it failed").trim()))
}

fn json(program: &str, arguments: &[&str]) -> Result<Value, String> {
    let bytes = run(program, arguments)?;
    serde_json::from_slice(&bytes).map_err(|_| format!("{program} printed no JSON"))
}

impl Kernel for Machine {
    fn resolve(&self, name: &str, family: Family) -> Result<Vec<IpAddr>, String> {
        ask(SocketAddr::from(([127, 0, 0, 1], DNS_PORT)), name, family)
    }

    fn vip(&self, vip: &Vip) -> Result<Option<usize>, String> {
        let (map, protocol) = (
            match vip.address {
                IpAddr::V4(_) => "vip4",
                IpAddr::V6(_) => "vip6",
            },
            match vip.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
            },
        );
        let element = format!("{{ {} . {protocol} . {} }}", vip.address, vip.port);
        // nft 1.0.6 prints text here, whatever it is asked for.
        match run("nft", &["get", "element", "inet", "tombolo", map, &element]) {
            Ok(found) => Ok(verdict(&String::from_utf8_lossy(&found))),
            Err(error) if error.contains("No such file") => {
                // Either the element or all of the table.
                run("nft", &["list", "counters", "table", "inet", "tombolo"])
                    .map(|_| None)
                    .map_err(|_| "there is no table inet tombolo: has an agent run here?".to_owned())
            }
            Err(error) => Err(error),
        }
    }

    fn route(&self, to: IpAddr, from: Option<IpAddr>) -> Result<Way, String> {
        let get = |arguments: &[&str]| {
            let words = [&["-j", "route", "get"], arguments].concat();
            match json("ip", &words) {
                Ok(found) => {
                    let kind = found[0]["type"].as_str();
                    match (kind, found[0]["dev"].as_str()) {
                        (Some("unreachable" | "blackhole" | "prohibit"), _) | (_, None) => {
                            Ok(Way::Refused("unreachable".to_owned()))
                        }
                        (_, Some(link)) => Ok(Way::Link(plain(link))),
                    }
                }
                // The kernel's no, and not the program's.
                Err(error) if error.starts_with("RTNETLINK answers") => Ok(Way::Refused(error)),
                Err(error) => Err(error),
            }
        };
        let to = to.to_string();
        match from {
            None => get(&[&to]),
            Some(from) => {
                let from = from.to_string();
                match get(&[&from])? {
                    Way::Link(link) => get(&[&to, "from", &from, "iif", &link]),
                    Way::Refused(error) => Err(format!("this node has no way to {from}: {error}")),
                }
            }
        }
    }

    fn links(&self) -> Result<BTreeMap<DeviceNumber, Link>, String> {
        let all = json("ip", &["-j", "link", "show"])?;
        let mut links = BTreeMap::new();
        for link in all.as_array().into_iter().flatten() {
            let number = link["ifname"].as_str().and_then(|name| name.strip_prefix("tombolo"));
            let Some(number) = number.and_then(|n| n.parse().ok()).and_then(DeviceNumber::new) else {
                continue;
            };
            let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == "UP"));
            links.insert(number, Link { up, mtu: link["mtu"].as_u64().unwrap_or(0) });
        }
        Ok(links)
    }

    fn device(&self, number: DeviceNumber) -> Result<DeviceState, String> {
        self.runtime.block_on(self.driver.read(number)).map_err(|error| plain(&error.to_string()))
    }

    fn echo(&self, to: IpAddr, by: Option<DeviceNumber>, bytes: usize) -> Result<Reply, String> {
        echo(to, by, bytes).map_err(|error| format!("echoes cannot be sent: {error}"))
    }

    fn connect(&self, to: SocketAddr) -> Reply {
        let start = Instant::now();
        match TcpStream::connect_timeout(&to, ANSWER) {
            Ok(_) => Reply::Answered(start.elapsed()),
            Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
                Reply::Silent
            }
            Err(_) => Reply::Refused,
        }
    }
}

/// The count in `goto pick4_3`.
fn verdict(text: &str) -> Option<usize> {
    let (_, goto) = text.split_once("goto pick")?;
    let (family, rest) = goto.split_once('_')?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    (family.len() == 1).then(|| digits.parse().ok()).flatten()
}

fn echo(to: IpAddr, by: Option<DeviceNumber>, bytes: usize) -> std::io::Result<Reply> {
    let (domain, protocol, header) = match to {
        IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, 20),
        IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, 40),
    };
    // The answer may come by another tunnel than the question went.
    let (sender, socket) =
        (Socket::new(domain, Type::RAW, Some(protocol))?, Socket::new(domain, Type::RAW, Some(protocol))?);
    if let Some(number) = by {
        sender.bind_device(Some(number.link().as_bytes()))?;
    }
    let start = Instant::now();
    // Unique enough: a reply is matched by both.
    let tag = [
        std::process::id().to_be_bytes()[2..].to_vec(),
        std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.subsec_nanos() >> 8).to_be_bytes()[2..]
            .to_vec(),
    ]
    .concat();
    if sender
        .send_to(&request(to.is_ipv4(), &tag, bytes.saturating_sub(header)), &SocketAddr::new(to, 0).into())
        .is_err()
    {
        return Ok(Reply::Refused);
    }
    let mut buffer = vec![0; 1 << 16];
    while let Some(left) = ANSWER.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
        socket.set_read_timeout(Some(left))?;
        let Ok(length) = (&socket).read(&mut buffer) else { continue };
        let bytes = &buffer[..length];
        // A raw socket of IPv4 gives the header too.
        let (skip, reply) = match to {
            IpAddr::V4(_) => (usize::from(bytes.first().unwrap_or(&0) & 15) * 4, 0),
            IpAddr::V6(_) => (0, 129),
        };
        if let Some([kind, _, _, _, rest @ ..]) = bytes.get(skip..)
            && *kind == reply
            && rest.starts_with(&tag)
        {
            return Ok(Reply::Answered(start.elapsed()));
        }
    }
    Ok(Reply::Silent)
}

/// An echo request (RFC 792, 4443) of so many bytes.
fn request(v4: bool, tag: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = vec![if v4 { 8 } else { 128 }, 0, 0, 0];
    bytes.extend(tag);
    bytes.resize(length.max(16) & !1, 0x74);
    if v4 {
        let sum: u64 = bytes.chunks_exact(2).map(|c| u64::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        let mut folded = sum;
        while folded > 0xffff {
            folded = (folded & 0xffff) + (folded >> 16);
        }
        let sum = !u16::try_from(folded).unwrap_or(0);
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// One question, asked twice before the resolver is given up.
fn ask(server: SocketAddr, name: &str, family: Family) -> Result<Vec<IpAddr>, String> {
    let kind: u16 = if family == Family::V4 { 1 } else { 28 };
    let mut query = vec![0x70, 0x6f, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').chain([""]) {
        query.push(u8::try_from(label.len()).unwrap_or(0));
        query.extend(label.bytes());
    }
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    let question = query.len();
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::WouldBlock => "it does not answer within 1 s, twice".to_owned(),
        _ => error.to_string(),
    };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed)?;
    socket.connect(server).map_err(failed)?;
    socket.set_read_timeout(Some(ANSWER)).map_err(failed)?;
    let mut answer = [0; 1232];
    let mut asked = || {
        socket.send(&query)?;
        socket.recv(&mut answer)
    };
    let length = asked().or_else(|_| asked()).map_err(failed)?;
    let answer = &answer[..length];
    if length < question || answer[..2] != query[..2] {
        return Err("what answers is no resolver".to_owned());
    }
    match answer[3] & 15 {
        0 | 3 => Ok(addresses(&answer[question..], usize::from(answer[7]), kind)),
        2 => Err("it knows no names yet (SERVFAIL)".to_owned()),
        code => Err(format!("another resolver answers there (code {code})")),
    }
}

/// Addresses of an answer section whose owners are compressed (pointers), as ours are, or not.
fn addresses(mut rest: &[u8], count: usize, kind: u16) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for _ in 0..count {
        let Some(after) = skip_name(rest) else { break };
        let Some([t0, t1, _, _, _, _, _, _, l0, l1, data @ ..]) = Some(after) else { break };
        let length = usize::from(u16::from_be_bytes([*l0, *l1]));
        let (Some(value), Some(next)) = (data.get(..length), data.get(length..)) else { break };
        if u16::from_be_bytes([*t0, *t1]) == kind {
            if let Ok(v4) = <[u8; 4]>::try_from(value) {
                found.push(Ipv4Addr::from(v4).into());
            } else if let Ok(v6) = <[u8; 16]>::try_from(value) {
                found.push(Ipv6Addr::from(v6).into());
            }
        }
        rest = next;
    }
    found
}

fn skip_name(mut rest: &[u8]) -> Option<&[u8]> {
    loop {
        match rest {
            [length, _, after @ ..] if *length >= 0xc0 => return Some(after),
            [0, after @ ..] => return Some(after),
            [length, after @ ..] => rest = after.get(usize::from(*length)..)?,
            [] => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_nonsense_is_not() {
        let record = |owner: &[u8], kind: u8, data: &[u8]| {
            [owner, &[0, kind, 0, 1, 0, 0, 0, 4, 0, u8::try_from(data.len()).unwrap()], data].concat()
        };
        let both = [record(&[0xc0, 12], 1, &[198, 19, 0, 2]), record(b"\x01a\0", 1, &[10, 1, 2, 3])].concat();
        let expected: Vec<IpAddr> = vec!["198.19.0.2".parse().unwrap(), "10.1.2.3".parse().unwrap()];
        assert_eq!(addresses(&both, 2, 1), expected);
        assert_eq!(addresses(&both, 2, 28), Vec::<IpAddr>::new());
        for cut in 0..both.len() {
            assert!(addresses(&both[..cut], 9, 1).len() <= 2);
        }
    }

    #[test]
    fn an_echo_has_its_length_and_a_good_checksum() {
        for length in [0, 28, 1400, 9000] {
            let bytes = request(true, &[1, 2, 3, 4], length);
            assert_eq!(bytes.len(), length.max(16));
            let sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        }
    }

    #[test]
    fn the_count_is_read_out_of_the_verdict() {
        let found = "\telements = { 198.19.0.2 . tcp . 8080 : goto pick4_13 }\n";
        assert_eq!(verdict(found), Some(13));
        assert_eq!(verdict(""), None);
    }
}
