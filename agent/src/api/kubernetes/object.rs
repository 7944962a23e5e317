//! What is watched, and which value an object of it is.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::core::ApiResource;
use serde_json::{Map, Value};
use tombolo_agent_core::finding::Severity;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, Node, Service, ServiceExport, ServiceKey, Slice, SliceKey,
    TunnelNode,
};
use tombolo_proto::model::{ClusterId, Namespace, NodeName, Prefix, Record};

use crate::api::kind::member::MemberStatus;
use crate::api::kind::multicluster::{ServiceExportStatus, ServiceImportStatus};
use crate::api::kind::tunnel_node::TunnelNodeStatus;
use crate::api::kind::{
    Kind, Problem, bad, cluster_set, derived, identity, member, multicluster, node, service, slice,
    tunnel_node, typed,
};
use crate::api::observed::{ClusterSet, Member};

/// A kind of objects that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// One of those that we read in every form of the API.
    Kind(Kind),
    /// networking.k8s.io ServiceCIDR: where this cluster's Services have their addresses.
    ServiceCidr,
    /// about.k8s.io ClusterProperty.
    ClusterProperty,
    /// crd.projectcalico.org BlockAffinity: which ranges Calico gives to the pods of a node.
    BlockAffinity,
    /// cilium.io CiliumNode: the same of Cilium.
    CiliumNode,
}

impl Source {
    /// What the API serves it as: the newest that we know first.
    pub(super) fn resources(self) -> Vec<ApiResource> {
        match self {
            Self::Kind(kind @ (Kind::ServiceExport | Kind::ServiceImport)) => {
                ["v1beta1", "v1alpha1"].map(|version| of_kind(kind, version)).into()
            }
            Self::Kind(kind) => {
                let version = kind.api_version().rsplit('/').next().unwrap_or_default();
                vec![of_kind(kind, version)]
            }
            Self::ServiceCidr => vec![resource("networking.k8s.io", "v1", "ServiceCIDR", "servicecidrs")],
            Self::ClusterProperty => ["v1beta1", "v1alpha1"]
                .map(|v| resource("about.k8s.io", v, "ClusterProperty", "clusterproperties"))
                .into(),
            Self::BlockAffinity => {
                vec![resource("crd.projectcalico.org", "v1", "BlockAffinity", "blockaffinities")]
            }
            Self::CiliumNode => vec![resource("cilium.io", "v2", "CiliumNode", "ciliumnodes")],
        }
    }

    /// Whether a cluster may well not have the kind: then it has no objects of it.
    pub(super) fn is_optional(self) -> bool {
        !matches!(self, Self::Kind(_))
    }

    /// As in `kind:`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kind(kind) => kind.name(),
            Self::ServiceCidr => "ServiceCIDR",
            Self::ClusterProperty => "ClusterProperty",
            Self::BlockAffinity => "BlockAffinity",
            Self::CiliumNode => "CiliumNode",
        }
    }

    /// Which of them an agent needs, as a label selector and a field selector.
    pub(super) fn selectors(self, scope: &Scope) -> (Option<String>, Option<String>) {
        use crate::api::kind::{MANAGED_BY, MANAGED_BY_LABEL, slice::SLICE_MANAGER_LABEL};
        let own = || Some(format!("metadata.name={}", scope.node));
        match self {
            Self::Kind(Kind::ServiceImport) if !scope.controller => {
                (Some(format!("{MANAGED_BY_LABEL}={MANAGED_BY}")), None)
            }
            Self::Kind(Kind::EndpointSlice) if !scope.controller => {
                (Some(format!("{SLICE_MANAGER_LABEL}={MANAGED_BY}")), None)
            }
            Self::Kind(Kind::TunnelNode) if !scope.controller => (None, own()),
            Self::CiliumNode => (None, own()),
            _ => (None, None),
        }
    }
}

/// What an agent is, and so which objects it needs: a node does without Services and their EndpointSlices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The agent's node.
    pub node: NodeName,
    /// It plans that node.
    pub is_node: bool,
    /// It may lead.
    pub controller: bool,
}

