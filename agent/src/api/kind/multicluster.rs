//! multicluster.x-k8s.io ServiceExport and ServiceImport (mcs-api v0.5.2; v1alpha1 has the same shape).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU32;

use k8s_openapi::api::core::v1::{ClientIPConfig, SessionAffinityConfig};
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use tombolo_agent_core::object::{Condition, ExportStatus, Import, Preferences, ServiceExport, ServiceKey};
use tombolo_proto::model::{
    ClusterId, Port, Prefer, Preference, Priority, ServiceType, Share, Weight, is_label_name, is_label_value,
};

use super::service::{family_text, port, read_families};
use super::{
    Kind, MANAGED_BY, MANAGED_BY_LABEL, OWN_PREFIX, ObjectId, Problem, bad, own_meta, seconds, time,
};

/// `spec` of a ServiceExport.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "multicluster.x-k8s.io",
    version = "v1beta1",
    kind = "ServiceExport",
    root = "ServiceExportResource",
    plural = "serviceexports",
    namespaced,
    schema = "disabled",
    status = "ServiceExportStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct ServiceExportSpec {
    /// Labels that the ServiceImport shall bear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exported_labels: Option<BTreeMap<String, String>>,
    /// Annotations that the ServiceImport shall bear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exported_annotations: Option<BTreeMap<String, String>>,
}

/// `status` of a ServiceExport.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct ServiceExportStatus {
    /// Valid, Ready, Conflict.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<meta::Condition>,
}

/// `spec` of a ServiceImport.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "multicluster.x-k8s.io",
    version = "v1beta1",
    kind = "ServiceImport",
    root = "ServiceImportResource",
    plural = "serviceimports",
    namespaced,
    schema = "disabled",
    status = "ServiceImportStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct ServiceImportSpec {
    /// ClusterSetIP or Headless.
    #[serde(rename = "type")]
    pub type_: String,
    /// Merged.
    #[serde(default)]
    pub ports: Vec<ServicePort>,
    /// One a family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<String>,
    /// In the order of `ips`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ip_families: Vec<String>,
    /// None or ClientIP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_affinity: Option<String>,
    /// Its time limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_affinity_config: Option<SessionAffinityConfig>,
    /// Cluster or Local.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_traffic_policy: Option<String>,
    /// As the Service's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_distribution: Option<String>,
}

/// A port of a ServiceImport.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Unique; absent for a lone port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// TCP, UDP, SCTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// As the Service's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
    /// 1 to 65535.
    pub port: i32,
}

/// `status` of a ServiceImport.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ServiceImportStatus {
    /// Who exports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clusters: Vec<ClusterStatus>,
    /// Ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<meta::Condition>,
    /// [`SLICES_PRESENT`]; definitions before mcs-api v0.5.2 do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint_slice_objects: Option<String>,
}

/// Imported EndpointSlices are objects that others may read (KEP-1645).
pub const SLICES_PRESENT: &str = "Present";

/// One of who exports.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ClusterStatus {
    /// Its id.
    pub cluster: String,
}

/// A user's ServiceExport. `created` is 0 where its creation is not known yet.
pub fn read_export(object: &ServiceExportResource) -> Result<(ServiceKey, ServiceExport), Problem> {
    let key = super::service::key(object.metadata.namespace.as_deref(), object.metadata.name.as_deref())?;
    let mut wrong = Vec::new();
    let labels = read_exported("exportedLabels", object.spec.exported_labels.as_ref(), is_label, &mut wrong);
    let annotations = object.spec.exported_annotations.as_ref();
    let annotations = read_exported("exportedAnnotations", annotations, is_annotation, &mut wrong);
    let created = object.metadata.creation_timestamp.as_ref().map_or(0, seconds);
    let preference = read_preference(object.metadata.annotations.as_ref(), &mut wrong);
    let left = wrong.len().saturating_sub(MAX_TOLD);
    wrong.truncate(MAX_TOLD);
    if left > 0 {
        wrong.push(format!("and {left} more"));
    }
    let misread = (!wrong.is_empty()).then(|| wrong.join("; "));
    Ok((key, ServiceExport { labels, annotations, created, preference, misread }))
}

/// Entries of `exportedLabels` and of `exportedAnnotations` that count.
const MAX_EXPORTED: usize = 64;
/// Mistakes of one ServiceExport that are told.
const MAX_TOLD: usize = 5;

/// What others may be given; of the rest it is told why not.
fn read_exported(
    field: &str,
    map: Option<&BTreeMap<String, String>>,
    good: fn(&str) -> Result<(), &'static str>,
    wrong: &mut Vec<String>,
) -> BTreeMap<String, String> {
    let mut read = BTreeMap::new();
    for (name, value) in map.into_iter().flatten() {
        let shown = super::shorten(name);
        if !is_label_name(name) {
            wrong.push(format!("{field}: {shown:?} is not a name such as example.org/team, and is left out"));
        } else if let Err(why) = good(value) {
            wrong.push(format!("{field}: the value of {shown} {why}, and is left out"));
        } else if read.len() == MAX_EXPORTED {
            wrong.push(format!("{field}: {shown} is left out, {MAX_EXPORTED} entries are allowed"));
        } else {
            read.insert(name.clone(), value.clone());
        }
    }
    read
}

