//! `tombolo-lab`: the lab's command.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use tombolo_lab::fetch::{Family, fetch};
use tombolo_lab::probe::{Pace, Question, Report, Stop, dns, ping, tcp, udp};
use tombolo_lab::serve::serve;

/// Clusters, nodes and pods as namespaces of this machine, with the real programs inside.
#[derive(Parser)]
#[command(name = "tombolo-lab", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP and echo, as a pod does
    Serve {
        /// What to call oneself.
        #[arg(long, default_value = "pod")]
        name: String,
        /// HTTP port.
        #[arg(long, default_value_t = 8080)]
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
enum Probe {
    /// UDP packets to an echo server
    Udp(Flow),
    /// Records over one TCP connection to an echo server
    Tcp(Flow),
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

#[allow(clippy::print_stdout)]
fn print(text: &str) {
    println!("{text}");
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve { name, port } => serve(&name, port)?,
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
                Probe::Udp(flow) => {
                    let (pace, stop) = flow.pace();
                    Report::Udp(udp(&pace, &stop)?)
                }
                Probe::Tcp(flow) => {
                    let (pace, stop) = flow.pace();
                    Report::Tcp(tcp(&pace, &stop)?)
                }
                Probe::Dns { flow, name, kind } => {
                    let (pace, stop) = flow.pace();
                    Report::Dns(dns(&pace, &Question { name, kind }, &stop)?)
                }
            };
            print(&serde_json::to_string(&report)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}
