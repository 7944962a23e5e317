//! The node's loop: observe, plan, apply; the newest value wins.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::NodeDesired;
use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::hello::WITHHELD;
use tombolo_agent_core::known::{Known, Section};
use tombolo_agent_core::object::NodeKey;
use tombolo_agent_core::outside::Outside;
use tombolo_agent_core::plan::{Planner, eligible};
use tombolo_agent_core::steady::Steady;
use tombolo_agent_core::world::{Health, NodeWorld, Reach};
use tombolo_agent_core::zone::Zone;
use tombolo_proto::model::{ClusterId, DeviceNumber, Family, NodeName, Position, Prefix, Rank, WireguardKey};
use tracing::{debug, info, warn};

use crate::admin::{Planned, Shown};
use crate::api::cache::Cache;
use crate::api::{ClusterApi, Observed};
use crate::apply::Appliers;
use crate::apply::key::{DeviceKeys, Rotation};
use crate::metrics::ClusterLabel;
use crate::observe::liveness::Roster;
use crate::observe::member::{Members, Verifier, inner_ranges};
use crate::observe::netlink::{Monitor, Underlay};
use crate::tell::Part;

mod announce;
mod saving;

use saving::Saving;

/// Changes that come together are planned together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// However long a pass takes, the next begins so long after it at the latest.
const BRAKE: Duration = Duration::from_millis(300);
/// While a peer does not answer: when the next attempt may be due is known to the appliers.
const ATTEMPT: Duration = Duration::from_secs(5);
/// At a start the API may take so long before the cache is used: what it holds may be older than what is in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);
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
    /// What it starts from while the API cannot be read; none while it is being written.
    pub cache: Option<Cache>,
    /// The plan, kept from pass to pass.
    pub planner: Planner,
    /// To the resolver.
    pub zone: watch::Sender<Option<Arc<Zone>>>,
    /// To liveness and hellos: whom there are tunnels with.
    pub roster: watch::Sender<Option<Arc<Roster>>>,
    /// What they say.
    pub health: watch::Receiver<Health>,
    /// What other clusters say that they have said, and that did not come here for long.
    pub withheld: watch::Receiver<BTreeMap<ClusterId, Position>>,
    /// Where nodes of other clusters see this one. Looked at in passes that others cause: whoever says another address
    /// with every hello shall cause none.
    pub seen: watch::Receiver<BTreeMap<ClusterId, BTreeSet<IpAddr>>>,
    /// What this node is may not be told yet, whatever is shown: true at first.
    pub untold: bool,
    /// To the admin pages.
    pub shown: Arc<Shown>,
}

/// Whether the API has told all that a plan needs.
fn is_told(now: &Observed) -> bool {
    now.clusterset.is_known()
        && now.members.is_known()
        && now.member_nodes.is_known()
        && now.nodes.is_known()
        && now.imports.is_known()
        && now.slices.is_known()
}

/// What the API does not tell (yet, or for now), as it was when it was last told.
fn from_cache(now: Arc<Observed>, cached: Option<&Arc<Observed>>) -> Arc<Observed> {
    let Some(cached) = cached.filter(|_| !is_told(&now)) else {
        return now;
    };
    fn or<T: Clone>(now: &Known<T>, cached: &Known<T>) -> Known<T> {
        if now.is_known() { now.clone() } else { cached.clone() }
    }
    let mut filled = Observed::clone(&now);
    filled.clusterset = or(&now.clusterset, &cached.clusterset);
    filled.members = or(&now.members, &cached.members);
    filled.member_nodes = or(&now.member_nodes, &cached.member_nodes);
    filled.nodes = or(&now.nodes, &cached.nodes);
    filled.imports = or(&now.imports, &cached.imports);
    filled.slices = or(&now.slices, &cached.slices);
    Arc::new(filled)
}

/// Whether two observations differ in imports, slices and what no node works with.
fn only_services(old: &Observed, new: &Observed) -> bool {
    old.clusterset == new.clusterset
        && old.members == new.members
        && old.member_nodes == new.member_nodes
        && old.nodes == new.nodes
        && old.tunnel_nodes == new.tunnel_nodes
}

