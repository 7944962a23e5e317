//! The rules of MCS-API that plans decide, by their number in docs/names.md: each test says which it holds.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use proptest::prelude::*;
use tombolo_proto::model::{Backends, ClusterId, Export, Family, ServiceType};

use super::cluster::{
    MEMBER_SINCE, applied, condition, foreign, group, known, local, no, plan, us_export, user_export,
    with_us, world, yes,
};
use super::merge::any_export;
use super::{id, port, service};
use crate::desired::ClusterDesired;
use crate::known::Known;
use crate::object::{Import, LocalKind, Service, ServiceExport, Slice, SliceKey};
use crate::shelf::Shelf;
use crate::world::ClusterWorld;
use crate::zone::Zone;

fn imports(desired: &ClusterDesired) -> &BTreeMap<crate::object::ServiceKey, Import> {
    &desired.imports.get().unwrap().set
}

fn slices<'a>(desired: &'a ClusterDesired, name: &str) -> Vec<(&'a SliceKey, &'a Slice)> {
    let name = service(name);
    desired.slices.get().unwrap().set.iter().filter(|(key, _)| key.service == name).collect()
}

fn clusters(names: &[&str]) -> BTreeSet<ClusterId> {
    names.iter().map(|n| id(n)).collect()
}

/// A third cluster, number 3, with an export and a backend.
fn with_ap(mut world: ClusterWorld, name: &str, export: Export, address: &str) -> ClusterWorld {
    let ap = world.foreign.entry(id("ap")).or_insert_with(|| foreign("ap", 3));
    let targets: Vec<(u16, u16)> = export.ports.iter().map(|p| (p.port, p.port + 8000)).collect();
    ap.backends.insert(service(name), [(1, Backends { groups: vec![group(&targets, &[address])] })].into());
    ap.exports.insert(service(name), export);
    world
}

fn message(desired: &ClusterDesired, name: &str, kind: &str) -> String {
    desired.statuses.get().unwrap()[&service(name)].conditions[kind].message.clone()
}

#[test]
fn mcs_1_2_only_the_service_of_that_name_and_only_if_exported_here() {
    // a/quiet exists here too, and another cluster exports that name.
    let (desired, _) = plan(&with_us(world(), "a/quiet", us_export(&[80]), &["10.2.1.1"]));
    let imports = imports(&desired);
    assert_eq!(imports.keys().collect::<Vec<_>>(), [&service("a/quiet"), &service("a/web")]);
    assert_eq!(imports[&service("a/quiet")].clusters, clusters(&["us"]));
    assert!(slices(&desired, "a/quiet").iter().all(|(key, _)| key.source == id("us")));
    assert_eq!(imports[&service("a/web")].clusters, clusters(&["eu"]));
}

#[test]
fn mcs_3_an_import_exists_where_its_namespace_does() {
    let (desired, _) = plan(&with_us(world(), "elsewhere/web", us_export(&[80]), &["10.2.1.1"]));
    assert!(!imports(&desired).contains_key(&service("elsewhere/web")));
    assert!(slices(&desired, "elsewhere/web").is_empty());
    assert!(imports(&desired).contains_key(&service("a/web")), "in an exporter too");
}

#[test]
fn mcs_4_16_an_import_lives_as_long_as_somebody_exports() {
    let both = with_us(world(), "a/web", us_export(&[80]), &["10.2.1.1"]);
    let (desired, _) = plan(&both);
    assert_eq!(imports(&desired)[&service("a/web")].clusters, clusters(&["eu", "us"]));
    assert_eq!(slices(&desired, "a/web").len(), 2);

    let mut one = applied(&both, &desired);
    *known(&mut one.exports) = Shelf::new();
    let (desired, _) = plan(&one);
    assert_eq!(imports(&desired)[&service("a/web")].clusters, clusters(&["us"]));
    assert!(slices(&desired, "a/web").iter().all(|(key, _)| key.source == id("us")));

    let mut none = applied(&one, &desired);
    none.foreign.get_mut(&id("us")).unwrap().exports.clear();
    let (desired, _) = plan(&none);
    assert!(imports(&desired).is_empty() && slices(&desired, "a/web").is_empty());
    assert!(desired.imports.get().unwrap().keep.is_empty());
}

