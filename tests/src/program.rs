//! The command lines of every program the lab starts, and where the programs are: all in this one file.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::topology::{Cluster, Node, Topology};

/// Where brokers listen.
pub const BROKER_PORT: u16 = 4500;
/// Administration of a broker, on its loopback.
pub const BROKER_ADMIN: &str = "127.0.0.1:4501";
/// Administration of an agent, on its loopback.
pub const AGENT_ADMIN: &str = "127.0.0.1:4505";
/// The cluster's directory on its nodes.
pub const CLUSTER_DIR: &str = "/run/lab/cluster";
/// A place's private directory.
pub const STATE_DIR: &str = "/run/lab/state";
/// A broker's secret, in its private directory.
pub const BROKER_KEY: &str = "broker.key";
/// What a broker knows of the set, in its private directory; the same name in the administrator's.
pub const BROKER_SET: &str = "broker.set";
/// Devices that can be killed, whatever this machine's kernel has.
const USERSPACE: &str = "--tunnel-driver=userspace";
/// Where devices are asked for.
pub const DEVICES_DIR: &str = "/run/tombolo/devices";

/// A program that is built with the lab and lies beside it.
///
/// # Errors
/// If it was not built: says how.
pub fn find(program: &str) -> Result<String> {
    let exe = std::env::current_exe()?;
    // A deleted and rebuilt executable shows with a suffix; tests lie one directory deeper.
    let dir = exe.parent().context("the lab's own directory")?;
    let dirs = [Some(dir), dir.parent().filter(|_| dir.ends_with("deps"))];
    let found = dirs.into_iter().flatten().map(|d| d.join(program)).find(|p: &PathBuf| p.is_file());
    let found = found.with_context(|| {
        format!("{program} is not built (looked in {}): cargo build --workspace", dir.display())
    })?;
    Ok(found.to_string_lossy().into_owned())
}

/// All of Tombolo's programs.
const PROGRAMS: [&str; 4] = ["tombolo", "tombolo-agent", "tombolo-broker", "tombolo-wireguard"];

/// Makes sure that all of Tombolo's programs are there: under `cargo run` they are built, so that they are as new as
/// the lab; else they must lie beside it.
///
/// # Errors
/// If one is missing or does not build.
pub fn ensure_built() -> Result<()> {
    ensure_these(&PROGRAMS)
}

/// The same for some of them.
///
/// # Errors
/// If one is missing or does not build.
pub fn ensure_these(programs: &[&str]) -> Result<()> {
    if std::env::var_os("CARGO").is_some() {
        let mut command = cargo();
        command.args(["build", "--bins"]);
        for program in programs {
            command.args(["--package", program]);
        }
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        ensure!(command.status()?.success(), "the programs do not build: see above");
    }
    programs.iter().try_for_each(|p| find(p).map(drop))
}

/// Cargo, without what an outer `cargo run` told about its package: ring's build script would build it anew for that.
pub(crate) fn cargo() -> std::process::Command {
    let mut command = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || text.starts_with("CARGO_MANIFEST_")
            || text == "CARGO_PRIMARY_PACKAGE"
        {
            command.env_remove(&name);
        }
    }
    command
}

fn line(program: &str, args: &[&str]) -> Result<Vec<String>> {
    let mut line = vec![find(program)?];
    line.extend(args.iter().map(|a| (*a).to_owned()));
    Ok(line)
}

/// What runs in each pod.
///
/// # Errors
/// If the lab's own program is not built.
pub fn serve(pod: &str) -> Result<Vec<String>> {
    line("tombolo-lab", &["serve", "--name", pod, "--port", "8080"])
}

/// The lab's own program with these arguments (`fetch`, `probe`).
///
/// # Errors
/// If it is not built.
pub fn lab(args: &[&str]) -> Result<Vec<String>> {
    line("tombolo-lab", args)
}

/// A broker. [`crate::Lab::start_broker`] put its identity and the set's roots into its private directory.
///
/// # Errors
/// If it is not built.
pub fn broker() -> Result<Vec<String>> {
    let listen = format!("[::]:{BROKER_PORT}");
    let file = |name: &str| format!("{STATE_DIR}/{name}");
    line(
        "tombolo-broker",
        &[
            "--listen",
            &listen,
            "--data",
            &file("data"),
            "--identity",
            &file(BROKER_KEY),
            "--set",
            &file(BROKER_SET),
            "--admin",
            BROKER_ADMIN,
        ],
    )
}

/// An agent, both roles.
///
/// # Errors
/// If it is not built.
pub fn agent(node: &Node) -> Result<Vec<String>> {
    let lanes = format!("--lanes={}", node.lanes);
    line(
        "tombolo-agent",
        &[
            "--cluster-dir",
            CLUSTER_DIR,
            "--state-dir",
            STATE_DIR,
            "--node",
            &node.name,
            "--admin",
            AGENT_ADMIN,
            "--devices-dir",
            DEVICES_DIR,
            USERSPACE,
            &lanes,
        ],
    )
}

