//! `check`: is this node fit, and if not, what cures it.

mod range;

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;
use tombolo_agent::api::Observed;
use tombolo_agent::api::directory::Directory;
use tombolo_agent::observe::member::{Members, Verifier};
use tombolo_agent_core::finding::Severity;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::world::ClustersetRanges;

use super::admin;
use crate::cli::Check;
use crate::output::{Printer, Verdict, plain};

/// One line: what was looked at, how it is, and what to do.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    category: &'static str,
    name: &'static str,
    verdict: Verdict,
    message: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    remedy: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    verdict: Verdict,
    checks: Vec<Line>,
    not_checked: &'static [&'static str],
}

struct Lines(Vec<Line>);

impl Lines {
    fn add(
        &mut self,
        category: &'static str,
        name: &'static str,
        verdict: Verdict,
        message: impl Into<String>,
    ) {
        self.0.push(Line { category, name, verdict, message: message.into(), remedy: Vec::new() });
    }

    /// What is wrong with the directory's objects or with members.
    fn found(&mut self, name: &'static str, verdict: Verdict, finding: &admin::Finding) {
        let message = plain(&format!("{}: {}: {}", finding.reason, finding.object, finding.message));
        self.add("membership", name, verdict, message);
        self.remedy(&[&finding.page()]);
    }

    fn remedy(&mut self, lines: &[&str]) {
        if let Some(last) = self.0.last_mut() {
            last.remedy = lines.iter().map(|l| (*l).to_owned()).collect();
        }
    }
}

pub(super) fn check(printer: &Printer, args: &Check) -> Result<ExitCode> {
    let mut lines = Lines(Vec::new());
    kernel(&mut lines);
    forwarding(&mut lines);
    firewall(&mut lines);
    if !args.pre {
        member(&mut lines, args);
    }
    let verdict = lines.0.iter().map(|l| l.verdict).max().unwrap_or(Verdict::Ok);
    let report = Report { verdict, checks: lines.0, not_checked: &NOT_CHECKED };
    printer.print("CheckReport", &report, |printer| {
        let mut text = String::new();
        let mut category = "";
        for line in &report.checks {
            if line.category != category {
                text += &format!("{}{}\n", if category.is_empty() { "" } else { "\n" }, line.category);
                category = line.category;
            }
            text += &format!("  {} {}: {}\n", printer.mark(line.verdict), line.name, line.message);
            for remedy in &line.remedy {
                text += &format!("      {remedy}\n");
            }
        }
        let count = |v| report.checks.iter().filter(|l| l.verdict == v).count();
        text += "\nnot checked\n";
        for line in report.not_checked {
            text += &format!("  - {line}\n");
        }
        text + &format!(
            "\n{} checks, {} warnings, {} failures\n",
            report.checks.len(),
            count(Verdict::Warning),
            count(Verdict::Failure)
        )
    })?;
    let failed = verdict == Verdict::Failure || (args.strict && verdict == Verdict::Warning);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Chains of others on this node that drop what is forwarded, and what cures each.
pub(super) fn dropping() -> Vec<(String, Vec<String>)> {
    let mut lines = Lines(Vec::new());
    firewall(&mut lines);
    let failed = lines.0.into_iter().filter(|l| l.verdict == Verdict::Failure);
    failed.map(|l| (l.message, l.remedy)).collect()
}

fn kernel(lines: &mut Lines) {
    let capabilities = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|s| s.lines().find_map(|l| l.strip_prefix("CapEff:").map(|v| v.trim().to_owned())))
        .and_then(|v| u64::from_str_radix(&v, 16).ok());
    match capabilities {
        Some(set) if set >> 12 & 1 == 1 => {
            lines.add("kernel", "privileges", Verdict::Ok, "CAP_NET_ADMIN is held")
        }
        _ => {
            lines.add(
                "kernel",
                "privileges",
                Verdict::Failure,
                "CAP_NET_ADMIN is missing: links, routes and firewall cannot be read",
            );
            lines.remedy(&["run as root: sudo tombolo check"]);
        }
    }
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => lines.add(
            "kernel",
            "tun",
            Verdict::Ok,
            "/dev/net/tun opens: the userspace WireGuard device can run",
        ),
        Err(error) => {
            lines.add("kernel", "tun", Verdict::Failure, format!("/dev/net/tun does not open: {error}"));
            lines.remedy(&["modprobe tun", "in a container: give it the device /dev/net/tun"]);
        }
    }
    match Command::new("nft").arg("--version").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let version = text
                .split_whitespace()
                .find(|w| w.starts_with('v'))
                .unwrap_or("v?")
                .trim_start_matches('v')
                .to_owned();
            let parts: Vec<u32> = version.split('.').filter_map(|p| p.parse().ok()).collect();
            if parts.as_slice() >= [1, 0, 6].as_slice() {
                lines.add("kernel", "nft", Verdict::Ok, format!("nftables {version}"));
            } else {
                lines.add(
                    "kernel",
                    "nft",
                    Verdict::Failure,
                    format!("nftables {version} is older than 1.0.6"),
                );
                lines.remedy(&["install a newer nftables"]);
            }
        }
        _ => {
            lines.add("kernel", "nft", Verdict::Failure, "the program nft is missing");
            lines.remedy(&["apt-get install nftables"]);
        }
    }
}

