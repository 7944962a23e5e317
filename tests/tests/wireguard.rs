//! `tombolo-wireguard` as its users meet it: in network namespaces, through `wg`, `wg-quick` and the socket, against
//! itself and against wireguard-go, and while its processes are killed.
//!
//! Needs root, iproute2, wireguard-tools, ping, iperf3, ss, setpriv and, for wireguard-go, Go (it is built once into
//! the cache directory). What is missing makes the tests fail with a line that names it: Rust cannot say "skipped".
//! The program is `$TOMBOLO_WIREGUARD`, or the one beside the test (`cargo build -p tombolo-wireguard`).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test may panic, and show its figures"
)]

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const WIREGUARD_GO: &str = "v0.0.0-20260522210424-ecfc5a8d5446";

#[test]
fn two_devices_carry_both_families_and_show_what_wg_expects() {
    let net = Net::new();
    let (a, b) = net.pair(Kind::Ours, Kind::Ours);
    net.ping("a", "10.99.0.2", 5, 0);
    net.ping("b", "fd99::1", 5, 0);
    let shown = run("wg", &["show", &a.name]);
    for part in
        ["latest handshake: ", "transfer: ", "endpoint: 192.0.2.2:", "preshared key: (hidden)", "fd99::2/128"]
    {
        assert!(shown.contains(part), "no `{part}` in: {shown}");
    }
    let counters: Vec<u64> = run("wg", &["show", &a.name, "transfer"])
        .split_whitespace()
        .skip(1)
        .map(|n| n.parse().unwrap())
        .collect();
    assert!(counters.iter().all(|bytes| *bytes > 1000), "{counters:?}");
    let link = net.ip("a", &["link", "show", &a.name]);
    assert!(link.contains("mtu 1420") && link.contains("qlen 4096"), "{link}");

    // Volume, and packets as large as the link takes them.
    assert!(net.megabits("a", "10.99.0.2") > 20.0);
    net.ping_with("a", &["-M", "do", "-s", "1392", "-c", "3", "-i", "0.05"], "10.99.0.2", 3, 0);

    // A mark on what is sent.
    run("wg", &["set", &a.name, "fwmark", "0x1234"]);
    assert_eq!(run("wg", &["show", &a.name, "fwmark"]).trim(), "0x1234");
    let sockets = net.exec("a", &["ss", "-uane"]);
    assert!(sockets.lines().filter(|l| l.contains("fwmark:0x1234")).count() == 2, "{sockets}");

    // The underlay changes its family, then A its address: B follows.
    run("wg", &["set", &a.name, "peer", &b.public, "endpoint", &format!("[2001:db8::2]:{}", b.port)]);
    net.ping("a", "10.99.0.2", 3, 0);
    assert!(run("wg", &["show", &b.name, "endpoints"]).contains("[2001:db8::1]:"));
    net.ip("a", &["addr", "add", "2001:db8::7/64", "dev", &net.veth("a"), "nodad"]);
    net.ip("a", &["addr", "del", "2001:db8::1/64", "dev", &net.veth("a")]);
    net.ping("a", "fd99::2", 5, 0);
    assert!(run("wg", &["show", &b.name, "endpoints"]).contains("[2001:db8::7]:"));

    // Another port, in use or free.
    let other = net.device("a", Kind::Ours);
    let taken = output("wg", &["set", &a.name, "listen-port", &other.port.to_string()]);
    assert!(!taken.status.success() && text(&taken.stderr).contains("in use"), "{}", text(&taken.stderr));
    assert_eq!(run("wg", &["show", &a.name, "listen-port"]).trim(), a.port.to_string());
    run("wg", &["set", &a.name, "listen-port", "0"]);
    let port: u16 = run("wg", &["show", &a.name, "listen-port"]).trim().parse().unwrap();
    assert!(port != 0 && port != a.port);
    net.ping("a", "10.99.0.2", 3, 0);
    net.ping("b", "10.99.0.1", 3, 0);
}

