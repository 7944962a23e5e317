//! The upstream conformance suite of the Multi-Cluster Services API.

use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::kubernetes::conformance;
use tombolo_lab::topology::Proxy;
use tombolo_lab::{Lab, scenario_kubernetes};

/// How many tests the suite of tests/kube/conformance has; two of them are known to be wrong and skipped.
const TESTS: usize = 18;
const SKIPPED: usize = 2;

/// Runs the suite on two clusters; prints a line for each test. Exactly what is known to be open may fail.
#[allow(clippy::print_stdout)]
fn conforms(proxy: Proxy) -> Result<()> {
    let lab = Lab::build(conformance::topology(2, proxy)?)?;
    lab.bring_up()?;
    let outcome = conformance::run(&lab)?;
    outcome.lines.iter().for_each(|line| println!("{line}"));
    let (passed, ran) = outcome.score();
    println!("{passed} of {ran} passed");
    ensure!(
        outcome.broken().is_empty(),
        "other tests fail than the one that is open: {:?}",
        outcome.broken()
    );
    ensure!(passed + 1 == ran, "the test that is open passes: say so no more");
    ensure!(ran + SKIPPED == TESTS, "{ran} of {TESTS} tests ran");
    Ok(())
}

#[test]
fn two_clusters_conform() {
    scenario_kubernetes("two_clusters_conform", Duration::from_secs(900), || conforms(Proxy::Nftables));
}
