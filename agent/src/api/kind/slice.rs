//! discovery.k8s.io/v1 EndpointSlice: the users', and those we import.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as discovery;
use ring::digest::{SHA256, digest};
use tombolo_agent_core::object::{LocalBackends, ServiceKey, Slice, SliceKey};
use tombolo_proto::model::{Backend, BackendGroup, Backends, ClusterId, Family, Hostname, Port, ServiceName};

use super::service::{family_text, port};
use super::{Kind, MANAGED_BY, ObjectId, Problem, bad, derived, own_meta, shorten};

/// On slices of local services (Kubernetes).
pub const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// On imported slices (MCS-API).
pub const IMPORT_LABEL: &str = "multicluster.kubernetes.io/service-name";
/// On imported slices (MCS-API).
pub const SOURCE_LABEL: &str = "multicluster.kubernetes.io/source-cluster";
/// Who manages a slice (Kubernetes).
pub const SLICE_MANAGER_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
/// Tells slices of one service, cluster and family apart.
pub const INDEX_LABEL: &str = "tombolo.dev/index";

/// Some backends of a local service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalSlice {
    /// Of which.
    pub service: ServiceKey,
    /// `addressType`
    pub family: Family,
    /// Who serves, and on which ports.
    pub group: BackendGroup,
}

/// A slice of a local service. None for those that are imported or managed by us.
pub fn read_local(object: &discovery::EndpointSlice) -> Result<Option<LocalSlice>, Problem> {
    let empty = BTreeMap::new();
    let labels = object.metadata.labels.as_ref().unwrap_or(&empty);
    if labels.contains_key(SOURCE_LABEL) || labels.get(SLICE_MANAGER_LABEL).is_some_and(|m| m == MANAGED_BY) {
        return Ok(None);
    }
    let Some(service) = labels.get(SERVICE_LABEL) else {
        return Err(Problem::warning(
            "SliceOfNoService",
            format!(
                "it has no label {SERVICE_LABEL}, so it belongs to no service; add `{SERVICE_LABEL}: NAME` to metadata.labels"
            ),
        ));
    };
    let service = super::service::key(object.metadata.namespace.as_deref(), Some(service))
        .map_err(|e| bad(format!("label {SERVICE_LABEL}: {e}")))?;
    let Some(family) = family(&object.address_type)? else {
        return Err(Problem::warning("SliceOfNames", "addressType FQDN is not supported; list IP addresses"));
    };
    let mut ports = read_ports(object)?;
    ports.sort();
    let mut backends = read_backends(object, family)?;
    backends.sort();
    Ok(Some(LocalSlice { service, family, group: BackendGroup { ports, backends } }))
}

/// All slices of a service together, whatever their order. An address that several slices name with the same
/// ports counts once (Kubernetes allows that while it moves): ready if one says so.
pub fn merge<'a>(slices: impl IntoIterator<Item = &'a LocalSlice>) -> LocalBackends {
    let mut groups: BTreeMap<&Vec<Port>, BTreeMap<IpAddr, Backend>> = BTreeMap::new();
    for slice in slices {
        let group = groups.entry(&slice.group.ports).or_default();
        for backend in &slice.group.backends {
            let known = group.entry(backend.address).or_insert_with(|| backend.clone());
            known.ready |= backend.ready;
            known.serving |= backend.serving;
            known.terminating &= backend.terminating;
            known.hostname = known.hostname.take().max(backend.hostname.clone());
        }
    }
    let group = |(ports, backends): (&Vec<Port>, BTreeMap<IpAddr, Backend>)| BackendGroup {
        ports: ports.clone(),
        backends: backends.into_values().collect(),
    };
    groups.into_iter().map(group).collect()
}

/// Name of an imported slice: the service's, so that people find it, and a hash of the whole key, so that no two
/// keys share a name.
pub fn name(key: &SliceKey) -> String {
    let mut bytes = Vec::new();
    let family = family_text(key.family);
    for part in [
        key.service.namespace.as_str(),
        key.service.name.as_str(),
        key.source.as_str(),
        &family,
        &key.index.to_string(),
    ] {
        bytes.extend((part.len() as u64).to_be_bytes());
        bytes.extend(part.as_bytes());
    }
    let hash = data_encoding::HEXLOWER.encode(&digest(&SHA256, &bytes).as_ref()[..8]);
    format!("{}-{hash}", key.service.name.as_str().get(..46).unwrap_or(key.service.name.as_str()))
}

/// Where an imported slice lies.
pub fn id(key: &SliceKey) -> Result<ObjectId, Problem> {
    ObjectId::namespaced(Kind::EndpointSlice, &key.service.namespace, &name(key))
}

