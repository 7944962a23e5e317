//! The configuration protocol of userspace WireGuard devices, as text
//! (<https://www.wireguard.com/xplatform/#configuration-protocol>).
//!
//! A request is read whole before anything is done with it. What `get=1` answers is also the form in which a device
//! keeps its state over its own death ([`parse_state`]).
//!
//! Two keys are ours, and no `wg` sends them; without them everything is as the protocol says.
//! `previous_private_key=<hex>` of a device: this key is answered to as well, for [`identity::HOLD`] and as long as a
//! peer has nothing else. `replaces=<hex>` of a peer: it is the peer of that public key, which has a new one: it takes
//! over its place, allowed IPs, endpoint and all, and the sessions there are until it has its own.
//! `get=1` says more, too: `previous_private_key`, `previous_private_key_age_sec`, and `clock_behind_sec` while the
//! clock is behind the last handshake of this key ([`crate::stamp`]).
//!
//! [`identity::HOLD`]: crate::identity::HOLD

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::key::{PresharedKey, PrivateKey, PublicKey, parse_hex};

/// A client's wish.
pub enum Request {
    /// `get=1`
    Get,
    /// `set=1`
    Set(SetDevice),
}

/// What to change in a device; what is `None` stays.
#[derive(Default)]
pub struct SetDevice {
    /// `Some(None)`: none from now on.
    pub private_key: Option<Option<PrivateKey>>,
    /// Answered to beside it; `Some(None)`: none from now on. Another `private_key` without it ends it.
    pub previous_key: Option<Option<PrivateKey>>,
    /// For how long it has been that, when a device is restored.
    pub previous_age: Duration,
    /// 0: any free one.
    pub listen_port: Option<u16>,
    /// 0: none.
    pub fwmark: Option<u32>,
    /// Remove all peers first.
    pub replace_peers: bool,
    /// In this order; a key may occur several times.
    pub peers: Vec<SetPeer>,
}

/// What to change in a peer, or a peer to add.
pub struct SetPeer {
    /// Whom.
    pub public_key: PublicKey,
    /// Remove it; everything else is ignored.
    pub remove: bool,
    /// Do nothing if there is no such peer.
    pub update_only: bool,
    /// The peer of this key is meant, and has a new one from now on. Means nothing if there is none.
    pub replaces: Option<PublicKey>,
    /// `Some(None)`: none from now on.
    pub preshared_key: Option<Option<PresharedKey>>,
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Seconds, 0: off.
    pub keepalive: Option<u16>,
    /// Remove all its allowed IPs first.
    pub replace_allowed_ips: bool,
    /// In this order.
    pub allowed_ips: Vec<AllowedIp>,
    /// What a device that is restored remembers.
    pub past: Past,
}

impl SetPeer {
    /// A change that changes nothing, but adds the peer.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            replaces: None,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
            past: Past::default(),
        }
    }
}

/// A change to a peer's allowed IPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedIp {
    /// `allowed_ip=10.0.0.0/8`
    Add(IpNet),
    /// `allowed_ip=-10.0.0.0/8`
    Remove(IpNet),
}

/// A peer's history.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Past {
    /// When the last handshake was completed, since 1970; zero: never.
    pub last_handshake: Duration,
    /// Bytes received from it, as they were on the wire.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
}

/// Why a request was refused. Nothing was changed.
#[derive(Debug, Error)]
pub enum UapiError {
    /// The text is no request.
    #[error("line {line}: {what}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// Names the key, never a value, which may be secret.
        what: String,
        /// EINVAL or EPROTO.
        errno: i32,
    },
    /// The device cannot do it.
    #[error("{what}")]
    Refused {
        /// Why.
        what: String,
        /// What the system said.
        errno: i32,
    },
}

impl UapiError {
    /// The error number that the client is told, positive.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Syntax { errno, .. } | Self::Refused { errno, .. } => *errno,
        }
    }
}