/// An agent of one role by the API of the cluster that its pod runs in.
///
/// # Errors
/// If it is not built.
pub fn agent_in_cluster(role: &str, name: &str) -> Result<Vec<String>> {
    let (role, name) = (format!("--role={role}"), format!("--node={name}"));
    let admin = format!("--admin={AGENT_ADMIN}");
    let dirs = [format!("--state-dir={STATE_DIR}"), format!("--devices-dir={DEVICES_DIR}")];
    line("tombolo-agent", &["--in-cluster", &role, &name, &admin, &dirs[0], &dirs[1], USERSPACE])
}

/// `tombolo join --kubernetes` with the token on standard input: prints manifests.
///
/// # Errors
/// If it is not built.
pub fn join_kubernetes(cluster: &Cluster) -> Result<Vec<String>> {
    let topology = if cluster.mesh { "mesh" } else { "gateway" };
    line("tombolo", &["join", "-", "--kubernetes", "--reach", cluster.reach.as_str(), "--topology", topology])
}

/// The userspace devices of a node.
///
/// # Errors
/// If it is not built.
pub fn wireguard() -> Result<Vec<String>> {
    Ok(with(&[STAMPS], line("tombolo-wireguard", &["serve", "--dir", DEVICES_DIR])?))
}

/// Where devices write down their last handshakes: a node's own, not the machine's.
pub const STAMPS: &str = "TOMBOLO_WIREGUARD_STATE_DIR=/run/lab/state/wireguard";

/// A command line with these variables (`NAME=VALUE`).
#[must_use]
pub fn with(variables: &[&str], line: Vec<String>) -> Vec<String> {
    let mut whole = vec!["env".to_owned()];
    whole.extend(variables.iter().map(|v| (*v).to_owned()));
    whole.extend(line);
    whole
}

/// The variables under which a program's clock is shifted by so many seconds: the wall clock alone, as when somebody
/// sets it.
///
/// # Errors
/// If libfaketime is not installed.
pub fn shifted(seconds: i64) -> Result<Vec<String>> {
    let mut found = None;
    for dir in ["/usr/lib", "/usr/lib64", "/usr/local/lib"] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
        let files =
            std::iter::once(PathBuf::from(dir)).chain(entries).map(|d| d.join("faketime/libfaketime.so.1"));
        found = found.or_else(|| files.into_iter().find(|f| f.is_file()));
    }
    let library = found.context("libfaketime is missing, which shifts clocks: apt-get install faketime")?;
    Ok(vec![
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME={seconds:+}"),
        "DONT_FAKE_MONOTONIC=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        "NO_FAKE_STAT=1".to_owned(),
    ])
}

/// The administrator's directory: the lab is the administrator.
#[must_use]
pub fn set_dir() -> String {
    format!("{}/set", crate::sandbox::ROOT)
}

/// `tombolo init`.
///
/// # Errors
/// If it is not built.
pub fn init(topology: &Topology) -> Result<Vec<String>> {
    let mut args = vec!["init".to_owned(), topology.name.clone(), "--dir".to_owned(), set_dir()];
    for broker in &topology.brokers {
        args.push("--broker".to_owned());
        args.push(format!("{}:{BROKER_PORT}", broker.v4));
    }
    line("tombolo", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// `tombolo invite`: prints a token.
///
/// # Errors
/// If it is not built.
pub fn invite(cluster: &Cluster) -> Result<Vec<String>> {
    let (v4, v6) = (cluster.pods4.to_string(), cluster.pods6.to_string());
    line("tombolo", &["invite", &cluster.id, "--pod-cidr", &v4, "--pod-cidr", &v6, "--dir", &set_dir()])
}

/// `tombolo join` with the token on standard input, on a node of the cluster.
///
/// # Errors
/// If it is not built.
pub fn join(cluster: &Cluster) -> Result<Vec<String>> {
    let topology = if cluster.mesh { "mesh" } else { "gateway" };
    line(
        "tombolo",
        &[
            "join",
            "-",
            "--cluster-dir",
            CLUSTER_DIR,
            "--reach",
            cluster.reach.as_str(),
            "--topology",
            topology,
        ],
    )
}

/// `tombolo revoke`.
///
/// # Errors
/// If it is not built.
pub fn revoke(cluster: &str) -> Result<Vec<String>> {
    line("tombolo", &["revoke", cluster, "--dir", &set_dir(), "--yes"])
}

/// Where `tombolo init` puts the secret of the broker that was named as the `index`th (from 0).
#[must_use]
pub fn made_broker_key(index: usize) -> String {
    format!("{}/broker-{}.key", set_dir(), index + 1)
}

/// Any command of the operator's that looks at a cluster, on one of its nodes.
///
/// # Errors
/// If it is not built or there are no words.
pub fn tombolo(words: &[&str]) -> Result<Vec<String>> {
    ensure!(!words.is_empty(), "tombolo needs a command");
    let mut args = words.to_vec();
    args.extend(["--cluster-dir", CLUSTER_DIR]);
    line("tombolo", &args)
}
