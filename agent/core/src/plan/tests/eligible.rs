//! Which backends are used: by what is ready, what can be reached and what the exports prefer.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tombolo_proto::model::{ClusterId, Family, Priority, ServiceType, Share, Weight};

use super::node::{dead, firewall, import, member, number, plan, slice_key, world};
use super::{backend, id, ip, node, port, service};
use crate::known::Known;
use crate::object::{Import, Preferences, Slice};
use crate::plan::eligible::{Verdict, View, unreached};
use crate::world::{Health, NodeWorld};
use crate::zone::{Answer, Data, Kind};

fn share(priority: u8, weight: u8) -> Share {
    Share { priority: Priority::new(priority).unwrap(), weight: Weight::new(weight).unwrap() }
}

fn preferences(local: bool, shares: &[(&str, Share)]) -> Preferences {
    Preferences { local, shares: shares.iter().map(|(c, share)| (id(c), *share)).collect() }
}

fn judge(preferences: &Preferences, unreached: &[&str], ready: &[&str]) -> BTreeMap<String, Verdict> {
    let (us, unreached) = (id("eu"), unreached.iter().map(|c| id(c)).collect());
    let ready: Vec<ClusterId> = ready.iter().map(|c| id(c)).collect();
    let view = View { cluster: &us, unreached: &unreached };
    let verdicts = view.eligible(preferences, &ready.iter().collect());
    verdicts.into_iter().map(|(c, v)| (c.to_string(), v)).collect()
}

fn used(preferences: &Preferences, unreached: &[&str], ready: &[&str]) -> Vec<String> {
    let verdicts = judge(preferences, unreached, ready);
    verdicts.into_iter().filter(|(_, v)| *v == Verdict::Used).map(|(c, _)| c).collect()
}

#[test]
fn ways_first_then_local_then_priority() {
    let all = ["as", "eu", "us"];
    let none = preferences(false, &[]);
    assert_eq!(used(&none, &[], &all), all);
    assert_eq!(used(&none, &["us"], &all), ["as", "eu"]);
    assert_eq!(judge(&none, &["us"], &all)["us"], Verdict::Unreached);
    // The last ones are kept.
    assert_eq!(used(&none, &["us"], &["us"]), ["us"]);
    assert_eq!(used(&none, &["us", "as"], &["us", "as"]), ["as", "us"]);

    let local = preferences(true, &[("eu", share(10, 100))]);
    assert_eq!(used(&local, &[], &all), ["eu"], "local goes before priority");
    assert_eq!(judge(&local, &[], &all)["us"], Verdict::NotLocal);
    assert_eq!(used(&local, &[], &["as", "us"]), ["as", "us"]);

    let standby = preferences(false, &[("as", share(10, 100)), ("eu", share(20, 100))]);
    assert_eq!(used(&standby, &[], &all), ["us"]);
    assert_eq!(judge(&standby, &[], &all)["eu"], Verdict::Passive(Priority::default()));
    assert_eq!(used(&standby, &["us"], &all), ["as"]);
    assert_eq!(used(&standby, &["us", "as"], &all), ["eu"]);
    // Of what nobody reaches, the best again.
    assert_eq!(used(&standby, &["us", "as"], &["us", "as"]), ["us"]);
    // Nothing is remembered: failback is the same decision.
    assert_eq!(used(&standby, &[], &all), ["us"]);
}

/// web in us and as (eu has it if `own`), with two families and a headless twin.
fn three(name: &str, own: bool, preferences: Preferences) -> NodeWorld {
    let mut world = world(name);
    let headless =
        Import { kind: ServiceType::Headless, ips: Vec::new(), ..import(&[port("http", 80)], &[]) };
    let vip = import(&[port("http", 80), port("admin", 9000)], &["198.19.0.9", "fd19:746f:6d62::9"]);
    let imports = [(service("a/db"), headless), (service("a/web"), vip)];
    world.imports = Known::Yes(
        imports.map(|(key, import)| (key, Import { preferences: preferences.clone(), ..import })).into(),
    );
    world.members = Known::Yes([("eu", 1), ("us", 2), ("as", 3)].map(|(c, n)| (id(c), member(n))).into());
    let mut slices = BTreeMap::new();
    for (cluster, n) in [("eu", 1), ("us", 2), ("as", 3)] {
        if cluster == "eu" && !own {
            continue;
        }
        for name in ["a/web", "a/db"] {
            for (family, address) in
                [(Family::V4, format!("10.{n}.3.10")), (Family::V6, format!("fd00:10:{n}:3::10"))]
            {
                // Only as has admin.
                let ports = [port("http", 8080), port("admin", 9001)];
                let count = if cluster == "as" { 2 } else { 1 };
                let slice = Slice {
                    ports: ports[..count].to_vec(),
                    backends: vec![backend(&address)],
                    ..Slice::default()
                };
                slices.insert(slice_key(name, cluster, family, 0), slice);
            }
        }
    }
    world.slices = Known::Yes(slices.into());
    world
}

