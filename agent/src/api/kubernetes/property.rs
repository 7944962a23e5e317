//! about.k8s.io ClusterProperties of this cluster (KEP-2149; mcs 44 to 47).

use std::collections::BTreeMap;

use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use serde_json::json;
use tracing::warn;

use super::fence::Fence;
use super::object::{Object, Source};
use super::watch::problem;
use super::write::{FIELD_MANAGER, Outcome, Writer, timed};
use crate::api::kind::{MANAGED_BY, MANAGED_BY_LABEL};
use crate::api::{Applied, Error};

/// Makes ours so: those named have these values, others of ours go. A property that somebody else has set stays.
pub(super) async fn apply(
    writer: &Writer,
    fence: &Fence,
    desired: &BTreeMap<&'static str, String>,
) -> Result<Applied, Error> {
    let there: Option<BTreeMap<String, (String, bool)>> = writer.shared.with(|tables| {
        let entries = tables.all(Source::ClusterProperty)?.values();
        let property = |object: &Object| match object {
            Object::Property(name, value, ours) => Some((name.clone(), (value.clone(), *ours))),
            _ => None,
        };
        Some(entries.filter_map(|entry| property(entry.object.as_deref()?)).collect())
    });
    let (Some(there), Some(resource)) = (there, writer.shared.listed(Source::ClusterProperty)) else {
        // The cluster has no such kind (yet).
        return Ok(Applied::default());
    };
    let api: Api<DynamicObject> = Api::all_with(writer.client.clone(), &resource);
    let mut applied = Applied::default();
    for (&name, value) in desired {
        match there.get(name) {
            Some((held, _)) if held == value => continue,
            Some((held, false)) => {
                warn!(name, held, "this ClusterProperty is somebody else's, and left as it is");
                continue;
            }
            _ => {}
        }
        fence.check().await?;
        let body = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": { "name": name, "labels": { MANAGED_BY_LABEL: MANAGED_BY } },
            "spec": { "value": value },
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        done("write", name, timed(api.patch(name, &params, &Patch::Apply(&body))).await)?;
        applied.written += 1;
    }
    let gone = |(name, (_, ours)): &(&String, &(String, bool))| *ours && !desired.contains_key(name.as_str());
    for (name, _) in there.iter().filter(gone) {
        fence.check().await?;
        done("delete", name, timed(api.delete(name, &DeleteParams::default())).await)?;
        applied.deleted += 1;
    }
    Ok(applied)
}

fn done<T>(action: &'static str, name: &str, outcome: Outcome<T>) -> Result<(), Error> {
    let object = format!("ClusterProperty {name}");
    match outcome {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Error::Api { action, object, cause: problem(&error) }),
        Err(_) => Err(Error::Api { action, object, cause: "no answer of the API server".to_owned() }),
    }
}
