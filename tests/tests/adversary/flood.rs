//! Floods: whoever says too much is bounded, and slows down nobody else.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tombolo_lab::{Lab, measure};

use crate::honest::{self, intact};
use crate::mallory::{self, Mallory, PODS, at, backends, export, service};

/// From an honest export to the name, at most (milliseconds).
const BUDGET: f64 = 1000.0;

/// Measures the honest pair before the flood and during it. `flood` is called again and again, at most `rate` times a
/// second, with a number that grows.
fn flooded(
    name: &str,
    rate: u32,
    flood: impl Fn(&mut Mallory, u64) -> Result<()> + Send + Sync,
    after: impl Fn(&Lab, &Mallory) -> Result<()>,
) {
    honest::alone(name, || {
        let lab = honest::up()?;
        let mut mallory = Mallory::admitted(&lab, "mallory", &PODS, &["production", "team-*"])?;
        mallory.join();
        lab.unexport("eu-west", "production", "api-service")?;
        let before = measure::propagation(&lab, 5)?;
        let (stop, times) = (AtomicBool::new(false), AtomicU64::new(0));
        let during = std::thread::scope(|scope| -> Result<_> {
            let flooder = scope.spawn(|| -> Result<()> {
                let start = Instant::now();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    flood(&mut mallory, number)?;
                    times.store(number + 1, Ordering::Relaxed);
                    let due = start + Duration::from_secs(1) * u32::try_from(number + 1)? / rate;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                Ok(())
            });
            // It is under way.
            let begun = tombolo_lab::wait_until("the flood", honest::SOON, || {
                ensure!(times.load(Ordering::Relaxed) > u64::from(rate / 10), "not yet");
                Ok(())
            });
            let during = begun.and_then(|_| measure::propagation(&lab, 10));
            stop.store(true, Ordering::Relaxed);
            flooder.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
            during
        })?;
        let said = times.load(Ordering::Relaxed);
        println!("{name}: {said} statements; before\n{before}\nduring\n{during}");
        ensure!(before.export.max_ms < BUDGET, "slow before the flood already:\n{before}");
        ensure!(during.export.max_ms < BUDGET, "the flood slows others:\n{during}\nbefore\n{before}");
        lab.export("eu-west", "production", "api-service")?;
        tombolo_lab::wait_until("the honest service", honest::SOON, || honest::talk(&lab))?;
        intact(&lab, "mallory", &["flood.production", "flood-1.production"])?;
        after(&lab, &mallory)
    });
}

#[test]
fn two_hundred_statements_a_second() {
    flooded(
        "flood::two_hundred_statements_a_second",
        200,
        |mallory, number| {
            let last = u8::try_from(number % 200)?;
            let body = at(&[("a", std::net::IpAddr::from([10, 66, 1, last]))]);
            mallory.say([
                export("production", "flood", &service(true))?,
                backends("production", "flood", 0, &body)?,
            ])
        },
        |_, _| Ok(()),
    );
}

/// What is larger than anything may be: the broker ends the liar's own session, again and again.
#[test]
fn oversized_records_end_their_own_session() {
    flooded(
        "flood::oversized_records_end_their_own_session",
        20,
        |mallory, number| {
            let size = 64 * 1024 + 1 + usize::try_from(number % 3)? * 3_000_000;
            mallory.say([(mallory::scope("production")?, mallory::record(77, &["flood"], vec![1; size])?)])
        },
        |lab, mallory| {
            ensure!(
                mallory.heard().iter().any(|text| text.contains("at most 65536 are allowed")),
                "{:?}",
                mallory.heard()
            );
            let metrics = lab.fetch("broker", "http://127.0.0.1:4501/metrics", &[])?.body;
            ensure!(metrics.contains("result=\"broken\""), "the broker counts no broken session");
            Ok(())
        },
    );
}
