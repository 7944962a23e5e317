//! What one derived service is on a node: its names, its VIPs, and what of it may be reached from outside. It hangs on
//! its own import and slices, and on a [`Frame`] that all services share.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{ClusterId, NodeName, Protocol, ServiceType};

use super::backend::Ranges;
use super::eligible::View;
use super::findings::Findings;
use super::roster::Claim;
use super::vip;
use crate::desired::{Balance, Vip};
use crate::object::{Import, ServiceKey, Slice, SliceKey};
use crate::world::ClustersetRanges;
use crate::zone::Entry;

/// What all services hang on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) cluster: ClusterId,
    pub(super) node: NodeName,
    /// See [`crate::world::NodeWorld::clusterset`].
    pub(super) clusterset: Option<ClustersetRanges>,
    pub(super) ranges: Ranges,
    /// Of this node.
    pub(super) claim: Claim,
    /// Clusters that no way leads to.
    pub(super) unreached: BTreeSet<ClusterId>,
}

/// An own address, transport and port that others may reach.
pub(super) type Exported = (IpAddr, Protocol, u16);

/// One service.
#[derive(Debug, Default)]
pub(super) struct Local {
    pub(super) entry: Option<Entry>,
    pub(super) vips: BTreeMap<Vip, Balance>,
    pub(super) exported: BTreeSet<Exported>,
    pub(super) findings: Findings,
}

impl Local {
    pub(super) fn is_anything(&self) -> bool {
        self.entry.is_some() || !self.vips.is_empty() || !self.exported.is_empty()
    }
}

impl Frame {
    /// Plans a service. `holder`: whose a ClusterSetIP is.
    pub(super) fn local<'a>(
        &self,
        key: &ServiceKey,
        import: Option<&Import>,
        slices: impl Iterator<Item = (&'a SliceKey, &'a Slice)>,
        holder: impl Fn(IpAddr) -> Option<ServiceKey>,
    ) -> Local {
        let mut local = Local::default();
        let slices: Vec<(&SliceKey, Cow<'_, Slice>)> =
            slices.map(|(key, slice)| (key, self.ranges.owned(key, slice, &mut local.findings))).collect();
        let slices: Vec<(&SliceKey, &Slice)> = slices.iter().map(|(key, slice)| (*key, &**slice)).collect();
        local.exported = self.exported(&slices);
        let Some(import) = import else { return local };
        let view = View { cluster: &self.cluster, unreached: &self.unreached };
        let import = self.honest(key, import, holder, &mut local.findings);
        local.entry = Entry::eligible(key, &import, &slices, view);
        if self.clusterset.is_some() {
            local.vips = vip::vips(&self.node, view, &import, &slices);
        }
        local
    }

    /// Addresses of an import that could be its ClusterSetIPs.
    pub(super) fn claims<'a>(&'a self, import: &'a Import) -> impl Iterator<Item = IpAddr> + 'a {
        let ranges = self.clusterset.as_ref().filter(|_| import.kind == ServiceType::ClusterSetIP);
        ranges.into_iter().flat_map(|r| import.ips.iter().copied().filter(|ip| vip::is_vip(r, *ip)))
    }

    /// The import with only those ClusterSetIPs that are one: in this cluster's range, and of two imports that bear one
    /// address the lower name's. VIPs and names use the result (law 2). Under Kubernetes the API sees to that.
    fn honest<'a>(
        &self,
        key: &ServiceKey,
        import: &'a Import,
        holder: impl Fn(IpAddr) -> Option<ServiceKey>,
        findings: &mut Findings,
    ) -> Cow<'a, Import> {
        let Some(ranges) = self.clusterset.as_ref().filter(|_| import.kind == ServiceType::ClusterSetIP)
        else {
            return Cow::Borrowed(import);
        };
        let mut good = |&ip: &IpAddr| {
            if !vip::is_vip(ranges, ip) {
                let text = format!("{ip} is not in this cluster's ClusterSetIP range; it is not used");
                findings.error("ClusterSetIPOutsideRange", format!("serviceimport {key}"), text);
                return false;
            }
            let other = holder(ip).filter(|holder| holder != key);
            if let Some(other) = &other {
                let text = format!("{ip} is already {other}'s; it stays there");
                findings.error("ClusterSetIPTwice", format!("serviceimport {key}"), text);
            }
            other.is_none()
        };
        let ips: Vec<IpAddr> = import.ips.iter().copied().filter(&mut good).collect();
        if ips.len() == import.ips.len() {
            return Cow::Borrowed(import);
        }
        Cow::Owned(Import { ips, ..import.clone() })
    }

    /// Whatever its readiness: that one changes often, and who may not have traffic is not sent any.
    fn exported(&self, slices: &[(&SliceKey, &Slice)]) -> BTreeSet<Exported> {
        let claim = &self.claim;
        let here = |address: IpAddr| {
            claim.tunnel.contains(&address) || claim.prefixes.iter().any(|p| p.contains(address))
        };
        // Others reach what is on this host's network by its tunnel address.
        let stated = |address: IpAddr| match self.ranges.host(address) {
            Some(node) if *node == self.node => {
                claim.tunnel.iter().copied().find(|t| t.is_ipv4() == address.is_ipv4()).unwrap_or(address)
            }
            Some(_) | None => address,
        };
        slices
            .iter()
            .filter(|(key, _)| key.source == self.cluster)
            .flat_map(|(_, slice)| slice.ports.iter().map(move |port| (slice, port)))
            .flat_map(|(slice, port)| {
                slice.backends.iter().map(|b| (stated(b.address), port.protocol, port.port))
            })
            .filter(|(address, ..)| here(*address))
            .collect()
    }
}
