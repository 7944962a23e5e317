//! The cluster's API as a directory on one machine: `docs/directory.md`.
//!
//! `manifests/` is people's (and `tombolo export`'s), `state/` is ours.

mod assemble;
mod document;
mod export;
mod join;
mod memory;
mod object;
mod reader;
mod rotate;
mod shown;
mod store;
mod tree;
mod watch;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use serde_json::Value;
use tokio::sync::watch::Receiver;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::{Known, Objects};
use tombolo_agent_core::lease::Timing;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_proto::model::{ClusterId, NodeName, Record, RecordKey};
use tombolo_proto::trust::SigningKey;

use super::kind::{
    self, Kind, ObjectId, Problem, cluster_set, json, lease, member, multicluster, secret, slice, time,
    tunnel_node, typed,
};
use super::{Applied, ClusterApi, ClusterSet, Error, Lease, Member, Observed, Version, Versioned};
use memory::Memory;
use reader::Reader;
use store::{Store, Transaction, object_error, version};
use watch::Watching;

pub use export::Edited;
pub use rotate::Rotation;
#[cfg(test)]
pub(crate) use rotate::Step;

/// What people write.
pub const MANIFESTS: &str = "manifests";
/// What we write.
pub const STATE: &str = "state";

/// A cluster's directory. Cheap to open; the watching thread starts with the first [`ClusterApi::observe`] and
/// ends when this is dropped.
pub struct Directory {
    root: PathBuf,
    store: Arc<Store>,
    memory: Option<Memory>,
    /// See [`ClusterApi::lead_as`]; 0 before that.
    epoch: AtomicU64,
    watching: OnceLock<Result<Watching, Receiver<Arc<Observed>>>>,
}

