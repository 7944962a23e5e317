//! From a name, or an address, to backends: export, import, name, VIP, eligibility.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_agent_core::desired::Vip;
use tombolo_agent_core::object::{Import, ServiceKey};
use tombolo_agent_core::world::ClustersetRanges;
use tombolo_agent_core::zone::APEX;
use tombolo_proto::model::{ClusterId, Family, Port, Protocol, ServiceType};

use super::super::backend::{self, Row, port};
use super::{Broken, Goal, Outcome, Walk, host};
use crate::command::resolve;

impl Walk<'_> {
    /// From the name to backends, one of each cluster.
    pub(super) fn service(
        &mut self,
        key: &ServiceKey,
        asked: Option<u16>,
        pod: Option<IpAddr>,
    ) -> Result<BTreeMap<ClusterId, Goal>, Broken> {
        let import = self.import(key)?;
        let family = self.name(key, &import, pod)?;
        let wanted = self.port(key, &import, asked)?;
        self.vip(&import, family, wanted.as_ref())?;
        self.eligible(key, &import, family, wanted.as_ref())
    }

    fn import(&mut self, key: &ServiceKey) -> Result<Import, Broken> {
        let observed = &self.here.observed;
        let us = &self.here.set.cluster;
        let missing = observed.namespaces.get().is_some_and(|all| !all.contains(&key.namespace));
        if missing {
            self.warn(
                "export",
                format!("not seen from here: {us} takes nothing in namespaces that it does not have"),
                &[],
            );
            return self.fail(
                "import",
                resolve::no_namespace(observed, key),
                &["create the namespace here, as in the clusters that export the service"],
            );
        }
        let Some(imports) = observed.imports.get() else {
            return self.fail("export", "what is imported cannot be read now", &["tombolo status tells why"]);
        };
        let Some(import) = imports.get(key) else {
            return self.fail(
                "export",
                resolve::not_imported(observed, key),
                &[&format!("tombolo export {key}    # in the cluster that has the service; tombolo status there tells the rest")],
            );
        };
        let clusters: Vec<String> = import.clusters.iter().map(ToString::to_string).collect();
        let refused: Vec<String> = import.clusters.iter().filter_map(|id| self.here.refused(id)).collect();
        let text = format!("exported by {}", clusters.join(", "));
        if refused.is_empty() {
            self.ok("export", text);
        } else {
            self.warn("export", format!("{text}; {}", refused.join(", ")), &[]);
        }
        let ports: Vec<String> = import.ports.iter().map(port).collect();
        let kind = match import.kind {
            ServiceType::ClusterSetIP => "ClusterSetIP",
            ServiceType::Headless => "Headless",
        };
        self.ok("import", format!("ServiceImport {key}: {kind}, {}", ports.join(", ")));
        Ok(import.clone())
    }

    /// What the plan and the resolver answer; the family to go on with.
    fn name(&mut self, key: &ServiceKey, import: &Import, pod: Option<IpAddr>) -> Result<Family, Broken> {
        let name = format!("{}.{}.svc.{APEX}", key.name, key.namespace);
        let families: Vec<Family> = match pod {
            Some(pod) => vec![Family::of(pod)],
            None => Family::ALL.into_iter().filter(|f| import.families.contains(f)).collect(),
        };
        let Some(&family) = families.first().filter(|f| import.families.contains(f)) else {
            return self.fail(
                "name",
                format!("{name} has no addresses of the family that is asked from"),
                &["ask from an address of the other family, or make the service dual-stack where it runs"],
            );
        };
        let planned: BTreeSet<IpAddr> = backend::rows(self.here, key, import)
            .iter()
            .filter(|row| row.used && (row.cluster.is_none() || import.kind == ServiceType::Headless))
            .filter_map(|row| row.address)
            .filter(|address| Family::of(*address) == family)
            .collect();
        let answer: BTreeSet<IpAddr> = match self.kernel.resolve(&name, family) {
            Ok(answer) => answer.into_iter().collect(),
            Err(error) => {
                return self.fail(
                    "name",
                    format!("the resolver of this node: {error}"),
                    &["is tombolo-agent running on this node? its log tells more; tombolo check"],
                );
            }
        };
        if planned.is_empty() {
            return self.fail(
                "name",
                format!("{name} has no address"),
                &[&format!(
                    "tombolo resolve --explain {}.{}    # tells why of each",
                    key.name, key.namespace
                )],
            );
        }
        if answer.is_empty() || !answer.is_subset(&planned) {
            return self.fail(
                "name",
                format!("the resolver answers {}, where {} is imported", list(&answer), list(&planned)),
                &["the agent of this node is behind: its log tells why; tombolo check"],
            );
        }
        self.ok("name", format!("{name} is {}", list(&answer)));
        Ok(family)
    }

    fn port(
        &mut self,
        key: &ServiceKey,
        import: &Import,
        asked: Option<u16>,
    ) -> Result<Option<Port>, Broken> {
        let found = match asked {
            None => {
                import.ports.iter().find(|p| p.protocol == Protocol::Tcp).or_else(|| import.ports.first())
            }
            Some(asked) => import.ports.iter().find(|p| p.port == asked),
        };
        if found.is_none() && (asked.is_some() && import.kind == ServiceType::ClusterSetIP) {
            let ports: Vec<String> = import.ports.iter().map(port).collect();
            return self.fail(
                "vip",
                format!("{} is no port of {key}, which has {}", asked.unwrap_or(0), ports.join(", ")),
                &["ask for one of these; ports that lost a conflict with another cluster's are left out"],
            );
        }
        Ok(found.cloned())
    }

    fn vip(&mut self, import: &Import, family: Family, wanted: Option<&Port>) -> Result<(), Broken> {
        if import.kind == ServiceType::Headless {
            self.ok("vip", "none: a headless name answers with the backends themselves");
            return Ok(());
        }
        let address = import.ips.iter().copied().find(|a| Family::of(*a) == family);
        let (Some(address), Some(wanted)) = (address, wanted) else {
            return self.fail(
                "vip",
                "the import has no ClusterSetIP of this family, or no port",
                &["docs/troubleshooting.md#clustersetiprangefull"],
            );
        };
        let vip = Vip { address, protocol: wanted.protocol, port: wanted.port };
        let planned = self
            .here
            .desired
            .firewall
            .get()
            .and_then(|f| f.vips.get(&vip))
            .map_or(0, |balance| balance.entries().min(64));
        let what = format!("{}:{}/{}", host(address), vip.port, vip.protocol);
        match self.kernel.vip(&vip) {
            Err(error) => self.fail(
                "vip",
                format!("the firewall of this node cannot be read: {error}"),
                &["run as root; tombolo check tells whether nft is there"],
            ),
            Ok(real) if real.unwrap_or(0) == planned => {
                self.ok("vip", format!("{what} is spread over {planned} backends by this node's firewall"));
                Ok(())
            }
            Ok(real) => self.fail(
                "vip",
                format!("{what} is spread over {} backends, and {planned} are eligible", real.unwrap_or(0)),
                &["the agent of this node is behind, or does not run: its log tells why; tombolo check"],
            ),
        }
    }

    fn eligible(
        &mut self,
        key: &ServiceKey,
        import: &Import,
        family: Family,
        wanted: Option<&Port>,
    ) -> Result<BTreeMap<ClusterId, Goal>, Broken> {
        let rows = backend::rows(self.here, key, import);
        let backends: Vec<&Row> = rows
            .iter()
            .filter(|row| row.cluster.is_some() && row.address.is_none_or(|a| Family::of(a) == family))
            .collect();
        let used: Vec<&&Row> = backends.iter().filter(|row| row.used).collect();
        let unused: Vec<String> = backends
            .iter()
            .filter(|row| !row.used)
            .take(3)
            .map(|row| {
                let address = row.address.map(|a| format!("{a} ")).unwrap_or_default();
                let cluster = row.cluster.as_ref().map(ToString::to_string).unwrap_or_default();
                format!("{address}({cluster}): {}", row.reason)
            })
            .collect();
        let explain = format!("tombolo resolve --explain {}.{}    # tells of each", key.name, key.namespace);
        if used.is_empty() {
            let why = if unused.is_empty() { "there are none".to_owned() } else { unused.join("; ") };
            return self.fail("eligible", format!("no backend is eligible: {why}"), &[&explain]);
        }
        let mut goals = BTreeMap::new();
        for row in &used {
            let (Some(cluster), Some(address)) = (&row.cluster, row.address) else { continue };
            let target = wanted.and_then(|wanted| self.target(key, cluster, address, wanted));
            goals.entry(cluster.clone()).or_insert(Goal { address, port: target });
        }
        let counts: Vec<String> = goals
            .keys()
            .map(|id| format!("{} of {id}", used.iter().filter(|r| r.cluster.as_ref() == Some(id)).count()))
            .collect();
        let mut text = format!("{} of {} backends: {}", used.len(), backends.len(), counts.join(", "));
        if unused.is_empty() {
            self.ok("eligible", text);
        } else {
            text += &format!("; not {}", unused.join("; "));
            self.add("eligible", Outcome::Ok, text, &[&explain]);
        }
        let own = goals.remove(&self.here.set.cluster);
        if own.is_some() && goals.is_empty() {
            let text = "only this cluster itself has backends: its own network carries, Tombolo does not";
            self.ok("reach", text);
        }
        Ok(goals)
    }

    /// The target port of a backend.
    fn target(
        &self,
        key: &ServiceKey,
        cluster: &ClusterId,
        address: IpAddr,
        wanted: &Port,
    ) -> Option<(Protocol, u16)> {
        let slices = self.here.observed.slices.get()?;
        let of = slices.iter().filter(|(k, _)| k.service == *key && k.source == *cluster);
        let has = of.filter(|(_, slice)| slice.backends.iter().any(|b| b.address == address));
        let mut ports = has.flat_map(|(_, slice)| &slice.ports);
        let found = ports.find(|p| p.name == wanted.name && p.protocol == wanted.protocol)?;
        Some((found.protocol, found.port))
    }

    /// An address that is no ClusterSetIP.
    pub(super) fn address(
        &mut self,
        address: IpAddr,
        asked: Option<u16>,
    ) -> Result<BTreeMap<ClusterId, Goal>, Broken> {
        let here = self.here;
        let clusterset =
            here.set.clusterset.iter().flat_map(ClustersetRanges::nets).any(|net| net.contains(&address));
        if clusterset {
            return self.fail(
                "reach",
                format!(
                    "{address} is in the range of ClusterSetIPs, and no import's: connections are refused"
                ),
                &["ask for the name: tombolo explain SERVICE.NAMESPACE"],
            );
        }
        let Some((owner, _)) = here.owner(address) else {
            let gone = here.taken_out();
            let gone = if gone.is_empty() { String::new() } else { format!(" ({})", gone.join(", ")) };
            return self.fail(
                "reach",
                format!(
                    "no cluster of the set owns {address}{gone}: it goes where this node's own routes lead"
                ),
                &["tombolo status -o wide shows who owns what"],
            );
        };
        if *owner == here.set.cluster {
            self.ok(
                "reach",
                format!("{address} is in this cluster itself: its own network carries, Tombolo does not"),
            );
            return Ok(BTreeMap::new());
        }
        let slices = here.observed.slices.get();
        let of: Vec<(Protocol, u16)> = slices
            .into_iter()
            .flatten()
            .filter(|(_, slice)| slice.backends.iter().any(|b| b.address == address))
            .flat_map(|(_, slice)| slice.ports.iter().map(|p| (p.protocol, p.port)))
            .collect();
        let port = match asked {
            Some(asked) => of.iter().copied().find(|(_, p)| *p == asked).or(Some((Protocol::Tcp, asked))),
            None => of.iter().copied().min(),
        };
        Ok(BTreeMap::from([(owner.clone(), Goal { address, port })]))
    }
}

fn list(all: &BTreeSet<IpAddr>) -> String {
    const MOST: usize = 4;
    if all.is_empty() {
        return "nothing".to_owned();
    }
    let mut text: Vec<String> = all.iter().take(MOST).map(ToString::to_string).collect();
    if all.len() > MOST {
        text.push(format!("{} more", all.len() - MOST));
    }
    text.join(", ")
}
