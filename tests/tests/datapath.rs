//! The data path of docs/datapath.md, set up by hand: `ip`, `nft` and a WireGuard device, no agent. What the agent
//! plans must behave like this; what this page of set-up cannot do, no agent can.
#![allow(clippy::print_stderr)]

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use tombolo_lab::fault::Fault;
use tombolo_lab::probe::Echo;
use tombolo_lab::sandbox::ROOT;
use tombolo_lab::topology::{Cluster, Node, TWO, Topology};
use tombolo_lab::{Lab, foreign, host, program, scenario, wait_until};
use x25519_dalek::{PublicKey, StaticSecret};

const LIMIT: Duration = Duration::from_secs(240);

#[test]
fn data_path_over_wireguard_go() {
    // Built outside: inside there is no network.
    let device = foreign::wireguard_go().expect("wireguard-go");
    scenario("data_path_over_wireguard_go", LIMIT, || story(&device.to_string_lossy(), TWO));
}

#[test]
fn data_path_over_our_device() {
    scenario("data_path_over_our_device", LIMIT, || story(&program::find("tombolo-wireguard")?, TWO));
}

/// The nodes' own addresses lie inside the grants, and the underlay filters by reverse path.
#[test]
fn data_path_in_flat_networks() {
    scenario("data_path_in_flat_networks", LIMIT, || {
        let flat = TWO.replace("    pod_cidrs", "    flat: true\n    pod_cidrs");
        let (lab, hand) = start(&program::find("tombolo-wireguard")?, &flat)?;
        let watch = lab.watch_wire()?;
        tunnels(&lab)?;
        lab.everybody_reaches_everybody()?;
        for node in lab.topology().nodes() {
            let strict = [("ipv4/conf/eth0/rp_filter", "1"), ("ipv4/conf/eth0/src_valid_mark", "1")];
            lab.place(&node.name)?.sysctl(&strict)?;
        }
        lab.everybody_reaches_everybody()?;
        nothing_in_clear_without_tunnels(&lab, &hand)?;
        watch.seen().assert_protected()
    });
}

#[test]
fn a_foreign_drop_is_cured_by_the_stated_lines() {
    scenario("a_foreign_drop_is_cured_by_the_stated_lines", LIMIT, || {
        let drop = TWO.replace("    pod_cidrs", "    forward: drop\n    pod_cidrs");
        let (lab, _hand) = start(&program::find("tombolo-wireguard")?, &drop)?;
        let to = lab.topology().pod("us-c")?.v4;
        let url = format!("http://{to}:8080/health");
        ensure!(lab.fetch("eu-c", &url, &["--timeout", "1"]).is_err(), "the policy drop did not drop");
        for node in lab.topology().nodes() {
            for family in ["ip", "ip6"] {
                for side in ["iifname", "oifname"] {
                    let rule = format!("insert rule {family} filter FORWARD {side} \"tombolo*\" accept\n");
                    lab.place(&node.name)?.nft(&rule)?;
                }
            }
        }
        tunnels(&lab)?;
        lab.everybody_reaches_everybody()
    });
}

fn story(device: &str, topology: &str) -> Result<()> {
    let (lab, hand) = start(device, topology)?;
    let watch = lab.watch_wire()?;
    tunnels(&lab)?;
    lab.everybody_reaches_everybody()?;
    nodes_reach_pods_and_tunnel_addresses(&lab)?;
    a_smaller_mtu_behind_the_gateway_is_told(&lab)?;
    one_way_cut(&lab)?;
    nothing_in_clear_without_tunnels(&lab, &hand)?;
    watch.seen().assert_protected()
}

fn start(device: &str, topology: &str) -> Result<(Lab, Hand)> {
    let lab = Lab::build(Topology::parse(topology)?)?;
    // A CNI that masquerades even what comes from outside: both directions must keep their source.
    for cluster in &lab.topology().clusters {
        for node in &cluster.nodes {
            lab.place(&node.name)?.nft(&format!(
                "add rule inet cni postrouting ip saddr != {0} ip daddr {0} oifname \"cni0\" masquerade\n\
                 add rule inet cni postrouting ip6 saddr != {1} ip6 daddr {1} oifname \"cni0\" masquerade\n",
                cluster.pods4, cluster.pods6
            ))?;
        }
    }
    let mut hand = Hand { device: device.to_owned(), keys: 0 };
    for node in lab.topology().clone().nodes() {
        hand.set_up(&lab, node)?;
    }
    Ok((lab, hand))
}

