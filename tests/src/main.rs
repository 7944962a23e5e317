//! `tombolo-lab`: the lab's command.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use tombolo_lab::control::{self, Action, Request, Status};
use tombolo_lab::fault::Fault;
use tombolo_lab::fetch::{Family, fetch};
use tombolo_lab::hello::hello;
use tombolo_lab::kubernetes::{self, conformance};
use tombolo_lab::probe::{PROBE_LEN, Pace, Question, Report, Stop, dns, ping, tcp, udp};
use tombolo_lab::sandbox::{self, Sandbox};
use tombolo_lab::serve::serve;
use tombolo_lab::topology::{self, DEMO, KUBERNETES, TWO};
use tombolo_lab::{Lab, Topology, bench, demo, measure, program, scorecard};

/// Clusters, nodes and pods as namespaces of this machine, with the real programs inside.
#[derive(Parser)]
#[command(name = "tombolo-lab", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell the whole story, step by step, on the real programs
    Demo,
    /// Measure a promise in a lab of its own, and print the figures
    #[command(subcommand)]
    Measure(Measure),
    /// Compare what is carried with what others carry, and print medians and ratios
    #[command(subcommand)]
    Bench(Bench),
    /// Run the tests that measure promises and print their figures beside the budgets
    ///
    /// Every promise is one entry of tests/budgets.yaml. Each event runs in a lab of its own, under traffic, as often as
    /// asked; one line each tells median, worst, budget and verdict. CONTROL MS is the longest gap of a flow that crosses
    /// no tunnel at the same time: what the machine itself cost. Exits 1 if a promise was not kept. Use a machine that
    /// does nothing else, and optimised programs: cargo run --release -p tombolo-lab -- scorecard
    Scorecard {
        /// Runs of each event (a test that takes minutes may have fewer).
        #[arg(long, default_value_t = 50)]
        runs: u32,
        /// Only these events, or files of tests.
        #[arg(long, value_delimiter = ',', value_name = "EVENT")]
        only: Vec<String>,
        /// The short forms of tests, as at a landing (30 s in place of 5 min, ...).
        #[arg(long)]
        short: bool,
        /// Set aside, and take again, what was measured while the machine was starved (CONTROL MS says so).
        #[arg(long)]
        calm: bool,
        /// List events and budgets; run nothing.
        #[arg(long)]
        list: bool,
        /// Write all figures to this file too, as JSON, after each test; what the tests said to FILE with the ending log.
        #[arg(long, value_name = "FILE")]
        keep: Option<std::path::PathBuf>,
        /// As a table or as JSON.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Run the upstream conformance suite of the Multi-Cluster Services API on real control planes
    ///
    /// Prints a line for each test of the suite, exits 1 if one failed. Needs what .ci/kube builds, and busybox.
    Conformance {
        /// How many clusters, one or two.
        #[arg(long, default_value_t = 2)]
        clusters: u8,
        /// How kube-proxy balances.
        #[arg(long, value_enum, default_value_t)]
        proxy: Proxy,
        /// Write the suite's own report, HTML, to this file.
        #[arg(long, value_name = "FILE")]
        report: Option<std::path::PathBuf>,
    },
    /// Build a lab and keep it until ^C or `down`
    Up {
        /// A topology file, or the name of a built-in topology: two, demo, kubernetes.
        #[arg(default_value = "demo")]
        topology: String,
        /// The lab's name, if not the topology's.
        #[arg(long)]
        name: Option<String>,
        /// Only namespaces and pods: start no Tombolo program.
        #[arg(long)]
        bare: bool,
    },
    /// Run a command in a node, pod or broker of a running lab
    Exec {
        /// Where; `wire` is the place between the clusters.
        place: String,
        #[command(flatten)]
        lab: Named,
        /// What.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Run kubectl as the administrator of a cluster of `api: kubernetes` in a running lab
    Kubectl {
        /// The cluster.
        cluster: String,
        #[command(flatten)]
        lab: Named,
        /// What kubectl is to do.
        #[arg(last = true, required = true)]
        words: Vec<String>,
    },
    /// Tell what there is in a running lab
    Status {
        #[command(flatten)]
        lab: Named,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Break something in a running lab, and heal it
    ///
    /// Programs are killed, stopped, continued and started by name (`fault stop eu-gw1 agent`); the network is cut, made
    /// lossy, narrow, slow or late between two of node, broker or cluster (`fault loss eu-west us-east 5`); disks are
    /// filled. Faults add up until `heal`. `fault list` tells what is in force.
    Fault {
        #[command(flatten)]
        lab: Named,
        #[command(subcommand)]
        fault: FaultCommand,
    },
    /// End a running lab
    Down {
        #[command(flatten)]
        lab: Named,
    },
    /// Serve HTTP and echo, as a pod does
    Serve {
        /// What to call oneself.
        #[arg(long, default_value = "pod")]
        name: String,
        /// HTTP port.
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
    /// Tell whoever connects which address it reached, as the conformance suite's pods do
    Hello {
        /// Port, TCP and UDP.
        #[arg(long, default_value_t = 42)]
        port: u16,
    },
    /// Fetch http://HOST:PORT/PATH, or ask udp://HOST:PORT which address it sees
    Fetch {
        /// The URL.
        url: String,
        /// Only IPv4.
        #[arg(short = '4', conflicts_with = "v6")]
        v4: bool,
        /// Only IPv6.
        #[arg(short = '6')]
        v6: bool,
        /// Seconds for each step.
        #[arg(long, default_value_t = 5.0)]
        timeout: f64,
        /// Print status, peer and time too, as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Send one ICMP echo
    Ping {
        /// To whom.
        to: std::net::IpAddr,
        /// Seconds to wait.
        #[arg(long, default_value_t = 2.0)]
        timeout: f64,
    },
    /// Send a steady flow and report, as JSON, what became of it; ends with the standard input
    #[command(subcommand)]
    Probe(Probe),
}

#[derive(Subcommand)]
enum Measure {
    /// From a manifest written (or removed) to the name answering (or gone) in a pod of the other cluster
    Propagation {
        /// How often.
        #[arg(long, default_value_t = 100)]
        rounds: u32,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// Tunnels between two namespaces: our device, wireguard-go, VXLAN and no tunnel, in turns
    ///
    /// Both ends and all that sends and receives share this machine: only the ratios to another way of the same run mean
    /// anything. Use a machine that does nothing else, and optimised programs:
    /// cargo run --release -p tombolo-lab -- bench tunnels
    Tunnels {
        /// How often each has its turn.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Seconds of each TCP flow.
        #[arg(long, default_value_t = 3)]
        seconds: u32,
        /// One processor for each end.
        #[arg(long)]
        pin: bool,
        /// No segmentation offload on the wire between them.
        #[arg(long)]
        nic: bool,
        /// MTU of that wire; the tunnels' is 80 less.
        #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u16).range(1400..=9000))]
        mtu: u16,
        /// Only these: ours, ours-1000-peers, wireguard-go, vxlan, plain.
        #[arg(long, value_delimiter = ',', value_name = "WAY")]
        ways: Vec<bench::Way>,
        /// Only these: ping, tcp1, tcp4, tcp1-v6, small64, udp, loaded.
        #[arg(long, value_delimiter = ',', value_name = "TEST")]
        tests: Vec<bench::Test>,
        /// As a table or as JSON.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
}

/// How figures are printed.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

/// As kube-proxy's `mode`.
#[derive(Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Proxy {
    #[default]
    Nftables,
    Iptables,
}

/// Which running lab.
#[derive(Args)]
struct Named {
    /// The lab's name; not needed if only one runs.
    #[arg(long = "lab", value_name = "NAME")]
    name: Option<String>,
}

#[derive(Subcommand)]
enum FaultCommand {
    /// SIGKILL a program of a place
    ///
    /// A node has agent and wireguard, a broker's place broker, a pod serve. See `start`.
    Kill { place: String, program: String },
    /// SIGKILL the first child of a program: the agent proper, which its holder restarts
    KillChild { place: String, program: String },
    /// SIGKILL a program and all that it started, a node's devices too
    KillAll { place: String, program: String },
    /// SIGTERM a program
    Term { place: String, program: String },
    /// SIGSTOP a program and all that it started: it hangs, and keeps its sockets and locks
    Stop { place: String, program: String },
    /// SIGCONT what `stop` stopped
    Cont { place: String, program: String },
    /// Start a program again that was killed
    Start { place: String, program: String },
    /// Nothing passes between two nodes, brokers or clusters
    ///
    /// A cluster stands for all its nodes. Between nodes of one cluster it works too.
    Cut { a: String, b: String },
    /// Nothing passes from one to the other; the way back is open
    CutOneway { from: String, to: String },
    /// So many of a hundred packets are lost at random, each way
    Loss { a: String, b: String, percent: u8 },
    /// Exactly every Nth packet of each direction and family is lost
    EveryNth { a: String, b: String, n: u32 },
    /// A black hole: IP packets longer than BYTES vanish, and no ICMP says so
    Mtu { a: String, b: String, bytes: u16 },
    /// Each direction and family carries KBIT (1000 bits a second); there is no queue
    ///
    /// More is dropped, but for a second's worth that may pass at once.
    Rate { a: String, b: String, kbit: u32 },
    /// Every packet arrives MS milliseconds later, each way, give or take JITTER
    ///
    /// With a jitter packets overtake each other. Between clusters and brokers only; needs iptables.
    Delay {
        a: String,
        b: String,
        ms: u32,
        #[arg(default_value_t = 0)]
        jitter: u32,
    },
    /// No room is left on the disk of a node or broker (its programs' state) or of a cluster (its API)
    DiskFull { of: String },
    /// List the faults in force, as this command takes them
    List,
    /// End faults of network and disks: all, or the one named as it is listed (`heal cut eu-gw1 us-gw1`)
    ///
    /// Programs that were killed or stopped are `start`ed and `cont`inued.
    Heal {
        /// The fault's words.
        fault: Vec<String>,
    },
}

impl FaultCommand {
    fn request(self) -> Request {
        let program = |place, program, action| Request::Program { place, program, action };
        let fault = match self {
            Self::Kill { place, program: name } => return program(place, name, Action::Kill),
            Self::KillChild { place, program: name } => return program(place, name, Action::KillChild),
            Self::KillAll { place, program: name } => return program(place, name, Action::KillAll),
            Self::Term { place, program: name } => return program(place, name, Action::Term),
            Self::Stop { place, program: name } => return program(place, name, Action::Stop),
            Self::Cont { place, program: name } => return program(place, name, Action::Cont),
            Self::Start { place, program: name } => return program(place, name, Action::Start),
            Self::List => return Request::Status,
            Self::Heal { fault } => {
                return Request::Heal { only: (!fault.is_empty()).then(|| fault.join(" ")) };
            }
            Self::Cut { a, b } => Fault::Cut { a, b },
            Self::CutOneway { from, to } => Fault::CutOneway { from, to },
            Self::Loss { a, b, percent } => Fault::Loss { a, b, percent },
            Self::EveryNth { a, b, n } => Fault::EveryNth { a, b, n },
            Self::Mtu { a, b, bytes } => Fault::Mtu { a, b, bytes },
            Self::Rate { a, b, kbit } => Fault::Rate { a, b, kbit },
            Self::Delay { a, b, ms, jitter } => Fault::Delay { a, b, ms, jitter },
            Self::DiskFull { of } => Fault::DiskFull { of },
        };
        Request::Fault { fault }
    }
}

#[derive(Subcommand)]
enum Probe {
    /// UDP packets to an echo server
    Udp {
        #[command(flatten)]
        flow: Flow,
        /// Bytes of payload in each (28 less than the IPv4 packet, 48 less than the IPv6 one).
        #[arg(long, default_value_t = PROBE_LEN)]
        size: usize,
    },
    /// Records over TCP connections to an echo server
    Tcp {
        #[command(flatten)]
        flow: Flow,
        /// How many connections; each has the whole rate.
        #[arg(long, default_value_t = 1)]
        flows: usize,
    },
    /// DNS questions
    Dns {
        #[command(flatten)]
        flow: Flow,
        /// The name to ask for.
        #[arg(long)]
        name: String,
        /// Its type: 1 A, 28 AAAA, 33 SRV, 16 TXT.
        #[arg(long = "type", default_value_t = 1)]
        kind: u16,
        /// Addresses that may be answered; any other is counted as wrong.
        #[arg(long, value_delimiter = ',')]
        expect: Vec<std::net::IpAddr>,
    },
}

#[derive(Args)]
struct Flow {
    /// Whom to ask.
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// How many a second.
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// For so many seconds; without it, until the standard input ends.
    #[arg(long)]
    seconds: Option<f64>,
}

impl Flow {
    fn pace(&self) -> (Pace, Stop) {
        let stop = Stop::default();
        if self.seconds.is_none() {
            stop.on_end_of_input();
        }
        (Pace { to: self.to, rate: self.rate, length: self.seconds.map(Duration::from_secs_f64) }, stop)
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            print_error(&error);
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stderr)]
fn print_error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

#[allow(clippy::print_stderr)]
fn print_progress(text: &str) {
    eprintln!("{text}");
}

#[allow(clippy::print_stdout)]
fn print(text: &str) {
    println!("{text}");
}

/// A built-in topology by its name, or a file.
fn built_in(name: &str) -> Result<Topology> {
    match name {
        "two" => Topology::parse(TWO),
        "demo" => Topology::parse(DEMO),
        "kubernetes" => Topology::parse(KUBERNETES),
        file => {
            let text = std::fs::read_to_string(file).with_context(|| {
                format!("{file} is neither a built-in topology (two, demo) nor a readable file")
            })?;
            Topology::parse(&text).with_context(|| file.to_owned())
        }
    }
}

/// Outside: runs this command again inside a sandbox, with the lab's socket, and ends as it ends.
fn outside(name: &str, bare: bool) -> Result<ExitCode> {
    Sandbox::check()?;
    if !bare {
        program::ensure_built()?;
    }
    let listener = control::listen(name)?;
    let mut child = Sandbox::spawn(std::env::args_os().skip(1).collect(), Some(listener.into()))?;
    // ^C goes to everybody on the terminal; the lab itself handles it.
    sandbox::catch_interrupts();
    let status = child.wait()?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

fn up(topology: Topology, name: &str, bare: bool) -> Result<()> {
    let socket = Sandbox::passed()?;
    Sandbox::prepare()?;
    sandbox::catch_interrupts();
    let lab = Arc::new(Lab::build(topology)?);
    let down = Arc::new(AtomicBool::new(false));
    control::serve(socket, &lab, name, &down)?;
    if !bare {
        lab.bring_up()?;
    }
    print(&table(&control::status(&lab, name)));
    print("\nThe lab runs until ^C or `tombolo-lab down`. Enter it: tombolo-lab exec NAME -- COMMAND");
    while !down.load(Ordering::Relaxed) && !sandbox::interrupted() {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Three tables: places, programs, faults.
fn table(status: &Status) -> String {
    let mut rows = vec![["NAME", "KIND", "CLUSTER", "NODE", "ADDRESSES"].map(str::to_owned)];
    rows.extend(status.places.iter().map(|p| {
        [p.name.clone(), p.kind.clone(), p.cluster.clone(), p.node.clone(), p.addresses.join(", ")]
    }));
    let mut text = columns(&rows);
    if !status.programs.is_empty() {
        let mut rows = vec![["PLACE", "PROGRAM", "PID", "STATE"].map(str::to_owned)];
        rows.extend(status.programs.iter().map(|p| {
            let state = p.ended.clone().unwrap_or_else(|| "running".to_owned());
            [p.place.clone(), p.program.clone(), p.pid.to_string(), state]
        }));
        text = format!("{text}\n\n{}", columns(&rows));
    }
    for fault in &status.faults {
        text = format!("{text}\nfault: {fault}");
    }
    format!("{text}\n\nlogs: {}", status.logs)
}

fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|r| r[column].len()).max().unwrap_or_default();
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("   ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn exec(lab: &Named, place: &str, command: &[String]) -> Result<ExitCode> {
    let status = control::exec(&control::connect(lab.name.as_deref())?, place, command)?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo => {
            if !Sandbox::inside() {
                return outside(&format!("demo-{}", std::process::id()), false);
            }
            Sandbox::prepare()?;
            sandbox::catch_interrupts();
            demo::demo(Topology::parse(DEMO)?, &mut std::io::stdout())?;
        }
        Command::Measure(Measure::Propagation { rounds, json }) => {
            if !Sandbox::inside() {
                return outside(&format!("measure-{}", std::process::id()), false);
            }
            Sandbox::prepare()?;
            sandbox::catch_interrupts();
            let lab = Lab::build(Topology::parse(TWO)?)?;
            lab.bring_up()?;
            let figures = measure::propagation(&lab, rounds)?;
            print(&if json { serde_json::to_string_pretty(&figures)? } else { figures.to_string() });
        }
        Command::Conformance { clusters, proxy, report } => {
            if !Sandbox::inside() {
                if let Some(why) = kubernetes::missing() {
                    bail!(why);
                }
                return outside(&format!("conformance-{}", std::process::id()), false);
            }
            Sandbox::prepare()?;
            sandbox::catch_interrupts();
            let proxy =
                if proxy == Proxy::Nftables { topology::Proxy::Nftables } else { topology::Proxy::Iptables };
            let lab = Lab::build(conformance::topology(clusters, proxy)?)?;
            lab.bring_up()?;
            let outcome = conformance::run(&lab)?;
            outcome.lines.iter().for_each(|line| print(&line.to_string()));
            let (passed, ran) = outcome.score();
            let broken = outcome.broken().len();
            let open = if passed + broken < ran { ", one is known to be open (docs/lab.md)" } else { "" };
            print(&format!("{passed} of {ran} passed{open}"));
            if let Some(file) = report {
                std::fs::write(&file, &outcome.report).with_context(|| file.display().to_string())?;
            }
            if broken > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Bench(Bench::Tunnels { rounds, seconds, pin, nic, mtu, ways, tests, output }) => {
            if !Sandbox::inside() {
                program::ensure_these(&["tombolo-wireguard"])?;
                return outside(&format!("bench-{}", std::process::id()), true);
            }
            Sandbox::prepare()?;
            let all = |ways: Vec<_>| if ways.is_empty() { bench::Way::all() } else { ways };
            let tests = if tests.is_empty() { bench::Test::all() } else { tests };
            let options = bench::Options { rounds, seconds, pin, nic, mtu, ways: all(ways), tests };
            let figures = bench::tunnels(&options, print_progress)?;
            let json = || serde_json::to_string_pretty(&figures);
            print(&if output == Output::Json { json()? } else { figures.to_string() });
        }
        Command::Scorecard { list: true, output, .. } => {
            let budgets = scorecard::budgets()?;
            let mut rows = vec![["EVENT", "BUDGET", "UNIT", "PROMISE"].map(str::to_owned)];
            rows.extend(
                budgets
                    .iter()
                    .map(|(event, b)| [event.clone(), b.budget.to_string(), b.unit.clone(), b.says.clone()]),
            );
            let json = || serde_json::to_string_pretty(budgets);
            print(&if output == Output::Json { json()? } else { columns(&rows) });
        }
        Command::Scorecard { runs, only, short, calm, keep, output, .. } => {
            Sandbox::check()?;
            let options = scorecard::Options { runs: runs.max(1), only, short, calm, keep };
            let card = scorecard::run(&options, print_progress)?;
            let json = || serde_json::to_string_pretty(&card);
            print(&if output == Output::Json { json()? } else { card.to_string() });
            if !card.pass() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Up { topology: file, name, bare } => {
            let topology = built_in(&file)?;
            let name = name.unwrap_or_else(|| topology.name.clone());
            if !Sandbox::inside() {
                return outside(&name, bare);
            }
            up(topology, &name, bare)?;
        }
        Command::Exec { place, lab, command } => return exec(&lab, &place, &command),
        Command::Kubectl { cluster, lab, words } => {
            return exec(&lab, &format!("api-{cluster}"), &kubernetes::kubectl(&words)?);
        }
        Command::Status { lab, json } => {
            let answer = control::ask(&control::connect(lab.name.as_deref())?, &Request::Status)?;
            let status = answer.status.unwrap_or_default();
            print(&if json { serde_json::to_string_pretty(&status)? } else { table(&status) });
        }
        Command::Fault { lab, fault } => {
            let answer = control::ask(&control::connect(lab.name.as_deref())?, &fault.request())?;
            if let Some(status) = answer.status {
                print(&if status.faults.is_empty() {
                    "no fault is in force".to_owned()
                } else {
                    status.faults.join("\n")
                });
            }
        }
        Command::Down { lab } => {
            control::ask(&control::connect(lab.name.as_deref())?, &Request::Down)?;
        }
        Command::Serve { name, port } => serve(&name, port)?,
        Command::Hello { port } => hello(port)?,
        Command::Fetch { url, v4, v6, timeout, json } => {
            let family = if v4 {
                Family::V4
            } else if v6 {
                Family::V6
            } else {
                Family::Any
            };
            let answer = fetch(&url, family, Duration::from_secs_f64(timeout))?;
            let text = if json { serde_json::to_string(&answer)? } else { answer.body.trim_end().to_owned() };
            print(&text);
            if answer.status != 200 {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Ping { to, timeout } => {
            let echo = ping(to, Duration::from_secs_f64(timeout))?;
            print(&serde_json::to_string(&echo)?);
            if !echo.is_answered() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Probe(probe) => {
            let report = match probe {
                Probe::Udp { flow, size } => {
                    let (pace, stop) = flow.pace();
                    Report::Udp(udp(&pace, size, &stop)?)
                }
                Probe::Tcp { flow, flows } => {
                    let (pace, stop) = flow.pace();
                    Report::Tcp(tcp(&pace, flows, &stop)?)
                }
                Probe::Dns { flow, name, kind, expect } => {
                    let (pace, stop) = flow.pace();
                    Report::Dns(dns(&pace, &Question { name, kind }, &expect, &stop)?)
                }
            };
            print(&serde_json::to_string(&report)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}
