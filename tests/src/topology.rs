//! The topology file: which clusters, nodes and pods the lab builds, and every address they get.
//!
//! Addresses follow from positions, so that a file names nothing twice: cluster *i* has the underlay
//! `172.30.i.0/24` (or, `flat`, the first /24 of its pod range), its node *k* the underlay address `.k`
//! and the pods of the *k*-th /24 and /64 of the pod range.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

mod api;

pub use api::{Api, CLUSTER_DNS, ControlPlane, Proxy, SERVICES4, SERVICES6};

use api::ApiFile;

/// The built-in topology of the end-to-end tests: two gateways and a worker a side.
pub const TWO: &str = include_str!("../topologies/two.yaml");
/// The built-in topology of the demo: one gateway and one worker a side.
pub const DEMO: &str = include_str!("../topologies/demo.yaml");
/// The built-in topology of real control planes: a gateway and a worker a side.
pub const KUBERNETES: &str = include_str!("../topologies/kubernetes.yaml");

/// Where pods of a directory ask for names: the clusterset range's first address.
pub const NAMESERVER: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);

/// A topology file that was read and found possible.
#[derive(Debug, Clone)]
pub struct Topology {
    /// The lab's name: `exec`, `fault` and `down` find it by this.
    pub name: String,
    /// The brokers, each in a namespace of its own.
    pub brokers: Vec<Broker>,
    /// The clusters.
    pub clusters: Vec<Cluster>,
}

/// One broker and its addresses.
#[derive(Debug, Clone)]
pub struct Broker {
    /// Its name in the lab.
    pub name: String,
    /// Underlay address.
    pub v4: Ipv4Addr,
    /// Underlay address.
    pub v6: Ipv6Addr,
}

/// What other clusters may reach here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// Exported ports only.
    #[default]
    Exports,
    /// Every pod.
    All,
}

impl Reach {
    /// As the agent's `--reach` spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exports => "exports",
            Self::All => "all",
        }
    }
}

/// The policy of the CNI's FORWARD chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Forward {
    /// Everything is forwarded.
    #[default]
    Accept,
    /// Only the cluster's own pods are (as Docker leaves it): `tombolo check` must find it.
    Drop,
}

/// One cluster.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Its id in the set.
    pub id: String,
    /// 1 for the first of the file.
    pub index: u8,
    /// Pod range.
    pub pods4: Ipv4Net,
    /// Pod range.
    pub pods6: Ipv6Net,
    /// The nodes' own network.
    pub lan4: Ipv4Net,
    /// The nodes' own network.
    pub lan6: Ipv6Net,
    /// The wire's address in the nodes' network: their default gateway.
    pub router4: Ipv4Addr,
    /// The wire's address in the nodes' network: their default gateway.
    pub router6: Ipv6Addr,
    /// Node addresses lie inside the pod range.
    pub flat: bool,
    /// What others may reach here.
    pub reach: Reach,
    /// Every node has tunnels to other clusters (`topology: mesh`), not gateways alone.
    pub mesh: bool,
    /// Policy of the CNI's FORWARD chain.
    pub forward: Forward,
    /// What serves its API.
    pub api: Api,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The services whose manifests the lab writes.
    pub services: Vec<Service>,
}

/// One node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name, unique in the lab.
    pub name: String,
    /// The cluster's id.
    pub cluster: String,
    /// 1 for the first of the cluster.
    pub number: u8,
    /// Labelled as a gateway.
    pub gateway: bool,
    /// Tunnels side by side to each peer.
    pub lanes: u8,
    /// Its pods are not the lab's but those that the scheduler sends there: kwok runs them, all in one place, `kwok-NODE`,
    /// to which the node's whole pod range belongs.
    pub kwok: bool,
    /// Underlay address.
    pub v4: Ipv4Addr,
    /// Underlay address.
    pub v6: Ipv6Addr,
    /// Its pods' prefix, a /24.
    pub pods4: Ipv4Net,
    /// Its pods' prefix, a /64.
    pub pods6: Ipv6Net,
    /// The CNI bridge's address.
    pub cni4: Ipv4Addr,
    /// The CNI bridge's address.
    pub cni6: Ipv6Addr,
    /// Its pods.
    pub pods: Vec<Pod>,
}

/// One pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name, unique in the lab.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// What services select by.
    pub app: String,
    /// The node's name.
    pub node: String,
    /// The cluster's id.
    pub cluster: String,
    /// Pod address.
    pub v4: Ipv4Addr,
    /// Pod address.
    pub v6: Ipv6Addr,
}