#[test]
fn mcs_5_6_23_conditions_tell_how_an_export_stands() {
    let mut world = world();
    known(&mut world.exports).insert(service("a/late"), user_export(MEMBER_SINCE));
    known(&mut world.exports).insert(service("a/ext"), user_export(MEMBER_SINCE));
    let external = Service { kind: LocalKind::ExternalName, ..local(&[80]) };
    known(&mut world.services).insert(service("a/ext"), external);
    let (desired, _) = plan(&world);
    assert_eq!(condition(&desired, "a/late", "Valid"), no("NoService"));
    assert_eq!(condition(&desired, "a/late", "Ready"), no("Pending"));
    assert_eq!(condition(&desired, "a/ext", "Valid"), no("InvalidServiceType"));
    assert!(!imports(&desired).contains_key(&service("a/ext")));
    known(&mut world.services).insert(service("a/late"), local(&[80]));
    let (desired, _) = plan(&world);
    assert_eq!(condition(&desired, "a/late", "Valid"), yes("Valid"));
    assert_eq!(condition(&desired, "a/late", "Ready"), yes("Exported"));
}

#[test]
fn mcs_7_12_13_types_and_families() {
    let mut world = world();
    let headless =
        Service { kind: LocalKind::Headless, families: vec![Family::V6, Family::V4], ..local(&[80]) };
    known(&mut world.services).insert(service("a/db"), headless);
    let both = Service { families: vec![Family::V6, Family::V4], ..local(&[80]) };
    known(&mut world.services).insert(service("a/both"), both);
    for name in ["a/db", "a/both"] {
        known(&mut world.exports).insert(service(name), user_export(MEMBER_SINCE));
    }
    let (desired, _) = plan(&world);
    let db = &imports(&desired)[&service("a/db")];
    assert_eq!((db.kind, db.ips.len()), (ServiceType::Headless, 0));
    assert_eq!(db.families, [Family::V6, Family::V4], "never empty, headless too");
    let both = &imports(&desired)[&service("a/both")];
    assert_eq!(both.kind, ServiceType::ClusterSetIP);
    assert_eq!(both.families, [Family::V6, Family::V4]);
    let order: Vec<Family> = both.ips.iter().map(|ip| Family::of(*ip)).collect();
    assert_eq!(order, both.families, "addresses in the order of families");
}

#[test]
fn mcs_8_what_others_change_in_an_import_is_repaired() {
    let good = world();
    let (desired, _) = plan(&good);
    let mut changed = applied(&good, &desired);
    let import = known(&mut changed.imports).get_mut(&service("a/web")).unwrap();
    import.ports = vec![port("evil", 1)];
    import.clusters = clusters(&["eu", "nobody"]);
    import.labels.insert("x".into(), "y".into());
    assert_eq!(imports(&plan(&changed).0), imports(&desired));
}

#[test]
fn mcs_9_only_exported_labels_and_annotations_travel() {
    let mut world = world();
    let export = ServiceExport {
        labels: [("team".to_owned(), "shop".to_owned())].into(),
        annotations: [("example.org/note".to_owned(), "text".to_owned())].into(),
        ..user_export(MEMBER_SINCE)
    };
    known(&mut world.exports).insert(service("a/web"), export.clone());
    let import = imports(&plan(&world).0)[&service("a/web")].clone();
    assert_eq!((import.labels, import.annotations), (export.labels, export.annotations));
}

#[test]
fn mcs_10_a_deleted_service_or_namespace_withdraws() {
    for namespace in [false, true] {
        let before = world();
        let (desired, _) = plan(&before);
        let mut after = applied(&before, &desired);
        if namespace {
            known(&mut after.namespaces).remove(&"a".parse().unwrap());
        } else {
            known(&mut after.services).remove(&service("a/web"));
        }
        let (desired, _) = plan(&after);
        let scopes: Vec<String> = desired.records.get().unwrap().keys().map(ToString::to_string).collect();
        assert_eq!(scopes, ["nodes"]);
        assert!(imports(&desired).is_empty() && slices(&desired, "a/web").is_empty());
    }
}

