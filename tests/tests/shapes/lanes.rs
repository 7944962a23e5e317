//! Several tunnels side by side to one node.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_lab::{Lab, scenario, wait_until};

use super::common::{SOON, Shape, busy, bytes, every_node_reaches_every_other, names, slots_of, up};

const LIMIT: Duration = Duration::from_secs(300);
/// The lane-1 device of a gateway towards other gateways of its rank, and its port.
const LANE: (&str, &str) = ("tombolo9", "4519");

/// What the routes of a node's lanes 1 and 2 to a prefix should be.
fn lanes(lab: &Lab, node: &str, prefix: &str, wanted: [&str; 2]) -> Result<()> {
    for (table, wanted) in ["4511", "4512"].into_iter().zip(wanted) {
        let slots = slots_of(lab, node, table, prefix)?;
        ensure!(slots == [wanted], "{node}, table {table}, {prefix}: {slots:?}, not {wanted}");
    }
    Ok(())
}

fn all_lanes(lab: &Lab) -> Result<()> {
    for prefix in ["10.2.0.0/16", "fd00:10:2::/48"] {
        // The other side has two.
        lanes(lab, "eu-gw1", prefix, ["tombolo9", "tombolo1"])?;
        lanes(lab, "eu-w1", prefix, ["tombolo13", "tombolo21"])?;
    }
    lanes(lab, "eu-gw1", "10.3.0.0/16", ["tombolo1", "tombolo1"])?;
    let (own, their) =
        (slots_of(lab, "us-gw1", "4511", "10.1.0.0/16")?, slots_of(lab, "us-w1", "4511", "10.1.0.0/16")?);
    ensure!(own == ["tombolo9"] && their == ["tombolo13"], "us: {own:?} {their:?}");
    ensure!(slots_of(lab, "us-gw1", "4512", "10.1.0.0/16")?.is_empty(), "us has two lanes");
    ensure!(slots_of(lab, "as-gw1", "4511", "10.1.0.0/16")?.is_empty(), "as has one lane");
    Ok(())
}

/// Runs flows between all pods of `eu` and `us` and returns what each device of each node sent meanwhile, bytes.
fn sent(lab: &Lab, nodes: &[&str]) -> Result<BTreeMap<(String, String), u64>> {
    let before: Vec<_> = nodes.iter().map(|node| bytes(lab, node)).collect::<Result<_>>()?;
    let mut flows = Vec::new();
    for p in 1..=6 {
        for q in 1..=6 {
            let to = lab.topology().pod(&format!("us-p{q}"))?;
            let to = if q % 2 == 0 { to.v4.into() } else { to.v6.into() };
            flows.push(lab.udp_flow(&format!("eu-p{p}"), to, 20)?);
        }
    }
    // What a node itself sends.
    let to = lab.topology().pod("us-p1")?;
    for _ in 0..6 {
        flows.push(lab.udp_flow("eu-w1", to.v4.into(), 20)?);
        flows.push(lab.udp_flow("eu-w1", to.v6.into(), 20)?);
    }
    std::thread::sleep(Duration::from_secs(4));
    let reports: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = flows.into_iter().map(|flow| scope.spawn(move || flow.stop_udp())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for report in reports {
        let report = report?;
        ensure!(report.sent > 50 && report.lost == 0, "{report:?}");
    }
    let mut all = BTreeMap::new();
    for (node, before) in nodes.iter().zip(before) {
        for (device, (_, sent)) in bytes(lab, node)? {
            let (_, so_far) = before.get(&device).copied().unwrap_or_default();
            if device.starts_with("tombolo") {
                all.insert(((*node).to_owned(), device), sent - so_far);
            }
        }
    }
    Ok(all)
}

/// Flows are spread over the lanes that both ends have, each lane being a thread; a lane whose port a firewall closes is
/// left within seconds and used again once it is open; whoever has one lane is reached as ever.
#[test]
fn lanes_share_the_flows() {
    scenario("lanes::lanes_share_the_flows", LIMIT, || {
        let of = |lines| Shape { pods: 6, lines, ..Shape::of(1, 1) };
        let lab = up(&[of("lanes: 3"), of("lanes: 2"), Shape::of(1, 1)])?;
        wait_until("all lanes to be used", SOON, || all_lanes(&lab))?;
        every_node_reaches_every_other(&lab)?;
        names(&lab)?;

        let idle = busy(&lab, "eu-w1")?;
        let bytes = sent(&lab, &["eu-w1", "eu-gw1", "us-gw1", "us-w1"])?;
        eprintln!("sent, bytes by node and device: {bytes:?}");
        let shares = |node: &str, devices: &[&str]| -> Result<()> {
            let of =
                |device: &&str| bytes.get(&(node.to_owned(), (*device).to_owned())).copied().unwrap_or(0);
            let all: u64 = devices.iter().map(of).sum();
            let least = all / (3 * devices.len() as u64);
            ensure!(all > 200_000 && devices.iter().all(|d| of(d) > least), "{node}: {devices:?}: {bytes:?}");
            Ok(())
        };
        shares("eu-w1", &["tombolo5", "tombolo13", "tombolo21"])?;
        shares("eu-gw1", &["tombolo4", "tombolo12"])?;
        shares("eu-gw1", &["tombolo1", "tombolo9"])?;
        shares("us-gw1", &["tombolo1", "tombolo9"])?;
        shares("us-gw1", &["tombolo4", "tombolo12"])?;
        shares("us-w1", &["tombolo5", "tombolo13"])?;
        let busy = busy(&lab, "eu-w1")?;
        let ran: Vec<f64> = ["tombolo5", "tombolo13", "tombolo21"]
            .map(|device| busy.get(device).unwrap_or(&0.0) - idle.get(device).unwrap_or(&0.0))
            .into();
        eprintln!("eu-w1: milliseconds of processor of tombolo5, tombolo13, tombolo21: {ran:.1?}");
        let all: f64 = ran.iter().sum();
        ensure!(ran.iter().all(|ran| *ran > 0.1 * all), "one thread does all: {ran:?}");

        // A firewall that lets the other lanes through.
        let closed = format!(
            "add table inet closed\nadd chain inet closed in {{ type filter hook input priority 0; }}\n\
             add rule inet closed in udp dport {port} drop\n\
             add chain inet closed out {{ type filter hook output priority 0; }}\n\
             add rule inet closed out udp dport {port} drop\n",
            port = LANE.1
        );
        lab.place("us-gw1")?.nft(&closed)?;
        let without = || {
            lanes(&lab, "eu-gw1", "10.2.0.0/16", ["tombolo1", "tombolo1"])?;
            let back = slots_of(&lab, "us-gw1", "4511", "10.1.0.0/16")?;
            ensure!(back == ["tombolo1"], "us-gw1: {back:?}");
            Ok(())
        };
        wait_until("the closed lane to be left", SOON, without)?;
        let bytes = sent(&lab, &["eu-gw1"])?;
        let late = bytes.get(&("eu-gw1".to_owned(), LANE.0.to_owned())).copied().unwrap_or(0);
        ensure!(late < 50_000, "{bytes:?}");
        lab.place("us-gw1")?.capture(&["nft", "delete", "table", "inet", "closed"])?;
        wait_until("the lane to be used again", SOON, || all_lanes(&lab))?;
        sent(&lab, &["eu-gw1"]).map(|_| ())
    });
}
