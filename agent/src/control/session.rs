//! Sessions with brokers, while this agent leads. Their end withdraws nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tombolo_proto::trust::{Broker, SigningKey};
use tombolo_proto::wire::{MembershipParts, Message, decode_message, encode_message};
use tombolo_replica::{Introduction, Replica, Session};
use tracing::{debug, info, warn};

use crate::admin::Shown;
use crate::metrics::BrokerLabel;

/// What is known of every cluster, shared by the controller and its sessions.
pub struct Shared {
    replica: Mutex<Replica>,
    version: watch::Sender<u64>,
}

impl Shared {
    /// Around a replica.
    pub fn new(replica: Replica) -> Arc<Self> {
        let version = watch::Sender::new(replica.version());
        Arc::new(Self { replica: Mutex::new(replica), version })
    }

    /// Reads or changes the replica; who waits for a change is woken if there was one.
    pub fn with<T>(&self, act: impl FnOnce(&mut Replica) -> T) -> T {
        let mut replica = self.lock();
        let result = act(&mut replica);
        let version = replica.version();
        drop(replica);
        self.version.send_if_modified(|old| std::mem::replace(old, version) != version);
        result
    }

    /// Tells of every change.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Replica> {
        // A panic elsewhere leaves the replica whole: it only takes what was verified, in one step.
        self.replica.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first wait after a failure; doubled up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(200);
/// The longest wait between two attempts.
const LONGEST: Duration = Duration::from_secs(5);
/// A broker that cannot be reached for so long is worth a warning; before it is noise.
const CONNECT: Duration = Duration::from_secs(5);

/// Keeps a session with every broker of the newest list until `stop`.
pub async fn run(shared: Arc<Shared>, key: Arc<SigningKey>, shown: Arc<Shown>, stop: CancellationToken) {
    let mut changed = shared.changed();
    let mut tasks: BTreeMap<Broker, CancellationToken> = BTreeMap::new();
    let mut set = JoinSet::new();
    loop {
        let wanted: Vec<Broker> =
            shared.with(|replica| replica.brokers().map(|list| list.brokers.clone()).unwrap_or_default());
        tasks.retain(|broker, token| {
            let keep = wanted.contains(broker);
            if !keep {
                token.cancel();
            }
            keep
        });
        for broker in wanted {
            tasks.entry(broker.clone()).or_insert_with(|| {
                let token = stop.child_token();
                set.spawn(keep(broker, shared.clone(), key.clone(), shown.clone(), token.clone()));
                token
            });
        }
        tokio::select! {
            () = stop.cancelled() => break,
            result = changed.changed() => if result.is_err() { break },
        }
    }
    while set.join_next().await.is_some() {}
}

/// One broker: connect, hold the session, wait a little, again.
async fn keep(
    broker: Broker,
    shared: Arc<Shared>,
    key: Arc<SigningKey>,
    shown: Arc<Shown>,
    stop: CancellationToken,
) {
    let label = BrokerLabel { broker: broker.address.clone() };
    let gauge = shown.metrics.sessions.get_or_create(&label).clone();
    gauge.set(0);
    let mut wait = SHORTEST;
    let mut told = false;
    loop {
        let mut up = false;
        let outcome = tokio::select! {
            () = stop.cancelled() => break,
            outcome = once(&broker, &shared, &key, &shown, &mut up, || { gauge.set(1); }) => outcome,
        };
        gauge.set(0);
        if up {
            wait = SHORTEST;
            told = false;
        }
        match outcome {
            Ok(()) => info!(broker = %broker.address, "the broker ended the session"),
            Err(error) if told => debug!(broker = %broker.address, "no session: {error:#}"),
            Err(error) => {
                warn!(broker = %broker.address, "no session, retrying; nothing is withdrawn: {error:#}")
            }
        }
        told = true;
        // Jitter out of the address of this task's own data: members must not all come at once.
        let jitter = u32::from(key.public().0[0]) % 100;
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(wait + wait * jitter / 200) => {}
        }
        wait = (wait * 2).min(LONGEST);
    }
    shown.metrics.sessions.remove(&label);
}

/// One session from connection to end.
async fn once(
    broker: &Broker,
    shared: &Arc<Shared>,
    key: &SigningKey,
    shown: &Shown,
    up: &mut bool,
    on_up: impl Fn(),
) -> Result<()> {
    let keys = [broker.key];
    let connect = tombolo_tls::client::connect(&broker.address, &keys, key);
    let mut client = tokio::time::timeout(CONNECT, connect).await.context("no answer within 5 s")??;
    let (outbox, messages) = mpsc::channel(4);
    let mut inbox = client
        .session(ReceiverStream::new(messages))
        .await
        .context("the broker refused the session")?
        .into_inner();

    let membership = shared.with(|replica| {
        let own = replica.own()?;
        let membership = replica.membership(own)?;
        Some(MembershipParts {
            grant: membership.grant().envelope().clone(),
            bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
        })
    });
    let mut session = Session::new(Introduction {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        features: Vec::new(),
        membership,
    });
    let mut changed = shared.changed();
    loop {
        let mut full = false;
        loop {
            match outbox.try_reserve() {
                Ok(permit) => match shared.with(|replica| session.poll_transmit(replica)) {
                    Some(message) => permit.send(encode_message(&message)),
                    None => break,
                },
                Err(mpsc::error::TrySendError::Full(())) => {
                    full = true;
                    break;
                }
                Err(mpsc::error::TrySendError::Closed(())) => bail!("the stream was closed"),
            }
        }
        tokio::select! {
            message = inbox.message() => {
                let Some(message) = message.context("the session broke")? else { return Ok(()) };
                if !*up {
                    *up = true;
                    on_up();
                    info!(broker = %broker.address, "session with the broker");
                }
                let Some(message) = decode_message(&message).context("the broker sent something malformed")? else { continue };
                handle(broker, shared, &mut session, shown, message)?;
            }
            result = changed.changed() => result.context("the controller ended")?,
            result = outbox.reserve(), if full => drop(result.context("the stream was closed")?),
        }
    }
}

fn handle(
    broker: &Broker,
    shared: &Shared,
    session: &mut Session,
    shown: &Shown,
    message: Message,
) -> Result<()> {
    shared.with(|replica| session.handle_message(replica, message))?;
    for refusal in session.take_refusals() {
        shown.metrics.refusals.inc();
        warn!(broker = %broker.address, "{refusal}");
    }
    for alarm in session.take_peer_alarms() {
        warn!(broker = %broker.address, object = %alarm.object, "the broker refuses: {}", alarm.reason);
    }
    Ok(())
}
