//! Userspace devices: a file asks `tombolo-wireguard serve` for one, its UAPI socket takes its configuration
//! (<https://www.wireguard.com/xplatform/#configuration-protocol>).

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};
use tombolo_proto::model::{DeviceNumber, WireguardKey};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::Writes;
use super::device::{
    DeviceChange, DeviceError, DeviceState, KEEPALIVE, PeerAction, PeerChange, PeerState, TunnelDriver,
};
use super::netlink::device_number;

/// How long a device may take to come or go.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// The same for one that did not come the last time, so that the others do not wait for it again and again.
const IMPATIENCE: Duration = Duration::from_millis(200);
/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(10);
/// A device that does not answer so long is broken.
const ANSWER: Duration = Duration::from_secs(5);
/// The longest answer: 500 peers with 100 allowed IPs are 3 MiB.
const MAX_ANSWER: u64 = 64 << 20;

/// Devices of `tombolo-wireguard`.
pub struct Userspace {
    devices: PathBuf,
    sockets: PathBuf,
    late: Mutex<BTreeSet<DeviceNumber>>,
    writes: Arc<Writes>,
}

impl Userspace {
    /// `devices`: where devices are asked for, a file each; written by the agent alone. `sockets`: where UAPI sockets
    /// are.
    pub fn new(devices: PathBuf, sockets: PathBuf, writes: Arc<Writes>) -> Self {
        Self { devices, sockets, late: Mutex::default(), writes }
    }

    fn socket(&self, number: DeviceNumber) -> PathBuf {
        self.sockets.join(format!("{}.sock", number.link()))
    }

    async fn connect(&self, number: DeviceNumber) -> Result<UnixStream, DeviceError> {
        let path = self.socket(number);
        UnixStream::connect(&path).await.map_err(io_error("cannot connect to", &path))
    }

    async fn ask(&self, number: DeviceNumber, request: &str) -> Result<Zeroizing<String>, DeviceError> {
        let path = self.socket(number);
        let exchange = async {
            let mut stream = UnixStream::connect(&path).await?;
            stream.write_all(request.as_bytes()).await?;
            read_answer(&mut stream).await
        };
        match timeout(ANSWER, exchange).await {
            Ok(answer) => answer.map_err(io_error("cannot talk to the device at", &path)),
            Err(_) => Err(io_error("no answer from the device at", &path)(io::ErrorKind::TimedOut.into())),
        }
    }

    fn is_late(&self, number: DeviceNumber) -> bool {
        self.late.lock().is_ok_and(|late| late.contains(&number))
    }

    fn set_late(&self, number: DeviceNumber, is: bool) {
        if let Ok(mut late) = self.late.lock() {
            if is {
                late.insert(number)
            } else {
                late.remove(&number)
            };
        }
    }
}

