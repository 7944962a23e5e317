//! Somebody on the way alters, drops, repeats and mixes what members say: nobody's replica ever holds anything
//! that was not said, and once the way is honest again everybody catches up.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::VecDeque;

use common::{
    Link, Member, brokers, cluster, held, interest, membership, parts, record, revocations, roots, scope,
    wanted,
};
use proptest::prelude::*;
use prost::Message as _;
use tombolo_proto::model::{Position, Scope};
use tombolo_proto::pb;
use tombolo_proto::trust::SigningKey;
use tombolo_proto::wire::{self, Documents, Message};
use tombolo_replica::{Interest, Introduction, Object, Quota, Reason, Replica};

#[derive(Debug, Clone)]
enum Evil {
    Pass,
    Flip { at: usize, bit: u8 },
    Drop,
    Twice,
    Replay { which: usize },
    OldStatement { which: usize },
    OldLeaves { which: usize },
    Body { value: u8 },
    NoDeltas,
    WrongBase,
    SwapScope,
}

fn evil() -> impl Strategy<Value = Evil> {
    prop_oneof![
        12 => Just(Evil::Pass),
        2 => (any::<usize>(), 0..8u8).prop_map(|(at, bit)| Evil::Flip { at, bit }),
        1 => Just(Evil::Drop),
        1 => Just(Evil::Twice),
        1 => any::<usize>().prop_map(|which| Evil::Replay { which }),
        1 => any::<usize>().prop_map(|which| Evil::OldStatement { which }),
        1 => any::<usize>().prop_map(|which| Evil::OldLeaves { which }),
        1 => any::<u8>().prop_map(|value| Evil::Body { value }),
        1 => Just(Evil::NoDeltas),
        1 => Just(Evil::WrongBase),
        1 => Just(Evil::SwapScope),
    ]
}

/// Messages as altered on the way.
fn alter(evil: &Evil, bytes: Vec<u8>, past: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let pick = |which: usize| past.get(which % past.len().max(1)).cloned();
    let update = |bytes: &[u8]| match pb::Message::decode(bytes) {
        Ok(pb::Message { kind: Some(pb::message::Kind::Update(update)) }) => Some(update),
        _ => None,
    };
    let old = |which: usize| {
        let updates: Vec<_> = past.iter().filter_map(|bytes| update(bytes)).collect();
        updates.get(which % updates.len().max(1)).cloned()
    };
    let message =
        |update: pb::Update| pb::Message { kind: Some(pb::message::Kind::Update(update)) }.encode_to_vec();
    let with = |change: &dyn Fn(&mut pb::Update)| match update(&bytes) {
        Some(mut update) => {
            change(&mut update);
            vec![message(update)]
        }
        None => vec![bytes.clone()],
    };
    match evil {
        Evil::Pass => vec![bytes],
        Evil::Flip { at, bit } => {
            let mut bytes = bytes;
            let at = at % bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << bit;
            }
            vec![bytes]
        }
        Evil::Drop => Vec::new(),
        Evil::Twice => vec![bytes.clone(), bytes],
        Evil::Replay { which } => pick(*which).into_iter().chain([bytes]).collect(),
        Evil::OldStatement { which } => with(&|update| {
            if let Some(old) = old(*which) {
                update.statement = old.statement;
            }
        }),
        Evil::OldLeaves { which } => with(&|update| {
            if let Some(old) = old(*which) {
                update.leaves = old.leaves;
                update.namespaces_hash = old.namespaces_hash;
            }
        }),
        Evil::NoDeltas => with(&|update| update.deltas.clear()),
        Evil::WrongBase => with(&|update| {
            if let Some(base) = &mut update.base {
                base.sequence = base.sequence.saturating_sub(1);
            }
        }),
        Evil::Body { value } => {
            let alter = |records: &mut Vec<pb::Record>| {
                records.iter_mut().for_each(|record| record.body = vec![*value; 4].into());
            };
            match pb::Message::decode(bytes.as_slice()) {
                Ok(mut message) => {
                    match &mut message.kind {
                        Some(pb::message::Kind::Chunk(chunk)) => alter(&mut chunk.records),
                        Some(pb::message::Kind::Update(update)) => {
                            update.deltas.iter_mut().for_each(|delta| alter(&mut delta.upserts));
                        }
                        _ => {}
                    }
                    vec![message.encode_to_vec()]
                }
                Err(_) => vec![bytes],
            }
        }
        Evil::SwapScope => match pb::Message::decode(bytes.as_slice()) {
            Ok(pb::Message { kind: Some(pb::message::Kind::Chunk(mut chunk)) }) => {
                chunk.scope = Some(pb::Scope { kind: 2, name: "ns-1".into() });
                vec![pb::Message { kind: Some(pb::message::Kind::Chunk(chunk)) }.encode_to_vec()]
            }
            _ => vec![bytes],
        },
    }
}

