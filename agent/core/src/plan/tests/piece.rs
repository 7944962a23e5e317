//! The plan in pieces is the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use tombolo_proto::model::{RecordKey, Scope, record_kind};

use super::cluster::{any_world, applied, known, local, user_export, world};
use super::service;
use crate::finding::Finding;
use crate::known::{Known, Objects};
use crate::object::{DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey};
use crate::plan::piece::{self, OwnPlan, Shared};
use crate::world::ClusterWorld;

#[derive(Default)]
struct Whole {
    imports: Objects<ServiceKey, Import>,
    slices: Objects<SliceKey, Slice>,
    derived: BTreeMap<ServiceKey, DerivedService>,
    statuses: BTreeMap<ServiceKey, ExportStatus>,
    findings: BTreeSet<Finding>,
}

/// The world of one service.
fn part(world: &ClusterWorld, key: &ServiceKey) -> ClusterWorld {
    let mut part = world.clone();
    known(&mut part.imports).retain(|k, _| k == key);
    known(&mut part.slices).retain(|k| k.service == *key);
    for foreign in part.foreign.values_mut() {
        foreign.exports.retain(|k, _| k == key);
        foreign.backends.retain(|k, _| k == key);
    }
    (part.services, part.exports, part.backends) = (Known::No, Known::No, Known::No);
    (part.nodes, part.tunnel_nodes, part.stated) = (Known::No, Known::No, Known::No);
    part
}

/// Every service there is anything of, one after the other.
fn pieces(world: &ClusterWorld, own: &OwnPlan, shared: &mut Shared) -> Whole {
    let mut keys: BTreeSet<ServiceKey> = known(&mut world.imports.clone()).keys().cloned().collect();
    keys.extend(world.exports.get().unwrap().keys().cloned());
    keys.extend(world.foreign.values().flat_map(|f| f.exports.keys().cloned()));
    let mut whole = Whole {
        statuses: own.statuses().iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        ..Whole::default()
    };
    whole.findings.extend(own.findings.iter().cloned());
    for key in keys {
        let piece = piece::service(&mut part(world, &key), Some(own), &key, shared).unwrap();
        if let Some(conflict) = piece.conflict {
            whole.statuses.get_mut(&key).unwrap().conditions.insert("Conflict".to_owned(), conflict);
        }
        if piece.stays {
            whole.imports.keep.insert(key.clone());
        }
        whole.imports.set.extend(piece.import.map(|import| (key.clone(), import)));
        whole.derived.extend(piece.derived.map(|service| (key.clone(), service)));
        whole.slices.set.extend(piece.slices);
        whole.slices.keep.extend(piece.keep);
        whole.findings.extend(piece.findings);
    }
    whole
}

fn same(world: &ClusterWorld, own: &OwnPlan, whole: Whole) -> Result<(), TestCaseError> {
    let (desired, findings) = crate::plan::cluster(world);
    prop_assert_eq!(&own.records, desired.records.get().unwrap());
    prop_assert_eq!(&own.nodes, desired.nodes.get().unwrap());
    prop_assert_eq!(&whole.imports, desired.imports.get().unwrap());
    prop_assert_eq!(&whole.slices, desired.slices.get().unwrap());
    prop_assert_eq!(&whole.derived, &desired.derived.get().unwrap().set);
    prop_assert_eq!(&whole.statuses, desired.statuses.get().unwrap());
    prop_assert_eq!(whole.findings.into_iter().collect::<Vec<_>>(), findings);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn pieces_make_the_whole(mut first in any_world(), mut second in any_world(), kubernetes in any::<bool>()) {
        if kubernetes {
            (first.clusterset, second.clusterset) = (None, None);
        }
        let mut shared =
            Shared::new(first.cluster.clone(), first.clusterset, first.imports.get().unwrap());
        let own = piece::own(&first, None).unwrap();
        let whole = pieces(&first, &own, &mut shared);
        same(&first, &own, whole)?;
        // Another world later, with what was made of the first one there.
        let (desired, _) = crate::plan::cluster(&first);
        let now = applied(&first, &desired);
        let next =
            ClusterWorld { stated: now.stated.clone(), imports: now.imports, slices: now.slices, ..second };
        let later = piece::own(&next, Some(&own)).unwrap();
        let whole = pieces(&next, &later, &mut shared);
        same(&next, &later, whole)?;
        // What is not planned again is what did not change.
        let changed = later.changed(Some(&own));
        let (before, after) = (first.exports.get().unwrap(), next.exports.get().unwrap());
        for key in &changed {
            prop_assert!(before.contains_key(key) || after.contains_key(key));
        }
        prop_assert!(later.changed(Some(&later)).is_empty());
    }
}

/// With ten thousand exports a change of one must not cost ten thousand.
#[test]
fn what_did_not_change_is_not_planned_again() {
    let mut first = world();
    for name in ["b/one", "b/two"] {
        known(&mut first.services).insert(service(name), local(&[80]));
        known(&mut first.exports).insert(service(name), user_export(0));
    }
    let before = piece::own(&first, None).unwrap();
    let mut second = first.clone();
    known(&mut second.services).insert(service("b/two"), local(&[81]));
    // Not exported, and of no concern.
    known(&mut second.services).insert(service("b/three"), local(&[80]));
    let after = piece::own(&second, Some(&before)).unwrap();
    assert_eq!(after.changed(Some(&before)), [service("b/two")].into());
    let shared = |plan: &OwnPlan, name: &str| plan.statuses().get_shared(&service(name)).cloned().unwrap();
    assert!(Arc::ptr_eq(&shared(&before, "b/one"), &shared(&after, "b/one")));
    let of = |plan: &OwnPlan| plan.records[&Scope::Namespace("b".parse().unwrap())].clone();
    let keys: Vec<RecordKey> = of(&after).changed(&of(&before)).into_iter().cloned().collect();
    assert_eq!(keys, [RecordKey::new(record_kind::EXPORT, &["two"]).unwrap()]);
    // Another right to speak concerns all of them.
    second.own.owned.clear();
    let revoked = piece::own(&second, Some(&after)).unwrap();
    let anew = piece::own(&second, None).unwrap();
    assert_eq!((revoked.records, revoked.findings), (anew.records, anew.findings));
}
