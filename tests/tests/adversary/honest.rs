//! The honest clusters, and what must hold in them whatever anybody says: the oracle looks at the kernel, the
//! devices, the cluster's objects, the names and the logs, and knows nothing but the grants.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use tombolo_agent::api::directory::Directory;
use tombolo_lab::sandbox::ROOT;
use tombolo_lab::topology::Topology;
use tombolo_lab::{Lab, directory, place, program, wait_until};
use tombolo_proto::model::{ClusterId, NodeName, record_kind};
use tombolo_proto::wire::{decode_endpoint, decode_grant};

use crate::mallory::Mallory;

/// How long news may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);
/// A test's own limit.
const LIMIT: Duration = Duration::from_secs(300);

/// Where a directory's ClusterSetIPs lie.
const CLUSTERSET: [&str; 2] = ["198.19.0.0/16", "fd19:746f:6d62::/112"];
/// Namespaces that exist in the honest clusters and that nobody may export into, or that no grant here names.
pub const CLOSED: [&str; 5] = ["kube-system", "kube-public", "tombolo-system", "staging", "default"];

/// Two clusters; `production` and `team-blue` are open to a third.
const TOPOLOGY: &str = r#"
name: adversary
clusters:
  - id: eu-west
    pod_cidrs: [10.1.0.0/16, "fd00:10:1::/48"]
    nodes:
      - { name: eu-gw1, gateway: true }
      - { name: eu-w1, pods: [{ name: eu-c, namespace: production, app: api }, { name: eu-d, namespace: staging, app: other }] }
    services:
      - { name: api-service, namespace: production, app: api, ports: [{ name: http, port: 8080 }, { name: echo, port: 7000, protocol: UDP }] }
      - { name: db, namespace: production, app: api, headless: true, ports: [{ name: http, port: 8080 }] }
  - id: us-east
    pod_cidrs: [10.2.0.0/16, "fd00:10:2::/48"]
    nodes:
      - { name: us-gw1, gateway: true }
      - { name: us-w1, pods: [{ name: us-c, namespace: production, app: web }, { name: us-d, namespace: team-blue, app: other }] }
    services:
      - { name: web, namespace: production, app: web, ports: [{ name: http, port: 8080 }] }
"#;

/// Who measures latency runs alone, all others together: what a test's neighbours use of the machine is not its matter.
static MACHINE: RwLock<()> = RwLock::new(());

/// A test's story, beside others.
pub fn story(name: &str, body: impl FnOnce() -> Result<()>) {
    let _shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    tombolo_lab::scenario(name, LIMIT, body);
}

/// A test's story, alone.
pub fn alone(name: &str, body: impl FnOnce() -> Result<()>) {
    let _alone = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
    tombolo_lab::scenario(name, LIMIT, body);
}

/// Everything up, `api-service` and `db` exported by eu-west and used by us-east.
pub fn up() -> Result<Lab> {
    up_by(&["broker"])
}

/// The same with these brokers.
pub fn up_by(brokers: &[&str]) -> Result<Lab> {
    let brokers = format!("name: adversary\nbrokers: [{}]\n", brokers.join(", "));
    let lab = Lab::build(Topology::parse(&TOPOLOGY.replacen("name: adversary\n", &brokers, 1))?)?;
    for cluster in &lab.topology().clusters {
        let manifests = lab.cluster_dir(&cluster.id).join("manifests");
        for namespace in CLOSED.iter().chain(&["team-blue"]) {
            let text = format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n");
            directory::put(&manifests, &format!("namespace-{namespace}.yaml"), &text)?;
        }
    }
    lab.bring_up()?;
    for service in ["api-service", "db"] {
        lab.export("eu-west", "production", service)?;
    }
    wait_until("the honest service", SOON, || reaches_api(&lab))?;
    Ok(lab)
}

/// Kills the agents of a cluster, and waits until nothing of them is left.
pub fn down(lab: &Lab, cluster: &str) -> Result<()> {
    let nodes = &lab.topology().cluster(cluster)?.nodes;
    nodes.iter().try_for_each(|node| lab.kill_tree(&node.name, "agent"))?;
    nodes.iter().try_for_each(|node| port_free(lab, &node.name, 10053))
}

