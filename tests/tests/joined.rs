//! Two clusters joined by the real programs: who reaches whom, by which name, from which address, and what the wire
//! sees of it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tombolo_lab::probe::Echo;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Lab, host, scenario, wait_until};

const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(20);
const API: &str = "api-service.production.svc.clusterset.local";
const DB: &str = "db.production.svc.clusterset.local";

fn up(topology: &str) -> Result<Lab> {
    let lab = Lab::build(Topology::parse(topology)?)?;
    lab.bring_up()?;
    Ok(lab)
}

/// Waits for one pair of pods, then asks all: tunnels need a handshake, nothing else may be late.
fn tunnels(lab: &Lab) -> Result<()> {
    wait_until("tunnels", SOON, || lab.everybody_reaches_everybody()).map(drop)
}

#[test]
fn every_pod_reaches_every_pod_under_reach_all() {
    scenario("every_pod_reaches_every_pod_under_reach_all", LIMIT, || {
        let lab = up(&TWO.replace("    pod_cidrs", "    reach: all\n    pod_cidrs"))?;
        let watch = lab.watch_wire()?;
        tunnels(&lab)?;
        for node in lab.topology().nodes() {
            for pod in lab.topology().pods().filter(|p| p.cluster != node.cluster) {
                for address in [IpAddr::from(pod.v4), pod.v6.into()] {
                    let echo = lab.ping(&node.name, address, Duration::from_secs(2))?;
                    ensure!(echo.is_answered(), "{} pings {address}: {echo:?}", node.name);
                }
            }
        }
        watch.seen().assert_protected()?;
        without_tunnels(&lab)?;
        watch.seen().assert_protected()
    });
}

/// The last tunnel is down: refused, and never in clear.
fn without_tunnels(lab: &Lab) -> Result<()> {
    let target = lab.topology().pod("us-c")?;
    for node in &lab.topology().cluster("eu-west")?.nodes {
        lab.kill(&node.name, "agent")?;
        let devices = lab.place(&node.name)?.capture(&["ip", "-o", "link", "show"])?;
        lab.kill(&node.name, "wireguard")?;
        for device in
            devices.lines().filter_map(|l| l.split(": ").nth(1)).filter(|d| d.starts_with("tombolo"))
        {
            let _ = lab.place(&node.name)?.output(&["ip", "link", "del", device])?;
        }
    }
    for place in ["eu-a", "eu-c", "eu-gw1", "eu-w1"] {
        for address in [IpAddr::from(target.v4), target.v6.into()] {
            let echo = lab.ping(place, address, Duration::from_secs(1))?;
            ensure!(echo == Echo::Unreachable, "{place} pings {address} without tunnels: {echo:?}");
        }
    }
    Ok(())
}

#[test]
fn only_what_is_exported_is_reached_under_reach_exports() {
    scenario("only_what_is_exported_is_reached_under_reach_exports", LIMIT, || {
        let lab = up(TWO)?;
        let watch = lab.watch_wire()?;
        lab.export("eu-west", "production", "api-service")?;
        names(&lab)?;
        exported_addresses(&lab)?;
        lab.export("eu-west", "production", "db")?;
        headless(&lab)?;
        unexported(&lab)?;
        watch.seen().assert_protected()
    });
}