/// Reads one request, without its final blank line.
pub fn parse_request(text: &str) -> Result<Request, UapiError> {
    let mut lines = (1..).zip(text.lines());
    match lines.next() {
        Some((_, "get=1")) => match lines.next() {
            None => Ok(Request::Get),
            Some((line, _)) => Err(protocol(line, "nothing follows get=1 but a blank line")),
        },
        Some((_, "set=1")) => parse_device(lines, false).map(Request::Set),
        _ => Err(protocol(1, "a request begins with get=1 or set=1")),
    }
}

/// Reads what [`write_device`] and [`write_peer`] wrote, as changes to an empty device.
pub fn parse_state(text: &str) -> Result<SetDevice, UapiError> {
    parse_device((1..).zip(text.lines()), true)
}

/// Writes the part of a `get=1` answer that speaks of the device.
pub fn write_device(out: &mut String, private_key: Option<&PrivateKey>, listen_port: u16, fwmark: u32) {
    if let Some(key) = private_key {
        line(out, "private_key", key.hex().as_str());
    }
    if listen_port != 0 {
        line(out, "listen_port", listen_port);
    }
    if fwmark != 0 {
        line(out, "fwmark", fwmark);
    }
}

/// Writes the key that is answered to beside the device's own, after [`write_device`].
pub fn write_previous(out: &mut String, key: &PrivateKey, age: Duration) {
    line(out, "previous_private_key", key.hex().as_str());
    line(out, "previous_private_key_age_sec", age.as_secs());
}

/// Writes how far the clock is behind, after [`write_device`].
pub fn write_behind(out: &mut String, behind: Duration) {
    line(out, "clock_behind_sec", behind.as_secs().max(1));
}

/// Writes the part of a `get=1` answer that speaks of one peer. `allowed_ips` come after it, by [`write_allowed_ip`].
pub fn write_peer(
    out: &mut String,
    key: &PublicKey,
    preshared: Option<&PresharedKey>,
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    past: &Past,
) {
    line(out, "public_key", key.hex());
    let none = Zeroizing::new("0".repeat(64));
    line(out, "preshared_key", preshared.map_or(none, PresharedKey::hex).as_str());
    line(out, "protocol_version", 1);
    if let Some(endpoint) = endpoint {
        line(out, "endpoint", endpoint);
    }
    line(out, "last_handshake_time_sec", past.last_handshake.as_secs());
    line(out, "last_handshake_time_nsec", past.last_handshake.subsec_nanos());
    line(out, "tx_bytes", past.tx_bytes);
    line(out, "rx_bytes", past.rx_bytes);
    line(out, "persistent_keepalive_interval", keepalive);
}

/// Writes one allowed IP of the peer written last.
pub fn write_allowed_ip(out: &mut String, prefix: IpNet) {
    line(out, "allowed_ip", prefix);
}

fn line(out: &mut String, key: &str, value: impl std::fmt::Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{key}={value}");
}

fn parse_device<'t>(
    lines: impl Iterator<Item = (usize, &'t str)>,
    state: bool,
) -> Result<SetDevice, UapiError> {
    let mut device = SetDevice::default();
    for (number, text) in lines {
        let (key, value) = text.split_once('=').ok_or_else(|| protocol(number, "expected key=value"))?;
        let invalid = || UapiError::Syntax {
            line: number,
            what: format!("`{}` has an invalid value or does not belong here", printable(key)),
            errno: libc::EINVAL,
        };
        if key == "public_key" {
            let key = parse_hex(value).ok_or_else(invalid)?;
            device.peers.push(SetPeer::new(PublicKey::new(*key)));
            continue;
        }
        let fits = match device.peers.last_mut() {
            None => device.set(key, value, state),
            Some(peer) => peer.set(key, value, state),
        };
        fits.ok_or_else(invalid)?;
    }
    Ok(device)
}

