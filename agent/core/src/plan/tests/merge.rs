use std::collections::BTreeMap;
use std::num::NonZeroU32;

use proptest::prelude::*;
use tombolo_proto::model::{ClusterId, Export, Family, Port, Protocol, ServiceType};

use super::{export, id, port};
use crate::merge::{Conflict, Constituent, Merged, expose, merge};

fn merged(parts: &[(&ClusterId, &Export, u64)]) -> Merged {
    let parts: Vec<Constituent<'_>> = parts
        .iter()
        .map(|(cluster, export, member_since)| Constituent { cluster, export, member_since: *member_since })
        .collect();
    merge(&parts).unwrap()
}

#[test]
fn nobody_exports_nothing() {
    assert!(merge(&[]).is_none());
}

#[test]
fn mcs_18_oldest_export_wins_but_nobody_is_older_than_their_membership() {
    let (a, b) = (id("a"), id("b"));
    let honest =
        Export { labels: BTreeMap::from([("x".into(), "b".into())]), ..export(1000, &[port("", 80)]) };
    let claims_1970 = Export { kind: ServiceType::Headless, ..export(0, &[port("", 80)]) };
    let result = merged(&[(&a, &claims_1970, 2000), (&b, &honest, 500)]);
    assert_eq!(result.oldest, b);
    assert_eq!(result.import.kind, ServiceType::ClusterSetIP);
    assert_eq!(result.import.labels, honest.labels);
    assert_eq!(result.conflicts.keys().copied().collect::<Vec<_>>(), [Conflict::Type, Conflict::Labels]);
    // A tie goes to the lower cluster id.
    let result = merged(&[(&b, &honest, 2000), (&a, &claims_1970, 2000)]);
    assert_eq!(result.oldest, a);
}

#[test]
fn mcs_11_20_ports_are_united_and_each_goes_only_where_it_is_exposed() {
    let (a, b, c) = (id("a"), id("b"), id("c"));
    let first = export(1, &[port("http", 80), port("admin", 9000)]);
    // The same name for another number loses; another name for the same number is the same port.
    let second = export(2, &[port("http", 8080), port("manage", 9000), port("extra", 7000)]);
    let third = export(3, &[port("extra", 7000)]);
    let result = merged(&[(&c, &third, 0), (&b, &second, 0), (&a, &first, 0)]);
    assert_eq!(result.import.ports, [port("http", 80), port("admin", 9000), port("extra", 7000)]);
    let of = |cluster: &ClusterId| -> Vec<(Port, Port)> {
        result.exposed[cluster].iter().map(|e| (e.own.clone(), e.merged.clone())).collect()
    };
    assert_eq!(of(&a).len(), 2);
    assert_eq!(
        of(&b),
        [(port("manage", 9000), port("admin", 9000)), (port("extra", 7000), port("extra", 7000))]
    );
    assert_eq!(of(&c), [(port("extra", 7000), port("extra", 7000))]);
    assert_eq!(result.conflicts, BTreeMap::from([(Conflict::Port, [b, c].into())]));
}

#[test]
fn mcs_19_unequal_port_sets_are_united_and_a_conflict() {
    let (a, b) = (id("a"), id("b"));
    let (first, second) = (export(1, &[port("http", 80)]), export(2, &[port("grpc", 81)]));
    let result = merged(&[(&a, &first, 0), (&b, &second, 0)]);
    assert_eq!(result.import.ports, [port("http", 80), port("grpc", 81)]);
    assert_eq!(
        result.conflicts,
        BTreeMap::from([(Conflict::Port, [b].into())]),
        "as the upstream suite wants it"
    );
    let other_order = (export(1, &[port("a", 1), port("b", 2)]), export(2, &[port("b", 2), port("a", 1)]));
    let result = merged(&[(&id("a"), &other_order.0, 0), (&id("b"), &other_order.1, 0)]);
    assert!(result.conflicts.is_empty(), "{:?}", result.conflicts);
}

fn any_port() -> impl Strategy<Value = Port> {
    ((0_u8..4), (80_u16..84), any::<bool>()).prop_map(|(name, number, tcp)| Port {
        protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
        ..port(["", "a", "b", "c"][usize::from(name)], number)
    })
}

pub(super) fn any_export() -> impl Strategy<Value = Export> {
    let families = prop::sample::select(vec![
        vec![Family::V4],
        vec![Family::V6, Family::V4],
        vec![Family::V4, Family::V6],
    ]);
    (0_u64..4, prop::collection::vec(any_port(), 0..5), families, 0_u32..3, any::<(bool, bool)>()).prop_map(
        |(created, ports, families, affinity, (headless, local))| Export {
            kind: if headless { ServiceType::Headless } else { ServiceType::ClusterSetIP },
            families,
            affinity: NonZeroU32::new(affinity),
            internal_local: local,
            ..export(created, &ports)
        },
    )
}

proptest! {
    #[test]
    fn law_5_merge_is_independent_of_order(
        exports in prop::collection::vec((any_export(), 0_u64..3), 1..5).prop_shuffle(),
        turn in 0_usize..5,
    ) {
        let clusters: Vec<ClusterId> = (0..exports.len()).map(|i| id(&format!("c{i}"))).collect();
        let mut parts: Vec<(&ClusterId, &Export, u64)> =
            clusters.iter().zip(&exports).map(|(c, (e, since))| (c, e, *since)).collect();
        let first = merged(&parts);
        let turn = turn % parts.len();
        parts.rotate_left(turn);
        prop_assert_eq!(&merged(&parts), &first);
        parts.reverse();
        prop_assert_eq!(&merged(&parts), &first);

        let import = &first.import;
        for (i, one) in import.ports.iter().enumerate() {
            for other in &import.ports[..i] {
                prop_assert!(one.name != other.name, "mcs 11: name twice");
                prop_assert!((one.protocol, one.port) != (other.protocol, other.port), "mcs 11: number twice");
            }
        }
        for (cluster, export, _) in &parts {
            for e in &first.exposed[*cluster] {
                prop_assert!(import.ports.contains(&e.merged) && export.ports.contains(&e.own));
                prop_assert_eq!((e.own.protocol, e.own.port), (e.merged.protocol, e.merged.port));
            }
            // The oldest loses nothing but what it says twice.
            if **cluster == first.oldest {
                prop_assert_eq!(&expose(&import.ports, export), &first.exposed[*cluster]);
            }
        }
    }
}
