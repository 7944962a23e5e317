//! The arrows of the design: `proto <- cores <- shells <- ctl, tests`, and what cores cannot name.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// What each of our crates may use of ours.
const ARROWS: [(&str, &[&str]); 11] = [
    ("tombolo-proto", &[]),
    ("tombolo-tls", &["tombolo-proto"]),
    ("tombolo-replica", &["tombolo-proto"]),
    ("tombolo-agent-core", &["tombolo-proto", "tombolo-replica"]),
    ("tombolo-broker-core", &["tombolo-proto", "tombolo-replica"]),
    ("tombolo-hold", &[]),
    ("tombolo-wireguard", &["tombolo-hold"]),
    (
        "tombolo-agent",
        &["tombolo-proto", "tombolo-tls", "tombolo-replica", "tombolo-agent-core", "tombolo-hold"],
    ),
    ("tombolo-broker", &["tombolo-proto", "tombolo-tls", "tombolo-replica", "tombolo-broker-core"]),
    ("tombolo", &["tombolo-proto", "tombolo-tls", "tombolo-replica", "tombolo-agent-core", "tombolo-agent"]),
    ("tombolo-lab", &["tombolo-proto", "tombolo-tls", "tombolo-replica", "tombolo-agent-core"]),
];

/// Crates that only decide.
const CORES: [&str; 4] = ["tombolo-proto", "tombolo-replica", "tombolo-agent-core", "tombolo-broker-core"];
/// I/O, which they cannot name.
const IO: [&str; 10] = [
    "tokio",
    "kube",
    "k8s-openapi",
    "tonic",
    "rtnetlink",
    "hickory-server",
    "nix",
    "libc",
    "socket2",
    "tracing-subscriber",
];

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let normal = package["dependencies"]
            .as_array()
            .expect("dependencies")
            .iter()
            .filter(|d| d["kind"].is_null() && d["optional"] == false)
            .map(|d| d["name"].as_str().expect("name").to_owned())
            .collect();
        found.insert(package["name"].as_str().expect("name").to_owned(), normal);
    }
    found
}

#[test]
fn arrows_point_as_designed() {
    let found = dependencies();
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ARROWS.iter().map(|(name, uses)| (*name, uses.iter().copied().collect())).collect();
    for (name, dependencies) in &found {
        let allowed = allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} is not in ARROWS"));
        for dependency in dependencies.iter().filter(|d| found.contains_key(*d)) {
            assert!(allowed.contains(dependency.as_str()), "{name} must not use {dependency}");
        }
    }
}

#[test]
fn cores_do_no_io() {
    let found = dependencies();
    for core in CORES {
        let dependencies = &found[core];
        for io in IO {
            assert!(!dependencies.contains(io), "{core} must not use {io}");
        }
    }
}