impl Directory {
    /// Opens a directory. Nothing is made or written.
    ///
    /// # Errors
    /// [`Error::NotADirectory`] if it has no `manifests/` and `state/`.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, Error> {
        let root = root.into();
        for half in [MANIFESTS, STATE] {
            if !root.join(half).is_dir() {
                return Err(Error::NotADirectory { path: root, problem: format!("it has no {half}/") });
            }
        }
        Ok(Self::at(root))
    }

    /// Opens a directory, making what is missing of it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create(root: impl Into<PathBuf>) -> Result<Self, Error> {
        let root = root.into();
        store::make_dir(&root.join(MANIFESTS), 0o755)?;
        store::make_dir(&root.join(STATE), 0o755)?;
        Ok(Self::at(root))
    }

    fn at(root: PathBuf) -> Self {
        let store = Arc::new(Store::new(root.join(STATE)));
        Self { root, store, memory: None, epoch: AtomicU64::new(0), watching: OnceLock::new() }
    }

    /// Keeps copies of good manifests in `state_dir`, so that one that is broken keeps its last good value over
    /// restarts too. To be called before the first [`ClusterApi::observe`].
    #[must_use]
    pub fn remembering(mut self, state_dir: &Path) -> Self {
        self.memory = Some(Memory::new(state_dir.join(MANIFESTS)));
        self
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Reads all of it once, for commands such as `tombolo status`.
    pub fn read(&self) -> Observed {
        self.reader().observed()
    }

    fn reader(&self) -> Reader {
        let mut reader = Reader::new(&self.root);
        reader.scan(&BTreeSet::new());
        reader
    }

    /// Who leads.
    ///
    /// # Errors
    /// If the Lease cannot be read.
    pub fn read_lease(&self) -> Result<Option<Versioned<Lease>>, Error> {
        self.read_typed(&own(lease::id())?, |value| lease::read(&typed(value)?))
    }

    /// The set, if this cluster is a member.
    ///
    /// # Errors
    /// If the object cannot be read.
    pub fn read_clusterset(&self) -> Result<Option<Versioned<ClusterSet>>, Error> {
        self.read_typed(&own(cluster_set::id())?, |value| cluster_set::read(&typed(value)?))
    }

    /// The cluster's signing key: while it is being rotated the one that the own Member binds.
    ///
    /// # Errors
    /// If the Secret cannot be read.
    pub fn read_cluster_key(&self) -> Result<Option<SigningKey>, Error> {
        let Some(Versioned { value: keys, .. }) = self.read_typed(&own(secret::id())?, secret::read)? else {
            return Ok(None);
        };
        let Some(previous) = keys.previous else { return Ok(Some(keys.newest)) };
        let bound = match self.read_clusterset()? {
            Some(set) => {
                self.read_typed(&own(member::id(&set.value.cluster))?, |v| member::read(&typed(v)?))?
            }
            None => None,
        };
        let bound = bound.and_then(|member| member.value.1.bound_key());
        Ok(Some(if bound == Some(previous.public()) { previous } else { keys.newest }))
    }

    fn read_typed<T>(
        &self,
        id: &ObjectId,
        read: impl FnOnce(&Value) -> Result<T, Problem>,
    ) -> Result<Option<Versioned<T>>, Error> {
        let Some(value) = self.store.read(id)? else { return Ok(None) };
        let version = version(&value);
        let value = read(&value).map_err(|problem| object_error(id, &problem))?;
        Ok(Some(Versioned { value, version }))
    }

    /// Runs work that waits for disks and locks where it harms nobody.
    async fn transact(
        &self,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<(), Error> + Send + 'static,
    ) -> Result<Applied, Error> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || store.transact(body)).await.map_err(|_| Error::Ending)?
    }

    /// The same for the leader, if it still is: the Lease is read after the lock was taken. Whoever leads by
    /// then can only have waited for this lock, so that what it writes comes last.
    async fn lead(
        &self,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<(), Error> + Send + 'static,
    ) -> Result<Applied, Error> {
        let epoch = self.epoch.load(Ordering::Acquire);
        let work = move |t: &mut Transaction<'_>| {
            if epoch != 0 {
                let lease = t.get(&own(lease::id())?)?.flatten();
                let lease = lease.and_then(|value| lease::read(&typed(&value).ok()?).ok());
                if lease.is_none_or(|lease| lease.epoch != epoch) {
                    return Err(Error::NotLeading);
                }
            }
            body(t)
        };
        self.transact(work).await
    }
}

/// Makes the objects of a kind so: `set` put, `keep` left, the rest deleted.
async fn apply(
    directory: &Directory,
    kind: Kind,
    set: Vec<(ObjectId, Value)>,
    keep: BTreeSet<ObjectId>,
) -> Result<Applied, Error> {
    let work = move |t: &mut Transaction<'_>| {
        let wanted: BTreeSet<ObjectId> = set.iter().map(|(id, _)| id.clone()).collect();
        let there = t.list(kind)?;
        // What comes is written before what goes is deleted.
        for (id, value) in set {
            t.put(&id, value)?;
        }
        for id in there.keys().filter(|id| !wanted.contains(id) && !keep.contains(id)) {
            t.delete(id)?;
        }
        Ok(())
    };
    directory.lead(work).await
}

#[async_trait]
impl ClusterApi for Directory {
    fn observe(&self) -> Receiver<Arc<Observed>> {
        let start = || {
            Watching::start(self.root.clone(), self.memory.clone()).map_err(|error| {
                let finding = Finding {
                    severity: Severity::Error,
                    reason: "NoWatch",
                    object: format!("directory {}", self.root.display()),
                    message: format!("the system gives no thread to watch it ({error}); restart the agent"),
                };
                let observed = Observed { findings: vec![finding], ..Observed::default() };
                tokio::sync::watch::channel(Arc::new(observed)).1
            })
        };
        match self.watching.get_or_init(start) {
            Ok(watching) => watching.receiver(),
            Err(dead) => dead.clone(),
        }
    }

