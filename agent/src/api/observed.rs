//! What was read of the cluster, and what is written to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_agent_core::finding::Finding;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, LocalBackends, Node, Service, ServiceExport, ServiceKey, Slice,
    SliceKey, TunnelNode,
};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::world::{ClustersetRanges, Reach, Topology};
use tombolo_proto::model::{ClusterId, Namespace, NodeName, Prefix, Record, RecordKey};
use tombolo_proto::trust::{Digest, Envelope, PublicKey, SetId};
use tombolo_proto::wire::{MembershipParts, decode_binding, decode_grant};

/// All objects of the cluster, parsed. What is signed is not verified yet: that is the reader's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observed {
    /// v1 Nodes.
    pub nodes: Known<BTreeMap<NodeName, Node>>,
    /// Namespaces that exist. In a directory also those that an object of the users' lies in, since nobody
    /// is there to refuse it.
    pub namespaces: Known<BTreeSet<Namespace>>,
    /// v1 Services.
    pub services: Known<Shelf<ServiceKey, Service>>,
    /// ServiceExports that have a creation time.
    pub exports: Known<Shelf<ServiceKey, ServiceExport>>,
    /// All ServiceExports, those too that wait for [`super::ClusterApi::stamp_exports`].
    pub declared_exports: Known<Arc<BTreeSet<ServiceKey>>>,
    /// Statuses of ServiceExports as last written.
    pub statuses: Known<Shelf<ServiceKey, ExportStatus>>,
    /// Backends of local services, out of all their EndpointSlices.
    pub backends: Known<Shelf<ServiceKey, LocalBackends>>,
    /// ServiceImports.
    pub imports: Known<Shelf<ServiceKey, Import>>,
    /// Imported EndpointSlices.
    pub slices: Known<Shelf<SliceKey, Slice>>,
    /// Services that carry ClusterSetIPs; a directory has none.
    pub derived: Known<Shelf<ServiceKey, DerivedService>>,
    /// Ranges of this cluster's Services, where they are known.
    pub service_ranges: BTreeSet<Prefix>,
    /// Clusters as the controller verified them, the own one too.
    pub members: Known<BTreeMap<ClusterId, Member>>,
    /// Records of the clusters' scope `nodes`.
    pub member_nodes: Known<BTreeMap<ClusterId, BTreeMap<RecordKey, Record>>>,
    /// What nodes say of themselves.
    pub tunnel_nodes: Known<BTreeMap<NodeName, TunnelNode>>,
    /// The set; none before `tombolo join`.
    pub clusterset: Known<Option<ClusterSet>>,
    /// What is wrong with any of them, in order.
    pub findings: Vec<Finding>,
}

/// tombolo.dev Member: a cluster's right to speak and the last that it said, as envelopes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its newest grant: what it owns.
    pub grant: Envelope,
    /// The newest grant's bindings 0, 1, ...
    pub bindings: Vec<Envelope>,
    /// The older membership that `statement` was given under; none if that is the newest.
    pub spoken: Option<MembershipParts>,
    /// The statement that its [`Observed::member_nodes`] fit; none before it has spoken.
    pub statement: Option<Envelope>,
    /// Hash over the leaves of the namespaces under that statement: with it and the records of `nodes` the
    /// statement's root can be checked.
    pub namespaces: Option<Digest>,
}

impl Member {
    /// The serial that its grant claims.
    fn serial(&self) -> Option<u64> {
        decode_grant(&self.grant.payload).ok().map(|grant| grant.serial)
    }

    /// Whether its membership is newer than another's: joined anew, or its key rotated.
    pub(super) fn is_newer_than(&self, other: &Self) -> bool {
        let (held, serial) = (self.serial(), other.serial());
        let extends =
            self.bindings.len() > other.bindings.len() && self.bindings.starts_with(&other.bindings);
        held > serial || (held == serial && extends)
    }

    /// The key that its last binding claims.
    pub(super) fn bound_key(&self) -> Option<PublicKey> {
        Some(decode_binding(&self.bindings.last()?.payload).ok()?.key)
    }
}

/// tombolo.dev ClusterSet: the one object `clusterset`, which makes a cluster a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterSet {
    /// The set that was pinned at join.
    pub set: SetId,
    /// The own cluster.
    pub cluster: ClusterId,
    /// Versions 1, 2, ... of the roots.
    pub roots: Vec<Envelope>,
    /// The newest list of brokers.
    pub brokers: Option<Envelope>,
    /// The newest list of revocations.
    pub revocations: Option<Envelope>,
    /// What foreign traffic may come in.
    pub reach: Reach,
    /// Which of its nodes have tunnels to other clusters.
    pub topology: Topology,
    /// Where a directory's ClusterSetIPs come from; none under Kubernetes, where Services carry them.
    pub clusterset: Option<ClustersetRanges>,
    /// Ranges of this cluster (Services, API server, ...) that no other may own.
    pub reserved: BTreeSet<Prefix>,
    /// Nodes that are to change their WireGuard keys, each once for every number that is larger than the one before
    /// (`tombolo rotate wireguard`).
    pub rotations: BTreeMap<NodeName, u64>,
    /// Of its own will the cluster says nothing any more, and takes nothing of the others (`tombolo leave`).
    pub leaving: bool,
}

/// coordination.k8s.io Lease `tombolo-controller`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Who leads; none when it was given up.
    pub holder: Option<String>,
    /// How long a renewal holds, seconds.
    pub duration: u32,
    /// Unix microseconds; for people. Whoever waits counts by its own clock since the Lease last changed.
    pub acquired: u64,
    /// Unix microseconds; for people, like `acquired`.
    pub renewed: u64,
    /// How often the holder changed.
    pub transitions: u32,
    /// The epoch that the holder reserved (`tombolo.dev/epoch`).
    pub epoch: u64,
}

/// Where an object has come to: opaque, compared only for equality.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(pub(crate) String);

/// A value and the version it was read at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// What was read.
    pub value: T,
    /// For a write that must find it unchanged.
    pub version: Version,
}

/// What a writer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// Objects created or changed.
    pub written: usize,
    /// Objects deleted.
    pub deleted: usize,
}

impl Applied {
    /// Whether everything was right already.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}