impl SetDevice {
    fn set(&mut self, key: &str, value: &str, state: bool) -> Option<()> {
        match key {
            "private_key" => self.private_key = Some(PrivateKey::new(*parse_hex(value)?)),
            "previous_private_key" => self.previous_key = Some(PrivateKey::new(*parse_hex(value)?)),
            "previous_private_key_age_sec" if state => {
                self.previous_age = Duration::from_secs(number(value)?);
            }
            // What was true then.
            "clock_behind_sec" if state => {}
            "listen_port" => self.listen_port = Some(number(value)?),
            "fwmark" => self.fwmark = Some(number(value)?),
            "replace_peers" => self.replace_peers = truth(value)?,
            _ => return None,
        }
        Some(())
    }
}

impl SetPeer {
    fn set(&mut self, key: &str, value: &str, state: bool) -> Option<()> {
        match key {
            "remove" => self.remove = truth(value)?,
            "update_only" => self.update_only = truth(value)?,
            "replaces" => self.replaces = Some(PublicKey::new(*parse_hex(value)?)),
            "preshared_key" => self.preshared_key = Some(PresharedKey::new(*parse_hex(value)?)),
            "endpoint" => self.endpoint = Some(endpoint(value)?),
            "persistent_keepalive_interval" => self.keepalive = Some(number(value)?),
            "replace_allowed_ips" => {
                self.replace_allowed_ips = truth(value)?;
                self.allowed_ips.clear();
            }
            "allowed_ip" => self.allowed_ips.push(match value.strip_prefix('-') {
                Some(prefix) => AllowedIp::Remove(prefix.parse().ok()?),
                None => AllowedIp::Add(value.parse().ok()?),
            }),
            "protocol_version" if value == "1" => {}
            "last_handshake_time_sec" if state => {
                let nanos = self.past.last_handshake.subsec_nanos();
                self.past.last_handshake = Duration::new(number(value)?, nanos);
            }
            "last_handshake_time_nsec" if state => {
                let nanos: u32 = number(value)?;
                let seconds = self.past.last_handshake.as_secs();
                self.past.last_handshake = (nanos < 1_000_000_000).then(|| Duration::new(seconds, nanos))?;
            }
            "rx_bytes" if state => self.past.rx_bytes = number(value)?,
            "tx_bytes" if state => self.past.tx_bytes = number(value)?,
            _ => return None,
        }
        Some(())
    }
}

/// Decimal digits only: `parse` alone would take a sign.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn truth(text: &str) -> Option<bool> {
    (text == "true").then_some(true)
}

/// `1.2.3.4:5`, `[::1]:5`, `[fe80::1%eth0]:5`.
fn endpoint(text: &str) -> Option<SocketAddr> {
    let parsed = match text.split_once('%') {
        Some((address, rest)) => {
            let (scope, port) = rest.split_once(']')?;
            let scope = number::<u32>(scope).or_else(|| nix::net::if_::if_nametoindex(scope).ok())?;
            let SocketAddr::V6(mut whole) = format!("{address}]{port}").parse().ok()? else { return None };
            whole.set_scope_id(scope);
            SocketAddr::V6(whole)
        }
        None => text.parse().ok()?,
    };
    // The v6 socket takes v6 only.
    let mapped = match parsed {
        SocketAddr::V6(v6) => v6.ip().to_ipv4_mapped().map(|v4| SocketAddr::new(v4.into(), v6.port())),
        SocketAddr::V4(_) => None,
    };
    Some(mapped.unwrap_or(parsed)).filter(|e| e.port() != 0)
}

fn protocol(line: usize, what: &str) -> UapiError {
    UapiError::Syntax { line, what: what.to_owned(), errno: libc::EPROTO }
}

