//! The objects as they were last told, and what the agent observes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::{
    DerivedService, ExportStatus, Import, LocalBackends, Service, ServiceExport, ServiceKey, Slice, SliceKey,
};
use tombolo_agent_core::shelf::Shelf;
use tombolo_proto::model::{NodeName, Prefix};

use super::object::{Object, Source};
use crate::api::kind::slice::{self, LocalSlice};
use crate::api::kind::{Kind, ObjectId, Problem};
use crate::api::observed::Observed;

/// Namespace (empty for kinds outside of them) and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Name {
    pub(super) fn of(id: &ObjectId) -> Self {
        let namespace = id.namespace.as_ref().map(ToString::to_string).unwrap_or_default();
        Self { namespace, name: id.name.as_str().to_owned() }
    }

    fn shown(&self, source: Source) -> String {
        let Self { namespace, name } = self;
        let slash = if namespace.is_empty() { "" } else { "/" };
        format!("{} {namespace}{slash}{name}", source.name())
    }
}

/// An object as it was last told.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// `metadata.resourceVersion`
    pub(super) version: String,
    /// `metadata.generation`
    pub(super) generation: Option<i64>,
    /// `metadata.uid`, of kinds that Events are about.
    pub(super) uid: Option<Box<str>>,
    /// What it is; what it was last, if it cannot be read now; None if it never could.
    pub(super) object: Option<Arc<Object>>,
    /// Why it cannot be read.
    pub(super) problem: Option<Problem>,
}

/// A source's objects.
#[derive(Debug, Default)]
struct Kept {
    /// None before the first full list.
    told: Option<BTreeMap<Name, Entry>>,
    /// A new list, until it is whole.
    coming: Option<BTreeMap<Name, Entry>>,
    /// Why nothing is told now.
    trouble: Option<String>,
}

/// All sources.
#[derive(Debug, Default)]
pub(super) struct Tables {
    sources: BTreeMap<Source, Kept>,
    /// What is observed, as of when it was asked last; the largest parts follow every change at once.
    observed: Observed,
    services: Shelf<ServiceKey, Service>,
    derived: Shelf<ServiceKey, DerivedService>,
    exports: Shelf<ServiceKey, ServiceExport>,
    statuses: Shelf<ServiceKey, ExportStatus>,
    imports: Shelf<ServiceKey, Import>,
    slices: Shelf<SliceKey, Slice>,
    backends: Shelf<ServiceKey, LocalBackends>,
    /// Slices of local services.
    local: BTreeMap<ServiceKey, Vec<(Name, Arc<Object>)>>,
    /// Services whose backends may be others.
    unmerged: BTreeSet<ServiceKey>,
    /// Sources of the small parts that are others since.
    dirty: BTreeSet<Source>,
    /// What is wrong with single objects.
    wrong: BTreeMap<(Source, Name), Vec<Finding>>,
}

/// What is wrong with an object.
fn wrong(source: Source, name: &Name, entry: &Entry) -> Vec<Finding> {
    let mut problems = Vec::new();
    let stays = if entry.object.is_some() { "; what was good before stays in use" } else { "" };
    if let Some(problem) = &entry.problem {
        problems.push(Problem { message: format!("{}{stays}", problem.message), ..problem.clone() });
    }
    if let Some(Object::Import { ours: false, .. }) = entry.object.as_deref() {
        let text = "somebody else made it, and no cluster exports this name, so it is left alone and not \
                    used; remove it, and write a ServiceExport in the cluster that has the service";
        problems.push(Problem::warning("ServiceImportByHand", text));
    }
    problems.into_iter().map(|problem| problem.on(name.shown(source), "the cluster's API")).collect()
}

impl Tables {
    pub(super) fn new(sources: impl IntoIterator<Item = Source>) -> Self {
        let sources = sources.into_iter().map(|source| (source, Kept::default())).collect();
        Self { sources, ..Self::default() }
    }

    /// A full list begins. What was told stays until it is whole.
    pub(super) fn begin(&mut self, source: Source) {
        self.kept(source).coming = Some(BTreeMap::new());
    }

