//! `resolve`: what a name answers, out of the objects that the resolver answers from.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;
use tombolo_agent::api::Observed;
use tombolo_agent::api::directory::Directory;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::ServiceKey;
use tombolo_agent_core::zone::{APEX, Answer, Data, Kind, Target, Zone};
use tombolo_proto::model::{Family, Namespace, ServiceName, ServiceType};

use super::explain::here::Here;
use super::explain::{
    self,
    backend::{self, Row},
};
use super::say;
use crate::cli::{RecordKind, Resolve};
use crate::output::{Printer, Table};

/// Records that are printed of each type.
const MOST: usize = 1000;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Resolution {
    name: String,
    /// NOERROR, NODATA or NXDOMAIN.
    status: &'static str,
    records: Vec<RecordRow>,
    /// Why there is no answer, as far as this cluster knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// With `--explain`: every address of the service, and why it is or is not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    addresses: Option<Vec<Row>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RecordRow {
    name: String,
    ttl: u32,
    #[serde(rename = "type")]
    kind: &'static str,
    data: String,
}

pub(super) fn resolve(printer: &Printer, args: &Resolve) -> Result<ExitCode> {
    let labels = labels(&args.name)?;
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let observed = Directory::open(&args.cluster.cluster_dir)?.read();
    let (Known::Yes(imports), Known::Yes(slices)) = (&observed.imports, &observed.slices) else {
        bail!("what {} imports cannot be read now", args.cluster.cluster_dir.display());
    };
    // As the agent answers. Of a cluster that is no member, or whose membership is damaged, as it would.
    // What this machine's node cannot reach it does not answer with; on another machine everything counts as reached.
    let (underlay, node) = explain::this_machine(&observed).unwrap_or_default();
    let here = Here::of(observed.clone(), node.as_ref(), &underlay, None);
    let planned = here.as_ref().ok().and_then(|here| here.desired.zone.get().cloned());
    let zone = planned.unwrap_or_else(|| Zone::build(imports, slices));
    let mut records = Vec::new();
    let mut exists = false;
    for kind in kinds(args.kind, &labels) {
        match zone.answer(&labels, kind, 0, MOST) {
            Answer::NoName => {}
            Answer::NoData => exists = true,
            Answer::Found(found) => {
                exists = true;
                records.extend(found.records.iter().map(|data| row(&labels, *data)));
                if found.cut {
                    say(format!("only the first {MOST} records are shown"));
                }
            }
        }
    }
    let status = match (records.is_empty(), exists) {
        (false, _) => "NOERROR",
        (true, true) => "NODATA",
        (true, false) => "NXDOMAIN",
    };
    let reason = records.is_empty().then(|| reason(&observed, &labels, args.kind, exists));
    let addresses = match service_key(&labels) {
        Some(key) if args.explain => {
            let import = imports.get(&key);
            Some(
                import
                    .map(|import| Ok::<_, anyhow::Error>(backend::rows(&here?, &key, import)))
                    .transpose()?,
            )
        }
        _ => None,
    };
    let addresses = addresses.map(Option::unwrap_or_default);
    let found = Resolution { name: name(&labels), status, records, reason, addresses };
    printer.print("Resolution", &found, |printer| text(printer, &found))?;
    Ok(if found.reason.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(printer: &Printer, found: &Resolution) -> String {
    let mut text = match &found.reason {
        Some(reason) => format!("{}: {}: {reason}\n", found.name, found.status),
        None => printer.table(&Table {
            headers: vec!["NAME", "TTL", "TYPE", "DATA"],
            narrow: 4,
            rows: found
                .records
                .iter()
                .map(|r| vec![r.name.clone(), r.ttl.to_string(), r.kind.to_owned(), r.data.clone()])
                .collect(),
        }),
    };
    let addresses = found.addresses.as_deref().unwrap_or_default();
    if !addresses.is_empty() {
        let row = |r: &Row| {
            vec![
                r.address.map(|a| a.to_string()).unwrap_or_default(),
                r.cluster.as_ref().map_or_else(|| "(all)".to_owned(), ToString::to_string),
                r.ports.join(","),
                if r.used { "yes" } else { "no" }.to_owned(),
                r.reason.clone(),
            ]
        };
        let table = Table {
            headers: vec!["ADDRESS", "CLUSTER", "PORTS", "USED", "REASON"],
            narrow: 5,
            rows: addresses.iter().map(row).collect(),
        };
        text.push('\n');
        text += &printer.table(&table);
    }
    text
}

/// The service that labels before the apex name, or name something below.
pub(super) fn service_key<S: AsRef<str>>(labels: &[S]) -> Option<ServiceKey> {
    let [.., service, namespace, svc] = labels else { return None };
    if svc.as_ref() != "svc" || service.as_ref().starts_with('_') {
        return None;
    }
    let namespace = Namespace::new(namespace.as_ref()).ok()?;
    Some(ServiceKey { namespace, name: ServiceName::new(service.as_ref()).ok()? })
}

/// The labels before the apex, in lower case. `SERVICE.NAMESPACE` and `SERVICE.NAMESPACE.svc` are short forms.
pub(super) fn labels(text: &str) -> Result<Vec<String>> {
    let lower = text.to_ascii_lowercase();
    let trimmed = lower.strip_suffix('.').unwrap_or(&lower);
    let inside = match trimmed.strip_suffix(APEX) {
        Some("") => return Ok(Vec::new()),
        Some(rest) => rest.strip_suffix('.'),
        None => None,
    };
    let labels: Vec<String> = inside.unwrap_or(trimmed).split('.').map(ToOwned::to_owned).collect();
    if trimmed.len() > 253
        || labels.iter().any(|l| l.is_empty() || l.len() > 63 || l.contains(char::is_control))
    {
        bail!("{:?} is not a DNS name", text.chars().take(80).collect::<String>());
    }
    match (inside.is_some(), labels.len(), labels.last().map(String::as_str)) {
        (true, ..) => Ok(labels),
        (false, 2, _) if labels[1] != "svc" => Ok([labels, vec!["svc".to_owned()]].concat()),
        (false, 3.., Some("svc")) => Ok(labels),
        _ => bail!("{text} is not in {APEX}: SERVICE.NAMESPACE or SERVICE.NAMESPACE.svc.{APEX} is expected"),
    }
}

fn kinds(asked: Option<RecordKind>, labels: &[&str]) -> Vec<Kind> {
    match asked {
        Some(RecordKind::A) => vec![Kind::A],
        Some(RecordKind::Aaaa) => vec![Kind::Aaaa],
        Some(RecordKind::Srv) => vec![Kind::Srv],
        Some(RecordKind::Txt) => vec![Kind::Txt],
        None if labels.first().is_some_and(|l| l.starts_with('_')) => vec![Kind::Srv],
        None if labels == ["dns-version"] => vec![Kind::Txt],
        None => vec![Kind::A, Kind::Aaaa],
    }
}

fn name<S: AsRef<str>>(labels: &[S]) -> String {
    let mut name: String = labels.iter().map(|l| format!("{}.", l.as_ref())).collect();
    name.push_str(APEX);
    name
}

fn row(asked: &[&str], data: Data<'_>) -> RecordRow {
    let target = |target: Target<'_>| name(&target.labels().collect::<Vec<_>>());
    let (kind, text) = match data {
        Data::A(address) => ("A", address.to_string()),
        Data::Aaaa(address) => ("AAAA", address.to_string()),
        Data::Srv { port, target: to } => ("SRV", format!("0 50 {port} {}", target(to))),
        Data::Txt(text) => ("TXT", format!("{text:?}")),
        Data::Soa => ("SOA", String::new()),
        Data::Ns => ("NS", String::new()),
    };
    RecordRow { name: name(asked), ttl: data.ttl(), kind, data: text }
}

/// The likely reason that there is no answer.
fn reason(observed: &Observed, labels: &[&str], asked: Option<RecordKind>, exists: bool) -> String {
    let [below @ .., service, namespace, "svc"] = labels else {
        return if exists {
            "the name exists, without such records".to_owned()
        } else {
            "no such name in the zone".to_owned()
        };
    };
    let (Ok(namespace), Ok(service)) = (Namespace::new(namespace), ServiceName::new(service)) else {
        return "no service can have this name".to_owned();
    };
    let key = ServiceKey { namespace, name: service };
    if let Known::Yes(None) = &observed.clusterset {
        return "this cluster is no member of a set yet: `tombolo join`".to_owned();
    }
    if let Some(namespaces) = observed.namespaces.get()
        && !namespaces.contains(&key.namespace)
    {
        return no_namespace(observed, &key);
    }
    let Some(import) = observed.imports.get().and_then(|imports| imports.get(&key)) else {
        return not_imported(observed, &key);
    };
    if !exists {
        return match import.kind {
            _ if !below.is_empty() => format!("{key} is imported, but has no such name below it"),
            ServiceType::Headless => format!("{key} is headless, and none of its endpoints is ready"),
            ServiceType::ClusterSetIP => format!("{key} is imported, but has no name"),
        };
    }
    let has = |family| import.families.contains(&family);
    match asked {
        Some(RecordKind::Aaaa) if !has(Family::V6) => format!("{key} is IPv4 only"),
        Some(RecordKind::A) if !has(Family::V4) => format!("{key} is IPv6 only"),
        Some(RecordKind::Txt) => "only dns-version.clusterset.local has TXT records".to_owned(),
        _ if import.kind == ServiceType::ClusterSetIP && import.ips.is_empty() => {
            format!("{key} has no ClusterSetIP yet: is an agent of this cluster running, and does it lead?")
        }
        _ => "the name exists, without such records".to_owned(),
    }
}

/// Services are taken only in namespaces that exist.
pub(super) fn no_namespace(observed: &Observed, key: &ServiceKey) -> String {
    let set = observed.clusterset.get().and_then(Option::as_ref);
    let place = set.map_or_else(|| "this cluster".to_owned(), |set| set.cluster.to_string());
    format!(
        "namespace {} does not exist in {place}, and services are taken only in namespaces that do",
        key.namespace
    )
}

/// Why nothing of this name is imported.
pub(super) fn not_imported(observed: &Observed, key: &ServiceKey) -> String {
    let declared = observed.declared_exports.get().is_some_and(|exports| exports.contains(key));
    if declared {
        let status = observed.statuses.get().and_then(|statuses| statuses.get(key));
        let told = status
            .and_then(|s| s.conditions.iter().find(|(kind, c)| kind.as_str() != "Conflict" && !c.status));
        return match told {
            Some((_, condition)) => format!("{key} is exported here, but: {}", condition.message),
            None => format!("{key} is exported here, and no agent has taken it up yet: is one running?"),
        };
    }
    let local = observed.services.get().is_some_and(|services| services.contains_key(key));
    if local {
        return format!(
            "service {key} exists here, but neither this cluster nor another exports it: `tombolo export {key}`"
        );
    }
    format!(
        "no cluster exports {key}, as far as is known here; `tombolo export {key}` in the one that has it"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_names() {
        let full = ["api", "production", "svc"].map(str::to_owned).to_vec();
        for text in ["api.production", "api.production.svc", "API.production.svc.clusterset.local."] {
            assert_eq!(labels(text).unwrap(), full, "{text}");
        }
        assert_eq!(labels("clusterset.local").unwrap(), Vec::<String>::new());
        for bad in ["api", "a..b", "api.production.svc.cluster.local", "", "x.svc", "aclusterset.local.de.x"]
        {
            assert!(labels(bad).is_err(), "{bad}");
        }
    }
}
