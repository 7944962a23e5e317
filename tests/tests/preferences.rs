//! Which of several clusters' backends new connections and names use: when a cluster vanishes and returns, and by what
//! the exports prefer.
#![allow(clippy::print_stderr)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tombolo_lab::directory;
use tombolo_lab::fault::Fault;
use tombolo_lab::probe::{Question, ask};
use tombolo_lab::topology::{NAMESERVER, Topology};
use tombolo_lab::{Lab, event, runs, scenario_alone, strict, wait_until};

const THREE: &str = include_str!("../topologies/three.yaml");
const LIMIT: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(30);
const WEB: &str = "web.production.svc.clusterset.local";
const DB: &str = "db.production.svc.clusterset.local";
const CLUSTERS: [&str; 3] = ["eu-west", "us-east", "ap-south"];
/// A connection that takes longer has failed.
const PATIENCE: Duration = Duration::from_millis(400);

/// All three, both services exported by two of them, and every node knows that its peers live.
fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(THREE)?)?;
    lab.bring_up()?;
    for cluster in ["us-east", "ap-south"] {
        export(&lab, cluster, &[])?;
    }
    for node in lab.topology().nodes() {
        wait_until("liveness", SOON, || {
            let file = lab.state_dir(&node.name).join("health.json");
            let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
            let peers = if node.gateway { 3 } else { 1 };
            let alive = text.matches("alive").count();
            ensure!(alive == peers, "{}: {alive} of {peers} peers are known to be alive", node.name);
            Ok(())
        })?;
    }
    Ok(lab)
}

/// Exports both services, with these annotations.
fn export(lab: &Lab, cluster: &str, annotations: &[(&str, &str)]) -> Result<()> {
    for service in ["web", "db"] {
        let mut text = directory::export_manifest("production", service);
        if !annotations.is_empty() {
            text.push_str("  annotations:\n");
        }
        for (name, value) in annotations {
            text.push_str(&format!("    tombolo.dev/{name}: \"{value}\"\n"));
        }
        let manifests = lab.cluster_dir(cluster).join("manifests");
        directory::put(&manifests, &format!("export-production-{service}.yaml"), &text)?;
    }
    Ok(())
}

/// Says of a cluster's pods whether they are ready.
fn ready(lab: &Lab, cluster: &str, ready: bool) -> Result<()> {
    let cluster = lab.topology().cluster(cluster)?;
    for service in &cluster.services {
        let pods: Vec<_> = directory::backends(cluster, service).collect();
        let text = directory::service_manifest(cluster, service, &pods, |_| ready);
        let manifests = lab.cluster_dir(&cluster.id).join("manifests");
        directory::put(&manifests, &format!("service-production-{}.yaml", service.name), &text)?;
    }
    Ok(())
}

/// Whose a pod's address is.
fn owner(address: IpAddr) -> &'static str {
    let index = match address {
        IpAddr::V4(a) => u16::from(a.octets()[1]),
        IpAddr::V6(a) => a.segments()[2],
    };
    CLUSTERS[usize::from(index) - 1]
}

/// What a question or a new connection met.
#[derive(Debug, Clone)]
struct Seen {
    at: Instant,
    name: bool,
    clusters: BTreeSet<&'static str>,
}

/// New connections to the ClusterSetIP, and questions for the headless name, all the time from one pod.
struct Watch {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    fn start(lab: &Lab, pod: &str) -> Result<Self> {
        let mut watch = Self { stop: Arc::default(), seen: Arc::default(), threads: Vec::new() };
        let (_, addresses) = lab.ask(pod, WEB, 1)?;
        let vip = SocketAddr::new(*addresses.first().context("no ClusterSetIP")?, 80);
        for lane in 0..5_u64 {
            let (stop, seen) = (watch.stop.clone(), watch.seen.clone());
            let code = move || {
                std::thread::sleep(Duration::from_millis(20 * lane));
                while !stop.load(Ordering::Relaxed) {
                    let at = Instant::now();
                    let clusters = if lane == 0 { name() } else { connect(vip).into_iter().collect() };
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.push(Seen { at, name: lane == 0, clusters });
                    drop(seen);
                    std::thread::sleep(Duration::from_millis(if lane == 0 { 25 } else { 80 }));
                }
            };
            watch.threads.push(lab.place(pod)?.spawn(code)?);
        }
        Ok(watch)
    }