    async fn apply_imports(&self, desired: &Objects<ServiceKey, Import>) -> Result<Applied, Error> {
        let id = |key: &ServiceKey| own(ObjectId::of_service(Kind::ServiceImport, key));
        let mut set = Vec::new();
        for (key, import) in &desired.set {
            set.push((id(key)?, json(&own(multicluster::write_import(key, import))?)));
        }
        let keep = desired.keep.iter().map(id).collect::<Result<_, _>>()?;
        apply(self, Kind::ServiceImport, set, keep).await
    }

    async fn apply_slices(&self, desired: &Objects<SliceKey, Slice>) -> Result<Applied, Error> {
        let mut set = Vec::new();
        for (key, value) in &desired.set {
            set.push((own(slice::id(key))?, json(&own(slice::write(key, value))?)));
        }
        let keep = desired.keep.iter().map(|key| own(slice::id(key))).collect::<Result<_, _>>()?;
        apply(self, Kind::EndpointSlice, set, keep).await
    }

    async fn write_imports(
        &self,
        set: BTreeMap<ServiceKey, Import>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<Applied, Error> {
        let id = |key: &ServiceKey| own(ObjectId::of_service(Kind::ServiceImport, key));
        let work = move |t: &mut Transaction<'_>| {
            for (key, import) in &set {
                t.put(&id(key)?, json(&own(multicluster::write_import(key, import))?))?;
            }
            gone.iter().try_for_each(|key| t.delete(&id(key)?))
        };
        self.lead(work).await
    }

