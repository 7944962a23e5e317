//! Which clusters' backends of a service new connections may go to: decided here for VIPs, names and slices alike, from
//! three things: ready backends, a way that carries, and what the exports prefer. Nothing remembers the last decision,
//! so what failed over comes back by itself.

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, Family, Port, Priority};

use crate::desired::TunnelDevice;
use crate::object::{Import, Preferences, Slice, SliceKey};
use crate::world::{Members, NodeWorld};

/// Why a cluster's ready backends of a service are, or are not, used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// They are.
    Used,
    /// No way leads to the cluster, and another has the service.
    Unreached,
    /// The service prefers local backends, and this cluster has some.
    NotLocal,
    /// Clusters of this better priority have some.
    Passive(Priority),
}

/// Where a decision is made.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The own cluster.
    pub cluster: &'a ClusterId,
    /// Clusters that no way leads to; all others count as reached.
    pub unreached: &'a BTreeSet<ClusterId>,
}

impl View<'_> {
    /// Judges the clusters that have ready backends. Some are always used, if there are any: the last ones with a service
    /// are kept, also where no way is known to lead to them.
    ///
    /// A way goes first, then local, then priority.
    pub fn eligible<'c>(
        self,
        preferences: &Preferences,
        ready: &BTreeSet<&'c ClusterId>,
    ) -> BTreeMap<&'c ClusterId, Verdict> {
        let mut left: BTreeSet<&ClusterId> =
            ready.iter().copied().filter(|c| !self.unreached.contains(*c)).collect();
        let reached = !left.is_empty();
        if !reached {
            left.clone_from(ready);
        }
        let local = preferences.local && left.contains(self.cluster);
        let best = left.iter().map(|c| preferences.share(c).priority).min().unwrap_or_default();
        let verdict = |cluster: &'c ClusterId| {
            let verdict = if reached && !left.contains(cluster) {
                Verdict::Unreached
            } else if local && cluster != self.cluster {
                Verdict::NotLocal
            } else if !local && preferences.share(cluster).priority > best {
                Verdict::Passive(best)
            } else {
                Verdict::Used
            };
            (cluster, verdict)
        };
        ready.iter().copied().map(verdict).collect()
    }

    /// Judges what has a port of a ClusterSetIP in a family: only clusters that expose it take part (mcs 20).
    pub fn of_port<'c>(
        self,
        import: &Import,
        slices: &[(&'c SliceKey, &'c Slice)],
        port: &Port,
        family: Family,
    ) -> BTreeMap<&'c ClusterId, Verdict> {
        let has = |key: &SliceKey, slice: &Slice| {
            key.family == family && target(slice, port).is_some() && slice.backends.iter().any(|b| b.ready)
        };
        let ready =
            slices.iter().filter(|(key, slice)| has(key, slice)).map(|(key, _)| &key.source).collect();
        self.eligible(&import.preferences, &ready)
    }

    /// Judges what a headless service's bare name answers with: A and AAAA are of the same endpoints (mcs 37).
    pub fn of_service<'c>(
        self,
        import: &Import,
        slices: &[(&'c SliceKey, &'c Slice)],
    ) -> BTreeMap<&'c ClusterId, Verdict> {
        let has = |slice: &Slice| slice.backends.iter().any(|b| b.ready);
        let ready = slices.iter().filter(|(_, slice)| has(slice)).map(|(key, _)| &key.source).collect();
        self.eligible(&import.preferences, &ready)
    }
}

/// Where a slice's backends serve a port of the service.
pub(crate) fn target<'a>(slice: &'a Slice, port: &Port) -> Option<&'a Port> {
    slice.ports.iter().find(|p| p.name == port.name && p.protocol == port.protocol)
}

/// Clusters that no way from this node leads to, of whom it is known.
pub fn unreached(world: &NodeWorld, devices: &BTreeMap<DeviceNumber, TunnelDevice>) -> BTreeSet<ClusterId> {
    let clusters = world.members.get().into_iter().flat_map(Members::keys);
    clusters.filter(|cluster| !reaches(world, devices, cluster)).cloned().collect()
}

/// Whether a way from this node leads to a cluster, as far as is known: a live tunnel of its own, or a live own gateway
/// that does not say that it has none. A gateway relies on another only if that one says that it can. Where there is no
/// way at all, nothing is known, and unknown is not dead (law 4).
pub fn reaches(
    world: &NodeWorld,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    cluster: &ClusterId,
) -> bool {
    if *cluster == world.cluster {
        return true;
    }
    let gateway = world
        .members
        .get()
        .and_then(|members| members.get(&world.cluster)?.nodes.get(&world.node))
        .is_some_and(|me| me.rank.is_gateway());
    let mut any = false;
    for (&number, device) in devices {
        for (key, peer) in &device.peers {
            // A meshed node's way counts once it has proved itself; a gateway's until it is known to be dead.
            let meshed = number.family() == DeviceFamily::Out && !(gateway && number.rank().is_gateway());
            let id = (number, *key);
            let alive =
                if meshed { world.health.alive.contains(&id) } else { !world.health.dead.contains(&id) };
            match number.family() {
                DeviceFamily::Out if peer.node.cluster == *cluster => {
                    any |= alive || !meshed;
                    if alive {
                        return true;
                    }
                }
                DeviceFamily::In if number.rank().is_gateway() => {
                    let told = world.health.unreachable.get(&peer.node.node);
                    any |= !gateway;
                    if alive && told.map_or(!gateway, |told| !told.contains(cluster)) {
                        return true;
                    }
                }
                DeviceFamily::Out | DeviceFamily::In => {}
            }
        }
    }
    !any
}
