//! For tests, here and in the rooms that build on this one: a set with everything signed, and proptest
//! strategies for every model type and document. Behind feature `testing`, which no program enables.
#![allow(clippy::unwrap_used)]

pub mod readers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;

use ipnet::IpNet;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use crate::model::{
    Backend, BackendGroup, Backends, ClusterId, Device, DeviceNumber, Endpoint, Export, Family, Hostname,
    Namespace, NamespacePattern, NodeName, Port, PortName, Position, Prefer, Preference, Prefix, Priority,
    Protocol, Rank, Record, RecordKey, Scope, ServiceName, ServiceType, SetName, Share, Weight, WireguardKey,
    usable_address,
};
use crate::trust::{
    Binding, Broker, Brokers, Context, Digest, Envelope, Grant, Invitation, Membership, PublicKey,
    Revocations, RootChain, Roots, ScopeDigest, SetId, SigningKey, Statement,
};
use crate::wire::{Alarm, Chunk, Documents, Have, Hello, MembershipParts, Message, ScopeDelta, Update, Want};

/// The key of a seed of equal bytes.
pub fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

/// A cluster's id.
pub fn cluster(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

/// A prefix.
pub fn net(text: &str) -> Prefix {
    text.parse().unwrap()
}

/// The set `harbour`, whose two root keys are [`key`] 7 and 8. Gives the first, which signs.
pub fn set() -> (SigningKey, RootChain) {
    let root = key(7);
    let chain = RootChain::first(&first_roots().sign(&root)).unwrap();
    (root, chain)
}

/// The first roots of [`set`].
pub fn first_roots() -> Roots {
    let keys = vec![key(7).public(), key(8).public()];
    Roots { version: 1, name: SetName::new("harbour").unwrap(), keys, previous: None }
}

/// A grant of [`set`], not yet signed; its tunnel range is 198.18.(serial mod 256).0/24.
pub fn grant(cluster_name: &str, serial: u64, owned: &[&str], subject: PublicKey) -> Grant {
    Grant {
        set: set().1.set(),
        cluster: cluster(cluster_name),
        serial,
        member_since: serial.saturating_add(1_700_000_000),
        owned: owned.iter().map(|p| net(p)).collect(),
        tunnel: BTreeSet::from([net(&format!("198.18.{}.0/24", serial % 256))]),
        namespaces: Vec::new(),
        subject,
        bind_before: None,
    }
}

/// A binding that fits a grant, not yet signed.
pub fn binding(grant: &Grant, generation: u32, key: PublicKey) -> Binding {
    Binding { set: grant.set, cluster: grant.cluster.clone(), serial: grant.serial, generation, key }
}

/// A membership in [`set`] with one binding, and the key that speaks for the cluster.
pub fn membership(cluster_name: &str, serial: u64, owned: &[&str]) -> (Membership, SigningKey) {
    let (root, roots) = set();
    let mut seed = [0xa5; 32];
    seed[..8].copy_from_slice(&serial.to_be_bytes());
    let speaks = SigningKey::from_seed(&seed);
    let grant = grant(cluster_name, serial, owned, speaks.public());
    let first = binding(&grant, 0, speaks.public()).sign(&speaks);
    (Membership::verify(&roots, &grant.sign(&root), &[first]).unwrap(), speaks)
}

/// A statement under a membership, signed by `key`.
pub fn statement(
    membership: &Membership,
    epoch: u64,
    sequence: u64,
    root: Digest,
    key: &SigningKey,
) -> Envelope {
    let generation = u32::try_from(membership.bindings().len() - 1).unwrap();
    let grant = membership.grant();
    let position = Position { serial: grant.serial, generation, epoch, sequence };
    Statement { set: grant.set, cluster: grant.cluster.clone(), position, root }.sign(key)
}

/// An invitation into [`set`] with a one-use key ([`key`] of the serial).
pub fn invitation(cluster_name: &str, serial: u64, owned: &[&str]) -> Invitation {
    let (root, roots) = set();
    let invite = key(serial as u8);
    let grant = grant(cluster_name, serial, owned, invite.public()).sign(&root);
    let brokers = vec![Broker { address: "broker.example:4500".into(), key: key(9).public() }];
    let brokers = Brokers { set: roots.set(), version: 1, brokers }.sign(&root);
    let (brokers, grant) = (roots.brokers(&brokers).unwrap(), roots.grant(&grant).unwrap());
    Invitation { roots, brokers, grant, invite_key: Some(invite) }
}

const LABEL: &str = "[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?";

/// Any cluster id.
pub fn any_cluster() -> impl Strategy<Value = ClusterId> {
    LABEL.prop_map(|t| ClusterId::new(&t).unwrap())
}

/// Any namespace.
pub fn any_namespace() -> impl Strategy<Value = Namespace> {
    LABEL.prop_map(|t| Namespace::new(&t).unwrap())
}

/// Any namespace pattern.
pub fn any_pattern() -> impl Strategy<Value = NamespacePattern> {
    prop_oneof![LABEL.boxed(), "[a-z0-9][a-z0-9-]{0,9}\\*".boxed(), Just("*".to_owned()).boxed()]
        .prop_map(|t| NamespacePattern::new(&t).unwrap())
}

/// Any service name.
pub fn any_service() -> impl Strategy<Value = ServiceName> {
    LABEL.prop_map(|t| ServiceName::new(&t).unwrap())
}

/// Any node name.
pub fn any_node() -> impl Strategy<Value = NodeName> {
    vec(LABEL, 1..4).prop_map(|t| NodeName::new(&t.join(".")).unwrap())
}

/// Any address that may cross between clusters.
pub fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|n| IpAddr::V4(Ipv4Addr::from(n))),
        any::<u32>().prop_map(|n| IpAddr::V4(Ipv4Addr::from(0x0a00_0000 | n >> 12))),
        any::<u128>().prop_map(|n| IpAddr::V6(Ipv6Addr::from(0xfd << 120 | n >> 8))),
        any::<u128>().prop_map(|n| IpAddr::V6(Ipv6Addr::from(n))),
    ]
    .prop_filter("usable", |a| usable_address(*a).is_ok())
}

