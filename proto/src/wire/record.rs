//! Bodies of records.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU32;

use super::{
    Result, WireError, address, address_bytes, array, bad, bounded, parse, prefix, prefix_pb, to_bytes,
};
use crate::model::{
    Backend, BackendGroup, Backends, Device, DeviceNumber, Endpoint, Export, Family, Hostname, NodeName,
    Port, PortName, Prefer, Preference, Priority, Protocol, Rank, ServiceType, Share, Weight, WireguardKey,
    is_label_name, is_label_value, usable_address,
};
use crate::pb;

/// Body of an Endpoint record; the node's name is in the key.
pub fn encode_endpoint(endpoint: &Endpoint) -> Vec<u8> {
    to_bytes(&pb::Endpoint {
        rank: endpoint.rank.get().into(),
        devices: endpoint
            .devices
            .iter()
            .map(|(number, device)| pb::Device {
                number: number.get().into(),
                key: device.key.0.to_vec().into(),
                port: device.port.into(),
            })
            .collect(),
        candidates: endpoint.candidates.iter().map(|a| address_bytes(*a).into()).collect(),
        tunnel_v4: endpoint.tunnel_v4.map(|a| a.octets().to_vec()).unwrap_or_default().into(),
        tunnel_v6: endpoint.tunnel_v6.map(|a| a.octets().to_vec()).unwrap_or_default().into(),
        prefixes: endpoint.prefixes.iter().map(prefix_pb).collect(),
        mesh: endpoint.mesh,
    })
}

/// Reads the body of node `node`'s Endpoint record.
pub fn decode_endpoint(node: NodeName, bytes: &[u8]) -> Result<Endpoint> {
    let value: pb::Endpoint = parse(bytes)?;
    bounded("devices", &value.devices, 64)?;
    bounded("candidates", &value.candidates, 2 * Endpoint::MAX_CANDIDATES)?;
    bounded("prefixes", &value.prefixes, Endpoint::MAX_PREFIXES)?;
    let rank = u8::try_from(value.rank).ok().and_then(Rank::new).ok_or_else(|| bad("rank", "not 0 to 3"))?;
    let mut devices = BTreeMap::new();
    for device in &value.devices {
        let number = u8::try_from(device.number)
            .ok()
            .and_then(DeviceNumber::new)
            .ok_or_else(|| bad("device number", "not 0 to 63"))?;
        let port = u16::try_from(device.port)
            .ok()
            .filter(|&p| p > 0)
            .ok_or_else(|| bad("device port", "not 1 to 65535"))?;
        let key = WireguardKey(array("device key", &device.key)?);
        if key.0 == [0; 32] {
            return Err(bad("device key", "all zero"));
        }
        if devices.insert(number, Device { key, port }).is_some() {
            return Err(bad("device number", "repeated"));
        }
    }
    let mut candidates: Vec<IpAddr> = Vec::new();
    for bytes in &value.candidates {
        // Where packets are sent from the host's own network: usable, but not bound to the grant.
        let candidate = usable_address(address("candidate", bytes)?)?;
        let same = candidates.iter().filter(|c| c.is_ipv4() == candidate.is_ipv4()).count();
        if same >= Endpoint::MAX_CANDIDATES {
            return Err(WireError::TooMany {
                field: "candidates",
                count: same + 1,
                max: Endpoint::MAX_CANDIDATES,
            });
        }
        if !candidates.contains(&candidate) {
            candidates.push(candidate);
        }
    }
    let tunnel_v4 = if value.tunnel_v4.is_empty() {
        None
    } else {
        let address = array::<4>("tunnel_v4", &value.tunnel_v4)?.into();
        usable_address(IpAddr::V4(address))?;
        Some(address)
    };
    let tunnel_v6 = if value.tunnel_v6.is_empty() {
        None
    } else {
        let address = array::<16>("tunnel_v6", &value.tunnel_v6)?.into();
        usable_address(IpAddr::V6(address))?;
        Some(address)
    };
    Ok(Endpoint {
        node,
        rank,
        devices,
        candidates,
        tunnel_v4,
        tunnel_v6,
        prefixes: value.prefixes.iter().map(prefix).collect::<Result<BTreeSet<_>>>()?,
        mesh: value.mesh,
    })
}