#[test]
fn mcs_11_20_ports_of_a_service_of_several_have_names_and_lead_only_where_they_are() {
    // Alone a port needs no name; beside another it does, and takes what somebody calls it.
    let lone = |number: u16| Export { ports: vec![port("", number)], ..us_export(&[]) };
    let world = with_us(world(), "b/app", lone(80), &["10.2.1.1"]);
    let mut world = with_ap(world, "b/app", Export { created: MEMBER_SINCE + 3000, ..lone(443) }, "10.3.1.1");
    let us = world.foreign.get_mut(&id("us")).unwrap().backends.get_mut(&service("b/app")).unwrap();
    us.get_mut(&1).unwrap().groups[0].ports = vec![port("", 8080)];
    let ap = world.foreign.get_mut(&id("ap")).unwrap();
    ap.backends.get_mut(&service("b/app")).unwrap().get_mut(&1).unwrap().groups[0].ports =
        vec![port("", 8443)];
    let (desired, _) = plan(&world);
    assert_eq!(imports(&desired)[&service("b/app")].ports, [port("tcp-80", 80), port("tcp-443", 443)]);
    let ports = |cluster: &str| {
        let of = slices(&desired, "b/app").into_iter().filter(|(key, _)| key.source == id(cluster));
        of.flat_map(|(_, slice)| slice.ports.clone()).collect::<Vec<_>>()
    };
    assert_eq!(ports("us"), [port("tcp-80", 8080)]);
    assert_eq!(ports("ap"), [port("tcp-443", 8443)]);
}

#[test]
fn mcs_14_18_the_oldest_decides_each_property() {
    let ours = Service {
        affinity: NonZeroU32::new(300),
        internal_local: true,
        traffic_distribution: Some("PreferClose".into()),
        ..local(&[80])
    };
    for (theirs, oldest) in [(2000, "eu"), (500, "us")] {
        let mut world = with_us(
            world(),
            "a/web",
            Export { created: MEMBER_SINCE + theirs, ..us_export(&[80]) },
            &["10.2.1.1"],
        );
        known(&mut world.services).insert(service("a/web"), ours.clone());
        let (desired, _) = plan(&world);
        let import = &imports(&desired)[&service("a/web")];
        let expected = if oldest == "eu" { ours.affinity } else { None };
        assert_eq!(import.affinity, expected);
        assert_eq!(import.internal_local, oldest == "eu");
        assert_eq!(import.traffic_distribution.is_some(), oldest == "eu");
        assert!(message(&desired, "a/web", "Conflict").contains(&format!("the values of {oldest}")));
    }
}

#[test]
fn mcs_15_an_import_keeps_its_address_for_life() {
    let mut world = world();
    let address = |world: &ClusterWorld| imports(&plan(world).0)[&service("a/web")].ips.clone();
    let first = address(&world);
    assert_eq!(first.len(), 1);
    let settle = |world: ClusterWorld| {
        let (desired, _) = plan(&world);
        applied(&world, &desired)
    };
    world = settle(world);
    // Somebody older joins, with other ports; then the first one leaves; then it comes back.
    world = settle(with_us(
        world,
        "a/web",
        Export { created: MEMBER_SINCE, ..us_export(&[80, 81]) },
        &["10.2.1.1"],
    ));
    assert_eq!(address(&world), first);
    *known(&mut world.exports) = Shelf::new();
    world = settle(world);
    assert_eq!(address(&world), first);
    known(&mut world.exports).insert(service("a/web"), user_export(MEMBER_SINCE + 9000));
    assert_eq!(address(&settle(world)), first);
}

