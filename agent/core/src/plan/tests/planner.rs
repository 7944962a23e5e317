//! A plan that goes on from the one before is the plan.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tombolo_proto::model::{Family, ServiceType};

use super::node::{any_slices, any_world, firewall, import, slice_key, world};
use super::{backend, ip, node, port, service};
use crate::known::Known;
use crate::object::{Import, ServiceKey, Slice, SliceKey};
use crate::plan::Planner;
use crate::world::{NodeWorld, Reach};

#[derive(Debug, Clone)]
enum Step {
    Import(ServiceKey, Option<Box<Import>>),
    /// These are there; those of the same services that are not go.
    Slices(BTreeMap<SliceKey, Slice>),
    Reach(Reach),
    /// The own node or another has this address.
    Host(bool),
    Ranges(bool),
    Unknown,
    World(Box<NodeWorld>),
}

fn any_step() -> impl Strategy<Value = Step> {
    let name = prop::sample::select(vec!["a/web", "b/db", "c/app", "c/zoo"]);
    let ips = prop::sample::subsequence(
        vec!["198.19.0.9", "198.19.0.10", "fd19:746f:6d62::9", "10.9.9.9", "198.19.0.9"],
        0..4,
    );
    let one = (ips, any::<bool>(), 80_u16..82).prop_map(|(ips, headless, number)| {
        let mut import = import(&[port("", number), port("more", 90)], &ips);
        if headless {
            import.kind = ServiceType::Headless;
        }
        import
    });
    prop_oneof![
        6 => (name, prop::option::weighted(0.7, one)).prop_map(|(n, i)| Step::Import(service(n), i.map(Box::new))),
        4 => any_slices().prop_map(Step::Slices),
        1 => any::<bool>().prop_map(|all| Step::Reach(if all { Reach::All } else { Reach::Exports })),
        1 => any::<bool>().prop_map(Step::Host),
        1 => any::<bool>().prop_map(Step::Ranges),
        1 => Just(Step::Unknown),
        1 => any_world().prop_map(|world| Step::World(Box::new(world))),
    ]
}

fn take(world: &mut NodeWorld, step: Step) {
    let (Known::Yes(imports), Known::Yes(slices)) = (&mut world.imports, &mut world.slices) else { return };
    match step {
        Step::Import(key, Some(import)) => imports.insert(key, *import),
        Step::Import(key, None) => {
            imports.remove(&key);
        }
        Step::Slices(new) => {
            let gone =
                |key: &&SliceKey| new.keys().any(|k| k.service == key.service) && !new.contains_key(key);
            let gone: Vec<SliceKey> = slices.keys().filter(gone).cloned().collect();
            gone.iter().for_each(|key| {
                slices.remove(key);
            });
            slices.extend(new);
        }
        Step::Reach(reach) => world.reach = reach,
        Step::Host(own) => {
            let name = if own { world.node.clone() } else { node("other") };
            world.hosts = Known::Yes([(ip("192.0.2.1"), name)].into());
        }
        Step::Ranges(some) => world.clusterset = super::node::world("n1").clusterset.filter(|_| some),
        Step::Unknown => {}
        Step::World(other) => *world = *other,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn going_on_is_planning_anew(
        first in any_world(),
        steps in prop::collection::vec(any_step(), 1..24),
    ) {
        let mut planner = Planner::default();
        let mut world = first;
        prop_assert_eq!(planner.plan(&world), crate::plan::node(&world));
        for step in steps {
            if matches!(step, Step::Unknown) {
                let unknown = NodeWorld { slices: Known::No, ..world.clone() };
                prop_assert_eq!(planner.plan(&unknown), crate::plan::node(&unknown));
            }
            take(&mut world, step);
            prop_assert_eq!(planner.plan(&world), crate::plan::node(&world));
        }
    }
}

/// Of two that bear one address the lower name has it, and the other one when that goes: in one step or in two.
#[test]
fn an_address_goes_over_to_the_next_that_bears_it() {
    let both = |names: &[&str]| -> NodeWorld {
        let of = |n: &&str| (service(n), import(&[port("", 80)], &["198.19.0.9"]));
        let slice = |n: &&str| {
            let last = if *n == "a/web" { 1 } else { 2 };
            let address = format!("10.2.1.{last}");
            (
                slice_key(n, "us", Family::V4, 0),
                Slice { ports: vec![port("", 8080)], backends: vec![backend(&address)], ..Slice::default() },
            )
        };
        NodeWorld {
            imports: Known::Yes(names.iter().map(of).collect()),
            slices: Known::Yes(names.iter().map(slice).collect()),
            ..world("w1")
        }
    };
    let mut planner = Planner::default();
    let mut target = |names: &[&str]| {
        let (desired, findings) = planner.plan(&both(names));
        let vips = &firewall(&desired).vips;
        let first = vips.values().next().and_then(|balance| balance.backends.keys().next().map(|b| b.0));
        (vips.len(), first, findings.iter().filter(|f| f.reason == "ClusterSetIPTwice").count())
    };
    assert_eq!(target(&["b/web"]), (1, Some(ip("10.2.1.2")), 0));
    assert_eq!(target(&["a/web", "b/web"]), (1, Some(ip("10.2.1.1")), 1));
    assert_eq!(target(&["b/web"]), (1, Some(ip("10.2.1.2")), 0));
    assert_eq!(target(&["a/web"]), (1, Some(ip("10.2.1.1")), 0));
    assert_eq!(target(&[]), (0, None, 0));
}
