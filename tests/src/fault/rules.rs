//! Faults that are rules of nft. The wire carries them as a table `fault`, and so does each cluster's bridge for what
//! passes inside the cluster.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Result, ensure};

use super::Fault;
use crate::Lab;

/// What happens to a packet, by its family (`ip`, `ip6`).
type Verdict<'a> = dyn Fn(&str) -> String + 'a;

pub(super) fn apply(lab: &Lab, faults: &[Fault]) -> Result<()> {
    let mut wire = String::new();
    let mut lans: Vec<(&str, Vec<IpAddr>, String)> = Vec::new();
    for cluster in &lab.topology().clusters {
        lans.push((&cluster.id, lab.topology().underlay(&cluster.id)?, String::new()));
    }
    for fault in faults {
        let drop = |_: &str| "drop".to_owned();
        let (from, to, both, verdict): (_, _, _, Box<Verdict>) = match fault {
            Fault::Cut { a, b } => (a, b, true, Box::new(drop)),
            Fault::CutOneway { from, to } => (from, to, false, Box::new(drop)),
            Fault::Loss { a, b, percent } => {
                (a, b, true, Box::new(move |_| format!("numgen random mod 100 < {percent} drop")))
            }
            Fault::EveryNth { a, b, n } => {
                (a, b, true, Box::new(move |_| format!("numgen inc mod {n} == {} drop", n - 1)))
            }
            Fault::Mtu { a, b, bytes } => (a, b, true, Box::new(move |family| too_long(family, *bytes))),
            Fault::Rate { a, b, kbit } => (a, b, true, Box::new(move |_| too_much(*kbit))),
            Fault::Delay { .. } | Fault::DiskFull { .. } => continue,
        };
        ensure!(from != to, "a fault needs two ends, not {from} twice");
        let (from, to) = (lab.topology().underlay(from)?, lab.topology().underlay(to)?);
        // Whatever passes the wire passes a bridge before and after: it must meet a fault once.
        let place = |rules: &mut String, from: &[IpAddr], to: &[IpAddr]| {
            rule(rules, from, to, &verdict);
            if both {
                rule(rules, to, from, &verdict);
            }
        };
        place(&mut wire, &from, &to);
        for (_, inside, rules) in &mut lans {
            let within = |list: &[IpAddr]| -> Vec<IpAddr> {
                list.iter().filter(|a| inside.contains(a)).copied().collect()
            };
            let (from, to) = (within(&from), within(&to));
            if !from.is_empty() && !to.is_empty() {
                place(rules, &from, &to);
            }
        }
    }
    let table = |family: &str, rules: &str| {
        format!(
            "table {family} fault {{}}\nflush table {family} fault\ntable {family} fault {{\n chain forward {{\n  \
             type filter hook forward priority filter; policy accept;\n{rules} }}\n}}\n"
        )
    };
    lab.wire().nft(&table("inet", &wire))?;
    for (cluster, _, rules) in &lans {
        lab.lan(cluster)?.nft(&table("bridge", rules))?;
    }
    Ok(())
}

/// The length field of IPv6 leaves its header of 40 bytes out.
fn too_long(family: &str, bytes: u16) -> String {
    let bytes = if family == "ip6" { bytes.saturating_sub(40) } else { bytes };
    format!("{family} length > {bytes} drop")
}

/// nft itself lets a second's worth pass at once; beyond that no more than some packets.
fn too_much(kbit: u32) -> String {
    let bytes = u64::from(kbit) * 125;
    format!("limit rate over {bytes} bytes/second burst 6000 bytes drop")
}

fn rule(rules: &mut String, from: &[IpAddr], to: &[IpAddr], verdict: &Verdict) {
    for (family, v4) in [("ip", true), ("ip6", false)] {
        let set = |list: &[IpAddr]| {
            let list: Vec<_> = list.iter().filter(|a| a.is_ipv4() == v4).map(ToString::to_string).collect();
            list.join(", ")
        };
        let (from, to) = (set(from), set(to));
        let _ =
            writeln!(rules, "  {family} saddr {{ {from} }} {family} daddr {{ {to} }} {}", verdict(family));
    }
}
