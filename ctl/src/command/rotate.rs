//! New keys for old, under traffic.

mod wireguard;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use tombolo_agent::api::directory::{Directory, Rotation};
use tombolo_proto::model::Position;
use tombolo_proto::trust::Membership;
use tombolo_proto::wire::decode_statement;

use super::say;
use crate::cli::{Rotate, RotateClusterKey, RotateWhat};
use crate::output::Printer;

pub(super) fn rotate(printer: &Printer, args: &Rotate) -> Result<()> {
    match &args.what {
        RotateWhat::ClusterKey(args) => cluster_key(printer, args),
        RotateWhat::Wireguard(args) => wireguard::rotate(printer, args),
    }
}

/// Between two looks for the leader's word.
const LOOK: Duration = Duration::from_millis(50);

fn cluster_key(printer: &Printer, args: &RotateClusterKey) -> Result<()> {
    let directory = Directory::open(&args.cluster.cluster_dir)?;
    let rotation = directory.rotate_cluster_key().context("the key was not rotated")?;
    let key = directory.read_cluster_key()?.context("the key is gone")?.public();
    let stated = stated(&directory, &rotation, Duration::from_secs(args.wait));
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Rotated {
        cluster: String,
        serial: u64,
        generation: u32,
        public_key: String,
        /// An earlier rotation was finished.
        resumed: bool,
        /// Where the cluster spoke under the new key; none if it has not yet.
        position: Option<String>,
        /// How often the key can be rotated before a newer grant is needed.
        left: usize,
    }
    let left = (Membership::MAX_BINDINGS - 1).saturating_sub(rotation.generation.try_into().unwrap_or(0));
    let rotated = Rotated {
        cluster: rotation.cluster.to_string(),
        serial: rotation.serial,
        generation: rotation.generation,
        public_key: key.to_string(),
        resumed: rotation.resumed,
        position: stated.map(|position| position.to_string()),
        left,
    };
    if rotated.resumed {
        say("An earlier rotation was cut off; it is finished now, and no other was made.");
    }
    if stated.is_none() {
        say(format!(
            "The leading agent has not spoken with the new key{}. Nothing is lost: it does as soon as it runs (`tombolo status`).",
            if args.wait == 0 { " yet".to_owned() } else { format!(" within {} s", args.wait) }
        ));
    }
    if left < 8 {
        say(format!(
            "This key can be rotated {left} more times; then ask the administrator for a newer grant (`tombolo invite {} --renew`).",
            rotated.cluster
        ));
    }
    printer.print("Rotation", &rotated, |_| {
        let spoken = rotated.position.as_ref().map(|at| format!("; spoken with at position {at}"));
        format!(
            "The key of {} is of generation {} now (grant {}): {}{}.\n",
            rotated.cluster,
            rotated.generation,
            rotated.serial,
            rotated.public_key,
            spoken.unwrap_or_default()
        )
    })
}

/// Waits until the own Member holds a statement by the new key.
fn stated(directory: &Directory, rotation: &Rotation, within: Duration) -> Option<Position> {
    let start = Instant::now();
    loop {
        let read = directory.read();
        let statement = read.members.get().and_then(|all| all.get(&rotation.cluster)?.statement.clone());
        let position = statement.and_then(|s| decode_statement(&s.payload).ok()).map(|s| s.position);
        let newer = |p: &Position| (p.serial, p.generation) >= (rotation.serial, rotation.generation);
        if let Some(position) = position.filter(newer) {
            return Some(position);
        }
        if start.elapsed() >= within {
            return None;
        }
        thread::sleep(LOOK);
    }
}
