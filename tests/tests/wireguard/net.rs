//! Two network namespaces with devices in them, and what is done there.

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const WIREGUARD_GO: &str = "v0.0.0-20260522210424-ecfc5a8d5446";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Ours,
    Go,
}

/// Two namespaces, `a` and `b`, and a wire.
pub(crate) struct Net {
    pub(crate) id: String,
    pub(crate) dir: tempfile::TempDir,
}

/// A device in a namespace.
pub(crate) struct End {
    pub(crate) name: String,
    pub(crate) place: &'static str,
    pub(crate) port: u16,
    pub(crate) public: String,
    pub(crate) process: Child,
}

impl End {
    pub(crate) fn pid(&self) -> i32 {
        self.process.id() as i32
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            let _ = self.process.wait();
        }
    }
}

pub(crate) struct Guard(pub(crate) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Net {
    pub(crate) fn new() -> Self {
        require();
        let net = Self { id: fresh(""), dir: tempfile::tempdir().unwrap() };
        for place in ["a", "b"] {
            run("ip", &["netns", "add", &net.space(place)]);
            net.ip(place, &["link", "set", "lo", "up"]);
        }
        let (a, b) = (net.veth("a"), net.veth("b"));
        run(
            "ip",
            &[
                "link",
                "add",
                &a,
                "netns",
                &net.space("a"),
                "type",
                "veth",
                "peer",
                "name",
                &b,
                "netns",
                &net.space("b"),
            ],
        );
        for (place, host) in [("a", 1), ("b", 2)] {
            let veth = net.veth(place);
            net.ip(place, &["addr", "add", &format!("192.0.2.{host}/24"), "dev", &veth]);
            net.ip(place, &["addr", "add", &format!("2001:db8::{host}/64"), "dev", &veth, "nodad"]);
            net.ip(place, &["link", "set", &veth, "up"]);
        }
        net
    }

    pub(crate) fn space(&self, place: &str) -> String {
        format!("{}-{place}", self.id)
    }

    pub(crate) fn veth(&self, place: &str) -> String {
        format!("{}v{place}", self.id)
    }

    pub(crate) fn command(&self, place: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(place), program]);
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn exec(&self, place: &str, line: &[&str]) -> String {
        let output = self.command(place, line[0]).args(&line[1..]).output().unwrap();
        assert!(
            output.status.success(),
            "{line:?} in {place}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    pub(crate) fn ip(&self, place: &str, line: &[&str]) -> String {
        let space = self.space(place);
        run("ip", &[&["-n", &space], line].concat())
    }

    pub(crate) fn has_link(&self, place: &str, name: &str) -> bool {
        output("ip", &["-n", &self.space(place), "link", "show", name]).status.success()
    }

    /// A device that is up to be configured.
    pub(crate) fn device(&self, place: &'static str, kind: Kind) -> End {
        self.device_without(place, kind, "")
    }

    /// The same, without some of the kernel's offloads.
    pub(crate) fn device_without(&self, place: &'static str, kind: Kind, offloads: &str) -> End {
        let name = fresh(place);
        let program = match kind {
            Kind::Ours => binary(),
            Kind::Go => wireguard_go(),
        };
        let log = fs::File::create(self.dir.path().join(format!("{name}.log"))).unwrap();
        let process = self
            .command(place, program.to_str().unwrap())
            .args(["-f", &name])
            .env("TOMBOLO_LOG", "debug")
            .env("TOMBOLO_WIREGUARD_STATE_DIR", self.dir.path().join("stamps"))
            .env("TOMBOLO_WIREGUARD_WITHOUT", offloads)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        wait_for("the device's socket", || UnixStream::connect(socket(&name)).ok());
        let key = genkey();
        let public = public(&key);
        static PORT: AtomicU32 = AtomicU32::new(20000);
        let port = PORT.fetch_add(1, Ordering::SeqCst) as u16;
        let file = self.dir.path().join(format!("{name}.key"));
        fs::write(&file, key).unwrap();
        run("wg", &["set", &name, "private-key", file.to_str().unwrap(), "listen-port", &port.to_string()]);
        End { name, place, port, public, process }
    }

    pub(crate) fn configure(
        &self,
        end: &End,
        v4: &str,
        v6: &str,
        peer: &str,
        endpoint: Option<&str>,
        allowed: &str,
    ) {
        let mut line = vec!["set", &end.name, "peer", peer, "allowed-ips", allowed];
        line.extend(endpoint.iter().flat_map(|e| ["endpoint", e]));
        run("wg", &line);
        self.ip(end.place, &["addr", "add", &format!("{v4}/24"), "dev", &end.name]);
        self.ip(end.place, &["addr", "add", &format!("{v6}/64"), "dev", &end.name, "nodad"]);
        self.ip(end.place, &["link", "set", &end.name, "up"]);
    }

    /// Two devices that know each other; only the first knows where the other is.
    pub(crate) fn pair(&self, a: Kind, b: Kind) -> (End, End) {
        self.join(self.device("a", a), self.device("b", b))
    }

    pub(crate) fn join(&self, a: End, b: End) -> (End, End) {
        let endpoint = format!("192.0.2.2:{}", b.port);
        self.configure(&a, "10.99.0.1", "fd99::1", &b.public, Some(&endpoint), "10.99.0.2/32,fd99::2/128");
        self.configure(&b, "10.99.0.2", "fd99::2", &a.public, None, "10.99.0.1/32,fd99::1/128");
        let shared = self.dir.path().join("psk");
        fs::write(&shared, run("wg", &["genpsk"])).unwrap();
        for (end, peer) in [(&a, &b), (&b, &a)] {
            run("wg", &["set", &end.name, "peer", &peer.public, "preshared-key", shared.to_str().unwrap()]);
        }
        (a, b)
    }

    pub(crate) fn ping(&self, place: &str, to: &str, count: u32, may_lose: u32) {
        self.ping_with(place, &["-c", &count.to_string(), "-i", "0.01"], to, count, may_lose);
    }

    pub(crate) fn ping_with(&self, place: &str, options: &[&str], to: &str, count: u32, may_lose: u32) {
        let output = self.command(place, "ping").args(options).args(["-q", "-W", "2", to]).output().unwrap();
        let lost = count - received(&text(&output.stdout));
        assert!(lost <= may_lose, "{lost} of {count} lost from {place} to {to}\n{}", self.logs());
    }

    pub(crate) fn start_ping(&self, place: &str, to: &str, count: u32) -> Flow {
        let count_text = count.to_string();
        let mut command = self.command(place, "ping");
        command.args(["-q", "-i", "0.01", "-W", "1", "-c", &count_text, to]).stdout(Stdio::piped());
        Flow { ping: command.spawn().unwrap(), count }
    }

    /// Sends UDP packets, slowly enough that nearly all must arrive.
    pub(crate) fn udp(&self, place: &str, to: &str) {
        let other = if place == "a" { "b" } else { "a" };
        let mut server = Guard(
            self.command(other, "iperf3")
                .args(["-s", "-1", "-p", "5302"])
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        );
        wait_for("iperf3", || self.exec(other, &["ss", "-tlnH"]).contains(":5302").then_some(()));
        let line = ["iperf3", "-u", "-c", to, "-p", "5302", "-t", "1", "-b", "20M", "-l", "1200"];
        let report = self.exec(place, &line);
        server.0.wait().unwrap();
        let line = report.lines().find(|l| l.ends_with("receiver")).unwrap_or_else(|| panic!("{report}"));
        let lost = line.rsplit_once('(').and_then(|(_, rest)| rest.split_once("%)")).unwrap().0;
        assert!(lost.parse::<f64>().unwrap() < 20.0, "{line}\n{}", self.logs());
    }

    pub(crate) fn megabits(&self, place: &str, to: &str) -> f64 {
        let other = if place == "a" { "b" } else { "a" };
        let mut server = Guard(
            self.command(other, "iperf3")
                .args(["-s", "-1", "-p", "5301"])
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        );
        wait_for("iperf3", || self.exec(other, &["ss", "-tlnH"]).contains(":5301").then_some(()));
        let report = self.exec(place, &["iperf3", "-c", to, "-p", "5301", "-t", "1", "-f", "m"]);
        server.0.wait().unwrap();
        let line = report.lines().find(|l| l.ends_with("receiver")).unwrap_or_else(|| panic!("{report}"));
        let words: Vec<_> = line.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "Mbits/sec").unwrap();
        let megabits = words[at - 1].parse().unwrap();
        println!("{place} to {to}: {megabits} Mbit/s");
        megabits
    }

    /// A thousand echoes a second.
    pub(crate) fn steady(&self, place: &str, to: &str, count: u32) -> Flow {
        let count_text = count.to_string();
        let mut command = self.command(place, "ping");
        command.args(["-q", "-i", "0.001", "-W", "2", "-c", &count_text, to]).stdout(Stdio::piped());
        Flow { ping: command.spawn().unwrap(), count }
    }

    /// The mean length of packets that an interface sent, or received.
    pub(crate) fn mean(&self, place: &str, link: &str, direction: &str) -> u64 {
        let shown = self.ip(place, &["-s", "link", "show", link]);
        let mut lines = shown.lines().skip_while(|line| !line.trim().starts_with(direction)).skip(1);
        let mut numbers = lines.next().unwrap().split_whitespace().map(|n| n.parse::<u64>().unwrap());
        let (bytes, packets) = (numbers.next().unwrap(), numbers.next().unwrap());
        bytes / packets.max(1)
    }

    /// What a device's processes logged.
    pub(crate) fn said(&self, end: &End) -> String {
        fs::read_to_string(self.dir.path().join(format!("{}.log", end.name))).unwrap_or_default()
    }

    pub(crate) fn logs(&self) -> String {
        let mut all = String::new();
        for entry in fs::read_dir(self.dir.path()).unwrap().flatten() {
            if entry.path().extension().is_some_and(|e| e == "log") {
                all +=
                    &format!("--- {}\n{}", entry.path().display(), fs::read_to_string(entry.path()).unwrap());
            }
        }
        all
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for place in ["a", "b"] {
            // What a failed test left running there: our own, by namespace.
            let space = self.space(place);
            for pid in text(&output("ip", &["netns", "pids", &space]).stdout).split_whitespace() {
                let _ = kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGTERM);
            }
            output("ip", &["netns", "del", &space]);
        }
    }
}

