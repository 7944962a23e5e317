//! A member that lies: a valid membership, and whatever it likes to say.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_lab::{Lab, program};
use tombolo_proto::model::{ClusterId, Endpoint, Namespace, NodeName, Position, Record, RecordKey, Scope};
use tombolo_proto::pb;
use tombolo_proto::trust::{Invitation, Membership, PublicKey, RootChain, SigningKey};
use tombolo_proto::wire::{self, Documents, MembershipParts};
use tombolo_replica::{Interest, Introduction, LocalOrigin, Quota, Replica, Session};

/// What is said of one scope.
pub type Said = BTreeMap<Scope, BTreeMap<RecordKey, Record>>;

/// Its pod ranges.
pub const PODS: [&str; 2] = ["10.66.0.0/16", "fd00:10:66::/48"];

/// A hostile member of a lab's set. It calls from the wire.
pub struct Mallory {
    pub id: ClusterId,
    pub key: SigningKey,
    pub membership: Membership,
    pub roots: RootChain,
    pub brokers: Vec<(String, PublicKey)>,
    pub position: Position,
    pub said: Said,
    local: LocalOrigin,
    shared: Arc<Shared>,
    runtime: Runtime,
}

struct Shared {
    replica: Mutex<Replica>,
    version: watch::Sender<u64>,
    /// How its sessions ended, and what brokers told it.
    heard: Mutex<Vec<String>>,
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut Replica) -> T) -> T {
        let mut replica = self.replica.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut replica);
        let version = replica.version();
        drop(replica);
        self.version.send_if_modified(|old| std::mem::replace(old, version) != version);
        result
    }

    fn hear(&self, text: String) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.len() < 1000 {
            heard.push(text);
        }
    }
}

/// A runtime whose sockets are in a place.
pub fn runtime(lab: &Lab, place: &str) -> Result<Runtime> {
    let build = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.on_thread_start(|| {
            let _ = tombolo_lab::machine::step_back();
        });
        builder.thread_name("liar").worker_threads(1).enable_all().build()
    };
    Ok(lab.place(place)?.run(build)??)
}

impl Mallory {
    /// Invited by an administrator who knows no better, with these namespaces.
    pub fn admitted(lab: &Lab, name: &str, pods: &[&str], namespaces: &[&str]) -> Result<Self> {
        let mut args = vec![program::find("tombolo")?, "invite".to_owned(), name.to_owned()];
        for pod in pods {
            args.extend(["--pod-cidr".to_owned(), (*pod).to_owned()]);
        }
        for namespace in namespaces {
            args.extend(["--namespaces".to_owned(), (*namespace).to_owned()]);
        }
        args.extend(["--dir".to_owned(), program::set_dir()]);
        let output = lab.command("wire", &args)?.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let invitation = Invitation::parse(&String::from_utf8_lossy(&output.stdout))?;
        let key = SigningKey::generate()?;
        let membership = invitation.accept(&key)?;
        let id = membership.cluster().clone();
        let (roots, quota) = (
            invitation.roots.clone(),
            Quota { bytes: 1 << 30, records: 1 << 20, nodes: 1 << 20, ..Quota::default() },
        );
        let mut replica = Replica::new(roots.clone(), Interest::All).with_own(id.clone()).with_quota(quota);
        let documents = Documents { memberships: vec![parts(&membership)], ..Documents::default() };
        ensure!(replica.offer_documents(&documents).is_empty(), "its own membership is refused");
        let serial = membership.grant().serial;
        let brokers = invitation.brokers.brokers.iter().map(|b| (b.address.clone(), b.key)).collect();
        Ok(Self {
            local: LocalOrigin::new(roots.set(), id.clone()),
            id,
            key,
            membership,
            roots,
            brokers,
            position: Position { serial, generation: 0, epoch: 1, sequence: 0 },
            said: Said::new(),
            shared: Arc::new(Shared {
                replica: Mutex::new(replica),
                version: watch::Sender::new(0),
                heard: Mutex::default(),
            }),
            runtime: runtime(lab, "wire")?,
        })
    }

    /// Adds to what it says, and signs it.
    pub fn say(&mut self, records: impl IntoIterator<Item = (Scope, Record)>) -> Result<()> {
        for (scope, record) in records {
            self.said.entry(scope).or_default().insert(record.key.clone(), record);
        }
        self.sign()
    }

    /// Signs all that it says now.
    pub fn sign(&mut self) -> Result<()> {
        self.local.set_records(&self.said);
        self.position.sequence += 1;
        let statement = self.local.sign(&self.key, self.position);
        Ok(self.shared.with(|replica| replica.publish(statement))?)
    }

