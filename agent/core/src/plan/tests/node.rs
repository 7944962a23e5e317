use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;
use tombolo_proto::model::{
    ClusterId, Device, DeviceFamily, DeviceNumber, Endpoint, Family, Lane, Lanes, NodeName, Prefix, Protocol,
    Rank, ServiceType, WireguardKey,
};
use tombolo_proto::testing::net;

use super::{backend, endpoint, id, ip, nets, node, owned, port, service, tunnel};
use crate::desired::{Firewall, NodeDesired, Route, TABLE_IN, TABLE_OUT, TunnelDevice, Via, Vip, table_lane};
use crate::known::{Known, Section};
use crate::object::{Import, Slice, SliceKey};
use crate::shelf::Shelf;
use crate::world::{ClustersetRanges, Health, MemberNodes, Members, NodeWorld, Reach};

pub(super) fn plan(world: &NodeWorld) -> (NodeDesired, Vec<&'static str>) {
    let (desired, findings) = crate::plan::node(world);
    assert_eq!(crate::plan::node(world), (desired.clone(), findings.clone()), "law 1");
    (desired, findings.iter().map(|f| f.reason).collect())
}

/// docs/datapath.md: two gateways and a worker a side.
pub(super) fn member(cluster: u8) -> MemberNodes {
    let nodes = [(1, "gw1", 1), (2, "gw2", 2), (3, "w1", 0)];
    let nodes = nodes.map(|(host, name, rank)| (node(name), endpoint(cluster, host, name, rank)));
    MemberNodes {
        serial: cluster.into(),
        owned: owned(cluster),
        tunnel: tunnel(cluster),
        nodes: nodes.into(),
    }
}

fn ranges() -> ClustersetRanges {
    ClustersetRanges {
        v4: Some("198.19.0.0/16".parse::<Ipv4Net>().unwrap()),
        v6: Some("fd19:746f:6d62::/112".parse::<Ipv6Net>().unwrap()),
    }
}

pub(super) fn world(name: &str) -> NodeWorld {
    NodeWorld {
        cluster: id("eu"),
        node: node(name),
        reach: Reach::Exports,
        clusterset: Some(ranges()),
        underlay_mtu: 1500,
        underlay: Family::ALL.into(),
        inner: nets(&["192.0.2.16/28"]),
        hosts: Known::Yes(BTreeMap::new()),
        members: Known::Yes([(id("eu"), member(1)), (id("us"), member(2))].into()),
        imports: Known::Yes(Shelf::new()),
        slices: Known::Yes(Shelf::new()),
        health: Health::default(),
    }
}

pub(super) fn number(n: u8) -> DeviceNumber {
    DeviceNumber::new(n).unwrap()
}

pub(super) fn devices(desired: &NodeDesired) -> &BTreeMap<DeviceNumber, TunnelDevice> {
    desired.devices.get().unwrap()
}

pub(super) fn firewall(desired: &NodeDesired) -> &Firewall {
    desired.firewall.get().unwrap()
}

/// Device numbers to the peers' names and what those may send.
fn table(desired: &NodeDesired) -> BTreeMap<u8, Vec<(String, BTreeSet<Prefix>)>> {
    let peers = |d: &TunnelDevice| {
        d.peers.values().map(|p| (p.node.to_string(), p.allowed.clone())).collect::<Vec<_>>()
    };
    devices(desired).iter().map(|(n, d)| (n.get(), peers(d))).collect()
}

pub(super) fn slots(desired: &NodeDesired, prefix: &str) -> Option<Vec<u8>> {
    let wanted = net(prefix);
    desired.routes.get()?.iter().find_map(|r| match &r.via {
        Via::Devices(d) if r.prefix == wanted && r.table == TABLE_OUT => {
            Some(d.iter().map(|n| n.get()).collect())
        }
        Via::Devices(_) | Via::Bound(_) | Via::Unreachable => None,
    })
}

