//! Nothing is lost when a program that only decides goes away: the broker, the agent.

use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::topology::{NAMESERVER, TWO, Topology};
use tombolo_lab::{Flow, Lab, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(20);
const API: &str = "api-service.production.svc.clusterset.local";

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(TWO)?)?;
    lab.bring_up()?;
    lab.export("eu-west", "production", "api-service")?;
    wait_until("the name", SOON, || lab.fetch("us-c", &format!("http://{API}:8080/health"), &[]).map(drop))?;
    Ok(lab)
}

/// From pods on a gateway and on a worker, both families.
fn flows(lab: &Lab) -> Result<Vec<Flow>> {
    let backend = lab.topology().pod("eu-c")?;
    Ok(vec![
        lab.udp_flow("us-c", backend.v4.into(), 1000)?,
        lab.udp_flow("us-a", backend.v6.into(), 1000)?,
        lab.dns_flow("us-c", &format!("{NAMESERVER}:53"), API, 1, 1000)?,
    ])
}

fn nothing_lost(flows: Vec<Flow>) -> Result<()> {
    for flow in flows {
        match flow.stop()? {
            tombolo_lab::probe::Report::Udp(report) => {
                ensure!(report.sent > 1000 && report.lost == 0 && report.duplicated == 0, "{report:?}");
            }
            tombolo_lab::probe::Report::Dns(report) => {
                ensure!(report.sent > 1000 && report.refused == 0 && report.unanswered == 0, "{report:?}");
                ensure!(report.answers.keys().eq([&0]) && report.empty == 0, "{report:?}");
            }
            tombolo_lab::probe::Report::Tcp(report) => ensure!(report.broken.is_none(), "{report:?}"),
        }
    }
    Ok(())
}

/// Routes, rules, peers and firewall of a node, as text without counters.
fn kernel(lab: &Lab, node: &str) -> Result<String> {
    let place = lab.place(node)?;
    let mut text = String::new();
    for args in [
        &["ip", "route", "show", "table", "all", "proto", "98"][..],
        &["ip", "-6", "route", "show", "table", "all", "proto", "98"],
        &["ip", "rule", "show"],
        &["ip", "-6", "rule", "show"],
        &["nft", "-s", "list", "table", "inet", "tombolo"],
    ] {
        text += &place.capture(args)?;
    }
    Ok(text)
}

#[test]
fn a_broker_that_dies_or_forgets_takes_nothing_away() {
    scenario("a_broker_that_dies_or_forgets_takes_nothing_away", LIMIT, || {
        let lab = up()?;
        let nodes: Vec<_> = lab.topology().nodes().map(|n| n.name.clone()).collect();
        let before: Vec<_> = nodes.iter().map(|n| kernel(&lab, n)).collect::<Result<_>>()?;
        let flows = flows(&lab)?;
        lab.kill("broker", "broker")?;
        // The event itself: the broker is away for so long.
        std::thread::sleep(Duration::from_secs(30));
        lab.restart("broker", "broker")?;
        lab.wait_ready()?;
        lab.kill("broker", "broker")?;
        std::fs::remove_dir_all(lab.state_dir("broker").join("data"))?;
        lab.restart("broker", "broker")?;
        lab.wait_ready()?;
        nothing_lost(flows)?;
        for (node, before) in nodes.iter().zip(before) {
            let after = kernel(&lab, node)?;
            ensure!(after == before, "{node} changed:\n{before}\nto\n{after}");
        }
        // The emptied broker knows everybody again: news passes through it.
        lab.export("us-east", "production", "web")?;
        wait_until("news through the refilled broker", SOON, || {
            let url = "http://web.production.svc.clusterset.local:8080/health";
            lab.fetch("eu-c", url, &["--timeout", "2"]).map(drop)
        })?;
        Ok(())
    });
}

#[test]
fn an_agent_killed_ten_times_loses_nothing() {
    scenario("an_agent_killed_ten_times_loses_nothing", LIMIT, || {
        let lab = up()?;
        let flows = flows(&lab)?;
        for round in 0..10 {
            // The client's node answers its names; a gateway carries its packets.
            let node = if round % 2 == 0 { "us-w1" } else { "us-gw1" };
            let before = lab.child_pid(node, "agent")?;
            let state = kernel(&lab, node)?;
            let mut monitor = lab.place(node)?.command("ip");
            monitor.args(["monitor", "link", "address", "route", "rule"]);
            let mut monitor = monitor.stdout(std::process::Stdio::piped()).spawn()?;
            lab.kill_child(node, "agent")?;
            wait_until("the holder to start another", SOON, || {
                ensure!(lab.child_pid(node, "agent")? != before, "the old one is still there");
                Ok(())
            })?;
            lab.wait_ready()?;
            monitor.kill()?;
            let changes = String::from_utf8_lossy(&monitor.wait_with_output()?.stdout).into_owned();
            ensure!(changes.is_empty(), "the restarted agent of {node} changed:\n{changes}");
            let after = kernel(&lab, node)?;
            ensure!(after == state, "{node} changed:\n{state}\nto\n{after}");
        }
        nothing_lost(flows)
    });
}
