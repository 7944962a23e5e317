use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tombolo_proto::model::{
    BackendGroup, Backends, Export, Family, Hostname, Lanes, Position, Preference, Rank, RecordKey, Scope,
    ServiceType, record_kind,
};
use tombolo_proto::testing;
use tombolo_proto::trust::{Member, Membership};
use tombolo_proto::wire;

use super::merge::any_export;
use super::{backend, devices, endpoint, export, id, ip, nets, node, owned, port, service, tunnel};
use crate::desired::ClusterDesired;
use crate::diff::Diff;
use crate::known::{Known, Section};
use crate::object::{LocalKind, Node, Service, ServiceExport, ServiceKey, Slice, SliceKey, TunnelNode};
use crate::world::{ClusterWorld, ClustersetRanges, Foreign, Topology};

pub(super) fn plan(world: &ClusterWorld) -> (ClusterDesired, Vec<&'static str>) {
    let (desired, findings) = crate::plan::cluster(world);
    assert_eq!(crate::plan::cluster(world), (desired.clone(), findings.clone()), "law 1");
    (desired, findings.iter().map(|f| f.reason).collect())
}

fn member(name: &str, number: u8, namespaces: &[&str]) -> Member {
    let (root, roots) = testing::set();
    let speaks = testing::key(number + 100);
    let mut grant =
        testing::grant(name, u64::from(number), &[&format!("10.{number}.0.0/16")], speaks.public());
    grant.namespaces = namespaces.iter().map(|p| p.parse().unwrap()).collect();
    let binding = testing::binding(&grant, 0, speaks.public()).sign(&speaks);
    let membership = Membership::verify(&roots, &grant.sign(&root), &[binding]).unwrap();
    Member { membership, owned: owned(number), tunnel: tunnel(number) }
}

pub(super) fn foreign(name: &str, number: u8) -> Foreign {
    Foreign {
        member: member(name, number, &[]),
        position: Position::default(),
        nodes: BTreeMap::new(),
        exports: BTreeMap::new(),
        backends: BTreeMap::new(),
        unknown_namespaces: BTreeSet::new(),
    }
}

fn k8s_node(host: u8) -> Node {
    Node {
        gateway: false,
        ready: true,
        pod_cidrs: nets(&[&format!("10.1.{host}.0/24"), &format!("fd00:10:1:{host}::/64")]),
        addresses: vec![ip(&format!("192.0.2.{host}"))],
    }
}

fn tunnel_node(host: u8) -> TunnelNode {
    TunnelNode {
        devices: devices(1, host, Lanes::ONE),
        candidates: vec![ip(&format!("192.0.2.{host}"))],
        prefixes: BTreeSet::new(),
        outside: BTreeSet::new(),
        unreached: BTreeSet::new(),
    }
}

pub(super) fn local(ports: &[u16]) -> Service {
    Service {
        kind: LocalKind::ClusterIP,
        ports: ports.iter().map(|p| port(&format!("p{p}"), *p)).collect(),
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
    }
}

pub(super) fn user_export(created: u64) -> ServiceExport {
    ServiceExport {
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created,
        preference: Preference::default(),
        misread: None,
    }
}

pub(super) fn group(ports: &[(u16, u16)], addresses: &[&str]) -> BackendGroup {
    BackendGroup {
        ports: ports.iter().map(|(name, target)| port(&format!("p{name}"), *target)).collect(),
        backends: addresses.iter().map(|a| backend(a)).collect(),
    }
}

pub(super) const MEMBER_SINCE: u64 = 1_700_000_000;

/// Cluster eu with nodes a, b, c; services a/web (exported) and a/quiet (not).
pub(super) fn world() -> ClusterWorld {
    let names = ["a", "b", "c"];
    ClusterWorld {
        cluster: id("eu"),
        own: member("eu", 1, &[]),
        clusterset: Some(ClustersetRanges {
            v4: Some("198.19.0.0/16".parse().unwrap()),
            v6: Some("fd19:746f:6d62::/112".parse().unwrap()),
        }),
        topology: Topology::Gateway,
        nodes: Known::Yes(names.iter().zip(1..).map(|(n, i)| (node(n), k8s_node(i))).collect()),
        tunnel_nodes: Known::Yes(names.iter().zip(1..).map(|(n, i)| (node(n), tunnel_node(i))).collect()),
        stated: Known::Yes(BTreeMap::new()),
        namespaces: Known::Yes(["a", "b", "kube-system"].map(|n| n.parse().unwrap()).into()),
        services: Known::Yes([(service("a/web"), local(&[80])), (service("a/quiet"), local(&[80]))].into()),
        exports: Known::Yes([(service("a/web"), user_export(MEMBER_SINCE + 1000))].into()),
        backends: Known::Yes(
            [
                (service("a/web"), vec![group(&[(80, 8080)], &["10.1.1.5", "10.1.2.5"])]),
                (service("a/quiet"), vec![group(&[(80, 8080)], &["10.1.1.6"])]),
            ]
            .into(),
        ),
        imports: Known::Yes(BTreeMap::new()),
        slices: Known::Yes(BTreeSet::new()),
        derived: Known::Yes(BTreeMap::new()),
        service_families: BTreeSet::new(),
        foreign: BTreeMap::new(),
        unknown: BTreeSet::new(),
    }
}

