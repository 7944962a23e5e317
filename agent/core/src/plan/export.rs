//! What this cluster exports, and how its users' ServiceExports stand (mcs 1, 2, 5 to 7, 9, 10, 23).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{
    Backend, BackendGroup, Backends, Endpoint, Export, Family, NodeName, Port, Record, RecordKey, Scope,
    ServiceType, record_kind,
};
use tombolo_proto::wire;

use super::findings::Findings;
use super::shard;
use crate::object::{Condition, ExportStatus, LocalBackends, LocalKind, Service, ServiceExport, ServiceKey};
use crate::world::ClusterWorld;

/// A service that this cluster exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Own {
    pub(crate) export: Export,
    pub(crate) shards: BTreeMap<u32, Backends>,
    /// Tunnel addresses that stand for backends on a node's own network, and where those are within the cluster.
    pub(crate) hosts: BTreeMap<IpAddr, IpAddr>,
}

/// All of them, and the conditions `Valid` and `Ready` of every ServiceExport.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    pub(crate) good: BTreeMap<ServiceKey, Own>,
    pub(crate) statuses: BTreeMap<ServiceKey, ExportStatus>,
}

/// Plans the exports. None while inputs are unknown.
pub(crate) fn exports(
    world: &ClusterWorld,
    endpoints: Option<&BTreeMap<NodeName, Endpoint>>,
    findings: &mut Findings,
) -> Option<Exports> {
    let exports = world.exports.get()?;
    let services = world.services.get()?;
    let namespaces = world.namespaces.get()?;
    let backends = world.backends.get()?;
    let hosts = Hosts::new(world, endpoints?)?;

    let mut result = Exports::default();
    for (key, export) in exports {
        let exists = namespaces.contains(&key.namespace);
        let outcome = judge(world, key, export, services.get(key).filter(|_| exists));
        let status = match outcome {
            Ok(stated) => {
                let local = backends.get(key).map(Vec::as_slice).unwrap_or_default();
                let (own, mut but) = own(world, &hosts, key, stated, local, findings);
                result.good.insert(key.clone(), own);
                if let Some(misread) = &export.misread {
                    let text = format!("{misread}; correct it");
                    findings.warning("ExportMisread", format!("serviceexport {key}"), text);
                    but.push(misread.clone());
                }
                let ready = if but.is_empty() {
                    "stated to the set".to_owned()
                } else {
                    format!("stated to the set, but {}", but.join("; "))
                };
                status((true, "Valid", "the service can be exported"), (true, "Exported", &ready))
            }
            Err(Refusal { valid, ready, message }) => {
                status((valid == "Valid", valid, &message), (false, ready, &message))
            }
        };
        result.statuses.insert(key.clone(), status);
    }
    Some(result)
}

/// The exports as records.
pub(crate) fn records(
    exports: &BTreeMap<ServiceKey, Own>,
    findings: &mut Findings,
) -> BTreeMap<Scope, BTreeMap<RecordKey, Record>> {
    let mut records: BTreeMap<Scope, BTreeMap<RecordKey, Record>> = BTreeMap::new();
    for (service, own) in exports {
        let mut add = |kind: u32, name: &[&str], body: Vec<u8>| {
            let Some(key) = RecordKey::new(kind, name) else { return };
            if body.len() > Record::MAX_BODY {
                let text = format!(
                    "record {key:?} would have {} bytes, {} are allowed; its backends are left out: use fewer port sets",
                    body.len(),
                    Record::MAX_BODY
                );
                findings.error("RecordTooLarge", format!("serviceexport {service}"), text);
                return;
            }
            let scope = Scope::Namespace(service.namespace.clone());
            records.entry(scope).or_default().insert(key.clone(), Record { key, body: body.into() });
        };
        add(record_kind::EXPORT, &[service.name.as_str()], wire::encode_export(&own.export));
        for (number, shard) in &own.shards {
            let name = [service.name.as_str(), &number.to_string()];
            add(record_kind::BACKENDS, &name, wire::encode_backends(shard));
        }
    }
    records
}

struct Refusal {
    valid: &'static str,
    ready: &'static str,
    message: String,
}

impl Refusal {
    fn new(valid: &'static str, ready: &'static str, message: impl Into<String>) -> Self {
        Self { valid, ready, message: message.into() }
    }
}