fn check(origin: &Member, replica: &Replica, last: &mut Position) {
    let Some((position, records)) = held(replica, &origin.id()) else {
        assert_eq!(*last, Position::default(), "what was held is gone");
        return;
    };
    assert!(*last <= position, "position went back");
    *last = position;
    let said = origin.said.get(&position).expect("nobody said this");
    let complete = replica.is_complete(&origin.id());
    assert!(records.iter().all(|(scope, records)| said.get(scope) == Some(records)));
    assert!(!complete || records == wanted(said, replica.interest()));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_altered_counts(
        steps in prop::collection::vec((evil(), prop::option::of((0..4u8, 0..5u16, any::<u8>())), any::<bool>()), 1..150),
    ) {
        let mut origin = Member::new("east", 1);
        let mut other = Member::new("west", 2);
        other.replica = Replica::new(roots(), interest(0b110)).with_own(other.id());
        assert_eq!(other.replica.offer_documents(&other.documents()), []);
        let new = |a: &Member, b: &Member| Link::new(a.introduction(), b.introduction());
        let mut link = new(&origin, &other);
        let mut past: Vec<Vec<u8>> = Vec::new();
        let mut last = Position::default();
        for (evil, say, back) in steps {
            if let Some((s, key, value)) = say {
                origin.set(scope(s), record(key, value, 3));
                if value % 4 == 0 {
                    origin.records.remove(&scope(value / 4 % 4));
                }
                origin.publish();
            }
            let from = usize::from(back);
            let (sender, receiver) = if back {
                (&mut other.replica, &mut origin.replica)
            } else {
                (&mut origin.replica, &mut other.replica)
            };
            let Some(message) = link.sessions[from].poll_transmit(sender) else { continue };
            let bytes = wire::encode_message(&message).encode_to_vec();
            let altered = alter(&evil, bytes.clone(), &past);
            past.push(bytes);
            let failed = altered.iter().any(|bytes| link.handle(1 - from, receiver, bytes).is_err());
            check(&origin, &other.replica, &mut last);
            prop_assert_eq!(held(&origin.replica, &origin.id()).unwrap().0, origin.position);
            if failed {
                link = new(&origin, &other);
            }
        }
        // An honest session repairs it all.
        link = new(&origin, &other);
        for _ in 0..100 {
            link.transmit(0, &origin.replica);
            link.transmit(1, &other.replica);
            link.receive(1, &mut other.replica).unwrap();
            link.receive(0, &mut origin.replica).unwrap();
            check(&origin, &other.replica, &mut last);
        }
        prop_assert_eq!(last, origin.position);
        prop_assert!(other.replica.is_complete(&origin.id()));
        prop_assert!(link.sessions[1].is_synced(&other.replica));
    }
}

/// Runs two sides until both are silent; all messages that went, by side.
fn talk(a: &mut Replica, b: &mut Replica, link: &mut Link) -> [VecDeque<Message>; 2] {
    let mut log: [VecDeque<Message>; 2] = Default::default();
    loop {
        let mut silent = true;
        while let Some(message) = link.sessions[0].poll_transmit(a) {
            log[0].push_back(message.clone());
            link.sessions[1].handle_message(b, message).unwrap();
            silent = false;
        }
        while let Some(message) = link.sessions[1].poll_transmit(b) {
            log[1].push_back(message.clone());
            link.sessions[0].handle_message(a, message).unwrap();
            silent = false;
        }
        if silent {
            return log;
        }
    }
}

