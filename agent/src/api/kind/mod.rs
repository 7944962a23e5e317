//! The kinds of objects we read and write, and what they are in `tombolo-agent-core`'s words.
//!
//! One file a noun. Each gives `read(..)`, from the API's object to our value or a [`Problem`], and, for what we
//! write, `write(..)`, the way back. Both forms of the API use them.

pub mod cluster_set;
pub mod derived;
pub mod lease;
pub mod member;
pub mod multicluster;
pub mod node;
pub mod secret;
pub mod service;
pub mod slice;
pub mod tunnel_node;
pub mod tutorial;

#[cfg(test)]
mod tests;

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use k8s_openapi::jiff;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::object::ServiceKey;
use tombolo_proto::model::{Namespace, ServiceName};
use tombolo_proto::trust::Envelope;
use tombolo_proto::{pb, wire};

/// Namespace of our own namespaced objects.
pub const OWN_NAMESPACE: &str = "tombolo-system";
/// Label and annotation keys under it are ours.
pub const OWN_PREFIX: &str = "tombolo.dev/";
/// On what we write.
pub const MANAGED_BY_LABEL: &str = "tombolo.dev/managed-by";
/// Value of [`MANAGED_BY_LABEL`], and of `endpointslice.kubernetes.io/managed-by` on our slices.
pub const MANAGED_BY: &str = "tombolo.dev";

/// A kind we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// v1
    Namespace,
    /// v1
    Node,
    /// v1
    Service,
    /// discovery.k8s.io/v1
    EndpointSlice,
    /// multicluster.x-k8s.io
    ServiceExport,
    /// multicluster.x-k8s.io
    ServiceImport,
    /// v1
    Secret,
    /// coordination.k8s.io/v1
    Lease,
    /// tombolo.dev/v1alpha1
    Member,
    /// tombolo.dev/v1alpha1
    MemberNodes,
    /// tombolo.dev/v1alpha1
    TunnelNode,
    /// tombolo.dev/v1alpha1
    ClusterSet,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Namespace,
        Self::Node,
        Self::Service,
        Self::EndpointSlice,
        Self::ServiceExport,
        Self::ServiceImport,
        Self::Secret,
        Self::Lease,
        Self::Member,
        Self::MemberNodes,
        Self::TunnelNode,
        Self::ClusterSet,
    ];

    /// As in `kind:`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceExport => "ServiceExport",
            Self::ServiceImport => "ServiceImport",
            Self::Secret => "Secret",
            Self::Lease => "Lease",
            Self::Member => "Member",
            Self::MemberNodes => "MemberNodes",
            Self::TunnelNode => "TunnelNode",
            Self::ClusterSet => "ClusterSet",
        }
    }

    /// As in `apiVersion:`, the one we write.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Service | Self::Secret => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceExport | Self::ServiceImport => "multicluster.x-k8s.io/v1beta1",
            Self::Lease => "coordination.k8s.io/v1",
            Self::Member | Self::MemberNodes | Self::TunnelNode | Self::ClusterSet => "tombolo.dev/v1alpha1",
        }
    }

    /// `plural.group`: the name of its CRD, and of its directory in `state/`.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices.discovery.k8s.io",
            Self::ServiceExport => "serviceexports.multicluster.x-k8s.io",
            Self::ServiceImport => "serviceimports.multicluster.x-k8s.io",
            Self::Secret => "secrets",
            Self::Lease => "leases.coordination.k8s.io",
            Self::Member => "members.tombolo.dev",
            Self::MemberNodes => "membernodes.tombolo.dev",
            Self::TunnelNode => "tunnelnodes.tombolo.dev",
            Self::ClusterSet => "clustersets.tombolo.dev",
        }
    }

    /// Whether its objects lie in namespaces.
    pub fn is_namespaced(self) -> bool {
        match self {
            Self::Service
            | Self::EndpointSlice
            | Self::ServiceExport
            | Self::ServiceImport
            | Self::Secret
            | Self::Lease => true,
            Self::Namespace
            | Self::Node
            | Self::Member
            | Self::MemberNodes
            | Self::TunnelNode
            | Self::ClusterSet => false,
        }
    }

    /// The kind of an `apiVersion` and a `kind`, if both are ones we read.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let found = Self::ALL.into_iter().find(|k| k.name() == kind)?;
        let multicluster = matches!(found, Self::ServiceExport | Self::ServiceImport);
        let known = api_version == found.api_version()
            || multicluster && api_version == "multicluster.x-k8s.io/v1alpha1";
        known.then_some(found)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Name of an object: a DNS name, short enough to be a file's name too.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectName(String);

impl ObjectName {
    /// Characters.
    pub const MAX: usize = 245;

