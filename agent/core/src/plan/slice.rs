//! Imported EndpointSlices: one source cluster, one family and one set of ports each (mcs 20, 24 to 26).

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{Backend, Backends, ClusterId, Family, Port, ServiceType};
use tombolo_proto::trust::Member;

use super::derived;
use super::eligible::{Verdict, View, target};
use super::findings::Findings;
use super::service::{Derived, Sources};
use crate::known::Objects;
use crate::merge::Exposed;
use crate::object::{Import, ServiceKey, Slice, SliceKey};
use crate::world::ClusterWorld;

/// Backends of a slice.
const MAX: usize = 100;
/// Slices of one shard and family.
const PER_SHARD: u32 = 2048;

/// Slices of one shard and family of another cluster: as many sets of target ports may its backends have.
const PER_FOREIGN_SHARD: u32 = 64;
/// Slices that one other cluster may have here.
pub(crate) const MAX_FOREIGN: usize = 30_000;

/// Plans the slices. A shard of a statement becomes one slice for each set of ports (and hundred backends): a slice
/// changes when its shard does.
pub(crate) fn slices(
    sources: &Sources<'_>,
    services: &BTreeMap<ServiceKey, Derived<'_>>,
    imports: &Objects<ServiceKey, Import>,
    existing: (&BTreeMap<ServiceKey, Import>, &BTreeSet<SliceKey>),
    findings: &mut Findings,
) -> Objects<SliceKey, Slice> {
    let world = sources.world;
    let mut objects = Objects::default();
    let mut counts: BTreeMap<&ClusterId, Count> = BTreeMap::new();
    for (service, derived) in services {
        let Some(import) = imports.set.get(service).or_else(|| existing.0.get(service)) else { continue };
        for (&cluster, exposed) in &derived.exposed {
            let own;
            let (member, shards): (&Member, Vec<(u32, &Backends)>) = if *cluster == world.cluster {
                own = sources.own.and_then(|own| own.get(service));
                let shards = own.iter().flat_map(|own| &own.shards).map(|(n, s)| (*n, s)).collect();
                (&world.own, shards)
            } else {
                let Some(foreign) = world.foreign.get(cluster) else { continue };
                let shards = foreign.backends.get(service).into_iter().flatten().map(|(n, s)| (*n, s));
                (&foreign.member, shards.collect())
            };
            let foreign = *cluster != world.cluster;
            let per_shard = if foreign { PER_FOREIGN_SHARD } else { PER_SHARD };
            let count = counts.entry(cluster).or_default();
            let mut outside = 0;
            for (number, shard) in shards.into_iter().filter(|(n, _)| *n < Backends::MAX_SHARDS) {
                for &family in &import.families {
                    let key = |index| SliceKey {
                        service: service.clone(),
                        source: cluster.clone(),
                        family,
                        index: number * PER_SHARD + index,
                    };
                    if foreign && count.taken >= MAX_FOREIGN {
                        count.lost = true;
                        continue;
                    }
                    let mut list = divide(shard, family, import, exposed, member, &mut outside);
                    list.iter_mut().for_each(|slice| slice.derived = derived::is_carried(world, import));
                    let hosts = (!foreign).then(|| sources.own?.get(service)).flatten().map(|own| &own.hosts);
                    for backend in list.iter_mut().flat_map(|slice| &mut slice.backends) {
                        if let Some(real) = hosts.and_then(|hosts| hosts.get(&backend.address)) {
                            backend.address = *real;
                        }
                    }
                    count.lost |= list.len() > per_shard as usize;
                    count.taken += list.len().min(per_shard as usize);
                    objects.set.extend((0..per_shard).zip(list).map(|(index, slice)| (key(index), slice)));
                }
            }
            if outside > 0 {
                report(cluster, service, outside, findings);
            }
        }
    }
    for (cluster, _) in counts.iter().filter(|(_, count)| count.lost) {
        let text = format!(
            "states more EndpointSlices than are made here (in all {MAX_FOREIGN} of a cluster, {PER_FOREIGN_SHARD} of a \
             shard of backends with as many sets of target ports); the rest is not used"
        );
        findings.error("TooManySlices", format!("cluster {cluster}"), text);
    }
    if world.clusterset.is_none() {
        withhold(world, imports, existing.0, &mut objects.set);
    }
    // What came from somebody who is not at hand stays, as long as its service does.
    let stays = |key: &&SliceKey| {
        services.contains_key(&key.service) && sources.unknown(&key.source, &key.service.namespace)
    };
    objects.keep = existing.1.iter().filter(stays).cloned().collect();
    objects
}