fn pair() -> (Member, Replica, Link) {
    let mut member = Member::new("east", 1);
    member.set(scope(1), record(1, 1, 3));
    member.publish();
    let mut broker = Replica::new(roots(), Interest::All);
    let mut link = Link::new(member.introduction(), Introduction::default());
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(broker.origin(&member.id()).unwrap().position(), member.position);
    (member, broker, link)
}

#[test]
fn a_small_change_is_a_small_message() {
    let (mut member, mut broker, mut link) = pair();
    for key in 0..2_000 {
        member.set(scope(1), record(key, 1, 100));
    }
    member.publish();
    talk(&mut member.replica, &mut broker, &mut link);
    member.set(scope(1), record(7, 2, 100));
    member.publish();
    let [log, back] = talk(&mut member.replica, &mut broker, &mut link);
    let Message::Update(update) = &log[0] else { panic!("{log:?}") };
    assert_eq!((log.len(), back.len(), update.deltas[0].upserts.len()), (1, 0, 1));
    assert!(wire::encode_message(&log[0]).encoded_len() < 600);
    assert_eq!(held(&broker, &member.id()).unwrap().1, member.records);
}

#[test]
fn large_scopes_come_in_chunks_and_count_whole() {
    let (mut member, mut broker, mut link) = pair();
    for key in 0..100 {
        member.set(scope(2), record(key, 1, 60_000));
    }
    member.publish();
    let [log, _] = talk(&mut member.replica, &mut broker, &mut link);
    let chunks = log.iter().filter(|m| matches!(m, Message::Chunk(_))).count();
    assert!((6..9).contains(&chunks), "{chunks}");
    assert_eq!(held(&broker, &member.id()).unwrap(), (member.position, member.records));
}

#[test]
fn revocation_takes_all_at_once_and_forever() {
    let (mut member, mut broker, mut link) = pair();
    let list = revocations(1, &[("east", 1)]);
    let offered = Documents { revocations: Some(list), ..Documents::default() };
    assert_eq!(broker.offer_documents(&offered), []);
    assert!(broker.origin(&member.id()).is_none() && broker.membership(&member.id()).is_none());
    talk(&mut member.replica, &mut broker, &mut link);
    assert!(member.replica.revocations().is_some(), "offered on");
    assert!(member.replica.origin(&member.id()).is_none());
    let refusals = broker.offer_documents(&member.documents());
    assert_eq!(refusals[0].reason, Reason::Revoked { up_to: 1 });
    // Admitted anew under a higher serial, over the same session.
    member.membership = membership("east", 5, &[&member.key]);
    assert_eq!(member.replica.offer_documents(&member.documents()), []);
    member.position = Position { serial: 5, ..Position::default() };
    member.publish();
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(held(&broker, &member.id()).unwrap(), (member.position, member.records));
}

#[test]
fn the_first_of_two_at_one_position_is_kept() {
    let (mut member, mut broker, _) = pair();
    let kept = held(&broker, &member.id()).unwrap();
    let mut twin = Member::new("east", 1);
    twin.replica = Replica::new(roots(), Interest::All);
    assert_eq!(twin.replica.offer_documents(&twin.documents()), []);
    twin.set(scope(1), record(9, 9, 3));
    twin.position = Position { sequence: member.position.sequence - 1, ..member.position };
    twin.publish();
    assert_eq!(twin.position, member.position);
    let update = {
        let mut link = Link::new(twin.introduction(), Introduction::default());
        let mut empty = Replica::new(roots(), Interest::All);
        let [log, _] = talk(&mut twin.replica, &mut empty, &mut link);
        log.into_iter().find(|m| matches!(m, Message::Update(_))).unwrap()
    };
    let mut link = Link::new(twin.introduction(), Introduction::default());
    talk(&mut twin.replica, &mut broker, &mut link);
    link.sessions[1].handle_message(&mut broker, update).unwrap();
    assert_eq!(held(&broker, &member.id()).unwrap(), kept);
    let reason = &broker.findings()[&Object::Statement(cluster("east"))];
    assert!(matches!(reason, Reason::Equivocation(_)), "{reason}");
    // The twin's position is shown to the member as its own: nothing of it is taken.
    member.replica.set_interest(interest(0));
    assert_eq!(held(&member.replica, &member.id()).unwrap().1, member.records);
}

