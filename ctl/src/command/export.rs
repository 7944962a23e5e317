//! `export` and `unexport`: a ServiceExport in the directory's manifests.

use anyhow::{Result, bail};
use serde::Serialize;
use tombolo_agent::api::Observed;
use tombolo_agent::api::directory::{Directory, Edited};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::LocalKind;
use tombolo_proto::wire::decode_grant;

use super::say;
use crate::cli::Export;
use crate::output::Printer;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    namespace: String,
    service: String,
    exported: bool,
    changed: bool,
    files: Vec<String>,
    /// Under which other clusters will find it.
    name: String,
    warnings: Vec<String>,
}

pub(super) fn export(printer: &Printer, args: &Export) -> Result<()> {
    let key = &args.service;
    if key.namespace.is_reserved() {
        bail!("namespace {} is the cluster's own: nothing in it is ever exported", key.namespace);
    }
    let directory = Directory::open(&args.cluster.cluster_dir)?;
    let warnings = doubts(&directory.read(), args);
    let edited = directory.export(key)?;
    outcome(printer, args, true, &edited, warnings)
}

pub(super) fn unexport(printer: &Printer, args: &Export) -> Result<()> {
    let directory = Directory::open(&args.cluster.cluster_dir)?;
    let edited = directory.unexport(&args.service)?;
    outcome(printer, args, false, &edited, Vec::new())
}

fn outcome(
    printer: &Printer,
    args: &Export,
    exported: bool,
    edited: &Edited,
    warnings: Vec<String>,
) -> Result<()> {
    let key = &args.service;
    let (changed, files) = match edited {
        Edited::Changed(file) => (true, vec![file.display().to_string()]),
        Edited::Already(files) => (false, files.iter().map(|f| f.display().to_string()).collect()),
    };
    for warning in &warnings {
        say(format!("warning: {warning}"));
    }
    let outcome = Outcome {
        namespace: key.namespace.to_string(),
        service: key.name.to_string(),
        exported,
        changed,
        files,
        name: format!("{}.{}.svc.clusterset.local", key.name, key.namespace),
        warnings,
    };
    printer.print("Export", &outcome, |_| {
        let files = outcome.files.join(", ");
        match (exported, changed) {
            (true, true) => format!("Exported {key} (in {files}): {} in the other clusters.\n", outcome.name),
            (true, false) => format!("{key} is exported already (in {files}); nothing was changed.\n"),
            (false, true) => format!("Took the export of {key} back (in {files}).\n"),
            (false, false) => format!("{key} is not exported; nothing was changed.\n"),
        }
    })
}

/// Why the export might not do what is meant; it is written all the same, since order does not matter.
fn doubts(observed: &Observed, args: &Export) -> Vec<String> {
    let key = &args.service;
    let mut doubts = Vec::new();
    match observed.services.get().map(|services| services.get(key)) {
        Some(None) => {
            doubts.push(format!("there is no service {key} here yet; it is exported when there is"))
        }
        Some(Some(service)) => match service.kind {
            LocalKind::ExternalName => {
                doubts.push(format!("service {key} is of type ExternalName, which cannot be exported"));
            }
            LocalKind::Derived => {
                doubts.push(format!(
                    "service {key} was imported from other clusters, and is not exported again"
                ));
            }
            LocalKind::ClusterIP | LocalKind::Headless => {}
        },
        None => {
            doubts.push(format!("the services here cannot be read, so whether {key} exists is not known"))
        }
    }
    match &observed.clusterset {
        Known::Yes(None) => doubts.push("this cluster is no member of a set yet: `tombolo join`".to_owned()),
        Known::Yes(Some(set)) => {
            let own = observed.members.get().and_then(|members| members.get(&set.cluster));
            if let Some(grant) = own.and_then(|own| decode_grant(&own.grant.payload).ok())
                && !grant.may_export(&key.namespace)
            {
                doubts.push(format!(
                    "the administrator did not grant this cluster namespace {}: others will not take it",
                    key.namespace
                ));
            }
        }
        Known::No => {}
    }
    doubts
}
