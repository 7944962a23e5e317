//! A running broker.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_broker_core::Admission;
use tombolo_proto::model::ClusterId;
use tombolo_proto::pb::exchange_server::ExchangeServer;
use tombolo_proto::wire::Documents;
use tombolo_replica::{Interest, OriginState, Replica};
use tombolo_tls::server::{Accepted, Acceptor};
use tombolo_tls::{MAX_MESSAGE, TlsError};
use tonic::transport::Server;
use tracing::{debug, info, warn};

use crate::admin;
use crate::config::Config;
use crate::persist::Persister;
use crate::service::Service;
use crate::shared::{Counted, Hooks, Shared, unix_now};
use crate::store::{Store, StoreError};

/// Connections at once, and of them from one address (one /64 is not summed up: controllers are few).
const CONNECTIONS: usize = 4096;
const CONNECTIONS_PER_ADDRESS: usize = 512;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// HTTP/2 pings on a silent connection, and how long the answer may take.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long the last messages may take when the broker goes down.
const DRAIN: Duration = Duration::from_secs(3);
/// How long a broker that began with an empty store takes late bindings (see [`Admission`]).
const RELEARN: Duration = Duration::from_secs(600);

/// Why a broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// From the system.
        reason: io::Error,
    },
    /// The key.
    #[error("{0}")]
    Tls(TlsError),
    /// The store.
    #[error("{0}")]
    Store(StoreError),
}

/// A broker that runs until [`Broker::stop`].
pub struct Broker {
    shared: Arc<Shared>,
    address: SocketAddr,
    admin: Option<SocketAddr>,
    tasks: Vec<JoinHandle<()>>,
    _gone: DropGuard,
}

impl Broker {
    /// Takes back what the store holds, then listens. Returns once it does.
    pub async fn start(config: Config, mut store: Box<dyn Store>, hooks: Hooks) -> Result<Self, StartError> {
        let mut replica = Replica::new(config.set.roots.clone(), Interest::All).with_quota(config.quota);
        let brokers = Some(config.set.brokers.envelope().clone());
        replica.offer_documents(&Documents { brokers, ..Documents::default() });
        let (written, stale) = restore(&mut replica, store.as_mut()).map_err(StartError::Store)?;
        let own = config.identity.public();
        if !replica.brokers().is_some_and(|list| list.brokers.iter().any(|broker| broker.key == own)) {
            warn!(key = %own, "this broker's key is not in the set's list of brokers: no member will trust it");
        }
        let empty = replica.memberships().next().is_none();
        let admission = Admission { relearn_until: empty.then(|| unix_now() + RELEARN.as_secs()) };
        let acceptor = Acceptor::new(&config.identity).map_err(StartError::Tls)?;
        let listener = listen(config.listen).await?;
        let address = local(&listener, config.listen)?;
        info!(%address, set = %replica.set(), name = %replica.roots().current().name, "listening");
        let shared = Arc::new(Shared::new(replica, admission, hooks));

        let mut tasks = vec![tokio::spawn(Persister::new(store, written, stale).run(shared.clone()))];
        let mut admin_address = None;
        let gone = CancellationToken::new();
        if let Some(configured) = config.admin {
            let listener = listen(configured).await?;
            admin_address = Some(local(&listener, configured)?);
            let (router, gone) = (admin::router(shared.clone()), gone.clone());
            // Answers "not ready" while the sessions drain.
            tokio::spawn(async move {
                let serve = axum::serve(listener, router).into_future();
                tokio::select! { _ = serve => {}, () = gone.cancelled() => {} }
            });
        }
        let (accepted, incoming) = mpsc::channel(64);
        tasks.push(tokio::spawn(accept(shared.clone(), listener, acceptor, accepted)));
        tasks.push(tokio::spawn(serve(shared.clone(), incoming)));
        Ok(Self { shared, address, admin: admin_address, tasks, _gone: gone.drop_guard() })
    }

    /// Where members come.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where health and metrics are.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Looks at what is held.
    pub fn with_replica<T>(&self, look: impl FnOnce(&Replica) -> T) -> T {
        look(&self.shared.replica())
    }

    /// Changes what is held, as an evil broker might; wakes the sessions.
    pub fn with_replica_mut<T>(&self, change: impl FnOnce(&mut Replica) -> T) -> T {
        let mut replica = self.shared.replica();
        let result = change(&mut replica);
        self.shared.announce(&replica);
        result
    }

