//! Every kind comes back as it was written; nothing from outside panics.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::{Value, json as value};
use tombolo_agent_core::object::{
    Condition, ExportStatus, Import, LocalKind, Preferences, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::{ClusterId, Family, Prefer, Record, RecordKey, ServiceType, Share};
use tombolo_proto::testing::{
    any_backends, any_cluster, any_digest, any_endpoint, any_envelope, any_export, any_namespace, any_node,
    any_prefix, any_records, any_service, any_set, key,
};
use tombolo_proto::trust::SigningKey;
use tombolo_proto::wire::MembershipParts;

use super::*;
use crate::api::observed::{ClusterSet, Lease, Member};

fn any_key() -> impl Strategy<Value = ServiceKey> {
    (any_namespace(), any_service()).prop_map(|(namespace, name)| ServiceKey { namespace, name })
}

fn any_import() -> impl Strategy<Value = Import> {
    (any_export(), proptest::collection::btree_set(any_cluster(), 0..4)).prop_map(|(export, clusters)| {
        let ip = |f: &Family| match f {
            Family::V4 => "198.19.0.7".parse().unwrap(),
            Family::V6 => "fd19:746f:6d62::7".parse().unwrap(),
        };
        let foreign = |map: BTreeMap<String, String>| {
            map.into_iter().filter(|(k, _)| !k.starts_with(OWN_PREFIX)).collect::<BTreeMap<_, _>>()
        };
        Import {
            ips: if export.kind == ServiceType::Headless {
                Vec::new()
            } else {
                export.families.iter().map(ip).collect()
            },
            kind: export.kind,
            ports: export.ports,
            families: export.families,
            affinity: export.affinity,
            internal_local: export.internal_local,
            traffic_distribution: export.traffic_distribution,
            labels: foreign(export.labels),
            annotations: foreign(export.annotations),
            preferences: Preferences {
                local: export.preference.prefer == Some(Prefer::Local),
                shares: clusters
                    .iter()
                    .map(|c: &ClusterId| (c.clone(), export.preference.share))
                    .filter(|(_, share)| *share != Share::default())
                    .collect(),
            },
            clusters,
        }
    })
}

fn any_slice() -> impl Strategy<Value = (SliceKey, Slice)> {
    let more = (any::<u32>(), any::<bool>());
    (any_key(), any_cluster(), any_backends(), more).prop_map(
        |(service, source, backends, (index, derived))| {
            let group = backends.groups.into_iter().next();
            let group =
                group.unwrap_or(tombolo_proto::model::BackendGroup { ports: vec![], backends: vec![] });
            let family = group.backends.first().map_or(Family::V4, |b| Family::of(b.address));
            let backends = group.backends.into_iter().filter(|b| Family::of(b.address) == family).collect();
            (SliceKey { service, source, family, index }, Slice { ports: group.ports, backends, derived })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn imports_come_back(key in any_key(), import in any_import()) {
        let object = json(&multicluster::write_import(&key, &import).unwrap());
        prop_assert_eq!(multicluster::read_import(&typed(&object).unwrap()).unwrap(), (key, import));
    }

    #[test]
    fn slices_come_back((key, slice) in any_slice()) {
        let object = slice::write(&key, &slice).unwrap();
        let object: k8s_openapi::api::discovery::v1::EndpointSlice = typed(&json(&object)).unwrap();
        prop_assert_eq!(slice::read(&object).unwrap(), (key, slice));
        // What we wrote is never taken for a local service's.
        prop_assert_eq!(slice::read_local(&object).unwrap(), None);
    }

    #[test]
    fn members_come_back(
        cluster in any_cluster(),
        grant in any_envelope(),
        bindings in proptest::collection::vec(any_envelope(), 0..3),
        spoken in proptest::option::of((any_envelope(), proptest::collection::vec(any_envelope(), 0..3))),
        statement in proptest::option::of(any_envelope()),
        namespaces in proptest::option::of(any_digest()),
        records in any_records(),
    ) {
        let spoken = spoken.map(|(grant, bindings)| MembershipParts { grant, bindings });
        let member = Member { grant, bindings, spoken, statement, namespaces };
        let object = json(&member::write(&cluster, &member).unwrap());
        prop_assert_eq!(member::read(&typed(&object).unwrap()).unwrap(), (cluster.clone(), member));

        let nodes: BTreeMap<RecordKey, Record> = records.into_iter().map(|r| (r.key.clone(), r)).collect();
        let mut back = BTreeMap::new();
        for (shard, object) in member::write_nodes(&cluster, &nodes, &BTreeMap::new()).unwrap() {
            let (whose, number, records) = member::read_nodes(&typed(&json(&object)).unwrap()).unwrap();
            prop_assert_eq!((&whose, number), (&cluster, shard));
            back.extend(records.into_iter().map(|r| (r.key.clone(), r)));
        }
        prop_assert_eq!(back, nodes);
    }

    #[test]
    fn tunnel_nodes_come_back(
        name in any_node(),
        endpoint in any_endpoint(),
        unreached in proptest::collection::btree_set(any_cluster(), 0..3),
        outside in proptest::collection::btree_set(any::<std::net::Ipv4Addr>().prop_map(Into::into), 0..2),
    ) {
        prop_assume!(name.as_str().len() <= ObjectName::MAX);
        let node = TunnelNode {
            devices: endpoint.devices,
            candidates: endpoint.candidates,
            outside,
            prefixes: endpoint.prefixes,
            unreached,
        };
        let object = json(&tunnel_node::write(&name, &node).unwrap());
        prop_assert_eq!(tunnel_node::read(&typed(&object).unwrap()).unwrap(), (name, node));
    }

    #[test]
    fn the_set_comes_back(
        set in any_set(),
        cluster in any_cluster(),
        roots in proptest::collection::vec(any_envelope(), 1..3),
        brokers in proptest::option::of(any_envelope()),
        revocations in proptest::option::of(any_envelope()),
        reserved in proptest::collection::btree_set(any_prefix(), 0..3),
        rotations in proptest::collection::btree_map(any_node(), 0..u64::MAX, 0..3),
        (leaving, ranged) in any::<(bool, bool)>(),
    ) {
        let ranges = ClustersetRanges {
            v4: Some("198.19.0.0/16".parse().unwrap()),
            v6: Some("fd19:746f:6d62::/112".parse().unwrap()),
        };
        let clusterset = ranged.then_some(ranges);
        let set = ClusterSet { set, cluster, roots, brokers, revocations, reach: Reach::All, topology: Topology::Mesh, clusterset, reserved, rotations, leaving };
        let object = json(&cluster_set::write(&set).unwrap());
        prop_assert_eq!(cluster_set::read(&typed(&object).unwrap()).unwrap(), set);
    }

    #[test]
    fn leases_come_back(
        holder in proptest::option::of("[a-z]{1,9}"),
        duration in 0..1_000_000_u32,
        at in 0..4_000_000_000_000_000_u64,
        epoch in any::<u64>(),
    ) {
        let lease = Lease { holder, duration, acquired: at, renewed: at + 7, transitions: duration, epoch };
        let object = json(&lease::write(&lease).unwrap());
        prop_assert_eq!(lease::read(&typed(&object).unwrap()).unwrap(), lease);
    }

    /// Any JSON in place of any field gives a value or a problem.
    #[test]
    fn nothing_panics(text in "\\PC{0,40}", number in any::<i64>(), path in 0..40_usize, pick in 0..6_usize) {
        let junk = [
            value!(text), value!(number), value!(null), value!([text, number]), value!({ "a": number }), value!(true),
        ];
        let mut object = value!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "a", "namespace": "b", "labels": { "x": "y" }, "creationTimestamp": null },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": ["10.0.0.1"], "conditions": { "ready": true }, "hostname": "h" }],
            "ports": [{ "name": "p", "port": 80, "protocol": "TCP" }],
            "spec": {
                "type": "ClusterIP", "ports": [{ "name": "p", "port": 80, "protocol": "TCP" }],
                "ipFamilies": ["IPv4"], "sessionAffinity": "ClientIP", "podCIDRs": ["10.1.0.0/24"],
                "exportedLabels": { "k": "v" }, "ips": ["10.0.0.1"], "roots": ["AA=="], "devices": [],
                "clusterset": { "v4": "198.19.0.0/16" }, "cluster": "eu", "shard": 1, "records": [],
            },
            "status": { "addresses": [{ "type": "InternalIP", "address": "10.0.0.1" }], "conditions": [] },
        });
        let places: Vec<String> = pointers(&object, "");
        if let Some(slot) = object.pointer_mut(&places[1 + path % (places.len() - 1)]) {
            *slot = junk[pick].clone();
        }
        let _ = typed(&object).and_then(|o| service::read(&o)).is_ok();
        object["kind"] = value!("Node");
        let _ = typed(&object).and_then(|o| node::read(&o)).is_ok();
        object["apiVersion"] = value!("discovery.k8s.io/v1");
        object["kind"] = value!("EndpointSlice");
        let _ = typed(&object).and_then(|o| slice::read_local(&o)).is_ok();
        let _ = typed(&object).and_then(|o| slice::read(&o)).is_ok();
        let _ = typed(&object).and_then(|o| multicluster::read_export(&o)).is_ok();
        let _ = typed(&object).and_then(|o| multicluster::read_import(&o)).is_ok();
        let _ = typed(&object).and_then(|o| member::read(&o)).is_ok();
        let _ = typed(&object).and_then(|o| member::read_nodes(&o)).is_ok();
        let _ = typed(&object).and_then(|o| tunnel_node::read(&o)).is_ok();
        let _ = typed(&object).and_then(|o| cluster_set::read(&o)).is_ok();
        let _ = secret::read(&object).is_ok();
        for kind in Kind::ALL {
            let _ = identity(kind, &object).is_ok();
        }
        let _ = tutorial::judge(&text, "ServiceExport", &object);
    }
}

