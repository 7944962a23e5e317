//! The holder, and the agent proper that it keeps running.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tombolo_hold::Event;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat, Role};
use crate::{admin, control, hold};

/// Runs the holder or, when started by it, the agent proper.
pub fn run(config: Config) -> Result<ExitCode> {
    log(config.log_format);
    match hold::take_sockets()? {
        Some(sockets) => runtime()?.block_on(agent(config, sockets)),
        None if config.cleanup => runtime()?.block_on(control::cleanup(&config)),
        None => {
            // Found here, a wrong name or address is told once, not by every child.
            config.node_name()?;
            let sockets = hold::sockets(&config.dns)?;
            let code = hold::run_holder(sockets, std::env::args_os().skip(1), told)?;
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
        }
    }
}

fn told(event: Event) {
    match event {
        Event::Started { pid } => info!(pid, "the agent runs"),
        Event::Died { how, restart_in } => {
            warn!(after = ?restart_in, "the agent died ({how}) and is started again; traffic and names go on");
        }
        Event::Failed { error, restart_in } => {
            error!(after = ?restart_in, "the agent could not be started: {error}")
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("no runtime")
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("TOMBOLO_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

/// SIGTERM and SIGINT end the agent and remove nothing: traffic runs on without it.
async fn agent(config: Config, sockets: hold::DnsSockets) -> Result<ExitCode> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed"))?;
    let stop = CancellationToken::new();
    let shown = admin::Shown::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot hear SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot hear SIGINT")?;
    {
        let (address, shown, stop) = (config.admin, shown.clone(), stop.clone());
        tokio::spawn(async move {
            if let Err(error) = admin::serve(address, shown, stop).await {
                // Traffic and names do not hang on the admin pages.
                error!("{error:#}");
            }
        });
    }
    let config = Arc::new(config);
    if !config.role.contains(&Role::Node) {
        warn!("no node role: this agent makes no tunnels and answers no names");
    }
    let work = control::run(config, sockets, shown, stop.clone());
    tokio::pin!(work);
    let outcome = tokio::select! {
        outcome = &mut work => outcome,
        _ = terminate.recv() => { info!("told to end; nothing is removed"); stop.cancel(); work.await }
        _ = interrupt.recv() => { info!("told to end; nothing is removed"); stop.cancel(); work.await }
    };
    outcome.map(|()| ExitCode::SUCCESS)
}
