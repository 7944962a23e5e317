//! Which value an object of a directory is.

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde_json::{Map, Value};
use tombolo_agent_core::object::{
    ExportStatus, Import, Node, Service, ServiceExport, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_proto::model::{ClusterId, Namespace, NodeName, Record};

use crate::api::kind::{
    self, Kind, ObjectId, Problem, bad, cluster_set, identity, member, multicluster, node, service, slice,
    tunnel_node, tutorial, typed,
};
use crate::api::observed::{ClusterSet, Member};

/// A parsed object.
#[derive(Debug, PartialEq)]
pub(super) enum Object {
    Namespace(Namespace),
    Node(NodeName, Node),
    Service(ServiceKey, Service),
    LocalSlice(slice::LocalSlice),
    Export(ServiceKey, ServiceExport),
    /// Creation and status of a user's ServiceExport.
    ExportRecord(ServiceKey, u64, ExportStatus),
    Import(ServiceKey, Import),
    Slice(SliceKey, Slice),
    Member(ClusterId, Member),
    MemberNodes(ClusterId, Vec<Record>),
    TunnelNode(NodeName, TunnelNode),
    ClusterSet(ClusterSet),
    /// Read on demand (Lease, Secret), or of no interest (an EndpointSlice that is an import of somebody's).
    Other,
}

/// What a manifest's document is.
#[derive(Debug)]
pub(super) enum Document {
    /// Nothing of ours.
    Ignored,
    /// Objects, each with what is to be said of it.
    Objects(Vec<(ObjectId, Result<Object, Problem>, Option<Problem>)>),
    /// Not an object, or one whose name cannot be known.
    Unknown(Problem),
}

/// Reads an object out of people's hands.
pub(super) fn manifest(mut value: Value) -> Vec<Document> {
    if let Some(items) = list_items(&mut value) {
        return items.into_iter().map(single).collect();
    }
    vec![single(value)]
}

/// `kubectl get -o yaml` prints lists.
fn list_items(value: &mut Value) -> Option<Vec<Value>> {
    let kind = value.get("kind")?.as_str()?;
    if value.get("apiVersion")?.as_str()? != "v1" || kind != "List" {
        return None;
    }
    match value.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => Some(items),
        _ => Some(Vec::new()),
    }
}

fn single(mut value: Value) -> Document {
    let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let (Some(api_version), Some(name)) = (text("apiVersion"), text("kind")) else {
        return Document::Unknown(Problem::error(
            "NotAnObject",
            "this is no Kubernetes object: apiVersion or kind is missing or no text",
        ));
    };
    let (kind, warning) = match Kind::of(&api_version, &name) {
        Some(Kind::Secret | Kind::Lease) => return Document::Ignored,
        Some(
            kind @ (Kind::Namespace | Kind::Node | Kind::Service | Kind::EndpointSlice | Kind::ServiceExport),
        ) => (kind, None),
        Some(
            Kind::ServiceImport | Kind::Member | Kind::MemberNodes | Kind::TunnelNode | Kind::ClusterSet,
        )
        | None => match tutorial::judge(&api_version, &name, &value) {
            tutorial::Verdict::Ignore => return Document::Ignored,
            tutorial::Verdict::ExportWith(warning) => (Kind::ServiceExport, Some(warning)),
            tutorial::Verdict::Refuse(problem) => {
                // Nothing of this name is read from manifests, so nothing can be lost by it.
                let known = Kind::ALL.into_iter().find(|k| k.name() == name);
                let id = known.and_then(|kind| identity(kind, &value).ok());
                return match id {
                    Some(id) => Document::Objects(vec![(id, Ok(Object::Other), Some(problem))]),
                    None => Document::Unknown(problem),
                };
            }
        },
    };
    let id = match identity(kind, &value) {
        Ok(id) => id,
        Err(problem) => {
            let problem = Problem { message: format!("{kind}: {}", problem.message), ..problem };
            return Document::Unknown(problem);
        }
    };
    let object = user_object(&id, &mut value);
    Document::Objects(vec![(id, object, warning)])
}

fn user_object(id: &ObjectId, value: &mut Value) -> Result<Object, Problem> {
    if let Some(namespace) = &id.namespace {
        value["metadata"]["namespace"] = Value::String(namespace.to_string());
    }
    match id.kind {
        Kind::Namespace => {
            let namespace = Namespace::new(id.name.as_str());
            Ok(Object::Namespace(namespace.map_err(|e| bad(format!("metadata.name: {e}")))?))
        }
        Kind::Node => {
            let (name, value) = node::read(&typed::<core::Node>(value)?)?;
            Ok(Object::Node(name, value))
        }
        Kind::Service => {
            let (key, value) = service::read(&typed::<core::Service>(value)?)?;
            Ok(Object::Service(key, value))
        }
        Kind::EndpointSlice => {
            let slice = slice::read_local(&typed::<discovery::EndpointSlice>(value)?)?;
            Ok(slice.map_or(Object::Other, Object::LocalSlice))
        }
        Kind::ServiceExport => {
            with_spec(value);
            let (key, value) = multicluster::read_export(&typed(value)?)?;
            Ok(Object::Export(key, value))
        }
        Kind::ServiceImport
        | Kind::Secret
        | Kind::Lease
        | Kind::Member
        | Kind::MemberNodes
        | Kind::TunnelNode
        | Kind::ClusterSet => Ok(Object::Other),
    }
}

/// A ServiceExport need not have a spec.
fn with_spec(value: &mut Value) {
    if value.get("spec").is_none_or(Value::is_null) {
        value["spec"] = Value::Object(Map::new());
    }
}

/// Reads an object of ours, which must be what its path says.
pub(super) fn state(id: &ObjectId, value: &mut Value) -> Result<Object, Problem> {
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let kind = Kind::of(&text("apiVersion"), &text("kind"));
    if kind != Some(id.kind) || identity(id.kind, value)? != *id {
        return Err(bad(format!("it is not the {id} that its path says")));
    }
    match id.kind {
        Kind::ServiceExport => {
            with_spec(value);
            let object: multicluster::ServiceExportResource = typed(value)?;
            let created = object.metadata.creation_timestamp.as_ref().map_or(0, kind::seconds);
            Ok(Object::ExportRecord(id.service_key()?, created, multicluster::read_status(&object)))
        }
        Kind::ServiceImport => {
            let (key, value) = multicluster::read_import(&typed(value)?)?;
            Ok(Object::Import(key, value))
        }
        Kind::EndpointSlice => {
            let (key, value) = slice::read(&typed::<discovery::EndpointSlice>(value)?)?;
            Ok(Object::Slice(key, value))
        }
        Kind::Member => {
            let (cluster, value) = member::read(&typed(value)?)?;
            Ok(Object::Member(cluster, value))
        }
        Kind::MemberNodes => {
            let (cluster, _, records) = member::read_nodes(&typed(value)?)?;
            Ok(Object::MemberNodes(cluster, records))
        }
        Kind::TunnelNode => {
            let (name, value) = tunnel_node::read(&typed(value)?)?;
            Ok(Object::TunnelNode(name, value))
        }
        Kind::ClusterSet => Ok(Object::ClusterSet(cluster_set::read(&typed(value)?)?)),
        Kind::Lease | Kind::Secret => Ok(Object::Other),
        Kind::Namespace | Kind::Node | Kind::Service => Err(bad("it does not belong in state/; remove it")),
    }
}