fn setting(path: &str) -> Option<String> {
    fs::read_to_string(Path::new("/proc/sys").join(path)).ok().map(|s| s.trim().to_owned())
}

fn forwarding(lines: &mut Lines) {
    for (name, path, cure) in [
        ("IPv4", "net/ipv4/ip_forward", "sysctl -w net.ipv4.ip_forward=1"),
        ("IPv6", "net/ipv6/conf/all/forwarding", "sysctl -w net.ipv6.conf.all.forwarding=1"),
    ] {
        match setting(path).as_deref() {
            Some("1" | "2") => lines.add("forwarding", name, Verdict::Ok, "this node forwards"),
            Some(_) => {
                lines.add(
                    "forwarding",
                    name,
                    Verdict::Failure,
                    format!("{name} forwarding is off: pods of this node reach nobody"),
                );
                lines.remedy(&[cure]);
            }
            None => lines.add("forwarding", name, Verdict::Warning, format!("this kernel has no {name}")),
        }
    }
}

fn nft(arguments: &[&str]) -> Option<Value> {
    let output = Command::new("nft").args(arguments).output().ok()?;
    if output.status.success() { serde_json::from_slice(&output.stdout).ok() } else { None }
}

/// A drop in any base chain is final: only the administrator of that firewall can let tunnels pass.
fn firewall(lines: &mut Lines) {
    let Some(chains) = nft(&["-j", "list", "chains"]) else {
        lines.add(
            "firewall",
            "forward",
            Verdict::Warning,
            "the ruleset cannot be read (not root, or no nft)",
        );
        return;
    };
    let empty = Vec::new();
    let mut dropping = Vec::new();
    for chain in chains["nftables"].as_array().unwrap_or(&empty).iter().filter_map(|o| o.get("chain")) {
        let text = |key: &str| chain[key].as_str().unwrap_or_default();
        if text("hook") == "forward" && text("policy") == "drop" && text("table") != "tombolo" {
            dropping.push((text("family").to_owned(), text("table").to_owned(), text("name").to_owned()));
        }
    }
    let mut any = false;
    let silent = dropping.is_empty();
    for (family, table, name) in dropping {
        if lets_tunnels_pass(&family, &table, &name) {
            lines.add(
                "firewall",
                "forward",
                Verdict::Ok,
                format!("chain {family} {table} {name} drops by policy, and lets tunnels pass"),
            );
            continue;
        }
        any = true;
        lines.add(
            "firewall",
            "forward",
            Verdict::Failure,
            format!("chain {family} {table} {name} has policy drop and no rule that lets tunnels pass"),
        );
        // Names out of the kernel's own list; still, only plain ones are printed for copying.
        if [&table, &name].iter().all(|n| n.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)))
        {
            lines.remedy(&[
                &format!("nft insert rule {family} {table} {name} iifname \"tombolo*\" accept"),
                &format!("nft insert rule {family} {table} {name} oifname \"tombolo*\" accept"),
            ]);
        }
    }
    for program in ["iptables-legacy", "ip6tables-legacy"] {
        let Ok(output) = Command::new(program).args(["-S", "FORWARD"]).output() else { continue };
        let rules = String::from_utf8_lossy(&output.stdout);
        if rules.contains("-P FORWARD DROP")
            && !(rules.contains("-i tombolo+ -j ACCEPT") && rules.contains("-o tombolo+ -j ACCEPT"))
        {
            any = true;
            lines.add(
                "firewall",
                "forward",
                Verdict::Failure,
                format!("{program}: FORWARD has policy DROP and no rule that lets tunnels pass"),
            );
            lines.remedy(&[
                &format!("{program} -I FORWARD -i tombolo+ -j ACCEPT"),
                &format!("{program} -I FORWARD -o tombolo+ -j ACCEPT"),
            ]);
        }
    }
    if !any && silent {
        lines.add("firewall", "forward", Verdict::Ok, "nothing drops forwarded packets by policy");
    }
}

