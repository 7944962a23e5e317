//! Services that carry ClusterSetIPs under Kubernetes (mcs 12, 15, 27).

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{Export, Family, ServiceType};

use super::cluster::{applied, known, us_export, with_us, world};
use super::{ip, service};
use crate::desired::ClusterDesired;
use crate::known::{Known, Section};
use crate::object::DerivedService;
use crate::plan::cluster as plan;
use crate::world::ClusterWorld;

/// Cluster eu under Kubernetes; us exports b/app.
fn kubernetes(export: Export) -> ClusterWorld {
    let mut world = with_us(world(), "b/app", export, &["10.2.0.5"]);
    world.clusterset = None;
    world.service_families = Family::ALL.into();
    world
}

fn derived(desired: &ClusterDesired) -> &BTreeMap<crate::object::ServiceKey, DerivedService> {
    &desired.derived.get().unwrap().set
}

/// What the API server makes of it: it gives addresses where none are asked for.
fn made(world: &ClusterWorld, desired: &ClusterDesired) -> ClusterWorld {
    let mut next = applied(world, desired);
    let Section::Set(objects) = &desired.derived else { panic!("not planned") };
    let all = objects.set.iter().map(|(key, service)| {
        let mut service = service.clone();
        for family in service.families.clone() {
            if !service.ips.iter().any(|ip| Family::of(*ip) == family) {
                let hash = key.to_string().bytes().fold(0_u8, |sum, b| sum.wrapping_mul(31).wrapping_add(b));
                service.ips.push(match family {
                    Family::V4 => [10, 96, 0, hash].into(),
                    Family::V6 => ip(&format!("fd00:96::{hash:x}")),
                });
            }
        }
        (key.clone(), service)
    });
    next.derived = Known::Yes(all.collect());
    next
}

#[test]
fn an_import_appears_with_the_address_of_its_service_and_keeps_it() {
    let app = service("b/app");
    let world = kubernetes(us_export(&[80]));
    let (desired, _) = plan(&world);
    assert!(derived(&desired)[&app].ips.is_empty(), "any address will do");
    assert!(!desired.imports.get().unwrap().set.contains_key(&app), "nothing is shown without an address");
    let slices = &desired.slices.get().unwrap().set;
    assert!(slices.values().all(|slice| slice.derived), "the Service balances over them");

    let world = made(&world, &desired);
    let (desired, _) = plan(&world);
    let import = &desired.imports.get().unwrap().set[&app];
    assert_eq!((import.ips.len(), &import.ips), (1, &known(&mut world.derived.clone())[&app].ips), "mcs 12");
    assert_eq!(derived(&desired)[&app].ips, import.ips);

    // At rest; and a Service that somebody deleted is made again with its address.
    let mut world = made(&world, &desired);
    assert_eq!(plan(&world).0, desired);
    world.derived = Known::Yes(BTreeMap::new());
    let (again, _) = plan(&world);
    assert_eq!(again.imports, desired.imports, "mcs 15: the name answers all the while");
    assert_eq!(derived(&again)[&app].ips, import.ips);
    // Where the API server gave another one, the import follows.
    let other = DerivedService { ips: vec![ip("10.96.9.9")], ..derived(&again)[&app].clone() };
    world.derived = Known::Yes([(app.clone(), other)].into());
    assert_eq!(plan(&world).0.imports.get().unwrap().set[&app].ips, [ip("10.96.9.9")]);
}

#[test]
fn headless_services_and_families_that_are_not_here_have_no_service() {
    let app = service("b/app");
    let headless = kubernetes(Export { kind: ServiceType::Headless, ..us_export(&[80]) });
    let (desired, _) = plan(&headless);
    assert!(!derived(&desired).contains_key(&app));
    assert!(desired.imports.get().unwrap().set.contains_key(&app));
    let slices = &desired.slices.get().unwrap().set;
    assert!(slices.iter().filter(|(key, _)| key.service == app).all(|(_, slice)| !slice.derived), "mcs 27");

    let mut six = kubernetes(us_export(&[80]));
    six.service_families = BTreeSet::from([Family::V6]);
    let (desired, findings) = plan(&six);
    assert!(!derived(&desired).contains_key(&app));
    assert!(desired.imports.get().unwrap().set[&app].ips.is_empty());
    assert!(findings.iter().any(|f| f.reason == "IPFamilyNotSupported"), "{findings:?}");
}

#[test]
fn a_service_keeps_its_first_family() {
    let app = service("b/app");
    let both = Export { families: vec![Family::V4, Family::V6], ..us_export(&[80]) };
    let mut world = kubernetes(both);
    let service = DerivedService {
        ips: vec![ip("fd00:96::1")],
        families: vec![Family::V6],
        ports: Vec::new(),
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
    };
    world.derived = Known::Yes([(app.clone(), service)].into());
    let (desired, _) = plan(&world);
    let planned = &derived(&desired)[&app];
    assert_eq!(planned.families, [Family::V6, Family::V4]);
    assert_eq!(planned.ips, [ip("fd00:96::1")], "the other address is to come");
    assert_eq!(desired.imports.get().unwrap().set[&app].families, planned.families, "mcs 12: in one order");
}

#[test]
fn nothing_goes_while_the_services_are_unknown() {
    let mut world = kubernetes(us_export(&[80]));
    world.derived = Known::No;
    let (desired, _) = plan(&world);
    assert_eq!(
        (desired.imports, desired.slices, desired.derived),
        (Section::Keep, Section::Keep, Section::Keep)
    );
}

/// A cluster states what it likes; an API server refuses the whole Service for it, and would be asked again for ever.
#[test]
fn what_no_service_can_ask_for_is_left_out_and_told() {
    for (wanted, told) in [("PreferClose", false), ("Anywhere<script>", true)] {
        let export = Export { traffic_distribution: Some(wanted.to_owned()), ..us_export(&[80]) };
        let (desired, findings) = plan(&kubernetes(export));
        let service = &derived(&desired)[&service("b/app")];
        assert_eq!(service.traffic_distribution.as_deref(), (!told).then_some(wanted));
        assert_eq!(findings.iter().any(|f| f.reason == "TrafficDistributionUnknown"), told);
    }
}