    /// An object, of a list that began, or by itself. True if anything that is observed may be another now.
    pub(super) fn put(&mut self, source: Source, name: Name, mut entry: Entry) -> bool {
        let kept = self.kept(source);
        let old = kept.told.as_ref().and_then(|told| told.get(&name));
        match old {
            Some(old) if entry.object.is_none() => entry.object.clone_from(&old.object),
            // One value is kept of two that are equal.
            Some(old) if old.object == entry.object => entry.object.clone_from(&old.object),
            _ => {}
        }
        let news = old.is_none_or(|old| old.object != entry.object || old.problem != entry.problem);
        if let Some(list) = &mut kept.coming {
            list.insert(name, entry);
            return false;
        }
        self.tell(source, name, Some(entry));
        news
    }

    /// What a writer got back: it is what is told from now on.
    pub(super) fn wrote(&mut self, source: Source, name: Name, entry: Entry) {
        if let Some(list) = &mut self.kept(source).coming {
            list.insert(name.clone(), entry.clone());
        }
        self.tell(source, name, Some(entry));
    }

    /// An object is gone. True if it was there.
    pub(super) fn remove(&mut self, source: Source, name: &Name) -> bool {
        if let Some(list) = &mut self.kept(source).coming {
            list.remove(name);
        }
        self.tell(source, name.clone(), None)
    }

    /// The list is whole: what is not in it is gone.
    pub(super) fn end(&mut self, source: Source) {
        let kept = self.kept(source);
        let Some(list) = kept.coming.take() else { return };
        let old = kept.told.get_or_insert_default();
        let gone: Vec<Name> = old.keys().filter(|name| !list.contains_key(*name)).cloned().collect();
        self.dirty.insert(source);
        for name in gone {
            self.tell(source, name, None);
        }
        for (name, entry) in list {
            self.tell(source, name, Some(entry));
        }
    }