pub(super) fn known<T>(value: &mut Known<T>) -> &mut T {
    match value {
        Known::Yes(value) => value,
        Known::No => panic!("not known"),
    }
}

pub(super) fn with_us(
    mut world: ClusterWorld,
    name: &str,
    export: Export,
    addresses: &[&str],
) -> ClusterWorld {
    let us = world.foreign.entry(id("us")).or_insert_with(|| foreign("us", 2));
    let targets: Vec<(u16, u16)> = export.ports.iter().map(|p| (p.port, p.port + 8000)).collect();
    us.exports.insert(service(name), export);
    let groups = vec![group(&targets, addresses)];
    us.backends.insert(service(name), BTreeMap::from([(1, Backends { groups })]));
    world
}

pub(super) fn us_export(ports: &[u16]) -> Export {
    let ports: Vec<_> = ports.iter().map(|p| port(&format!("p{p}"), *p)).collect();
    Export { families: vec![Family::V4], ..export(MEMBER_SINCE + 2000, &ports) }
}

/// What the shell would read back after writing all that was planned.
pub(super) fn applied(world: &ClusterWorld, desired: &ClusterDesired) -> ClusterWorld {
    let mut world = world.clone();
    if let Section::Set(nodes) = &desired.nodes {
        world.stated = Known::Yes(nodes.clone());
    }
    if let Section::Set(objects) = &desired.imports {
        let mut now = world.imports.get().unwrap().clone();
        now.retain(|key, _| objects.keep.contains(key));
        now.extend(objects.set.clone());
        world.imports = Known::Yes(now);
    }
    if let Section::Set(objects) = &desired.slices {
        let mut now = world.slices.get().unwrap().clone();
        now.retain(|key| objects.keep.contains(key));
        now.extend(objects.set.keys().cloned());
        world.slices = Known::Yes(now);
    }
    world
}

pub(super) fn condition(desired: &ClusterDesired, name: &str, kind: &str) -> Option<(bool, String)> {
    let status = desired.statuses.get()?.get(&service(name))?;
    status.conditions.get(kind).map(|c| (c.status, c.reason.clone()))
}

pub(super) fn yes(reason: &str) -> Option<(bool, String)> {
    Some((true, reason.to_owned()))
}

pub(super) fn no(reason: &str) -> Option<(bool, String)> {
    Some((false, reason.to_owned()))
}

