//! The faults do what they say: counted by probes between nodes without Tombolo on top.
#![allow(clippy::print_stderr)]

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::fault::Fault;
use tombolo_lab::probe::UdpReport;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, program, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(20);
const A: &str = "eu-gw1";
const B: &str = "us-gw1";

/// Nodes and wire alone, and an echo server on the far node.
fn bare() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(TWO)?)?;
    lab.start(B, "serve", &program::serve(B)?)?;
    for to in ends(&lab)? {
        wait_until("the echo server", SOON, || one(&lab, to, 32, 50).map(drop))?;
    }
    Ok(lab)
}

fn ends(lab: &Lab) -> Result<[IpAddr; 2]> {
    let node = lab.topology().node(B)?;
    Ok([node.v4.into(), node.v6.into()])
}

/// A second of a flow from A.
fn one(lab: &Lab, to: IpAddr, size: usize, rate: u32) -> Result<UdpReport> {
    some(lab, to, size, rate, Duration::from_secs(1))
}

fn some(lab: &Lab, to: IpAddr, size: usize, rate: u32, length: Duration) -> Result<UdpReport> {
    let flow = lab.udp_flow_of(A, to, rate, size)?;
    std::thread::sleep(length);
    let report = flow.stop_udp()?;
    eprintln!("{to}, {size} bytes, {rate}/s: {report:?}");
    ensure!(report.sent >= u64::from(rate) / 2, "{report:?}");
    Ok(report)
}

fn fault(lab: &Lab, words: impl Fn(String, String) -> Fault) -> Result<()> {
    lab.fault(words(A.to_owned(), B.to_owned()))
}

#[test]
fn faults_of_the_network_do_what_they_say() {
    scenario("faults_of_the_network_do_what_they_say", LIMIT, || {
        let lab = bare()?;
        for to in ends(&lab)? {
            let report = one(&lab, to, 32, 1000)?;
            ensure!(report.lost + report.duplicated + report.reordered == 0, "without a fault: {report:?}");
        }
        fault(&lab, |a, b| Fault::EveryNth { a, b, n: 10 })?;
        for to in ends(&lab)? {
            // Of ten that leave, nine arrive; of ten answers, nine.
            let report = one(&lab, to, 32, 1000)?;
            let there = report.sent - report.sent / 10;
            ensure!(report.returned == there - there / 10, "every tenth each way: {report:?}");
        }
        lab.heal()?;
        fault(&lab, |a, b| Fault::Mtu { a, b, bytes: 1300 })?;
        for to in ends(&lab)? {
            let header = if to.is_ipv4() { 28 } else { 48 };
            let passes = one(&lab, to, 1300 - header, 100)?;
            let vanishes = one(&lab, to, 1301 - header, 100)?;
            ensure!(passes.lost == 0, "1300 bytes: {passes:?}");
            ensure!(
                vanishes.returned == 0 && vanishes.refused == 0,
                "1301 bytes, nobody says why: {vanishes:?}"
            );
        }
        lab.heal()?;
        fault(&lab, |a, b| Fault::Rate { a, b, kbit: 800 })?;
        for to in ends(&lab)? {
            // 100 kB a second hold a flow of 50 packets of 1 kB and not one of 400: of that pass 97 a second, and the
            // 100 of a second's burst.
            let fits = one(&lab, to, 1000, 50)?;
            ensure!(fits.lost == 0, "within the rate: {fits:?}");
            let more = some(&lab, to, 1000, 400, Duration::from_secs(3))?;
            ensure!((300..=480).contains(&more.returned), "at four times the rate: {more:?}");
        }
        lab.heal()?;
        fault(&lab, |a, b| Fault::Loss { a, b, percent: 20 })?;
        for to in ends(&lab)? {
            // 0.8 x 0.8 come back: 64 of a hundred, 5 sigma about 7.5.
            let report = one(&lab, to, 32, 1000)?;
            let back = report.returned * 100 / report.sent;
            ensure!((55..=73).contains(&back), "{back} of a hundred at 20 % each way: {report:?}");
        }
        lab.heal()?;
        fault(&lab, |from, to| Fault::CutOneway { from: to, to: from })?;
        for to in ends(&lab)? {
            let report = one(&lab, to, 32, 100)?;
            ensure!(report.returned == 0, "cut: {report:?}");
        }
        lab.heal()?;
        for to in ends(&lab)? {
            let report = one(&lab, to, 32, 1000)?;
            ensure!(report.lost + report.duplicated + report.reordered == 0, "healed: {report:?}");
        }
        Ok(())
    });
}

