//! A set, members that hold real sessions, and brokers in this process or another.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_broker::store::Embedded;
use tombolo_broker::{Broker, Config, Hooks};
use tombolo_proto::model::{ClusterId, Namespace, Position, Record, RecordKey, Scope, SetName};
use tombolo_proto::pb;
use tombolo_proto::trust::{
    Binding, Brokers, Envelope, Grant, Membership, Revocations, RootChain, Roots, SigningKey,
};
use tombolo_proto::wire::{self, Documents, MembershipParts};
use tombolo_replica::{Interest, Introduction, LocalOrigin, Quota, Replica, Session, SetFile};
use tonic::Status;

pub type Records = BTreeMap<Scope, BTreeMap<RecordKey, Record>>;

pub fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

pub const ROOT: u8 = 7;
pub const BROKER: u8 = 8;

pub fn roots() -> RootChain {
    let name = SetName::new("harbour").unwrap();
    let roots = Roots { version: 1, name, keys: vec![key(ROOT).public()], previous: None };
    RootChain::first(&roots.sign(&key(ROOT))).unwrap()
}

pub fn set_file() -> SetFile {
    let broker = tombolo_proto::trust::Broker { address: "localhost:4500".into(), key: key(BROKER).public() };
    let list = Brokers { set: roots().set(), version: 1, brokers: vec![broker] };
    SetFile { roots: roots(), brokers: roots().brokers(&list.sign(&key(ROOT))).unwrap() }
}

