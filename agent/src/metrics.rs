//! What is counted. Labels are bounded: never an address, a pod or a service.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Labels `reason` and `by`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FindingLabel {
    /// Of a fixed list.
    pub reason: &'static str,
    /// `node` or `controller`.
    pub by: &'static str,
}

/// Label `reason` of dropped packets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DropLabel {
    /// Name of a counter of our table.
    pub reason: String,
}

/// Label `broker`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BrokerLabel {
    /// Its address, out of the signed list.
    pub broker: String,
}

/// Label `cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ClusterLabel {
    /// A member.
    pub cluster: String,
}

/// The agent's metrics.
pub struct Metrics {
    /// For the exposition, and for parts that register their own.
    pub registry: Mutex<Registry>,
    /// Times that a node's plan was made and applied.
    pub reconciles: Counter,
    /// Of them, with an error.
    pub reconcile_errors: Counter,
    /// Seconds from observation to applied.
    pub reconcile_seconds: Histogram,
    /// Writes to the kernel: netlink, nft, devices.
    pub kernel_writes: Counter,
    /// Findings now, by reason and by who found it.
    pub findings: Family<FindingLabel, Gauge>,
    /// Packets that the firewall of this node has dropped since its table was made, by counter.
    pub dropped: Family<DropLabel, Gauge>,
    /// Whether this agent leads its cluster.
    pub leader: Gauge,
    /// Statements signed.
    pub statements: Counter,
    /// Documents and statements refused.
    pub refusals: Counter,
    /// Sessions up, by broker.
    pub sessions: Family<BrokerLabel, Gauge>,
    /// Peers by cluster.
    pub peers: Family<ClusterLabel, Gauge>,
    /// What the narrowest path to a cluster carries, bytes.
    pub path_mtu: Family<ClusterLabel, Gauge>,
}

impl Metrics {
    /// Registers all.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("tombolo");
        let buckets = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];
        let metrics = Self {
            reconciles: Counter::<u64, AtomicU64>::default(),
            reconcile_errors: Counter::default(),
            reconcile_seconds: Histogram::new(buckets),
            kernel_writes: Counter::default(),
            findings: Family::default(),
            dropped: Family::default(),
            leader: Gauge::<i64, AtomicI64>::default(),
            statements: Counter::default(),
            refusals: Counter::default(),
            sessions: Family::default(),
            peers: Family::default(),
            path_mtu: Family::default(),
            registry: Mutex::new(Registry::default()),
        };
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent's version", version);
        registry.register("reconciles", "Plans made and applied", metrics.reconciles.clone());
        registry.register("reconcile_errors", "Plans not wholly applied", metrics.reconcile_errors.clone());
        registry.register(
            "reconcile_duration_seconds",
            "From observation to applied",
            metrics.reconcile_seconds.clone(),
        );
        registry.register(
            "kernel_writes",
            "Writes to netlink, nft and devices",
            metrics.kernel_writes.clone(),
        );
        registry.register("findings", "Findings now", metrics.findings.clone());
        registry.register(
            "dropped_packets",
            "Packets dropped by the firewall since its table was made",
            metrics.dropped.clone(),
        );
        registry.register("leader", "1 while this agent leads its cluster", metrics.leader.clone());
        registry.register("statements", "Statements signed", metrics.statements.clone());
        registry.register("refusals", "Documents and statements refused", metrics.refusals.clone());
        registry.register("broker_sessions", "Sessions with brokers", metrics.sessions.clone());
        registry.register("peers", "Tunnel peers by cluster", metrics.peers.clone());
        let text = "The longest packet that every path to a cluster carries";
        registry.register("path_mtu_bytes", text, metrics.path_mtu.clone());
        Self { registry: Mutex::new(registry), ..metrics }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