    /// Makes an object of what was told so, and all that is observed of it. Nothing before the first full list. True if
    /// it was there.
    fn tell(&mut self, source: Source, name: Name, entry: Option<Entry>) -> bool {
        if self.kept(source).told.is_none() {
            return false;
        }
        let wrong = entry.as_ref().map(|entry| wrong(source, &name, entry)).unwrap_or_default();
        if wrong.is_empty() {
            self.wrong.remove(&(source, name.clone()));
        } else {
            self.wrong.insert((source, name.clone()), wrong);
        }
        let told = self.kept(source).told.get_or_insert_default();
        let new = entry.as_ref().and_then(|entry| entry.object.clone());
        let old = match entry {
            Some(entry) => told.insert(name.clone(), entry),
            None => told.remove(&name),
        };
        let there = old.is_some();
        let old = old.and_then(|entry| entry.object);
        let same = match (&old, &new) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.observe(source, &name, old.as_deref(), new);
        }
        there
    }

    /// An object is another, as far as it is observed.
    fn observe(&mut self, source: Source, name: &Name, old: Option<&Object>, new: Option<Arc<Object>>) {
        match source {
            Source::Kind(Kind::Service) => {
                match old {
                    Some(Object::Service(key, _)) => drop(self.services.remove(key)),
                    Some(Object::Derived { as_service: (key, _), of, .. }) => {
                        self.services.remove(key);
                        self.derived.remove(of);
                    }
                    _ => {}
                }
                match new.as_deref() {
                    Some(Object::Service(key, value)) => {
                        self.services.insert_shared(key.clone(), value.clone());
                    }
                    Some(Object::Derived { as_service: (key, service), of, value }) => {
                        self.services.insert_shared(key.clone(), service.clone());
                        self.derived.insert_shared(of.clone(), value.clone());
                    }
                    _ => {}
                }
            }
            Source::Kind(Kind::ServiceExport) => {
                if let Some(Object::Export(key, ..)) = old {
                    self.exports.remove(key);
                    self.statuses.remove(key);
                    self.unmerged.insert(key.clone());
                }
                if let Some(Object::Export(key, export, status, _)) = new.as_deref() {
                    self.exports.insert_shared(key.clone(), export.clone());
                    self.statuses.insert_shared(key.clone(), status.clone());
                    self.unmerged.insert(key.clone());
                }
                self.dirty.insert(source);
            }
            Source::Kind(Kind::ServiceImport) => {
                let new = match new.as_deref() {
                    Some(Object::Import { key, value, ours: true, .. }) => Some((key, value)),
                    _ => None,
                };
                if let Some(Object::Import { key, value, ours: true, .. }) = old {
                    if new.is_some_and(|(_, new)| new == value) {
                        return;
                    }
                    self.imports.remove(key);
                }
                if let Some((key, value)) = new {
                    self.imports.insert_shared(key.clone(), value.clone());
                }
            }
            Source::Kind(Kind::EndpointSlice) => {
                match old {
                    Some(Object::Slice(key, _)) => drop(self.slices.remove(key)),
                    Some(Object::LocalSlice(slice)) => {
                        if let Some(all) = self.local.get_mut(&slice.service) {
                            all.retain(|(other, _)| other != name);
                            if all.is_empty() {
                                self.local.remove(&slice.service);
                            }
                        }
                        self.unmerged.insert(slice.service.clone());
                    }
                    _ => {}
                }
                match new.as_deref() {
                    Some(Object::Slice(key, value)) => {
                        self.slices.insert_shared(key.clone(), value.clone());
                    }
                    Some(Object::LocalSlice(slice)) => {
                        let service = slice.service.clone();
                        self.unmerged.insert(service.clone());
                        // Few, and in the order of their names.
                        let all = self.local.entry(service).or_default();
                        let at = all.partition_point(|(other, _)| other < name);
                        new.into_iter().for_each(|new| all.insert(at, (name.clone(), new)));
                    }
                    _ => {}
                }
            }
            _ => drop(self.dirty.insert(source)),
        }
    }

    /// Nothing is told for now: what was told last stays. True if that is new.
    pub(super) fn trouble(&mut self, source: Source, why: String) -> bool {
        let kept = self.kept(source);
        kept.coming = None;
        let new = kept.trouble.as_ref() != Some(&why);
        kept.trouble = Some(why);
        new
    }

    /// It is told again. True if it was not.
    pub(super) fn fine(&mut self, source: Source) -> bool {
        self.kept(source).trouble.take().is_some()
    }

    /// The API does not serve the kind: there is nothing of it, unless there once was.
    pub(super) fn absent(&mut self, source: Source) -> bool {
        let kept = self.kept(source);
        kept.coming = None;
        let new = kept.told.is_none();
        kept.told.get_or_insert_default();
        self.dirty.insert(source);
        new
    }

    /// What was last told of an object.
    pub(super) fn entry(&self, source: Source, name: &Name) -> Option<&Entry> {
        self.sources.get(&source)?.told.as_ref()?.get(name)
    }

    /// All objects of a source; None before the first full list.
    pub(super) fn all(&self, source: Source) -> Option<&BTreeMap<Name, Entry>> {
        self.sources.get(&source)?.told.as_ref()
    }

    fn kept(&mut self, source: Source) -> &mut Kept {
        self.sources.entry(source).or_default()
    }

    fn objects(&self, source: Source) -> Option<impl Iterator<Item = &Object>> {
        Some(self.all(source)?.values().filter_map(|entry| entry.object.as_deref()))
    }

    fn known<T>(&self, kind: Kind, take: impl Fn(&Object) -> Option<T>) -> Option<impl Iterator<Item = T>> {
        self.objects(Source::Kind(kind)).map(|objects| objects.filter_map(take))
    }

    /// What the agent observes.
    pub(super) fn observed(&mut self) -> Observed {
        let mut observed = std::mem::take(&mut self.observed);
        let dirty = std::mem::take(&mut self.dirty);
        let is = |sources: &[Source]| sources.iter().any(|source| dirty.contains(source));
        self.of_people(&mut observed, is);
        self.of_ours(&mut observed, is);
        observed.findings = self.findings();
        self.observed = observed.clone();
        observed
    }

    /// Whether a kind was listed.
    fn is_told(&self, kind: Kind) -> bool {
        self.all(Source::Kind(kind)).is_some()
    }

    fn of_people(&mut self, observed: &mut Observed, is: impl Fn(&[Source]) -> bool) {
        if is(&[Source::Kind(Kind::Node), Source::BlockAffinity, Source::CiliumNode]) {
            let pods = self.pod_ranges();
            let nodes = self.known(Kind::Node, |object| match object {
                Object::Node(name, node) => Some((name.clone(), node.clone())),
                _ => None,
            });
            observed.nodes = yes(nodes.map(|nodes| {
                let with_ranges = |(name, mut node): (NodeName, tombolo_agent_core::object::Node)| {
                    // A CNI that gives out ranges of its own uses no others.
                    if let Some(ranges) = pods.get(&name) {
                        node.pod_cidrs.clone_from(ranges);
                    }
                    (name, node)
                };
                nodes.map(with_ranges).collect()
            }));
        }
        if is(&[Source::Kind(Kind::Namespace)]) {
            let namespaces = self.known(Kind::Namespace, |object| match object {
                Object::Namespace(name) => Some(name.clone()),
                _ => None,
            });
            observed.namespaces = yes(namespaces.map(Iterator::collect));
        }
        if self.is_told(Kind::Service) {
            observed.services = Known::Yes(self.services.clone());
            observed.derived = Known::Yes(self.derived.clone());
        }
        if self.is_told(Kind::ServiceExport) {
            if is(&[Source::Kind(Kind::ServiceExport)]) {
                observed.declared_exports = Known::Yes(Arc::new(self.exports.keys().cloned().collect()));
            }
            observed.exports = Known::Yes(self.exports.clone());
            observed.statuses = Known::Yes(self.statuses.clone());
            if self.is_told(Kind::EndpointSlice) {
                self.merge();
                observed.backends = Known::Yes(self.backends.clone());
            }
        }
    }

    /// Puts backends together, of services that are exported: of others none are needed.
    fn merge(&mut self) {
        for key in std::mem::take(&mut self.unmerged) {
            let slices = self.local.get(&key).filter(|_| self.exports.contains_key(&key));
            match slices {
                Some(slices) => {
                    let local = |(_, object): &(Name, Arc<Object>)| match &**object {
                        Object::LocalSlice(slice) => Some(slice.clone()),
                        _ => None,
                    };
                    let slices: Vec<LocalSlice> = slices.iter().filter_map(local).collect();
                    self.backends.insert(key, slice::merge(&slices));
                }
                None => drop(self.backends.remove(&key)),
            }
        }
    }

    fn of_ours(&self, observed: &mut Observed, is: impl Fn(&[Source]) -> bool) {
        if self.is_told(Kind::ServiceImport) {
            observed.imports = Known::Yes(self.imports.clone());
        }
        if self.is_told(Kind::EndpointSlice) {
            observed.slices = Known::Yes(self.slices.clone());
        }
        if is(&[Source::Kind(Kind::Member)]) {
            let members = self.known(Kind::Member, |object| match object {
                Object::Member(cluster, value, _) => Some((cluster.clone(), value.clone())),
                _ => None,
            });
            observed.members = yes(members.map(Iterator::collect));
        }
        if is(&[Source::Kind(Kind::MemberNodes)]) {
            let shards = self.known(Kind::MemberNodes, |object| match object {
                Object::MemberNodes(cluster, _, records) => Some((cluster.clone(), records.clone())),
                _ => None,
            });
            observed.member_nodes = yes(shards.map(|shards| {
                let mut nodes: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
                for (cluster, records) in shards {
                    let of = nodes.entry(cluster).or_default();
                    of.extend(records.into_iter().map(|record| (record.key.clone(), record)));
                }
                nodes
            }));
        }
        if is(&[Source::Kind(Kind::TunnelNode)]) {
            let tunnel_nodes = self.known(Kind::TunnelNode, |object| match object {
                Object::TunnelNode(name, value, _) => Some((name.clone(), value.clone())),
                _ => None,
            });
            observed.tunnel_nodes = yes(tunnel_nodes.map(Iterator::collect));
        }
        if is(&[Source::ServiceCidr, Source::Kind(Kind::ClusterSet)]) {
            let ranges = self.objects(Source::ServiceCidr).into_iter().flatten();
            observed.service_ranges = ranges
                .filter_map(|object| match object {
                    Object::ServiceCidr(ranges) => Some(ranges),
                    _ => None,
                })
                .flatten()
                .copied()
                .collect();
            let sets = self.known(Kind::ClusterSet, |object| match object {
                Object::ClusterSet(set) => Some(set.clone()),
                _ => None,
            });
            observed.clusterset = yes(sets.map(|mut sets| {
                let mut set = sets.next()?;
                // No grant of another cluster may touch the addresses of this one's Services.
                set.reserved.extend(observed.service_ranges.iter().copied());
                Some(set)
            }));
        }
    }

    /// Which ranges a CNI says that the pods of its nodes have.
    fn pod_ranges(&self) -> BTreeMap<NodeName, BTreeSet<Prefix>> {
        let mut ranges: BTreeMap<NodeName, BTreeSet<Prefix>> = BTreeMap::new();
        for source in [Source::BlockAffinity, Source::CiliumNode] {
            for object in self.objects(source).into_iter().flatten() {
                if let Object::PodRanges(node, list) = object
                    && !list.is_empty()
                {
                    ranges.entry(node.clone()).or_default().extend(list);
                }
            }
        }
        ranges
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (source, kept) in &self.sources {
            if let Some(trouble) = &kept.trouble {
                findings.push(Finding {
                    severity: Severity::Warning,
                    reason: "ApiTrouble",
                    object: format!("all of kind {}", source.name()),
                    message: format!("cannot be watched: {trouble}; what was told last stays in use"),
                });
            }
        }
        findings.extend(self.wrong.values().flatten().cloned());
        findings.sort();
        findings.dedup();
        findings
    }
}

