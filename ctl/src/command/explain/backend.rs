//! Why each address behind a name is, or is not, used.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;
use tombolo_agent_core::desired::{Balance, Vip};
use tombolo_agent_core::object::{Import, ServiceKey, Slice, SliceKey};
use tombolo_agent_core::plan::eligible::{Verdict, View};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::zone::{Answer, Data, Kind, MAX_HOSTS, Zone};
use tombolo_proto::model::{Backend, ClusterId, Family, Port, ServiceType};

use super::here::Here;

/// An address, and why it is or is not in the answer (of a ClusterSetIP: behind it).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::command) struct Row {
    /// None: a cluster that has none.
    pub(in crate::command) address: Option<IpAddr>,
    /// Whose; none of a ClusterSetIP, which is the whole set's.
    pub(in crate::command) cluster: Option<ClusterId>,
    /// Target ports.
    pub(in crate::command) ports: Vec<String>,
    pub(in crate::command) used: bool,
    pub(in crate::command) reason: String,
}

/// All addresses of an imported service: its ClusterSetIPs first, then backends.
pub(in crate::command) fn rows(here: &Here, key: &ServiceKey, import: &Import) -> Vec<Row> {
    let zone = here.desired.zone.get();
    let named: BTreeSet<IpAddr> = zone.map(|zone| answered(zone, key)).unwrap_or_default();
    let vips = here.desired.firewall.get().map(|f| &f.vips);
    let mine = |vip: &Vip| import.ips.contains(&vip.address);
    let balances: BTreeMap<&Vip, &Balance> = vips.into_iter().flatten().filter(|(v, _)| mine(v)).collect();
    let balanced: BTreeSet<IpAddr> =
        balances.values().flat_map(|b| b.backends.keys().map(|(address, _)| *address)).collect();

    let mut rows: Vec<Row> =
        import.ips.iter().map(|ip| clusterset_ip(*ip, import, &named, &balances)).collect();
    let none = Shelf::new();
    let slices = here.observed.slices.get().unwrap_or(&none);
    let of: Vec<(&SliceKey, &Slice)> = slices.iter().filter(|(k, _)| k.service == *key).collect();
    let counted: Vec<(&SliceKey, &Slice)> =
        of.iter().copied().filter(|(k, _)| here.members.nodes.contains_key(&k.source)).collect();
    for (slice_key, slice) in &of {
        for backend in &slice.backends {
            let used = match import.kind {
                ServiceType::ClusterSetIP => balanced.contains(&backend.address),
                ServiceType::Headless => named.contains(&backend.address),
            };
            let reason = why_not(here, import, &counted, (slice_key, slice, backend), used);
            rows.push(Row {
                address: Some(backend.address),
                cluster: Some(slice_key.source.clone()),
                ports: slice.ports.iter().map(port).collect(),
                used: reason.is_none(),
                reason: reason.unwrap_or_else(|| in_use(import, slice)),
            });
        }
    }
    for cluster in &import.clusters {
        if of.iter().any(|(k, slice)| k.source == *cluster && !slice.backends.is_empty()) {
            continue;
        }
        rows.push(Row {
            address: None,
            cluster: Some(cluster.clone()),
            ports: Vec::new(),
            used: false,
            reason: here.refused(cluster).unwrap_or_else(|| {
                "exports it, but no backend of it counts: it has none, or all of its ports lost a conflict".to_owned()
            }),
        });
    }
    rows
}

/// The addresses that the bare name answers with.
fn answered(zone: &Zone, key: &ServiceKey) -> BTreeSet<IpAddr> {
    let labels = [key.name.as_str(), key.namespace.as_str(), "svc"];
    let mut found = BTreeSet::new();
    for kind in [Kind::A, Kind::Aaaa] {
        if let Answer::Found(answer) = zone.answer(&labels, kind, 0, usize::MAX) {
            found.extend(answer.records.iter().filter_map(|data| match data {
                Data::A(a) => Some(IpAddr::V4(*a)),
                Data::Aaaa(a) => Some(IpAddr::V6(*a)),
                Data::Srv { .. } | Data::Txt(_) | Data::Soa | Data::Ns => None,
            }));
        }
    }
    found
}

fn clusterset_ip(
    ip: IpAddr,
    import: &Import,
    named: &BTreeSet<IpAddr>,
    balances: &BTreeMap<&Vip, &Balance>,
) -> Row {
    let own: Vec<&&Balance> = balances.iter().filter(|(v, _)| v.address == ip).map(|(_, b)| b).collect();
    let most = own.iter().map(|b| b.backends.len()).max();
    let reason = match (named.contains(&ip), most) {
        (false, _) => "the name does not answer with it".to_owned(),
        (true, None) => {
            "it is outside of this cluster's ClusterSetIP range, or another import's: nothing is balanced there"
                .to_owned()
        }
        (true, Some(0)) => "no backend is eligible: connections are refused".to_owned(),
        (true, Some(n)) => {
            format!("ClusterSetIP, over {n} eligible backends on this node{}", weighted(&own))
        }
    };
    Row {
        address: Some(ip),
        cluster: None,
        ports: import.ports.iter().map(port).collect(),
        used: named.contains(&ip),
        reason,
    }
}

