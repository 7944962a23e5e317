//! What was verified once is never undone by whoever brings something older, over restarts too.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Link, Member, interest, record, roots, scope};
use tombolo_proto::model::Position;
use tombolo_replica::{Introduction, Object, Reason, Replica};

/// Everything goes to and fro until both are quiet.
fn settle(broker: &mut Replica, member: &mut Replica, link: &mut Link) {
    while link.transmit(0, broker)
        | link.transmit(1, member)
        | link.receive(1, member).unwrap()
        | link.receive(0, broker).unwrap()
    {}
}

fn introductions() -> Link {
    Link::new(Introduction::default(), Introduction::default())
}

/// A broker that holds what `member` says now.
fn broker(member: &mut Member) -> Replica {
    let mut broker = Replica::new(roots(), tombolo_replica::Interest::All);
    let introduction = member.introduction();
    settle(&mut broker, &mut member.replica, &mut Link::new(Introduction::default(), introduction));
    assert_eq!(broker.origin(&member.id()).unwrap().position(), member.position);
    broker
}

/// A member that has just started and knows who `other` is.
fn newcomer(other: &Member) -> Replica {
    let mut replica = Replica::new(roots(), interest(0b110));
    assert_eq!(replica.offer_documents(&other.documents()), []);
    replica
}

#[test]
fn nobody_is_rolled_back_over_a_restart() {
    let mut other = Member::new("oslo", 1);
    let mut old = broker(&mut other);
    other.set(scope(0), record(1, 1, 10));
    other.publish();
    let mut new = broker(&mut other);
    let seen = new.origin(&other.id()).unwrap().statement().envelope().clone();

    // Without the floor the old one is taken: there is nothing to compare with.
    let mut naive = newcomer(&other);
    settle(&mut old, &mut naive, &mut introductions());
    assert!(naive.origin(&other.id()).unwrap().position() < other.position);

    let mut replica = newcomer(&other);
    assert_eq!(replica.set_floor(&seen).unwrap(), other.position);
    settle(&mut old, &mut replica, &mut introductions());
    assert!(replica.origin(&other.id()).is_none());
    let statement = Object::Statement(other.id());
    assert!(matches!(replica.findings().get(&statement), Some(Reason::Stale { .. })));

    // The same position, and what comes after it, are taken; then nothing is wrong any more.
    settle(&mut new, &mut replica, &mut introductions());
    assert_eq!(replica.origin(&other.id()).unwrap().position(), other.position);
    assert_eq!(replica.findings().get(&statement), None);
}

#[test]
fn a_peer_that_catches_up_is_heard_in_the_same_session() {
    let mut other = Member::new("oslo", 1);
    let mut behind = broker(&mut other);
    other.set(scope(0), record(1, 1, 10));
    other.publish();
    let mut ahead = broker(&mut other);
    let seen = ahead.origin(&other.id()).unwrap().statement().envelope().clone();
    let mut replica = newcomer(&other);
    replica.set_floor(&seen).unwrap();
    let mut link = introductions();
    settle(&mut behind, &mut replica, &mut link);
    assert!(replica.origin(&other.id()).is_none());
    settle(&mut ahead, &mut behind, &mut introductions());
    settle(&mut behind, &mut replica, &mut link);
    assert_eq!(replica.origin(&other.id()).unwrap().position(), other.position);
}

#[test]
fn the_own_floor_counts_as_seen() {
    let mut own = Member::new("oslo", 1);
    own.position = Position { epoch: 900, ..own.position };
    own.publish();
    let said = own.replica.origin(&own.id()).unwrap().statement().envelope().clone();
    let mut replica = Replica::new(roots(), interest(0)).with_own(own.id());
    assert_eq!(replica.offer_documents(&own.documents()), []);
    replica.set_floor(&said).unwrap();
    assert_eq!(replica.own_seen(), Some(own.position));
    // Another's key cannot raise it.
    let other = Member::new("bergen", 2);
    let forged = other.replica.origin(&other.id()).unwrap().statement().envelope().clone();
    assert!(replica.set_floor(&forged).is_err());
    assert_eq!(replica.floor(&other.id()), None);
}