    async fn write_slices(
        &self,
        set: BTreeMap<SliceKey, Slice>,
        gone: BTreeSet<SliceKey>,
    ) -> Result<Applied, Error> {
        let work = move |t: &mut Transaction<'_>| {
            for (key, value) in &set {
                t.put(&own(slice::id(key))?, json(&own(slice::write(key, value))?))?;
            }
            gone.iter().try_for_each(|key| t.delete(&own(slice::id(key))?))
        };
        self.lead(work).await
    }

    async fn write_derived(
        &self,
        _set: BTreeMap<ServiceKey, DerivedService>,
        _gone: BTreeSet<ServiceKey>,
    ) -> Result<BTreeMap<ServiceKey, DerivedService>, Error> {
        // Nodes of a directory balance themselves, so none is ever planned.
        Ok(BTreeMap::new())
    }

    async fn apply_properties(&self, _desired: &BTreeMap<&'static str, String>) -> Result<Applied, Error> {
        // The ClusterSet says the same to whoever reads state/.
        Ok(Applied::default())
    }

    async fn apply_statuses(
        &self,
        desired: &BTreeMap<ServiceKey, ExportStatus>,
        now: u64,
    ) -> Result<Applied, Error> {
        let desired = desired.clone();
        let work = move |t: &mut Transaction<'_>| {
            for (key, status) in &desired {
                let id = own(ObjectId::of_service(Kind::ServiceExport, key))?;
                let Some(Some(known)) = t.get(&id)? else { continue };
                let was = known.get("status").and_then(|status| typed(status).ok());
                let status = multicluster::write_status(status, was.as_ref(), now);
                let mut value = known.as_ref().clone();
                if let Some(object) = value.as_object_mut() {
                    object.insert("status".to_owned(), json(&status));
                }
                t.put(&id, value)?;
            }
            Ok(())
        };
        self.lead(work).await
    }

    async fn stamp_exports(&self, now: u64) -> Result<Applied, Error> {
        let observed = match self.watching.get() {
            Some(Ok(watching)) => Arc::clone(&watching.receiver().borrow()),
            _ => Arc::new(self.read()),
        };
        let (Known::Yes(declared), Known::Yes(stamped)) = (&observed.declared_exports, &observed.statuses)
        else {
            return Ok(Applied::default());
        };
        if declared.iter().eq(stamped.keys()) {
            return Ok(Applied::default());
        }
        let declared = declared.clone();
        let work = move |t: &mut Transaction<'_>| {
            let there = t.list(Kind::ServiceExport)?;
            let mut wanted = BTreeSet::new();
            for key in &*declared {
                let id = own(ObjectId::of_service(Kind::ServiceExport, key))?;
                // A damaged one is made anew: then it is new again.
                if !matches!(there.get(&id), Some(Some(_))) {
                    let value = serde_json::json!({
                        "apiVersion": Kind::ServiceExport.api_version(),
                        "kind": Kind::ServiceExport.name(),
                        "metadata": {
                            "name": key.name.as_str(),
                            "namespace": key.namespace.as_str(),
                            "labels": { kind::MANAGED_BY_LABEL: kind::MANAGED_BY },
                            "creationTimestamp": json(&time(now)),
                        },
                        "spec": {},
                    });
                    t.put(&id, value)?;
                }
                wanted.insert(id);
            }
            for id in there.keys().filter(|id| !wanted.contains(id)) {
                t.delete(id)?;
            }
            Ok(())
        };
        self.lead(work).await
    }

    async fn write_member(
        &self,
        cluster: &ClusterId,
        member: &Member,
        nodes: &BTreeMap<RecordKey, Record>,
    ) -> Result<Applied, Error> {
        let (cluster, nodes) = (cluster.clone(), nodes.clone());
        let id = own(member::id(&cluster))?;
        let value = json(&own(member::write(&cluster, member))?);
        let member = member.clone();
        // Thousands of prefixes are encoded before the lock is taken: others wait for it.
        let (store, of, records) = (Arc::clone(&self.store), cluster.clone(), nodes.clone());
        let prepare = move || store.look(|t| Shards::prepare(t, &of, &records));
        let prepared = tokio::task::spawn_blocking(prepare).await.map_err(|_| Error::Ending)??;
        let work = move |t: &mut Transaction<'_>| {
            let known = t.get(&id)?.flatten();
            let known = known.and_then(|value| member::read(&typed(&value).ok()?).ok());
            if known.is_some_and(|(_, known)| known.is_newer_than(&member)) {
                // Joined anew, or its key rotated, since the caller looked.
                return Err(Error::Conflict { object: id.to_string() });
            }
            prepared.put(t, &cluster, &id, value, &nodes)
        };
        self.lead(work).await
    }

    async fn delete_member(&self, cluster: &ClusterId) -> Result<Applied, Error> {
        let cluster = cluster.clone();
        let work = move |t: &mut Transaction<'_>| {
            // First that which makes the cluster a member.
            t.delete(&own(member::id(&cluster))?)?;
            for id in shards(t, &cluster)?.keys() {
                t.delete(id)?;
            }
            Ok(())
        };
        self.lead(work).await
    }

    async fn write_tunnel_node(&self, node: &NodeName, value: &TunnelNode) -> Result<Applied, Error> {
        let id = own(ObjectId::cluster(Kind::TunnelNode, node.as_str()))?;
        let value = json(&own(tunnel_node::write(node, value))?);
        self.transact(move |t| t.put(&id, value)).await
    }

    async fn delete_tunnel_node(&self, node: &NodeName) -> Result<Applied, Error> {
        let id = own(ObjectId::cluster(Kind::TunnelNode, node.as_str()))?;
        self.lead(move |t| t.delete(&id)).await
    }

    async fn clusterset(&self) -> Result<Option<Versioned<ClusterSet>>, Error> {
        self.read_clusterset()
    }

    async fn write_clusterset(
        &self,
        value: &ClusterSet,
        expected: Option<&Version>,
    ) -> Result<Version, Error> {
        let (id, object) = (own(cluster_set::id())?, json(&own(cluster_set::write(value))?));
        let expected = expected.cloned();
        let new = Arc::new(OnceLock::new());
        let told = Arc::clone(&new);
        let work = move |t: &mut Transaction<'_>| {
            let version = t.swap(&id, object, expected.as_ref())?;
            let _ = told.set(version);
            Ok(())
        };
        self.lead(work).await?;
        new.get().cloned().ok_or(Error::Ending)
    }

    fn lead_as(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }

    fn timing(&self) -> Timing {
        Timing::DIRECTORY
    }

    async fn lease(&self) -> Result<Option<Versioned<Lease>>, Error> {
        self.read_lease()
    }

    async fn write_lease(&self, lease: &Lease, expected: Option<&Version>) -> Result<Version, Error> {
        let (id, object) = (own(lease::id())?, json(&own(lease::write(lease))?));
        let (store, expected) = (Arc::clone(&self.store), expected.cloned());
        let work = move || {
            let mut new = None;
            store.transact_lease(|t| {
                new = Some(t.swap(&id, object, expected.as_ref())?);
                Ok(())
            })?;
            new.ok_or(Error::Ending)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Ending)?
    }

    async fn cluster_key(&self) -> Result<Option<SigningKey>, Error> {
        self.read_cluster_key()
    }
}