#[test]
fn configurations_are_synchronised_without_disturbing_the_tunnel() {
    let net = Net::new();
    let (a, b) = net.pair(Kind::Ours, Kind::Ours);
    net.ping("a", "10.99.0.2", 3, 0);
    let handshake = run("wg", &["show", &a.name, "latest-handshakes"]);
    let file = net.dir.path().join("sync.conf");
    let shown = run("wg", &["showconf", &a.name]);
    fs::write(
        &file,
        format!("{shown}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.98.0.0/16\n", public(&genkey())),
    )
    .unwrap();
    let flow = net.start_ping("a", "10.99.0.2", 100);
    run("wg", &["syncconf", &a.name, file.to_str().unwrap()]);
    assert_eq!(run("wg", &["show", &a.name, "peers"]).lines().count(), 2);
    fs::write(&file, &shown).unwrap();
    run("wg", &["syncconf", &a.name, file.to_str().unwrap()]);
    assert_eq!(run("wg", &["show", &a.name, "peers"]).trim(), b.public);
    assert_eq!(flow.lost(), 0);
    assert_eq!(run("wg", &["show", &a.name, "latest-handshakes"]), handshake);
    assert_eq!(run("wg", &["showconf", &a.name]), shown);
    // The same by setconf, which begins anew.
    run("wg", &["setconf", &a.name, file.to_str().unwrap()]);
    net.ping("a", "10.99.0.2", 3, 0);

    // A bad request changes nothing, whatever came before the fault in it.
    let state = || uapi(&a.name, "get=1\n\n");
    let before = state();
    for bad in [
        "set=1\nreplace_peers=true\nfwmark=x\n\n",
        "set=1\nlisten_port=1\npublic_key=00\n\n",
        "set=1\nprivate_key=00\n\n",
        "set=2\n\n",
        "nonsense\n\n",
    ] {
        let answer = uapi(&a.name, bad);
        assert!(answer.starts_with("errno=-") && !answer.starts_with("errno=0"), "{answer}");
    }
    // Clients that say nothing, or half, hold nobody up.
    let mute: Vec<_> = (0..20).map(|_| UnixStream::connect(socket(&a.name)).unwrap()).collect();
    for stream in &mute {
        { stream }.write_all(b"set=1\nreplace_peers=true\n").unwrap();
    }
    assert_eq!(counters_cut(&state()), counters_cut(&before));
    drop(mute);
    assert_eq!(counters_cut(&state()), counters_cut(&before));
    net.ping("a", "10.99.0.2", 3, 0);
}

#[test]
fn each_offload_can_be_missing() {
    // At one end, at the other, at both; the last as an old kernel has it.
    let ways = ["", "uso", "tso,uso", "join", "segment", "gro", "vnet", "vnet,segment,gro"];
    for (i, without) in ways.into_iter().enumerate() {
        let net = Net::new();
        let at = |end: usize| if i % 3 == end { "" } else { without };
        let ends = (net.device_without("a", Kind::Ours, at(1)), net.device_without("b", Kind::Ours, at(2)));
        let (a, b) = net.join(ends.0, ends.1);
        net.ping("a", "10.99.0.2", 3, 0);
        for (end, to) in [(&a, "10.99.0.2"), (&b, "fd99::1")] {
            assert!(net.megabits(end.place, to) > 20.0, "without `{without}`\n{}", net.logs());
        }
        net.ping_with("a", &["-M", "do", "-s", "1392", "-c", "3", "-i", "0.05"], "10.99.0.2", 3, 0);
        net.udp("a", "10.99.0.2");
        net.udp("b", "fd99::1");
        // Whether they are in use shows in the lengths of what passes.
        for (end, without) in [(&a, at(1)), (&b, at(2))] {
            let not = |name: &str| without.split(',').any(|word| word == name);
            let (from_host, to_host) = (net.mean("a", &a.name, "TX:"), net.mean(end.place, &end.name, "RX:"));
            if end.place == "a" {
                assert_eq!(from_host > 1500, !not("tso") && !not("vnet"), "without `{without}`: {from_host}");
            }
            assert_eq!(to_host > 1500, !not("join") && !not("vnet"), "without `{without}`: {to_host}");
            let wire = net.mean(end.place, &net.veth(end.place), "TX:");
            assert_eq!(wire > 1600, !not("segment"), "without `{without}`: {wire}");
        }
    }
}

