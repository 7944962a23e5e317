//! Nothing is lost when a program that only decides goes away or hangs: the broker, the agent.
#![allow(clippy::print_stderr)]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tombolo_lab::count::{Netlink, Writes};
use tombolo_lab::probe::{Question, Report};
use tombolo_lab::topology::{NAMESERVER, TWO, Topology};
use tombolo_lab::{Flow, Lab, event, runs, scenario_alone, strict, wait_until};

const LIMIT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(20);
const API: &str = "api-service.production.svc.clusterset.local";

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(TWO)?)?;
    lab.bring_up()?;
    lab.export("eu-west", "production", "api-service")?;
    wait_until("the name", SOON, || lab.fetch("us-c", &format!("http://{API}:8080/health"), &[]).map(drop))?;
    Ok(lab)
}

/// From pods on a gateway and on a worker, both families.
fn flows(lab: &Lab) -> Result<Vec<Flow>> {
    let backend = lab.topology().pod("eu-c")?;
    let question = Question { name: API.to_owned(), kind: 1 };
    // The one answer that is right.
    let (_, addresses) = lab.ask("us-c", API, 1)?;
    Ok(vec![
        lab.udp_flow("us-c", backend.v4.into(), 1000)?,
        lab.udp_flow("us-a", backend.v6.into(), 1000)?,
        lab.dns_flow_expecting("us-c", &format!("{NAMESERVER}:53"), &question, 1000, &addresses)?,
    ])
}

/// Packets lost, and questions that were not answered well within a second.
fn missing(flows: Vec<Flow>) -> Result<(f64, f64)> {
    let (mut packets, mut answers) = (0, 0);
    for flow in flows {
        match flow.stop()? {
            Report::Udp(report) => {
                eprintln!("{report:?}");
                ensure!(report.sent > 1000 && report.duplicated == 0, "{report:?}");
                packets += report.lost;
            }
            Report::Dns(report) => {
                eprintln!("{report:?}");
                ensure!(report.sent > 1000 && report.answers.keys().all(|code| *code == 0), "{report:?}");
                answers += report.refused + report.unanswered + report.empty + report.wrong;
            }
            Report::Tcp(report) => ensure!(report.broken.is_none(), "{report:?}"),
        }
    }
    Ok((packets as f64, answers as f64))
}

