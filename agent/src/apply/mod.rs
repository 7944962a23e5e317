//! Makes the node as [`NodeDesired`] says, and decides nothing.
//!
//! Each applier reads what is there and bears our marks, compares, adds before it removes, and reports what it did.
//! A key that fails is reported and left for the next time, while the others proceed. What is as it should be is not
//! written: the second apply of the same makes no change ([`Writes`] counts).
//!
//! Our marks: links named `tombolo<n>` with alias `tombolo`; routes of tables 4510 to 4517 and 4520 to 4527 with protocol
//! 98; rules with protocol 98; the nft table `inet tombolo`.

pub mod device;
pub mod driver;
pub mod firewall;
pub mod kernel;
pub mod key;
pub mod link;
pub mod netlink;
pub mod route;
pub mod rule;
pub mod uapi;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use futures::future::join_all;
use serde::{Serialize, Serializer};
use thiserror::Error;
use tombolo_agent_core::desired::{NodeDesired, Rule, TunnelDevice};
use tombolo_agent_core::object::NodeKey;
use tombolo_proto::model::{DeviceNumber, WireguardKey};

use device::{Attempts, DeviceError, DeviceState, Owners, PeerAction, TunnelDriver};
use firewall::{FirewallError, Nft};
use key::{DeviceKeys, KeyError};
use link::ALIAS;
use netlink::{Links, Netlink, NetlinkError};
use route::RouteKey;

/// Where things are.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where devices are asked for, a file each.
    pub devices: PathBuf,
    /// Where UAPI sockets are.
    pub sockets: PathBuf,
    /// The program nft.
    pub nft: PathBuf,
    /// What new devices are.
    pub driver: driver::Choice,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            devices: "/run/tombolo/devices".into(),
            sockets: "/var/run/wireguard".into(),
            nft: "nft".into(),
            driver: driver::Choice::Auto,
        }
    }
}

/// Reads what the firewall has dropped, for whoever applies nothing.
pub struct Drops(Nft);

impl Drops {
    /// With the same programs as [`Appliers`].
    pub fn new(options: &Options) -> Self {
        Self(Nft::new(options.nft.clone(), Arc::default()))
    }

    /// Packets, by counter.
    ///
    /// # Errors
    /// If nft cannot be run, or answers something else.
    pub async fn read(&self) -> Result<BTreeMap<String, u64>, FirewallError> {
        self.0.drops().await
    }
}

/// Counts what was written, since the start.
#[derive(Debug, Default)]
pub struct Writes {
    netlink: AtomicU64,
    nft: AtomicU64,
    uapi: AtomicU64,
    device: AtomicU64,
}

/// The counts at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct WriteCounts {
    /// Netlink requests that change something.
    pub netlink: u64,
    /// nft scripts.
    pub nft: u64,
    /// UAPI requests that change something.
    pub uapi: u64,
    /// Devices asked for or let go.
    pub device: u64,
}

impl Writes {
    fn netlink(&self) {
        self.netlink.fetch_add(1, Ordering::Relaxed);
    }

    fn nft(&self) {
        self.nft.fetch_add(1, Ordering::Relaxed);
    }

    fn uapi(&self) {
        self.uapi.fetch_add(1, Ordering::Relaxed);
    }

    fn device(&self) {
        self.device.fetch_add(1, Ordering::Relaxed);
    }

    /// Now.
    pub fn counts(&self) -> WriteCounts {
        WriteCounts {
            netlink: self.netlink.load(Ordering::Relaxed),
            nft: self.nft.load(Ordering::Relaxed),
            uapi: self.uapi.load(Ordering::Relaxed),
            device: self.device.load(Ordering::Relaxed),
        }
    }
}

impl WriteCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.netlink + self.nft + self.uapi + self.device
    }
}

