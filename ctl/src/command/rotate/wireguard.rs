//! New WireGuard keys for nodes: asked for in the cluster's API, since a node's keys never leave it.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use tombolo_agent::api::directory::Directory;
use tombolo_agent::api::{ClusterApi as _, Error};
use tombolo_agent_core::object::TunnelNode;
use tombolo_proto::model::{NodeName, WireguardKey};

use super::super::{now, say};
use super::LOOK;
use crate::cli::RotateWireguard;
use crate::output::{Printer, Table};

/// How often the wish is written anew when others write at the same time.
const ATTEMPTS: usize = 16;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rotated {
    cluster: String,
    nodes: Vec<NodeRow>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeRow {
    name: String,
    /// It has told its new keys.
    rotated: bool,
    /// Milliseconds from the wish to that.
    milliseconds: Option<u64>,
}

pub(super) fn rotate(printer: &Printer, args: &RotateWireguard) -> Result<()> {
    let directory = Directory::open(&args.cluster.cluster_dir)?;
    let before = tunnel_nodes(&directory)?;
    let nodes: BTreeSet<NodeName> = if args.all {
        before.keys().cloned().collect()
    } else {
        if let Some(unknown) = args.nodes.iter().find(|name| !before.contains_key(*name)) {
            let known: Vec<_> = before.keys().map(ToString::to_string).collect();
            bail!("no agent has told of a node {unknown}; there are: {}", known.join(", "));
        }
        args.nodes.iter().cloned().collect()
    };
    if nodes.is_empty() {
        bail!("no agent has told of any node of this cluster yet: nothing is to be rotated");
    }
    let cluster = ask(&directory, &nodes, &before)?;
    let asked = Instant::now();
    let mut done: BTreeMap<&NodeName, Duration> = BTreeMap::new();
    let deadline = asked + Duration::from_secs(args.wait);
    while done.len() < nodes.len() && Instant::now() < deadline {
        thread::sleep(LOOK);
        let after = tunnel_nodes(&directory)?;
        for name in
            nodes.iter().filter(|name| after.get(*name).is_some_and(|node| is_new(&before, name, node)))
        {
            done.entry(name).or_insert_with(|| asked.elapsed());
        }
    }
    let row = |name: &NodeName| NodeRow {
        name: name.to_string(),
        rotated: done.contains_key(name),
        milliseconds: done.get(name).map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
    };
    let rotated = Rotated { cluster, nodes: nodes.iter().map(row).collect() };
    if args.wait > 0 && done.len() < nodes.len() {
        say(format!(
            "{} of {} nodes have not told new keys within {} s. Nothing is lost: a node does as soon as its agent runs, and \
             when its rotation before is over (some 3 minutes after that, or when its last peer has heard of it).",
            nodes.len() - done.len(),
            nodes.len(),
            args.wait
        ));
    }
    printer.print("WireguardRotation", &rotated, |printer| {
        let row = |node: &NodeRow| {
            let state = match node.milliseconds {
                Some(ms) => format!("after {ms} ms"),
                None => "asked for".to_owned(),
            };
            vec![node.name.clone(), state]
        };
        let rows = rotated.nodes.iter().map(row).collect();
        printer.table(&Table { headers: vec!["NODE", "NEW KEYS"], narrow: 2, rows })
    })
}

/// All its keys are others.
fn is_new(before: &BTreeMap<NodeName, TunnelNode>, name: &NodeName, now: &TunnelNode) -> bool {
    let keys =
        |node: &TunnelNode| -> BTreeSet<WireguardKey> { node.devices.values().map(|d| d.key).collect() };
    before.get(name).is_none_or(|before| keys(before).is_disjoint(&keys(now)))
}

fn tunnel_nodes(directory: &Directory) -> Result<BTreeMap<NodeName, TunnelNode>> {
    directory.read().tunnel_nodes.get().cloned().context("the TunnelNodes of the cluster cannot be read")
}

/// Writes the wish; the cluster's id.
fn ask(
    directory: &Directory,
    nodes: &BTreeSet<NodeName>,
    there: &BTreeMap<NodeName, TunnelNode>,
) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("no runtime")?;
    for _ in 0..ATTEMPTS {
        let known = directory.read_clusterset()?.with_context(|| {
            format!("{} is no cluster of a set: run `tombolo join`", directory.root().display())
        })?;
        let mut set = known.value;
        set.rotations.retain(|name, _| there.contains_key(name));
        for name in nodes {
            // Larger than any before, whatever the clock says.
            let wish = set.rotations.entry(name.clone()).or_default();
            *wish = now().max(wish.saturating_add(1));
        }
        match runtime.block_on(directory.write_clusterset(&set, Some(&known.version))) {
            Ok(_) => return Ok(set.cluster.to_string()),
            Err(Error::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bail!("the ClusterSet is written by others all the time; nothing was asked for, try again")
}
