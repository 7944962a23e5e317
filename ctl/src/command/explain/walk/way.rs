//! Over tunnels to one cluster: reach, route, slot, peer, MTU, answer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use tombolo_agent_core::desired::{Route, TABLE_OUT, Via};
use tombolo_agent_core::world::MemberNodes;
use tombolo_proto::model::{ClusterId, DeviceFamily, DeviceNumber, Family, Protocol};

use super::super::kernel::{Link, Reply, Way};
use super::{Broken, Goal, Walk, host};

impl Walk<'_> {
    /// Over tunnels to one cluster.
    pub(super) fn way(&mut self, cluster: &ClusterId, goal: Goal, pod: Option<IpAddr>) -> Result<(), Broken> {
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
                Via::Bound(_) | Via::Unreachable => None,
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
        // A meshed node's own tunnel to the node that has the pod, where it does not carry.
        for (node, number) in self.unused(goal, slots) {
            bad.push(format!("{node} by {number}, which would be direct"));
        }
        let open = "does UDP 4510 to 4517 pass between the two nodes, both ways (clouds' firewalls, NAT)? do agent and \
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

    /// Meshed nodes that have the pod and to whom this node has a tunnel that no packet takes.
    fn unused(&self, goal: Goal, slots: &BTreeSet<DeviceNumber>) -> Vec<(String, DeviceNumber)> {
        let devices = self.here.desired.devices.get().into_iter().flatten();
        let plain = devices.filter(|(number, _)| {
            number.family() == DeviceFamily::Out && !number.rank().is_gateway() && !slots.contains(number)
        });
        let has = plain.flat_map(|(number, device)| device.peers.values().map(move |peer| (number, peer)));
        has.filter(|(_, peer)| peer.allowed.iter().any(|p| p.contains(goal.address)))
            .map(|(number, peer)| (peer.node.to_string(), *number))
            .collect()
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
        let narrow = self.here.world.health.narrow.iter();
        let narrow = narrow
            .filter(|((number, _), _)| slots.contains(number))
            .map(|(_, bytes)| u64::from(*bytes))
            .min();
        let bytes = usize::try_from(narrow.map_or(least, |bytes| bytes.min(least))).unwrap_or(0);
        match self.kernel.echo(to, None, bytes) {
            Ok(Reply::Answered(_)) => {
                let path = narrow.map(|_| format!("; the path carries no more, the device {least}"));
                self.ok("mtu", format!("{bytes} bytes pass, there and back{}", path.unwrap_or_default()));
                Ok(())
            }
            Ok(_) => self.fail(
                "mtu",
                format!("small packets pass to {cluster}, packets of {bytes} bytes do not"),
                &["a link between the two carries less than its ends say; the agent finds that out within ten seconds, if it runs"],
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