/// A call with a right first check, by a key that the device does not know, again and again.
pub(crate) struct Flood {
    pub(crate) sent: Arc<AtomicU32>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    /// From `a` to the device of `b`, at most 50 in a millisecond, from so many addresses.
    pub(crate) fn start(net: &Net, victim: &End, sources: usize) -> Self {
        // All of 198.18.0.0/16 is here, and answers find the way.
        net.ip("a", &["route", "add", "local", "198.18.0.0/16", "dev", "lo"]);
        net.ip("b", &["route", "add", "198.18.0.0/16", "via", "192.0.2.1"]);
        let caller = net.device("a", Kind::Ours);
        let (sent, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let space = fs::File::open(format!("/var/run/netns/{}", net.space("a"))).unwrap();
        let (name, key, port) = (caller.name.clone(), victim.public.clone(), victim.port);
        let (counter, stopped) = (Arc::clone(&sent), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            // This thread alone.
            nix::sched::setns(space, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let ear = UdpSocket::bind("127.0.0.1:0").unwrap();
            ear.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let here = ear.local_addr().unwrap().to_string();
            let line = ["set", &name, "peer", &key, "endpoint", &here, "persistent-keepalive", "25"];
            run("wg", &line);
            let mut call = [0; 148];
            assert_eq!(ear.recv(&mut call).unwrap(), 148);
            drop(caller);
            let address = |i: usize| format!("198.18.{}.{}:0", i / 250, i % 250 + 1);
            let sockets: Vec<_> = (0..sources).map(|i| UdpSocket::bind(address(i)).unwrap()).collect();
            let begun = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                for socket in
                    sockets.iter().cycle().skip(counter.load(Ordering::Relaxed) as usize % sources).take(50)
                {
                    let _ = socket.send_to(&call, ("192.0.2.2", port));
                }
                let sent = counter.fetch_add(50, Ordering::Relaxed) + 50;
                std::thread::sleep(
                    Duration::from_micros(u64::from(sent) * 20).saturating_sub(begun.elapsed()),
                );
            }
        });
        let flood = Self { sent, stop, thread: Some(thread) };
        wait_for("the flood", || (flood.sent.load(Ordering::Relaxed) > 5000).then_some(()));
        flood
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(|thread| thread.join().is_ok());
        assert!(std::thread::panicking() || ended == Some(true), "the flood broke off");
    }
}

