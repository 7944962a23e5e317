use tombolo_agent_core::world::{Reach, Topology};
use tombolo_proto::testing::{self, cluster, first_roots, key, net};
use tombolo_proto::trust::{Broker, Brokers, Grant, RootChain, Roots, ScopeDigest, SigningKey, root_hash};
use tombolo_proto::wire::MembershipParts;

use super::*;

const EMPTY: Digest = Digest([9; 32]);

/// A cluster of the tests' set, and the key that speaks for it.
struct Side {
    grant: Grant,
    key: SigningKey,
}

impl Side {
    fn new(name: &str, serial: u64, owned: &[&str]) -> Self {
        let key = key(u8::try_from(serial).unwrap() + 100);
        Self { grant: testing::grant(name, serial, owned, key.public()), key }
    }

    fn parts(&self) -> MembershipParts {
        let binding = testing::binding(&self.grant, 0, self.key.public()).sign(&self.key);
        MembershipParts { grant: self.grant.sign(&testing::set().0), bindings: vec![binding] }
    }

    fn position(&self, sequence: u64) -> Position {
        Position { serial: self.grant.serial, generation: 0, epoch: 1, sequence }
    }

    /// Its Member after it stated these nodes.
    fn says(&self, sequence: u64, nodes: &[&str]) -> (Member, BTreeMap<RecordKey, Record>) {
        let records: BTreeMap<RecordKey, Record> = nodes.iter().map(|name| record(name, 1)).collect();
        let root = root_hash(ScopeDigest::of(records.values()).as_ref(), &EMPTY);
        let grant = &self.grant;
        let position = self.position(sequence);
        let statement = Statement { set: grant.set, cluster: grant.cluster.clone(), position, root };
        let MembershipParts { grant, bindings } = self.parts();
        let statement = Some(statement.sign(&self.key));
        (Member { grant, bindings, spoken: None, statement, namespaces: Some(EMPTY) }, records)
    }
}

/// A node of this rank.
fn record(name: &str, rank: u8) -> (RecordKey, Record) {
    let key = RecordKey::new(record_kind::ENDPOINT, &[name]).unwrap();
    let endpoint = Endpoint {
        node: name.parse().unwrap(),
        rank: tombolo_proto::model::Rank::new(rank).unwrap(),
        devices: BTreeMap::new(),
        candidates: Vec::new(),
        tunnel_v4: None,
        tunnel_v6: None,
        prefixes: BTreeSet::new(),
        mesh: false,
    };
    let body = tombolo_proto::wire::encode_endpoint(&endpoint).into();
    (key.clone(), Record { key, body })
}

fn eu() -> Side {
    Side::new("eu", 1, &["10.1.0.0/16"])
}

fn us() -> Side {
    Side::new("us", 2, &["10.2.0.0/16"])
}

/// Cluster eu, which knows us.
fn observed() -> Observed {
    let mut observed = Observed {
        clusterset: Known::Yes(Some(ClusterSet {
            set: testing::set().1.set(),
            cluster: cluster("eu"),
            roots: vec![first_roots().sign(&key(7))],
            brokers: None,
            revocations: None,
            reach: Reach::Exports,
            topology: Topology::Gateway,
            clusterset: None,
            reserved: BTreeSet::new(),
            rotations: BTreeMap::new(),
            leaving: false,
        })),
        members: Known::Yes(BTreeMap::new()),
        member_nodes: Known::Yes(BTreeMap::new()),
        nodes: Known::Yes(BTreeMap::new()),
        imports: Known::Yes([].into()),
        slices: Known::Yes([].into()),
        ..Observed::default()
    };
    put(&mut observed, "eu", eu().says(1, &["n1"]));
    put(&mut observed, "us", us().says(1, &["u1", "u2"]));
    observed
}

fn yes<T>(known: &mut Known<T>) -> &mut T {
    match known {
        Known::Yes(value) => value,
        Known::No => panic!("it is known"),
    }
}

fn put(observed: &mut Observed, name: &str, (member, records): (Member, BTreeMap<RecordKey, Record>)) {
    yes(&mut observed.members).insert(cluster(name), member);
    yes(&mut observed.member_nodes).insert(cluster(name), records);
}

fn set(observed: &mut Observed) -> &mut ClusterSet {
    yes(&mut observed.clusterset).as_mut().unwrap()
}

fn revoke(observed: &mut Observed, name: &str, up_to: u64) {
    let list =
        Revocations { set: testing::set().1.set(), version: up_to, up_to: [(cluster(name), up_to)].into() };
    set(observed).revocations = Some(list.sign(&key(7)));
}

fn verify(verifier: &mut Verifier, observed: &Observed) -> (Members, Vec<&'static str>) {
    let Known::Yes(members) = verifier.verify(observed) else { panic!("unknown") };
    let reasons = members.findings.iter().map(|f| f.reason).collect();
    (Members::clone(&members), reasons)
}

fn names(members: &Members, name: &str) -> Vec<String> {
    members.nodes[&cluster(name)].nodes.keys().map(ToString::to_string).collect()
}

