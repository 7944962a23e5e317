//! The smallest clusters, and the ones with the most gateways.

use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::{scenario, wait_until};

use super::common::{SOON, Shape, acquainted, bytes, findings, slots, up};

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

/// Three gateways a side carry, each of them; a fourth one that is labelled is told about and carries nothing.
#[test]
fn three_gateways_all_carry() {
    scenario("small::three_gateways_all_carry", LIMIT, || {
        let lab = up(&[Shape { pods: 6, ..Shape::of(4, 1) }, Shape { pods: 6, ..Shape::of(3, 1) }])?;
        acquainted(&lab, |node| match node {
            "eu-w1" | "us-w1" | "eu-gw4" => 3,
            _ => 6,
        })?;
        for (node, prefix) in
            [("eu-w1", "10.2.0.0/16"), ("us-w1", "10.1.0.0/16"), ("eu-gw4", "fd00:10:2::/48")]
        {
            let slots = slots(&lab, node, prefix)?;
            ensure!(slots == ["tombolo5", "tombolo6", "tombolo7"], "{node} has {slots:?} towards {prefix}");
        }
        let slots = slots(&lab, "us-gw2", "10.1.0.0/16")?;
        ensure!(slots == ["tombolo1", "tombolo2", "tombolo3"], "{slots:?}");
        wait_until("the fourth to be told about", SOON, || {
            let mut all = String::new();
            for node in lab.topology().nodes().filter(|n| n.cluster == "eu") {
                all += &findings(&lab, &node.name)?;
            }
            ensure!(all.contains("TooManyGateways") && all.contains("eu-gw4"), "{all}");
            Ok(())
        })?;

        let before: Vec<_> = lab.topology().nodes().map(|n| bytes(&lab, &n.name)).collect::<Result<_>>()?;
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
        for flow in flows {
            let report = flow.stop_udp()?;
            ensure!(report.sent > 50, "{report:?}");
            lost += report.lost;
        }
        ensure!(lost == 0, "{lost} packets lost");
        for (node, before) in lab.topology().nodes().zip(before) {
            let after = bytes(&lab, &node.name)?;
            let carried = |device: &str| {
                let grown = |all: &std::collections::BTreeMap<String, (u64, u64)>| {
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
                "eu-gw4" => ensure!(carries.iter().sum::<u64>() < 50_000, "eu-gw4: {carries:?}"),
                name => {
                    ensure!(carries[1..4].iter().sum::<u64>() > 50_000, "{name}: {carries:?}");
                    ensure!(carries[4] > 50_000, "{name}: {carries:?}");
                }
            }
        }
        Ok(())
    });
}
