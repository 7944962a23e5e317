//! What the loss of a gateway, or of one direction of one tunnel, costs; and that loss alone moves nothing.
#![allow(clippy::print_stderr)]

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use tombolo_lab::count::Netlink;
use tombolo_lab::fault::Fault;
use tombolo_lab::topology::{TWO, Topology};
use tombolo_lab::{Flow, Lab, event, runs, scenario_alone, strict, wait_until};

const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(20);
/// UDP flows, three a direction, and programs that share the TCP flows.
const PROBES: usize = 6;
/// Of each UDP flow: 1,000 packets a second both ways.
const RATE: u32 = 334;
const TCP_FLOWS: usize = 100;
/// Records a second of each TCP flow.
const TCP_RATE: u32 = 5;

fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(&TWO.replace("    pod_cidrs", "    reach: all\n    pod_cidrs"))?)?;
    lab.bring_up()?;
    wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
    // Answered once and known to be: before that nobody is dead.
    for node in lab.topology().nodes() {
        wait_until("liveness", SOON, || {
            let file = lab.state_dir(&node.name).join("health.json");
            let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
            let peers = if node.gateway { 4 } else { 2 };
            let alive = text.matches("alive").count();
            ensure!(alive == peers, "{}: {alive} of {peers} peers are known to be alive", node.name);
            Ok(())
        })?;
    }
    Ok(lab)
}

struct Flows {
    udp: Vec<(String, Flow)>,
    tcp: Vec<(String, Flow)>,
}

/// Between pods of these, both ways and both families.
fn flows(lab: &Lab, eu: &[&str], us: &[&str]) -> Result<Flows> {
    let address = |pod: &str, v4: bool| -> Result<IpAddr> {
        let pod = lab.topology().pod(pod)?;
        Ok(if v4 { pod.v4.into() } else { pod.v6.into() })
    };
    let pairs: Vec<(&str, &str)> =
        eu.iter().flat_map(|e| us.iter().flat_map(|u| [(*u, *e), (*e, *u)])).collect();
    let mut flows = Flows { udp: Vec::new(), tcp: Vec::new() };
    for n in 0..PROBES {
        let (from, to) = pairs[n % pairs.len()];
        let to = address(to, n % 4 < 2)?;
        flows.udp.push((format!("{from} -> {to}"), lab.udp_flow(from, to, RATE)?));
        let share = TCP_FLOWS / PROBES + usize::from(n < TCP_FLOWS % PROBES);
        flows.tcp.push((format!("{from} -> {to}"), lab.tcp_flows(from, to, TCP_RATE, share)?));
    }
    Ok(flows)
}

impl Flows {
    /// The longest gap of UDP, in milliseconds; None if no packet was lost: then chance has led all flows by other ways
    /// than the one that broke, and the run says nothing. No TCP flow may have been reset.
    fn stop(self, title: &str) -> Result<Option<f64>> {
        let (mut worst, mut lost, mut reordered, mut duplicated) = (0.0_f64, 0, 0, 0);
        for (name, flow) in self.udp {
            let report = flow.stop_udp()?;
            ensure!(report.returned > 1000, "{name}: {report:?}");
            worst = worst.max(report.largest_gap_ms);
            lost += report.lost;
            reordered += report.reordered;
            duplicated += report.duplicated;
        }
        let (mut slowest, mut flows) = (0.0_f64, 0);
        for (name, flow) in self.tcp {
            let report = flow.stop_tcp()?;
            ensure!(report.broken.is_none() && report.returned == report.sent, "{name}: {report:?}");
            slowest = slowest.max(report.largest_gap_ms);
            flows += report.flows;
        }
        eprintln!(
            "{title}: worst gap {worst:.0} ms, {lost} packets lost, {reordered} reordered, {duplicated} duplicated; \
             {flows} TCP flows, none reset, their worst gap, with TCP's own retransmission, {slowest:.0} ms"
        );
        if lost == 0 {
            eprintln!("{title}: no flow went that way; not counted");
        }
        Ok((lost > 0).then_some(worst))
    }
}

/// What one run of an event has to report.
type Figures = Vec<(&'static str, f64, &'static str)>;

/// Of a gap that was counted.
fn gap(event: &'static str, gap: Option<f64>) -> Figures {
    gap.map(|gap| (event, gap, "ms")).into_iter().collect()
}