fn nodes_reach_pods_and_tunnel_addresses(lab: &Lab) -> Result<()> {
    for node in lab.topology().nodes() {
        for other in lab.topology().nodes().filter(|o| o.name != node.name) {
            let mut targets: Vec<IpAddr> = tunnel_addresses(lab, other)?.into();
            if other.cluster != node.cluster {
                targets.extend(other.pods.iter().flat_map(|p| [IpAddr::from(p.v4), p.v6.into()]));
            }
            for target in targets {
                let echo = lab.ping(&node.name, target, Duration::from_secs(2))?;
                ensure!(echo.is_answered(), "{} pings {target} of {}: {echo:?}", node.name, other.name);
            }
        }
    }
    Ok(())
}

/// The tunnel address is the source of "fragmentation needed", so that it passes the peers' allowed IPs.
fn a_smaller_mtu_behind_the_gateway_is_told(lab: &Lab) -> Result<()> {
    let pod = lab.topology().pod("us-c")?;
    for (mtu, body) in [(1300, 300_000), (1420, 1)] {
        for gateway in ["us-gw1", "us-gw2"] {
            lab.place(gateway)?.ip(&format!("link set tombolo4 mtu {mtu}"))?;
            // Answers come back by the worker's devices: the smaller MTU is met on the way there only.
        }
        for target in [IpAddr::from(pod.v4), pod.v6.into()] {
            let url = format!("http://{}:8080/bytes/{body}", host(target));
            let answer = lab.fetch("eu-c", &url, &[])?;
            ensure!(answer.body.len() == body, "only {} bytes at MTU {mtu}", answer.body.len());
            // The echo probe's direction meets it: 16 KiB must go out.
            let flow = lab.tcp_flow("eu-c", target, 20_000)?;
            std::thread::sleep(Duration::from_millis(300));
            let report = flow.stop_tcp()?;
            ensure!(report.broken.is_none() && report.returned == report.sent, "MTU {mtu}: {report:?}");
        }
    }
    Ok(())
}

/// One way dead: who sends that way takes the other slot alone; the other side need not know.
fn one_way_cut(lab: &Lab) -> Result<()> {
    let gateway = lab.place("eu-gw1")?;
    lab.fault(Fault::CutOneway { from: "eu-gw1".to_owned(), to: "us-gw1".to_owned() })?;
    let targets: Vec<_> = lab.topology().cluster("us-east")?.nodes.iter().flat_map(|n| &n.pods).collect();
    let mut lost = 0;
    for pod in &targets {
        for target in [IpAddr::from(pod.v4), pod.v6.into()] {
            lost += u32::from(!lab.ping("eu-a", target, Duration::from_millis(500))?.is_answered());
        }
    }
    // Addresses choose the slot, so this is no chance: some of these six flows are hashed to the cut one.
    ensure!(lost > 0, "the cut cut nothing");
    for prefix in ["10.2.0.0/16", "198.18.2.0/24"] {
        gateway.ip(&format!("route replace {prefix} table 4510 proto 98 src 198.18.1.1 dev tombolo2"))?;
    }
    for prefix in ["fd00:10:2::/48", "fd00:18:2::/64"] {
        gateway.ip(&format!(
            "-6 route replace {prefix} table 4510 proto 98 src fd00:18:1::1 nexthop via fe80::1 dev tombolo2\n"
        ))?;
    }
    lab.everybody_reaches_everybody()?;
    lab.heal()
}