/// Why something is not as it should be.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The kernel.
    #[error(transparent)]
    Netlink(NetlinkError),
    /// A tunnel device.
    #[error(transparent)]
    Device(DeviceError),
    /// nft.
    #[error(transparent)]
    Firewall(FirewallError),
    /// The keys' files.
    #[error(transparent)]
    Key(KeyError),
    /// A route over a device that is not there.
    #[error("{0} is not there to carry it")]
    NoDevice(DeviceNumber),
}

/// What was, or was not, changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    /// A tunnel device: its link, key, port.
    Device(DeviceNumber),
    /// All links or devices: they could not be read.
    Devices,
    /// An address on a device.
    Address(DeviceNumber, IpAddr),
    /// A peer of a device.
    Peer(DeviceNumber, WireguardKey),
    /// A route.
    Route(RouteKey),
    /// All routes: they could not be read.
    Routes,
    /// A rule; `None` for one that we never make.
    Rule(Option<Rule>),
    /// All rules: they could not be read.
    Rules,
    /// The nft table, with its chains.
    Firewall,
    /// Elements of a set or map in it.
    Elements(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(number) => write!(f, "device {number}"),
            Self::Devices => f.write_str("devices"),
            Self::Address(number, address) => write!(f, "address {address} on {number}"),
            Self::Peer(number, key) => write!(f, "peer {key} of {number}"),
            Self::Route(key) => write!(f, "route {key}"),
            Self::Routes => f.write_str("routes"),
            Self::Rule(Some(rule)) => {
                write!(f, "rule {} ({:?}) to table {}", rule.priority, rule.selector, rule.table)
            }
            Self::Rule(None) => f.write_str("rule of unknown shape"),
            Self::Rules => f.write_str("rules"),
            Self::Firewall => f.write_str("table inet tombolo"),
            Self::Elements(set) => write!(f, "elements of {set} in table inet tombolo"),
        }
    }
}

/// What happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It was not there.
    Added,
    /// It was different.
    Changed,
    /// It was there and ours, and is not desired.
    Removed,
}

/// One change that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// What.
    pub action: Action,
    /// To what.
    pub subject: Subject,
}

/// One thing that could not be made so; it is to be tried again.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// What.
    pub subject: Subject,
    /// Why.
    #[serde(serialize_with = "as_text")]
    pub error: ApplyError,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.error)
    }
}

fn as_text<S: Serializer>(error: &ApplyError, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(error)
}

/// What an apply did.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Changes made, in order.
    pub applied: Vec<Applied>,
    /// What is not as it should be.
    pub failures: Vec<Failure>,
    /// Devices whose key's last call is later than the clock, and by how much: peers ignore their calls.
    pub behind: BTreeMap<DeviceNumber, Duration>,
}

impl Report {
    /// Whether everything is as desired.
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }

    fn note(&mut self, subject: Subject, action: Action, result: Result<(), ApplyError>) {
        match result {
            Ok(()) => self.applied.push(Applied { action, subject }),
            Err(error) => self.failures.push(Failure { subject, error }),
        }
    }

    fn fail(&mut self, subject: Subject, error: ApplyError) {
        self.failures.push(Failure { subject, error });
    }

    fn take<T>(&mut self, subject: Subject, result: Result<T, ApplyError>) -> Option<T> {
        result.map_err(|error| self.fail(subject, error)).ok()
    }

    fn extend(&mut self, other: Self) {
        self.applied.extend(other.applied);
        self.failures.extend(other.failures);
        self.behind.extend(other.behind);
    }
}

/// All appliers of a node. They work in the network namespace in which they were made.
pub struct Appliers {
    netlink: Netlink,
    driver: Box<dyn TunnelDriver>,
    nft: Nft,
    keys: Arc<DeviceKeys>,
    attempts: BTreeMap<DeviceNumber, Attempts>,
    owners: Owners,
    writes: Arc<Writes>,
    /// Devices, routes and rules as the last apply left them, if all of it went well.
    settled: Option<NodeDesired>,
}