impl Scope {
    /// What is to be watched.
    pub(super) fn sources(&self) -> BTreeSet<Source> {
        let mut sources = BTreeSet::from(
            [
                Kind::Node,
                Kind::EndpointSlice,
                Kind::ServiceImport,
                Kind::Member,
                Kind::MemberNodes,
                Kind::TunnelNode,
                Kind::ClusterSet,
            ]
            .map(Source::Kind),
        );
        sources.insert(Source::ServiceCidr);
        if self.is_node {
            sources.extend([Source::BlockAffinity, Source::CiliumNode]);
        }
        if self.controller {
            sources.extend([Kind::Namespace, Kind::Service, Kind::ServiceExport].map(Source::Kind));
            sources.insert(Source::ClusterProperty);
        }
        sources
    }
}

fn of_kind(kind: Kind, version: &str) -> ApiResource {
    let (plural, group) = kind.plural().split_once('.').unwrap_or((kind.plural(), ""));
    resource(group, version, kind.name(), plural)
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let (group, version) = (group.to_owned(), version.to_owned());
    ApiResource { group, version, api_version, kind: kind.to_owned(), plural: plural.to_owned() }
}

/// A parsed object.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Object {
    Namespace(Namespace),
    Node(NodeName, Node),
    Service(ServiceKey, Arc<Service>),
    /// One of ours, beside what it is as any Service.
    Derived {
        as_service: (ServiceKey, Arc<Service>),
        of: ServiceKey,
        value: Arc<DerivedService>,
    },
    LocalSlice(slice::LocalSlice),
    Export(ServiceKey, Arc<ServiceExport>, Arc<ExportStatus>, Option<ServiceExportStatus>),
    Import {
        key: ServiceKey,
        value: Arc<Import>,
        ours: bool,
        status: Option<ServiceImportStatus>,
    },
    Slice(SliceKey, Arc<Slice>),
    Member(ClusterId, Member, Option<MemberStatus>),
    MemberNodes(ClusterId, u32, Vec<Record>),
    TunnelNode(NodeName, TunnelNode, Option<TunnelNodeStatus>),
    ClusterSet(ClusterSet),
    ServiceCidr(BTreeSet<Prefix>),
    /// Name and value, and whether it is ours.
    Property(String, String, bool),
    /// Ranges of a node's pods.
    PodRanges(NodeName, BTreeSet<Prefix>),
    /// Of no interest.
    Other,
}

impl Object {
    /// Of the kinds that others make too: whether this one is ours to remove.
    pub(super) fn is_ours(&self) -> bool {
        match self {
            Self::Namespace(_)
            | Self::Node(..)
            | Self::Service(..)
            | Self::LocalSlice(_)
            | Self::Export(..)
            | Self::Other => false,
            Self::Import { ours, .. } | Self::Property(_, _, ours) => *ours,
            _ => true,
        }
    }
}

