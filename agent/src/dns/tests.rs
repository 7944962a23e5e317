//! Bytes in, bytes out; and the whole server on loopback, with `dig` as an outside witness.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::sync::watch;
use tombolo_agent_core::object::{Import, ServiceKey, Slice, SliceKey};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::zone::Zone;
use tombolo_proto::model::{Backend, Family, Port, Protocol, ServiceType};

use super::*;
use crate::hold::sockets;

fn import(kind: ServiceType, ips: &[&str], ports: &[Port]) -> Import {
    Import {
        kind,
        ports: ports.to_vec(),
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        families: Family::ALL.to_vec(),
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        clusters: BTreeSet::new(),
        preferences: Default::default(),
    }
}

/// `web.shop`: a ClusterSetIP of both families. `db.shop`: headless, one endpoint in `east`, one in `west`.
/// `big.shop`: headless, 900 endpoints in both families.
fn zone() -> Zone {
    let service = |name: &str| ServiceKey { namespace: "shop".parse().unwrap(), name: name.parse().unwrap() };
    let port = |name: &str, port| Port {
        name: Some(name.parse().unwrap()),
        protocol: Protocol::Tcp,
        port,
        app_protocol: None,
    };
    let backend = |address: String, hostname: Option<String>| Backend {
        address: address.parse().unwrap(),
        hostname: hostname.map(|name| name.parse().unwrap()),
        ready: true,
        serving: true,
        terminating: false,
    };
    let (http, sql) = (port("http", 80), port("sql", 5432));
    let imports = Shelf::from([
        (service("web"), import(ServiceType::ClusterSetIP, &["198.19.0.5", "fd19::5"], &[http])),
        (service("db"), import(ServiceType::Headless, &[], std::slice::from_ref(&sql))),
        (service("big"), import(ServiceType::Headless, &[], std::slice::from_ref(&sql))),
    ]);
    let slice = |name, source: &str, family, backends| {
        let key = SliceKey { service: service(name), source: source.parse().unwrap(), family, index: 0 };
        (key, Slice { ports: vec![sql.clone()], backends, ..Slice::default() })
    };
    let big = |at: u32| Some(format!("a-host-with-a-rather-long-name-{at}"));
    let slices = Shelf::from([
        slice("db", "east", Family::V4, vec![backend("10.1.0.1".into(), Some("db-0".into()))]),
        slice("db", "east", Family::V6, vec![backend("fd01::1".into(), Some("db-0".into()))]),
        slice("db", "west", Family::V4, vec![backend("10.2.0.1".into(), None)]),
        slice(
            "big",
            "east",
            Family::V4,
            (0..900).map(|at| backend(format!("10.9.{}.{}", at / 250, at % 250), big(at))).collect(),
        ),
        slice(
            "big",
            "east",
            Family::V6,
            (0..900).map(|at| backend(format!("fd09::{at:x}"), big(at))).collect(),
        ),
    ]);
    Zone::build(&imports, &slices)
}

fn query(name: &str, record: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record));
    message
}

fn with_edns(mut message: Message, payload: u16, version: u8) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload).set_version(version);
    message.set_edns(edns);
    message
}

const CLIENT: &str = "10.0.0.1:5353";

fn reply(query: &[u8], over: Over) -> Option<(Message, usize)> {
    let reply = answer(Some(&zone()), query, CLIENT.parse().unwrap(), over, 0)?;
    Some((Message::from_vec(&reply.bytes).expect("an answer can be read"), reply.bytes.len()))
}

fn ask(message: &Message, over: Over) -> Message {
    reply(&message.to_vec().unwrap(), over).expect("an answer").0
}

#[test]
fn case_comes_back_as_it_was_asked() {
    let answer = ask(&query("WeB.shop.SVC.Clusterset.LOCAL.", RecordType::A), Over::Udp);
    let asked = Name::from_ascii("WeB.shop.SVC.Clusterset.LOCAL.").unwrap();
    assert!(answer.queries[0].name().eq_case(&asked));
    assert!(answer.answers[0].name.eq_case(&asked));
    assert!(answer.metadata.authoritative && !answer.metadata.recursion_available);
    assert!(answer.metadata.recursion_desired && answer.metadata.id == 4711);
}

#[test]
fn denials_carry_a_short_soa() {
    for (name, code) in [("x.shop.svc", ResponseCode::NXDomain), ("shop.svc", ResponseCode::NoError)] {
        let answer = ask(&query(&format!("{name}.clusterset.local."), RecordType::A), Over::Udp);
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (code, 0));
        let soa = &answer.authorities[0];
        assert_eq!((soa.name.to_ascii().as_str(), soa.ttl), ("clusterset.local.", 1));
        let RData::SOA(soa) = &soa.data else { panic!("{soa:?}") };
        assert_eq!(soa.minimum, 1);
    }
}

