//! Makes one derived service out of what several clusters export under one name (KEP-1645, "Constraints and Conflict
//! Resolution").
//!
//! Independent of the order of its inputs: constituents are ordered by effective creation, then by cluster id, and the
//! oldest wins every property that cannot be united.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use tombolo_proto::model::{ClusterId, Export, Port, PortName, Prefer, Protocol, Share};

use crate::object::{Import, Preferences};

/// One cluster's part in a derived service.
#[derive(Debug, Clone, Copy)]
pub struct Constituent<'a> {
    /// Who exports.
    pub cluster: &'a ClusterId,
    /// What it states.
    pub export: &'a Export,
    /// `member_since` of its grant, unix seconds: nobody is older than their membership.
    pub member_since: u64,
}

impl Constituent<'_> {
    /// Unix seconds.
    pub fn created(&self) -> u64 {
        self.export.created.max(self.member_since)
    }
}

/// Reasons of condition `Conflict`, as mcs-api v0.5.2 writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Conflict {
    /// Ports of one name that differ, or of one number that have other names; also ports that only one of them has: all
    /// are united, but not all clusters serve all.
    Port,
    /// ClusterSetIP and Headless.
    Type,
    /// Affinity and none.
    SessionAffinity,
    /// Affinities of other lengths.
    SessionAffinityConfig,
    /// Exported labels.
    Labels,
    /// Exported annotations.
    Annotations,
    /// `internalTrafficPolicy`
    InternalTrafficPolicy,
    /// `trafficDistribution`
    TrafficDistribution,
    /// `ipFamilies`
    IpFamily,
}

impl Conflict {
    /// The reason, verbatim.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Port => "PortConflict",
            Self::Type => "TypeConflict",
            Self::SessionAffinity => "SessionAffinityConflict",
            Self::SessionAffinityConfig => "SessionAffinityConfigConflict",
            Self::Labels => "LabelsConflict",
            Self::Annotations => "AnnotationsConflict",
            Self::InternalTrafficPolicy => "InternalTrafficPolicyConflict",
            Self::TrafficDistribution => "TrafficDistributionConflict",
            Self::IpFamily => "IPFamilyConflict",
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

/// A port of a constituent that is a port of the derived service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// As its cluster names it: target ports are found by this name.
    pub own: Port,
    /// As the derived service names it.
    pub merged: Port,
}

/// A derived service and how it came to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The derived service, without ClusterSetIPs.
    pub import: Import,
    /// By cluster: which of its ports count (mcs 20). A cluster whose ports all lost is here with none.
    pub exposed: BTreeMap<ClusterId, Vec<Exposed>>,
    /// The oldest constituent, whose values count.
    pub oldest: ClusterId,
    /// What differs, and in which clusters it differs from what counts.
    pub conflicts: BTreeMap<Conflict, BTreeSet<ClusterId>>,
}

/// Ports without their order.
fn set_of(ports: &[Port]) -> BTreeSet<(Option<&PortName>, Protocol, u16)> {
    ports.iter().map(|port| (port.name.as_ref(), port.protocol, port.port)).collect()
}

