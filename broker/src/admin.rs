//! Health, metrics and what is held, over plain HTTP on the admin address.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tombolo_replica::Replica;

use crate::shared::Shared;

struct Admin {
    shared: Arc<Shared>,
    registry: Registry,
}

pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let registry = shared.metrics.register();
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/debug/origins", get(origins))
        .with_state(Arc::new(Admin { shared, registry }))
}

/// In the form of Kubernetes' own components.
async fn readyz(State(admin): State<Arc<Admin>>, RawQuery(query): RawQuery) -> Response {
    let draining = admin.shared.stop.is_cancelled();
    let stored = admin.shared.metrics.store_healthy.get() == 1;
    let mut text = String::new();
    if query
        .is_some_and(|query| query.split('&').any(|part| part == "verbose" || part.starts_with("verbose=")))
    {
        let mut line = |good: bool, name: &str, remark: &str| {
            let mark = if good { "+" } else { "-" };
            let _ = writeln!(text, "[{mark}]{name} {}", if good { "ok" } else { remark });
        };
        line(!draining, "serving", "failed: going down");
        line(stored, "store", "failed: kept in memory only, see the log (does not make the broker unready)");
    }
    let (status, verdict) = if draining {
        (StatusCode::SERVICE_UNAVAILABLE, "readyz check failed")
    } else {
        (StatusCode::OK, "readyz check passed")
    };
    let _ = writeln!(text, "{verdict}");
    (status, text).into_response()
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    {
        let replica = admin.shared.replica();
        let metrics = &admin.shared.metrics;
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let scopes = || replica.origins().flat_map(|(_, state)| state.scopes().values());
        let members: std::collections::BTreeSet<_> = replica.memberships().map(|m| m.cluster()).collect();
        metrics.members.set(number(members.len()));
        metrics.origins.set(number(replica.origins().count()));
        metrics.records.set(number(scopes().map(|records| records.len()).sum()));
        metrics.record_bytes.set(number(scopes().map(|records| records.bytes()).sum()));
        let stored = admin.shared.stored.load(std::sync::atomic::Ordering::Relaxed);
        metrics.store_pending.set(replica.version().saturating_sub(stored).try_into().unwrap_or(i64::MAX));
        metrics.findings.set(number(replica.findings().len()));
    }
    let mut text = String::new();
    if encode(&mut text, &admin.registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

#[derive(Serialize)]
struct Held {
    set: String,
    roots: u64,
    brokers: Option<u64>,
    revocations: Option<u64>,
    members: BTreeMap<String, Vec<Member>>,
    origins: BTreeMap<String, Origin>,
    sessions: BTreeMap<String, usize>,
    findings: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Member {
    serial: u64,
    generations: usize,
    owned: Vec<String>,
}

#[derive(Serialize)]
struct Origin {
    position: String,
    scopes: usize,
    records: usize,
    bytes: usize,
}

impl Held {
    fn of(replica: &Replica, sessions: BTreeMap<String, usize>) -> Self {
        let mut members: BTreeMap<String, Vec<Member>> = BTreeMap::new();
        for membership in replica.memberships() {
            members.entry(membership.cluster().to_string()).or_default().push(Member {
                serial: membership.grant().serial,
                generations: membership.bindings().len(),
                owned: membership.grant().owned.iter().map(ToString::to_string).collect(),
            });
        }
        let origin = |state: &tombolo_replica::OriginState| Origin {
            position: state.position().to_string(),
            scopes: state.leaves().len(),
            records: state.scopes().values().map(|records| records.len()).sum(),
            bytes: state.scopes().values().map(|records| records.bytes()).sum(),
        };
        Self {
            set: replica.set().to_string(),
            roots: replica.roots().current().version,
            brokers: replica.brokers().map(|list| list.version),
            revocations: replica.revocations().map(|list| list.version),
            members,
            origins: replica.origins().map(|(name, state)| (name.to_string(), origin(state))).collect(),
            sessions,
            findings: replica.findings().iter().map(|(o, r)| (o.to_string(), r.to_string())).collect(),
        }
    }
}

async fn origins(State(admin): State<Arc<Admin>>) -> Response {
    let sessions = crate::shared::lock(&admin.shared.sessions)
        .iter()
        .map(|(cluster, count)| (cluster.to_string(), *count))
        .collect();
    let held = Held::of(&admin.shared.replica(), sessions);
    match serde_json::to_string_pretty(&held) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text + "\n").into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
