//! What is encoded is read back the same, and arbitrary bytes are read as something valid or refused.

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message as _;
use tombolo_proto::model::{NodeName, Prefer, Preference, Record, RecordKey, Scope, ServiceName, Subject};
use tombolo_proto::testing::*;
use tombolo_proto::trust::{Context, Envelope, Grant, Revocations, Roots};
use tombolo_proto::{pb, wire};

proptest! {
    #[test]
    fn documents(
        roots in any_roots(), grant in any_grant(), binding in any_binding(), statement in any_statement(),
        revocations in any_revocations(), brokers in any_brokers(),
    ) {
        prop_assert_eq!(wire::decode_roots(&wire::encode_roots(&roots)), Ok(roots));
        prop_assert_eq!(wire::decode_grant(&wire::encode_grant(&grant)), Ok(grant));
        prop_assert_eq!(wire::decode_binding(&wire::encode_binding(&binding)), Ok(binding));
        prop_assert_eq!(wire::decode_statement(&wire::encode_statement(&statement)), Ok(statement));
        prop_assert_eq!(wire::decode_revocations(&wire::encode_revocations(&revocations)), Ok(revocations));
        prop_assert_eq!(wire::decode_brokers(&wire::encode_brokers(&brokers)), Ok(brokers));
    }

    #[test]
    fn records(endpoint in any_endpoint(), export in any_export(), backends in any_backends()) {
        let node = endpoint.node.clone();
        prop_assert_eq!(wire::decode_endpoint(node, &wire::encode_endpoint(&endpoint)), Ok(endpoint));
        prop_assert_eq!(wire::decode_export(&wire::encode_export(&export)), Ok(export));
        prop_assert_eq!(wire::decode_backends(&wire::encode_backends(&backends)), Ok(backends));
    }

    #[test]
    fn envelopes_and_messages(envelope in any_envelope(), message in any_message()) {
        let bytes = wire::encode_envelope(&envelope).encode_to_vec();
        let back = pb::Envelope::decode(&*bytes).unwrap();
        prop_assert_eq!(wire::decode_envelope(&back), Ok(envelope));
        let bytes = wire::encode_message(&message).encode_to_vec();
        let back = pb::Message::decode(&*bytes).unwrap();
        prop_assert_eq!(wire::decode_message(&back), Ok(Some(message)));
    }

    /// Nothing here may panic; what is read must be within its bounds and read back the same.
    #[test]
    fn arbitrary_bytes(bytes in vec(any::<u8>(), 0..200)) {
        read_all(&bytes);
    }

    #[test]
    fn keys_have_one_spelling(service in any_service(), shard in any::<u32>(), node in any_node(), text in "[!-~]{1,5}") {
        let scope = Scope::Namespace(tombolo_proto::model::Namespace::new("default").unwrap());
        let export = RecordKey::export(&service);
        prop_assert_eq!(export.subject(&scope), Some(Subject::Export(service.clone())));
        prop_assert_eq!(export.subject(&Scope::Nodes), None);
        let endpoint = RecordKey::endpoint(&node);
        prop_assert_eq!(endpoint.subject(&Scope::Nodes), Some(Subject::Endpoint(node)));
        prop_assert_eq!(endpoint.subject(&scope), None);
        match RecordKey::backends(&service, shard % 2048) {
            Some(key) => prop_assert_eq!(key.subject(&scope), Some(Subject::Backends(service.clone(), shard % 2048))),
            None => prop_assert!(shard % 2048 >= 1024),
        }
        let key = RecordKey::new(3, &[service.as_str(), &text]).unwrap();
        if let Some(Subject::Backends(service, shard)) = key.subject(&scope) {
            prop_assert_eq!(RecordKey::backends(&service, shard), Some(key));
        }
    }
}