/// An answer ends with a blank line.
async fn read_answer(stream: &mut UnixStream) -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
    let mut limited = stream.take(MAX_ANSWER);
    while !bytes.ends_with(b"\n\n") {
        if limited.read_buf(&mut *bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    let path = path.to_owned();
    move |source| DeviceError::Io { what, path, source }
}

#[async_trait]
impl TunnelDriver for Userspace {
    async fn list(&self) -> Result<BTreeSet<DeviceNumber>, DeviceError> {
        let error = || io_error("cannot list", &self.devices);
        let mut entries = match tokio::fs::read_dir(&self.devices).await {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(e) => return Err(error()(e)),
        };
        let mut numbers = BTreeSet::new();
        while let Some(entry) = entries.next_entry().await.map_err(error())? {
            numbers.extend(entry.file_name().to_str().and_then(device_number));
        }
        Ok(numbers)
    }

    async fn create(&self, number: DeviceNumber) -> Result<bool, DeviceError> {
        let file = self.devices.join(number.link());
        let made = match tokio::fs::metadata(&file).await {
            Ok(_) => false,
            Err(_) => {
                tokio::fs::create_dir_all(&self.devices)
                    .await
                    .map_err(io_error("cannot create", &self.devices))?;
                self.writes.device();
                tokio::fs::write(&file, b"").await.map_err(io_error("cannot create", &file))?;
                true
            }
        };
        let patience = if self.is_late(number) { IMPATIENCE } else { PATIENCE };
        let deadline = Instant::now() + patience;
        while self.connect(number).await.is_err() {
            if Instant::now() > deadline {
                self.set_late(number, true);
                return Err(DeviceError::Absent {
                    directory: self.devices.clone(),
                    seconds: PATIENCE.as_secs(),
                });
            }
            sleep(LOOK).await;
        }
        self.set_late(number, false);
        Ok(made)
    }

    async fn remove(&self, number: DeviceNumber) -> Result<(), DeviceError> {
        let file = self.devices.join(number.link());
        self.writes.device();
        match tokio::fs::remove_file(&file).await {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("cannot remove", &file)(e)),
            _ => {}
        }
        let deadline = Instant::now() + PATIENCE;
        while self.connect(number).await.is_ok() {
            if Instant::now() > deadline {
                return Err(DeviceError::Stays {
                    directory: self.devices.clone(),
                    seconds: PATIENCE.as_secs(),
                });
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    async fn read(&self, number: DeviceNumber) -> Result<DeviceState, DeviceError> {
        parse(&self.ask(number, "get=1\n\n").await?)
    }

    async fn write(&self, number: DeviceNumber, change: &DeviceChange<'_>) -> Result<(), DeviceError> {
        self.writes.uapi();
        let mut answer = self.ask(number, &render(change, true)).await?;
        if !answer.lines().any(|line| line == "errno=0") && has_extensions(change) {
            // A device of an earlier version, or somebody else's: it changes keys, but not without loss.
            answer = self.ask(number, &render(change, false)).await?;
        }
        match answer.lines().find_map(|line| line.strip_prefix("errno=")).map(str::parse::<i32>) {
            Some(Ok(0)) => Ok(()),
            Some(Ok(errno)) => Err(DeviceError::Refused(errno.saturating_abs())),
            _ => Err(DeviceError::Protocol("no errno".into())),
        }
    }
}

/// Whether it holds what only our devices understand (`tombolo_wireguard::uapi`).
fn has_extensions(change: &DeviceChange<'_>) -> bool {
    let replaces = |peer: &PeerChange| matches!(peer.what, PeerAction::Add { replaces: Some(_), .. });
    change.previous.is_some() || change.peers.iter().any(replaces)
}

/// The request, blank line and all. Typed values alone go in.
fn render(change: &DeviceChange<'_>, extensions: bool) -> Zeroizing<String> {
    // Large enough that it never moves: what it leaves behind when it does is not wiped.
    let lines: usize = change.peers.iter().map(|p| 4 + allowed_count(p) + 2).sum();
    let mut out = Zeroizing::new(String::with_capacity(1024 + lines * 100));
    out.push_str("set=1\n");
    let previous = change.previous.filter(|_| extensions);
    for (name, key) in [("private_key=", change.key), ("previous_private_key=", previous)] {
        if let Some(key) = key {
            out.push_str(name);
            out.push_str(&Zeroizing::new(HEXLOWER.encode(key.bytes())));
            out.push('\n');
        }
    }
    // Writing to a String cannot fail.
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(out, "{key}={value}");
    };
    if let Some(port) = change.port {
        line("listen_port", &port);
    }
    if let Some(mark) = change.mark {
        line("fwmark", &mark);
    }
    for PeerChange { key, what } in &change.peers {
        line("public_key", &HEXLOWER.encode(&key.0));
        match what {
            PeerAction::Add { endpoint, allowed, replaces } => {
                if let Some(before) = replaces.filter(|_| extensions) {
                    line("replaces", &HEXLOWER.encode(&before.0));
                    // What it leaves is not left to the new one.
                    line("replace_allowed_ips", &true);
                }
                if let Some(endpoint) = endpoint {
                    line("endpoint", endpoint);
                }
                line("persistent_keepalive_interval", &KEEPALIVE);
                allowed.iter().for_each(|net| line("allowed_ip", net));
            }
            PeerAction::Change { endpoint, keepalive, allow, forbid } => {
                line("update_only", &true);
                if let Some(endpoint) = endpoint {
                    line("endpoint", endpoint);
                }
                if *keepalive {
                    line("persistent_keepalive_interval", &KEEPALIVE);
                }
                allow.iter().for_each(|net| line("allowed_ip", net));
                forbid.iter().for_each(|net| line("allowed_ip", &format_args!("-{net}")));
            }
            PeerAction::Remove => line("remove", &true),
        }
    }
    out.push('\n');
    out
}

fn allowed_count(change: &PeerChange) -> usize {
    match &change.what {
        PeerAction::Add { allowed, .. } => allowed.len(),
        PeerAction::Change { allow, forbid, .. } => allow.len() + forbid.len(),
        PeerAction::Remove => 0,
    }
}

fn parse(text: &str) -> Result<DeviceState, DeviceError> {
    let mut state = DeviceState::default();
    let mut peer: Option<(WireguardKey, PeerState)> = None;
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() {
            break;
        }
        let bad = || DeviceError::Protocol(format!("line {number} of its state"));
        let (key, value) = line.split_once('=').ok_or_else(bad)?;
        if key == "public_key" {
            state.peers.extend(peer.take());
            peer = Some((WireguardKey(*parse_key(value).ok_or_else(bad)?), PeerState::default()));
            continue;
        }
        if key == "errno" {
            match value.parse() {
                Ok(0) => continue,
                Ok(errno) => return Err(DeviceError::Refused(errno)),
                Err(_) => return Err(bad()),
            }
        }
        match &mut peer {
            None => parse_device(&mut state, key, value),
            Some((_, peer)) => parse_peer(peer, key, value),
        }
        .ok_or_else(bad)?;
    }
    state.peers.extend(peer);
    Ok(state)
}

/// Unknown keys are left out: devices may say more than we ask.
fn parse_device(state: &mut DeviceState, key: &str, value: &str) -> Option<()> {
    match key {
        "private_key" => {
            let secret = StaticSecret::from(*parse_key(value)?);
            state.key = Some(WireguardKey(PublicKey::from(&secret).to_bytes()));
        }
        "listen_port" => state.port = value.parse().ok()?,
        "fwmark" => state.mark = value.parse().ok()?,
        "previous_private_key" => {
            let secret = StaticSecret::from(*parse_key(value)?);
            state.previous = Some(WireguardKey(PublicKey::from(&secret).to_bytes()));
        }
        "clock_behind_sec" => state.behind = Some(Duration::from_secs(value.parse().ok()?)),
        _ => {}
    }
    Some(())
}

fn parse_peer(peer: &mut PeerState, key: &str, value: &str) -> Option<()> {
    match key {
        "endpoint" => peer.endpoint = Some(value.parse().ok()?),
        "persistent_keepalive_interval" => peer.keepalive = value.parse().ok()?,
        "last_handshake_time_sec" => {
            let at = Duration::from_secs(value.parse().ok()?);
            peer.last_handshake = (at > Duration::ZERO).then_some(at);
        }
        "rx_bytes" => peer.received = value.parse().ok()?,
        "tx_bytes" => peer.sent = value.parse().ok()?,
        "allowed_ip" => drop(peer.allowed.insert(value.parse().ok()?)),
        _ => {}
    }
    Some(())
}

fn parse_key(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let bytes = Zeroizing::new(HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok()?);
    let mut key = Zeroizing::new([0; 32]);
    (bytes.len() == 32).then(|| key.copy_from_slice(&bytes))?;
    Some(key)
}

#[cfg(test)]
mod tests {
    use tombolo_proto::model::Lanes;

    use super::super::key::DeviceKeys;
    use super::*;

    #[test]
    fn requests_read_as_the_protocol_says() {
        let dir = tempfile::tempdir().unwrap();
        let keys = DeviceKeys::load(dir.path(), Lanes::ONE).unwrap_or_else(|e| panic!("{e}"));
        let net = |t: &str| BTreeSet::from([t.parse().unwrap()]);
        let peer = |n: u8, what| PeerChange { key: WireguardKey([n; 32]), what };
        let pair = keys.get(DeviceNumber::new(1).unwrap()).unwrap();
        let change = DeviceChange {
            key: Some(&pair.current),
            previous: Some(&pair.current),
            port: Some(4511),
            mark: Some(0x0100_0000),
            peers: vec![
                peer(
                    1,
                    PeerAction::Add {
                        endpoint: Some("[2001:db8::1]:4511".parse().unwrap()),
                        allowed: net("10.0.0.0/8"),
                        replaces: Some(WireguardKey([3; 32])),
                    },
                ),
                peer(
                    2,
                    PeerAction::Change {
                        endpoint: None,
                        keepalive: true,
                        allow: net("fd00::/8"),
                        forbid: net("10.1.0.0/16"),
                    },
                ),
                peer(3, PeerAction::Remove),
            ],
        };
        let text = render(&change, true);
        let secrets = |l: &&str| l.starts_with("private_key=") || l.starts_with("previous_private_key=");
        assert_eq!(text.lines().filter(secrets).count(), 2);
        let hidden: Vec<&str> = text.lines().filter(|l| !secrets(l)).collect();
        let (one, two, three) = ("01".repeat(32), "02".repeat(32), "03".repeat(32));
        assert_eq!(
            hidden.join("\n"),
            format!(
                "set=1\nlisten_port=4511\nfwmark=16777216\npublic_key={one}\nreplaces={three}\n\
                 replace_allowed_ips=true\nendpoint=[2001:db8::1]:4511\n\
                 persistent_keepalive_interval=10\nallowed_ip=10.0.0.0/8\npublic_key={two}\nupdate_only=true\n\
                 persistent_keepalive_interval=10\nallowed_ip=fd00::/8\nallowed_ip=-10.1.0.0/16\npublic_key={three}\n\
                 remove=true\n"
            )
        );
        assert!(text.ends_with("\n\n"));
        // For others nothing that they do not know.
        let plain = render(&change, false);
        assert!(has_extensions(&change) && !plain.contains("previous") && !plain.contains("replaces="));
    }

    #[test]
    fn states_are_read_or_refused() {
        let key = "01".repeat(32);
        let text = format!(
            "private_key={key}\nlisten_port=4511\nfwmark=5\npublic_key={key}\npreshared_key={key}\nendpoint=1.2.3.4:5\n\
             last_handshake_time_sec=7\nlast_handshake_time_nsec=9\ntx_bytes=1\nrx_bytes=2\n\
             persistent_keepalive_interval=10\nallowed_ip=10.0.0.0/8\nprotocol_version=1\nerrno=0\n\n"
        );
        let state = parse(&text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((state.port, state.mark, state.peers.len()), (4511, 5, 1));
        let peer = &state.peers[&WireguardKey([1; 32])];
        assert_eq!((peer.sent, peer.received, peer.keepalive), (1, 2, 10));
        assert_eq!(peer.last_handshake, Some(Duration::from_secs(7)));
        assert_eq!(peer.allowed.len(), 1);
        assert!(matches!(parse("errno=5\n\n"), Err(DeviceError::Refused(5))));
        for bad in ["x\n", "listen_port=99999\n", "public_key=zz\n", "private_key=00\n"] {
            let error = parse(bad).err().unwrap_or_else(|| panic!("{bad}")).to_string();
            assert!(error.contains("line 1"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_device_that_never_comes_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let driver = Userspace::new(dir.path().join("devices"), dir.path().join("sockets"), Arc::default());
        let number = DeviceNumber::new(4).unwrap();
        driver.set_late(number, true);
        let error = driver.create(number).await.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("tombolo-wireguard serve"), "{error}");
        assert_eq!(driver.list().await.unwrap_or_default(), BTreeSet::from([number]));
    }
}
