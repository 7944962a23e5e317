//! A node whose clock is set back.
#![allow(clippy::print_stderr)]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tombolo_agent::api::directory::Directory;
use tombolo_lab::place::log_dir;
use tombolo_lab::topology::{DEMO, Topology};
use tombolo_lab::{Lab, event, program, scenario_alone, wait_until};
use tombolo_proto::model::NodeName;

const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(30);
const HOUR: i64 = 3600;

/// One gateway a side: what passes, passes it.
fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(&DEMO.replace("    pod_cidrs", "    reach: all\n    pod_cidrs"))?)?;
    lab.bring_up()?;
    wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
    Ok(lab)
}

fn keys(lab: &Lab, cluster: &str, node: &str) -> Result<Vec<String>> {
    let observed = Directory::open(lab.cluster_dir(cluster))?.read();
    let nodes = observed.tunnel_nodes.get().context("the TunnelNodes cannot be read")?;
    let node = nodes.get(&NodeName::new(node)?).context("it has told nothing")?;
    Ok(node.devices.values().map(|d| d.key.to_string()).collect())
}

fn log(place: &str, name: &str) -> String {
    let file = log_dir().join(format!("{place}-{name}.log"));
    std::fs::read(file).map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default()
}

/// Waits until pings pass both ways between all these, each pair in both families.
fn pass(lab: &Lab, pairs: &[(&str, &str)], within: Duration) -> Result<Duration> {
    let begun = Instant::now();
    for (a, b) in pairs {
        for (from, to) in [(a, b), (b, a)] {
            let pod = lab.topology().pod(to)?;
            for address in [IpAddr::from(pod.v4), pod.v6.into()] {
                while !lab.ping(from, address, Duration::from_millis(200))?.is_answered() {
                    if begun.elapsed() > within {
                        bail!("{from} does not reach {to} ({address}) after {within:?}");
                    }
                }
            }
        }
    }
    Ok(begun.elapsed())
}

#[test]
fn a_node_whose_clock_went_back_is_up_within_seconds() {
    scenario_alone("a_node_whose_clock_went_back_is_up_within_seconds", LIMIT, || {
        let variables = program::shifted(-HOUR)?;
        let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
        let lab = up()?;
        let gateway = lab.topology().cluster("eu-west")?.nodes.iter().find(|n| n.gateway);
        let gateway = gateway.context("no gateway")?.clone();
        let node = gateway.name.as_str();
        let pods = |cluster: &str| -> Result<Vec<String>> {
            let nodes = &lab.topology().cluster(cluster)?.nodes;
            Ok(nodes.iter().flat_map(|n| n.pods.iter().map(|p| p.name.clone())).collect())
        };
        let (eu, us) = (pods("eu-west")?, pods("us-east")?);
        let pairs: Vec<(&str, &str)> =
            eu.iter().flat_map(|e| us.iter().map(move |u| (e.as_str(), u.as_str()))).collect();
        wait_until("stamps", SOON, || {
            let directory = lab.state_dir(node).join("wireguard");
            ensure!(std::fs::read_dir(&directory).is_ok_and(|d| d.count() > 0), "{}", directory.display());
            Ok(())
        })?;
        // Each device writes down its own within a moment.
        std::thread::sleep(Duration::from_secs(2));
        let before = keys(&lab, "eu-west", node)?;
        let run = lab.state_dir(node).join("../../tombolo");
        event(&lab, &[node], || {
            // As when it loses its power: /run is empty after.
            // A child may end while it is being told to.
            wait_until("the agent's end", SOON, || gone(&lab, node, "agent"))?;
            wait_until("the devices' end", SOON, || gone(&lab, node, "wireguard"))?;
            kill_all(&lab, node)?;
            std::fs::remove_dir_all(&run).context("emptying /run")?;
            ensure!(pass(&lab, &pairs[..1], Duration::from_millis(500)).is_err(), "it still carries");
            let begun = Instant::now();
            lab.start(node, "wireguard", &program::with(&variables, program::wireguard()?))?;
            lab.start(node, "agent", &program::with(&variables, program::agent(&gateway)?))?;
            pass(&lab, &pairs, Duration::from_secs(60))?;
            let took = begun.elapsed();
            eprintln!("clock back one hour, everything restarted: traffic both ways after {took:?}");
            Ok(vec![("clock-back", took.as_secs_f64() * 1000.0, "ms")])
        })?;
        // It was so, and this was the cure.
        ensure!(log(node, "agent").contains("behind the last handshake"), "{}", lab.tail(node, "agent"));
        let after = keys(&lab, "eu-west", node)?;
        ensure!(before.iter().zip(&after).any(|(b, a)| b != a), "no key is another");
        // Nothing else minds: it leads or follows, speaks and hears.
        lab.wait_ready()?;
        lab.export("eu-west", "production", "api-service")?;
        wait_until("the name", SOON, || named(&lab, &us[0]))?;
        Ok(())
    });
}

