//! Nodes and gateways that come and go, ten a minute.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tombolo_lab::{Lab, measured, scenario_alone, strict, wait_until};

use super::common::{
    SOON, Shape, acquainted, every_node_reaches_every_other, kernel, names, peers, since, up,
};

const LIMIT: Duration = Duration::from_secs(900);
/// Ten a minute.
const EVERY: Duration = Duration::from_secs(6);
/// A gateway that dies may cost a flow so long.
/// By what should cost nothing: no more than a busy machine takes itself.
const GAP_OF_OTHERS_MS: f64 = 5000.0;

struct Flows(Vec<(String, tombolo_lab::Flow)>);

/// Between pods of nodes that stay.
fn flows(lab: &Lab) -> Result<Flows> {
    let mut flows = Vec::new();
    for (from, to) in [("eu-p1", "us-p1"), ("us-p1", "eu-g1"), ("us-g1", "eu-p1")] {
        let pod = lab.topology().pod(to)?;
        for to_address in [pod.v4.into(), pod.v6.into()] {
            flows.push((format!("{from} -> {to_address}"), lab.udp_flow(from, to_address, 200)?));
        }
    }
    Ok(Flows(flows))
}

impl Flows {
    /// The largest gap, and how many were lost.
    fn stop(self, title: &str) -> Result<(f64, u64)> {
        let (mut worst, mut lost) = (0.0_f64, 0);
        // Each waits a second for what is under way.
        let reports: Vec<_> = std::thread::scope(|scope| {
            let stop =
                |(name, flow): (String, tombolo_lab::Flow)| scope.spawn(move || (name, flow.stop_udp()));
            let threads: Vec<_> = self.0.into_iter().map(stop).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (name, report) in reports {
            let report = report?;
            if report.lost > 0 {
                eprintln!(
                    "{title}: {name}: {} of {} lost, largest gap {:.0} ms",
                    report.lost, report.sent, report.largest_gap_ms
                );
            }
            worst = worst.max(report.largest_gap_ms);
            lost += report.lost;
        }
        eprintln!("{title}: {lost} lost, largest gap {worst:.0} ms");
        Ok((worst, lost))
    }
}

fn whole(lab: &Lab) -> Result<()> {
    acquainted(lab, |node| match node {
        "eu-gw1" | "eu-gw2" => 4,
        "us-gw1" | "us-gw2" => 5,
        _ => 2,
    })
}

#[test]
fn nodes_come_and_go() {
    scenario_alone("churn::nodes_come_and_go", LIMIT, || {
        let lab = up(&[Shape::of(2, 1), Shape::of(2, 2)])?;
        whole(&lab)?;
        // Tunnels of some age, as those of a cluster that runs.
        std::thread::sleep(Duration::from_secs(12));
        let names_of: Vec<_> = lab.topology().nodes().map(|n| n.name.clone()).collect();
        let keys = || -> Result<Vec<usize>> {
            names_of.iter().map(|n| Ok(peers(n)?.values().map(|p| p.len()).sum())).collect()
        };
        let before = keys()?;

        // Not us-w1, eu-w1 and the first gateways: between them are the flows.
        let movers = ["us-w2", "us-gw2", "us-w2", "us-gw2", "eu-gw2"];
        let events: u32 = if strict() { 50 } else { 5 };
        let (mut deaths, mut others, mut gap_of_others) = (Vec::new(), 0, 0.0_f64);
        let begun = Instant::now();
        for event in 0..events {
            let gone = movers.iter().find(|node| !lab.has_node(node));
            let node = gone.copied().unwrap_or(movers[usize::try_from(event)? / 2 % movers.len()]);
            let flows = flows(&lab)?;
            std::thread::sleep(Duration::from_secs(1));
            let comes = !lab.has_node(node);
            let title = format!("{node} {}", if comes { "comes" } else { "goes" });
            if comes {
                lab.give_node(node)?
            } else {
                lab.take_node(node)?
            }
            std::thread::sleep(
                (EVERY * (event + 1)).saturating_sub(begun.elapsed() + Duration::from_millis(1300)),
            );
            let (gap, lost) = flows.stop(&title)?;
            if node.contains("gw") && !comes {
                deaths.push(gap);
            } else {
                others += lost;
                gap_of_others = gap_of_others.max(gap);
            }
        }
        let worst = deaths.iter().copied().fold(0.0, f64::max);
        eprintln!(
            "{events} changes in {:.0} s: gateways that went cost {worst:.0} ms at most, everything else {others} packets",
            begun.elapsed().as_secs_f64()
        );
        measured("churn-gateway-goes", worst, "ms")?;
        // A landing's machine is shared, and may lose some to its load.
        ensure!(!strict() || others == 0, "{others} packets lost by what costs nothing");
        ensure!(gap_of_others < GAP_OF_OTHERS_MS, "a gap of {gap_of_others:.0} ms by what costs nothing");

        for node in movers {
            if !lab.has_node(node) {
                lab.give_node(node)?;
            }
        }
        lab.wait_ready()?;
        let start = Instant::now();
        wait_until("everybody", SOON, || every_node_reaches_every_other(&lab))?;
        wait_until("names", SOON, || names(&lab))?;
        whole(&lab)?;
        eprintln!("whole again after {:.0} ms", since(start));
        // As a fresh start would have it: no device, key or route too many or too few.
        wait_until("as many peers as before", SOON, || {
            let after = keys()?;
            ensure!(after == before, "{names_of:?} had {before:?} peers and have {after:?}");
            Ok(())
        })?;
        for node in &names_of {
            let state = kernel(&lab, node)?;
            lab.kill_child(node, "agent")?;
            lab.wait_ready()?;
            let fresh = kernel(&lab, node)?;
            ensure!(state == fresh, "{node} had\n{state}\nand a new agent makes it\n{fresh}");
        }
        Ok(())
    });
}
