//! The running lab's control socket, and both ends of it.
//!
//! The socket is an abstract one of the machine's own network namespace: it has no file, and is gone the moment the
//! lab is. Only root may speak to it.

use std::ffi::CString;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::lab::{Lab, Running};
use crate::place;

const PREFIX: &str = "tombolo-lab/";

/// What a running lab may be asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Request {
    /// Tell what there is.
    Status,
    /// Hand out the namespaces of a place.
    Enter {
        /// Node, pod, broker, or `wire`.
        place: String,
    },
    /// Do something to a program.
    Program {
        /// Where.
        place: String,
        /// Which.
        program: String,
        /// What.
        action: Action,
    },
    /// Put a fault on the network.
    Fault {
        /// Which.
        fault: Fault,
    },
    /// End faults of network and disks.
    Heal {
        /// One, named as it is listed; none: all.
        only: Option<String>,
    },
    /// End the lab.
    Down,
}

/// What may be done to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// SIGKILL.
    Kill,
    /// SIGKILL to its first child: the agent proper below its holder.
    KillChild,
    /// SIGKILL to it and all that it started.
    KillAll,
    /// SIGTERM.
    Term,
    /// SIGSTOP to it and all that it started.
    Stop,
    /// SIGCONT to them.
    Cont,
    /// Start it again as it was started.
    Start,
}

/// A lab's answer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Why it was not done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// For [`Request::Status`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// What there is in a lab.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The lab's name.
    pub name: String,
    /// Nodes, pods and brokers.
    pub places: Vec<PlaceRow>,
    /// What runs, or ran.
    pub programs: Vec<Running>,
    /// The faults in force, as `tombolo-lab fault` takes them; stopped programs too.
    pub faults: Vec<String>,
    /// Where the logs are: a directory inside the lab, unless TOMBOLO_LAB_LOGS named one.
    pub logs: String,
}

/// One place, for people.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlaceRow {
    /// Its name.
    pub name: String,
    /// `gateway`, `node`, `pod`, `broker`.
    pub kind: String,
    /// Its cluster, if any.
    pub cluster: String,
    /// Its node, for a pod.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<String>,
}

/// Takes a name: the socket of a new lab.
///
/// # Errors
/// If a lab of this name runs already.
pub fn listen(name: &str) -> Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(format!("{PREFIX}{name}"))?;
    UnixListener::bind_addr(&address).with_context(|| {
        format!("a lab named {name} already runs: end it by `tombolo-lab down`, or give --name")
    })
}

/// The names of the labs that run.
///
/// # Errors
/// If the machine's sockets cannot be listed.
pub fn names() -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/net/unix")?;
    let mut names: Vec<_> = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7)?.strip_prefix('@')?.strip_prefix(PREFIX))
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// A connection to a running lab: to the named one, else to the only one.
///
/// # Errors
/// If there is none, or none was named of several.
pub fn connect(name: Option<&str>) -> Result<UnixStream> {
    let name = match name {
        Some(name) => name.to_owned(),
        None => match names()?.as_slice() {
            [only] => only.clone(),
            [] => bail!("no lab runs: start one with `tombolo-lab up`"),
            several => bail!("several labs run ({}): give --lab NAME", several.join(", ")),
        },
    };
    let address = SocketAddr::from_abstract_name(format!("{PREFIX}{name}"))?;
    UnixStream::connect_addr(&address).with_context(|| format!("no lab named {name} runs"))
}

/// Asks a running lab.
///
/// # Errors
/// What the lab says.
pub fn ask(stream: &UnixStream, request: &Request) -> Result<Answer> {
    writeln!(&mut &*stream, "{}", serde_json::to_string(request)?)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Answer = serde_json::from_str(&line).context("the lab ended without an answer")?;
    match answer.error {
        Some(error) => bail!("{error}"),
        None => Ok(answer),
    }
}

/// Runs a command in a place of a running lab, on this terminal.
///
/// # Errors
/// If there is no such place, or no such program.
pub fn exec(stream: &UnixStream, place: &str, command: &[String]) -> Result<ExitStatus> {
    writeln!(&mut &*stream, "{}", serde_json::to_string(&Request::Enter { place: place.to_owned() })?)?;
    let mut text = [0; 4096];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 3]);
    let (len, descriptors) = {
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let mut descriptors = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(list) = part {
                // SAFETY: the kernel has just made these descriptors for this process; nobody else knows them.
                descriptors.extend(list.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, descriptors)
    };
    let answer: Answer = serde_json::from_slice(&text[..len]).context("the lab ended without an answer")?;
    if let Some(error) = answer.error {
        bail!("{error}");
    }
    let [net, mnt, pid] = descriptors.as_slice() else { bail!("the lab sent no namespaces") };
    let (program, args) = command.split_first().context("which command?")?;
    let own = std::env::current_exe()?;
    let mut path = own.parent().unwrap_or(std::path::Path::new("/")).as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    setns(pid, CloneFlags::CLONE_NEWPID).context("entering the lab")?;
    let mut command = Command::new(program);
    command
        .args(args)
        .env("PATH", path)
        .env("TOMBOLO_CLUSTER_DIR", crate::program::CLUSTER_DIR)
        .env("TOMBOLO_STATE_DIR", crate::program::STATE_DIR)
        .env("TOMBOLO_SET_DIR", crate::program::set_dir());
    place::enter(&mut command, net.as_raw_fd(), mnt.as_raw_fd());
    // Entering a mount namespace ends at its root: go back to where the user stands, if it is there too.
    let here = std::env::current_dir().ok().and_then(|d| CString::new(d.into_os_string().into_vec()).ok());
    // SAFETY: runs between fork and exec: one system call on a string made before.
    unsafe {
        command.pre_exec(move || {
            if let Some(here) = &here {
                libc::chdir(here.as_ptr());
            }
            Ok(())
        });
    }
    command.status().with_context(|| format!("running {program} in {place}"))
}

