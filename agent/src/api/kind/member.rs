//! tombolo.dev/v1alpha1 Member and MemberNodes: what the controller verified of a cluster, as it came.
#![allow(unreachable_pub, reason = "the schema macro repeats the types where nobody sees them")]
#![allow(clippy::duplicated_attributes, reason = "columns are of one type")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};
use tombolo_agent_core::standing::Standing;
use tombolo_proto::model::{ClusterId, Record, RecordKey};
use tombolo_proto::trust::{Digest, Envelope, Grant, Membership};
use tombolo_proto::wire::{self, MembershipParts};

use super::{Kind, ObjectId, Problem, bad, condition, envelope_text, own_meta, read_envelope};
use crate::api::observed::Member;

/// `spec` of a Member; its name is the cluster's id.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tombolo.dev",
    version = "v1alpha1",
    kind = "Member",
    root = "MemberResource",
    plural = "members",
    shortname = "tmember",
    category = "tombolo",
    status = "MemberStatus",
    validation = Rule::new("size(self.metadata.name) <= 63").message("a member bears its cluster's id"),
    printcolumn(
        name = "Reached",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Reached\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Reached\")].reason"
    ),
    printcolumn(name = "Pods", type_ = "string", json_path = ".spec.pods"),
    printcolumn(name = "Position", type_ = "string", json_path = ".spec.position"),
    printcolumn(name = "Tunnels", type_ = "string", json_path = ".spec.tunnels", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct MemberSpec {
    /// Envelope in base64.
    pub grant: String,
    /// Envelopes in base64, generations 0, 1, ...
    #[schemars(length(max = 64))]
    pub bindings: Vec<String>,
    /// What the statement was given under, if that is not the grant above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoken: Option<SpokenSpec>,
    /// Envelope in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statement: Option<String>,
    /// SHA-256 in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces_hash: Option<String>,
    /// Of the statement, for people only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Pod ranges of the grant, for people only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<String>,
    /// Tunnel ranges of the grant, for people only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tunnels: Vec<String>,
}

/// `status` of a Member, for people only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct MemberStatus {
    /// Reached: whether any ready node of this cluster reaches it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<meta::Condition>,
}

/// An older membership, still spoken under.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct SpokenSpec {
    /// Envelope in base64.
    pub grant: String,
    /// Envelopes in base64, generations 0, 1, ...
    #[schemars(length(max = 64))]
    pub bindings: Vec<String>,
}

/// `spec` of a MemberNodes: a shard of the records of a cluster's scope `nodes`.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tombolo.dev",
    version = "v1alpha1",
    kind = "MemberNodes",
    root = "MemberNodesResource",
    plural = "membernodes",
    shortname = "tmnodes",
    category = "tombolo",
    validation = Rule::new("self.metadata.name.startsWith(self.spec.cluster)").message("its name is CLUSTER.SHARD"),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    derive = "PartialEq"
)]
pub struct MemberNodesSpec {
    /// Whose nodes.
    #[schemars(with = "String", length(max = 63))]
    pub cluster: ClusterId,
    /// Counts the shards of a cluster.
    #[schemars(with = "i64", range(min = 0, max = 4_294_967_295_i64))]
    pub shard: u32,
    /// At most 100.
    #[schemars(length(max = 100))]
    pub records: Vec<RecordSpec>,
}

/// A record, its body opaque.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct RecordSpec {
    /// Kind of the record's key.
    #[schemars(with = "i64", range(min = 0, max = 4_294_967_295_i64))]
    pub kind: u32,
    /// Parts of the record's key.
    #[schemars(length(max = 8))]
    pub name: Vec<String>,
    /// Base64.
    #[schemars(length(max = 87_384))]
    pub body: String,
}

/// Records of a shard.
pub const MAX_SHARD: usize = 100;
/// Bytes of the bodies of a shard, so that etcd takes the object (limit 1.5 MiB).
pub const MAX_SHARD_BYTES: usize = 512 * 1024;

/// Where a cluster's Member lies.
pub fn id(cluster: &ClusterId) -> Result<ObjectId, Problem> {
    ObjectId::cluster(Kind::Member, cluster.as_str())
}

/// Where a shard lies. A cluster's id has no dot, so the name is unambiguous.
pub fn nodes_id(cluster: &ClusterId, shard: u32) -> Result<ObjectId, Problem> {
    ObjectId::cluster(Kind::MemberNodes, &format!("{cluster}.{shard}"))
}

/// The API's object of a member.
pub fn write(cluster: &ClusterId, member: &Member) -> Result<MemberResource, Problem> {
    let position = member
        .statement
        .as_ref()
        .and_then(|envelope| wire::decode_statement(&envelope.payload).ok())
        .map(|statement| statement.position.to_string());
    let grant = wire::decode_grant(&member.grant.payload).ok();
    let texts = |take: fn(&Grant) -> Vec<String>| grant.as_ref().map(take).unwrap_or_default();
    let spec = MemberSpec {
        grant: envelope_text(&member.grant),
        bindings: member.bindings.iter().map(envelope_text).collect(),
        spoken: member.spoken.as_ref().map(|spoken| SpokenSpec {
            grant: envelope_text(&spoken.grant),
            bindings: spoken.bindings.iter().map(envelope_text).collect(),
        }),
        statement: member.statement.as_ref().map(envelope_text),
        namespaces_hash: member.namespaces.map(|digest| data_encoding::HEXLOWER.encode(&digest.0)),
        position,
        pods: texts(|grant| grant.owned.iter().map(ToString::to_string).collect()),
        tunnels: texts(|grant| grant.tunnel.iter().map(ToString::to_string).collect()),
    };
    Ok(MemberResource { metadata: own_meta(&id(cluster)?), spec, status: None })
}

