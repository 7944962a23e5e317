//! The derived services' plan, kept from one change to the next: what is planned anew is what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tombolo_agent_core::finding::Finding;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::{Condition, DerivedService, Import, ServiceKey, Slice, SliceKey, slices_of};
use tombolo_agent_core::plan::piece::{self, OwnPlan, Piece};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::world::{ClusterWorld, ClustersetRanges, Foreign, Topology};
use tombolo_proto::model::{ClusterId, Prefix};

use super::queue::{Cause, Credit, Queue};
use crate::api::Observed;
use crate::observe::origin::{self, Frame, Seen, View};

/// A batch's plan takes so long, or it has so many services, and writing it about as long again: nobody waits longer for
/// another's.
const BATCH: Duration = Duration::from_millis(15);
const BATCH_KEYS: usize = 64;
/// A service is charged at most so much.
const SERVICE: Duration = Duration::from_millis(5);
/// What was written is shown so much later at most; until then what is shown tells nothing.
const LAG: Duration = Duration::from_secs(2);
/// Objects of so many services are written anew, if need be, with every resync: what is damaged is mended.
const SCRUB: usize = 256;

/// What the services hang on, as the voice of the cluster knows it.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) frame: Arc<Frame>,
    pub(super) ranges: Option<ClustersetRanges>,
    pub(super) topology: Topology,
    pub(super) own: Arc<OwnPlan>,
}

/// A service as it should be.
#[derive(Debug, Default)]
struct Held {
    import: Option<Import>,
    derived: Option<DerivedService>,
    slices: Shelf<SliceKey, Slice>,
    conflict: Option<Condition>,
    /// When all of it was written; None: it is to be.
    written: Option<Duration>,
}

/// What one turn's services need written.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) cause: Cause,
    pub(super) keys: BTreeSet<ServiceKey>,
    pub(super) derived: (BTreeMap<ServiceKey, DerivedService>, BTreeSet<ServiceKey>),
    pub(super) imports: (BTreeMap<ServiceKey, Import>, BTreeSet<ServiceKey>),
    pub(super) slices: (BTreeMap<SliceKey, Slice>, BTreeSet<SliceKey>),
}

