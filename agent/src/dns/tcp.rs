//! DNS over TCP (RFC 7766): bounded in connections, in connections of one client, and in time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Over, Shared};

/// Connections of a listener; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 512;
/// Of one client's address; more are closed.
const MAX_OF_CLIENT: usize = 64;
/// For the next query, and for the client to take an answer.
const IDLE: Duration = Duration::from_secs(5);

pub(super) async fn run(listener: TcpListener, shared: Shared) {
    shared.known().await;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let clients = Clients::default();
    let mut connections = JoinSet::new();
    while let Ok(permit) = room.clone().acquire_owned().await {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a DNS connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let Some(client) = clients.enter(from.ip()) else { continue };
        let shared = shared.clone();
        connections.spawn(async move {
            let _ = converse(stream, from, &shared).await;
            drop((client, permit));
        });
    }
}

/// Answers queries one after the other until the client goes, or is silent.
async fn converse(mut stream: TcpStream, from: SocketAddr, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut query = Vec::new();
    for turn in 0u32.. {
        timeout(IDLE, async {
            let length = stream.read_u16().await?;
            query.resize(length.into(), 0);
            stream.read_exact(&mut query).await
        })
        .await??;
        let started = Instant::now();
        // No answer means no DNS client.
        let Some(reply) = shared.answer(&query, from, Over::Tcp, turn.wrapping_add(u32::from(from.port())))
        else {
            break;
        };
        let length = u16::try_from(reply.bytes.len()).map_err(io::Error::other)?;
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend(reply.bytes);
        timeout(IDLE, stream.write_all(&bytes)).await??;
        shared.metrics.answered(reply.rcode, started.elapsed());
    }
    Ok(())
}

/// Connections by client.
#[derive(Clone, Default)]
struct Clients(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

struct Client {
    clients: Clients,
    address: IpAddr,
}

impl Clients {
    fn enter(&self, address: IpAddr) -> Option<Client> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= MAX_OF_CLIENT {
            return None;
        }
        *count += 1;
        Some(Client { clients: self.clone(), address })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut counts = self.clients.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}
