//! The cluster's API: what people and we ourselves write down about a cluster.
//!
//! [`ClusterApi`] is what the rest of the agent sees. It has two forms: [`kubernetes::Kubernetes`], and a
//! [`directory::Directory`] on one machine. Objects are Kubernetes' own in both forms ([`kind`]); they are parsed here, at the edge, into the
//! words of `tombolo-agent-core`.

pub mod cache;
pub mod directory;
pub mod kind;
pub mod kubernetes;
mod observed;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;
use tombolo_agent_core::known::Objects;
use tombolo_agent_core::lease::Timing;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey, TunnelNode,
};
use tombolo_agent_core::standing::Standing;
use tombolo_proto::model::{ClusterId, NodeName, Record, RecordKey};
use tombolo_proto::trust::SigningKey;

pub use observed::{Applied, ClusterSet, Lease, Member, Observed, Version, Versioned};

/// The cluster's objects. Every writer below has one caller, as in the table of single writers; all of them
/// write nothing when what is there is what should be.
#[async_trait]
pub trait ClusterApi: Send + Sync {
    /// All kinds, parsed and coalesced: the newest value wins. Everything is unknown until the first full
    /// reading, and a part is unknown again while its source cannot be read.
    fn observe(&self) -> watch::Receiver<Arc<Observed>>;

    /// Makes the ServiceImports so. Only the leader calls it.
    async fn apply_imports(&self, desired: &Objects<ServiceKey, Import>) -> Result<Applied, Error>;

    /// Makes the imported EndpointSlices so. Only the leader calls it.
    async fn apply_slices(&self, desired: &Objects<SliceKey, Slice>) -> Result<Applied, Error>;

