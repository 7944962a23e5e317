//! Single writes: each makes an object so, or tells why not.

use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::core::ApiResource;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::object::{Object, Source};
use super::table::{Entry, Name};
use super::watch::{Patience, Shared, parse, problem};
use crate::api::kind::{Kind, ObjectId};
use crate::api::{Error, Version};

/// Who writes, to the API server.
pub(super) const FIELD_MANAGER: &str = "tombolo-agent";
/// One request: less than between the end of a lead and the next one's begin.
const REQUEST: Duration = Duration::from_secs(4);
/// Attempts at one object.
const ATTEMPTS: usize = 5;

/// A part of an object that is written by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All but the status.
    Main,
    /// `status`
    Status,
}

/// Writes objects.
#[derive(Clone)]
pub(super) struct Writer {
    pub(super) client: Client,
    pub(super) shared: Arc<Shared>,
}

/// What a single attempt came to.
enum Attempt<T> {
    Done(T),
    /// Somebody wrote in between.
    Stale,
    /// What was there is gone, or that which it would lie in is not there.
    Gone(Error),
    /// Try again later: the server is busy or away.
    Later(Error),
    Failed(Error),
}

impl Writer {
    /// What was last told of an object, by the API or by a write.
    pub(super) fn entry(&self, id: &ObjectId) -> Option<Entry> {
        let name = Name::of(id);
        self.shared.with(|tables| tables.entry(Source::Kind(id.kind), &name).cloned())
    }

