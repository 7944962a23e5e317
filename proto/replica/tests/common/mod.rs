//! A set of members and brokers in memory, with links that carry encoded messages.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message as _;
use tombolo_proto::model::{ClusterId, Namespace, Position, Record, RecordKey, Scope, SetName};
use tombolo_proto::pb;
use tombolo_proto::trust::{
    Binding, Broker, Brokers, Envelope, Grant, Membership, Revocations, RootChain, Roots, SigningKey,
};
use tombolo_proto::wire::{self, Documents, MembershipParts};
use tombolo_replica::{Interest, Introduction, LocalOrigin, Replica, Session, SessionError};

pub type Records = BTreeMap<Scope, BTreeMap<RecordKey, Record>>;

pub fn root() -> SigningKey {
    SigningKey::from_seed(&[7; 32])
}

pub fn roots() -> RootChain {
    let root = root();
    let name = SetName::new("harbour").unwrap();
    let roots = Roots { version: 1, name, keys: vec![root.public()], previous: None };
    RootChain::first(&roots.sign(&root)).unwrap()
}

pub fn cluster(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

pub fn scope(index: u8) -> Scope {
    match index {
        0 => Scope::Nodes,
        n => Scope::Namespace(Namespace::new(&format!("ns-{n}")).unwrap()),
    }
}

pub fn interest(bits: u8) -> Interest {
    let wanted = (1..4).filter(|n| bits & (1 << n) != 0);
    Interest::Namespaces(wanted.map(|n| Namespace::new(&format!("ns-{n}")).unwrap()).collect())
}

pub fn record(key: u16, value: u8, size: usize) -> Record {
    let mut body = vec![value; size];
    body.extend(key.to_be_bytes());
    Record { key: RecordKey::new(2, &[&format!("k{key}")]).unwrap(), body: body.into() }
}

pub fn parts(membership: &Membership) -> MembershipParts {
    MembershipParts {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
    }
}

pub fn membership(name: &str, serial: u64, keys: &[&SigningKey]) -> Membership {
    let chain = roots();
    let grant = Grant {
        set: chain.set(),
        cluster: cluster(name),
        serial,
        member_since: 1_700_000_000,
        owned: BTreeSet::new(),
        tunnel: BTreeSet::new(),
        namespaces: Vec::new(),
        subject: keys[0].public(),
        bind_before: None,
    };
    let mut signer = keys[0];
    let mut bindings = Vec::new();
    for (generation, key) in (0..).zip(keys) {
        let binding =
            Binding { set: chain.set(), cluster: cluster(name), serial, generation, key: key.public() };
        bindings.push(binding.sign(signer));
        signer = key;
    }
    Membership::verify(&chain, &grant.sign(&root()), &bindings).unwrap()
}

pub fn revocations(version: u64, entries: &[(&str, u64)]) -> Envelope {
    let up_to = entries.iter().map(|&(name, serial)| (cluster(name), serial)).collect();
    Revocations { set: roots().set(), version, up_to }.sign(&root())
}

pub fn brokers(version: u64) -> Envelope {
    let broker = Broker { address: "broker.example:4500".into(), key: root().public() };
    Brokers { set: roots().set(), version, brokers: vec![broker] }.sign(&root())
}

/// A member: what it says, and the replica it holds.
pub struct Member {
    pub name: String,
    pub key: SigningKey,
    pub seeds: Vec<[u8; 32]>,
    pub membership: Membership,
    pub local: LocalOrigin,
    pub records: Records,
    pub position: Position,
    pub replica: Replica,
    /// Everything it ever said.
    pub said: BTreeMap<Position, Records>,
}

impl Member {
    pub fn new(name: &str, serial: u64) -> Self {
        let key = SigningKey::from_seed(&[serial as u8; 32]);
        let membership = membership(name, serial, &[&key]);
        let mut member = Self {
            name: name.to_owned(),
            local: LocalOrigin::new(roots().set(), cluster(name)),
            records: Records::new(),
            position: Position { serial, generation: 0, epoch: 1, sequence: 0 },
            replica: Replica::new(roots(), interest(0)),
            said: BTreeMap::new(),
            seeds: vec![**key.seed()],
            key,
            membership,
        };
        member.restart(interest(0b110));
        member
    }

    pub fn id(&self) -> ClusterId {
        cluster(&self.name)
    }

    pub fn documents(&self) -> Documents {
        Documents { memberships: vec![parts(&self.membership)], ..Documents::default() }
    }

    /// Forgets all it heard and takes the lead anew.
    pub fn restart(&mut self, interest: Interest) {
        let seen = self.replica.own_seen().map_or(0, |seen| seen.epoch);
        self.position.epoch = self.position.epoch.max(seen) + 1;
        self.position.sequence = 0;
        self.replica = Replica::new(roots(), interest).with_own(self.id());
        assert_eq!(self.replica.offer_documents(&self.documents()), []);
        self.publish();
    }

    pub fn publish(&mut self) {
        self.position.sequence += 1;
        self.local.set_records(&self.records);
        self.replica.publish(self.local.sign(&self.key, self.position)).unwrap();
        let mut said = self.records.clone();
        said.retain(|_, records| !records.is_empty());
        self.said.insert(self.position, said);
    }

    pub fn set(&mut self, scope: Scope, record: Record) {
        self.records.entry(scope).or_default().insert(record.key.clone(), record);
    }

    pub fn introduction(&self) -> Introduction {
        Introduction { membership: Some(parts(&self.membership)), ..Introduction::default() }
    }
}

/// Two sessions and what is on the way between them, encoded.
pub struct Link {
    pub sessions: [Session; 2],
    pub wires: [VecDeque<Vec<u8>>; 2],
}

pub const CAPACITY: usize = 2;

impl Link {
    pub fn new(a: Introduction, b: Introduction) -> Self {
        Self { sessions: [Session::new(a), Session::new(b)], wires: Default::default() }
    }

    /// Side `from` puts a message on its wire, if there is room and anything to say.
    pub fn transmit(&mut self, from: usize, replica: &Replica) -> bool {
        if self.wires[from].len() >= CAPACITY {
            return false;
        }
        let Some(message) = self.sessions[from].poll_transmit(replica) else { return false };
        let bytes = wire::encode_message(&message).encode_to_vec();
        assert!(bytes.len() < 4 * 1024 * 1024, "{} bytes", bytes.len());
        self.wires[from].push_back(bytes);
        true
    }

    /// Side `to` takes a message off the other's wire.
    pub fn receive(&mut self, to: usize, replica: &mut Replica) -> Result<bool, SessionError> {
        let Some(bytes) = self.wires[1 - to].pop_front() else { return Ok(false) };
        self.handle(to, replica, &bytes).map(|()| true)
    }

    pub fn handle(&mut self, to: usize, replica: &mut Replica, bytes: &[u8]) -> Result<(), SessionError> {
        let broken = SessionError::Order("unreadable");
        let message = pb::Message::decode(bytes).map_err(|_| broken.clone())?;
        match wire::decode_message(&message).map_err(|_| broken)? {
            Some(message) => self.sessions[to].handle_message(replica, message),
            None => Ok(()),
        }
    }
}

/// What a replica holds of an origin, in the form of [`Member::said`].
pub fn held(replica: &Replica, origin: &ClusterId) -> Option<(Position, Records)> {
    let state = replica.origin(origin)?;
    let scopes = state.scopes().iter().map(|(scope, records)| {
        let record = |(key, body): (&RecordKey, &std::sync::Arc<[u8]>)| {
            (key.clone(), Record { key: key.clone(), body: body.clone() })
        };
        (scope.clone(), records.iter().map(record).collect())
    });
    Some((state.position(), scopes.collect()))
}

/// What of `records` one with this interest should hold.
pub fn wanted(records: &Records, interest: &Interest) -> Records {
    records.iter().filter(|(scope, _)| interest.wants(scope)).map(|(s, r)| (s.clone(), r.clone())).collect()
}
