//! What is known of the outside, parsed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use tombolo_proto::model::{
    Backends, ClusterId, Endpoint, Export, Family, Namespace, NodeName, Position, Prefix,
};
use tombolo_proto::trust;

use crate::known::Known;
use crate::liveness::PeerId;
use crate::object::{
    DerivedService, Import, LocalBackends, Node, Service, ServiceExport, ServiceKey, Slice, SliceKey,
    TunnelNode,
};
use crate::shelf::Shelf;

/// Which foreign traffic may come to own pods.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// Exported (address, protocol, port) only.
    #[default]
    Exports,
    /// Every pod.
    All,
}

/// Which nodes have tunnels to other clusters.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// Gateways alone.
    #[default]
    Gateway,
    /// Every node, to every node of clusters that choose it too; over gateways where that does not carry.
    Mesh,
}

/// Where ClusterSetIPs come from in a directory; local to the cluster. Kubernetes gives them itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct ClustersetRanges {
    /// Default 198.19.0.0/16; its first address is the resolver's.
    pub v4: Option<Ipv4Net>,
    /// Default fd19:746f:6d62::/112; its first address is the resolver's.
    pub v6: Option<Ipv6Net>,
}

impl ClustersetRanges {
    /// The ranges.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.v4.map(IpNet::from).into_iter().chain(self.v6.map(IpNet::from))
    }

    /// What pods ask for names, port 53: the first address of each range.
    pub fn resolvers(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.v4.and_then(|net| net.hosts().next()).map(IpAddr::V4);
        let v6 = self.v6.map(|net| IpAddr::V6((u128::from(net.network()) + 1).into()));
        v4.into_iter().chain(v6)
    }
}

/// A member as nodes use it: effective ranges, and the nodes it states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberNodes {
    /// Of its newest grant: who was admitted first keeps what two claim.
    pub serial: u64,
    /// Effective pod ranges.
    pub owned: BTreeSet<Prefix>,
    /// Effective tunnel ranges.
    pub tunnel: BTreeSet<Prefix>,
    /// Its nodes, as stated; plans take only what lies in the ranges.
    pub nodes: BTreeMap<NodeName, Endpoint>,
}

/// All members, by name.
pub type Members = Shelf<ClusterId, MemberNodes>;

/// What liveness and hellos say; what is not in here is not known to be bad.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Health {
    /// Peers of this node that answered once and do not now.
    pub dead: BTreeSet<PeerId>,
    /// Peers of this node that answer: what is neither here nor in `dead` never has.
    pub alive: BTreeSet<PeerId>,
    /// Peers that came lately to others that have lived for a while, and have not shown yet that they can carry: better
    /// none of these, if another way is there. An own gateway has, once it answers and says what it has tried.
    pub young: BTreeSet<PeerId>,
    /// Peers of this node whose path carries less than their device, and how much, bytes.
    #[serde(default, with = "pairs")]
    pub narrow: BTreeMap<PeerId, u16>,
    /// All peers that are watched, once one of them has lived for a while: others came just now, and are young too.
    pub known: Option<BTreeSet<PeerId>>,
    /// By own node that said something lately: clusters that it has no live tunnel to.
    pub unreachable: BTreeMap<NodeName, BTreeSet<ClusterId>>,
    /// By own node that said something lately: clusters to which a tunnel of it has never answered. Heeded of young ones
    /// alone: unknown is not dead.
    pub untried: BTreeMap<NodeName, BTreeSet<ClusterId>>,
}

/// A map whose keys are no strings, as a list: JSON has no other.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use crate::liveness::PeerId;

    pub(super) fn serialize<S: Serializer>(map: &BTreeMap<PeerId, u16>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<PeerId, u16>, D::Error> {
        Ok(Vec::<(PeerId, u16)>::deserialize(from)?.into_iter().collect())
    }
}

