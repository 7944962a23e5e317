//! tombolo.dev/v1alpha1 ClusterSet: the object that makes a cluster a member.

use std::collections::{BTreeMap, BTreeSet};

use kube::CustomResource;
use serde::{Deserialize, Serialize};
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::{ClusterId, NodeName, Prefix};
use tombolo_proto::trust::{RootChain, SetId};

use super::{Kind, ObjectId, Problem, bad, envelope_text, own_meta, read_envelope};
use crate::api::observed::ClusterSet;

/// The one name.
pub const NAME: &str = "clusterset";

/// `spec` of a ClusterSet.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tombolo.dev",
    version = "v1alpha1",
    kind = "ClusterSet",
    root = "ClusterSetResource",
    plural = "clustersets",
    schema = "disabled",
    derive = "PartialEq"
)]
pub struct ClusterSetSpec {
    /// The set that was pinned at join.
    pub set: SetId,
    /// The own cluster's id.
    pub cluster: ClusterId,
    /// Envelopes in base64, versions 1, 2, ...
    pub roots: Vec<String>,
    /// Envelope in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brokers: Option<String>,
    /// Envelope in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocations: Option<String>,
    /// exports or all.
    #[serde(default)]
    pub reach: Reach,
    /// gateway or mesh.
    #[serde(default)]
    pub topology: Topology,
    /// Where a directory's ClusterSetIPs come from.
    pub clusterset: ClustersetRanges,
    /// Other ranges of this cluster that no other may own.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub reserved: BTreeSet<Prefix>,
    /// Nodes that are to change their WireGuard keys, once for every number that is larger than the one before.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rotations: BTreeMap<NodeName, u64>,
    /// Of its own will the cluster says nothing any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
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