/// Every kind of conflict, one export that differs in it.
fn kinds() -> Vec<(&'static str, Export)> {
    let base = || us_export(&[80]);
    let map = || BTreeMap::from([("x".to_owned(), "y".to_owned())]);
    vec![
        ("PortConflict", Export { ports: vec![port("p80", 81)], ..base() }),
        ("TypeConflict", Export { kind: ServiceType::Headless, ..base() }),
        ("SessionAffinityConflict", Export { affinity: None, ..base() }),
        ("SessionAffinityConfigConflict", Export { affinity: NonZeroU32::new(20), ..base() }),
        ("LabelsConflict", Export { labels: map(), ..base() }),
        ("AnnotationsConflict", Export { annotations: map(), ..base() }),
        ("InternalTrafficPolicyConflict", Export { internal_local: true, ..base() }),
        (
            "TrafficDistributionConflict",
            Export { traffic_distribution: Some("PreferClose".into()), ..base() },
        ),
        ("IPFamilyConflict", Export { families: vec![Family::V4, Family::V6], ..base() }),
    ]
}

#[test]
fn mcs_19_every_export_of_a_service_tells_of_each_conflict_and_with_whom() {
    for (reason, differs) in kinds() {
        let seconds = NonZeroU32::new(10);
        let differs = if reason.starts_with("SessionAffinity") {
            differs
        } else {
            Export { affinity: seconds, ..differs }
        };
        for theirs in [500, 2000] {
            // Seen from the oldest, and from one that is not.
            let export = Export { created: MEMBER_SINCE + theirs, ..differs.clone() };
            let mut world = with_us(world(), "a/web", export, &["10.2.1.1"]);
            let ours = Service { affinity: seconds, ..local(&[80]) };
            known(&mut world.services).insert(service("a/web"), ours);
            let (desired, _) = plan(&world);
            assert_eq!(condition(&desired, "a/web", "Conflict"), yes(reason), "{theirs}");
            let other = if theirs == 500 { "eu" } else { "us" };
            let text = message(&desired, "a/web", "Conflict");
            assert!(text.contains(&format!("{reason} with {other}")), "{text}");
            assert_eq!(imports(&desired)[&service("a/web")].clusters, clusters(&["eu", "us"]));
        }
    }
}

#[test]
fn mcs_19_22_conflicts_are_joined_and_recomputed() {
    let labels = BTreeMap::from([("x".to_owned(), "y".to_owned())]);
    let odd = Export { created: MEMBER_SINCE + 500, labels, internal_local: true, ..us_export(&[80]) };
    let world = with_us(world(), "a/web", odd, &["10.2.1.1"]);
    let world =
        with_ap(world, "a/web", Export { created: MEMBER_SINCE + 3000, ..us_export(&[80]) }, "10.3.1.1");
    let (desired, _) = plan(&world);
    assert_eq!(condition(&desired, "a/web", "Conflict"), yes("LabelsConflict,InternalTrafficPolicyConflict"));
    let text = message(&desired, "a/web", "Conflict");
    assert!(text.contains("LabelsConflict with ap, eu") && text.contains("the values of us"), "{text}");
    assert!(imports(&desired)[&service("a/web")].internal_local);

    // The oldest leaves: the others agree.
    let mut left = applied(&world, &desired);
    left.foreign.remove(&id("us"));
    let (desired, _) = plan(&left);
    assert_eq!(condition(&desired, "a/web", "Conflict"), no("NoConflicts"));
    assert_eq!(imports(&desired)[&service("a/web")].clusters, clusters(&["ap", "eu"]));
}

#[test]
fn mcs_20_a_port_leads_only_to_clusters_that_expose_it() {
    // Unequal sets without a conflict, and a name that two mean differently.
    let world = with_us(world(), "a/web", us_export(&[80, 90]), &["10.2.1.1"]);
    let ap = Export {
        ports: vec![port("p80", 8888), port("p90", 90)],
        created: MEMBER_SINCE + 3000,
        ..us_export(&[])
    };
    let mut world = with_ap(world, "a/web", ap, "10.3.1.1");
    let targets = vec![port("p80", 7), port("p90", 8090)];
    let ap = world.foreign.get_mut(&id("ap")).unwrap().backends.get_mut(&service("a/web")).unwrap();
    ap.get_mut(&1).unwrap().groups[0].ports = targets;
    let (desired, _) = plan(&world);
    assert_eq!(imports(&desired)[&service("a/web")].ports, [port("p80", 80), port("p90", 90)]);
    let who = |name: &str| {
        let has =
            |slice: &Slice| slice.ports.iter().any(|p| p.name.as_ref().is_some_and(|n| n.as_str() == name));
        let of = slices(&desired, "a/web").into_iter().filter(|(_, slice)| has(slice));
        of.map(|(key, _)| key.source.clone()).collect::<BTreeSet<_>>()
    };
    assert_eq!(who("p80"), clusters(&["eu", "us"]));
    assert_eq!(who("p90"), clusters(&["ap", "us"]));
    assert_eq!(condition(&desired, "a/web", "Conflict"), yes("PortConflict"));
}

