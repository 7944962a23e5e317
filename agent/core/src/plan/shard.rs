//! Divides a service's backends into records of about a hundred.
//!
//! A shard is a leaf of a binary tree over the hash of the address: a leaf with more than [`MAX`] addresses is split in
//! two, two that together have no more are one again. So the division depends on the addresses alone, and a backend
//! that comes or goes changes its own leaf (rarely: splits or joins it) and no other. A leaf's number is its path with a
//! leading one: the root is 1, its children are 2 and 3.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tombolo_proto::model::{Backend, BackendGroup, Backends, Port};

use super::hash::{octets, stable};

/// Backends of a shard; more only at [`MAX_DEPTH`].
const MAX: usize = 100;
/// Keeps numbers under [`Backends::MAX_SHARDS`].
const MAX_DEPTH: u32 = 9;

const _: () = assert!(1 << (MAX_DEPTH + 1) <= Backends::MAX_SHARDS);

/// Divides backends. Groups of equal ports become one, an address appears once in a group.
/// Also tells how many did not fit into what a shard may hold.
pub(crate) fn shards(groups: &[BackendGroup]) -> (BTreeMap<u32, Backends>, usize) {
    let mut by_ports: BTreeMap<Vec<Port>, BTreeMap<IpAddr, Backend>> = BTreeMap::new();
    for group in groups {
        let mut ports = group.ports.clone();
        ports.sort();
        ports.dedup();
        let place = by_ports.entry(ports).or_default();
        for backend in &group.backends {
            let known = place.entry(backend.address).or_insert_with(|| backend.clone());
            // While an endpoint moves between slices it is in both.
            known.ready |= backend.ready;
            known.serving |= backend.serving;
            known.terminating &= backend.terminating;
            known.hostname = known.hostname.take().max(backend.hostname.clone());
        }
    }
    let mut leaves = BTreeMap::new();
    let all = by_ports
        .iter()
        .flat_map(|(ports, list)| list.values().map(move |b| (stable(&[&octets(b.address)]), ports, b)))
        .collect();
    divide(all, 0, 1, &mut leaves);

    let mut lost = 0;
    let mut shards = BTreeMap::new();
    for (number, mut list) in leaves {
        list.sort_by_key(|(_, ports, backend)| (*ports, *backend));
        lost += list.len().saturating_sub(Backends::MAX_SHARD);
        let mut groups: Vec<BackendGroup> = Vec::new();
        for (_, ports, backend) in list.into_iter().take(Backends::MAX_SHARD) {
            match groups.last_mut() {
                Some(group) if group.ports == *ports => group.backends.push(backend.clone()),
                Some(_) | None => {
                    groups.push(BackendGroup { ports: ports.clone(), backends: vec![backend.clone()] });
                }
            }
        }
        shards.insert(number, Backends { groups });
    }
    (shards, lost)
}

type Leaf<'a> = Vec<(u64, &'a Vec<Port>, &'a Backend)>;

fn divide<'a>(list: Leaf<'a>, depth: u32, number: u32, leaves: &mut BTreeMap<u32, Leaf<'a>>) {
    if list.is_empty() {
        return;
    }
    if list.len() <= MAX || depth == MAX_DEPTH {
        leaves.insert(number, list);
        return;
    }
    let (left, right) = list.into_iter().partition(|(hash, ..)| (hash >> (63 - depth)) & 1 == 0);
    divide(left, depth + 1, number * 2, leaves);
    divide(right, depth + 1, number * 2 + 1, leaves);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn group(addresses: impl IntoIterator<Item = u32>) -> BackendGroup {
        let backend = |a: u32| Backend {
            address: IpAddr::V4(a.into()),
            hostname: None,
            ready: true,
            serving: true,
            terminating: false,
        };
        BackendGroup { ports: Vec::new(), backends: addresses.into_iter().map(backend).collect() }
    }

    proptest! {
        #[test]
        fn one_backend_moves_few(addresses in prop::collection::btree_set(any::<u32>(), 1..3000), other in any::<u32>()) {
            let (before, lost) = shards(&[group(addresses.iter().copied())]);
            prop_assert_eq!(lost, 0);
            let all: BTreeSet<IpAddr> = before.values().flat_map(Backends::addresses).collect();
            prop_assert_eq!(all.len(), addresses.len());
            prop_assert!(before.keys().all(|&n| n < Backends::MAX_SHARDS));
            prop_assert!(before.values().all(|s| s.addresses().len() <= MAX));

            let mut more = addresses.clone();
            more.insert(other);
            let (after, _) = shards(&[group(more.iter().rev().copied())]);
            let changed = before.keys().chain(after.keys()).collect::<BTreeSet<_>>();
            let changed = changed.into_iter().filter(|n| before.get(n) != after.get(n)).count();
            // A split writes two new and takes one away; splits of splits are rare, as halves are even.
            prop_assert!(changed <= 5, "{changed} shards changed");
        }
    }
}