/// Reads an object of a source.
pub(super) fn read(source: Source, value: &mut Value) -> Result<Object, Problem> {
    let Source::Kind(kind) = source else { return foreign(source, value) };
    match kind {
        Kind::Namespace => {
            let namespace = Namespace::new(text(value, "/metadata/name"));
            let ends = value.pointer("/metadata/deletionTimestamp").is_some();
            let namespace = namespace.map_err(|e| bad(format!("metadata.name: {e}")))?;
            // One that ends takes nothing new: the API would refuse it.
            Ok(if ends { Object::Other } else { Object::Namespace(namespace) })
        }
        Kind::Node => {
            let (name, value) = node::read(&typed::<core::Node>(value)?)?;
            Ok(Object::Node(name, value))
        }
        Kind::Service => {
            let object: core::Service = typed(value)?;
            let (key, as_any) = service::read(&object)?;
            let as_any = Arc::new(as_any);
            let Some((of, mut value)) = derived::read(&object)? else {
                return Ok(Object::Service(key, as_any));
            };
            if derived::is_bent(&object) {
                // No Service is without a family: so it is seen to be another than it should be.
                value.families.clear();
            }
            Ok(Object::Derived { as_service: (key, as_any), of, value: Arc::new(value) })
        }
        Kind::EndpointSlice => {
            let object: discovery::EndpointSlice = typed(value)?;
            let labels = object.metadata.labels.as_ref();
            let ours = labels.and_then(|l| l.get(slice::SLICE_MANAGER_LABEL));
            if ours.is_some_and(|manager| manager == crate::api::kind::MANAGED_BY) {
                let (key, value) = slice::read(&object)?;
                // One that only says that it is ours has another name.
                let id = slice::id(&key)?;
                let is = object.metadata.name.as_deref() == Some(id.name.as_str());
                return Ok(if is { Object::Slice(key, Arc::new(value)) } else { Object::Other });
            }
            match slice::read_local(&object) {
                Ok(local) => Ok(local.map_or(Object::Other, Object::LocalSlice)),
                // Other programs use slices for other things: that is no mistake.
                Err(problem) if problem.severity == Severity::Warning => Ok(Object::Other),
                Err(problem) => Err(problem),
            }
        }
        Kind::ServiceExport => {
            if value.get("spec").is_none_or(Value::is_null) {
                value["spec"] = Value::Object(Map::new());
            }
            let object: multicluster::ServiceExportResource = typed(value)?;
            let (key, export) = multicluster::read_export(&object)?;
            let status = Arc::new(multicluster::read_status(&object));
            Ok(Object::Export(key, Arc::new(export), status, object.status))
        }
        Kind::ServiceImport => {
            fill_families(value);
            let object: multicluster::ServiceImportResource = typed(value)?;
            let ours = multicluster::is_ours(&object);
            let (key, value) = multicluster::read_import(&object)?;
            Ok(Object::Import { key, value: Arc::new(value), ours, status: object.status })
        }
        Kind::Member => {
            let object: member::MemberResource = typed(value)?;
            let (cluster, value) = member::read(&object)?;
            Ok(Object::Member(cluster, value, object.status))
        }
        Kind::MemberNodes => {
            let (cluster, shard, records) = member::read_nodes(&typed(value)?)?;
            Ok(Object::MemberNodes(cluster, shard, records))
        }
        Kind::TunnelNode => {
            let object: tunnel_node::TunnelNodeResource = typed(value)?;
            let (name, value) = tunnel_node::read(&object)?;
            Ok(Object::TunnelNode(name, value, object.status))
        }
        Kind::ClusterSet => {
            let id = identity(kind, value)?;
            if id.name.as_str() != cluster_set::NAME {
                let text = format!("only the ClusterSet named {} counts; remove this one", cluster_set::NAME);
                return Err(Problem::warning("StrayObject", text));
            }
            let mut set = cluster_set::read(&typed(value)?)?;
            // Services carry ClusterSetIPs here, whatever it says.
            set.clusterset = None;
            Ok(Object::ClusterSet(set))
        }
        Kind::Lease | Kind::Secret => Ok(Object::Other),
    }
}

/// CustomResourceDefinitions from before mcs-api v0.4 drop `ipFamilies`.
fn fill_families(value: &mut Value) {
    let empty = |list: Option<&Value>| list.and_then(Value::as_array).is_none_or(Vec::is_empty);
    if !empty(value.pointer("/spec/ipFamilies")) {
        return;
    }
    let ips = value.pointer("/spec/ips").and_then(Value::as_array);
    let family = |ip: &Value| if ip.as_str().is_some_and(|ip| ip.contains(':')) { "IPv6" } else { "IPv4" };
    let mut families: Vec<Value> = ips.into_iter().flatten().map(|ip| family(ip).into()).collect();
    if families.is_empty() {
        families.push("IPv4".into());
    }
    if let Some(spec) = value.get_mut("spec").and_then(Value::as_object_mut) {
        spec.insert("ipFamilies".to_owned(), Value::Array(families));
    }
}