#[test]
fn what_is_not_ours_is_refused() {
    let mut chaos = query("dns-version.clusterset.local.", RecordType::TXT);
    chaos.queries[0].set_query_class(hickory_proto::rr::DNSClass::CH);
    for message in [
        query("example.com.", RecordType::A),
        query("local.", RecordType::A),
        query(".", RecordType::NS),
        query("xclusterset.local.", RecordType::A),
        query("web.shop.svc.cluster.local.", RecordType::A),
        query("clusterset.local.", RecordType::AXFR),
        query("clusterset.local.", RecordType::IXFR),
        chaos,
    ] {
        for over in [Over::Udp, Over::Tcp] {
            let answer = ask(&message, over);
            assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{message:?}");
            assert!(answer.answers.is_empty() && !answer.metadata.authoritative);
        }
    }
}

#[test]
fn oddities_are_named() {
    let code = |message: &Message| ask(message, Over::Udp).metadata.response_code;
    let ours = || query("web.shop.svc.clusterset.local.", RecordType::A);
    let newer = ask(&with_edns(ours(), 1232, 1), Over::Udp);
    assert_eq!(u16::from(newer.metadata.response_code), 16, "BADVERS");
    assert_eq!(newer.edns.unwrap().version(), 0);
    let mut status = ours();
    status.metadata.op_code = OpCode::Status;
    assert_eq!(code(&status), ResponseCode::NotImp);
    let mut two = ours();
    two.add_query(Query::query(Name::root(), RecordType::A));
    assert_eq!(code(&two), ResponseCode::FormErr);
    let mut response = ours();
    response.metadata.message_type = MessageType::Response;
    assert_eq!(reply(&response.to_vec().unwrap(), Over::Udp), None);
    assert_eq!(reply(&[0; 11], Over::Udp), None);
    // No zone yet.
    let bytes = ours().to_vec().unwrap();
    let answer = answer(None, &bytes, CLIENT.parse().unwrap(), Over::Udp, 0).unwrap();
    assert_eq!(answer.rcode, Rcode::ServFail);
    // From nowhere.
    assert_eq!(super::answer(None, &bytes, "10.0.0.1:0".parse().unwrap(), Over::Udp, 0), None);
}

#[test]
fn any_gives_one_set() {
    let answer = ask(&query("web.shop.svc.clusterset.local.", RecordType::ANY), Over::Udp);
    assert_eq!(answer.answers.len(), 1);
}

#[test]
fn sizes_are_kept_and_cuts_are_said() {
    for record in [RecordType::A, RecordType::AAAA, RecordType::SRV] {
        let plain = query("big.shop.svc.clusterset.local.", record);
        for (message, most) in [
            (plain.clone(), 512),
            (with_edns(plain.clone(), 100, 0), 512),
            (with_edns(plain.clone(), 1000, 0), 1000),
            (with_edns(plain.clone(), 65535, 0), 1232),
        ] {
            let (answer, length) = reply(&message.to_vec().unwrap(), Over::Udp).unwrap();
            assert!(answer.metadata.truncation);
            assert!(length <= most && length + 120 > most, "{length} of {most}");
            assert_eq!(answer.edns.is_some(), message.edns.is_some());
        }
        let (answer, _) = reply(&plain.to_vec().unwrap(), Over::Tcp).unwrap();
        assert_eq!(answer.metadata.truncation, record == RecordType::SRV, "{}", answer.answers.len());
        if record != RecordType::SRV {
            assert_eq!(answer.answers.len(), 900);
        }
    }
}