#[test]
fn mcs_21_the_oldest_type_wins_and_the_import_exists() {
    for (theirs, kind) in [(500, ServiceType::Headless), (2000, ServiceType::ClusterSetIP)] {
        let export =
            Export { kind: ServiceType::Headless, created: MEMBER_SINCE + theirs, ..us_export(&[80]) };
        let (desired, _) = plan(&with_us(world(), "a/web", export, &["10.2.1.1"]));
        let import = &imports(&desired)[&service("a/web")];
        assert_eq!((import.kind, import.ips.is_empty()), (kind, kind == ServiceType::Headless));
        assert_eq!(slices(&desired, "a/web").len(), 2, "endpoints of both");
    }
}

#[test]
fn preferences_are_merged_and_a_misread_one_is_told() {
    use tombolo_proto::model::{Prefer, Preference, Priority, Share, Weight};
    let share = Share { priority: Priority::new(7).unwrap(), weight: Weight::new(3).unwrap() };
    let mut world = world();
    let stated = |prefer| Preference { prefer, share };
    let us = Export { preference: stated(Some(Prefer::Local)), ..us_export(&[80]) };
    let ap = Export {
        preference: Preference { prefer: Some(Prefer::Any), ..Preference::default() },
        created: MEMBER_SINCE + 3000,
        ..us_export(&[80])
    };
    let export = ServiceExport { misread: Some("annotation x is bad".into()), ..user_export(MEMBER_SINCE) };
    known(&mut world.exports).insert(service("a/web"), export);
    let world = with_ap(with_us(world, "a/web", us, &["10.2.1.1"]), "a/web", ap, "10.3.1.1");
    let (desired, findings) = plan(&world);
    let import = &imports(&desired)[&service("a/web")];
    assert!(import.preferences.local, "the oldest that states it, us, wins");
    assert_eq!(import.preferences.shares, BTreeMap::from([(id("us"), share)]));
    assert_eq!(condition(&desired, "a/web", "Conflict"), no("NoConflicts"), "shares may differ");
    assert_eq!(findings, ["ExportMisread"]);
    assert_eq!(condition(&desired, "a/web", "Ready"), yes("Exported"), "nothing is lost by it");
    assert!(message(&desired, "a/web", "Ready").contains("annotation x is bad"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever order clusters are heard in, and whatever was imported in between: the same import (its address aside,
    /// which belongs to its history), slices and names.
    #[test]
    fn law_5_any_order_of_arrival_gives_the_same(
        exports in prop::collection::vec(any_export(), 1..5),
        order in Just((0..4).collect::<Vec<usize>>()).prop_shuffle(),
        leaves in prop::collection::vec(0_usize..4, 0..3),
    ) {
        let clusters = ["ap", "sa", "us", "za"];
        let tell = |mut world: ClusterWorld, n: usize| {
            let Some(export) = exports.get(n) else { return world };
            let number = u8::try_from(n).unwrap() + 2;
            let mut other = foreign(clusters[n], number);
            let targets: Vec<(u16, u16)> = export.ports.iter().map(|p| (p.port, p.port + 8000)).collect();
            let mut group = group(&targets, &[&format!("10.{number}.1.1")]);
            for (target, port) in group.ports.iter_mut().zip(&export.ports) {
                target.name = port.name.clone();
                target.protocol = port.protocol;
            }
            other.backends.insert(service("b/app"), [(1, Backends { groups: vec![group] })].into());
            other.exports.insert(service("b/app"), Export { created: export.created + MEMBER_SINCE, ..export.clone() });
            world.foreign.insert(id(clusters[n]), other);
            world
        };
        let settle = |world: ClusterWorld| {
            let (desired, _) = plan(&world);
            applied(&world, &desired)
        };
        let strip = |desired: &ClusterDesired| {
            let mut imports = imports(desired).clone();
            imports.values_mut().for_each(|import| import.ips.clear());
            let slices = desired.slices.get().unwrap().set.clone();
            let zone = Zone::build(&imports.clone().into(), &slices.clone().into());
            (imports, slices, zone)
        };
        // All at once.
        let at_once = plan(&(0..4).fold(world(), tell)).0;
        // One by one in another order, some leaving in between, each step written and read back.
        let mut world = world();
        for n in order {
            world = settle(tell(world, n));
            for leaver in &leaves {
                world.foreign.remove(&id(clusters[*leaver]));
            }
            world = settle(world);
        }
        for n in leaves {
            world = settle(tell(world, n));
        }
        let (imports, ..) = strip(&at_once);
        prop_assert_eq!(strip(&plan(&world).0), strip(&at_once));
        for import in imports.values() {
            prop_assert!(!import.families.is_empty(), "mcs 12");
            let named = import.ports.iter().filter(|p| p.name.is_some()).count();
            prop_assert!(import.ports.len() < 2 || named == import.ports.len(), "mcs 11: {:?}", import.ports);
        }
    }
}

#[test]
fn unknown_clusters_change_nothing_of_what_they_are_in() {
    let both = with_us(world(), "a/web", us_export(&[80]), &["10.2.1.1"]);
    let (desired, _) = plan(&both);
    let mut unknown = applied(&both, &desired);
    unknown.foreign.remove(&id("us"));
    unknown.unknown.insert(id("us"));
    unknown.namespaces = Known::Yes(["a", "b"].map(|n| n.parse().unwrap()).into());
    let (desired, _) = plan(&unknown);
    assert!(desired.imports.get().unwrap().keep.contains(&service("a/web")));
}

/// Under Kubernetes kube-proxy balances by these slices; in a directory the nodes do, and slices say what was stated.
#[test]
fn slices_withhold_what_is_not_eligible_under_kubernetes() {
    let mut world = with_us(world(), "b/app", us_export(&[80]), &["10.2.1.1"]);
    world = with_ap(world, "b/app", Export { created: MEMBER_SINCE + 3000, ..us_export(&[80]) }, "10.3.1.1");
    let ready = |world: &ClusterWorld| -> BTreeSet<ClusterId> {
        let (desired, _) = plan(world);
        let of =
            slices(&desired, "b/app").into_iter().filter(|(_, slice)| slice.backends.iter().all(|b| b.ready));
        of.map(|(key, _)| key.source.clone()).collect()
    };
    let unreached = |world: &mut ClusterWorld, names: &[&str], gone: &[&str]| {
        for (name, node) in known(&mut world.tunnel_nodes).iter_mut() {
            node.unreached = if names.contains(&name.as_str()) { clusters(gone) } else { BTreeSet::new() };
        }
    };
    unreached(&mut world, &["a", "b", "c"], &["us"]);
    assert_eq!(ready(&world), clusters(&["ap", "us"]), "a directory's nodes decide");
    world.clusterset = None;
    assert_eq!(ready(&world), clusters(&["ap"]));
    unreached(&mut world, &["a", "b"], &["us"]);
    assert_eq!(ready(&world), clusters(&["ap", "us"]), "one node still reaches it");
    known(&mut world.nodes).get_mut(&"c".parse().unwrap()).unwrap().ready = false;
    assert_eq!(ready(&world), clusters(&["ap"]), "that one is not ready");
    unreached(&mut world, &["a", "b", "c"], &["us", "ap"]);
    assert_eq!(ready(&world), clusters(&["ap", "us"]), "the last ones are kept");
    unreached(&mut world, &[], &[]);
    world
        .foreign
        .get_mut(&id("us"))
        .unwrap()
        .exports
        .get_mut(&service("b/app"))
        .unwrap()
        .preference
        .share
        .priority = tombolo_proto::model::Priority::new(1).unwrap();
    assert_eq!(ready(&world), clusters(&["ap"]));
}
