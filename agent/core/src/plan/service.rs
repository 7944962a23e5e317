//! Derived services: which there are, from whom, and which must stay as they are (mcs 3, 4).

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{ClusterId, Export, Namespace};

use super::export::Own;
use super::findings::Findings;
use crate::known::Objects;
use crate::merge::{Constituent, Exposed, Merged, expose, merge};
use crate::object::{Import, ServiceKey};
use crate::shelf::Shelf;
use crate::world::{ClusterWorld, Foreign};

/// Services that one other cluster may have here.
pub(crate) const MAX_FOREIGN: usize = 20_000;

/// A derived service of this plan.
#[derive(Debug)]
pub(crate) struct Derived<'a> {
    /// Merged anew; None: it stays as it is, since somebody who is in it is unknown.
    pub(crate) merged: Option<Merged>,
    /// What counts of each cluster that is known.
    pub(crate) exposed: BTreeMap<&'a ClusterId, Vec<Exposed>>,
}

/// What is known of other clusters and of the own one.
pub(crate) struct Sources<'a> {
    pub(crate) world: &'a ClusterWorld,
    /// Own exports; None: the own cluster counts as unknown.
    pub(crate) own: Option<&'a Shelf<ServiceKey, Own>>,
}

impl<'a> Sources<'a> {
    /// Whether a cluster's part in the services of a namespace is not at hand.
    pub(crate) fn unknown(&self, cluster: &ClusterId, namespace: &Namespace) -> bool {
        if *cluster == self.world.cluster {
            return self.own.is_none();
        }
        match self.world.foreign.get(cluster) {
            Some(foreign) => foreign.unknown_namespaces.contains(namespace),
            None => self.world.unknown.contains(cluster),
        }
    }

    /// Whether anybody's part in the services of a namespace is not at hand.
    pub(crate) fn somebody_unknown(&self, namespace: &Namespace) -> bool {
        self.own.is_none()
            || self.world.unknown.iter().any(|c| self.unknown(c, namespace))
            || self.world.foreign.keys().any(|c| self.unknown(c, namespace))
    }

    fn foreign(&self) -> impl Iterator<Item = (&'a ClusterId, &'a Foreign)> {
        self.world.foreign.iter().filter(|(id, _)| **id != self.world.cluster)
    }
}

/// Finds all derived services. None while namespaces or imports are unknown.
pub(crate) fn services<'a>(
    sources: &Sources<'a>,
    findings: &mut Findings,
) -> Option<BTreeMap<ServiceKey, Derived<'a>>> {
    let world = sources.world;
    let namespaces = world.namespaces.get()?;
    let imports = world.imports.get()?;
    let here = |key: &ServiceKey| namespaces.contains(&key.namespace) && !key.namespace.is_reserved();

    let mut parts: BTreeMap<&ServiceKey, BTreeMap<&ClusterId, (&Export, u64)>> = BTreeMap::new();
    for (key, own) in sources.own.into_iter().flatten().filter(|(key, _)| here(key)) {
        let since = world.own.membership.grant().member_since;
        parts.entry(key).or_default().insert(&world.cluster, (&own.export, since));
    }
    for (cluster, foreign) in sources.foreign() {
        let grant = foreign.member.membership.grant();
        let mut refused: BTreeSet<&Namespace> = BTreeSet::new();
        let mut count = 0;
        for (key, export) in foreign.exports.iter().filter(|(key, _)| here(key)) {
            if grant.may_export(&key.namespace) {
                count += 1;
                if count > MAX_FOREIGN {
                    continue;
                }
                parts.entry(key).or_default().insert(cluster, (export, grant.member_since));
            } else {
                refused.insert(&key.namespace);
            }
        }
        if count > MAX_FOREIGN {
            let text = format!("exports {count} services; only the first {MAX_FOREIGN} by name are imported");
            findings.error("TooManyServices", format!("cluster {cluster}"), text);
        }
        for namespace in refused {
            let text =
                format!("exports namespace {namespace}, which it was not granted; that is not imported");
            findings.error("NamespaceNotGranted", format!("cluster {cluster}"), text);
        }
    }

    let keys: BTreeSet<&ServiceKey> =
        parts.keys().copied().chain(imports.keys().filter(|key| here(key))).collect();
    let mut services = BTreeMap::new();
    for key in keys {
        let known = parts.remove(key).unwrap_or_default();
        let existing = imports.get(key);
        let stays = existing
            .filter(|import| import.clusters.iter().any(|cluster| sources.unknown(cluster, &key.namespace)));
        let derived = if let Some(import) = stays {
            let exposed = known.iter().map(|(c, (export, _))| (*c, expose(&import.ports, export))).collect();
            Derived { merged: None, exposed }
        } else {
            let constituents: Vec<Constituent<'_>> = known
                .iter()
                .map(|(cluster, (export, since))| Constituent { cluster, export, member_since: *since })
                .collect();
            let Some(merged) = merge(&constituents) else { continue };
            let of = |c: &ClusterId| merged.exposed.get(c).cloned().unwrap_or_default();
            let exposed = known.keys().map(|cluster| (*cluster, of(cluster))).collect();
            Derived { merged: Some(merged), exposed }
        };
        services.insert(key.clone(), derived);
    }
    Some(services)
}

/// The derived services as ServiceImports, yet without new ClusterSetIPs.
pub(crate) fn imports(services: &BTreeMap<ServiceKey, Derived<'_>>) -> Objects<ServiceKey, Import> {
    let mut objects = Objects::default();
    for (key, derived) in services {
        match &derived.merged {
            Some(merged) => {
                objects.set.insert(key.clone(), merged.import.clone());
            }
            None => {
                objects.keep.insert(key.clone());
            }
        }
    }
    objects
}
