//! From the manifest to the name: p99 under a second. `tombolo-lab measure propagation` prints the same figures.

#![allow(clippy::print_stderr)]

use std::time::Duration;

use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, measure, measured, runs, scenario_alone};

#[test]
fn an_export_is_known_and_forgotten_within_a_second() {
    scenario_alone("an_export_is_known_and_forgotten_within_a_second", Duration::from_secs(240), || {
        let lab = Lab::build(Topology::parse(TWO)?)?;
        lab.bring_up()?;
        let figures = measure::propagation(&lab, u32::try_from(runs(20))?)?;
        eprintln!("{figures}");
        for time in &figures.export.all_ms {
            measured("export", *time, "ms")?;
        }
        for time in &figures.unexport.all_ms {
            measured("unexport", *time, "ms")?;
        }
        Ok(())
    });
}