/// Any prefix that can be owned.
pub fn any_prefix() -> impl Strategy<Value = Prefix> {
    (any_address(), 0_u8..=128).prop_filter_map("ownable", |(address, length)| {
        let max = if address.is_ipv4() { 32 } else { 128 };
        Prefix::new(IpNet::new(address, length % (max + 1)).ok()?.trunc()).ok()
    })
}

/// Prefixes of 10.0.0.0/12, few enough to meet each other.
pub fn crowded_prefix() -> impl Strategy<Value = Prefix> {
    (any::<u32>(), 12_u8..=20).prop_map(|(n, length)| {
        let address = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 | n >> 12));
        Prefix::new(IpNet::new(address, length).unwrap().trunc()).unwrap()
    })
}

/// Any position.
pub fn any_position() -> impl Strategy<Value = Position> {
    (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>())
        .prop_map(|(serial, generation, epoch, sequence)| Position { serial, generation, epoch, sequence })
}

/// Any set id.
pub fn any_set() -> impl Strategy<Value = SetId> {
    any::<[u8; 16]>().prop_map(SetId)
}

/// Any key that somebody holds.
pub fn any_key() -> impl Strategy<Value = PublicKey> {
    any::<[u8; 32]>().prop_map(|seed| SigningKey::from_seed(&seed).public())
}

/// Any digest.
pub fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

/// Any roots document that can be read, first or not.
pub fn any_roots() -> impl Strategy<Value = Roots> {
    (any::<u64>(), LABEL, vec(any_key(), 1..=Roots::MAX_KEYS), option::of(any::<[u8; 32]>())).prop_map(
        |(version, name, keys, previous)| Roots {
            version,
            name: SetName::new(&name).unwrap(),
            keys,
            previous,
        },
    )
}

