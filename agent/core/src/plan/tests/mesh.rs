//! The topology `mesh`: nodes talk to nodes, and over gateways where that does not carry.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tombolo_proto::model::{DeviceFamily, DeviceNumber, Endpoint, Prefix};
use tombolo_proto::testing::net;

use super::node::{devices, number, plan, slots, world};
use super::{endpoint, id, nets, node};
use crate::desired::{NodeDesired, TABLE_OUT, Via};
use crate::known::Known;
use crate::liveness::PeerId;
use crate::world::{MemberNodes, NodeWorld};

/// docs/datapath.md with both clusters meshed; `us` has a second worker.
fn meshed(name: &str) -> NodeWorld {
    let mut world = world(name);
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    members.get_mut(&id("us")).unwrap().nodes.insert(node("w2"), endpoint(2, 4, "w2", 0));
    for endpoint in members.values_mut().flat_map(|m| m.nodes.values_mut()) {
        endpoint.mesh = true;
    }
    world
}

fn us(world: &mut NodeWorld) -> &mut MemberNodes {
    let Known::Yes(members) = &mut world.members else { unreachable!() };
    members.get_mut(&id("us")).unwrap()
}

/// The peer that a node of `us` is, on the device of that number.
fn peer(world: &NodeWorld, n: u8, name: &str) -> PeerId {
    let desired = plan(world).0;
    let peers = &devices(&desired)[&number(n)].peers;
    let (key, _) = peers.iter().find(|(_, p)| p.node.node == node(name)).unwrap();
    (number(n), *key)
}

fn peers(desired: &NodeDesired, n: u8) -> Vec<String> {
    devices(desired).get(&number(n)).map_or(Vec::new(), |device| {
        let mut names: Vec<_> = device.peers.values().map(|p| p.node.to_string()).collect();
        names.sort();
        names
    })
}

#[test]
fn a_worker_talks_to_all_and_gateways_speak_for_their_cluster() {
    let world = meshed("w1");
    let (desired, findings) = plan(&world);
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(peers(&desired, 0), ["us/w1", "us/w2"]);
    assert_eq!((peers(&desired, 1), peers(&desired, 2)), (vec!["us/gw1".into()], vec!["us/gw2".into()]));
    let allowed = |n: u8, name: &str| {
        let id = peer(&world, n, name);
        devices(&desired)[&number(n)].peers[&id.1].allowed.clone()
    };
    assert_eq!(
        allowed(0, "w2"),
        nets(&["10.2.4.0/24", "fd00:10:2:4::/64", "198.18.2.4/32", "fd00:18:2::4/128"])
    );
    assert_eq!(
        allowed(1, "gw1"),
        nets(&["10.2.0.0/16", "fd00:10:2::/48", "198.18.2.0/24", "fd00:18:2::/64"])
    );
    // tombolo0 of each to the other's tombolo0; a gateway's tombolo0 to the worker's tombolo1.
    let theirs = &endpoint(2, 3, "w1", 0).devices;
    assert_eq!(peer(&world, 0, "w1").1, theirs[&number(0)].key);
    assert_eq!(peer(&meshed("gw1"), 0, "w1").1, theirs[&number(1)].key);
}

#[test]
fn a_path_is_used_once_it_has_answered_and_left_when_it_does_not() {
    let mut w1 = meshed("w1");
    let direct = ["10.2.3.0/24", "fd00:10:2:3::/64", "198.18.2.3/32", "fd00:18:2::3/128"];
    // Unknown is not dead, nor is it proved.
    assert!(direct.iter().all(|p| slots(&plan(&w1).0, p).is_none()));
    let way = peer(&w1, 0, "w1");
    w1.health.alive.insert(way);
    let (desired, findings) = plan(&w1);
    assert!(findings.is_empty(), "{findings:?}");
    assert!(direct.iter().all(|p| slots(&desired, p) == Some(vec![0])));
    assert_eq!(slots(&desired, "10.2.4.0/24"), None, "another node's");
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![5, 6]), "the rest by own gateways");
    w1.health.alive.remove(&way);
    w1.health.dead.insert(way);
    assert!(direct.iter().all(|p| slots(&plan(&w1).0, p).is_none()));
    // On a gateway alike, besides its slots.
    let mut gw1 = meshed("gw1");
    gw1.health.alive.insert(peer(&gw1, 0, "w1"));
    let (desired, _) = plan(&gw1);
    assert_eq!(slots(&desired, "10.2.3.0/24"), Some(vec![0]));
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![1, 2]));
}