/// Waits until nobody has a TCP port of a place any more.
pub fn port_free(lab: &Lab, place: &str, port: u16) -> Result<()> {
    let place = lab.place(place)?;
    wait_until("the port to be free", SOON, || {
        place.run(|| std::net::TcpListener::bind(("0.0.0.0", port)).map(drop))??;
        Ok(())
    })
    .map(drop)
}

/// Starts them again.
pub fn again(lab: &Lab, cluster: &str) -> Result<()> {
    lab.topology().cluster(cluster)?.nodes.iter().try_for_each(|node| lab.restart(&node.name, "agent"))
}

/// A pod of us-east uses eu-west's service by name.
pub fn reaches_api(lab: &Lab) -> Result<()> {
    let url = "http://api-service.production.svc.clusterset.local:8080/health";
    let answer = lab.fetch("us-c", url, &["--timeout", "2"])?;
    ensure!(answer.body.starts_with("ok eu-c"), "{url} answers {answer:?}");
    Ok(())
}

/// The honest pair talks, by the backend's address and with the source kept.
pub fn talk(lab: &Lab) -> Result<()> {
    let (client, backend) = (lab.topology().pod("us-c")?, lab.topology().pod("eu-c")?);
    for (own, other) in
        [(IpAddr::from(client.v4), IpAddr::from(backend.v4)), (client.v6.into(), backend.v6.into())]
    {
        let url = format!("http://{}:8080/ip", tombolo_lab::host(other));
        let answer = lab.fetch("us-c", &url, &["--timeout", "2"])?;
        ensure!(answer.body.trim() == own.to_string(), "{other} saw {own} as {}", answer.body);
    }
    reaches_api(lab)
}

/// A liar that has learned of everybody.
pub fn knowing(lab: &Lab, mallory: Mallory) -> Result<Mallory> {
    wait_until("the liar to learn who is who", SOON, || {
        for node in lab.topology().nodes().filter(|node| node.gateway) {
            mallory.endpoint_of(&node.cluster, &node.name)?;
        }
        Ok(())
    })?;
    Ok(mallory)
}

/// What eu-west keeps of another cluster: membership and nodes.
pub fn kept(lab: &Lab, of: &str) -> Result<String> {
    let observed = Directory::open(lab.cluster_dir("eu-west"))?.read();
    let cluster = ClusterId::new(of)?;
    let members = observed.members.get().context("the members cannot be read")?;
    let member = members.get(&cluster).with_context(|| format!("eu-west does not know {of}"))?;
    let nodes = observed.member_nodes.get().and_then(|all| all.get(&cluster));
    Ok(format!("{:?} {:?} {nodes:?}", member.grant, member.bindings))
}

/// What every cluster was granted, pods and tunnels, out of a cluster's verified Members.
pub fn grants(lab: &Lab, seen_by: &str) -> Result<BTreeMap<String, Vec<IpNet>>> {
    let observed = Directory::open(lab.cluster_dir(seen_by))?.read();
    let members = observed.members.get().context("the members cannot be read")?;
    let ranges = |envelope: &tombolo_proto::trust::Envelope| -> Result<Vec<IpNet>> {
        Ok(decode_grant(&envelope.payload)?.ranges().map(|p| p.net()).collect())
    };
    members.iter().map(|(cluster, member)| Ok((cluster.to_string(), ranges(&member.grant)?))).collect()
}

fn within(net: IpNet, ranges: &[IpNet]) -> bool {
    ranges.iter().any(|range| range.contains(&net))
}

/// Checks every honest cluster. `mallory` is the liar's id, `names` are asked from a pod of each cluster.
///
/// # Errors
/// What is outside of the grants, and where.
pub fn intact(lab: &Lab, mallory: &str, names: &[&str]) -> Result<()> {
    for cluster in &lab.topology().clusters {
        let grants = grants(lab, &cluster.id)?;
        for node in &cluster.nodes {
            routes(lab, &node.name, &grants)?;
            allowed_ips(lab, &cluster.id, &node.name, &grants)?;
            firewall(lab, &node.name, &grants)?;
        }
        objects(lab, &cluster.id, mallory, &grants)?;
        let pod = cluster.nodes.iter().flat_map(|n| &n.pods).next().context("a pod")?;
        answers(lab, &pod.name, names, &grants)?;
    }
    files(&Path::new(ROOT).join("cluster"))?;
    logs()
}

