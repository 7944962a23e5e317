//! What serves a cluster's API.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::{Cluster, Node, Pod, host4, host6};

/// The virtual addresses of Services, the same in every cluster of `api: kubernetes`, as in most real ones.
pub const SERVICES4: &str = "10.96.0.0/16";
/// The same for IPv6.
pub const SERVICES6: &str = "fd00:96::/108";
/// Where pods of a cluster of `api: kubernetes` ask for names: its DNS Service.
pub const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// How kube-proxy balances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Proxy {
    /// By nft.
    #[default]
    Nftables,
    /// By iptables.
    Iptables,
}

impl Proxy {
    /// As kube-proxy's `mode` spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// What serves a cluster's API.
#[derive(Debug, Clone)]
pub enum Api {
    /// A directory that its nodes share.
    Directory,
    /// A real kube-apiserver.
    Kubernetes(Box<ControlPlane>),
}

/// Where a cluster of `api: kubernetes` has its API and its DNS.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    /// The place of etcd, kube-apiserver, kube-controller-manager and kube-scheduler: `api-CLUSTER`.
    pub place: String,
    /// Its address in the nodes' network.
    pub v4: Ipv4Addr,
    /// Its address in the nodes' network.
    pub v6: Ipv6Addr,
    /// How kube-proxy balances on the nodes.
    pub proxy: Proxy,
    /// The pod in which CoreDNS runs, on the first node: `dns-CLUSTER`.
    pub dns: Pod,
    /// The pods of Tombolo's controllers, one on the first node and one on the last: `controller-CLUSTER-0` and `-1`.
    pub controllers: [Pod; 2],
}

impl ControlPlane {
    /// The pods of the control plane's own: of names and of controllers.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        std::iter::once(&self.dns).chain(&self.controllers)
    }
}

impl Cluster {
    /// Its control plane, if its API is a real one.
    #[must_use]
    pub fn kubernetes(&self) -> Option<&ControlPlane> {
        match &self.api {
            Api::Directory => None,
            Api::Kubernetes(control) => Some(control),
        }
    }
}

/// As the topology file says it.
#[derive(Deserialize, Default, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum ApiFile {
    #[default]
    Directory,
    Kubernetes,
}

impl ApiFile {
    /// The API of a cluster with this network of its nodes.
    pub(super) fn check(
        self,
        cluster: &str,
        proxy: Option<Proxy>,
        (lan4, lan6): (Ipv4Net, Ipv6Net),
        nodes: &[Node],
    ) -> Result<Api> {
        match self {
            Self::Directory => {
                ensure!(proxy.is_none(), "proxy: is for clusters of api: kubernetes");
                ensure!(!nodes.iter().any(|n| n.kwok), "kwok: is for clusters of api: kubernetes");
                Ok(Api::Directory)
            }
            Self::Kubernetes => {
                let mut own = nodes.iter().filter(|n| !n.kwok);
                let first = own.next().context("the cluster needs a node that is not kwok's")?;
                let last = own.next_back().unwrap_or(first);
                let pod = |name: String, namespace: &str, app: &str, node: &Node, host| Pod {
                    name,
                    namespace: namespace.to_owned(),
                    app: app.to_owned(),
                    node: node.name.clone(),
                    cluster: cluster.to_owned(),
                    v4: host4(node.pods4, host),
                    v6: host6(node.pods6, host),
                };
                let controller = |number: u8, node: &Node| {
                    let name = format!("controller-{cluster}-{number}");
                    pod(name, "tombolo-system", "tombolo-controller", node, 7 + number)
                };
                Ok(Api::Kubernetes(Box::new(ControlPlane {
                    place: format!("api-{cluster}"),
                    v4: host4(lan4, 253),
                    v6: host6(lan6, 253),
                    proxy: proxy.unwrap_or_default(),
                    dns: pod(format!("dns-{cluster}"), "kube-system", "kube-dns", first, 9),
                    controllers: [controller(0, first), controller(1, last)],
                })))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{TWO, Topology};

    #[test]
    fn a_cluster_of_kubernetes_has_a_place_for_its_api_and_a_pod_for_its_names() {
        let with = |extra: &str| TWO.replacen("    pod_cidrs", &format!("    {extra}\n    pod_cidrs"), 1);
        let two = Topology::parse(&with("api: kubernetes\n    proxy: iptables")).unwrap();
        let control = two.cluster("eu-west").unwrap().kubernetes().unwrap();
        assert_eq!((control.place.as_str(), control.proxy), ("api-eu-west", Proxy::Iptables));
        assert_eq!(control.v4.to_string(), "172.30.1.253");
        assert_eq!(
            (control.dns.node.as_str(), control.dns.v6.to_string().as_str()),
            ("eu-gw1", "fd00:10:1:1::9")
        );
        assert!(two.cluster("us-east").unwrap().kubernetes().is_none());
        let twice = with("api: kubernetes").replace("name: eu-a", "name: dns-eu-west");
        assert!(Topology::parse(&twice).unwrap_err().to_string().contains("dns-eu-west is used twice"));
    }
}