#[test]
fn a_set_of_one_cluster_works() {
    let (desired, findings) = plan(&world());
    assert!(findings.is_empty(), "{findings:?}");
    let records = desired.records.get().unwrap();
    assert_eq!(records.len(), 2);
    let scope = &records[&Scope::Namespace("a".parse().unwrap())];
    let names: Vec<String> = scope.keys().map(|k| format!("{k:?}")).collect();
    assert_eq!(names, [r#"2["web"]"#, r#"3["web", "1"]"#]);
    let key = RecordKey::new(record_kind::BACKENDS, &["web", "1"]).unwrap();
    let shard = wire::decode_backends(&scope[&key].body).unwrap();
    assert_eq!(shard.addresses(), [ip("10.1.1.5"), ip("10.1.2.5")].into());
    // What is stated, receivers read as it was meant.
    for (key, record) in &records[&Scope::Nodes] {
        let name = node(&key.name()[0]);
        let read = wire::decode_endpoint(name.clone(), &record.body).unwrap();
        assert_eq!(read, desired.nodes.get().unwrap()[&name]);
    }
    let imports = &desired.imports.get().unwrap().set;
    assert_eq!(imports.keys().collect::<Vec<_>>(), [&service("a/web")], "mcs 2, 3");
    let import = &imports[&service("a/web")];
    assert_eq!(import.ips.len(), 1);
    assert_eq!(import.clusters, [id("eu")].into());
    let slices = &desired.slices.get().unwrap().set;
    assert_eq!(slices.len(), 1);
    assert_eq!(slices.values().next().unwrap().ports, [port("p80", 8080)]);
    assert_eq!(condition(&desired, "a/web", "Valid"), yes("Valid"));
    assert_eq!(condition(&desired, "a/web", "Ready"), yes("Exported"));
    assert_eq!(condition(&desired, "a/web", "Conflict"), no("NoConflicts"));
}

#[test]
fn ranks_stick_and_are_freed() {
    let ranks = |world: &ClusterWorld| -> Vec<(String, u8)> {
        let (desired, _) = plan(world);
        let nodes = desired.nodes.get().unwrap();
        nodes
            .iter()
            .filter(|(_, e)| e.rank.is_gateway())
            .map(|(n, e)| (n.to_string(), e.rank.get()))
            .collect()
    };
    let pairs = |list: &[(&str, u8)]| list.iter().map(|(n, r)| ((*n).to_owned(), *r)).collect::<Vec<_>>();
    let mut world = world();
    assert_eq!(ranks(&world), pairs(&[("a", 1), ("b", 2)]));
    // Stated otherwise before: stays.
    known(&mut world.stated).insert(node("c"), endpoint(1, 3, "c", 3));
    known(&mut world.stated).insert(node("b"), endpoint(1, 2, "b", 1));
    assert_eq!(ranks(&world), pairs(&[("b", 1), ("c", 3)]));
    // Not ready: another takes over, under a rank that is free; alone it would stay.
    known(&mut world.nodes).get_mut(&node("c")).unwrap().ready = false;
    assert_eq!(ranks(&world), pairs(&[("a", 2), ("b", 1)]));
    known(&mut world.nodes).get_mut(&node("a")).unwrap().ready = false;
    assert_eq!(ranks(&world), pairs(&[("b", 1), ("c", 3)]));
    // Gone frees it.
    known(&mut world.nodes).remove(&node("b"));
    assert_eq!(ranks(&world), pairs(&[("c", 3)]));
    // A label decides, ready or not.
    known(&mut world.nodes).get_mut(&node("a")).unwrap().gateway = true;
    assert_eq!(ranks(&world), pairs(&[("a", 1)]));
}

#[test]
fn a_fourth_gateway_is_named() {
    let mut world = world();
    for name in ["d", "a", "b", "c"] {
        let nodes = known(&mut world.nodes);
        nodes.entry(node(name)).or_insert_with(|| k8s_node(4)).gateway = true;
        known(&mut world.tunnel_nodes).entry(node(name)).or_insert_with(|| tunnel_node(4));
    }
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["TooManyGateways"]);
    assert_eq!(desired.nodes.get().unwrap()[&node("d")].rank, Rank::NODE);
}

#[test]
fn tunnel_addresses_stick() {
    let mut world = world();
    let address =
        |world: &ClusterWorld, name: &str| plan(world).0.nodes.get().unwrap()[&node(name)].tunnel_v4.unwrap();
    assert_eq!(address(&world, "a").to_string(), "198.18.1.1");
    let stated = plan(&world).0.nodes.get().unwrap().clone();
    *known(&mut world.stated) = stated;
    known(&mut world.nodes).insert(node("0"), k8s_node(9));
    known(&mut world.tunnel_nodes).insert(node("0"), tunnel_node(9));
    assert_eq!(address(&world, "a").to_string(), "198.18.1.1");
    assert_eq!(address(&world, "0").to_string(), "198.18.1.4");
    // One that was another's, and one that is nobody's to bear.
    known(&mut world.stated).get_mut(&node("b")).unwrap().tunnel_v4 = Some("198.18.1.1".parse().unwrap());
    known(&mut world.stated).get_mut(&node("c")).unwrap().tunnel_v4 = Some("198.18.1.255".parse().unwrap());
    assert_eq!(address(&world, "a").to_string(), "198.18.1.1");
    assert_eq!(address(&world, "b").to_string(), "198.18.1.3");
    assert_eq!(address(&world, "c").to_string(), "198.18.1.4");
}

#[test]
fn node_prefixes_come_from_the_api_else_from_the_node_and_lie_in_the_grant() {
    let mut world = world();
    let prefixes =
        |world: &ClusterWorld, name: &str| plan(world).0.nodes.get().unwrap()[&node(name)].prefixes.clone();
    assert_eq!(prefixes(&world, "a"), nets(&["10.1.1.0/24", "fd00:10:1:1::/64"]));
    known(&mut world.nodes).get_mut(&node("a")).unwrap().pod_cidrs = nets(&["192.168.0.0/24"]);
    known(&mut world.tunnel_nodes).get_mut(&node("a")).unwrap().prefixes =
        nets(&["10.1.9.0/26", "10.9.0.0/24", "10.1.2.128/25"]);
    // 10.1.2.128/25 overlaps b's: a is lower by name.
    assert_eq!(prefixes(&world, "a"), nets(&["10.1.9.0/26", "10.1.2.128/25"]));
    assert_eq!(prefixes(&world, "b"), nets(&["fd00:10:1:2::/64"]));
}

#[test]
fn every_export_has_its_conditions() {
    let mut world = world();
    world.own = member("eu", 1, &["a", "kube-*"]);
    let services = known(&mut world.services);
    services.insert(service("a/ext"), Service { kind: LocalKind::ExternalName, ..local(&[80]) });
    services.insert(service("a/derived"), Service { kind: LocalKind::Derived, ..local(&[80]) });
    services.insert(service("a/wild"), Service { ports: vec![port("x", 80); 101], ..local(&[80]) });
    services.insert(service("b/web"), local(&[80]));
    services.insert(service("kube-system/dns"), local(&[53]));
    services.insert(service("gone/web"), local(&[53]));
    for name in ["a/ext", "a/derived", "a/wild", "a/missing", "b/web", "kube-system/dns", "gone/web"] {
        known(&mut world.exports).insert(service(name), user_export(0));
    }
    let (desired, _) = plan(&world);
    let both = |name: &str| (condition(&desired, name, "Valid"), condition(&desired, name, "Ready"));
    assert_eq!(both("a/ext"), (no("InvalidServiceType"), no("Failed")), "mcs 6");
    assert_eq!(
        both("a/derived"),
        (no("InvalidServiceType"), no("Failed")),
        "law 5: imports are never exported"
    );
    assert_eq!(both("a/wild"), (yes("Valid"), no("Failed")));
    assert_eq!(both("a/missing"), (no("NoService"), no("Pending")), "mcs 5");
    assert_eq!(both("b/web"), (no("NamespaceNotGranted"), no("Failed")));
    assert_eq!(both("kube-system/dns"), (no("NamespaceReserved"), no("Failed")));
    assert_eq!(condition(&desired, "a/ext", "Conflict"), None);
    let scopes: Vec<String> = desired.records.get().unwrap().keys().map(ToString::to_string).collect();
    assert_eq!(scopes, ["nodes", "namespace a"]);
    assert_eq!(desired.imports.get().unwrap().set.keys().collect::<Vec<_>>(), [&service("a/web")]);
}

#[test]
fn backends_of_host_network_are_stated_by_tunnel_address_and_foreign_ones_not_at_all() {
    let mut world = world();
    known(&mut world.backends).insert(
        service("a/web"),
        vec![group(&[(80, 8080), (99, 1)], &["192.0.2.2", "10.2.0.1", "10.1.1.5"])],
    );
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["BackendOutsideGrant"]);
    let slices = &desired.slices.get().unwrap().set;
    let all: Vec<String> =
        slices.values().flat_map(|s| s.backends.iter().map(|b| b.address.to_string())).collect();
    assert_eq!(all, ["10.1.1.5", "192.0.2.2"], "within the cluster, its node's own address");
    assert_eq!(slices.values().next().unwrap().ports, [port("p80", 8080)]);
}