/// Whether a service may be exported, and as what.
fn judge(
    world: &ClusterWorld,
    key: &ServiceKey,
    export: &ServiceExport,
    service: Option<&Service>,
) -> Result<Export, Refusal> {
    if key.namespace.is_reserved() {
        let text = format!("namespace {} is never exported; move the service to another", key.namespace);
        return Err(Refusal::new("NamespaceReserved", "Failed", text));
    }
    if !world.own.membership.grant().may_export(&key.namespace) {
        let text = format!(
            "cluster {} was not granted to export namespace {}; ask the set's administrator for it",
            world.cluster, key.namespace
        );
        return Err(Refusal::new("NamespaceNotGranted", "Failed", text));
    }
    let Some(service) = service else {
        let text = format!("there is no Service {key}; it is exported as soon as there is");
        return Err(Refusal::new("NoService", "Pending", text));
    };
    let kind = match service.kind {
        LocalKind::ClusterIP => ServiceType::ClusterSetIP,
        LocalKind::Headless => ServiceType::Headless,
        LocalKind::ExternalName => {
            let text = "a Service of type ExternalName has no backends of its own and cannot be exported";
            return Err(Refusal::new("InvalidServiceType", "Failed", text));
        }
        LocalKind::Derived => {
            let text = "this Service was made from an import, which is never exported again; remove the ServiceExport";
            return Err(Refusal::new("InvalidServiceType", "Failed", text));
        }
    };
    let stated = Export {
        kind,
        ports: service.ports.clone(),
        families: service.families.clone(),
        affinity: service.affinity,
        internal_local: service.internal_local,
        traffic_distribution: service.traffic_distribution.clone(),
        labels: export.labels.clone(),
        annotations: export.annotations.clone(),
        created: export.created,
        preference: export.preference,
    };
    // Read as receivers will: what they refuse is not stated.
    let bytes = wire::encode_export(&stated);
    if bytes.len() > Record::MAX_BODY {
        let text = format!(
            "ports, exportedLabels and exportedAnnotations take {} bytes, {} are allowed; export fewer or shorter ones",
            bytes.len(),
            Record::MAX_BODY
        );
        return Err(Refusal::new("Valid", "Failed", text));
    }
    wire::decode_export(&bytes)
        .map_err(|error| Refusal::new("Valid", "Failed", format!("cannot be exported: {error}")))
}

/// Own addresses of nodes: a backend there (hostNetwork) is stated as its node's tunnel address, since a node's own
/// address is no cluster's to carry.
struct Hosts<'a> {
    by_address: BTreeMap<IpAddr, &'a NodeName>,
    endpoints: &'a BTreeMap<NodeName, Endpoint>,
}

impl<'a> Hosts<'a> {
    fn new(world: &'a ClusterWorld, endpoints: &'a BTreeMap<NodeName, Endpoint>) -> Option<Self> {
        let nodes = world.nodes.get()?;
        let by_address =
            nodes.iter().flat_map(|(name, node)| node.addresses.iter().map(move |a| (*a, name))).collect();
        Some(Self { by_address, endpoints })
    }

    /// Where others reach the backend; None if they cannot.
    fn reach(&self, world: &ClusterWorld, address: IpAddr) -> Option<IpAddr> {
        if let Some(&node) = self.by_address.get(&address) {
            return self.endpoints.get(node)?.tunnel().find(|t| t.is_ipv4() == address.is_ipv4());
        }
        world.own.owned.iter().any(|p| p.contains(address)).then_some(address)
    }
}

/// The service, and what of it could not be stated.
fn own(
    world: &ClusterWorld,
    hosts: &Hosts<'_>,
    key: &ServiceKey,
    export: Export,
    local: &[BackendGroup],
    findings: &mut Findings,
) -> (Own, Vec<String>) {
    let mut but = Vec::new();
    let mut outside: BTreeSet<IpAddr> = BTreeSet::new();
    let mut real: BTreeMap<IpAddr, IpAddr> = BTreeMap::new();
    let mut groups: LocalBackends = Vec::new();
    for group in local {
        let known = |p: &&Port| {
            p.port > 0 && export.ports.iter().any(|own| own.name == p.name && own.protocol == p.protocol)
        };
        let ports = group.ports.iter().filter(known).map(|p| Port { app_protocol: None, ..p.clone() });
        let mut backends: Vec<Backend> = Vec::new();
        for backend in &group.backends {
            if !export.families.contains(&Family::of(backend.address)) {
                continue;
            }
            match hosts.reach(world, backend.address) {
                Some(address) => {
                    if address != backend.address {
                        let lowest = real.entry(address).or_insert(backend.address);
                        *lowest = backend.address.min(*lowest);
                    }
                    backends.push(Backend { address, ..backend.clone() });
                }
                None => {
                    outside.insert(backend.address);
                }
            }
        }
        groups.push(BackendGroup { ports: ports.take(Export::MAX_PORTS).collect(), backends });
    }
    let has_backends = local.iter().any(|group| !group.backends.is_empty());
    if has_backends && !export.ports.is_empty() && groups.iter().all(|group| group.ports.is_empty()) {
        but.push("no backend serves any of its ports: compare targetPort with the pods' ports".to_owned());
    }
    if let Some(first) = outside.first() {
        let text = format!(
            "{} backends are outside of what this cluster was granted ({first} is one) and are not exported; \
             grant their range, or correct their EndpointSlices",
            outside.len()
        );
        but.push(text.clone());
        findings.error("BackendOutsideGrant", format!("serviceexport {key}"), text);
    }
    let (shards, lost) = shard::shards(&groups);
    if lost > 0 {
        let text = format!("{lost} backends are too many and are not exported");
        but.push(text.clone());
        findings.error("TooManyBackends", format!("serviceexport {key}"), text);
    }
    (Own { export, shards, hosts: real }, but)
}

fn status(valid: (bool, &str, &str), ready: (bool, &str, &str)) -> ExportStatus {
    let condition = |(status, reason, message): (bool, &str, &str)| Condition {
        status,
        reason: reason.to_owned(),
        message: message.to_owned(),
    };
    let conditions =
        BTreeMap::from([("Valid".to_owned(), condition(valid)), ("Ready".to_owned(), condition(ready))]);
    ExportStatus { conditions }
}
