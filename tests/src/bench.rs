//! Benchmarks: what tunnels carry, beside what others carry on the same machine at the same time.
//!
//! Both ends, the programs that send and receive, and the kernel share this machine: a figure alone says little, its
//! ratio to another of the same run much. So all ways take turns, and medians over the rounds are compared.

mod figure;
mod way;

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::sandbox::which;

pub use figure::Test;
pub use way::Way;

/// What is measured, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often each way has its turn.
    pub rounds: usize,
    /// Seconds of each flow.
    pub seconds: u32,
    /// One processor for each end.
    pub pin: bool,
    /// No segmentation offload between the ends.
    pub nic: bool,
    /// MTU between the ends; the tunnels' is 80 less.
    pub mtu: u16,
    /// The ways.
    pub ways: Vec<Way>,
    /// The tests.
    pub tests: Vec<Test>,
}

/// Figures of one run, by their names, which end in their units.
pub type Figures = BTreeMap<String, f64>;

/// What came out.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Tunnels {
    /// The kernel's release.
    pub kernel: String,
    /// Processors.
    pub cpus: usize,
    /// See [`Options`].
    pub pin: bool,
    /// See [`Options`].
    pub nic: bool,
    /// See [`Options`].
    pub mtu: u16,
    /// All figures of each way, one map a round.
    pub rounds: BTreeMap<String, Vec<Figures>>,
    /// The median of each.
    pub medians: BTreeMap<String, Figures>,
    /// Ours, divided by each other way's.
    pub ratios: BTreeMap<String, Figures>,
}

/// Measures; `progress` is told what is done. To be run inside a sandbox.
///
/// # Errors
/// If a tool is missing or a way does not carry.
pub fn tunnels(options: &Options, progress: fn(&str)) -> Result<Tunnels> {
    let tools = [("iperf3", "iperf3"), ("ping", "iputils-ping"), ("wg", "wireguard-tools")];
    for (tool, package) in tools.into_iter().chain(options.nic.then_some(("ethtool", "ethtool"))) {
        ensure!(which(tool).is_some(), "{tool} not found: apt-get install {package}");
    }
    let mut rounds: BTreeMap<String, Vec<Figures>> = BTreeMap::new();
    for round in 0..options.rounds {
        // Nobody always follows the same neighbour.
        for turn in 0..options.ways.len() {
            let way = options.ways[(round + turn) % options.ways.len()];
            let figures = way::run(way, options)?;
            let line: Vec<_> = figures.iter().map(|(name, value)| format!("{name} {value:.3}")).collect();
            progress(&format!("round {}, {way}: {}", round + 1, line.join(", ")));
            rounds.entry(way.to_string()).or_default().push(figures);
        }
    }
    let medians: BTreeMap<_, _> = rounds.iter().map(|(way, all)| (way.clone(), median(all))).collect();
    let ours = medians.get(&Way::Ours.to_string()).cloned().unwrap_or_default();
    let ratio = |other: &Figures| -> Figures {
        let pairs = ours.iter().filter_map(|(name, value)| Some((name, value, other.get(name)?)));
        pairs.filter(|(_, _, base)| **base > 0.0).map(|(name, v, base)| (name.clone(), v / base)).collect()
    };
    let others = medians.iter().filter(|(way, _)| **way != Way::Ours.to_string());
    let ratios = others.map(|(way, figures)| (way.clone(), ratio(figures))).collect();
    Ok(Tunnels {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        pin: options.pin,
        nic: options.nic,
        mtu: options.mtu,
        rounds,
        medians,
        ratios,
    })
}

fn median(rounds: &[Figures]) -> Figures {
    let mut all: BTreeMap<&String, Vec<f64>> = BTreeMap::new();
    for (name, value) in rounds.iter().flatten() {
        all.entry(name).or_default().push(*value);
    }
    let middle = |mut values: Vec<f64>| {
        values.sort_unstable_by(f64::total_cmp);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        f64::midpoint(low, high)
    };
    all.into_iter().map(|(name, values)| (name.clone(), middle(values))).collect()
}

impl std::fmt::Display for Tunnels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:<26}", "median (ours : it)")?;
        for way in self.medians.keys() {
            write!(f, "   {way:>20}")?;
        }
        let names: std::collections::BTreeSet<_> = self.medians.values().flat_map(Figures::keys).collect();
        for name in names {
            write!(f, "\n{name:<26}")?;
            for (way, figures) in &self.medians {
                let value = figures.get(name).map_or("-".to_owned(), |value| format!("{value:.3}"));
                let ratio = self.ratios.get(way).and_then(|ratios| ratios.get(name));
                let ratio = ratio.map_or(String::new(), |ratio| format!(" ({ratio:.2})"));
                write!(f, "   {:>20}", value + &ratio)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        let round = |value: f64| Figures::from([("x".to_owned(), value)]);
        assert_eq!(median(&[round(3.0), round(1.0), round(2.0)]), round(2.0));
        assert_eq!(median(&[round(3.0), round(1.0)]), round(2.0));
    }
}
