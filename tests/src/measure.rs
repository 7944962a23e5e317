//! Measurements: the commands behind the numbers that the README promises.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::lab::Lab;
use crate::probe::{Question, ask, ms, percentile};
use crate::sandbox::interrupted;
use crate::topology::NAMESERVER;

/// How long one round may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Between two changes: brokers hear who says much more slowly, which is not what is measured.
const PAUSE: Duration = Duration::from_millis(100);

/// Times in milliseconds.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Times {
    /// Half took less.
    pub p50_ms: f64,
    /// 99 of a hundred took less.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// All, in the order in which they were taken.
    #[serde(skip)]
    pub all_ms: Vec<f64>,
}

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        let all_ms = times.iter().copied().map(ms).collect();
        times.sort_unstable();
        let last = times.last().copied().unwrap_or_default();
        Self {
            p50_ms: ms(percentile(&times, 50)),
            p99_ms: ms(percentile(&times, 99)),
            max_ms: ms(last),
            all_ms,
        }
    }
}

/// How long an export and its end take to be seen in the other cluster.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Propagation {
    /// How often it was measured.
    pub rounds: u32,
    /// From the manifest to the name.
    pub export: Times,
    /// From the manifest's removal to NXDOMAIN.
    pub unexport: Times,
}

impl std::fmt::Display for Propagation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:<10}   {:>8}   {:>8}   {:>8}   of {} rounds",
            "", "p50 ms", "p99 ms", "max ms", self.rounds
        )?;
        for (name, times) in [("export", &self.export), ("unexport", &self.unexport)] {
            let Times { p50_ms, p99_ms, max_ms, .. } = times;
            write!(f, "\n{name:<10}   {p50_ms:>8.1}   {p99_ms:>8.1}   {max_ms:>8.1}")?;
        }
        Ok(())
    }
}

/// Measures from the manifest's writing in `eu-west` to the answer that a pod of `us-east` gets, and back.
///
/// # Errors
/// If a round takes too long.
pub fn propagation(lab: &Lab, rounds: u32) -> Result<Propagation> {
    let name = "api-service.production.svc.clusterset.local";
    let question = Question { name: name.to_owned(), kind: 1 };
    let server: SocketAddr = (NAMESERVER, 53).into();
    let client = lab.place("us-c")?;
    let seen = |wanted: bool| -> Result<Duration> {
        client.run(|| {
            let start = Instant::now();
            loop {
                let answer = ask(server, &question, Duration::from_secs(1));
                match &answer {
                    Ok((0, addresses)) if wanted && !addresses.is_empty() => break,
                    Ok((3, _)) if !wanted => break,
                    _ => {}
                }
                ensure!(!interrupted(), "interrupted");
                ensure!(start.elapsed() < LIMIT, "after {LIMIT:?} {name} still answers {answer:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(start.elapsed())
        })?
    };
    seen(false)?;
    let (mut export, mut unexport) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        std::thread::sleep(PAUSE);
        lab.export("eu-west", "production", "api-service")?;
        export.push(seen(true)?);
        std::thread::sleep(PAUSE);
        lab.unexport("eu-west", "production", "api-service")?;
        unexport.push(seen(false)?);
    }
    Ok(Propagation { rounds, export: Times::of(export), unexport: Times::of(unexport) })
}