/// Whatever comes, nothing panics, and what goes back is a DNS answer to it within its limit.
fn check_any(bytes: &[u8]) -> Result<(), TestCaseError> {
    for (over, limit) in [(Over::Udp, 1232), (Over::Tcp, 65535)] {
        if let Some((message, length)) = reply(bytes, over) {
            prop_assert!(length <= limit);
            prop_assert_eq!(message.metadata.message_type, MessageType::Response);
            prop_assert_eq!(message.metadata.id.to_be_bytes(), [bytes[0], bytes[1]]);
            prop_assert!(bytes[2] & 0x80 == 0, "a reply is never answered");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes(bytes in vec(any::<u8>(), 0..600)) {
        check_any(&bytes)?;
    }

    #[test]
    fn damaged_queries(
        name in proptest::sample::select(vec!["big.shop.svc", "_sql._tcp.db.shop.svc", "web.shop.svc", "x"]),
        record in proptest::sample::select(vec![RecordType::A, RecordType::SRV, RecordType::ANY, RecordType::TXT]),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes =
            with_edns(query(&format!("{name}.clusterset.local."), record), 900, 0).to_vec().unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        check_any(&bytes)?;
        check_any(&bytes[..cut.index(bytes.len())])?;
    }
}

/// A server on loopback, of both families.
struct Running {
    runtime: tokio::runtime::Runtime,
    server: Option<Server>,
    held: crate::hold::DnsSockets,
    zone: watch::Sender<Option<Arc<Zone>>>,
    metrics: DnsMetrics,
    v4: SocketAddr,
    v6: SocketAddr,
}

impl Running {
    fn start() -> Self {
        let held = sockets(&["127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap()]).unwrap();
        let at = |at: usize| held.tcp[at].local_addr().unwrap();
        let mut running = Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
            server: None,
            v4: at(0),
            v6: at(1),
            held,
            zone: watch::Sender::new(Some(Arc::new(zone()))),
            metrics: DnsMetrics::new(),
        };
        running.serve();
        running
    }

    /// As a new agent would, on the sockets that are held.
    fn serve(&mut self) {
        let sockets = crate::hold::DnsSockets {
            udp: self.held.udp.iter().map(|socket| socket.try_clone().unwrap()).collect(),
            tcp: self.held.tcp.iter().map(|socket| socket.try_clone().unwrap()).collect(),
        };
        let _runtime = self.runtime.enter();
        self.server = Some(serve(sockets, self.zone.subscribe(), self.metrics.clone()).unwrap());
    }

    fn dig(&self, arguments: &str) -> String {
        let at = if arguments.contains("-6") { self.v6 } else { self.v4 };
        let output = Command::new("dig")
            .arg(format!("@{}", at.ip()))
            .args(["-p", &at.port().to_string(), "+tries=1", "+time=5", "+norecurse"])
            .args(arguments.split_whitespace())
            .output()
            .expect("`dig` witnesses these tests: install Debian's bind9-dnsutils");
        String::from_utf8(output.stdout).unwrap().replace('\t', " ")
    }
}

fn ask_udp(server: SocketAddr, message: &Message) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.connect(server).unwrap();
    socket.send(&message.to_vec().unwrap()).unwrap();
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

#[test]
fn dig_agrees() {
    let running = Running::start();
    let short = |arguments: &str| {
        let mut lines: Vec<String> =
            running.dig(&format!("{arguments} +short")).lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    for family in ["-4", "-6"] {
        for over in ["+notcp", "+tcp"] {
            let with = |question: &str| short(&format!("{family} {over} {question}"));
            assert_eq!(with("web.shop.svc.clusterset.local A"), ["198.19.0.5"]);
            assert_eq!(with("web.shop.svc.clusterset.local AAAA"), ["fd19::5"]);
            assert_eq!(
                with("_http._tcp.web.shop.svc.clusterset.local SRV"),
                ["0 100 80 web.shop.svc.clusterset.local."]
            );
            assert_eq!(with("dns-version.clusterset.local TXT"), ["\"1.0.0\""]);
            assert_eq!(with("db.shop.svc.clusterset.local A"), ["10.1.0.1", "10.2.0.1"]);
            assert_eq!(with("db-0.east.db.shop.svc.clusterset.local AAAA"), ["fd01::1"]);
            assert_eq!(with("10-2-0-1.west.db.shop.svc.clusterset.local A"), ["10.2.0.1"]);
        }
    }
    let has = |arguments: &str, wanted: &[&str]| {
        let output = running.dig(arguments);
        for text in wanted {
            assert!(output.contains(text), "{text:?} is not in:\n{output}");
        }
        assert!(!output.contains("malformed") && !output.contains("extra bytes"), "{output}");
    };
    has("x.shop.svc.clusterset.local A", &["status: NXDOMAIN", "flags: qr aa;", "ns.dns.clusterset.local."]);
    has("shop.svc.clusterset.local A", &["status: NOERROR", "ANSWER: 0, AUTHORITY: 1"]);
    has("clusterset.local SOA", &["hostmaster.clusterset.local. 1 7200 1800 86400 1"]);
    has("clusterset.local NS", &["ns.dns.clusterset.local."]);
    has("example.com A", &["status: REFUSED", "flags: qr;"]);
    has("+tcp clusterset.local AXFR", &["Transfer failed"]);
    has("+edns=0 +bufsize=4096 web.shop.svc.clusterset.local", &["EDNS: version: 0, flags:; udp: 1232"]);
    has("+dnssec web.shop.svc.clusterset.local", &["flags: do;"]);
    has("+edns=1 +noednsnegotiation web.shop.svc.clusterset.local", &["status: BADVERS"]);
    has("+noedns db.shop.svc.clusterset.local SRV", &["ANSWER: 2", "ADDITIONAL: 3"]);
    has("+ignore big.shop.svc.clusterset.local", &["flags: qr aa tc;", "EDNS: version: 0"]);
    assert_eq!(short("big.shop.svc.clusterset.local AAAA").len(), 900, "again over TCP");
    has("WEB.shop.svc.clusterset.local", &["WEB.shop.svc.clusterset.local. 4 IN A"]);
}

#[test]
fn noise_kills_nothing() {
    let running = Running::start();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut state = 1u64;
    let mut noise = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    for round in 0..400usize {
        let bytes: Vec<u8> = (0..(round * 7) % 5000).map(|_| noise()).collect();
        socket.send_to(&bytes, running.v4).unwrap();
        if round % 20 == 0 {
            let mut stream = TcpStream::connect(running.v4).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // Closed in the end, whatever it was.
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut buffer = [0; 4096];
    while let Ok(length) = socket.recv(&mut buffer) {
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        let code = answer.metadata.response_code;
        assert!(matches!(code, ResponseCode::FormErr | ResponseCode::NotImp), "{answer:?}");
    }
    let answer = ask_udp(running.v4, &query("web.shop.svc.clusterset.local.", RecordType::A));
    assert_eq!(answer.answers.len(), 1);
    let counted = |rcode| running.metrics.count(rcode) >= 1;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !(counted(Rcode::NoError) && counted(Rcode::FormErr)) {
        assert!(Instant::now() < deadline, "answers are counted");
        std::thread::yield_now();
    }
}

/// Else conntrack would not undo the pods' NAT: a connected socket hears only who it asked.
#[test]
fn answers_come_from_the_address_that_was_asked() {
    let sockets = sockets(&["0.0.0.0:0".parse().unwrap()]).unwrap();
    let port = sockets.tcp[0].local_addr().unwrap().port();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let zone = watch::Sender::new(Some(Arc::new(zone())));
    let _runtime = runtime.enter();
    let _server = serve(sockets, zone.subscribe(), DnsMetrics::new()).unwrap();
    let message = query("web.shop.svc.clusterset.local.", RecordType::A);
    for address in ["127.0.0.1", "127.0.0.3"] {
        assert_eq!(ask_udp(format!("{address}:{port}").parse().unwrap(), &message).answers.len(), 1);
    }
}

/// Queries that come while nobody serves wait, and the next agent answers them.
#[test]
fn held_sockets_lose_no_query() {
    let mut running = Running::start();
    let message = query("web.shop.svc.clusterset.local.", RecordType::A);
    assert_eq!(ask_udp(running.v4, &message).answers.len(), 1);
    let mut server = running.server.take().unwrap();
    server.stop.write(1).unwrap();
    server.threads.drain(..).for_each(|thread| thread.join().unwrap());
    drop(server);

    // More than a default queue would hold, and of each client as many answers as its own queue holds.
    let bytes = message.to_vec().unwrap();
    let clients: Vec<UdpSocket> = (0..15).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for client in &clients {
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        for id in 0..100u16 {
            let mut bytes = bytes.clone();
            bytes[..2].copy_from_slice(&id.to_be_bytes());
            client.send_to(&bytes, running.v4).unwrap();
        }
    }
    let started = Instant::now();
    // The new one does not know its zone at once.
    let zone = running.zone.send_replace(None);
    running.serve();
    running.zone.send_replace(zone);
    let mut buffer = [0; 512];
    for client in clients {
        let mut open: BTreeSet<u16> = (0..100).collect();
        while !open.is_empty() {
            let length = client.recv(&mut buffer).expect("all are answered");
            let answer = Message::from_vec(&buffer[..length]).unwrap();
            assert_eq!(answer.answers.len(), 1, "{answer:?}");
            open.remove(&answer.metadata.id);
        }
    }
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn counters_are_named_as_documented() {
    let metrics = DnsMetrics::new();
    let mut registry = prometheus_client::registry::Registry::with_prefix("tombolo");
    metrics.register(&mut registry);
    metrics.answered(Rcode::NxDomain, Duration::from_micros(30));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains("tombolo_dns_requests_total{rcode=\"NXDOMAIN\"} 1"), "{text}");
    assert!(text.contains("tombolo_dns_request_duration_seconds_count 1"), "{text}");
}
