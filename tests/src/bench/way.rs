//! The ways that are compared, each between two network namespaces of its own.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Figures, Options};
use crate::place::{Mounts, Place};
use crate::{foreign, program};

const LIMIT: Duration = Duration::from_secs(10);

/// How packets get from one end to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Our userspace device.
    Ours,
    /// The same, with a thousand other peers.
    Crowded,
    /// The other userspace device, in Go.
    WireguardGo,
    /// The kernel's VXLAN, in clear.
    Vxlan,
    /// No tunnel.
    Plain,
}

const WAYS: [(Way, &str); 5] = [
    (Way::Ours, "ours"),
    (Way::Crowded, "ours-1000-peers"),
    (Way::WireguardGo, "wireguard-go"),
    (Way::Vxlan, "vxlan"),
    (Way::Plain, "plain"),
];

impl Way {
    /// All.
    #[must_use]
    pub fn all() -> Vec<Self> {
        WAYS.iter().map(|(way, _)| *way).collect()
    }

    fn program(self) -> Result<Option<String>> {
        Ok(match self {
            Self::Ours | Self::Crowded => Some(program::find("tombolo-wireguard")?),
            Self::WireguardGo => Some(foreign::wireguard_go()?.to_string_lossy().into_owned()),
            Self::Vxlan | Self::Plain => None,
        })
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(WAYS.iter().find(|(way, _)| way == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = WAYS.map(|(_, name)| name).join(", ");
        WAYS.iter().find(|(_, name)| *name == text).map(|(way, _)| *way).ok_or(format!("one of {names}"))
    }
}

/// Two ends with a way between them, and a server at the second.
pub(super) struct Stand {
    places: [Place; 2],
    devices: Vec<Child>,
    server: Option<Child>,
    tunnel: bool,
    pin: bool,
}

/// Builds a way, measures, and takes it down.
pub(super) fn run(way: Way, options: &Options) -> Result<Figures> {
    let mut stand = Stand::build(options)?;
    stand.join(way, options).with_context(|| format!("setting up {way}"))?;
    let mut figures = Figures::new();
    for test in &options.tests {
        test.run(&stand, options, &mut figures).with_context(|| format!("{test:?} over {way}"))?;
    }
    if stand.has_processes() {
        figures.insert("memory MiB".to_owned(), stand.memory());
    }
    Ok(figures)
}

impl Stand {
    fn build(options: &Options) -> Result<Self> {
        let place = |name| Place::create(name, &Mounts::default());
        let places = [place("bench-a")?, place("bench-b")?];
        places[0].ip(&format!("link add eth0 type veth peer name eth0 netns {}", places[1].path()))?;
        for (place, host) in places.iter().zip(1..) {
            place.ip(&format!(
                "link set eth0 mtu {} up\naddr add 192.0.2.{host}/24 dev eth0\n\
                 -6 addr add 2001:db8::{host}/64 dev eth0 nodad",
                options.mtu
            ))?;
            if options.nic {
                // As a card that sends each datagram by itself.
                let off = ["ethtool", "-K", "eth0", "tx-udp-segmentation", "off", "gso", "off", "tso", "off"];
                place.capture(&off)?;
                place.capture(&["ethtool", "-K", "eth0", "gro", "on"])?;
            }
        }
        Ok(Self { places, devices: Vec::new(), server: None, tunnel: false, pin: options.pin })
    }

    fn join(&mut self, way: Way, options: &Options) -> Result<()> {
        self.tunnel = way != Way::Plain;
        match way.program()? {
            Some(program) => self.start(&program, if way == Way::Crowded { 1000 } else { 0 })?,
            None if way == Way::Vxlan => {
                for (place, other) in self.places.iter().zip([2, 1]) {
                    place.ip(&format!(
                        "link add tun0 type vxlan id 7 dev eth0 remote 192.0.2.{other} dstport 4789"
                    ))?;
                }
            }
            None => {}
        }
        if self.tunnel {
            for (place, host) in self.places.iter().zip(1..) {
                place.ip(&format!(
                    "addr add 10.99.0.{host}/24 dev {0}\nlink set {0} mtu {1} up\n\
                     -6 addr add fd99::{host}/64 dev {0} nodad",
                    Self::link(way, host - 1),
                    options.mtu - 80
                ))?;
            }
        }
        let server = self.command(1, "iperf3").args(["-s", "-p", "5201"]).stdout(Stdio::null()).spawn();
        self.server = Some(server?);
        let target = self.target(false);
        wait(|| Ok(self.places[0].succeeds(&["ping", "-c", "1", "-W", "1", &target])?.then_some(())))
            .context("no echo comes back")
    }

    fn link(way: Way, end: usize) -> String {
        if way == Way::Vxlan { "tun0".to_owned() } else { name(end) }
    }

    /// Two devices that know each other, and so many that are never there.
    fn start(&mut self, program: &str, others: u32) -> Result<()> {
        for end in 0..2 {
            let mut command = self.command(end, program);
            command.args(["-f", &name(end)]).env("LOG_LEVEL", "error").env("TOMBOLO_LOG", "warn");
            // wireguard-go has much to say to people.
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            self.devices.push(command.spawn()?);
        }
        let mut keys = Vec::new();
        for end in 0..2 {
            wait(|| Ok(UnixStream::connect(socket(end)).ok().map(drop)))?;
            let mut key = [0u8; 32];
            File::open("/dev/urandom")?.read_exact(&mut key)?;
            ask(end, &format!("private_key={}\nlisten_port={}\n", hex(&key), 51001 + end))?;
            let shown = self.places[end].capture(&["wg", "show", &name(end), "public-key"])?;
            keys.push(hex(&decode(shown.trim())?));
        }
        for end in 0..2 {
            let others = (1..=others).map(|i| {
                let (high, low) = (i / 256, i % 256);
                format!("public_key={i:064x}\nallowed_ip=10.{}.{low}.0/24\n", 100 + high)
            });
            ask(end, &others.collect::<String>())?;
            let other = 1 - end;
            ask(
                end,
                &format!(
                    "public_key={}\nendpoint=192.0.2.{}:{}\nallowed_ip=10.99.0.{}/32\nallowed_ip=fd99::{}/128\n",
                    keys[other],
                    other + 1,
                    51001 + other,
                    other + 1,
                    other + 1
                ),
            )?;
        }
        Ok(())
    }

    /// A command at one of the ends.
    pub(super) fn command(&self, end: usize, program: &str) -> Command {
        if self.pin {
            let mut command = self.places[end].command("taskset");
            command.args(["-c", &end.to_string(), program]);
            command
        } else {
            self.places[end].command(program)
        }
    }

    /// The second end's address.
    pub(super) fn target(&self, v6: bool) -> String {
        match (self.tunnel, v6) {
            (true, false) => "10.99.0.2",
            (true, true) => "fd99::2",
            (false, false) => "192.0.2.2",
            (false, true) => "2001:db8::2",
        }
        .to_owned()
    }

    /// Whether there are processes that carry packets.
    pub(super) fn has_processes(&self) -> bool {
        !self.devices.is_empty()
    }

    /// The devices' processes, with what they started.
    fn processes(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self.devices.iter().map(Child::id).collect();
        let mut next = 0;
        while let Some(pid) = all.get(next).copied() {
            next += 1;
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        all
    }

    /// What they used so far, in user and kernel.
    pub(super) fn processor_seconds(&self) -> f64 {
        let ticks = |pid: u32| -> Option<f64> {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
            Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
        };
        let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        self.processes().into_iter().filter_map(ticks).sum::<f64>() / a_second as f64
    }

    /// Their peak, in MiB.
    fn memory(&self) -> f64 {
        let peak = |pid: u32| -> Option<f64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        self.processes().into_iter().filter_map(peak).sum::<f64>() / 1024.0
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        for child in self.devices.iter_mut().chain(self.server.as_mut()) {
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

fn name(end: usize) -> String {
    format!("bench{end}")
}

fn socket(end: usize) -> PathBuf {
    PathBuf::from(format!("/var/run/wireguard/{}.sock", name(end)))
}

/// A change by UAPI.
fn ask(end: usize, request: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket(end))?;
    stream.write_all(format!("set=1\n{request}\n").as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("errno=0"), "the device refuses: {}", answer.trim());
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Base64 of 32 bytes.
fn decode(text: &str) -> Result<Vec<u8>> {
    let digits = text.trim_end_matches('=').bytes().map(|c| match c {
        b'A'..=b'Z' => Ok(c - b'A'),
        b'a'..=b'z' => Ok(c - b'a' + 26),
        b'0'..=b'9' => Ok(c - b'0' + 52),
        b'+' => Ok(62),
        b'/' => Ok(63),
        _ => bail!("`{text}` is no key"),
    });
    let (mut bytes, mut bits, mut have) = (Vec::new(), 0u32, 0);
    for digit in digits {
        (bits, have) = (bits << 6 | u32::from(digit?), have + 6);
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
        }
    }
    ensure!(bytes.len() == 32, "`{text}` is no key");
    Ok(bytes)
}

fn wait(mut look: impl FnMut() -> Result<Option<()>>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while look()?.is_none() {
        ensure!(Instant::now() < deadline, "waited {} s in vain", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_a_name_that_is_read_back() {
        for way in [Way::Ours, Way::Crowded, Way::WireguardGo, Way::Vxlan, Way::Plain] {
            assert_eq!(way.to_string().parse(), Ok(way));
        }
        assert!("".parse::<Way>().is_err());
    }

    #[test]
    fn a_key_is_the_same_in_both_spellings() {
        let key = decode("AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=").unwrap_or_default();
        assert_eq!(key, (1..=32).collect::<Vec<u8>>());
        assert!(decode("AQID").is_err() && decode("nonsense!").is_err());
    }
}