/// Under Kubernetes others balance, by what these slices say: a backend that is not eligible is not ready there (it goes on
/// serving). A cluster counts as reached while any node that is ready reaches it. Nodes of a directory balance
/// themselves, each by what itself knows, and a slice says what its cluster stated.
fn withhold(
    world: &ClusterWorld,
    imports: &Objects<ServiceKey, Import>,
    existing: &BTreeMap<ServiceKey, Import>,
    set: &mut BTreeMap<SliceKey, Slice>,
) {
    let unreached = unreached(world);
    let view = View { cluster: &world.cluster, unreached: &unreached };
    let mut by_service: BTreeMap<&ServiceKey, Vec<(&SliceKey, &Slice)>> = BTreeMap::new();
    for (key, slice) in &*set {
        by_service.entry(&key.service).or_default().push((key, slice));
    }
    let mut out: BTreeSet<SliceKey> = BTreeSet::new();
    for (service, slices) in by_service {
        let Some(import) = imports.set.get(service).or_else(|| existing.get(service)) else { continue };
        let headless = view.of_service(import, &slices);
        for (key, slice) in &slices {
            let used = |verdicts: &BTreeMap<&ClusterId, Verdict>| {
                verdicts.get(&key.source).is_none_or(|verdict| *verdict == Verdict::Used)
            };
            // A slice has several ports and one readiness: it is used while any of them is.
            let used = match import.kind {
                ServiceType::Headless => used(&headless),
                ServiceType::ClusterSetIP => {
                    let serves = |p: &&Port| target(slice, p).is_some();
                    let mut ports = import.ports.iter().filter(serves);
                    ports.any(|port| used(&view.of_port(import, &slices, port, key.family)))
                }
            };
            if !used {
                out.insert((*key).clone());
            }
        }
    }
    for key in out {
        for backend in set.get_mut(&key).into_iter().flat_map(|slice| &mut slice.backends) {
            backend.ready = false;
        }
    }
}

/// Clusters that every ready node says no way from it leads to.
pub(crate) fn unreached(world: &ClusterWorld) -> BTreeSet<ClusterId> {
    let (Some(nodes), Some(told)) = (world.nodes.get(), world.tunnel_nodes.get()) else {
        return BTreeSet::new();
    };
    let ready = told.iter().filter(|(name, _)| nodes.get(*name).is_some_and(|node| node.ready));
    let sets = ready.map(|(_, node)| node.unreached.clone());
    sets.reduce(|a, b| a.intersection(&b).cloned().collect()).unwrap_or_default()
}

/// Of one cluster.
#[derive(Default)]
struct Count {
    taken: usize,
    lost: bool,
}

fn report(cluster: &ClusterId, service: &ServiceKey, outside: usize, findings: &mut Findings) {
    let text = format!(
        "states {outside} backends of {service} outside of its own ranges; they are not used. \
         A mistake there, or an attempt to draw traffic elsewhere"
    );
    findings.error("BackendOutsideGrant", format!("cluster {cluster}"), text);
}

/// One shard's slices of a family, in order of their ports.
fn divide(
    shard: &Backends,
    family: Family,
    import: &Import,
    exposed: &[Exposed],
    member: &Member,
    outside: &mut usize,
) -> Vec<Slice> {
    let mut by_ports: BTreeMap<Vec<Port>, BTreeSet<&Backend>> = BTreeMap::new();
    for group in &shard.groups {
        let ports = target_ports(&group.ports, exposed);
        // Of a service without ports (headless) names alone count; else a backend without one has no use.
        if ports.is_empty() && !import.ports.is_empty() {
            continue;
        }
        let wanted = group.backends.iter().filter(|b| Family::of(b.address) == family);
        let (good, bad): (Vec<&Backend>, Vec<&Backend>) = wanted.partition(|b| member.owns(b.address));
        *outside += bad.len();
        by_ports.entry(ports).or_default().extend(good);
    }
    let mut slices = Vec::new();
    for (ports, backends) in by_ports {
        let backends: Vec<Backend> = backends.into_iter().cloned().collect();
        for part in backends.chunks(MAX) {
            slices.push(Slice { ports: ports.clone(), backends: part.to_vec(), derived: false });
        }
    }
    slices
}

/// A group's target ports under the names of the derived service's ports.
fn target_ports(targets: &[Port], exposed: &[Exposed]) -> Vec<Port> {
    let find = |e: &Exposed| {
        let same = |t: &&Port| t.name == e.own.name && t.protocol == e.own.protocol;
        targets.iter().find(same).map(|t| Port { port: t.port, ..e.merged.clone() })
    };
    exposed.iter().filter_map(find).collect()
}
