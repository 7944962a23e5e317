//! `tombolo-wireguard`: see the library.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tombolo_wireguard::name::DeviceName;
use tombolo_wireguard::worker::End;
use tombolo_wireguard::{daemon, serve, supervisor, worker};
use tracing_subscriber::EnvFilter;

/// What a worker exits with that shall be restarted (EX_TEMPFAIL).
const RESTART: u8 = 75;

const AFTER: &str = "\
TOMBOLO_WIREGUARD_STATE_DIR (/var/lib/tombolo/wireguard) is where it is written down when each key last called a peer,
so that a clock that went back is noticed after a restart. TOMBOLO_LOG sets the log's level.";

/// A userspace WireGuard device.
///
/// `tombolo-wireguard NAME` creates the interface NAME, to be configured by `wg`, and returns;
/// the device ends when the interface or /var/run/wireguard/NAME.sock is removed, or by SIGTERM.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = AFTER)]
struct Cli {
    /// Stay in the foreground, and log to stderr
    #[arg(short, long)]
    foreground: bool,
    /// Tell the state on stdout
    #[arg(long, hide = true, requires = "foreground")]
    detached: bool,
    /// The interface to create
    #[arg(required = true)]
    name: Option<DeviceName>,
    #[command(subcommand)]
    command: Option<Action>,
}

#[derive(Subcommand)]
enum Action {
    /// Keep one device for each file in a directory, by the file's name
    Serve {
        /// The directory
        #[arg(long, default_value = "/run/tombolo/devices")]
        dir: PathBuf,
    },
    /// What a supervisor starts
    #[command(hide = true)]
    Worker {
        /// The device
        name: DeviceName,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = std::env::var("TOMBOLO_LOG").or_else(|_| std::env::var("RUST_LOG"));
    let asked = level.is_ok();
    // boringtun calls an idle peer an error.
    let filter = EnvFilter::builder()
        .parse(level.as_deref().unwrap_or("info"))
        .unwrap_or_else(|_| EnvFilter::new("info"))
        .add_directive("boringtun=off".parse().unwrap_or_default());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();

    match (cli.command, cli.name) {
        (Some(Action::Serve { dir }), _) => finish(serve::run(&dir).map(|()| ExitCode::SUCCESS)),
        (Some(Action::Worker { name }), _) => finish(worker::run(&name).map(|end| match end {
            End::Over => ExitCode::SUCCESS,
            End::Restart => ExitCode::from(RESTART),
        })),
        (None, Some(name)) if cli.detached => {
            daemon::detach();
            let result = supervisor::run(&name, || daemon::tell(Ok(())));
            if let Err(error) = &result {
                daemon::tell(Err(&error.to_string()));
            }
            finish(result.map(code))
        }
        (None, Some(name)) if cli.foreground => finish(supervisor::run(&name, || {}).map(code)),
        (None, Some(name)) => finish(daemon::start(&name, asked).map(|()| ExitCode::SUCCESS)),
        (None, None) => ExitCode::from(2),
    }
}

fn code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

#[expect(clippy::print_stderr, reason = "the one line a person sees")]
fn finish(result: Result<ExitCode, impl std::error::Error>) -> ExitCode {
    result.unwrap_or_else(|error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            // An error that prints its cause does not print it twice.
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        eprintln!("tombolo-wireguard: {text}");
        ExitCode::FAILURE
    })
}