#[test]
fn what_is_not_stated_of_an_export_is_told_on_it() {
    let ready = |groups: Vec<BackendGroup>| {
        let mut world = world();
        known(&mut world.backends).insert(service("a/web"), groups);
        let (desired, _) = plan(&world);
        assert_eq!(condition(&desired, "a/web", "Ready"), yes("Exported"));
        let statuses = desired.statuses.get().unwrap();
        statuses[&service("a/web")].conditions["Ready"].message.clone()
    };
    assert_eq!(ready(vec![group(&[(80, 8080)], &["10.1.1.5"])]), "stated to the set");
    assert_eq!(ready(vec![]), "stated to the set");
    let outside = ready(vec![group(&[(80, 8080)], &["10.1.1.5", "10.2.0.1"])]);
    assert!(outside.contains("but 1 backends are outside") && outside.contains("10.2.0.1"), "{outside}");
    let ports = ready(vec![group(&[(99, 8080)], &["10.1.1.5"])]);
    assert!(ports.contains("no backend serves any of its ports"), "{ports}");
}

#[test]
fn two_clusters_make_one_service() {
    let world = with_us(world(), "a/web", us_export(&[80, 81]), &["10.2.1.1", "10.1.1.5", "192.0.2.9"]);
    let world = with_us(world, "nowhere/web", us_export(&[80]), &["10.2.1.1"]);
    let world = with_us(world, "kube-system/dns", us_export(&[80]), &["10.2.1.1"]);
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["BackendOutsideGrant"]);
    let imports = &desired.imports.get().unwrap().set;
    assert_eq!(imports.len(), 1, "mcs 3: only where the namespace exists");
    assert_eq!(imports[&service("a/web")].clusters, [id("eu"), id("us")].into());
    assert_eq!(imports[&service("a/web")].ports, [port("p80", 80), port("p81", 81)]);
    let slices = &desired.slices.get().unwrap().set;
    let of = |cluster: &str| {
        slices.iter().filter(|(k, _)| k.source == id(cluster)).map(|(_, s)| s).collect::<Vec<_>>()
    };
    assert_eq!(of("eu")[0].ports, [port("p80", 8080)], "mcs 20");
    assert_eq!(of("us")[0].ports, [port("p80", 8080), port("p81", 8081)]);
    assert_eq!(of("us")[0].backends, [backend("10.2.1.1")]);
    assert_eq!(condition(&desired, "a/web", "Conflict"), yes("PortConflict"), "us has a port more");

    let headless = Export { kind: ServiceType::Headless, ..us_export(&[80]) };
    let (desired, _) = plan(&with_us(world, "a/web", headless, &[]));
    assert_eq!(condition(&desired, "a/web", "Conflict"), yes("TypeConflict"), "mcs 19: on the winner's too");
}

