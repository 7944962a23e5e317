//! The kernel's own WireGuard, on Debian's kernel in a virtual machine: this machine's may have none. Needs root,
//! qemu, and the kernel that `.ci/kernel` fetches. Without them the test says so and does nothing, except in CI.
//!
//! The machine's root is made of busybox, `ip`, this very program and the libraries of these; its init loads the modules
//! and runs [`inside`].

// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::unwrap_in_result, clippy::print_stdout)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use tombolo_agent::apply::device::TunnelDriver as _;
use tombolo_agent::apply::driver::{Choice, Drivers};
use tombolo_agent::apply::kernel::Kernel;
use tombolo_agent::apply::key::DeviceKeys;
use tombolo_agent::apply::{Appliers, Options, Writes};
use tombolo_agent_core::desired::{NodeDesired, Peer, TunnelDevice};
use tombolo_agent_core::known::Section;
use tombolo_agent_core::object::NodeKey;
use tombolo_proto::model::{DeviceNumber, Lanes, WireguardKey};

/// Modules that the machine needs, and what they need.
const MODULES: [&str; 3] = ["wireguard", "tun", "veth"];
/// The machine is emulated: minutes, should the other tests take all processors.
const PATIENCE: Duration = Duration::from_secs(300);

// ---- outside

/// Where `.ci/kernel` put a kernel: `vmlinuz`, and `modules` with `modules.dep`.
fn kernel() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tombolo"));
    let cache = std::env::var_os("TOMBOLO_CACHE").map(PathBuf::from).or(home)?;
    let entries = fs::read_dir(cache).ok()?.flatten().map(|entry| entry.path());
    let mut kernels: Vec<PathBuf> = entries.filter(|path| path.join("vmlinuz").is_file()).collect();
    kernels.sort();
    kernels.pop()
}

/// A program of the search path.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A program that is built with this test.
fn built(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.parent().unwrap().parent().unwrap().join(name);
    assert!(path.is_file(), "{name} is not built: cargo build --workspace --bins");
    path
}

/// Libraries of a program, as the loader finds them.
fn libraries(program: &Path) -> BTreeSet<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(|word| PathBuf::from(word.trim_end_matches(':'))).collect()
}