#[test]
fn a_restarted_member_learns_how_far_it_had_spoken() {
    let (mut member, mut broker, _) = pair();
    let before = member.position;
    member.position.epoch = 0;
    member.replica = Replica::new(roots(), interest(0)).with_own(member.id());
    assert_eq!(member.replica.offer_documents(&member.documents()), []);
    let mut link = Link::new(member.introduction(), Introduction::default());
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(member.replica.own_seen(), Some(before));
    assert!(member.replica.origin(&member.id()).is_none(), "only published, never taken back");
    assert!(link.sessions[0].is_synced(&member.replica));
}

/// A reader whose session with a broker was stopped just before the chunk that completes a statement.
fn before_the_chunk() -> (Member, Replica, Member, Link, Message) {
    let (member, mut broker, _) = pair();
    let mut reader = Member::new("west", 2);
    reader.replica = Replica::new(roots(), interest(0b10)).with_own(reader.id());
    assert_eq!(reader.replica.offer_documents(&reader.documents()), []);
    let mut link = Link::new(reader.introduction(), Introduction::default());
    loop {
        while let Some(message) = link.sessions[0].poll_transmit(&reader.replica) {
            link.sessions[1].handle_message(&mut broker, message).unwrap();
        }
        let message = link.sessions[1].poll_transmit(&broker).expect("it comes to the chunk");
        if matches!(message, Message::Chunk(_)) {
            return (member, broker, reader, link, message);
        }
        link.sessions[0].handle_message(&mut reader.replica, message).unwrap();
    }
}

#[test]
fn what_comes_late_by_one_way_does_not_undo_the_other() {
    let (mut member, mut broker, mut reader, mut link, chunk) = before_the_chunk();
    assert!(reader.replica.origin(&member.id()).is_none(), "nothing counts before it is whole");
    member.set(scope(1), record(1, 2, 3));
    member.publish();
    let mut way = Link::new(member.introduction(), Introduction::default());
    talk(&mut member.replica, &mut broker, &mut way);
    let mut other = Link::new(reader.introduction(), Introduction::default());
    talk(&mut reader.replica, &mut broker, &mut other);
    let newest = (member.position, member.records.clone());
    assert_eq!(held(&reader.replica, &member.id()).unwrap(), newest);
    link.sessions[0].handle_message(&mut reader.replica, chunk).unwrap();
    assert_eq!(held(&reader.replica, &member.id()).unwrap(), newest);
}

#[test]
fn a_broker_that_is_behind_is_asked_again() {
    let (mut member, mut behind, mut way) = pair();
    let mut reader = Member::new("west", 2);
    reader.replica = Replica::new(roots(), interest(0)).with_own(reader.id());
    assert_eq!(reader.replica.offer_documents(&reader.documents()), []);
    let mut slow = Link::new(reader.introduction(), Introduction::default());
    talk(&mut reader.replica, &mut behind, &mut slow);
    // Its reader hears the next statement from elsewhere, and only then wants the records.
    member.set(scope(1), record(1, 2, 3));
    member.publish();
    let mut ahead = Replica::new(roots(), Interest::All);
    for side in [&mut member, &mut reader] {
        let mut link = Link::new(side.introduction(), Introduction::default());
        talk(&mut side.replica, &mut ahead, &mut link);
    }
    assert_eq!(held(&reader.replica, &member.id()).unwrap().0, member.position);
    reader.replica.set_interest(interest(0b10));
    talk(&mut reader.replica, &mut behind, &mut slow);
    assert!(!reader.replica.is_complete(&member.id()), "what it has is of another position");
    talk(&mut member.replica, &mut behind, &mut way);
    talk(&mut reader.replica, &mut behind, &mut slow);
    assert_eq!(held(&reader.replica, &member.id()).unwrap().1, member.records);
}

#[test]
fn what_is_no_longer_wanted_is_not_held() {
    let (member, _, mut reader, mut link, chunk) = before_the_chunk();
    reader.replica.set_interest(interest(0));
    link.sessions[0].handle_message(&mut reader.replica, chunk).unwrap();
    let (position, records) = held(&reader.replica, &member.id()).unwrap();
    assert_eq!((position, records.len()), (member.position, 0));
}

