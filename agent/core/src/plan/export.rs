//! What this cluster exports, and how its users' ServiceExports stand (mcs 1, 2, 5 to 7, 9, 10, 23).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{
    Backend, BackendGroup, Backends, ClusterId, Endpoint, Export, Family, Namespace, NodeName, Port, Record,
    RecordKey, Scope, ServiceType, record_kind,
};
use tombolo_proto::trust::Member;
use tombolo_proto::wire;

use super::findings::Findings;
use super::shard;
use crate::object::{
    Condition, ExportStatus, LocalBackends, LocalKind, Node, Service, ServiceExport, ServiceKey,
};
use crate::shelf::Shelf;
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
#[derive(Debug, Clone)]
pub(crate) struct Exports {
    pub(crate) good: Shelf<ServiceKey, Own>,
    pub(crate) statuses: Shelf<ServiceKey, ExportStatus>,
    /// The good ones as records; no scope is empty.
    pub(crate) records: BTreeMap<Scope, Shelf<RecordKey, Record>>,
    /// What is wrong with any of them.
    findings: Shelf<ServiceKey, Findings>,
    of: Inputs,
}

/// What they were planned from. Copies of the shelves cost nothing.
#[derive(Debug, Clone)]
struct Inputs {
    exports: Shelf<ServiceKey, ServiceExport>,
    services: Shelf<ServiceKey, Service>,
    backends: Shelf<ServiceKey, LocalBackends>,
    frame: Frame,
}

/// What all of them hang on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Frame {
    cluster: ClusterId,
    own: Member,
    namespaces: BTreeSet<Namespace>,
    hosts: Hosts,
}

/// Plans the exports; those that are as in `before`, and hang on the same, are taken from there. None while inputs are
/// unknown.
pub(crate) fn exports(
    world: &ClusterWorld,
    endpoints: Option<&BTreeMap<NodeName, Endpoint>>,
    before: Option<&Exports>,
) -> Option<Exports> {
    let of = Inputs {
        exports: world.exports.get()?.clone(),
        services: world.services.get()?.clone(),
        backends: world.backends.get()?.clone(),
        frame: Frame {
            cluster: world.cluster.clone(),
            own: world.own.clone(),
            namespaces: world.namespaces.get()?.clone(),
            hosts: Hosts::new(world, endpoints?)?,
        },
    };
    let before = before.filter(|before| before.of.frame == of.frame);
    let changed: BTreeSet<ServiceKey> = match before {
        None => of.exports.keys().cloned().collect(),
        Some(Exports { of: old, .. }) => {
            let mut changed = of.exports.changed(&old.exports);
            let exported =
                |key: &&ServiceKey| of.exports.contains_key(*key) || old.exports.contains_key(*key);
            changed.extend(of.services.changed(&old.services).into_iter().filter(exported));
            changed.extend(of.backends.changed(&old.backends).into_iter().filter(exported));
            changed.into_iter().cloned().collect()
        }
    };
    let mut all = match before {
        Some(before) => Exports { of, ..before.clone() },
        None => Exports {
            good: Shelf::new(),
            statuses: Shelf::new(),
            records: BTreeMap::new(),
            findings: Shelf::new(),
            of,
        },
    };
    changed.into_iter().for_each(|key| all.plan(key));
    Some(all)
}

impl Exports {
    fn plan(&mut self, key: ServiceKey) {
        let mut findings = Findings::default();
        let old = self.good.get_shared(&key).cloned();
        let mut new = None;
        let mut status = None;
        if let Some(export) = self.of.exports.get(&key) {
            let frame = &self.of.frame;
            let exists = frame.namespaces.contains(&key.namespace);
            let service = self.of.services.get(&key).filter(|_| exists);
            match judge(frame, &key, export, service) {
                Ok(stated) => {
                    let local = self.of.backends.get(&key).map(Vec::as_slice).unwrap_or_default();
                    let (own, mut but) = own(frame, &key, stated, local, &mut findings);
                    new = Some(own);
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
                    let valid = (true, "Valid", "the service can be exported");
                    status = Some(self::status(valid, (true, "Exported", &ready)));
                }
                Err(Refusal { valid, ready, message }) => {
                    let valid = (valid == "Valid", valid, &*message);
                    status = Some(self::status(valid, (false, ready, &message)));
                }
            }
        }
        // As it was where it is the same, so that who compares sees at once.
        if old.as_deref() != new.as_ref() {
            self.state(&key, old.as_deref(), new.as_ref(), &mut findings);
            put(&mut self.good, &key, new);
        } else if let Some(own) = &new {
            // Its records stay; what is wrong with them is told again.
            records(&key, own, &mut findings);
        }
        put(&mut self.statuses, &key, status);
        put(&mut self.findings, &key, Some(findings).filter(|findings| !findings.is_empty()));
    }