#[test]
fn a_gateway_as_in_the_data_path() {
    let (desired, findings) = plan(&world("gw1"));
    assert!(findings.is_empty(), "{findings:?}");
    let foreign = nets(&["10.2.0.0/16", "fd00:10:2::/48", "198.18.2.0/24", "fd00:18:2::/64"]);
    let worker = nets(&["10.1.3.0/24", "fd00:10:1:3::/64", "198.18.1.3/32", "fd00:18:1::3/128"]);
    let other = nets(&["10.1.2.0/24", "fd00:10:1:2::/64", "198.18.1.2/32", "fd00:18:1::2/128"]);
    let expected = BTreeMap::from([
        (1, vec![("us/gw1".to_owned(), foreign.clone())]),
        (2, vec![("us/gw2".to_owned(), foreign.clone())]),
        (4, vec![("eu/w1".to_owned(), worker)]),
        (6, vec![("eu/gw2".to_owned(), other.union(&foreign).copied().collect())]),
    ]);
    assert_eq!(table(&desired), expected);
    let device = &devices(&desired)[&number(2)];
    assert_eq!(device.mtu, 1420);
    assert_eq!(device.addresses, [ip("198.18.1.1"), ip("fd00:18:1::1")].into());
    // eu-gw1.tombolo2 with us-gw2.tombolo1, port 4511.
    let (key, peer) = device.peers.first_key_value().unwrap();
    assert_eq!(key, &endpoint(2, 2, "gw2", 2).devices[&number(1)].key);
    assert_eq!(peer.candidates, ["192.0.2.34:4511".parse().unwrap()]);

    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![1, 2]));
    assert_eq!(slots(&desired, "fd00:18:2::/64"), Some(vec![1, 2]));
    assert_eq!(slots(&desired, "198.18.1.3/32"), Some(vec![4]));
    let routes = desired.routes.get().unwrap();
    let inward = |prefix: &str, n: u8| Route {
        table: TABLE_IN,
        prefix: net(prefix),
        via: Via::Devices([number(n)].into()),
        source: None,
        mtu: None,
    };
    assert!(routes.contains(&inward("10.1.3.0/24", 4)) && routes.contains(&inward("fd00:10:1:2::/64", 6)));
    assert!(!routes.iter().any(|r| r.table == TABLE_IN && r.prefix == net("10.2.0.0/16")));
    // Two families, five rules each.
    assert_eq!(desired.rules.get().unwrap().len(), 10);
}

#[test]
fn a_worker_as_in_the_data_path() {
    let (desired, findings) = plan(&world("w1"));
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(table(&desired).keys().copied().collect::<Vec<_>>(), [5, 6]);
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![5, 6]));
    assert!(!desired.routes.get().unwrap().iter().any(|r| r.table == TABLE_IN));
    let unreachable = Route {
        table: TABLE_OUT,
        prefix: net("10.2.0.0/16"),
        via: Via::Unreachable,
        source: None,
        mtu: None,
    };
    assert!(desired.routes.get().unwrap().contains(&unreachable));
    assert_eq!(firewall(&desired).local, nets(&["10.1.3.0/24", "fd00:10:1:3::/64"]));
}

/// Peers of this node, by device number.
pub(super) fn dead(world: &NodeWorld, numbers: &[u8]) -> Health {
    let desired = plan(world).0;
    let peers =
        |n: &u8| devices(&desired)[&number(*n)].peers.keys().map(|k| (number(*n), *k)).collect::<Vec<_>>();
    Health { dead: numbers.iter().flat_map(peers).collect(), ..Health::default() }
}

#[test]
fn a_gateway_leaves_dead_slots() {
    let mut gw1 = world("gw1");
    let peer = "198.18.2.1/32";
    assert_eq!(slots(&plan(&gw1).0, peer), Some(vec![1]));
    gw1.health = dead(&gw1, &[1]);
    let (desired, findings) = plan(&gw1);
    assert!(findings.is_empty(), "{findings:?}");
    for prefix in ["10.2.0.0/16", "fd00:10:2::/48", "198.18.2.0/24"] {
        assert_eq!(slots(&desired, prefix), Some(vec![2]));
    }
    assert_eq!(slots(&desired, peer), None);
    assert_eq!(slots(&desired, "198.18.2.2/32"), Some(vec![2]));

    // The last one dies too: kept while nobody says that he can do better.
    gw1.health = dead(&gw1, &[1, 2]);
    let (desired, findings) = plan(&gw1);
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![1, 2]));
    assert_eq!(findings, ["NoLiveTunnel"]);
    gw1.health.unreachable.insert(node("gw2"), [id("us")].into());
    assert_eq!(slots(&plan(&gw1).0, "10.2.0.0/16"), Some(vec![1, 2]));
    gw1.health.unreachable.insert(node("gw2"), [id("as")].into());
    assert_eq!(slots(&plan(&gw1).0, "10.2.0.0/16"), Some(vec![6]));
    // A plain node's word counts for nothing.
    gw1.health.unreachable = [(node("w1"), BTreeSet::new())].into();
    assert_eq!(slots(&plan(&gw1).0, "10.2.0.0/16"), Some(vec![1, 2]));
    // Ways inward stay, whatever answers.
    gw1.health = dead(&gw1, &[1, 2, 4, 6]);
    let inward = |d: &NodeDesired| {
        d.routes.get().unwrap().iter().filter(|r| r.table == TABLE_IN).cloned().collect::<Vec<_>>()
    };
    assert_eq!(inward(&plan(&gw1).0), inward(&plan(&world("gw1")).0));
}

