//! The cluster's plan in pieces, so that it costs what changed: what the cluster says of itself, and one derived
//! service at a time.
//!
//! All services planned one after the other by name, from nothing, give what [`super::cluster`] gives. Later the order
//! in which they came counts where they share: whoever has a ClusterSetIP keeps it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{ClusterId, Endpoint, Family, NodeName, Record, RecordKey, Scope, ServiceType};

use super::address::Pools;
use super::export::{self, Exports};
use super::findings::Findings;
use super::service::{self, Sources};
use super::vip::is_vip;
use super::{address, conflict, derived, endpoint, is_stated, node_records, records, slice};
use crate::finding::Finding;
use crate::object::{Condition, DerivedService, ExportStatus, Import, ServiceKey, Slice, SliceKey};
use crate::shelf::Shelf;
use crate::world::{ClusterWorld, ClustersetRanges};

/// What a cluster says of itself. Copies, and plans that were made of one another, share what they have in common.
#[derive(Debug, Clone)]
pub struct OwnPlan {
    /// Its statement; no scope is empty.
    pub records: BTreeMap<Scope, Shelf<RecordKey, Record>>,
    /// Its nodes.
    pub nodes: BTreeMap<NodeName, Endpoint>,
    /// Records of those of them that it does not state, for the own MemberNodes.
    pub unstated: BTreeMap<RecordKey, Record>,
    /// What is wrong.
    pub findings: Vec<Finding>,
    exports: Exports,
}

impl OwnPlan {
    /// Services whose part by this cluster is another than in `old`.
    pub fn changed(&self, old: Option<&Self>) -> BTreeSet<ServiceKey> {
        match old {
            None => self.exports.good.keys().cloned().collect(),
            Some(old) => self.exports.good.changed(&old.exports.good).into_iter().cloned().collect(),
        }
    }

    /// How its users' ServiceExports stand, without the condition `Conflict`: that one is the services'.
    pub fn statuses(&self) -> &Shelf<ServiceKey, ExportStatus> {
        &self.exports.statuses
    }
}

/// Plans what the cluster says of itself; exports that are as they were in `before` are taken from there. None while an
/// input is unknown. Other clusters do not matter.
pub fn own(world: &ClusterWorld, before: Option<&OwnPlan>) -> Option<OwnPlan> {
    let mut findings = Findings::default();
    let endpoints = endpoint::endpoints(world, &mut findings);
    let exports = export::exports(world, endpoints.as_ref(), before.map(|before| &before.exports))?;
    let nodes = endpoints?;
    exports.tell(&mut findings);
    Some(OwnPlan {
        records: records(&exports, &nodes),
        unstated: node_records(&nodes, |endpoint| !is_stated(endpoint)),
        nodes,
        findings: findings.into_vec(),
        exports,
    })
}

/// Clusters that no ready node of this one has a way to, as nodes say: where others balance, what comes from there is not
/// ready while another cluster has the service.
pub fn unreached(world: &ClusterWorld) -> BTreeSet<ClusterId> {
    slice::unreached(world)
}

/// What the services share: whose each ClusterSetIP is, and how much one other cluster has here.
#[derive(Debug)]
pub struct Shared {
    us: ClusterId,
    ranges: Option<ClustersetRanges>,
    holders: BTreeMap<IpAddr, ServiceKey>,
    had: BTreeMap<ServiceKey, Had>,
    pools: Option<Pools>,
    /// Services and slices of each other cluster.
    counts: BTreeMap<ClusterId, (usize, usize)>,
}

/// What one service has of it.
#[derive(Debug, Default)]
struct Had {
    ips: Vec<IpAddr>,
    clusters: BTreeSet<ClusterId>,
    counts: BTreeMap<ClusterId, (usize, usize)>,
}

impl Shared {
    /// With the imports as they are: their ClusterSetIPs stick. Of two that have one address the lower name keeps it.
    pub fn new(
        us: ClusterId,
        ranges: Option<ClustersetRanges>,
        existing: &BTreeMap<ServiceKey, Import>,
    ) -> Self {
        let mut shared = Self {
            us,
            ranges,
            holders: BTreeMap::new(),
            had: BTreeMap::new(),
            pools: None,
            counts: BTreeMap::new(),
        };
        for (key, import) in existing.iter().filter(|(_, i)| i.kind == ServiceType::ClusterSetIP) {
            let ips = shared.keeps(key, import);
            shared.hold(key, Had { ips, clusters: import.clusters.clone(), counts: BTreeMap::new() });
        }
        shared
    }

