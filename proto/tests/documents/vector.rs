//! The test vectors of `docs/protocol.md` are what the code does.

use std::collections::BTreeMap;
use std::fmt::Write;

use data_encoding::HEXLOWER;
use prost::Message as _;
use tombolo_proto::model::{Namespace, Position, Record, ServiceName};
use tombolo_proto::model::{NodeName, RecordKey, Scope};
use tombolo_proto::testing::*;
use tombolo_proto::trust::{
    Broker, Brokers, Digest, Envelope, Membership, Revocations, RootChain, ScopeDigest, Statement, leaf_hash,
    namespaces_hash, record_hash, root_hash,
};
use tombolo_proto::wire;

const PAGE: &str = include_str!("../../../docs/protocol.md");

/// Lines `name = hex` of the page's blocks marked `vector`.
fn on_the_page() -> BTreeMap<&'static str, &'static str> {
    let mut inside = false;
    let mut found = BTreeMap::new();
    for line in PAGE.lines() {
        match line {
            "```vector" => inside = true,
            "```" => inside = false,
            line if inside => {
                let (name, value) = line.split_once('=').unwrap();
                assert!(found.insert(name.trim(), value.trim()).is_none(), "{name} stands twice");
            }
            _ => {}
        }
    }
    found
}

fn made() -> Vec<(&'static str, String)> {
    let hex = |bytes: &[u8]| HEXLOWER.encode(bytes);
    let mut all: Vec<(&'static str, String)> = Vec::new();
    let mut document = |payload: &'static str, signature: &'static str, envelope: &Envelope| {
        all.push((payload, hex(&envelope.payload)));
        all.push((signature, hex(&envelope.signature)));
    };

    let roots = first_roots().sign(&key(7));
    let chain = RootChain::first(&roots).unwrap();
    document("roots.payload", "roots.signature", &roots);

    let mut grant = grant("oslo", 1, &["10.1.0.0/16", "fd00:1::/48"], key(1).public());
    grant.namespaces = vec!["team-*".parse().unwrap()];
    grant.bind_before = Some(1_800_000_000);
    let grant = grant;
    document("grant.payload", "grant.signature", &grant.sign(&key(7)));

    let first = binding(&grant, 0, key(2).public()).sign(&key(1));
    let second = binding(&grant, 1, key(3).public()).sign(&key(2));
    document("binding0.payload", "binding0.signature", &first);
    document("binding1.payload", "binding1.signature", &second);
    let member = Membership::verify(&chain, &grant.sign(&key(7)), &[first, second]).unwrap();

    let node = NodeName::new("gw-1").unwrap();
    let records: BTreeMap<Scope, Vec<Record>> = BTreeMap::from([
        (Scope::Nodes, vec![Record { key: RecordKey::endpoint(&node), body: b"endpoint".as_slice().into() }]),
        (Scope::Namespace(Namespace::new("team-a").unwrap()), {
            let api = ServiceName::new("api").unwrap();
            vec![
                Record { key: RecordKey::export(&api), body: b"export".as_slice().into() },
                Record { key: RecordKey::backends(&api, 0).unwrap(), body: b"backends".as_slice().into() },
                Record { key: RecordKey::new(9, &["z"]).unwrap(), body: b"unknown".as_slice().into() },
                Record { key: RecordKey::new(9, &["a", "b"]).unwrap(), body: b"".as_slice().into() },
            ]
        }),
    ]);
    let leaves: BTreeMap<Scope, ScopeDigest> =
        records.iter().map(|(scope, list)| (scope.clone(), ScopeDigest::of(list).unwrap())).collect();
    let second_hash = namespaces_hash(&leaves);
    let root = root_hash(leaves.get(&Scope::Nodes), &second_hash);
    let (nodes, team) = (&Scope::Nodes, &Scope::Namespace(Namespace::new("team-a").unwrap()));

    let position = Position { serial: 1, generation: 1, epoch: 1_700_000_100, sequence: 7 };
    let statement = Statement { set: chain.set(), cluster: cluster("oslo"), position, root }.sign(&key(3));
    assert!(member.statement(&statement).is_ok());
    document("statement.payload", "statement.signature", &statement);

    let up_to = [(cluster("bergen"), 2), (cluster("moss"), 9)].into();
    let list = Revocations { set: chain.set(), version: 3, up_to }.sign(&key(8));
    assert!(chain.revocations(&list).is_ok());
    document("revocations.payload", "revocations.signature", &list);

    let broker = |address: &str, seed| Broker { address: address.into(), key: key(seed).public() };
    let brokers = vec![broker("broker.example:4500", 9), broker("[fd00::9]:4500", 10)];
    let list = Brokers { set: chain.set(), version: 1, brokers }.sign(&key(7));
    assert!(chain.brokers(&list).is_ok());
    document("brokers.payload", "brokers.signature", &list);

    let seeds = [("key1", 1), ("key2", 2), ("key3", 3), ("key7", 7), ("key8", 8), ("key9", 9), ("key10", 10)];
    for (name, seed) in seeds {
        all.push((name, hex(&key(seed).public().0)));
    }
    all.push(("set", hex(&chain.set().0)));
    all.push(("grant.envelope", hex(&wire::encode_envelope(member.grant().envelope()).encode_to_vec())));
    let d = |digest: Digest| hex(&digest.0);
    all.push(("tree.record.endpoint", d(record_hash(b"endpoint"))));
    all.push(("tree.digest.nodes", d(leaves[nodes].digest)));
    all.push(("tree.digest.team-a", d(leaves[team].digest)));
    all.push(("tree.leaf.nodes", d(leaf_hash(nodes, &leaves[nodes]))));
    all.push(("tree.leaf.team-a", d(leaf_hash(team, &leaves[team]))));
    all.push(("tree.second", d(second_hash)));
    all.push(("tree.root", d(root)));
    all.push(("tree.root.empty", d(root_hash(None, &namespaces_hash(&BTreeMap::new())))));
    all.push(("invitation.text", invitation("oslo", 3, &["10.1.0.0/16"]).to_text()));
    all
}

#[test]
fn vectors() {
    let page = on_the_page();
    let made = made();
    let mut wrong = String::new();
    for (name, value) in &made {
        if page.get(name) != Some(&value.as_str()) {
            writeln!(wrong, "{name} = {value}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "docs/protocol.md should say:\n{wrong}");
    assert_eq!(page.len(), made.len(), "vectors that nothing checks");
}
