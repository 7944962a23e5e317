//! The smallest clusters, and the ones with the most gateways.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use tombolo_lab::fault::Fault;
use tombolo_lab::{measured, scenario, scenario_alone, wait_until};

use super::common::{SOON, Shape, acquainted, busy, bytes, findings, slots, up};

const LIMIT: Duration = Duration::from_secs(300);

/// A cluster whose one node is its gateway, by label or not; one with a single gateway: each with each of the others.
#[test]
fn one_node_is_a_cluster() {
    scenario("small::one_node_is_a_cluster", LIMIT, || {
        let lab = up(&[Shape::of(1, 0), Shape { unlabelled: true, ..Shape::of(1, 0) }, Shape::of(1, 1)])?;
        for (node, prefix) in
            [("eu-gw1", "10.2.0.0/16"), ("us-gw1", "10.3.0.0/16"), ("as-gw1", "fd00:10:1::/48")]
        {
            let slots = slots(&lab, node, prefix)?;
            ensure!(slots == ["tombolo1"], "{node} has {slots:?} towards {prefix}");
        }
        // Nobody to lean on: the only node stays alone after its agent is new, too.
        for node in ["eu-gw1", "us-gw1"] {
            lab.kill_child(node, "agent")?;
        }
        lab.wait_ready()?;
        lab.everybody_reaches_everybody()
    });
}

