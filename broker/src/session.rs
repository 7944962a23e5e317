//! The loop around one peer's session.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tombolo_broker_core::{Admission, Admitted};
use tombolo_proto::pb;
use tombolo_proto::wire::{self, Message};
use tombolo_replica::{Introduction, Session};
use tombolo_tls::server::Peer;
use tonic::{Status, Streaming};
use tracing::{info, warn};

use crate::metrics::ResultLabel;
use crate::shared::{Counted, Shared, unix_now};

/// Messages that wait for the transport; the session makes no more while these wait.
pub(crate) const QUEUE: usize = 2;
/// How long the hello may take.
const HELLO: Duration = Duration::from_secs(10);
/// Sessions of one cluster: its leader's, a former leader's, some that are dying.
const SESSIONS_PER_CLUSTER: usize = 8;

type Outbound = mpsc::Sender<Result<pb::Message, Status>>;

/// Runs a session to its end, and tells the peer why it ended.
pub(crate) async fn run(shared: Arc<Shared>, peer: Peer, inbound: Streaming<pb::Message>, out: Outbound) {
    let mut runner =
        Runner { shared: shared.clone(), peer, inbound, out, name: "?".to_owned(), told_braked: false };
    let end = runner.session().await;
    let result = match &end {
        End::Closed => "closed",
        End::Draining => "draining",
        End::Replaced => "replaced",
        End::Denied(_) => "denied",
        End::Broken(_) => "broken",
    };
    shared.metrics.session_ends.get_or_create(&ResultLabel { result }).inc();
    let (peer, address) = (&runner.name, peer.address);
    let status = match end {
        End::Closed => {
            info!(%peer, %address, "session ended");
            return;
        }
        End::Draining => Status::unavailable("the broker is going down; come again in a moment"),
        End::Replaced => {
            info!(%peer, %address, "session ended: its key was replaced by a newer one");
            Status::unavailable("this key was replaced by a newer one of the cluster; come again with that")
        }
        End::Denied(status) => {
            warn!(%peer, %address, reason = status.message(), "session refused");
            status
        }
        End::Broken(status) => {
            warn!(%peer, %address, reason = status.message(), "session broken off");
            status
        }
    };
    // A peer that does not read will not read this either.
    let _ = tokio::time::timeout(Duration::from_secs(2), runner.out.send(Err(status))).await;
}

enum End {
    Closed,
    Draining,
    Replaced,
    Denied(Status),
    Broken(Status),
}

struct Runner {
    shared: Arc<Shared>,
    peer: Peer,
    inbound: Streaming<pb::Message>,
    out: Outbound,
    /// For the log.
    name: String,
    told_braked: bool,
}

impl Runner {
    async fn session(&mut self) -> End {
        let shared = self.shared.clone();
        let mut session = Session::new(Introduction {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Introduction::default()
        });
        // Ours may go at once: it tells nothing that Fetch does not.
        let hello = session.poll_transmit(&shared.replica());
        if let Some(hello) = hello {
            let _ = self.out.send(Ok(wire::encode_message(&hello))).await;
        }
        let first = tokio::select! {
            first = tokio::time::timeout(HELLO, self.receive()) => first,
            () = shared.stop.cancelled() => return End::Draining,
        };
        let first = match first {
            Ok(Ok(first)) => first,
            Ok(Err(end)) => return end,
            Err(_) => return End::Denied(Status::deadline_exceeded("no hello came")),
        };
        let admitted = match self.admit(&first) {
            Ok(admitted) => admitted,
            Err(status) => return End::Denied(status),
        };
        let _guard = match &admitted {
            Admitted::Member(cluster) => {
                let max = SESSIONS_PER_CLUSTER;
                match Counted::take(&shared, cluster.clone(), max, |shared| &shared.sessions) {
                    Some(guard) => Some(guard),
                    None => {
                        let text = format!("{cluster} holds {max} sessions already");
                        return End::Denied(Status::resource_exhausted(text));
                    }
                }
            }
            Admitted::Broker => None,
        };
        shared.metrics.sessions.inc();
        let end = self.exchange(&mut session, &admitted, first).await;
        shared.metrics.sessions.dec();
        end
    }

    fn admit(&mut self, first: &Message) -> Result<Admitted, Status> {
        let Message::Hello(hello) = first else {
            return Err(Status::invalid_argument("the first message is not a hello"));
        };
        let judged = self.shared.admission.judge(&self.shared.replica(), &self.peer.key, hello, unix_now());
        let result = if judged.is_ok() { "admitted" } else { "denied" };
        self.shared.metrics.admissions.get_or_create(&ResultLabel { result }).inc();
        let admitted = judged.map_err(|denied| Status::permission_denied(denied.to_string()))?;
        self.name = match &admitted {
            Admitted::Member(cluster) => cluster.to_string(),
            Admitted::Broker => "broker".to_owned(),
        };
        info!(peer = %self.name, address = %self.peer.address, version = hello.version, "session admitted");
        Ok(admitted)
    }