/// Tunnels gone, then rules gone: everything is refused or dropped, and nothing is seen on the wire but tunnels.
fn nothing_in_clear_without_tunnels(lab: &Lab, hand: &Hand) -> Result<()> {
    for node in &lab.topology().cluster("eu-west")?.nodes {
        for number in hand.devices(node) {
            lab.kill(&node.name, &format!("tombolo{number}"))?;
            let place = lab.place(&node.name)?;
            // A device whose supervisor is killed goes with its descriptors.
            wait_until("the device to go", Duration::from_secs(5), || {
                let link = place.succeeds(&["ip", "link", "show", &format!("tombolo{number}")])?;
                ensure!(!link, "it is still there");
                Ok(())
            })?;
        }
    }
    let pod = lab.topology().pod("us-c")?;
    for target in [IpAddr::from(pod.v4), pod.v6.into()] {
        for place in ["eu-a", "eu-c", "eu-gw1", "eu-w1"] {
            let echo = lab.ping(place, target, Duration::from_secs(1))?;
            ensure!(echo == Echo::Unreachable, "{place} pings {target} without tunnels: {echo:?}");
        }
    }
    for place in ["eu-gw1", "eu-w1"] {
        lab.place(place)?.ip("rule del priority 110\n-6 rule del priority 110\n")?;
    }
    for target in [IpAddr::from(pod.v4), pod.v6.into()] {
        for place in ["eu-a", "eu-c", "eu-gw1", "eu-w1"] {
            let echo = lab.ping(place, target, Duration::from_millis(300))?;
            ensure!(!echo.is_answered(), "{place} still pings {target}");
        }
    }
    Ok(())
}

/// A first handshake that met a device not yet configured is repeated after five seconds: waits until every tunnel
/// has carried something.
fn tunnels(lab: &Lab) -> Result<()> {
    wait_until("tunnels", Duration::from_secs(90), || {
        let pods: Vec<_> = lab.topology().pods().collect();
        for (from, to) in pods.iter().flat_map(|a| pods.iter().map(move |b| (a, b))) {
            if from.cluster != to.cluster {
                let echo = lab.ping(&from.name, to.v4.into(), Duration::from_millis(500))?;
                ensure!(echo.is_answered(), "{} pings {}: {echo:?}", from.name, to.name);
            }
        }
        Ok(())
    })
    .map(drop)
    .inspect_err(|_| {
        for node in lab.topology().nodes() {
            let shown = lab.place(&node.name).and_then(|p| p.capture(&["wg", "show", "all"]));
            eprintln!("{}:\n{}", node.name, shown.unwrap_or_else(|error| format!("{error:#}")));
        }
    })
}

/// An agent's work by hand.
struct Hand {
    device: String,
    keys: u8,
}

fn rank(node: &Node) -> u8 {
    if node.gateway { node.number } else { 0 }
}

/// In this topology a node's number tells its tunnel addresses.
fn tunnel_addresses(lab: &Lab, node: &Node) -> Result<[IpAddr; 2]> {
    let (i, k) = (lab.topology().cluster(&node.cluster)?.index, node.number);
    Ok([format!("198.18.{i}.{k}").parse()?, format!("fd00:18:{i}::{k}").parse()?])
}

fn tunnel_ranges(cluster: &Cluster) -> Result<[IpNet; 2]> {
    let i = cluster.index;
    Ok([format!("198.18.{i}.0/24").parse()?, format!("fd00:18:{i}::/64").parse()?])
}

fn grant(cluster: &Cluster) -> Result<Vec<IpNet>> {
    let mut list = vec![cluster.pods4.into(), cluster.pods6.into()];
    list.extend(tunnel_ranges(cluster)?);
    Ok(list)
}

/// Any 32 bytes are a key; these are told by node and device.
fn key(node: &Node, number: u8) -> StaticSecret {
    let mut bytes = [7; 32];
    for (slot, byte) in bytes.iter_mut().zip(format!("{}-{number}", node.name).bytes()) {
        *slot = byte;
    }
    StaticSecret::from(bytes)
}

struct Peer {
    node: Node,
    number: u8,
    allowed: Vec<IpNet>,
    /// Seconds. One end calls: of two handshakes that cross, wireguard-go may keep one half each, and then one direction
    /// is dead for two minutes, while keepalives of the other hide it.
    keepalive: u8,
}

impl Hand {
    fn devices(&self, node: &Node) -> Vec<u8> {
        match rank(node) {
            0 => vec![5, 6],
            1 => vec![1, 2, 4, 6],
            _ => vec![1, 2, 4, 5],
        }
    }