/// Whether both directions have an accept for `tombolo*` in the chain.
fn lets_tunnels_pass(family: &str, table: &str, name: &str) -> bool {
    let Some(chain) = nft(&["-j", "list", "chain", family, table, name]) else { return false };
    let empty = Vec::new();
    let mut passes = [false, false];
    for rule in chain["nftables"].as_array().unwrap_or(&empty).iter().filter_map(|o| o.get("rule")) {
        let expressions = rule["expr"].as_array().unwrap_or(&empty);
        if !expressions.iter().any(|e| e.get("accept").is_some()) {
            continue;
        }
        for matched in expressions.iter().filter_map(|e| e.get("match")) {
            if matched["right"] == "tombolo*" || matched["right"] == "tombolo+" {
                passes[0] |= matched["left"]["meta"]["key"] == "iifname";
                passes[1] |= matched["left"]["meta"]["key"] == "oifname";
            }
        }
    }
    passes == [true, true]
}

/// What only a member has. None of it is looked at by `--pre`.
fn member(lines: &mut Lines, args: &Check) {
    let path = &args.cluster.cluster_dir;
    let observed = match Directory::open(path) {
        Ok(directory) => directory.read(),
        Err(error) => {
            lines.add("membership", "directory", Verdict::Failure, plain(&error.to_string()));
            lines.remedy(&["tombolo join --cluster-dir DIR @TOKEN", "before joining: tombolo check --pre"]);
            agent(lines, args);
            return;
        }
    };
    match &observed.clusterset {
        Known::Yes(Some(set)) => {
            let message = format!("{} is cluster {} of set {}", path.display(), set.cluster, set.set);
            lines.add("membership", "directory", Verdict::Ok, message);
        }
        Known::Yes(None) => {
            let message = format!("{} is no member of a set yet", path.display());
            lines.add("membership", "directory", Verdict::Failure, message);
            lines.remedy(&["tombolo join --cluster-dir DIR @TOKEN", "before joining: tombolo check --pre"]);
        }
        Known::No => {
            lines.add(
                "membership",
                "directory",
                Verdict::Failure,
                format!("{}/state cannot be read", path.display()),
            );
            lines.remedy(&["tombolo status tells why"]);
        }
    }
    for finding in &observed.findings {
        let verdict = if finding.severity == Severity::Error { Verdict::Failure } else { Verdict::Warning };
        lines.found("objects", verdict, &finding.into());
    }
    let verified = Verifier::default().verify(&observed);
    if let Known::Yes(verified) = &verified {
        for finding in &verified.findings {
            lines.found("members", Verdict::Warning, &finding.into());
        }
        range::ranges(lines, &observed, verified);
    }
    agent(lines, args);
    devices(lines, &observed, verified.get().map(|v| v.as_ref()));
    resolver(lines, &observed);
}

fn agent(lines: &mut Lines, args: &Check) {
    match admin::readiness(args.agent.admin) {
        Ok((true, _)) => lines.add("agent", "ready", Verdict::Ok, "the agent is ready"),
        Ok((false, problems)) => {
            lines.add("agent", "ready", Verdict::Failure, "the agent is not ready");
            lines.remedy(&problems.iter().map(String::as_str).collect::<Vec<_>>());
        }
        Err(error) => {
            let message = format!("no agent answers on {}: {error}", args.agent.admin);
            lines.add("agent", "ready", Verdict::Failure, message);
            lines.remedy(&["start tombolo-agent on this node, or tell by --admin where its pages are"]);
            return;
        }
    }
    match admin::findings(args.agent.admin) {
        Ok(findings) if findings.is_empty() => {
            lines.add("agent", "findings", Verdict::Ok, "the agent finds nothing wrong")
        }
        Ok(findings) => {
            for finding in findings {
                let message = plain(&format!("{}: {}: {}", finding.reason, finding.object, finding.message));
                lines.add("agent", "findings", Verdict::Warning, message);
                lines.remedy(&[&finding.page()]);
            }
        }
        Err(error) => {
            lines.add("agent", "findings", Verdict::Warning, format!("its findings cannot be read: {error}"))
        }
    }
}