    /// Which addresses of an import stay: one a family.
    fn keeps(&self, key: &ServiceKey, import: &Import) -> Vec<IpAddr> {
        let mut ips: Vec<IpAddr> = Vec::new();
        for &ip in &import.ips {
            let good = self.ranges.as_ref().is_none_or(|ranges| is_vip(ranges, ip));
            let free = self.holders.get(&ip).is_none_or(|holder| holder == key);
            if good && free && !ips.iter().any(|other| Family::of(*other) == Family::of(ip)) {
                ips.push(ip);
            }
        }
        ips
    }

    fn hold(&mut self, key: &ServiceKey, had: Had) {
        for ip in &had.ips {
            self.holders.insert(*ip, key.clone());
            if let Some(pools) = &mut self.pools {
                pools.take(*ip);
                pools.charge(&self.us, &had.clusters, Family::of(*ip), 1);
            }
        }
        for (cluster, (services, slices)) in &had.counts {
            let count = self.counts.entry(cluster.clone()).or_default();
            *count = (count.0 + services, count.1 + slices);
        }
        self.had.insert(key.clone(), had);
    }

    fn release(&mut self, key: &ServiceKey) {
        let Some(had) = self.had.remove(key) else { return };
        for ip in &had.ips {
            self.holders.remove(ip);
            if let Some(pools) = &mut self.pools {
                pools.free(*ip);
                pools.charge(&self.us, &had.clusters, Family::of(*ip), -1);
            }
        }
        for (cluster, (services, slices)) in &had.counts {
            if let Some(count) = self.counts.get_mut(cluster) {
                *count = (count.0.saturating_sub(*services), count.1.saturating_sub(*slices));
            }
        }
    }

    fn pools(&mut self, ranges: &ClustersetRanges) -> &mut Pools {
        if self.pools.is_none() {
            let mut pools = Pools::new(ranges);
            for had in self.had.values() {
                for ip in &had.ips {
                    pools.take(*ip);
                    pools.charge(&self.us, &had.clusters, Family::of(*ip), 1);
                }
            }
            self.pools = Some(pools);
        }
        self.pools.get_or_insert_with(|| Pools::new(ranges))
    }

    /// Gives an import its addresses: what it has, else new ones.
    fn assign(
        &mut self,
        key: &ServiceKey,
        before: Option<&Import>,
        import: &mut Import,
        findings: &mut Findings,
    ) {
        if import.kind != ServiceType::ClusterSetIP {
            return;
        }
        let before = before.filter(|before| before.kind == ServiceType::ClusterSetIP);
        let kept = before.map(|before| self.keeps(key, before)).unwrap_or_default();
        let Some(ranges) = self.ranges else {
            import.ips = kept.into_iter().filter(|ip| import.families.contains(&Family::of(*ip))).collect();
            return;
        };
        address::fit_families(&ranges, key, import, findings);
        let mut ips = Vec::new();
        for family in import.families.clone() {
            if let Some(ip) = kept.iter().find(|ip| Family::of(**ip) == family) {
                ips.push(*ip);
                continue;
            }
            let us = self.us.clone();
            let pools = self.pools(&ranges);
            if let Some(greedy) = pools.greedy(&us, import, family) {
                for cluster in greedy {
                    let text = "its services have half of the ClusterSetIPs here; more of them have none. Configure a \
                                larger range, or ask whether it means to export so many";
                    findings.error("ClusterSetIPShareFull", format!("cluster {cluster}"), text);
                }
                continue;
            }
            match pools.next(key, family) {
                Some(ip) => {
                    ips.push(ip);
                }
                None => {
                    let text = format!(
                        "the range of {family:?} is full: imports have no ClusterSetIP; configure a larger one"
                    );
                    findings.error("ClusterSetIPRangeFull", "clusterset", text);
                }
            }
        }
        import.ips = ips;
    }
}