    fn peers(&self, lab: &Lab, node: &Node, number: u8) -> Result<Vec<Peer>> {
        let mut foreign = Vec::new();
        for cluster in lab.topology().clusters.iter().filter(|c| c.id != node.cluster) {
            foreign.extend(grant(cluster)?);
        }
        let mut peers = Vec::new();
        for other in lab.topology().nodes().filter(|o| o.name != node.name) {
            let (same, wanted) = (other.cluster == node.cluster, rank(other) == number % 4);
            if same != (number >= 4) || !wanted {
                continue;
            }
            let family = if same { 4 } else { 0 };
            let mut allowed = if !same || other.gateway { foreign.clone() } else { Vec::new() };
            if same {
                allowed.extend([IpNet::from(other.pods4), other.pods6.into()]);
                allowed.extend(tunnel_addresses(lab, other)?.map(IpNet::from));
            }
            let keepalive = if node.name < other.name { 5 } else { 0 };
            peers.push(Peer { node: other.clone(), number: rank(node) + family, allowed, keepalive });
        }
        Ok(peers)
    }

    fn set_up(&mut self, lab: &Lab, node: &Node) -> Result<()> {
        let place = lab.place(&node.name)?;
        let [t4, t6] = tunnel_addresses(lab, node)?;
        let own = lab.topology().cluster(&node.cluster)?;
        let mut batch = "rule add not fwmark 0x01000000/0x0f000000 lookup 4510 priority 110 protocol 98\n\
                         -6 rule add not fwmark 0x01000000/0x0f000000 lookup 4510 priority 110 protocol 98\n"
            .to_owned();
        for number in self.devices(node) {
            let name = format!("tombolo{number}");
            lab.start(&node.name, &name, &[self.device.clone(), "-f".to_owned(), name.clone()])?;
            let socket =
                Path::new(ROOT).join("node").join(&node.name).join(format!("run/wireguard/{name}.sock"));
            wait_until("the device's socket", Duration::from_secs(10), || {
                lab.pid(&node.name, &name)?;
                UnixStream::connect(&socket).map(drop).context(socket.display().to_string())
            })?;
            self.keys += 1;
            configure(&socket, &key(node, number), number, &self.peers(lab, node, number)?)?;
            let _ = write!(
                batch,
                "link set {name} mtu 1420 txqueuelen 1000 up\naddr add {t4}/32 dev {name}\naddr add {t6}/128 dev {name} nodad\n\
                 rule add iif {name} lookup 4520 priority 100 protocol 98\n-6 rule add iif {name} lookup 4520 priority 100 protocol 98\n"
            );
            if number < 4 {
                continue;
            }
            for peer in self.peers(lab, node, number)? {
                let [p4, p6] = tunnel_addresses(lab, &peer.node)?;
                let _ = write!(
                    batch,
                    "route add {} dev {name} table 4520 proto 98\n-6 route add {} dev {name} table 4520 proto 98\n\
                     route add {p4} dev {name} table 4510 proto 98 src {t4}\n-6 route add {p6} dev {name} table 4510 proto 98 src {t6}\n",
                    peer.node.pods4, peer.node.pods6
                );
            }
        }
        let [a, b] = if node.gateway { [1, 2] } else { [5, 6] };
        let worst = "table 4510 proto 98 metric 4294967295";
        let mut foreign = Vec::new();
        for cluster in lab.topology().clusters.iter().filter(|c| c.id != node.cluster) {
            foreign.extend(grant(cluster)?);
        }
        for net in &foreign {
            let _ = match net {
                IpNet::V4(net) => writeln!(
                    batch,
                    "route add {net} table 4510 proto 98 src {t4} nexthop dev tombolo{a} nexthop dev tombolo{b}\n\
                     route add unreachable {net} {worst}"
                ),
                IpNet::V6(net) => writeln!(
                    batch,
                    "-6 route add {net} table 4510 proto 98 src {t6} nexthop via fe80::1 dev tombolo{a} nexthop via fe80::1 dev tombolo{b}\n\
                     -6 route add unreachable {net} {worst}"
                ),
            };
        }
        let [r4, r6] = tunnel_ranges(own)?;
        let _ = write!(batch, "route add unreachable {r4} {worst}\n-6 route add unreachable {r6} {worst}\n");
        place.ip(&batch)?;
        for number in self.devices(node) {
            let key = format!("ipv4/conf/tombolo{number}/rp_filter");
            place.sysctl(&[(&key, "2")])?;
        }
        place.nft(&ruleset(node, own, &foreign, t4, t6)?)
    }
}