fn printable(key: &str) -> String {
    key.chars().filter(char::is_ascii_graphic).take(40).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> Result<SetDevice, UapiError> {
        match parse_request(&format!("set=1\n{text}"))? {
            Request::Set(set) => Ok(set),
            Request::Get => panic!("a get"),
        }
    }

    const KEY: &str = "9f5b4ecb2e7e0c5b1d3d2a4d8e5b8a7f6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f";

    #[test]
    fn reads_all_that_wg_writes() {
        let text = format!(
            "private_key={KEY}\nlisten_port=51820\nfwmark=51820\nreplace_peers=true\npublic_key={KEY}\nupdate_only=true\n\
             preshared_key={KEY}\nendpoint=[2001:db8::1]:5\npersistent_keepalive_interval=25\nreplace_allowed_ips=true\n\
             allowed_ip=10.0.0.0/8\nallowed_ip=-2001:db8::/32\nprotocol_version=1\npublic_key={KEY}\nremove=true"
        );
        let device = set(&text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            (device.listen_port, device.fwmark, device.replace_peers),
            (Some(51820), Some(51820), true)
        );
        assert_eq!(device.private_key.flatten().unwrap().hex().as_str(), KEY);
        let [first, second] = &device.peers[..] else { panic!() };
        assert!(first.update_only && !first.remove && second.remove && first.replace_allowed_ips);
        assert_eq!(first.preshared_key.clone().flatten().unwrap().hex().as_str(), KEY);
        assert_eq!(first.endpoint.unwrap().to_string(), "[2001:db8::1]:5");
        assert_eq!(first.keepalive, Some(25));
        let expected = [
            AllowedIp::Add("10.0.0.0/8".parse().unwrap()),
            AllowedIp::Remove("2001:db8::/32".parse().unwrap()),
        ];
        assert_eq!(first.allowed_ips, expected);
        assert!(matches!(parse_request("get=1"), Ok(Request::Get)));
        assert!(matches!(parse_request("get=1\n"), Ok(Request::Get)));
    }

    #[test]
    fn a_zero_key_is_none() {
        let zero = "0".repeat(64);
        let device = set(&format!("private_key={zero}\npublic_key={KEY}\npreshared_key={zero}"))
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(device.private_key, Some(None)));
        assert!(matches!(device.peers[0].preshared_key, Some(None)));
    }

    #[test]
    fn refuses_and_names_the_line_but_no_value() {
        for (text, line) in [
            ("private_key=secret".to_owned(), 2),
            ("listen_port=65536".into(), 2),
            ("listen_port=+1".into(), 2),
            ("fwmark=-1".into(), 2),
            ("replace_peers=false".into(), 2),
            ("nonsense".into(), 2),
            ("endpoint=1.2.3.4:5".into(), 2),
            (format!("public_key={KEY}x"), 2),
            (format!("public_key={KEY}\nlisten_port=1"), 3),
            (format!("public_key={KEY}\nendpoint=example.com:1"), 3),
            (format!("public_key={KEY}\nendpoint=1.2.3.4:0"), 3),
            (format!("public_key={KEY}\nallowed_ip=1.2.3.4/33"), 3),
            (format!("public_key={KEY}\nprotocol_version=2"), 3),
            (format!("public_key={KEY}\nrx_bytes=2"), 3),
        ] {
            let error = set(&text).err().unwrap_or_else(|| panic!("{text}"));
            assert!(error.errno() > 0 && !error.to_string().contains("secret"));
            assert!(error.to_string().starts_with(&format!("line {line}:")), "{text}: {error}");
        }
        assert_eq!(parse_request("").err().unwrap().errno(), libc::EPROTO);
        assert_eq!(parse_request("get=1\nx=y").err().unwrap().errno(), libc::EPROTO);
    }

    #[test]
    fn endpoints_are_what_the_sockets_can_reach() {
        assert_eq!(endpoint("[::ffff:10.0.0.1]:7").unwrap().to_string(), "10.0.0.1:7");
        assert_eq!(endpoint("[fe80::1%3]:7").unwrap().to_string(), "[fe80::1%3]:7");
        assert_eq!(endpoint("[fe80::1%lo]:7").unwrap().to_string(), "[fe80::1%1]:7");
        for bad in
            ["", ":", "1.2.3.4", "[::1]", "::1:7", "1.2.3.4%1]:7", "[fe80::1%no-such]:7", "[fe80::1%", "%]"]
        {
            assert!(endpoint(bad).is_none(), "{bad}");
        }
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (any::<[u8; 4]>(), 0u8..=32).prop_map(|(a, l)| IpNet::new(a.into(), l).unwrap()),
            (any::<[u8; 16]>(), 0u8..=128).prop_map(|(a, l)| IpNet::new(a.into(), l).unwrap()),
        ]
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_request(&text);
            let _ = parse_state(&text);
            let _ = parse_request(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn lines_of_the_protocol_in_any_order_are_read_or_refused(lines in prop::collection::vec((
            prop::sample::select(vec!["private_key", "listen_port", "fwmark", "replace_peers", "previous_private_key", "previous_private_key_age_sec", "replaces", "public_key", "remove", "update_only", "preshared_key", "endpoint", "persistent_keepalive_interval", "replace_allowed_ips", "allowed_ip", "protocol_version", "last_handshake_time_sec", "last_handshake_time_nsec", "errno"]),
            prop_oneof![Just(KEY.to_owned()), Just("true".to_owned()), "[0-9]{1,22}", "-?[0-9./:]{0,20}", "\\[[0-9a-f:%]{0,20}\\]:[0-9]{1,5}", "\\PC{0,10}"],
        ), 0..12)) {
            let text: String = lines.iter().map(|(k, v)| format!("{k}={v}\n")).collect();
            let _ = set(&text);
            let _ = parse_state(&text);
        }

        #[test]
        fn state_that_is_written_is_read(
            private in any::<[u8; 32]>(), port: u16, fwmark: u32,
            peers in prop::collection::vec((any::<[u8; 32]>(), any::<[u8; 32]>(), prop::option::of((any::<[u8; 16]>(), any::<bool>(), 1u16..)), any::<u16>(), (any::<u64>(), 0u32..1_000_000_000, any::<u64>(), any::<u64>()), prop::collection::vec(any_net(), 0..4)), 0..4),
        ) {
            let mut text = String::new();
            let private = PrivateKey::new(private);
            write_device(&mut text, private.as_ref(), port, fwmark);
            for (key, psk, endpoint, keepalive, (s, n, rx_bytes, tx_bytes), nets) in &peers {
                let endpoint = endpoint.map(|(a, v4, p)| if v4 { ([a[0], a[1], a[2], a[3]], p).into() } else { (a, p).into() });
                let past = Past { last_handshake: Duration::new(*s, *n), rx_bytes: *rx_bytes, tx_bytes: *tx_bytes };
                write_peer(&mut text, &PublicKey::new(*key), PresharedKey::new(*psk).as_ref(), endpoint, *keepalive, &past);
                nets.iter().for_each(|net| write_allowed_ip(&mut text, *net));
            }
            let read = parse_state(&text).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert!(read.private_key.flatten() == private);
            prop_assert_eq!(read.listen_port.unwrap_or(0), port);
            prop_assert_eq!(read.fwmark.unwrap_or(0), fwmark);
            prop_assert_eq!(read.peers.len(), peers.len());
            for (read, (key, psk, endpoint, keepalive, (s, n, rx, tx), nets)) in read.peers.iter().zip(&peers) {
                prop_assert_eq!(read.public_key, PublicKey::new(*key));
                prop_assert!(read.preshared_key.clone().flatten() == PresharedKey::new(*psk));
                prop_assert_eq!(read.endpoint.is_some(), endpoint.is_some());
                prop_assert_eq!(read.keepalive, Some(*keepalive));
                prop_assert_eq!(read.past, Past { last_handshake: Duration::new(*s, *n), rx_bytes: *rx, tx_bytes: *tx });
                prop_assert_eq!(&read.allowed_ips, &nets.iter().map(|n| AllowedIp::Add(*n)).collect::<Vec<_>>());
            }
        }
    }
}
