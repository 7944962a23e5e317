//! The node's loop: observe, plan, apply; the newest value wins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::NodeDesired;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::{Known, Section};
use tombolo_agent_core::object::TunnelNode;
use tombolo_agent_core::plan;
use tombolo_agent_core::world::{NodeWorld, Reach};
use tombolo_agent_core::zone::Zone;
use tombolo_proto::model::{Endpoint, Family, NodeName};
use tracing::{debug, error, info, warn};

use crate::admin::{Planned, Shown};
use crate::api::cache::Cache;
use crate::api::{ClusterApi, Observed};
use crate::apply::Appliers;
use crate::apply::key::DeviceKeys;
use crate::metrics::{ClusterLabel, ReasonLabel};
use crate::observe::member::{Members, Verifier};
use crate::observe::netlink::{Monitor, Underlay};

/// Changes that come together are planned together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// A slow resync heals what no event told.
const RESYNC: Duration = Duration::from_secs(30);
/// After a pass that failed in part; doubled up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What a node's loop works with.
pub struct Node {
    /// This node.
    pub name: NodeName,
    /// The cluster's API.
    pub api: Arc<dyn ClusterApi>,
    /// The kernel.
    pub appliers: Appliers,
    /// Drift, and the links below.
    pub monitor: Monitor,
    /// Of its devices.
    pub keys: Arc<DeviceKeys>,
    /// What it starts from while the API cannot be read.
    pub cache: Cache,
    /// To the resolver.
    pub zone: watch::Sender<Option<Arc<Zone>>>,
    /// To the admin pages.
    pub shown: Arc<Shown>,
}

/// What the API has not told yet, as it was when it was last told.
fn from_cache(now: Arc<Observed>, cached: Option<&Observed>) -> Arc<Observed> {
    let Some(cached) =
        cached.filter(|_| !now.clusterset.is_known() || !now.members.is_known() || !now.slices.is_known())
    else {
        return now;
    };
    fn or<T: Clone>(now: &Known<T>, cached: &Known<T>) -> Known<T> {
        if now.is_known() { now.clone() } else { cached.clone() }
    }
    let mut filled = Observed::clone(&now);
    filled.clusterset = or(&now.clusterset, &cached.clusterset);
    filled.members = or(&now.members, &cached.members);
    filled.member_nodes = or(&now.member_nodes, &cached.member_nodes);
    filled.imports = or(&now.imports, &cached.imports);
    filled.slices = or(&now.slices, &cached.slices);
    Arc::new(filled)
}