#[test]
fn without_own_gateways_the_others_gateways_carry() {
    let mut w1 = meshed("w1");
    w1.health.unreachable = [(node("gw1"), [id("us")].into()), (node("gw2"), [id("us")].into())].into();
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![5, 6]), "never answered");
    w1.health.alive.insert(peer(&w1, 2, "gw2"));
    let (desired, findings) = plan(&w1);
    assert_eq!(slots(&desired, "10.2.0.0/16"), Some(vec![2]));
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn both_ends_choose_it() {
    for (mine, theirs) in [(true, false), (false, true), (false, false)] {
        let mut world = meshed("w1");
        let Known::Yes(members) = &mut world.members else { unreachable!() };
        for (cluster, member) in members.iter_mut() {
            let mesh = if *cluster == id("eu") { mine } else { theirs };
            member.nodes.values_mut().for_each(|e| e.mesh = mesh);
        }
        let (desired, _) = plan(&world);
        assert_eq!(devices(&desired).keys().map(|n| n.get()).collect::<Vec<_>>(), [5, 6]);
    }
}

#[test]
fn a_node_with_all_that_its_cluster_has() {
    let mut w1 = meshed("w1");
    let us = us(&mut w1);
    us.nodes.retain(|name, _| *name == node("w1") || *name == node("gw1"));
    us.nodes.get_mut(&node("gw1")).unwrap().prefixes = BTreeSet::new();
    us.nodes.get_mut(&node("w1")).unwrap().prefixes = nets(&["10.2.0.0/16"]);
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![5, 6]));
    w1.health.alive.insert(peer(&w1, 0, "w1"));
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![0]));
    // Were it dead, nobody would take it for a gateway.
    w1.health.dead = std::mem::take(&mut w1.health.alive);
    assert_eq!(slots(&plan(&w1).0, "10.2.0.0/16"), Some(vec![5, 6]));
}

#[test]
fn too_large_falls_back_to_gateways_and_says_so() {
    let mut world = meshed("w1");
    for host in 0..600 {
        let name = node(&format!("x{host}"));
        us(&mut world)
            .nodes
            .insert(name.clone(), Endpoint { node: name, mesh: true, ..endpoint(2, 9, "x", 0) });
    }
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["MeshTooLarge"]);
    assert_eq!(devices(&desired).keys().map(|n| n.get()).collect::<Vec<_>>(), [5, 6]);

    let mut world = meshed("w1");
    let prefixes: BTreeSet<Prefix> = (0..9).map(|n| net(&format!("10.2.3.{}/28", n * 16))).collect();
    us(&mut world).nodes.get_mut(&node("w1")).unwrap().prefixes = prefixes;
    let (desired, findings) = plan(&world);
    assert_eq!(findings, ["MeshPrefixesTooMany"]);
    assert_eq!(peers(&desired, 0), ["us/w2"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever is dead and alive: what a node sends to a prefix directly, the node that has it takes, and so does every
    /// gateway on the way of what falls back.
    #[test]
    fn whatever_is_sent_is_allowed(seed in prop::collection::vec(any::<u8>(), 40), which in 0_usize..7) {
        let nodes = [("eu", "gw1"), ("eu", "gw2"), ("eu", "w1"), ("us", "gw1"), ("us", "gw2"), ("us", "w1"), ("us", "w2")];
        let of = |cluster: &str, name: &str| NodeWorld { cluster: id(cluster), ..meshed(name) };
        let worlds: BTreeMap<_, _> = nodes.iter().map(|(c, n)| ((id(c), node(n)), of(c, n))).collect();
        let (cluster, name) = nodes[which];
        let mut world = of(cluster, name);
        let plain = plan(&world).0;
        let all = devices(&plain).iter().flat_map(|(n, d)| d.peers.keys().map(|key| (*n, *key)));
        for (i, peer) in all.enumerate() {
            match seed[i % seed.len()] % 3 {
                0 => drop(world.health.alive.insert(peer)),
                1 => drop(world.health.dead.insert(peer)),
                _ => {}
            }
        }
        let (desired, _) = plan(&world);
        let mine = world.members.get().unwrap()[&world.cluster].nodes[&world.node].clone();
        for route in desired.routes.get().unwrap().iter().filter(|r| r.table == TABLE_OUT) {
            let Via::Devices(slots) = &route.via else { continue };
            for slot in slots.iter().filter(|n| n.family() == DeviceFamily::Out) {
                let carrier = devices(&desired)[slot].peers.values().find(|p| p.allowed.iter().any(|a| a.covers(&route.prefix)));
                let carrier = carrier.expect("nobody to send it to");
                // What is mine is allowed at the other end, on the device that I talk to.
                let there = plan(&worlds[&(carrier.node.cluster.clone(), carrier.node.node.clone())]).0;
                let device = DeviceNumber::of(DeviceFamily::Out, mine.rank, slot.lane());
                let me = devices(&there)[&device].peers.values().find(|p| p.node.node == world.node && p.node.cluster == world.cluster);
                let me = me.expect("the other end does not know me");
                for prefix in &mine.prefixes {
                    prop_assert!(me.allowed.iter().any(|a| a.covers(prefix)));
                }
                // And a gateway's of its whole cluster: it may carry for a node whose own way is cut.
                if mine.rank.is_gateway() {
                    prop_assert!(world.members.get().unwrap()[&world.cluster].owned.iter().all(|p| me.allowed.contains(p)));
                }
            }
        }
    }
}