    async fn exchange(&mut self, session: &mut Session, admitted: &Admitted, first: Message) -> End {
        let shared = self.shared.clone();
        let mut version = shared.version.subscribe();
        let mut next = Some(first);
        let mut ready = true;
        // Until then the peer is not read: what it wants to say waits with it.
        let mut braked: Option<Instant> = None;
        loop {
            if let Some(message) = next.take() {
                // What others say and this one passes on is theirs.
                let statement = matches!((&message, admitted),
                    (Message::Update(update), Admitted::Member(cluster)) if update.origin == *cluster);
                let (result, used) = {
                    let mut replica = shared.replica();
                    let begun = Instant::now();
                    let result = session.handle_message(&mut replica, message);
                    shared.announce(&replica);
                    (result, begun.elapsed())
                };
                if let Admitted::Member(cluster) = admitted {
                    let wait = shared.charge(cluster, statement, used);
                    braked = (!wait.is_zero()).then(|| Instant::now() + wait);
                    self.tell_braked(wait);
                }
                for refusal in session.take_refusals() {
                    shared.metrics.refusals.inc();
                    warn!(peer = %self.name, "{refusal}");
                }
                for alarm in session.take_peer_alarms() {
                    warn!(peer = %self.name, object = alarm.object, reason = alarm.reason, "the peer complains");
                }
                if let Err(error) = result {
                    return End::Broken(Status::invalid_argument(error.to_string()));
                }
                if let Some(end) = self.ended(admitted) {
                    return end;
                }
                ready = true;
            }
            tokio::select! {
                () = shared.stop.cancelled() => return End::Draining,
                permit = self.out.clone().reserve_owned(), if ready => {
                    let Ok(permit) = permit else { return End::Closed };
                    let message = session.poll_transmit(&shared.replica());
                    match message {
                        Some(message) => {
                            if self.send(admitted, message, permit).await.is_none() {
                                return End::Closed;
                            }
                        }
                        None => ready = false,
                    }
                }
                () = tokio::time::sleep_until(braked.unwrap_or_else(Instant::now)), if braked.is_some() => braked = None,
                () = self.out.closed(), if braked.is_some() => return End::Closed,
                message = receive(&mut self.inbound, &shared), if braked.is_none() => match message {
                    Ok(message) => next = Some(message),
                    Err(end) => return end,
                },
                changed = version.changed() => {
                    if changed.is_err() {
                        return End::Draining;
                    }
                    if let Some(end) = self.ended(admitted) {
                        // It is told why before it goes: the list is among the documents.
                        self.farewell(session).await;
                        return end;
                    }
                    ready = true;
                }
            }
        }
    }

    /// Counts that a member has to wait; once in a session it stands in the log.
    fn tell_braked(&mut self, wait: Duration) {
        if wait.is_zero() {
            return;
        }
        self.shared.metrics.brakes.inc();
        if !std::mem::replace(&mut self.told_braked, true) {
            warn!(
                peer = %self.name,
                "says more than others can follow: it is heard more slowly until it says less"
            );
        }
    }

    /// Sends through the hook, if there is one.
    async fn send(
        &self,
        admitted: &Admitted,
        message: Message,
        permit: mpsc::OwnedPermit<Result<pb::Message, Status>>,
    ) -> Option<()> {
        let encode = |message: &Message| {
            let message = wire::encode_message(message);
            self.shared.metrics.message("sent", message.encoded_len());
            Ok(message)
        };
        match &self.shared.hooks.outbound {
            None => {
                permit.send(encode(&message));
            }
            Some(hook) => {
                drop(permit);
                for message in hook(admitted, message) {
                    self.out.send(encode(&message)).await.ok()?;
                }
            }
        }
        Some(())
    }

    async fn farewell(&self, session: &mut Session) {
        let message = session.poll_transmit(&self.shared.replica());
        if let Some(message @ Message::Documents(_)) = message {
            let sent = self.out.send(Ok(wire::encode_message(&message)));
            let _ = tokio::time::timeout(Duration::from_secs(2), sent).await;
        }
    }

    /// Why a member that was admitted is one no more.
    fn ended(&self, admitted: &Admitted) -> Option<End> {
        let Admitted::Member(cluster) = admitted else { return None };
        let replica = self.shared.replica();
        if replica.membership(cluster).is_none() {
            let text = format!("{cluster} has no membership any more: it was revoked");
            return Some(End::Denied(Status::permission_denied(text)));
        }
        // An honest member has brought the new one itself, and comes again with it.
        Admission::is_replaced(&replica, cluster, &self.peer.key).then_some(End::Replaced)
    }

    async fn receive(&mut self) -> Result<Message, End> {
        receive(&mut self.inbound, &self.shared).await
    }
}

/// The next message that this version knows. May be dropped while it waits.
async fn receive(inbound: &mut Streaming<pb::Message>, shared: &Shared) -> Result<Message, End> {
    loop {
        let message = match inbound.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(End::Closed),
            Err(status) if is_gone(&status) => return Err(End::Closed),
            Err(status) => return Err(End::Broken(status)),
        };
        shared.metrics.message("received", message.encoded_len());
        match wire::decode_message(&message) {
            Ok(Some(message)) => return Ok(message),
            Ok(None) => {}
            Err(error) => return Err(End::Broken(Status::invalid_argument(error.to_string()))),
        }
    }
}

/// A connection that broke is an end like any other.
fn is_gone(status: &Status) -> bool {
    use tonic::Code;
    matches!(status.code(), Code::Cancelled | Code::Unavailable)
        || (status.code() == Code::Unknown && std::error::Error::source(status).is_some())
}