/// Where they do not all get the same.
fn weighted(balances: &[&&Balance]) -> &'static str {
    let all = || balances.iter().flat_map(|b| b.backends.values());
    if all().min() == all().max() { "" } else { ", by weight (tombolo.dev/weight)" }
}

/// None if it is used.
fn why_not(
    here: &Here,
    import: &Import,
    all: &[(&SliceKey, &Slice)],
    (key, slice, backend): (&SliceKey, &Slice, &Backend),
    used: bool,
) -> Option<String> {
    let family = |f: Family| match f {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    if !import.families.contains(&key.family) {
        return Some(format!("the service has no {} here", family(key.family)));
    }
    if let Some(refused) = here.refused(&key.source) {
        return Some(refused);
    }
    let member = here.members.nodes.get(&key.source)?;
    let granted = member.owned.iter().chain(&member.tunnel).any(|p| p.contains(backend.address));
    if !granted || Family::of(backend.address) != key.family {
        return Some(format!("outside of what cluster {} was granted", key.source));
    }
    if !backend.ready {
        return Some(match (backend.terminating, backend.serving) {
            (true, true) => "terminating: it still serves, but takes no new connections".to_owned(),
            (true, false) => "terminating".to_owned(),
            (false, _) => format!("not ready, says cluster {}", key.source),
        });
    }
    if used {
        return None;
    }
    if let Some(left) = left_out(here, import, all, key, slice) {
        return Some(left);
    }
    Some(match import.kind {
        ServiceType::ClusterSetIP if exposed(import, slice).is_empty() => {
            "none of its ports is one of the service's: they lost a port conflict".to_owned()
        }
        ServiceType::ClusterSetIP => {
            "not among the backends that this node uses: they are more than it takes, and other nodes take \
             others; or the plan has no way to it"
                .to_owned()
        }
        ServiceType::Headless => {
            format!("beyond the {MAX_HOSTS} that the bare name answers with; its own name has it")
        }
    })
}

/// Why a cluster's ready backends are not eligible: the agent's own judgement (`docs/preferences.md`).
fn left_out(
    here: &Here,
    import: &Import,
    all: &[(&SliceKey, &Slice)],
    key: &SliceKey,
    slice: &Slice,
) -> Option<String> {
    let unreached = here.unreached();
    let view = View { cluster: &here.set.cluster, unreached: &unreached };
    let verdicts: Vec<Verdict> = match import.kind {
        ServiceType::Headless => view.of_service(import, all).get(&key.source).copied().into_iter().collect(),
        ServiceType::ClusterSetIP => {
            let of = |port| view.of_port(import, all, port, key.family).get(&key.source).copied();
            exposed(import, slice).into_iter().filter_map(of).collect()
        }
    };
    let verdict = verdicts.into_iter().find(|verdict| *verdict != Verdict::Used)?;
    Some(match verdict {
        Verdict::Used => return None,
        Verdict::Unreached => {
            format!("no way leads to cluster {} now, and another cluster has the service", key.source)
        }
        Verdict::NotLocal => {
            "the service prefers local backends (tombolo.dev/prefer), and this cluster has some".to_owned()
        }
        Verdict::Passive(best) => format!(
            "cluster {} has priority {} (tombolo.dev/priority), and backends of priority {} are there",
            key.source,
            import.preferences.share(&key.source).priority.get(),
            best.get()
        ),
    })
}

/// Ports of the service that the slice serves.
fn exposed<'a>(import: &'a Import, slice: &Slice) -> Vec<&'a Port> {
    let serves = |p: &&Port| slice.ports.iter().any(|s| s.name == p.name && s.protocol == p.protocol);
    import.ports.iter().filter(serves).collect()
}

fn in_use(import: &Import, slice: &Slice) -> String {
    let has = exposed(import, slice);
    let missing: Vec<String> = import.ports.iter().filter(|p| !has.contains(p)).map(port).collect();
    if missing.is_empty() {
        "ready".to_owned()
    } else {
        format!(
            "ready, but not for {}: its cluster has no such port, or lost a conflict about it",
            missing.join(", ")
        )
    }
}

pub(in crate::command) fn port(port: &Port) -> String {
    let name = port.name.as_ref().map(|name| format!("{name}:")).unwrap_or_default();
    format!("{name}{}/{}", port.port, port.protocol)
}