#[test]
fn a_delay_delays_and_a_jitter_reorders() {
    scenario("a_delay_delays_and_a_jitter_reorders", LIMIT, || {
        let lab = bare()?;
        fault(&lab, |a, b| Fault::Delay { a, b, ms: 40, jitter: 0 })?;
        for to in ends(&lab)? {
            let report = one(&lab, to, 32, 1000)?;
            ensure!(report.lost + report.duplicated + report.reordered == 0, "an even delay: {report:?}");
            for _ in 0..5 {
                let echo = lab.ping(A, to, SOON)?;
                let tombolo_lab::probe::Echo::Answered(ms) = echo else { anyhow::bail!("{to}: {echo:?}") };
                ensure!((80.0..200.0).contains(&ms), "40 ms each way and {ms} ms there and back");
            }
        }
        fault(&lab, |a, b| Fault::Cut { a: a.replace("gw1", "gw2"), b })?;
        lab.heal_one("delay eu-gw1 us-gw1 40 0")?;
        ensure!(lab.faults().len() == 1, "one of two was healed: {:?}", lab.faults());
        let to = ends(&lab)?[0];
        let echo = lab.ping(A, to, SOON)?;
        ensure!(matches!(echo, tombolo_lab::probe::Echo::Answered(ms) if ms < 40.0), "healed: {echo:?}");
        fault(&lab, |a, b| Fault::Delay { a, b, ms: 20, jitter: 20 })?;
        for to in ends(&lab)? {
            let report = one(&lab, to, 32, 1000)?;
            ensure!(report.lost + report.duplicated == 0 && report.reordered > 100, "a jitter: {report:?}");
        }
        let wrong = lab.fault(Fault::Delay { a: A.into(), b: "eu-gw2".into(), ms: 1, jitter: 0 });
        ensure!(wrong.is_err_and(|e| e.to_string().contains("one cluster")), "inside a cluster");
        Ok(())
    });
}

#[test]
fn faults_that_cannot_be_are_refused_in_a_sentence() {
    scenario("faults_that_cannot_be_are_refused_in_a_sentence", LIMIT, || {
        let lab = Lab::build(Topology::parse(TWO)?)?;
        let (a, b) = (A.to_owned(), B.to_owned());
        let refused = [
            (Fault::Loss { a: a.clone(), b: b.clone(), percent: 0 }, "1 to 100"),
            (Fault::EveryNth { a: a.clone(), b: b.clone(), n: 1 }, "2 or more"),
            (Fault::Delay { a: a.clone(), b: b.clone(), ms: 1, jitter: 2 }, "more than the delay"),
            (Fault::Cut { a: a.clone(), b: a.clone() }, "two ends"),
            (Fault::Cut { a, b: "nobody".into() }, "nobody"),
            (Fault::DiskFull { of: "nobody".into() }, "nobody"),
        ];
        for (fault, words) in refused {
            let error = lab.fault(fault.clone()).err().map(|e| format!("{e:#}")).unwrap_or_default();
            ensure!(error.contains(words), "{fault}: {error:?}");
        }
        ensure!(lab.faults().is_empty(), "{:?}", lab.faults());
        let none = lab.heal_one("cut x y").err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(none.contains("nor any other"), "{none}");
        Ok(())
    });
}

#[test]
fn a_full_disk_takes_nothing_more_and_then_does() {
    scenario("a_full_disk_takes_nothing_more_and_then_does", LIMIT, || {
        let lab = Lab::build(Topology::parse(TWO)?)?;
        for (of, dir) in [
            ("eu-gw1", lab.state_dir("eu-gw1")),
            ("broker", lab.state_dir("broker")),
            ("eu-west", lab.cluster_dir("eu-west")),
        ] {
            std::fs::write(dir.join("before"), [1; 10_000])?;
            lab.fault(Fault::DiskFull { of: of.into() })?;
            let error = std::fs::write(dir.join("x"), "x").err();
            let full = Some(libc::ENOSPC);
            ensure!(error.as_ref().and_then(std::io::Error::raw_os_error) == full, "{of}: {error:?}");
            ensure!(std::fs::read(dir.join("before"))?.len() == 10_000, "{of}: what was there is there");
            lab.heal()?;
            std::fs::write(dir.join("x"), "x")?;
        }
        Ok(())
    });
}