/// All that a node's plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeWorld {
    /// The own cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeName,
    /// What foreign traffic may come in.
    pub reach: Reach,
    /// Where directory VIPs come from; None under Kubernetes, where Services carry them.
    pub clusterset: Option<ClustersetRanges>,
    /// MTU of the links that tunnels run over, bytes.
    pub underlay_mtu: u16,
    /// Families that this node can send outer packets in.
    pub underlay: BTreeSet<Family>,
    /// Ranges and addresses of this cluster that no other's node can have: reserved ones, ClusterSetIPs, own nodes.
    pub inner: BTreeSet<Prefix>,
    /// Own nodes by their own addresses: hostNetwork backends of this cluster are reached there from within it.
    pub hosts: Known<BTreeMap<IpAddr, NodeName>>,
    /// Every member, the own one too, verified again on this node. Unknown before the first full reading.
    pub members: Known<Members>,
    /// ServiceImports of the own API.
    pub imports: Known<Shelf<ServiceKey, Import>>,
    /// Imported EndpointSlices of the own API, the own cluster's too.
    pub slices: Known<Shelf<SliceKey, Slice>>,
    /// Which ways carry.
    pub health: Health,
}

/// What another cluster has stated, verified and checked against its grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// Its right to speak, and its effective ranges.
    pub member: trust::Member,
    /// Where it has come to.
    pub position: Position,
    /// Its nodes.
    pub nodes: BTreeMap<NodeName, Endpoint>,
    /// Its exports in namespaces that exist here.
    pub exports: BTreeMap<ServiceKey, Export>,
    /// Backends of its exports, by shard.
    pub backends: BTreeMap<ServiceKey, BTreeMap<u32, Backends>>,
    /// Scopes whose records are not here yet: their services stay as they are.
    pub unknown_namespaces: BTreeSet<Namespace>,
}

/// All that the controller's plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterWorld {
    /// The own cluster.
    pub cluster: ClusterId,
    /// The own right to speak.
    pub own: trust::Member,
    /// See [`NodeWorld::clusterset`].
    pub clusterset: Option<ClustersetRanges>,
    /// Which of its nodes others may talk to.
    pub topology: Topology,
    /// Nodes.
    pub nodes: Known<BTreeMap<NodeName, Node>>,
    /// What nodes say of themselves.
    pub tunnel_nodes: Known<BTreeMap<NodeName, TunnelNode>>,
    /// Own nodes as last stated: ranks and tunnel addresses stick.
    pub stated: Known<BTreeMap<NodeName, Endpoint>>,
    /// Namespaces that exist here.
    pub namespaces: Known<BTreeSet<Namespace>>,
    /// Local services.
    pub services: Known<Shelf<ServiceKey, Service>>,
    /// What the users export.
    pub exports: Known<Shelf<ServiceKey, ServiceExport>>,
    /// Backends of local services.
    pub backends: Known<Shelf<ServiceKey, LocalBackends>>,
    /// Imports as they are: their ClusterSetIPs stick.
    pub imports: Known<BTreeMap<ServiceKey, Import>>,
    /// Imported EndpointSlices as they are: those of clusters that are not known stay.
    pub slices: Known<BTreeSet<SliceKey>>,
    /// Under Kubernetes: the Services that carry ClusterSetIPs, as they are.
    pub derived: Known<BTreeMap<ServiceKey, DerivedService>>,
    /// Under Kubernetes: families that its Services can have; empty: not known, and all are tried.
    pub service_families: BTreeSet<Family>,
    /// What other clusters have stated.
    pub foreign: BTreeMap<ClusterId, Foreign>,
    /// Members (not revoked) of whom nothing verified is at hand: what came from them stays as it is.
    pub unknown: BTreeSet<ClusterId>,
}

#[cfg(test)]
mod tests {
    use tombolo_proto::model::{DeviceNumber, WireguardKey};

    use super::*;

    #[test]
    fn health_is_told_in_json_and_read_back() {
        let peer = (DeviceNumber::new(1).unwrap(), WireguardKey([7; 32]));
        let health = Health {
            dead: [peer].into(),
            narrow: [(peer, 1240)].into(),
            known: Some([peer].into()),
            unreachable: [("n1".parse().unwrap(), ["us".parse().unwrap()].into())].into(),
            ..Health::default()
        };
        let text = serde_json::to_string(&health).unwrap();
        assert_eq!(serde_json::from_str::<Health>(&text).unwrap(), health);
    }
}