fn routes(lab: &Lab, node: &str, grants: &BTreeMap<String, Vec<IpNet>>) -> Result<()> {
    let place = lab.place(node)?;
    for (family, table) in [("-4", "4510"), ("-4", "4520"), ("-6", "4510"), ("-6", "4520")] {
        let output = place.output(&["ip", family, "route", "show", "table", table])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in text.lines().filter(|l| !l.starts_with([' ', '\t'])) {
            let mut words = line.split_whitespace().filter(|w| *w != "unreachable");
            let to = words.next().context("a route")?;
            let net: IpNet = match to.parse() {
                Ok(net) => net,
                Err(_) => IpNet::from(to.parse::<IpAddr>().with_context(|| format!("{node}: {line}"))?),
            };
            ensure!(grants.values().any(|g| within(net, g)), "{node} routes {line}: in nobody's grant");
        }
    }
    Ok(())
}

/// A device's peers, by key in hexadecimal: what they may send.
pub fn peers(node: &str, device: &str) -> Result<BTreeMap<String, Vec<IpNet>>> {
    let path = Path::new(ROOT).join("node").join(node).join("run/wireguard").join(device);
    let mut stream = std::os::unix::net::UnixStream::connect(&path)
        .with_context(|| format!("connecting to {}", path.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"get=1\n\n")?;
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains("errno=") || !text.ends_with("\n\n") {
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "{device} of {node} says {text:?}");
        text += std::str::from_utf8(&buffer[..count])?;
    }
    let mut peers: BTreeMap<String, Vec<IpNet>> = BTreeMap::new();
    let mut last = None;
    for line in text.lines() {
        match line.split_once('=') {
            Some(("public_key", key)) => last = Some(peers.entry(key.to_owned()).or_default()),
            Some(("allowed_ip", net)) => last.as_mut().context("a peer")?.push(net.parse()?),
            _ => {}
        }
    }
    Ok(peers)
}