/// A device exists while a peer needs it.
fn devices(lines: &mut Lines, observed: &Observed, members: Option<&Members>) {
    let Some(devices) = range::devices() else {
        lines.add("tunnels", "devices", Verdict::Warning, "links cannot be read: is the program ip there?");
        return;
    };
    let own = observed.clusterset.get().and_then(Option::as_ref).map(|set| &set.cluster);
    let others =
        members.into_iter().flat_map(|m| &m.nodes).filter(|(id, m)| Some(*id) != own && !m.nodes.is_empty());
    let others = others.count();
    let down: Vec<&str> = devices.iter().filter(|(_, up)| !up).map(|(name, _)| name.as_str()).collect();
    if devices.is_empty() && others > 0 {
        let message = format!("{others} other clusters have nodes, and this node has no device tombolo<n>");
        lines.add("tunnels", "devices", Verdict::Failure, message);
        lines.remedy(&["is tombolo-wireguard serve running on this node? its log and the agent's tell more"]);
    } else if !down.is_empty() {
        lines.add("tunnels", "devices", Verdict::Failure, format!("{} is down", down.join(", ")));
        lines.remedy(&["the agent's log tells why"]);
    } else if devices.is_empty() {
        lines.add("tunnels", "devices", Verdict::Ok, "none, and no other cluster has nodes yet");
    } else {
        let names: Vec<&str> = devices.iter().map(|(name, _)| name.as_str()).collect();
        lines.add("tunnels", "devices", Verdict::Ok, format!("{} up", names.join(", ")));
    }
}

/// Asked for `dns-version`, which has an answer before any service is imported.
fn resolver(lines: &mut Lines, observed: &Observed) {
    let own = SocketAddr::from(([127, 0, 0, 1], tombolo_agent_core::desired::DNS_PORT));
    let set = observed.clusterset.get().and_then(Option::as_ref);
    let ranges = set.into_iter().flat_map(|set| &set.clusterset);
    let theirs = ranges.flat_map(ClustersetRanges::resolvers).map(|a| SocketAddr::new(a, 53));
    for address in [own].into_iter().chain(theirs) {
        match ask(address) {
            Ok(()) => lines.add("names", "resolver", Verdict::Ok, format!("{address} answers")),
            // From pods it may be reached all the same: the CNI gives them a route.
            Err(error) if error.kind() == ErrorKind::NetworkUnreachable => {
                let message =
                    format!("{address} cannot be asked from the node itself, which has no route there");
                lines.add("names", "resolver", Verdict::Warning, message);
                lines.remedy(&[
                    "ask from a pod of this node; or give the node a default route of that family",
                ]);
            }
            Err(error) => {
                lines.add(
                    "names",
                    "resolver",
                    Verdict::Failure,
                    format!("{address} does not answer: {error}"),
                );
                lines.remedy(&["is tombolo-agent running on this node? nft list table inet tombolo shows where queries are sent"]);
            }
        }
    }
}

fn ask(address: SocketAddr) -> std::io::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() },
        0,
    ))?;
    socket.connect(address)?;
    let mut query = vec![0x70, 0x6f, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["dns-version", "clusterset", "local", ""] {
        query.push(u8::try_from(label.len()).unwrap_or(0));
        query.extend(label.bytes());
    }
    // TXT, IN
    query.extend([0, 16, 0, 1]);
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut answer = [0; 512];
    // One may be lost; the second is not.
    for last in [false, true] {
        socket.send(&query)?;
        match socket.recv(&mut answer) {
            Ok(length) if length >= 12 && answer[..2] == query[..2] => {
                let (code, records) = (answer[3] & 15, u16::from_be_bytes([answer[6], answer[7]]));
                return match (code, records) {
                    (0, 1..) => Ok(()),
                    (2, _) => Err(std::io::Error::other("it knows no names yet (SERVFAIL)")),
                    _ => Err(std::io::Error::other(format!("another resolver answers there (code {code})"))),
                };
            }
            Ok(_) => return Err(std::io::Error::other("what answers is no resolver")),
            Err(error) if last && error.kind() == ErrorKind::WouldBlock => {
                return Err(std::io::Error::other("nothing came within 1 s, twice"));
            }
            Err(error) if last => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}

/// What a command on this node cannot see.
const NOT_CHECKED: [&str; 4] = [
    "whether UDP from other clusters' gateways reaches this node (clouds' firewalls, NAT)",
    "rules that drop some forwarded packets in a chain whose policy is accept",
    "dataplanes that bypass netfilter",
    "the path MTU between clusters",
];