#[test]
fn a_worker_leaves_gateways_that_are_dead_or_cut_off() {
    let mut w1 = world("w1");
    w1.health = dead(&w1, &[5]);
    let (desired, findings) = plan(&w1);
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![6]));
    // The other one lives but has no way: better than none.
    w1.health.unreachable.insert(node("gw2"), [id("us")].into());
    let (desired, findings) = plan(&w1);
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![6]));
    assert_eq!(findings, ["NoLiveTunnel"]);
    w1.health = dead(&w1, &[5, 6]);
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![5, 6]));
    w1.health = Health { unreachable: [(node("gw1"), [id("us")].into())].into(), ..Health::default() };
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![6]));
    w1.health.unreachable.insert(node("gw2"), [id("us")].into());
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![5, 6]));
}

#[test]
fn gateways_that_came_lately_get_packets_once_they_can_carry_them() {
    let mut w1 = world("w1");
    let both = dead(&w1, &[5, 6]).dead;
    w1.health.young = dead(&w1, &[6]).dead;
    let prefix = "10.2.0.0/16";
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5]));
    w1.health.alive = both.clone();
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5]), "it has said nothing yet");
    w1.health.unreachable.insert(node("gw2"), BTreeSet::new());
    w1.health.untried.insert(node("gw2"), [id("us")].into());
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5]));
    w1.health.untried.insert(node("gw2"), [id("as")].into());
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5, 6]));
    // Better than none, whatever is said; and of one that is not young it is no matter.
    w1.health.untried.insert(node("gw2"), [id("us")].into());
    w1.health.dead = dead(&world("w1"), &[5]).dead;
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![6]));
    w1.health.dead = BTreeSet::new();
    w1.health.young = BTreeSet::new();
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5, 6]));
    w1.health.young = both;
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5, 6]), "all are");

    // Not watched yet, while others are.
    w1.health = Health { known: Some(dead(&world("w1"), &[5]).dead), ..Health::default() };
    assert_eq!(slots(&plan(&w1).0, prefix), Some(vec![5]));

    let mut gw1 = world("gw1");
    gw1.health.young = dead(&gw1, &[2]).dead;
    assert_eq!(slots(&plan(&gw1).0, prefix), Some(vec![1]));
    gw1.health.alive = gw1.health.young.clone();
    assert_eq!(slots(&plan(&gw1).0, prefix), Some(vec![1]), "it cannot reach its own nodes yet");
    gw1.health =
        Health { young: gw1.health.young, dead: dead(&world("gw1"), &[1]).dead, ..Health::default() };
    assert_eq!(slots(&plan(&gw1).0, prefix), Some(vec![2]));
}

#[test]
fn unknown_is_kept_and_known_to_be_gone_goes() {
    let (desired, _) = plan(&NodeWorld { members: Known::No, ..world("w1") });
    assert_eq!(desired, NodeDesired::default());
    // Nothing comes in before the firewall knows what may.
    let (desired, _) = plan(&NodeWorld { slices: Known::No, ..world("w1") });
    assert_eq!(desired, NodeDesired::default());
    // Revoked: gone at once, whatever else is unknown.
    let revoked = Known::Yes(Members::from([(id("us"), member(2))]));
    let (desired, _) = plan(&NodeWorld { members: revoked, imports: Known::No, ..world("w1") });
    assert_eq!(desired.devices, Section::Set(BTreeMap::new()));
    assert_eq!(desired.routes, Section::Set(BTreeSet::new()));
    assert_eq!(desired.firewall, Section::Keep);
    // Not stated yet: no tunnels, and still nothing in clear.
    let (desired, _) = plan(&world("new"));
    assert!(devices(&desired).is_empty());
    assert_eq!(desired.routes.get().unwrap().len(), 6);
}

pub(super) fn import(ports: &[tombolo_proto::model::Port], ips: &[&str]) -> Import {
    Import {
        kind: ServiceType::ClusterSetIP,
        ports: ports.to_vec(),
        ips: ips.iter().map(|a| ip(a)).collect(),
        families: vec![Family::V4, Family::V6],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        clusters: BTreeSet::new(),
        preferences: Default::default(),
    }
}

pub(super) fn slice_key(name: &str, source: &str, family: Family, index: u32) -> SliceKey {
    SliceKey { service: service(name), source: id(source), family, index }
}

