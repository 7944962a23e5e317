//! Which imported backends count on a node. Decided once: VIPs, reach and names all use the result.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use tombolo_proto::model::{Backend, ClusterId, Family, NodeName};

use super::findings::Findings;
use crate::object::{Slice, SliceKey};
use crate::world::MemberNodes;

/// Slices without the backends that lie outside the ranges of their source, or in another family (law 2): whoever can
/// write slices in this cluster still cannot send traffic anywhere else. The own cluster's may be on the host network of
/// its nodes.
pub(crate) fn owned<'a>(
    slices: &'a BTreeMap<SliceKey, Slice>,
    members: &BTreeMap<ClusterId, MemberNodes>,
    (us, hosts): (&ClusterId, &BTreeMap<IpAddr, NodeName>),
    findings: &mut Findings,
) -> Cow<'a, BTreeMap<SliceKey, Slice>> {
    let good = |key: &SliceKey, backend: &Backend| {
        Family::of(backend.address) == key.family
            && (members
                .get(&key.source)
                .is_some_and(|m| m.owned.iter().chain(&m.tunnel).any(|p| p.contains(backend.address)))
                || (key.source == *us && hosts.contains_key(&backend.address)))
    };
    let bad: Vec<(&SliceKey, &Slice)> =
        slices.iter().filter(|(key, slice)| !slice.backends.iter().all(|b| good(key, b))).collect();
    if bad.is_empty() {
        return Cow::Borrowed(slices);
    }
    let mut result = slices.clone();
    for (key, slice) in bad {
        let first = slice.backends.iter().find(|b| !good(key, b)).map(|b| b.address);
        let kept: Vec<Backend> = slice.backends.iter().filter(|b| good(key, b)).cloned().collect();
        if let Some(first) = first {
            let text = format!(
                "{} backends of cluster {} are outside its ranges ({first} is one); they are not used",
                slice.backends.len() - kept.len(),
                key.source
            );
            findings.error("BackendOutsideGrant", format!("serviceimport {}", key.service), text);
        }
        if let Some(slice) = result.get_mut(key) {
            slice.backends = kept;
        }
    }
    Cow::Owned(result)
}