/// The devices of a node.
pub fn devices(node: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(Path::new(ROOT).join("node").join(node).join("run/wireguard"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("tombolo") && name.ends_with(".sock") {
            names.push(name);
        }
    }
    Ok(names)
}

/// Whose WireGuard key is whose: by what each honest cluster states of itself, in its own directory.
pub fn honest_keys(lab: &Lab) -> Result<BTreeMap<String, (String, String)>> {
    let mut keys = BTreeMap::new();
    for cluster in &lab.topology().clusters {
        let observed = Directory::open(lab.cluster_dir(&cluster.id))?.read();
        let nodes = observed.tunnel_nodes.get().context("the nodes cannot be read")?;
        for (node, value) in nodes {
            for device in value.devices.values() {
                let hex: String = device.key.0.iter().map(|b| format!("{b:02x}")).collect();
                keys.insert(hex, (cluster.id.clone(), node.to_string()));
            }
        }
    }
    Ok(keys)
}

/// Devices to other clusters: each key may send what its true owner was granted. Those to own nodes: nobody but own
/// nodes is there, and nothing that nobody was granted.
fn allowed_ips(lab: &Lab, cluster: &str, node: &str, grants: &BTreeMap<String, Vec<IpNet>>) -> Result<()> {
    let keys = honest_keys(lab)?;
    let devices = devices(node)?;
    ensure!(!devices.is_empty(), "{node} has no tunnels");
    for device in devices {
        let number: u8 = device.trim_start_matches("tombolo").trim_end_matches(".sock").parse()?;
        let out = number & 4 == 0;
        let mut seen: BTreeMap<IpNet, String> = BTreeMap::new();
        for (key, allowed) in peers(node, &device)? {
            let owner = keys.get(&key).map(|(cluster, _)| cluster.as_str());
            ensure!(out || owner == Some(cluster), "{node} {device}: {key} ({owner:?}) is no own node's");
            for net in allowed {
                // Who states another's key gives its own ranges to that key's holder: its own alone.
                let liars = || grants.iter().filter(|(id, _)| lab.topology().cluster(id).is_err());
                let good = if out {
                    let owned = owner.and_then(|owner| grants.get(owner)).is_some_and(|g| within(net, g));
                    owned || liars().any(|(_, g)| within(net, g))
                } else {
                    grants.values().any(|g| within(net, g))
                };
                ensure!(
                    good,
                    "{node} {device}: {key} of {owner:?} may send {net}, which is not its cluster's"
                );
                let twice = seen.insert(net, key.clone());
                ensure!(twice.is_none(), "{node} {device}: {net} has two peers");
            }
        }
    }
    Ok(())
}

/// Every address in the maps of our table is somebody's, or a ClusterSetIP.
fn firewall(lab: &Lab, node: &str, grants: &BTreeMap<String, Vec<IpNet>>) -> Result<()> {
    let text = lab.place(node)?.capture(&["nft", "-j", "list", "table", "inet", "tombolo"])?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let clusterset: Vec<IpNet> = CLUSTERSET.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    let mut found = Vec::new();
    for element in json["nftables"].as_array().context("nft's list")?.iter() {
        let set = if element["map"].is_null() { &element["set"] } else { &element["map"] };
        addresses(&set["elem"], &mut found);
    }
    for address in found {
        let net = IpNet::from(address);
        let good = grants.values().any(|g| within(net, g)) || within(net, &clusterset);
        ensure!(good || network(address, grants, &clusterset), "{node}: {address} stands in the firewall");
    }
    Ok(())
}

/// The first or last address of a granted range, as nft prints intervals.
fn network(address: IpAddr, grants: &BTreeMap<String, Vec<IpNet>>, clusterset: &[IpNet]) -> bool {
    grants.values().flatten().chain(clusterset).any(|n| n.network() == address || n.broadcast() == address)
}

fn addresses(value: &serde_json::Value, found: &mut Vec<IpAddr>) {
    match value {
        serde_json::Value::String(text) => found.extend(text.parse::<IpAddr>()),
        serde_json::Value::Array(list) => list.iter().for_each(|v| addresses(v, found)),
        serde_json::Value::Object(map) => map.values().for_each(|v| addresses(v, found)),
        _ => {}
    }
}

fn objects(lab: &Lab, cluster: &str, mallory: &str, grants: &BTreeMap<String, Vec<IpNet>>) -> Result<()> {
    let observed = Directory::open(lab.cluster_dir(cluster))?.read();
    let clusterset: Vec<IpNet> = CLUSTERSET.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    for (key, import) in observed.imports.get().context("the imports cannot be read")? {
        let namespace = key.namespace.as_str();
        let liar = import.clusters.iter().any(|c| c.as_str() == mallory);
        ensure!(!liar || !CLOSED.contains(&namespace), "{cluster} imports {key} of {mallory}");
        for ip in &import.ips {
            ensure!(within(IpNet::from(*ip), &clusterset), "{cluster}: {key} has the address {ip}");
        }
    }
    for (key, slice) in observed.slices.get().context("the slices cannot be read")? {
        let own = grants
            .get(key.source.as_str())
            .with_context(|| format!("{cluster}: a slice of {}", key.source))?;
        let liar = key.source.as_str() == mallory;
        ensure!(!liar || !CLOSED.contains(&key.service.namespace.as_str()), "{cluster}: a slice {key:?}");
        for backend in &slice.backends {
            ensure!(
                within(IpNet::from(backend.address), own),
                "{cluster}: {key:?} names {}",
                backend.address
            );
        }
    }
    // What is kept of each member reads as what that member itself stated of its nodes.
    for (member, records) in observed.member_nodes.get().context("the members' nodes cannot be read")? {
        let Ok(honest) = lab.topology().cluster(member.as_str()) else { continue };
        let nodes: BTreeSet<&str> = honest.nodes.iter().map(|n| n.name.as_str()).collect();
        let keys = honest_keys(lab)?;
        for (key, record) in records.iter().filter(|(k, _)| k.kind() == record_kind::ENDPOINT) {
            let [node] = key.name() else { continue };
            ensure!(nodes.contains(&**node), "{cluster} keeps a node {node} of {member}");
            for device in decode_endpoint(NodeName::new(node)?, &record.body)?.devices.values() {
                let hex: String = device.key.0.iter().map(|b| format!("{b:02x}")).collect();
                let owner = keys.get(&hex).map(|(c, n)| (c.as_str(), n.as_str()));
                ensure!(
                    owner == Some((member.as_str(), node)),
                    "{cluster} keeps a key of {member}/{node} that is {owner:?}'s"
                );
            }
        }
    }
    Ok(())
}

fn answers(lab: &Lab, pod: &str, names: &[&str], grants: &BTreeMap<String, Vec<IpNet>>) -> Result<()> {
    let clusterset: Vec<IpNet> = CLUSTERSET.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    for name in names {
        for kind in [1, 28] {
            let (_, addresses) = lab.ask(pod, &format!("{name}.svc.clusterset.local"), kind)?;
            for address in addresses {
                let net = IpNet::from(address);
                let good = within(net, &clusterset) || grants.values().any(|g| within(net, g));
                ensure!(good, "{pod} is told that {name} is {address}");
            }
        }
    }
    Ok(())
}

/// No file bears a name that a stranger chose freely.
fn files(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let good = |b: &u8| b.is_ascii_alphanumeric() || b"._-".contains(b);
        let plain = name.as_encoded_bytes().iter().all(good) && !name.to_string_lossy().contains("..");
        ensure!(plain, "a file is called {name:?} in {}", dir.display());
        ensure!(!name.to_string_lossy().contains("pwned"), "{name:?} was made in {}", dir.display());
        if entry.file_type()?.is_dir() {
            // Written and removed while we look.
            if let Err(error) = files(&entry.path())
                && entry.path().exists()
            {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// No log holds a control character, with which lines can be forged and terminals driven.
fn logs() -> Result<()> {
    for entry in std::fs::read_dir(place::log_dir())? {
        let path = entry?.path();
        let text = std::fs::read(&path)?;
        let bad = text.iter().position(|b| *b < 0x20 && *b != b'\n' || *b == 0x7f);
        let around = bad.map(|at| {
            String::from_utf8_lossy(&text[at.saturating_sub(80)..(at + 40).min(text.len())]).into_owned()
        });
        ensure!(around.is_none(), "{} holds a control character: {around:?}", path.display());
    }
    Ok(())
}

/// Findings of all agents of a cluster, as `reason object message`.
pub fn findings(lab: &Lab, cluster: &str) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in &lab.topology().cluster(cluster)?.nodes {
        let url = format!("http://{}/debug/findings", program::AGENT_ADMIN);
        let list: serde_json::Value = serde_json::from_str(&lab.fetch(&node.name, &url, &[])?.body)?;
        for finding in list.as_array().context("a list of findings")? {
            let word = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            all.push(format!("{} {} {}", word("reason"), word("object"), word("message")));
        }
    }
    Ok(all)
}

/// Waits until a cluster tells of this: a finding, a line of an agent's log, and a metric.
pub fn told(lab: &Lab, cluster: &str, reason: &str, words: &str) -> Result<()> {
    told_within(lab, cluster, reason, words, SOON)
}

/// The same within a time.
pub fn told_within(lab: &Lab, cluster: &str, reason: &str, words: &str, within: Duration) -> Result<()> {
    wait_until(&format!("{cluster} to find {reason} ({words})"), within, || {
        let findings = findings(lab, cluster)?;
        ensure!(findings.iter().any(|f| f.starts_with(reason) && f.contains(words)), "{findings:#?}");
        let counted = metric(lab, cluster, &format!("tombolo_findings{{reason=\"{reason}\","))?;
        ensure!(counted > 0.0, "no metric counts {reason}");
        logged(lab, cluster, &[reason, words])
    })
    .map(drop)
}

/// Whether an agent of the cluster wrote a line with all these words.
pub fn logged(lab: &Lab, cluster: &str, words: &[&str]) -> Result<()> {
    let nodes = lab.topology().cluster(cluster)?.nodes.iter().map(|n| format!("{}-agent.log", n.name));
    for file in nodes {
        let text = std::fs::read(place::log_dir().join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if text.lines().any(|line| words.iter().all(|w| line.contains(w))) {
            return Ok(());
        }
    }
    anyhow::bail!("no agent of {cluster} logged {words:?}")
}

/// The sum of a metric over a cluster's agents.
pub fn metric(lab: &Lab, cluster: &str, name: &str) -> Result<f64> {
    let mut sum = 0.0;
    for node in &lab.topology().cluster(cluster)?.nodes {
        let url = format!("http://{}/metrics", program::AGENT_ADMIN);
        let text = lab.fetch(&node.name, &url, &[])?.body;
        let values = text
            .lines()
            .filter(|l| l.starts_with(name))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok());
        sum += values.sum::<f64>();
    }
    Ok(sum)
}