    /// Exchanges an export's records.
    fn state(&mut self, key: &ServiceKey, old: Option<&Own>, new: Option<&Own>, findings: &mut Findings) {
        let scope = Scope::Namespace(key.namespace.clone());
        let of = self.records.entry(scope.clone()).or_default();
        for (key, _) in old.into_iter().flat_map(|old| records(key, old, &mut Findings::default())) {
            of.remove(&key);
        }
        for (key, body) in new.into_iter().flat_map(|new| records(key, new, findings)) {
            of.insert(key.clone(), Record { key, body: body.into() });
        }
        if of.is_empty() {
            self.records.remove(&scope);
        }
    }

    /// What is wrong with any of them.
    pub(crate) fn tell(&self, findings: &mut Findings) {
        self.findings.values().for_each(|of| findings.extend(of));
    }
}

/// As it was where it is the same, so that who compares sees at once.
fn put<V: PartialEq>(shelf: &mut Shelf<ServiceKey, V>, key: &ServiceKey, value: Option<V>) {
    match value {
        None => drop(shelf.remove(key)),
        Some(value) if shelf.get(key) != Some(&value) => shelf.insert(key.clone(), value),
        Some(_) => {}
    }
}

/// An export's records that are not too large.
fn records(service: &ServiceKey, own: &Own, findings: &mut Findings) -> Vec<(RecordKey, Vec<u8>)> {
    let mut records = Vec::new();
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
        records.push((key, body));
    };
    add(record_kind::EXPORT, &[service.name.as_str()], wire::encode_export(&own.export));
    for (number, shard) in &own.shards {
        let name = [service.name.as_str(), &number.to_string()];
        add(record_kind::BACKENDS, &name, wire::encode_backends(shard));
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
    frame: &Frame,
    key: &ServiceKey,
    export: &ServiceExport,
    service: Option<&Service>,
) -> Result<Export, Refusal> {
    if key.namespace.is_reserved() {
        let text = format!("namespace {} is never exported; move the service to another", key.namespace);
        return Err(Refusal::new("NamespaceReserved", "Failed", text));
    }
    if !frame.own.membership.grant().may_export(&key.namespace) {
        let text = format!(
            "cluster {} was not granted to export namespace {}; ask the set's administrator for it",
            frame.cluster, key.namespace
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

/// Own addresses of nodes, and their tunnel addresses: a backend there (hostNetwork) is stated as its node's tunnel
/// address, since a node's own address is no cluster's to carry.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hosts(BTreeMap<IpAddr, Vec<IpAddr>>);

impl Hosts {
    fn new(world: &ClusterWorld, endpoints: &BTreeMap<NodeName, Endpoint>) -> Option<Self> {
        let of = |(name, node): (&NodeName, &Node)| {
            let tunnel: Vec<IpAddr> = endpoints.get(name).into_iter().flat_map(Endpoint::tunnel).collect();
            node.addresses.iter().map(|address| (*address, tunnel.clone())).collect::<Vec<_>>()
        };
        Some(Self(world.nodes.get()?.iter().flat_map(of).collect()))
    }
}

impl Frame {
    /// Where others reach the backend; None if they cannot.
    fn reach(&self, address: IpAddr) -> Option<IpAddr> {
        if let Some(tunnel) = self.hosts.0.get(&address) {
            return tunnel.iter().copied().find(|t| t.is_ipv4() == address.is_ipv4());
        }
        self.own.owned.iter().any(|p| p.contains(address)).then_some(address)
    }
}

/// The service, and what of it could not be stated.
fn own(
    frame: &Frame,
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
            match frame.reach(backend.address) {
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
