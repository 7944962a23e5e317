//! Faults of the network: cuts, one-way cuts, loss. (Faults of programs are signals: [`crate::Lab::signal`].)

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::Lab;

/// A fault between two of: node, broker, cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "fault")]
pub enum Fault {
    /// Nothing passes either way.
    Cut {
        /// One side.
        a: String,
        /// The other.
        b: String,
    },
    /// Nothing passes from one to the other; the way back is open.
    CutOneway {
        /// Sender.
        from: String,
        /// Receiver.
        to: String,
    },
    /// So many of a hundred packets are lost, each way.
    Loss {
        /// One side.
        a: String,
        /// The other.
        b: String,
        /// 1 to 100.
        percent: u8,
    },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cut { a, b } => write!(f, "cut {a} {b}"),
            Self::CutOneway { from, to } => write!(f, "cut-oneway {from} {to}"),
            Self::Loss { a, b, percent } => write!(f, "loss {a} {b} {percent}"),
        }
    }
}

/// The faults in force. The wire carries them as a table `fault`, and so does each cluster's bridge for what passes
/// inside the cluster.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    list: Vec<Fault>,
}

impl Faults {
    pub(crate) fn list(&self) -> Vec<Fault> {
        self.list.clone()
    }

    pub(crate) fn add(&mut self, lab: &Lab, fault: Fault) -> Result<()> {
        if let Fault::Loss { percent, .. } = &fault {
            ensure!((1..=100).contains(percent), "a loss of {percent} %: give 1 to 100");
        }
        let mut list = self.list.clone();
        list.push(fault);
        apply(lab, &list)?;
        self.list = list;
        Ok(())
    }

    pub(crate) fn heal(&mut self, lab: &Lab) -> Result<()> {
        apply(lab, &[])?;
        self.list.clear();
        Ok(())
    }
}

fn apply(lab: &Lab, faults: &[Fault]) -> Result<()> {
    let mut wire = String::new();
    let mut lans: Vec<(&str, Vec<IpAddr>, String)> = Vec::new();
    for cluster in &lab.topology().clusters {
        lans.push((&cluster.id, lab.topology().underlay(&cluster.id)?, String::new()));
    }
    for fault in faults {
        let (from, to, both, verdict) = match fault {
            Fault::Cut { a, b } => (a, b, true, "drop".to_owned()),
            Fault::CutOneway { from, to } => (from, to, false, "drop".to_owned()),
            Fault::Loss { a, b, percent } => (a, b, true, format!("numgen random mod 100 < {percent} drop")),
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

fn rule(rules: &mut String, from: &[IpAddr], to: &[IpAddr], verdict: &str) {
    for (family, v4) in [("ip", true), ("ip6", false)] {
        let set = |list: &[IpAddr]| {
            let list: Vec<_> = list.iter().filter(|a| a.is_ipv4() == v4).map(ToString::to_string).collect();
            list.join(", ")
        };
        let _ = writeln!(
            rules,
            "  {family} saddr {{ {} }} {family} daddr {{ {} }} {verdict}",
            set(from),
            set(to)
        );
    }
}