#[test]
fn headless_services_keep_hostnames_and_have_no_address() {
    let mut world = world();
    let services = known(&mut world.services);
    services.insert(service("a/web"), Service { kind: LocalKind::Headless, ports: Vec::new(), ..local(&[]) });
    let mut named = group(&[], &["10.1.1.5"]);
    named.backends[0].hostname = Some(Hostname::new("db-0").unwrap());
    known(&mut world.backends).insert(service("a/web"), vec![named.clone()]);
    let (desired, _) = plan(&world);
    assert!(desired.imports.get().unwrap().set[&service("a/web")].ips.is_empty());
    let slices = &desired.slices.get().unwrap().set;
    assert_eq!(
        slices.values().collect::<Vec<_>>(),
        [&Slice { backends: named.backends, ..Slice::default() }]
    );
}

#[test]
fn what_is_not_granted_is_not_imported() {
    let mut world = with_us(world(), "b/web", us_export(&[80]), &["10.2.1.1"]);
    world.foreign.get_mut(&id("us")).unwrap().member = member("us", 2, &["a"]);
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["NamespaceNotGranted"]);
    assert!(!desired.imports.get().unwrap().set.contains_key(&service("b/web")));
}

#[test]
fn nothing_is_stated_while_a_source_is_unknown() {
    let full = world();
    let variants = [
        ClusterWorld { nodes: Known::No, ..full.clone() },
        ClusterWorld { tunnel_nodes: Known::No, ..full.clone() },
        ClusterWorld { stated: Known::No, ..full.clone() },
        ClusterWorld { namespaces: Known::No, ..full.clone() },
        ClusterWorld { services: Known::No, ..full.clone() },
        ClusterWorld { exports: Known::No, ..full.clone() },
        ClusterWorld { backends: Known::No, ..full.clone() },
    ];
    let existing = applied(&full, &plan(&full).0);
    for world in variants {
        let (desired, _) = plan(&world);
        assert_eq!((&desired.records, &desired.statuses), (&Section::Keep, &Section::Keep));
        // And nothing that came of it goes.
        let world =
            ClusterWorld { imports: existing.imports.clone(), slices: existing.slices.clone(), ..world };
        let (desired, _) = plan(&world);
        if let Section::Set(objects) = &desired.imports {
            assert!(Diff::objects(objects, existing.imports.get().unwrap()).is_empty());
            let slices: BTreeMap<_, _> =
                existing.slices.get().unwrap().iter().map(|k| (k.clone(), ())).collect();
            let objects = desired.slices.get().unwrap();
            assert!(slices.keys().all(|k| objects.keep.contains(k)));
        } else {
            assert_eq!(desired.slices, Section::Keep);
        }
    }
    assert_eq!(plan(&ClusterWorld { imports: Known::No, ..full.clone() }).0.imports, Section::Keep);
    assert_eq!(plan(&ClusterWorld { slices: Known::No, ..full }).0.slices, Section::Keep);
}

#[test]
fn an_unknown_cluster_takes_nothing_along() {
    let world = with_us(world(), "a/web", us_export(&[80, 81]), &["10.2.1.1"]);
    let world = with_us(world, "b/only", us_export(&[80]), &["10.2.1.1"]);
    let mut world = applied(&world, &plan(&world).0);
    let before: BTreeSet<SliceKey> = world.slices.get().unwrap().clone();
    world.foreign.clear();

    // Not at hand: its services stay, and the own part of them goes on.
    let mut unknown = world.clone();
    unknown.unknown.insert(id("us"));
    known(&mut unknown.backends).insert(service("a/web"), vec![group(&[(80, 8080)], &["10.1.1.77"])]);
    let (desired, _) = plan(&unknown);
    let imports = desired.imports.get().unwrap();
    assert_eq!(imports.keep, [service("a/web"), service("b/only")].into());
    let slices = desired.slices.get().unwrap();
    let us: BTreeSet<SliceKey> = before.iter().filter(|k| k.source == id("us")).cloned().collect();
    assert_eq!(slices.keep, us);
    assert_eq!(slices.set.len(), 1);
    assert_eq!(slices.set.values().next().unwrap().backends, [backend("10.1.1.77")]);
    assert_eq!(condition(&desired, "a/web", "Conflict"), None, "left as it is");

    // Known to be no member: everything of it goes (mcs 4).
    let (desired, _) = plan(&world);
    let imports = desired.imports.get().unwrap();
    assert!(imports.keep.is_empty());
    assert_eq!(imports.set.keys().collect::<Vec<_>>(), [&service("a/web")]);
    assert_eq!(imports.set[&service("a/web")].clusters, [id("eu")].into());
    assert!(desired.slices.get().unwrap().set.keys().all(|k| k.source == id("eu")));
}