fn spoil(envelope: &mut Envelope) {
    let mut bytes = envelope.payload.to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    envelope.payload = bytes.into();
}

#[test]
fn a_damaged_root_tears_nothing_down() {
    let mut verifier = Verifier::default();
    let (before, reasons) = verify(&mut verifier, &observed());
    assert!(before.usable && reasons.is_empty(), "{reasons:?}");
    let mut damaged = observed();
    spoil(&mut set(&mut damaged).roots[0]);
    let (after, reasons) = verify(&mut verifier, &damaged);
    assert_eq!(reasons, ["RootsInvalid"]);
    assert!(after.usable && after.nodes == before.nodes);
    // A node that has only just started knows nothing, which is not the same as knowing that there is nobody.
    assert!(!verify(&mut Verifier::default(), &damaged).0.usable);
}

#[test]
fn a_member_that_does_not_read_or_verify_stays() {
    let mut verifier = Verifier::default();
    let (before, _) = verify(&mut verifier, &observed());
    for name in ["eu", "us"] {
        let mut gone = observed();
        yes(&mut gone.members).remove(&cluster(name));
        let (after, _) = verify(&mut verifier, &gone);
        assert!(after.usable && after.nodes == before.nodes);
        let mut damaged = observed();
        spoil(&mut yes(&mut damaged.members).get_mut(&cluster(name)).unwrap().grant);
        let (after, reasons) = verify(&mut verifier, &damaged);
        assert!(after.usable && after.nodes == before.nodes);
        assert_eq!(reasons, ["MemberInvalid"]);
    }
    let mut gone = observed();
    yes(&mut gone.members).remove(&cluster("eu"));
    let (fresh, reasons) = verify(&mut Verifier::default(), &gone);
    assert!(!fresh.usable && reasons == ["NotAMember"]);
}

#[test]
fn only_a_revocation_takes_a_member_away() {
    let mut verifier = Verifier::default();
    verify(&mut verifier, &observed());
    let mut now = observed();
    revoke(&mut now, "us", 2);
    let (after, reasons) = verify(&mut verifier, &now);
    assert!(after.usable && !after.nodes.contains_key(&cluster("us")));
    assert_eq!(reasons, ["Revoked"]);
    // A list that is lost again changes nothing.
    let (after, _) = verify(&mut verifier, &observed());
    assert!(!after.nodes.contains_key(&cluster("us")));
    // The own one: that is known, and acted upon, also when its Member is gone then.
    revoke(&mut now, "eu", 3);
    let (after, _) = verify(&mut verifier, &now);
    assert!(after.usable && !after.nodes.contains_key(&cluster("eu")));
    yes(&mut now.members).remove(&cluster("eu"));
    assert!(verify(&mut verifier, &now).0.usable);
    assert!(
        verify(&mut Verifier::default(), &{
            let mut now = observed();
            revoke(&mut now, "eu", 1);
            now
        })
        .0
        .usable
    );
}

#[test]
fn what_a_removed_root_signed_is_no_membership_any_more() {
    let mut verifier = Verifier::default();
    verify(&mut verifier, &observed());
    let mut now = observed();
    let first = set(&mut now).roots[0].clone();
    let previous = ring::digest::digest(&ring::digest::SHA256, &first.payload);
    let second = Roots {
        version: 2,
        keys: vec![key(8).public()],
        previous: Some(previous.as_ref().try_into().unwrap()),
        ..first_roots()
    };
    set(&mut now).roots.push(second.sign(&key(8)));
    assert!(RootChain::pinned(set(&mut now).set, &set(&mut now).roots.clone()).is_ok());
    let (after, _) = verify(&mut verifier, &now);
    assert!(!after.nodes.contains_key(&cluster("us")));
    assert!(!after.usable, "nobody said that the own one ended: nothing changes");
}

#[test]
fn own_ranges_do_not_shrink_while_nodes_are_unknown() {
    let mut observed = observed();
    let address = "10.2.0.7";
    let node = Node {
        gateway: false,
        ready: true,
        pod_cidrs: BTreeSet::new(),
        addresses: vec![address.parse().unwrap()],
    };
    yes(&mut observed.nodes).insert("n1".parse().unwrap(), node);
    let mut verifier = Verifier::default();
    let (first, reasons) = verify(&mut verifier, &observed);
    assert_eq!(reasons, ["RangeIsOurs"]);
    observed.nodes = Known::No;
    put(&mut observed, "us", us().says(2, &["u1"]));
    assert!(verify(&mut verifier, &observed).0.nodes == first.nodes);
    assert!(!Verifier::default().verify(&observed).is_known());
    // The same for addresses that only the kernel knows, and for brokers.
    observed.nodes = Known::Yes(BTreeMap::new());
    let mut verifier = Verifier::default();
    verifier.set_addresses(&[address.parse().unwrap()]);
    assert_eq!(verify(&mut verifier, &observed).1, ["RangeIsOurs"]);
    let broker = Broker { address: format!("{address}:4500"), key: key(9).public() };
    let brokers = Brokers { set: testing::set().1.set(), version: 1, brokers: vec![broker] };
    set(&mut observed).brokers = Some(brokers.sign(&key(7)));
    assert_eq!(verify(&mut Verifier::default(), &observed).1, ["RangeIsOurs"]);
}