/// A Service whose manifest, with its EndpointSlices, the lab writes.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The pods behind it: those with this `app` in its namespace.
    pub app: String,
    /// Without a virtual address.
    #[serde(default)]
    pub headless: bool,
    /// Its ports.
    pub ports: Vec<Port>,
}

/// A port of a [`Service`].
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// The service's port.
    pub port: u16,
    /// The pods' port, the same if not given.
    #[serde(default)]
    pub target: Option<u16>,
    /// TCP or UDP.
    #[serde(default = "tcp")]
    pub protocol: String,
}

fn tcp() -> String {
    "TCP".to_owned()
}

impl Topology {
    /// Reads and checks a topology file.
    ///
    /// # Errors
    /// One sentence that names the object and says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.len() <= 1 << 20, "the topology is larger than 1 MiB");
        let file: File = serde_saphyr::from_str(text).context("the topology file")?;
        file.check()
    }

    /// All nodes of all clusters.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.clusters.iter().flat_map(|c| &c.nodes)
    }

    /// All pods of all clusters.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes().flat_map(|n| &n.pods)
    }

    /// The cluster of this id.
    ///
    /// # Errors
    /// If there is none.
    pub fn cluster(&self, id: &str) -> Result<&Cluster> {
        self.clusters.iter().find(|c| c.id == id).with_context(|| format!("there is no cluster {id}"))
    }

    /// The node of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes().find(|n| n.name == name).with_context(|| format!("there is no node {name}"))
    }

    /// The pod of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods().find(|p| p.name == name).with_context(|| format!("there is no pod {name}"))
    }

    /// The underlay addresses of a node, a broker, or all nodes of a cluster.
    ///
    /// # Errors
    /// If nothing has this name.
    pub fn underlay(&self, name: &str) -> Result<Vec<IpAddr>> {
        if let Some(b) = self.brokers.iter().find(|b| b.name == name) {
            return Ok(vec![b.v4.into(), b.v6.into()]);
        }
        if let Ok(n) = self.node(name) {
            return Ok(vec![n.v4.into(), n.v6.into()]);
        }
        let Ok(c) = self.cluster(name) else { bail!("there is no node, broker or cluster named {name}") };
        Ok(c.nodes.iter().flat_map(|n| [IpAddr::from(n.v4), IpAddr::from(n.v6)]).collect())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default = "lab")]
    name: String,
    #[serde(default = "one_broker")]
    brokers: Vec<String>,
    clusters: Vec<ClusterFile>,
}

fn lab() -> String {
    "lab".to_owned()
}

fn one_lane() -> u8 {
    1
}

fn one_broker() -> Vec<String> {
    vec!["broker".to_owned()]
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClusterFile {
    id: String,
    pod_cidrs: Vec<IpNet>,
    #[serde(default)]
    flat: bool,
    #[serde(default)]
    reach: Reach,
    #[serde(default)]
    topology: Tunnels,
    #[serde(default)]
    forward: Forward,
    #[serde(default)]
    api: ApiFile,
    proxy: Option<Proxy>,
    #[serde(default = "one_lane")]
    lanes: u8,
    nodes: Vec<NodeFile>,
    #[serde(default)]
    services: Vec<Service>,
}

/// As `tombolo join --topology` takes it.
#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum Tunnels {
    #[default]
    Gateway,
    Mesh,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    name: String,
    #[serde(default)]
    gateway: bool,
    #[serde(default)]
    kwok: bool,
    #[serde(default)]
    pods: Vec<PodFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PodFile {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default)]
    app: String,
}

fn default_namespace() -> String {
    "default".to_owned()
}

/// A DNS label, which also serves as a name in paths and command lines.
fn label(what: &str, text: &str) -> Result<()> {
    let good = !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    ensure!(good, "{what} {text:?} is no name: use at most 63 of a-z, 0-9 and -, and no - at an end");
    Ok(())
}