/// Any grant that can be read.
pub fn any_grant() -> impl Strategy<Value = Grant> {
    (
        (any_set(), any_cluster(), 1..=u64::MAX, any::<u64>(), any_key()),
        (btree_set(any_prefix(), 0..6), btree_set(any_prefix(), 0..4)),
        (vec(any_pattern(), 0..4), option::of(1..=u64::MAX)),
    )
        .prop_map(
            |(
                (set, cluster, serial, member_since, subject),
                (owned, mut tunnel),
                (namespaces, bind_before),
            )| {
                tunnel.retain(|t| !owned.iter().any(|o: &Prefix| o.overlaps(t)));
                Grant { set, cluster, serial, member_since, owned, tunnel, namespaces, subject, bind_before }
            },
        )
}

/// Any binding.
pub fn any_binding() -> impl Strategy<Value = Binding> {
    (any_set(), any_cluster(), any::<u64>(), any::<u32>(), any_key())
        .prop_map(|(set, cluster, serial, generation, key)| Binding { set, cluster, serial, generation, key })
}

/// Any statement.
pub fn any_statement() -> impl Strategy<Value = Statement> {
    (any_set(), any_cluster(), any_position(), any_digest())
        .prop_map(|(set, cluster, position, root)| Statement { set, cluster, position, root })
}

/// Any list of revocations.
pub fn any_revocations() -> impl Strategy<Value = Revocations> {
    (any_set(), any::<u64>(), btree_map(any_cluster(), any::<u64>(), 0..8))
        .prop_map(|(set, version, up_to)| Revocations { set, version, up_to })
}

/// Any list of brokers.
pub fn any_brokers() -> impl Strategy<Value = Brokers> {
    let host = prop_oneof![
        LABEL.boxed(),
        any::<[u8; 4]>().prop_map(|a| Ipv4Addr::from(a).to_string()).boxed(),
        any::<[u8; 16]>().prop_map(|a| format!("[{}]", Ipv6Addr::from(a))).boxed(),
    ];
    let broker = (host, 1..=u16::MAX, any_key())
        .prop_map(|(host, port, key)| Broker { address: format!("{host}:{port}"), key });
    (any_set(), any::<u64>(), vec(broker, 0..4)).prop_map(|(set, version, brokers)| Brokers {
        set,
        version,
        brokers,
    })
}

fn any_device() -> impl Strategy<Value = Device> {
    (any::<[u8; 32]>().prop_filter("zero", |k| *k != [0; 32]), 1..=u16::MAX)
        .prop_map(|(key, port)| Device { key: WireguardKey(key), port })
}

/// Any endpoint.
pub fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let number = (0_u8..64).prop_map(|n| DeviceNumber::new(n).unwrap());
    let tunnel = (option::of(any_address()), option::of(any_address()));
    (
        (any_node(), 0_u8..=3, any::<bool>()),
        btree_map(number, any_device(), 0..5),
        vec(any_address(), 0..=Endpoint::MAX_CANDIDATES),
        tunnel,
        btree_set(any_prefix(), 0..5),
    )
        .prop_map(|((node, rank, mesh), devices, mut candidates, tunnel, prefixes)| {
            let mut seen = BTreeSet::new();
            candidates.retain(|c| seen.insert(*c));
            let all = [tunnel.0, tunnel.1];
            let tunnel_v4 =
                all.iter().flatten().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
            let tunnel_v6 =
                all.iter().flatten().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
            let rank = Rank::new(rank).unwrap();
            Endpoint { node, rank, devices, candidates, tunnel_v4, tunnel_v6, prefixes, mesh }
        })
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)]
}

fn any_ports() -> impl Strategy<Value = Vec<Port>> {
    let named = btree_map(
        LABEL,
        (any_protocol(), 1..=u16::MAX, "|([a-z]{1,4}[.]io/)?[a-z]([a-z.]{0,4}[a-z])?"),
        0..4,
    )
    .prop_map(|ports| {
        let mut seen = BTreeSet::new();
        let port = |(name, (protocol, port, app)): (String, (Protocol, u16, String))| Port {
            name: Some(PortName::new(&name).unwrap()),
            protocol,
            port,
            app_protocol: (!app.is_empty()).then_some(app),
        };
        ports.into_iter().map(port).filter(|p| seen.insert((p.protocol, p.port))).collect()
    });
    let one = (any_protocol(), 1..=u16::MAX)
        .prop_map(|(protocol, port)| vec![Port { name: None, protocol, port, app_protocol: None }]);
    prop_oneof![named.boxed(), one.boxed()]
}