/// Merges what clusters export under one name. None if nobody does.
pub fn merge(constituents: &[Constituent<'_>]) -> Option<Merged> {
    let mut ordered: Vec<&Constituent<'_>> = constituents.iter().collect();
    ordered.sort_by_key(|c| (c.created(), c.cluster));
    ordered.dedup_by_key(|c| c.cluster);
    let oldest = ordered.first()?;
    let first = oldest.export;

    let mut conflicts: BTreeMap<Conflict, BTreeSet<ClusterId>> = BTreeMap::new();
    let mut ports: Vec<Port> = Vec::new();
    let mut exposed = BTreeMap::new();
    for constituent in &ordered {
        let export = constituent.export;
        let (list, clean) = unite(&mut ports, &export.ports);
        exposed.insert(constituent.cluster.clone(), list);
        let seconds = |e: &Export| e.affinity.filter(|_| first.affinity.is_some());
        let differs = [
            (Conflict::Port, !clean || set_of(&export.ports) != set_of(&first.ports)),
            (Conflict::Type, export.kind != first.kind),
            (Conflict::SessionAffinity, export.affinity.is_some() != first.affinity.is_some()),
            (Conflict::SessionAffinityConfig, seconds(export).is_some_and(|own| Some(own) != first.affinity)),
            (Conflict::Labels, export.labels != first.labels),
            (Conflict::Annotations, export.annotations != first.annotations),
            (Conflict::InternalTrafficPolicy, export.internal_local != first.internal_local),
            (Conflict::TrafficDistribution, export.traffic_distribution != first.traffic_distribution),
            (
                Conflict::IpFamily,
                export.families.iter().collect::<BTreeSet<_>>() != first.families.iter().collect(),
            ),
        ];
        for (conflict, _) in differs.into_iter().filter(|(_, differs)| *differs) {
            conflicts.entry(conflict).or_default().insert(constituent.cluster.clone());
        }
    }
    name_all(&mut ports, &ordered, &mut exposed);
    let import = Import {
        kind: first.kind,
        ports,
        ips: Vec::new(),
        families: first.families.clone(),
        affinity: first.affinity,
        internal_local: first.internal_local,
        traffic_distribution: first.traffic_distribution.clone(),
        labels: first.labels.clone(),
        annotations: first.annotations.clone(),
        clusters: exposed.keys().cloned().collect(),
        preferences: preferences(&ordered),
    };
    Some(Merged { import, exposed, oldest: oldest.cluster.clone(), conflicts })
}

/// The oldest that states whether to prefer local wins; priority and weight are each cluster's own.
fn preferences(ordered: &[&Constituent<'_>]) -> Preferences {
    let prefer = ordered.iter().find_map(|c| c.export.preference.prefer);
    let shares = ordered.iter().map(|c| (c.cluster.clone(), c.export.preference.share));
    Preferences {
        local: prefer == Some(Prefer::Local),
        shares: shares.filter(|(_, share)| *share != Share::default()).collect(),
    }
}

/// Which of an export's ports are ports of a service whose merged ports are given.
pub fn expose(merged: &[Port], export: &Export) -> Vec<Exposed> {
    let mut list: Vec<Exposed> = Vec::new();
    for own in &export.ports {
        if let Place::At(merged, _) = place(merged, own)
            && !list.iter().any(|e| e.merged == *merged)
        {
            list.push(Exposed { own: own.clone(), merged: merged.clone() });
        }
    }
    list
}

/// Adds a constituent's ports to the merged ones: first by name, then by (protocol, port), so that both stay unique
/// (mcs 11). Tells which count, and whether all agreed.
fn unite(merged: &mut Vec<Port>, own: &[Port]) -> (Vec<Exposed>, bool) {
    let mut clean = true;
    let mut list: Vec<Exposed> = Vec::new();
    for port in own {
        let at = match place(merged, port) {
            Place::At(at, same) => {
                clean &= same;
                at.clone()
            }
            Place::Lost => {
                clean = false;
                continue;
            }
            // More ports than a service may have are of no use to anybody.
            Place::Free if merged.len() >= Export::MAX_PORTS => {
                clean = false;
                continue;
            }
            Place::Free => {
                merged.push(port.clone());
                port.clone()
            }
        };
        if list.iter().any(|e| e.merged == at) {
            clean = false;
        } else {
            list.push(Exposed { own: port.clone(), merged: at });
        }
    }
    (list, clean)
}

/// Names what has no name, where there are several ports: Kubernetes wants all of them named. A port takes the name that
/// the oldest has for it who has one, else one of its number; neither may mean another port anywhere.
fn name_all(
    merged: &mut [Port],
    ordered: &[&Constituent<'_>],
    exposed: &mut BTreeMap<ClusterId, Vec<Exposed>>,
) {
    if merged.len() < 2 {
        return;
    }
    // What each name means, wherever it means something.
    let mut meant: BTreeMap<PortName, BTreeSet<Number>> = BTreeMap::new();
    // What each port is called, by age of who calls it so.
    let mut called: BTreeMap<Number, Vec<PortName>> = BTreeMap::new();
    for port in ordered.iter().flat_map(|c| &c.export.ports) {
        if let Some(name) = &port.name {
            meant.entry(name.clone()).or_default().insert(number(port));
            called.entry(number(port)).or_default().push(name.clone());
        }
    }
    for port in merged.iter_mut().filter(|port| port.name.is_none()) {
        let nameless = port.clone();
        let own = BTreeSet::from([number(&nameless)]);
        let theirs = called.get(&number(&nameless)).cloned().unwrap_or_default();
        let text = format!("{}-{}", nameless.protocol.as_str().to_ascii_lowercase(), nameless.port);
        let numbered = (1_u32..).map(|n| if n == 1 { text.clone() } else { format!("{text}-{n}") });
        let made = numbered.filter_map(|text| PortName::new(&text).ok());
        let free = |name: &PortName| meant.get(name).is_none_or(|numbers| *numbers == own);
        let Some(name) = theirs.into_iter().chain(made).find(free) else { continue };
        meant.insert(name.clone(), own);
        port.name = Some(name);
        for list in exposed.values_mut() {
            for e in list.iter_mut().filter(|e| e.merged == nameless) {
                e.merged = port.clone();
            }
        }
    }
}

type Number = (Protocol, u16);

fn number(port: &Port) -> Number {
    (port.protocol, port.port)
}

enum Place<'a> {
    /// It is this one, and whether all its properties are the same.
    At(&'a Port, bool),
    /// Its name means another port.
    Lost,
    /// Nobody has it yet.
    Free,
}

fn place<'a>(merged: &'a [Port], port: &Port) -> Place<'a> {
    let same = |p: &&Port| number(p) == number(port);
    // What has no name has none in common.
    if let Some(named) = merged.iter().find(|p| p.name.is_some() && p.name == port.name) {
        return if same(&named) {
            Place::At(named, named.app_protocol == port.app_protocol)
        } else {
            Place::Lost
        };
    }
    match merged.iter().find(same) {
        Some(other) => Place::At(other, other.name == port.name && other.app_protocol == port.app_protocol),
        None => Place::Free,
    }
}
