//! The lab itself: underlay, nodes, pods, and the processes that run in them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::capture::Capture;
use crate::directory;
use crate::fault::{Fault, Faults};
use crate::kubernetes;
use crate::place::{Mounts, Place, log_dir};
use crate::program;
use crate::sandbox::{ROOT, Sandbox};
use crate::topology::{Api, CLUSTER_DNS, Cluster, ControlPlane, Forward, NAMESERVER, Node, Pod, Topology};

/// The resolv.conf of places that ask a directory's agents, and of those that ask a cluster's DNS.
const DIRECTORY_RESOLV: &str = "resolv.conf";
const KUBERNETES_RESOLV: &str = "resolv-kubernetes.conf";

/// A running lab. Dropping it ends its processes; its namespaces end with the sandbox.
#[derive(Debug)]
pub struct Lab {
    topology: Topology,
    wire: Place,
    lans: BTreeMap<String, Place>,
    places: BTreeMap<String, Place>,
    processes: Mutex<BTreeMap<(String, String), Process>>,
    faults: Mutex<Faults>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    args: Vec<String>,
    ended: Option<ExitStatus>,
}

/// A process of the lab, for `status`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Running {
    /// Where it runs.
    pub place: String,
    /// What it is called there.
    pub program: String,
    /// Its number, as seen inside.
    pub pid: u32,
    /// How it ended, if it did.
    pub ended: Option<String>,
}

