//! v1 Service.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use k8s_openapi::api::core::v1 as core;
use tombolo_agent_core::object::{LocalKind, Service, ServiceKey};
use tombolo_proto::model::{Export, Family, Namespace, Port, PortName, Protocol, ServiceName};

use super::{MANAGED_BY, MANAGED_BY_LABEL, Problem, bad, shorten};

/// Kubernetes' default time limit of `sessionAffinity: ClientIP`, seconds.
const AFFINITY: NonZeroU32 = NonZeroU32::new(10_800).unwrap();

/// A Service as plans see it. `families` is empty when the object does not tell: it was allotted no addresses,
/// as in a directory; then its EndpointSlices tell (see [`super::super::directory`]).
pub fn read(object: &core::Service) -> Result<(ServiceKey, Service), Problem> {
    let key = key(object.metadata.namespace.as_deref(), object.metadata.name.as_deref())?;
    let spec = object.spec.clone().unwrap_or_default();
    let derived = object
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(MANAGED_BY_LABEL))
        .is_some_and(|value| value == MANAGED_BY);
    let kind = if derived {
        LocalKind::Derived
    } else if spec.type_.as_deref() == Some("ExternalName") {
        LocalKind::ExternalName
    } else if spec.cluster_ip.as_deref() == Some("None") {
        LocalKind::Headless
    } else {
        LocalKind::ClusterIP
    };
    let mut ports = Vec::new();
    for (index, p) in spec.ports.iter().flatten().enumerate() {
        let at = format!("spec.ports[{index}]");
        ports.push(port(&at, p.name.as_deref(), p.protocol.as_deref(), p.port, p.app_protocol.as_deref())?);
    }
    check_ports(&ports)?;
    let affinity = match spec.session_affinity.as_deref() {
        Some("ClientIP") => {
            let config = spec.session_affinity_config.and_then(|c| c.client_ip);
            let limit = config.and_then(|c| c.timeout_seconds);
            Some(limit.map_or(Ok(AFFINITY), |limit| {
                u32::try_from(limit).ok().filter(|&s| s <= 86_400).and_then(NonZeroU32::new).ok_or_else(
                    || bad("spec.sessionAffinityConfig.clientIP.timeoutSeconds is not 1 to 86400"),
                )
            })?)
        }
        Some("None" | "") | None => None,
        Some(other) => {
            let other = shorten(other);
            return Err(bad(format!("spec.sessionAffinity is {other:?}, not None or ClientIP")));
        }
    };
    let internal_local = match spec.internal_traffic_policy.as_deref() {
        Some("Local") => true,
        Some("Cluster" | "") | None => false,
        Some(other) => {
            let other = shorten(other);
            return Err(bad(format!("spec.internalTrafficPolicy is {other:?}, not Cluster or Local")));
        }
    };
    let traffic_distribution = match spec.traffic_distribution {
        Some(text) if text.len() > 63 || text.chars().any(char::is_control) => {
            return Err(bad("spec.trafficDistribution is longer than 63 characters or not printable"));
        }
        other => other.filter(|text| !text.is_empty()),
    };
    let families = families(
        spec.ip_families.as_deref(),
        spec.cluster_ips.as_deref(),
        spec.cluster_ip.as_deref(),
        spec.ip_family_policy.as_deref(),
    )?;
    let service = Service { kind, ports, families, affinity, internal_local, traffic_distribution };
    Ok((key, service))
}

/// The families an object tells: as listed, or of its addresses, or both if it asks for both.
fn families(
    listed: Option<&[String]>,
    addresses: Option<&[String]>,
    address: Option<&str>,
    policy: Option<&str>,
) -> Result<Vec<Family>, Problem> {
    if let Some(listed) = listed.filter(|list| !list.is_empty()) {
        return read_families("spec.ipFamilies", listed);
    }
    let mut families: Vec<Family> = Vec::new();
    for text in addresses.unwrap_or_default().iter().map(String::as_str).chain(address) {
        if let Ok(address) = text.parse()
            && !families.contains(&Family::of(address))
        {
            families.push(Family::of(address));
        }
    }
    if families.is_empty() && matches!(policy, Some("PreferDualStack" | "RequireDualStack")) {
        families = Family::ALL.to_vec();
    }
    Ok(families)
}

/// `IPv4`, `IPv6`, each once.
pub(crate) fn read_families(field: &str, listed: &[String]) -> Result<Vec<Family>, Problem> {
    let mut families = Vec::new();
    for text in listed {
        let family = match text.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => return Err(bad(format!("{field}: {:?} is not IPv4 or IPv6", shorten(other)))),
        };
        if families.contains(&family) {
            return Err(bad(format!("{field} lists {text} twice")));
        }
        families.push(family);
    }
    Ok(families)
}

/// `IPv4`, `IPv6`.
pub(crate) fn family_text(family: Family) -> String {
    match family {
        Family::V4 => "IPv4".to_owned(),
        Family::V6 => "IPv6".to_owned(),
    }
}

/// A service's key out of metadata.
pub(crate) fn key(namespace: Option<&str>, name: Option<&str>) -> Result<ServiceKey, Problem> {
    let namespace = Namespace::new(namespace.unwrap_or("default"));
    Ok(ServiceKey {
        namespace: namespace.map_err(|e| bad(format!("metadata.namespace: {e}")))?,
        name: ServiceName::new(name.unwrap_or("")).map_err(|e| bad(format!("metadata.name: {e}")))?,
    })
}

/// One port.
pub(crate) fn port(
    at: &str,
    name: Option<&str>,
    protocol: Option<&str>,
    number: i32,
    app_protocol: Option<&str>,
) -> Result<Port, Problem> {
    let name = match name {
        None | Some("") => None,
        Some(name) => Some(PortName::new(name).map_err(|e| bad(format!("{at}.name: {e}")))?),
    };
    let protocol: Protocol = match protocol {
        None | Some("") => Protocol::Tcp,
        Some(text) => shorten(text).parse().map_err(|e| bad(format!("{at}: {e}")))?,
    };
    let port = u16::try_from(number)
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| bad(format!("{at}.port is {number}, not 1 to 65535")))?;
    let app_protocol = match app_protocol {
        Some(text) if text.len() > 317 || text.chars().any(char::is_control) => {
            return Err(bad(format!("{at}.appProtocol is longer than 317 characters or not printable")));
        }
        other => other.filter(|text| !text.is_empty()).map(str::to_owned),
    };
    Ok(Port { name, protocol, port, app_protocol })
}

/// Kubernetes' own rules: each name and each (protocol, port) once, and names for all of several.
fn check_ports(ports: &[Port]) -> Result<(), Problem> {
    if ports.len() > Export::MAX_PORTS {
        return Err(bad(format!(
            "spec.ports has {} entries, at most {} are allowed",
            ports.len(),
            Export::MAX_PORTS
        )));
    }
    let names: BTreeSet<_> = ports.iter().map(|p| &p.name).collect();
    let numbers: BTreeSet<_> = ports.iter().map(|p| (p.protocol, p.port)).collect();
    if ports.len() > 1 && names.contains(&None) {
        return Err(bad("spec.ports: of several ports each needs a name"));
    }
    if names.len() < ports.len() || numbers.len() < ports.len() {
        return Err(bad("spec.ports: a name, or a protocol and number, stands there twice"));
    }
    Ok(())
}