    /// Labels of lower-case letters, digits and '-', joined by '.'.
    pub fn new(text: &str) -> Result<Self, Problem> {
        let label = |l: &str| {
            let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            l.len() <= 63
                && end(l.bytes().next())
                && end(l.bytes().last())
                && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if text.is_empty() {
            return Err(Problem::error("BadObject", "metadata.name is missing"));
        }
        if text.len() > Self::MAX {
            return Err(Problem::error(
                "BadObject",
                format!("metadata.name {:?}... is longer than {} characters", shorten(text), Self::MAX),
            ));
        }
        if !text.split('.').all(label) {
            return Err(Problem::error(
                "BadObject",
                format!(
                    "metadata.name {:?} is not a DNS name (labels of lower-case letters, digits and '-', joined by '.')",
                    shorten(text)
                ),
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names an object of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectId {
    /// What it is.
    pub kind: Kind,
    /// Where; none for kinds outside of namespaces.
    pub namespace: Option<Namespace>,
    /// Which.
    pub name: ObjectName,
}

impl ObjectId {
    /// An object outside of namespaces.
    pub fn cluster(kind: Kind, name: &str) -> Result<Self, Problem> {
        Ok(Self { kind, namespace: None, name: ObjectName::new(name)? })
    }

    /// An object in a namespace.
    pub fn namespaced(kind: Kind, namespace: &Namespace, name: &str) -> Result<Self, Problem> {
        Ok(Self { kind, namespace: Some(namespace.clone()), name: ObjectName::new(name)? })
    }

    /// What a service's key names in `kind`.
    pub fn of_service(kind: Kind, key: &ServiceKey) -> Result<Self, Problem> {
        Self::namespaced(kind, &key.namespace, key.name.as_str())
    }

    /// The service of that name.
    pub fn service_key(&self) -> Result<ServiceKey, Problem> {
        let namespace = self.namespace.clone().ok_or_else(|| bad("metadata.namespace is missing"))?;
        let name = ServiceName::new(self.name.as_str()).map_err(|e| bad(format!("metadata.name: {e}")))?;
        Ok(ServiceKey { namespace, name })
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name.0),
            None => write!(f, "{} {}", self.kind, self.name.0),
        }
    }
}

/// What is wrong with an object; becomes a [`Finding`] once it is known where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// See [`Finding::reason`].
    pub reason: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

impl Problem {
    /// The object cannot be used.
    pub fn error(reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, reason, message: message.into() }
    }

    /// The object is used all the same.
    pub fn warning(reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, reason, message: message.into() }
    }

    /// As a finding on `object`, found at `place`.
    pub fn on(&self, object: String, place: &str) -> Finding {
        // Parsers quote what they read; a terminal must not obey it.
        let text = |c: char| if c.is_control() && c != '\n' { '\u{fffd}' } else { c };
        let message = format!("{place}: {}", self.message).chars().map(text).collect();
        let object = object.chars().map(text).collect();
        Finding { severity: self.severity, reason: self.reason, object, message }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

pub(crate) fn bad(message: impl Into<String>) -> Problem {
    Problem::error("BadObject", message)
}

/// A text from outside, for a message.
pub(crate) fn shorten(text: &str) -> String {
    text.chars().take(60).collect()
}

/// Takes an API object out of JSON; an error names the field.
pub(crate) fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let text = error.inner().to_string();
        let hint = if text.contains("expected a string") || text.contains("expected a map") && path == "." {
            " (put values such as true, 1.0 or 80 in quotes where a text is needed)"
        } else {
            ""
        };
        bad(format!("{path}: {}{hint}", text.chars().take(200).collect::<String>()))
    })
}

/// An API object as JSON.
pub(crate) fn json<T: Serialize>(object: &T) -> Value {
    // Our objects are plain structs with text keys: serialising into a value does not fail.
    serde_json::to_value(object).unwrap_or(Value::Null)
}

/// Metadata of an object of ours.
pub(crate) fn own_meta(id: &ObjectId) -> ObjectMeta {
    ObjectMeta {
        name: Some(id.name.0.clone()),
        namespace: id.namespace.as_ref().map(ToString::to_string),
        labels: Some([(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned())].into()),
        ..ObjectMeta::default()
    }
}

/// Who an object says it is. A namespaced one without a namespace is in `default`, as for kubectl.
pub fn identity(kind: Kind, value: &Value) -> Result<ObjectId, Problem> {
    let meta = value.get("metadata").ok_or_else(|| bad("metadata is missing"))?;
    let text = |field: &str| match meta.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(bad(format!("metadata.{field} is not a text; put it in quotes"))),
    };
    let name = ObjectName::new(text("name")?.unwrap_or(""))?;
    let namespace = if kind.is_namespaced() {
        let namespace = Namespace::new(text("namespace")?.unwrap_or("default"));
        Some(namespace.map_err(|e| bad(format!("metadata.namespace: {e}")))?)
    } else {
        None
    };
    Ok(ObjectId { kind, namespace, name })
}

/// An envelope as text: protobuf in base64.
pub fn envelope_text(envelope: &Envelope) -> String {
    data_encoding::BASE64.encode(&wire::encode_envelope(envelope).encode_to_vec())
}

/// Takes an envelope out of its text; nothing in it is believed yet.
pub fn read_envelope(field: &str, text: &str) -> Result<Envelope, Problem> {
    let bytes = data_encoding::BASE64
        .decode(text.as_bytes())
        .map_err(|_| bad(format!("spec.{field} is not base64")))?;
    let value = pb::Envelope::decode(bytes.as_slice())
        .map_err(|_| bad(format!("spec.{field} is not a signed document")))?;
    wire::decode_envelope(&value).map_err(|e| bad(format!("spec.{field}: {e}")))
}

/// A condition to write: status, reason and message. One whose status is what it `was` keeps its time; `now`: unix seconds.
fn condition(
    was: &[Condition],
    kind: &str,
    (status, reason, message): (&str, &str, &str),
    generation: Option<i64>,
    now: u64,
) -> Condition {
    let known = was.iter().find(|c| c.type_ == kind && c.status == status);
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: known.map_or_else(|| time(now), |known| known.last_transition_time.clone()),
        observed_generation: generation,
    }
}

/// Unix seconds as the API writes them.
pub(crate) fn time(seconds: u64) -> Time {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    Time(jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX))
}

/// Unix seconds of a time; 0 before 1970.
pub(crate) fn seconds(time: &Time) -> u64 {
    u64::try_from(time.0.as_second()).unwrap_or(0)
}