#[test]
fn a_range_that_is_full_is_named() {
    let mut world = world();
    // Of eight addresses five are VIPs.
    world.clusterset = Some(ClustersetRanges { v4: Some("198.19.0.0/29".parse().unwrap()), v6: None });
    for i in 0..8 {
        let key = service(&format!("a/s{i}"));
        known(&mut world.services).insert(key.clone(), local(&[80]));
        known(&mut world.exports).insert(key, user_export(MEMBER_SINCE));
    }
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["ClusterSetIPRangeFull"], "one, however many it concerns");
    let ips: BTreeSet<_> = desired.imports.get().unwrap().set.values().flat_map(|i| i.ips.clone()).collect();
    assert_eq!(ips.len(), 5);
}

#[test]
fn a_flooder_does_not_take_everybodys_addresses() {
    let mut world = world();
    world.clusterset = Some(ClustersetRanges { v4: Some("198.19.0.0/28".parse().unwrap()), v6: None });
    for i in 0..1000 {
        world = with_us(world, &format!("a/s{i}"), us_export(&[80]), &[]);
    }
    // Its name comes last.
    let mut as_ = foreign("as", 3);
    as_.exports.insert(service("b/zz"), us_export(&[80]));
    // And this one it shares with the flooder.
    as_.exports.insert(service("a/s999"), us_export(&[80]));
    world.foreign.insert(id("as"), as_);
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["ClusterSetIPShareFull"]);
    let imports = &desired.imports.get().unwrap().set;
    let has = |name: &str| !imports[&service(name)].ips.is_empty();
    assert!(has("a/web") && has("b/zz") && has("a/s999"));
    assert_eq!(imports.values().filter(|i| !i.ips.is_empty()).count(), 8 + 3);
}

#[test]
fn a_hostile_member_makes_no_endless_services_and_slices() {
    let mut flood = foreign("us", 2);
    for i in 0..20_010 {
        flood.exports.insert(service(&format!("b/s{i:05}")), us_export(&[80]));
    }
    // Each group has a target port of its own.
    let groups = (0..1000_u16).map(|n| group(&[(80, 1000 + n)], &["10.2.1.1"])).collect::<Vec<_>>();
    let shards: BTreeMap<u32, Backends> =
        (1..=20).map(|shard| (shard, Backends { groups: groups.clone() })).collect();
    for i in 0..30 {
        flood.backends.insert(service(&format!("b/s{i:05}")), shards.clone());
    }
    let mut world = world();
    world.foreign.insert(id("us"), flood);
    let (desired, findings) = crate::plan::cluster(&world);
    let reasons: Vec<&str> = findings.iter().map(|f| f.reason).collect();
    assert_eq!(reasons, ["TooManyServices", "TooManySlices"]);
    assert_eq!(desired.imports.get().unwrap().set.len(), 20_001);
    let slices = &desired.slices.get().unwrap().set;
    assert!(slices.len() <= 30_000 + 64);
    assert!(slices.keys().all(|key| key.index % 2048 < 64), "of one shard");
    assert!(slices.keys().any(|key| key.source == id("eu")), "the own ones are not touched");
}

fn any_backends() -> impl Strategy<Value = BTreeMap<u32, Backends>> {
    let address = (0_u8..4, 0_u8..5, any::<bool>()).prop_map(|(cluster, host, v4)| {
        if v4 { format!("10.{cluster}.0.{host}") } else { format!("fd00:10:{cluster}::{host}") }
    });
    let port = (0_u8..4, 80_u16..84).prop_map(|(name, n)| port(["", "a", "b", "c"][usize::from(name)], n));
    let group = (prop::collection::vec(port, 0..3), prop::collection::vec(address, 0..4)).prop_map(
        |(ports, list)| BackendGroup { ports, backends: list.iter().map(|a| backend(a)).collect() },
    );
    let shard = prop::collection::vec(group, 0..3).prop_map(|groups| Backends { groups });
    prop::collection::btree_map(prop_oneof![0_u32..3, Just(u32::MAX)], shard, 0..3)
}

fn any_name() -> impl Strategy<Value = ServiceKey> {
    prop::sample::select(vec!["a/web", "a/db", "b/web", "b/x", "c/web", "kube-system/dns"]).prop_map(service)
}

fn any_foreign(name: &'static str, number: u8) -> impl Strategy<Value = Foreign> {
    let unknown = prop::collection::btree_set(prop::sample::select(vec!["a", "b"]), 0..2);
    (
        prop::collection::btree_map(any_name(), any_export(), 0..4),
        prop::collection::btree_map(any_name(), any_backends(), 0..4),
        unknown,
    )
        .prop_map(move |(exports, backends, unknown)| Foreign {
            exports,
            backends,
            unknown_namespaces: unknown.iter().map(|n| n.parse().unwrap()).collect(),
            ..foreign(name, number)
        })
}