fn pointers(value: &Value, at: &str) -> Vec<String> {
    let mut all = vec![at.to_owned()];
    match value {
        Value::Object(map) => all.extend(map.iter().flat_map(|(k, v)| pointers(v, &format!("{at}/{k}")))),
        Value::Array(list) => {
            all.extend(list.iter().enumerate().flat_map(|(i, v)| pointers(v, &format!("{at}/{i}"))));
        }
        _ => {}
    }
    all
}

#[test]
fn the_key_comes_back() {
    let (new, old): (SigningKey, SigningKey) = (key(3), key(4));
    let back = secret::read(&secret::write(&new, None)).unwrap();
    assert_eq!(back.newest.public(), new.public());
    assert!(back.previous.is_none());
    let back = secret::read(&secret::write(&new, Some(&old))).unwrap();
    assert_eq!(back.newest.public(), new.public());
    assert_eq!(back.previous.unwrap().public(), old.public());
}

#[test]
fn slice_names_tell_keys_apart() {
    let key = |service: &str, source: &str, index| SliceKey {
        service: service::key(Some("production"), Some(service)).unwrap(),
        source: tombolo_proto::testing::cluster(source),
        family: Family::V4,
        index,
    };
    let keys = [
        key("a-b", "c", 0),
        key("a", "b-c", 0),
        key("a", "c", 1),
        key("a", "c", 11),
        key(&"s".repeat(63), "c", 0),
    ];
    let names: BTreeSet<String> = keys.iter().map(slice::name).collect();
    assert_eq!(names.len(), keys.len());
    assert!(names.iter().all(|name| ObjectName::new(name).is_ok() && name.len() <= 63));
}

