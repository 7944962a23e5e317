//! From the manifest to the name: p99 under a second. `tombolo-lab measure propagation` prints the same figures.

#![allow(clippy::print_stderr)]

use std::time::Duration;

use anyhow::ensure;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, measure, scenario};

#[test]
fn an_export_is_known_and_forgotten_within_a_second() {
    scenario("an_export_is_known_and_forgotten_within_a_second", Duration::from_secs(240), || {
        let lab = Lab::build(Topology::parse(TWO)?)?;
        lab.bring_up()?;
        let figures = measure::propagation(&lab, 20)?;
        eprintln!("{figures}");
        ensure!(figures.export.max_ms < 1000.0 && figures.unexport.max_ms < 1000.0, "{figures}");
        Ok(())
    });
}
