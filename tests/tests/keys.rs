//! Keys and grants change under traffic, and what the administrator takes back is gone everywhere.
#![allow(clippy::print_stderr)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_agent::api::Member;
use tombolo_agent::api::directory::Directory;
use tombolo_lab::directory::{node_manifest, put};
use tombolo_lab::fault::Fault;
use tombolo_lab::probe::Report;
use tombolo_lab::sandbox::ROOT;
use tombolo_lab::topology::{NAMESERVER, TWO, Topology};
use tombolo_lab::{Flow, Lab, event, place, program, scenario, strict, wait_until};
use tombolo_proto::model::{ClusterId, Position};
use tombolo_proto::wire::decode_statement;

const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(30);
const API: &str = "api-service.production.svc.clusterset.local";

/// What was measured: event, figure, unit.
type Figures = Vec<(&'static str, f64, &'static str)>;

/// Two clusters of three nodes; every pod reaches every pod.
fn up() -> Result<Lab> {
    let lab = Lab::build(Topology::parse(&TWO.replace("    pod_cidrs", "    reach: all\n    pod_cidrs"))?)?;
    lab.bring_up()?;
    lab.export("eu-west", "production", "api-service")?;
    wait_until("the name", SOON, || lab.fetch("us-c", &format!("http://{API}:8080/health"), &[]).map(drop))?;
    wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
    Ok(lab)
}

/// 1,000 packets a second both ways and both families, from pods on gateways and on workers, and names.
fn flows(lab: &Lab) -> Result<Vec<Flow>> {
    let pod = |name: &str| lab.topology().pod(name);
    Ok(vec![
        lab.udp_flow("us-c", pod("eu-c")?.v4.into(), 500)?,
        lab.udp_flow("us-a", pod("eu-c")?.v6.into(), 500)?,
        lab.udp_flow("eu-a", pod("us-c")?.v4.into(), 500)?,
        lab.udp_flow("eu-c", pod("us-b")?.v6.into(), 500)?,
        lab.dns_flow("us-c", &format!("{NAMESERVER}:53"), API, 1, 200)?,
    ])
}

/// Ends the flows; how many packets and answers were lost.
fn lost(flows: Vec<Flow>) -> Result<u64> {
    // What an event does late counts too.
    std::thread::sleep(if strict() { Duration::from_secs(30) } else { Duration::from_secs(4) });
    let mut lost = 0;
    for flow in flows {
        match flow.stop()? {
            Report::Udp(report) => {
                ensure!(report.sent > 1000, "{report:?}");
                if report.lost > 0 {
                    eprintln!("{report:?}");
                }
                lost += report.lost;
            }
            Report::Dns(report) => {
                ensure!(report.sent > 500, "{report:?}");
                lost += report.refused + report.unanswered + report.empty;
                ensure!(report.answers.keys().eq([&0]), "{report:?}");
            }
            Report::Tcp(report) => ensure!(report.broken.is_none(), "{report:?}"),
        }
    }
    Ok(lost)
}

/// A command of the administrator's, who sits at the wire.
fn administrator(lab: &Lab, words: &[&str]) -> Result<String> {
    let mut args = vec![program::find("tombolo")?];
    args.extend(words.iter().map(|w| (*w).to_owned()));
    args.extend(["--dir".to_owned(), program::set_dir()]);
    spoken(words, lab.command("wire", &args)?.stdin(Stdio::null()).output()?)
}

/// A command in a cluster, with this input.
fn in_cluster(lab: &Lab, node: &str, words: &[&str], input: &str) -> Result<String> {
    let mut command = lab.command(node, &program::tombolo(words)?)?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no input")?.write_all(input.as_bytes())?;
    spoken(words, child.wait_with_output()?)
}