/// The API's object of an imported slice. It never bears `nodeName`, `zone` or `targetRef`: a node of another
/// cluster may have the name of one here.
pub fn write(key: &SliceKey, slice: &Slice) -> Result<discovery::EndpointSlice, Problem> {
    let mut metadata = own_meta(&id(key)?);
    metadata.labels.get_or_insert_default().extend([
        (IMPORT_LABEL.to_owned(), key.service.name.to_string()),
        (SOURCE_LABEL.to_owned(), key.source.to_string()),
        (SLICE_MANAGER_LABEL.to_owned(), MANAGED_BY.to_owned()),
        (INDEX_LABEL.to_owned(), key.index.to_string()),
    ]);
    if slice.derived {
        let labels = metadata.labels.get_or_insert_default();
        labels.insert(SERVICE_LABEL.to_owned(), derived::name(&key.service));
    }
    let endpoint = |backend: &Backend| discovery::Endpoint {
        addresses: vec![backend.address.to_string()],
        conditions: Some(discovery::EndpointConditions {
            ready: Some(backend.ready),
            serving: Some(backend.serving),
            terminating: Some(backend.terminating),
        }),
        hostname: backend.hostname.as_ref().map(ToString::to_string),
        ..discovery::Endpoint::default()
    };
    let port = |port: &Port| discovery::EndpointPort {
        name: Some(port.name.as_ref().map(ToString::to_string).unwrap_or_default()),
        protocol: Some(port.protocol.to_string()),
        port: Some(port.port.into()),
        app_protocol: port.app_protocol.clone(),
    };
    Ok(discovery::EndpointSlice {
        metadata,
        address_type: family_text(key.family),
        endpoints: slice.backends.iter().map(endpoint).collect(),
        ports: Some(slice.ports.iter().map(port).collect()),
    })
}

/// An imported slice.
pub fn read(object: &discovery::EndpointSlice) -> Result<(SliceKey, Slice), Problem> {
    let label = |name: &str| {
        let value = object.metadata.labels.as_ref().and_then(|labels| labels.get(name));
        value.map(String::as_str).ok_or_else(|| bad(format!("label {name} is missing")))
    };
    let namespace = super::service::key(object.metadata.namespace.as_deref(), Some("a"))?.namespace;
    let service = ServiceName::new(label(IMPORT_LABEL)?).map_err(|e| bad(format!("{IMPORT_LABEL}: {e}")))?;
    let source = ClusterId::new(label(SOURCE_LABEL)?).map_err(|e| bad(format!("{SOURCE_LABEL}: {e}")))?;
    let index = label(INDEX_LABEL)?.parse().map_err(|_| bad(format!("{INDEX_LABEL} is not a number")))?;
    let family = family(&object.address_type)?.ok_or_else(|| bad("addressType is FQDN"))?;
    let key = SliceKey { service: ServiceKey { namespace, name: service }, source, family, index };
    if object.metadata.name.as_deref() != Some(name(&key).as_str()) {
        return Err(bad("its name does not fit its labels"));
    }
    // Any other Service's is a mistake, and mended.
    let derived = label(SERVICE_LABEL).is_ok_and(|name| name == derived::name(&key.service));
    Ok((key, Slice { ports: read_ports(object)?, backends: read_backends(object, family)?, derived }))
}

fn family(address_type: &str) -> Result<Option<Family>, Problem> {
    match address_type {
        "IPv4" => Ok(Some(Family::V4)),
        "IPv6" => Ok(Some(Family::V6)),
        "FQDN" => Ok(None),
        other => Err(bad(format!("addressType is {:?}, not IPv4 or IPv6", shorten(other)))),
    }
}

fn read_ports(object: &discovery::EndpointSlice) -> Result<Vec<Port>, Problem> {
    let listed = object.ports.as_deref().unwrap_or_default();
    if listed.len() > 100 {
        return Err(bad(format!("ports has {} entries, at most 100 are allowed", listed.len())));
    }
    let mut ports = Vec::new();
    for (index, p) in listed.iter().enumerate() {
        let at = format!("ports[{index}]");
        // "All ports" is for other uses of slices; a service's have numbers.
        let number = p.port.ok_or_else(|| bad(format!("{at}.port is missing")))?;
        ports.push(port(&at, p.name.as_deref(), p.protocol.as_deref(), number, p.app_protocol.as_deref())?);
    }
    Ok(ports)
}

fn read_backends(object: &discovery::EndpointSlice, family: Family) -> Result<Vec<Backend>, Problem> {
    if object.endpoints.len() > Backends::MAX_SHARD {
        return Err(bad(format!(
            "endpoints has {} entries, at most {} are allowed; write several slices",
            object.endpoints.len(),
            Backends::MAX_SHARD
        )));
    }
    let mut backends = Vec::new();
    for (index, endpoint) in object.endpoints.iter().enumerate() {
        let at = format!("endpoints[{index}]");
        // Only the first address means anything (Kubernetes' own words on the field).
        let text = endpoint.addresses.first().ok_or_else(|| bad(format!("{at}.addresses is empty")))?;
        let address: IpAddr = text.parse().ok().filter(|&a| Family::of(a) == family).ok_or_else(|| {
            bad(format!("{at}: {:?} is not an {} address", shorten(text), object.address_type))
        })?;
        let hostname = match endpoint.hostname.as_deref() {
            None | Some("") => None,
            Some(name) => Some(Hostname::new(name).map_err(|e| bad(format!("{at}.hostname: {e}")))?),
        };
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let ready = conditions.ready.unwrap_or(true);
        backends.push(Backend {
            address,
            hostname,
            ready,
            serving: conditions.serving.unwrap_or(ready),
            terminating: conditions.terminating.unwrap_or(false),
        });
    }
    Ok(backends)
}