/// Any export.
pub fn any_export() -> impl Strategy<Value = Export> {
    let families = prop_oneof![
        Just(vec![Family::V4]),
        Just(vec![Family::V6]),
        Just(vec![Family::V4, Family::V6]),
        Just(vec![Family::V6, Family::V4]),
    ];
    let name = "([a-z]{1,9}[.][a-z]{1,5}/)?[a-z][a-z._-]{0,9}[a-z]";
    let annotations = btree_map(name, "\\PC{0,30}", 0..3);
    let labels = btree_map(name, "([A-Za-z0-9]([A-Za-z0-9._-]{0,18}[A-Za-z0-9])?)?", 0..3);
    (
        (any_ports(), families, any::<bool>(), any::<bool>()),
        (option::of(1_u32..=86_400), option::of("[A-Za-z]{1,20}"), any::<u64>()),
        (labels, annotations),
        any_preference(),
    )
        .prop_map(
            |(
                (ports, families, headless, internal_local),
                (affinity, distribution, created),
                maps,
                preference,
            )| Export {
                kind: if headless { ServiceType::Headless } else { ServiceType::ClusterSetIP },
                ports,
                families,
                affinity: affinity.and_then(NonZeroU32::new),
                internal_local,
                traffic_distribution: distribution,
                labels: maps.0,
                annotations: maps.1,
                created,
                preference,
            },
        )
}

/// Any preference.
pub fn any_preference() -> impl Strategy<Value = Preference> {
    let prefer = option::of(prop_oneof![Just(Prefer::Local), Just(Prefer::Any)]);
    (prefer, 0_u8..=100, 1_u8..=100).prop_map(|(prefer, priority, weight)| Preference {
        prefer,
        share: Share { priority: Priority::new(priority).unwrap(), weight: Weight::new(weight).unwrap() },
    })
}

/// Any shard of backends.
pub fn any_backends() -> impl Strategy<Value = Backends> {
    let backend =
        (any_address(), option::of(LABEL), any::<[bool; 3]>()).prop_map(|(address, hostname, is)| Backend {
            address,
            hostname: hostname.map(|h| Hostname::new(&h).unwrap()),
            ready: is[0],
            serving: is[1],
            terminating: is[2],
        });
    let group =
        (any_ports(), vec(backend, 0..5)).prop_map(|(ports, backends)| BackendGroup { ports, backends });
    vec(group, 0..4).prop_map(|groups| Backends { groups })
}

/// Any record key, of kinds known and unknown.
pub fn any_record_key() -> impl Strategy<Value = RecordKey> {
    (1_u32..6, vec("[!-~]{1,6}", 1..4)).prop_map(|(kind, name)| {
        let parts: Vec<&str> = name.iter().map(String::as_str).collect();
        RecordKey::new(kind, &parts).unwrap()
    })
}

/// Any record.
pub fn any_record() -> impl Strategy<Value = Record> {
    (any_record_key(), vec(any::<u8>(), 0..40)).prop_map(|(key, body)| Record { key, body: body.into() })
}

/// Records of a scope: no key twice.
pub fn any_records() -> impl Strategy<Value = Vec<Record>> {
    btree_map(any_record_key(), vec(any::<u8>(), 0..40), 0..8)
        .prop_map(|all| all.into_iter().map(|(key, body)| Record { key, body: body.into() }).collect())
}

/// Any scope.
pub fn any_scope() -> impl Strategy<Value = Scope> {
    prop_oneof![Just(Scope::Nodes).boxed(), any_namespace().prop_map(Scope::Namespace).boxed()]
}

