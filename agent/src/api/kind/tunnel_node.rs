//! tombolo.dev/v1alpha1 TunnelNode: what a node says of itself.
#![allow(unreachable_pub, reason = "the schema macro repeats the types where nobody sees them")]
#![allow(clippy::duplicated_attributes, reason = "columns are of one type")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};
use tombolo_agent_core::object::TunnelNode;
use tombolo_proto::model::{
    ClusterId, Device, DeviceNumber, Endpoint, Family, NodeName, Prefix, WireguardKey,
};

use super::{Kind, ObjectId, Problem, bad, condition, own_meta};

/// Clusters of a set are fewer.
pub const MAX_UNREACHED: usize = 10_000;

/// `spec` of a TunnelNode.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tombolo.dev",
    version = "v1alpha1",
    kind = "TunnelNode",
    root = "TunnelNodeResource",
    plural = "tunnelnodes",
    shortname = "tnode",
    category = "tombolo",
    status = "TunnelNodeStatus",
    printcolumn(
        name = "Reached",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Reached\")].status"
    ),
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.candidates[0]"),
    printcolumn(name = "Pods", type_ = "string", json_path = ".spec.prefixes"),
    printcolumn(name = "Unreached", type_ = "string", json_path = ".spec.unreached"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    derive = "PartialEq"
)]
pub struct TunnelNodeSpec {
    /// Its devices.
    #[schemars(length(max = 64))]
    #[x_kube(
        validation = Rule::new("self.all(d, self.exists_one(e, e.number == d.number))")
            .message("each device number stands there once")
    )]
    pub devices: Vec<DeviceSpec>,
    /// Where it may be reached, best first.
    #[serde(default)]
    #[schemars(with = "Vec<String>", length(max = 64))]
    pub candidates: Vec<IpAddr>,
    /// Where other clusters see it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub outside: BTreeSet<IpAddr>,
    /// Pod ranges on it.
    #[serde(default)]
    #[schemars(with = "Vec<String>", length(max = 256))]
    pub prefixes: BTreeSet<Prefix>,
    /// Clusters that it cannot reach.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    #[schemars(with = "Vec<String>", length(max = 10_000))]
    pub unreached: BTreeSet<ClusterId>,
}

/// `status` of a TunnelNode, for people only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct TunnelNodeStatus {
    /// Reached: whether a way from it leads to every other cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<meta::Condition>,
}

/// A device of a node.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct DeviceSpec {
    /// Its number.
    #[schemars(with = "i32", range(min = 0, max = 63))]
    pub number: DeviceNumber,
    /// Its WireGuard public key.
    #[schemars(with = "String", length(min = 44, max = 44))]
    pub key: WireguardKey,
    /// UDP port it listens on.
    #[schemars(with = "i32", range(min = 1, max = 65_535))]
    pub port: u16,
}

/// The API's object.
pub fn write(node: &NodeName, value: &TunnelNode) -> Result<TunnelNodeResource, Problem> {
    let id = ObjectId::cluster(Kind::TunnelNode, node.as_str())?;
    let device = |(number, device): (&DeviceNumber, &Device)| DeviceSpec {
        number: *number,
        key: device.key,
        port: device.port,
    };
    let spec = TunnelNodeSpec {
        devices: value.devices.iter().map(device).collect(),
        candidates: value.candidates.clone(),
        outside: value.outside.clone(),
        prefixes: value.prefixes.clone(),
        unreached: value.unreached.clone(),
    };
    Ok(TunnelNodeResource { metadata: own_meta(&id), spec, status: None })
}

/// The status to write. A condition whose status is what it was keeps its time; `now`: unix seconds.
pub fn write_status(
    value: &TunnelNode,
    was: Option<&TunnelNodeStatus>,
    generation: Option<i64>,
    now: u64,
) -> TunnelNodeStatus {
    let few: Vec<&str> = value.unreached.iter().take(10).map(ClusterId::as_str).collect();
    let more = value.unreached.len() - few.len();
    let (status, reason, message) = match (few.as_slice(), more) {
        ([], _) => ("True", "AllReached", "a way from this node leads to every other cluster".to_owned()),
        (few, 0) => ("False", "Unreached", format!("no way from this node leads to {}", few.join(", "))),
        (few, more) => (
            "False",
            "Unreached",
            format!("no way from this node leads to {} and {more} more", few.join(", ")),
        ),
    };
    let was = was.map(|was| was.conditions.as_slice()).unwrap_or_default();
    TunnelNodeStatus {
        conditions: vec![condition(was, "Reached", (status, reason, &message), generation, now)],
    }
}

/// Our value.
pub fn read(object: &TunnelNodeResource) -> Result<(NodeName, TunnelNode), Problem> {
    let name = NodeName::new(object.metadata.name.as_deref().unwrap_or(""))
        .map_err(|e| bad(format!("metadata.name: {e}")))?;
    let spec = &object.spec;
    if spec.candidates.len() > 64
        || spec.outside.len() > Family::ALL.len()
        || spec.prefixes.len() > Endpoint::MAX_PREFIXES
        || spec.unreached.len() > MAX_UNREACHED
    {
        return Err(bad(
            "spec.candidates, spec.outside, spec.prefixes or spec.unreached has too many entries",
        ));
    }
    let mut devices = BTreeMap::new();
    for device in &spec.devices {
        if device.port == 0 {
            return Err(bad("spec.devices: port 0"));
        }
        if devices.insert(device.number, Device { key: device.key, port: device.port }).is_some() {
            return Err(bad(format!("spec.devices: number {} stands there twice", device.number.get())));
        }
    }
    let value = TunnelNode {
        devices,
        candidates: spec.candidates.clone(),
        outside: spec.outside.clone(),
        prefixes: spec.prefixes.clone(),
        unreached: spec.unreached.clone(),
    };
    Ok((name, value))
}