    /// Keeps sessions with all brokers of its invitation.
    pub fn join(&self) {
        for (address, key) in &self.brokers {
            let (shared, own) = (self.shared.clone(), SigningKey::from_seed(self.key.seed()));
            let (address, broker, membership) = (address.clone(), *key, parts(&self.membership));
            self.runtime.spawn(async move {
                loop {
                    let introduction =
                        Introduction { membership: Some(membership.clone()), ..Introduction::default() };
                    let end = session(&address, broker, &own, &shared, introduction).await;
                    shared.hear(end.err().map_or_else(|| "closed".to_owned(), |error| format!("{error:#}")));
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
        }
    }

    /// Opens a session with the first broker as itself, sends this after its hello, and tells how it went: the
    /// broker's complaints and how it ended the session, if it did within a second.
    pub fn shout(&self, messages: Vec<pb::Message>) -> Result<String> {
        let (address, broker) = self.brokers.first().cloned().context("no broker")?;
        let own = SigningKey::from_seed(self.key.seed());
        let hello = self.hello();
        let work = async move {
            let client = tombolo_tls::client::connect(&address, &[broker], &own).await?;
            let mut client = client.max_encoding_message_size(64 << 20);
            let (out, outbound) = mpsc::channel(4);
            let mut inbound = client.session(ReceiverStream::new(outbound)).await?.into_inner();
            let mut told = String::new();
            let speak = async {
                for message in std::iter::once(hello).chain(messages) {
                    if out.send(message).await.is_err() {
                        break;
                    }
                }
                std::future::pending::<()>().await;
            };
            let listen = async {
                loop {
                    // Alarms come together.
                    let patience = Duration::from_millis(if told.is_empty() { 1000 } else { 100 });
                    match tokio::time::timeout(patience, inbound.message()).await {
                        Ok(Ok(Some(pb::Message { kind: Some(pb::message::Kind::Alarm(alarm)) }))) => {
                            told += &format!("alarm: {}: {}\n", alarm.object, alarm.reason);
                        }
                        Ok(Ok(Some(_))) => {}
                        Ok(Ok(None)) | Err(_) => break,
                        Ok(Err(status)) => {
                            told += &format!("ended: {}\n", status.message());
                            break;
                        }
                    }
                }
            };
            tokio::select! {
                () = speak => {}
                () = listen => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            anyhow::Ok(told)
        };
        self.block_on(work)
    }

    /// Shouts each of these in a session of its own, few at once. A second hello after it ends the session in any case.
    pub fn shout_each(&self, messages: Vec<pb::Message>) -> Result<()> {
        for few in messages.chunks(5) {
            let each = |message: &pb::Message| self.shout(vec![message.clone(), self.hello(), self.hello()]);
            let each = &each;
            std::thread::scope(|scope| -> Result<()> {
                let threads: Vec<_> = few.iter().map(|m| scope.spawn(move || each(m))).collect();
                for thread in threads {
                    let told = thread.join().map_err(|_| anyhow::anyhow!("a shout panicked"))??;
                    ensure!(told.contains("ended: "), "the broker went on: {told:?}");
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn hello(&self) -> pb::Message {
        wire::encode_message(&wire::Message::Hello(wire::Hello {
            set: self.roots.set(),
            features: Vec::new(),
            membership: Some(parts(&self.membership)),
            version: "0".to_owned(),
            namespaces: None,
        }))
    }

    /// Offers documents to the first broker without a session; what it refused.
    pub fn offer(&self, documents: Documents) -> Result<Vec<String>> {
        let (address, broker) = self.brokers.first().cloned().context("no broker")?;
        let own = SigningKey::from_seed(self.key.seed());
        let request = pb::OfferRequest { documents: Some(wire::encode_documents(&documents)) };
        self.block_on(async move {
            let mut client = tombolo_tls::client::connect(&address, &[broker], &own).await?;
            let answer = client.offer(request).await?.into_inner();
            anyhow::Ok(answer.refusals.into_iter().map(|r| format!("{}: {}", r.object, r.reason)).collect())
        })
    }

    /// What brokers said to it, and how its sessions ended.
    pub fn heard(&self) -> Vec<String> {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it knows of everybody.
    pub fn with_replica<T>(&self, look: impl FnOnce(&Replica) -> T) -> T {
        self.shared.with(|replica| look(replica))
    }

    /// What a cluster states of a node, as it learned from the broker.
    pub fn endpoint_of(&self, cluster: &str, node: &str) -> Result<Endpoint> {
        let (cluster, node) = (ClusterId::new(cluster)?, NodeName::new(node)?);
        let body = self.with_replica(|replica| {
            let state = replica.origin(&cluster)?;
            state
                .records(&Scope::Nodes)?
                .iter()
                .find(|(k, _)| **k == RecordKey::endpoint(&node))
                .map(|(_, b)| b.clone())
        });
        let body = body.with_context(|| format!("nothing is known of {cluster}/{node}"))?;
        Ok(wire::decode_endpoint(node, &body)?)
    }

    fn block_on<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        // On the runtime's own thread, which is in the right namespace.
        std::thread::scope(|scope| {
            let task = self.runtime.spawn(work);
            let handle = self.runtime.handle();
            match scope.spawn(|| handle.block_on(task)).join() {
                Ok(result) => result?,
                Err(_) => anyhow::bail!("the liar panicked"),
            }
        })
    }
}

/// A membership as it travels.
pub fn parts(membership: &Membership) -> MembershipParts {
    MembershipParts {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
    }
}

async fn session(
    address: &str,
    broker: PublicKey,
    own: &SigningKey,
    shared: &Shared,
    introduction: Introduction,
) -> Result<()> {
    let client = tombolo_tls::client::connect(address, &[broker], own).await?;
    let mut client = client.max_encoding_message_size(64 << 20);
    let (out, outbound) = mpsc::channel::<pb::Message>(4);
    let mut inbound = client.session(ReceiverStream::new(outbound)).await?.into_inner();
    let mut session = Session::new(introduction);
    let mut changed = shared.version.subscribe();
    let mut ready = true;
    loop {
        tokio::select! {
            permit = out.reserve(), if ready => {
                match (shared.with(|replica| session.poll_transmit(replica)), permit) {
                    (Some(message), Ok(permit)) => permit.send(wire::encode_message(&message)),
                    _ => ready = false,
                }
            }
            message = inbound.message() => {
                let Some(message) = message? else { return Ok(()) };
                let Some(message) = wire::decode_message(&message)? else { continue };
                let result = shared.with(|replica| session.handle_message(replica, message));
                session.take_peer_alarms().into_iter().for_each(|a| shared.hear(format!("{}: {}", a.object, a.reason)));
                result?;
                ready = true;
            }
            _ = changed.changed() => ready = true,
        }
    }
}

/// The scope of a namespace.
pub fn scope(namespace: &str) -> Result<Scope> {
    Ok(Scope::Namespace(Namespace::new(namespace)?))
}

/// A record of any content.
pub fn record(kind: u32, name: &[&str], body: Vec<u8>) -> Result<Record> {
    Ok(Record { key: RecordKey::new(kind, name).context("no key")?, body: body.into() })
}

/// A node.
pub fn endpoint(node: &str, body: &pb::Endpoint) -> Result<(Scope, Record)> {
    Ok((Scope::Nodes, record(1, &[node], body.encode_to_vec())?))
}

/// An exported service.
pub fn export(namespace: &str, service: &str, body: &pb::Export) -> Result<(Scope, Record)> {
    Ok((scope(namespace)?, record(2, &[service], body.encode_to_vec())?))
}

/// Some of its backends.
pub fn backends(namespace: &str, service: &str, shard: u32, body: &pb::Backends) -> Result<(Scope, Record)> {
    Ok((scope(namespace)?, record(3, &[service, &shard.to_string()], body.encode_to_vec())?))
}

/// An address as it travels.
pub fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// A prefix as it travels, whatever it is.
pub fn prefix(text: &str) -> Result<pb::Prefix> {
    let (address, length) = text.split_once('/').context("a prefix")?;
    Ok(pb::Prefix { address: bytes(address.parse()?).into(), length: length.parse()? })
}

/// The port of all its services.
pub fn http() -> pb::Port {
    pb::Port {
        name: "http".into(),
        protocol: pb::Protocol::Tcp.into(),
        port: 8080,
        app_protocol: String::new(),
    }
}

/// A service as an honest cluster would state it, but for its age.
pub fn service(headless: bool) -> pb::Export {
    let kind = if headless { pb::ServiceType::Headless } else { pb::ServiceType::ClusterSetIp };
    pb::Export {
        r#type: kind.into(),
        ports: vec![http()],
        families: vec![pb::IpFamily::V4.into(), pb::IpFamily::V6.into()],
        created: 1,
        ..pb::Export::default()
    }
}

/// Ready backends at these addresses, the hostname for each.
pub fn at(addresses: &[(&str, IpAddr)]) -> pb::Backends {
    let backend = |(name, address): &(&str, IpAddr)| pb::Backend {
        address: bytes(*address).into(),
        hostname: (*name).to_owned(),
        ready: true,
        serving: true,
        terminating: false,
    };
    pb::Backends {
        groups: vec![pb::BackendGroup {
            ports: vec![http()],
            backends: addresses.iter().map(backend).collect(),
        }],
    }
}

/// A gateway of the own grant, with a key of its own.
pub fn gateway(rank: u32, key: u8) -> pb::Endpoint {
    let device = |number: u32| pb::Device { number, key: vec![key; 32].into(), port: 4510 + number };
    pb::Endpoint {
        rank,
        devices: (0..8).map(device).collect(),
        candidates: vec![vec![172, 30, 0, 254].into()],
        ..pb::Endpoint::default()
    }
}
