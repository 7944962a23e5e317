//! Surroundings that are not ours: a firewall that drops, nodes whose addresses lie inside the grant.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);

fn up(topology: &str) -> Result<Lab> {
    let lab = Lab::build(Topology::parse(topology)?)?;
    lab.bring_up()?;
    Ok(lab)
}

/// `check` finds the chain and prints the lines; whoever runs them is cured.
#[test]
fn check_cures_a_foreign_drop() {
    scenario("check_cures_a_foreign_drop", LIMIT, || {
        let lab = up(&TWO.replace("    pod_cidrs", "    reach: all\n    forward: drop\n    pod_cidrs"))?;
        let url = format!("http://{}:8080/health", lab.topology().pod("us-c")?.v4);
        ensure!(lab.fetch("eu-c", &url, &["--timeout", "2"]).is_err(), "the policy drop did not drop");
        for node in lab.topology().nodes() {
            for line in remedies(&lab, &node.name)? {
                lab.place(&node.name)?.capture(&["sh", "-c", &line])?;
            }
            ensure!(remedies(&lab, &node.name)?.is_empty(), "check of {} still finds a drop", node.name);
        }
        wait_until("everybody to reach everybody", SOON, || lab.everybody_reaches_everybody()).map(drop)
    });
}

/// The cures of failed checks of the firewall on a node.
fn remedies(lab: &Lab, node: &str) -> Result<Vec<String>> {
    let mut command = lab.command(node, &tombolo_lab::program::tombolo(&["check", "-o", "json"])?)?;
    let output = command.output()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("the report of check")?;
    let checks = report["checks"].as_array().context("checks")?;
    let failed: Vec<_> =
        checks.iter().filter(|c| c["category"] == "firewall" && c["verdict"] == "failure").collect();
    ensure!(output.status.success() == failed.is_empty(), "exit code {} with {failed:?}", output.status);
    let lines = failed.iter().filter_map(|c| c["remedy"].as_array()).flatten();
    Ok(lines.filter_map(|l| l.as_str().map(str::to_owned)).collect())
}

/// Peers' UDP addresses lie inside their grants.
#[test]
fn flat_networks_are_joined() {
    scenario("flat_networks_are_joined", LIMIT, || {
        let lab = up(&TWO.replace("    pod_cidrs", "    reach: all\n    flat: true\n    pod_cidrs"))?;
        let watch = lab.watch_wire()?;
        wait_until("everybody to reach everybody", SOON, || lab.everybody_reaches_everybody())?;
        watch.seen().assert_protected()
    });
}
