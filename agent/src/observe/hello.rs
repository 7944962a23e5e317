//! Says hello over the tunnels, and hears others.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::desired::LANE_KEPT;
use tombolo_agent_core::hello::{Hello, Hellos, MAX_LEN, PORT, cannot_reach, untried};
use tombolo_agent_core::liveness::PeerId;
use tombolo_agent_core::object::NodeKey;
use tombolo_agent_core::world::Health;
use tombolo_proto::model::{ClusterId, DeviceNumber, Family, Position};
use tracing::debug;

use super::liveness::{Answers, Roster, pair};
use crate::apply::device::TunnelDriver;

/// Between readings of where peers are.
const LOOK: Duration = Duration::from_secs(10);
/// A socket that cannot be opened is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// Hellos that wait to be read.
const QUEUE: usize = 256;

/// What comes of hellos.
pub struct Heard {
    /// Liveness's answers, and what own gateways say.
    pub health: watch::Sender<Health>,
    /// What other clusters say that they have said, and that is not here.
    pub withheld: watch::Sender<BTreeMap<ClusterId, Position>>,
    /// By other cluster: where its nodes see this one.
    pub seen: watch::Sender<BTreeMap<ClusterId, BTreeSet<IpAddr>>>,
}

/// Runs until `stop`.
pub async fn run(
    mut roster: watch::Receiver<Option<Arc<Roster>>>,
    driver: Arc<dyn TunnelDriver>,
    mut answers: watch::Receiver<Answers>,
    follow: Heard,
    stop: CancellationToken,
) -> Result<()> {
    let (queue, mut heard) = mpsc::channel(QUEUE);
    let mut sockets = Sockets { open: BTreeMap::new(), queue };
    let mut task: Option<Task> = None;
    let mut look = Instant::now();
    loop {
        let Answers { alive, dead, young, known, narrow } = answers.borrow_and_update().clone();
        let new = roster.borrow_and_update().as_ref().map(Roster::first_lane);
        let mut wake = Instant::now() + LOOK;
        if let Some(new) = new {
            let task = Task::of(&mut task, &new);
            let complete = sockets.fit(&new);
            if look <= Instant::now() {
                task.seen(&*driver).await;
                look = Instant::now() + LOOK;
            }
            let now = task.start.elapsed();
            let reach =
                (cannot_reach(&new.devices, &dead), untried(&new.cluster, &new.devices, &dead, &alive));
            task.hellos.handle_content(now, reach, new.positions.clone());
            task.say(&sockets);
            let timeout = task.hellos.poll_timeout(task.start.elapsed()).map(|at| task.start + at);
            wake = timeout.into_iter().fold(look, Instant::min);
            if !complete {
                wake = wake.min(Instant::now() + RETRY);
            }
        }
        let unreachable = task.as_ref().map(|t| t.hellos.unreachable(t.start.elapsed())).unwrap_or_default();
        let untried = task.as_ref().map(|t| t.hellos.untried(t.start.elapsed())).unwrap_or_default();
        let young = match &task {
            Some(task) => task.hellos.early(task.start.elapsed(), &young, &alive),
            None => young,
        };
        let value = Health { dead, alive, young, narrow, known, unreachable, untried };
        let missed = task.as_ref().map(|t| t.hellos.withheld(t.start.elapsed())).unwrap_or_default();
        let seen = task.as_ref().map(|t| t.hellos.seen(t.start.elapsed())).unwrap_or_default();
        tell(&follow.withheld, missed);
        tell(&follow.health, value);
        tell(&follow.seen, seen);
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = answers.changed() => if changed.is_err() { return Ok(()) },
            changed = roster.changed() => if changed.is_err() { return Ok(()) },
            Some(datagram) = heard.recv() => {
                if let Some(task) = &mut task {
                    task.hear(datagram);
                }
            }
            () = tokio::time::sleep_until(wake.into()) => {}
        }
    }
}

fn tell<T: PartialEq>(whom: &watch::Sender<T>, value: T) {
    whom.send_if_modified(|old| {
        let differs = *old != value;
        *old = value;
        differs
    });
}

struct Datagram {
    number: DeviceNumber,
    from: IpAddr,
    bytes: Vec<u8>,
}

struct Task {
    start: Instant,
    roster: Arc<Roster>,
    hellos: Hellos,
}

