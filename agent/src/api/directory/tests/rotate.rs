//! The cluster's key is another, and at no moment is there none that works.

use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::testing::{binding, cluster, grant, set};
use tombolo_proto::trust::{Membership, Revocations, SigningKey};

use super::super::rotate::Step;
use super::*;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

fn object(membership: &Membership) -> Member {
    Member {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
        spoken: None,
        statement: None,
        namespaces: None,
    }
}

fn join(directory: &Directory, serial: u64, key: &SigningKey) -> Membership {
    let (root, roots) = set();
    let grant = grant("eu", serial, &["10.1.0.0/16"], key.public());
    let first = binding(&grant, 0, key.public()).sign(key);
    let membership = Membership::verify(&roots, &grant.sign(&root), &[first]).unwrap();
    let set = ClusterSet {
        set: roots.set(),
        cluster: cluster("eu"),
        roots: roots.envelopes().cloned().collect(),
        brokers: None,
        revocations: None,
        reach: Reach::Exports,
        topology: Topology::Gateway,
        clusterset: Some(ClustersetRanges { v4: Some("198.19.0.0/16".parse().unwrap()), v6: None }),
        reserved: BTreeSet::new(),
        rotations: std::collections::BTreeMap::new(),
        leaving: false,
    };
    directory.join(&set, key, &object(&membership)).unwrap();
    membership
}

/// The own membership, verified anew from the disk.
fn bound(directory: &Directory) -> Membership {
    let (_, roots) = set();
    let member = directory.read().members.get().unwrap()[&cluster("eu")].clone();
    Membership::verify(&roots, &member.grant, &member.bindings).unwrap()
}

/// What an agent that starts now signs with is what everybody expects.
fn works(directory: &Directory) {
    let key = directory.read_cluster_key().unwrap().unwrap();
    assert_eq!(key.public(), bound(directory).key());
}

fn secret(directory: &Directory) -> String {
    let path = "secrets/tombolo-system/tombolo-cluster-key.json";
    std::fs::read_to_string(directory.root().join(STATE).join(path)).unwrap()
}

#[test]
fn each_generation_is_bound_by_the_one_before() {
    let (_temporary, directory) = directory();
    let first = join(&directory, 1, &key(40));
    for generation in 1..4 {
        let before = bound(&directory);
        let rotation = directory.rotate_cluster_key().unwrap();
        assert_eq!((rotation.serial, rotation.generation, rotation.resumed), (1, generation, false));
        works(&directory);
        let now = bound(&directory);
        assert!(now.extends(&before) && now.extends(&first) && now.key() != before.key());
        assert!(!secret(&directory).contains("previousSeed"), "the old key is forgotten");
    }
}

#[test]
fn cut_off_anywhere_a_key_works_and_the_next_goes_on() {
    for last in [Step::Kept, Step::Bound] {
        let (_temporary, directory) = directory();
        join(&directory, 1, &key(40));
        directory.rotate_cluster_key_until(last).unwrap();
        works(&directory);
        assert_eq!(bound(&directory).generation(), u32::from(last >= Step::Bound));
        // By another process, twice, as two people might.
        let other = Directory::open(directory.root()).unwrap();
        let rotation = other.rotate_cluster_key().unwrap();
        assert_eq!((rotation.generation, rotation.resumed), (1, true), "{last:?}");
        works(&directory);
        assert!(!secret(&directory).contains("previousSeed"));
        assert_eq!(other.rotate_cluster_key().unwrap().generation, 2);
        works(&directory);
    }
}