pub(super) fn any_world() -> impl Strategy<Value = ClusterWorld> {
    let kind = prop::sample::select(vec![
        LocalKind::ClusterIP,
        LocalKind::Headless,
        LocalKind::ExternalName,
        LocalKind::Derived,
    ]);
    (
        prop::option::of(any_foreign("as", 3)),
        prop::option::of(any_foreign("us", 2)),
        prop::collection::btree_map(any_name(), kind, 0..5),
        prop::collection::btree_set(any_name(), 0..5),
        any_backends(),
        prop::collection::btree_set(0_usize..2, 0..2),
    )
        .prop_map(|(as_, us, services, exports, backends, unknown)| {
            let mut world = world();
            let groups: Vec<BackendGroup> = backends.into_values().flat_map(|b| b.groups).collect();
            known(&mut world.backends).extend(services.keys().map(|k| (k.clone(), groups.clone())));
            known(&mut world.services)
                .extend(services.into_iter().map(|(key, kind)| (key, Service { kind, ..local(&[80, 81]) })));
            known(&mut world.exports).extend(exports.into_iter().map(|key| (key, user_export(0))));
            let both = [("as", as_), ("us", us)];
            world.foreign = both.into_iter().filter_map(|(n, f)| Some((id(n), f?))).collect();
            world.unknown = unknown
                .into_iter()
                .map(|i| id(["as", "us"][i]))
                .filter(|c| !world.foreign.contains_key(c))
                .collect();
            world
        })
}