pub(crate) struct Flow {
    pub(crate) ping: Child,
    pub(crate) count: u32,
}

impl Flow {
    pub(crate) fn lost(mut self) -> u32 {
        let mut report = String::new();
        self.ping.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        self.ping.wait().unwrap();
        self.count - received(&report)
    }
}

pub(crate) fn received(report: &str) -> u32 {
    let words: Vec<_> = report.split_whitespace().collect();
    let at =
        words.iter().position(|w| w.starts_with("received")).unwrap_or_else(|| panic!("ping said: {report}"));
    words[at - 1].parse().unwrap()
}

/// The newest child of a device's supervisor: the one before may linger.
pub(crate) fn worker_of(end: &End) -> Option<i32> {
    let worker = |entry: fs::DirEntry| -> Option<(u64, i32)> {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let fields: Vec<_> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let ours = fields[0] != "Z" && fields[1] == end.pid().to_string();
        ours.then_some((fields[19].parse().ok()?, pid))
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(worker).max().map(|(_, pid)| pid)
}

pub(crate) fn uapi(name: &str, request: &str) -> String {
    let mut stream = UnixStream::connect(socket(name)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A state without what changes by itself.
pub(crate) fn counters_cut(state: &str) -> Vec<&str> {
    state.lines().filter(|l| !l.contains("_bytes=") && !l.contains("handshake")).collect()
}

pub(crate) fn socket(name: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{name}.sock"))
}

pub(crate) fn genkey() -> String {
    run("wg", &["genkey"]).trim().to_owned()
}

pub(crate) fn public(key: &str) -> String {
    let mut child =
        Command::new("wg").arg("pubkey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(key.as_bytes()).unwrap();
    text(&child.wait_with_output().unwrap().stdout).trim().to_owned()
}

/// A name that nobody else uses on this machine.
pub(crate) fn fresh(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::SeqCst);
    format!("hwg{kind}{:x}-{n}", std::process::id() & 0xffff)
}

pub(crate) fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(output.status.success(), "{program} {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited 10 s for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn binary() -> PathBuf {
    let program = std::env::var_os("TOMBOLO_WIREGUARD").map(PathBuf::from).unwrap_or_else(|| {
        let test = std::env::current_exe().unwrap();
        test.parent().and_then(Path::parent).unwrap().join("tombolo-wireguard")
    });
    assert!(program.exists(), "{} is missing: run `cargo build -p tombolo-wireguard`", program.display());
    program
}

/// A release with UDP segmentation offload, built once.
pub(crate) fn wireguard_go() -> PathBuf {
    static BUILD: Once = Once::new();
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"));
    let program = cache.join("tombolo").join(format!("wireguard-go-{WIREGUARD_GO}")).join("wireguard");
    BUILD.call_once(|| {
        if !program.exists() {
            let module = format!("golang.zx2c4.com/wireguard@{WIREGUARD_GO}");
            let built = Command::new("go")
                .args(["install", &module])
                .env("GOBIN", program.parent().unwrap())
                .output();
            let built = built.unwrap_or_else(|e| panic!("Go is needed to build wireguard-go: {e}"));
            assert!(built.status.success(), "go install {module}: {}", text(&built.stderr));
        }
    });
    program
}

/// Says all that is missing at once.
pub(crate) fn require() {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root (run the tests as root)".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for (tool, package) in [
        ("ip", "iproute2"),
        ("ss", "iproute2"),
        ("wg", "wireguard-tools"),
        ("wg-quick", "wireguard-tools"),
        ("ping", "iputils-ping"),
        ("iperf3", "iperf3"),
        ("setpriv", "util-linux"),
    ] {
        if !std::env::split_paths(&path).any(|dir| dir.join(tool).exists()) {
            missing.push(format!("{tool} (apt-get install {package})"));
        }
    }
    assert!(missing.is_empty(), "these tests cannot run here; missing: {}", missing.join(", "));
}
