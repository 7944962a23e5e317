//! A third cluster joins a set that runs, and leaves it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tombolo_lab::{Lab, measured, scenario_alone, wait_until};

use super::common::{
    SOON, Shape, every_node_reaches_every_other, kernel, name_of, names, since, topology, up,
};

const LIMIT: Duration = Duration::from_secs(300);

fn flows(lab: &Lab) -> Result<Vec<tombolo_lab::Flow>> {
    let of = |pod: &str| lab.topology().pod(pod);
    Ok(vec![
        lab.udp_flow("eu-p1", of("us-p1")?.v4.into(), 1000)?,
        lab.udp_flow("us-p1", of("eu-p1")?.v6.into(), 1000)?,
        lab.udp_flow("us-g1", of("eu-g1")?.v4.into(), 1000)?,
    ])
}

fn nothing_lost(title: &str, flows: Vec<tombolo_lab::Flow>) -> Result<()> {
    for flow in flows {
        let report = flow.stop_udp()?;
        eprintln!(
            "{title}: {} sent, {} lost, largest gap {:.0} ms",
            report.sent, report.lost, report.largest_gap_ms
        );
        ensure!(report.sent > 1000 && report.lost == 0, "{title}: {report:?}");
    }
    Ok(())
}

#[test]
fn a_third_cluster_joins_and_leaves() {
    scenario_alone("live::a_third_cluster_joins_and_leaves", LIMIT, || {
        let two = [Shape::of(2, 1), Shape::of(1, 1)];
        let mut lab = up(&two)?;
        let before: Vec<_> = ["eu-gw1", "eu-w1", "us-gw1", "us-w1"]
            .iter()
            .map(|node| Ok((*node, kernel(&lab, node)?)))
            .collect::<Result<_>>()?;

        let [eu, us] = two;
        lab.grow(topology(&[eu, us, Shape::of(1, 1)])?)?;
        let running = flows(&lab)?;
        std::thread::sleep(Duration::from_secs(1));
        let start = Instant::now();
        lab.join("as")?;
        lab.start_agents("as")?;
        lab.export("as", "production", "svc-as")?;
        wait_until("names and virtual addresses of the third", SOON, || names(&lab))?;
        measured("third-joins", since(start), "ms")?;
        wait_until("tunnels", SOON, || every_node_reaches_every_other(&lab))?;
        eprintln!("a third cluster: everybody reaches everybody after {:.0} ms", since(start));
        nothing_lost("join", running)?;

        let running = flows(&lab)?;
        std::thread::sleep(Duration::from_secs(1));
        let start = Instant::now();
        lab.revoke("as")?;
        wait_until("the third to be gone everywhere", SOON, || {
            for (node, before) in &before {
                let after = kernel(&lab, node)?;
                ensure!(after == *before, "{node} has\n{after}\nand had\n{before}");
            }
            for pod in ["eu-p1", "us-g1"] {
                let answer = lab.ask(pod, &name_of("as"), 1)?;
                ensure!(answer.0 == 3, "{pod} still gets {answer:?}");
            }
            for node in ["as-gw1", "as-w1"] {
                let devices = lab.place(node)?.capture(&["ip", "-o", "link", "show"])?;
                ensure!(!devices.contains("tombolo"), "{node} still has\n{devices}");
                let answer = lab.ask("as-p1", &name_of("eu"), 1)?;
                ensure!(answer.0 != 0 || answer.1.is_empty(), "as still gets {answer:?}");
            }
            Ok(())
        })?;
        measured("third-leaves", since(start), "ms")?;
        nothing_lost("leave", running)
    });
}
