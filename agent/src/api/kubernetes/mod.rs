//! The cluster's API as Kubernetes serves it: `docs/kubernetes.md`.
//!
//! Watches tell what there is ([`table`]); whatever becomes of a watch, what was told last stays. Writers use
//! server-side apply, at the version of the object that was told last, and write nothing that is there already.

mod access;
mod event;
mod fence;
mod object;
mod property;
mod service;
mod table;
mod watch;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::watch::Receiver;
use tombolo_agent_core::known::Objects;
use tombolo_agent_core::lease::Timing;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_agent_core::standing::Standing;
use tombolo_proto::model::{ClusterId, NodeName, Record, RecordKey};
use tombolo_proto::trust::SigningKey;
use tracing::warn;

use super::kind::{
    Kind, ObjectId, Problem, cluster_set, json as to_json, member, multicluster, secret, slice, tunnel_node,
    typed,
};
use super::{Applied, ClusterApi, ClusterSet, Error, Lease, Member, Observed, Version, Versioned};
use event::Events;
use fence::Fence;
use object::{Object, Source};
use table::{Entry, Tables};
use watch::{Shared, Watching};
use write::{Part, Writer, object};

pub use access::Access;
pub use object::Scope;

/// Objects that are written at a time.
const WRITES: usize = 16;

/// A cluster's API server. Watches from its making to its end.
pub struct Kubernetes {
    writer: Writer,
    fence: Fence,
    events: Events,
    watching: Watching,
}

impl Kubernetes {
    /// Begins to watch. The API server need not be there yet.
    ///
    /// # Errors
    /// If it is not told where it is, or who we are.
    pub async fn connect(access: &Access, scope: &Scope) -> Result<Self, Error> {
        let config = access.config().await?;
        let client = client(config.clone())?;
        let shared = Arc::new(Shared::new(Tables::new(scope.sources())));
        let watching = Watching::start(&client, &shared, scope);
        let fence = Fence::new(client.clone(), config);
        let events = Events::new(client.clone(), scope.node.to_string());
        Ok(Self { writer: Writer { client, shared }, fence, events, watching })
    }

    /// Does one thing to many objects, some at a time, while it is known that this process leads. All are tried then; the
    /// first error is told.
    async fn each<T, O, F>(&self, items: Vec<T>, write: impl Fn(T) -> F) -> Result<Vec<O>, Error>
    where
        F: Future<Output = Result<O, Error>>,
    {
        let one = |item: T| {
            let work = write(item);
            async {
                match self.fence.check().await {
                    Ok(()) => Ok(work.await),
                    Err(error) => Err(error),
                }
            }
        };
        let mut results = Vec::with_capacity(items.len());
        let mut first = None;
        let mut work = stream::iter(items).map(one).buffer_unordered(WRITES);
        while let Some(result) = work.next().await {
            match result? {
                Ok(done) => results.push(done),
                Err(error) => {
                    first.get_or_insert(error);
                }
            }
        }
        first.map_or(Ok(results), Err)
    }

    async fn delete_all(&self, ids: Vec<ObjectId>) -> Result<Applied, Error> {
        let deleted = self.each(ids, |id| async move { self.writer.delete(&id).await }).await?;
        Ok(Applied { written: 0, deleted: deleted.into_iter().filter(|deleted| *deleted).count() })
    }

    /// Names of our objects of a kind that `pick` picks.
    fn ours(
        &self,
        kind: Kind,
        pick: impl Fn(&Object) -> Option<Result<ObjectId, Problem>>,
    ) -> Result<Vec<ObjectId>, Error> {
        self.writer.shared.with(|tables| {
            let entries = tables.all(Source::Kind(kind)).into_iter().flat_map(BTreeMap::values);
            entries.filter_map(|entry| pick(entry.object.as_deref()?)).map(own).collect()
        })
    }

