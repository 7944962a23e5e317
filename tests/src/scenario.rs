//! How a test gets its own lab.

use std::ffi::OsString;
use std::io::Write;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kubernetes;
use crate::sandbox::Sandbox;
use crate::scorecard::runs;

/// Tests of one file run side by side, but for those that measure times.
static MACHINE: RwLock<()> = RwLock::new(());

/// Runs a test's body inside a sandbox of its own, and fails with it. `name` is the test function's name, by which the
/// test program, started again inside, finds it. `within` is the time of one run, if the scorecard asks for several.
///
/// # Panics
/// If the body fails, takes longer than `within`, or the machine has no namespaces for us (a lab test is never
/// skipped in silence).
pub fn scenario(name: &str, within: Duration, body: impl FnOnce() -> Result<()>) {
    let _shared = (!Sandbox::inside()).then(|| MACHINE.read().unwrap_or_else(PoisonError::into_inner));
    run(name, within, body);
}

/// The same for a test that measures times: no other test of its file runs beside it.
///
/// # Panics
/// As [`scenario`].
pub fn scenario_alone(name: &str, within: Duration, body: impl FnOnce() -> Result<()>) {
    let _alone = (!Sandbox::inside()).then(|| MACHINE.write().unwrap_or_else(PoisonError::into_inner));
    run(name, within, body);
}

/// The same as [`scenario`] for a lab of `api: kubernetes`: where its programs are not there it says so, past the test
/// runner, and fails if `CI` is set.
///
/// # Panics
/// As [`scenario`].
pub fn scenario_kubernetes(name: &str, within: Duration, body: impl FnOnce() -> Result<()>) {
    if let Some(why) = kubernetes::missing() {
        assert!(std::env::var_os("CI").is_none(), "{name}: {why}");
        let _ = writeln!(std::io::stderr(), "\n{name} DID NOT RUN: {why}\n");
        return;
    }
    // Control planes take what two cores have: one lab at a time.
    scenario_alone(name, within, body);
}

fn run(name: &str, within: Duration, body: impl FnOnce() -> Result<()>) {
    let outcome =
        if Sandbox::inside() { Sandbox::prepare().and_then(|()| body()) } else { outside(name, within) };
    if let Err(error) = outcome {
        panic!("{name}: {error:#}");
    }
}

fn outside(name: &str, within: Duration) -> Result<()> {
    let args = [name, "--exact", "--nocapture", "--test-threads=1", "--include-ignored"].map(OsString::from);
    let within = within * u32::try_from(runs(1))?;
    let mut child = Sandbox::spawn(args.into(), None)?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("waiting for the lab")? {
            match status.code() {
                Some(0) => return Ok(()),
                _ => bail!("failed inside the lab ({status}): see above"),
            }
        }
        if start.elapsed() > within {
            child.kill()?;
            child.wait()?;
            bail!("took longer than {within:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
