//! What a tunnel device is told: its key, its port, its peers. Changed in place; a live peer is never removed and
//! added again, and never told where its other end is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use ipnet::IpNet;
use thiserror::Error;
use tombolo_agent_core::desired::{MARK, TunnelDevice};
use tombolo_agent_core::object::NodeKey;
use tombolo_proto::model::{DeviceNumber, WireguardKey};

use super::key::{DeviceKey, Pair};
use super::netlink::NetlinkError;

/// Seconds between keepalives: keeps NAT mappings, and makes silence mean something.
pub const KEEPALIVE: u16 = 10;
/// A session older than this is dead (WireGuard's REJECT_AFTER_TIME, 180 s, and a handshake's time to come).
const ALIVE: Duration = Duration::from_secs(185);
/// A peer that does not answer at one candidate is tried at the next after this time, at first.
const TRY: Duration = Duration::from_secs(10);
/// Doubled after each round, so often.
const TRY_DOUBLINGS: u32 = 3;

/// Makes and configures tunnel devices.
#[async_trait]
pub trait TunnelDriver: Send + Sync {
    /// The devices that this driver was told to keep.
    async fn list(&self) -> Result<BTreeSet<DeviceNumber>, DeviceError>;
    /// Makes a device and waits until it can be configured. Nothing happens if it is there. `true` if it was made.
    async fn create(&self, number: DeviceNumber) -> Result<bool, DeviceError>;
    /// Ends a device and waits until it is gone.
    async fn remove(&self, number: DeviceNumber) -> Result<(), DeviceError>;
    /// What a device is and knows.
    async fn read(&self, number: DeviceNumber) -> Result<DeviceState, DeviceError>;
    /// Changes a device; all or nothing.
    async fn write(&self, number: DeviceNumber, change: &DeviceChange<'_>) -> Result<(), DeviceError>;
}

/// Why a device is not as it should be.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A file or socket of it.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It did not come.
    #[error(
        "the device did not come up within {seconds} s: is `tombolo-wireguard serve --dir {}` running on this node? Its log says why", directory.display()
    )]
    Absent {
        /// Where devices are asked for.
        directory: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// It did not go.
    #[error("the device did not end within {seconds} s: is `tombolo-wireguard serve --dir {}` running on this node?", directory.display())]
    Stays {
        /// Where devices are asked for.
        directory: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// A link of that name belongs to somebody else.
    #[error("a link of this name exists and is not ours; rename or delete it (`ip link delete {0}`)")]
    Foreign(DeviceNumber),
    /// It does not speak UAPI.
    #[error("the device answered what is not UAPI: {0}")]
    Protocol(String),
    /// It refused.
    #[error("the device refused its configuration: {}", std::io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// The kernel's own WireGuard.
    #[error("{}", in_kernel(.0))]
    Kernel(NetlinkError),
    /// No key for it.
    #[error("there is no private key for this device")]
    NoKey,
    /// Asked for, but its link is not there yet.
    #[error("the device has no link yet")]
    NoLink,
}

fn in_kernel(error: &NetlinkError) -> String {
    if error.errno() == Some(libc::EOPNOTSUPP) {
        "this kernel has no WireGuard: load the module `wireguard`, or let the agent use --tunnel-driver userspace".to_owned()
    } else {
        format!("the kernel's WireGuard: {error}")
    }
}

/// A device as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceState {
    /// Public half of its key.
    pub key: Option<WireguardKey>,
    /// UDP port.
    pub port: u16,
    /// Mark of what it sends.
    pub mark: u32,
    /// By key.
    pub peers: BTreeMap<WireguardKey, PeerState>,
    /// Public half of the key that it answers to beside its own.
    pub previous: Option<WireguardKey>,
    /// How far the clock is behind the last call by its key, if it is: peers ignore its calls so long.
    pub behind: Option<Duration>,
}

/// A peer as the device knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerState {
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0: off.
    pub keepalive: u16,
    /// When the last handshake was completed, since 1970; `None`: never.
    pub last_handshake: Option<Duration>,
    /// Bytes received from it.
    pub received: u64,
    /// Bytes sent to it.
    pub sent: u64,
    /// What it may send.
    pub allowed: BTreeSet<IpNet>,
}

impl PeerState {
    /// Whether its session is young enough to carry packets.
    pub fn is_alive(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.last_handshake.is_some_and(|at| now.saturating_sub(at) < ALIVE)
    }
}

/// What to change; what is `None` or empty stays.
#[derive(Default)]
pub struct DeviceChange<'a> {
    /// Its identity.
    pub key: Option<&'a DeviceKey>,
    /// What it is to answer to as well; told only with `key`.
    pub previous: Option<&'a DeviceKey>,
    /// UDP port.
    pub port: Option<u16>,
    /// Mark of what it sends.
    pub mark: Option<u32>,
    /// In this order.
    pub peers: Vec<PeerChange>,
}