/// The words of the WireGuard cross-platform interface.
fn configure(socket: &Path, secret: &StaticSecret, number: u8, peers: &[Peer]) -> Result<()> {
    let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, b| format!("{text}{b:02x}"));
    let mut text = format!(
        "set=1\nprivate_key={}\nlisten_port={}\nfwmark=16777216\nreplace_peers=true\n",
        hex(&secret.to_bytes()),
        4510 + u16::from(number)
    );
    for peer in peers {
        let public = PublicKey::from(&key(&peer.node, peer.number));
        let port = 4510 + u16::from(peer.number);
        let _ = write!(
            text,
            "public_key={}\nendpoint={}:{port}\npersistent_keepalive_interval={}\nreplace_allowed_ips=true\n",
            hex(public.as_bytes()),
            peer.node.v4,
            peer.keepalive
        );
        for net in &peer.allowed {
            let _ = writeln!(text, "allowed_ip={net}");
        }
    }
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(format!("{text}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    ensure!(answer.trim() == "errno=0", "{}: {answer}", socket.display());
    Ok(())
}

fn ruleset(node: &Node, own: &Cluster, foreign: &[IpNet], t4: IpAddr, t6: IpAddr) -> Result<String> {
    let own = grant(own)?;
    let here = [IpNet::from(node.pods4), node.pods6.into(), t4.into(), t6.into()];
    let set = |name: &str, nets: &[IpNet]| {
        let mut text = String::new();
        for (family, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            let list: Vec<_> = nets
                .iter()
                .filter(|n| n.addr().is_ipv4() == (family == 4))
                .map(ToString::to_string)
                .collect();
            let _ = writeln!(
                text,
                " set {name}{family} {{ type {kind}; flags interval; elements = {{ {} }}; }}",
                list.join(", ")
            );
        }
        text
    };
    let sets = [set("foreign", foreign), set("own", &own), set("here", &here)].concat();
    Ok(format!(
        r#"table inet tombolo {{
{sets}
 set out_devices {{ type ifname; elements = {{ "tombolo0", "tombolo1", "tombolo2", "tombolo3" }}; }}
 chain transit {{
  type filter hook prerouting priority raw; policy accept;
  iifname "tombolo*" ip saddr @foreign4 ip daddr @own4 ip daddr != @here4 notrack
  iifname "tombolo*" ip saddr @own4 ip saddr != @here4 ip daddr @foreign4 notrack
  iifname "tombolo*" ip6 saddr @foreign6 ip6 daddr @own6 ip6 daddr != @here6 notrack
  iifname "tombolo*" ip6 saddr @own6 ip6 saddr != @here6 ip6 daddr @foreign6 notrack
 }}
 chain source {{
  type nat hook postrouting priority srcnat - 10; policy accept;
  ip saddr @here4 ip daddr @foreign4 snat ip to ip saddr
  ip saddr @foreign4 ip daddr @here4 snat ip to ip saddr
  oifname "tombolo*" meta nfproto ipv4 snat ip to {t4}
  ip6 saddr @here6 ip6 daddr @foreign6 snat ip6 to ip6 saddr
  ip6 saddr @foreign6 ip6 daddr @here6 snat ip6 to ip6 saddr
  oifname "tombolo*" meta nfproto ipv6 snat ip6 to {t6}
 }}
 chain clear {{
  type filter hook postrouting priority filter; policy accept;
  meta mark & 0x0f000000 == 0x01000000 accept
  oifname "tombolo*" accept
  ip daddr @foreign4 counter drop
  ip6 daddr @foreign6 counter drop
 }}
 chain hub {{
  type filter hook forward priority filter - 6; policy accept;
  iifname @out_devices oifname @out_devices counter drop
 }}
 chain arrival {{
  type filter hook prerouting priority mangle; policy accept;
  iifname != "tombolo*" ip saddr @foreign4 fib daddr type local udp dport 4510-4573 meta mark set meta mark & 0xf0ffffff | 0x01000000
 }}
}}
"#
    ))
}