#[test]
fn a_clock_set_back_under_way_disturbs_nothing() {
    scenario_alone("a_clock_set_back_under_way_disturbs_nothing", LIMIT, || {
        let lab = up()?;
        let gateway = lab.topology().cluster("eu-west")?.nodes.iter().find(|n| n.gateway);
        let gateway = gateway.context("no gateway")?.clone();
        let (node, file) = (gateway.name.as_str(), lab.state_dir(&gateway.name).join("clock"));
        // As libfaketime reads it, once a second.
        std::fs::write(&file, "+0")?;
        let mut variables = program::shifted(0)?;
        variables.retain(|v| !v.starts_with("FAKETIME="));
        variables.push(format!("FAKETIME_TIMESTAMP_FILE={}/clock", program::STATE_DIR));
        variables.push("FAKETIME_CACHE_DURATION=1".to_owned());
        let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
        wait_until("the agent's end", SOON, || gone(&lab, node, "agent"))?;
        wait_until("the devices' end", SOON, || gone(&lab, node, "wireguard"))?;
        lab.start(node, "wireguard", &program::with(&variables, program::wireguard()?))?;
        lab.start(node, "agent", &program::with(&variables, program::agent(&gateway)?))?;
        wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
        let (client, pod) = ("client", lab.topology().pod("api-0")?.clone());
        event(&lab, &[], || {
            let flow = lab.udp_flow(client, pod.v4.into(), 1000)?;
            std::thread::sleep(Duration::from_secs(2));
            std::fs::write(&file, format!("-{HOUR}"))?;
            std::thread::sleep(Duration::from_secs(6));
            let report = flow.stop_udp()?;
            eprintln!("clock back one hour under way: {} packets sent, {} lost", report.sent, report.lost);
            // The cluster is still led, and told.
            lab.export("eu-west", "production", "api-service")?;
            wait_until("the name", SOON, || named(&lab, client))?;
            Ok(vec![("clock-back-under-way-lost", report.lost as f64, "packets")])
        })?;
        // A device that starts anew now has a clock that is behind its key.
        let before = keys(&lab, "eu-west", node)?;
        event(&lab, &[node], || {
            let flow = lab.udp_flow(client, pod.v4.into(), 1000)?;
            std::thread::sleep(Duration::from_secs(1));
            kill_workers(&lab, node)?;
            wait_until("another key", SOON, || {
                let after = keys(&lab, "eu-west", node)?;
                ensure!(before.iter().zip(&after).any(|(b, a)| b != a), "no key is another");
                Ok(())
            })?;
            std::thread::sleep(Duration::from_secs(2));
            let report = flow.stop_udp()?;
            eprintln!("workers killed, an hour back: gap {:.0} ms", report.largest_gap_ms);
            Ok(vec![("clock-back-worker-killed", report.largest_gap_ms, "ms")])
        })?;
        lab.everybody_reaches_everybody()
    });
}

fn named(lab: &Lab, from: &str) -> Result<()> {
    let (code, addresses) = lab.ask(from, "api-service.production.svc.clusterset.local", 1)?;
    ensure!(code == 0 && !addresses.is_empty(), "{code}: {addresses:?}");
    Ok(())
}

/// SIGKILL to the workers of all devices of a node.
fn kill_workers(lab: &Lab, node: &str) -> Result<()> {
    let net = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    let home = net(&lab.pid(node, "wireguard")?.to_string())?;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        if line.split(|b| *b == 0).nth(1) == Some(b"worker")
            && net(&name).is_ok_and(|n| n == home)
            && let Ok(pid) = name.parse()
        {
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        }
    }
    Ok(())
}

/// Kills a program with all that it started, unless it is dead already.
fn gone(lab: &Lab, node: &str, program: &str) -> Result<()> {
    if lab.pid(node, program).is_ok() { lab.kill_tree(node, program) } else { Ok(()) }
}

