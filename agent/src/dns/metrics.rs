//! What is counted about names.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Result of a query: the codes we give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rcode {
    /// Answered; NODATA too.
    NoError = 0,
    /// The query is damaged.
    FormErr = 1,
    /// The zone is not known yet.
    ServFail = 2,
    /// No such name.
    NxDomain = 3,
    /// Not a query.
    NotImp = 4,
    /// Not our zone, or a transfer.
    Refused = 5,
    /// An EDNS version that does not exist (RFC 6891).
    BadVers = 16,
}

impl Rcode {
    const ALL: [Self; 7] = [
        Self::NoError,
        Self::FormErr,
        Self::ServFail,
        Self::NxDomain,
        Self::NotImp,
        Self::Refused,
        Self::BadVers,
    ];

    /// As `dig` writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoError => "NOERROR",
            Self::FormErr => "FORMERR",
            Self::ServFail => "SERVFAIL",
            Self::NxDomain => "NXDOMAIN",
            Self::NotImp => "NOTIMP",
            Self::Refused => "REFUSED",
            Self::BadVers => "BADVERS",
        }
    }
}

/// Label `rcode`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RcodeLabel {
    /// As `dig` writes it.
    pub rcode: &'static str,
}

/// Counters of the resolver; clones share them.
#[derive(Debug, Clone)]
pub struct DnsMetrics {
    requests: Family<RcodeLabel, Counter>,
    by_code: [Counter; Rcode::ALL.len()],
    duration: Histogram,
}

impl DnsMetrics {
    /// All at zero.
    pub fn new() -> Self {
        let requests = Family::<RcodeLabel, Counter>::default();
        let counter = |rcode: Rcode| requests.get_or_create_owned(&RcodeLabel { rcode: rcode.as_str() });
        let by_code = Rcode::ALL.map(counter);
        let buckets = [5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1];
        Self { requests, by_code, duration: Histogram::new(buckets) }
    }

    /// Adds them to a registry whose prefix is `tombolo`: `tombolo_dns_requests_total{rcode}` and
    /// `tombolo_dns_request_duration_seconds`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("dns_requests", "Queries answered", self.requests.clone());
        registry.register(
            "dns_request_duration_seconds",
            "From reading a query to its answer's departure",
            self.duration.clone(),
        );
    }

    pub(super) fn answered(&self, rcode: Rcode, took: Duration) {
        if let Some(at) = Rcode::ALL.iter().position(|known| *known == rcode) {
            self.by_code[at].inc();
        }
        self.duration.observe(took.as_secs_f64());
    }

    /// How many were answered with `rcode`.
    pub fn count(&self, rcode: Rcode) -> u64 {
        Rcode::ALL.iter().position(|known| *known == rcode).map_or(0, |at| self.by_code[at].get())
    }
}

impl Default for DnsMetrics {
    fn default() -> Self {
        Self::new()
    }
}