/// Three gateways a side carry, each of them; a fourth one that is labelled is told about and carries nothing. Each device
/// is a thread, so that as many processors carry.
#[test]
fn three_gateways_all_carry() {
    scenario("small::three_gateways_all_carry", LIMIT, || {
        let lab = up(&[Shape { pods: 6, ..Shape::of(4, 1) }, Shape { pods: 6, ..Shape::of(3, 1) }])?;
        // Ranks are given as agents come: any of the four may be the last.
        let mut fourth = String::new();
        wait_until("the fourth to be told about", SOON, || {
            for node in lab.topology().nodes().filter(|n| n.cluster == "eu") {
                let all: serde_json::Value = serde_json::from_str(&findings(&lab, &node.name)?)?;
                let told = all.as_array().into_iter().flatten().find(|f| f["reason"] == "TooManyGateways");
                if let Some(name) = told.and_then(|f| f["object"].as_str()?.strip_prefix("node eu/")) {
                    fourth = name.to_owned();
                    return Ok(());
                }
            }
            bail!("no finding TooManyGateways")
        })?;
        acquainted(&lab, |node| if node == fourth || ["eu-w1", "us-w1"].contains(&node) { 3 } else { 6 })?;
        for (node, prefix) in
            [("eu-w1", "10.2.0.0/16"), ("us-w1", "10.1.0.0/16"), (&fourth, "fd00:10:2::/48")]
        {
            let slots = slots(&lab, node, prefix)?;
            ensure!(slots == ["tombolo5", "tombolo6", "tombolo7"], "{node} has {slots:?} towards {prefix}");
        }
        let slots = slots(&lab, "us-gw2", "10.1.0.0/16")?;
        ensure!(slots == ["tombolo1", "tombolo2", "tombolo3"], "{slots:?}");
        let before: Vec<_> = lab.topology().nodes().map(|n| bytes(&lab, &n.name)).collect::<Result<_>>()?;
        let idle = busy(&lab, "eu-w1")?;
        let mut flows = Vec::new();
        for p in 1..=6 {
            for q in 1..=6 {
                let to = lab.topology().pod(&format!("us-p{q}"))?;
                let to = if q % 2 == 0 { to.v4.into() } else { to.v6.into() };
                flows.push(lab.udp_flow(&format!("eu-p{p}"), to, 20)?);
            }
        }
        std::thread::sleep(Duration::from_secs(5));
        let mut lost = 0;
        // Each waits a second for what is under way.
        let reports: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = flows.into_iter().map(|f| scope.spawn(move || f.stop_udp())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for report in reports {
            let report = report?;
            ensure!(report.sent > 50, "{report:?}");
            lost += report.lost;
        }
        ensure!(lost == 0, "{lost} packets lost");
        let busy = busy(&lab, "eu-w1")?;
        let ran: Vec<f64> = ["tombolo5", "tombolo6", "tombolo7"]
            .map(|device| busy.get(device).unwrap_or(&0.0) - idle.get(device).unwrap_or(&0.0))
            .into();
        eprintln!("eu-w1: milliseconds of processor of tombolo5 to tombolo7: {ran:.1?}");
        let all: f64 = ran.iter().sum();
        ensure!(ran.iter().all(|ran| *ran > 0.1 * all), "one thread does all: {ran:?}");
        for (node, before) in lab.topology().nodes().zip(before) {
            let after = bytes(&lab, &node.name)?;
            let carried = |device: &str| {
                let grown = |all: &BTreeMap<String, (u64, u64)>| {
                    all.get(device).map_or(0, |(received, sent)| received + sent)
                };
                grown(&after) - grown(&before)
            };
            let carries: Vec<_> = (0..8).map(|n| carried(&format!("tombolo{n}"))).collect();
            eprintln!("{}: bytes of tombolo0 to tombolo7: {carries:?}", node.name);
            match node.name.as_str() {
                "eu-w1" | "us-w1" => {
                    ensure!(carries[5..8].iter().all(|n| *n > 50_000), "{}: {carries:?}", node.name)
                }
                name if name == fourth => {
                    ensure!(carries.iter().sum::<u64>() < 50_000, "{name}: {carries:?}")
                }
                name => {
                    ensure!(carries[1..4].iter().sum::<u64>() > 50_000, "{name}: {carries:?}");
                    ensure!(carries[4] > 50_000, "{name}: {carries:?}");
                }
            }
        }
        Ok(())
    });
}

/// A gateway whose own tunnels to a cluster are all dead says so, and its nodes leave its slot.
#[test]
fn a_gateway_says_what_it_cannot_reach() {
    scenario_alone("small::a_gateway_says_what_it_cannot_reach", LIMIT, || {
        let lab = up(&[Shape::of(2, 1), Shape::of(2, 1), Shape::of(1, 1)])?;
        acquainted(&lab, |node| match node {
            "eu-gw1" | "eu-gw2" | "us-gw1" | "us-gw2" => 5,
            "as-gw1" => 5,
            "as-w1" => 1,
            _ => 2,
        })?;
        let towards = |prefix: &str, wanted: &[&str]| -> Result<()> {
            let slots = slots(&lab, "eu-w1", prefix)?;
            ensure!(slots == wanted, "eu-w1 has {slots:?} towards {prefix}");
            Ok(())
        };
        let both = ["tombolo5", "tombolo6"];
        wait_until("both slots", SOON, || towards("10.2.0.0/16", &both))?;
        let mut flows = Vec::new();
        for (from, to) in [("eu-p1", "us-p1"), ("eu-p1", "us-g1"), ("us-p1", "eu-p1"), ("eu-p1", "us-g2")] {
            let pod = lab.topology().pod(to)?;
            flows.push(lab.udp_flow(from, pod.v4.into(), 500)?);
            flows.push(lab.udp_flow(from, pod.v6.into(), 500)?);
        }
        std::thread::sleep(Duration::from_secs(2));
        // Ranks are given as agents come: what leads eu-gw1 to the other gateway leads the worker there too.
        let inward = |name: &&str| ["tombolo5", "tombolo6"].contains(name);
        let links = bytes(&lab, "eu-gw1")?;
        let other: Vec<&str> = links.keys().map(String::as_str).filter(inward).collect();
        lab.fault(Fault::Cut { a: "eu-gw1".into(), b: "us".into() })?;
        let took = wait_until("the cut gateway's slot to be left", SOON, || towards("10.2.0.0/16", &other))?;
        eprintln!("the slot of a gateway that is cut off was left after {:.0} ms", took.as_secs_f64() * 1e3);
        // It reaches the third, and says nothing else.
        towards("10.3.0.0/16", &both)?;
        towards("fd00:10:3::/48", &both)?;
        std::thread::sleep(Duration::from_secs(2));
        let mut worst = 0.0_f64;
        for flow in flows {
            worst = worst.max(flow.stop_udp()?.largest_gap_ms);
        }
        measured("gateway-cut-off", worst, "ms")?;
        lab.heal()?;
        wait_until("both slots again", SOON, || towards("10.2.0.0/16", &both)).map(drop)
    });
}