    /// Writes some ServiceImports and removes others, and leaves all that are not named. Only the leader calls it.
    async fn write_imports(
        &self,
        set: BTreeMap<ServiceKey, Import>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<Applied, Error>;

    /// The same for imported EndpointSlices.
    async fn write_slices(
        &self,
        set: BTreeMap<SliceKey, Slice>,
        gone: BTreeSet<SliceKey>,
    ) -> Result<Applied, Error>;

    /// Makes some Services that carry ClusterSetIPs, and removes others. Returns how those of `set` came to be, with the
    /// addresses that they have. Only the leader calls it, and only of a cluster whose ClusterSetIPs Services carry.
    async fn write_derived(
        &self,
        set: BTreeMap<ServiceKey, DerivedService>,
        gone: BTreeSet<ServiceKey>,
    ) -> Result<BTreeMap<ServiceKey, DerivedService>, Error>;

    /// Makes the cluster's own ClusterProperties so (about.k8s.io): others of ours go, others' stay. Only the leader calls
    /// it. A directory has none.
    async fn apply_properties(&self, desired: &BTreeMap<&'static str, String>) -> Result<Applied, Error>;

    /// Writes the statuses of the users' ServiceExports. `now`: unix seconds, for the times of conditions that
    /// changed. Exports that are gone are passed over. Only the leader calls it.
    async fn apply_statuses(
        &self,
        desired: &BTreeMap<ServiceKey, ExportStatus>,
        now: u64,
    ) -> Result<Applied, Error>;

    /// Gives every new ServiceExport its creationTimestamp, and forgets those of exports that are gone.
    /// Kubernetes does this itself. Cheap when there is nothing to do: the leader calls it on every change.
    async fn stamp_exports(&self, now: u64) -> Result<Applied, Error>;

    /// Keeps what was verified of a cluster: its membership, its statement, and the records of its scope
    /// `nodes`, all in one batch. Only the leader calls it.
    async fn write_member(
        &self,
        cluster: &ClusterId,
        member: &Member,
        nodes: &BTreeMap<RecordKey, Record>,
    ) -> Result<Applied, Error>;

    /// Says on a cluster's Member how it stands. `now`: unix seconds. Only the leader calls it. A directory says it by
    /// `tombolo status` alone.
    async fn write_standing(
        &self,
        _cluster: &ClusterId,
        _standing: &Standing,
        _now: u64,
    ) -> Result<Applied, Error> {
        Ok(Applied::default())
    }

    /// Forgets a cluster. Only the leader calls it.
    async fn delete_member(&self, cluster: &ClusterId) -> Result<Applied, Error>;

    /// Says what a node is. Only that node calls it.
    async fn write_tunnel_node(&self, node: &NodeName, value: &TunnelNode) -> Result<Applied, Error>;

    /// Forgets a node that is no more. Only the leader calls it.
    async fn delete_tunnel_node(&self, node: &NodeName) -> Result<Applied, Error>;

    /// The set as this cluster knows it, for a read-modify-write with [`Self::write_clusterset`].
    async fn clusterset(&self) -> Result<Option<Versioned<ClusterSet>>, Error>;

    /// Replaces the set's object if it still is at `expected` (None: does not exist). Only the leader and
    /// `tombolo` call it.
    async fn write_clusterset(
        &self,
        value: &ClusterSet,
        expected: Option<&Version>,
    ) -> Result<Version, Error>;

    /// From now on this process's writes that only the leader may do count while the Lease bears this epoch, and
    /// fail with [`Error::NotLeading`] after: nobody who slept through its successor's election writes.
    fn lead_as(&self, epoch: u64);

    /// How fast the lead passes on.
    fn timing(&self) -> Timing;

    /// Who leads.
    async fn lease(&self) -> Result<Option<Versioned<Lease>>, Error>;

    /// Replaces the Lease if it still is at `expected` (None: does not exist); else [`Error::Conflict`].
    async fn write_lease(&self, lease: &Lease, expected: Option<&Version>) -> Result<Version, Error>;

    /// The cluster's signing key, for the controller alone.
    async fn cluster_key(&self) -> Result<Option<SigningKey>, Error>;
}

/// Why the cluster's API could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else wrote in between: read again and decide anew.
    #[error("{object} was changed by somebody else in the meantime")]
    Conflict {
        /// Which object.
        object: String,
    },
    /// Another took the lead.
    #[error("another agent leads this cluster by now; nothing was written")]
    NotLeading,
    /// The directory is not there, or not one of ours.
    #[error(
        "{path} is not a cluster's directory ({problem}); `tombolo join --cluster-dir {path} ...` makes one"
    )]
    NotADirectory {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// This directory is a member already.
    #[error(
        "{path} already is cluster {cluster} of set {set}; leave that set first, or use another directory"
    )]
    AlreadyMember {
        /// Which.
        path: PathBuf,
        /// Of whom.
        cluster: ClusterId,
        /// Of which set.
        set: String,
    },
    /// Somebody holds the lock for too long.
    #[error(
        "the lock {path} was held by another process for {seconds} s; is an agent stopped (SIGSTOP), or the disk stuck?"
    )]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long we waited.
        seconds: u64,
    },
    /// An object cannot be written or read because of what it is.
    #[error("{object}: {message}")]
    Object {
        /// Which.
        object: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// The system refused.
    #[error("cannot {action} {path}: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed. (Told by the error itself, since most who log it show no chain.)
        cause: std::io::Error,
    },
    /// It is not told where the API server is, or who we are.
    #[error("{from} does not tell how to reach the API server: {cause}")]
    Access {
        /// What was read.
        from: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The API server does not answer as it should.
    #[error("cannot {action} {object}: {cause}")]
    Api {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        /// Why it failed.
        cause: String,
    },
    /// The API server refused for good.
    #[error("the API server refuses to {action} {object}: {cause}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        /// Its words.
        cause: String,
        /// Because of what the object says.
        invalid: bool,
    },
    /// The cluster's definition of a kind is older than what is written.
    #[error("the definition of {object} in this cluster is too old: {cause}; apply deploy/crds")]
    Undeclared {
        /// What was written.
        object: String,
        /// The API server's words.
        cause: String,
    },
    /// The work was cut off, since this process ends.
    #[error("the agent is ending")]
    Ending,
}

impl Error {
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { action, path, cause }
    }
}
