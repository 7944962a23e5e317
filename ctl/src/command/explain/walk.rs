//! The walk: one step after another, until one is broken.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tombolo_agent_core::desired::{Route, TABLE_OUT, Via, Vip};
use tombolo_agent_core::object::{Import, ServiceKey};
use tombolo_agent_core::world::MemberNodes;
use tombolo_agent_core::zone::APEX;
use tombolo_proto::model::{
    ClusterId, DeviceFamily, DeviceNumber, Family, NodeName, Port, Protocol, ServiceType,
};

use super::backend::{self, Row, port};
use super::here::Here;
use super::kernel::{Kernel, Link, Reply, Way};
use crate::command::resolve;
use crate::output::plain;

/// How a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Outcome {
    Ok,
    /// Works, or cannot be seen from here.
    Warning,
    Failure,
    /// Something before it is broken.
    NotReached,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Step {
    pub(super) step: &'static str,
    /// Of several clusters that have the service: the way to this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cluster: Option<ClusterId>,
    pub(super) outcome: Outcome,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) remedy: Vec<String>,
}

/// Where from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum From {
    /// The node that this runs on.
    Here,
    Node(NodeName),
    Address(IpAddr),
}

/// Where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum To {
    Name(ServiceKey, Option<u16>),
    Address(IpAddr, Option<u16>),
}

/// Steps to the service, then those to each cluster that has it.
const SERVICE: [&str; 5] = ["export", "import", "name", "vip", "eligible"];
const WAY: [&str; 6] = ["reach", "route", "slot", "peer", "mtu", "answer"];

/// Walks. `firewall`: chains of others on this node that drop what is forwarded, with what cures it.
pub(super) fn walk(
    here: &Here,
    kernel: &dyn Kernel,
    from: &From,
    to: &To,
    firewall: &[(String, Vec<String>)],
) -> Vec<Step> {
    let mut walk = Walk { here, kernel, firewall, steps: Vec::new(), cluster: None };
    if walk.all(from, to).is_err() {
        let service: &[&str] = if matches!(to, To::Name(..)) { &SERVICE } else { &[] };
        let rest = ["from", "set"].iter().chain(service).chain(&WAY);
        walk.unreached(rest.copied());
    }
    walk.steps
}

/// A step is broken: those after it are not reached.
struct Broken;

struct Walk<'a> {
    here: &'a Here,
    kernel: &'a dyn Kernel,
    firewall: &'a [(String, Vec<String>)],
    steps: Vec<Step>,
    cluster: Option<ClusterId>,
}

/// A backend to walk to.
#[derive(Clone, Copy)]
struct Goal {
    address: IpAddr,
    port: Option<(Protocol, u16)>,
}

