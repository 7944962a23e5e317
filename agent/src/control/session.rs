//! Sessions with brokers, while this agent leads. Their end withdraws nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tombolo_agent_core::bucket::Bucket;
use tombolo_proto::trust::{Broker, SigningKey};
use tombolo_proto::wire::{MembershipParts, Message, decode_message, encode_message};
use tombolo_replica::{Introduction, Replica, Session};
use tracing::{debug, error, info, warn};

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
/// A session that lasted so long was a good one: after it the first wait is the shortest again.
const GOOD: Duration = Duration::from_secs(30);
/// Connecting, opening the stream, and the broker's first message may take so long each.
const PATIENCE: Duration = Duration::from_secs(5);
/// Lines a minute about one broker: it, or whoever speaks through it, causes them.
const LINES: u32 = 10;

/// Whether what came was no message, or too large for one: not a failure of the transport.
fn is_malformed(status: &tonic::Status) -> bool {
    use tonic::Code::{DataLoss, Internal, InvalidArgument, OutOfRange, ResourceExhausted};
    matches!(status.code(), Internal | OutOfRange | InvalidArgument | DataLoss | ResourceExhausted)
}

/// Keeps a session with every broker of the newest list until `stop`.
pub async fn run(shared: Arc<Shared>, key: Arc<SigningKey>, shown: Arc<Shown>, stop: CancellationToken) {
    let mut changed = shared.changed();
    let mut tasks: BTreeMap<Broker, (CancellationToken, tokio::task::Id)> = BTreeMap::new();
    let mut set: JoinSet<()> = JoinSet::new();
    let mut delay = Duration::ZERO;
    loop {
        let wanted: Vec<Broker> =
            shared.with(|replica| replica.brokers().map(|list| list.brokers.clone()).unwrap_or_default());
        tasks.retain(|broker, (token, _)| {
            let keep = wanted.contains(broker);
            if !keep {
                token.cancel();
            }
            keep
        });
        for broker in wanted {
            tasks.entry(broker.clone()).or_insert_with(|| {
                let token = stop.child_token();
                let task = Caller {
                    broker,
                    shared: shared.clone(),
                    key: key.clone(),
                    shown: shown.clone(),
                    start: Instant::now(),
                    bucket: Bucket::a_minute(LINES),
                };
                let id = set.spawn(task.keep(delay, token.clone())).id();
                (token, id)
            });
        }
        delay = Duration::ZERO;
        tokio::select! {
            // The stop first: tasks that end by it have not failed.
            biased;
            () = stop.cancelled() => break,
            result = changed.changed() => if result.is_err() { break },
            Some(ended) = set.join_next_with_id(), if !set.is_empty() => {
                // One that was told to end, or one that failed: that is called again, but not at once.
                let id = match &ended {
                    Ok((id, ())) => *id,
                    Err(error) => error.id(),
                };
                tasks.retain(|broker, (_, task)| {
                    if *task == id {
                        error!(broker = %broker.address, "the session's task failed and is started again");
                        delay = LONGEST;
                    }
                    *task != id
                });
            }
        }
    }
    while set.join_next().await.is_some() {}
}

/// Waits between attempts: fast after a good session, ever slower while there is none or they are short.
#[derive(Debug, Default)]
struct Pace {
    failures: u32,
}

impl Pace {
    /// How long to wait after an attempt. `lasted`: how long the session was up; None if it never was.
    fn after(&mut self, lasted: Option<Duration>) -> Duration {
        if lasted.is_some_and(|lasted| lasted >= GOOD) {
            self.failures = 0;
        }
        let wait = SHORTEST.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX));
        self.failures = (self.failures + 1).min(16);
        wait.min(LONGEST)
    }
}

/// Who keeps the session with one broker.
struct Caller {
    broker: Broker,
    shared: Arc<Shared>,
    key: Arc<SigningKey>,
    shown: Arc<Shown>,
    start: Instant,
    bucket: Bucket,
}

