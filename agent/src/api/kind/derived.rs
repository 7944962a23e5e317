//! v1 Service that carries an import's ClusterSetIPs under Kubernetes.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use ring::digest::{SHA256, digest};
use tombolo_agent_core::object::{DerivedService, LocalKind, ServiceKey};
use tombolo_proto::model::Port;

use super::service::family_text;
use super::slice::IMPORT_LABEL;
use super::{Kind, ObjectId, Problem, bad, own_meta, service};

/// Name of an import's Service: with the import's, so that people find it, and a hash of it, so that no two share one
/// and none meets a Service of the users'. At most 63 characters, beginning with a letter.
pub fn name(key: &ServiceKey) -> String {
    let whole = key.name.as_str();
    let hash = data_encoding::HEXLOWER.encode(&digest(&SHA256, whole.as_bytes()).as_ref()[..5]);
    format!("tombolo-{}-{hash}", whole.get(..44).unwrap_or(whole).trim_end_matches('-'))
}

/// Where it lies.
pub fn id(key: &ServiceKey) -> Result<ObjectId, Problem> {
    ObjectId::namespaced(Kind::Service, &key.namespace, &name(key))
}

/// The API's object. It has no selector: its EndpointSlices are the imported ones.
pub fn write(key: &ServiceKey, value: &DerivedService) -> Result<core::Service, Problem> {
    let mut metadata = own_meta(&id(key)?);
    metadata.labels.get_or_insert_default().insert(IMPORT_LABEL.to_owned(), key.name.to_string());
    let port = |port: &Port| core::ServicePort {
        name: port.name.as_ref().map(ToString::to_string),
        protocol: Some(port.protocol.to_string()),
        port: port.port.into(),
        // Only for who reads it: a Service without a selector goes by its slices.
        target_port: Some(IntOrString::Int(port.port.into())),
        app_protocol: port.app_protocol.clone(),
        node_port: None,
    };
    let ips: Vec<String> = value.ips.iter().map(ToString::to_string).collect();
    let dual = value.families.len() > 1;
    let spec = core::ServiceSpec {
        type_: Some("ClusterIP".to_owned()),
        cluster_ip: ips.first().cloned(),
        cluster_ips: Some(ips).filter(|ips| !ips.is_empty()),
        ip_families: Some(value.families.iter().map(|f| family_text(*f)).collect()),
        // Whatever of the two the cluster has.
        ip_family_policy: Some(if dual { "PreferDualStack" } else { "SingleStack" }.to_owned()),
        ports: Some(value.ports.iter().map(port).collect()),
        session_affinity: Some(if value.affinity.is_some() { "ClientIP" } else { "None" }.to_owned()),
        session_affinity_config: value.affinity.map(|limit| core::SessionAffinityConfig {
            client_ip: Some(core::ClientIPConfig { timeout_seconds: i32::try_from(limit.get()).ok() }),
        }),
        internal_traffic_policy: Some(if value.internal_local { "Local" } else { "Cluster" }.to_owned()),
        traffic_distribution: value.traffic_distribution.clone(),
        ..core::ServiceSpec::default()
    };
    Ok(core::Service { metadata, spec: Some(spec), status: None })
}

/// An import's Service; None for any other.
pub fn read(object: &core::Service) -> Result<Option<(ServiceKey, DerivedService)>, Problem> {
    let label = object.metadata.labels.as_ref().and_then(|labels| labels.get(IMPORT_LABEL));
    let (_, value) = service::read(object)?;
    let (LocalKind::Derived, Some(label)) = (value.kind, label) else { return Ok(None) };
    let (namespace, name) = (object.metadata.namespace.as_deref(), object.metadata.name.as_deref());
    let key = service::key(namespace, Some(label)).map_err(|e| bad(format!("label {IMPORT_LABEL}: {e}")))?;
    if name != Some(self::name(&key).as_str()) {
        return Err(bad("its name does not fit its labels"));
    }
    let spec = object.spec.clone().unwrap_or_default();
    let ip = |text: &String| text.parse::<IpAddr>().map_err(|_| bad("spec.clusterIPs holds no address"));
    let ips = spec.cluster_ips.iter().flatten().filter(|text| *text != "None").map(ip);
    let derived = DerivedService {
        ips: ips.collect::<Result<_, _>>()?,
        families: value.families,
        ports: value.ports,
        affinity: value.affinity,
        internal_local: value.internal_local,
        traffic_distribution: value.traffic_distribution,
    };
    Ok(Some((key, derived)))
}

/// Whether a Service selects pods, has other ways in, or is of another type: what none of ours does.
pub fn is_bent(object: &core::Service) -> bool {
    let Some(spec) = &object.spec else { return true };
    let selects = spec.selector.as_ref().is_some_and(|selector| !selector.is_empty());
    let outside = spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
    selects || outside || spec.type_.as_deref().is_some_and(|type_| type_ != "ClusterIP")
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use tombolo_proto::model::{Family, Protocol, ServiceName};

    use super::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey { namespace: "shop".parse().unwrap(), name: name.parse().unwrap() }
    }

    #[test]
    fn names_are_services_names_and_differ() {
        let long = "a".repeat(63);
        let names = ["web", "web-2", &long[..62], &long].map(|name| super::name(&key(name)));
        for name in &names {
            assert!(ServiceName::new(name).is_ok() && name.len() <= 63, "{name}");
        }
        let all: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(all.len(), names.len());
    }

    #[test]
    fn what_is_written_is_read_back() {
        let port = |name: &str, port| Port {
            name: Some(name.parse().unwrap()),
            protocol: Protocol::Tcp,
            port,
            app_protocol: Some("http".to_owned()),
        };
        let value = DerivedService {
            ips: vec!["10.96.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            families: vec![Family::V4, Family::V6],
            ports: vec![port("http", 80), port("alt", 81)],
            affinity: NonZeroU32::new(600),
            internal_local: true,
            traffic_distribution: Some("PreferClose".to_owned()),
        };
        let object = write(&key("web"), &value).unwrap();
        assert_eq!(read(&object).unwrap(), Some((key("web"), value.clone())));
        assert!(!is_bent(&object));
        // A Service of the users' is none of ours, and neither is one that bears our label by mistake.
        let mut other = object.clone();
        other.metadata.labels = None;
        assert_eq!(read(&other).unwrap(), None);
        let mut named = object;
        named.metadata.name = Some("web".to_owned());
        assert!(read(&named).is_err());
    }
}