/// A change to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerChange {
    /// Whom.
    pub key: WireguardKey,
    /// What.
    pub what: PeerAction,
}

/// What happens to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerAction {
    /// A new peer.
    Add {
        /// Where to try first.
        endpoint: Option<SocketAddr>,
        /// What it may send.
        allowed: BTreeSet<IpNet>,
        /// The same node's key before: its sessions carry on until the new key's do.
        replaces: Option<WireguardKey>,
    },
    /// A peer that is there. An allowed IP moves from its old peer at once.
    Change {
        /// Where to try now.
        endpoint: Option<SocketAddr>,
        /// Whether the keepalive is to be set.
        keepalive: bool,
        /// What it may send from now on too.
        allow: BTreeSet<IpNet>,
        /// What it may not send any more.
        forbid: BTreeSet<IpNet>,
    },
    /// It goes.
    Remove,
}

impl DeviceChange<'_> {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.key.is_none() && self.port.is_none() && self.mark.is_none() && self.peers.is_empty()
    }
}

/// Peers that do not answer, and what was tried. Bounded by the peers there are.
#[derive(Default)]
pub(super) struct Attempts(BTreeMap<WireguardKey, Attempt>);

struct Attempt {
    since: Instant,
    times: u32,
}

impl Attempts {
    /// Where to try next, if it is time to. `peer` is not alive.
    fn next(
        &mut self,
        key: WireguardKey,
        peer: &PeerState,
        candidates: &[SocketAddr],
        now: Instant,
    ) -> Option<SocketAddr> {
        let first = *candidates.first()?;
        let Some(index) = candidates.iter().position(|c| Some(*c) == peer.endpoint) else {
            self.0.insert(key, Attempt { since: now, times: 0 });
            return Some(first);
        };
        let attempt = self.0.entry(key).or_insert(Attempt { since: now, times: 0 });
        let rounds = (attempt.times / u32::try_from(candidates.len()).unwrap_or(u32::MAX)).min(TRY_DOUBLINGS);
        if candidates.len() < 2 || now.saturating_duration_since(attempt.since) < TRY * (1 << rounds) {
            return None;
        }
        *attempt = Attempt { since: now, times: attempt.times.saturating_add(1) };
        Some(candidates[(index + 1) % candidates.len()])
    }
}

/// Which nodes' keys are, or were, peers.
pub(super) type Owners = BTreeMap<WireguardKey, NodeKey>;

/// The change that makes `actual` as `desired`.
pub(super) fn diff<'a>(
    number: DeviceNumber,
    desired: &TunnelDevice,
    keys: &'a Pair,
    actual: &DeviceState,
    owners: &Owners,
    attempts: &mut Attempts,
    (now, wall): (Instant, SystemTime),
) -> DeviceChange<'a> {
    attempts.0.retain(|key, _| desired.peers.contains_key(key));
    let other = actual.key != Some(keys.current.public());
    let mut change = DeviceChange {
        key: other.then_some(&keys.current),
        previous: keys.previous.as_ref().filter(|_| other),
        port: (actual.port != number.default_port()).then_some(number.default_port()),
        mark: (actual.mark != MARK).then_some(MARK),
        peers: Vec::new(),
    };
    let owner: BTreeMap<IpNet, WireguardKey> = desired
        .peers
        .iter()
        .flat_map(|(key, peer)| peer.allowed.iter().map(|prefix| (prefix.net(), *key)))
        .collect();
    // What arrives takes its allowed IPs along; what was left behind is forbidden after that.
    let mut later = Vec::new();
    for (&key, peer) in &desired.peers {
        let wanted: BTreeSet<IpNet> =
            peer.allowed.iter().map(|p| p.net()).filter(|net| owner.get(net) == Some(&key)).collect();
        let Some(there) = actual.peers.get(&key) else {
            attempts.0.insert(key, Attempt { since: now, times: 0 });
            let former = |(key, _): &(&WireguardKey, &PeerState)| {
                !desired.peers.contains_key(*key) && owners.get(*key) == Some(&peer.node)
            };
            let former = actual.peers.iter().find(former);
            // It is where it was.
            let endpoint =
                former.filter(|(_, state)| state.is_alive(wall)).and_then(|(_, state)| state.endpoint);
            let endpoint = endpoint.or(peer.candidates.first().copied());
            let replaces = former.map(|(key, _)| *key);
            change
                .peers
                .push(PeerChange { key, what: PeerAction::Add { endpoint, allowed: wanted, replaces } });
            continue;
        };
        let endpoint = if there.is_alive(wall) {
            attempts.0.remove(&key);
            None
        } else {
            attempts.next(key, there, &peer.candidates, now)
        };
        let allow: BTreeSet<IpNet> = wanted.difference(&there.allowed).copied().collect();
        let keepalive = there.keepalive != KEEPALIVE;
        if endpoint.is_some() || keepalive || !allow.is_empty() {
            let what = PeerAction::Change { endpoint, keepalive, allow, forbid: BTreeSet::new() };
            change.peers.push(PeerChange { key, what });
        }
        let forbid: BTreeSet<IpNet> =
            there.allowed.difference(&wanted).filter(|net| !owner.contains_key(net)).copied().collect();
        if !forbid.is_empty() {
            let what =
                PeerAction::Change { endpoint: None, keepalive: false, allow: BTreeSet::new(), forbid };
            later.push(PeerChange { key, what });
        }
    }
    change.peers.extend(later);
    let gone = actual.peers.keys().filter(|key| !desired.peers.contains_key(*key));
    change.peers.extend(gone.map(|key| PeerChange { key: *key, what: PeerAction::Remove }));
    change
}

