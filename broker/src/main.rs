//! `tombolo-broker`: a command line around the library.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tombolo_broker::store::Embedded;
use tombolo_broker::{Broker, Config, Hooks, config};
use tombolo_replica::Quota;
use tracing::info;
use tracing_subscriber::EnvFilter;

/// The meeting point of a Tombolo set: takes members' signed statements and passes every change on
///
/// It holds no secret of the set and cannot forge what members say; all it needs is its own key and the set file,
/// both made by `tombolo init`. Members bring back whatever its store loses.
#[derive(Parser)]
#[command(name = "tombolo-broker", version)]
struct Arguments {
    /// Where members come (TLS 1.3, gRPC)
    #[arg(long, env = "TOMBOLO_BROKER_LISTEN", default_value = "[::]:4500")]
    listen: SocketAddr,
    /// Directory of the store
    #[arg(long, env = "TOMBOLO_BROKER_DATA")]
    data: PathBuf,
    /// File with the broker's Ed25519 seed in base64, mode 0600
    #[arg(long, env = "TOMBOLO_BROKER_IDENTITY")]
    identity: PathBuf,
    /// The set file (broker.set)
    #[arg(long, env = "TOMBOLO_BROKER_SET")]
    set: PathBuf,
    /// Health, metrics and debugging over plain HTTP: /healthz, /readyz?verbose, /metrics, /debug/origins
    #[arg(long, env = "TOMBOLO_BROKER_ADMIN")]
    admin: Option<SocketAddr>,
    /// How the log looks; what is in it is set by TOMBOLO_LOG (such as "debug" or "tombolo_broker=debug")
    #[arg(long, env = "TOMBOLO_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log(arguments.log_format);
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("TOMBOLO_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = Config {
        listen: arguments.listen,
        admin: arguments.admin,
        identity: config::read_identity(&arguments.identity)?,
        set: config::read_set(&arguments.set)?,
        quota: Quota::default(),
    };
    let store = Embedded::open(&arguments.data, config.set.roots.set())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let broker = Broker::start(config, Box::new(store), Hooks::default()).await?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("going down: sessions are told to end");
        broker.stop().await;
        Ok(())
    })
}
