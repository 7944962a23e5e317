//! Floods: whoever says too much is bounded, and slows down nobody else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tombolo_lab::{Lab, machine, measure};
use tombolo_proto::{
    model::{Record, Scope},
    pb,
};

use crate::honest::{self, intact};
use crate::mallory::{self, Mallory, PODS, at, backends, export, service};

/// From an honest export to the name, at most (milliseconds): in full runs, on a machine that does nothing else.
const BUDGET: f64 = 1000.0;
/// The same where a landing's other tests share the machine.
const BUDGET_BUSY: f64 = 5000.0;
/// Half of the honest changes take at most so many times as long as without the flood, in full runs. The work of the
/// broker and of four agents is done on the same few cores; the liar's has what they leave.
const RATIO: f64 = 1.25;

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
        let before = measure::propagation(&lab, if tombolo_lab::strict() { 50 } else { 5 })?;
        let (stop, times) = (AtomicBool::new(false), AtomicU64::new(0));
        let (during, used) = std::thread::scope(|scope| -> Result<_> {
            let flood = || -> Result<()> {
                // In life the liar works on a machine of its own.
                machine::step_back()?;
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
            };
            let flooder = std::thread::Builder::new().name("liar".to_owned()).spawn_scoped(scope, flood)?;
            // It is under way.
            let begun = tombolo_lab::wait_until("the flood", honest::SOON, || {
                ensure!(times.load(Ordering::Relaxed) > u64::from(rate / 10), "not yet");
                Ok(())
            });
            let rounds = if tombolo_lab::strict() { 50 } else { 10 };
            let measured = begun.and_then(|_| {
                let (start, before) = (Instant::now(), machine::used()?);
                let during = measure::propagation(&lab, rounds)?;
                Ok((during, usage(&before, &machine::used()?, start.elapsed())))
            });
            stop.store(true, Ordering::Relaxed);
            flooder.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
            measured
        })?;
        let said = times.load(Ordering::Relaxed);
        let ratio = during.export.p50_ms / before.export.p50_ms;
        println!(
            "{name}: {said} statements; before\n{before}\nduring\n{during}\n{used}\nratio of the p50: {ratio:.2}"
        );
        let budget = if tombolo_lab::strict() { BUDGET } else { BUDGET_BUSY };
        ensure!(before.export.max_ms < budget, "slow before the flood already:\n{before}");
        ensure!(during.export.max_ms < budget, "the flood slows others:\n{during}\nbefore\n{before}");
        ensure!(!tombolo_lab::strict() || ratio < RATIO, "the flood slows others {ratio:.2} times");
        lab.export("eu-west", "production", "api-service")?;
        tombolo_lab::wait_until("the honest service", honest::SOON, || honest::talk(&lab))?;
        intact(&lab, "mallory", &["flood.production", "flood-1.production"])?;
        after(&lab, &mallory)
    });
}

/// Who used how much of a processor meanwhile.
fn usage(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>, time: Duration) -> String {
    let shares = after.iter().map(|(name, seconds)| {
        let seconds = seconds - before.get(name).copied().unwrap_or(0.0);
        (name, seconds / time.as_secs_f64() * 100.0)
    });
    let shares = shares.filter(|(_, share)| *share >= 1.0).map(|(name, share)| format!("{name} {share:.0}"));
    format!("percent of a processor: {}", shares.collect::<Vec<_>>().join(", "))
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

#[test]
fn thousands_of_exports() {
    flooded(
        "flood::thousands_of_exports",
        2,
        |mallory, number| {
            let mut said = Vec::new();
            for n in 0..1000 {
                let name = format!("flood-{}", number.min(5) * 1000 + n);
                said.push(export("production", &name, &service(false))?);
                said.push(backends("production", &name, 0, &at(&[("a", "10.66.1.1".parse()?)]))?);
            }
            mallory.say(said)
        },
        |_, _| Ok(()),
    );
}

#[test]
fn thousands_of_namespaces_and_megabytes_of_unknown_records() {
    flooded(
        "flood::thousands_of_namespaces_and_megabytes_of_unknown_records",
        4,
        |mallory, number| {
            let mut said: Vec<(Scope, Record)> = Vec::new();
            for n in 0..500 {
                said.push(export(&format!("team-{}", number.min(10) * 500 + n), "flood", &service(false))?);
            }
            for n in 0..10 {
                let body = vec![number.to_be_bytes()[7]; 60 * 1024];
                said.push((
                    mallory::scope("production")?,
                    mallory::record(77, &[&format!("flood-{}", (number * 10 + n) % 300)], body)?,
                ));
            }
            mallory.say(said)
        },
        |_, _| Ok(()),
    );
}

/// Every node a gateway, every node with all keys and prefixes it may state, and backends of everything.
#[test]
fn thousands_of_nodes_and_backends() {
    flooded(
        "flood::thousands_of_nodes_and_backends",
        2,
        |mallory, number| {
            let mut said = Vec::new();
            for n in 0..500_u64 {
                let id = number.min(4) * 500 + n;
                let [.., high, low] = id.to_be_bytes();
                let prefixes = (0..64_u8)
                    .map(|p| pb::Prefix { address: vec![10, 66, low, p * 4].into(), length: 30 })
                    .collect();
                let body = pb::Endpoint {
                    prefixes,
                    tunnel_v4: vec![198, 18, 2, low].into(),
                    ..mallory::gateway(u32::from(high) % 4, low)
                };
                said.push(mallory::endpoint(&format!("node-{id}"), &body)?);
            }
            said.push(export("production", "flood", &service(true))?);
            for shard in 0..20_u8 {
                let list: Vec<(String, std::net::IpAddr)> =
                    (0..200_u8).map(|n| (format!("h{n}"), [10, 66, shard, n].into())).collect();
                let list: Vec<(&str, std::net::IpAddr)> =
                    list.iter().map(|(h, a)| (h.as_str(), *a)).collect();
                said.push(backends("production", "flood", shard.into(), &at(&list))?);
            }
            mallory.say(said)
        },
        |lab, _| {
            for cluster in ["eu-west", "us-east"] {
                honest::told(lab, cluster, "QuotaExceeded", "the statement of mallory is refused")?;
            }
            Ok(())
        },
    );
}