#[cfg(test)]
mod tests {
    use tombolo_agent_core::desired::Peer;
    use tombolo_agent_core::object::NodeKey;
    use tombolo_proto::model::Lanes;

    use super::super::key::DeviceKeys;
    use super::*;

    fn peer(candidates: &[&str], allowed: &[&str]) -> Peer {
        Peer {
            node: NodeKey { cluster: "us".parse().unwrap(), node: "gw1".parse().unwrap() },
            candidates: candidates.iter().map(|c| c.parse().unwrap()).collect(),
            allowed: allowed.iter().map(|p| p.parse().unwrap()).collect(),
            tunnel: BTreeSet::new(),
        }
    }

    fn device(peers: &[(u8, Peer)]) -> TunnelDevice {
        TunnelDevice {
            mtu: 1420,
            addresses: BTreeSet::new(),
            peers: peers.iter().map(|(n, p)| (WireguardKey([*n; 32]), p.clone())).collect(),
        }
    }

    /// What a device is after a change, as WireGuard has it.
    fn applied(mut state: DeviceState, change: &DeviceChange<'_>) -> DeviceState {
        if let Some(key) = change.key {
            state.key = Some(key.public());
        }
        state.port = change.port.unwrap_or(state.port);
        state.mark = change.mark.unwrap_or(state.mark);
        for PeerChange { key, what } in &change.peers {
            let mut allow = BTreeSet::new();
            match what {
                PeerAction::Add { endpoint, allowed, replaces } => {
                    assert!(!state.peers.contains_key(key));
                    allow.clone_from(allowed);
                    let former = replaces.and_then(|key| state.peers.remove(&key)).unwrap_or_default();
                    let new = PeerState {
                        endpoint: *endpoint,
                        keepalive: KEEPALIVE,
                        allowed: BTreeSet::new(),
                        ..former
                    };
                    state.peers.insert(*key, new);
                }
                PeerAction::Change { endpoint, keepalive, allow: more, forbid } => {
                    allow.clone_from(more);
                    let peer = state.peers.get_mut(key).unwrap();
                    peer.endpoint = endpoint.or(peer.endpoint);
                    if *keepalive {
                        peer.keepalive = KEEPALIVE;
                    }
                    peer.allowed.retain(|net| !forbid.contains(net));
                }
                PeerAction::Remove => drop(state.peers.remove(key)),
            }
            for peer in state.peers.values_mut() {
                peer.allowed.retain(|net| !allow.contains(net));
            }
            if let Some(peer) = state.peers.get_mut(key) {
                peer.allowed.extend(allow);
            }
        }
        state
    }

    struct Case {
        keys: DeviceKeys,
        pair: Option<std::sync::Arc<Pair>>,
        owners: Owners,
        attempts: Attempts,
        now: Instant,
        wall: SystemTime,
    }

    impl Case {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let keys = DeviceKeys::load(dir.path(), Lanes::ONE).unwrap_or_else(|e| panic!("{e}"));
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            Self {
                keys,
                pair: None,
                owners: Owners::new(),
                attempts: Attempts::default(),
                now: Instant::now(),
                wall,
            }
        }