impl File {
    fn check(self) -> Result<Topology> {
        label("the lab's name", &self.name)?;
        ensure!(!self.clusters.is_empty(), "the topology has no clusters: give at least one");
        ensure!(self.clusters.len() <= 200, "the topology has more than 200 clusters");
        ensure!(self.brokers.len() <= 9, "the topology has more than 9 brokers");
        let mut names = BTreeSet::from(["wire".to_owned()]);
        let mut unique = |what: &str, name: &str| -> Result<()> {
            label(what, name)?;
            ensure!(names.insert(name.to_owned()), "the name {name} is used twice: every one must differ");
            Ok(())
        };
        let mut brokers = Vec::new();
        for (b, name) in (10u8..).zip(&self.brokers) {
            unique("broker", name)?;
            brokers.push(Broker {
                name: name.clone(),
                v4: Ipv4Addr::new(172, 30, 0, b),
                v6: Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, b.into()),
            });
        }
        let mut clusters = Vec::new();
        for (index, cluster) in (1u8..).zip(self.clusters) {
            unique("cluster", &cluster.id)?;
            if cluster.api == ApiFile::Kubernetes {
                unique("the place of the API", &format!("api-{}", cluster.id))?;
                unique("the DNS pod", &format!("dns-{}", cluster.id))?;
                unique("a controller", &format!("controller-{}-0", cluster.id))?;
                unique("a controller", &format!("controller-{}-1", cluster.id))?;
            }
            for node in &cluster.nodes {
                unique("node", &node.name)?;
                if node.kwok {
                    unique("the place of kwok", &format!("kwok-{}", node.name))?;
                }
                for pod in &node.pods {
                    unique("pod", &pod.name)?;
                }
            }
            let id = cluster.id.clone();
            clusters.push(cluster.check(index).with_context(|| format!("cluster {id}"))?);
        }
        disjoint(&clusters)?;
        Ok(Topology { name: self.name, brokers, clusters })
    }
}

fn disjoint(clusters: &[Cluster]) -> Result<()> {
    let fixed = [
        ("the underlay", "172.30.0.0/16"),
        ("the underlay", "fd00:30::/32"),
        ("tunnels and virtual addresses", "198.18.0.0/15"),
        ("services", SERVICES4),
        ("services", SERVICES6),
    ];
    let mut taken: Vec<(String, IpNet)> = Vec::new();
    for (what, net) in fixed {
        taken.push((what.to_owned(), net.parse()?));
    }
    for cluster in clusters {
        for net in [IpNet::from(cluster.pods4), IpNet::from(cluster.pods6)] {
            if let Some((what, other)) =
                taken.iter().find(|(_, o)| o.contains(&net.network()) || net.contains(&o.network()))
            {
                bail!("cluster {}: {net} overlaps {other} of {what}: choose another range", cluster.id);
            }
            taken.push((format!("cluster {}", cluster.id), net));
        }
    }
    Ok(())
}

impl ClusterFile {
    fn check(self, index: u8) -> Result<Cluster> {
        let mut v4 = None;
        let mut v6 = None;
        for net in &self.pod_cidrs {
            ensure!(net.trunc() == *net, "{net} has bits beyond its length: write {}", net.trunc());
            let twice = match *net {
                IpNet::V4(net) => v4.replace(net).is_some(),
                IpNet::V6(net) => v6.replace(net).is_some(),
            };
            ensure!(!twice, "the lab takes one pod range for each of IPv4 and IPv6");
        }
        let (Some(pods4), Some(pods6)) = (v4, v6) else {
            bail!("pod_cidrs needs one IPv4 range (/22 or larger) and one IPv6 range (/56 or larger)")
        };
        ensure!(
            pods4.prefix_len() <= 22,
            "{pods4} is too small: nodes take a /24 each; give a /22 or larger"
        );
        ensure!(
            pods6.prefix_len() <= 56,
            "{pods6} is too small: nodes take a /64 each; give a /56 or larger"
        );
        let room = (1u32 << (24 - pods4.prefix_len())).min(251) - 1;
        ensure!(!self.nodes.is_empty(), "the cluster has no nodes");
        ensure!(
            self.nodes.len() <= room as usize,
            "{} nodes, but {pods4} has room for {room}",
            self.nodes.len()
        );
        let i = u16::from(index);
        let (lan4, lan6) = if self.flat {
            (prefix4(pods4, 0)?, prefix6(pods6, 0)?)
        } else {
            let v6 = Ipv6Addr::new(0xfd00, 0x30, i, 0, 0, 0, 0, 0);
            (Ipv4Net::new(Ipv4Addr::new(172, 30, index, 0), 24)?, Ipv6Net::new(v6, 64)?)
        };
        ensure!((1..=8).contains(&self.lanes), "lanes: {} must be 1 to 8", self.lanes);
        let mut nodes = Vec::new();
        for (number, node) in (1u8..).zip(self.nodes) {
            ensure!(node.pods.len() <= 200, "node {} has more than 200 pods", node.name);
            ensure!(!node.kwok || node.pods.is_empty(), "node {}: kwok makes its pods, give none", node.name);
            let (pods4, pods6) = (prefix4(pods4, number)?, prefix6(pods6, number)?);
            // kwok gives its pods the first addresses.
            let cni = if node.kwok { 254 } else { 1 };
            let pods = (10u8..)
                .zip(node.pods)
                .map(|(host, pod)| Pod {
                    app: if pod.app.is_empty() { pod.name.clone() } else { pod.app },
                    name: pod.name,
                    namespace: pod.namespace,
                    node: node.name.clone(),
                    cluster: self.id.clone(),
                    v4: host4(pods4, host),
                    v6: host6(pods6, host),
                })
                .collect();
            nodes.push(Node {
                name: node.name,
                cluster: self.id.clone(),
                number,
                gateway: node.gateway,
                lanes: self.lanes,
                kwok: node.kwok,
                v4: host4(lan4, number),
                v6: host6(lan6, number),
                cni4: host4(pods4, cni),
                cni6: host6(pods6, cni),
                pods4,
                pods6,
                pods,
            });
        }
        let mut ports = BTreeMap::new();
        for service in &self.services {
            label("service", &service.name)?;
            label("namespace", &service.namespace)?;
            ensure!(!service.ports.is_empty(), "service {} has no ports", service.name);
            for port in &service.ports {
                ensure!(
                    matches!(port.protocol.as_str(), "TCP" | "UDP"),
                    "service {}: protocol {:?} must be TCP or UDP",
                    service.name,
                    port.protocol
                );
            }
            let key = (service.namespace.clone(), service.name.clone());
            ensure!(ports.insert(key, ()).is_none(), "service {} is given twice", service.name);
        }
        Ok(Cluster {
            index,
            pods4,
            pods6,
            lan4,
            lan6,
            router4: host4(lan4, 254),
            router6: host6(lan6, 254),
            flat: self.flat,
            reach: self.reach,
            mesh: matches!(self.topology, Tunnels::Mesh),
            forward: self.forward,
            api: self.api.check(&self.id, self.proxy, (lan4, lan6), &nodes)?,
            nodes,
            id: self.id,
            services: self.services,
        })
    }
}