fn is_label(value: &str) -> Result<(), &'static str> {
    if is_label_value(value) {
        Ok(())
    } else {
        Err("is no label's value (up to 63 letters, digits, -, _ and .)")
    }
}

fn is_annotation(value: &str) -> Result<(), &'static str> {
    let good = value.len() <= 4096 && !value.chars().any(char::is_control);
    if good { Ok(()) } else { Err("is longer than 4096 bytes or not printable") }
}

/// `local` or `any`.
const PREFER: &str = "tombolo.dev/prefer";
/// 0 to 100, lower first.
const PRIORITY: &str = "tombolo.dev/priority";
/// 1 to 100.
const WEIGHT: &str = "tombolo.dev/weight";
/// On a ServiceImport: priority and weight of each cluster that has others than the default, as JSON.
const SHARES: &str = "tombolo.dev/shares";

/// What cannot be read has its default, and is told.
fn read_preference(annotations: Option<&BTreeMap<String, String>>, wrong: &mut Vec<String>) -> Preference {
    let mut preference = Preference::default();
    let mut read = |name: &str, expected: &str, take: &mut dyn FnMut(&str) -> Option<()>| {
        let Some(text) = annotations.and_then(|a| a.get(name)) else { return };
        if take(text.trim()).is_none() {
            wrong.push(format!("annotation {name} is {:?}, not {expected}", super::shorten(text)));
        }
    };
    read(PREFER, "local or any (any is used)", &mut |text| {
        preference.prefer = Some(match text {
            "local" => Prefer::Local,
            "any" => Prefer::Any,
            _ => return None,
        });
        Some(())
    });
    read(PRIORITY, "a number from 0 to 100 (0, the first choice, is used)", &mut |text| {
        preference.share.priority = text.parse().ok().and_then(Priority::new)?;
        Some(())
    });
    read(WEIGHT, "a number from 1 to 100 (100 is used)", &mut |text| {
        preference.share.weight = text.parse().ok().and_then(Weight::new)?;
        Some(())
    });
    preference
}

fn read_preferences(annotations: Option<&BTreeMap<String, String>>) -> Preferences {
    let find = |name: &str| annotations.and_then(|a| a.get(name));
    let shares: BTreeMap<ClusterId, Share> =
        find(SHARES).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    Preferences { local: find(PREFER).is_some_and(|text| text == "local"), shares }
}

fn write_preferences(preferences: &Preferences) -> Result<BTreeMap<String, String>, Problem> {
    let mut annotations = BTreeMap::new();
    if preferences.local {
        annotations.insert(PREFER.to_owned(), "local".to_owned());
    }
    if !preferences.shares.is_empty() {
        let text = serde_json::to_string(&preferences.shares)
            .map_err(|error| bad(format!("its shares cannot be written: {error}")))?;
        annotations.insert(SHARES.to_owned(), text);
    }
    Ok(annotations)
}

/// The status in a ServiceExport.
pub fn read_status(object: &ServiceExportResource) -> ExportStatus {
    let conditions = object.status.iter().flat_map(|s| &s.conditions);
    let condition = |c: &meta::Condition| {
        let value =
            Condition { status: c.status == "True", reason: c.reason.clone(), message: c.message.clone() };
        (c.type_.clone(), value)
    };
    ExportStatus { conditions: conditions.map(condition).collect() }
}

/// The status to write. A condition whose status is what it was keeps its time; `now`: unix seconds.
pub fn write_status(
    status: &ExportStatus,
    was: Option<&ServiceExportStatus>,
    now: u64,
) -> ServiceExportStatus {
    let condition = |(type_, c): (&String, &Condition)| {
        let status = if c.status { "True" } else { "False" };
        let known = was.iter().flat_map(|s| &s.conditions).find(|k| k.type_ == *type_ && k.status == status);
        meta::Condition {
            type_: type_.clone(),
            status: status.to_owned(),
            reason: c.reason.clone(),
            message: c.message.clone(),
            last_transition_time: known.map_or_else(|| time(now), |k| k.last_transition_time.clone()),
            observed_generation: None,
        }
    };
    ServiceExportStatus { conditions: status.conditions.iter().map(condition).collect() }
}

