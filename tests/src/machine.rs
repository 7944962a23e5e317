//! What the machine itself costs while something is measured: a flow that crosses no tunnel, and who uses its time.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::{SysconfVar, gettid, sysconf};

use crate::Lab;
use crate::pod::Flow;

/// Packets a second: a gap is known to 5 ms.
const RATE: u32 = 200;

/// A flow between a pod and its own node, over one veth. Every program that a tunnel's flow needs (probe, echo server)
/// is there, but for the tunnel: if this one has a gap, the machine was starved and not the tunnel dead.
#[derive(Debug)]
pub struct Machine {
    flow: Flow,
}

impl Machine {
    /// Starts it, on the first node that has a pod and is none of those that the event touches.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn watch(lab: &Lab, except: &[&str]) -> Result<Self> {
        let untouched = |name: &str| !except.contains(&name);
        let node = lab.topology().nodes().find(|n| untouched(&n.name) && !n.pods.is_empty());
        let node = node.context("the control flow needs a node with a pod")?;
        Ok(Self { flow: lab.udp_flow(&node.name, node.pods[0].v4.into(), RATE)? })
    }

    /// Its longest gap, in milliseconds.
    ///
    /// # Errors
    /// If the probe failed.
    pub fn stop(self) -> Result<f64> {
        Ok(self.flow.stop_udp()?.largest_gap_ms)
    }
}

/// Seconds of processor time by program, of all that run now in this PID namespace; of the calling process by name of
/// the thread.
///
/// # Errors
/// If /proc cannot be read.
pub fn used() -> Result<BTreeMap<String, f64>> {
    let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the length of a tick")?;
    let mut used = BTreeMap::new();
    let own = std::process::id().to_string();
    let mut add = |stat: &str| {
        // The name stands in parentheses and may hold anything.
        let (Some((_, rest)), Some((head, _))) = (stat.rsplit_once(") "), stat.rsplit_once(')')) else {
            return;
        };
        let Some((_, name)) = head.split_once('(') else { return };
        let mut fields = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
        let sum = fields.next().unwrap_or(0) + fields.next().unwrap_or(0);
        *used.entry(name.to_owned()).or_insert(0.0) += sum as f64 / ticks as f64;
    };
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name == own {
            for task in std::fs::read_dir("/proc/self/task")? {
                add(&std::fs::read_to_string(task?.path().join("stat")).unwrap_or_default());
            }
        } else if name.bytes().all(|b| b.is_ascii_digit()) {
            add(&std::fs::read_to_string(format!("/proc/{name}/stat")).unwrap_or_default());
        }
    }
    Ok(used)
}

/// The calling thread gets only what others leave: what it stands for has a machine of its own in life.
///
/// # Errors
/// If there is no `renice`.
pub fn step_back() -> Result<()> {
    let status = Command::new("renice")
        .args(["-n", "19", "-p", &gettid().to_string()])
        .stdout(Stdio::null())
        .status()
        .context("renice")?;
    ensure!(status.success(), "renice: {status}");
    Ok(())
}