impl Lab {
    /// Builds namespaces, links, addresses, routes, the CNI and the manifests, and starts `serve` in every pod. No
    /// Tombolo program runs yet.
    ///
    /// # Errors
    /// What could not be made, and why.
    pub fn build(topology: Topology) -> Result<Self> {
        Sandbox::prepare()?;
        let etc = Path::new(ROOT).join("etc");
        std::fs::write(etc.join("nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files dns\n")?;
        std::fs::write(etc.join("hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
        let resolv = format!("nameserver {NAMESERVER}\noptions timeout:1 attempts:3\n");
        std::fs::write(etc.join(DIRECTORY_RESOLV), resolv)?;
        // As a kubelet writes it.
        let search = "search default.svc.cluster.local svc.cluster.local cluster.local\n";
        let resolv = format!("nameserver {CLUSTER_DNS}\n{search}options ndots:5 timeout:1 attempts:3\n");
        std::fs::write(etc.join(KUBERNETES_RESOLV), resolv)?;
        let wire = Place::create("wire", &Mounts::default())?;
        forwarding(&wire)?;
        let mut lab = Self {
            topology: topology.clone(),
            wire,
            lans: BTreeMap::new(),
            places: BTreeMap::new(),
            processes: Mutex::default(),
            faults: Mutex::default(),
        };
        for broker in &topology.brokers {
            lab.add_broker(broker)?;
        }
        for cluster in &topology.clusters {
            lab.add_cluster(cluster)?;
        }
        lab.finish_planes(&topology.clusters)?;
        for pod in topology.pods() {
            lab.start(&pod.name, "serve", &program::serve(&pod.name)?)?;
        }
        Ok(lab)
    }

    /// What it was built from.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The place between the clusters.
    #[must_use]
    pub fn wire(&self) -> &Place {
        &self.wire
    }

    /// The bridge that joins a cluster's nodes.
    ///
    /// # Errors
    /// If there is no such cluster.
    pub fn lan(&self, cluster: &str) -> Result<&Place> {
        self.lans.get(cluster).with_context(|| format!("there is no cluster {cluster}"))
    }

    /// A node, pod or broker.
    ///
    /// # Errors
    /// If nothing has this name.
    pub fn place(&self, name: &str) -> Result<&Place> {
        if name == "wire" {
            return Ok(&self.wire);
        }
        self.places.get(name).with_context(|| format!("there is no node, pod or broker named {name}"))
    }

    /// The directory that is the cluster's API, as seen from here (`/run/lab/cluster` on the cluster's nodes), or of its
    /// control plane (`/run/lab/cluster` there).
    #[must_use]
    pub fn cluster_dir(&self, cluster: &str) -> PathBuf {
        Path::new(ROOT).join("cluster").join(cluster)
    }

    /// A node's or broker's private directory as seen from here (`/run/lab/state` there).
    #[must_use]
    pub fn state_dir(&self, place: &str) -> PathBuf {
        Path::new(ROOT).join("node").join(place).join("run/lab/state")
    }

    /// Starts watching the wire.
    ///
    /// # Errors
    /// If the packet socket cannot be opened.
    pub fn watch_wire(&self) -> Result<Capture> {
        Capture::start(&self.wire, &self.topology)
    }

    /// Starts a program in a place. Its output goes to `PLACE-NAME.log`.
    ///
    /// # Errors
    /// If it cannot be started, or one of this name already runs there.
    pub fn start(&self, place: &str, name: &str, args: &[String]) -> Result<()> {
        let mut processes = self.processes();
        let key = (place.to_owned(), name.to_owned());
        if let Some(old) = processes.get_mut(&key)
            && old.child.try_wait()?.is_none()
        {
            bail!("{name} already runs in {place}");
        }
        let (first, rest) = args.split_first().context("an empty command")?;
        let dir = log_dir();
        std::fs::create_dir_all(&dir)?;
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(dir.join(format!("{place}-{name}.log")))?;
        let child = self
            .place(place)?
            .command(first)
            .args(rest)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {first} in {place}"))?;
        processes.insert(key, Process { child, args: args.to_vec(), ended: None });
        Ok(())
    }

    /// Sends a signal to a program of a place.
    ///
    /// # Errors
    /// If it does not run.
    pub fn signal(&self, place: &str, name: &str, signal: Signal) -> Result<()> {
        let pid = self.pid(place, name)?;
        kill(Pid::from_raw(pid.cast_signed()), signal)
            .with_context(|| format!("{signal} to {name} in {place}"))
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill(&self, place: &str, name: &str) -> Result<()> {
        self.signal(place, name, Signal::SIGKILL)?;
        self.wait(place, name).map(drop)
    }

    /// Waits for a program's end.
    ///
    /// # Errors
    /// If it was never started.
    pub fn wait(&self, place: &str, name: &str) -> Result<ExitStatus> {
        let mut processes = self.processes();
        let process = find(&mut processes, place, name)?;
        let status = process.child.wait()?;
        process.ended = Some(status);
        Ok(status)
    }

    /// Starts a program again as it was started before.
    ///
    /// # Errors
    /// If it was never started, or still runs.
    pub fn restart(&self, place: &str, name: &str) -> Result<()> {
        let args = find(&mut self.processes(), place, name)?.args.clone();
        self.start(place, name, &args)
    }

    /// A program's process number.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&self, place: &str, name: &str) -> Result<u32> {
        let mut processes = self.processes();
        let process = find(&mut processes, place, name)?;
        if let Some(status) = process.child.try_wait()? {
            bail!("{name} in {place} has ended: {status}\n{}", self.tail(place, name));
        }
        Ok(process.child.id())
    }

    /// The number of the first child of a program: the agent proper, below its holder.
    ///
    /// # Errors
    /// If the program does not run or has no child.
    pub fn child_pid(&self, place: &str, name: &str) -> Result<u32> {
        let parent = self.pid(place, name)?;
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))
            .or_else(|_| children_of(parent))?;
        let first = children.split_whitespace().next();
        first.and_then(|p| p.parse().ok()).with_context(|| format!("{name} in {place} has no child"))
    }

    /// SIGKILL to the first child of a program.
    ///
    /// # Errors
    /// If there is none.
    pub fn kill_child(&self, place: &str, name: &str) -> Result<()> {
        let pid = self.child_pid(place, name)?;
        Ok(kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)?)
    }

    /// SIGSTOP to a program and all that it started: it hangs, and keeps what it holds.
    ///
    /// # Errors
    /// If it does not run.
    pub fn stop(&self, place: &str, name: &str) -> Result<()> {
        self.signal_tree(place, name, Signal::SIGSTOP).map(drop)
    }