fn spoken(words: &[&str], output: Output) -> Result<String> {
    ensure!(output.status.success(), "tombolo {}: {}", words.join(" "), place::words(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// What a cluster keeps of another.
fn member(lab: &Lab, seen_by: &str, of: &str) -> Result<Member> {
    let observed = Directory::open(lab.cluster_dir(seen_by))?.read();
    let members = observed.members.get().context("the members cannot be read")?;
    members.get(&ClusterId::new(of)?).cloned().with_context(|| format!("{seen_by} does not know {of}"))
}

/// How far a cluster has spoken, as another knows.
fn position(lab: &Lab, seen_by: &str, of: &str) -> Result<Position> {
    let statement = member(lab, seen_by, of)?.statement.with_context(|| format!("{of} has not spoken"))?;
    Ok(decode_statement(&statement.payload)?.position)
}

fn known(lab: &Lab, seen_by: &str, of: &str, serial: u64, generation: u32) -> Result<()> {
    let at = position(lab, seen_by, of)?;
    ensure!(
        (at.serial, at.generation) == (serial, generation),
        "{seen_by} has {of} at {at}, not under {serial}.{generation}"
    );
    Ok(())
}

/// The node whose agent leads a cluster.
fn leader(lab: &Lab, cluster: &str) -> Result<String> {
    let lease = Directory::open(lab.cluster_dir(cluster))?.read_lease()?.context("no Lease")?;
    lease.value.holder.context("nobody leads")
}

/// The routes of a node to other clusters.
fn routes(lab: &Lab, node: &str) -> Result<String> {
    let place = lab.place(node)?;
    let mut text = place.capture(&["ip", "route", "show", "table", "4510"])?;
    text += &place.capture(&["ip", "-6", "route", "show", "table", "4510"])?;
    Ok(text)
}

/// The keys of all peers of all devices of a node.
fn peers(node: &str) -> Result<BTreeSet<String>> {
    let mut keys = BTreeSet::new();
    for entry in std::fs::read_dir(Path::new(ROOT).join("node").join(node).join("run/wireguard"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !(name.starts_with("tombolo") && name.ends_with(".sock")) {
            continue;
        }
        // A device that is just going away has no peers.
        let Ok(mut stream) = std::os::unix::net::UnixStream::connect(&path) else { continue };
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"get=1\n\n")?;
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !(text.contains("errno=") && text.ends_with("\n\n")) {
            let count = stream.read(&mut buffer)?;
            ensure!(count > 0, "{name} of {node} says {text:?}");
            text += std::str::from_utf8(&buffer[..count])?;
        }
        keys.extend(text.lines().filter_map(|l| l.strip_prefix("public_key=")).map(str::to_owned));
    }
    Ok(keys)
}

/// The WireGuard keys of a cluster's nodes.
fn wireguard_keys(lab: &Lab, cluster: &str) -> Result<BTreeSet<String>> {
    let observed = Directory::open(lab.cluster_dir(cluster))?.read();
    let nodes = observed.tunnel_nodes.get().context("the nodes cannot be read")?;
    let devices = nodes.values().flat_map(|node| node.devices.values());
    Ok(devices.map(|device| device.key.0.iter().map(|b| format!("{b:02x}")).collect()).collect())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[test]
fn a_rotated_cluster_key_loses_no_packet() {
    scenario("a_rotated_cluster_key_loses_no_packet", LIMIT, || {
        let lab = up()?;
        event(&lab, &[], || rotations(&lab))?;
        // What it says with the new key counts.
        lab.export("us-east", "production", "web")?;
        wait_until("news under the new key", SOON, || {
            let url = "http://web.production.svc.clusterset.local:8080/health";
            lab.fetch("eu-c", url, &["--timeout", "2"]).map(drop)
        })?;
        Ok(())
    });
}

/// Of both clusters, with a leader that dies, and twice while the broker is away.
fn rotations(lab: &Lab) -> Result<Figures> {
    let nodes: Vec<_> = lab.topology().nodes().map(|n| n.name.clone()).collect();
    let before: Vec<_> = nodes.iter().map(|n| lab.kernel(n)).collect::<Result<_>>()?;
    let mut figures = Figures::new();
    let flows = flows(lab)?;
    for (cluster, other, node) in [("us-east", "eu-west", "us-w1"), ("eu-west", "us-east", "eu-gw1")] {
        let now = position(lab, cluster, cluster)?;
        let next = now.generation + 1;
        let start = Instant::now();
        let said = in_cluster(lab, node, &["rotate", "cluster-key"], "")?;
        ensure!(said.contains(&format!("generation {next} now")) && said.contains("spoken with"), "{said}");
        wait_until("the other cluster to hear it", SOON, || known(lab, other, cluster, now.serial, next))?;
        figures.push(("cluster-key-rotation-known", ms(start.elapsed()), "ms"));
    }
    // Whoever starts now speaks with the new key.
    let at = position(lab, "us-east", "us-east")?;
    lab.kill_child(&leader(lab, "us-east")?, "agent")?;
    wait_until("a leader", SOON, || {
        let now = position(lab, "us-east", "us-east")?;
        ensure!(now.epoch > at.epoch && now.generation == at.generation, "at {now} still");
        Ok(())
    })?;
    // Twice while the broker is away: who was not there hears of both at once.
    lab.kill("broker", "broker")?;
    for generation in [at.generation + 1, at.generation + 2] {
        let said = in_cluster(lab, "us-gw1", &["rotate", "cluster-key", "-o", "json"], "")?;
        ensure!(said.contains(&format!("\"generation\": {generation}")), "{said}");
    }
    known(lab, "eu-west", "us-east", at.serial, at.generation)?;
    lab.restart("broker", "broker")?;
    let last = at.generation + 2;
    wait_until("the broker's return", SOON, || known(lab, "eu-west", "us-east", at.serial, last))?;
    let held = member(lab, "eu-west", "us-east")?.bindings.len();
    ensure!(held == usize::try_from(last)? + 1, "{held} bindings");
    figures.push(("cluster-key-rotation-lost", lost(flows)? as f64, "packets"));
    for (node, before) in nodes.iter().zip(before) {
        let after = lab.kernel(node)?;
        ensure!(after == before, "{node} changed:\n{before}\nto\n{after}");
    }
    let status = in_cluster(lab, "eu-gw2", &["status", "-o", "json"], "")?;
    ensure!(status.contains(&format!("\"generation\": {last}")), "{status}");
    Ok(figures)
}

/// A second range on a worker's CNI: a pod gets an address in it.
fn second_range(lab: &Lab) -> Result<()> {
    let node = lab.topology().node("us-w1")?;
    lab.place("us-c")?.ip("addr add 10.9.3.10/24 dev eth0\n")?;
    lab.place("us-w1")?.ip("addr add 10.9.3.1/24 dev cni0\n")?;
    for gateway in ["us-gw1", "us-gw2"] {
        lab.place(gateway)?.ip(&format!("route add 10.9.3.0/24 via {}\n", node.v4))?;
    }
    let manifest = node_manifest(node).replace("podCIDRs: [", "podCIDRs: [\"10.9.3.0/24\", ");
    put(&lab.cluster_dir("us-east").join("manifests"), "node-us-w1.yaml", &manifest)
}

#[test]
fn an_extended_grant_loses_no_packet_and_carries() {
    scenario("an_extended_grant_loses_no_packet_and_carries", LIMIT, || {
        let lab = up()?;
        let target: IpAddr = SECOND.parse()?;
        second_range(&lab)?;
        let echo = lab.ping("eu-c", target, Duration::from_millis(500))?;
        ensure!(!echo.is_answered(), "it is reached before it is granted");
        event(&lab, &[], || extension(&lab, target))
    });
}

/// An address of a pod in the second range.
const SECOND: &str = "10.9.3.10";

/// A range comes and goes.
fn extension(lab: &Lab, target: IpAddr) -> Result<Figures> {
    let mut figures = Figures::new();
    let nodes = |cluster: &str| -> Result<Vec<String>> {
        Ok(lab.topology().cluster(cluster)?.nodes.iter().map(|n| n.name.clone()).collect())
    };
    let before = position(lab, "eu-west", "us-east")?;

    let flows = flows(lab)?;
    let token = administrator(lab, &["invite", "us-east", "--add-pod-cidr", "10.9.0.0/16"])?;
    let start = Instant::now();
    in_cluster(lab, "us-gw1", &["join", "-"], &token)?;
    for node in nodes("eu-west")? {
        wait_until("the new range to be routed", SOON, || {
            let routes = routes(lab, &node)?;
            ensure!(routes.contains("unreachable 10.9.0.0/16 "), "{node} does not know it:\n{routes}");
            Ok(())
        })?;
    }
    // From pods of a worker and of a gateway, source kept, and back.
    for pod in ["eu-c", "eu-a"] {
        let own = lab.topology().pod(pod)?.v4.to_string();
        wait_until("the new range to carry", SOON, || {
            let answer = lab.fetch(pod, &format!("http://{target}:8080/ip"), &["--timeout", "1"])?;
            ensure!(answer.body.trim() == own, "{target} saw {own} as {}", answer.body);
            ensure!(lab.ping(pod, target, Duration::from_secs(1))?.is_answered(), "no echo");
            Ok(())
        })?;
    }
    figures.push(("grant-extended-carries", ms(start.elapsed()), "ms"));
    let after = position(lab, "eu-west", "us-east")?;
    ensure!(after.serial > before.serial && after.generation == 0, "{before} -> {after}");
    figures.push(("grant-extended-lost", lost(flows)? as f64, "packets"));

    // Narrowed again: gone everywhere, and what stays carries on.
    let flows = self::flows(lab)?;
    let token = administrator(lab, &["invite", "us-east", "--remove-pod-cidr", "10.9.0.0/16"])?;
    let start = Instant::now();
    in_cluster(lab, "us-gw2", &["join", "-"], &token)?;
    for node in nodes("eu-west")?.iter().chain(&nodes("us-east")?) {
        wait_until("the range to go", SOON, || {
            let routes = routes(lab, node)?;
            ensure!(!routes.contains("10.9."), "{node} still has it:\n{routes}");
            Ok(())
        })?;
    }
    figures.push(("grant-narrowed-gone", ms(start.elapsed()), "ms"));
    let echo = lab.ping("eu-c", target, Duration::from_millis(500))?;
    ensure!(!echo.is_answered(), "it is reached still");
    figures.push(("grant-narrowed-lost", lost(flows)? as f64, "packets"));
    Ok(figures)
}

#[test]
fn a_stolen_key_is_replaced_without_a_gap() {
    scenario("a_stolen_key_is_replaced_without_a_gap", LIMIT, || {
        let lab = up()?;
        event(&lab, &[], || replacement(&lab))?;
        lab.export("us-east", "production", "web")?;
        wait_until("news under the new grant", SOON, || {
            let url = "http://web.production.svc.clusterset.local:8080/health";
            lab.fetch("eu-c", url, &["--timeout", "2"]).map(drop)
        })?;
        Ok(())
    });
}

/// By a newer grant and a new key; then the former grant ends.
fn replacement(lab: &Lab) -> Result<Figures> {
    let key = || -> Result<_> {
        let key = Directory::open(lab.cluster_dir("us-east"))?.read_cluster_key()?;
        Ok(key.context("no key")?.public())
    };
    let (stolen, before) = (key()?, position(lab, "eu-west", "us-east")?);
    let flows = flows(lab)?;
    let ranges = ["10.2.0.0/16", "fd00:10:2::/48"].map(|r| ["--pod-cidr", r]).concat();
    let token = administrator(lab, &[&["invite", "us-east", "--renew"][..], ranges.as_slice()].concat())?;
    in_cluster(lab, "us-w1", &["join", "-", "--new-key"], &token)?;
    ensure!(key()? != stolen, "the key is the same");
    wait_until("the other cluster to hear it", SOON, || {
        let now = position(lab, "eu-west", "us-east")?;
        ensure!(now.serial > before.serial, "{now}");
        Ok(())
    })?;
    // Now the grant that the thief can speak under is ended, and the cluster's own is not.
    administrator(lab, &["revoke", "us-east", "--older", "--yes"])?;
    wait_until("the list to be there", SOON, || {
        let set = Directory::open(lab.cluster_dir("eu-west"))?.read_clusterset()?.context("no set")?;
        ensure!(set.value.revocations.is_some(), "no list yet");
        Ok(())
    })?;
    Ok(vec![("stolen-key-replaced-lost", lost(flows)? as f64, "packets")])
}

#[test]
fn revocation_is_obeyed_everywhere() {
    scenario("revocation_is_obeyed_everywhere", LIMIT, || {
        let lab = up()?;
        lab.export("us-east", "production", "web")?;
        wait_until("the name", SOON, || {
            let url = "http://web.production.svc.clusterset.local:8080/health";
            lab.fetch("eu-c", url, &["--timeout", "2"]).map(drop)
        })?;
        event(&lab, &[], || revocation(&lab))
    });
}

/// Of a cluster, which is admitted again then.
fn revocation(lab: &Lab) -> Result<Figures> {
    let keys: BTreeMap<&str, BTreeSet<String>> = ["eu-west", "us-east"]
        .into_iter()
        .map(|cluster| Ok((cluster, wireguard_keys(lab, cluster)?)))
        .collect::<Result<_>>()?;
    let start = Instant::now();
    lab.revoke("eu-west")?;
    // On both sides: the others forget it, and it forgets the others.
    for cluster in &lab.topology().clusters {
        let (gone, range) = if cluster.id == "eu-west" { ("us-east", "10.2.") } else { ("eu-west", "10.1.") };
        for node in &cluster.nodes {
            wait_until("peers and routes to go", SOON, || forgotten(lab, &node.name, range, &keys[gone]))?;
        }
    }
    for (pod, name) in [("us-c", API), ("eu-c", "web.production.svc.clusterset.local")] {
        wait_until("the name to go", SOON, || {
            let answer = lab.ask(pod, name, 1)?;
            ensure!(answer.0 == 3, "{name} answers {answer:?}");
            Ok(())
        })?;
    }
    let took = ms(start.elapsed());
    let target = lab.topology().pod("eu-c")?.v4.into();
    let echo = lab.ping("us-c", target, Duration::from_millis(500))?;
    ensure!(!echo.is_answered(), "it is reached still: {echo:?}");
    let told = in_cluster(lab, "eu-gw1", &["status"], "")?;
    ensure!(told.contains("revoked by the administrator"), "{told}");
    // Admitted again, it is back.
    lab.join("eu-west")?;
    wait_until("the cluster to be back", SOON, || lab.everybody_reaches_everybody())?;
    Ok(vec![("revocation", took, "ms")])
}

fn forgotten(lab: &Lab, node: &str, range: &str, keys: &BTreeSet<String>) -> Result<()> {
    let routes = routes(lab, node)?;
    ensure!(!routes.contains(range), "{node} still has routes:\n{routes}");
    let peers = peers(node)?;
    ensure!(peers.is_disjoint(keys), "{node} still has peers");
    Ok(())
}

/// Three clusters of one node, two brokers.
const THREE: &str = r#"
name: three
brokers: [broker-1, broker-2]
clusters:
  - id: oslo
    reach: all
    pod_cidrs: [10.1.0.0/16, "fd00:10:1::/48"]
    nodes: [{ name: oslo-1, gateway: true, pods: [{ name: oslo-a, namespace: production, app: api }] }]
    services:
      - { name: api, namespace: production, app: api, ports: [{ name: http, port: 8080 }] }
  - id: riga
    reach: all
    pod_cidrs: [10.2.0.0/16, "fd00:10:2::/48"]
    nodes: [{ name: riga-1, gateway: true, pods: [{ name: riga-a, namespace: production, app: web }] }]
  - id: turku
    reach: all
    pod_cidrs: [10.3.0.0/16, "fd00:10:3::/48"]
    nodes: [{ name: turku-1, gateway: true, pods: [{ name: turku-a, namespace: production, app: web }] }]
"#;

#[test]
fn revocation_comes_by_whoever_has_it() {
    scenario("revocation_comes_by_whoever_has_it", LIMIT, || {
        let lab = Lab::build(Topology::parse(THREE)?)?;
        lab.bring_up()?;
        wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
        event(&lab, &[], || by_another(&lab))
    });
}

/// One cluster hears of a revocation through another.
fn by_another(lab: &Lab) -> Result<Figures> {
    lab.export("oslo", "production", "api")?;
    let name = "api.production.svc.clusterset.local";
    for pod in ["riga-a", "turku-a"] {
        wait_until("the name", SOON, || {
            ensure!(lab.ask(pod, name, 1)?.0 == 0, "{pod} does not know it");
            Ok(())
        })?;
    }
    let keys = wireguard_keys(lab, "oslo")?;
    let gone = |pod: &str, node: &str| -> Result<()> {
        forgotten(lab, node, "10.1.", &keys)?;
        let answer = lab.ask(pod, name, 1)?;
        ensure!(answer.0 == 3, "{pod} hears {answer:?}");
        Ok(())
    };
    let flow = lab.udp_flow("riga-a", lab.topology().pod("turku-a")?.v4.into(), 1000)?;
    // turku is cut off from the only broker that the administrator reaches.
    lab.fault(Fault::Cut { a: "turku".into(), b: "broker-1".into() })?;
    lab.stop("broker-2", "broker")?;
    let start = Instant::now();
    lab.revoke("oslo")?;
    wait_until("riga to obey", SOON, || gone("riga-a", "riga-1"))?;
    let riga = start.elapsed();
    ensure!(gone("turku-a", "turku-1").is_err(), "turku cannot know");
    // riga has sessions with both brokers, and passes on what it heard.
    lab.cont("broker-2", "broker")?;
    let start = Instant::now();
    wait_until("turku to obey", SOON, || gone("turku-a", "turku-1"))?;
    let turku = ms(start.elapsed());
    // A broker that does not answer is waited for by the command, not by the members.
    ensure!(riga < Duration::from_secs(20), "{riga:?}");
    let lost = lost(vec![flow])? as f64;
    // Back to where it began.
    lab.heal()?;
    lab.join("oslo")?;
    wait_until("it to be back", SOON, || lab.everybody_reaches_everybody())?;
    Ok(vec![("revocation-by-another", turku, "ms"), ("revocation-others-lost", lost, "packets")])
}

#[test]
fn who_leaves_is_gone_and_may_come_back() {
    scenario("who_leaves_is_gone_and_may_come_back", LIMIT, || {
        let three = THREE.replace("brokers: [broker-1, broker-2]", "brokers: [broker-1]");
        let lab = Lab::build(Topology::parse(&three)?)?;
        lab.bring_up()?;
        wait_until("tunnels", SOON, || lab.everybody_reaches_everybody())?;
        event(&lab, &[], || departure(&lab))
    });
}

/// A cluster leaves, and joins again.
fn departure(lab: &Lab) -> Result<Figures> {
    lab.export("oslo", "production", "api")?;
    let name = "api.production.svc.clusterset.local";
    wait_until("the name", SOON, || {
        ensure!(lab.ask("riga-a", name, 1)?.0 == 0, "not known");
        Ok(())
    })?;
    let (oslo, riga) = (wireguard_keys(lab, "oslo")?, wireguard_keys(lab, "riga")?);
    let flow = lab.udp_flow("riga-a", lab.topology().pod("turku-a")?.v4.into(), 1000)?;
    let start = Instant::now();
    let said = in_cluster(lab, "oslo-1", &["leave", "--yes"], "")?;
    ensure!(said.contains("states nothing any more") && said.contains("tombolo revoke oslo"), "{said}");
    wait_until("the others to forget it", SOON, || {
        ensure!(peers("riga-1")?.is_disjoint(&oslo), "riga-1 has peers still");
        ensure!(lab.ask("riga-a", name, 1)?.0 == 3, "riga-a has the name still");
        Ok(())
    })?;
    // Its ranges stay its own: never in clear.
    let routes = routes(lab, "riga-1")?;
    ensure!(routes.contains("unreachable 10.1.0.0/16 "), "{routes}");
    wait_until("it to forget the others", SOON, || forgotten(lab, "oslo-1", "10.2.", &riga))?;
    let took = ms(start.elapsed());
    let lost = lost(vec![flow])? as f64;
    lab.join("oslo").err().context("a grant that lives is not granted anew by mistake")?;
    let token = administrator(
        lab,
        &["invite", "oslo", "--renew", "--pod-cidr", "10.1.0.0/16", "--pod-cidr", "fd00:10:1::/48"],
    )?;
    in_cluster(lab, "oslo-1", &["join", "-"], &token)?;
    wait_until("it to be back", SOON, || lab.everybody_reaches_everybody())?;
    wait_until("the name to be back", SOON, || {
        ensure!(lab.ask("riga-a", name, 1)?.0 == 0, "not known");
        Ok(())
    })?;
    Ok(vec![("leave", took, "ms"), ("leave-others-lost", lost, "packets")])
}