    async fn write_import(&self, key: ServiceKey, import: Import) -> Result<bool, Error> {
        let id = own(ObjectId::of_service(Kind::ServiceImport, &key))?;
        let body = main_part(to_json(&own(multicluster::write_import(&key, &import))?));
        let main = |value: &Import| Import { clusters: BTreeSet::new(), ..value.clone() };
        let is_main = |entry: Option<&Entry>| {
            let there = object(entry);
            matches!(there, Some(Object::Import { value, ours: true, .. }) if main(value) == main(&import))
        };
        let wanted = |there: Option<&Entry>| Ok((!is_main(there)).then(|| body.clone()));
        let applied = self.writer.apply(&id, Part::Main, wanted).await?;
        let mut written = applied.is_some();
        if let Some(entry) = &applied
            && !is_main(Some(entry))
        {
            // Something of somebody else's is in it, which server-side apply leaves.
            self.writer.replace(&id, Part::Main, body.clone()).await?;
        }
        let status = |there: Option<&Entry>| {
            let was = match object(there) {
                Some(Object::Import { status, .. }) => status.clone(),
                _ => None,
            };
            let generation = there.and_then(|entry| entry.generation);
            let condition = multicluster::import_condition(&import, was.as_ref(), generation, unix());
            let cluster = |c: &ClusterId| multicluster::ClusterStatus { cluster: c.to_string() };
            let clusters = import.clusters.iter().map(cluster).collect();
            let older = self.writer.shared.older_imports.load(Ordering::Relaxed);
            let new = multicluster::ServiceImportStatus {
                clusters,
                conditions: vec![condition],
                endpoint_slice_objects: (!older).then(|| multicluster::SLICES_PRESENT.to_owned()),
            };
            (was.as_ref() != Some(&new)).then_some(new)
        };
        let wanted = |there: Option<&Entry>| {
            // Gone again already: the next plan says whether it is made anew.
            Ok(there.and_then(|_| status(there)).map(|new| json!({ "metadata": {}, "status": new })))
        };
        let applied = match self.writer.apply(&id, Part::Status, wanted).await {
            Err(Error::Undeclared { .. }) => {
                self.writer.shared.older_imports.store(true, Ordering::Relaxed);
                self.writer.apply(&id, Part::Status, wanted).await?
            }
            other => other?,
        };
        written |= applied.is_some();
        let there = self.writer.entry(&id);
        if let (true, Some(new)) = (is_main(there.as_ref()), status(there.as_ref())) {
            // Clusters and conditions that somebody else put there.
            let mut whole = body.clone();
            whole["status"] = to_json(&new);
            self.writer.replace(&id, Part::Status, whole).await?;
        }
        Ok(written)
    }

    async fn write_slice(&self, key: SliceKey, value: Slice) -> Result<bool, Error> {
        let id = own(slice::id(&key))?;
        let body = to_json(&own(slice::write(&key, &value))?);
        let is = |there: Option<&Entry>| matches!(object(there), Some(Object::Slice(_, there)) if **there == value);
        let wanted = |there: Option<&Entry>| Ok((!is(there)).then(|| body.clone()));
        let applied = self.writer.apply(&id, Part::Main, wanted).await?;
        if let Some(entry) = &applied
            && !is(Some(entry))
        {
            self.writer.replace(&id, Part::Main, body.clone()).await?;
        }
        Ok(applied.is_some())
    }

    async fn write_status(&self, key: ServiceKey, status: ExportStatus, now: u64) -> Result<bool, Error> {
        let id = own(ObjectId::of_service(Kind::ServiceExport, &key))?;
        let mut before = Vec::new();
        let mut after = Vec::new();
        let wanted = |there: Option<&Entry>| {
            let Some(Object::Export(_, _, known, was)) = object(there) else { return Ok(None) };
            // What is not judged now stays as it was.
            let mut whole = ExportStatus::clone(known);
            whole.conditions.extend(status.conditions.clone());
            let generation = there.and_then(|entry| entry.generation);
            let mut value = multicluster::write_status(&whole, was.as_ref(), now);
            value.conditions.iter_mut().for_each(|condition| condition.observed_generation = generation);
            before = was.as_ref().map(|was| was.conditions.clone()).unwrap_or_default();
            after.clone_from(&value.conditions);
            Ok((was.as_ref() != Some(&value)).then(|| json!({ "metadata": {}, "status": value })))
        };
        let Some(entry) = self.writer.apply(&id, Part::Status, wanted).await? else { return Ok(false) };
        self.tell(&id, &entry, &before, &after).await;
        Ok(true)
    }

    /// Tells what changed on an object.
    async fn tell(&self, id: &ObjectId, there: &Entry, before: &[Condition], after: &[Condition]) {
        if let Some(resource) = self.writer.shared.served(Source::Kind(id.kind)) {
            self.events.tell(id, &resource, there, before, after).await;
        }
    }

    /// Writes an object of ours that no one else writes, if it is not so.
    async fn write_own(
        &self,
        id: ObjectId,
        body: Value,
        is: impl Fn(&Object) -> bool,
    ) -> Result<bool, Error> {
        let wanted = |there: Option<&Entry>| {
            let same = object(there).is_some_and(&is);
            Ok((!same).then(|| body.clone()))
        };
        Ok(self.writer.apply(&id, Part::Main, wanted).await?.is_some())
    }

