//! Topologies by numbers, and what every shape is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tombolo_lab::program::AGENT_ADMIN;
use tombolo_lab::sandbox::ROOT;
use tombolo_lab::topology::Topology;
use tombolo_lab::{Lab, wait_until};

pub const SOON: Duration = Duration::from_secs(30);

/// The names of all clusters, by their place in the file.
const NAMES: [&str; 4] = ["eu", "us", "as", "af"];

/// A cluster: gateways `eu-gw1`.. and workers `eu-w1`.., on each a pod `eu-g1`.. or `eu-p1`.., and one service, `svc-eu`,
/// of all of them.
#[derive(Clone, Default)]
pub struct Shape {
    pub gateways: usize,
    pub workers: usize,
    /// Pods on each worker.
    pub pods: usize,
    /// Whether the first kind of nodes bears the label.
    pub unlabelled: bool,
    /// Further lines of the cluster.
    pub lines: &'static str,
}

impl Shape {
    pub fn of(gateways: usize, workers: usize) -> Self {
        Self { gateways, workers, pods: 1, ..Self::default() }
    }
}

pub fn topology(shapes: &[Shape]) -> Result<Topology> {
    let mut text = "name: shapes\nclusters:\n".to_owned();
    for (i, shape) in shapes.iter().enumerate() {
        let (id, n) = (NAMES[i], i + 1);
        writeln!(text, "  - id: {id}\n    pod_cidrs: [10.{n}.0.0/16, \"fd00:10:{n}::/48\"]")?;
        if !shape.lines.is_empty() {
            writeln!(text, "    {}", shape.lines)?;
        }
        writeln!(text, "    nodes:")?;
        let pod = |name: String| format!("{{ name: {name}, namespace: production, app: api }}");
        for g in 1..=shape.gateways {
            let label = if shape.unlabelled { "" } else { "gateway: true, " };
            writeln!(text, "      - {{ name: {id}-gw{g}, {label}pods: [{}] }}", pod(format!("{id}-g{g}")))?;
        }
        for w in 1..=shape.workers {
            let pods: Vec<_> =
                (1..=shape.pods).map(|p| pod(format!("{id}-p{}", (w - 1) * shape.pods + p))).collect();
            writeln!(text, "      - {{ name: {id}-w{w}, pods: [{}] }}", pods.join(", "))?;
        }
        writeln!(
            text,
            "    services:\n      - {{ name: svc-{id}, namespace: production, app: api, ports: [{{ name: http, port: 8080 }}, {{ name: udp, port: 7000, protocol: UDP }}, {{ name: tcp, port: 7000 }}] }}"
        )?;
    }
    Topology::parse(&text)
}

pub fn name_of(cluster: &str) -> String {
    format!("svc-{cluster}.production.svc.clusterset.local")
}

/// Everything up, every service exported, every pod in reach of all others.
pub fn up(shapes: &[Shape]) -> Result<Lab> {
    let lab = Lab::build(topology(shapes)?)?;
    lab.bring_up()?;
    for cluster in &lab.topology().clusters {
        lab.export(&cluster.id, "production", &format!("svc-{}", cluster.id))?;
    }
    wait_until("tunnels", SOON, || every_node_reaches_every_other(&lab))?;
    wait_until("names", SOON, || names(&lab))?;
    Ok(lab)
}

/// TCP, UDP and ICMP, both families, from the first pod of every node to that of every node of other clusters, source
/// kept.
pub fn every_node_reaches_every_other(lab: &Lab) -> Result<()> {
    let there = |n: &&tombolo_lab::topology::Node| lab.has_node(&n.name);
    let pods: Vec<_> = lab.topology().nodes().filter(there).filter_map(|n| n.pods.first()).collect();
    for from in &pods {
        for to in pods.iter().filter(|to| to.cluster != from.cluster) {
            lab.reaches(&from.name, from.v4.into(), to.v4.into())?;
            lab.reaches(&from.name, from.v6.into(), to.v6.into())?;
        }
    }
    Ok(())
}

/// From one pod of each cluster the services of all others, by name, both families.
pub fn names(lab: &Lab) -> Result<()> {
    for from in &lab.topology().clusters {
        let pod = from.nodes.iter().flat_map(|n| &n.pods).next().context("no pod")?;
        for to in lab.topology().clusters.iter().filter(|to| to.id != from.id) {
            for family in ["-4", "-6"] {
                let url = format!("http://{}:8080/health", name_of(&to.id));
                lab.fetch(&pod.name, &url, &[family, "--timeout", "2"])
                    .with_context(|| format!("{} {family} from {}", to.id, pod.name))?;
            }
        }
    }
    Ok(())
}

/// Every peer of every node that is there has answered: from then on liveness knows dead from unknown.
pub fn acquainted(lab: &Lab, peers: impl Fn(&str) -> usize) -> Result<()> {
    for node in lab.topology().nodes().filter(|n| lab.has_node(&n.name)) {
        wait_until("liveness", SOON, || {
            let file = lab.state_dir(&node.name).join("health.json");
            let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
            let (alive, wanted) = (text.matches("alive").count(), peers(&node.name));
            ensure!(alive >= wanted, "{}: {alive} of {wanted} peers are known to be alive", node.name);
            Ok(())
        })?;
    }
    Ok(())
}

