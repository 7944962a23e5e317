//! A network of members and brokers under random operations: it always comes to rest with everybody holding
//! what its members say, and no position ever goes back on the way.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{Link, Member, held, interest, membership, record, roots, scope, wanted};
use proptest::prelude::*;
use tombolo_proto::model::{ClusterId, Position};
use tombolo_proto::trust::SigningKey;
use tombolo_replica::{Interest, Introduction, Replica};

#[derive(Debug, Clone)]
enum Op {
    Set { member: usize, scope: u8, key: u16, value: u8 },
    Remove { member: usize, scope: u8, key: u16 },
    Clear { member: usize, scope: u8 },
    Large { member: usize, scope: u8, value: u8 },
    Connect { member: usize, broker: usize },
    Drop { member: usize, broker: usize },
    Run { member: usize, broker: usize, to_broker: u8, to_member: u8 },
    RestartBroker { broker: usize },
    RestartMember { member: usize },
    Interest { member: usize, bits: u8 },
    Renew { member: usize },
    Rotate { member: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let m = 0..3usize;
    let b = 0..2usize;
    prop_oneof![
        8 => (m.clone(), 0..4u8, 0..6u16, any::<u8>())
            .prop_map(|(member, scope, key, value)| Op::Set { member, scope, key, value }),
        3 => (m.clone(), 0..4u8, 0..6u16).prop_map(|(member, scope, key)| Op::Remove { member, scope, key }),
        1 => (m.clone(), 0..4u8).prop_map(|(member, scope)| Op::Clear { member, scope }),
        1 => (m.clone(), 0..4u8, any::<u8>()).prop_map(|(member, scope, value)| Op::Large { member, scope, value }),
        4 => (m.clone(), b.clone()).prop_map(|(member, broker)| Op::Connect { member, broker }),
        1 => (m.clone(), b.clone()).prop_map(|(member, broker)| Op::Drop { member, broker }),
        24 => (m.clone(), b.clone(), 0..5u8, 0..5u8)
            .prop_map(|(member, broker, to_broker, to_member)| Op::Run { member, broker, to_broker, to_member }),
        1 => b.prop_map(|broker| Op::RestartBroker { broker }),
        1 => m.clone().prop_map(|member| Op::RestartMember { member }),
        2 => (m.clone(), any::<u8>()).prop_map(|(member, bits)| Op::Interest { member, bits }),
        1 => m.clone().prop_map(|member| Op::Renew { member }),
        1 => m.prop_map(|member| Op::Rotate { member }),
    ]
}

struct Network {
    members: Vec<Member>,
    brokers: Vec<Replica>,
    links: BTreeMap<(usize, usize), Link>,
    /// Highest position seen of (holder, origin) in the holder's life.
    seen: BTreeMap<(String, ClusterId), Position>,
}

impl Network {
    fn new() -> Self {
        let members =
            ["east", "west", "north"].into_iter().zip(1..).map(|(n, s)| Member::new(n, s)).collect();
        let brokers = (0..2).map(|_| Replica::new(roots(), Interest::All)).collect();
        Self { members, brokers, links: BTreeMap::new(), seen: BTreeMap::new() }
    }

    fn connect(&mut self, member: usize, broker: usize) {
        let introduction = self.members[member].introduction();
        let link = || Link::new(introduction, Introduction::default());
        self.links.entry((member, broker)).or_insert_with(link);
    }

    fn forget(&mut self, holder: &str) {
        self.seen.retain(|(name, _), _| name != holder);
    }

    /// Runs a link: each side transmits and receives so many messages. True if anything moved.
    fn run(&mut self, member: usize, broker: usize, counts: [u8; 2]) -> bool {
        let Some(link) = self.links.get_mut(&(member, broker)) else { return false };
        let mut moved = false;
        for (to, count) in counts.into_iter().enumerate() {
            for _ in 0..count {
                let member = &mut self.members[member].replica;
                let broker = &mut self.brokers[broker];
                let (from, into) = if to == 0 { (broker, member) } else { (member, broker) };
                moved |= link.transmit(1 - to, from);
                moved |= link.receive(to, into).expect("honest peers agree");
            }
        }
        for session in &mut link.sessions {
            assert_eq!(session.take_refusals(), [], "honest peers refuse nothing");
        }
        self.check_positions(&format!("member {member}"), member, false);
        self.check_positions(&format!("broker {broker}"), broker, true);
        moved
    }