    /// SIGCONT to a program and all that it started.
    ///
    /// # Errors
    /// If it does not run.
    pub fn cont(&self, place: &str, name: &str) -> Result<()> {
        self.signal_tree(place, name, Signal::SIGCONT).map(drop)
    }

    /// SIGKILL to a program and all that it started, devices too, and waits until it is gone.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill_tree(&self, place: &str, name: &str) -> Result<()> {
        for pid in self.signal_tree(place, name, Signal::SIGSTOP)? {
            // A child may be gone with its parent.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        self.wait(place, name).map(drop)
    }

    /// From the root down: what a stopped parent starts no more cannot be missed. Whom it reached.
    fn signal_tree(&self, place: &str, name: &str, signal: Signal) -> Result<Vec<u32>> {
        let (mut pids, mut next) = (vec![self.pid(place, name)?], 0);
        while let Some(pid) = pids.get(next).copied() {
            kill(Pid::from_raw(pid.cast_signed()), signal)
                .with_context(|| format!("{signal} to process {pid} of {name} in {place}"))?;
            pids.extend(children_of(pid)?.split_whitespace().filter_map(|p| p.parse::<u32>().ok()));
            next += 1;
        }
        Ok(pids)
    }

    /// What runs, or ran.
    #[must_use]
    pub fn running(&self) -> Vec<Running> {
        self.processes()
            .iter_mut()
            .map(|((place, program), process)| {
                if process.ended.is_none() {
                    process.ended = process.child.try_wait().ok().flatten();
                }
                let ended = process.ended.map(|status| status.to_string());
                Running { place: place.clone(), program: program.clone(), pid: process.child.id(), ended }
            })
            .collect()
    }

    /// The last lines that a program wrote.
    #[must_use]
    pub fn tail(&self, place: &str, name: &str) -> String {
        let file = log_dir().join(format!("{place}-{name}.log"));
        let text = std::fs::read(&file).map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let mut tail = String::new();
        for line in &lines[lines.len().saturating_sub(30)..] {
            let _ = writeln!(tail, "{place} {name}: {line}");
        }
        tail
    }