/// Copies a program and its libraries into a root, without what only debuggers read.
fn install(root: &Path, program: &Path, to: &str) {
    let to = root.join(to);
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(program, &to).unwrap();
    let stripped = Command::new("strip").arg(&to).status().unwrap();
    assert!(stripped.success(), "strip {}", to.display());
    for library in libraries(program) {
        let to = root.join(library.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(&library, &to).unwrap();
    }
}

/// The files of modules and of what they need, in the order in which they are to be loaded.
fn modules(kernel: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(kernel.join("modules/modules.dep")).unwrap();
    let mut needs: BTreeMap<&str, (&str, Vec<&str>)> = BTreeMap::new();
    for line in text.lines() {
        let (file, after) = line.split_once(':').unwrap();
        let name = file.rsplit('/').next().unwrap().split('.').next().unwrap();
        needs.insert(name, (file, after.split_whitespace().collect()));
    }
    let mut order = Vec::new();
    for name in MODULES {
        // What is not there is built in.
        let Some((file, after)) = needs.get(name) else { continue };
        for file in after.iter().rev().chain([file]) {
            if !order.contains(file) {
                order.push(file);
            }
        }
    }
    order.into_iter().map(|file| kernel.join("modules").join(file)).collect()
}

/// The root of the machine, as the kernel unpacks it.
fn image(directory: &Path, kernel: &Path) -> PathBuf {
    let root = directory.join("root");
    for dir in ["proc", "sys", "dev", "tmp", "run/netns", "etc", "var/run", "lib/modules"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    install(&root, &program("busybox").unwrap(), "bin/busybox");
    install(&root, &program("ip").unwrap(), "bin/ip");
    install(&root, &std::env::current_exe().unwrap(), "bin/guest");
    install(&root, &built("tombolo-wireguard"), "bin/tombolo-wireguard");
    let mut init = String::from(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n\
         mount -t proc proc /proc\nmount -t sysfs sysfs /sys\nmount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmp /tmp\nmount -t tmpfs run /run\nmkdir -p /run/netns /var/run\n",
    );
    for module in modules(kernel) {
        let name = module.file_name().unwrap().to_str().unwrap().to_owned();
        fs::copy(&module, root.join("lib/modules").join(&name)).unwrap();
        let _ = writeln!(init, "insmod /lib/modules/{name} || echo cannot load {name}");
    }
    init.push_str(
        "mkdir -p /dev/net; [ -c /dev/net/tun ] || mknod /dev/net/tun c 10 200\nip link set lo up\n\
         guest --exact inside --ignored --nocapture 2>&1\necho \"guest ended with $?\"\npoweroff -f\n",
    );
    fs::write(root.join("init"), init).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let image = directory.join("initrd");
    let pack = format!("cd '{}' && find . | busybox cpio -o -H newc > '{}'", root.display(), image.display());
    let packed = Command::new("sh").args(["-c", &pack]).stderr(Stdio::null()).status().unwrap();
    assert!(packed.success(), "{pack}");
    image
}

/// Ends with the test, whatever becomes of it.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_kernels_wireguard_carries_and_is_chosen() {
    let qemu = "qemu-system-x86_64";
    let (Some(qemu), Some(kernel)) = (program(qemu), kernel()) else {
        let text = "qemu-system-x86_64 or Debian's kernel is not here: run .ci/setup";
        assert!(std::env::var_os("CI").is_none(), "{text}");
        println!("NOT RUN: {text}");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let initrd = image(directory.path(), &kernel);
    let console = directory.path().join("console");
    let machine = Command::new(qemu)
        .args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "1", "-no-reboot", "-display", "none"])
        .args(["-nic", "none", "-monitor", "none"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(kernel.join("vmlinuz"))
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut machine = Machine(machine);
    let start = Instant::now();
    while machine.0.try_wait().unwrap().is_none() {
        let said = || fs::read_to_string(&console).unwrap_or_default();
        assert!(start.elapsed() < PATIENCE, "the machine does not end; it said: {}", said());
        std::thread::sleep(Duration::from_millis(100));
    }
    let said = String::from_utf8_lossy(&fs::read(&console).unwrap()).into_owned();
    println!("{said}");
    assert!(said.contains("guest ended with 0") && said.contains("1 passed"), "the guest failed: {said}");
}

/// A device is taken away for another one alone. (Where this machine's kernel has WireGuard, the virtual machine shows
/// that it is changed.)
#[test]
fn a_kernel_without_wireguard_leaves_userspace_devices() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(number(0).link());
    fs::write(&file, b"").unwrap();
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let writes = Arc::new(Writes::default());
            let (devices, sockets) = (directory.path().to_owned(), directory.path().join("sockets"));
            let drivers = Drivers::open(Choice::Kernel, devices, sockets, writes).unwrap();
            match drivers.create(number(0)).await {
                Err(error) if Kernel::is_missing(&error) => assert!(file.is_file(), "{error}"),
                other => println!("NOT RUN: this machine's kernel may have WireGuard: {other:?}"),
            }
        });
    });
    thread.join().unwrap();
}

// ---- inside