#[test]
fn another_worker_goes_on_with_the_offloads() {
    let net = Net::new();
    let (a, b) = net.pair(Kind::Ours, Kind::Ours);
    net.ping("a", "10.99.0.2", 3, 0);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        for end in [&a, &b] {
            let worker = wait_for("a worker", || worker_of(end));
            kill(Pid::from_raw(worker), signal).unwrap();
            wait_for("another worker", || worker_of(end).filter(|pid| *pid != worker));
        }
        net.ping_with("a", &["-c", "20", "-i", "0.01"], "10.99.0.2", 20, 19);
        let before = net.mean("b", &b.name, "RX:");
        assert!(net.megabits("a", "10.99.0.2") > 20.0);
        let after = net.mean("b", &b.name, "RX:");
        assert!(after > 1500, "{before}, {after}");
    }
}

#[test]
fn a_killed_worker_costs_almost_nothing() {
    let net = Net::new();
    let (a, b) = net.pair(Kind::Ours, Kind::Ours);
    net.ping("a", "10.99.0.2", 3, 0);
    let port = run("wg", &["show", &a.name, "listen-port"]);
    let flow = net.start_ping("a", "10.99.0.2", 500);
    for (end, signal) in
        [(&a, Signal::SIGKILL), (&b, Signal::SIGKILL), (&a, Signal::SIGKILL), (&b, Signal::SIGTERM)]
    {
        let worker = wait_for("a worker", || worker_of(end));
        kill(Pid::from_raw(worker), signal).unwrap();
        let new = wait_for("another worker", || worker_of(end).filter(|pid| *pid != worker));
        assert_ne!(new, worker);
        // Answered by the new one: it has the whole configuration.
        assert!(run("wg", &["show", &end.name]).contains("latest handshake"));
        std::thread::sleep(Duration::from_millis(500));
    }
    let lost = flow.lost();
    // At 100 packets a second: 150 ms for each of four deaths.
    assert!(lost <= 60, "{lost} of 500 lost");
    println!("four deaths: {lost} of 500 packets lost");
    assert_eq!(run("wg", &["show", &a.name, "listen-port"]), port);
    // What configures after a death is kept over the next.
    run("wg", &["set", &a.name, "peer", &b.public, "persistent-keepalive", "25"]);
    kill(Pid::from_raw(wait_for("a worker", || worker_of(&a))), Signal::SIGKILL).unwrap();
    net.ping("a", "fd99::2", 20, 15);
    assert!(run("wg", &["show", &a.name]).contains("every 25 seconds"));
}