/// Serves a lab's socket on threads of its own; `down` is set when somebody asks the lab to end.
///
/// # Errors
/// If the socket fails at once.
pub fn serve(listener: OwnedFd, lab: &Arc<Lab>, name: &str, down: &Arc<AtomicBool>) -> Result<()> {
    let listener = UnixListener::from(listener);
    let (lab, name, down) = (lab.clone(), name.to_owned(), down.clone());
    std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let (lab, name, down) = (lab.clone(), name.clone(), down.clone());
            std::thread::spawn(move || {
                // Who asks and goes away before the answer loses only the answer.
                let _ = handle(&stream, &lab, &name, &down);
            });
        }
    })?;
    Ok(())
}

fn handle(stream: &UnixStream, lab: &Lab, name: &str, down: &AtomicBool) -> Result<()> {
    ensure!(getsockopt(stream, PeerCredentials)?.uid() == 0, "not root");
    let mut line = String::new();
    let mut reader = BufReader::new(std::io::Read::take(stream, 1 << 16));
    while reader.read_line(&mut line)? > 0 {
        let request = serde_json::from_str(&line).map_err(anyhow::Error::from);
        line.clear();
        let mut entered = None;
        let result = request.and_then(|request| {
            if let Request::Enter { place } = &request {
                entered = Some(lab.place(place)?);
            }
            act(&request, lab, name, down)
        });
        let answer = result.unwrap_or_else(|e| Answer { error: Some(format!("{e:#}")), ..Answer::default() });
        let text = format!("{}\n", serde_json::to_string(&answer)?);
        match entered {
            Some(place) => {
                let pid = std::fs::File::open("/proc/self/ns/pid")?;
                let [net, mnt] = place.descriptors();
                let list = [net.as_raw_fd(), mnt.as_raw_fd(), pid.as_fd().as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&list)];
                let parts = [IoSlice::new(text.as_bytes())];
                sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None)?;
            }
            None => (&mut &*stream).write_all(text.as_bytes())?,
        }
    }
    Ok(())
}

fn act(request: &Request, lab: &Lab, name: &str, down: &AtomicBool) -> Result<Answer> {
    match request {
        Request::Status => return Ok(Answer { status: Some(status(lab, name)), ..Answer::default() }),
        Request::Enter { .. } => {}
        Request::Program { place, program, action } => match action {
            Action::Kill => lab.kill(place, program)?,
            Action::KillAll => lab.kill_tree(place, program)?,
            Action::KillChild => lab.kill_child(place, program)?,
            Action::Term => lab.signal(place, program, Signal::SIGTERM)?,
            Action::Stop => lab.stop(place, program)?,
            Action::Cont => lab.cont(place, program)?,
            Action::Start => lab.restart(place, program)?,
        },
        Request::Fault { fault } => lab.fault(fault.clone())?,
        Request::Heal { only: None } => lab.heal()?,
        Request::Heal { only: Some(fault) } => lab.heal_one(fault)?,
        Request::Down => down.store(true, Ordering::Relaxed),
    }
    Ok(Answer::default())
}

/// What there is in a lab.
#[must_use]
pub fn status(lab: &Lab, name: &str) -> Status {
    let topology = lab.topology();
    let row = |name: &str, kind: &str, cluster: &str, node: &str, addresses: [String; 2]| PlaceRow {
        name: name.to_owned(),
        kind: kind.to_owned(),
        cluster: cluster.to_owned(),
        node: node.to_owned(),
        addresses: addresses.into(),
    };
    let mut places = Vec::new();
    for broker in &topology.brokers {
        places.push(row(&broker.name, "broker", "", "", [broker.v4.to_string(), broker.v6.to_string()]));
    }
    for node in topology.nodes() {
        let kind = if node.gateway { "gateway" } else { "node" };
        places.push(row(&node.name, kind, &node.cluster, "", [node.v4.to_string(), node.v6.to_string()]));
        for pod in &node.pods {
            let addresses = [pod.v4.to_string(), pod.v6.to_string()];
            places.push(row(&pod.name, "pod", &pod.cluster, &pod.node, addresses));
        }
    }
    let mut programs = lab.running();
    let mut faults: Vec<_> = lab.faults().iter().map(ToString::to_string).collect();
    let stopped = programs.iter().filter(|p| p.ended.is_none() && is_stopped(p.pid));
    faults.extend(stopped.map(|p| format!("stop {} {}", p.place, p.program)));
    programs.retain(|p| p.program != "serve" || p.ended.is_some());
    Status { name: name.to_owned(), places, programs, faults, logs: place::log_dir().display().to_string() }
}

/// Whether a process hangs by SIGSTOP.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}