#[test]
fn shards_stick() {
    let record = |n: usize| {
        let key = RecordKey::new(1, &[&format!("node-{n:04}")]).unwrap();
        (key.clone(), Record { key, body: vec![7; 300].into() })
    };
    let cluster = tombolo_proto::testing::cluster("eu");
    let mut nodes: BTreeMap<RecordKey, Record> = (0..250).map(record).collect();
    let first = member::write_nodes(&cluster, &nodes, &BTreeMap::new()).unwrap();
    assert_eq!(first.len(), 3);
    let mut placed = BTreeMap::new();
    for (shard, object) in &first {
        placed.extend(member::read_nodes(object).unwrap().2.into_iter().map(|r| (r.key, *shard)));
    }
    nodes.remove(&record(0).0);
    nodes.extend([record(999)]);
    let second = member::write_nodes(&cluster, &nodes, &placed).unwrap();
    let changed = first.iter().filter(|(shard, object)| second.get(shard) != Some(object)).count();
    assert_eq!(changed, 1, "one node left and one came in the room it left");
}

#[test]
fn labels_that_nobody_takes_are_left_out_and_told() {
    let annotations: BTreeMap<String, String> =
        (0..70).map(|n| (format!("example.org/a{n:02}"), "x".to_owned())).collect();
    let object = serde_json::json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "exportedLabels": {
                "team": "blue", "-bad": "x", "a/../b": "x", "worse": "-x", "empty": "", "line": "a\nb",
            },
            "exportedAnnotations": annotations,
        },
    });
    let (_, export) = multicluster::read_export(&typed(&object).unwrap()).unwrap();
    assert_eq!(export.labels.keys().collect::<Vec<_>>(), ["empty", "team"]);
    assert_eq!(export.annotations.len(), 64);
    let told = export.misread.unwrap();
    assert!(told.contains("\"-bad\" is not a name") && told.contains("the value of worse"), "{told}");
    assert!(told.ends_with("and 5 more") && told.len() < 1000, "{told}");
}

