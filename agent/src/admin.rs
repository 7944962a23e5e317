//! Health, readiness, metrics, and what the agent knows, wants and finds; over HTTP on loopback.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use arc_swap::{ArcSwap, ArcSwapOption};
use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::NodeDesired;
use tombolo_agent_core::finding::Finding;
use tombolo_agent_core::world::NodeWorld;
use tracing::debug;

use crate::apply::Drops;
use crate::metrics::{DropLabel, Metrics};
use crate::tell::{Part, Teller};

/// A world and what was made of it.
pub struct Planned {
    /// What was known.
    pub world: NodeWorld,
    /// What should be.
    pub desired: NodeDesired,
}

/// What the admin pages show; loops replace their part of it.
pub struct Shown {
    /// Named checks: why each is not ready, or None.
    pub ready: ArcSwap<BTreeMap<&'static str, Option<String>>>,
    /// The node's findings.
    pub node_findings: ArcSwap<Vec<Finding>>,
    /// The controller's findings.
    pub cluster_findings: ArcSwap<Vec<Finding>>,
    /// The node's world and plan.
    pub planned: ArcSwapOption<Planned>,
    /// Counters.
    pub metrics: Metrics,
    teller: Teller,
    /// Set by who runs a node: reads what its firewall dropped.
    drops: OnceLock<tokio::sync::Mutex<(Drops, Option<Instant>)>>,
}

/// Dropped packets are read so often at most: each time is a process.
const DROPS_EVERY: Duration = Duration::from_secs(1);

impl Shown {
    /// Nothing known yet: not ready.
    pub fn new() -> Arc<Self> {
        let starting = BTreeMap::from([("start", Some("starting".to_owned()))]);
        let metrics = Metrics::new();
        Arc::new(Self {
            teller: Teller::new(metrics.findings.clone()),
            ready: ArcSwap::from_pointee(starting),
            node_findings: ArcSwap::default(),
            cluster_findings: ArcSwap::default(),
            planned: ArcSwapOption::empty(),
            drops: OnceLock::new(),
            metrics,
        })
    }

    /// Replaces what one part of the agent finds: shown, counted, and what is new logged, in bounds.
    pub fn tell(&self, part: Part, findings: Vec<Finding>) {
        let all = self.teller.tell(part, findings);
        match part {
            Part::Node => self.node_findings.store(all),
            Part::Voice | Part::Services => self.cluster_findings.store(all),
        }
    }

    /// From now on metrics tell what the firewall dropped.
    pub fn count_drops(&self, drops: Drops) {
        let _ = self.drops.set(tokio::sync::Mutex::new((drops, None)));
    }

    /// Reads what was dropped; what cannot be read stays as it was.
    async fn read_drops(&self) {
        let Some(drops) = self.drops.get() else { return };
        let mut drops = drops.lock().await;
        if drops.1.is_some_and(|at| at.elapsed() < DROPS_EVERY) {
            return;
        }
        match drops.0.read().await {
            Ok(counts) => {
                for (reason, count) in counts {
                    let gauge = self.metrics.dropped.get_or_create(&DropLabel { reason }).clone();
                    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
                }
            }
            Err(error) => debug!("the counters of dropped packets cannot be read: {error}"),
        }
        drops.1 = Some(Instant::now());
    }

    /// Ends what the controller found, since it leads no more.
    pub fn leads_no_more(&self) {
        self.tell(Part::Voice, Vec::new());
        self.tell(Part::Services, Vec::new());
    }

    /// Sets one readiness check.
    pub fn check(&self, name: &'static str, problem: Option<String>) {
        self.ready.rcu(|old| {
            let mut new = BTreeMap::clone(old);
            new.remove("start");
            new.insert(name, problem.clone());
            new
        });
    }
}

/// Serves until `stop`.
pub async fn serve(address: SocketAddr, shown: Arc<Shown>, stop: CancellationToken) -> Result<()> {
    let app = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route(
            "/debug/world",
            get(async |State(s): State<Arc<Shown>>| planned(&s, |p: &Planned| format!("{:#?}\n", p.world))),
        )
        .route(
            "/debug/desired",
            get(async |State(s): State<Arc<Shown>>| planned(&s, |p: &Planned| format!("{:#?}\n", p.desired))),
        )
        .route("/debug/findings", get(findings))
        .route("/debug/health", get(health))
        .with_state(shown);
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address} for the admin pages; choose another with --admin")
    })?;
    axum::serve(listener, app)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
        .context("the admin pages ended")
}

fn planned(shown: &Shown, part: impl FnOnce(&Planned) -> String) -> String {
    shown.planned.load().as_deref().map_or_else(|| "nothing is planned yet\n".to_owned(), part)
}

async fn readyz(
    State(shown): State<Arc<Shown>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> impl IntoResponse {
    let checks = shown.ready.load();
    let ready = checks.values().all(Option::is_none);
    let mut text = String::new();
    if query.contains_key("verbose") || !ready {
        for (name, problem) in checks.iter() {
            match problem {
                None => text += &format!("[+]{name} ok\n"),
                Some(problem) => text += &format!("[-]{name} not ready: {problem}\n"),
            }
        }
    }
    text += if ready { "ok\n" } else { "not ready\n" };
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

async fn metrics(State(shown): State<Arc<Shown>>) -> impl IntoResponse {
    shown.read_drops().await;
    let mut text = String::new();
    let registry = shown.metrics.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => (
            StatusCode::OK,
            [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
            text,
        ),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string())
        }
    }
}

/// What this node found out of its peers: `tombolo explain` plans with it.
async fn health(State(shown): State<Arc<Shown>>) -> impl IntoResponse {
    let planned = shown.planned.load();
    match serde_json::to_string(&planned.as_ref().map(|planned| &planned.world.health)) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn findings(State(shown): State<Arc<Shown>>) -> impl IntoResponse {
    let node = shown.node_findings.load();
    let cluster = shown.cluster_findings.load();
    let all: Vec<&Finding> = node.iter().chain(cluster.iter()).collect();
    match serde_json::to_string_pretty(&all) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
