//! WireGuard keys change by command, under traffic, and nothing is lost.
#![allow(clippy::print_stderr)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tombolo_agent::api::directory::Directory;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Flow, Lab, event, scenario_alone, strict, wait_until};

const LIMIT: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(30);
/// Of each flow; there are six, three a direction: 1,000 packets a second both ways.
const RATE: u32 = 334;

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(&TWO.replace("    pod_cidrs", "    reach: all\n    pod_cidrs"))?)?;
    lab.bring_up()?;
    wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
    Ok(lab)
}

/// Between pods on gateways and on workers, both ways and both families.
fn flows(lab: &Lab) -> Result<Vec<Flow>> {
    let pod = |name: &str| lab.topology().pod(name);
    Ok(vec![
        lab.udp_flow("us-c", pod("eu-c")?.v4.into(), RATE)?,
        lab.udp_flow("us-a", pod("eu-c")?.v6.into(), RATE)?,
        lab.udp_flow("us-b", pod("eu-a")?.v4.into(), RATE)?,
        lab.udp_flow("eu-c", pod("us-c")?.v4.into(), RATE)?,
        lab.udp_flow("eu-a", pod("us-b")?.v6.into(), RATE)?,
        lab.udp_flow("eu-b", pod("us-a")?.v4.into(), RATE)?,
    ])
}

/// Packets lost, and the longest gap in milliseconds.
fn stop(flows: Vec<Flow>, title: &str) -> Result<(u64, f64)> {
    let (mut sent, mut lost, mut gap) = (0, 0, 0.0_f64);
    for flow in flows {
        let report = flow.stop_udp()?;
        ensure!(report.sent > 500, "{report:?}");
        if report.lost > 0 {
            eprintln!("{title}: {report:?}");
        }
        (sent, lost, gap) = (sent + report.sent, lost + report.lost, gap.max(report.largest_gap_ms));
    }
    eprintln!("{title}: {sent} packets sent, {lost} lost, largest gap {gap:.0} ms");
    Ok((lost, gap))
}

/// The public keys of all nodes of a cluster, as they tell them: node and device number to key.
fn keys(lab: &Lab, cluster: &str) -> Result<BTreeMap<(String, u8), String>> {
    let observed = Directory::open(lab.cluster_dir(cluster))?.read();
    let nodes = observed.tunnel_nodes.get().context("the TunnelNodes cannot be read")?;
    Ok(nodes
        .iter()
        .flat_map(|(name, node)| {
            node.devices.iter().map(move |(n, d)| ((name.to_string(), n.get()), d.key.to_string()))
        })
        .collect())
}

/// Every key of these nodes is another, and every tunnel to them is in use by it.
fn in_use(lab: &Lab, cluster: &str, nodes: &[&str], before: &BTreeMap<(String, u8), String>) -> Result<()> {
    let after = keys(lab, cluster)?;
    for ((node, number), key) in after.iter().filter(|((node, _), _)| nodes.contains(&node.as_str())) {
        let old = before.get(&(node.clone(), *number)).context("a device that was not there before")?;
        ensure!(old != key, "{node} still tells its key of device {number}");
        for other in lab.topology().nodes() {
            let place = lab.place(&other.name)?;
            // Also: `wg` reads a device that says more than others.
            let dump = place.capture(&["wg", "show", "all", "dump"])?;
            ensure!(
                !dump.lines().any(|l| l.split('\t').nth(1) == Some(old)),
                "{} has {node}'s old key",
                other.name
            );
            for line in dump.lines().filter(|l| l.split('\t').nth(1) == Some(key)) {
                let handshake = line.split('\t').nth(5).unwrap_or_default();
                ensure!(handshake != "0", "{}: no handshake by {node}'s new key: {line}", other.name);
            }
        }
    }
    Ok(())
}

#[test]
fn every_node_rotates_without_a_lost_packet() {
    scenario_alone("every_node_rotates_without_a_lost_packet", LIMIT, || {
        let lab = up()?;
        let (us, eu) = (keys(&lab, "us-east")?, keys(&lab, "eu-west")?);
        event(&lab, &[], || {
            let flows = flows(&lab)?;
            std::thread::sleep(Duration::from_secs(2));
            for node in ["us-gw1", "us-gw2", "us-w1"] {
                eprint!("{}", lab.tombolo(node, &["rotate", "wireguard", node])?);
                wait_until("the new keys in use", SOON, || in_use(&lab, "us-east", &[node], &us))?;
                std::thread::sleep(Duration::from_secs(1));
            }
            eprint!("{}", lab.tombolo("eu-gw1", &["rotate", "wireguard", "--all"])?);
            let all = ["eu-gw1", "eu-gw2", "eu-w1"];
            wait_until("the new keys in use", SOON, || in_use(&lab, "eu-west", &all, &eu))?;
            std::thread::sleep(Duration::from_secs(2));
            let (lost, _) = stop(flows, "every node rotates, then all of a cluster at once")?;
            Ok(vec![("wireguard-rotation-lost", lost as f64, "packets")])
        })?;
        // Asked for once, obeyed once: a new agent does not do it again.
        let told = keys(&lab, "us-east")?;
        lab.kill_child("us-gw1", "agent")?;
        lab.wait_ready()?;
        wait_until("the agent to lead or follow", SOON, || lab.everybody_reaches_everybody())?;
        ensure!(keys(&lab, "us-east")? == told, "a restarted agent told other keys");
        Ok(())
    });
}