/// One derived service, as it should be.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its import; None: there is none, or it [`Self::stays`].
    pub import: Option<Import>,
    /// The import stays as it is: somebody who is in it is unknown.
    pub stays: bool,
    /// The Service that carries its ClusterSetIPs under Kubernetes; like the import it may stay.
    pub derived: Option<DerivedService>,
    /// Its slices.
    pub slices: BTreeMap<SliceKey, Slice>,
    /// Slices that stay as they are.
    pub keep: BTreeSet<SliceKey>,
    /// Condition `Conflict` of the own export, if it is known.
    pub conflict: Option<Condition>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Plans one service. In `world` there need be no other service than this one; what the own cluster has of it comes
/// from `own` (None: unknown). None while namespaces, imports, slices or derived Services are unknown.
pub fn service(
    world: &mut ClusterWorld,
    own: Option<&OwnPlan>,
    key: &ServiceKey,
    shared: &mut Shared,
) -> Option<Piece> {
    let mut findings = Findings::default();
    let known = world.namespaces.is_known() && world.imports.is_known() && world.slices.is_known();
    if !(known && derived::is_known(world)) {
        return None;
    }
    let had = shared.had.get(key).map(|had| had.ips.clone());
    shared.release(key);
    for (cluster, foreign) in &mut world.foreign {
        let full = shared.counts.get(cluster).is_some_and(|(services, _)| *services >= service::MAX_FOREIGN);
        if full && foreign.exports.contains_key(key) {
            foreign.exports.clear();
            let text = format!(
                "exports more than {} services; those that came later are not imported",
                service::MAX_FOREIGN
            );
            findings.error("TooManyServices", format!("cluster {cluster}"), text);
        }
    }
    let world = &*world;
    let part = own.map(|own| {
        let mut part = Shelf::new();
        own.exports
            .good
            .get_shared(key)
            .into_iter()
            .for_each(|own| part.insert_shared(key.clone(), own.clone()));
        part
    });
    let sources = Sources { world, own: part.as_ref() };
    let services = service::services(&sources, &mut findings)?;
    let existing = world.imports.get()?;
    let mut imports = service::imports(&services);
    let mut now = Had::default();
    for (service, import) in &mut imports.set {
        shared.assign(service, existing.get(service), import, &mut findings);
    }
    let (mut carriers, waiting) = derived::carriers(world, &mut imports, &mut findings);
    if let Some(import) = imports.set.get(key) {
        now.ips.clone_from(&import.ips);
        now.clusters.clone_from(&import.clusters);
    }
    if imports.keep.contains(key)
        && let Some(import) = existing.get(key)
    {
        now.ips = had.unwrap_or_else(|| shared.keeps(key, import));
        now.clusters.clone_from(&import.clusters);
    }
    let slices = world.slices.get()?;
    let mut slices = slice::slices(&sources, &services, &imports, (existing, slices), &mut findings);
    let mut lost = BTreeSet::new();
    slices.set.retain(|slice, _| {
        if slice.source == world.cluster {
            return true;
        }
        let others = shared.counts.get(&slice.source).map_or(0, |(_, slices)| *slices);
        let count = now.counts.entry(slice.source.clone()).or_default();
        let fits = others + count.1 < slice::MAX_FOREIGN;
        count.1 += usize::from(fits);
        if !fits {
            lost.insert(slice.source.clone());
        }
        fits
    });
    for cluster in lost {
        let text = format!(
            "states more EndpointSlices than are made here ({}); the rest is not used",
            slice::MAX_FOREIGN
        );
        findings.error("TooManySlices", format!("cluster {cluster}"), text);
    }
    for (cluster, foreign) in &world.foreign {
        if foreign.exports.contains_key(key) {
            now.counts.entry(cluster.clone()).or_default().0 = 1;
        }
    }
    shared.hold(key, now);
    let mut statuses = BTreeMap::new();
    if part.as_ref().is_some_and(|own| own.contains_key(key)) {
        statuses.insert(key.clone(), ExportStatus::default());
        conflict::conflicts(&sources, &services, &mut statuses);
    }
    Some(Piece {
        import: imports.set.remove(key).filter(|_| !waiting.contains(key)),
        derived: carriers.set.remove(key),
        stays: imports.keep.contains(key),
        slices: slices.set,
        keep: slices.keep,
        conflict: statuses.remove(key).and_then(|mut status| status.conditions.remove("Conflict")),
        findings: findings.into_vec(),
    })
}