    /// Adds a fault to those in force.
    ///
    /// # Errors
    /// If a name is unknown.
    pub fn fault(&self, fault: Fault) -> Result<()> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).add(self, fault)
    }

    /// Ends every fault of network and disks.
    ///
    /// # Errors
    /// If nft fails.
    pub fn heal(&self) -> Result<()> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).heal(self, None)
    }

    /// Ends one fault, named as [`Fault`] displays.
    ///
    /// # Errors
    /// If it is not in force: says which are.
    pub fn heal_one(&self, fault: &str) -> Result<()> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).heal(self, Some(fault))
    }

    /// The faults in force.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).list()
    }

    fn processes(&self) -> MutexGuard<'_, BTreeMap<(String, String), Process>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_broker(&mut self, broker: &crate::topology::Broker) -> Result<()> {
        let place = Place::create(&broker.name, &mounts(&broker.name, DIRECTORY_RESOLV, None)?)?;
        let (v4, v6, link) = (broker.v4, broker.v6, format!("b{}", broker.v4.octets()[3]));
        self.wire.ip(&format!(
            "link add {link} type veth peer name eth0 netns {}\n\
             link set {link} up\naddr add 172.30.0.254/32 dev {link}\nroute add {v4}/32 dev {link}\n\
             addr add fd00:30::fe/128 dev {link} nodad\n-6 route add {v6}/128 dev {link}\n",
            place.path()
        ))?;
        place.ip(&format!(
            "link set eth0 up\naddr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n\
             route add 172.30.0.254/32 dev eth0\nroute add default via 172.30.0.254\n\
             -6 route add fd00:30::fe/128 dev eth0\n-6 route add default via fd00:30::fe\n"
        ))?;
        self.places.insert(broker.name.clone(), place);
        Ok(())
    }

    /// The topology as it was.
    pub(crate) fn replace_topology(&mut self, topology: Topology) -> Topology {
        std::mem::replace(&mut self.topology, topology)
    }

    pub(crate) fn add_cluster(&mut self, cluster: &Cluster) -> Result<()> {
        crate::fault::disk::make(&self.cluster_dir(&cluster.id))?;
        if matches!(cluster.api, Api::Directory) {
            directory::write(&self.cluster_dir(&cluster.id), cluster)?;
        }
        let lan = Place::create(&format!("lan-{}", cluster.id), &Mounts::default())?;
        let link = format!("c{}", cluster.index);
        lan.ip("link add br0 type bridge\nlink set br0 up\n")?;
        self.wire.ip(&format!(
            "link add {link} type veth peer name wire netns {}\nlink set {link} up\n\
             addr add {}/24 dev {link}\naddr add {}/64 dev {link} nodad\n",
            lan.path(),
            cluster.router4,
            cluster.router6
        ))?;
        lan.ip("link set wire master br0 up\n")?;
        self.lans.insert(cluster.id.clone(), lan);
        for node in &cluster.nodes {
            self.add_node(cluster, node)?;
        }
        cluster.kubernetes().map_or(Ok(()), |control| self.add_plane(cluster, control))
    }

    /// The place of a control plane and the pod of its DNS; starts what takes longest.
    fn add_plane(&mut self, cluster: &Cluster, control: &ControlPlane) -> Result<()> {
        let mounts_of = mounts(&control.place, DIRECTORY_RESOLV, Some(&self.cluster_dir(&cluster.id)))?;
        let place = Place::create(&control.place, &mounts_of)?;
        self.lan(&cluster.id)?.ip(&format!(
            "link add api type veth peer name eth0 netns {}\nlink set api master br0 up\n",
            place.path()
        ))?;
        place.ip(&format!(
            "link set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             route add default via {}\n-6 route add default via {}\n",
            control.v4, control.v6, cluster.router4, cluster.router6
        ))?;
        self.places.insert(control.place.clone(), place);
        for pod in control.pods() {
            let node =
                cluster.nodes.iter().find(|n| n.name == pod.node).context("a pod of the control plane's")?;
            let place = add_pod(node, pod, self.place(&node.name)?, DIRECTORY_RESOLV)?;
            self.places.insert(pod.name.clone(), place);
        }
        self.start_plane(cluster, control)
    }

    pub(crate) fn add_node(&mut self, cluster: &Cluster, node: &Node) -> Result<()> {
        let directory = self.cluster_dir(&cluster.id);
        let (resolv, directory) = match cluster.api {
            Api::Directory => (DIRECTORY_RESOLV, Some(&*directory)),
            // The control plane's directory has its keys.
            Api::Kubernetes(_) => (KUBERNETES_RESOLV, None),
        };
        let place = Place::create(&node.name, &mounts(&node.name, resolv, directory)?)?;
        forwarding(&place)?;
        let link = format!("n{}", node.number);
        self.lan(&cluster.id)?.ip(&format!(
            "link add {link} type veth peer name eth0 netns {}\nlink set {link} master br0 up\n",
            place.path()
        ))?;
        let mut batch = format!(
            "link set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             route add default via {}\n-6 route add default via {}\n",
            node.v4, node.v6, cluster.router4, cluster.router6
        );
        if !node.kwok {
            let _ = write!(
                batch,
                "link add cni0 type bridge\naddr add {}/24 dev cni0\naddr add {}/64 dev cni0 nodad\nlink set cni0 up\n",
                node.cni4, node.cni6
            );
        }
        for other in cluster.nodes.iter().filter(|other| other.number != node.number) {
            let _ = writeln!(batch, "route add {} via {}", other.pods4, other.v4);
            let _ = writeln!(batch, "-6 route add {} via {}", other.pods6, other.v6);
        }
        place.ip(&batch)?;
        place.nft(&cni(cluster))?;
        if node.kwok {
            let name = kubernetes::kwok::name(node);
            let simulated = Place::create(&name, &mounts(&name, resolv, None)?)?;
            kubernetes::kwok::wire(&simulated, node, &place)?;
            self.places.insert(name, simulated);
        }
        for pod in &node.pods {
            let pod_place = add_pod(node, pod, &place, resolv)?;
            self.places.insert(pod.name.clone(), pod_place);
        }
        self.places.insert(node.name.clone(), place);
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for process in self.processes().values_mut() {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}

fn find<'a>(
    processes: &'a mut BTreeMap<(String, String), Process>,
    place: &str,
    name: &str,
) -> Result<&'a mut Process> {
    processes
        .get_mut(&(place.to_owned(), name.to_owned()))
        .with_context(|| format!("no {name} was started in {place}"))
}