impl Appliers {
    /// With devices of the kernel or of userspace. Needs a tokio runtime.
    pub fn new(options: Options, keys: Arc<DeviceKeys>) -> io::Result<Self> {
        let writes = Arc::new(Writes::default());
        let Options { devices, sockets, nft, driver } = options;
        let driver = driver::Drivers::open(driver, devices, sockets, writes.clone())?;
        Self::with_driver(Box::new(driver), nft, keys, writes)
    }

    /// With devices of any kind; `writes` is what the driver counts in.
    pub fn with_driver(
        driver: Box<dyn TunnelDriver>,
        nft: PathBuf,
        keys: Arc<DeviceKeys>,
        writes: Arc<Writes>,
    ) -> io::Result<Self> {
        let netlink = Netlink::open(writes.clone())?;
        let nft = Nft::new(nft, writes.clone());
        Ok(Self {
            netlink,
            driver,
            nft,
            keys,
            attempts: BTreeMap::new(),
            owners: Owners::new(),
            writes,
            settled: None,
        })
    }

    /// Whose keys these were before this process: a node that has another one takes over from itself.
    pub fn remember(&mut self, owners: impl IntoIterator<Item = (WireguardKey, NodeKey)>) {
        self.owners.extend(owners);
    }

    /// What was written since the start.
    pub fn writes(&self) -> Arc<Writes> {
        self.writes.clone()
    }

    /// What the devices that are there know of themselves and their peers.
    pub async fn tunnels(&self) -> Result<BTreeMap<DeviceNumber, DeviceState>, DeviceError> {
        let numbers = self.driver.list().await?;
        let states = join_all(numbers.iter().map(|n| self.driver.read(*n))).await;
        Ok(numbers.into_iter().zip(states).filter_map(|(n, state)| Some((n, state.ok()?))).collect())
    }

    /// What the firewall has dropped, in packets, by why.
    pub async fn drops(&self) -> Result<BTreeMap<String, u64>, FirewallError> {
        self.nft.drops().await
    }

    /// Makes it so. Adds in an order in which nothing is sent, translated or let in wrongly meanwhile: firewall, devices with
    /// their addresses and peers, routes, rules; then removes in reverse. The firewall comes first, since what arrives by a
    /// new device before its routes are there would otherwise leave in clear by the default route.
    pub async fn apply(&mut self, desired: &NodeDesired) -> Report {
        let mut report = Report::default();
        // Without its firewall a node opens no tunnel and no way: it would let everything in.
        let mut guarded = true;
        if let Some(firewall) = desired.firewall.get() {
            let applied = self.nft.apply(firewall).await;
            guarded = applied.is_clean();
            report.extend(applied);
        }
        if let Some(devices) = desired.devices.get()
            && guarded
        {
            self.add_devices(devices, &mut report).await;
        }
        let mut routes = None;
        if let Some(desired) = desired.routes.get() {
            routes = self.add_routes(desired, &mut report).await;
        }
        if let Some(desired) = desired.rules.get() {
            let actual = rule::read(&self.netlink).await.map_err(ApplyError::Netlink);
            if let Some(actual) = report.take(Subject::Rules, actual) {
                let diff = rule::diff(desired, actual);
                diff.add(&self.netlink, &mut report).await;
                diff.remove(&self.netlink, &mut report).await;
            }
        }
        if let Some(diff) = routes {
            diff.remove(&self.netlink, &mut report).await;
        }
        if let Some(devices) = desired.devices.get() {
            self.remove_devices(|number| devices.contains_key(&number), &mut report).await;
        }
        self.settled = report.is_clean().then(|| NodeDesired {
            devices: desired.devices.clone(),
            routes: desired.routes.clone(),
            rules: desired.rules.clone(),
            ..NodeDesired::default()
        });
        report
    }

    /// The same where nothing but `desired` can have changed since the last apply, in the kernel as little as among the
    /// peers: what is desired as it was is not looked at.
    pub async fn apply_news(&mut self, desired: &NodeDesired) -> Report {
        let same = self.settled.as_ref().is_some_and(|settled| {
            settled.devices == desired.devices
                && settled.routes == desired.routes
                && settled.rules == desired.rules
        });
        if !same {
            return self.apply(desired).await;
        }
        let mut report = Report::default();
        if let Some(firewall) = desired.firewall.get() {
            report.extend(self.nft.apply(firewall).await);
        }
        if !report.is_clean() {
            self.settled = None;
        }
        report
    }