fn slots(lab: &Lab, node: &str, prefix: &str) -> Result<Vec<String>> {
    let text = lab.place(node)?.capture(&["ip", "route", "show", "table", "4510", prefix])?;
    let text = text.split("unreachable").next().unwrap_or_default().to_owned();
    let words: Vec<_> = text.split_whitespace().collect();
    Ok(words.windows(2).filter(|w| w[0] == "dev").map(|w| w[1].to_owned()).collect())
}

/// Both slots carry again everywhere.
fn whole(lab: &Lab) -> Result<()> {
    for (node, prefix) in [
        ("eu-gw1", "10.2.0.0/16"),
        ("eu-gw2", "10.2.0.0/16"),
        ("eu-w1", "10.2.0.0/16"),
        ("us-gw1", "10.1.0.0/16"),
        ("us-gw2", "10.1.0.0/16"),
        ("us-w1", "10.1.0.0/16"),
    ] {
        let slots = slots(lab, node, prefix)?;
        ensure!(slots.len() == 2, "{node} has {slots:?} towards {prefix}");
    }
    Ok(())
}

#[test]
fn a_dying_gateway_costs_less_than_a_second() {
    scenario_alone("a_dying_gateway_costs_less_than_a_second", LIMIT, || {
        let lab = up()?;
        let mut counted = 0;
        for round in 0..runs(2) {
            let (cluster, node, link, us): (_, _, _, &[&str]) = match round % 2 {
                0 => ("us-east", "us-gw1", "n1", &["us-b", "us-c"]),
                _ => ("eu-west", "eu-gw2", "n2", &["us-a", "us-c"]),
            };
            event(&lab, &[node], || {
                let flows = flows(&lab, &["eu-a", "eu-c"], us)?;
                std::thread::sleep(Duration::from_secs(4));
                // As when its power goes: silence first.
                lab.lan(cluster)?.ip(&format!("link set {link} down\n"))?;
                lab.kill_tree(node, "agent")?;
                lab.kill_tree(node, "wireguard")?;
                std::thread::sleep(Duration::from_secs(5));
                let figures = gap("gateway-dies", flows.stop(&format!("{node} dies"))?);
                counted += figures.len();
                lab.lan(cluster)?.ip(&format!("link set {link} up\n"))?;
                lab.restart(node, "wireguard")?;
                lab.restart(node, "agent")?;
                lab.wait_ready()?;
                wait_until("both gateways again", Duration::from_secs(60), || whole(&lab))?;
                Ok(figures)
            })?;
        }
        ensure!(counted > 0, "not one flow crossed a gateway that died");
        Ok(())
    });
}

