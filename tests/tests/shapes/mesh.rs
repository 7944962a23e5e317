//! Topology `mesh`: nodes to nodes, and over the gateways where that does not carry.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tombolo_lab::fault::Fault;
use tombolo_lab::{Lab, measured, program, scenario_alone, strict, wait_until};

use super::common::{SOON, Shape, bytes, since, slots, up};

const LIMIT: Duration = Duration::from_secs(300);

/// Bytes that a place's tunnel devices sent.
fn sent(lab: &Lab, place: &str) -> Result<u64> {
    Ok(bytes(lab, place)?
        .iter()
        .filter(|(name, _)| name.starts_with("tombolo"))
        .map(|(_, (_, sent))| sent)
        .sum())
}

fn on(lab: &Lab, node: &str, prefix: &str, wanted: &[&str]) -> Result<()> {
    let slots = slots(lab, node, prefix)?;
    ensure!(slots == wanted, "{node} has {slots:?} towards {prefix}");
    Ok(())
}

/// What `tombolo explain` on eu-w1 tells of the peers on the way to a pod.
fn peer(lab: &Lab, pod: Ipv4Addr, outcome: &str, say: &str) -> Result<()> {
    let words = ["explain", "-o", "json", &format!("{pod}:8080")];
    let output = lab.command("eu-w1", &program::tombolo(&words)?)?.output()?;
    let told: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let steps = told["steps"].as_array().context("steps")?;
    let step = steps.iter().find(|step| step["step"] == "peer").with_context(|| format!("{told:#}"))?;
    let said = step["message"].as_str().unwrap_or_default();
    ensure!(step["outcome"] == outcome && said.contains(say), "{told:#}");
    Ok(())
}

/// eu and us are meshed, as is not. eu-w1 has 10.1.2.0/24, us-w1 10.2.2.0/24.
#[test]
fn meshed_nodes_need_no_gateway() {
    scenario_alone("mesh::meshed_nodes_need_no_gateway", LIMIT, || {
        let meshed = Shape { lines: "topology: mesh", ..Shape::of(1, 1) };
        let lab = up(&[meshed.clone(), meshed, Shape::of(1, 1)])?;
        let direct = || -> Result<()> {
            for (node, prefix) in [
                ("eu-w1", "10.2.2.0/24"),
                ("eu-w1", "fd00:10:2:2::/64"),
                ("us-w1", "10.1.2.0/24"),
                ("us-gw1", "10.1.2.0/24"),
            ] {
                on(&lab, node, prefix, &["tombolo0"])?;
            }
            on(&lab, "eu-w1", "10.2.1.0/24", &["tombolo1"])
        };
        wait_until("direct ways", SOON, direct)?;
        // What no node is known to have, and clusters that are not meshed, over the own gateways.
        on(&lab, "eu-w1", "10.2.0.0/16", &["tombolo5"])?;
        on(&lab, "eu-w1", "10.3.0.0/16", &["tombolo5"])?;
        on(&lab, "eu-w1", "10.3.2.0/24", &[])?;
        on(&lab, "as-w1", "10.1.2.0/24", &[])?;
        super::common::every_node_reaches_every_other(&lab)?;

        let us = lab.topology().pod("us-p1")?;
        wait_until("explain to know of the direct way", SOON, || peer(&lab, us.v4, "ok", "us/us-w1 at "))?;
        let flows = || -> Result<_> {
            Ok([
                lab.udp_flow("eu-p1", us.v4.into(), 500)?,
                lab.udp_flow("eu-p1", us.v6.into(), 500)?,
                lab.udp_flow("us-p1", lab.topology().pod("eu-p1")?.v4.into(), 500)?,
            ])
        };
        let (gw, worker) = (sent(&lab, "eu-gw1")? + sent(&lab, "us-gw1")?, sent(&lab, "eu-w1")?);
        let running = flows()?;
        std::thread::sleep(Duration::from_secs(3));
        let (gw, worker) =
            (sent(&lab, "eu-gw1")? + sent(&lab, "us-gw1")? - gw, sent(&lab, "eu-w1")? - worker);
        eprintln!("sent in 3 s: {worker} bytes by eu-w1, {gw} by both gateways");
        ensure!(worker > 200_000 && gw < 50_000, "{worker} bytes by eu-w1, {gw} by the gateways");

        // Their own way is cut: over the gateways.
        lab.fault(Fault::Cut { a: "eu-w1".into(), b: "us-w1".into() })?;
        let start = Instant::now();
        wait_until("the direct way to be left", SOON, || {
            on(&lab, "eu-w1", "10.2.2.0/24", &[])?;
            on(&lab, "us-w1", "10.1.2.0/24", &[])
        })?;
        eprintln!("direct way left after {:.0} ms", since(start));
        std::thread::sleep(Duration::from_secs(2));
        let mut worst = 0.0_f64;
        for flow in running {
            let report = flow.stop_udp()?;
            eprintln!(
                "cut: {} sent, {} lost, largest gap {:.0} ms",
                report.sent, report.lost, report.largest_gap_ms
            );
            worst = worst.max(report.largest_gap_ms);
        }
        measured("mesh-falls-back", worst, "ms")?;
        wait_until("explain to miss the direct way", SOON, || {
            peer(&lab, us.v4, "warning", "silent: us/us-w1 by tombolo0, which would be direct")
        })?;
        lab.reaches("eu-p1", lab.topology().pod("eu-p1")?.v4.into(), us.v4.into())?;

        // And back, without a loss.
        let running = flows()?;
        std::thread::sleep(Duration::from_millis(500));
        lab.heal()?;
        let took = wait_until("direct ways again", SOON, direct)?;
        std::thread::sleep(Duration::from_millis(500));
        let mut lost = 0;
        for flow in running {
            lost += flow.stop_udp()?.lost;
        }
        eprintln!("mesh returns after {:.0} ms, {lost} packets lost", took.as_secs_f64() * 1e3);
        ensure!(lost <= if strict() { 0 } else { 20 }, "{lost} packets lost on the way back");

        // Without any own gateway, through the gateways at the other end: pods of us-gw1 are direct, this is for the rest.
        lab.reaches("us-p1", lab.topology().pod("us-p1")?.v4.into(), lab.topology().pod("eu-g1")?.v4.into())
    });
}
