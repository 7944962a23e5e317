//! Brokers and members over real connections on the loopback.
#![allow(missing_docs, clippy::unwrap_used, clippy::unwrap_in_result)]

mod common;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tombolo_broker::store::{Batch, Store, StoreError, Stored};
use tombolo_broker::{Broker, Hooks};
use tombolo_proto::model::Scope;
use tombolo_proto::pb;
use tombolo_proto::wire::{self, Documents, Hello, Message};
use tombolo_tls::client::ConnectError;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn members_exchange_what_they_say() {
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks::default()).await;
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(broker.address());
    west.join(broker.address());
    until("both know each other", || west.holds(&east) && east.holds(&west)).await;
    for n in 0..40u8 {
        east.publish(&format!("big-{n}"), namespace("production"), &vec![n; 60_000]);
    }
    until("large scopes arrive", || west.holds(&east)).await;
    let start = Instant::now();
    west.publish("small", namespace("production"), b"x");
    until("a small change arrives", || east.holds(&west)).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());

    let admin = broker.admin_address().unwrap();
    let ready = get(admin, "/readyz?verbose").await.unwrap();
    assert!(ready.contains("[+]serving ok\n[+]store ok\nreadyz check passed"), "{ready}");
    assert!(get(admin, "/healthz").await.unwrap().ends_with("ok\n"));
    let metrics = get(admin, "/metrics").await.unwrap();
    for name in ["sessions 2", "origins 2", "members 2", "store_healthy 1", "build_info{version="] {
        assert!(metrics.contains(&format!("tombolo_broker_{name}")), "{name}\n{metrics}");
    }
    let origins = get(admin, "/debug/origins").await.unwrap();
    assert!(origins.contains("\"east\"") && origins.contains(&east.position.to_string()), "{origins}");
    broker.stop().await;
    until("members are told", || east.ended.lock().unwrap().is_some()).await;
    assert!(east.holds(&west), "an end of a session withdraws nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_comes_back_with_and_without_its_disk() {
    let directory = tempfile::tempdir().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let process = Process::start(directory.path(), "data", address).await;
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(address);
    west.join(address);
    east.publish("api", namespace("production"), b"one");
    until("both know each other", || west.holds(&east) && east.holds(&west)).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while process.metric("store_pending").await != Some(0.0) {
        assert!(Instant::now() < deadline, "the store is not written");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // With its disk, and nobody there to bring anything back.
    east.leave();
    west.leave();
    process.kill();
    let process = Process::start(directory.path(), "data", address).await;
    let mut north = Member::new("north", 3);
    north.join(address);
    until("the disk had it all", || north.holds(&east) && north.holds(&west)).await;
    // Killed while they talk, and the disk is lost.
    east.join(address);
    west.join(address);
    process.kill();
    assert!(west.holds(&east), "a dead broker withdraws nothing");
    east.publish("api", namespace("production"), b"two");
    let mut process = Process::start(directory.path(), "other", address).await;
    until("the members bring it back", || north.holds(&east) && west.holds(&east) && east.holds(&north))
        .await;
    let mut south = Member::new("south", 4);
    south.join(address);
    until("also for newcomers", || south.holds(&east) && south.holds(&west) && south.holds(&north)).await;
    // Told to go, it goes soon, although sessions are open.
    let start = Instant::now();
    let pid = process.child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = loop {
        if let Some(status) = process.child.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(status.code(), Some(0));
}

/// Counts the newest positions of a member that another one sees.
async fn seen_of(other: &Member, of: &Member, time: Duration) -> usize {
    let (id, end) = (of.id(), Instant::now() + time);
    let mut changed = other.version.subscribe();
    let mut seen = std::collections::BTreeSet::new();
    while tokio::time::timeout_at(end.into(), changed.changed()).await.is_ok() {
        seen.extend(other.replica.lock().unwrap().origin(&id).map(|state| state.position().sequence));
    }
    seen.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_says_much_waits_alone() {
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks::default()).await;
    let (mut east, mut west, mut north) =
        (Member::new("east", 1), Member::new("west", 2), Member::new("north", 3));
    for member in [&mut east, &mut west, &mut north] {
        member.join(broker.address());
    }
    until("all know each other", || north.holds(&east) && north.holds(&west)).await;
    let flood = tokio::spawn(async move {
        for n in 0..1500_u16 {
            east.publish("flood", namespace("production"), &n.to_be_bytes());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        east
    });
    let other = Member::new("east", 1);
    let seen = seen_of(&north, &other, Duration::from_secs(2)).await;
    assert!((50..=200).contains(&seen), "a burst and then 20 a second: {seen}");
    let start = Instant::now();
    west.publish("small", namespace("production"), b"x");
    until("a small change arrives", || north.holds(&west)).await;
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    let metrics = get(broker.admin_address().unwrap(), "/metrics").await.unwrap();
    let brakes = metrics.lines().find_map(|line| line.strip_prefix("tombolo_broker_brakes_total "));
    assert!(brakes.is_some_and(|count| count != "0"), "{metrics}");
    flood.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_cluster_is_out_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks::default()).await;
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(broker.address());
    west.join(broker.address());
    until("both know each other", || west.holds(&east) && east.holds(&west)).await;
    let mut anybody = client(broker.address(), &key(99)).await;
    let forged =
        tombolo_proto::trust::Revocations { set: roots().set(), version: 9, up_to: [(west.id(), 9)].into() };
    for (list, refusals) in [(forged.sign(&key(50)), 1), (revocations(1, &[("east", 1)]), 0)] {
        let documents = Documents { revocations: Some(list), ..Documents::default() };
        let request = pb::OfferRequest { documents: Some(wire::encode_documents(&documents)) };
        let answer = anybody.offer(request).await.unwrap().into_inner();
        assert_eq!(answer.refusals.len(), refusals, "{answer:?}");
    }
    until("west forgets it", || west.replica.lock().unwrap().origin(&east.id()).is_none()).await;
    until("east is told", || {
        let ended = east.ended.lock().unwrap().clone();
        ended.is_some_and(|text| text.contains("revoked"))
    })
    .await;
    assert!(east.holds(&west) || east.replica.lock().unwrap().revocations().is_some());
    let fetched = anybody.fetch(pb::FetchRequest::default()).await.unwrap().into_inner();
    let documents = wire::decode_documents(&fetched.documents.unwrap()).unwrap();
    assert_eq!(documents.memberships, [parts(&west.membership)]);
    assert!(documents.revocations.is_some() && documents.brokers.is_some());
    let other = anybody.fetch(pb::FetchRequest { set: vec![1; 16].into() }).await.unwrap_err();
    assert_eq!(other.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_holds_no_session_and_binds_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks::default()).await;
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(broker.address());
    west.join(broker.address());
    until("both know each other", || west.holds(&east) && east.holds(&west)).await;
    let before = east.membership.clone();
    east.membership = before.rotated(&key(1), key(11).public()).unwrap();
    {
        let documents = Documents { memberships: vec![parts(&east.membership)], ..Documents::default() };
        let mut replica = east.replica.lock().unwrap();
        assert_eq!(replica.offer_documents(&documents), []);
        east.version.send_replace(replica.version());
    }
    // Whoever goes on to call by the old key, with the old membership, is let go and not let in.
    for word in ["replaced by a newer one", "was replaced by its generation 1"] {
        until(word, || east.ended.lock().unwrap().clone().is_some_and(|text| text.contains(word))).await;
    }
    assert_eq!(west.replica.lock().unwrap().membership(&east.id()).unwrap().generation(), 1);
    assert!(west.holds(&east), "what the old key said stays until the new one speaks");
    // Nor does it bind another key.
    let fork = before.rotated(&key(1), key(66).public()).unwrap();
    let documents = Documents { memberships: vec![parts(&fork)], ..Documents::default() };
    let request = pb::OfferRequest { documents: Some(wire::encode_documents(&documents)) };
    let answer = client(broker.address(), &key(99)).await.offer(request).await.unwrap().into_inner();
    assert!(answer.refusals[0].reason.contains("was seen first and is pinned"), "{answer:?}");
    // The honest one comes with the new key.
    east.leave();
    east.seed = 11;
    east.position = tombolo_proto::model::Position { generation: 1, epoch: 2, sequence: 0, ..east.position };
    east.publish("api", namespace("production"), b"new");
    east.join(broker.address());
    until("its word is heard", || west.holds(&east)).await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks::default()).await;
    let address = broker.address();
    let hello = |membership: Option<_>, set| {
        let hello = Hello { set, features: Vec::new(), membership, version: String::new(), namespaces: None };
        wire::encode_message(&Message::Hello(hello))
    };
    let set = roots().set();
    let east = Member::new("east", 1);
    let shown = || Some(parts(&east.membership));
    let denied = |status: tonic::Status| {
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        status.message().to_owned()
    };
    denied(refused(address, &key(1), vec![hello(None, set)]).await);
    denied(refused(address, &key(66), vec![hello(shown(), set)]).await);
    let other = tombolo_proto::trust::SetId([1; 16]);
    denied(refused(address, &key(1), vec![hello(shown(), other)]).await);
    let mut own = Member::with("own", 20, membership("own", 20, &key(20), None));
    let mut forged = parts(&own.membership);
    forged.grant = forged.bindings[0].clone();
    denied(refused(address, &key(20), vec![hello(Some(forged), set)]).await);
    let have = wire::encode_message(&Message::Have(Default::default()));
    assert_eq!(refused(address, &key(1), vec![have]).await.code(), Code::InvalidArgument);
    assert_eq!(broker.with_replica(|replica| replica.memberships().count()), 0, "nothing was taken");

    // Who is not the broker is told nothing.
    let wrong = tombolo_tls::client::connect(&address.to_string(), &[key(77).public()], &key(1)).await;
    assert!(matches!(wrong, Err(ConnectError::Stranger { .. })), "{:?}", wrong.err());
    // Another kind of key gets no TLS.
    let pair = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["x".into()]).unwrap().self_signed(&pair).unwrap();
    assert_eq!(tombolo_tls::certificate_key(certificate.der()), None);

    // An address that asks too often waits.
    let mut anybody = client(address, &key(99)).await;
    let mut limited = false;
    for _ in 0..200 {
        limited |= anybody
            .fetch(pb::FetchRequest::default())
            .await
            .is_err_and(|s| s.code() == Code::ResourceExhausted);
    }
    assert!(limited);
    own.join(address);
    until("members are not held up by that", || {
        broker.with_replica(|replica| replica.origin(&own.id()).is_some())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_harmless() {
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks::default()).await;
    let address = broker.address();
    let mut silent = Vec::new();
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 5000], &[0x16, 3, 1, 255, 255], b"\x16\x03\x01\x00\x05abcde"]
    {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = tokio::time::timeout(Duration::from_millis(200), stream.read_to_end(&mut Vec::new())).await;
        silent.push(stream);
    }
    for _ in 0..100 {
        silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(address);
    west.join(address);
    until("members are not held up by that", || west.holds(&east) && east.holds(&west)).await;

    // Oversized and nonsensical messages end their own session alone.
    let hello = |member: &Member| {
        let membership = Some(parts(&member.membership));
        let set = roots().set();
        let hello = Hello { set, features: Vec::new(), membership, version: String::new(), namespaces: None };
        wire::encode_message(&Message::Hello(hello))
    };
    let chunk = |kind: i32, size: usize| {
        let scope = Some(pb::Scope { kind, name: String::new() });
        let key = Some(pb::RecordKey { kind: 1, name: vec!["a".into()] });
        let records = vec![pb::Record { key, body: vec![0; size].into() }];
        let chunk = pb::Chunk { origin: "east".into(), scope, index: 0, last: true, records };
        pb::Message { kind: Some(pb::message::Kind::Chunk(chunk)) }
    };
    let north = Member::new("north", 3);
    for bad in [chunk(1, 5 * 1024 * 1024), chunk(1, 70_000), chunk(9, 3)] {
        let status = refused(address, &key(3), vec![hello(&north), bad]).await;
        assert!(matches!(status.code(), Code::OutOfRange | Code::InvalidArgument), "{status:?}");
    }
    let unknown = pb::Message { kind: None };
    let twice = vec![hello(&north), unknown, hello(&north)];
    assert!(refused(address, &key(3), twice).await.message().contains("second hello"));
    east.publish("after", Scope::Nodes, b"x");
    until("the others go on", || west.holds(&east)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evil_broker_is_caught() {
    let evil = Arc::new(AtomicBool::new(true));
    let switch = evil.clone();
    let outbound = move |_: &_, mut message| {
        if switch.load(Ordering::Relaxed) {
            let body: Arc<[u8]> = b"evil".as_slice().into();
            match &mut message {
                Message::Chunk(chunk) => chunk.records.iter_mut().for_each(|r| r.body = body.clone()),
                Message::Update(update) => {
                    for record in update.deltas.iter_mut().flat_map(|delta| &mut delta.upserts) {
                        record.body = body.clone();
                    }
                }
                _ => {}
            }
        }
        vec![message]
    };
    let directory = tempfile::tempdir().unwrap();
    let broker = broker(directory.path(), Hooks { outbound: Some(Arc::new(outbound)) }).await;
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(broker.address());
    west.join(broker.address());
    until("it is caught", || {
        let ended = west.ended.lock().unwrap().clone();
        ended.is_some_and(|text| text.contains("does not fit what east signed"))
    })
    .await;
    assert!(west.replica.lock().unwrap().origin(&east.id()).is_none());
    evil.store(false, Ordering::Relaxed);
    until("honest again", || west.holds(&east)).await;
}

/// A disk that is full while the switch is on.
struct Full {
    full: Arc<AtomicBool>,
    writes: Arc<Mutex<usize>>,
}

impl Store for Full {
    fn load(&mut self) -> Result<Stored, StoreError> {
        Ok(Stored::default())
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        if self.full.load(Ordering::Relaxed) {
            return Err(StoreError::Disk { path: "x".into(), reason: "no space left".into() });
        }
        *self.writes.lock().unwrap() += batch.origins.len();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_nobody() {
    let full = Arc::new(AtomicBool::new(true));
    let writes = Arc::new(Mutex::new(0));
    let store = Full { full: full.clone(), writes: writes.clone() };
    let broker = Broker::start(config(), Box::new(store), Hooks::default()).await.unwrap();
    let (mut east, mut west) = (Member::new("east", 1), Member::new("west", 2));
    east.join(broker.address());
    west.join(broker.address());
    until("served from memory", || west.holds(&east) && east.holds(&west)).await;
    let admin = broker.admin_address().unwrap();
    let ready = get(admin, "/readyz?verbose").await.unwrap();
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("[-]store"), "{ready}");
    assert!(get(admin, "/metrics").await.unwrap().contains("tombolo_broker_store_healthy 0"));
    assert_eq!(*writes.lock().unwrap(), 0);
    full.store(false, Ordering::Relaxed);
    until("written when there is room", || *writes.lock().unwrap() >= 2).await;
}

#[test]
fn what_cannot_be_used_is_refused_in_one_line() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let run = || {
        let output = command(directory.path(), "data").args(["--listen", "127.0.0.1:0"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("ERROR")).count(), 1, "{text}");
        text
    };
    assert!(run().contains("identity"));
    write_files(directory.path());
    std::fs::set_permissions(path("identity"), std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(run().contains("chmod 600"));
    write_files(directory.path());
    std::fs::write(path("broker.set"), "tombolo1.abc").unwrap();
    assert!(run().contains("tombolo init"));
    write_files(directory.path());
    std::fs::create_dir(path("data")).unwrap();
    std::fs::write(path("data/broker.redb"), "not a database").unwrap();
    assert!(run().contains("move it away and start again"));
}