/// For kernels without `/proc/PID/task/TID/children`.
fn children_of(parent: u32) -> std::io::Result<String> {
    let mut children = String::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let after = stat.rsplit(')').next().unwrap_or_default();
        if after.split_whitespace().nth(1) == Some(&parent.to_string()) {
            children.push_str(&format!("{} ", entry.file_name().to_string_lossy()));
        }
    }
    Ok(children)
}

fn forwarding(place: &Place) -> Result<()> {
    place.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])
}

fn add_pod(node: &Node, pod: &Pod, on: &Place, resolv: &str) -> Result<Place> {
    let place = Place::create(&pod.name, &mounts(&pod.name, resolv, None)?)?;
    let link = format!("p{}", pod.v4.octets()[3]);
    // Hairpin as the kubelet sets it: a pod may be its own backend.
    on.ip(&format!(
        "link add {link} type veth peer name eth0 netns {}\nlink set {link} master cni0 up\n\
         link set {link} type bridge_slave hairpin on\n",
        place.path()
    ))?;
    place.ip(&format!(
        "link set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
         route add default via {}\n-6 route add default via {}\n",
        pod.v4, pod.v6, node.cni4, node.cni6
    ))?;
    Ok(place)
}

/// A place's own /run, with its private state and, on a node, the cluster's directory.
fn mounts(name: &str, resolv: &str, cluster: Option<&Path>) -> Result<Mounts> {
    let run = Path::new(ROOT).join("node").join(name).join("run");
    for dir in ["lab/state", "lab/cluster", "tombolo/devices", "wireguard"] {
        std::fs::create_dir_all(run.join(dir))?;
    }
    crate::fault::disk::make(&run.join("lab/state"))?;
    if let Some(cluster) = cluster {
        let none = None::<&str>;
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(cluster), &run.join("lab/cluster"), none, flags, none)?;
    }
    let etc = Path::new(ROOT).join("etc");
    let files = [(resolv, "resolv.conf"), ("nsswitch.conf", "nsswitch.conf"), ("hosts", "hosts")];
    let files = files.map(|(ours, theirs)| (etc.join(ours), Path::new("/etc").join(theirs)));
    Ok(Mounts { run: Some(run), files: files.into() })
}

/// What a CNI leaves in a node's firewall.
fn cni(cluster: &Cluster) -> String {
    let (v4, v6) = (cluster.pods4, cluster.pods6);
    let mut text = format!(
        "table inet cni {{\n chain postrouting {{\n  type nat hook postrouting priority srcnat; policy accept;\n  \
         ip saddr {v4} ip daddr != {v4} oifname != \"cni0\" masquerade\n  \
         ip6 saddr {v6} ip6 daddr != {v6} oifname != \"cni0\" masquerade\n }}\n}}\n"
    );
    if cluster.forward == Forward::Drop {
        for (family, own) in [("ip", v4.to_string()), ("ip6", v6.to_string())] {
            let _ = write!(
                text,
                "table {family} filter {{\n chain FORWARD {{\n  type filter hook forward priority filter; policy drop;\n  \
                 {family} saddr {own} {family} daddr {own} accept\n  oifname \"eth0\" accept\n  \
                 ct state established,related accept\n }}\n}}\n"
            );
        }
    }
    text
}

/// Waits until something holds, looking every 20 ms.
///
/// # Errors
/// If it does not within the time: says what was waited for, and what the last look said.
pub fn wait_until(what: &str, within: Duration, mut look: impl FnMut() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    loop {
        match look() {
            Ok(()) => return Ok(start.elapsed()),
            Err(error) if start.elapsed() >= within => {
                return Err(error.context(format!("waited {within:?} for: {what}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// An address as it stands in a URL.
#[must_use]
pub fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => format!("[{a}]"),
    }
}
