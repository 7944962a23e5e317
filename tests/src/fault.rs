//! Faults of the network and of disks. (Faults of programs are signals: [`crate::Lab::signal`], [`crate::Lab::stop`].)

mod delay;
pub(crate) mod disk;
mod rules;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::Lab;

/// A fault between two of: node, broker, cluster; or of one's disk. What lies between the two matters: a cluster stands
/// for all its nodes.
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
    /// So many of a hundred packets are lost at random, each way.
    Loss {
        /// One side.
        a: String,
        /// The other.
        b: String,
        /// 1 to 100.
        percent: u8,
    },
    /// Exactly every so-manyth packet of each direction and family is lost.
    EveryNth {
        /// One side.
        a: String,
        /// The other.
        b: String,
        /// 2 or more.
        n: u32,
    },
    /// A black hole: longer packets vanish, and nobody says so.
    Mtu {
        /// One side.
        a: String,
        /// The other.
        b: String,
        /// The longest IP packet that passes, in bytes.
        bytes: u16,
    },
    /// Each direction and family carries so much; what is more is dropped (a policer: there is no queue, and a
    /// second's worth may pass at once).
    Rate {
        /// One side.
        a: String,
        /// The other.
        b: String,
        /// 1000 bits a second.
        kbit: u32,
    },
    /// Every packet arrives so much later, each way. With a jitter, packets overtake each other.
    Delay {
        /// One side.
        a: String,
        /// The other.
        b: String,
        /// Milliseconds.
        ms: u32,
        /// Milliseconds more or less, evenly spread; at most `ms`.
        jitter: u32,
    },
    /// No room is left: of a node or broker where its programs keep their state, of a cluster where its API does.
    DiskFull {
        /// Node, broker or cluster.
        of: String,
    },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cut { a, b } => write!(f, "cut {a} {b}"),
            Self::CutOneway { from, to } => write!(f, "cut-oneway {from} {to}"),
            Self::Loss { a, b, percent } => write!(f, "loss {a} {b} {percent}"),
            Self::EveryNth { a, b, n } => write!(f, "every-nth {a} {b} {n}"),
            Self::Mtu { a, b, bytes } => write!(f, "mtu {a} {b} {bytes}"),
            Self::Rate { a, b, kbit } => write!(f, "rate {a} {b} {kbit}"),
            Self::Delay { a, b, ms, jitter } => write!(f, "delay {a} {b} {ms} {jitter}"),
            Self::DiskFull { of } => write!(f, "disk-full {of}"),
        }
    }
}

impl Fault {
    fn check(&self) -> Result<()> {
        match self {
            Self::Loss { percent, .. } => {
                ensure!((1..=100).contains(percent), "a loss of {percent} %: give 1 to 100");
            }
            Self::EveryNth { n, .. } => {
                ensure!(*n >= 2, "every {n}th packet: give 2 or more, or cut");
            }
            Self::Mtu { bytes, .. } => {
                ensure!(*bytes >= 68, "an MTU of {bytes} bytes: IPv4 asks for 68 (RFC 791), IPv6 for 1280");
            }
            Self::Rate { kbit, .. } => {
                ensure!((8..=100_000_000).contains(kbit), "a rate of {kbit} kbit/s: give 8 to 100000000");
            }
            Self::Delay { ms, jitter, .. } => {
                ensure!(*ms <= 60_000, "a delay of {ms} ms: give at most a minute");
                ensure!(jitter <= ms, "a jitter of {jitter} ms is more than the delay of {ms} ms");
            }
            Self::Cut { .. } | Self::CutOneway { .. } | Self::DiskFull { .. } => {}
        }
        Ok(())
    }
}

/// The faults in force.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    list: Vec<Fault>,
    delays: Vec<(Fault, delay::Delay)>,
}

impl Faults {
    pub(crate) fn list(&self) -> Vec<Fault> {
        self.list.clone()
    }

    pub(crate) fn add(&mut self, lab: &Lab, fault: Fault) -> Result<()> {
        fault.check()?;
        ensure!(!self.list.contains(&fault), "{fault} is in force already");
        let mut list = self.list.clone();
        list.push(fault);
        self.enact(lab, list)
    }

    /// Ends one fault, named as it is listed, or all.
    pub(crate) fn heal(&mut self, lab: &Lab, only: Option<&str>) -> Result<()> {
        let mut list = Vec::new();
        if let Some(only) = only {
            list.clone_from(&self.list);
            let at = list.iter().position(|f| f.to_string() == only);
            let known: Vec<_> = list.iter().map(ToString::to_string).collect();
            list.remove(at.with_context(|| match known.as_slice() {
                [] => format!("no fault {only:?} is in force, nor any other"),
                known => format!("no fault {only:?} is in force; there are: {}", known.join("; ")),
            })?);
        }
        self.enact(lab, list)
    }

    fn enact(&mut self, lab: &Lab, list: Vec<Fault>) -> Result<()> {
        rules::apply(lab, &list)?;
        segments(lab, &list, &self.list)?;
        let (stay, go) = std::mem::take(&mut self.delays).into_iter().partition(|(f, _)| list.contains(f));
        self.delays = stay;
        for (_, delay) in go {
            delay::Delay::end(delay, lab)?;
        }
        for fault in &list {
            if let Fault::Delay { a, b, ms, jitter } = fault
                && !self.delays.iter().any(|(other, _)| other == fault)
            {
                let taken: Vec<u16> = self.delays.iter().map(|(_, d)| d.queue()).collect();
                self.delays.push((fault.clone(), delay::Delay::start(lab, a, b, *ms, *jitter, &taken)?));
            }
        }
        let full = |list: &[Fault]| -> Vec<String> {
            let of = |f: &Fault| if let Fault::DiskFull { of } = f { Some(of.clone()) } else { None };
            list.iter().filter_map(of).collect()
        };
        let (before, after) = (full(&self.list), full(&list));
        for of in after.iter().filter(|of| !before.contains(of)) {
            disk::fill(&disk::of(lab, of)?).with_context(|| format!("filling the disk of {of}"))?;
        }
        for of in before.iter().filter(|of| !after.contains(of)) {
            disk::free(&disk::of(lab, of)?).with_context(|| format!("freeing the disk of {of}"))?;
        }
        self.list = list;
        Ok(())
    }
}

/// While packets are judged one by one, nodes hand them over one by one: what a sender gives the kernel in one piece (TSO,
/// `UDP_SEGMENT`) passes links of this machine in one piece, and would be judged as one.
fn segments(lab: &Lab, list: &[Fault], before: &[Fault]) -> Result<()> {
    let counts = |list: &[Fault]| {
        let one = |f: &Fault| {
            matches!(f, Fault::Loss { .. } | Fault::EveryNth { .. } | Fault::Mtu { .. } | Fault::Rate { .. })
        };
        list.iter().any(one)
    };
    if counts(list) == counts(before) {
        return Ok(());
    }
    // As links are made: GSO_MAX_SEGS.
    let most = if counts(list) { 1 } else { 65535 };
    for node in lab.topology().nodes() {
        lab.place(&node.name)?.ip(&format!("link set eth0 gso_max_segs {most}\n"))?;
    }
    Ok(())
}
