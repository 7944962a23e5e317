//! A disk without room: nothing is lost, one clear error says it, and all goes on when there is room again.
#![allow(clippy::print_stderr)]

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tombolo_lab::directory;
use tombolo_lab::fault::Fault;
use tombolo_lab::place::log_dir;
use tombolo_lab::topology::{NAMESERVER, TWO, Topology};
use tombolo_lab::{Flow, Lab, event, runs, scenario_alone, wait_until};

const LIMIT: Duration = Duration::from_secs(200);
const SOON: Duration = Duration::from_secs(30);
const API: &str = "api-service.production.svc.clusterset.local";
const WEB: &str = "web.production.svc.clusterset.local";

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(TWO)?)?;
    lab.bring_up()?;
    lab.export("eu-west", "production", "api-service")?;
    wait_until("the name", SOON, || lab.fetch("us-c", &format!("http://{API}:8080/health"), &[]).map(drop))?;
    Ok(lab)
}

fn flows(lab: &Lab) -> Result<Vec<Flow>> {
    let backend = lab.topology().pod("eu-c")?;
    Ok(vec![
        lab.udp_flow("us-c", backend.v4.into(), 500)?,
        lab.udp_flow("us-a", backend.v6.into(), 500)?,
        lab.dns_flow("us-c", &format!("{NAMESERVER}:53"), API, 1, 200)?,
    ])
}

/// Packets and answers that did not come.
fn missing(flows: Vec<Flow>) -> Result<f64> {
    let mut missing = 0;
    for flow in flows {
        match flow.stop()? {
            tombolo_lab::probe::Report::Udp(report) => {
                eprintln!("{report:?}");
                missing += report.lost;
            }
            tombolo_lab::probe::Report::Dns(report) => {
                eprintln!("{report:?}");
                missing += report.refused + report.unanswered + report.empty;
            }
            tombolo_lab::probe::Report::Tcp(report) => ensure!(report.broken.is_none(), "{report:?}"),
        }
    }
    Ok(missing as f64)
}

/// What a program has written to its log since then.
struct Log {
    file: std::path::PathBuf,
    start: usize,
}

impl Log {
    fn of(place: &str, program: &str) -> Result<Self> {
        let file = log_dir().join(format!("{place}-{program}.log"));
        let start = std::fs::read(&file).with_context(|| file.display().to_string())?.len();
        Ok(Self { file, start })
    }

    /// Warnings and errors.
    fn troubles(&self) -> Result<Vec<String>> {
        let lines = self.lines()?;
        Ok(lines.into_iter().filter(|l| l.contains("ERROR") || l.contains("WARN")).collect())
    }

    fn lines(&self) -> Result<Vec<String>> {
        let bytes = std::fs::read(&self.file)?;
        let new = String::from_utf8_lossy(bytes.get(self.start..).unwrap_or_default()).into_owned();
        Ok(new.lines().map(str::to_owned).collect())
    }
}

fn news(lab: &Lab, cluster: &str, service: &str, pod: &str, name: &str) -> Result<()> {
    lab.export(cluster, "production", service)?;
    wait_until("news", SOON, || {
        lab.fetch(pod, &format!("http://{name}:8080/health"), &["--timeout", "2"]).map(drop)
    })
    .map(drop)
}

/// A service of 4,000 backends, of which nobody is there: more than a store's free pages hold.
fn bulk(lab: &Lab) -> Result<()> {
    let manifests = lab.cluster_dir("eu-west").join("manifests");
    let mut text =
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: bulk\n  namespace: production\nspec:\n  \
                    clusterIP: None\n  clusterIPs: [None]\n  ipFamilies: [IPv4]\n  ports:\n    \
                    - { name: http, port: 8080, targetPort: 8080, protocol: TCP }\n"
            .to_owned();
    for slice in 0..40 {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: bulk-{slice}\n  \
             namespace: production\n  labels:\n    kubernetes.io/service-name: bulk\naddressType: IPv4\nports:\n  \
             - {{ name: http, port: 8080, protocol: TCP }}\nendpoints:\n"
        );
        for n in 1..=100 {
            let _ = writeln!(
                text,
                "  - {{ addresses: [10.1.{}.{n}], hostname: a-rather-long-name-of-backend-{slice}-{n}, \
                 conditions: {{ ready: true, serving: true, terminating: false }} }}",
                100 + slice
            );
        }
    }
    directory::put(&manifests, "bulk.yaml", &text)?;
    lab.export("eu-west", "production", "bulk")
}

fn full(of: &str) -> Fault {
    Fault::DiskFull { of: of.to_owned() }
}