fn read_all(bytes: &[u8]) {
    if let Ok(roots) = wire::decode_roots(bytes) {
        assert!((1..=Roots::MAX_KEYS).contains(&roots.keys.len()) && roots.keys.iter().all(|k| k.is_sound()));
        assert_eq!(wire::decode_roots(&wire::encode_roots(&roots)), Ok(roots));
    }
    if let Ok(grant) = wire::decode_grant(bytes) {
        assert!(grant.ranges().count() <= 2 * Grant::MAX_PREFIXES);
        assert_eq!(wire::decode_grant(&wire::encode_grant(&grant)), Ok(grant));
    }
    let _ = (wire::decode_binding(bytes).is_ok(), wire::decode_statement(bytes).is_ok());
    let _ = (wire::decode_revocations(bytes).is_ok(), wire::decode_brokers(bytes).is_ok());
    let _ = (wire::decode_export(bytes).is_ok(), wire::decode_backends(bytes).is_ok());
    let _ = wire::decode_endpoint(NodeName::new("n").unwrap(), bytes).is_ok();
    let _ = wire::decode_invitation(bytes).is_ok();
    if let Ok(message) = pb::Message::decode(bytes)
        && let Ok(Some(message)) = wire::decode_message(&message)
    {
        assert_eq!(wire::decode_message(&wire::encode_message(&message)), Ok(Some(message)));
    }
}

#[test]
fn other_spellings_of_a_shard_are_no_keys() {
    let scope = Scope::Namespace(tombolo_proto::model::Namespace::new("default").unwrap());
    for text in ["01", "+1", "-1", "1024", "99999999999", "x"] {
        assert_eq!(RecordKey::new(3, &["api", text]).unwrap().subject(&scope), None, "{text}");
    }
    assert_eq!(RecordKey::new(2, &["Api"]).unwrap().subject(&scope), None);
    assert_eq!(RecordKey::new(9, &["Api"]).unwrap().subject(&scope), Some(Subject::Unknown(9)));
    let api = ServiceName::new("api").unwrap();
    assert_eq!(RecordKey::new(3, &["api", "1"]), RecordKey::backends(&api, 1));
}

/// Every list at its bound still fits its envelope; one more is refused.
#[test]
fn bounds() {
    let long = |n: usize| format!("{n:0>63}");
    let mut list = Revocations { set: set().1.set(), version: u64::MAX, up_to: Default::default() };
    for n in 0..Revocations::MAX_ENTRIES {
        list.up_to.insert(cluster(&long(n)), u64::MAX);
    }
    let fits = |e: &Envelope| wire::decode_envelope(&wire::encode_envelope(e)).is_ok();
    let envelope = list.sign(&key(7));
    assert!(fits(&envelope) && set().1.revocations(&envelope).is_ok());
    list.up_to.insert(cluster(&long(5000)), 1);
    assert!(set().1.revocations(&list.sign(&key(7))).is_err());

    let mut grant = grant(&long(1), u64::MAX, &[], key(1).public());
    grant.tunnel.clear();
    for n in 0..64_u128 {
        let v6 = |head: u128| {
            let address = std::net::Ipv6Addr::from(head << 112 | n << 1);
            tombolo_proto::model::Prefix::new(ipnet::IpNet::new(address.into(), 127).unwrap()).unwrap()
        };
        grant.owned.insert(v6(0xfd01));
        grant.tunnel.insert(v6(0xfd02));
    }
    for n in 0..Grant::MAX_PATTERNS {
        grant.namespaces.push(tombolo_proto::model::NamespacePattern::new(&long(n)).unwrap());
    }
    let envelope = grant.sign(&key(7));
    assert!(fits(&envelope) && set().1.grant(&envelope).is_ok());
    grant.namespaces.push(tombolo_proto::model::NamespacePattern::new("*").unwrap());
    assert!(set().1.grant(&grant.sign(&key(7))).is_err());

    for context in CONTEXTS {
        let long =
            Envelope { context, payload: vec![0; context.max_payload() + 1].into(), signature: [0; 64] };
        assert!(!fits(&long), "{}", context.name());
    }
    assert!(CONTEXTS.iter().all(|c| c.max_payload() <= Envelope::MAX_PAYLOAD));
    assert!(Context::Binding.max_payload() * 256 < 512 * 1024);

    let record = |body: usize| pb::Chunk {
        origin: "a".into(),
        scope: Some(pb::Scope { kind: 1, name: String::new() }),
        records: vec![pb::Record {
            key: Some(pb::RecordKey { kind: 1, name: vec!["n".into()] }),
            body: vec![0; body].into(),
        }],
        ..Default::default()
    };
    let read = |c| wire::decode_message(&pb::Message { kind: Some(pb::message::Kind::Chunk(c)) });
    assert!(read(record(Record::MAX_BODY)).is_ok());
    assert!(read(record(Record::MAX_BODY + 1)).is_err());
}