fn prefix4(range: Ipv4Net, number: u8) -> Result<Ipv4Net> {
    Ok(Ipv4Net::new(Ipv4Addr::from(u32::from(range.network()) + (u32::from(number) << 8)), 24)?)
}

fn prefix6(range: Ipv6Net, number: u8) -> Result<Ipv6Net> {
    Ok(Ipv6Net::new(Ipv6Addr::from(u128::from(range.network()) + (u128::from(number) << 64)), 64)?)
}

fn host4(net: Ipv4Net, host: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(net.network()) + u32::from(host))
}

fn host6(net: Ipv6Net, host: u8) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(net.network()) + u128::from(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_topologies_are_possible() {
        let two = Topology::parse(TWO).unwrap();
        assert_eq!(two.nodes().count(), 6);
        let pod = two.pod("us-c").unwrap();
        assert_eq!(pod.v4.to_string(), "10.2.3.10");
        assert_eq!(pod.v6.to_string(), "fd00:10:2:3::a");
        assert_eq!(two.node("eu-gw2").unwrap().v4.to_string(), "172.30.1.2");
        Topology::parse(DEMO).unwrap();
        Topology::parse(KUBERNETES).unwrap();
    }

    #[test]
    fn a_flat_cluster_has_its_nodes_in_the_pod_range() {
        let two =
            Topology::parse(&TWO.replace("  - id: us-east", "  - id: us-east\n    flat: true")).unwrap();
        assert_eq!(two.node("us-w1").unwrap().v4.to_string(), "10.2.0.3");
    }

    #[test]
    fn errors_name_the_object_and_the_cure() {
        let bad = |from: &str, to: &str| {
            assert!(TWO.contains(from), "{from}");
            format!("{:#}", Topology::parse(&TWO.replacen(from, to, 1)).unwrap_err())
        };
        assert!(
            bad("10.2.0.0/16", "10.1.0.0/17").contains("cluster us-east: 10.1.0.0/17 overlaps 10.1.0.0/16")
        );
        assert!(bad("10.2.0.0/16", "10.2.0.0/25").contains("/22 or larger"));
        assert!(bad("10.2.0.0/16", "10.2.3.4/16").contains("write 10.2.0.0/16"));
        assert!(bad("10.2.0.0/16", "198.18.0.0/16").contains("virtual addresses"));
        assert!(bad("name: us-a", "name: eu-a").contains("eu-a is used twice"));
        assert!(bad("name: us-a", "name: US_A").contains("\"US_A\" is no name"));
        assert!(bad("10.2.0.0/16", "10.96.0.0/16").contains("of services"));
        assert!(bad("pod_cidrs", "proxy: nftables\n    pod_cidrs").contains("api: kubernetes"));
        assert!(bad("protocol: UDP", "protocol: SCTP").contains("must be TCP or UDP"));
        assert!(bad("pod_cidrs", "podcidrs").contains("podcidrs"));
    }
}