#[test]
fn a_flood_of_initiations_disturbs_neither_a_flow_nor_a_rekey() {
    for sources in [1, 1000] {
        let net = Net::new();
        let (a, b) = net.pair(Kind::Ours, Kind::Ours);
        net.ping("a", "10.99.0.2", 3, 0);
        let flood = Flood::start(&net, &b, sources);
        let ping = ["-q", "-i", "0.002", "-W", "2", "-c", "2000", "10.99.0.2"];
        let sent = flood.sent.load(Ordering::Relaxed);
        let report = text(&net.command("a", "ping").args(ping).output().unwrap().stdout);
        let flooded = flood.sent.load(Ordering::Relaxed) - sent;
        let lost = 2000 - received(&report);
        println!("{flooded} initiations from {sources} sources: {lost} of 2000 packets lost");
        assert!(flooded > 20_000, "{flooded}");
        // One in a thousand.
        assert!(lost <= 2, "{lost} lost\n{}", net.logs());
        // A has no keys any more: a genuine handshake, from a peer's address.
        let worker = wait_for("a worker", || worker_of(&a));
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        let began = Instant::now();
        wait_for("a genuine handshake", || {
            let output = net.command("a", "ping").args(["-q", "-c", "1", "-W", "1", "10.99.0.2"]).output();
            (received(&text(&output.unwrap().stdout)) == 1).then_some(())
        });
        println!("a handshake under the flood: {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    }
}

#[test]
fn a_thousand_peers_cost_16_kib_each_at_most() {
    let net = Net::new();
    let (a, _b) = net.pair(Kind::Ours, Kind::Ours);
    net.ping("a", "10.99.0.2", 3, 0);
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{}/status", worker_of(&a)?)).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?.to_owned();
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let before = wait_for("a worker", resident);
    let mut request = String::from("set=1\n");
    for i in 1..=1000u32 {
        request += &format!("public_key={i:064x}\nendpoint=192.0.2.9:{i}\n");
        request += &format!("allowed_ip=10.{}.{}.0/24\n", 100 + i / 256, i % 256);
    }
    assert!(uapi(&a.name, &(request + "\n")).starts_with("errno=0"));
    assert_eq!(run("wg", &["show", &a.name, "peers"]).lines().count(), 1001);
    net.ping("a", "10.99.0.2", 20, 0);
    let after = wait_for("a worker", resident);
    println!("a thousand peers: {before} KiB, then {after} KiB");
    assert!(after - before <= 16 * 1000, "{before} KiB, then {after} KiB");
}

#[test]
fn a_device_ends_with_its_interface_its_socket_or_a_signal() {
    let net = Net::new();
    let mut ends: Vec<End> = (0..3).map(|_| net.device("a", Kind::Ours)).collect();
    net.ip("a", &["link", "del", &ends[0].name]);
    fs::remove_file(socket(&ends[1].name)).unwrap();
    kill(Pid::from_raw(ends[2].pid()), Signal::SIGTERM).unwrap();
    for end in &mut ends {
        let status = wait_for("the device's end", || end.process.try_wait().unwrap());
        assert!(status.success(), "{}: {status}", end.name);
        assert!(!socket(&end.name).exists(), "{}", end.name);
        assert!(!net.has_link("a", &end.name), "{}", end.name);
    }
    // Nor does a worker live on without its supervisor.
    let mut end = net.device("a", Kind::Ours);
    end.process.kill().unwrap();
    end.process.wait().unwrap();
    wait_for("the interface and the socket to go", || {
        (!net.has_link("a", &end.name) && !socket(&end.name).exists()).then_some(())
    });
}

#[test]
fn wireguard_go_understands_us_whoever_calls() {
    for (caller, called) in [(Kind::Ours, Kind::Go), (Kind::Go, Kind::Ours)] {
        let net = Net::new();
        let (a, b) = net.pair(caller, called);
        net.ping("a", "10.99.0.2", 5, 0);
        net.ping("b", "fd99::1", 5, 0);
        assert!(net.megabits("a", "10.99.0.2") > 20.0);
        assert!(net.megabits("b", "10.99.0.1") > 20.0);
        if called == Kind::Ours {
            // The other side has a session with a process that is no more.
            kill(Pid::from_raw(wait_for("a worker", || worker_of(&b))), Signal::SIGKILL).unwrap();
            net.ping("a", "10.99.0.2", 50, 15);
        }
        assert!(run("wg", &["show", &a.name]).contains("latest handshake"));
    }
}

#[test]
fn wg_quick_brings_it_up_and_down() {
    let net = Net::new();
    let peer = net.device("b", Kind::Ours);
    let name = fresh("q");
    let key = genkey();
    let file = net.dir.path().join(format!("{name}.conf"));
    let config = format!(
        "[Interface]\nPrivateKey = {key}\nAddress = 10.99.0.1/24, fd99::1/64\nListenPort = 51820\n\n\
         [Peer]\nPublicKey = {}\nEndpoint = 192.0.2.2:{}\nAllowedIPs = 10.99.0.2/32, fd99::2/128, 10.77.0.0/16\n",
        peer.public, peer.port
    );
    fs::write(&file, config).unwrap();
    net.configure(&peer, "10.99.0.2", "fd99::2", &public(&key), None, "10.99.0.1/32,fd99::1/128");
    let quick = |verb: &str| {
        let output = net
            .command("a", "wg-quick")
            .args([verb, file.to_str().unwrap()])
            .env("WG_QUICK_USERSPACE_IMPLEMENTATION", binary())
            .env("TOMBOLO_WIREGUARD_STATE_DIR", net.dir.path().join("stamps"))
            .output()
            .unwrap();
        assert!(output.status.success(), "wg-quick {verb}: {}", text(&output.stderr));
        text(&output.stderr)
    };
    let said = quick("up");
    if Path::new("/sys/module/wireguard").exists() {
        println!(
            "this kernel has WireGuard, and wg-quick took that: only a kernel without shows ours\n{said}"
        );
    } else {
        assert!(said.contains(binary().to_str().unwrap()), "{said}");
        assert!(socket(&name).exists());
    }
    net.ping("a", "10.99.0.2", 3, 0);
    assert!(net.ip("a", &["route", "get", "10.77.1.1"]).contains(&name));
    quick("down");
    assert!(!net.has_link("a", &name));
    wait_for("the socket to go", || (!socket(&name).exists()).then_some(()));
}

#[test]
fn serve_keeps_a_device_for_each_file_and_outlives_itself() {
    let net = Net::new();
    let dir = net.dir.path().join("devices");
    let (first, second) = (fresh("s"), fresh("s"));
    let serve = |log: &str| {
        let log = fs::File::create(net.dir.path().join(log)).unwrap();
        Guard(
            net.command("a", binary().to_str().unwrap())
                .args(["serve", "--dir", dir.to_str().unwrap()])
                .stderr(log)
                .spawn()
                .unwrap(),
        )
    };
    let there = |name: &str| (net.has_link("a", name) && socket(name).exists()).then_some(());
    let gone = |name: &str| (!net.has_link("a", name) && !socket(name).exists()).then_some(());
    let mut server = serve("1.log");
    wait_for("the directory", || dir.exists().then_some(()));
    fs::write(dir.join(&first), "").unwrap();
    fs::write(dir.join(&second), "").unwrap();
    fs::write(dir.join("no name!"), "").unwrap();
    wait_for("two devices", || there(&first).and(there(&second)));
    run("wg", &["set", &first, "listen-port", "51999"]);

    // Killed, it takes nothing along; started again, it makes nothing anew, and ends what has gone meanwhile.
    wait_for("both to be remembered", || dir.join(".kept").join(&second).exists().then_some(()));
    server.0.kill().unwrap();
    server.0.wait().unwrap();
    fs::remove_file(dir.join(&second)).unwrap();
    assert!(there(&first).is_some() && there(&second).is_some());
    let mut server = serve("2.log");
    wait_for("the second to end", || gone(&second));
    assert_eq!(run("wg", &["show", &first, "listen-port"]).trim(), "51999");

    // A device that dies whole comes back, unconfigured.
    fs::remove_file(socket(&first)).unwrap();
    wait_for("the first to be made again", || {
        there(&first)?;
        let shown = output("wg", &["show", &first, "listen-port"]);
        (shown.status.success() && text(&shown.stdout).trim() == "0").then_some(())
    });
    fs::remove_file(dir.join(&first)).unwrap();
    wait_for("the first to end", || gone(&first));
    kill(Pid::from_raw(server.0.id() as i32), Signal::SIGTERM).unwrap();
    assert!(wait_for("serve to end", || server.0.try_wait().unwrap()).success());
}

#[test]
fn what_cannot_be_is_said_in_one_line() {
    let net = Net::new();
    let end = net.device("a", Kind::Ours);
    let said = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(!output.status.success());
        let said = text(&output.stderr);
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    };
    let program = binary();
    let program = program.to_str().unwrap();
    assert!(said(net.command("a", program).arg(&end.name)).contains("ip link del"));
    // The same name in another network namespace would take the same socket.
    assert!(said(net.command("b", program).arg(&end.name)).contains("another network namespace"));
    assert!(!net.has_link("b", &end.name));
    net.ip("a", &["link", "show", &end.name]);
    let name = fresh("x");
    let copy = net.dir.path().join("program");
    fs::copy(program, &copy).unwrap();
    let copy = copy.to_str().unwrap();
    fs::set_permissions(net.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let nobody = said(Command::new(copy).arg(&name).uid(65534).gid(65534));
    assert!(nobody.contains("run as root"), "{nobody}");
    let bare = said(net.command("a", "setpriv").args([
        "--bounding-set=-net_admin",
        "--inh-caps=-net_admin",
        copy,
        &name,
    ]));
    assert!(bare.contains("CAP_NET_ADMIN"), "{bare}");
    let worker = said(Command::new(copy).args(["worker", &name]));
    assert!(worker.contains("started by its supervisor"), "{worker}");
    let odd = Command::new(copy).arg("no/name").output().unwrap();
    assert_eq!(odd.status.code(), Some(2));
}

// What the tests stand on.

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Ours,
    Go,
}

/// Two namespaces, `a` and `b`, and a wire.
struct Net {
    id: String,
    dir: tempfile::TempDir,
}

/// A device in a namespace.
struct End {
    name: String,
    place: &'static str,
    port: u16,
    public: String,
    process: Child,
}

impl End {
    fn pid(&self) -> i32 {
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

struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Net {
    fn new() -> Self {
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

    fn space(&self, place: &str) -> String {
        format!("{}-{place}", self.id)
    }

    fn veth(&self, place: &str) -> String {
        format!("{}v{place}", self.id)
    }

    fn command(&self, place: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(place), program]);
        command.stdin(Stdio::null());
        command
    }

    fn exec(&self, place: &str, line: &[&str]) -> String {
        let output = self.command(place, line[0]).args(&line[1..]).output().unwrap();
        assert!(
            output.status.success(),
            "{line:?} in {place}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    fn ip(&self, place: &str, line: &[&str]) -> String {
        let space = self.space(place);
        run("ip", &[&["-n", &space], line].concat())
    }

    fn has_link(&self, place: &str, name: &str) -> bool {
        output("ip", &["-n", &self.space(place), "link", "show", name]).status.success()
    }

    /// A device that is up to be configured.
    fn device(&self, place: &'static str, kind: Kind) -> End {
        self.device_without(place, kind, "")
    }

    /// The same, without some of the kernel's offloads.
    fn device_without(&self, place: &'static str, kind: Kind, offloads: &str) -> End {
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

    fn configure(&self, end: &End, v4: &str, v6: &str, peer: &str, endpoint: Option<&str>, allowed: &str) {
        let mut line = vec!["set", &end.name, "peer", peer, "allowed-ips", allowed];
        line.extend(endpoint.iter().flat_map(|e| ["endpoint", e]));
        run("wg", &line);
        self.ip(end.place, &["addr", "add", &format!("{v4}/24"), "dev", &end.name]);
        self.ip(end.place, &["addr", "add", &format!("{v6}/64"), "dev", &end.name, "nodad"]);
        self.ip(end.place, &["link", "set", &end.name, "up"]);
    }

    /// Two devices that know each other; only the first knows where the other is.
    fn pair(&self, a: Kind, b: Kind) -> (End, End) {
        self.join(self.device("a", a), self.device("b", b))
    }

    fn join(&self, a: End, b: End) -> (End, End) {
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

    fn ping(&self, place: &str, to: &str, count: u32, may_lose: u32) {
        self.ping_with(place, &["-c", &count.to_string(), "-i", "0.01"], to, count, may_lose);
    }

    fn ping_with(&self, place: &str, options: &[&str], to: &str, count: u32, may_lose: u32) {
        let output = self.command(place, "ping").args(options).args(["-q", "-W", "2", to]).output().unwrap();
        let lost = count - received(&text(&output.stdout));
        assert!(lost <= may_lose, "{lost} of {count} lost from {place} to {to}\n{}", self.logs());
    }

    fn start_ping(&self, place: &str, to: &str, count: u32) -> Flow {
        let count_text = count.to_string();
        let mut command = self.command(place, "ping");
        command.args(["-q", "-i", "0.01", "-W", "1", "-c", &count_text, to]).stdout(Stdio::piped());
        Flow { ping: command.spawn().unwrap(), count }
    }

    /// Sends UDP packets, slowly enough that nearly all must arrive.
    fn udp(&self, place: &str, to: &str) {
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

    fn megabits(&self, place: &str, to: &str) -> f64 {
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

    /// The mean length of packets that an interface sent, or received.
    fn mean(&self, place: &str, link: &str, direction: &str) -> u64 {
        let shown = self.ip(place, &["-s", "link", "show", link]);
        let mut lines = shown.lines().skip_while(|line| !line.trim().starts_with(direction)).skip(1);
        let mut numbers = lines.next().unwrap().split_whitespace().map(|n| n.parse::<u64>().unwrap());
        let (bytes, packets) = (numbers.next().unwrap(), numbers.next().unwrap());
        bytes / packets.max(1)
    }

    fn logs(&self) -> String {
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
struct Flood {
    sent: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    /// From `a` to the device of `b`, at most 50 in a millisecond, from so many addresses.
    fn start(net: &Net, victim: &End, sources: usize) -> Self {
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

struct Flow {
    ping: Child,
    count: u32,
}

impl Flow {
    fn lost(mut self) -> u32 {
        let mut report = String::new();
        self.ping.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        self.ping.wait().unwrap();
        self.count - received(&report)
    }
}

fn received(report: &str) -> u32 {
    let words: Vec<_> = report.split_whitespace().collect();
    let at =
        words.iter().position(|w| w.starts_with("received")).unwrap_or_else(|| panic!("ping said: {report}"));
    words[at - 1].parse().unwrap()
}

/// The child of a device's supervisor.
fn worker_of(end: &End) -> Option<i32> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let (state, parent) = (fields.next()?, fields.next()?);
        (state != "Z" && parent == end.pid().to_string()).then_some(pid)
    })
}

fn uapi(name: &str, request: &str) -> String {
    let mut stream = UnixStream::connect(socket(name)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A state without what changes by itself.
fn counters_cut(state: &str) -> Vec<&str> {
    state.lines().filter(|l| !l.contains("_bytes=") && !l.contains("handshake")).collect()
}

fn socket(name: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{name}.sock"))
}

fn genkey() -> String {
    run("wg", &["genkey"]).trim().to_owned()
}

fn public(key: &str) -> String {
    let mut child =
        Command::new("wg").arg("pubkey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(key.as_bytes()).unwrap();
    text(&child.wait_with_output().unwrap().stdout).trim().to_owned()
}

/// A name that nobody else uses on this machine.
fn fresh(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::SeqCst);
    format!("hwg{kind}{:x}-{n}", std::process::id() & 0xffff)
}

fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(output.status.success(), "{program} {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited 10 s for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn binary() -> PathBuf {
    let program = std::env::var_os("TOMBOLO_WIREGUARD").map(PathBuf::from).unwrap_or_else(|| {
        let test = std::env::current_exe().unwrap();
        test.parent().and_then(Path::parent).unwrap().join("tombolo-wireguard")
    });
    assert!(program.exists(), "{} is missing: run `cargo build -p tombolo-wireguard`", program.display());
    program
}

/// A release with UDP segmentation offload, built once.
fn wireguard_go() -> PathBuf {
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
fn require() {
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