#[test]
fn vips_and_reach() {
    let mut world = world("w1");
    let imports = [
        (
            service("a/web"),
            import(&[port("http", 80), port("admin", 9000)], &["198.19.0.9", "fd19:746f:6d62::9"]),
        ),
        // The resolver's address, one outside, and one that is taken.
        (service("b/bad"), import(&[port("", 80)], &["198.19.0.1", "10.0.0.1", "198.19.0.9"])),
    ];
    let slice = |ports: &[_], backends: &[&str]| Slice {
        ports: ports.to_vec(),
        backends: backends.iter().map(|a| backend(a)).collect(),
        ..Slice::default()
    };
    let mut sick = slice(&[port("http", 8080)], &["10.2.9.9"]);
    sick.backends[0].ready = false;
    let slices = [
        (slice_key("a/web", "eu", Family::V4, 0), slice(&[port("http", 8080)], &["10.1.3.10", "10.1.2.10"])),
        // 10.1.3.11 is not its to give; nor is 192.0.2.1 anybody's.
        (
            slice_key("a/web", "us", Family::V4, 0),
            slice(&[port("http", 8080), port("admin", 1)], &["10.2.3.10", "10.1.3.11", "192.0.2.1"]),
        ),
        (slice_key("a/web", "us", Family::V4, 1), sick),
    ];
    world.imports = Known::Yes(imports.into());
    world.slices = Known::Yes(slices.into());
    let (desired, findings) = plan(&world);
    assert_eq!(
        findings,
        ["BackendOutsideGrant", "ClusterSetIPOutsideRange", "ClusterSetIPOutsideRange", "ClusterSetIPTwice"]
    );
    let firewall = firewall(&desired);
    let vip = |address: &str, port: u16| {
        let vip = Vip { address: ip(address), protocol: Protocol::Tcp, port };
        firewall.vips[&vip].backends.keys().map(|b| SocketAddr::from(*b).to_string()).collect::<Vec<_>>()
    };
    assert_eq!(vip("198.19.0.9", 80), ["10.1.2.10:8080", "10.1.3.10:8080", "10.2.3.10:8080"]);
    assert_eq!(vip("198.19.0.9", 9000), ["10.2.3.10:1"], "mcs 20");
    assert!(vip("fd19:746f:6d62::9", 80).is_empty());
    assert_eq!(firewall.vips.len(), 4);
    assert_eq!(firewall.exported, [(ip("10.1.3.10"), Protocol::Tcp, 8080)].into(), "only what is here");
    assert_eq!(firewall.resolvers, [ip("198.19.0.1"), ip("fd19:746f:6d62::1")].into());

    world.clusterset = None;
    assert!(self::firewall(&plan(&world).0).vips.is_empty());
}

#[test]
fn own_backends_on_a_hosts_network_are_reached_there_and_let_in_by_tunnel_address() {
    let mut world = world("w1");
    world.hosts = Known::Yes([(ip("192.0.2.16"), node("w1")), (ip("192.0.2.17"), node("gw1"))].into());
    world.imports = Known::Yes([(service("a/web"), import(&[port("", 80)], &["198.19.0.9"]))].into());
    let slice = |names: &[&str]| Slice {
        ports: vec![port("", 8080)],
        backends: names.iter().map(|a| backend(a)).collect(),
        ..Slice::default()
    };
    let all = slice(&["192.0.2.16", "192.0.2.17", "192.0.2.18"]);
    let theirs = slice(&["192.0.2.16"]);
    world.slices = Known::Yes(
        [(slice_key("a/web", "eu", Family::V4, 0), all), (slice_key("a/web", "us", Family::V4, 0), theirs)]
            .into(),
    );
    let (desired, findings) = plan(&world);
    assert_eq!(
        findings,
        ["BackendOutsideGrant", "BackendOutsideGrant"],
        "192.0.2.18 is no node; us has none here"
    );
    let firewall = firewall(&desired);
    let backends: Vec<_> = firewall.vips.values().next().unwrap().backends.keys().map(|b| b.0).collect();
    assert_eq!(backends, [ip("192.0.2.16"), ip("192.0.2.17")]);
    let tunnel = *firewall.tunnel.iter().find(|t| t.is_ipv4()).unwrap();
    assert_eq!(firewall.exported, [(tunnel, Protocol::Tcp, 8080)].into());

    world.hosts = Known::No;
    assert_eq!(plan(&world).0.firewall, Section::Keep, "unknown hosts withdraw nothing");
}