/// Where nothing changes, nothing is done: not to the kernel, and not to the clusters' APIs but to renew the Leases.
#[test]
fn a_quiet_set_changes_nothing() {
    scenario_alone("a_quiet_set_changes_nothing", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(1) {
            let netlink = Netlink::watch(&lab, &[])?;
            let apis = ["eu-west", "us-east"].map(|c| Writes::watch(&lab, c));
            // Renewals of Leases, and other writes, since then.
            let written = |since: Instant| -> Result<(usize, Vec<(Instant, String)>)> {
                let mut all = Vec::new();
                for api in &apis {
                    all.extend(api.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))?.writes());
                }
                all.retain(|(at, _)| *at > since);
                let (leases, others): (Vec<_>, Vec<_>) =
                    all.into_iter().partition(|(_, path)| path.contains("lease"));
                Ok((leases.len(), others))
            };
            // What follows a start has settled when nothing happened for twelve seconds: where a cluster's statements have
            // come to is kept ten seconds later at the latest.
            let start = Instant::now();
            wait_until("the set to settle", Duration::from_secs(60), || {
                let all = [netlink.changes(), written(start)?.1].concat();
                let last = all.iter().map(|(at, _)| *at).max().unwrap_or(start);
                ensure!(last.elapsed() > Duration::from_secs(12), "{:?}", all.last());
                Ok(())
            })?;
            event(&lab, &[], || {
                let start = Instant::now();
                std::thread::sleep(Duration::from_secs(if strict() { 60 } else { 15 }));
                let mut changes = netlink.changes();
                changes.retain(|(at, _)| *at > start);
                let (leases, others) = written(start)?;
                if !changes.is_empty() || !others.is_empty() {
                    eprintln!("{changes:#?}\n{others:#?}");
                }
                eprintln!("{leases} renewals of two Leases");
                ensure!(leases > 0, "no Lease was renewed: are writes seen at all?");
                Ok(vec![
                    ("quiet-changes", changes.len() as f64, "changes"),
                    ("quiet-writes", others.len() as f64, "writes"),
                ])
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_broker_that_dies_or_forgets_takes_nothing_away() {
    scenario_alone("a_broker_that_dies_or_forgets_takes_nothing_away", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(1) {
            event(&lab, &["broker"], || broker_away(&lab))?;
        }
        // The emptied broker knows everybody again: news passes through it.
        lab.export("us-east", "production", "web")?;
        wait_until("news through the refilled broker", SOON, || {
            let url = "http://web.production.svc.clusterset.local:8080/health";
            lab.fetch("eu-c", url, &["--timeout", "2"]).map(drop)
        })?;
        Ok(())
    });
}

fn broker_away(lab: &Lab) -> Result<Vec<(&'static str, f64, &'static str)>> {
    let before = kernels(lab)?;
    let flows = flows(lab)?;
    lab.kill("broker", "broker")?;
    // The event itself: the broker is away for so long.
    std::thread::sleep(Duration::from_secs(if strict() { 30 } else { 10 }));
    lab.restart("broker", "broker")?;
    lab.wait_ready()?;
    lab.kill("broker", "broker")?;
    std::fs::remove_dir_all(lab.state_dir("broker").join("data"))?;
    lab.restart("broker", "broker")?;
    lab.wait_ready()?;
    let (packets, answers) = missing(flows)?;
    unchanged(&before, &kernels(lab)?)?;
    Ok(vec![("broker-away-lost", packets, "packets"), ("broker-away-unanswered", answers, "answers")])
}

#[test]
fn a_hanging_broker_takes_nothing_away() {
    scenario_alone("a_hanging_broker_takes_nothing_away", LIMIT, || {
        let lab = up()?;
        for round in 0..runs(1) {
            event(&lab, &["broker"], || {
                let before = kernels(&lab)?;
                let flows = flows(&lab)?;
                lab.stop("broker", "broker")?;
                std::thread::sleep(stopped());
                let (packets, answers) = missing(flows)?;
                unchanged(&before, &kernels(&lab)?)?;
                lab.cont("broker", "broker")?;
                Ok(vec![
                    ("broker-stopped-lost", packets, "packets"),
                    ("broker-stopped-unanswered", answers, "answers"),
                ])
            })?;
            // It goes on where it hung: news passes.
            let (cluster, pod, service) = ("us-east", "eu-c", "web");
            let url = format!("http://{service}.production.svc.clusterset.local:8080/health");
            lab.export(cluster, "production", service)?;
            wait_until(&format!("news after hang {round}"), Duration::from_secs(60), || {
                lab.fetch(pod, &url, &["--timeout", "2"]).map(drop)
            })?;
            lab.unexport(cluster, "production", service)?;
            let name = format!("{service}.production.svc.clusterset.local");
            wait_until("the name to go", SOON, || {
                let (code, _) = lab.ask(pod, &name, 1)?;
                ensure!(code == 3, "{name} still answers {code}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// Holder and agent of a worker and of a gateway hang. Only packets count: a node whose agent hangs answers its names
/// late, from the queue of the socket that is held.
#[test]
fn a_hanging_agent_loses_no_packet() {
    scenario_alone("a_hanging_agent_loses_no_packet", LIMIT, || {
        let lab = up()?;
        for round in 0..runs(1) {
            event(&lab, &["us-w1", "us-gw1", "eu-gw1"], || {
                let before = kernels(&lab)?;
                let mut flows = flows(&lab)?;
                let names = flows.pop();
                let nodes = ["us-w1", "us-gw1", "eu-gw1"];
                for node in nodes {
                    lab.stop(node, "agent")?;
                }
                std::thread::sleep(stopped());
                for node in nodes {
                    lab.cont(node, "agent")?;
                }
                let (packets, _) = missing(flows)?;
                drop(names);
                lab.wait_ready()?;
                unchanged(&before, &kernels(&lab)?)?;
                wait_until("names again", SOON, || {
                    let (code, addresses) = lab.ask("us-c", API, 1)?;
                    ensure!(code == 0 && addresses.len() == 1, "round {round}: {code}, {addresses:?}");
                    Ok(())
                })?;
                Ok(vec![("agent-stopped-lost", packets, "packets")])
            })?;
        }
        Ok(())
    });
}

#[test]
fn an_agent_killed_ten_times_loses_nothing() {
    scenario_alone("an_agent_killed_ten_times_loses_nothing", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(1) {
            event(&lab, &["us-w1", "us-gw1"], || {
                let flows = flows(&lab)?;
                let mut changed = 0;
                for round in 0..10 {
                    // The client's node answers its names; a gateway carries its packets.
                    changed += kill_agent(&lab, if round % 2 == 0 { "us-w1" } else { "us-gw1" })?;
                }
                let (packets, answers) = missing(flows)?;
                Ok(vec![
                    ("agent-killed-lost", packets, "packets"),
                    ("agent-killed-unanswered", answers, "answers"),
                    ("agent-killed-changes", changed as f64, "changes"),
                ])
            })?;
        }
        Ok(())
    });
}

/// How many changes of links, addresses, routes, rules and nftables the agent makes that comes back.
fn kill_agent(lab: &Lab, node: &str) -> Result<usize> {
    let before = lab.child_pid(node, "agent")?;
    let state = lab.kernel(node)?;
    let others: Vec<_> = lab.topology().nodes().map(|n| n.name.as_str()).filter(|n| *n != node).collect();
    let watch = Netlink::watch(lab, &others)?;
    lab.kill_child(node, "agent")?;
    wait_until("the holder to start another", SOON, || {
        ensure!(lab.child_pid(node, "agent")? != before, "the old one is still there");
        Ok(())
    })?;
    lab.wait_ready()?;
    let changes = watch.changes();
    if !changes.is_empty() {
        eprintln!("the restarted agent of {node} changed: {changes:#?}");
    }
    let after = lab.kernel(node)?;
    ensure!(after == state, "{node} changed:\n{state}\nto\n{after}");
    Ok(changes.len())
}

fn stopped() -> Duration {
    Duration::from_secs(if strict() { 30 } else { 10 })
}

fn kernels(lab: &Lab) -> Result<Vec<(String, String)>> {
    lab.topology().nodes().map(|n| Ok((n.name.clone(), lab.kernel(&n.name)?))).collect()
}

fn unchanged(before: &[(String, String)], after: &[(String, String)]) -> Result<()> {
    for ((node, before), (_, after)) in before.iter().zip(after) {
        ensure!(after == before, "{node} changed:\n{before}\nto\n{after}");
    }
    Ok(())
}