impl Caller {
    /// Connects, holds the session, waits a little, again.
    async fn keep(mut self, delay: Duration, stop: CancellationToken) {
        let label = BrokerLabel { broker: self.broker.address.clone() };
        let gauge = self.shown.metrics.sessions.get_or_create(&label).clone();
        gauge.set(0);
        let (mut reach, mut sessions) = (Pace::default(), Pace::default());
        let mut told = false;
        let mut wait = delay;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
            let mut up = None;
            let outcome = tokio::select! {
                () = stop.cancelled() => break,
                outcome = self.once(&mut up, || { gauge.set(1); }) => outcome,
            };
            gauge.set(0);
            let lasted = up.map(|up: Instant| up.elapsed());
            // A broker that was away long and then came is a good one, until its sessions prove short.
            wait = match lasted {
                Some(_) => {
                    reach = Pace::default();
                    told = false;
                    sessions.after(lasted)
                }
                None => reach.after(None),
            };
            let address = self.broker.address.clone();
            match outcome {
                Ok(()) => self.say(|| info!(broker = %address, "the broker ended the session")),
                Err(error) if told => debug!(broker = %address, "no session: {error:#}"),
                Err(error) => self.say(|| {
                    warn!(broker = %address, "no session, retrying; nothing is withdrawn: {error:#}");
                }),
            }
            told = true;
            // Jitter out of this task's own data: members must not all come at once.
            let jitter = u32::from(self.key.public().0[0]) % 100;
            wait += wait * jitter / 200;
        }
        self.shown.metrics.sessions.remove(&label);
    }

    /// Logs, a few lines a minute.
    fn say(&mut self, log: impl FnOnce()) {
        let Some(held_back) = self.bucket.take(self.start.elapsed()) else { return };
        if held_back > 0 {
            warn!(broker = %self.broker.address, "{held_back} more messages about this broker were held back");
        }
        log();
    }

    /// One session from connection to end.
    async fn once(&mut self, up: &mut Option<Instant>, on_up: impl Fn()) -> Result<()> {
        let keys = [self.broker.key];
        let connect = tombolo_tls::client::connect(&self.broker.address, &keys, &self.key);
        let mut client =
            tokio::time::timeout(PATIENCE, connect).await.context("no connection within 5 s")??;
        let (outbox, messages) = mpsc::channel(4);
        let open = client.session(ReceiverStream::new(messages));
        let mut inbox = tokio::time::timeout(PATIENCE, open)
            .await
            .context("the broker opened no session within 5 s")?
            .context("the broker refused the session")?
            .into_inner();
        let membership = self.shared.with(|replica| {
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
        let mut changed = self.shared.changed();
        let opened = tokio::time::Instant::now();
        loop {
            let mut full = false;
            loop {
                match outbox.try_reserve() {
                    Ok(permit) => match self.shared.with(|replica| session.poll_transmit(replica)) {
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
                    if message.as_ref().is_err_and(is_malformed) {
                        self.shown.metrics.refusals.inc();
                    }
                    let Some(message) = message.context("the session broke")? else { return Ok(()) };
                    if up.is_none() {
                        *up = Some(Instant::now());
                        on_up();
                        let address = self.broker.address.clone();
                        self.say(|| info!(broker = %address, "session with the broker"));
                    }
                    let message = decode_message(&message).context("the broker sent something malformed");
                    if message.is_err() {
                        self.shown.metrics.refusals.inc();
                    }
                    let Some(message) = message? else { continue };
                    self.handle(&mut session, message)?;
                }
                result = changed.changed() => result.context("the controller ended")?,
                result = outbox.reserve(), if full => drop(result.context("the stream was closed")?),
                () = tokio::time::sleep_until(opened + PATIENCE), if up.is_none() => {
                    bail!("the broker said nothing within 5 s");
                }
            }
        }
    }

    fn handle(&mut self, session: &mut Session, message: Message) -> Result<()> {
        let handled = self.shared.with(|replica| session.handle_message(replica, message));
        if handled.is_err() {
            // What does not fit what was signed ends the session, and is a refusal like any other.
            self.shown.metrics.refusals.inc();
        }
        handled?;
        let broker = self.broker.address.clone();
        for refusal in session.take_refusals() {
            self.shown.metrics.refusals.inc();
            self.say(|| warn!(%broker, "{refusal}"));
        }
        for alarm in session.take_peer_alarms() {
            self.say(|| warn!(%broker, object = %alarm.object, "the broker refuses: {}", alarm.reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sessions_come_ever_later_and_a_good_one_at_once() {
        let mut pace = Pace::default();
        let short = Some(Duration::from_secs(1));
        let waits: Vec<u128> = (0..6).map(|_| pace.after(short).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000]);
        for _ in 0..100 {
            assert_eq!(pace.after(None), LONGEST);
        }
        assert_eq!(pace.after(Some(GOOD)), SHORTEST);
        assert_eq!(pace.after(short), SHORTEST * 2);
    }
}
