//! The appliers on a real kernel, each test in a network namespace of its own. Needs root, `ip` and `nft`.

// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::unwrap_in_result)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::{NonZeroU16, NonZeroU32};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::sched::{CloneFlags, unshare};
use tombolo_agent::apply::device::{
    DeviceChange, DeviceError, DeviceState, PeerAction, PeerState, TunnelDriver,
};
use tombolo_agent::apply::key::DeviceKeys;
use tombolo_agent::apply::{Appliers, Report, WriteCounts, Writes};
use tombolo_agent::observe::netlink::Monitor;
use tombolo_agent_core::desired::{
    Balance, Firewall, NodeDesired, PRIORITY_IN, PRIORITY_LANE, PRIORITY_OUT, Peer, Route, Rule, Selector,
    TABLE_IN, TABLE_OUT, TunnelDevice, Via, Vip,
};
use tombolo_agent_core::known::Section;
use tombolo_agent_core::object::NodeKey;
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::world::Reach;
use tombolo_proto::model::{DeviceNumber, Family, Lanes, Prefix, Protocol, WireguardKey};

/// Runs a test in a new network namespace, on a thread and a runtime of its own.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    assert!(nix::unistd::geteuid().is_root(), "these tests change network namespaces: run them as root");
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        ok("ip link set lo up");
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command that must succeed; its output.
fn ok(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output =
        Command::new(words.next().unwrap()).args(words).output().unwrap_or_else(|e| panic!("{command}: {e}"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Feeds a script to nft.
fn nft(script: &str) {
    let mut child = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{script}");
}

/// A driver whose devices are veths, with a peer table in memory that behaves as WireGuard's.
#[derive(Clone, Default)]
struct Veths {
    devices: Arc<Mutex<BTreeMap<DeviceNumber, DeviceState>>>,
    changes: Arc<Mutex<u64>>,
}

#[async_trait]
impl TunnelDriver for Veths {
    async fn list(&self) -> Result<BTreeSet<DeviceNumber>, DeviceError> {
        Ok(self.devices.lock().unwrap().keys().copied().collect())
    }

    async fn create(&self, number: DeviceNumber) -> Result<bool, DeviceError> {
        if self.devices.lock().unwrap().contains_key(&number) {
            return Ok(false);
        }
        let n = number.get();
        ok(&format!("ip link add {number} type veth peer name far{n}"));
        ok(&format!("ip link set far{n} up"));
        self.devices.lock().unwrap().insert(number, DeviceState::default());
        *self.changes.lock().unwrap() += 1;
        Ok(true)
    }

    async fn remove(&self, number: DeviceNumber) -> Result<(), DeviceError> {
        ok(&format!("ip link delete {number}"));
        self.devices.lock().unwrap().remove(&number);
        *self.changes.lock().unwrap() += 1;
        Ok(())
    }

    async fn read(&self, number: DeviceNumber) -> Result<DeviceState, DeviceError> {
        Ok(self.devices.lock().unwrap().get(&number).cloned().unwrap_or_default())
    }

    async fn write(&self, number: DeviceNumber, change: &DeviceChange<'_>) -> Result<(), DeviceError> {
        *self.changes.lock().unwrap() += 1;
        let mut devices = self.devices.lock().unwrap();
        let state = devices.entry(number).or_default();
        if let Some(key) = change.key {
            state.key = Some(key.public());
        }
        state.port = change.port.unwrap_or(state.port);
        state.mark = change.mark.unwrap_or(state.mark);
        for peer in &change.peers {
            let entry = state.peers.entry(peer.key).or_default();
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            match &peer.what {
                PeerAction::Add { endpoint, allowed, .. } => {
                    *entry = PeerState {
                        endpoint: *endpoint,
                        keepalive: 10,
                        last_handshake: Some(now),
                        allowed: allowed.clone(),
                        ..PeerState::default()
                    };
                }
                PeerAction::Change { allow, forbid, .. } => {
                    entry.allowed.extend(allow);
                    entry.allowed.retain(|net| !forbid.contains(net));
                }
                PeerAction::Remove => drop(state.peers.remove(&peer.key)),
            }
        }
        Ok(())
    }
}

struct Node {
    driver: Veths,
    keys: Arc<DeviceKeys>,
    appliers: Appliers,
    _state: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let state = tempfile::tempdir().unwrap();
        let keys = Arc::new(DeviceKeys::load(state.path(), Lanes::ONE).unwrap_or_else(|e| panic!("{e}")));
        let driver = Veths::default();
        let appliers = appliers(&driver, &keys);
        Self { driver, keys, appliers, _state: state }
    }

    async fn apply(&mut self, desired: &NodeDesired) -> Report {
        let report = self.appliers.apply(desired).await;
        let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{failures:#?}");
        report
    }

    /// Applies, and tells what was written.
    async fn writes(&mut self, desired: &NodeDesired) -> (WriteCounts, u64) {
        let (before, driver) = (self.appliers.writes().counts(), *self.driver.changes.lock().unwrap());
        self.apply(desired).await;
        let after = self.appliers.writes().counts();
        let counts = WriteCounts {
            netlink: after.netlink - before.netlink,
            nft: after.nft - before.nft,
            uapi: 0,
            device: 0,
        };
        (counts, *self.driver.changes.lock().unwrap() - driver)
    }

    async fn assert_settled(&mut self, desired: &NodeDesired) {
        assert_eq!(self.writes(desired).await, (WriteCounts::default(), 0));
    }

    fn restart(&mut self) {
        self.appliers = appliers(&self.driver, &self.keys);
    }
}

fn appliers(driver: &Veths, keys: &Arc<DeviceKeys>) -> Appliers {
    let writes = Arc::new(Writes::default());
    Appliers::with_driver(Box::new(driver.clone()), "nft".into(), keys.clone(), writes).unwrap()
}

fn number(n: u8) -> DeviceNumber {
    DeviceNumber::new(n).unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn set<T: std::str::FromStr<Err: std::fmt::Debug> + Ord>(all: &[&str]) -> BTreeSet<T> {
    all.iter().map(|text| text.parse().unwrap()).collect()
}

fn device(peer: u8) -> TunnelDevice {
    let peer = (
        WireguardKey([peer; 32]),
        Peer {
            node: NodeKey { cluster: "us".parse().unwrap(), node: "gw1".parse().unwrap() },
            candidates: vec!["192.0.2.1:4511".parse().unwrap()],
            allowed: set(&["10.2.0.0/16", "fd00:10:2::/48"]),
            tunnel: BTreeSet::new(),
        },
    );
    TunnelDevice { mtu: 1420, addresses: set(&["198.18.1.3", "fd00:18:1::3"]), peers: BTreeMap::from([peer]) }
}

fn route(table: u32, to: &str, devices: &[u8]) -> Route {
    let to = prefix(to);
    let source = match to.family() {
        Family::V4 => address("198.18.1.3"),
        Family::V6 => address("fd00:18:1::3"),
    };
    if devices.is_empty() {
        return Route { table, prefix: to, via: Via::Unreachable, source: None, mtu: None };
    }
    let via = Via::Devices(devices.iter().map(|n| number(*n)).collect());
    Route { table, prefix: to, via, source: (table == TABLE_OUT).then_some(source), mtu: None }
}

fn rules(devices: &[u8]) -> BTreeSet<Rule> {
    let of = |family| {
        let out = Rule { family, priority: PRIORITY_OUT, selector: Selector::NotMark, table: TABLE_OUT };
        let iif = devices.iter().map(move |n| Rule {
            family,
            priority: PRIORITY_IN,
            selector: Selector::Device(number(*n)),
            table: TABLE_IN,
        });
        [out].into_iter().chain(iif)
    };
    Family::ALL.into_iter().flat_map(of).collect()
}

fn firewall() -> Firewall {
    Firewall {
        reach: Reach::Exports,
        own: set(&["10.1.0.0/16", "fd00:10:1::/48"]),
        local: set(&["10.1.3.0/24", "fd00:10:1:3::/64"]),
        remote: set(&["10.2.0.0/16", "198.18.2.0/24", "fd00:10:2::/48", "fd00:18:2::/64"]),
        tunnel: set(&["198.18.1.3", "fd00:18:1::3"]),
        own_tunnel: set(&["198.18.1.0/24", "fd00:18:1::/64"]),
        out_devices: [0, 1, 2, 3].map(number).into(),
        in_devices: [4, 5, 6, 7].map(number).into(),
        exported: BTreeSet::from([
            (address("10.1.3.10"), Protocol::Tcp, 9000),
            (address("fd00:10:1:3::10"), Protocol::Sctp, 9000),
        ]),
        vips: Shelf::new(),
        clusterset: set(&["198.19.0.0/16", "fd19:746f:6d62::/112"]),
        resolvers: set(&["198.19.0.1", "fd19:746f:6d62::1"]),
        narrow: BTreeSet::new(),
        lanes: Lanes::ONE,
    }
}

fn desired() -> NodeDesired {
    let out = |to| [route(TABLE_OUT, to, &[1, 2]), route(TABLE_OUT, to, &[])];
    let mut routes: BTreeSet<Route> = ["10.2.0.0/16", "198.18.2.0/24", "fd00:10:2::/48", "fd00:18:2::/64"]
        .into_iter()
        .flat_map(out)
        .collect();
    routes.insert(route(TABLE_IN, "10.1.4.0/24", &[4]));
    routes.insert(route(TABLE_IN, "fd00:10:1:4::/64", &[4]));
    NodeDesired {
        devices: Section::Set(BTreeMap::from([
            (number(1), device(1)),
            (number(2), device(2)),
            (number(4), device(4)),
        ])),
        routes: Section::Set(routes),
        rules: Section::Set(rules(&[1, 2, 4])),
        firewall: Section::Set(firewall()),
        zone: Section::Keep,
    }
}

/// Everything of the node that we may touch, as text, without what counts.
fn snapshot() -> String {
    [
        ok("ip -d rule show"),
        ok("ip -6 -d rule show"),
        ok("ip route show table all"),
        ok("ip -6 route show table all"),
        ok("nft -s list ruleset"),
        ok("ip -o link show"),
        ok("ip -o address show"),
    ]
    .join("\n")
}

fn vip(text: &str, port: u16) -> Vip {
    Vip { address: address(text), protocol: Protocol::Tcp, port }
}

fn balance(backends: &[&str], affinity: Option<u32>) -> Balance {
    let backends = backends
        .iter()
        .map(|b| b.parse::<SocketAddr>().unwrap())
        .map(|b| ((b.ip(), b.port()), NonZeroU16::MIN));
    let backends = backends.collect();
    Balance { backends, affinity: affinity.and_then(NonZeroU32::new) }
}

#[test]
fn the_second_apply_writes_nothing_nor_does_a_restarted_one() {
    in_namespace(|| async {
        let mut node = Node::new();
        let desired = desired();
        let (counts, _) = node.writes(&desired).await;
        assert!(counts.netlink > 0 && counts.nft == 1, "{counts:?}");
        node.assert_settled(&desired).await;
        node.restart();
        node.assert_settled(&desired).await;

        let out = ok("ip route show table 4510");
        assert!(out.contains("10.2.0.0/16 proto 98 scope link src 198.18.1.3 metric 100"), "{out}");
        assert!(
            out.contains("nexthop dev tombolo1 weight 1") && out.contains("nexthop dev tombolo2 weight 1"),
            "{out}"
        );
        assert!(out.contains("unreachable 10.2.0.0/16 proto 98 metric 4294967295"), "{out}");
        let out = ok("ip -6 route show table 4510");
        assert!(
            out.contains("nexthop via fe80::1 dev tombolo1") && out.contains("unreachable fd00:10:2::/48"),
            "{out}"
        );
        let rules = ok("ip -d rule show");
        assert!(rules.contains("not from all fwmark 0x1000000/0xf000000 lookup 4510 proto 98"), "{rules}");
        assert!(rules.contains("iif tombolo4 lookup 4520 proto 98"), "{rules}");
        let link = ok("ip -d link show tombolo1");
        assert!(link.contains("mtu 1420") && link.contains("alias tombolo"), "{link}");
        assert_eq!(ok("sysctl -n net.ipv4.conf.tombolo1.rp_filter").trim(), "2");
        assert!(ok("ip address show tombolo1").contains("198.18.1.3/32"));
        // Keep changes nothing, whatever is there.
        let before = snapshot();
        node.assert_settled(&NodeDesired::default()).await;
        assert_eq!(snapshot(), before);
    });
}

/// What [`desired`] is with a second lane.
fn laned() -> NodeDesired {
    let mut desired = desired();
    let mut routes = desired.routes.get().unwrap().clone();
    for to in ["10.2.0.0/16", "198.18.2.0/24", "fd00:10:2::/48", "fd00:18:2::/64"] {
        routes.insert(route(TABLE_OUT + 1, to, &[2, 9]));
        routes.insert(route(TABLE_OUT + 1, to, &[]));
    }
    let bound = Route { via: Via::Bound(number(9)), ..route(TABLE_OUT + 1, "fd00:18:2::1/128", &[]) };
    let host = route(TABLE_OUT + 1, "fd00:18:2::1/128", &[2]);
    routes.extend([bound, host, route(TABLE_IN + 1, "10.1.4.0/24", &[4])]);
    desired.routes = Section::Set(routes);
    let mut rules = rules(&[1, 2, 4]);
    for family in Family::ALL {
        let lane = number(9).lane();
        rules.insert(Rule {
            family,
            priority: PRIORITY_LANE,
            selector: Selector::Lane(lane),
            table: TABLE_OUT + 1,
        });
        let selector = Selector::Device(number(9));
        rules.insert(Rule { family, priority: PRIORITY_IN, selector, table: TABLE_IN + 1 });
    }
    desired.rules = Section::Set(rules);
    let mut devices = desired.devices.get().unwrap().clone();
    devices.insert(number(9), device(9));
    desired.devices = Section::Set(devices);
    desired.firewall = Section::Set(Firewall { lanes: Lanes::new(2).unwrap(), ..firewall() });
    desired
}

#[test]
fn lanes_come_and_go() {
    in_namespace(|| async {
        let mut node = Node::new();
        node.keys = Arc::new(
            DeviceKeys::load(node._state.path(), Lanes::new(2).unwrap()).unwrap_or_else(|e| panic!("{e}")),
        );
        node.restart();
        node.apply(&desired()).await;
        let before = snapshot();
        node.apply(&laned()).await;
        node.assert_settled(&laned()).await;
        node.restart();
        node.assert_settled(&laned()).await;

        let rules = ok("ip rule show");
        assert!(
            rules.contains("105:\tfrom all fwmark 0x10000000/0x7f000000 lookup 4511 proto 98"),
            "{rules}"
        );
        assert!(rules.contains("iif tombolo9 lookup 4521 proto 98"), "{rules}");
        let lane = |mark: &str, to: &str| ok(&format!("ip route get {to} mark {mark}"));
        let one = lane("0x10000000", "10.2.3.4");
        assert!(one.contains("table 4511") && !one.contains("tombolo1 "), "{one}");
        let echo = "ip -6 route get fd00:18:2::1 mark 0x90000000";
        assert!(ok(echo).contains("tombolo2"), "{}", ok(echo));
        let echo = format!("{echo} oif tombolo9");
        assert!(ok(&echo).contains("dev tombolo9"), "{}", ok(&echo));
        assert!(lane("0x00000000", "10.2.3.4").contains("table 4510"));
        assert!(lane("0x30000000", "10.2.3.4").contains("table 4510"), "no such lane here");
        let nft = ok("nft list table inet tombolo");
        assert!(nft.contains("63 : goto lane_1"), "{nft}");

        node.apply(&desired()).await;
        node.assert_settled(&desired()).await;
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn cleanup_removes_ours_and_nothing_else() {
    in_namespace(|| async {
        ok("ip link add eth0 type veth peer name eth0far");
        ok("ip link set eth0 up");
        ok("ip link set eth0far up");
        ok("ip link add tombolo9 type veth peer name strange");
        ok("ip address add 192.0.2.2/24 dev eth0");
        ok("ip route add 10.99.0.0/16 dev eth0 table 4510 proto static metric 100");
        ok("ip route add 10.2.0.0/16 dev eth0 proto 98");
        ok("ip rule add fwmark 0x5 lookup 77 priority 100 protocol 99");
        ok("ip -6 rule add iif tombolo1 lookup 77 priority 110 protocol 4");
        nft(
            "table inet other { set foreign4 { type ipv4_addr; elements = { 10.0.0.1 }; }; chain c { type filter hook input priority 0; ip saddr @foreign4 counter; }; }\n\
             table ip tombolo { chain c { }; }\n",
        );
        // Link-local addresses and their routes come with time; wait for them.
        wait("link-local", || ok("ip -6 address show dev eth0").contains("fe80"));
        wait("no longer tentative", || !ok("ip -6 address show").contains("tentative"));
        let before = snapshot();
        let mut node = Node::new();
        node.apply(&desired()).await;
        assert_ne!(snapshot(), before);
        assert!(ok("ip route show table 4510").contains("10.99.0.0/16"));
        let report = node.appliers.cleanup().await;
        assert!(report.is_clean(), "{:?}", report.failures);
        assert_same(&before, &snapshot(), "cleanup");
    });
}

#[test]
fn drift_is_told_and_healed() {
    in_namespace(|| async {
        let mut node = Node::new();
        let desired = desired();
        node.apply(&desired).await;
        wait("no longer tentative", || !ok("ip -6 address show").contains("tentative"));
        let monitor = Monitor::start().await.unwrap();
        let good = snapshot();
        for harm in [
            "ip route del 10.2.0.0/16 table 4510 metric 100",
            "ip -6 route del fd00:10:2::/48 table 4510 metric 100",
            "ip route del unreachable 10.2.0.0/16 table 4510",
            "ip route replace 10.2.0.0/16 dev tombolo4 table 4510 metric 100 proto 98",
            "ip route add 10.77.0.0/16 dev tombolo4 table 4510 proto 98",
            "ip -6 route add fd77::/64 dev tombolo4 table 4520 proto 98",
            "ip -6 route append fd00:10:2::/48 via fe80::7 dev tombolo4 table 4510 metric 100 proto 98",
            "ip rule del priority 100",
            "ip -6 rule del iif tombolo1",
            "ip rule add fwmark 7 lookup 4510 priority 105 protocol 98",
            "ip address add 198.18.1.99/32 dev tombolo1",
            "ip link set tombolo1 mtu 1300",
            "ip link set tombolo1 alias other",
            "nft delete table inet tombolo",
            "nft flush chain inet tombolo reach_input",
            "nft add rule inet tombolo reach_input drop",
            "nft flush ruleset",
            "nft add element inet tombolo foreign4 { 10.66.0.0/16 }",
            "nft delete element inet tombolo foreign4 { 10.2.0.0/16 }",
            "nft add element inet tombolo out_devices { eth7 }",
        ] {
            settle(&monitor).await;
            ok(harm);
            assert_ne!(snapshot(), good, "{harm}");
            tokio::time::timeout(Duration::from_secs(5), monitor.changed())
                .await
                .unwrap_or_else(|_| panic!("nobody was told of: {harm}"));
            node.apply(&desired).await;
            assert_same(&good, &snapshot(), harm);
            node.assert_settled(&desired).await;
        }
        // What takes routes along: an address, and the link.
        for harm in ["ip address del 198.18.1.3/32 dev tombolo1", "ip link set tombolo1 down"] {
            settle(&monitor).await;
            ok(harm);
            tokio::time::timeout(Duration::from_secs(5), monitor.changed()).await.expect(harm);
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                let report = node.appliers.apply(&desired).await;
                if report.is_clean() && report.applied.is_empty() {
                    break;
                }
                assert!(Instant::now() < deadline, "{harm}: {:?}", report.failures);
            }
            wait("no longer tentative", || !ok("ip -6 address show").contains("tentative"));
            assert_same(&good, &snapshot(), harm);
        }
    });
}

/// Waits until the monitor has told all that happened so far.
async fn settle(monitor: &Monitor) {
    while tokio::time::timeout(Duration::from_millis(100), monitor.changed()).await.is_ok() {}
}

/// The same lines, in any order: equal priorities and next hops have none.
fn assert_same(good: &str, now: &str, after: &str) {
    let mut left: BTreeMap<&str, i32> = BTreeMap::new();
    good.lines().for_each(|line| *left.entry(line).or_default() += 1);
    now.lines().for_each(|line| *left.entry(line).or_default() -= 1);
    left.retain(|_, count| *count != 0);
    assert!(left.is_empty(), "after {after}, missing (1) and too much (-1): {left:#?}");
}

fn wait(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn slots_change_in_place_by_one_message_each() {
    in_namespace(|| async {
        let mut node = Node::new();
        let with = |slots: &[u8]| {
            let routes = ["10.2.0.0/16", "fd00:10:2::/48"];
            let mut all: BTreeSet<Route> = routes.iter().map(|to| route(TABLE_OUT, to, slots)).collect();
            all.extend(routes.iter().map(|to| route(TABLE_OUT, to, &[])));
            let devices = [1, 2, 3].map(|n| (number(n), device(n)));
            NodeDesired {
                devices: Section::Set(BTreeMap::from(devices)),
                routes: Section::Set(all),
                ..NodeDesired::default()
            }
        };
        node.apply(&with(&[1])).await;
        for slots in [&[1, 2][..], &[2], &[3], &[1, 2, 3], &[1, 3], &[1], &[2, 3]] {
            let changed = node.writes(&with(slots)).await;
            assert_eq!(changed, (WriteCounts { netlink: 2, ..WriteCounts::default() }, 0), "{slots:?}");
            for command in ["ip route show table 4510", "ip -6 route show table 4510"] {
                let text = ok(command);
                for n in 1..=3 {
                    let times = text.matches(&format!("dev tombolo{n} ")).count();
                    assert_eq!(times, usize::from(slots.contains(&n)), "{slots:?}: {text}");
                }
            }
            node.assert_settled(&with(slots)).await;
        }
        // A device that goes by itself leaves the others, and is put back.
        node.apply(&with(&[1, 2])).await;
        node.driver.devices.lock().unwrap().remove(&number(2));
        ok("ip link delete tombolo2");
        let left = ok("ip -6 route show table 4510") + &ok("ip route show table 4510");
        assert!(left.contains("dev tombolo1"), "{left}");
        node.apply(&with(&[1, 2])).await;
        node.assert_settled(&with(&[1, 2])).await;
        let back = ok("ip -6 route show table 4510") + &ok("ip route show table 4510");
        assert_eq!(back.matches("dev tombolo2").count(), 2, "{back}");
    });
}

#[test]
fn a_foreign_route_at_our_place_is_not_taken() {
    in_namespace(|| async {
        let mut node = Node::new();
        let mut only_devices = desired();
        only_devices.routes = Section::Keep;
        node.apply(&only_devices).await;
        ok("ip route add 10.2.0.0/16 dev tombolo4 table 4510 proto static metric 100");
        let report = node.appliers.apply(&desired()).await;
        let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        assert_eq!(failures.len(), 1, "{failures:?}");
        assert!(failures[0].contains("10.2.0.0/16") && failures[0].contains("exists"), "{failures:?}");
        // The others went on.
        assert!(ok("ip route show table 4510").contains("198.18.2.0/24"));
        assert!(ok("ip route show table 4510").contains("10.2.0.0/16 dev tombolo4 proto static"));
        ok("ip route del 10.2.0.0/16 dev tombolo4 table 4510 proto static");
        node.apply(&desired()).await;
    });
}

#[test]
fn a_link_of_our_name_that_is_not_ours_is_left_alone() {
    in_namespace(|| async {
        ok("ip link add tombolo1 type veth peer name other");
        let before = ok("ip -o link show tombolo1");
        let mut node = Node::new();
        let report = node.appliers.apply(&desired()).await;
        let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        assert!(failures.iter().any(|f| f.contains("tombolo1") && f.contains("not ours")), "{failures:?}");
        assert_eq!(ok("ip -o link show tombolo1"), before);
        assert!(ok("ip -o link show tombolo2").contains("mtu 1420"));
    });
}

type Step<'a> = Box<dyn Fn(&mut Firewall) + 'a>;

#[test]
fn firewall_data_changes_by_element() {
    in_namespace(|| async {
        let mut node = Node::new();
        let with = |change: &dyn Fn(&mut Firewall)| {
            let mut firewall = firewall();
            change(&mut firewall);
            NodeDesired { firewall: Section::Set(firewall), ..NodeDesired::default() }
        };
        node.apply(&with(&|_| {})).await;
        let handle = || {
            let text = ok("nft -a list table inet tombolo");
            text.lines().next().unwrap_or_default().to_owned()
        };
        let first = handle();
        let many: Vec<String> = (0..100).map(|i| format!("10.2.3.{i}:80")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let steps: Vec<Step> = vec![
            Box::new(|f| f.reach = Reach::All),
            Box::new(|f| f.remote.extend([prefix("10.3.0.0/16")])),
            // Overlaps, and a range that grows over the one that was there.
            Box::new(|f| f.local = set(&["10.1.3.0/24", "10.1.3.7/32", "10.1.2.0/24"])),
            Box::new(|f| f.local = set(&["10.1.0.0/22"])),
            Box::new(|f| {
                f.local = set(&["10.1.2.0/25", "10.1.3.128/25", "fd00:10:1:3::/64", "fd00:10:1:3::1/128"])
            }),
            Box::new(|f| f.exported.clear()),
            Box::new(|f| f.tunnel = set(&["198.18.1.4"])),
            Box::new(|f| f.vips.insert(vip("198.19.0.10", 80), balance(&["10.2.3.4:8080"], Some(10800)))),
            Box::new(|f| {
                f.vips.insert(vip("198.19.0.10", 80), balance(&["10.2.3.4:8080", "10.2.3.5:8080"], Some(1)));
                f.vips.insert(vip("fd19:746f:6d62::10", 80), balance(&["[fd00:10:2::5]:8080"], None));
            }),
            Box::new(|f| f.vips.insert(vip("198.19.0.10", 80), balance(&["10.2.3.5:8080"], None))),
            Box::new(move |f| f.vips.insert(vip("198.19.0.10", 80), balance(&many, None))),
            Box::new(|f| f.vips.insert(vip("198.19.0.10", 80), balance(&[], None))),
            Box::new(|f| f.resolvers.clear()),
            Box::new(|_| {}),
        ];
        for (i, step) in steps.iter().enumerate() {
            let desired = with(step.as_ref());
            let (counts, _) = node.writes(&desired).await;
            assert_eq!(counts, WriteCounts { nft: 1, ..WriteCounts::default() }, "step {i}");
            assert_eq!(handle(), first, "step {i} replaced the table");
            node.assert_settled(&desired).await;
        }
    });
}

/// A thread that answers each TCP connection with one letter.
fn answer(listen: &str, letter: u8) {
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("{listen}: {e}"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.and_then(|mut s| s.write_all(&[letter]));
        }
    });
}

fn ask(to: &str) -> std::io::Result<u8> {
    let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut letter = [0];
    stream.read_exact(&mut letter)?;
    Ok(letter[0])
}

#[test]
fn vips_balance_stick_and_refuse() {
    in_namespace(|| async {
        // Somewhere for the default route to lead: packets for a VIP must get as far as the output hook.
        ok("ip link add eth0 type veth peer name eth0far");
        for command in [
            "ip link set eth0 up",
            "ip link set eth0far up",
            "ip address add 192.0.2.2/24 dev eth0",
            "ip address add 2001:db8::2/64 dev eth0 nodad",
            "ip route add default via 192.0.2.1",
            "ip -6 route add default via 2001:db8::1",
            "ip address add 10.1.3.10/32 dev lo",
            "ip address add 10.1.3.11/32 dev lo",
            "ip address add fd00:10:1:3::10/128 dev lo nodad",
            "ip address add fd00:10:1:3::11/128 dev lo nodad",
        ] {
            ok(command);
        }
        answer("10.1.3.10:9000", b'a');
        answer("10.1.3.11:9000", b'b');
        answer("[fd00:10:1:3::10]:9000", b'a');
        answer("[fd00:10:1:3::11]:9000", b'b');

        let mut node = Node::new();
        let both = [
            ("198.19.0.10", "198.19.0.10:80", ["10.1.3.10:9000", "10.1.3.11:9000"], 4),
            (
                "fd19:746f:6d62::10",
                "[fd19:746f:6d62::10]:80",
                ["[fd00:10:1:3::10]:9000", "[fd00:10:1:3::11]:9000"],
                6,
            ),
        ];
        for (virtual_address, to, backends, digit) in both {
            let with = |backends: &[&str], affinity| {
                let mut firewall = firewall();
                firewall.vips.insert(vip(virtual_address, 80), balance(backends, affinity));
                NodeDesired { firewall: Section::Set(firewall), ..NodeDesired::default() }
            };
            node.apply(&with(&backends, None)).await;
            let letters: BTreeSet<u8> = (0..60).map(|_| ask(to).unwrap()).collect();
            assert_eq!(letters, BTreeSet::from(*b"ab"), "{to}: both backends");

            node.apply(&with(&backends, Some(10800))).await;
            let letters: BTreeSet<u8> = (0..60).map(|_| ask(to).unwrap()).collect();
            assert_eq!(letters.len(), 1, "{to}: a client stays");
            let kept = ok(&format!("nft list map inet tombolo affinity{digit}"));
            assert!(kept.contains("elements = "), "{kept}");
            node.assert_settled(&with(&backends, Some(10800))).await;

            // Its backend goes.
            let (gone, other) = if letters.contains(&b'a') { (0, 1) } else { (1, 0) };
            let _ = gone;
            node.apply(&with(&[backends[other]], Some(10800))).await;
            let letters: BTreeSet<u8> = (0..20).map(|_| ask(to).unwrap()).collect();
            assert_eq!(letters, BTreeSet::from([b"ab"[other]]), "{to}: the other backend");

            node.apply(&with(&[], Some(10800))).await;
            let start = Instant::now();
            let error = ask(&to.replace("10:80", "10:81").replace("10]:80", "77]:80")).expect_err("no VIP");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}: {error}");
            let error = ask(to).expect_err("no backend");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}: {error}");
            assert!(start.elapsed() < Duration::from_secs(1));
            node.assert_settled(&with(&[], Some(10800))).await;
        }
    });
}

#[test]
fn questions_come_to_the_resolver_of_the_node() {
    in_namespace(|| async {
        ok("ip link add eth0 type veth peer name eth0far");
        for command in [
            "ip link set eth0 up",
            "ip link set eth0far up",
            "ip address add 192.0.2.2/24 dev eth0",
            "ip address add 2001:db8::2/64 dev eth0 nodad",
            "ip route add default via 192.0.2.1",
            "ip -6 route add default via 2001:db8::1",
        ] {
            ok(command);
        }
        let mut node = Node::new();
        node.apply(&NodeDesired { firewall: Section::Set(firewall()), ..NodeDesired::default() }).await;
        for (listen, from, to) in [
            ("127.0.0.1:10053", "0.0.0.0:0", "198.19.0.1:53"),
            ("[::1]:10053", "[::]:0", "[fd19:746f:6d62::1]:53"),
        ] {
            let server = UdpSocket::bind(listen).unwrap();
            let client = UdpSocket::bind(from).unwrap();
            for socket in [&server, &client] {
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            }
            client.send_to(b"question", to).unwrap();
            let mut buffer = [0; 16];
            let (length, asker) = server.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{to}: {e}"));
            assert_eq!(&buffer[..length], b"question");
            server.send_to(b"answer", asker).unwrap();
            let (length, answerer) = client.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{to}: {e}"));
            assert_eq!((&buffer[..length], answerer), (&b"answer"[..], to.parse().unwrap()));
        }
    });
}

#[test]
fn the_underlay_is_known_and_followed() {
    in_namespace(|| async {
        let monitor = Monitor::start().await.unwrap();
        assert!(monitor.underlay().addresses.is_empty());
        for command in [
            "ip link add eth0 mtu 1400 type veth peer name eth0far",
            "ip link set eth0 up",
            "ip link set eth0far up",
            "ip address add 192.0.2.2/24 dev eth0",
            "ip address add 2001:db8::2/64 dev eth0 nodad",
            "ip route add default via 192.0.2.1",
            "ip -6 route add default via 2001:db8::1",
            "ip link add cni0 type bridge",
            "ip link set cni0 up",
            "ip address add 10.1.3.1/24 dev cni0",
        ] {
            ok(command);
        }
        let expected: Vec<IpAddr> = vec![address("192.0.2.2"), address("2001:db8::2")];
        let owned = BTreeSet::from([prefix("10.1.0.0/16")]);
        let known = async {
            loop {
                let underlay = monitor.underlay();
                let local = underlay.pod_ranges(&owned) == BTreeSet::from([prefix("10.1.3.0/24")]);
                if underlay.addresses == expected && underlay.mtu == 1400 && local {
                    return;
                }
                monitor.changed().await;
            }
        };
        let result = tokio::time::timeout(Duration::from_secs(5), known).await;
        assert!(result.is_ok(), "{:?}", monitor.underlay());
    });
}
