//! Ranges: what was granted, against this node's addresses and routes.

use std::net::IpAddr;
use std::process::Command;

use ipnet::IpNet;
use serde_json::Value;
use tombolo_agent::api::Observed;
use tombolo_agent::observe::member::Members;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::world::ClustersetRanges;
use tombolo_proto::model::{ClusterId, Prefix};

use super::Lines;
use crate::output::{Verdict, plain};

/// Our routes bear it.
const OUR_PROTOCOL: &str = "98";
const OUR_LINKS: &str = "tombolo";

/// A net that this node has of its own: an address of a link, or a route that is not ours.
struct Local {
    net: Prefix,
    link: String,
    what: String,
    is_address: bool,
}

pub(super) fn ranges(lines: &mut Lines, observed: &Observed, verified: &Members) {
    let Known::Yes(Some(set)) = &observed.clusterset else { return };
    let Some(local) = local() else {
        lines.add(
            "ranges",
            "routes",
            Verdict::Warning,
            "addresses and routes cannot be read: is the program ip there?",
        );
        lines.remedy(&["apt-get install iproute2"]);
        return;
    };
    let own = verified.nodes.get(&set.cluster);
    match own {
        Some(own) => {
            for range in &own.owned {
                own_range(lines, range, &local);
            }
        }
        None => {
            lines.add(
                "ranges",
                "own grant",
                Verdict::Failure,
                "this cluster's own membership does not verify",
            );
            lines.remedy(&["tombolo status tells why; ask the administrator for another token"]);
        }
    }
    let mut clashes = 0;
    let ranges = set.clusterset.iter().flat_map(ClustersetRanges::nets);
    for range in ranges.filter_map(|net| Prefix::new(net).ok()) {
        for clash in local.iter().filter(|l| l.net.overlaps(&range)) {
            clashes += 1;
            let message = format!("{} overlaps this cluster's range of ClusterSetIPs {range}", clash.what);
            lines.add("ranges", "ClusterSetIPs", Verdict::Failure, message);
            lines.remedy(&[
                "while nothing is imported yet: tombolo join @TOKEN (the same) --clusterset-v4 or --clusterset-v6 CIDR",
                "else give that link or route another range",
            ]);
        }
    }
    let tunnels = own.into_iter().flat_map(|own| &own.tunnel).map(|range| (&set.cluster, range));
    let foreign = verified.nodes.iter().filter(|(id, _)| **id != set.cluster);
    let foreign = foreign.flat_map(|(id, m)| m.owned.iter().chain(&m.tunnel).map(move |range| (id, range)));
    for (id, range) in tunnels.chain(foreign) {
        clashes += foreign_range(lines, id, range, &local);
    }
    if clashes == 0 {
        let message =
            "no address or route of this node lies in a range of ClusterSetIPs, tunnels or another cluster";
        lines.add("ranges", "overlaps", Verdict::Ok, message);
    }
}

/// Pods should be there, or at least a way to them.
fn own_range(lines: &mut Lines, range: &Prefix, local: &[Local]) {
    let inside = local.iter().find(|l| range.covers(&l.net) || l.net.covers(range));
    match inside {
        Some(local) => {
            lines.add("ranges", "own pods", Verdict::Ok, format!("{range}: {}", local.what));
        }
        None => {
            let message = format!(
                "no address or route of this node is in {range}, which this cluster was granted for pods"
            );
            lines.add("ranges", "own pods", Verdict::Warning, message);
            lines.remedy(&["is it the range that the CNI gives to pods? ip route; tombolo status -o wide"]);
        }
    }
}

/// A node address in a granted range is allowed for (peers are reached by mark); a route takes traffic away.
fn foreign_range(lines: &mut Lines, id: &ClusterId, range: &Prefix, local: &[Local]) -> usize {
    let mut clashes = 0;
    for clash in local.iter().filter(|l| l.net.overlaps(range)) {
        clashes += 1;
        let message = format!("{} overlaps {range}, which is cluster {id}'s", clash.what);
        lines.add(
            "ranges",
            "overlap",
            if clash.is_address { Verdict::Failure } else { Verdict::Warning },
            message,
        );
        lines.remedy(&["what this node reaches by it and what cluster has the range, cannot both be reached: give one another range"]);
    }
    clashes
}

/// Addresses and routes that are not ours, without what every machine has: default routes, loopback, link-local.
fn local() -> Option<Vec<Local>> {
    let mut found = Vec::new();
    for link in ip(&["-j", "address", "show"])? {
        let name = plain(link["ifname"].as_str().unwrap_or_default());
        if name.starts_with(OUR_LINKS) {
            continue;
        }
        for info in link["addr_info"].as_array().into_iter().flatten() {
            let address = info["local"].as_str().and_then(|a| a.parse::<IpAddr>().ok());
            let Some(net) = address.and_then(|a| Prefix::host(a).ok()) else { continue };
            let what = format!("address {} of {name}", net.address());
            found.push(Local { net, link: name.clone(), what, is_address: true });
        }
    }
    for family in ["-4", "-6"] {
        for route in ip(&["-j", family, "route", "show", "table", "main"]).unwrap_or_default() {
            let link = plain(route["dev"].as_str().unwrap_or_default());
            if route["protocol"].as_str() == Some(OUR_PROTOCOL) || link.starts_with(OUR_LINKS) {
                continue;
            }
            let Some(net) = route["dst"].as_str().and_then(net) else { continue };
            let by = route["gateway"].as_str().map(|g| format!(" via {}", plain(g))).unwrap_or_default();
            found.push(Local { net, what: format!("route {net}{by} dev {link}"), link, is_address: false });
        }
    }
    found.retain(|l| l.link != "lo");
    Some(found)
}

/// `default` and what is in no grant are none.
fn net(text: &str) -> Option<Prefix> {
    match text.parse::<IpNet>() {
        Ok(net) => Prefix::new(net).ok(),
        Err(_) => text.parse().ok().and_then(|address| Prefix::host(address).ok()),
    }
}

fn ip(arguments: &[&str]) -> Option<Vec<Value>> {
    let output = Command::new("ip").args(arguments).output().ok()?;
    if !output.status.success() {
        return None;
    }
    if output.stdout.iter().all(u8::is_ascii_whitespace) {
        return Some(Vec::new());
    }
    serde_json::from_slice(&output.stdout).ok()
}

/// Links of ours: whether each is up.
pub(super) fn devices() -> Option<Vec<(String, bool)>> {
    let links = ip(&["-j", "link", "show"])?;
    let ours = links.iter().filter_map(|link| {
        let name = link["ifname"].as_str().filter(|name| {
            name.strip_prefix(OUR_LINKS)
                .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        })?;
        let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
        Some((name.to_owned(), up))
    });
    Some(ours.collect())
}
