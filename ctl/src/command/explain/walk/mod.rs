//! The walk: one step after another, until one is broken.

mod service;
#[cfg(test)]
mod tests;
mod way;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use tombolo_agent_core::object::ServiceKey;
use tombolo_proto::model::{ClusterId, NodeName, Protocol};

use super::here::Here;
use super::kernel::Kernel;
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
}

fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => format!("[{a}]"),
    }
}
