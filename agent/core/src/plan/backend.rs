//! Which imported backends count on a node. Decided once: VIPs, reach and names all use the result.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{Backend, ClusterId, Family, NodeName, Prefix};

use super::findings::Findings;
use crate::object::{Slice, SliceKey};
use crate::world::Members;

/// Where backends may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranges {
    us: ClusterId,
    /// Pods and tunnels of every member.
    members: BTreeMap<ClusterId, BTreeSet<Prefix>>,
    /// Addresses of own nodes.
    hosts: BTreeMap<IpAddr, NodeName>,
}

impl Ranges {
    pub(crate) fn of(us: &ClusterId, members: &Members, hosts: &BTreeMap<IpAddr, NodeName>) -> Self {
        let ranges = members.iter().map(|(id, m)| (id.clone(), m.owned.union(&m.tunnel).copied().collect()));
        Self { us: us.clone(), members: ranges.collect(), hosts: hosts.clone() }
    }

    /// Which own node has an address.
    pub(crate) fn host(&self, address: IpAddr) -> Option<&NodeName> {
        self.hosts.get(&address)
    }

    fn contain(&self, key: &SliceKey, backend: &Backend) -> bool {
        let stated = || {
            let ranges = self.members.get(&key.source);
            ranges.is_some_and(|ranges| ranges.iter().any(|p| p.contains(backend.address)))
        };
        let own_host = || key.source == self.us && self.hosts.contains_key(&backend.address);
        Family::of(backend.address) == key.family && (stated() || own_host())
    }

    /// A slice without the backends that lie outside the ranges of its source, or in another family (law 2): whoever
    /// can write slices in this cluster still cannot send traffic anywhere else. The own cluster's may be on the host
    /// network of its nodes.
    pub(crate) fn owned<'a>(
        &self,
        key: &SliceKey,
        slice: &'a Slice,
        findings: &mut Findings,
    ) -> Cow<'a, Slice> {
        let Some(first) = slice.backends.iter().find(|b| !self.contain(key, b)) else {
            return Cow::Borrowed(slice);
        };
        let kept: Vec<Backend> = slice.backends.iter().filter(|b| self.contain(key, b)).cloned().collect();
        let text = format!(
            "{} backends of cluster {} are outside its ranges ({} is one); they are not used",
            slice.backends.len() - kept.len(),
            key.source,
            first.address
        );
        findings.error("BackendOutsideGrant", format!("serviceimport {}", key.service), text);
        Cow::Owned(Slice { ports: slice.ports.clone(), backends: kept, derived: slice.derived })
    }
}