    fn check_positions(&mut self, name: &str, index: usize, is_broker: bool) {
        let replica = if is_broker { &self.brokers[index] } else { &self.members[index].replica };
        for (origin, state) in replica.origins() {
            let last = self.seen.entry((name.to_owned(), origin.clone())).or_default();
            assert!(*last <= state.position(), "{name} went back with {origin}");
            *last = state.position();
        }
        for member in &self.members {
            if let Some((position, records)) = held(replica, &member.id()) {
                let said = &member.said[&position];
                assert!(records.iter().all(|(s, r)| said.get(s) == Some(r)), "{name} holds what nobody said");
                let own = replica.own() == Some(&member.id());
                let asked = |scope| own || replica.interest().wants(scope);
                assert!(records.keys().all(asked), "{name} holds what it does not want");
            }
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Set { member, scope: s, key, value } => {
                self.members[member].set(scope(s), record(key, value, 3));
                self.members[member].publish();
            }
            Op::Remove { member, scope: s, key } => {
                let records = self.members[member].records.entry(scope(s)).or_default();
                records.remove(&record(key, 0, 0).key);
                self.members[member].publish();
            }
            Op::Clear { member, scope: s } => {
                self.members[member].records.remove(&scope(s));
                self.members[member].publish();
            }
            Op::Large { member, scope: s, value } => {
                for key in 0..40 {
                    self.members[member].set(scope(s), record(key, value, 60_000));
                }
                self.members[member].publish();
            }
            Op::Connect { member, broker } => self.connect(member, broker),
            Op::Drop { member, broker } => {
                self.links.remove(&(member, broker));
            }
            Op::Run { member, broker, to_broker, to_member } => {
                self.run(member, broker, [to_member, to_broker]);
            }
            Op::RestartBroker { broker } => {
                self.links.retain(|(_, b), _| *b != broker);
                self.brokers[broker] = Replica::new(roots(), Interest::All);
                self.forget(&format!("broker {broker}"));
            }
            Op::RestartMember { member } => {
                self.links.retain(|(m, _), _| *m != member);
                let interest = self.members[member].replica.interest().clone();
                self.members[member].restart(interest);
                self.forget(&format!("member {member}"));
            }
            Op::Interest { member, bits } => self.members[member].replica.set_interest(interest(bits)),
            Op::Renew { member } => {
                let member = &mut self.members[member];
                let serial = member.position.serial + 10;
                member.seeds = vec![**member.key.seed()];
                member.membership = membership(&member.name, serial, &[&member.key]);
                assert_eq!(member.replica.offer_documents(&member.documents()), []);
                // Goes on under the old serial until its next statement, as a controller may.
                member.position = Position { serial, generation: 0, epoch: 1, sequence: 0 };
            }
            Op::Rotate { member } => {
                let member = &mut self.members[member];
                if member.seeds.len() > 15 {
                    return;
                }
                let seed = [100 + member.seeds.len() as u8; 32];
                member.seeds.push(seed);
                let keys: Vec<_> = member.seeds.iter().map(SigningKey::from_seed).collect();
                let refs: Vec<&SigningKey> = keys.iter().collect();
                member.membership = membership(&member.name, member.position.serial, &refs);
                assert_eq!(member.replica.offer_documents(&member.documents()), []);
                member.key = SigningKey::from_seed(&seed);
                member.position.generation += 1;
                member.publish();
            }
        }
    }

    /// Connects everybody and runs until nothing moves.
    fn rest(&mut self) {
        let pairs: Vec<_> = (0..3).flat_map(|m| (0..self.brokers.len()).map(move |b| (m, b))).collect();
        pairs.iter().for_each(|&(m, b)| self.connect(m, b));
        for _ in 0..10_000 {
            let moved = pairs.iter().map(|&(m, b)| self.run(m, b, [2, 2])).collect::<Vec<_>>();
            if !moved.contains(&true) {
                return;
            }
        }
        panic!("the network does not come to rest");
    }

    fn check(&self) {
        let holders = self.brokers.iter().chain(self.members.iter().map(|m| &m.replica));
        for (holder, replica) in holders.enumerate() {
            for origin in &self.members {
                let own = replica.own() == Some(&origin.id());
                let (position, said) = origin.said.last_key_value().unwrap();
                let interest = if own { &Interest::All } else { replica.interest() };
                let (held_position, records) = held(replica, &origin.id()).expect("everybody is known");
                assert_eq!(held_position, *position, "holder {holder} is behind {}", origin.name);
                assert!(records == wanted(said, interest), "holder {holder} differs from {}", origin.name);
                assert!(replica.is_complete(&origin.id()));
            }
            assert_eq!(replica.findings().len(), 0);
        }
        for link in self.links.values() {
            let [_, b] = &link.sessions;
            assert!(b.is_synced(&self.brokers[0]) || self.brokers.len() > 1);
        }
    }
}

/// Member 1 goes on under a newer grant while broker 1 still passes on what it said under the older one.
#[test]
fn what_comes_late_under_an_older_grant_is_no_lie() {
    let run = |to_broker, to_member| Op::Run { member: 1, broker: 1, to_broker, to_member };
    let set = || Op::Set { member: 0, scope: 0, key: 0, value: 0 };
    let mut network = Network::new();
    for op in [
        Op::Connect { member: 1, broker: 1 },
        set(),
        Op::Remove { member: 0, scope: 0, key: 0 },
        Op::Connect { member: 0, broker: 0 },
        run(1, 0),
        Op::Renew { member: 1 },
        run(0, 2),
        run(3, 1),
        set(),
        set(),
        Op::RestartMember { member: 1 },
    ] {
        network.apply(op);
    }
    network.rest();
    network.check();
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn comes_to_rest(ops in prop::collection::vec(op(), 1..120), one_broker in any::<bool>()) {
        let mut network = Network::new();
        if one_broker {
            network.brokers.pop();
        }
        for op in ops {
            let broker = match op {
                Op::Connect { broker, .. } | Op::Drop { broker, .. } | Op::Run { broker, .. }
                | Op::RestartBroker { broker } => broker,
                _ => 0,
            };
            if broker < network.brokers.len() {
                network.apply(op);
            }
        }
        network.rest();
        network.check();
    }
}