impl Walk<'_> {
    fn add(&mut self, step: &'static str, outcome: Outcome, message: String, remedy: &[&str]) {
        let remedy = remedy.iter().map(|r| (*r).to_owned()).collect();
        let cluster = self.cluster.clone();
        self.steps.push(Step { step, cluster, outcome, message: plain(&message), remedy });
    }

    fn ok(&mut self, step: &'static str, message: impl Into<String>) {
        self.add(step, Outcome::Ok, message.into(), &[]);
    }

    fn warn(&mut self, step: &'static str, message: impl Into<String>, remedy: &[&str]) {
        self.add(step, Outcome::Warning, message.into(), remedy);
    }

    fn fail<T>(
        &mut self,
        step: &'static str,
        message: impl Into<String>,
        remedy: &[&str],
    ) -> Result<T, Broken> {
        self.add(step, Outcome::Failure, message.into(), remedy);
        Err(Broken)
    }

    fn unreached(&mut self, steps: impl Iterator<Item = &'static str>) {
        for step in steps {
            if !self.steps.iter().any(|s| s.step == step && s.cluster == self.cluster) {
                self.add(step, Outcome::NotReached, "not reached".to_owned(), &[]);
            }
        }
    }

    fn all(&mut self, from: &From, to: &To) -> Result<(), Broken> {
        let pod = self.from(from)?;
        self.set(to)?;
        let service = match to {
            To::Name(key, port) => Some((key.clone(), *port)),
            // A ClusterSetIP is a name's.
            To::Address(address, port) => self
                .here
                .observed
                .imports
                .get()
                .and_then(|all| all.iter().find(|(_, import)| import.ips.contains(address)))
                .map(|(key, _)| (key.clone(), *port)),
        };
        let goals: BTreeMap<ClusterId, Goal> = match (service, to) {
            (Some((key, port)), _) => self.service(&key, port, pod)?,
            (None, To::Address(address, port)) => self.address(*address, *port)?,
            (None, To::Name(..)) => BTreeMap::new(),
        };
        let several = goals.len() > 1;
        for (cluster, goal) in goals {
            self.cluster = several.then(|| cluster.clone());
            if self.way(&cluster, goal, pod).is_err() {
                self.unreached(WAY.into_iter());
            }
        }
        self.cluster = None;
        Ok(())
    }

    /// Who asks; the address of a pod on this node.
    fn from(&mut self, from: &From) -> Result<Option<IpAddr>, Broken> {
        let (here, us) = (self.here, &self.here.world.node);
        let cluster = &here.set.cluster;
        match from {
            From::Here => {
                self.ok("from", format!("node {us} of cluster {cluster}"));
                Ok(None)
            }
            From::Node(node) if node == us => {
                self.ok("from", format!("node {us} of cluster {cluster}"));
                Ok(None)
            }
            From::Node(node) => self.fail(
                "from",
                format!("{node} is not this node, which is {us}"),
                &["run the same on that node: kernel, devices and resolver are looked at where traffic begins"],
            ),
            From::Address(address) => self.pod(*address),
        }
    }

    fn pod(&mut self, address: IpAddr) -> Result<Option<IpAddr>, Broken> {
        let (here, us) = (self.here, &self.here.world.node);
        let cluster = &here.set.cluster;
        let nodes = here.observed.nodes.get();
        if nodes.and_then(|nodes| nodes.get(us)).is_some_and(|node| node.addresses.contains(&address)) {
            self.ok("from", format!("{address}: node {us} of cluster {cluster} itself"));
            return Ok(None);
        }
        let own = here.own();
        if let Some((other, _)) = here.owner(address).filter(|(id, _)| *id != cluster) {
            return self.fail(
                "from",
                format!("{address} is of cluster {other}, and this is {cluster}"),
                &["run the same there, on the node of that address"],
            );
        }
        if !own.is_some_and(|own| own.owned.iter().any(|range| range.contains(address))) {
            return self.fail(
                "from",
                format!("{address} is in no range that cluster {cluster} was granted: others do not let it in"),
                &["tombolo status -o wide shows the ranges; the administrator grants more by tombolo invite --renew"],
            );
        }
        let holds = own.and_then(|own| {
            own.nodes.iter().find(|(_, node)| node.prefixes.iter().any(|range| range.contains(address)))
        });
        match holds {
            Some((node, _)) if node != us => self.fail(
                "from",
                format!("{address} is a pod of node {node}, and this is {us}"),
                &["run the same on that node: kernel, devices and resolver are looked at where traffic begins"],
            ),
            Some(_) => {
                self.ok("from", format!("{address}: a pod of node {us} of cluster {cluster}"));
                Ok(Some(address))
            }
            None => {
                self.warn(
                    "from",
                    format!("{address} is of cluster {cluster}; no node states that it has it"),
                    &["set spec.podCIDRs of the Nodes (docs/troubleshooting.md#nodeprefixesunknown)"],
                );
                Ok(Some(address))
            }
        }
    }

    /// The set: is anybody else there?
    fn set(&mut self, to: &To) -> Result<(), Broken> {
        let here = self.here;
        let us = &here.set.cluster;
        if here.own().is_none() {
            let why = match here.revoked.get(us) {
                Some(_) => "was revoked by the administrator".to_owned(),
                None => "has no membership that verifies".to_owned(),
            };
            return self.fail(
                "set",
                format!("this cluster, {us}, {why}"),
                &["tombolo status tells why; ask the administrator for another token (docs/troubleshooting.md#notamember)"],
            );
        }
        let gone = here.taken_out();
        let gone = if gone.is_empty() { String::new() } else { format!(" ({})", gone.join(", ")) };
        let others: Vec<&ClusterId> = here.members.nodes.keys().filter(|id| *id != us).collect();
        if others.is_empty() {
            return self.fail(
                "set",
                format!("no other cluster is in the set{gone}"),
                &["tombolo status shows who is refused and why; another cluster joins by tombolo invite and tombolo join"],
            );
        }
        let silent: Vec<String> = others
            .iter()
            .filter(|id| here.members.nodes.get(**id).is_some_and(|m| m.nodes.is_empty()))
            .map(|id| format!("{id} has not spoken yet"))
            .collect();
        let names: Vec<&str> = others.iter().map(|id| id.as_str()).collect();
        let mut text = format!("joined with {}{gone}", names.join(", "));
        if !silent.is_empty() {
            text += &format!("; {}", silent.join(", "));
        }
        if let To::Address(address, _) = to
            && let Some((owner, _)) = here.owner(*address)
        {
            text += &format!("; {address} is {owner}'s");
        }
        self.ok("set", text);
        Ok(())
    }

    /// From the name to backends, one of each cluster.
    fn service(
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
            .map_or(0, |balance| balance.backends.len().min(64));
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
    fn address(&mut self, address: IpAddr, asked: Option<u16>) -> Result<BTreeMap<ClusterId, Goal>, Broken> {
        let here = self.here;
        let clusterset = here.set.clusterset.nets().any(|net| net.contains(&address));
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

    /// Over tunnels to one cluster.
    fn way(&mut self, cluster: &ClusterId, goal: Goal, pod: Option<IpAddr>) -> Result<(), Broken> {
        let Some(member) = self.here.members.nodes.get(cluster) else {
            let why = self.here.refused(cluster).unwrap_or_default();
            return self.fail("reach", why, &["tombolo status tells why"]);
        };
        self.reach(cluster, goal, pod)?;
        let Ok(links) = self.kernel.links() else {
            return self.fail("route", "links cannot be read", &["apt-get install iproute2"]);
        };
        let slots = self.route(cluster, member, goal, pod, &links)?;
        let slots = self.slots(&slots, &links)?;
        let answering = self.peer(cluster, member, goal, &slots)?;
        self.mtu(cluster, answering, &slots, &links)?;
        self.answer(cluster, goal)
    }

    /// Who lets it pass. The other cluster's filter is not seen from here.
    fn reach(&mut self, cluster: &ClusterId, goal: Goal, pod: Option<IpAddr>) -> Result<(), Broken> {
        if pod.is_some()
            && let Some((what, cures)) = self.firewall.first()
        {
            let cures: Vec<&str> = cures.iter().map(String::as_str).collect();
            return self.fail("reach", format!("this node drops what its pods send: {what}"), &cures);
        }
        let exported = self.exported(goal);
        let what = match goal.port {
            Some((protocol, port)) => format!("{}:{port}/{protocol}", host(goal.address)),
            None => goal.address.to_string(),
        };
        if exported {
            self.ok("reach", format!("{what} is exported, so {cluster}'s nodes should let it in (their filter is not seen from here)"));
        } else {
            self.warn(
                "reach",
                format!("{what} is behind nothing that is imported here: {cluster}'s nodes drop it, unless its reach is `all` (not seen from here)"),
                &["export the service there, or ask that cluster's operator"],
            );
        }
        Ok(())
    }

    fn exported(&self, goal: Goal) -> bool {
        let slices = self.here.observed.slices.get();
        slices.into_iter().flatten().any(|(_, slice)| {
            slice.backends.iter().any(|b| b.address == goal.address)
                && goal.port.is_none_or(|(protocol, port)| {
                    slice.ports.iter().any(|p| p.protocol == protocol && p.port == port)
                })
        })
    }

    /// The planned route, and what the kernel does.
    fn route(
        &mut self,
        cluster: &ClusterId,
        member: &MemberNodes,
        goal: Goal,
        pod: Option<IpAddr>,
        links: &BTreeMap<DeviceNumber, Link>,
    ) -> Result<BTreeSet<DeviceNumber>, Broken> {
        let here = self.here;
        let us = &here.world.node;
        let Some(routes) = here.desired.routes.get() else {
            return self.fail(
                "route",
                "nothing is planned: not all of state/ can be read",
                &["tombolo status tells why"],
            );
        };
        let covers = |r: &&Route| r.table == TABLE_OUT && r.prefix.contains(goal.address);
        let best = routes
            .iter()
            .filter(covers)
            .filter_map(|r| match &r.via {
                Via::Devices(devices) => Some((r.prefix, devices)),
                Via::Unreachable => None,
            })
            .max_by_key(|(prefix, _)| prefix.length());
        let Some((prefix, slots)) = best else {
            let own = here.own();
            let gateway = |m: &MemberNodes| m.nodes.values().any(|n| n.rank.is_gateway());
            let (why, cure) = if !gateway(member) {
                (
                    format!("cluster {cluster} has stated no gateway yet"),
                    "do its agents run, and reach the broker? tombolo status there",
                )
            } else if own.is_none_or(|own| !own.nodes.contains_key(us)) {
                (
                    format!("this cluster has not stated node {us} yet"),
                    "does an agent run here and another lead? tombolo status",
                )
            } else if !own.is_some_and(gateway) {
                (
                    "this cluster has no gateway".to_owned(),
                    "label a node tombolo.dev/gateway=true, or start an agent on a Ready one",
                )
            } else {
                (
                    "no tunnel of this node leads there".to_owned(),
                    "tombolo status lists the findings that tell why",
                )
            };
            return self.fail("route", why, &[cure]);
        };
        let names = devices(slots);
        if slots.iter().all(|n| !links.contains_key(n)) {
            self.ok("route", format!("{prefix} by {names}, as planned"));
            return Ok(slots.clone());
        }
        let heal = "is the agent of this node running? It puts back what is lost within seconds; its log tells why it cannot";
        match self.kernel.route(goal.address, pod) {
            Ok(Way::Link(link)) if slots.iter().any(|n| n.link() == link) => {
                self.ok("route", format!("{prefix} by {names}; the kernel takes {link}"));
                Ok(slots.clone())
            }
            // The agent knows which peers are dead, and avoids them.
            Ok(Way::Link(link)) if link.starts_with("tombolo") => {
                let number = link.trim_start_matches("tombolo").parse().ok().and_then(DeviceNumber::new);
                self.warn(
                    "route",
                    format!("{prefix} by {names}; the agent has chosen {link} instead"),
                    &["docs/troubleshooting.md; tombolo status shows what the agent finds"],
                );
                Ok(number.map_or_else(|| slots.clone(), |number| BTreeSet::from([number])))
            }
            Ok(Way::Link(link)) => self.fail(
                "route",
                format!("{prefix} is planned by {names}, and the kernel sends it by {link}"),
                &["a rule of somebody else comes first: ip rule; ip route show table 4510", heal],
            ),
            Ok(Way::Refused(error)) => self.fail(
                "route",
                format!("{prefix} is planned by {names}, and the kernel says: {error}"),
                &["ip rule; ip route show table 4510", heal],
            ),
            Err(error) => {
                self.warn(
                    "route",
                    format!("{prefix} by {names} as planned; the kernel was not asked: {error}"),
                    &[],
                );
                Ok(slots.clone())
            }
        }
    }

    fn slots(
        &mut self,
        planned: &BTreeSet<DeviceNumber>,
        links: &BTreeMap<DeviceNumber, Link>,
    ) -> Result<BTreeSet<DeviceNumber>, Broken> {
        let good: BTreeSet<DeviceNumber> =
            planned.iter().copied().filter(|n| links.get(n).is_some_and(|link| link.up)).collect();
        let bad: BTreeSet<DeviceNumber> = planned.difference(&good).copied().collect();
        let cure = "is tombolo-wireguard serve running on this node? its log and the agent's tell more";
        if good.is_empty() {
            return self.fail("slot", format!("{} is missing or down", devices(&bad)), &[cure]);
        }
        if bad.is_empty() {
            self.ok("slot", format!("{} up", devices(&good)));
        } else {
            self.warn("slot", format!("{} up; {} missing or down", devices(&good), devices(&bad)), &[cure]);
        }
        Ok(good)
    }

    /// Who answers behind the slots; a tunnel address that does, of the other cluster if possible.
    fn peer(
        &mut self,
        cluster: &ClusterId,
        member: &MemberNodes,
        goal: Goal,
        slots: &BTreeSet<DeviceNumber>,
    ) -> Result<IpAddr, Broken> {
        let here = self.here;
        let family = Family::of(goal.address);
        let mut answering = None;
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for number in slots {
            let Some(device) = here.desired.devices.get().and_then(|all| all.get(number)) else { continue };
            let state = self.kernel.device(*number);
            for (key, peer) in &device.peers {
                if !peer.allowed.iter().any(|p| p.contains(goal.address)) {
                    continue;
                }
                let known = state.as_ref().ok().and_then(|state| state.peers.get(key));
                let place = match known.and_then(|k| k.endpoint) {
                    Some(at) => format!("{} at {at} by {number}", peer.node),
                    None => format!("{} by {number}", peer.node),
                };
                let session = match (&state, known.map(|k| k.last_handshake)) {
                    (Err(error), _) => error.clone(),
                    (Ok(_), None) => "the device does not know it".to_owned(),
                    (Ok(_), Some(None)) => "no handshake yet".to_owned(),
                    (Ok(_), Some(Some(at))) => format!("handshake {} ago", ago(at)),
                };
                let echo = peer.tunnel.iter().copied().find(|a| Family::of(*a) == family);
                let reply = echo.map(|to| (to, self.kernel.echo(to, Some(*number), 84)));
                match reply {
                    Some((to, Ok(Reply::Answered(time)))) => {
                        good.push(format!("{place} ({session}, echo {})", ms(time)));
                        answering = answering.or(Some(to));
                    }
                    Some((_, Ok(_))) => bad.push(format!("{place} ({session}, no echo)")),
                    Some((_, Err(error))) => bad.push(format!("{place} ({session}; {error})")),
                    None => bad.push(format!("{place} ({session}; no tunnel address to ask)")),
                }
            }
        }
        let outer = slots.iter().all(|n| n.family() == DeviceFamily::Out);
        let open = "does UDP 4510 to 4522 pass between the two nodes, both ways (clouds' firewalls, NAT)? do agent and \
                    tombolo-wireguard run there? tombolo status shows the addresses that are tried";
        let Some(answering) = answering else {
            return self.fail("peer", format!("nobody answers: {}", bad.join(", ")), &[open]);
        };
        let text = if bad.is_empty() {
            good.join(", ")
        } else {
            format!("{}; silent: {}", good.join(", "), bad.join(", "))
        };
        if outer {
            self.peers_are(text, bad.is_empty(), open);
            return Ok(answering);
        }
        // Own gateways answered; now those behind them.
        let gateways = member.nodes.values().filter(|n| n.rank.is_gateway());
        let far: Vec<(String, IpAddr)> = gateways
            .filter_map(|n| Some((n.node.to_string(), n.tunnel().find(|a| Family::of(*a) == family)?)))
            .collect();
        let replies: Vec<(String, IpAddr, bool)> = far
            .into_iter()
            .map(|(node, to)| {
                let answered = matches!(self.kernel.echo(to, None, 84), Ok(Reply::Answered(_)));
                (node, to, answered)
            })
            .collect();
        let names = |yes: bool| {
            let names: Vec<&str> = replies.iter().filter(|r| r.2 == yes).map(|r| r.0.as_str()).collect();
            names.join(", ")
        };
        let Some((_, far, _)) = replies.iter().find(|r| r.2) else {
            let on: Vec<String> = here
                .own()
                .into_iter()
                .flat_map(|own| own.nodes.values())
                .filter(|n| n.rank.is_gateway())
                .map(|n| n.node.to_string())
                .collect();
            let cure = format!(
                "run the same on a gateway of this cluster ({}): it sees the tunnels between the clusters",
                on.join(", ")
            );
            return self.fail(
                "peer",
                format!("own gateways answer, those of {cluster} ({}) do not: {text}", names(false)),
                &[&cure, open],
            );
        };
        let all = replies.iter().all(|r| r.2);
        let text = if all {
            format!("{text}; behind them {}", names(true))
        } else {
            format!("{text}; behind them {}, silent: {}", names(true), names(false))
        };
        self.peers_are(text, bad.is_empty() && all, open);
        Ok(*far)
    }

    fn peers_are(&mut self, text: String, all: bool, cure: &str) {
        if all {
            self.ok("peer", text);
        } else {
            self.warn("peer", text, &[cure]);
        }
    }

    /// A packet as large as the tunnel takes must pass.
    fn mtu(
        &mut self,
        cluster: &ClusterId,
        to: IpAddr,
        slots: &BTreeSet<DeviceNumber>,
        links: &BTreeMap<DeviceNumber, Link>,
    ) -> Result<(), Broken> {
        for number in slots {
            let planned =
                self.here.desired.devices.get().and_then(|all| all.get(number)).map(|d| u64::from(d.mtu));
            let real = links.get(number).map(|link| link.mtu);
            if planned != real {
                let text = format!(
                    "{number} has {} bytes, and {} are planned",
                    real.unwrap_or(0),
                    planned.unwrap_or(0)
                );
                return self.fail(
                    "mtu",
                    text,
                    &["is the agent of this node running? It sets it back within seconds"],
                );
            }
        }
        let least = slots.iter().filter_map(|n| links.get(n)).map(|link| link.mtu).min().unwrap_or(0);
        let bytes = usize::try_from(least).unwrap_or(0);
        match self.kernel.echo(to, None, bytes) {
            Ok(Reply::Answered(_)) => {
                self.ok("mtu", format!("{bytes} bytes pass, there and back"));
                Ok(())
            }
            Ok(_) => self.fail(
                "mtu",
                format!("small packets pass to {cluster}, packets of {bytes} bytes do not"),
                &["a link between the two carries less than its ends say: raise its MTU, or lower that of both nodes' links"],
            ),
            Err(error) => {
                self.warn("mtu", format!("{bytes} bytes; not tried: {error}"), &[]);
                Ok(())
            }
        }
    }

    /// The backend itself, asked from this node.
    fn answer(&mut self, cluster: &ClusterId, goal: Goal) -> Result<(), Broken> {
        let there = "look there: tombolo check on the pod's node; is the pod alive, and what does its cluster's own policy let in?";
        let exported = self.exported(goal);
        match goal.port {
            Some((Protocol::Tcp, port)) => {
                let to = SocketAddr::new(goal.address, port);
                match self.kernel.connect(to) {
                    Reply::Answered(time) => {
                        self.ok("answer", format!("{to} takes connections of this node ({})", ms(time)));
                        Ok(())
                    }
                    Reply::Refused => self.fail(
                        "answer",
                        format!("{to} refuses connections: the pod is reached, and nothing listens there"),
                        &[there],
                    ),
                    Reply::Silent if exported => self.fail(
                        "answer",
                        format!("the way to {cluster} is whole, and {to} does not answer"),
                        &[there],
                    ),
                    Reply::Silent => self.fail(
                        "answer",
                        format!(
                            "the way to {cluster} is whole, and {to}, which is not exported, does not answer"
                        ),
                        &["export the service there, or ask that cluster's operator"],
                    ),
                }
            }
            other => {
                let what = match other {
                    Some((protocol, port)) => format!("{}:{port}/{protocol}", host(goal.address)),
                    None => goal.address.to_string(),
                };
                match self.kernel.echo(goal.address, None, 84) {
                    Ok(Reply::Answered(time)) => {
                        self.ok("answer", format!("{} answers an echo ({}); {what} itself was not asked", goal.address, ms(time)));
                    }
                    _ => self.warn(
                        "answer",
                        format!("the way to {cluster} is whole, and {} does not answer an echo, which a pod need not", goal.address),
                        &[there],
                    ),
                }
                Ok(())
            }
        }
    }
}

fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => format!("[{a}]"),
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

fn devices(all: &BTreeSet<DeviceNumber>) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// `at`: since 1970.
fn ago(at: Duration) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{} s", now.saturating_sub(at).as_secs())
}