impl Node {
    /// Runs until `stop`, and removes nothing then.
    pub async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut observed = self.api.observe();
        let mut verifier = Verifier::default();
        let mut retry = RETRY;
        let loaded = self.cache.as_mut().map(Cache::load).transpose();
        let mut last = loaded.map(Option::flatten).unwrap_or_else(|error| {
            warn!("{error}");
            None
        });
        if let Some(cached) = &last {
            // What was good stays so, whatever became of it in the API meanwhile.
            if let Known::Yes(members) = verifier.verify(cached) {
                self.appliers.remember(owners(&members));
            }
        }
        let mut last = last.take().map(Arc::new);
        let mut saving = Saving::default();
        let mut planned: Option<(Arc<Planned>, Vec<Finding>)> = None;
        let mut unreached: Steady<BTreeSet<ClusterId>> = Steady::default();
        let mut outside: Option<Outside> = None;
        let begun = Instant::now();
        // Whether only the API said anything new, and when all was looked at last.
        let mut news = false;
        let mut looked: Option<Instant> = None;
        let mut attempts = false;
        loop {
            let start = Instant::now();
            let patience = PATIENCE.saturating_sub(begun.elapsed());
            if !patience.is_zero() && !is_told(&observed.borrow_and_update()) {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    result = observed.changed() => result.context("the cluster's API ended")?,
                    () = tokio::time::sleep(patience) => {}
                }
                continue;
            }
            let now = from_cache(observed.borrow_and_update().clone(), last.as_ref());
            let only =
                std::mem::take(&mut news) && last.as_ref().is_some_and(|last| only_services(last, &now));
            let whole = !only || looked.is_none_or(|at| at.elapsed() >= ATTEMPT);
            if whole {
                looked = Some(start);
            }
            last = Some(now.clone());
            let underlay = self.monitor.underlay();
            verifier.set_addresses(&underlay.addresses);
            let members = heavy(|| verifier.verify(&now));
            let rotated = self.rotate(&now);
            let sight = self.outside(&mut outside, begun.elapsed(), &now, &underlay);
            let mut announced = self.announce(&now, &underlay, members.get(), None, &sight).await;
            let keys = self.keys.public(None);
            let clean = match Self::world(&self.name, &now, &underlay, &members) {
                Some((mut world, mut findings)) => {
                    findings.extend(withheld(&self.withheld.borrow_and_update(), &verifier.positions()));
                    world.health = self.health.borrow_and_update().clone();
                    let (current, findings) = match planned.take() {
                        Some((planned, old)) if planned.world == world && old == findings => (planned, old),
                        _ => (self.plan(world, findings.clone()), findings),
                    };
                    let clean = self.apply(&current.desired, whole, start).await;
                    self.answer(&current.desired);
                    self.introduce(&current, &verifier);
                    if let Some(devices) = current.desired.devices.get() {
                        unreached.handle(begun.elapsed(), eligible::unreached(&current.world, devices));
                    }
                    planned = Some((current, findings));
                    clean
                }
                None => {
                    self.shown
                        .check("member", Some("the cluster is no member yet: run `tombolo join`".to_owned()));
                    true
                }
            };
            let reached = unreached.value(begun.elapsed());
            let told =
                now.tunnel_nodes.get().and_then(|nodes| nodes.get(&self.name)).map(|node| &node.unreached);
            if self.keys.public(None) != keys || (reached.is_some() && reached != told) {
                // Only now that devices answer to their new keys; and nothing that fails over waits for the API.
                announced &= self.announce(&now, &underlay, members.get(), reached, &sight).await;
            }
            let brake = start.elapsed().clamp(DEBOUNCE, BRAKE);
            let mut wait = if clean && announced && rotated {
                retry = RETRY;
                if whole {
                    attempts = match &planned {
                        Some((planned, _)) => self.attempts(&planned.desired).await,
                        None => false,
                    };
                }
                if attempts { ATTEMPT } else { RESYNC }
            } else {
                looked = None;
                let wait = retry;
                retry = (retry * 2).min(RETRY_MAX);
                wait
            };
            let outside = outside.as_ref().and_then(Outside::poll_timeout);
            for at in unreached.poll_timeout().into_iter().chain(outside) {
                wait = wait.min(at.saturating_sub(begun.elapsed()));
            }
            // Last, since nothing waits for it, and seldom, since it is the whole world.
            wait = wait.min(self.save(&mut saving, &verifier, &now));
            tokio::select! {
                () = stop.cancelled() => {
                    if let Some(task) = saving.task.take() {
                        self.saved(&mut saving, task.await);
                    }
                    if let (Some(cache), Some(good)) = (&mut self.cache, verifier.good(&now)) {
                        cache.keep(&good);
                    }
                    return Ok(());
                }
                Some(done) = saving.done() => self.saved(&mut saving, done),
                result = observed.changed() => {
                    result.context("the cluster's API ended")?;
                    news = true;
                }
                // At the end it may stop first.
                result = self.health.changed() => if !stop.is_cancelled() { result.context("liveness ended")? },
                result = self.withheld.changed() => if !stop.is_cancelled() { result.context("hellos ended")? },
                () = self.monitor.changed() => debug!("the kernel's state changed"),
                () = tokio::time::sleep(wait) => {}
            }
            // Much to do is done less often; what is dead is not waited for.
            tokio::select! {
                () = stop.cancelled() => {}
                result = self.health.changed() => {
                    news = false;
                    if !stop.is_cancelled() {
                        result.context("liveness ended")?;
                    }
                }
                () = tokio::time::sleep(brake) => {}
            }
        }
    }

    /// Makes keys anew if that was asked for. False if it is to be tried again.
    fn rotate(&self, observed: &Observed) -> bool {
        let Known::Yes(Some(clusterset)) = &observed.clusterset else { return true };
        let Some(wish) = clusterset.rotations.get(&self.name) else { return true };
        match self.keys.rotate(*wish) {
            Ok(Rotation::Made) => {
                info!("made new WireGuard keys, as asked by `tombolo rotate wireguard`");
                true
            }
            Ok(Rotation::Done) => true,
            Ok(Rotation::Waits) => {
                debug!("new WireGuard keys are asked for, while the ones before are still in use");
                true
            }
            Err(error) => {
                warn!("cannot make new WireGuard keys, retrying: {error}");
                false
            }
        }
    }

    /// Gives devices new keys whose old ones peers would not take calls by. True if there were any.
    fn renew(&self, behind: &BTreeMap<DeviceNumber, Duration>) -> bool {
        let mut renewed = false;
        for (number, behind) in behind {
            match self.keys.renew(*number) {
                Ok(()) => {
                    let behind = behind.as_secs();
                    warn!(device = %number, "the clock is {behind} s behind the last handshake: peers would ignore this key; made a new one");
                    renewed = true;
                }
                Err(error) => {
                    warn!(device = %number, "the clock went back, and there is no new key: {error}")
                }
            }
        }
        renewed
    }

    /// Whether a peer does not answer, and there is somewhere else to look for it.
    async fn attempts(&self, desired: &NodeDesired) -> bool {
        let Some(devices) = desired.devices.get().filter(|devices| !devices.is_empty()) else { return false };
        let Ok(states) = self.appliers.tunnels().await else { return false };
        let now = SystemTime::now();
        devices.iter().any(|(number, device)| {
            device.peers.iter().any(|(key, peer)| {
                let state = states.get(number).and_then(|state| state.peers.get(key));
                let there = state.and_then(|state| state.endpoint);
                let elsewhere = peer.candidates.iter().any(|candidate| Some(*candidate) != there);
                elsewhere && !state.is_some_and(|state| state.is_alive(now))
            })
        })
    }

    /// What the plan of node `name` is made from, and what is wrong with it; none of a cluster that is no member.
    pub fn world(
        name: &NodeName,
        observed: &Observed,
        underlay: &Underlay,
        members: &Known<Arc<Members>>,
    ) -> Option<(NodeWorld, Vec<Finding>)> {
        let Known::Yes(Some(clusterset)) = &observed.clusterset else { return None };
        let mut findings = observed.findings.clone();
        if let Some(members) = members.get() {
            findings.extend(members.findings.iter().cloned());
        }
        let reach: Reach = clusterset.reach;
        let mut inner = inner_ranges(clusterset, observed.nodes.get());
        inner.extend(underlay.addresses.iter().filter_map(|a| Prefix::host(*a).ok()));
        let world = NodeWorld {
            cluster: clusterset.cluster.clone(),
            node: name.clone(),
            reach,
            clusterset: clusterset.clusterset,
            underlay_mtu: underlay.mtu,
            underlay: underlay.addresses.iter().map(|a| Family::of(*a)).collect(),
            inner,
            hosts: match observed.nodes.get() {
                Some(nodes) => Known::Yes(
                    nodes
                        .iter()
                        .flat_map(|(n, node)| node.addresses.iter().map(|a| (*a, n.clone())))
                        .collect(),
                ),
                None => Known::No,
            },
            members: match members {
                Known::Yes(members) if members.usable => Known::Yes(members.nodes.clone()),
                Known::Yes(_) | Known::No => Known::No,
            },
            imports: observed.imports.clone(),
            slices: observed.slices.clone(),
            health: Health::default(),
        };
        Some((world, findings))
    }

    fn plan(&mut self, world: NodeWorld, mut findings: Vec<Finding>) -> Arc<Planned> {
        let (desired, planned) = heavy(|| self.planner.plan(&world));
        findings.extend(planned);
        findings.sort();
        findings.dedup();
        self.show(&world, &desired, findings);
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

    /// Tells liveness and hellos whom there are tunnels with now.
    fn introduce(&self, planned: &Planned, verifier: &Verifier) {
        let (Section::Set(devices), Some(members)) = (&planned.desired.devices, planned.world.members.get())
        else {
            return;
        };
        let own = members.get(&planned.world.cluster).and_then(|own| own.nodes.get(&self.name));
        let roster = Roster {
            cluster: planned.world.cluster.clone(),
            rank: own.map_or(Rank::NODE, |own| own.rank),
            devices: devices.clone(),
            positions: verifier.positions(),
        };
        self.roster.send_if_modified(|old| {
            let same = old.as_deref() == Some(&roster);
            if !same {
                *old = Some(Arc::new(roster));
            }
            !same
        });
    }

    /// `whole`: more than what is desired may have changed.
    async fn apply(&mut self, desired: &NodeDesired, whole: bool, start: Instant) -> bool {
        let metrics = &self.shown.metrics;
        let written = self.appliers.writes();
        let before = written.counts().total();
        let mut report = match whole {
            true => self.appliers.apply(desired).await,
            false => self.appliers.apply_news(desired).await,
        };
        if self.renew(&report.behind) {
            let behind = std::mem::take(&mut report.behind);
            report = self.appliers.apply(desired).await;
            report.behind.retain(|number, _| !behind.contains_key(number));
        }
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

    fn show(&self, world: &NodeWorld, desired: &NodeDesired, findings: Vec<Finding>) {
        self.shown.tell(Part::Node, findings);
        let metrics = &self.shown.metrics;
        metrics.peers.clear();
        metrics.path_mtu.clear();
        let mut peers: BTreeMap<String, (i64, u16)> = BTreeMap::new();
        for (number, device) in desired.devices.get().into_iter().flatten() {
            for (key, peer) in &device.peers {
                let length = world.health.narrow.get(&(*number, *key)).unwrap_or(&device.mtu);
                let (count, least) = peers.entry(peer.node.cluster.to_string()).or_insert((0, u16::MAX));
                (*count, *least) = (*count + 1, (*least).min(*length));
            }
        }
        for (cluster, (count, least)) in peers {
            metrics.peers.get_or_create(&ClusterLabel { cluster: cluster.clone() }).set(count);
            metrics.path_mtu.get_or_create(&ClusterLabel { cluster }).set(least.into());
        }
    }
}

/// Freshness is an alarm and nothing more: what was verified last stays in use.
fn withheld(said: &BTreeMap<ClusterId, Position>, here: &BTreeMap<ClusterId, Position>) -> Vec<Finding> {
    let finding = |(cluster, said): (&ClusterId, &Position)| {
        let here = here.get(cluster).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        Finding {
            severity: Severity::Warning,
            reason: "NewsWithheld",
            object: format!("cluster {cluster}"),
            message: format!(
                "its nodes say that it has come to position {said}, and for more than {} s what came here is {here}; \
                 what was verified last stays in use. Is this cluster's controller connected, and does a broker hold \
                 back what it should pass on?",
                WITHHELD.as_secs()
            ),
        }
    };
    said.iter().map(finding).collect()
}

/// Work that may take long, where it holds up no other task.
fn heavy<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Whose the devices' keys are.
fn owners(members: &Members) -> impl Iterator<Item = (WireguardKey, NodeKey)> {
    let nodes =
        members.nodes.iter().flat_map(|(cluster, member)| member.nodes.values().map(move |n| (cluster, n)));
    nodes.flat_map(|(cluster, endpoint)| {
        let node = NodeKey { cluster: cluster.clone(), node: endpoint.node.clone() };
        endpoint.devices.values().map(move |device| (device.key, node.clone()))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_the_api_loses_stays_as_it_was_last_and_not_as_at_the_start() {
        let known = |mtu: &str| Observed {
            clusterset: Known::Yes(None),
            members: Known::Yes(BTreeMap::new()),
            member_nodes: Known::Yes(BTreeMap::new()),
            nodes: Known::Yes(
                [(
                    mtu.parse().unwrap(),
                    tombolo_agent_core::object::Node {
                        gateway: false,
                        ready: true,
                        pod_cidrs: BTreeSet::new(),
                        addresses: Vec::new(),
                    },
                )]
                .into(),
            ),
            imports: Known::Yes([].into()),
            slices: Known::Yes([].into()),
            ..Observed::default()
        };
        let mut last = Some(Arc::new(known("start")));
        for now in [known("later"), Observed::default(), Observed { nodes: Known::No, ..known("x") }] {
            last = Some(from_cache(Arc::new(now), last.as_ref()));
        }
        assert_eq!(last.unwrap().nodes, known("later").nodes);
    }
}
