//! Keys are rotated: whoever has an old one, or shows an old binding, moves nobody.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{Link, Member, interest, parts, record, roots, scope};
use tombolo_proto::model::Position;
use tombolo_proto::trust::{Binding, Membership, SigningKey};
use tombolo_proto::wire::{Documents, MembershipParts};
use tombolo_replica::{Interest, Introduction, LocalOrigin, Object, Reason, Replica};

/// Everything goes to and fro until both are quiet.
fn settle(a: &mut Replica, b: &mut Replica, link: &mut Link) {
    while link.transmit(0, a)
        | link.transmit(1, b)
        | link.receive(1, b).unwrap()
        | link.receive(0, a).unwrap()
    {}
}

fn link() -> Link {
    Link::new(Introduction::default(), Introduction::default())
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

/// The member's key is another from now on.
fn rotate(member: &mut Member, next: SigningKey) {
    member.membership = member.membership.rotated(&member.key, next.public()).unwrap();
    member.key = next;
    assert_eq!(member.replica.offer_documents(&member.documents()), []);
    member.position.generation += 1;
    member.position.epoch += 1;
    member.position.sequence = 0;
    member.publish();
}

fn offer(replica: &mut Replica, membership: MembershipParts) -> Vec<Reason> {
    let documents = Documents { memberships: vec![membership], ..Documents::default() };
    replica.offer_documents(&documents).into_iter().map(|refusal| refusal.reason).collect()
}

/// A broker and a receiver that know a member, one after the other.
fn all_know(member: &mut Member, broker: &mut Replica, receiver: &mut Replica) {
    settle(broker, &mut member.replica, &mut link());
    settle(broker, receiver, &mut link());
    assert_eq!(receiver.origin(&member.id()).unwrap().position(), member.position);
}

fn new(interest: Interest) -> Replica {
    Replica::new(roots(), interest)
}

#[test]
fn a_rotation_arrives_in_a_running_session_and_withdraws_nothing() {
    let mut member = Member::new("oslo", 1);
    member.set(scope(0), record(1, 1, 10));
    member.publish();
    let (mut broker, mut receiver) = (new(Interest::All), new(interest(0b110)));
    let (mut up, mut down) = (link(), link());
    settle(&mut broker, &mut member.replica, &mut up);
    settle(&mut broker, &mut receiver, &mut down);
    for generation in 1..4 {
        let before = receiver.origin(&member.id()).unwrap().records(&scope(0)).unwrap().clone();
        rotate(&mut member, key(100 + generation));
        // The binding comes first; until the statement follows, the old one counts.
        settle(&mut broker, &mut member.replica, &mut up);
        settle(&mut broker, &mut receiver, &mut down);
        let state = receiver.origin(&member.id()).unwrap();
        assert_eq!(state.position(), member.position);
        assert_eq!(state.records(&scope(0)).unwrap(), &before);
        assert_eq!(receiver.membership(&member.id()).unwrap().generation(), u32::from(generation));
        assert!(receiver.findings().is_empty() && broker.findings().is_empty());
    }
}

#[test]
fn who_was_away_during_two_rotations_hears_of_both() {
    let mut member = Member::new("oslo", 1);
    let (mut broker, mut away) = (new(Interest::All), new(interest(0b110)));
    all_know(&mut member, &mut broker, &mut away);
    rotate(&mut member, key(101));
    settle(&mut broker, &mut member.replica, &mut link());
    rotate(&mut member, key(102));
    all_know(&mut member, &mut broker, &mut away);
    assert_eq!(away.membership(&member.id()).unwrap().bindings().len(), 3);
    assert!(away.findings().is_empty());
}

#[test]
fn an_old_key_says_nothing_any_more() {
    let mut member = Member::new("oslo", 1);
    let old = key(1);
    let (mut broker, mut receiver) = (new(Interest::All), new(interest(0b110)));
    all_know(&mut member, &mut broker, &mut receiver);
    rotate(&mut member, key(101));
    all_know(&mut member, &mut broker, &mut receiver);
    // Signed with the stolen key of generation 0, at the highest position that has.
    let mut thief = new(Interest::All);
    assert_eq!(thief.offer_documents(&member.documents()), []);
    let mut local = LocalOrigin::new(roots().set(), member.id());
    let forged = record(9, 9, 10);
    local.set_records(&BTreeMap::from([(scope(0), BTreeMap::from([(forged.key.clone(), forged)]))]));
    let last = Position { serial: 1, generation: 0, epoch: u64::MAX, sequence: u64::MAX };
    thief.publish(local.sign(&old, last)).unwrap();
    settle(&mut thief, &mut receiver, &mut link());
    assert_eq!(receiver.origin(&member.id()).unwrap().position(), member.position);
    // Under the new generation it is not the key that may sign.
    let claimed = Position { generation: 1, ..last };
    assert!(thief.publish(local.sign(&old, claimed)).is_err());
    assert!(receiver.set_floor(thief.origin(&member.id()).unwrap().statement().envelope()).is_ok());
    assert_eq!(receiver.origin(&member.id()).unwrap().position(), member.position);
}

#[test]
fn the_first_binding_of_a_generation_is_pinned() {
    let mut member = Member::new("oslo", 1);
    let mut receiver = new(interest(0b110));
    assert_eq!(receiver.offer_documents(&member.documents()), []);
    let first = member.membership.clone();
    rotate(&mut member, key(101));
    assert_eq!(receiver.offer_documents(&member.documents()), []);
    // A thief has key 0 and binds another key 1, and builds upon that.
    let forked = first.rotated(&key(1), key(66).public()).unwrap();
    let longer = forked.rotated(&key(66), key(67).public()).unwrap();
    for fork in [&forked, &longer] {
        assert!(matches!(offer(&mut receiver, parts(fork)).as_slice(), [Reason::Fork { serial: 1 }]));
    }
    assert_eq!(receiver.membership(&member.id()).unwrap().key(), key(101).public());
    // It stays a finding when the honest cluster goes on.
    rotate(&mut member, key(102));
    assert_eq!(receiver.offer_documents(&member.documents()), []);
    let object = Object::Membership(Some(member.id()));
    assert!(matches!(receiver.findings().get(&object), Some(Reason::Fork { .. })));
    // And a key that was never bound binds nothing.
    assert!(first.rotated(&key(66), key(67).public()).is_err());
}

#[test]
fn old_bindings_that_are_shown_again_take_nothing_back() {
    let mut member = Member::new("oslo", 1);
    let (mut stale, mut receiver) = (new(Interest::All), new(interest(0b110)));
    let old = parts(&member.membership);
    all_know(&mut member, &mut stale, &mut receiver);
    let mut broker = new(Interest::All);
    rotate(&mut member, key(101));
    all_know(&mut member, &mut broker, &mut receiver);
    assert_eq!(offer(&mut receiver, old), []);
    // A broker that never heard of the rotation, or makes believe so.
    let mut down = link();
    settle(&mut stale, &mut receiver, &mut down);
    assert_eq!(receiver.origin(&member.id()).unwrap().position(), member.position);
    assert_eq!(receiver.membership(&member.id()).unwrap().generation(), 1);
    // Who listens to it learns the new binding from the receiver.
    assert_eq!(stale.origin(&member.id()).unwrap().position(), member.position);
}

#[test]
fn rotations_are_bounded_and_a_fresh_grant_begins_anew() {
    let mut membership = common::membership("oslo", 1, &[&key(1)]);
    let mut present = key(1);
    for seed in 2..=Membership::MAX_BINDINGS {
        let next = key(u8::try_from(seed).unwrap());
        membership = membership.rotated(&present, next.public()).unwrap();
        present = next;
    }
    assert_eq!(membership.bindings().len(), Membership::MAX_BINDINGS);
    let error = membership.rotated(&present, key(200).public()).unwrap_err().to_string();
    assert!(error.contains("63 times"), "{error}");
    let mut replica = new(Interest::All);
    assert_eq!(offer(&mut replica, parts(&membership)), []);
    // One more, made by hand, is refused whole.
    let grant = membership.grant();
    let one_more = Binding {
        set: grant.set,
        cluster: grant.cluster.clone(),
        serial: 1,
        generation: u32::try_from(Membership::MAX_BINDINGS).unwrap(),
        key: key(200).public(),
    };
    let mut long = parts(&membership);
    long.bindings.push(one_more.sign(&present));
    assert!(matches!(offer(&mut replica, long).as_slice(), [Reason::Trust(_)]));
    let fresh = common::membership("oslo", 2, &[&present]);
    assert_eq!(offer(&mut replica, parts(&fresh)), []);
    assert_eq!(fresh.rotated(&present, key(200).public()).unwrap().generation(), 1);
}