    /// Removes all that bears our marks from this node, but the keys.
    pub async fn cleanup(&mut self) -> Report {
        self.settled = None;
        let mut report = Report::default();
        let rules = rule::read(&self.netlink).await.map_err(ApplyError::Netlink);
        if let Some(actual) = report.take(Subject::Rules, rules) {
            rule::diff(&BTreeSet::new(), actual).remove(&self.netlink, &mut report).await;
        }
        if let Some(diff) = self.add_routes(&BTreeSet::new(), &mut report).await {
            diff.remove(&self.netlink, &mut report).await;
        }
        report.extend(self.nft.cleanup().await);
        self.remove_devices(|_| false, &mut report).await;
        report
    }

    async fn links(&self) -> Result<Links, ApplyError> {
        self.netlink.links().await.map_err(ApplyError::Netlink)
    }

    async fn add_routes(
        &self,
        desired: &BTreeSet<tombolo_agent_core::desired::Route>,
        report: &mut Report,
    ) -> Option<route::Diff> {
        let links = self.links().await;
        let links = report.take(Subject::Routes, links)?;
        let actual = route::read(&self.netlink, &links).await.map_err(ApplyError::Netlink);
        let actual = report.take(Subject::Routes, actual)?;
        let (diff, missing) = route::diff(desired, &actual, |number| links.device(number).is_some());
        for (key, number) in missing {
            report.fail(Subject::Route(key), ApplyError::NoDevice(number));
        }
        diff.add(&self.netlink, &links, report).await;
        Some(diff)
    }

    async fn add_devices(&mut self, devices: &BTreeMap<DeviceNumber, TunnelDevice>, report: &mut Report) {
        let listed = self.driver.list().await.map_err(ApplyError::Device);
        let Some(listed) = report.take(Subject::Devices, listed) else { return };
        let links = self.links().await;
        let Some(links) = report.take(Subject::Devices, links) else { return };
        let created =
            join_all(devices.keys().map(|&number| {
                let foreign = !listed.contains(&number)
                    && links.device(number).is_some_and(|link| link.alias.as_deref() != Some(ALIAS));
                let driver = &self.driver;
                async move {
                    if foreign { Err(DeviceError::Foreign(number)) } else { driver.create(number).await }
                }
            }))
            .await;
        let mut ready = Vec::new();
        for ((&number, device), created) in devices.iter().zip(created) {
            let subject = Subject::Device(number);
            match created {
                Ok(made) => {
                    if made {
                        report.note(subject, Action::Added, Ok(()));
                    }
                    ready.push((number, device));
                }
                Err(error) => report.fail(subject, ApplyError::Device(error)),
            }
        }
        // Those that were just made have links now.
        let links = self.links().await;
        let Some(links) = report.take(Subject::Devices, links) else { return };
        let addresses = link::addresses(&self.netlink).await.map_err(ApplyError::Netlink);
        let Some(addresses) = report.take(Subject::Devices, addresses) else { return };
        self.attempts.retain(|number, _| devices.contains_key(number));
        for number in self.keys.public(None).into_keys().filter(|number| !devices.contains_key(number)) {
            let handled = self.keys.handle_device(number, None).map_err(ApplyError::Key);
            report.take(Subject::Device(number), handled);
        }
        for (number, device) in ready {
            let Some(link) = links.device(number) else {
                report.fail(Subject::Device(number), ApplyError::Device(DeviceError::NoLink));
                continue;
            };
            match link::configure(&self.netlink, link, device.mtu).await {
                Ok(false) => {}
                other => report.note(
                    Subject::Device(number),
                    Action::Changed,
                    other.map(drop).map_err(ApplyError::Netlink),
                ),
            }
            self.set_addresses(number, link.index, device, addresses.get(&link.index), report).await;
            self.set_peers(number, device, report).await;
        }
        // What failed is tried again, and then the old key is still there.
        if report.is_clean() {
            self.owners.clear();
        }
        let peers = devices.values().flat_map(|device| &device.peers);
        self.owners.extend(peers.map(|(key, peer)| (*key, peer.node.clone())));
    }