    fn since(&self, from: Instant) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|s| s.at >= from).cloned().collect()
    }

    /// Waits until names and new connections of a second find just these clusters. How long after `from` it was so for
    /// good, in milliseconds: for both, and for names alone.
    fn settled(&self, from: Instant, wanted: &[&'static str]) -> Result<(f64, f64)> {
        let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
        let right = |s: &Seen| {
            if s.name {
                s.clusters == wanted
            } else {
                s.clusters.is_subset(&wanted) && !s.clusters.is_empty()
            }
        };
        wait_until(&format!("{wanted:?} alone"), SOON, || {
            let lately = self.since(from.max(Instant::now() - Duration::from_millis(1500)));
            let met: BTreeSet<&str> =
                lately.iter().filter(|s| !s.name).flat_map(|s| s.clusters.clone()).collect();
            let wrong: Vec<_> = lately.iter().filter(|s| !right(s)).collect();
            ensure!(lately.len() > 15, "only {} were asked", lately.len());
            ensure!(
                wrong.is_empty(),
                "{} of {} are wrong, such as {:?}",
                wrong.len(),
                lately.len(),
                wrong[0]
            );
            ensure!(met == wanted, "connections met {met:?}");
            Ok(())
        })?;
        let since = self.since(from);
        let last = |names: bool| {
            let wrong = since.iter().filter(|s| s.name == names && !right(s)).map(|s| s.at).max();
            wrong.map_or(0.0, |at| (at - from).as_secs_f64() * 1000.0)
        };
        Ok((last(false).max(last(true)), last(true)))
    }

    /// When after `from` a name and a connection first found a cluster again, in milliseconds: the later of both.
    fn found(&self, from: Instant, cluster: &'static str) -> Result<f64> {
        let first = |names: bool| {
            self.since(from).iter().find(|s| s.name == names && s.clusters.contains(cluster)).map(|s| s.at)
        };
        wait_until(&format!("{cluster} again"), SOON, || {
            ensure!(first(true).is_some(), "no name finds it");
            ensure!(first(false).is_some(), "no connection finds it");
            Ok(())
        })?;
        let later = first(true).max(first(false)).context("found")?;
        Ok((later - from).as_secs_f64() * 1000.0)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Whose endpoints the headless name has.
fn name() -> BTreeSet<&'static str> {
    let question = Question { name: DB.to_owned(), kind: 1 };
    let answer = ask((NAMESERVER, 53).into(), &question, Duration::from_secs(1));
    answer.map(|(_, addresses)| addresses.into_iter().map(owner).collect()).unwrap_or_default()
}

/// Who answers a new connection, if anybody does.
fn connect(vip: SocketAddr) -> Option<&'static str> {
    let mut stream = TcpStream::connect_timeout(&vip, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let pod = text.lines().last()?.strip_prefix("ok ")?.to_owned();
    CLUSTERS.into_iter().find(|c| c[..2] == pod[..2])
}

fn rounds() -> usize {
    runs(if strict() { 5 } else { 1 })
}

/// Who vanishes again within a minute of its return flaps, and is used again later each time (`docs/preferences.md`): each
/// round is to be a first one.
fn calm(round: usize) {
    if round > 0 {
        std::thread::sleep(Duration::from_secs(61));
    }
}

/// A cluster is cut off from everybody.
fn vanish(lab: &Lab, cluster: &str) -> Result<Instant> {
    let at = Instant::now();
    for other in CLUSTERS.into_iter().chain(["broker"]).filter(|other| *other != cluster) {
        lab.fault(Fault::Cut { a: cluster.into(), b: other.into() })?;
    }
    Ok(at)
}

fn heal(lab: &Lab) -> Result<Instant> {
    let at = Instant::now();
    lab.heal()?;
    Ok(at)
}

#[test]
fn a_vanished_cluster_is_left_and_comes_back() {
    scenario_alone("a_vanished_cluster_is_left_and_comes_back", LIMIT, || {
        let lab = up()?;
        wait_until("the services", SOON, || {
            ensure!(
                !lab.ask("eu-a", WEB, 1)?.1.is_empty() && lab.ask("eu-a", DB, 1)?.1.len() == 2,
                "not yet"
            );
            Ok(())
        })?;
        let watch = Watch::start(&lab, "eu-a")?;
        watch.settled(Instant::now(), &["us-east", "ap-south"])?;
        for round in 0..rounds() {
            calm(round);
            let (gone, other) =
                if round % 2 == 0 { ("us-east", "ap-south") } else { ("ap-south", "us-east") };
            event(&lab, &[], || {
                let at = vanish(&lab, gone)?;
                let (left, names) = watch.settled(at, &[other])?;
                let at = heal(&lab)?;
                let back = watch.found(at, gone)?;
                watch.settled(Instant::now(), &["us-east", "ap-south"])?;
                eprintln!(
                    "round {round}: {gone} vanished: names without it after {names:.0} ms, both after {left:.0} ms; \
                     back {back:.0} ms after its return"
                );
                Ok(vec![("cluster-vanishes", left, "ms"), ("cluster-returns", back, "ms")])
            })?;
        }
        // The last one is kept, gone or not: its names stay.
        lab.unexport("ap-south", "production", "db")?;
        wait_until("one cluster", SOON, || {
            ensure!(lab.ask("eu-a", DB, 1)?.1.len() == 1, "still two");
            Ok(())
        })?;
        let at = vanish(&lab, "us-east")?;
        wait_until("web without it", SOON, || {
            let lately: Vec<_> = watch.since(at).into_iter().filter(|s| !s.name).rev().take(8).collect();
            ensure!(
                lately.len() == 8 && lately.iter().all(|s| s.clusters.contains("ap-south")),
                "{lately:?}"
            );
            Ok(())
        })?;
        // And whoever asks why is told, as that node knows it.
        wait_until("the reason", SOON, || {
            let text = lab.tombolo("eu-w1", &["resolve", "--explain", WEB])?;
            ensure!(text.contains("no way leads to cluster us-east"), "explains nothing: {text}");
            Ok(())
        })?;
        let (_, addresses) = lab.ask("eu-a", DB, 1)?;
        ensure!(addresses.into_iter().map(owner).collect::<Vec<_>>() == ["us-east"], "the last one was left");
        Ok(())
    });
}

#[test]
fn preferences_are_kept_with_failover_and_failback() {
    scenario_alone("preferences_are_kept_with_failover_and_failback", LIMIT, || {
        let lab = up()?;
        export(&lab, "us-east", &[("priority", "10")])?;
        wait_until("the services", SOON, || {
            ensure!(
                !lab.ask("eu-a", WEB, 1)?.1.is_empty() && lab.ask("eu-a", DB, 1)?.1.len() == 1,
                "not yet"
            );
            Ok(())
        })?;
        let watch = Watch::start(&lab, "eu-a")?;
        // Active and passive: the annotation came late, and counts from then on.
        watch.settled(Instant::now(), &["ap-south"])?;
        for round in 0..rounds() {
            calm(round);
            event(&lab, &[], || {
                let (over, _) = watch.settled(vanish(&lab, "ap-south")?, &["us-east"])?;
                let (back, _) = watch.settled(heal(&lab)?, &["ap-south"])?;
                eprintln!("round {round}: priority: failover {over:.0} ms, failback {back:.0} ms");
                Ok(vec![("priority-failover", over, "ms"), ("priority-failback", back, "ms")])
            })?;
        }
        let text = lab.tombolo("eu-w1", &["resolve", DB, "--explain"])?;
        ensure!(text.contains("priority"), "explains nothing: {text}");
        // Its last backend is not ready: that is no fault of the network, and the same decision.
        ready(&lab, "ap-south", false)?;
        watch.settled(Instant::now(), &["us-east"])?;
        ready(&lab, "ap-south", true)?;
        watch.settled(Instant::now(), &["ap-south"])?;

        // Local first: a client in us-east stays there while there is something, whatever the priority.
        export(&lab, "us-east", &[("priority", "10"), ("prefer", "local")])?;
        let local = Watch::start(&lab, "us-b")?;
        local.settled(Instant::now(), &["us-east"])?;
        watch.settled(Instant::now(), &["ap-south"])?;
        ready(&lab, "us-east", false)?;
        local.settled(Instant::now(), &["ap-south"])?;
        ready(&lab, "us-east", true)?;
        local.settled(Instant::now(), &["us-east"])?;
        drop(local);

        // Weights: one in five.
        export(&lab, "us-east", &[("weight", "25")])?;
        watch.settled(Instant::now(), &["us-east", "ap-south"])?;
        let (at, wanted) = (Instant::now(), 300);
        let mut met = Vec::new();
        wait_until("enough connections", SOON, || {
            met = watch.since(at).into_iter().filter(|s| !s.name && !s.clusters.is_empty()).collect();
            ensure!(met.len() >= wanted, "{} of {wanted}", met.len());
            Ok(())
        })?;
        let us = met.iter().filter(|s| s.clusters.contains("us-east")).count();
        let part = us as f64 / met.len() as f64;
        eprintln!("weight 25 beside 100: {:.0} % of {} connections", part * 100.0, met.len());
        ensure!((0.10..0.32).contains(&part), "{us} of {} connections", met.len());

        // What cannot be read is said, and the default counts.
        export(&lab, "us-east", &[("priority", "high")])?;
        watch.settled(Instant::now(), &["us-east", "ap-south"])?;
        wait_until("the condition", SOON, || {
            let text = lab.tombolo("us-w1", &["status"])?;
            ensure!(text.contains("tombolo.dev/priority"), "it is not told: {text}");
            Ok(())
        })
        .map(drop)
    });
}
