//! Clusters of which only one side can be reached.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tombolo_lab::{Flow, Lab, measured, scenario_alone, strict, wait_until};

use super::common::{SOON, Shape, every_node_reaches_every_other, names, since, topology, uapi};

const LIMIT: Duration = Duration::from_secs(300);

/// Nothing that the others start gets to eu's nodes; with `ports`, they are also seen as the wire, at these UDP ports.
fn guard(lab: &Lab, ports: Option<&str>) -> Result<()> {
    let mut nat = String::new();
    if let Some(ports) = ports {
        for (ip, lan) in [("ip", "172.30.1.0/24"), ("ip6", "fd00:30:1::/64")] {
            nat +=
                &format!("  {ip} saddr {lan} {ip} daddr != {lan} meta l4proto udp masquerade to :{ports}\n");
            nat += &format!("  {ip} saddr {lan} {ip} daddr != {lan} masquerade\n");
        }
    }
    lab.wire().nft(&format!(
        "table inet guard {{}}\nflush table inet guard\ntable inet guard {{\n \
         chain forward {{\n  type filter hook forward priority filter - 1; policy accept;\n  \
         oifname \"c1\" ct state established,related accept\n  oifname \"c1\" iifname != \"c1\" drop\n }}\n \
         chain nat {{\n  type nat hook postrouting priority srcnat; policy accept;\n{nat} }}\n}}\n"
    ))
}

fn up(ports: Option<&str>) -> Result<Lab> {
    let lab = Lab::build(topology(&[Shape::of(1, 1), Shape::of(1, 1)])?)?;
    guard(&lab, ports)?;
    lab.bring_up()?;
    for cluster in ["eu", "us"] {
        lab.export(cluster, "production", &format!("svc-{cluster}"))?;
    }
    wait_until("tunnels", SOON, || every_node_reaches_every_other(&lab))?;
    wait_until("names", SOON, || names(&lab))?;
    Ok(lab)
}

/// Whose flows run through an event.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// Both sides start some.
    Both,
    /// The side that cannot be reached only answers.
    Far,
}

fn flows(lab: &Lab, by: By) -> Result<Vec<(&'static str, Flow)>> {
    let of = |pod: &str| lab.topology().pod(pod);
    let mut flows = vec![
        ("us -> eu", lab.udp_flow("us-p1", of("eu-p1")?.v4.into(), 100)?),
        ("us -> eu, IPv6", lab.udp_flow("us-g1", IpAddr::from(of("eu-g1")?.v6), 100)?),
    ];
    if by == By::Both {
        flows.push(("eu -> us", lab.udp_flow("eu-p1", of("us-p1")?.v4.into(), 100)?));
    }
    Ok(flows)
}

/// What an event costs, and that everything passes after it.
fn event(lab: &Lab, title: &str, by: By, happen: impl FnOnce() -> Result<()>) -> Result<(f64, u64)> {
    let flows = flows(lab, by)?;
    std::thread::sleep(Duration::from_secs(2));
    happen()?;
    let start = Instant::now();
    // What starts on the other side would itself wake the tunnel.
    if by == By::Far {
        std::thread::sleep(Duration::from_secs(4));
    }
    wait_until("both ways again", Duration::from_secs(60), || every_node_reaches_every_other(lab))
        .with_context(|| title.to_owned())?;
    eprintln!("{title}: everything passes after {:.0} ms at most", since(start));
    std::thread::sleep(Duration::from_secs(1));
    let (mut worst, mut lost) = (0.0_f64, 0);
    for (name, flow) in flows {
        let report = flow.stop_udp()?;
        eprintln!(
            "{title}: {name}: {} sent, {} lost, largest gap {:.0} ms",
            report.sent, report.lost, report.largest_gap_ms
        );
        ensure!(report.returned > 0, "{title}: {name}: nothing came back");
        worst = worst.max(report.largest_gap_ms);
        lost += report.lost;
    }
    eprintln!("{title}: worst gap {worst:.0} ms");
    Ok((worst, lost))
}

fn restarts(lab: &Lab) -> Result<()> {
    for node in ["eu-gw1", "us-gw1"] {
        let (gap, lost) =
            event(lab, &format!("agent of {node} anew"), By::Both, || lab.kill_child(node, "agent"))?;
        ensure!(!strict() || lost == 0, "the agent of {node} cost {lost} packets");
        ensure!(gap < 5000.0, "the agent of {node} cost {gap:.0} ms");
    }
    for node in ["eu-gw1", "us-gw1"] {
        let (gap, _) = event(lab, &format!("devices of {node} anew"), By::Both, || {
            lab.kill_tree(node, "wireguard")?;
            lab.restart(node, "wireguard")
        })?;
        ensure!(gap < 20_000.0, "the devices of {node} cost {gap:.0} ms");
    }
    Ok(())
}

#[test]
fn behind_a_firewall() {
    scenario_alone("nat::behind_a_firewall", LIMIT, || restarts(&up(None)?));
}

#[test]
fn behind_a_nat() {
    scenario_alone("nat::behind_a_nat", LIMIT, || {
        let lab = up(Some("20000-29999"))?;
        if strict() {
            restarts(&lab)?;
        }
        let rounds = [("30000-39999", By::Both), ("40000-49999", By::Far), ("20000-29999", By::Far)];
        for (round, (ports, by)) in rounds.into_iter().enumerate() {
            let title = format!(
                "round {round}, the NAT forgets{}",
                if by == By::Far { ", far flows alone" } else { "" }
            );
            let (gap, _) = event(&lab, &title, by, || {
                guard(&lab, Some(ports))?;
                lab.wire().capture(&["conntrack", "-F"]).map(drop)
            })?;
            measured("nat-forgets", gap, "ms")?;
            let seen = endpoints("us-gw1")?;
            let (low, high) = ports.split_once('-').context("a range")?;
            let (low, high): (u16, u16) = (low.parse()?, high.parse()?);
            let new = |e: &SocketAddr| (low..=high).contains(&e.port());
            ensure!(seen.iter().any(new), "us-gw1 sees its peers at {seen:?}, not at {ports}");
        }
        // Where us sees eu's gateway is where others may find it.
        wait_until("eu to tell where it is seen", Duration::from_secs(90), || {
            let told = lab.tombolo("eu-gw1", &["status", "-o", "wide"])?;
            ensure!(told.contains("172.30.2.254"), "not where the NAT is:\n{told}");
            Ok(())
        })?;
        Ok(())
    });
}

/// Where a node's devices have their peers of other clusters.
fn endpoints(node: &str) -> Result<Vec<SocketAddr>> {
    Ok(uapi(node, "endpoint")?.iter().filter_map(|e| e.parse().ok()).collect())
}
