//! Manifests as older tutorials show them: each gets one clear finding that prints what to write instead.

use serde_json::Value;

use super::{Problem, shorten};

/// What to do with an object that is none of the kinds we read.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// Somebody else's; not our business.
    Ignore,
    /// Read it as a ServiceExport of the multicluster API, and say this.
    ExportWith(Problem),
    /// Do not read it, and say this.
    Refuse(Problem),
}

/// Judges an object by its `apiVersion` and `kind`.
pub fn judge(api_version: &str, kind: &str, value: &Value) -> Verdict {
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let text = |pointer: &str, default: &str| {
        let text = value.pointer(pointer).and_then(Value::as_str).unwrap_or(default);
        text.chars().filter(|c| c.is_ascii_alphanumeric() || ".-".contains(*c)).take(63).collect::<String>()
    };
    let name = text("/metadata/name", "NAME");
    let namespace = text("/metadata/namespace", "default");
    let export = format!(
        "apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata:\n  name: {name}\n  namespace: {namespace}"
    );
    match kind {
        "ServiceExport" if group == "submariner.io" || group.ends_with(".submariner.io") => {
            Verdict::ExportWith(Problem::warning(
                "OldManifest",
                format!(
                    "apiVersion {api_version} is from an old tutorial; it is accepted, but write instead:\n{export}"
                ),
            ))
        }
        "ServiceExport" => Verdict::Refuse(Problem::error(
            "OldManifest",
            format!("a ServiceExport of {:?} is not read; write instead:\n{export}", shorten(api_version)),
        )),
        "ServiceImport" => {
            let old = value.pointer("/spec/type").and_then(Value::as_str) == Some("SuperClusterIP");
            let what = if old { "type SuperClusterIP is from an old tutorial, and " } else { "" };
            Verdict::Refuse(Problem::warning(
                "ServiceImportByHand",
                format!(
                    "{what}ServiceImports are made by Tombolo, never by hand: remove this one; in the cluster that has the service write:\n{export}"
                ),
            ))
        }
        "EndpointSlice" => Verdict::Refuse(Problem::error(
            "OldManifest",
            format!(
                "an EndpointSlice of {:?} is not read; write apiVersion: discovery.k8s.io/v1",
                shorten(api_version)
            ),
        )),
        "Endpoints" if api_version == "v1" => Verdict::Refuse(Problem::error(
            "OldManifest",
            format!(
                "Endpoints are not read; write an EndpointSlice (discovery.k8s.io/v1) with the label kubernetes.io/service-name: {name}"
            ),
        )),
        _ if group == "tombolo.dev" => Verdict::Refuse(Problem::warning(
            "OwnObjectInManifests",
            format!("{} is written by Tombolo itself and not read from here; remove it", shorten(kind)),
        )),
        _ => Verdict::Ignore,
    }
}