fn ports_pb(ports: &[Port]) -> Vec<pb::Port> {
    let port = |p: &Port| {
        let protocol = match p.protocol {
            Protocol::Tcp => pb::Protocol::Tcp,
            Protocol::Udp => pb::Protocol::Udp,
            Protocol::Sctp => pb::Protocol::Sctp,
        };
        pb::Port {
            name: p.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            protocol: protocol.into(),
            port: p.port.into(),
            app_protocol: p.app_protocol.clone().unwrap_or_default(),
        }
    };
    ports.iter().map(port).collect()
}

fn ports(list: &[pb::Port]) -> Result<Vec<Port>> {
    bounded("ports", list, Export::MAX_PORTS)?;
    let port = |p: &pb::Port| {
        let protocol = match p.protocol() {
            pb::Protocol::Tcp => Protocol::Tcp,
            pb::Protocol::Udp => Protocol::Udp,
            pb::Protocol::Sctp => Protocol::Sctp,
            pb::Protocol::Unspecified => return Err(bad("protocol", "not TCP, UDP or SCTP")),
        };
        let number =
            u16::try_from(p.port).ok().filter(|&n| n > 0).ok_or_else(|| bad("port", "not 1 to 65535"))?;
        Ok(Port {
            name: if p.name.is_empty() { None } else { Some(PortName::new(&p.name)?) },
            protocol,
            port: number,
            app_protocol: app_protocol(&p.app_protocol)?,
        })
    };
    list.iter().map(port).collect()
}

/// As an API server takes it: it refuses any other, and with it the whole Service.
fn app_protocol(text: &str) -> Result<Option<String>> {
    match text {
        "" => Ok(None),
        name if is_label_name(name) => Ok(Some(name.to_owned())),
        _ => Err(bad("app_protocol", "not a qualified name")),
    }
}

/// Kubernetes' own rules for a Service: each name and each (protocol, port) once, and names for all when
/// there are several.
fn distinct(ports: &[Port]) -> Result<()> {
    let names: BTreeSet<_> = ports.iter().map(|p| &p.name).collect();
    let numbers: BTreeSet<_> = ports.iter().map(|p| (p.protocol, p.port)).collect();
    if names.len() < ports.len() || numbers.len() < ports.len() {
        return Err(bad("ports", "repeated, by name or by protocol and number"));
    }
    if ports.len() > 1 && names.contains(&None) {
        return Err(bad("ports", "several, not all with a name"));
    }
    Ok(())
}

fn text(field: &'static str, value: &str, max: usize) -> Result<Option<String>> {
    if value.len() > max || value.chars().any(char::is_control) {
        return Err(bad(field, format!("longer than {max} bytes or not printable")));
    }
    Ok((!value.is_empty()).then(|| value.to_owned()))
}

/// Body of an Export record; namespace and service are in scope and key.
pub fn encode_export(export: &Export) -> Vec<u8> {
    let kind = match export.kind {
        ServiceType::ClusterSetIP => pb::ServiceType::ClusterSetIp,
        ServiceType::Headless => pb::ServiceType::Headless,
    };
    let family = |f: &Family| match f {
        Family::V4 => pb::IpFamily::V4.into(),
        Family::V6 => pb::IpFamily::V6.into(),
    };
    to_bytes(&pb::Export {
        r#type: kind.into(),
        ports: ports_pb(&export.ports),
        families: export.families.iter().map(family).collect(),
        client_ip_affinity_seconds: export.affinity.map_or(0, NonZeroU32::get),
        internal_traffic_policy: if export.internal_local { "Local".to_owned() } else { String::new() },
        traffic_distribution: export.traffic_distribution.clone().unwrap_or_default(),
        labels: export.labels.clone(),
        annotations: export.annotations.clone(),
        created: export.created,
        prefer: match export.preference.prefer {
            None => pb::Prefer::Unspecified.into(),
            Some(Prefer::Local) => pb::Prefer::Local.into(),
            Some(Prefer::Any) => pb::Prefer::Any.into(),
        },
        priority: export.preference.share.priority.get().into(),
        weight: match export.preference.share.weight {
            Weight::DEFAULT => 0,
            weight => weight.get().into(),
        },
    })
}