    /// Tells the sessions to go, writes the store, and returns within five seconds.
    pub async fn stop(self) {
        self.shared.stop.cancel();
        let deadline = tokio::time::Instant::now() + DRAIN + Duration::from_secs(1);
        for mut task in self.tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                task.abort();
            }
        }
        info!("stopped");
    }
}

type Written = BTreeMap<ClusterId, Arc<OriginState>>;

/// What the replica took back, and what in the store is of no use.
fn restore(
    replica: &mut Replica,
    store: &mut dyn Store,
) -> Result<(Written, BTreeSet<ClusterId>), StoreError> {
    let stored = store.load()?;
    if stored.unreadable > 0 {
        warn!(count = stored.unreadable, "parts of the store cannot be read; the members bring them back");
    }
    for documents in &stored.documents {
        for refusal in replica.offer_documents(documents) {
            warn!("from the store: {refusal}");
        }
    }
    let mut stale = BTreeSet::new();
    for origin in stored.origins {
        let leaves = origin.leaves();
        let restored = replica.restore(&origin.statement, leaves, origin.namespaces_hash, origin.records);
        if let Err(refusal) = restored {
            warn!("from the store: {refusal}; the members bring it back");
        }
        if replica.origin(&origin.cluster).is_none() {
            stale.insert(origin.cluster);
        }
    }
    let written: Written = replica.origins().map(|(name, state)| (name.clone(), state.clone())).collect();
    info!(members = replica.memberships().count(), origins = written.len(), "took back what the store holds");
    Ok((written, stale))
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(listener),
        // No IPv6 on this machine: "all addresses" then means all of IPv4.
        Err(error)
            if address.ip() == IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
                && error.kind() != io::ErrorKind::AddrInUse =>
        {
            warn!(%address, %error, "no IPv6 here, listening on IPv4 alone");
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            TcpListener::bind(v4).await.map_err(|reason| StartError::Listen { address: v4, reason })
        }
        Err(reason) => Err(StartError::Listen { address, reason }),
    }
}

fn local(listener: &TcpListener, address: SocketAddr) -> Result<SocketAddr, StartError> {
    listener.local_addr().map_err(|reason| StartError::Listen { address, reason })
}

/// Accepts and shakes hands, many at once; who is slow waits alone.
async fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    acceptor: Acceptor,
    accepted: mpsc::Sender<Accepted>,
) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (stream, address) = tokio::select! {
            () = shared.stop.cancelled() => return,
            result = listener.accept() => match result {
                Ok(connection) => connection,
                Err(error) => {
                    // Out of descriptors, or a connection that went at once.
                    debug!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            },
        };
        let ip = address.ip().to_canonical();
        let permit = connections.clone().try_acquire_owned().ok();
        let counted = Counted::take(&shared, ip, CONNECTIONS_PER_ADDRESS, |shared| &shared.addresses);
        let (Some(permit), Some(counted)) = (permit, counted) else {
            shared.metrics.handshake("limited");
            continue;
        };
        let guard = (permit, counted, Connection::new(&shared));
        tokio::spawn(shake(shared.clone(), acceptor.clone(), stream, address, guard, accepted.clone()));
    }
}

async fn shake(
    shared: Arc<Shared>,
    acceptor: Acceptor,
    stream: TcpStream,
    address: SocketAddr,
    guard: impl Send + Sync + Unpin + 'static,
    accepted: mpsc::Sender<Accepted>,
) {
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream, address)).await {
        Ok(Ok(connection)) => {
            shared.metrics.handshake("done");
            let _ = accepted.send(connection.with_guard(guard)).await;
        }
        Ok(Err(error)) => {
            shared.metrics.handshake("failed");
            debug!(%address, %error, "no TLS");
        }
        Err(_) => {
            shared.metrics.handshake("late");
            debug!(%address, "no TLS in time");
        }
    }
}

/// Counts an open connection.
struct Connection(Arc<Shared>);

impl Connection {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.metrics.connections.inc();
        Self(shared.clone())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

async fn serve(shared: Arc<Shared>, incoming: mpsc::Receiver<Accepted>) {
    let service = ExchangeServer::new(Service { shared: shared.clone() })
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(8)
        .http2_max_header_list_size(16 * 1024)
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .add_service(service)
        .serve_with_incoming_shutdown(
            ReceiverStream::new(incoming).map(Ok::<_, io::Error>),
            shared.stop.cancelled(),
        );
    let late = async { (shared.stop.cancelled().await, tokio::time::sleep(DRAIN).await) };
    tokio::select! {
        result = server => {
            if let Err(error) = result {
                warn!(%error, "the server ended");
            }
        }
        _ = late => debug!("not everybody went in time"),
    }
}
