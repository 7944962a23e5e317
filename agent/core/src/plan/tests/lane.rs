//! Several tunnels side by side to one node.

use std::collections::BTreeSet;

use tombolo_proto::model::Lanes;
use tombolo_proto::testing::net;

use super::node::{devices, number, plan, world};
use super::{id, node};
use crate::desired::{NodeDesired, Selector, TABLE_IN, TABLE_OUT, Via};
use crate::known::Known;
use crate::liveness::PeerId;
use crate::world::{Health, NodeWorld};

/// The same node, where `eu` has three lanes, `us/gw1` two, and the rest of `us` one.
fn laned(name: &str) -> NodeWorld {
    let mut world = world(name);
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    let eu = members.get_mut(&id("eu")).unwrap();
    for (host, name) in (1..).zip(["gw1", "gw2", "w1"]) {
        eu.nodes.get_mut(&node(name)).unwrap().devices = super::devices(1, host, Lanes::new(3).unwrap());
    }
    let us = members.get_mut(&id("us")).unwrap();
    us.nodes.get_mut(&node("gw1")).unwrap().devices = super::devices(2, 1, Lanes::new(2).unwrap());
    world
}

/// All peers of these devices answer.
fn answers(world: &NodeWorld, numbers: impl Iterator<Item = u8>) -> Health {
    let desired = plan(world).0;
    let numbers: BTreeSet<_> = numbers.map(number).collect();
    let all = devices(&desired).iter().filter(|(n, _)| numbers.contains(n));
    let alive = all.flat_map(|(n, device)| device.peers.keys().map(|key| (*n, *key))).collect();
    Health { alive, ..Health::default() }
}

fn slots(desired: &NodeDesired, table: u32, prefix: &str) -> Vec<u8> {
    let routes = desired.routes.get().unwrap().iter();
    let devices = routes.filter(|r| r.table == table && r.prefix == net(prefix)).find_map(|r| match &r.via {
        Via::Devices(devices) => Some(devices.iter().map(|n| n.get()).collect()),
        Via::Bound(_) | Via::Unreachable => None,
    });
    devices.unwrap_or_default()
}

#[test]
fn a_lane_is_used_by_both_that_have_it_once_it_answers() {
    let mut gw1 = laned("gw1");
    let silent = plan(&gw1).0;
    let numbers: Vec<_> = devices(&silent).keys().map(|n| n.get()).collect();
    assert_eq!(numbers, [1, 2, 4, 6, 9, 12, 14, 20, 22]);
    for table in [TABLE_OUT, TABLE_OUT + 1, TABLE_OUT + 2] {
        assert_eq!(slots(&silent, table, "10.2.0.0/16"), [1, 2], "{table}");
    }
    gw1.health = answers(&gw1, 0..64);
    let (desired, findings) = plan(&gw1);
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(slots(&desired, TABLE_OUT, "10.2.0.0/16"), [1, 2]);
    assert_eq!(slots(&desired, TABLE_OUT + 1, "10.2.0.0/16"), [2, 9]);
    assert_eq!(slots(&desired, TABLE_OUT + 2, "10.2.0.0/16"), [1, 2], "the other end has two lanes");
    assert_eq!(slots(&desired, TABLE_IN + 1, "10.1.3.0/24"), [12]);
    assert_eq!(slots(&desired, TABLE_IN + 2, "198.18.1.3/32"), [20]);
    assert_eq!(slots(&desired, TABLE_OUT + 2, "198.18.1.3/32"), [20]);
    assert_eq!(desired.firewall.get().unwrap().lanes.get(), 3);
    let rules = desired.rules.get().unwrap();
    let table = |wanted: Selector| rules.iter().find(|r| r.selector == wanted).map(|r| r.table);
    assert_eq!(table(Selector::Device(number(12))), Some(TABLE_IN + 1));
    assert_eq!(table(Selector::Lane(number(20).lane())), Some(TABLE_OUT + 2));
}

/// What can be reached lane 0 tells, and every lane follows.
#[test]
fn a_lane_that_died_is_left_and_a_slot_that_died_in_all() {
    let mut w1 = laned("w1");
    w1.health = answers(&w1, 0..64);
    assert_eq!(slots(&plan(&w1).0, TABLE_OUT + 2, "10.2.0.0/16"), [21, 22]);
    let well = w1.health.clone();
    let died = |numbers: &[u8]| {
        let (dead, alive) =
            well.alive.iter().partition::<BTreeSet<PeerId>, _>(|(n, _)| numbers.contains(&n.get()));
        let (desired, findings) =
            plan(&NodeWorld { health: Health { alive, dead, ..Health::default() }, ..w1.clone() });
        assert!(findings.is_empty(), "{findings:?}");
        [0, 1, 2].map(|lane| slots(&desired, TABLE_OUT + lane, "10.2.0.0/16"))
    };
    assert_eq!(died(&[13]), [vec![5, 6], vec![5, 14], vec![21, 22]]);
    assert_eq!(died(&[5]), [vec![6], vec![14], vec![22]]);
}

#[test]
fn one_lane_is_one_table() {
    let desired = plan(&world("gw1")).0;
    assert_eq!(desired.firewall.get().unwrap().lanes, Lanes::ONE);
    let tables: BTreeSet<u32> = desired.routes.get().unwrap().iter().map(|route| route.table).collect();
    assert_eq!(tables, [TABLE_OUT, TABLE_IN].into());
    assert!(!desired.rules.get().unwrap().iter().any(|rule| matches!(rule.selector, Selector::Lane(_))));
}

/// Who has IPv6 alone is asked by a route of its own, or a lane that was never used never would be.
#[test]
fn a_lane_is_asked_over_ipv6_before_it_is_used() {
    let mut gw1 = laned("gw1");
    let Known::Yes(members) = &mut gw1.members else { unreachable!() };
    members.get_mut(&id("us")).unwrap().nodes.get_mut(&node("gw1")).unwrap().tunnel_v4 = None;
    let desired = plan(&gw1).0;
    let bound: Vec<_> =
        desired.routes.get().unwrap().iter().filter(|r| matches!(r.via, Via::Bound(_))).cloned().collect();
    let [route] = &bound[..] else { panic!("{bound:?}") };
    assert_eq!(
        (route.table, route.prefix, &route.via),
        (TABLE_OUT + 1, net("fd00:18:2::1/128"), &Via::Bound(number(9)))
    );
}

#[test]
fn a_lane_that_never_answered_is_told() {
    let mut gw1 = laned("gw1");
    gw1.health = answers(&gw1, (0..64).filter(|n| *n != 9));
    assert_eq!(plan(&gw1).1, [""; 0], "it may still come");
    let all = answers(&gw1, 0..64).alive;
    gw1.health.known = Some(all.clone());
    assert_eq!(plan(&gw1).1, ["LaneSilent"]);
    gw1.health.young = all;
    assert_eq!(plan(&gw1).1, [""; 0], "it came lately");
}