#[test]
fn a_full_disk_of_the_broker_loses_nothing() {
    scenario_alone("a_full_disk_of_the_broker_loses_nothing", LIMIT, || {
        // One run a lab: a store that has grown once has room in itself.
        let lab = up()?;
        event(&lab, &["broker"], || {
            let flows = flows(&lab)?;
            let log = Log::of("broker", "broker")?;
            lab.fault(full("broker"))?;
            // It passes on what it cannot keep.
            bulk(&lab)?;
            news(&lab, "us-east", "web", "eu-c", WEB)?;
            wait_until("the broker to say so", SOON, || {
                ensure!(!log.troubles()?.is_empty(), "not a word");
                Ok(())
            })?;
            // The event itself: several tries to write.
            std::thread::sleep(Duration::from_secs(6));
            let troubles = log.troubles()?;
            eprintln!("{troubles:#?}");
            ensure!(troubles.len() == 1 && troubles[0].contains("No space left"), "{troubles:#?}");
            lab.heal()?;
            wait_until("the broker to write again", SOON, || {
                ensure!(log.lines()?.iter().any(|l| l.contains("is written again")), "{:#?}", log.lines()?);
                Ok(())
            })?;
            lab.kill("broker", "broker")?;
            lab.restart("broker", "broker")?;
            lab.wait_ready()?;
            let missing = missing(flows)?;
            lab.unexport("us-east", "production", "web")?;
            lab.unexport("eu-west", "production", "bulk")?;
            Ok(vec![("disk-full-broker-lost", missing, "packets")])
        })
    });
}

#[test]
fn a_full_disk_of_nodes_loses_nothing() {
    scenario_alone("a_full_disk_of_nodes_loses_nothing", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(1) {
            event(&lab, &["us-w1", "eu-gw1"], || {
                let flows = flows(&lab)?;
                let logs = [Log::of("us-w1", "agent")?, Log::of("eu-gw1", "agent")?];
                lab.fault(full("us-w1"))?;
                lab.fault(full("eu-gw1"))?;
                // They learn, plan and apply what they cannot cache.
                news(&lab, "us-east", "web", "eu-c", WEB)?;
                lab.export("eu-west", "production", "db")?;
                wait_until("news on a node with a full disk", SOON, || {
                    let (code, list) = lab.ask("us-c", "db.production.svc.clusterset.local", 1)?;
                    ensure!(code == 0 && list.len() == 3, "{code}: {list:?}");
                    Ok(())
                })?;
                // And start again from what they have.
                for node in ["us-w1", "eu-gw1"] {
                    lab.kill_child(node, "agent")?;
                }
                std::thread::sleep(Duration::from_secs(6));
                lab.wait_ready()?;
                for log in &logs {
                    let troubles = log.troubles()?;
                    // Once by the agent that was killed, once by the one that followed.
                    let full: Vec<_> = troubles.iter().filter(|l| l.contains("cannot be kept")).collect();
                    ensure!(full.len() <= 2, "{full:#?}");
                    ensure!(full.iter().all(|l| l.contains("No space left")), "{full:#?}");
                    eprintln!("{troubles:#?}");
                }
                lab.heal()?;
                let missing = missing(flows)?;
                lab.unexport("us-east", "production", "web")?;
                lab.unexport("eu-west", "production", "db")?;
                Ok(vec![("disk-full-node-lost", missing, "packets")])
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_full_disk_of_the_api_loses_nothing() {
    scenario_alone("a_full_disk_of_the_api_loses_nothing", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(1) {
            event(&lab, &["eu-gw1", "eu-gw2", "eu-w1"], || {
                let flows = flows(&lab)?;
                let nodes = ["eu-gw1", "eu-gw2", "eu-w1"];
                let logs = nodes.iter().map(|n| Log::of(n, "agent")).collect::<Result<Vec<_>>>()?;
                lab.fault(full("eu-west"))?;
                // The event itself: longer than a Lease.
                std::thread::sleep(Duration::from_secs(20));
                // Who wants to write says so once, until it can.
                let mut told = 0;
                for log in &logs {
                    let troubles = log.troubles()?;
                    let full = troubles.iter().filter(|l| l.contains("No space left")).count();
                    ensure!(full <= 1 && troubles.len() == full, "{troubles:#?}");
                    told += full;
                }
                ensure!(told > 0, "not a word");
                lab.heal()?;
                news(&lab, "eu-west", "db", "us-c", "db.production.svc.clusterset.local")?;
                lab.unexport("eu-west", "production", "db")?;
                lab.wait_ready()?;
                Ok(vec![("disk-full-api-lost", missing(flows)?, "packets")])
            })?;
        }
        Ok(())
    });
}
