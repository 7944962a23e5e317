//! Counters and gauges, all named `tombolo_broker_*`.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct ResultLabel {
    pub(crate) result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct DirectionLabel {
    pub(crate) direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct RpcLabel {
    pub(crate) rpc: &'static str,
    pub(crate) result: &'static str,
}

#[derive(Default)]
pub(crate) struct Metrics {
    pub(crate) connections: Gauge,
    pub(crate) handshakes: Family<ResultLabel, Counter>,
    pub(crate) sessions: Gauge,
    pub(crate) admissions: Family<ResultLabel, Counter>,
    pub(crate) session_ends: Family<ResultLabel, Counter>,
    pub(crate) messages: Family<DirectionLabel, Counter>,
    pub(crate) message_bytes: Family<DirectionLabel, Counter>,
    pub(crate) refusals: Counter,
    pub(crate) brakes: Counter,
    pub(crate) requests: Family<RpcLabel, Counter>,
    pub(crate) store_writes: Family<ResultLabel, Counter>,
    pub(crate) store_healthy: Gauge,
    pub(crate) store_pending: Gauge,
    pub(crate) store_seconds: Counter<f64, AtomicU64>,
    pub(crate) members: Gauge,
    pub(crate) origins: Gauge,
    pub(crate) records: Gauge,
    pub(crate) record_bytes: Gauge,
    pub(crate) findings: Gauge,
}

impl Metrics {
    pub(crate) fn register(&self) -> Registry {
        let mut r = Registry::with_prefix("tombolo_broker");
        r.register("connections", "Connections that shook hands", self.connections.clone());
        r.register("handshakes", "TLS handshakes", self.handshakes.clone());
        r.register("sessions", "Admitted sessions now", self.sessions.clone());
        r.register("admissions", "Judged hellos", self.admissions.clone());
        r.register("session_ends", "Ended sessions by cause", self.session_ends.clone());
        r.register("messages", "Session messages", self.messages.clone());
        r.register_with_unit("messages", "Session messages", Unit::Bytes, self.message_bytes.clone());
        r.register("refusals", "Documents and statements not taken", self.refusals.clone());
        r.register("brakes", "Messages that waited since their member had said much", self.brakes.clone());
        r.register("requests", "Offer and Fetch", self.requests.clone());
        r.register("store_writes", "Transactions of the store", self.store_writes.clone());
        r.register("store_healthy", "1 if the last write to the store went well", self.store_healthy.clone());
        r.register("store_pending", "Changes that are not in the store yet", self.store_pending.clone());
        r.register_with_unit("store_write", "Time spent writing", Unit::Seconds, self.store_seconds.clone());
        r.register("members", "Clusters with a membership", self.members.clone());
        r.register("origins", "Clusters whose statement is held", self.origins.clone());
        r.register("records", "Records held", self.records.clone());
        r.register_with_unit("records", "Bytes of the records held", Unit::Bytes, self.record_bytes.clone());
        r.register("findings", "Objects with something refused, see /debug/origins", self.findings.clone());
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "This program", build);
        r
    }

    pub(crate) fn handshake(&self, result: &'static str) {
        self.handshakes.get_or_create(&ResultLabel { result }).inc();
    }

    pub(crate) fn request(&self, rpc: &'static str, result: &'static str) {
        self.requests.get_or_create(&RpcLabel { rpc, result }).inc();
    }

    pub(crate) fn message(&self, direction: &'static str, bytes: usize) {
        let label = DirectionLabel { direction };
        self.messages.get_or_create(&label).inc();
        self.message_bytes.get_or_create(&label).inc_by(bytes as u64);
    }
}