    async fn set_addresses(
        &self,
        number: DeviceNumber,
        index: u32,
        device: &TunnelDevice,
        actual: Option<&BTreeSet<(IpAddr, u8)>>,
        report: &mut Report,
    ) {
        let desired: BTreeSet<_> = device.addresses.iter().map(|a| (*a, link::host_length(*a))).collect();
        let none = BTreeSet::new();
        let actual = actual.unwrap_or(&none);
        for (address, _) in desired.difference(actual) {
            let result = link::add(&self.netlink, index, *address).await.map_err(ApplyError::Netlink);
            report.note(Subject::Address(number, *address), Action::Added, result);
        }
        for address in actual.difference(&desired) {
            let result = link::remove(&self.netlink, index, *address).await.map_err(ApplyError::Netlink);
            report.note(Subject::Address(number, address.0), Action::Removed, result);
        }
    }

    async fn set_peers(&mut self, number: DeviceNumber, device: &TunnelDevice, report: &mut Report) {
        let subject = Subject::Device(number);
        let Some(pair) = self.keys.get(number) else {
            return report.fail(subject, ApplyError::Device(DeviceError::NoKey));
        };
        let actual = self.driver.read(number).await.map_err(ApplyError::Device);
        let Some(actual) = report.take(subject.clone(), actual) else { return };
        let attempts = self.attempts.entry(number).or_default();
        let change = device::diff(
            number,
            device,
            &pair,
            &actual,
            &self.owners,
            attempts,
            (Instant::now(), SystemTime::now()),
        );
        if change.is_empty() {
            return self.handle_keys(number, &actual, report);
        }
        if let Err(error) = self.driver.write(number, &change).await {
            return report.fail(subject, ApplyError::Device(error));
        }
        if change.key.is_some() {
            // With its key it knows how long ago that one called.
            let actual = self.driver.read(number).await.map_err(ApplyError::Device);
            let Some(actual) = report.take(subject.clone(), actual) else { return };
            self.handle_keys(number, &actual, report);
        } else {
            self.handle_keys(number, &actual, report);
        }
        if change.key.is_some() || change.port.is_some() || change.mark.is_some() {
            report.note(subject, Action::Changed, Ok(()));
        }
        for peer in &change.peers {
            let action = match peer.what {
                PeerAction::Add { .. } => Action::Added,
                PeerAction::Change { .. } => Action::Changed,
                PeerAction::Remove => Action::Removed,
            };
            report.note(Subject::Peer(number, peer.key), action, Ok(()));
        }
    }

    fn handle_keys(&self, number: DeviceNumber, actual: &DeviceState, report: &mut Report) {
        let has = actual.key.map(|key| (key, actual.previous));
        // Without a key it is not configured yet.
        if has.is_some() {
            let handled = self.keys.handle_device(number, has).map_err(ApplyError::Key);
            report.take(Subject::Device(number), handled);
        }
        if let Some(behind) = actual.behind {
            report.behind.insert(number, behind);
        }
    }

    async fn remove_devices(&mut self, keep: impl Fn(DeviceNumber) -> bool, report: &mut Report) {
        let listed = self.driver.list().await.map_err(ApplyError::Device);
        let Some(listed) = report.take(Subject::Devices, listed) else { return };
        let gone: Vec<_> = listed.into_iter().filter(|number| !keep(*number)).collect();
        let results = join_all(gone.iter().map(|number| self.driver.remove(*number))).await;
        for (number, result) in gone.into_iter().zip(results) {
            self.attempts.remove(&number);
            report.note(Subject::Device(number), Action::Removed, result.map_err(ApplyError::Device));
        }
    }
}