/// Clusters that new connections go to: by VIP in both families, and by the headless name; they are the same.
fn chosen(world: &NodeWorld, port: u16) -> Vec<String> {
    let (desired, _) = plan(world);
    let cluster = |n: u8| ["eu", "us", "as"][usize::from(n) - 1].to_owned();
    let vips = &firewall(&desired).vips;
    let of = |v4: bool| -> BTreeSet<String> {
        let balance = vips.iter().find(|(v, _)| v.port == port && v.address.is_ipv4() == v4).unwrap().1;
        balance
            .backends
            .keys()
            .map(|(address, _)| match address {
                std::net::IpAddr::V4(a) => cluster(a.octets()[1]),
                std::net::IpAddr::V6(a) => cluster(a.octets()[5]),
            })
            .collect()
    };
    assert_eq!(of(true), of(false));
    if port == 80 {
        let zone = desired.zone.get().unwrap();
        let Answer::Found(found) = zone.answer(&["db", "a", "svc"], Kind::A, 0, 99) else { panic!() };
        let names: BTreeSet<String> = found
            .records
            .iter()
            .map(|data| match data {
                Data::A(a) => cluster(a.octets()[1]),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(of(true), names, "names and VIPs use one decision");
    }
    of(true).into_iter().collect()
}

#[test]
fn a_vanished_cluster_is_left_and_the_last_one_kept() {
    // A plain node: by what its gateways say.
    let mut w1 = three("w1", false, Preferences::default());
    assert_eq!(chosen(&w1, 80), ["as", "us"]);
    w1.health.unreachable = [(node("gw1"), [id("us")].into())].into();
    assert_eq!(chosen(&w1, 80), ["as", "us"], "gw2 has not said so");
    w1.health.unreachable.insert(node("gw2"), [id("us")].into());
    assert_eq!(chosen(&w1, 80), ["as"]);
    // A gateway that is dead may say what it likes; one that lives and reaches it is a way.
    w1.health.unreachable.insert(node("gw1"), BTreeSet::new());
    assert_eq!(chosen(&w1, 80), ["as", "us"]);
    w1.health.dead = dead(&w1, &[5]).dead;
    assert_eq!(chosen(&w1, 80), ["as"]);
    // Only as has admin: it is the last one, reached or not.
    w1.health = Health::default();
    for gateway in ["gw1", "gw2"] {
        w1.health.unreachable.insert(node(gateway), [id("as")].into());
    }
    assert_eq!(chosen(&w1, 80), ["us"]);
    assert_eq!(chosen(&w1, 9000), ["as"]);
    for gateway in ["gw1", "gw2"] {
        w1.health.unreachable.insert(node(gateway), [id("as"), id("us")].into());
    }
    assert_eq!(chosen(&w1, 80), ["as", "us"], "all are gone, as far as is known: all are kept");
    // No own gateway answers: nothing but the own cluster is reached.
    let mut own = three("w1", true, Preferences::default());
    own.health = dead(&own, &[5, 6]);
    assert_eq!(chosen(&own, 80), ["eu"]);

    // A gateway: by its own tunnels, and by what another says.
    let mut gw1 = three("gw1", false, Preferences::default());
    let to = |world: &NodeWorld, cluster: &str| {
        let (desired, _) = plan(world);
        let devices = desired.devices.get().unwrap().clone();
        let of = |n: u8| devices[&number(n)].peers.iter().filter(|(_, p)| p.node.cluster == id(cluster));
        [1, 2]
            .iter()
            .flat_map(|n| of(*n).map(|(key, _)| (number(*n), *key)).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let us = to(&gw1, "us");
    assert_eq!(us.len(), 2);
    gw1.health.dead = us[..1].iter().copied().collect();
    assert_eq!(chosen(&gw1, 80), ["as", "us"]);
    gw1.health.dead = us.iter().copied().collect();
    assert_eq!(chosen(&gw1, 80), ["as"]);
    gw1.health.unreachable = [(node("gw2"), BTreeSet::new())].into();
    assert_eq!(chosen(&gw1, 80), ["as", "us"], "gw2 reaches it");
    gw1.health = Health::default();
    assert_eq!(chosen(&gw1, 80), ["as", "us"]);
}

#[test]
fn unknown_is_not_dead() {
    let mut lone = three("w1", true, Preferences::default());
    // A cluster that states no node, and one without gateways of our own.
    let Known::Yes(members) = &mut lone.members else { panic!() };
    members.get_mut(&id("us")).unwrap().nodes.clear();
    assert_eq!(chosen(&lone, 80), ["as", "eu", "us"]);
    let Known::Yes(members) = &mut lone.members else { panic!() };
    members.get_mut(&id("eu")).unwrap().nodes.retain(|name, _| *name == node("w1"));
    let (desired, _) = plan(&lone);
    assert_eq!(unreached(&lone, desired.devices.get().unwrap()), BTreeSet::new());
}

#[test]
fn priority_fails_over_and_back() {
    let mut w1 = three("w1", false, preferences(false, &[("us", share(50, 100))]));
    assert_eq!(chosen(&w1, 80), ["as"]);
    let gone = |c: &str| ["gw1", "gw2"].map(|gw| (node(gw), BTreeSet::from([id(c)]))).into();
    w1.health.unreachable = gone("as");
    assert_eq!(chosen(&w1, 80), ["us"]);
    w1.health.unreachable = gone("us");
    assert_eq!(chosen(&w1, 80), ["as"]);
    // Its last backend is not ready any more.
    w1.health = Health::default();
    let Known::Yes(slices) = &mut w1.slices else { panic!() };
    for (_, slice) in slices.iter_mut().filter(|(key, _)| key.source == id("as")) {
        slice.backends[0].ready = false;
    }
    assert_eq!(chosen(&w1, 80), ["us"]);
}

#[test]
fn local_first_while_there_is_something_local() {
    let local = preferences(true, &[]);
    let mut w1 = three("w1", true, local.clone());
    assert_eq!(chosen(&w1, 80), ["eu"]);
    assert_eq!(chosen(&w1, 9000), ["as"], "eu does not expose this port");
    let Known::Yes(slices) = &mut w1.slices else { panic!() };
    for (_, slice) in slices.iter_mut().filter(|(key, _)| key.source == id("eu")) {
        slice.backends[0].ready = false;
    }
    assert_eq!(chosen(&w1, 80), ["as", "us"]);
    assert_eq!(chosen(&three("w1", false, local), 80), ["as", "us"]);
}

#[test]
fn a_name_of_one_endpoint_leaves_no_choice() {
    let (desired, _) = plan(&three("w1", true, preferences(true, &[])));
    let zone = desired.zone.get().unwrap();
    let found = |labels: &[&str], kind| match zone.answer(labels, kind, 0, 99) {
        Answer::Found(found) => found.records.len(),
        Answer::NoName | Answer::NoData => 0,
    };
    assert_eq!(found(&["db", "a", "svc"], Kind::A), 1);
    assert_eq!(found(&["_http", "_tcp", "db", "a", "svc"], Kind::Srv), 2, "one a host: v4 and v6 have each");
    assert_eq!(found(&["10-2-3-10", "us", "db", "a", "svc"], Kind::A), 1);
    assert_eq!(found(&["10-3-3-10", "as", "db", "a", "svc"], Kind::A), 1);
}

fn counts(world: &NodeWorld) -> BTreeMap<String, u16> {
    let (desired, _) = plan(world);
    let vips = &firewall(&desired).vips;
    let balance = vips.iter().find(|(v, _)| v.port == 80 && v.address == ip("198.19.0.9")).unwrap().1;
    balance.backends.iter().map(|((address, _), count)| (address.to_string(), count.get())).collect()
}

#[test]
fn weights_repeat_entries() {
    let entries = |shares: &[(&str, Share)]| {
        counts(&three("w1", true, preferences(false, shares))).into_values().collect::<Vec<_>>()
    };
    // eu, us, as.
    assert_eq!(entries(&[]), [1, 1, 1]);
    assert_eq!(entries(&[("us", share(0, 25))]), [4, 1, 4]);
    assert_eq!(entries(&[("us", share(0, 50)), ("eu", share(0, 50)), ("as", share(0, 50))]), [1, 1, 1]);
    // 100 : 1 : 100 does not fit into 64; nobody is left without.
    let few = entries(&[("us", share(0, 1))]);
    assert_eq!((few.iter().sum::<u16>(), few[1]), (64, 1));
    assert!(few[0].abs_diff(few[2]) <= 1, "{few:?}");
    // Only what is used counts.
    assert_eq!(entries(&[("us", share(0, 1)), ("as", share(1, 1)), ("eu", share(1, 1))]), [1]);
}

proptest! {
    #[test]
    fn weights_are_kept_as_far_as_64_entries_can(
        sizes in prop::collection::vec((1_usize..80, 1_u8..=100), 1..4),
    ) {
        let mut world = three("w1", true, Preferences::default());
        let Known::Yes(slices) = &mut world.slices else { panic!() };
        let Known::Yes(imports) = &mut world.imports else { panic!() };
        let import = imports.get_mut(&service("a/web")).unwrap();
        *slices = Default::default();
        let names = ["eu", "us", "as"];
        for (n, (count, weight)) in sizes.iter().enumerate() {
            let list = (0..*count).map(|i| backend(&format!("10.{}.3.{}", n + 1, i + 1))).collect();
            let slice = Slice { ports: vec![port("http", 8080)], backends: list, ..Slice::default() };
            slices.insert(slice_key("a/web", names[n], Family::V4, 0), slice);
            import.preferences.shares.insert(id(names[n]), share(0, *weight));
        }
        let counts = counts(&world);
        let total: u16 = counts.values().sum();
        prop_assert!((1..=64).contains(&total));
        let parts: Vec<f64> = sizes.iter().map(|(count, weight)| *count as f64 * f64::from(*weight)).collect();
        let sum: f64 = parts.iter().sum();
        for (n, part) in parts.iter().enumerate() {
            let of = |(address, _): &(&String, &u16)| address.starts_with(&format!("10.{}.", n + 1));
            let got: u16 = counts.iter().filter(of).map(|(_, count)| *count).sum();
            prop_assert!(got >= 1, "{counts:?}");
            let same = sizes.iter().all(|(_, weight)| *weight == sizes[0].1);
            let wanted = part / sum * f64::from(total);
            prop_assert!(same || (f64::from(got) - wanted).abs() <= 2.0, "{got} of {total}, {wanted} wanted");
            // Evenly within a cluster.
            let each: Vec<u16> = counts.iter().filter(of).map(|(_, count)| *count).collect();
            prop_assert!(each.iter().max().unwrap() - each.iter().min().unwrap() <= 1);
        }
    }

    #[test]
    fn somebody_is_used_whenever_somebody_is_ready(
        ready in prop::collection::btree_set(prop::sample::select(vec!["eu", "us", "as", "sa"]), 0..5),
        gone in prop::collection::btree_set(prop::sample::select(vec!["us", "as", "sa"]), 0..4),
        local: bool,
        priorities in prop::collection::vec(0_u8..3, 4),
    ) {
        let shares: Vec<(&str, Share)> =
            ["eu", "us", "as", "sa"].into_iter().zip(priorities).map(|(c, p)| (c, share(p, 100))).collect();
        let preferences = preferences(local, &shares);
        let (ready, gone): (Vec<&str>, Vec<&str>) = (ready.into_iter().collect(), gone.into_iter().collect());
        let used = used(&preferences, &gone, &ready);
        prop_assert_eq!(used.is_empty(), ready.is_empty());
        let alive: Vec<&&str> = ready.iter().filter(|c| !gone.contains(*c)).collect();
        for cluster in &used {
            prop_assert!(alive.is_empty() || alive.iter().any(|c| *c == cluster));
        }
        if local && ready.contains(&"eu") {
            prop_assert_eq!(used, ["eu"]);
        }
    }
}