fn yes<T>(value: Option<T>) -> Known<T> {
    value.map_or(Known::No, Known::Yes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMESPACES: Source = Source::Kind(Kind::Namespace);

    fn name(text: &str) -> Name {
        Name { namespace: String::new(), name: text.to_owned() }
    }

    fn entry(text: &str) -> Entry {
        let object = Some(Arc::new(Object::Namespace(text.parse().unwrap())));
        Entry { version: "1".to_owned(), generation: None, uid: None, object, problem: None }
    }

    fn seen(tables: &mut Tables) -> Option<Vec<String>> {
        tables.observed().namespaces.get().map(|all| all.iter().map(ToString::to_string).collect())
    }

    fn texts(list: &[&str]) -> Option<Vec<String>> {
        Some(list.iter().map(|t| (*t).to_owned()).collect())
    }

    #[test]
    fn nothing_is_known_before_the_first_whole_list_and_nothing_lost_before_the_next() {
        let mut tables = Tables::new([NAMESPACES]);
        tables.begin(NAMESPACES);
        tables.put(NAMESPACES, name("a"), entry("a"));
        tables.put(NAMESPACES, name("b"), entry("b"));
        assert_eq!(seen(&mut tables), None);
        tables.end(NAMESPACES);
        assert_eq!(seen(&mut tables), texts(&["a", "b"]));
        // A list that is cut off takes nothing away.
        tables.begin(NAMESPACES);
        tables.put(NAMESPACES, name("b"), entry("b"));
        assert!(tables.trouble(NAMESPACES, "gone".to_owned()));
        assert_eq!(seen(&mut tables), texts(&["a", "b"]));
        assert_eq!(tables.observed().findings.len(), 1);
        tables.begin(NAMESPACES);
        tables.put(NAMESPACES, name("b"), entry("b"));
        tables.end(NAMESPACES);
        assert_eq!(seen(&mut tables), texts(&["b"]));
        assert!(tables.fine(NAMESPACES) && tables.observed().findings.is_empty());
        assert!(tables.remove(NAMESPACES, &name("b")));
        assert_eq!(seen(&mut tables), texts(&[]));
    }

    #[test]
    fn what_cannot_be_read_stays_as_it_was() {
        let mut tables = Tables::new([NAMESPACES]);
        tables.begin(NAMESPACES);
        tables.put(NAMESPACES, name("a"), entry("a"));
        tables.end(NAMESPACES);
        let broken = Entry {
            version: "2".to_owned(),
            generation: None,
            uid: None,
            object: None,
            problem: Some(Problem::error("BadObject", "broken")),
        };
        assert!(tables.put(NAMESPACES, name("a"), broken.clone()));
        assert!(!tables.put(NAMESPACES, name("a"), broken), "no news");
        assert_eq!(seen(&mut tables), texts(&["a"]));
        assert!(tables.observed().findings[0].message.contains("stays in use"));
    }
}