/// By name, from every pod and node of the other cluster, both families, source kept; every backend serves.
fn names(lab: &Lab) -> Result<()> {
    let url = format!("http://{API}:8080");
    for node in &lab.topology().cluster("us-east")?.nodes {
        for (place, own) in node
            .pods
            .iter()
            .map(|p| (&p.name, Some([p.v4.to_string(), p.v6.to_string()])))
            .chain([(&node.name, None)])
        {
            for (index, family) in ["-4", "-6"].iter().enumerate() {
                wait_until(&format!("{place} to get an answer {family}"), SOON, || {
                    let answer = lab.fetch(place, &format!("{url}/ip"), &[family, "--timeout", "2"])?;
                    if let Some(own) = &own {
                        ensure!(answer.body.trim() == own[index], "{place} was seen as {}", answer.body);
                    }
                    Ok(())
                })?;
            }
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    wait_until("every backend to serve", SOON, || {
        seen.insert(lab.fetch("us-c", &format!("{url}/health"), &["-4"])?.body);
        ensure!(seen.len() == 3, "only {seen:?}");
        Ok(())
    })?;
    // In the exporting cluster too: a derived service has its backends wherever they are.
    wait_until("the exporting cluster to answer", SOON, || {
        lab.fetch("eu-d", &format!("{url}/health"), &["-4", "--timeout", "2"]).map(drop)
    })?;
    let (code, addresses) = lab.ask("us-c", API, 1)?;
    ensure!(code == 0 && addresses.len() == 1, "{API} answered {code}, {addresses:?}");
    ensure!(lab.ask("us-c", "nothing.production.svc.clusterset.local", 1)?.0 == 3, "a name that is not");
    ensure!(lab.ask("us-c", "example.com", 1)?.0 == 5, "an open resolver");
    Ok(())
}

/// Directly: the exported port of a backend and its echo, nothing else, and no pod that backs nothing.
fn exported_addresses(lab: &Lab) -> Result<()> {
    let backend = lab.topology().pod("eu-c")?;
    let other = lab.topology().pod("eu-d")?;
    for (backend, other) in
        [(IpAddr::from(backend.v4), IpAddr::from(other.v4)), (backend.v6.into(), other.v6.into())]
    {
        lab.reaches("us-c", own(lab, "us-c", backend.is_ipv4())?, backend)?;
        let closed = format!("http://{}:7000/", host(backend));
        ensure!(
            lab.fetch("us-c", &closed, &["--timeout", "1"]).is_err(),
            "TCP 7000 of {backend} is not exported"
        );
        let url = format!("http://{}:8080/health", host(other));
        ensure!(lab.fetch("us-c", &url, &["--timeout", "1"]).is_err(), "{other} backs nothing exported");
        let echo = lab.ping("us-c", other, Duration::from_millis(500))?;
        ensure!(!echo.is_answered(), "{other} backs nothing exported but answers an echo");
        // The other cluster exports nothing yet: all of it is closed.
        let asker = lab.topology().pod("us-a")?;
        let url = format!(
            "http://{}:8080/",
            host(if backend.is_ipv4() { asker.v4.into() } else { asker.v6.into() })
        );
        ensure!(lab.fetch("eu-d", &url, &["--timeout", "1"]).is_err(), "us-east exports nothing yet");
    }
    Ok(())
}

fn own(lab: &Lab, pod: &str, v4: bool) -> Result<IpAddr> {
    let pod = lab.topology().pod(pod)?;
    Ok(if v4 { pod.v4.into() } else { pod.v6.into() })
}

fn headless(lab: &Lab) -> Result<()> {
    for (kind, v4) in [(1, true), (28, false)] {
        let mut wanted: Vec<IpAddr> = Vec::new();
        for pod in ["eu-a", "eu-b", "eu-c"] {
            wanted.push(own(lab, pod, v4)?);
        }
        wait_until("the headless name", SOON, || {
            let (_, mut addresses) = lab.ask("us-c", DB, kind)?;
            addresses.sort();
            ensure!(addresses == wanted, "{DB} is {addresses:?}");
            Ok(())
        })?;
        let one = format!("eu-b.eu-west.{DB}");
        ensure!(lab.ask("us-c", &one, kind)?.1 == [own(lab, "eu-b", v4)?], "{one}");
    }
    lab.fetch("us-c", &format!("http://eu-b.eu-west.{DB}:8080/health"), &[]).map(drop)
}

/// Taken back: the name goes, the virtual address refuses at once, the pods are closed again.
fn unexported(lab: &Lab) -> Result<()> {
    let (_, addresses) = lab.ask("us-c", API, 1)?;
    let address = *addresses.first().context("the name has an address")?;
    lab.unexport("eu-west", "production", "api-service")?;
    lab.unexport("eu-west", "production", "db")?;
    for name in [API, DB] {
        wait_until("the name to go", SOON, || {
            let answer = lab.ask("us-c", name, 1)?;
            ensure!(answer.0 == 3, "{name} answers {answer:?}");
            Ok(())
        })?;
    }
    wait_until("the pods to be closed", SOON, || {
        let url = format!("http://{}:8080/health", lab.topology().pod("eu-c")?.v4);
        ensure!(lab.fetch("us-c", &url, &["--timeout", "1"]).is_err(), "still open");
        let start = std::time::Instant::now();
        let url = format!("http://{}:8080/health", host(address));
        ensure!(lab.fetch("us-c", &url, &["--timeout", "3"]).is_err(), "the virtual address still answers");
        ensure!(start.elapsed() < Duration::from_secs(2), "a virtual address without backends must refuse");
        Ok(())
    })?;
    Ok(())
}
