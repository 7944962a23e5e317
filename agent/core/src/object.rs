//! Objects of the cluster's API as plans see them: parsed, bounded, free of Kubernetes types.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tombolo_proto::model::{
    Backend, BackendGroup, ClusterId, Device, DeviceNumber, Family, Namespace, NodeName, Port, Preference,
    Prefix, ServiceName, ServiceType, Share,
};

use crate::shelf::Shelf;

/// Names a service in every cluster of the set (namespace sameness, KEP-1645).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceKey {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ServiceName,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// v1 Node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Label `tombolo.dev/gateway=true`.
    pub gateway: bool,
    /// Condition Ready; a Node without conditions (a directory's) is ready.
    pub ready: bool,
    /// `spec.podCIDRs`
    pub pod_cidrs: BTreeSet<Prefix>,
    /// `status.addresses` of types InternalIP and ExternalIP, in order.
    pub addresses: Vec<IpAddr>,
}

/// What a service is, as far as an export depends on it (v1 Service).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// How it would be exported.
    pub kind: LocalKind,
    /// Its ports.
    pub ports: Vec<Port>,
    /// `spec.ipFamilies`; never empty.
    pub families: Vec<Family>,
    /// `sessionAffinity: ClientIP`, seconds.
    pub affinity: Option<NonZeroU32>,
    /// `internalTrafficPolicy: Local`
    pub internal_local: bool,
    /// `trafficDistribution`
    pub traffic_distribution: Option<String>,
}

/// Type of a local service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalKind {
    /// ClusterIP, NodePort, LoadBalancer.
    ClusterIP,
    /// `clusterIP: None`
    Headless,
    /// Cannot be exported.
    ExternalName,
    /// Derived from an import by us (label of ours): never exported.
    Derived,
}

/// multicluster.x-k8s.io ServiceExport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceExport {
    /// `spec.exportedLabels`
    pub labels: BTreeMap<String, String>,
    /// `spec.exportedAnnotations`
    pub annotations: BTreeMap<String, String>,
    /// `metadata.creationTimestamp`, unix seconds.
    pub created: u64,
    /// Annotations `tombolo.dev/prefer`, `/priority` and `/weight`.
    pub preference: Preference,
    /// What cannot be read of it, if anything: a preference has its default then, a label or annotation is left out.
    pub misread: Option<String>,
}

/// tombolo.dev TunnelNode: what a node says of itself. Written by that node alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelNode {
    /// Its devices' keys and ports, of all its lanes, made at first start.
    pub devices: BTreeMap<DeviceNumber, Device>,
    /// Where it may be reached, best first.
    pub candidates: Vec<IpAddr>,
    /// Where other clusters see it, if that is none of its own addresses: one a family ([`crate::outside`]).
    #[serde(default)]
    pub outside: BTreeSet<IpAddr>,
    /// Pod ranges on it.
    pub prefixes: BTreeSet<Prefix>,
    /// Clusters that no way from it leads to, once that was steady for [`crate::steady::HOLD`]. For people and for who
    /// balances for this node; failover does not wait for it.
    #[serde(default)]
    pub unreached: BTreeSet<ClusterId>,
}

/// multicluster.x-k8s.io ServiceImport: a derived service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// ClusterSetIP or Headless.
    pub kind: ServiceType,
    /// Merged ports: unique by name and by (protocol, port).
    pub ports: Vec<Port>,
    /// ClusterSetIPs, one a family, in the order of `families`; none for Headless.
    pub ips: Vec<IpAddr>,
    /// Never empty.
    pub families: Vec<Family>,
    /// `sessionAffinity: ClientIP`, seconds.
    pub affinity: Option<NonZeroU32>,
    /// `internalTrafficPolicy: Local`
    pub internal_local: bool,
    /// `trafficDistribution`
    pub traffic_distribution: Option<String>,
    /// Of the exports.
    pub labels: BTreeMap<String, String>,
    /// Of the exports.
    pub annotations: BTreeMap<String, String>,
    /// `status.clusters`
    pub clusters: BTreeSet<ClusterId>,
    /// How connections are shared out among these.
    #[serde(default)]
    pub preferences: Preferences,
}

/// What the exports of a derived service prefer, merged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Preferences {
    /// A cluster that has eligible backends of its own uses only those.
    #[serde(default)]
    pub local: bool,
    /// Shares that are not the default.
    #[serde(default)]
    pub shares: BTreeMap<ClusterId, Share>,
}

impl Preferences {
    /// A cluster's share.
    pub fn share(&self, cluster: &ClusterId) -> Share {
        self.shares.get(cluster).copied().unwrap_or_default()
    }
}

/// Names an imported EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SliceKey {
    /// Of which derived service.
    pub service: ServiceKey,
    /// Label `multicluster.kubernetes.io/source-cluster`.
    pub source: ClusterId,
    /// `addressType`
    pub family: Family,
    /// Counts the slices of the three above.
    pub index: u32,
}

/// The slices of one service.
pub fn slices_of<'a>(
    slices: &'a Shelf<SliceKey, Slice>,
    service: &ServiceKey,
) -> impl Iterator<Item = (&'a SliceKey, &'a Slice)> + use<'a> {
    // The first id there is.
    let first = ClusterId::new("0").ok().map(|source| SliceKey {
        service: service.clone(),
        source,
        family: Family::V4,
        index: 0,
    });
    let service = service.clone();
    first
        .map(|first| slices.starting_at(&first))
        .into_iter()
        .flatten()
        .take_while(move |(key, _)| key.service == service)
}

/// An imported EndpointSlice: one source cluster, one family, one set of ports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Slice {
    /// Target ports, named as the import's ports.
    pub ports: Vec<Port>,
    /// At most 100.
    pub backends: Vec<Backend>,
    /// Belongs to the import's [`DerivedService`] too, which balances over it.
    #[serde(default)]
    pub derived: bool,
}

/// The Service that carries an import's ClusterSetIPs under Kubernetes: it selects nothing, its EndpointSlices are the
/// imported ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DerivedService {
    /// `spec.clusterIPs`, in the order of `families`. Of one that is to be made: what it shall have; none: any.
    pub ips: Vec<IpAddr>,
    /// `spec.ipFamilies`; the API never changes the first of a Service.
    pub families: Vec<Family>,
    /// The import's.
    pub ports: Vec<Port>,
    /// The import's.
    pub affinity: Option<NonZeroU32>,
    /// The import's.
    pub internal_local: bool,
    /// The import's.
    pub traffic_distribution: Option<String>,
}

/// Backends of a local service, out of all its EndpointSlices.
pub type LocalBackends = Vec<BackendGroup>;

/// Status of a ServiceExport: condition type to (status, reason, message), reasons as in mcs-api v0.5.2.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExportStatus {
    /// `Valid`, `Ready`, `Conflict`.
    pub conditions: BTreeMap<String, Condition>,
}

/// A condition without its times, which the shell keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// True or False.
    pub status: bool,
    /// CamelCase.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Names a node of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeKey {
    /// Of which cluster.
    pub cluster: ClusterId,
    /// Its name there.
    pub node: NodeName,
}

impl fmt::Display for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.node)
    }
}