#[test]
fn more_than_64_backends_are_used_by_all_nodes_together() {
    let names: Vec<String> = (1..=100).map(|i| format!("10.2.0.{i}")).collect();
    let slice = Slice {
        ports: vec![port("", 80)],
        backends: names.iter().map(|a| backend(a)).collect(),
        ..Slice::default()
    };
    let mut used = BTreeSet::new();
    for host in 0..20 {
        let mut world = world(&format!("n{host}"));
        world.imports = Known::Yes([(service("a/web"), import(&[port("", 80)], &["198.19.0.9"]))].into());
        world.slices = Known::Yes([(slice_key("a/web", "us", Family::V4, 0), slice.clone())].into());
        let (desired, _) = plan(&world);
        let balance = firewall(&desired).vips.values().next().unwrap();
        assert_eq!((balance.backends.len(), balance.entries()), (64, 64));
        used.extend(balance.backends.keys().copied());
    }
    assert_eq!(used.len(), 100);
}

#[test]
fn a_copied_key_does_not_cut_off_its_holder() {
    let mut world = world("gw1");
    let mut hostile = member(3);
    let victim = endpoint(2, 1, "gw1", 1);
    for endpoint in hostile.nodes.values_mut().filter(|e| e.rank.get() == 1) {
        endpoint.devices = victim.devices.clone();
    }
    let members = [(id("as"), hostile), (id("eu"), member(1)), (id("us"), member(2))];
    world.members = Known::Yes(members.into());
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["KeyTwice"]);
    let device = &devices(&desired)[&number(1)];
    let peer = &device.peers[&victim.devices[&number(1)].key];
    assert_eq!(peer.node.cluster, id("us"), "who was admitted first");
    assert!(peer.allowed.contains(&net("10.2.0.0/16")));
    assert!(peer.candidates.contains(&"192.0.2.33:4511".parse().unwrap()));
}

/// A small universe, so that collisions are the rule.
fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let prefixes = || {
        prop::sample::select(vec![
            "10.1.0.0/16",
            "10.1.2.0/24",
            "10.1.2.128/25",
            "10.1.3.0/24",
            "10.1.3.7/32",
            "10.2.0.0/24",
            "10.2.1.0/24",
            "10.0.0.0/14",
            "10.3.0.0/16",
            "192.168.0.0/16",
            "fd00:10:1:2::/64",
            "fd00:10::/32",
            "198.18.1.0/24",
            "198.18.2.2/32",
        ])
        .prop_map(net)
    };
    let candidate =
        prop::sample::select(vec!["192.0.2.1", "10.1.2.3", "2001:db8::1", "198.18.1.1"]).prop_map(ip);
    let tunnel = (0_u8..4, 0_u8..4);
    (
        prop::sample::select(vec![0_u8, 0, 0, 0, 1, 2, 3]),
        (prop::collection::vec(1_u8..60, 8..=24), prop::option::weighted(0.1, 0_u8..24)),
        prop::collection::vec(candidate, 0..4),
        prop::option::of(tunnel.clone()),
        prop::option::of(tunnel),
        prop::collection::btree_set(prefixes(), 1..6),
        any::<bool>(),
    )
        .prop_map(|(rank, devices, candidates, v4, v6, prefixes, mesh)| Endpoint {
            node: node("x"),
            rank: Rank::new(rank).unwrap(),
            devices: (0..)
                .zip(devices.0)
                .filter(|(n, _)| Some(*n) != devices.1)
                .map(|(n, key)| (number(n), Device { key: WireguardKey([key; 32]), port: 4510 }))
                .collect(),
            candidates,
            tunnel_v4: v4.map(|(c, h)| format!("198.18.{c}.{h}").parse().unwrap()),
            tunnel_v6: v6.map(|(c, h)| format!("fd00:18:{c}::{h}").parse().unwrap()),
            prefixes,
            mesh,
        })
}

fn any_member(number: u8) -> impl Strategy<Value = MemberNodes> {
    prop::collection::btree_map("n[0-4]", any_endpoint(), 4..6).prop_map(move |nodes| MemberNodes {
        serial: (number ^ 2).into(),
        owned: owned(number),
        tunnel: tunnel(number),
        nodes: nodes.into_iter().map(|(n, e)| (node(&n), Endpoint { node: node(&n), ..e })).collect(),
    })
}

pub(super) fn any_slices() -> impl Strategy<Value = BTreeMap<SliceKey, Slice>> {
    let address = prop::sample::select(vec![
        "10.1.2.3",
        "10.2.2.3",
        "10.3.2.3",
        "198.18.1.2",
        "192.0.2.1",
        "fd00:10:1:2::3",
    ]);
    let key = (
        prop::sample::select(vec!["a/web", "b/db"]),
        prop::sample::select(vec!["as", "eu", "us", "xx"]),
        any::<bool>(),
        0_u32..2,
    );
    prop::collection::btree_map(key, prop::collection::vec((address, any::<bool>()), 0..4), 0..8).prop_map(
        |map| {
            let slice = |list: Vec<(&str, bool)>| Slice {
                ports: vec![port("", 8080)],
                backends: list
                    .into_iter()
                    .map(|(a, ready)| tombolo_proto::model::Backend { ready, ..backend(a) })
                    .collect(),
                ..Slice::default()
            };
            map.into_iter()
                .map(|((name, source, v4, index), list)| {
                    let family = if v4 { Family::V4 } else { Family::V6 };
                    (slice_key(name, source, family, index), slice(list))
                })
                .collect()
        },
    )
}