/// Any content of a scope.
pub fn any_content() -> impl Strategy<Value = ScopeDigest> {
    (1..=u64::MAX, any_digest()).prop_map(|(count, digest)| ScopeDigest { count, digest })
}

/// Any leaves of a statement.
pub fn any_leaves() -> impl Strategy<Value = BTreeMap<Scope, ScopeDigest>> {
    btree_map(any_scope(), any_content(), 0..6)
}

/// Any context.
pub fn any_context() -> impl Strategy<Value = Context> {
    prop::sample::select(CONTEXTS.to_vec())
}

/// All contexts.
pub const CONTEXTS: [Context; 6] = [
    Context::Roots,
    Context::Grant,
    Context::Binding,
    Context::Statement,
    Context::Revocations,
    Context::Brokers,
];

/// Any envelope: bytes that nobody signed.
pub fn any_envelope() -> impl Strategy<Value = Envelope> {
    (any_context(), vec(any::<u8>(), 0..60), any::<[u8; 32]>(), any::<[u8; 32]>()).prop_map(
        |(context, payload, r, s)| {
            let mut signature = [0; 64];
            signature[..32].copy_from_slice(&r);
            signature[32..].copy_from_slice(&s);
            Envelope { context, payload: payload.into(), signature }
        },
    )
}

fn any_parts() -> impl Strategy<Value = MembershipParts> {
    (any_envelope(), vec(any_envelope(), 0..3))
        .prop_map(|(grant, bindings)| MembershipParts { grant, bindings })
}

/// Any bundle of documents.
pub fn any_documents() -> impl Strategy<Value = Documents> {
    let lists = (option::of(any_envelope()), option::of(any_envelope()));
    (vec(any_envelope(), 0..3), lists, vec(any_parts(), 0..3)).prop_map(
        |(roots, (brokers, revocations), memberships)| Documents { roots, brokers, revocations, memberships },
    )
}

/// Any message of a session.
pub fn any_message() -> impl Strategy<Value = Message> {
    let hello = (
        (any_set(), vec("[a-z-]{1,9}", 0..3), "[0-9a-z.+-]{0,12}"),
        (option::of(any_parts()), option::of(vec(any_namespace(), 0..4))),
    )
        .prop_map(|((set, features, version), (membership, namespaces))| {
            Message::Hello(Hello { set, features, membership, version, namespaces })
        });
    let have = vec((any_cluster(), any_position()), 0..5).prop_map(|origins| Message::Have(Have { origins }));
    let delta = (any_scope(), vec(any_record(), 0..4), vec(any_record_key(), 0..4))
        .prop_map(|(scope, upserts, removed)| ScopeDelta { scope, upserts, removed });
    let update = (
        (any_cluster(), option::of(any_position()), any_envelope(), any_digest()),
        vec((any_scope(), option::of(any_content())), 0..4),
        vec(delta, 0..3),
    )
        .prop_map(|((origin, base, statement, namespaces_hash), leaves, deltas)| {
            Message::Update(Update { origin, base, statement, leaves, deltas, namespaces_hash })
        });
    let want = prop_oneof![
        (any_cluster(), vec(any_scope(), 0..4))
            .prop_map(|(origin, scopes)| Want::Scopes { origin, scopes })
            .boxed(),
        vec(any_namespace(), 0..4).prop_map(Want::Namespaces).boxed(),
    ]
    .prop_map(Message::Want);
    let chunk = (any_cluster(), any_scope(), any::<u32>(), any::<bool>(), any_records()).prop_map(
        |(origin, scope, index, last, records)| Message::Chunk(Chunk { origin, scope, index, last, records }),
    );
    let alarm =
        ("\\PC{0,20}", "\\PC{0,40}").prop_map(|(object, reason)| Message::Alarm(Alarm { object, reason }));
    prop_oneof![
        hello.boxed(),
        any_documents().prop_map(Message::Documents).boxed(),
        have.boxed(),
        update.boxed(),
        want.boxed(),
        chunk.boxed(),
        alarm.boxed(),
    ]
}