/// A cluster's MemberNodes as they are to be, made from what was there.
struct Shards {
    there: BTreeMap<ObjectId, store::Found>,
    wanted: BTreeMap<ObjectId, Value>,
}

impl Shards {
    fn prepare(
        t: &Transaction<'_>,
        cluster: &ClusterId,
        nodes: &BTreeMap<RecordKey, Record>,
    ) -> Result<Self, Error> {
        let there = shards(t, cluster)?;
        let mut placed = BTreeMap::new();
        for object in there.values().flatten() {
            if let Ok((_, shard, records)) = typed(object).and_then(|object| member::read_nodes(&object)) {
                placed.extend(records.into_iter().map(|record| (record.key, shard)));
            }
        }
        let mut wanted = BTreeMap::new();
        for (shard, object) in own(member::write_nodes(cluster, nodes, &placed))? {
            wanted.insert(own(member::nodes_id(cluster, shard))?, json(&object));
        }
        Ok(Self { there, wanted })
    }

    /// Whether it was made from this.
    fn is_of(&self, there: &BTreeMap<ObjectId, store::Found>) -> bool {
        let same = |(a, b): (&store::Found, &store::Found)| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || version(a) == version(b),
            (None, None) => true,
            _ => false,
        };
        self.there.keys().eq(there.keys()) && self.there.values().zip(there.values()).all(same)
    }

    /// Writes the nodes, and then the statement that they fit.
    fn put(
        self,
        t: &mut Transaction<'_>,
        cluster: &ClusterId,
        id: &ObjectId,
        value: Value,
        nodes: &BTreeMap<RecordKey, Record>,
    ) -> Result<(), Error> {
        let there = shards(t, cluster)?;
        let Self { wanted, .. } = if self.is_of(&there) { self } else { Self::prepare(t, cluster, nodes)? };
        let gone: Vec<ObjectId> = there.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for (id, object) in wanted {
            t.put(&id, object)?;
        }
        t.put(id, value)?;
        gone.iter().try_for_each(|id| t.delete(id))
    }
}

/// Writes a cluster's nodes, and then the statement that they fit.
fn put_member(
    t: &mut Transaction<'_>,
    cluster: &ClusterId,
    id: &ObjectId,
    value: Value,
    nodes: &BTreeMap<RecordKey, Record>,
) -> Result<(), Error> {
    Shards::prepare(t, cluster, nodes)?.put(t, cluster, id, value, nodes)
}

/// What there is of a cluster's MemberNodes.
fn shards(t: &Transaction<'_>, cluster: &ClusterId) -> Result<BTreeMap<ObjectId, store::Found>, Error> {
    let mut all = t.list(Kind::MemberNodes)?;
    all.retain(|id, _| id.name.as_str().split_once('.').is_some_and(|(name, _)| name == cluster.as_str()));
    Ok(all)
}

/// An object of ours that cannot be named or built: a name too long for a file.
fn own<T>(result: Result<T, Problem>) -> Result<T, Error> {
    result
        .map_err(|problem| Error::Object { object: "object of Tombolo".to_owned(), message: problem.message })
}