fn foreign(source: Source, value: &Value) -> Result<Object, Problem> {
    let list = |pointer: &str| -> Result<BTreeSet<Prefix>, Problem> {
        let entries = value.pointer(pointer).and_then(Value::as_array);
        let prefix = |entry: &Value| {
            let text = entry.as_str().unwrap_or_default();
            text.parse::<Prefix>().map_err(|e| bad(format!("{pointer}: {e}")))
        };
        entries.into_iter().flatten().take(256).map(prefix).collect()
    };
    match source {
        Source::ServiceCidr => Ok(Object::ServiceCidr(list("/spec/cidrs")?)),
        Source::ClusterProperty => {
            let label = format!("/metadata/labels/{}", crate::api::kind::MANAGED_BY_LABEL.replace('/', "~1"));
            let ours = text(value, &label) == crate::api::kind::MANAGED_BY;
            let (name, value) = (text(value, "/metadata/name"), text(value, "/spec/value"));
            Ok(Object::Property(name.to_owned(), value.to_owned(), ours))
        }
        Source::BlockAffinity => {
            let node = text(value, "/spec/node");
            let gone = text(value, "/spec/deleted") == "true" || text(value, "/spec/state") != "confirmed";
            let Ok(node) = NodeName::new(node) else { return Ok(Object::Other) };
            if gone {
                return Ok(Object::Other);
            }
            let cidr = text(value, "/spec/cidr").parse().map_err(|e| bad(format!("spec.cidr: {e}")))?;
            Ok(Object::PodRanges(node, BTreeSet::from([cidr])))
        }
        Source::CiliumNode => {
            let node = NodeName::new(text(value, "/metadata/name"));
            let node = node.map_err(|e| bad(format!("metadata.name: {e}")))?;
            Ok(Object::PodRanges(node, list("/spec/ipam/podCIDRs")?))
        }
        Source::Kind(_) => Ok(Object::Other),
    }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cni_tells_where_pods_are() {
        let mut block = json!({
            "metadata": { "name": "n1-10-244-7-64-26" },
            "spec": { "cidr": "10.244.7.64/26", "deleted": "false", "node": "n1", "state": "confirmed" },
        });
        let n1: NodeName = "n1".parse().unwrap();
        let ranges = |list: &[&str]| list.iter().map(|p| p.parse().unwrap()).collect::<BTreeSet<Prefix>>();
        let expected = Object::PodRanges(n1.clone(), ranges(&["10.244.7.64/26"]));
        assert_eq!(read(Source::BlockAffinity, &mut block), Ok(expected));
        block["spec"]["state"] = "pendingDeletion".into();
        assert_eq!(read(Source::BlockAffinity, &mut block), Ok(Object::Other));
        let mut cilium = json!({
            "metadata": { "name": "n1" },
            "spec": { "ipam": { "podCIDRs": ["10.0.1.0/24", "fd00::/64"] } },
        });
        let expected = Object::PodRanges(n1, ranges(&["10.0.1.0/24", "fd00::/64"]));
        assert_eq!(read(Source::CiliumNode, &mut cilium), Ok(expected));
    }

    #[test]
    fn slices_of_other_programs_are_no_mistake() {
        let mut slice = json!({
            "metadata": { "name": "x", "namespace": "a" },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": ["10.0.0.1"] }],
        });
        assert_eq!(read(Source::Kind(Kind::EndpointSlice), &mut slice), Ok(Object::Other));
        slice["metadata"]["labels"] = json!({ "kubernetes.io/service-name": "s" });
        slice["endpoints"][0]["addresses"] = json!(["nonsense"]);
        assert!(read(Source::Kind(Kind::EndpointSlice), &mut slice).is_err());
    }

    #[test]
    fn an_import_of_an_old_definition_has_the_families_of_its_addresses() {
        let mut import = json!({
            "metadata": { "name": "s", "namespace": "a" },
            "spec": { "type": "ClusterSetIP", "ports": [], "ips": ["fd00::1"] },
        });
        let Ok(Object::Import { value, ours: false, .. }) =
            read(Source::Kind(Kind::ServiceImport), &mut import)
        else {
            panic!("not read")
        };
        assert_eq!(value.families, [tombolo_proto::model::Family::V6]);
    }

    #[test]
    fn a_node_watches_no_services() {
        let scope = |is_node, controller| Scope { node: "n".parse().unwrap(), is_node, controller };
        let node = scope(true, false);
        assert!(!node.sources().contains(&Source::Kind(Kind::Service)));
        let slices = Source::Kind(Kind::EndpointSlice);
        assert!(slices.selectors(&node).0.is_some() && slices.selectors(&scope(false, true)).0.is_none());
        assert_eq!(
            Source::Kind(Kind::TunnelNode).selectors(&node),
            (None, Some("metadata.name=n".to_owned()))
        );
    }
}
