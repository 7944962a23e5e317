//! How a test gets its own lab.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sandbox::Sandbox;

/// Runs a test's body inside a sandbox of its own, and fails with it. `name` is the test function's name, by which the
/// test program, started again inside, finds it.
///
/// # Panics
/// If the body fails, takes longer than `within`, or the machine has no namespaces for us (a lab test is never
/// skipped in silence).
pub fn scenario(name: &str, within: Duration, body: impl FnOnce() -> Result<()>) {
    let outcome =
        if Sandbox::inside() { Sandbox::prepare().and_then(|()| body()) } else { outside(name, within) };
    if let Err(error) = outcome {
        panic!("{name}: {error:#}");
    }
}

fn outside(name: &str, within: Duration) -> Result<()> {
    let args = [name, "--exact", "--nocapture", "--test-threads=1", "--include-ignored"].map(OsString::from);
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