/// SIGSTOP, as when a machine swaps or a hypervisor pauses: the node's devices hold their sockets and answer nothing.
#[test]
fn hanging_devices_are_left_and_come_back() {
    scenario_alone("hanging_devices_are_left_and_come_back", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(1) {
            event(&lab, &["us-gw1"], || {
                let flows = flows(&lab, &["eu-a", "eu-c"], &["us-b", "us-c"])?;
                std::thread::sleep(Duration::from_secs(4));
                lab.stop("us-gw1", "wireguard")?;
                std::thread::sleep(Duration::from_secs(5));
                let mut figures = gap("devices-hang", flows.stop("us-gw1's devices hang")?);
                lab.cont("us-gw1", "wireguard")?;
                let back = wait_until("both gateways again", Duration::from_secs(60), || whole(&lab))?;
                figures.push(("devices-hang-back", ms(back), "ms"));
                Ok(figures)
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_oneway_cut_is_rerouted_and_heals_without_a_flap() {
    scenario_alone("a_oneway_cut_is_rerouted_and_heals_without_a_flap", LIMIT, || {
        let lab = up()?;
        for round in 0..runs(2) {
            let (from, to) = if round % 2 == 0 { ("eu-gw1", "us-gw1") } else { ("us-gw2", "eu-gw1") };
            event(&lab, &[from, to], || oneway_cut(&lab, from, to))?;
        }
        Ok(())
    });
}

/// The gap, and the changes of carrying routes beyond the one at the cut and the one at the heal, of the node where
/// there are most.
fn oneway_cut(lab: &Lab, from: &str, to: &str) -> Result<Figures> {
    let flows = flows(lab, &["eu-a", "eu-c"], &["us-a", "us-c"])?;
    std::thread::sleep(Duration::from_secs(4));
    let watch = Netlink::watch(lab, &[])?;
    lab.fault(Fault::CutOneway { from: from.into(), to: to.into() })?;
    std::thread::sleep(Duration::from_secs(6));
    let prefix = if from.starts_with("eu") { "10.2.0.0/16" } else { "10.1.0.0/16" };
    wait_until("the cut tunnel to be left", SOON, || {
        let slots = slots(lab, from, prefix)?;
        ensure!(slots.len() == 1, "{from} still uses {slots:?}");
        Ok(())
    })?;
    let before = watch.of(from, prefix).len();
    lab.heal()?;
    wait_until("both slots again", SOON, || whole(lab))?;
    std::thread::sleep(Duration::from_secs(6));
    let mut flaps = 0;
    for node in lab.topology().nodes() {
        for prefix in ["10.1.0.0/16", "10.2.0.0/16"] {
            let changes = watch.of(&node.name, prefix);
            if changes.len() > 2 {
                eprintln!("a flap: {changes:#?}");
            }
            flaps = flaps.max(changes.len().saturating_sub(2));
        }
    }
    let changes = watch.of(from, prefix).len();
    let mut figures = gap("one-way-cut", flows.stop(&format!("cut {from} -> {to}"))?);
    eprintln!("{from} changed its route {before} time(s) at the cut, {} at the heal", changes - before);
    figures.push(("one-way-cut-flaps", flaps as f64, "changes"));
    Ok(figures)
}

#[test]
fn loss_moves_nothing() {
    scenario_alone("loss_moves_nothing", Duration::from_secs(500), || {
        let lab = up()?;
        for _ in 0..runs(1) {
            event(&lab, &[], || {
                let watch = Netlink::watch(&lab, &[])?;
                let flows = flows(&lab, &["eu-a", "eu-c"], &["us-a", "us-c"])?;
                std::thread::sleep(Duration::from_secs(3));
                ensure!(watch.routes().is_empty(), "before any loss: {:#?}", watch.routes());
                lab.fault(Fault::Loss { a: "eu-west".into(), b: "us-east".into(), percent: 5 })?;
                std::thread::sleep(Duration::from_secs(if strict() { 300 } else { 30 }));
                let changes = watch.routes();
                lab.heal()?;
                flows.stop("5 % loss")?;
                if !changes.is_empty() {
                    eprintln!("changes of routes: {changes:#?}");
                }
                wait_until("both slots", SOON, || whole(&lab))?;
                Ok(vec![("loss-5-flaps", changes.len() as f64, "changes")])
            })?;
        }
        Ok(())
    });
}

/// Nodes that start on a bad wire: every tunnel comes up all the same.
#[test]
fn tunnels_come_up_through_heavy_loss() {
    scenario_alone("tunnels_come_up_through_heavy_loss", LIMIT, || {
        let lab = up()?;
        for _ in 0..runs(2) {
            event(&lab, &["us-gw1", "us-gw2"], || {
                for node in ["us-gw1", "us-gw2"] {
                    lab.kill_tree(node, "agent")?;
                    lab.kill_tree(node, "wireguard")?;
                }
                lab.fault(Fault::Loss { a: "eu-west".into(), b: "us-east".into(), percent: 20 })?;
                let start = SystemTime::now();
                for node in ["us-gw1", "us-gw2"] {
                    lab.restart(node, "wireguard")?;
                    lab.restart(node, "agent")?;
                }
                let up = wait_until("handshakes through the loss", Duration::from_secs(60), || {
                    for node in ["us-gw1", "us-gw2"] {
                        handshaken(&lab, node, start)?;
                    }
                    Ok(())
                })?;
                lab.heal()?;
                lab.wait_ready()?;
                wait_until("both gateways again", Duration::from_secs(60), || whole(&lab))?;
                Ok(vec![("loss-20-up", ms(up), "ms")])
            })?;
        }
        Ok(())
    });
}

/// A node's devices towards the other cluster have had a handshake with each of its gateways since then.
fn handshaken(lab: &Lab, node: &str, since: SystemTime) -> Result<()> {
    let since = since.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let text = lab.place(node)?.capture(&["wg", "show", "all", "latest-handshakes"])?;
    let outward = |line: &&str| line.starts_with("tombolo1\t") || line.starts_with("tombolo2\t");
    let times: Vec<_> = text
        .lines()
        .filter(outward)
        .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
        .collect();
    ensure!(times.len() == 2 && times.iter().all(|t| *t >= since), "{node}: {text}");
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
