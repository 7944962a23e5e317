//! Services that carry the ClusterSetIPs of imports under Kubernetes, so that kube-proxy, or what replaces it, balances
//! (mcs 12, 15, 27, 28). The API allots their addresses; an import has those of its Service.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tombolo_proto::model::{Family, ServiceType};

use super::findings::Findings;
use crate::known::Objects;
use crate::object::{DerivedService, Import, ServiceKey};
use crate::world::ClusterWorld;

/// Whether all is known that this needs.
pub(crate) fn is_known(world: &ClusterWorld) -> bool {
    world.clusterset.is_some() || world.derived.is_known()
}

/// Whether a Service carries the import's addresses here.
pub(crate) fn is_carried(world: &ClusterWorld, import: &Import) -> bool {
    world.clusterset.is_none() && import.kind == ServiceType::ClusterSetIP
}

/// Plans the Services, and gives the imports their addresses: those that a Service has; else those that the import had,
/// with which the Service is made again. Also tells which imports wait, unseen, for their first address: a name that
/// answers without one would be remembered so.
pub(crate) fn carriers(
    world: &ClusterWorld,
    imports: &mut Objects<ServiceKey, Import>,
    findings: &mut Findings,
) -> (Objects<ServiceKey, DerivedService>, BTreeSet<ServiceKey>) {
    let mut services = Objects { keep: imports.keep.clone(), ..Objects::default() };
    let mut waiting = BTreeSet::new();
    for (key, import) in imports.set.iter_mut().filter(|(_, import)| is_carried(world, import)) {
        let there = world.derived.get().and_then(|all| all.get(key));
        let families = families(world, import, there);
        if families.is_empty() {
            // Shown as it is, without an address.
            let text = "this cluster's Services have none of the service's IP families; it has no address";
            findings.error("IPFamilyNotSupported", format!("serviceimport {key}"), text);
            import.ips.clear();
            continue;
        }
        let of = |family: &Family| {
            let ips = there.map_or(&import.ips, |there| &there.ips);
            ips.iter().copied().find(|ip| Family::of(*ip) == *family)
        };
        let ips: Vec<IpAddr> = families.iter().filter_map(of).collect();
        let shown = world.imports.get().is_some_and(|imports| imports.contains_key(key));
        if ips.is_empty() && !shown {
            waiting.insert(key.clone());
        }
        import.ips.clone_from(&ips);
        import.families.clone_from(&families);
        let service = DerivedService {
            ips,
            families,
            ports: import.ports.clone(),
            affinity: import.affinity,
            internal_local: import.internal_local,
            traffic_distribution: traffic_distribution(key, import, findings),
        };
        services.set.insert(key.clone(), service);
    }
    (services, waiting)
}

/// What Services may ask for (Kubernetes 1.35): the API refuses any other value, and with it the whole Service.
const TRAFFIC_DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameZone", "PreferSameNode"];

/// The import's, unless no Service can have it.
fn traffic_distribution(key: &ServiceKey, import: &Import, findings: &mut Findings) -> Option<String> {
    let wanted = import.traffic_distribution.as_deref()?;
    if TRAFFIC_DISTRIBUTIONS.contains(&wanted) {
        return Some(wanted.to_owned());
    }
    let text = format!(
        "trafficDistribution `{wanted}` is none that Services here can have; connections are shared out evenly"
    );
    findings.warning("TrafficDistributionUnknown", format!("serviceimport {key}"), text);
    None
}

/// The import's families that Services can have here, the one first that its Service has first: that one never changes.
fn families(world: &ClusterWorld, import: &Import, there: Option<&DerivedService>) -> Vec<Family> {
    let here = |f: &&Family| world.service_families.is_empty() || world.service_families.contains(*f);
    let mut families: Vec<Family> = import.families.iter().filter(here).copied().collect();
    let first = there.and_then(|there| there.families.first());
    families.sort_by_key(|family| Some(family) != first);
    families
}