    /// What there is of a cluster's MemberNodes: where each record lies, and the shards.
    fn shards(&self, cluster: &ClusterId) -> (BTreeMap<RecordKey, u32>, BTreeSet<u32>) {
        self.writer.shared.with(|tables| {
            let (mut placed, mut shards) = (BTreeMap::new(), BTreeSet::new());
            for entry in tables.all(Source::Kind(Kind::MemberNodes)).into_iter().flat_map(BTreeMap::values) {
                if let Some(Object::MemberNodes(of, shard, records)) = entry.object.as_deref()
                    && of == cluster
                {
                    shards.insert(*shard);
                    placed.extend(records.iter().map(|record| (record.key.clone(), *shard)));
                }
            }
            (placed, shards)
        })
    }

    async fn read<T>(
        &self,
        id: &ObjectId,
        read: impl FnOnce(&Value) -> Result<T, Problem>,
    ) -> Result<Option<Versioned<T>>, Error> {
        let Some(object) = self.writer.get(id).await? else { return Ok(None) };
        let version = Version(object.metadata.resource_version.clone().unwrap_or_default());
        let value = read(&to_json(&object))
            .map_err(|problem| Error::Object { object: id.to_string(), message: problem.message })?;
        Ok(Some(Versioned { value, version }))
    }
}

#[async_trait]
impl ClusterApi for Kubernetes {
    fn observe(&self) -> Receiver<Arc<Observed>> {
        self.watching.receiver()
    }

    async fn apply_imports(&self, desired: &Objects<ServiceKey, Import>) -> Result<Applied, Error> {
        let stays = |key: &ServiceKey| desired.set.contains_key(key) || desired.keep.contains(key);
        let gone = self.ours(Kind::ServiceImport, |object| match object {
            Object::Import { key, ours: true, .. } if !stays(key) => {
                Some(ObjectId::of_service(Kind::ServiceImport, key))
            }
            _ => None,
        })?;
        let services = self.ours(Kind::Service, |object| match object {
            Object::Derived { of, .. } if !stays(of) => Some(super::kind::derived::id(of)),
            _ => None,
        })?;
        let applied = self.write_imports(desired.set.clone(), BTreeSet::new()).await?;
        let imports = self.delete_all(gone).await?;
        let services = self.delete_all(services).await?;
        Ok(Applied { written: applied.written, deleted: imports.deleted + services.deleted })
    }

    async fn apply_slices(&self, desired: &Objects<SliceKey, Slice>) -> Result<Applied, Error> {
        let stays = |key: &SliceKey| desired.set.contains_key(key) || desired.keep.contains(key);
        let gone = self.ours(Kind::EndpointSlice, |object| match object {
            Object::Slice(key, _) if !stays(key) => Some(slice::id(key)),
            _ => None,
        })?;
        let applied = self.write_slices(desired.set.clone(), BTreeSet::new()).await?;
        let deleted = self.delete_all(gone).await?.deleted;
        Ok(Applied { written: applied.written, deleted })
    }