impl Task {
    /// For this roster; hellos of another cluster than the own one before count no more.
    fn of<'a>(task: &'a mut Option<Self>, roster: &Arc<Roster>) -> &'a mut Self {
        let keep = task.take().filter(|task| task.roster.cluster == roster.cluster);
        let task = task.insert(keep.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let number = u64::try_from(since.as_micros()).unwrap_or_default();
            let empty = Roster { devices: BTreeMap::new(), ..Roster::clone(roster) };
            Self {
                start: Instant::now(),
                hellos: Hellos::new(roster.cluster.clone(), number),
                roster: Arc::new(empty),
            }
        }));
        if task.roster != *roster {
            task.roster = roster.clone();
            let peers: BTreeMap<PeerId, NodeKey> =
                roster.peers().map(|(id, _, peer)| (id, peer.node.clone())).collect();
            task.hellos.handle_peers(task.start.elapsed(), &peers);
        }
        task
    }

    /// Where the devices hear their peers from.
    async fn seen(&mut self, driver: &dyn TunnelDriver) {
        for &number in self.roster.devices.keys() {
            let Ok(state) = driver.read(number).await else { continue };
            let theirs = DeviceNumber::of(number.family(), self.roster.rank, number.lane());
            for (key, peer) in state.peers {
                if let Some(address) = peer.endpoint.filter(|_| peer.last_handshake.is_some()) {
                    self.hellos.handle_seen(self.start.elapsed(), (number, key), theirs, address);
                }
            }
        }
    }

    fn say(&mut self, sockets: &Sockets) {
        while let Some((id, bytes)) = self.hellos.poll_transmit(self.start.elapsed()) {
            let Some(device) = self.roster.devices.get(&id.0) else { continue };
            let Some((from, to)) = device.peers.get(&id.1).and_then(|peer| pair(device, peer)) else {
                continue;
            };
            if let Some((socket, _)) = sockets.open.get(&(id.0, from))
                && let Err(error) = socket.try_send_to(&bytes, SocketAddr::new(to, PORT))
            {
                debug!("hello to {to} by {}: {error}", id.0);
            }
        }
    }

    fn hear(&mut self, datagram: Datagram) {
        let Datagram { number, from, bytes } = datagram;
        let Some(device) = self.roster.devices.get(&number) else { return };
        let Some((key, peer)) = device.peers.iter().find(|(_, p)| p.tunnel.contains(&from)) else { return };
        match Hello::decode(&bytes) {
            Ok(hello) => {
                let unreachable = hello.cannot_reach.clone();
                if self.hellos.handle_hello(self.start.elapsed(), (number, *key), hello) {
                    debug!(?unreachable, "hello of {}", peer.node);
                }
            }
            Err(error) => debug!("from {} by {number}: {error}", peer.node),
        }
    }
}

/// A socket for each device and tunnel address, with the task that reads it.
struct Sockets {
    open: BTreeMap<(DeviceNumber, IpAddr), (Arc<UdpSocket>, AbortHandle)>,
    queue: mpsc::Sender<Datagram>,
}

impl Sockets {
    /// Opens and closes as the roster says. Whether all are open.
    fn fit(&mut self, roster: &Roster) -> bool {
        let wanted: BTreeSet<(DeviceNumber, IpAddr)> =
            roster.devices.iter().flat_map(|(n, d)| d.addresses.iter().map(move |a| (*n, *a))).collect();
        self.open.retain(|place, (_, reader)| {
            // One that cannot be read any more has lost its device.
            let keep = wanted.contains(place) && !reader.is_finished();
            if !keep {
                reader.abort();
            }
            keep
        });
        let mut complete = true;
        for place in wanted {
            if self.open.contains_key(&place) {
                continue;
            }
            match open(place.0, place.1) {
                Ok(socket) => {
                    let socket = Arc::new(socket);
                    let reader = tokio::spawn(read(place.0, socket.clone(), self.queue.clone()));
                    self.open.insert(place, (socket, reader.abort_handle()));
                }
                Err(error) => {
                    debug!("no hello on {} of {}: {error}; retrying", place.1, place.0);
                    complete = false;
                }
            }
        }
        complete
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.open.values().for_each(|(_, reader)| reader.abort());
    }
}

/// Hears only what its device brings: what was not in a tunnel counts for nothing.
fn open(number: DeviceNumber, address: IpAddr) -> io::Result<UdpSocket> {
    let domain = match Family::of(address) {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(number.link().as_bytes()))?;
    socket.set_mark(LANE_KEPT)?;
    socket.bind(&SocketAddr::new(address, PORT).into())?;
    UdpSocket::from_std(socket.into())
}

async fn read(number: DeviceNumber, socket: Arc<UdpSocket>, queue: mpsc::Sender<Datagram>) {
    let mut buffer = [0; MAX_LEN + 1];
    let mut failures = 0;
    // An error told by ICMP passes; a device that is gone stays so.
    while failures < 10 {
        match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => {
                failures = 0;
                let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                // Too many at once: what is lost is said again.
                let _ = queue.try_send(Datagram { number, from: from.ip(), bytes });
            }
            Err(_) => {
                failures += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
