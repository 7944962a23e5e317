//! The agent's loops: the node's, and the controller's while this agent leads.

pub mod cluster;
mod keep;
pub mod lead;
pub mod node;
pub mod session;
mod tell;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::plan::Planner;
use tombolo_agent_core::world::Health;
use tracing::{error, info};

use crate::admin::Shown;
use crate::api::ClusterApi;
use crate::api::cache::Cache;
use crate::api::directory::Directory;
use crate::api::kubernetes::Kubernetes;
use crate::apply::device::TunnelDriver;
use crate::apply::driver::Drivers;
use crate::apply::key::DeviceKeys;
use crate::apply::{Appliers, Drops, Options};
use crate::config::{Config, Role};
use crate::dns::{self, DnsMetrics};
use crate::hold::DnsSockets;
use crate::observe::liveness::Memory;
use crate::observe::netlink::Monitor;
use crate::observe::{hello, liveness};

/// Runs every role of this agent until `stop`.
pub async fn run(
    config: Arc<Config>,
    sockets: DnsSockets,
    shown: Arc<Shown>,
    stop: CancellationToken,
) -> Result<()> {
    let name = config.node_name()?;
    let api: Arc<dyn ClusterApi> = match config.access() {
        Some(access) => Arc::new(Kubernetes::connect(&access, &config.scope()?).await?),
        None => Arc::new(Directory::open(&config.cluster_dir)?.remembering(&config.state_dir)),
    };
    let mut tasks = tokio::task::JoinSet::new();
    // Dropped at the end: the resolver answers as long as the loops run.
    let mut resolver = None;
    if config.role.contains(&Role::Node) {
        let keys = DeviceKeys::load(&config.state_dir.join("keys"), config.lanes)
            .context("the keys of this node's devices")?;
        let keys = Arc::new(keys);
        let metrics = DnsMetrics::default();
        {
            let mut registry =
                shown.metrics.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            metrics.register(&mut registry);
        }
        let (zone, watch) = watch::channel(None);
        resolver = Some(dns::serve(sockets, watch, metrics).context("the resolver does not start")?);
        let appliers = Appliers::new(options(&config), keys.clone()).context("no netlink socket")?;
        shown.count_drops(Drops::new(&options(&config)));
        let monitor = Monitor::start().await.context("no netlink socket")?;
        let cache = Cache::new(&config.state_dir);
        let memory = Memory::load(&config.state_dir);
        let (roster, rosters) = watch::channel(None);
        let known = memory.answers();
        let (answers, heard) = watch::channel(known.clone());
        let (health, healths) = watch::channel(Health {
            dead: known.dead,
            alive: known.alive,
            narrow: known.narrow,
            ..Health::default()
        });
        let (withheld, missed) = watch::channel(Default::default());
        let (seen, sights) = watch::channel(Default::default());
        {
            // For reading alone: what it writes is not counted.
            let Options { devices, sockets, driver, .. } = options(&config);
            let driver =
                Drivers::open(driver, devices, sockets, Arc::default()).context("no netlink socket")?;
            let driver: Arc<dyn TunnelDriver> = Arc::new(driver);
            let (rosters, driver, stop) = (rosters.clone(), driver.clone(), stop.clone());
            let (rosters2, driver2, stop2) = (rosters.clone(), driver.clone(), stop.clone());
            tasks.spawn(async move {
                liveness::run(rosters, driver, memory, answers, stop).await.context("liveness")
            });
            tasks.spawn(async move {
                hello::run(rosters2, driver2, heard, hello::Heard { health, withheld, seen }, stop2)
                    .await
                    .context("hellos")
            });
        }
        let node = node::Node {
            planner: Planner::default(),
            roster,
            health: healths,
            withheld: missed,
            seen: sights,
            cache: Some(cache),
            name: name.clone(),
            api: api.clone(),
            appliers,
            monitor,
            keys,
            zone,
            untold: true,
            shown: shown.clone(),
        };
        let stop = stop.clone();
        tasks.spawn(async move { node.run(stop).await.context("the node's loop") });
    }
    if config.role.contains(&Role::Controller) {
        let (me, shown, stop) = (name.to_string(), shown.clone(), stop.clone());
        if !config.role.contains(&Role::Node) {
            // Whether it leads or waits is no matter of readiness; a node's is that of its loop.
            shown.check("controller", None);
        }
        tasks.spawn(async move { lead::run(api, me, shown, stop).await.context("the controller's loop") });
    }
    info!(node = %name, "started");
    let mut outcome = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let result = ended.context("a loop panicked").and_then(|result| result);
        if let Err(problem) = result
            && outcome.is_ok()
        {
            error!("{problem:#}; the agent ends, and its holder starts it again");
            stop.cancel();
            outcome = Err(problem);
        }
    }
    drop(resolver);
    outcome
}

fn options(config: &Config) -> Options {
    Options { devices: config.devices_dir.clone(), driver: config.tunnel_driver, ..Options::default() }
}

/// Removes everything of ours from this node but its keys.
pub async fn cleanup(config: &Config) -> Result<ExitCode> {
    let keys = DeviceKeys::load(&config.state_dir.join("keys"), config.lanes)
        .context("the keys of this node's devices")?;
    let mut appliers = Appliers::new(options(config), Arc::new(keys)).context("no netlink socket")?;
    let report = appliers.cleanup().await;
    for applied in &report.applied {
        info!("removed {}", applied.subject);
    }
    for failure in &report.failures {
        error!("not removed: {failure}");
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