pub(super) fn any_world() -> impl Strategy<Value = NodeWorld> {
    (
        any_member(1),
        any_member(2),
        any_member(3),
        "n[0-4]",
        any_slices(),
        prop::bool::weighted(0.95),
        any::<bool>(),
        any::<u16>(),
    )
        .prop_map(|(eu, us, as_, name, slices, here, v4, dead)| {
            let mut members = BTreeMap::from([(id("us"), us), (id("as"), as_)]);
            if here {
                members.insert(id("eu"), eu);
            }
            let imports = [
                (service("a/web"), import(&[port("", 80)], &["198.19.0.9"])),
                (service("b/db"), import(&[port("", 80)], &["198.19.0.9", "fd19:746f:6d62::9"])),
            ];
            let mut world = NodeWorld {
                members: Known::Yes(members.into()),
                imports: Known::Yes(imports.into()),
                slices: Known::Yes(slices.into()),
                underlay: if v4 { [Family::V4].into() } else { Family::ALL.into() },
                ..world(&name)
            };
            let (desired, _) = plan(&world);
            let peers = devices(&desired).iter().flat_map(|(n, d)| d.peers.keys().map(|key| (*n, *key)));
            let (gone, here): (Vec<_>, Vec<_>) =
                peers.enumerate().partition(|(i, _)| dead >> (i % 16) & 1 == 1);
            world.health.dead = gone.into_iter().map(|(_, p)| p).collect();
            world.health.alive = here.into_iter().filter(|(i, _)| i % 3 > 0).map(|(_, p)| p).collect();
            world.health.young =
                world.health.alive.iter().chain(&world.health.dead).copied().skip(1).collect();
            let told = (0..5).filter(|i| dead >> (i + 8) & 1 == 1);
            world.health.unreachable = told
                .map(|i| {
                    (
                        node(&format!("n{i}")),
                        if dead >> i & 1 == 1 { [id("us")].into() } else { BTreeSet::new() },
                    )
                })
                .collect();
            world
        })
}

