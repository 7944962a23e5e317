//! From objects to names.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tombolo_proto::model::{self, Backend, ClusterId, Family, ServiceType};

use super::{ClusterSetIP, Entry, Headless, Host, MAX_HOSTS, MAX_NAME, Port, Target, Zone};
use crate::object::{Import, ServiceKey, Slice, SliceKey, slices_of};
use crate::plan::eligible::{Verdict, View};
use crate::shelf::Shelf;

impl Zone {
    /// The zone of these ServiceImports and imported EndpointSlices. Whether an address may be spoken for was
    /// decided before: all of them are believed.
    pub fn build(imports: &Shelf<ServiceKey, Import>, slices: &Shelf<SliceKey, Slice>) -> Self {
        let mut zone = Self::default();
        for (key, import) in imports {
            let slices: Vec<_> = slices_of(slices, key).collect();
            zone.set(key, entry(key, import, &slices, |ready| ready.clone()));
        }
        zone
    }

    /// Gives a service these names, or none.
    pub(crate) fn set(&mut self, key: &ServiceKey, entry: Option<Entry>) {
        let (namespace, name) = (key.namespace.as_str(), key.name.as_str());
        let mut services = self.namespaces.get(namespace).cloned().unwrap_or_default();
        match entry {
            Some(entry) => services.insert(name.to_owned(), entry),
            None if !services.remove(name) => return,
            None => {}
        }
        if services.is_empty() {
            self.namespaces.remove(namespace);
        } else {
            self.namespaces.insert(namespace.to_owned(), services);
        }
    }
}

impl Entry {
    /// The names of a service. Of a headless one the bare name answers only with the endpoints of clusters that `view`
    /// judges to be used. A name that names one endpoint leaves no choice, and answers with it whatever was decided.
    pub(crate) fn eligible(
        key: &ServiceKey,
        import: &Import,
        slices: &[(&SliceKey, &Slice)],
        view: View<'_>,
    ) -> Option<Self> {
        entry(key, import, slices, |ready| {
            let verdicts = view.eligible(&import.preferences, ready);
            verdicts.into_iter().filter(|(_, verdict)| *verdict == Verdict::Used).map(|(c, _)| c).collect()
        })
    }
}

fn entry(
    key: &ServiceKey,
    import: &Import,
    slices: &[(&SliceKey, &Slice)],
    used: impl for<'c> Fn(&BTreeSet<&'c ClusterId>) -> BTreeSet<&'c ClusterId>,
) -> Option<Entry> {
    match import.kind {
        ServiceType::ClusterSetIP => Some(Entry::ClusterSetIP(clusterset_ip(import))),
        ServiceType::Headless => headless(key, slices, used).map(Entry::Headless),
    }
}

fn clusterset_ip(import: &Import) -> ClusterSetIP {
    let (v4, v6) = by_family(import.ips.iter().copied());
    ClusterSetIP { v4, v6, ports: ports(&import.ports) }
}

/// What a hostname of a cluster stands for.
#[derive(Default)]
struct Gathered {
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<Port>,
}

/// Nothing at all if no endpoint is ready (2.4.1: NXDOMAIN).
fn headless(
    service: &ServiceKey,
    slices: &[(&SliceKey, &Slice)],
    used: impl for<'c> Fn(&BTreeSet<&'c ClusterId>) -> BTreeSet<&'c ClusterId>,
) -> Option<Headless> {
    let mut gathered: BTreeMap<(&ClusterId, String), Gathered> = BTreeMap::new();
    for (key, slice) in slices {
        let ports = ports(&slice.ports);
        let fits = |b: &&Backend| b.ready && Family::of(b.address) == key.family;
        for backend in slice.backends.iter().filter(fits) {
            let host = gathered.entry((&key.source, hostname(backend))).or_default();
            host.addresses.insert(backend.address);
            host.ports.extend(ports.iter().cloned());
        }
    }
    let mut clusters: BTreeMap<&ClusterId, [VecDeque<Host>; 3]> = BTreeMap::new();
    for ((cluster, name), Gathered { addresses, ports }) in gathered {
        let target = Target {
            host: Some((&name, cluster.as_str())),
            service: service.name.as_str(),
            namespace: service.namespace.as_str(),
        };
        let named = target.wire_len() <= MAX_NAME;
        let (v4, v6) = by_family(addresses.into_iter());
        let families = clusters.entry(cluster).or_default();
        let list = match (v4.is_empty(), v6.is_empty()) {
            (false, false) => &mut families[0],
            (false, true) => &mut families[1],
            _ => &mut families[2],
        };
        list.push_back(Host { cluster: cluster.as_str().to_owned(), name, named, v4, v6, ports });
    }
    let used = used(&clusters.keys().copied().collect());
    let turns = |list: BTreeMap<&ClusterId, _>| Vec::from(take_turns(list.into_values().map(take_turns)));
    let (first, rest) = clusters.into_iter().partition(|(cluster, _)| used.contains(cluster));
    let mut hosts: Vec<Host> = turns(first);
    let shown = hosts.len().min(MAX_HOSTS);
    hosts.extend(turns(rest));
    if hosts.is_empty() {
        return None;
    }
    let mut names: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for (at, host) in hosts.iter().enumerate().filter(|(_, h)| h.named) {
        names.entry(host.cluster.clone()).or_default().insert(host.name.clone(), at);
    }
    let v4 = unique(hosts[..shown].iter().flat_map(|h| h.v4.iter().copied()));
    let v6 = unique(hosts[..shown].iter().flat_map(|h| h.v6.iter().copied()));
    Some(Headless { v4, v6, names, hosts, shown })
}

/// The endpoint's hostname, else its address with dashes, which is what other implementations call it. An IPv6
/// address that this would start or end with a dash is written out.
pub(super) fn hostname(backend: &Backend) -> String {
    if let Some(hostname) = &backend.hostname {
        return hostname.as_str().to_owned();
    }
    let dashed = backend.address.to_string().replace(['.', ':'], "-");
    match backend.address {
        IpAddr::V6(address) if dashed.starts_with('-') || dashed.ends_with('-') => written_out(address),
        _ => dashed,
    }
}

fn written_out(address: Ipv6Addr) -> String {
    address.segments().map(|group| format!("{group:04x}")).join("-")
}

fn ports(ports: &[model::Port]) -> BTreeSet<Port> {
    ports.iter().map(|p| Port { protocol: p.protocol, name: p.name.clone(), port: p.port }).collect()
}

fn by_family(addresses: impl Iterator<Item = IpAddr>) -> (Vec<Ipv4Addr>, Vec<Ipv6Addr>) {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(a) if !v4.contains(&a) => v4.push(a),
            IpAddr::V6(a) if !v6.contains(&a) => v6.push(a),
            _ => {}
        }
    }
    (v4, v6)
}

/// One of each in turn, until all are taken.
fn take_turns<T>(lists: impl IntoIterator<Item = VecDeque<T>>) -> VecDeque<T> {
    let mut lists: VecDeque<VecDeque<T>> = lists.into_iter().collect();
    let mut all = VecDeque::new();
    while let Some(mut list) = lists.pop_front() {
        if let Some(first) = list.pop_front() {
            all.push_back(first);
            lists.push_back(list);
        }
    }
    all
}

fn unique<T: Ord + Copy>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = BTreeSet::new();
    all.filter(|item| seen.insert(*item)).collect()
}