    /// Makes an object so by server-side apply, however it is now. `wanted` is asked before every attempt, with what is
    /// there: None if that will do. Returns what is there then.
    pub(super) async fn apply(
        &self,
        id: &ObjectId,
        part: Part,
        mut wanted: impl FnMut(Option<&Entry>) -> Result<Option<Value>, Error>,
    ) -> Result<Option<Entry>, Error> {
        let mut patience = Patience::default();
        let mut last = Error::Conflict { object: id.to_string() };
        for _ in 0..ATTEMPTS {
            let there = self.entry(id);
            let Some(mut body) = wanted(there.as_ref())? else { return Ok(None) };
            let api = self.api(id)?;
            self.address(id, there.as_ref(), &mut body)?;
            let params = PatchParams::apply(FIELD_MANAGER).force();
            let patch = Patch::Apply(&body);
            let name = id.name.as_str();
            let outcome = match part {
                Part::Main => timed(api.patch(name, &params, &patch)).await,
                Part::Status => timed(api.patch_status(name, &params, &patch)).await,
            };
            match attempt(outcome, "write", id) {
                Attempt::Done(object) => return Ok(Some(self.took(id, object))),
                Attempt::Gone(error) if there.is_none() => return Err(error),
                Attempt::Gone(_) | Attempt::Stale => self.refresh(id).await?,
                Attempt::Later(error) => {
                    last = error;
                    tokio::time::sleep(patience.wait()).await;
                }
                Attempt::Failed(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Replaces an object whole, so that nothing that others put into it stays.
    pub(super) async fn replace(&self, id: &ObjectId, part: Part, mut body: Value) -> Result<Entry, Error> {
        let api = self.api(id)?;
        self.address(id, self.entry(id).as_ref(), &mut body)?;
        let object: DynamicObject = serde_json::from_value(body)
            .map_err(|error| Error::Object { object: id.to_string(), message: error.to_string() })?;
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), dry_run: false };
        let name = id.name.as_str();
        let outcome = match part {
            Part::Main => timed(api.replace(name, &params, &object)).await,
            Part::Status => timed(api.replace_status(name, &params, &object)).await,
        };
        match attempt(outcome, "replace", id) {
            Attempt::Done(object) => Ok(self.took(id, object)),
            Attempt::Stale | Attempt::Gone(_) => {
                self.refresh(id).await?;
                Err(Error::Conflict { object: id.to_string() })
            }
            Attempt::Later(error) | Attempt::Failed(error) => Err(error),
        }
    }

    /// Removes an object of ours as it was last told; true if it was there. Somebody else's stays, also one that took the
    /// place of ours a moment ago.
    pub(super) async fn delete(&self, id: &ObjectId) -> Result<bool, Error> {
        let mut patience = Patience::default();
        let mut last = Error::Conflict { object: id.to_string() };
        for _ in 0..ATTEMPTS {
            let Some(entry) = self.entry(id).filter(|entry| is_ours(id.kind, entry)) else {
                return Ok(false);
            };
            let preconditions = Preconditions { resource_version: Some(entry.version), uid: None };
            let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
            let outcome = timed(self.api(id)?.delete(id.name.as_str(), &params)).await;
            match attempt(outcome, "delete", id) {
                Attempt::Done(_) => {
                    self.forget(id);
                    return Ok(true);
                }
                Attempt::Gone(_) => {
                    self.forget(id);
                    return Ok(false);
                }
                Attempt::Stale => self.refresh(id).await?,
                Attempt::Later(error) => {
                    last = error;
                    tokio::time::sleep(patience.wait()).await;
                }
                Attempt::Failed(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Applies an object that must be at a version (None: not there). What others put into its metadata stays.
    pub(super) async fn swap(
        &self,
        id: &ObjectId,
        mut body: Value,
        expected: Option<&Version>,
    ) -> Result<Version, Error> {
        self.address(id, None, &mut body)?;
        let object = match expected {
            None => swap(&self.client, &self.resource(id.kind)?, id, body, None).await?,
            Some(version) => {
                body["metadata"]["resourceVersion"] = json!(version.0);
                let params = PatchParams::apply(FIELD_MANAGER).force();
                let patch = Patch::Apply(&body);
                let outcome = timed(self.api(id)?.patch(id.name.as_str(), &params, &patch)).await;
                match attempt(outcome, "write", id) {
                    Attempt::Done(object) => object,
                    Attempt::Stale | Attempt::Gone(_) => {
                        return Err(Error::Conflict { object: id.to_string() });
                    }
                    Attempt::Later(error) | Attempt::Failed(error) => return Err(error),
                }
            }
        };
        Ok(Version(self.took(id, object).version))
    }

    /// Reads an object as it is now.
    pub(super) async fn get(&self, id: &ObjectId) -> Result<Option<DynamicObject>, Error> {
        get(&self.client, &self.resource(id.kind)?, id).await
    }

    /// Reads an object as it is now, into what is told.
    async fn refresh(&self, id: &ObjectId) -> Result<(), Error> {
        match self.get(id).await? {
            Some(object) => {
                self.took(id, object);
            }
            None => self.forget(id),
        }
        Ok(())
    }

    fn took(&self, id: &ObjectId, object: DynamicObject) -> Entry {
        let source = Source::Kind(id.kind);
        let (name, entry) = parse(source, object);
        let told = entry.clone();
        self.shared.with(|tables| tables.wrote(source, name, told));
        self.shared.tell();
        entry
    }

    fn forget(&self, id: &ObjectId) {
        if self.shared.with(|tables| tables.remove(Source::Kind(id.kind), &Name::of(id))) {
            self.shared.tell();
        }
    }

    /// Says in a body what it is, and which version it is made from: then nothing is written over what is not known.
    fn address(&self, id: &ObjectId, there: Option<&Entry>, body: &mut Value) -> Result<(), Error> {
        let resource = self.resource(id.kind)?;
        body["apiVersion"] = Value::String(resource.api_version);
        body["kind"] = Value::String(resource.kind);
        body["metadata"]["name"] = Value::String(id.name.as_str().to_owned());
        if let Some(namespace) = &id.namespace {
            body["metadata"]["namespace"] = json!(namespace.as_str());
        }
        if let Some(entry) = there {
            body["metadata"]["resourceVersion"] = json!(entry.version);
        }
        Ok(())
    }

    fn resource(&self, kind: Kind) -> Result<ApiResource, Error> {
        self.shared.served(Source::Kind(kind)).ok_or(Error::Ending)
    }

    fn api(&self, id: &ObjectId) -> Result<Api<DynamicObject>, Error> {
        Ok(api(&self.client, &self.resource(id.kind)?, id))
    }
}

fn api(client: &Client, resource: &ApiResource, id: &ObjectId) -> Api<DynamicObject> {
    match &id.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace.as_str(), resource),
        None => Api::all_with(client.clone(), resource),
    }
}

/// Reads an object by its own.
pub(super) async fn get(
    client: &Client,
    resource: &ApiResource,
    id: &ObjectId,
) -> Result<Option<DynamicObject>, Error> {
    let outcome = timed(api(client, resource, id).get_opt(id.name.as_str())).await;
    match attempt(outcome, "read", id) {
        Attempt::Done(object) => Ok(object),
        Attempt::Stale => Ok(None),
        Attempt::Gone(error) | Attempt::Later(error) | Attempt::Failed(error) => Err(error),
    }
}

/// Writes an object that must be at a version (None: not there), by replacing it.
pub(super) async fn swap(
    client: &Client,
    resource: &ApiResource,
    id: &ObjectId,
    mut body: Value,
    expected: Option<&str>,
) -> Result<DynamicObject, Error> {
    let api = api(client, resource, id);
    if let Some(version) = expected {
        body["metadata"]["resourceVersion"] = json!(version);
    }
    let object: DynamicObject = serde_json::from_value(body)
        .map_err(|error| Error::Object { object: id.to_string(), message: error.to_string() })?;
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), dry_run: false };
    let outcome = match expected {
        Some(_) => timed(api.replace(id.name.as_str(), &params, &object)).await,
        None => timed(api.create(&params, &object)).await,
    };
    match attempt(outcome, "write", id) {
        Attempt::Done(object) => Ok(object),
        Attempt::Stale => Err(Error::Conflict { object: id.to_string() }),
        Attempt::Gone(error) | Attempt::Later(error) | Attempt::Failed(error) => Err(error),
    }
}

pub(super) type Outcome<T> = Result<Result<T, kube::Error>, tokio::time::error::Elapsed>;

pub(super) async fn timed<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Outcome<T> {
    timeout(REQUEST, request).await
}

fn attempt<T>(outcome: Outcome<T>, action: &'static str, id: &ObjectId) -> Attempt<T> {
    let object = id.to_string();
    match outcome {
        Ok(Ok(value)) => Attempt::Done(value),
        Ok(Err(error)) => {
            let code = match &error {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            };
            let cause = problem(&error);
            match code {
                // Server-side apply tells so, with 500.
                Some(_) if cause.contains("field not declared in schema") => {
                    Attempt::Failed(Error::Undeclared { object, cause })
                }
                Some(409) => Attempt::Stale,
                Some(404) => Attempt::Gone(Error::Refused { action, object, cause, invalid: false }),
                Some(400 | 401 | 403 | 405 | 413 | 422) => {
                    Attempt::Failed(Error::Refused { action, object, cause, invalid: code == Some(422) })
                }
                Some(_) | None => Attempt::Later(Error::Api { action, object, cause }),
            }
        }
        Err(_) => {
            let cause = format!("no answer of the API server within {} s", REQUEST.as_secs());
            Attempt::Later(Error::Api { action, object, cause })
        }
    }
}

/// Whether an object may be removed. Of our own kinds all are ours, and of the others what cannot be read is nobody's
/// that is known.
fn is_ours(kind: Kind, entry: &Entry) -> bool {
    match kind {
        Kind::Service | Kind::EndpointSlice | Kind::ServiceImport => {
            entry.object.as_deref().is_some_and(Object::is_ours)
        }
        _ => true,
    }
}

/// The value of an entry, if it can be read.
pub(super) fn object(entry: Option<&Entry>) -> Option<&Object> {
    entry.and_then(|entry| entry.problem.is_none().then_some(entry.object.as_deref()).flatten())
}