/// What is out of bounds is taken for the nearest bound, and a wish that is not known for none: an export is never lost by
/// its preferences.
fn preference(value: &pb::Export) -> Preference {
    let bounded = |n: u32| u8::try_from(n).unwrap_or(u8::MAX).min(100);
    let prefer = match value.prefer() {
        pb::Prefer::Unspecified => None,
        pb::Prefer::Local => Some(Prefer::Local),
        pb::Prefer::Any => Some(Prefer::Any),
    };
    let share = Share {
        priority: Priority::new(bounded(value.priority)).unwrap_or_default(),
        weight: Weight::new(bounded(value.weight)).unwrap_or_default(),
    };
    Preference { prefer, share }
}

/// Reads the body of an Export record.
pub fn decode_export(bytes: &[u8]) -> Result<Export> {
    let value: pb::Export = parse(bytes)?;
    let kind = match value.r#type() {
        pb::ServiceType::ClusterSetIp => ServiceType::ClusterSetIP,
        pb::ServiceType::Headless => ServiceType::Headless,
        pb::ServiceType::Unspecified => return Err(bad("type", "not known")),
    };
    bounded("families", &value.families, 2)?;
    let mut families = Vec::new();
    for family in value.families() {
        let family = match family {
            pb::IpFamily::V4 => Family::V4,
            pb::IpFamily::V6 => Family::V6,
            pb::IpFamily::Unspecified => return Err(bad("families", "not IPv4 or IPv6")),
        };
        if families.contains(&family) {
            return Err(bad("families", "repeated"));
        }
        families.push(family);
    }
    if families.is_empty() {
        return Err(WireError::Missing("families"));
    }
    let internal_local = match value.internal_traffic_policy.as_str() {
        "" | "Cluster" => false,
        "Local" => true,
        _ => return Err(bad("internal_traffic_policy", "not Cluster or Local")),
    };
    for map in [&value.labels, &value.annotations] {
        if map.len() > 64 {
            return Err(WireError::TooMany { field: "labels", count: map.len(), max: 64 });
        }
        for (key, value) in map {
            if !is_label_name(key) {
                return Err(bad("labels", "not a qualified name"));
            }
            text("labels", value, 4096)?;
        }
    }
    if !value.labels.values().all(|value| is_label_value(value)) {
        return Err(bad("labels", "not a label value"));
    }
    let ports = ports(&value.ports)?;
    distinct(&ports)?;
    let preference = preference(&value);
    Ok(Export {
        kind,
        ports,
        families,
        affinity: NonZeroU32::new(value.client_ip_affinity_seconds.min(86_400)),
        internal_local,
        traffic_distribution: text("traffic_distribution", &value.traffic_distribution, 63)?,
        labels: value.labels,
        annotations: value.annotations,
        created: value.created,
        preference,
    })
}

/// Body of a Backends record.
pub fn encode_backends(backends: &Backends) -> Vec<u8> {
    let backend = |b: &Backend| pb::Backend {
        address: address_bytes(b.address).into(),
        hostname: b.hostname.as_ref().map(ToString::to_string).unwrap_or_default(),
        ready: b.ready,
        serving: b.serving,
        terminating: b.terminating,
    };
    to_bytes(&pb::Backends {
        groups: backends
            .groups
            .iter()
            .map(|g| pb::BackendGroup {
                ports: ports_pb(&g.ports),
                backends: g.backends.iter().map(backend).collect(),
            })
            .collect(),
    })
}

/// Reads the body of a Backends record. Whether its cluster owns the addresses is judged later, by
/// everybody who uses them.
pub fn decode_backends(bytes: &[u8]) -> Result<Backends> {
    let value: pb::Backends = parse(bytes)?;
    bounded("groups", &value.groups, Backends::MAX_SHARD)?;
    let count = value.groups.iter().map(|g| g.backends.len()).sum();
    if count > Backends::MAX_SHARD {
        return Err(WireError::TooMany { field: "backends", count, max: Backends::MAX_SHARD });
    }
    let backend = |b: &pb::Backend| {
        Ok(Backend {
            address: usable_address(address("backend address", &b.address)?)?,
            hostname: if b.hostname.is_empty() { None } else { Some(Hostname::new(&b.hostname)?) },
            ready: b.ready,
            serving: b.serving,
            terminating: b.terminating,
        })
    };
    let group = |g: &pb::BackendGroup| {
        Ok(BackendGroup {
            ports: ports(&g.ports)?,
            backends: g.backends.iter().map(backend).collect::<Result<_>>()?,
        })
    };
    Ok(Backends { groups: value.groups.iter().map(group).collect::<Result<_>>()? })
}
