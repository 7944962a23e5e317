//! `leave`: a cluster that goes of its own will.

use std::collections::BTreeMap;
use std::io::{BufRead as _, IsTerminal as _};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use tombolo_agent::api::directory::Directory;
use tombolo_agent::api::{ClusterApi as _, Error};
use tombolo_proto::model::ClusterId;
use tombolo_proto::trust::{namespaces_hash, root_hash};
use tombolo_proto::wire::decode_statement;

use super::say;
use crate::cli::Leave;
use crate::output::Printer;

/// Between two looks for the leader's word.
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn leave(printer: &Printer, args: &Leave) -> Result<()> {
    let path = args.cluster.cluster_dir.display();
    let directory = Directory::open(&args.cluster.cluster_dir)?;
    let Some(known) = directory.read_clusterset()? else { bail!("{path} is no member of a set") };
    let cluster = known.value.cluster.clone();
    if !args.yes {
        let what = format!(
            "takes {cluster} out of its set: its services are withdrawn everywhere, and others' are reached no more from here"
        );
        if !std::io::stdin().is_terminal() {
            bail!("this {what}; add --yes to do it without a terminal");
        }
        say(format!("This {what}. Type its id to go on:"));
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        if answer.trim() != cluster.as_str() {
            bail!("not left");
        }
    }
    mark(&directory)?;
    let withdrawn = withdrawn(&directory, &cluster, Duration::from_secs(args.wait));
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Left {
        cluster: String,
        /// Whether the leading agent has stated that there is nothing.
        withdrawn: bool,
    }
    let left = Left { cluster: cluster.to_string(), withdrawn };
    if !withdrawn {
        say(format!(
            "The leading agent has not withdrawn everything{}. It does as soon as it runs: let it, before anything else.",
            if args.wait == 0 { " yet".to_owned() } else { format!(" within {} s", args.wait) }
        ));
    }
    printer.print("Departure", &left, |_| {
        format!(
            "{cluster} has left: {}.\n\nNext, once the others have heard of it (they show it without nodes in `tombolo status`):\n  \
             the administrator frees its ranges:     tombolo revoke {cluster}\n  \
             on each node of this cluster:           end the agent, then tombolo-agent cleanup\n  \
             and last, here:                         remove {path}/state\n\
             To come back instead: tombolo join --cluster-dir {path} with its token, or a new one.\n",
            if left.withdrawn { "it states nothing any more" } else { "to be withdrawn by its leading agent" }
        )
    })
}

/// Says it in the set's object; whoever writes there at the same time is let go first.
fn mark(directory: &Directory) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("no runtime")?;
    for _ in 0..20 {
        let known = directory.read_clusterset()?.context("the set's object is gone")?;
        if known.value.leaving {
            return Ok(());
        }
        let mut set = known.value;
        set.leaving = true;
        match runtime.block_on(directory.write_clusterset(&set, Some(&known.version))) {
            Ok(_) => return Ok(()),
            Err(Error::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bail!("somebody else writes the set's object all the time; try again")
}

/// Waits until the own Member holds a statement that there is nothing.
fn withdrawn(directory: &Directory, cluster: &ClusterId, within: Duration) -> bool {
    let nothing = root_hash(None, &namespaces_hash(&BTreeMap::new()));
    let start = Instant::now();
    loop {
        let read = directory.read();
        let statement = read.members.get().and_then(|all| all.get(cluster)?.statement.clone());
        let stated = statement.and_then(|s| decode_statement(&s.payload).ok());
        if stated.is_some_and(|statement| statement.root == nothing) {
            return true;
        }
        if start.elapsed() >= within {
            return false;
        }
        thread::sleep(LOOK);
    }
}
