//! tombolo.dev/v1alpha1 ClusterSet: the object that makes a cluster a member.
#![allow(unreachable_pub, reason = "the schema macro repeats the types where nobody sees them")]
#![allow(clippy::duplicated_attributes, reason = "columns are of one type")]

use std::collections::{BTreeMap, BTreeSet};

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::{ClusterId, NodeName, Prefix};
use tombolo_proto::trust::{RootChain, SetId};

use super::{Kind, ObjectId, Problem, bad, envelope_text, own_meta, read_envelope};
use crate::api::observed::ClusterSet;

/// The one name.
pub const NAME: &str = "clusterset";

/// `spec` of a ClusterSet.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tombolo.dev",
    version = "v1alpha1",
    kind = "ClusterSet",
    root = "ClusterSetResource",
    plural = "clustersets",
    shortname = "cset",
    category = "tombolo",
    validation = Rule::new("self.metadata.name == 'clusterset'").message("the one ClusterSet is named clusterset"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Set", type_ = "string", json_path = ".spec.set"),
    printcolumn(name = "Reach", type_ = "string", json_path = ".spec.reach"),
    printcolumn(name = "Topology", type_ = "string", json_path = ".spec.topology"),
    printcolumn(name = "Leaving", type_ = "boolean", json_path = ".spec.leaving"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    derive = "PartialEq"
)]
pub struct ClusterSetSpec {
    /// The set that was pinned at join.
    #[schemars(with = "String", length(max = 128))]
    #[x_kube(
        validation = Rule::new("self == oldSelf")
            .message("a cluster changes its set by leaving one and joining another: delete the object first")
    )]
    pub set: SetId,
    /// The own cluster's id.
    #[schemars(with = "String", length(max = 63))]
    #[x_kube(
        validation = Rule::new("self == oldSelf")
            .message("a cluster's id does not change: leave the set, and join under another")
    )]
    pub cluster: ClusterId,
    /// Envelopes in base64, versions 1, 2, ...
    #[schemars(length(min = 1, max = 1000))]
    pub roots: Vec<String>,
    /// Envelope in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brokers: Option<String>,
    /// Envelope in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocations: Option<String>,
    /// exports or all.
    #[serde(default)]
    #[schemars(with = "String", regex(pattern = "^(exports|all)$"))]
    pub reach: Reach,
    /// gateway or mesh.
    #[serde(default)]
    #[schemars(with = "String", regex(pattern = "^(gateway|mesh)$"))]
    pub topology: Topology,
    /// Where a directory's ClusterSetIPs come from. Under Kubernetes Services carry them, and there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<RangesSpec>")]
    pub clusterset: Option<ClustersetRanges>,
    /// Other ranges of this cluster that no other may own.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    #[schemars(with = "Vec<String>", length(max = 1000))]
    pub reserved: BTreeSet<Prefix>,
    /// Nodes that are to change their WireGuard keys, once for every number that is larger than the one before.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, i64>")]
    pub rotations: BTreeMap<NodeName, u64>,
    /// Of its own will the cluster says nothing any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// [`ClustersetRanges`], for the schema.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "its fields are only described")]
struct RangesSpec {
    /// An IPv4 range.
    v4: Option<String>,
    /// An IPv6 range.
    v6: Option<String>,
}

/// Where it lies.
pub fn id() -> Result<ObjectId, Problem> {
    ObjectId::cluster(Kind::ClusterSet, NAME)
}

/// The API's object.
pub fn write(value: &ClusterSet) -> Result<ClusterSetResource, Problem> {
    let spec = ClusterSetSpec {
        set: value.set,
        cluster: value.cluster.clone(),
        roots: value.roots.iter().map(envelope_text).collect(),
        brokers: value.brokers.as_ref().map(envelope_text),
        revocations: value.revocations.as_ref().map(envelope_text),
        reach: value.reach,
        topology: value.topology,
        clusterset: value.clusterset,
        reserved: value.reserved.clone(),
        rotations: value.rotations.clone(),
        leaving: value.leaving,
    };
    Ok(ClusterSetResource { metadata: own_meta(&id()?), spec })
}

/// Our value. Nothing in it is verified here.
pub fn read(object: &ClusterSetResource) -> Result<ClusterSet, Problem> {
    let spec = &object.spec;
    if spec.roots.is_empty() || spec.roots.len() > RootChain::MAX_VERSIONS {
        return Err(bad("spec.roots is empty or has too many entries"));
    }
    Ok(ClusterSet {
        set: spec.set,
        cluster: spec.cluster.clone(),
        roots: spec.roots.iter().map(|r| read_envelope("roots", r)).collect::<Result<_, _>>()?,
        brokers: spec.brokers.as_ref().map(|b| read_envelope("brokers", b)).transpose()?,
        revocations: spec.revocations.as_ref().map(|r| read_envelope("revocations", r)).transpose()?,
        reach: spec.reach,
        topology: spec.topology,
        clusterset: spec.clusterset,
        reserved: spec.reserved.clone(),
        rotations: spec.rotations.clone(),
        leaving: spec.leaving,
    })
}