impl Node {
    /// Runs until `stop`, and removes nothing then.
    pub async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut observed = self.api.observe();
        let mut verifier = Verifier::default();
        let mut retry = RETRY;
        let cached = self.cache.load().unwrap_or_else(|error| {
            warn!("{error}");
            None
        });
        let mut planned: Option<Arc<Planned>> = None;
        loop {
            let start = Instant::now();
            let now = observed.borrow_and_update().clone();
            if let Err(error) = self.cache.save(&now) {
                warn!("what was verified cannot be kept for a start without the cluster's API: {error}");
            }
            let now = from_cache(now, cached.as_ref());
            let underlay = self.monitor.underlay();
            self.announce(&now, &underlay).await;
            let clean = match self.world(&now, &underlay, &mut verifier) {
                Some((world, findings)) => {
                    let current = match planned.take() {
                        Some(planned) if planned.world == world => planned,
                        _ => self.plan(world, findings),
                    };
                    let clean = self.apply(&current.desired, start).await;
                    self.answer(&current.desired);
                    planned = Some(current);
                    clean
                }
                None => {
                    self.shown
                        .check("member", Some("the cluster is no member yet: run `tombolo join`".to_owned()));
                    true
                }
            };
            let wait = if clean {
                retry = RETRY;
                RESYNC
            } else {
                let wait = retry;
                retry = (retry * 2).min(RETRY_MAX);
                wait
            };
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                result = observed.changed() => result.context("the cluster's API ended")?,
                () = self.monitor.changed() => debug!("the kernel's state changed"),
                () = tokio::time::sleep(wait) => {}
            }
            tokio::time::sleep(DEBOUNCE).await;
        }
    }

    /// Says what this node is, where the cluster's controller reads it.
    async fn announce(&self, observed: &Observed, underlay: &Underlay) {
        let Some(tunnel_nodes) = observed.tunnel_nodes.get() else { return };
        let Known::Yes(Some(_)) = &observed.clusterset else { return };
        let node = observed.nodes.get().and_then(|nodes| nodes.get(&self.name));
        let mut candidates: Vec<_> = node.map(|n| n.addresses.clone()).unwrap_or_default();
        for address in &underlay.addresses {
            if !candidates.contains(address) {
                candidates.push(*address);
            }
        }
        for family in Family::ALL {
            let mut count = 0;
            candidates.retain(|a| {
                count += usize::from(Family::of(*a) == family);
                Family::of(*a) != family || count <= Endpoint::MAX_CANDIDATES
            });
        }
        let prefixes = node.map(|n| n.pod_cidrs.clone()).unwrap_or_default();
        let value = TunnelNode { devices: self.keys.public(), candidates, prefixes };
        if tunnel_nodes.get(&self.name) != Some(&value) {
            match self.api.write_tunnel_node(&self.name, &value).await {
                Ok(_) => info!(candidates = ?value.candidates, "told what this node is"),
                Err(error) => warn!("cannot tell what this node is, retrying: {error}"),
            }
        }
    }

    fn world(
        &self,
        observed: &Observed,
        underlay: &Underlay,
        verifier: &mut Verifier,
    ) -> Option<(NodeWorld, Vec<Finding>)> {
        let Known::Yes(Some(clusterset)) = &observed.clusterset else { return None };
        let members: Known<Arc<Members>> = verifier.verify(observed);
        let mut findings = observed.findings.clone();
        if let Some(members) = members.get() {
            findings.extend(members.findings.iter().cloned());
        }
        let reach: Reach = clusterset.reach;
        let world = NodeWorld {
            cluster: clusterset.cluster.clone(),
            node: self.name.clone(),
            reach,
            clusterset: Some(clusterset.clusterset),
            underlay_mtu: underlay.mtu,
            underlay: underlay.addresses.iter().map(|a| Family::of(*a)).collect(),
            members: match members {
                Known::Yes(members) => Known::Yes(members.nodes.clone()),
                Known::No => Known::No,
            },
            imports: observed.imports.clone(),
            slices: observed.slices.clone(),
        };
        Some((world, findings))
    }

    fn plan(&self, world: NodeWorld, mut findings: Vec<Finding>) -> Arc<Planned> {
        let (desired, planned) = plan::node(&world);
        findings.extend(planned);
        findings.sort();
        findings.dedup();
        self.show(&desired, findings);
        let planned = Arc::new(Planned { world, desired });
        self.shown.planned.store(Some(planned.clone()));
        planned
    }

    /// Names come after the firewall: whoever gets a new address must find it balanced.
    fn answer(&self, desired: &NodeDesired) {
        if let Section::Set(zone) = &desired.zone {
            self.zone.send_if_modified(|old| {
                let same = old.as_deref() == Some(zone);
                if !same {
                    *old = Some(Arc::new(zone.clone()));
                }
                !same
            });
        }
    }

    async fn apply(&mut self, desired: &NodeDesired, start: Instant) -> bool {
        let metrics = &self.shown.metrics;
        let written = self.appliers.writes();
        let before = written.counts().total();
        let report = self.appliers.apply(desired).await;
        let writes = written.counts().total() - before;
        metrics.reconciles.inc();
        metrics.kernel_writes.inc_by(writes);
        metrics.reconcile_seconds.observe(start.elapsed().as_secs_f64());
        if writes > 0 {
            info!(writes, "applied");
        }
        for failure in &report.failures {
            warn!("{failure}; retrying");
        }
        let problem = match report.failures.len() {
            0 => None,
            n => Some(format!("{n} things could not be applied, see the log")),
        };
        let clean = problem.is_none();
        if !clean {
            metrics.reconcile_errors.inc();
        }
        self.shown.check("apply", problem);
        let known = |section: bool, what: &str| (!section).then(|| format!("{what} is not known yet"));
        self.shown.check("member", known(desired.devices.get().is_some(), "the membership"));
        self.shown.check("names", known(desired.zone.get().is_some(), "what is imported"));
        clean
    }

    fn show(&self, desired: &NodeDesired, findings: Vec<Finding>) {
        let old = self.shown.node_findings.load();
        for finding in findings.iter().filter(|f| !old.contains(f)) {
            match finding.severity {
                Severity::Error => {
                    error!(reason = finding.reason, object = %finding.object, "{}", finding.message);
                }
                Severity::Warning => {
                    warn!(reason = finding.reason, object = %finding.object, "{}", finding.message);
                }
            }
        }
        let metrics = &self.shown.metrics;
        metrics.findings.clear();
        for finding in &findings {
            metrics.findings.get_or_create(&ReasonLabel { reason: finding.reason.to_owned() }).inc();
        }
        metrics.peers.clear();
        let mut peers: BTreeMap<String, i64> = BTreeMap::new();
        for device in desired.devices.get().into_iter().flat_map(BTreeMap::values) {
            for peer in device.peers.values() {
                *peers.entry(peer.node.cluster.to_string()).or_default() += 1;
            }
        }
        for (cluster, count) in peers {
            metrics.peers.get_or_create(&ClusterLabel { cluster }).set(count);
        }
        self.shown.node_findings.store(Arc::new(findings));
    }
}