pub fn cluster(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

pub fn namespace(name: &str) -> Scope {
    Scope::Namespace(Namespace::new(name).unwrap())
}

pub fn record(name: &str, body: impl Into<Vec<u8>>) -> Record {
    Record { key: RecordKey::new(2, &[name]).unwrap(), body: body.into().into() }
}

pub fn membership(name: &str, serial: u64, own: &SigningKey, bind_before: Option<u64>) -> Membership {
    let (set, cluster) = (roots().set(), cluster(name));
    let grant = Grant {
        set,
        cluster: cluster.clone(),
        serial,
        member_since: 1,
        owned: BTreeSet::new(),
        tunnel: BTreeSet::new(),
        namespaces: Vec::new(),
        subject: own.public(),
        bind_before,
    };
    let binding = Binding { set, cluster, serial, generation: 0, key: own.public() };
    Membership::verify(&roots(), &grant.sign(&key(ROOT)), &[binding.sign(own)]).unwrap()
}

pub fn parts(membership: &Membership) -> MembershipParts {
    MembershipParts {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
    }
}

pub fn revocations(version: u64, entries: &[(&str, u64)]) -> Envelope {
    let up_to = entries.iter().map(|&(name, serial)| (cluster(name), serial)).collect();
    Revocations { set: roots().set(), version, up_to }.sign(&key(ROOT))
}

/// Waits for a condition; panics with `what` after ten seconds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A controller as far as a broker sees it: publishes, and keeps a session with one broker.
pub struct Member {
    pub name: String,
    pub seed: u8,
    pub membership: Membership,
    pub local: LocalOrigin,
    pub records: Records,
    pub position: Position,
    pub replica: Arc<Mutex<Replica>>,
    pub version: watch::Sender<u64>,
    /// How the last session ended.
    pub ended: Arc<Mutex<Option<String>>>,
    task: Option<JoinHandle<()>>,
}

impl Member {
    pub fn new(name: &str, seed: u8) -> Self {
        let membership = membership(name, seed.into(), &key(seed), None);
        Self::with(name, seed, membership)
    }

    pub fn with(name: &str, seed: u8, membership: Membership) -> Self {
        let mut replica = Replica::new(roots(), Interest::All).with_own(cluster(name));
        let documents = Documents { memberships: vec![parts(&membership)], ..Documents::default() };
        assert_eq!(replica.offer_documents(&documents), []);
        let mut member = Self {
            name: name.to_owned(),
            seed,
            local: LocalOrigin::new(roots().set(), cluster(name)),
            records: Records::new(),
            position: Position { serial: membership.grant().serial, generation: 0, epoch: 1, sequence: 0 },
            membership,
            replica: Arc::new(Mutex::new(replica)),
            version: watch::Sender::new(0),
            ended: Arc::default(),
            task: None,
        };
        member.publish("nodes", Scope::Nodes, b"hello");
        member
    }

    pub fn id(&self) -> ClusterId {
        cluster(&self.name)
    }

    pub fn publish(&mut self, name: &str, scope: Scope, body: &[u8]) {
        let record = record(name, body);
        self.records.entry(scope).or_default().insert(record.key.clone(), record);
        self.position.sequence += 1;
        self.local.set_records(&self.records);
        let mut replica = self.replica.lock().unwrap();
        replica.publish(self.local.sign(&key(self.seed), self.position)).unwrap();
        self.version.send_replace(replica.version());
    }

    /// Holds sessions with the broker, one after the other, until stopped.
    pub fn join(&mut self, broker: SocketAddr) {
        let (replica, version) = (self.replica.clone(), self.version.clone());
        let introduction =
            Introduction { membership: Some(parts(&self.membership)), ..Introduction::default() };
        let (seed, ended) = (self.seed, self.ended.clone());
        self.task = Some(tokio::spawn(async move {
            loop {
                let end = session(broker, seed, &replica, &version, introduction.clone()).await;
                *ended.lock().unwrap() = Some(end.unwrap_or_else(|| "closed".to_owned()));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }

    pub fn leave(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    pub fn holds(&self, other: &Self) -> bool {
        let replica = self.replica.lock().unwrap();
        let Some(state) = replica.origin(&other.id()) else { return false };
        state.position() == other.position && held(state) == other.records
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave();
    }
}

pub fn held(state: &tombolo_replica::OriginState) -> Records {
    let scope = |(scope, records): (&Scope, &Arc<tombolo_replica::ScopeRecords>)| {
        let record = |(key, body): (&RecordKey, &Arc<[u8]>)| {
            (key.clone(), Record { key: key.clone(), body: body.clone() })
        };
        (scope.clone(), records.iter().map(record).collect())
    };
    state.scopes().iter().map(scope).collect()
}

async fn session(
    broker: SocketAddr,
    seed: u8,
    replica: &Mutex<Replica>,
    version: &watch::Sender<u64>,
    introduction: Introduction,
) -> Option<String> {
    let own = key(seed);
    let connected = tombolo_tls::client::connect(&broker.to_string(), &[key(BROKER).public()], &own).await;
    let mut client = match connected {
        Ok(client) => client,
        Err(error) => return Some(error.to_string()),
    };
    let (out, outbound) = mpsc::channel::<pb::Message>(2);
    let mut inbound = match client.session(ReceiverStream::new(outbound)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Some(status.message().to_owned()),
    };
    let mut session = Session::new(introduction);
    let mut changed = version.subscribe();
    let mut ready = true;
    loop {
        tokio::select! {
            permit = out.reserve(), if ready => {
                let message = session.poll_transmit(&replica.lock().unwrap());
                match (message, permit) {
                    (Some(message), Ok(permit)) => permit.send(wire::encode_message(&message)),
                    (_, Err(_)) => ready = false,
                    (None, _) => ready = false,
                }
            }
            message = inbound.message() => {
                let message = match message {
                    Ok(Some(message)) => message,
                    Ok(None) => return None,
                    Err(status) => return Some(status.message().to_owned()),
                };
                let message = match wire::decode_message(&message) {
                    Ok(Some(message)) => message,
                    Ok(None) => continue,
                    Err(error) => return Some(error.to_string()),
                };
                let mut replica = replica.lock().unwrap();
                let result = session.handle_message(&mut replica, message);
                version.send_replace(replica.version());
                if let Err(error) = result {
                    return Some(error.to_string());
                }
                ready = true;
            }
            _ = changed.changed() => ready = true,
        }
    }
}

pub fn config() -> Config {
    Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        admin: Some("127.0.0.1:0".parse().unwrap()),
        identity: key(BROKER),
        set: set_file(),
        quota: Quota::default(),
    }
}

pub async fn broker(directory: &Path, hooks: Hooks) -> Broker {
    let store = Embedded::open(directory, roots().set()).unwrap();
    Broker::start(config(), Box::new(store), hooks).await.unwrap()
}

/// A broker as its own process.
pub struct Process {
    pub child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn write_files(directory: &Path) {
    let identity = directory.join("identity");
    std::fs::write(&identity, data_encoding::BASE64.encode(&**key(BROKER).seed())).unwrap();
    std::fs::set_permissions(&identity, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(directory.join("broker.set"), set_file().to_text()).unwrap();
}

pub fn command(directory: &Path, data: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tombolo-broker"));
    command
        .arg("--data")
        .arg(directory.join(data))
        .arg("--identity")
        .arg(directory.join("identity"))
        .arg("--set")
        .arg(directory.join("broker.set"));
    command
}

impl Process {
    /// Starts and waits until it is ready.
    pub async fn start(directory: &Path, data: &str, address: SocketAddr) -> Self {
        write_files(directory);
        let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let child = command(directory, data)
            .args(["--listen", &address.to_string(), "--admin", &admin.to_string()])
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let process = Self { child, address, admin };
        let deadline = Instant::now() + Duration::from_secs(15);
        while get(admin, "/readyz").await.is_none_or(|text| !text.starts_with("HTTP/1.1 200")) {
            assert!(Instant::now() < deadline, "the broker does not get ready");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        process
    }

    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = get(self.admin, "/metrics").await?;
        let line = text.lines().find(|line| line.starts_with(&format!("tombolo_broker_{name} ")))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The whole answer to a plain GET.
pub async fn get(address: SocketAddr, path: &str) -> Option<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}

pub async fn client(
    address: SocketAddr,
    own: &SigningKey,
) -> pb::exchange_client::ExchangeClient<tonic::transport::Channel> {
    tombolo_tls::client::connect(&address.to_string(), &[key(BROKER).public()], own).await.unwrap()
}

/// Opens a session, sends these messages, and waits for how the broker ends it.
pub async fn refused(address: SocketAddr, own: &SigningKey, messages: Vec<pb::Message>) -> Status {
    let mut client = client(address, own).await.max_encoding_message_size(16 * 1024 * 1024);
    let (out, outbound) = mpsc::channel(8);
    for message in messages {
        out.send(message).await.unwrap();
    }
    let mut inbound = client.session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    let wait = async {
        loop {
            match inbound.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("ended without a reason"),
                Err(status) => return status,
            }
        }
    };
    let status =
        tokio::time::timeout(Duration::from_secs(15), wait).await.expect("the broker ends the session");
    drop(out);
    status
}