    async fn write_imports(
        &self,
        set: BTreeMap<ServiceKey, Import>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<Applied, Error> {
        let write = |(key, import)| self.write_import(key, import);
        let written = count(self.each(set.into_iter().collect(), write).await?);
        // Somebody else's stays.
        let ours = |id: &ObjectId| {
            matches!(object(self.writer.entry(id).as_ref()), Some(Object::Import { ours: true, .. }))
        };
        let ids = gone.iter().map(|key| own(ObjectId::of_service(Kind::ServiceImport, key)));
        let ids: Vec<ObjectId> = ids.collect::<Result<_, _>>()?;
        let deleted = self.delete_all(ids.into_iter().filter(ours).collect()).await?.deleted;
        Ok(Applied { written, deleted })
    }

    async fn write_slices(
        &self,
        set: BTreeMap<SliceKey, Slice>,
        gone: BTreeSet<SliceKey>,
    ) -> Result<Applied, Error> {
        let write = |(key, value)| self.write_slice(key, value);
        let written = count(self.each(set.into_iter().collect(), write).await?);
        let ids = gone.iter().map(|key| own(slice::id(key))).collect::<Result<_, _>>()?;
        let deleted = self.delete_all(ids).await?.deleted;
        Ok(Applied { written, deleted })
    }

    async fn write_derived(
        &self,
        set: BTreeMap<ServiceKey, DerivedService>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<BTreeMap<ServiceKey, DerivedService>, Error> {
        let write = |(key, value): (ServiceKey, DerivedService)| async move {
            let there = service::make(&self.writer, &key, &value).await?;
            Ok((key, there))
        };
        let made = self.each(set.into_iter().collect(), write).await?;
        let ids = gone.iter().map(|key| own(super::kind::derived::id(key))).collect::<Result<_, _>>()?;
        self.delete_all(ids).await?;
        Ok(made.into_iter().collect())
    }

    async fn apply_statuses(
        &self,
        desired: &BTreeMap<ServiceKey, ExportStatus>,
        now: u64,
    ) -> Result<Applied, Error> {
        let items = desired.iter().map(|(key, status)| (key.clone(), status.clone())).collect();
        let write = |(key, status)| self.write_status(key, status, now);
        Ok(Applied { written: count(self.each(items, write).await?), deleted: 0 })
    }

    async fn apply_properties(&self, desired: &BTreeMap<&'static str, String>) -> Result<Applied, Error> {
        property::apply(&self.writer, &self.fence, desired).await
    }

    async fn stamp_exports(&self, _now: u64) -> Result<Applied, Error> {
        // Kubernetes does.
        Ok(Applied::default())
    }

    async fn write_member(
        &self,
        cluster: &ClusterId,
        member: &Member,
        nodes: &BTreeMap<RecordKey, Record>,
    ) -> Result<Applied, Error> {
        let (placed, there) = self.shards(cluster);
        let shards = own(member::write_nodes(cluster, nodes, &placed))?;
        let gone: Vec<u32> = there.into_iter().filter(|shard| !shards.contains_key(shard)).collect();
        let mut items = Vec::new();
        for (shard, object) in shards {
            let (_, _, records) = own(member::read_nodes(&object))?;
            items.push((own(member::nodes_id(cluster, shard))?, to_json(&object), records));
        }
        // The nodes first, and then the statement that they fit.
        let write = |(id, body, records): (ObjectId, Value, Vec<Record>)| {
            let is =
                move |there: &Object| matches!(there, Object::MemberNodes(_, _, there) if *there == records);
            self.write_own(id, body, is)
        };
        let mut written = count(self.each(items, write).await?);
        self.fence.check().await?;
        let id = own(member::id(cluster))?;
        let body = to_json(&own(member::write(cluster, member))?);
        let wanted = |there: Option<&Entry>| {
            let Some(Object::Member(_, known, _)) = object(there) else { return Ok(Some(body.clone())) };
            if known.is_newer_than(member) {
                // Joined anew, or its key rotated, since the caller looked.
                return Err(Error::Conflict { object: id.to_string() });
            }
            Ok((known != member).then(|| body.clone()))
        };
        written += usize::from(self.writer.apply(&id, Part::Main, wanted).await?.is_some());
        let ids = gone.into_iter().map(|shard| own(member::nodes_id(cluster, shard)));
        let deleted = self.delete_all(ids.collect::<Result<_, _>>()?).await?.deleted;
        Ok(Applied { written, deleted })
    }

    async fn write_standing(
        &self,
        cluster: &ClusterId,
        standing: &Standing,
        now: u64,
    ) -> Result<Applied, Error> {
        let id = own(member::id(cluster))?;
        let mut before = Vec::new();
        let mut after = Vec::new();
        let wanted = |there: Option<&Entry>| {
            let Some(Object::Member(_, _, was)) = object(there) else { return Ok(None) };
            let generation = there.and_then(|entry| entry.generation);
            let value = member::write_status(standing, was.as_ref(), generation, now);
            before = was.as_ref().map(|was| was.conditions.clone()).unwrap_or_default();
            after.clone_from(&value.conditions);
            let is = says_the_same(Some(&*before), &after);
            Ok((!is).then(|| json!({ "metadata": {}, "status": value })))
        };
        self.fence.check().await?;
        let Some(entry) = self.writer.apply(&id, Part::Status, wanted).await? else {
            return Ok(Applied::default());
        };
        self.tell(&id, &entry, &before, &after).await;
        Ok(Applied { written: 1, deleted: 0 })
    }

    async fn delete_member(&self, cluster: &ClusterId) -> Result<Applied, Error> {
        // First that which makes the cluster a member.
        let member = self.delete_all(vec![own(member::id(cluster))?]).await?;
        let (_, shards) = self.shards(cluster);
        let ids = shards.into_iter().map(|shard| own(member::nodes_id(cluster, shard)));
        let nodes = self.delete_all(ids.collect::<Result<_, _>>()?).await?;
        Ok(Applied { written: 0, deleted: member.deleted + nodes.deleted })
    }

    async fn write_tunnel_node(&self, node: &NodeName, value: &TunnelNode) -> Result<Applied, Error> {
        let id = own(ObjectId::cluster(Kind::TunnelNode, node.as_str()))?;
        let body = to_json(&own(tunnel_node::write(node, value))?);
        let is = |there: &Object| matches!(there, Object::TunnelNode(_, there, _) if there == value);
        let mut written = usize::from(self.write_own(id.clone(), body, is).await?);
        let wanted = |there: Option<&Entry>| {
            let Some(Object::TunnelNode(_, _, was)) = object(there) else { return Ok(None) };
            let generation = there.and_then(|entry| entry.generation);
            let status = tunnel_node::write_status(value, was.as_ref(), generation, unix());
            Ok((!says_the_same(was.as_ref().map(|was| &*was.conditions), &status.conditions))
                .then(|| json!({ "metadata": {}, "status": status })))
        };
        match self.writer.apply(&id, Part::Status, wanted).await {
            Ok(entry) => written += usize::from(entry.is_some()),
            // Manifests that are older than this agent. It is for people alone.
            Err(error @ (Error::Refused { .. } | Error::Conflict { .. })) => {
                warn!(
                    "the status of {id} is not written; are the manifests in deploy/ of this version? {error}"
                );
            }
            Err(error) => return Err(error),
        }
        Ok(Applied { written, deleted: 0 })
    }

    async fn delete_tunnel_node(&self, node: &NodeName) -> Result<Applied, Error> {
        self.delete_all(vec![own(ObjectId::cluster(Kind::TunnelNode, node.as_str()))?]).await
    }

    async fn clusterset(&self) -> Result<Option<Versioned<ClusterSet>>, Error> {
        let read = |value: &Value| cluster_set::read(&typed(value)?);
        self.read(&own(cluster_set::id())?, read).await
    }

    async fn write_clusterset(
        &self,
        value: &ClusterSet,
        expected: Option<&Version>,
    ) -> Result<Version, Error> {
        self.fence.check().await?;
        let id = own(cluster_set::id())?;
        let body = to_json(&own(cluster_set::write(value))?);
        self.writer.swap(&id, body, expected).await
    }

    fn lead_as(&self, epoch: u64) {
        self.fence.lead_as(epoch);
    }

    fn timing(&self) -> Timing {
        Timing::KUBERNETES
    }

    async fn lease(&self) -> Result<Option<Versioned<Lease>>, Error> {
        self.fence.lease().await
    }

    async fn write_lease(&self, lease: &Lease, expected: Option<&Version>) -> Result<Version, Error> {
        self.fence.write_lease(lease, expected).await
    }

    async fn cluster_key(&self) -> Result<Option<SigningKey>, Error> {
        let Some(Versioned { value: keys, .. }) = self.read(&own(secret::id())?, secret::read).await? else {
            return Ok(None);
        };
        let Some(previous) = keys.previous else { return Ok(Some(keys.newest)) };
        let bound = match self.clusterset().await? {
            Some(set) => {
                let id = own(member::id(&set.value.cluster))?;
                self.read(&id, |value| member::read(&typed(value)?)).await?
            }
            None => None,
        };
        let bound = bound.and_then(|member| member.value.1.bound_key());
        Ok(Some(if bound == Some(previous.public()) { previous } else { keys.newest }))
    }
}

/// A client of its own.
fn client(config: kube::Config) -> Result<Client, Error> {
    let from = config.cluster_url.to_string();
    Client::try_from(config).map_err(|error| Error::Access { from, cause: watch::problem(&error) })
}

/// All but what is written by itself.
fn main_part(mut body: Value) -> Value {
    if let Some(object) = body.as_object_mut() {
        object.remove("status");
    }
    body
}

/// Whether conditions are as they were, but for the generation: it grows with every word, and that alone is no news.
fn says_the_same(was: Option<&[Condition]>, now: &[Condition]) -> bool {
    let same = |(a, b): (&Condition, &Condition)| {
        (&a.type_, &a.status, &a.reason, &a.message) == (&b.type_, &b.status, &b.reason, &b.message)
    };
    was.is_some_and(|was| was.len() == now.len() && was.iter().zip(now).all(same))
}

fn count(written: Vec<bool>) -> usize {
    written.into_iter().filter(|written| *written).count()
}

fn unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// An object of ours that cannot be named or built.
fn own<T>(result: Result<T, Problem>) -> Result<T, Error> {
    result
        .map_err(|problem| Error::Object { object: "object of Tombolo".to_owned(), message: problem.message })
}
