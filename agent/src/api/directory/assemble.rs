//! From single objects to what the agent observes, independent of the order in which files were seen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::{Service, ServiceExport, ServiceKey};
use tombolo_agent_core::shelf::Shelf;
use tombolo_proto::model::Family;

use super::object::Object;
use crate::api::kind::ObjectId;
use crate::api::kind::slice::{self, LocalSlice};
use crate::api::observed::Observed;

/// One side of a directory: objects with the file they stand in, by path and then by place in the file.
pub(super) type Objects<'a> = Option<Vec<(&'a str, &'a ObjectId, &'a Arc<Object>)>>;

/// Puts both sides together, all but imports and imported slices. A side that could not be read is None, and its kinds
/// are unknown.
pub(super) fn assemble(manifests: &Objects<'_>, state: &Objects<'_>, findings: Vec<Finding>) -> Observed {
    let mut observed = Observed { findings, ..Observed::default() };
    let mut created = None;
    if let Some(state) = state {
        created = Some(take_state(&mut observed, state));
    }
    if let Some(manifests) = manifests {
        take_manifests(&mut observed, manifests, created.as_ref());
    }
    observed.findings.sort();
    observed.findings.dedup();
    observed
}

/// Returns when each ServiceExport was first seen.
fn take_state(
    observed: &mut Observed,
    objects: &[(&str, &ObjectId, &Arc<Object>)],
) -> BTreeMap<ServiceKey, u64> {
    let mut statuses = BTreeMap::new();
    let (mut members, mut tunnel_nodes) = (BTreeMap::new(), BTreeMap::new());
    let mut member_nodes: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    let (mut cluster_set, mut created) = (None, BTreeMap::new());
    for (_, _, object) in objects {
        match object.as_ref() {
            Object::ExportRecord(key, at, status) => {
                created.insert(key.clone(), *at);
                statuses.insert(key.clone(), status.clone());
            }
            Object::Member(cluster, value) => {
                members.insert(cluster.clone(), value.clone());
            }
            Object::MemberNodes(cluster, records) => {
                let nodes = member_nodes.entry(cluster.clone()).or_default();
                nodes.extend(records.iter().map(|r| (r.key.clone(), r.clone())));
            }
            Object::TunnelNode(name, value) => {
                tunnel_nodes.insert(name.clone(), value.clone());
            }
            Object::ClusterSet(value) => cluster_set = Some(value.clone()),
            Object::Namespace(_)
            | Object::Node(..)
            | Object::Service(..)
            | Object::LocalSlice(_)
            | Object::Export(..)
            | Object::Import(..)
            | Object::Slice(..)
            | Object::Other => {}
        }
    }
    observed.statuses = Known::Yes(statuses.into());
    observed.derived = Known::Yes(Shelf::new());
    observed.members = Known::Yes(members);
    observed.member_nodes = Known::Yes(member_nodes);
    observed.tunnel_nodes = Known::Yes(tunnel_nodes);
    observed.clusterset = Known::Yes(cluster_set);
    created
}

fn take_manifests(
    observed: &mut Observed,
    objects: &[(&str, &ObjectId, &Arc<Object>)],
    created: Option<&BTreeMap<ServiceKey, u64>>,
) {
    let (mut nodes, mut services, mut namespaces) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    let mut exports: BTreeMap<ServiceKey, ServiceExport> = BTreeMap::new();
    let mut slices: BTreeMap<ServiceKey, Vec<&LocalSlice>> = BTreeMap::new();
    let mut seen: BTreeMap<&ObjectId, &str> = BTreeMap::new();
    for (file, id, object) in objects {
        if matches!(object.as_ref(), Object::Other) {
            continue;
        }
        if let Some(first) = seen.get(*id) {
            observed.findings.push(Finding {
                severity: Severity::Error,
                reason: "DuplicateObject",
                object: id.to_string(),
                message: format!(
                    "manifests/{file}: it stands in manifests/{first} already, and that one counts; remove one of them"
                ),
            });
            continue;
        }
        seen.insert(id, file);
        namespaces.extend(id.namespace.clone());
        match object.as_ref() {
            Object::Namespace(name) => {
                namespaces.insert(name.clone());
            }
            Object::Node(name, value) => {
                nodes.insert(name.clone(), value.clone());
            }
            Object::Service(key, value) => {
                services.insert(key.clone(), value.clone());
            }
            Object::Export(key, value) => {
                exports.insert(key.clone(), value.clone());
            }
            Object::LocalSlice(value) => slices.entry(value.service.clone()).or_default().push(value),
            Object::ExportRecord(..)
            | Object::Import(..)
            | Object::Slice(..)
            | Object::Member(..)
            | Object::MemberNodes(..)
            | Object::TunnelNode(..)
            | Object::ClusterSet(_)
            | Object::Other => {}
        }
    }
    for (key, service) in &mut services {
        fill_families(service, slices.get(key));
    }
    observed.declared_exports = Known::Yes(Arc::new(exports.keys().cloned().collect()));
    // An export counts from when its creation is known: what is older wins conflicts.
    if let Some(created) = created {
        exports.retain(|key, export| {
            let at = created.get(key);
            export.created = at.copied().unwrap_or(0);
            at.is_some()
        });
        observed.exports = Known::Yes(exports.into());
    }
    observed.nodes = Known::Yes(nodes);
    observed.namespaces = Known::Yes(namespaces);
    observed.services = Known::Yes(services.into());
    observed.backends = Known::Yes(slices.into_iter().map(|(key, list)| (key, slice::merge(list))).collect());
}

/// Nobody allots addresses in a directory: a Service that does not tell its families has those of its backends.
fn fill_families(service: &mut Service, slices: Option<&Vec<&LocalSlice>>) {
    if service.families.is_empty() {
        let families: BTreeSet<Family> = slices.into_iter().flatten().map(|s| s.family).collect();
        service.families = families.into_iter().collect();
    }
    if service.families.is_empty() {
        service.families = vec![Family::V4];
    }
}