#[test]
fn both_clusters_rotate_at_once_without_a_lost_packet() {
    scenario_alone("both_clusters_rotate_at_once_without_a_lost_packet", LIMIT, || {
        let lab = up()?;
        let (us, eu) = (keys(&lab, "us-east")?, keys(&lab, "eu-west")?);
        event(&lab, &[], || {
            let flows = flows(&lab)?;
            std::thread::sleep(Duration::from_secs(2));
            for node in ["us-gw1", "eu-gw1"] {
                lab.tombolo(node, &["rotate", "wireguard", "--all", "--wait", "0"])?;
            }
            wait_until("the new keys in use", SOON, || {
                in_use(&lab, "us-east", &["us-gw1", "us-gw2", "us-w1"], &us)?;
                in_use(&lab, "eu-west", &["eu-gw1", "eu-gw2", "eu-w1"], &eu)
            })?;
            std::thread::sleep(Duration::from_secs(8));
            let (lost, _) = stop(flows, "both clusters rotate at once")?;
            Ok(vec![("wireguard-rotation-both-lost", lost as f64, "packets")])
        })?;
        Ok(())
    });
}

#[test]
fn a_worker_killed_in_the_midst_goes_on() {
    scenario_alone("a_worker_killed_in_the_midst_goes_on", LIMIT, || {
        let lab = up()?;
        let us = keys(&lab, "us-east")?;
        event(&lab, &["us-gw1"], || {
            let flows = flows(&lab)?;
            std::thread::sleep(Duration::from_secs(2));
            lab.tombolo("us-gw1", &["rotate", "wireguard", "us-gw1", "--wait", "0"])?;
            // Some of its peers know by then, some do not.
            let begun = Instant::now();
            let mut killed = 0;
            while begun.elapsed() < Duration::from_millis(600) {
                std::thread::sleep(Duration::from_millis(150));
                killed += kill_workers(&lab, "us-gw1")?;
            }
            ensure!(killed > 3, "{killed} workers were killed");
            wait_until("the new keys in use", SOON, || in_use(&lab, "us-east", &["us-gw1"], &us))?;
            std::thread::sleep(Duration::from_secs(5));
            let (_, gap) = stop(flows, &format!("us-gw1 rotates, {killed} times a worker was killed"))?;
            lab.everybody_reaches_everybody()?;
            Ok(vec![("wireguard-rotation-killed", gap, "ms")])
        })?;
        Ok(())
    });
}

#[test]
fn a_rotation_that_others_hear_of_late_cuts_nobody_off() {
    scenario_alone("a_rotation_that_others_hear_of_late_cuts_nobody_off", LIMIT * 2, || {
        let lab = up()?;
        let us = keys(&lab, "us-east")?;
        let previous = |expected: bool| -> Result<()> {
            let there = lab.state_dir("us-gw1").join("keys/tombolo1.previous").exists();
            ensure!(there == expected, "us-gw1's previous key is there: {there}");
            Ok(())
        };
        event(&lab, &[], || {
            let flows = flows(&lab)?;
            std::thread::sleep(Duration::from_secs(2));
            lab.kill("broker", "broker")?;
            eprint!("{}", lab.tombolo("us-gw1", &["rotate", "wireguard", "us-gw1"])?);
            // Those of the other cluster know the old key alone: longer than a session lives.
            std::thread::sleep(Duration::from_secs(if strict() { 240 } else { 8 }));
            previous(true)?;
            // One that starts meanwhile still knows whose the old key is.
            lab.kill_child("eu-gw1", "agent")?;
            std::thread::sleep(Duration::from_secs(2));
            lab.restart("broker", "broker")?;
            lab.wait_ready()?;
            wait_until("the new keys in use", SOON, || in_use(&lab, "us-east", &["us-gw1"], &us))?;
            std::thread::sleep(Duration::from_secs(2));
            let (lost, _) = stop(flows, "rotation while the broker is away")?;
            Ok(vec![("wireguard-rotation-late-lost", lost as f64, "packets")])
        })?;
        if strict() {
            wait_until("the previous key's end", Duration::from_secs(300), || previous(false))?;
            lab.everybody_reaches_everybody()?;
        }
        Ok(())
    });
}

/// SIGKILL to the workers of all devices of a node, each once.
fn kill_workers(lab: &Lab, node: &str) -> Result<u32> {
    let net = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    let home = net(&lab.pid(node, "wireguard")?.to_string())?;
    let mut killed = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<_> = line.split(|b| *b == 0).collect();
        if words.get(1) == Some(&&b"worker"[..])
            && net(&name).is_ok_and(|n| n == home)
            && let Ok(pid) = name.parse()
        {
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            killed += 1;
        }
    }
    Ok(killed)
}
