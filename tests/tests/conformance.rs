//! The upstream conformance suite of the Multi-Cluster Services API.

use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::kubernetes::conformance;
use tombolo_lab::topology::Proxy;
use tombolo_lab::{Lab, scenario_kubernetes};

/// How many tests the suite of tests/kube/conformance has.
const TESTS: usize = 18;

/// Runs the suite; every test that wants no more clusters than there are has to pass. Prints a line for each.
#[allow(clippy::print_stdout)]
fn conforms(clusters: u8, proxy: Proxy) -> Result<()> {
    let lab = Lab::build(conformance::topology(clusters, proxy)?)?;
    lab.bring_up()?;
    let outcome = conformance::run(&lab)?;
    outcome.lines.iter().for_each(|line| println!("{line}"));
    let (passed, ran) = outcome.score();
    println!("{passed} of {ran} passed");
    // A suite that was given by TOMBOLO_CONFORMANCE may have more.
    ensure!(outcome.lines.len() >= TESTS, "the suite has {} tests", outcome.lines.len());
    ensure!(
        passed == ran && (clusters < 2 || ran == outcome.lines.len()),
        "{passed} of {ran} passed: see above"
    );
    Ok(())
}

#[test]
fn two_clusters_conform() {
    scenario_kubernetes("two_clusters_conform", Duration::from_secs(900), || conforms(2, Proxy::Nftables));
}
