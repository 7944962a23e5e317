//! Questions to the resolver, over UDP and TCP.
#![no_main]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::LazyLock;

use tombolo_agent::dns::{Over, answer};
use tombolo_agent_core::object::{Import, ServiceKey, Slice, SliceKey};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::zone::Zone;
use tombolo_proto::model::{Backend, Family, Port, Protocol, ServiceType};

static ZONE: LazyLock<Zone> = LazyLock::new(zone);

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let from = SocketAddr::from(([127, 0, 0, 1], 4000));
    for over in [Over::Udp, Over::Tcp] {
        if let Some(reply) = answer(Some(&ZONE), bytes, from, over, 1) {
            let most = if matches!(over, Over::Udp) { 1232 } else { 65_535 };
            assert!((12..=most).contains(&reply.bytes.len()));
            assert_eq!(reply.bytes[..2], bytes[..2], "the id comes back");
            assert!(reply.bytes[2] & 0x80 != 0, "an answer says that it is one");
        }
    }
});

fn zone() -> Zone {
    let service = |name: &str| ServiceKey {
        namespace: "shop".parse().expect("a namespace"),
        name: name.parse().expect("a name"),
    };
    let port = Port {
        name: Some("sql".parse().expect("a port name")),
        protocol: Protocol::Tcp,
        port: 5432,
        app_protocol: None,
    };
    let import = |kind, ips: &[&str]| Import {
        kind,
        ports: vec![port.clone()],
        ips: ips.iter().map(|ip| ip.parse().expect("an address")).collect(),
        families: Family::ALL.to_vec(),
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        clusters: Default::default(),
        preferences: Default::default(),
    };
    let backend = |n: u8| Backend {
        address: [10, 1, 0, n].into(),
        hostname: (n % 2 == 0).then(|| format!("a-rather-long-name-{n}").parse().expect("a name")),
        ready: true,
        serving: true,
        terminating: false,
    };
    let imports = Shelf::from([
        (service("web"), import(ServiceType::ClusterSetIP, &["198.19.0.5", "fd19::5"])),
        (service("db"), import(ServiceType::Headless, &[])),
    ]);
    let key = SliceKey {
        service: service("db"),
        source: "east".parse().expect("a cluster"),
        family: Family::V4,
        index: 0,
    };
    let slice = Slice { ports: vec![port.clone()], backends: (0..100).map(backend).collect(), ..Slice::default() };
    Zone::build(&imports, &[(key, slice)].into())
}