fn ranges_of(members: &Members, which: impl Fn(&ClusterId) -> bool) -> BTreeSet<Prefix> {
    members.iter().filter(|(c, _)| which(c)).flat_map(|(_, m)| m.owned.union(&m.tunnel).copied()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn law_2_holds_whatever_others_state(world in any_world()) {
        let (desired, _) = plan(&world);
        let members = world.members.get().unwrap();
        let here = members.contains_key(&world.cluster);
        let own = ranges_of(members, |c| *c == world.cluster);
        let foreign = ranges_of(members, |c| *c != world.cluster);
        let within = |ranges: &BTreeSet<Prefix>, p: &Prefix| ranges.iter().any(|r| r.covers(p));
        let me = members.get(&world.cluster).and_then(|m| m.nodes.get(&world.node));

        let devices = devices(&desired);
        prop_assert!(here || devices.is_empty());
        for (number, device) in devices {
            prop_assert!(!device.peers.is_empty(), "a device exists while a peer needs it");
            prop_assert!(device.addresses.iter().all(|a| tunnel(1).iter().any(|p| p.contains(*a))));
            let peers: Vec<_> = device.peers.iter().collect();
            for (i, (key, peer)) in peers.iter().enumerate() {
                for (_, other) in &peers[..i] {
                    for p in &peer.allowed {
                        prop_assert!(!other.allowed.iter().any(|q| q.overlaps(p)), "{p} has two peers on {number}");
                    }
                }
                prop_assert!(Some(*key) != me.and_then(|me| me.devices.get(number)).map(|d| &d.key));
                prop_assert!(peer.node.cluster != world.cluster || peer.node.node != world.node);
                prop_assert!(peer.candidates.iter().all(|a| world.underlay.contains(&Family::of(a.ip()))));
                if peer.node.cluster != world.cluster {
                    let ours = |a: IpAddr| own.iter().chain(&world.inner).any(|p| p.contains(a));
                    prop_assert!(!peer.candidates.iter().any(|c| ours(c.ip())), "sends handshakes to itself");
                    let own_keys = members.get(&world.cluster).into_iter().flat_map(|m| m.nodes.values());
                    prop_assert!(!own_keys.flat_map(|e| e.devices.values()).any(|d| d.key == **key));
                }
                let stated = &members[&peer.node.cluster].nodes[&peer.node.node];
                prop_assert_eq!(stated.rank, number.rank());
                for p in &peer.allowed {
                    match number.family() {
                        DeviceFamily::Out if number.rank().is_gateway() => prop_assert!(foreign.contains(p)),
                        DeviceFamily::Out => {
                            // Whoever copied a key has added what is its own.
                            prop_assert!(stated.mesh && me.is_some_and(|me| me.mesh) && within(&foreign, p));
                        }
                        DeviceFamily::In if number.rank().is_gateway() => {
                            prop_assert!(within(&own, p) || foreign.contains(p));
                        }
                        DeviceFamily::In => prop_assert!(within(&own, p)),
                    }
                }
            }
        }

        let routes = desired.routes.get().unwrap();
        let mut carried = BTreeSet::new();
        for route in routes {
            let (first, lane) = table_lane(route.table).unwrap();
            prop_assert!(firewall(&desired).lanes.iter().any(|l| l == lane));
            prop_assert!(within(&own, &route.prefix) || (first == TABLE_OUT && within(&foreign, &route.prefix)));
            prop_assert!(route.source.is_none_or(|s| Family::of(s) == route.prefix.family()));
            if let Via::Devices(slots) = &route.via {
                prop_assert!(carried.insert((route.table, route.prefix)), "{} has two routes", route.prefix);
                prop_assert!(!slots.is_empty());
                for slot in slots {
                    prop_assert!(devices[slot].peers.values().any(|p| within(&p.allowed, &route.prefix)));
                }
            }
        }
        // Other lanes lead to the same nodes.
        let to = |lane: Lane| -> BTreeSet<Route> {
            let of_lane = routes.iter().filter(|r| table_lane(r.table).unwrap().1 == lane);
            let first = |route: &Route| {
                let via = match &route.via {
                    Via::Devices(all) => Via::Devices(all.iter().map(|n| n.in_lane(Lane::FIRST)).collect()),
                    Via::Bound(_) => return None,
                    Via::Unreachable => Via::Unreachable,
                };
                Some(Route { table: table_lane(route.table).unwrap().0, via, ..route.clone() })
            };
            of_lane.filter_map(first).collect()
        };
        for lane in firewall(&desired).lanes.iter() {
            prop_assert_eq!(to(lane), to(Lane::FIRST));
        }
        for prefix in foreign.iter().filter(|_| here) {
            let twin = Route { table: TABLE_OUT, prefix: *prefix, via: Via::Unreachable, source: None, mtu: None };
            prop_assert!(routes.contains(&twin), "{prefix} would leave in clear");
        }
        for rule in desired.rules.get().unwrap() {
            prop_assert!(routes.iter().any(|r| r.prefix.family() == rule.family));
        }

        let firewall = firewall(&desired);
        for (vip, balance) in &firewall.vips {
            prop_assert!(super::super::vip::is_vip(&ranges(), vip.address));
            for (address, _) in balance.backends.keys() {
                prop_assert!(own.iter().chain(&foreign).any(|p| p.contains(*address)));
            }
        }
        let local = |a: IpAddr| firewall.local.iter().any(|p| p.contains(a)) || firewall.tunnel.contains(&a);
        prop_assert!(firewall.exported.iter().all(|(a, ..)| local(*a)));
    }

    /// Both ends compute the same pairs, each alone.
    #[test]
    fn pairs_agree(ranks in prop::collection::vec((0_usize..3, 0_u8..4, any::<bool>(), 1_u8..4), 1..10)) {
        let names = ["as", "eu", "us"];
        let mut members: BTreeMap<ClusterId, MemberNodes> = (0..3_u8)
            .map(|i| (id(names[usize::from(i)]), MemberNodes { serial: i.into(), owned: owned(i), tunnel: tunnel(i), nodes: BTreeMap::new() }))
            .collect();
        for (host, (cluster, rank, mesh, lanes)) in ranks.into_iter().enumerate() {
            let (host, number) = (u8::try_from(host).unwrap() + 1, u8::try_from(cluster).unwrap());
            let name = format!("n{host}");
            let devices = super::devices(number, host, Lanes::new(lanes).unwrap());
            let endpoint = Endpoint { mesh, devices, ..endpoint(number, host, &name, rank) };
            members.get_mut(&id(names[cluster])).unwrap().nodes.insert(node(&name), endpoint);
        }
        // (who, own device's key) talks to (who, that one's key).
        let mut talks = BTreeSet::new();
        for (cluster, member) in &members {
            for (name, endpoint) in &member.nodes {
                let world = NodeWorld { cluster: cluster.clone(), node: name.clone(), members: Known::Yes(members.clone().into()), ..world("x") };
                for (number, device) in devices(&plan(&world).0) {
                    talks.extend(device.peers.keys().map(|key| (endpoint.devices[number].key, *key)));
                }
            }
        }
        for (one, other) in &talks {
            prop_assert!(talks.contains(&(*other, *one)));
        }
    }
}

#[test]
fn findings_are_bounded() {
    let mut world = world("gw1");
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    let us = members.get_mut(&id("eu")).unwrap();
    for host in 0..2000 {
        let name: NodeName = node(&format!("bad{host}"));
        us.nodes.insert(
            name.clone(),
            Endpoint { node: name, prefixes: nets(&["192.168.0.0/16"]), ..endpoint(1, 9, "x", 0) },
        );
    }
    assert_eq!(plan(&world).1.len(), 500);
}

#[test]
fn thousands_of_foreign_nodes_are_not_judged_on_every_node() {
    let mut world = world("gw1");
    let plain = plan(&world).0;
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    let us = members.get_mut(&id("us")).unwrap();
    for host in 0..20_000 {
        let name: NodeName = node(&format!("a{host}"));
        us.nodes.insert(name.clone(), Endpoint { node: name, ..endpoint(2, 1, "x", 0) });
    }
    assert_eq!(plan(&world), (plain, Vec::new()));
}

#[test]
fn a_foreign_candidate_of_ours_gets_no_handshakes() {
    let mut world = world("gw1");
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    let us = members.get_mut(&id("us")).unwrap();
    let gateway = us.nodes.get_mut(&node("gw1")).unwrap();
    // An own node, an own pod, an own tunnel address, and its own pod range, which is its own affair (a flat network).
    gateway.candidates = ["192.0.2.17", "10.1.3.9", "198.18.1.3", "10.2.0.9"].map(ip).to_vec();
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["CandidateIsOurs"]);
    let peers = &devices(&desired)[&number(1)].peers;
    assert_eq!(peers.values().next().unwrap().candidates, ["10.2.0.9:4511".parse().unwrap()]);
}

