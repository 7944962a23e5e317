//! A node's plan, kept from one world to the next: planned anew is what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_proto::model::{Lane, NodeName};

use super::backend::Ranges;
use super::findings::Findings;
use super::local::{Exported, Frame, Local};
use super::{eligible, firewall, lane, peer, roster, route, rule};
use crate::desired::{Balance, Firewall, NodeDesired, Vip};
use crate::finding::Finding;
use crate::known::Section;
use crate::object::{Import, ServiceKey, Slice, SliceKey, slices_of};
use crate::shelf::Shelf;
use crate::world::{Members, NodeWorld};
use crate::zone::Zone;

/// Plans a node again and again. Whatever it planned before, it gives what [`super::node`] gives; a service costs when its
/// import or its slices change, and all else when anything else does.
#[derive(Debug, Default)]
pub struct Planner {
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    world: NodeWorld,
    rest: Rest,
    services: Services,
}

impl Planner {
    /// Plans a node; see [`super::node`].
    pub fn plan(&mut self, world: &NodeWorld) -> (NodeDesired, Vec<Finding>) {
        let kept = self.kept.take();
        let mut desired = NodeDesired::default();
        let Some(members) = world.members.get() else { return (desired, Vec::new()) };
        if !members.contains_key(&world.cluster) {
            desired.devices = Section::Set(Default::default());
            desired.routes = Section::Set(Default::default());
            desired.rules = Section::Set(Default::default());
        }
        let (Some(imports), Some(slices), Some(hosts)) =
            (world.imports.get(), world.slices.get(), world.hosts.get())
        else {
            return (desired, Vec::new());
        };
        let (rest, services) = match kept {
            Some(kept) if is_same_but_services(&kept.world, world) => (kept.rest, kept.services),
            kept => {
                let rest = Rest::of(world, members, hosts, desired);
                let services = kept.filter(|kept| kept.rest.frame == rest.frame).map(|kept| kept.services);
                (rest, services.unwrap_or_default())
            }
        };
        let mut kept = Kept { world: world.clone(), rest, services };
        kept.services.update(&kept.rest.frame, imports, slices);
        let result = kept.desired();
        self.kept = Some(kept);
        result
    }
}

impl Kept {
    fn desired(&self) -> (NodeDesired, Vec<Finding>) {
        let mut desired = self.rest.desired.clone();
        desired.zone = Section::Set(self.services.zone.clone());
        desired.firewall = Section::Set(Firewall {
            exported: self.services.exported.keys().copied().collect(),
            vips: self.services.vips.clone(),
            ..self.rest.firewall.clone()
        });
        let mut findings = self.rest.findings.clone();
        self.services.findings.values().for_each(|of| findings.extend(of));
        (desired, findings.into_vec())
    }
}

/// Whether two worlds differ in imports and slices at most.
fn is_same_but_services(old: &NodeWorld, new: &NodeWorld) -> bool {
    let NodeWorld {
        cluster,
        node,
        reach,
        clusterset,
        underlay_mtu,
        underlay,
        inner,
        hosts,
        members,
        imports: _,
        slices: _,
        health,
    } = new;
    old.cluster == *cluster
        && old.node == *node
        && old.reach == *reach
        && old.clusterset == *clusterset
        && old.underlay_mtu == *underlay_mtu
        && old.underlay == *underlay
        && old.inner == *inner
        && old.hosts == *hosts
        && old.members == *members
        && old.health == *health
}

/// All but the services.
#[derive(Debug)]
struct Rest {
    /// Without zone and firewall.
    desired: NodeDesired,
    firewall: Firewall,
    frame: Frame,
    findings: Findings,
}