/// The status to write. A condition whose status is what it was keeps its time; `now`: unix seconds.
pub fn write_status(
    standing: &Standing,
    was: Option<&MemberStatus>,
    generation: Option<i64>,
    now: u64,
) -> MemberStatus {
    let status = match standing.reached {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    let was = was.map(|was| was.conditions.as_slice()).unwrap_or_default();
    let value = (status, standing.reason, standing.message.as_str());
    MemberStatus { conditions: vec![condition(was, "Reached", value, generation, now)] }
}

/// A member. Nothing in it is verified here.
pub fn read(object: &MemberResource) -> Result<(ClusterId, Member), Problem> {
    let cluster = ClusterId::new(object.metadata.name.as_deref().unwrap_or(""))
        .map_err(|e| bad(format!("metadata.name: {e}")))?;
    let spec = &object.spec;
    let bindings = |field: &str, list: &[String]| -> Result<Vec<Envelope>, Problem> {
        if list.len() > Membership::MAX_BINDINGS {
            return Err(bad(format!("spec.{field} has too many entries")));
        }
        list.iter().map(|b| read_envelope(field, b)).collect()
    };
    let spoken = |spoken: &SpokenSpec| {
        Ok(MembershipParts {
            grant: read_envelope("spoken.grant", &spoken.grant)?,
            bindings: bindings("spoken.bindings", &spoken.bindings)?,
        })
    };
    let digest = |text: &String| {
        let bytes = data_encoding::HEXLOWER.decode(text.as_bytes()).ok();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Digest)
            .ok_or_else(|| bad("spec.namespacesHash is not 64 hexadecimal digits"))
    };
    let member = Member {
        grant: read_envelope("grant", &spec.grant)?,
        bindings: bindings("bindings", &spec.bindings)?,
        spoken: spec.spoken.as_ref().map(spoken).transpose()?,
        statement: spec.statement.as_ref().map(|s| read_envelope("statement", s)).transpose()?,
        namespaces: spec.namespaces_hash.as_ref().map(digest).transpose()?,
    };
    Ok((cluster, member))
}

/// The API's objects of a cluster's `nodes`, by shard. A record stays in the shard where `placed` says it is, so
/// that a node that comes or goes rewrites one object.
pub fn write_nodes(
    cluster: &ClusterId,
    nodes: &BTreeMap<RecordKey, Record>,
    placed: &BTreeMap<RecordKey, u32>,
) -> Result<BTreeMap<u32, MemberNodesResource>, Problem> {
    let mut shards: BTreeMap<u32, (usize, Vec<&Record>)> = BTreeMap::new();
    let mut waiting = Vec::new();
    let room = |shard: Option<&(usize, Vec<&Record>)>, record: &Record| match shard {
        None => true,
        Some((bytes, records)) => records.len() < MAX_SHARD && bytes + record.body.len() <= MAX_SHARD_BYTES,
    };
    for (key, record) in nodes {
        match placed.get(key) {
            Some(shard) if room(shards.get(shard), record) => {
                let (bytes, records) = shards.entry(*shard).or_default();
                *bytes += record.body.len();
                records.push(record);
            }
            _ => waiting.push(record),
        }
    }
    let mut shard = 0;
    for record in waiting {
        while !room(shards.get(&shard), record) {
            shard += 1;
        }
        let (bytes, records) = shards.entry(shard).or_default();
        *bytes += record.body.len();
        records.push(record);
    }
    let mut objects = BTreeMap::new();
    for (shard, (_, mut records)) in shards {
        records.sort_by(|a, b| a.key.cmp(&b.key));
        let record = |record: &&Record| RecordSpec {
            kind: record.key.kind(),
            name: record.key.name().iter().map(ToString::to_string).collect(),
            body: data_encoding::BASE64.encode(&record.body),
        };
        let spec = MemberNodesSpec {
            cluster: cluster.clone(),
            shard,
            records: records.iter().map(record).collect(),
        };
        let metadata = own_meta(&nodes_id(cluster, shard)?);
        objects.insert(shard, MemberNodesResource { metadata, spec });
    }
    Ok(objects)
}

/// A shard of a cluster's `nodes`.
pub fn read_nodes(object: &MemberNodesResource) -> Result<(ClusterId, u32, Vec<Record>), Problem> {
    let spec = &object.spec;
    if object.metadata.name.as_deref() != Some(format!("{}.{}", spec.cluster, spec.shard).as_str()) {
        return Err(bad("its name does not fit spec.cluster and spec.shard"));
    }
    if spec.records.len() > MAX_SHARD {
        return Err(bad("spec.records has too many entries"));
    }
    let mut records = Vec::new();
    for (index, record) in spec.records.iter().enumerate() {
        let parts: Vec<&str> = record.name.iter().map(String::as_str).collect();
        let key = RecordKey::new(record.kind, &parts);
        let body = data_encoding::BASE64.decode(record.body.as_bytes()).ok();
        let (Some(key), Some(body)) = (key, body.filter(|b| b.len() <= Record::MAX_BODY)) else {
            return Err(bad(format!("spec.records[{index}] is not a record")));
        };
        records.push(Record { key, body: body.into() });
    }
    Ok((spec.cluster.clone(), spec.shard, records))
}
