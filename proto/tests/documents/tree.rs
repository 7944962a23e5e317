//! The hash tree under a statement.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use tombolo_proto::model::{Namespace, Record, RecordKey, Scope};
use tombolo_proto::testing::*;
use tombolo_proto::trust::{
    Digest, ScopeDigest, leaf_hash, namespaces_hash, record_hash, root_hash, scope_digest,
};

type Content = BTreeMap<Scope, BTreeMap<RecordKey, Vec<u8>>>;

fn any_world() -> impl Strategy<Value = Content> {
    world(0)
}

/// Of so many scopes at least.
fn world(least: usize) -> impl Strategy<Value = Content> {
    btree_map(any_scope(), btree_map(any_record_key(), vec(any::<u8>(), 0..9), 1..5), least..5)
}

fn leaves(world: &Content) -> BTreeMap<Scope, ScopeDigest> {
    let of = |records: &BTreeMap<RecordKey, Vec<u8>>| {
        scope_digest(records.iter().map(|(k, b)| (k, record_hash(b))))
    };
    world.iter().filter_map(|(scope, records)| Some((scope.clone(), of(records)?))).collect()
}

fn root(world: &Content) -> Digest {
    let leaves = leaves(world);
    root_hash(leaves.get(&Scope::Nodes), &namespaces_hash(&leaves))
}

proptest! {
    /// Two contents have one root only if they are the same: also through keys, scopes and bodies that
    /// run into each other.
    #[test]
    fn root_tells_contents_apart(a in any_world(), b in any_world()) {
        prop_assert_eq!(root(&a) == root(&b), a == b);
    }

    #[test]
    fn every_change_shows(mut world in world(1), pick in any::<prop::sample::Index>(), byte: u8, other in any_record_key()) {
        let before = root(&world);
        let scope = world.keys().nth(pick.index(world.len())).unwrap().clone();
        let original = world.clone();
        // A body.
        let records = world.get_mut(&scope).unwrap();
        records.first_entry().unwrap().get_mut().push(byte);
        prop_assert_ne!(root(&world), before);
        world = original.clone();
        // A key.
        let records = world.get_mut(&scope).unwrap();
        if !records.contains_key(&other) {
            let (_, body) = records.pop_first().unwrap();
            records.insert(other, body);
            prop_assert_ne!(root(&world), before);
        }
        world = original.clone();
        // A record gone.
        world.get_mut(&scope).unwrap().pop_first();
        prop_assert_ne!(root(&world), before);
        world = original.clone();
        // The scope.
        let records = world.remove(&scope).unwrap();
        prop_assert_ne!(root(&world), before);
        world.insert(Scope::Namespace(Namespace::new("zz-nobody-has-this").unwrap()), records);
        prop_assert_ne!(root(&world), before);
    }

    #[test]
    fn order_of_records_is_nothing(records in any_records(), seed in any::<u64>()) {
        let mut shuffled = records.clone();
        let mut state = seed | 1;
        for i in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            shuffled.swap(i, (state >> 33) as usize % (i + 1));
        }
        prop_assert_eq!(ScopeDigest::of(&records), ScopeDigest::of(&shuffled));
        let count = records.iter().map(|r| &r.key).collect::<BTreeSet<_>>().len() as u64;
        prop_assert_eq!(ScopeDigest::of(&records).map_or(0, |d| d.count), count);
    }

    /// Who has the nodes and the second hash can check the nodes, and nobody can pass it other nodes.
    #[test]
    fn nodes_alone(world in any_world(), other in any_content()) {
        let leaves = leaves(&world);
        let second = namespaces_hash(&leaves);
        let nodes = leaves.get(&Scope::Nodes);
        prop_assert_eq!(root_hash(nodes, &second), root(&world));
        prop_assert_ne!(root_hash(Some(&other), &second), root(&world));
        if nodes.is_some() {
            prop_assert_ne!(root_hash(None, &second), root(&world));
        }
    }

    #[test]
    fn count_and_scope_are_in_the_leaf(content in any_content(), a in any_scope(), b in any_scope()) {
        let more = ScopeDigest { count: content.count.wrapping_add(1), ..content };
        prop_assert_ne!(leaf_hash(&a, &content), leaf_hash(&a, &more));
        prop_assert_eq!(leaf_hash(&a, &content) == leaf_hash(&b, &content), a == b);
    }
}

/// The order is by kind, then part by part: not that of the hashed key bytes, where fewer parts come first.
#[test]
fn order_of_keys() {
    let key = |kind, parts: &[&str]| RecordKey::new(kind, parts).unwrap();
    let sorted = [
        key(1, &["z"]),
        key(2, &["a"]),
        key(2, &["a", "b"]),
        key(2, &["aa"]),
        key(2, &["b"]),
        key(256, &["a"]),
    ];
    assert!(sorted.is_sorted());
}

#[test]
fn an_empty_scope_has_no_leaf() {
    assert_eq!(ScopeDigest::of(&[] as &[Record]), None);
}