#[test]
fn condition_times_stay_until_the_status_changes() {
    let status = |status| ExportStatus {
        conditions: [(
            "Valid".to_owned(),
            Condition { status, reason: "Valid".to_owned(), message: "all is well".to_owned() },
        )]
        .into(),
    };
    let first = multicluster::write_status(&status(true), None, 1000);
    let same = multicluster::write_status(&status(true), Some(&first), 2000);
    assert_eq!(first, same);
    let other = multicluster::write_status(&status(false), Some(&first), 2000);
    assert_eq!(seconds(&other.conditions[0].last_transition_time), 2000);
}

#[test]
fn services_as_people_write_them() {
    let read = |spec: Value| {
        let object = value!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "api", "namespace": "production" },
            "spec": spec,
        });
        typed(&object).and_then(|object| service::read(&object)).map(|(_, service)| service)
    };
    let port = value!([{ "port": 80 }]);
    assert_eq!(read(value!({ "ports": port })).unwrap().kind, LocalKind::ClusterIP);
    assert_eq!(read(value!({ "ports": port, "clusterIP": "None" })).unwrap().kind, LocalKind::Headless);
    let external = read(value!({ "type": "ExternalName", "externalName": "a.example" })).unwrap();
    assert_eq!(external.kind, LocalKind::ExternalName);
    let both = read(value!({ "ports": port, "ipFamilyPolicy": "PreferDualStack" })).unwrap();
    assert_eq!(both.families, Family::ALL);
    let six = read(value!({ "ports": port, "clusterIPs": ["fd00::1", "10.0.0.1"] })).unwrap();
    assert_eq!(six.families, [Family::V6, Family::V4]);
    let sticky = read(value!({ "ports": port, "sessionAffinity": "ClientIP" })).unwrap();
    assert_eq!(sticky.affinity.map(std::num::NonZeroU32::get), Some(10_800));
    for (bad, word) in [
        (value!({ "ports": [{ "port": 0 }] }), "spec.ports[0].port"),
        (value!({ "ports": [{ "port": 65536 }] }), "spec.ports[0].port"),
        (value!({ "ports": [{ "port": "80" }] }), "spec.ports[0].port"),
        (value!({ "ports": [{ "port": 80 }, { "port": 81 }] }), "name"),
        (value!({ "ports": [{ "name": "a", "port": 80 }, { "name": "a", "port": 81 }] }), "twice"),
        (value!({ "ports": [{ "port": 80, "protocol": "tcp" }] }), "TCP"),
        (value!({ "ports": [{ "port": 80, "name": "Http" }] }), "name"),
        (value!({ "ports": port, "ipFamilies": ["IPv4", "IPv4"] }), "twice"),
        (value!({ "ports": port, "ipFamilies": ["v4"] }), "IPv4"),
        (value!({ "ports": port, "sessionAffinity": "Cookie" }), "ClientIP"),
        (value!({ "ports": port, "internalTrafficPolicy": "Nearby" }), "Local"),
        (value!("nothing"), "spec"),
    ] {
        let problem = read(bad.clone()).unwrap_err();
        assert!(problem.message.contains(word), "{bad}: {problem}");
    }
}