impl Batch {
    /// How many objects it writes and removes.
    pub(super) fn objects(&self) -> u32 {
        let count = self.derived.0.len()
            + self.derived.1.len()
            + self.imports.0.len()
            + self.imports.1.len()
            + self.slices.0.len()
            + self.slices.1.len();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// See the module.
pub(super) struct Desk {
    us: ClusterId,
    seen: Seen,
    queue: Queue,
    shared: Option<(Option<ClustersetRanges>, piece::Shared)>,
    world: Option<ClusterWorld>,
    frame: Option<Arc<Frame>>,
    own: Option<Arc<OwnPlan>>,
    planned: BTreeMap<ServiceKey, Held>,
    /// Planned, but not all written: these wait again, perhaps for long.
    failed: BTreeSet<ServiceKey>,
    findings: BTreeMap<ServiceKey, Vec<Finding>>,
    /// How long comparing all with what is shown took, and what was shown then.
    compared: (Credit, Option<Arc<Observed>>),
    scrubbed: Option<ServiceKey>,
}

impl Desk {
    pub(super) fn new(us: ClusterId) -> Self {
        Self {
            us,
            seen: Seen::default(),
            queue: Queue::default(),
            shared: None,
            world: None,
            frame: None,
            own: None,
            planned: BTreeMap::new(),
            failed: BTreeSet::new(),
            findings: BTreeMap::new(),
            compared: (Credit::new(), None),
            scrubbed: None,
        }
    }

    /// Finds what changed, and lines it up.
    pub(super) fn gather(&mut self, view: &View, observed: &Arc<Observed>, said: &Said, now: Duration) {
        let (Some(own), Some(namespaces)) = (&said.frame.own, observed.namespaces.get()) else { return };
        let news = self.seen.news(view, &self.us);
        let mut foreign = BTreeMap::new();
        let mut unknown = BTreeSet::new();
        for (cluster, member) in &said.frame.others {
            let Some(state) = view.states.get(cluster) else {
                unknown.insert(cluster.clone());
                continue;
            };
            let value = Foreign {
                member: member.clone(),
                position: state.position(),
                nodes: BTreeMap::new(),
                exports: BTreeMap::new(),
                backends: BTreeMap::new(),
                unknown_namespaces: origin::missing(&view.interest, state),
            };
            foreign.insert(cluster.clone(), value);
        }
        let world = ClusterWorld {
            cluster: self.us.clone(),
            own: own.clone(),
            clusterset: said.ranges,
            topology: said.topology,
            // Where others balance, which clusters no node reaches.
            nodes: if said.ranges.is_none() { observed.nodes.clone() } else { Known::No },
            tunnel_nodes: if said.ranges.is_none() { observed.tunnel_nodes.clone() } else { Known::No },
            stated: Known::No,
            namespaces: Known::Yes(namespaces.clone()),
            services: Known::No,
            exports: Known::No,
            backends: Known::No,
            imports: Known::Yes(BTreeMap::new()),
            slices: Known::Yes(BTreeSet::new()),
            derived: Known::Yes(BTreeMap::new()),
            service_families: observed.service_ranges.iter().map(Prefix::family).collect(),
            foreign,
            unknown,
        };
        if self.shared.as_ref().is_none_or(|(ranges, _)| *ranges != said.ranges) {
            let shown = observed.imports.get().into_iter().flatten();
            let mut imports: BTreeMap<_, _> =
                shown.map(|(key, import)| (key.clone(), import.clone())).collect();
            for (key, held) in &self.planned {
                imports.remove(key);
                imports.extend(held.import.iter().map(|import| (key.clone(), import.clone())));
            }
            let shared = piece::Shared::new(self.us.clone(), said.ranges, &imports);
            self.shared = Some((said.ranges, shared));
            self.world = None;
        }
        let before = self.world.replace(world);
        let first = self.own.is_none();
        let same = self.own.as_ref().is_some_and(|own| Arc::ptr_eq(own, &said.own));
        let changed = if same { BTreeSet::new() } else { said.own.changed(self.own.as_deref()) };
        (self.frame, self.own) = (Some(said.frame.clone()), Some(said.own.clone()));
        match before {
            Some(before) if !first => {
                self.reframed(&before, view, observed);
                self.queue.add(None, changed);
            }
            _ => self.everything(view, observed),
        }
        for (cluster, keys) in news {
            self.queue.add(Some(cluster), keys);
        }
        if self.compared.0.due() <= now
            && self.compared.1.as_ref().is_none_or(|last| !Arc::ptr_eq(last, observed))
        {
            let begun = Instant::now();
            let late = self.compare(observed, now);
            self.compared.1 = (!late).then(|| observed.clone());
            self.compared.0.charge(now, begun.elapsed());
        }
    }

    /// Lines up what hangs on who is a member, and on what is known of each.
    fn reframed(&mut self, before: &ClusterWorld, view: &View, observed: &Observed) {
        let Some(world) = &self.world else { return };
        if before.own != world.own
            || before.namespaces != world.namespaces
            || before.topology != world.topology
            || before.service_families != world.service_families
        {
            return self.everything(view, observed);
        }
        let mut clusters: BTreeSet<&ClusterId> =
            before.unknown.symmetric_difference(&world.unknown).collect();
        let unreached = (piece::unreached(before), piece::unreached(world));
        clusters.extend(unreached.0.symmetric_difference(&unreached.1));
        clusters.extend(before.foreign.keys().filter(|c| !world.foreign.contains_key(*c)));
        for (cluster, new) in &world.foreign {
            let same = before.foreign.get(cluster).is_some_and(|old| {
                old.member == new.member && old.unknown_namespaces == new.unknown_namespaces
            });
            if !same {
                clusters.insert(cluster);
            }
        }
        if clusters.is_empty() {
            return;
        }
        let mut keys: BTreeMap<ClusterId, BTreeSet<ServiceKey>> = BTreeMap::new();
        for cluster in clusters {
            let of = keys.entry(cluster.clone()).or_default();
            self.seen.all(cluster, of);
            let with = |import: &Import| import.clusters.contains(cluster);
            of.extend(
                self.planned
                    .iter()
                    .filter(|(_, h)| h.import.as_ref().is_some_and(with))
                    .map(|(k, _)| k.clone()),
            );
        }
        for (cluster, keys) in keys {
            self.queue.add(Some(cluster), keys);
        }
        // Whether they conflict with anybody is known, or not known, anew.
        let own: Vec<ServiceKey> = self.own.iter().flat_map(|own| own.statuses().keys().cloned()).collect();
        self.queue.add(None, own);
    }

    fn everything(&mut self, view: &View, observed: &Observed) {
        let own: Vec<ServiceKey> = self.own.iter().flat_map(|own| own.statuses().keys().cloned()).collect();
        self.queue.add(None, own);
        for cluster in view.states.keys().filter(|cluster| **cluster != self.us) {
            let mut keys = BTreeSet::new();
            self.seen.all(cluster, &mut keys);
            self.queue.add(Some(cluster.clone()), keys);
        }
        let shown = observed.imports.get().into_iter().flatten();
        let planned = self.planned.iter().filter_map(|(key, held)| Some((key, held.import.as_ref()?)));
        let all: Vec<_> =
            shown.chain(planned).map(|(key, import)| (self.cause(import), key.clone())).collect();
        all.into_iter().for_each(|(cause, key)| self.queue.add(cause, [key]));
        let derived = observed.derived.get().into_iter().flat_map(Shelf::keys);
        self.queue.add(None, derived.cloned().collect::<Vec<_>>());
        for slice in observed.slices.get().into_iter().flat_map(Shelf::keys) {
            let cause = (slice.source != self.us).then(|| slice.source.clone());
            self.queue.add(cause, [slice.service.clone()]);
        }
    }

    /// On whose account an import is planned again.
    fn cause(&self, import: &Import) -> Cause {
        if import.clusters.contains(&self.us) { None } else { import.clusters.first().cloned() }
    }

    /// Lines up what is shown otherwise than it was written. True if some of it was written too lately to tell.
    fn compare(&mut self, observed: &Observed, now: Duration) -> bool {
        let (Some(imports), Some(derived), Some(slices)) =
            (observed.imports.get(), observed.derived.get(), observed.slices.get())
        else {
            return true;
        };
        let mut odd: BTreeSet<&ServiceKey> = BTreeSet::new();
        for (key, import) in imports {
            let held = self.planned.get(key).and_then(|held| held.import.as_ref());
            if held != Some(import) {
                odd.insert(key);
            }
        }
        for (key, service) in derived {
            let held = self.planned.get(key).and_then(|held| held.derived.as_ref());
            if held != Some(service) {
                odd.insert(key);
            }
        }
        let mut counts: BTreeMap<&ServiceKey, usize> = BTreeMap::new();
        for (key, slice) in slices {
            *counts.entry(&key.service).or_default() += 1;
            let held = self.planned.get(&key.service).and_then(|held| held.slices.get(key));
            if held != Some(slice) {
                odd.insert(&key.service);
            }
        }
        for (key, held) in &self.planned {
            let there = imports.contains_key(key) == held.import.is_some()
                && derived.contains_key(key) == held.derived.is_some()
                && counts.get(key).copied().unwrap_or(0) == held.slices.len();
            if !there {
                odd.insert(key);
            }
        }
        let mut late = false;
        let mut again = Vec::new();
        for key in odd {
            match self.planned.get(key).map(|held| held.written) {
                Some(Some(at)) if now < at + LAG => late = true,
                Some(None) => {}
                Some(Some(_)) | None => again.push(key.clone()),
            }
        }
        for key in again {
            if let Some(held) = self.planned.get_mut(&key) {
                held.written = None;
            }
            self.queue.add(None, [key]);
        }
        late
    }

    /// Lines up some services to be written whatever is shown of them: a file that is damaged is shown as it was good.
    pub(super) fn scrub(&mut self) {
        let after = self.scrubbed.take();
        let next = self.planned.iter_mut().filter(|(key, _)| after.as_ref().is_none_or(|after| *key > after));
        let mut keys = Vec::new();
        for (key, held) in next.take(SCRUB) {
            held.written = None;
            keys.push(key.clone());
        }
        self.scrubbed = keys.last().cloned();
        self.queue.add(None, keys);
    }

    /// Plans the services of whose turn it is. None: nobody's.
    pub(super) fn batch(&mut self, view: &View, observed: &Observed, now: Duration) -> Option<Batch> {
        let cause = self.queue.next(now)?;
        let begun = Instant::now();
        let mut batch = Batch { cause: cause.clone(), ..Batch::default() };
        while batch.keys.len() < BATCH_KEYS && begun.elapsed() < BATCH {
            let Some(key) = self.queue.take(&cause) else { break };
            self.piece(view, observed, key, &mut batch);
        }
        Some(batch)
    }

    fn piece(&mut self, view: &View, observed: &Observed, key: ServiceKey, batch: &mut Batch) {
        let (Some(world), Some((_, shared))) = (&mut self.world, &mut self.shared) else { return };
        let (Some(imports), Some(services), Some(slices)) =
            (observed.imports.get(), observed.derived.get(), observed.slices.get())
        else {
            return;
        };
        let held = self.planned.remove(&key);
        let shown = imports.get(&key);
        let existing = match &held {
            Some(held) => held.import.clone(),
            None => shown.cloned(),
        };
        let carrier = match &held {
            Some(held) => held.derived.clone(),
            None => services.get(&key).cloned(),
        };
        let mut there: BTreeMap<SliceKey, Slice> =
            slices_of(slices, &key).map(|(slice, value)| (slice.clone(), value.clone())).collect();
        if let Some(held) = &held {
            there.extend(held.slices.iter().map(|(slice, value)| (slice.clone(), value.clone())));
        }
        world.imports = Known::Yes(existing.iter().map(|import| (key.clone(), import.clone())).collect());
        world.slices = Known::Yes(there.keys().cloned().collect());
        world.derived = Known::Yes(carrier.iter().map(|service| (key.clone(), service.clone())).collect());
        let mut findings = Vec::new();
        for (cluster, foreign) in &mut world.foreign {
            foreign.exports.clear();
            foreign.backends.clear();
            let Some(state) = view.states.get(cluster) else { continue };
            let (export, shards) = origin::part(cluster, state, &key, &mut findings);
            foreign.exports.extend(export.map(|export| (key.clone(), export)));
            if !shards.is_empty() {
                foreign.backends.insert(key.clone(), shards);
            }
        }
        let Some(piece) = piece::service(world, self.own.as_deref(), &key, shared) else { return };
        let Piece { import, stays, derived, slices, keep, conflict, findings: found } = piece;
        findings.extend(found);
        if findings.is_empty() {
            self.findings.remove(&key);
        } else {
            self.findings.insert(key.clone(), findings);
        }
        let written = held.as_ref().is_some_and(|held| held.written.is_some());
        let mut new = Held { conflict, ..Held::default() };
        if stays {
            (new.import, new.derived) = (existing, carrier);
        } else {
            match &derived {
                Some(service) if !written || carrier.as_ref() != Some(service) => {
                    batch.derived.0.insert(key.clone(), service.clone());
                }
                Some(_) => {}
                None if carrier.is_some() || services.contains_key(&key) => {
                    batch.derived.1.insert(key.clone());
                }
                None => {}
            }
            new.derived = derived;
            match &import {
                Some(import) if !written || existing.as_ref() != Some(import) => {
                    batch.imports.0.insert(key.clone(), import.clone());
                }
                Some(_) => {}
                None if existing.is_some() || shown.is_some() => {
                    batch.imports.1.insert(key.clone());
                }
                None => {}
            }
            new.import = import;
        }
        for (slice, value) in &slices {
            if !written || there.get(slice) != Some(value) {
                batch.slices.0.insert(slice.clone(), value.clone());
            }
        }
        for (slice, value) in there {
            if keep.contains(&slice) {
                new.slices.insert(slice, value);
            } else if !slices.contains_key(&slice) {
                batch.slices.1.insert(slice);
            }
        }
        new.slices.extend(slices);
        if new.import.is_some() || new.derived.is_some() || !new.slices.is_empty() {
            self.planned.insert(key.clone(), new);
        }
        batch.keys.insert(key);
    }

    /// The Services that carry ClusterSetIPs, as they came to be: an import follows the addresses of its own.
    pub(super) fn carried(&mut self, services: BTreeMap<ServiceKey, DerivedService>) {
        for (key, service) in services {
            let Some(held) = self.planned.get_mut(&key) else { continue };
            if held.derived.as_ref().is_none_or(|held| held.ips != service.ips) {
                held.derived = Some(service);
                self.queue.add(None, [key]);
            }
        }
    }

    /// What became of a batch's writes. `used`: how long all of it took.
    pub(super) fn settle(&mut self, batch: Batch, good: bool, now: Duration, used: Duration) {
        // On a machine that is busy with something else all takes long, which is nobody's fault.
        let most = u32::try_from(batch.keys.len()).unwrap_or(u32::MAX);
        self.queue.charge(&batch.cause, now, used.min(SERVICE * most));
        for key in &batch.keys {
            if let Some(held) = self.planned.get_mut(key) {
                held.written = good.then_some(now);
            }
            self.failed.remove(key);
        }
        if !good {
            self.failed.extend(batch.keys.iter().cloned());
            self.queue.add(batch.cause, batch.keys);
        }
    }

    /// When there is something to do next, if anything waits.
    pub(super) fn due(&self) -> Option<Duration> {
        self.queue.due()
    }

    /// When what is shown is to be compared again, if it was not since it changed.
    pub(super) fn compare_due(&self, observed: &Arc<Observed>) -> Option<Duration> {
        let known = self.compared.1.as_ref().is_some_and(|last| Arc::ptr_eq(last, observed));
        (!known).then(|| self.compared.0.due())
    }

    /// How many services wait.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether an own export is planned in a moment, for the first time since writing it last went well.
    pub(super) fn is_waiting(&self, key: &ServiceKey) -> bool {
        self.queue.is_own(key) && !self.failed.contains(key)
    }

    /// Condition `Conflict` of an own export, if it is known.
    pub(super) fn conflict(&self, key: &ServiceKey) -> Option<&Condition> {
        self.planned.get(key)?.conflict.as_ref()
    }

    /// What is wrong with any service; some, if there is much.
    pub(super) fn findings(&self, most: usize) -> Vec<Finding> {
        let seen = self.seen.findings();
        let mut all: BTreeSet<&Finding> = seen.iter().collect();
        for finding in self.findings.values().flatten() {
            // There may be many, and few of them are told.
            if all.len() < most || all.last().is_some_and(|last| finding < *last) {
                all.insert(finding);
                if all.len() > most {
                    all.pop_last();
                }
            }
        }
        all.into_iter().cloned().collect()
    }
}