fn check(world: &ClusterWorld, desired: &ClusterDesired) -> Result<(), TestCaseError> {
    let imports = desired.imports.get().unwrap();
    let existing = world.imports.get().unwrap();
    let namespaces = world.namespaces.get().unwrap();
    let ranges = world.clusterset.unwrap();
    let mut ips = BTreeSet::new();
    for (key, import) in
        imports.set.iter().chain(imports.keep.iter().filter_map(|k| Some((k, existing.get(k)?))))
    {
        prop_assert!(namespaces.contains(&key.namespace) && !key.namespace.is_reserved(), "mcs 3: {key}");
        prop_assert!(!import.families.is_empty(), "mcs 12");
        let expected = if import.kind == ServiceType::Headless { 0 } else { import.families.len() };
        prop_assert_eq!(import.ips.len(), expected, "mcs 12, 13");
        for (ip, family) in import.ips.iter().zip(&import.families) {
            prop_assert_eq!(Family::of(*ip), *family);
            prop_assert!(super::super::vip::is_vip(&ranges, *ip), "law 2: {ip}");
            prop_assert!(ips.insert(*ip), "{ip} twice");
        }
    }
    for (key, slice) in &desired.slices.get().unwrap().set {
        let member = match world.foreign.get(&key.source) {
            Some(foreign) => &foreign.member,
            None => &world.own,
        };
        let import = imports.set.get(&key.service).or_else(|| existing.get(&key.service)).unwrap();
        prop_assert!(slice.backends.len() <= 100 && !slice.backends.is_empty());
        for b in &slice.backends {
            prop_assert!(member.owns(b.address) && Family::of(b.address) == key.family, "law 2: {:?}", key);
        }
        for p in &slice.ports {
            prop_assert!(import.ports.iter().any(|i| i.name == p.name && i.protocol == p.protocol));
        }
    }
    for (key, import) in &imports.set {
        let derived = world.services.get().unwrap().get(key).is_some_and(|s| s.kind == LocalKind::Derived);
        prop_assert!(!derived || !import.clusters.contains(&world.cluster), "law 5");
    }
    for (scope, records) in desired.records.get().unwrap() {
        prop_assert!(!records.is_empty());
        for (key, record) in records {
            prop_assert!(record.body.len() <= tombolo_proto::model::Record::MAX_BODY);
            match key.kind() {
                record_kind::ENDPOINT => {
                    prop_assert_eq!(scope, &Scope::Nodes);
                    prop_assert!(wire::decode_endpoint(node(&key.name()[0]), &record.body).is_ok());
                }
                record_kind::EXPORT => prop_assert!(wire::decode_export(&record.body).is_ok()),
                _ => {
                    let shard = wire::decode_backends(&record.body);
                    prop_assert!(shard.is_ok_and(|s| s.addresses().iter().all(|a| world.own.owns(*a))));
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_laws_hold_whatever_others_state(first in any_world(), second in any_world()) {
        let (desired, _) = plan(&first);
        check(&first, &desired)?;
        // Law 1: with all of it applied nothing is left to do.
        let now = applied(&first, &desired);
        let (again, _) = plan(&now);
        check(&now, &again)?;
        prop_assert_eq!(&again.records, &desired.records);
        prop_assert!(Diff::objects(again.imports.get().unwrap(), now.imports.get().unwrap()).is_empty());
        let (a, b) = (again.slices.get().unwrap(), desired.slices.get().unwrap());
        for (key, slice) in &a.set {
            prop_assert_eq!(b.set.get(key), Some(slice));
        }

        // Then the world becomes another: addresses stick, the unknown stays.
        let next = ClusterWorld {
            stated: now.stated.clone(),
            imports: now.imports.clone(),
            slices: now.slices.clone(),
            ..second
        };
        let (later, _) = plan(&next);
        check(&next, &later)?;
        let before = now.imports.get().unwrap();
        let objects = later.imports.get().unwrap();
        for (key, import) in &objects.set {
            if let Some(old) = before.get(key) {
                for ip in import.ips.iter().filter(|ip| old.families.contains(&Family::of(**ip)) && !old.ips.is_empty()) {
                    prop_assert!(old.ips.contains(ip), "mcs 15: {key} moved to {ip}");
                }
            }
        }
        for (key, old) in before {
            let unknown = old.clusters.iter().any(|c| next.unknown.contains(c)
                || next.foreign.get(c).is_some_and(|f| f.unknown_namespaces.contains(&key.namespace)));
            prop_assert!(!unknown || objects.keep.contains(key), "law 4: {key}");
        }
        let slices = later.slices.get().unwrap();
        for key in now.slices.get().unwrap().iter().filter(|k| next.unknown.contains(&k.source)) {
            prop_assert!(slices.keep.contains(key), "law 4: {key:?}");
        }
        for (name, endpoint) in later.nodes.get().unwrap() {
            prop_assert_eq!(endpoint, &now.stated.get().unwrap()[name], "ranks and addresses stick");
        }
    }

    #[test]
    fn law_1_local_order_does_not_matter(backends in any_backends(), turn in 0_usize..7) {
        let mut groups: Vec<BackendGroup> = backends.into_values().flat_map(|b| b.groups).collect();
        let mut world = world();
        known(&mut world.backends).insert(service("a/web"), groups.clone());
        let first = plan(&world);
        if !groups.is_empty() {
            let turn = turn % groups.len();
            groups.rotate_left(turn);
        }
        for group in &mut groups {
            group.backends.reverse();
            group.ports.reverse();
        }
        known(&mut world.backends).insert(service("a/web"), groups);
        prop_assert_eq!(plan(&world), first);
    }
}

/// A thousand nodes with a /24 of pods each, out of 10.0.0.0/8.
pub(super) fn thousand() -> ClusterWorld {
    let mut world = world();
    world.own.owned = nets(&["10.0.0.0/8"]);
    world.own.tunnel = nets(&["198.18.0.0/20", "fd00:18::/64"]);
    let (nodes, tunnel_nodes) = (known(&mut world.nodes), known(&mut world.tunnel_nodes));
    nodes.clear();
    tunnel_nodes.clear();
    for number in 0..1000_u16 {
        let [high, low] = number.to_be_bytes();
        let name = node(&format!("n{number:04}"));
        let value = Node {
            gateway: number % 400 == 7,
            pod_cidrs: nets(&[&format!("10.{high}.{low}.0/24")]),
            ..k8s_node(1)
        };
        nodes.insert(name.clone(), value);
        tunnel_nodes
            .insert(name, TunnelNode { devices: devices(high + 1, low, Lanes::ONE), ..tunnel_node(1) });
    }
    world
}

#[test]
fn of_a_thousand_nodes_others_hear_of_the_gateways() {
    let mut world = thousand();
    let (desired, findings) = plan(&world);
    assert!(findings.is_empty(), "{findings:?}");
    let nodes = desired.nodes.get().unwrap();
    assert_eq!(nodes.len(), 1000);
    let addresses: BTreeSet<_> = nodes.values().map(|e| e.tunnel_v4.unwrap()).collect();
    assert_eq!(addresses.len(), 1000, "each its own");
    let stated: Vec<String> =
        desired.records.get().unwrap()[&Scope::Nodes].keys().map(|key| key.name()[0].to_string()).collect();
    assert_eq!(stated, ["n0007", "n0407", "n0807"]);
    // What is kept beside the statement is the rest, and it is all that is needed to go on as before.
    let own = crate::plan::piece::own(&world, None).unwrap();
    assert_eq!(own.unstated.len(), 997);
    let again = applied(&world, &desired);
    assert_eq!(plan(&again).0.nodes, desired.nodes);
    // Under the topology mesh nobody talks to so many.
    world.topology = Topology::Mesh;
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["MeshTooLarge"]);
    assert_eq!(desired.records.get().unwrap()[&Scope::Nodes].len(), 3);
}

#[test]
fn meshed_nodes_are_stated() {
    let mut world = world();
    world.topology = Topology::Mesh;
    let (desired, _) = plan(&world);
    assert_eq!(desired.records.get().unwrap()[&Scope::Nodes].len(), 3);
    known(&mut world.nodes).get_mut(&node("c")).unwrap().pod_cidrs.clear();
    let (desired, _) = plan(&world);
    assert_eq!(desired.records.get().unwrap()[&Scope::Nodes].len(), 2, "what has no prefix is not talked to");
}
