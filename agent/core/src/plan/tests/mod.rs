//! Laws of design.md 9 on plans.

mod cluster;
mod derived;
mod eligible;
mod lane;
mod mcs;
mod merge;
mod mesh;
mod narrow;
mod node;
mod piece;
mod planner;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{
    Backend, ClusterId, Device, DeviceNumber, Endpoint, Export, Family, Lanes, NodeName, Port, Preference,
    Prefix, Protocol, Rank, ServiceType, WireguardKey,
};
use tombolo_proto::testing::net;

use crate::object::ServiceKey;

fn id(text: &str) -> ClusterId {
    text.parse().unwrap()
}

fn node(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn nets(list: &[&str]) -> BTreeSet<Prefix> {
    list.iter().map(|p| net(p)).collect()
}

fn service(text: &str) -> ServiceKey {
    let (namespace, name) = text.split_once('/').unwrap();
    ServiceKey { namespace: namespace.parse().unwrap(), name: name.parse().unwrap() }
}

fn port(name: &str, port: u16) -> Port {
    let name = (!name.is_empty()).then(|| name.parse().unwrap());
    Port { name, protocol: Protocol::Tcp, port, app_protocol: None }
}

fn backend(address: &str) -> Backend {
    Backend { address: ip(address), hostname: None, ready: true, serving: true, terminating: false }
}

fn export(created: u64, ports: &[Port]) -> Export {
    Export {
        kind: ServiceType::ClusterSetIP,
        ports: ports.to_vec(),
        families: vec![Family::V4, Family::V6],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created,
        preference: Preference::default(),
    }
}

/// All devices, with keys that tell cluster, node and device apart.
fn devices(cluster: u8, host: u8, lanes: Lanes) -> BTreeMap<DeviceNumber, Device> {
    DeviceNumber::all(lanes)
        .map(|n| {
            let mut key = [0x77; 32];
            key[..3].copy_from_slice(&[cluster, host, n.get()]);
            (n, Device { key: WireguardKey(key), port: n.default_port() })
        })
        .collect()
}

/// Node `host` of cluster `number` as in docs/datapath.md.
fn endpoint(cluster: u8, host: u8, name: &str, rank: u8) -> Endpoint {
    Endpoint {
        node: node(name),
        rank: Rank::new(rank).unwrap(),
        devices: devices(cluster, host, Lanes::ONE),
        candidates: vec![ip(&format!("192.0.2.{}", cluster * 16 + host))],
        tunnel_v4: Some(format!("198.18.{cluster}.{host}").parse().unwrap()),
        tunnel_v6: Some(format!("fd00:18:{cluster}::{host}").parse().unwrap()),
        prefixes: nets(&[&format!("10.{cluster}.{host}.0/24"), &format!("fd00:10:{cluster}:{host}::/64")]),
        mesh: false,
    }
}

fn owned(cluster: u8) -> BTreeSet<Prefix> {
    nets(&[&format!("10.{cluster}.0.0/16"), &format!("fd00:10:{cluster}::/48")])
}

fn tunnel(cluster: u8) -> BTreeSet<Prefix> {
    nets(&[&format!("198.18.{cluster}.0/24"), &format!("fd00:18:{cluster}::/64")])
}
