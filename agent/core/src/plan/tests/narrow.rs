//! Paths that carry less than the devices.

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::testing::net;

use super::node::{dead, firewall, plan, world};
use crate::desired::{NodeDesired, TABLE_IN, TABLE_OUT, Via};
use crate::world::{Health, NodeWorld};

/// The same node, where the paths of these devices carry so much.
fn narrow(name: &str, paths: &[(u8, u16)]) -> NodeWorld {
    let of = |(number, bytes): &(u8, u16)| {
        let (world, bytes) = (world(name), *bytes);
        dead(&world, &[*number]).dead.into_iter().map(move |id| (id, bytes)).collect::<Vec<_>>()
    };
    let health = Health { narrow: paths.iter().flat_map(of).collect(), ..Health::default() };
    NodeWorld { health, ..world(name) }
}

/// Routes with an MTU, by table and prefix.
fn mtus(desired: &NodeDesired) -> BTreeMap<(u32, String), u16> {
    let routes = desired.routes.get().unwrap().iter();
    routes.filter_map(|route| Some(((route.table, route.prefix.to_string()), route.mtu?))).collect()
}

#[test]
fn a_route_carries_what_every_path_of_it_does() {
    let (desired, findings) = plan(&narrow("gw1", &[(1, 1400)]));
    assert!(findings.is_empty(), "{findings:?}");
    let out: BTreeMap<(u32, String), u16> = [
        "10.2.0.0/16",
        "198.18.2.0/24",
        "198.18.2.1/32",
        "fd00:10:2::/48",
        "fd00:18:2::/64",
        "fd00:18:2::1/128",
    ]
    .map(|prefix| ((TABLE_OUT, prefix.to_owned()), 1400))
    .into();
    assert_eq!(mtus(&desired), out);
    assert!(firewall(&desired).narrow.is_empty());
    // The narrower of two counts, if both carry.
    let two = narrow("gw1", &[(1, 1400), (2, 1320)]);
    let of = |world: &NodeWorld| mtus(&plan(world).0)[&(TABLE_OUT, "10.2.0.0/16".to_owned())];
    assert_eq!(of(&two), 1320);
    let left = Health { dead: dead(&world("gw1"), &[2]).dead, ..two.health.clone() };
    assert_eq!(of(&NodeWorld { health: left, ..two }), 1400);
}

#[test]
fn inward_too() {
    let (desired, _) = plan(&narrow("gw1", &[(4, 1300)]));
    let inward: BTreeSet<(u32, String)> = mtus(&desired).into_keys().collect();
    let of = |table, prefix: &str| (table, prefix.to_owned());
    assert!(
        inward.contains(&of(TABLE_IN, "10.1.3.0/24")) && inward.contains(&of(TABLE_OUT, "198.18.1.3/32")),
        "{inward:?}"
    );
    assert!(!inward.iter().any(|(_, prefix)| prefix.starts_with("10.2.") || prefix.starts_with("10.1.2.")));
}

#[test]
fn ipv6_is_never_narrower_than_it_may_be() {
    let (desired, findings) = plan(&narrow("gw1", &[(1, 1240)]));
    assert_eq!(findings, ["PathTooNarrow"]);
    let of = |prefix: &str| mtus(&desired)[&(TABLE_OUT, prefix.to_owned())];
    assert_eq!((of("10.2.0.0/16"), of("fd00:10:2::/48")), (1240, 1280));
    assert_eq!(
        firewall(&desired).narrow,
        [net("fd00:10:2::/48"), net("fd00:18:2::/64")].into(),
        "one within another is left out"
    );
    let nowhere = desired.routes.get().unwrap().iter().filter(|route| route.via == Via::Unreachable);
    assert!(nowhere.map(|route| route.mtu).all(|mtu| mtu.is_none()));
}
