//! What the machine itself costs while something is measured: a flow that crosses no tunnel.

use anyhow::{Context, Result};

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