#[test]
fn many_at_once_lose_no_key() {
    let (_temporary, directory) = directory();
    join(&directory, 1, &key(40));
    let done: usize = std::thread::scope(|scope| {
        let rotate = || {
            let directory = Directory::open(directory.root()).unwrap();
            (0..4).filter(|_| directory.rotate_cluster_key().is_ok()).count()
        };
        let all: Vec<_> = (0..4).map(|_| scope.spawn(rotate)).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(done > 0, "somebody wins");
    works(&directory);
    directory.rotate_cluster_key().unwrap();
    works(&directory);
}

#[tokio::test]
async fn an_older_membership_does_not_take_the_binding_away() {
    let (_temporary, directory) = directory();
    let old = object(&join(&directory, 1, &key(40)));
    directory.rotate_cluster_key().unwrap();
    let error = directory.write_member(&cluster("eu"), &old, &BTreeMap::new()).await.unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    works(&directory);
}

#[test]
fn there_are_bounds() {
    let (_temporary, directory) = directory();
    join(&directory, 1, &key(40));
    for _ in 1..Membership::MAX_BINDINGS {
        directory.rotate_cluster_key().unwrap();
    }
    let before = secret(&directory);
    let error = directory.rotate_cluster_key().unwrap_err().to_string();
    assert!(error.contains("63 times") && error.contains("grant the cluster anew"), "{error}");
    assert_eq!(secret(&directory), before, "nothing was changed");
    works(&directory);
    // A newer grant begins anew, with the key that is there or with another.
    let key = directory.read_cluster_key().unwrap().unwrap();
    join(&directory, 2, &key);
    assert_eq!(directory.rotate_cluster_key().unwrap().generation, 1);
    join(&directory, 3, &self::key(41));
    works(&directory);
    assert_eq!(directory.rotate_cluster_key().unwrap().generation, 1);
    works(&directory);
}

#[tokio::test]
async fn who_may_not_speak_rotates_nothing() {
    let (_temporary, directory) = directory();
    let error = directory.rotate_cluster_key().unwrap_err().to_string();
    assert!(error.contains("tombolo join"), "{error}");
    join(&directory, 1, &key(40));
    // A key from elsewhere.
    let id = own(secret::id()).unwrap();
    directory.store.transact(|t| t.put(&id, secret::write(&key(50), None))).unwrap();
    let error = directory.rotate_cluster_key().unwrap_err().to_string();
    assert!(error.contains("tombolo invite eu --renew"), "{error}");
    directory.store.transact(|t| t.put(&id, secret::write(&key(40), None))).unwrap();
    let (root, roots) = set();
    let mut known = directory.clusterset().await.unwrap().unwrap();
    let list = Revocations { set: roots.set(), version: 1, up_to: [(cluster("eu"), 1)].into() };
    known.value.revocations = Some(list.sign(&root));
    directory.write_clusterset(&known.value, Some(&known.version)).await.unwrap();
    let error = directory.rotate_cluster_key().unwrap_err().to_string();
    assert!(error.contains("revoked"), "{error}");
}

#[tokio::test]
async fn joining_by_a_newer_grant_keeps_what_was_said() {
    let (_temporary, directory) = directory();
    let before = join(&directory, 1, &key(40));
    let record = |name: &str| {
        let key = RecordKey::new(1, &[name]).unwrap();
        (key.clone(), Record { key, body: vec![7; 30].into() })
    };
    let nodes: BTreeMap<_, _> = [record("a"), record("b")].into();
    let said = Member {
        statement: Some(before.bindings()[0].envelope().clone()),
        namespaces: Some(tombolo_proto::trust::record_hash(b"x")),
        ..object(&before)
    };
    directory.write_member(&cluster("eu"), &said, &nodes).await.unwrap();
    // With its key and with another: ranks and tunnel addresses hang on what was said.
    for (serial, seed) in [(2, 40), (3, 41)] {
        join(&directory, serial, &key(seed));
        works(&directory);
        let read = directory.read();
        let member = &read.members.get().unwrap()[&cluster("eu")];
        assert_eq!((&member.statement, &member.namespaces), (&said.statement, &said.namespaces));
        assert_eq!(member.spoken.as_ref().unwrap().grant, said.grant);
        assert_eq!(read.member_nodes.get().unwrap()[&cluster("eu")], nodes);
    }
}