#[test]
fn a_statement_stands_under_the_older_grant_and_is_judged_by_the_newer() {
    let mut observed = observed();
    let newer = Side::new("us", 5, &["10.2.0.0/16", "10.5.0.0/16"]);
    let (mut member, records) = us().says(3, &["u1"]);
    member.spoken = Some(us().parts());
    let MembershipParts { grant, bindings } = newer.parts();
    (member.grant, member.bindings) = (grant, bindings);
    put(&mut observed, "us", (member, records));
    let mut verifier = Verifier::default();
    let (members, reasons) = verify(&mut verifier, &observed);
    assert!(reasons.is_empty(), "{reasons:?}");
    let us_ = &members.nodes[&cluster("us")];
    assert_eq!((us_.serial, us_.owned.contains(&net("10.5.0.0/16"))), (5, true));
    assert_eq!(names(&members, "us"), ["u1"]);
    // Then it speaks under the newer one, and the older one is heard no more.
    put(&mut observed, "us", newer.says(1, &["u9"]));
    assert_eq!(names(&verify(&mut verifier, &observed).0, "us"), ["u9"]);
    put(&mut observed, "us", us().says(9, &["u1"]));
    let (members, reasons) = verify(&mut verifier, &observed);
    assert_eq!((names(&members, "us"), reasons), (vec!["u9".to_owned()], vec!["StatementStale"]));
}

#[test]
fn of_two_statements_at_one_position_the_first_stays() {
    let mut observed = observed();
    let mut verifier = Verifier::default();
    verify(&mut verifier, &observed);
    put(&mut observed, "us", us().says(1, &["evil"]));
    let (members, reasons) = verify(&mut verifier, &observed);
    assert_eq!(reasons, ["Equivocation"]);
    assert_eq!(names(&members, "us"), ["u1", "u2"]);
}

#[test]
fn another_set_begins_anew() {
    let mut verifier = Verifier::default();
    verify(&mut verifier, &observed());
    let mut other = observed();
    set(&mut other).set = SetId([1; 16]);
    let (members, _) = verify(&mut verifier, &other);
    assert!(members.nodes.is_empty() && !members.usable);
}

#[test]
fn only_what_is_good_is_cached() {
    let mut verifier = Verifier::default();
    verify(&mut verifier, &observed());
    let mut damaged = observed();
    spoil(&mut set(&mut damaged).roots[0]);
    spoil(&mut yes(&mut damaged.members).get_mut(&cluster("us")).unwrap().grant);
    put(&mut damaged, "eu", eu().says(2, &["n1", "n2"]));
    verify(&mut verifier, &damaged);
    let kept = verifier.good(&damaged).unwrap();
    let mut expected = observed();
    put(&mut expected, "eu", eu().says(2, &["n1", "n2"]));
    assert_eq!((&kept.clusterset, &kept.members), (&expected.clusterset, &expected.members));
    assert_eq!(kept.member_nodes, expected.member_nodes);
    // And a node that starts from it stays as it was, whatever the API says meanwhile.
    let mut fresh = Verifier::default();
    fresh.verify(&kept);
    let (members, _) = verify(&mut fresh, &damaged);
    assert!(members.usable && members.nodes.len() == 2);
}

#[test]
fn own_plain_nodes_stand_beside_the_statement_and_nobody_elses_do() {
    let mut verifier = Verifier::default();
    let mut observed = observed();
    for name in ["w1", "w2"] {
        yes(&mut observed.member_nodes).get_mut(&cluster("eu")).unwrap().extend([record(name, 0)]);
    }
    let (members, reasons) = verify(&mut verifier, &observed);
    assert!(reasons.is_empty(), "{reasons:?}");
    assert_eq!(names(&members, "eu"), ["n1", "w1", "w2"]);
    // They come and go without a new statement.
    let own = yes(&mut observed.member_nodes).get_mut(&cluster("eu")).unwrap();
    own.remove(&record("w1", 0).0);
    own.extend([record("w3", 0)]);
    let (members, _) = verify(&mut verifier, &observed);
    assert_eq!(names(&members, "eu"), ["n1", "w2", "w3"]);
    // A gateway must be stated, and another cluster's plain node too.
    for (of, rank) in [("eu", 2), ("us", 0), ("us", 2)] {
        let mut bad = observed.clone();
        yes(&mut bad.member_nodes).get_mut(&cluster(of)).unwrap().extend([record("x", rank)]);
        let (members, reasons) = verify(&mut verifier, &bad);
        assert_eq!(reasons, ["StatementInvalid"], "{of} {rank}");
        assert_eq!(members.nodes[&cluster("us")].nodes.len(), 2);
        assert_eq!(names(&members, "eu"), ["n1", "w2", "w3"]);
    }
}