/// What a node's agent finds wrong, as JSON.
pub fn findings(lab: &Lab, node: &str) -> Result<String> {
    Ok(lab.fetch(node, &format!("http://{AGENT_ADMIN}/debug/findings"), &["--timeout", "3"])?.body)
}

/// Bytes (received, sent) of a place's links.
pub fn bytes(lab: &Lab, place: &str) -> Result<BTreeMap<String, (u64, u64)>> {
    let text = lab.place(place)?.capture(&["cat", "/proc/net/dev"])?;
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let mut numbers = numbers.split_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
        Some((name.trim().to_owned(), (numbers.next()?, numbers.nth(7)?)))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// The devices of a route of table OUT; empty if there is none that carries.
pub fn slots(lab: &Lab, node: &str, prefix: &str) -> Result<Vec<String>> {
    slots_of(lab, node, "4510", prefix)
}

/// The same of any table; one that is not there has no routes.
pub fn slots_of(lab: &Lab, node: &str, table: &str, prefix: &str) -> Result<Vec<String>> {
    let family = if prefix.contains(':') { "-6" } else { "-4" };
    let show = format!("ip {family} route show table {table} {prefix} 2>/dev/null || true");
    let text = lab.place(node)?.capture(&["sh", "-c", &show])?;
    let lines: Vec<_> = text.lines().filter(|l| !l.starts_with("unreachable")).collect();
    let words: Vec<_> = lines.iter().flat_map(|l| l.split_whitespace()).collect();
    let mut slots: Vec<_> = words.windows(2).filter(|w| w[0] == "dev").map(|w| w[1].to_owned()).collect();
    slots.sort();
    slots.dedup();
    Ok(slots)
}

/// Routes, rules, peers with what they may send, and firewall of a node, as text without counters.
pub fn kernel(lab: &Lab, node: &str) -> Result<String> {
    let mut text = lab.kernel(node)?;
    for (device, peers) in peers(node)? {
        writeln!(text, "{device}")?;
        for (key, allowed) in peers {
            writeln!(text, "  {key} {allowed:?}")?;
        }
    }
    Ok(text)
}

type Peers = BTreeMap<String, BTreeSet<String>>;

/// What a node's devices say of their peers: key and allowed IPs, by device.
pub fn peers(node: &str) -> Result<BTreeMap<String, Peers>> {
    let mut devices = BTreeMap::new();
    for (name, lines) in devices_of(node)? {
        let mut peers = Peers::new();
        let mut last = String::new();
        for (key, value) in lines {
            if key == "public_key" {
                peers.insert(value.clone(), BTreeSet::new());
                last = value;
            } else if key == "allowed_ip" {
                peers.entry(last.clone()).or_default().insert(value);
            }
        }
        devices.insert(name, peers);
    }
    Ok(devices)
}

/// All values that a node's devices give for a key of UAPI.
pub fn uapi(node: &str, key: &str) -> Result<Vec<String>> {
    let lines = devices_of(node)?.into_iter().flat_map(|(_, lines)| lines);
    Ok(lines.filter(|(k, _)| k == key).map(|(_, value)| value).collect())
}

type Lines = Vec<(String, String)>;

fn devices_of(node: &str) -> Result<Vec<(String, Lines)>> {
    let sockets = Path::new(ROOT).join("node").join(node).join("run/wireguard");
    let mut devices = Vec::new();
    for entry in std::fs::read_dir(&sockets)?.flatten() {
        let name = entry.file_name().to_string_lossy().trim_end_matches(".sock").to_owned();
        // One that is nobody's any more.
        let Ok(mut stream) = UnixStream::connect(entry.path()) else { continue };
        stream.write_all(b"get=1\n\n")?;
        let mut lines = Lines::new();
        for line in BufReader::new(stream).lines() {
            let line = line?;
            let Some((key, value)) = line.split_once('=') else { break };
            lines.push((key.to_owned(), value.to_owned()));
        }
        devices.push((name, lines));
    }
    Ok(devices)
}

/// How long the thread of each of a node's devices has run on a processor, in milliseconds (proc(5), `schedstat`).
pub fn busy(lab: &Lab, node: &str) -> Result<BTreeMap<String, f64>> {
    let net = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    let here = net(&lab.pid(node, "agent")?.to_string())?;
    let mut busy = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        // Not a process, or one that ended meanwhile.
        let Ok(line) = std::fs::read_to_string(entry.path().join("cmdline")) else { continue };
        let mut words = line.split_terminator('\0').rev();
        let (Some(device), Some("worker")) = (words.next(), words.next()) else { continue };
        if net(&pid).is_ok_and(|net| net == here) {
            let stat = std::fs::read_to_string(entry.path().join("schedstat"))?;
            let nanoseconds: f64 = stat.split_whitespace().next().context("schedstat is empty")?.parse()?;
            busy.insert(device.to_owned(), nanoseconds / 1e6);
        }
    }
    Ok(busy)
}

/// Milliseconds since a moment.
pub fn since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
