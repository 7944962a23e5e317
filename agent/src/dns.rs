//! Answers `clusterset.local` on sockets that outlive the agent.
//!
//! Reading of messages is hickory's; the sockets and the writing are ours, for four reasons. Who listens on all
//! addresses must answer from the address that was asked, else conntrack does not undo the pods' NAT. A query must
//! survive the agent's SIGKILL: a datagram is looked at, answered, and only then taken from its queue. An answer cut
//! short must still carry its OPT record and be compressed beyond 120 names. And TCP connections must be bounded.

mod answer;
mod metrics;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;
use tombolo_agent_core::zone::Zone;

pub use answer::{Over, Reply, answer};
pub use metrics::{DnsMetrics, Rcode, RcodeLabel};

use crate::hold::DnsSockets;

/// How long queries wait in their queues for a zone after start, before they are answered SERVFAIL. A restarted
/// agent has its zone long before.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the resolver answers now; `None` until it is known for the first time.
pub type ZoneWatch = watch::Receiver<Option<Arc<Zone>>>;

/// What the threads share.
#[derive(Clone)]
struct Shared {
    zone: ZoneWatch,
    metrics: DnsMetrics,
}

impl Shared {
    fn zone(&self) -> Option<Arc<Zone>> {
        self.zone.borrow().clone()
    }

    /// Returns when the zone is known, or after [`PATIENCE`].
    async fn known(&self) {
        let mut zone = self.zone.clone();
        let _ = tokio::time::timeout(PATIENCE, zone.wait_for(Option::is_some)).await;
    }

    /// Answers one message; a panic costs that message its answer and nothing else.
    fn answer(&self, query: &[u8], from: std::net::SocketAddr, over: Over, turn: u32) -> Option<Reply> {
        static TOLD: AtomicBool = AtomicBool::new(false);
        let zone = self.zone();
        let run = || answer(zone.as_deref(), query, from, over, turn);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|_| {
            if !TOLD.swap(true, Ordering::Relaxed) {
                let bytes = data_encoding::HEXLOWER.encode(query.get(..512).unwrap_or(query));
                tracing::error!(%from, query = bytes, "answering a query panicked; please report this (said once)");
            }
            None
        })
    }
}

/// The running resolver; dropped, it stops.
pub struct Server {
    stop: Arc<EventFd>,
    threads: Vec<std::thread::JoinHandle<()>>,
    tasks: tokio::task::JoinSet<()>,
}

/// Starts answering on `sockets`: a thread for each UDP socket, a task for each TCP listener. To be called inside a
/// tokio runtime.
///
/// # Errors
/// A thread or an eventfd cannot be had.
pub fn serve(sockets: DnsSockets, zone: ZoneWatch, metrics: DnsMetrics) -> io::Result<Server> {
    let shared = Shared { zone, metrics };
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let mut server = Server {
        stop: Arc::new(EventFd::from_value_and_flags(0, flags)?),
        threads: Vec::new(),
        tasks: tokio::task::JoinSet::new(),
    };
    for listener in sockets.tcp {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        server.tasks.spawn(tcp::run(listener, shared.clone()));
    }
    for (at, socket) in sockets.udp.into_iter().enumerate() {
        let (ready, begin) = std::sync::mpsc::channel::<()>();
        let waiting = shared.clone();
        server.tasks.spawn(async move {
            waiting.known().await;
            let _ = ready.send(());
        });
        let (shared, stop) = (shared.clone(), server.stop.clone());
        let thread = std::thread::Builder::new().name(format!("dns-udp{at}")).spawn(move || {
            // An error: the runtime ended before.
            if begin.recv().is_ok() {
                udp::run(&socket, &shared, &stop);
            }
        })?;
        server.threads.push(thread);
    }
    Ok(server)
}

impl Drop for Server {
    fn drop(&mut self) {
        // The threads see it at once; the process need not wait for them.
        let _ = self.stop.write(1);
        self.tasks.abort_all();
        self.threads.clear();
    }
}