#[test]
fn forks_older_lists_and_strangers_are_refused() {
    let (member, mut broker, _) = pair();
    let thief = SigningKey::from_seed(&[66; 32]);
    // A second first binding by the same subject.
    let chain = roots();
    let binding = tombolo_proto::trust::Binding {
        set: chain.set(),
        cluster: cluster("east"),
        serial: 1,
        generation: 0,
        key: thief.public(),
    };
    let mut forked = parts(&member.membership);
    forked.bindings = vec![binding.sign(&member.key)];
    assert_eq!(broker.offer_membership(&forked).unwrap_err().reason, Reason::Fork { serial: 1 });
    let lists = |version| Documents {
        brokers: Some(brokers(version)),
        revocations: Some(revocations(version, &[])),
        ..Documents::default()
    };
    assert_eq!(broker.offer_documents(&lists(2)), []);
    let version = broker.version();
    assert_eq!(broker.offer_documents(&lists(1)), []);
    assert_eq!((broker.version(), broker.brokers().unwrap().version), (version, 2));
    let other = revocations(2, &[("east", 9)]);
    let refusals = broker.offer_documents(&Documents { revocations: Some(other), ..Documents::default() });
    assert!(matches!(refusals[0].reason, Reason::Equivocation(_)));
    assert!(broker.origin(&member.id()).is_some());
}

#[test]
fn a_cluster_over_its_quota_keeps_what_it_had() {
    let (mut member, _, _) = pair();
    let quota = Quota { records: 10, bytes: 100_000, ..Quota::default() };
    let mut broker = Replica::new(roots(), Interest::All).with_quota(quota);
    let mut link = Link::new(member.introduction(), Introduction::default());
    talk(&mut member.replica, &mut broker, &mut link);
    let kept = held(&broker, &member.id()).unwrap();
    for key in 0..11 {
        member.set(scope(2), record(key, 1, 3));
    }
    member.publish();
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(held(&broker, &member.id()).unwrap(), kept);
    assert!(!link.sessions[0].take_peer_alarms().is_empty(), "it is told");
    member.records.remove(&scope(2));
    member.set(scope(3), record(1, 1, 60_000));
    member.set(scope(3), record(2, 1, 60_000));
    member.publish();
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(held(&broker, &member.id()).unwrap(), kept);
    member.records.remove(&scope(3));
    member.publish();
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(held(&broker, &member.id()).unwrap().0, member.position);
}

#[test]
fn a_cluster_of_too_many_nodes_keeps_what_it_had() {
    let (mut member, _, _) = pair();
    let mut broker = Replica::new(roots(), Interest::All).with_quota(Quota { nodes: 8, ..Quota::default() });
    let mut link = Link::new(member.introduction(), Introduction::default());
    talk(&mut member.replica, &mut broker, &mut link);
    let kept = held(&broker, &member.id()).unwrap();
    for key in 0..9 {
        member.set(Scope::Nodes, record(key, 1, 3));
    }
    member.publish();
    talk(&mut member.replica, &mut broker, &mut link);
    assert_eq!(held(&broker, &member.id()).unwrap(), kept);
    assert!(broker.findings().values().any(|r| *r == Reason::Quota { what: "nodes", max: 8 }));
}

#[test]
fn what_was_stored_is_verified_when_it_comes_back() {
    let (member, broker, _) = pair();
    let state = broker.origin(&member.id()).unwrap();
    let records = || -> Vec<(Scope, Vec<_>)> {
        member.records.iter().map(|(s, r)| (s.clone(), r.values().cloned().collect())).collect()
    };
    let restore = |records| {
        let mut new = Replica::new(roots(), Interest::All);
        assert_eq!(new.offer_documents(&broker.documents()), []);
        let envelope = state.statement().envelope();
        let result = new.restore(envelope, state.leaves().clone(), state.namespaces_hash(), records);
        result.map(|()| held(&new, &member.id()).unwrap())
    };
    assert_eq!(restore(records()).unwrap(), (member.position, member.records.clone()));
    let mut altered = records();
    altered[0].1[0].body = vec![1].into();
    assert!(matches!(restore(altered).unwrap_err().reason, Reason::Content(_)));
}