/// Runs a command that must succeed; its output.
fn ok(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn number(n: u8) -> DeviceNumber {
    DeviceNumber::new(n).unwrap()
}

/// A node in a network namespace.
struct Node {
    runtime: tokio::runtime::Runtime,
    namespace: Option<fs::File>,
    keys: Arc<DeviceKeys>,
    directory: PathBuf,
}

impl Node {
    fn new(name: &str, namespace: Option<&str>) -> Self {
        let directory = PathBuf::from("/tmp").join(name);
        fs::create_dir_all(directory.join("keys")).unwrap();
        let keys =
            Arc::new(DeviceKeys::load(&directory.join("keys"), Lanes::ONE).unwrap_or_else(|e| panic!("{e}")));
        let namespace = namespace.map(|name| fs::File::open(format!("/run/netns/{name}")).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, namespace, keys, directory }
    }

    /// Runs something in the node's namespace, with its appliers.
    fn run<T: Send>(&self, choice: Choice, work: impl AsyncFnOnce(&mut Appliers, &Drivers) -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                if let Some(namespace) = &self.namespace {
                    setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                }
                self.runtime.block_on(async {
                    let (devices, sockets) =
                        (self.directory.join("devices"), PathBuf::from("/var/run/wireguard"));
                    let options = Options {
                        devices: devices.clone(),
                        sockets: sockets.clone(),
                        driver: choice,
                        ..Options::default()
                    };
                    let mut appliers = Appliers::new(options, self.keys.clone()).unwrap();
                    let drivers =
                        Drivers::open(choice, devices, sockets, Arc::new(Writes::default())).unwrap();
                    work(&mut appliers, &drivers).await
                })
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn public(&self, device: u8) -> WireguardKey {
        self.keys.get(number(device)).unwrap().current.public()
    }
}

fn desired(device: u8, own: &str, peer: WireguardKey, at: &str, allowed: &[&str]) -> NodeDesired {
    let peer = (
        peer,
        Peer {
            node: NodeKey { cluster: "us".parse().unwrap(), node: "far".parse().unwrap() },
            candidates: vec![format!("{at}:{}", number(device).default_port()).parse().unwrap()],
            allowed: allowed.iter().map(|p| p.parse().unwrap()).collect(),
            tunnel: BTreeSet::new(),
        },
    );
    let addresses: BTreeSet<IpAddr> = [own.parse().unwrap()].into();
    let device = (number(device), TunnelDevice { mtu: 1420, addresses, peers: BTreeMap::from([peer]) });
    NodeDesired {
        devices: Section::Set(BTreeMap::from([device])),
        routes: Section::Keep,
        rules: Section::Keep,
        firewall: Section::Keep,
        zone: Section::Keep,
    }
}

/// Makes it so; how much was changed.
fn apply(node: &Node, choice: Choice, desired: &NodeDesired) -> usize {
    node.run(choice, async |appliers: &mut Appliers, _: &Drivers| {
        let report = appliers.apply(desired).await;
        let failures: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{failures:#?}");
        report.applied.len()
    })
}

fn is_kernel(node: &Node, device: u8) -> bool {
    let show = |name: &str| match &node.namespace {
        None => format!("ip -d link show {name}"),
        Some(_) => format!("ip -n far -d link show {name}"),
    };
    ok(&show(&number(device).link())).contains("wireguard")
}

/// Run by the machine's init, as root of a machine of its own, and by nobody else.
#[test]
#[ignore = "runs in the virtual machine of the other test"]
fn inside() {
    assert_eq!(fs::read_to_string("/proc/1/comm").unwrap().trim(), "init", "not in the machine");
    ok("ip netns add far");
    ok("ip link add wire type veth peer name wire netns far");
    for (namespace, address) in [("", "192.0.2.1"), ("-n far ", "192.0.2.2")] {
        ok(&format!("ip {namespace}addr add {address}/24 dev wire"));
        ok(&format!("ip {namespace}link set wire up"));
        ok(&format!("ip {namespace}link set lo up"));
    }
    let (near, far) = (Node::new("near", None), Node::new("far", Some("far")));
    // Keys are made with the first apply that wants them.
    let nobody = WireguardKey([9; 32]);
    for device in [0, 1] {
        apply(&near, Choice::Auto, &desired(device, "198.18.1.1", nobody, "192.0.2.9", &[]));
        apply(&far, Choice::Auto, &desired(device, "198.18.2.1", nobody, "192.0.2.9", &[]));
    }

    // Kernel to kernel.
    let near_wants = |far_key, more: &[&str]| {
        let allowed: Vec<&str> = [&["198.18.2.1/32", "10.2.0.0/16"], more].concat();
        desired(0, "198.18.1.1", far_key, "192.0.2.2", &allowed)
    };
    let wanted = near_wants(far.public(0), &[]);
    assert!(apply(&near, Choice::Auto, &wanted) > 0);
    apply(&far, Choice::Auto, &desired(0, "198.18.2.1", near.public(0), "192.0.2.1", &["198.18.1.1/32"]));
    assert!(is_kernel(&near, 0) && is_kernel(&far, 0), "auto takes the kernel's");
    assert_eq!(apply(&near, Choice::Auto, &wanted), 0, "the second apply changes nothing");
    ok("ip route add 198.18.2.1 dev tombolo0");
    ok("ip -n far route add 198.18.1.1 dev tombolo0");
    ok("ping -c 3 -W 10 -I 198.18.1.1 198.18.2.1");
    let state = near.run(Choice::Auto, async |_: &mut Appliers, drivers: &Drivers| {
        assert_eq!(drivers.list().await.unwrap(), [number(0)].into());
        drivers.read(number(0)).await.unwrap()
    });
    let peer = &state.peers[&far.public(0)];
    assert!(peer.last_handshake.is_some() && peer.received > 0 && peer.sent > 0, "{peer:?}");
    assert_eq!((state.port, state.key), (number(0).default_port(), Some(near.public(0))));

    // An allowed IP comes and goes, and the session stays.
    let more = near_wants(far.public(0), &["10.3.0.0/16", "fd00:3::/48"]);
    for wanted in [&more, &wanted] {
        assert!(apply(&near, Choice::Auto, wanted) > 0);
        assert_eq!(apply(&near, Choice::Auto, wanted), 0);
    }
    let after = near.run(Choice::Auto, async |_: &mut Appliers, drivers: &Drivers| {
        drivers.read(number(0)).await.unwrap()
    });
    assert_eq!(after.peers[&far.public(0)].last_handshake, peer.last_handshake);
    assert_eq!(after.peers[&far.public(0)].allowed.len(), 2);
    ok("ping -c 1 -W 10 -I 198.18.1.1 198.18.2.1");

    // Many peers, in several messages.
    let Section::Set(devices) = &wanted.devices else { panic!() };
    let mut crowd = devices[&number(0)].clone();
    for n in 0..1000_u32 {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        key[31] = 0x40;
        let mut one = crowd.peers[&far.public(0)].clone();
        one.node.node = format!("n{n}").parse().unwrap();
        one.allowed = [format!("10.{}.{}.0/24", 100 + n / 256, n % 256).parse().unwrap()].into();
        crowd.peers.insert(WireguardKey(key), one);
    }
    let crowd = NodeDesired { devices: Section::Set([(number(0), crowd)].into()), ..wanted.clone() };
    assert!(apply(&near, Choice::Auto, &crowd) >= 1000);
    assert_eq!(apply(&near, Choice::Auto, &crowd), 0);
    assert!(apply(&near, Choice::Auto, &wanted) >= 1000);

    // The kernel's and ours.
    let mut serving = Command::new("ip")
        .args(["netns", "exec", "far", "tombolo-wireguard", "serve", "--dir", "/tmp/far/devices"])
        .spawn()
        .unwrap();
    let ours = desired(0, "198.18.2.1", near.public(0), "192.0.2.1", &["198.18.1.1/32"]);
    apply(&far, Choice::Userspace, &ours);
    assert!(!is_kernel(&far, 0), "it is asked for");
    ok("ip -n far route replace 198.18.1.1 dev tombolo0");
    let start = Instant::now();
    while !Command::new("ping")
        .args(["-c", "1", "-W", "1", "-I", "198.18.1.1", "198.18.2.1"])
        .status()
        .unwrap()
        .success()
    {
        assert!(start.elapsed() < Duration::from_secs(60), "ours and the kernel's do not talk");
    }
    apply(&far, Choice::Auto, &ours);
    assert!(!is_kernel(&far, 0), "what is there stays");
    apply(&far, Choice::Kernel, &ours);
    assert!(is_kernel(&far, 0), "it is asked for");
    serving.kill().unwrap();
    serving.wait().unwrap();

    // Somebody else's of such a name is left alone.
    ok("ip link add tombolo7 type wireguard");
    near.run(Choice::Auto, async |_: &mut Appliers, drivers: &Drivers| {
        assert_eq!(drivers.list().await.unwrap(), [number(0)].into());
        assert!(drivers.create(number(7)).await.is_err());
    });
    ok("ip link delete tombolo7");

    // And nothing stays.
    near.run(Choice::Auto, async |_: &mut Appliers, drivers: &Drivers| {
        drivers.remove(number(0)).await.unwrap();
        assert!(drivers.list().await.unwrap().is_empty());
    });
    let links = ok("ip link");
    assert!(!links.contains("tombolo"), "{links}");
}