/// The API's object of an import. Labels and annotations under our own prefix are not taken from exports.
pub fn write_import(key: &ServiceKey, import: &Import) -> Result<ServiceImportResource, Problem> {
    let mut metadata = own_meta(&ObjectId::of_service(Kind::ServiceImport, key)?);
    let foreign = |map: &BTreeMap<String, String>| {
        map.iter()
            .filter(|(k, _)| !k.starts_with(OWN_PREFIX))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect::<BTreeMap<_, _>>()
    };
    metadata.labels.get_or_insert_default().extend(foreign(&import.labels));
    let mut annotations = foreign(&import.annotations);
    annotations.extend(write_preferences(&import.preferences)?);
    metadata.annotations = Some(annotations).filter(|a| !a.is_empty());
    let type_ = match import.kind {
        ServiceType::ClusterSetIP => "ClusterSetIP",
        ServiceType::Headless => "Headless",
    };
    let port = |p: &Port| ServicePort {
        name: p.name.as_ref().map(ToString::to_string),
        protocol: Some(p.protocol.to_string()),
        app_protocol: p.app_protocol.clone(),
        port: p.port.into(),
    };
    let spec = ServiceImportSpec {
        type_: type_.to_owned(),
        ports: import.ports.iter().map(port).collect(),
        ips: import.ips.iter().map(ToString::to_string).collect(),
        ip_families: import.families.iter().map(|f| family_text(*f)).collect(),
        session_affinity: Some(if import.affinity.is_some() { "ClientIP" } else { "None" }.to_owned()),
        session_affinity_config: import.affinity.map(|limit| SessionAffinityConfig {
            client_ip: Some(ClientIPConfig { timeout_seconds: i32::try_from(limit.get()).ok() }),
        }),
        internal_traffic_policy: Some(if import.internal_local { "Local" } else { "Cluster" }.to_owned()),
        traffic_distribution: import.traffic_distribution.clone(),
    };
    let clusters = import.clusters.iter().map(|c| ClusterStatus { cluster: c.to_string() }).collect();
    Ok(ServiceImportResource {
        metadata,
        spec,
        status: Some(ServiceImportStatus {
            clusters,
            conditions: Vec::new(),
            endpoint_slice_objects: Some(SLICES_PRESENT.to_owned()),
        }),
    })
}

/// Condition `Ready` of an import (mcs 16). One whose status is what it was keeps its time; `now`: unix seconds.
pub fn import_condition(
    import: &Import,
    was: Option<&ServiceImportStatus>,
    generation: Option<i64>,
    now: u64,
) -> meta::Condition {
    let ready = import.kind == ServiceType::Headless || !import.ips.is_empty();
    let (status, reason, message) = if ready {
        ("True", "Ready", "the service can be used here")
    } else {
        ("False", "IPFamilyNotSupported", "this cluster's Services have none of its IP families")
    };
    let known = was.iter().flat_map(|s| &s.conditions).find(|c| c.type_ == "Ready" && c.status == status);
    meta::Condition {
        type_: "Ready".to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: known.map_or_else(|| time(now), |known| known.last_transition_time.clone()),
        observed_generation: generation,
    }
}

/// An import.
pub fn read_import(object: &ServiceImportResource) -> Result<(ServiceKey, Import), Problem> {
    let key = super::service::key(object.metadata.namespace.as_deref(), object.metadata.name.as_deref())?;
    let spec = &object.spec;
    let kind = match spec.type_.as_str() {
        "ClusterSetIP" => ServiceType::ClusterSetIP,
        "Headless" => ServiceType::Headless,
        other => {
            let other = super::shorten(other);
            return Err(bad(format!("spec.type is {other:?}, not ClusterSetIP or Headless")));
        }
    };
    let mut ports = Vec::new();
    for (index, p) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        ports.push(port(&at, p.name.as_deref(), p.protocol.as_deref(), p.port, p.app_protocol.as_deref())?);
    }
    let ips: Vec<IpAddr> = spec
        .ips
        .iter()
        .map(|ip| {
            ip.parse().map_err(|_| bad(format!("spec.ips: {:?} is not an address", super::shorten(ip))))
        })
        .collect::<Result<_, _>>()?;
    let families = read_families("spec.ipFamilies", &spec.ip_families)?;
    if families.is_empty() || ips.len() > 2 {
        return Err(bad("spec.ipFamilies is empty, or spec.ips has more than two entries"));
    }
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
        let limit = config.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok());
        limit.and_then(NonZeroU32::new).unwrap_or(NonZeroU32::new(10_800).unwrap_or(NonZeroU32::MIN))
    });
    let clusters: BTreeSet<ClusterId> = object
        .status
        .iter()
        .flat_map(|s| &s.clusters)
        .map(|c| ClusterId::new(&c.cluster).map_err(|e| bad(format!("status.clusters: {e}"))))
        .collect::<Result<_, _>>()?;
    let foreign = |map: &Option<BTreeMap<String, String>>| {
        map.iter()
            .flatten()
            .filter(|(k, _)| !k.starts_with(OWN_PREFIX))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    };
    let import = Import {
        kind,
        ports,
        ips,
        families,
        affinity,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        traffic_distribution: spec.traffic_distribution.clone(),
        labels: foreign(&object.metadata.labels),
        annotations: foreign(&object.metadata.annotations),
        clusters,
        preferences: read_preferences(object.metadata.annotations.as_ref()),
    };
    Ok((key, import))
}

/// Whether a ServiceImport was made by us.
pub fn is_ours(object: &ServiceImportResource) -> bool {
    let labels = object.metadata.labels.as_ref();
    labels.and_then(|l| l.get(MANAGED_BY_LABEL)).is_some_and(|v| v == MANAGED_BY)
}