        fn diff(&mut self, desired: &TunnelDevice, actual: &DeviceState) -> DeviceChange<'_> {
            let number = DeviceNumber::new(1).unwrap();
            self.pair = self.keys.get(number);
            let pair = self.pair.as_ref().unwrap();
            diff(number, desired, pair, actual, &self.owners, &mut self.attempts, (self.now, self.wall))
        }
    }

    #[test]
    fn the_second_diff_is_empty() {
        let mut case = Case::new();
        let desired = device(&[
            (1, peer(&["192.0.2.1:4511", "[2001:db8::1]:4511"], &["10.1.0.0/16", "fd00:1::/48"])),
            (2, peer(&[], &["10.2.0.0/16"])),
        ]);
        let state = applied(DeviceState::default(), &case.diff(&desired, &DeviceState::default()));
        assert!(case.diff(&desired, &state).is_empty());
        assert_eq!((state.port, state.mark), (4511, MARK));
    }

    #[test]
    fn an_allowed_ip_moves_without_a_moment_without_owner() {
        let mut case = Case::new();
        let before =
            device(&[(1, peer(&[], &["10.1.0.0/16", "10.3.0.0/16"])), (2, peer(&[], &["10.2.0.0/16"]))]);
        let after =
            device(&[(1, peer(&[], &["10.1.0.0/16"])), (2, peer(&[], &["10.2.0.0/16", "10.3.0.0/16"]))]);
        let state = applied(DeviceState::default(), &case.diff(&before, &DeviceState::default()));
        let change = case.diff(&after, &state);
        let [PeerChange { key, what: PeerAction::Change { allow, forbid, .. } }] = &change.peers[..] else {
            panic!()
        };
        assert_eq!((key.0[0], allow.len(), forbid.len()), (2, 1, 0));
        let state = applied(state, &change);
        assert!(case.diff(&after, &state).is_empty());
    }

    #[test]
    fn a_live_peer_roams_and_a_dead_one_is_tried_elsewhere() {
        let mut case = Case::new();
        let desired = device(&[(1, peer(&["192.0.2.1:4511", "192.0.2.2:4511"], &[]))]);
        let mut state = applied(DeviceState::default(), &case.diff(&desired, &DeviceState::default()));
        let key = WireguardKey([1; 32]);
        let wall = case.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let roamed = Some("198.51.100.7:9".parse().unwrap());
        {
            let peer = state.peers.get_mut(&key).unwrap();
            peer.endpoint = roamed;
            peer.last_handshake = Some(wall);
        }
        assert!(case.diff(&desired, &state).is_empty());
        case.wall += Duration::from_secs(200);
        let change = case.diff(&desired, &state);
        let state = applied(state, &change);
        assert_eq!(state.peers[&key].endpoint, Some("192.0.2.1:4511".parse().unwrap()));
        assert!(case.diff(&desired, &state).is_empty());
        case.now += Duration::from_secs(11);
        let change = case.diff(&desired, &state);
        let state = applied(state, &change);
        assert_eq!(state.peers[&key].endpoint, Some("192.0.2.2:4511".parse().unwrap()));
        assert!(case.diff(&desired, &state).is_empty());
    }

    #[test]
    fn a_node_with_a_new_key_takes_over_from_itself_alone() {
        let mut case = Case::new();
        let named = |name: &str| {
            let mut peer = peer(&["192.0.2.1:4511"], &["10.1.0.0/16"]);
            peer.node.node = name.parse().unwrap();
            peer
        };
        let before = device(&[(1, named("gw1"))]);
        let mut state = applied(DeviceState::default(), &case.diff(&before, &DeviceState::default()));
        let wall = case.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let roamed = Some("198.51.100.7:9".parse().unwrap());
        {
            let peer = state.peers.get_mut(&WireguardKey([1; 32])).unwrap();
            (peer.endpoint, peer.last_handshake) = (roamed, Some(wall));
        }
        case.owners = [(WireguardKey([1; 32]), before.peers[&WireguardKey([1; 32])].node.clone())].into();
        // Another node takes its place: it has nothing to do with the sessions of the first.
        let change = case.diff(&device(&[(2, named("gw2"))]), &state);
        let PeerAction::Add { replaces, endpoint, .. } = &change.peers[0].what else { panic!() };
        assert_eq!((*replaces, endpoint.map(|e| e.to_string()).as_deref()), (None, Some("192.0.2.1:4511")));
        // It did not come to that; now it is itself that has a new key.
        let after = device(&[(3, named("gw1"))]);
        let change = case.diff(&after, &state);
        let PeerAction::Add { replaces, endpoint, .. } = &change.peers[0].what else { panic!() };
        assert_eq!((*replaces, *endpoint), (Some(WireguardKey([1; 32])), roamed));
        let state = applied(state, &change);
        assert!(case.diff(&after, &state).is_empty());
    }

    #[test]
    fn a_peer_that_goes_leaves_its_allowed_ips() {
        let mut case = Case::new();
        let before = device(&[(1, peer(&[], &["10.1.0.0/16"]))]);
        let after = device(&[(2, peer(&[], &["10.1.0.0/16"]))]);
        let state = applied(DeviceState::default(), &case.diff(&before, &DeviceState::default()));
        let change = case.diff(&after, &state);
        let state = applied(state, &change);
        assert_eq!(state.peers.len(), 1);
        assert!(case.diff(&after, &state).is_empty());
    }
}