#[test]
fn own_keys_stay_ours_for_every_device() {
    let mut world = world("gw1");
    let stolen = endpoint(1, 2, "gw2", 2).devices[&number(5)];
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    let us = members.get_mut(&id("us")).unwrap();
    us.nodes.get_mut(&node("gw1")).unwrap().devices.insert(number(1), stolen);
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["KeyTwice"]);
    assert!(!devices(&desired).contains_key(&number(1)));
}

#[test]
fn names_answer_no_address_that_is_not_a_vip() {
    let mut world = world("w1");
    let imports = [
        (service("a/web"), import(&[port("", 80)], &["198.19.0.9"])),
        (service("b/bad"), import(&[port("", 80)], &["198.19.0.1", "10.0.0.1", "198.19.0.9"])),
    ];
    world.imports = Known::Yes(imports.into());
    let good = [
        (service("a/web"), import(&[port("", 80)], &["198.19.0.9"])),
        (service("b/bad"), import(&[port("", 80)], &[])),
    ];
    let expected = crate::zone::Zone::build(&good.into(), &Shelf::new());
    assert_eq!(plan(&world).0.zone, Section::Set(expected));
}

#[test]
fn a_thousand_own_nodes_have_their_tunnels() {
    let (desired, _) = crate::plan::cluster(&super::cluster::thousand());
    let nodes = desired.nodes.get().unwrap().clone();
    let own = MemberNodes {
        serial: 1,
        owned: nets(&["10.0.0.0/8"]),
        tunnel: nets(&["198.18.0.0/20", "fd00:18::/64"]),
        nodes,
    };
    let us = MemberNodes { owned: nets(&["172.16.0.0/16"]), tunnel: nets(&["198.18.99.0/24"]), ..member(2) };
    let of = |name: &str| {
        let members = Known::Yes([(id("eu"), own.clone()), (id("us"), us.clone())].into());
        NodeWorld { members, inner: BTreeSet::new(), ..world(name) }
    };
    let peers = |name: &str| -> usize {
        let (desired, _) = plan(&of(name));
        let own = |p: &&crate::desired::Peer| p.node.cluster == id("eu");
        devices(&desired).values().map(|d| d.peers.values().filter(own).count()).sum()
    };
    assert_eq!(peers("n0007"), 999, "a gateway talks to all");
    assert_eq!(peers("n0500"), 3, "a plain node to the gateways");
}
