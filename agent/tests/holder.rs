//! The agent's resolver is killed under load, and every query is answered. Three processes of this one program: the
//! test that asks and kills, the holder, and its child. No test harness: a holder wants the main thread.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tombolo_agent::{dns, hold};
use tombolo_agent_core::zone::Zone;
use tombolo_hold::Event;

const KILLS: usize = 10;
/// Between two queries: 1,000 a second.
const PACE: Duration = Duration::from_millis(1);
/// In which each query has to be answered.
const LIMIT: Duration = Duration::from_secs(1);

/// `dns-version.clusterset.local` TXT, id 0.
const QUERY: &[u8] = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x0bdns-version\x0aclusterset\x05local\0\0\x10\0\x01";

/// Set for the holder and its children.
const ROLE: &str = "TOMBOLO_TEST_HOLDER";

fn main() {
    if std::env::var_os(ROLE).is_none() {
        a_killed_agent_refuses_no_query();
        println!("test a_killed_agent_refuses_no_query ... ok");
        return;
    }
    match hold::take_sockets().unwrap() {
        Some(sockets) => child(sockets),
        None => holder(),
    }
}

/// The agent proper, as far as names go: serves until it is killed, or told to end.
fn child(sockets: hold::DnsSockets) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _runtime = runtime.enter();
    let zone = tokio::sync::watch::Sender::new(Some(Arc::new(Zone::default())));
    let _server = dns::serve(sockets, zone.subscribe(), dns::DnsMetrics::new()).unwrap();
    runtime.block_on(std::future::pending::<()>());
}

/// Says where it listens, and every child's process id.
fn holder() {
    let sockets = hold::sockets(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    println!("listens {}", sockets.tcp[0].local_addr().unwrap());
    let code = hold::run_holder(sockets, ["child"], |event| match event {
        Event::Started { pid } => println!("child {pid}"),
        Event::Died { restart_in, .. } => assert_eq!(restart_in, Duration::ZERO),
        Event::Failed { error, .. } => panic!("{error}"),
    });
    // Told to end.
    assert_eq!(code.unwrap(), 128 + Signal::SIGTERM as i32);
}

fn a_killed_agent_refuses_no_query() {
    let program = std::env::current_exe().unwrap();
    let mut holder = Command::new(program).env(ROLE, "1").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines().map(Result::unwrap);
    let server = lines.find_map(|line| line.strip_prefix("listens ")?.parse().ok()).unwrap();
    let child = Arc::new(AtomicI32::new(0));
    let told = child.clone();
    let reader = std::thread::spawn(move || {
        lines.filter_map(|line| line.strip_prefix("child ")?.parse().ok()).for_each(|pid| {
            told.store(pid, Ordering::SeqCst);
        });
    });
    let outcome = std::panic::catch_unwind(|| ask_and_kill(server, &child));
    kill(Pid::from_raw(holder.id() as i32), Signal::SIGTERM).unwrap();
    assert!(holder.wait().unwrap().success());
    reader.join().unwrap();
    match outcome {
        Ok(slowest) => assert!(slowest < LIMIT, "a query waited for {slowest:?}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// How long the slowest query waited.
fn ask_and_kill(server: SocketAddr, child: &AtomicI32) -> Duration {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(server).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut open: BTreeMap<u16, Instant> = BTreeMap::new();
    let (mut slowest, mut killed, mut buffer) = (Duration::ZERO, 0, [0; 512]);
    let mut next = Instant::now();
    for id in 0..3000u16 {
        let mut query = QUERY.to_vec();
        query[..2].copy_from_slice(&id.to_be_bytes());
        socket.send(&query).expect("no query is refused");
        open.insert(id, Instant::now());
        // Queries, and with them kills, come at all phases of a query's life.
        if id % 250 == 249 && killed < KILLS {
            killed += 1;
            let pid = child.swap(0, Ordering::SeqCst);
            assert!(pid > 0, "the agent is there again after 250 queries");
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        next += PACE;
        while Instant::now() < next || (id == 2999 && !open.is_empty()) {
            match socket.recv(&mut buffer) {
                Ok(length) => {
                    assert_eq!(buffer[3] & 15, 0, "NOERROR");
                    assert!(buffer[..length].windows(5).any(|text| text == b"1.0.0"));
                    let id = u16::from_be_bytes([buffer[0], buffer[1]]);
                    slowest = slowest.max(open.remove(&id).map_or(Duration::ZERO, |at| at.elapsed()));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => panic!("refused: {error}"),
            }
            let oldest = open.values().map(Instant::elapsed).max().unwrap_or_default();
            assert!(oldest < LIMIT, "{} queries wait, one for {oldest:?}", open.len());
        }
    }
    slowest
}