/// A message of a kind that this version does not know is passed over, and so are fields it does not know.
#[test]
fn what_a_newer_version_adds() {
    let unknown = [15 << 3 | 2, 3, 1, 2, 3];
    let message = pb::Message::decode(&unknown[..]).unwrap();
    assert_eq!(wire::decode_message(&message), Ok(None));

    let (root, roots) = set();
    let mut payload = wire::encode_grant(&grant("oslo", 1, &["10.1.0.0/16"], key(1).public()));
    payload.extend(unknown);
    let envelope = root.sign(Context::Grant, payload.clone());
    let taken = roots.grant(&envelope).unwrap();
    assert_eq!(&*taken.envelope().payload, &*payload, "passed on byte for byte");
}

#[test]
fn preferences_never_cost_an_export() {
    let mut export = pb::Export { r#type: 1, families: vec![1], ..Default::default() };
    let bytes = export.encode_to_vec();
    let read = wire::decode_export(&bytes).unwrap();
    assert_eq!(read.preference, Preference::default());
    assert_eq!(wire::encode_export(&read), bytes, "who prefers nothing states what it always did");
    (export.prefer, export.priority, export.weight) = (99, 1000, 70_000);
    let read = wire::decode_export(&export.encode_to_vec()).unwrap().preference;
    assert_eq!((read.prefer, read.share.priority.get(), read.share.weight.get()), (None, 100, 100));
    (export.prefer, export.priority, export.weight) = (1, 7, 3);
    let read = wire::decode_export(&export.encode_to_vec()).unwrap().preference;
    assert_eq!(
        (read.prefer, read.share.priority.get(), read.share.weight.get()),
        (Some(Prefer::Local), 7, 3)
    );
}

#[test]
fn texts_and_lists_of_records() {
    let mut export = pb::Export { r#type: 1, families: vec![1], ..Default::default() };
    let read = |e: &pb::Export| wire::decode_export(&e.encode_to_vec());
    assert!(read(&export).is_ok());
    let port =
        |name: &str, port| pb::Port { name: name.into(), protocol: 1, port, app_protocol: String::new() };
    for bad in [
        vec![port("a", 1), port("a", 2)],
        vec![port("a", 1), port("b", 1)],
        vec![port("", 1), port("b", 2)],
        vec![port("a", 0)],
        vec![port("a", 65536)],
        vec![port("A", 1)],
    ] {
        export.ports = bad;
        assert!(read(&export).is_err(), "{:?}", export.ports);
    }
    export.ports = vec![port("a", 1), port("b", 2)];
    assert!(read(&export).is_ok());
    for (app_protocol, good) in [("kubernetes.io/h2c", true), ("http", true), ("a b", false), ("/x", false)] {
        export.ports[0].app_protocol = app_protocol.into();
        assert_eq!(read(&export).is_ok(), good, "{app_protocol}");
    }
    export.ports[0].app_protocol.clear();
    export.annotations.insert("a".into(), "x\ny".into());
    assert!(read(&export).is_err());
    export.annotations.clear();
    export.families = vec![1, 1];
    assert!(read(&export).is_err());

    let hello = |version: &str| pb::Message {
        kind: Some(pb::message::Kind::Hello(pb::Hello {
            set: vec![0; 16].into(),
            version: version.into(),
            ..Default::default()
        })),
    };
    assert!(wire::decode_message(&hello("0.1.0")).is_ok());
    assert!(wire::decode_message(&hello("0.1\n")).is_err());

    let brokers = |address: &str| {
        let broker = pb::Broker { address: address.into(), key: key(1).public().0.to_vec().into() };
        let list = pb::Brokers { set: vec![0; 16].into(), version: 1, brokers: vec![broker] };
        wire::decode_brokers(&list.encode_to_vec()).is_ok()
    };
    for good in ["broker.example:4500", "10.0.0.1:1", "[fd00::1]:65535"] {
        assert!(brokers(good), "{good}");
    }
    for bad in [
        "",
        ":1",
        "a",
        "a:0",
        "a:65536",
        "a:+1",
        "fd00::1:1",
        "[x]:1",
        "[::1:1",
        "a b:1",
        "a/b:1",
        "[fe80::1%eth0]:1",
    ] {
        assert!(!brokers(bad), "{bad}");
    }
}