/// What outlives its parents: devices.
fn kill_all(lab: &Lab, node: &str) -> Result<()> {
    let place = lab.place(node)?;
    for line in place.capture(&["ip", "-o", "link", "show"])?.lines() {
        if let Some(link) = line.split(": ").nth(1).filter(|l| l.starts_with("tombolo")) {
            // The device's end follows its interface's.
            place.ip(&format!("link delete {link}\n"))?;
        }
    }
    Ok(())
}

#[test]
fn a_device_without_an_agent_says_so_once_and_waits() {
    scenario_alone("a_device_without_an_agent_says_so_once_and_waits", LIMIT, || {
        let lab = Lab::build(Topology::parse(DEMO)?)?;
        let names: Vec<_> = lab.topology().nodes().map(|n| (n.name.clone(), n.v4)).collect();
        let ((a, a4), (b, b4)) = (names[0].clone(), names.last().context("nodes")?.clone());
        let device = |variables: &[String]| -> Result<Vec<String>> {
            let line = vec![program::find("tombolo-wireguard")?, "--foreground".into(), "wgq0".into()];
            let all: Vec<&str> = variables.iter().map(String::as_str).chain([program::STAMPS]).collect();
            Ok(program::with(&all, line))
        };
        let key = |node: &str, file: &str| -> Result<String> {
            let place = lab.place(node)?;
            let script = format!("umask 077; [ -e {file} ] || wg genkey > {file}; wg pubkey < {file}");
            Ok(place.capture(&["sh", "-c", &script])?.trim().to_owned())
        };
        let (file, port) = ("/run/lab/state/wgq.key", "51820");
        let (a_key, b_key) = (key(&a, file)?, key(&b, file)?);
        let configure = |node: &str, own: &str, peer: &str, other: &str, at: IpAddr| -> Result<()> {
            wait_until("the device", SOON, || lab.place(node)?.capture(&["wg", "show", "wgq0"]).map(drop))?;
            let place = lab.place(node)?;
            place.ip(&format!("addr add {own}/24 dev wgq0\nlink set wgq0 up\n"))?;
            place.capture(&[
                "wg",
                "set",
                "wgq0",
                "private-key",
                file,
                "listen-port",
                port,
                "peer",
                peer,
                "allowed-ips",
                &format!("{other}/32"),
                "endpoint",
                &format!("{at}:{port}"),
                "persistent-keepalive",
                "10",
            ])?;
            Ok(())
        };
        lab.start(&a, "wgq", &device(&[])?)?;
        lab.start(&b, "wgq", &device(&[])?)?;
        configure(&a, "10.77.0.1", &b_key, "10.77.0.2", b4.into())?;
        configure(&b, "10.77.0.2", &a_key, "10.77.0.1", a4.into())?;
        let answered = |from: &str, to: &str| -> Result<()> {
            let echo = lab.ping(from, to.parse()?, Duration::from_millis(500))?;
            ensure!(echo.is_answered(), "{from} pings {to}: {echo:?}");
            Ok(())
        };
        wait_until("the tunnel", SOON, || answered(&a, "10.77.0.2"))?;
        wait_until("stamps", SOON, || {
            let file = lab.state_dir(&a).join("wireguard/wgq0");
            ensure!(file.is_file(), "{}", file.display());
            Ok(())
        })?;
        lab.kill_tree(&a, "wgq")?;
        wait_until("the interface's end", SOON, || {
            let links = lab.place(&a)?.capture(&["ip", "-o", "link", "show"])?;
            ensure!(!links.contains("wgq0"), "{links}");
            Ok(())
        })?;
        ensure!(!log(&a, "wgq").contains("the clock is"), "{}", lab.tail(&a, "wgq"));
        let begun = Instant::now();
        lab.start(&a, "wgq", &device(&program::shifted(-HOUR)?)?)?;
        configure(&a, "10.77.0.1", &b_key, "10.77.0.2", b4.into())?;
        // It calls when what it sends goes unanswered for 15 s.
        wait_until("the peer's call", Duration::from_secs(60), || answered(&b, "10.77.0.1"))?;
        answered(&a, "10.77.0.2")?;
        eprintln!("without an agent: up after {:?}, when the peer called", begun.elapsed());
        let said = log(&a, "wgq").matches("behind this key's last handshake").count();
        ensure!(said == 1, "said {said} times:\n{}", lab.tail(&a, "wgq"));
        Ok(())
    });
}