#[test]
fn mcs_old_manifests_get_their_replacement() {
    let object =
        value!({ "metadata": { "name": "nginx", "namespace": "web" }, "spec": { "type": "SuperClusterIP" } });
    let says = |verdict: tutorial::Verdict| match verdict {
        tutorial::Verdict::Ignore => String::new(),
        tutorial::Verdict::ExportWith(problem) | tutorial::Verdict::Refuse(problem) => problem.message,
    };
    let export = tutorial::judge("submariner.io/v1", "ServiceExport", &object);
    assert!(matches!(export, tutorial::Verdict::ExportWith(_)));
    for (version, kind) in [("submariner.io/v1", "ServiceExport"), ("submariner.io/v1", "ServiceImport")] {
        let text = says(tutorial::judge(version, kind, &object));
        for line in [
            "apiVersion: multicluster.x-k8s.io/v1beta1",
            "kind: ServiceExport",
            "name: nginx",
            "namespace: web",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
    assert!(
        says(tutorial::judge("multicluster.x-k8s.io/v1alpha1", "ServiceImport", &object))
            .contains("SuperClusterIP")
    );
    assert_eq!(tutorial::judge("apps/v1", "Deployment", &object), tutorial::Verdict::Ignore);
    assert_eq!(tutorial::judge("serving.knative.dev/v1", "Service", &object), tutorial::Verdict::Ignore);
}

#[test]
fn backends_merge_in_any_order() {
    let slice = |address: &str, ready: bool, port: i32| {
        let object = value!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": { "name": "x", "namespace": "production", "labels": { "kubernetes.io/service-name": "api" } },
            "addressType": "IPv4", "ports": [{ "name": "", "port": port }],
            "endpoints": [{ "addresses": [address], "conditions": { "ready": ready } }],
        });
        slice::read_local(&typed(&object).unwrap()).unwrap().unwrap()
    };
    let slices = [slice("10.1.0.1", false, 80), slice("10.1.0.1", true, 80), slice("10.1.0.2", true, 8080)];
    let merged = slice::merge(&slices);
    assert_eq!(merged.len(), 2);
    assert!(merged[0].backends[0].ready);
    assert_eq!(slice::merge(slices.iter().rev()), merged);
}

#[test]
fn names_stay_in_their_directory() {
    let long = "a".repeat(300);
    for bad in ["", ".", "..", "../x", "a/b", "a\0b", "a..b", "-a", "A", ".tmp", "a/", "ä", &long] {
        assert!(ObjectName::new(bad).is_err(), "{bad:?}");
    }
    for good in ["a", "api-service", "ip-10-0-0-1.eu", "0"] {
        assert!(ObjectName::new(good).is_ok(), "{good:?}");
    }
}

#[test]
fn kinds_by_version() {
    for kind in Kind::ALL {
        assert_eq!(Kind::of(kind.api_version(), kind.name()), Some(kind));
    }
    assert_eq!(Kind::of("multicluster.x-k8s.io/v1alpha1", "ServiceExport"), Some(Kind::ServiceExport));
    assert_eq!(Kind::of("v1beta1", "Service"), None);
    assert_eq!(Kind::of("serving.knative.dev/v1", "Service"), None);
}
