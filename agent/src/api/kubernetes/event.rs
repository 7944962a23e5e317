//! Events (events.k8s.io/v1): what changed, as `kubectl describe` shows it beside the object.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Client;
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::ApiResource;
use serde_json::json;
use tombolo_agent_core::bucket::Bucket;
use tracing::debug;

use super::table::Entry;
use super::unix;
use super::watch::problem;
use super::write::timed;
use crate::api::kind::{ObjectId, json as to_json, time};

/// So many at once, and then one so often: whoever makes many exports fail does not fill the API server.
const BURST: u32 = 100;
const EVERY: Duration = Duration::from_secs(2);
/// Bytes of a note that the API takes.
const NOTE: usize = 1024;
/// Events about objects outside of any namespace lie there.
const NAMESPACE: &str = "default";
const CONTROLLER: &str = "tombolo.dev/agent";

/// Tells what changed. What cannot be told is not told: the conditions say how it is.
pub(super) struct Events {
    client: Client,
    instance: String,
    start: Instant,
    bucket: Mutex<Bucket>,
}

impl Events {
    pub(super) fn new(client: Client, instance: String) -> Self {
        Self { client, instance, start: Instant::now(), bucket: Mutex::new(Bucket::new(BURST, EVERY)) }
    }

    /// Tells every transition between two lists of an object's conditions. `there`: the object as it was written.
    pub(super) async fn tell(
        &self,
        id: &ObjectId,
        resource: &ApiResource,
        there: &Entry,
        was: &[Condition],
        now: &[Condition],
    ) {
        for condition in transitions(was, now) {
            let let_through = {
                let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.take(self.start.elapsed()).is_some()
            };
            if let_through {
                self.post(id, resource, there, condition).await;
            }
        }
    }

    async fn post(&self, id: &ObjectId, resource: &ApiResource, there: &Entry, condition: &Condition) {
        let namespace = id.namespace.as_ref().map_or(NAMESPACE, |namespace| namespace.as_str());
        let event = ApiResource {
            group: "events.k8s.io".to_owned(),
            version: "v1".to_owned(),
            api_version: "events.k8s.io/v1".to_owned(),
            kind: "Event".to_owned(),
            plural: "events".to_owned(),
        };
        let mut note = condition.message.clone();
        note.truncate(note.floor_char_boundary(NOTE));
        // The API wants fractions of a second.
        let at = to_json(&time(unix())).as_str().unwrap_or_default().replace('Z', ".000000Z");
        let body = json!({
            "apiVersion": event.api_version,
            "kind": event.kind,
            "metadata": { "generateName": format!("{}-", id.name.as_str()), "namespace": namespace },
            "eventTime": at,
            "reportingController": CONTROLLER,
            "reportingInstance": self.instance,
            "action": condition.type_,
            "reason": condition.reason,
            "type": if is_good(condition) { "Normal" } else { "Warning" },
            "note": note,
            "regarding": {
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "namespace": id.namespace.as_ref().map(|namespace| namespace.as_str()),
                "name": id.name.as_str(),
                "uid": there.uid,
            },
        });
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &event);
        let object = serde_json::from_value(body).ok();
        let Some(object) = object else { return };
        match timed(api.create(&PostParams::default(), &object)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => debug!(object = %id, "an Event is not told: {}", problem(&error)),
            Err(_) => debug!(object = %id, "an Event is not told: no answer of the API server"),
        }
    }
}

/// Whether all is well by a condition.
fn is_good(condition: &Condition) -> bool {
    let bad_if = if condition.type_ == "Conflict" { "True" } else { "False" };
    condition.status != bad_if
}

/// Conditions whose status or reason is another than it was. One that is new and good is none, but for the first word on
/// an export.
fn transitions<'a>(was: &[Condition], now: &'a [Condition]) -> Vec<&'a Condition> {
    let changed = |condition: &&Condition| match was.iter().find(|old| old.type_ == condition.type_) {
        Some(old) => (&old.status, &old.reason) != (&condition.status, &condition.reason),
        None => !is_good(condition) || condition.type_ == "Valid",
    };
    now.iter().filter(changed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(type_: &str, status: &str, reason: &str) -> Condition {
        Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: String::new(),
            last_transition_time: time(0),
            observed_generation: None,
        }
    }

    #[test]
    fn what_is_told_is_what_changed() {
        let valid = condition("Valid", "True", "Valid");
        let calm = [
            valid.clone(),
            condition("Ready", "True", "Ready"),
            condition("Conflict", "False", "NoConflicts"),
        ];
        let told = |was: &[Condition], now: &[Condition]| {
            let all = transitions(was, now).into_iter().map(|c| (c.reason.clone(), is_good(c)));
            all.collect::<Vec<_>>()
        };
        assert_eq!(told(&[], &calm), [("Valid".to_owned(), true)]);
        assert_eq!(told(&calm, &calm), []);
        let torn = [valid, condition("Conflict", "True", "PortConflict")];
        assert_eq!(told(&calm, &torn), [("PortConflict".to_owned(), false)]);
        assert_eq!(told(&torn, &calm), [("NoConflicts".to_owned(), true)]);
        assert_eq!(told(&[], &torn[1..]), [("PortConflict".to_owned(), false)]);
        let other = [condition("Conflict", "True", "TypeConflict")];
        assert_eq!(told(&torn, &other), [("TypeConflict".to_owned(), false)]);
    }
}