impl Rest {
    fn of(
        world: &NodeWorld,
        members: &Members,
        hosts: &BTreeMap<IpAddr, NodeName>,
        mut desired: NodeDesired,
    ) -> Self {
        let mut findings = Findings::default();
        let stations = roster::stations(world, members, &mut findings);
        // What can be reached lane 0 tells; the others carry what it does.
        let (devices, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            peer::devices(world, members, &stations, &mut findings)
                .into_iter()
                .partition(|(number, _)| number.lane() == Lane::FIRST);
        let me = stations.get(&world.cluster).and_then(|own| own.get(&world.node));
        let claim = me.map(|me| me.claim.clone()).unwrap_or_default();
        let mut firewall = firewall::firewall(world, members, &claim);
        let frame = Frame {
            cluster: world.cluster.clone(),
            node: world.node.clone(),
            clusterset: world.clusterset,
            ranges: Ranges::of(&world.cluster, members, hosts),
            claim,
            unreached: eligible::unreached(world, &devices),
        };
        if members.contains_key(&world.cluster) {
            let (mut routes, narrow) = route::routes(world, members, &stations, &devices, &mut findings);
            firewall.narrow = narrow;
            let all: BTreeMap<_, _> = devices.into_iter().chain(others).collect();
            let lanes = lane::lanes(&world.health, &all, &mut routes, &mut findings);
            firewall.lanes = lanes;
            desired.rules = Section::Set(rule::rules(&routes, &all, lanes));
            desired.devices = Section::Set(all);
            desired.routes = Section::Set(routes);
        }
        Self { desired, firewall, frame, findings }
    }
}

/// All services, as they were planned last.
#[derive(Debug, Default)]
struct Services {
    imports: Shelf<ServiceKey, Import>,
    slices: Shelf<SliceKey, Slice>,
    locals: BTreeMap<ServiceKey, Local>,
    /// Imports that bear a ClusterSetIP: the first one has it.
    claimants: BTreeMap<IpAddr, BTreeSet<ServiceKey>>,
    claims: BTreeMap<ServiceKey, BTreeSet<IpAddr>>,
    zone: Zone,
    vips: Shelf<Vip, Balance>,
    /// And by how many services.
    exported: BTreeMap<Exported, usize>,
    findings: BTreeMap<ServiceKey, Findings>,
}

impl Services {
    /// Plans what differs from the last time. `frame` is the same for all that is kept.
    fn update(
        &mut self,
        frame: &Frame,
        imports: &Shelf<ServiceKey, Import>,
        slices: &Shelf<SliceKey, Slice>,
    ) {
        let changed: BTreeSet<ServiceKey> = imports.changed(&self.imports).into_iter().cloned().collect();
        let mut dirty: BTreeSet<ServiceKey> =
            slices.changed(&self.slices).into_iter().map(|key| key.service.clone()).collect();
        for key in &changed {
            let ips = imports.get(key).into_iter().flat_map(|import| frame.claims(import)).collect();
            dirty.extend(self.claim(key, ips));
        }
        dirty.extend(changed);
        self.imports = imports.clone();
        self.slices = slices.clone();
        let planned: Vec<(ServiceKey, Local, Local)> = dirty
            .into_iter()
            .map(|key| {
                let old = self.locals.remove(&key).unwrap_or_default();
                let holder = |ip: IpAddr| self.claimants.get(&ip).and_then(BTreeSet::first).cloned();
                let new = frame.local(&key, imports.get(&key), slices_of(slices, &key), holder);
                (key, old, new)
            })
            .collect();
        // What one loses another may have now.
        for (_, old, new) in &planned {
            old.vips.keys().filter(|vip| !new.vips.contains_key(vip)).for_each(|vip| {
                self.vips.remove(vip);
            });
        }
        for (key, old, new) in planned {
            for (vip, balance) in &new.vips {
                if self.vips.get(vip) != Some(balance) {
                    self.vips.insert(*vip, balance.clone());
                }
            }
            if old.entry != new.entry {
                self.zone.set(&key, new.entry.clone());
            }
            for exported in new.exported.difference(&old.exported) {
                *self.exported.entry(*exported).or_default() += 1;
            }
            for exported in old.exported.difference(&new.exported) {
                if let Some(count) = self.exported.get_mut(exported) {
                    *count -= 1;
                    if *count == 0 {
                        self.exported.remove(exported);
                    }
                }
            }
            if new.findings.is_empty() {
                self.findings.remove(&key);
            } else {
                self.findings.insert(key.clone(), new.findings.clone());
            }
            if new.is_anything() {
                self.locals.insert(key, new);
            }
        }
    }

    /// Notes which ClusterSetIPs an import bears now; returns whose plans change by that, beside its own.
    fn claim(&mut self, key: &ServiceKey, now: BTreeSet<IpAddr>) -> BTreeSet<ServiceKey> {
        let before = self.claims.remove(key).unwrap_or_default();
        let mut others = BTreeSet::new();
        for &ip in before.union(&now) {
            let all = self.claimants.entry(ip).or_default();
            let first = all.first().cloned();
            if now.contains(&ip) {
                all.insert(key.clone());
            } else {
                all.remove(key);
            }
            if all.first() != first.as_ref() {
                others.extend(all.iter().cloned());
            }
            if all.is_empty() {
                self.claimants.remove(&ip);
            }
        }
        if !now.is_empty() {
            self.claims.insert(key.clone(), now);
        }
        others
    }
}
