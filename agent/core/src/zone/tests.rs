//! Examples by the numbers of the MCS checklist, then any objects against a naive list of records.

use std::fmt::Write as _;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use tombolo_proto::model::{self, Backend, Family, ServiceType};

use super::*;
use crate::object::{Import, ServiceKey, Slice, SliceKey};

type Imports = BTreeMap<ServiceKey, Import>;
type Slices = BTreeMap<SliceKey, Slice>;

const ALL: usize = usize::MAX;

fn service(namespace: &str, name: &str) -> ServiceKey {
    ServiceKey { namespace: namespace.parse().unwrap(), name: name.parse().unwrap() }
}

fn port(name: &str, protocol: Protocol, port: u16) -> model::Port {
    let name = (!name.is_empty()).then(|| name.parse().unwrap());
    model::Port { name, protocol, port, app_protocol: None }
}

fn import(kind: ServiceType, ips: &[&str], ports: Vec<model::Port>) -> Import {
    Import {
        kind,
        ports,
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

fn backend(address: &str, hostname: &str, ready: bool) -> Backend {
    let hostname = (!hostname.is_empty()).then(|| hostname.parse().unwrap());
    Backend { address: address.parse().unwrap(), hostname, ready, serving: ready, terminating: false }
}

fn slice(
    service: &ServiceKey,
    source: &str,
    ports: &[model::Port],
    backends: Vec<Backend>,
) -> (SliceKey, Slice) {
    let family = Family::of(backends[0].address);
    let key = SliceKey { service: service.clone(), source: source.parse().unwrap(), family, index: 0 };
    (key, Slice { ports: ports.to_vec(), backends, ..Slice::default() })
}

/// The answer as text, sorted: `A 10.0.0.1`, `SRV 80 web.shop.svc`, or `NXDOMAIN`, `NODATA`.
fn ask(zone: &Zone, name: &str, kind: Kind) -> Vec<String> {
    let labels: Vec<&str> = name.split('.').filter(|label| !label.is_empty()).collect();
    match zone.answer(&labels, kind, 0, ALL) {
        Answer::NoName => vec!["NXDOMAIN".into()],
        Answer::NoData => vec!["NODATA".into()],
        Answer::Found(found) => {
            assert!(!found.cut);
            sorted(found.records.iter().map(text))
        }
    }
}

fn text(data: &Data<'_>) -> String {
    match data {
        Data::A(a) => format!("A {a}"),
        Data::Aaaa(a) => format!("AAAA {a}"),
        Data::Srv { port, target } => {
            target.labels().enumerate().fold(format!("SRV {port} "), |mut text, (at, label)| {
                write!(text, "{}{label}", if at > 0 { "." } else { "" }).unwrap();
                text
            })
        }
        Data::Txt(t) => format!("TXT {t}"),
        Data::Soa => "SOA".into(),
        Data::Ns => "NS".into(),
    }
}

fn sorted(texts: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort();
    texts
}

fn vip() -> Zone {
    let ports = vec![
        port("http", Protocol::Tcp, 80),
        port("dns", Protocol::Tcp, 53),
        port("dns-udp", Protocol::Udp, 53),
        port("", Protocol::Tcp, 9),
    ];
    let import = import(ServiceType::ClusterSetIP, &["198.19.0.5", "fd19::5"], ports);
    Zone::build(&[(service("shop", "web"), import)].into(), &Shelf::new())
}

fn headless() -> Zone {
    let key = service("shop", "db");
    let ports = [port("sql", Protocol::Tcp, 5432)];
    let slices = [
        slice(&key, "east", &ports, vec![backend("10.1.0.1", "db-0", true), backend("10.1.0.2", "", true)]),
        slice(&key, "east", &ports, vec![backend("fd01::1", "db-0", true), backend("::1", "", true)]),
        slice(&key, "west", &ports, vec![backend("10.2.0.1", "db-0", true), backend("10.2.0.2", "", false)]),
    ];
    Zone::build(&[(key, import(ServiceType::Headless, &[], ports.to_vec()))].into(), &slices.into())
}

#[test]
fn mcs_32_dns_version_and_the_zones_own_names() {
    let zone = Zone::default();
    assert_eq!(ask(&zone, "dns-version", Kind::Txt), ["TXT 1.0.0"]);
    assert_eq!(ask(&zone, "dns-version", Kind::A), ["NODATA"]);
    assert_eq!(ask(&zone, "x.dns-version", Kind::Txt), ["NXDOMAIN"]);
    assert_eq!(ask(&zone, "", Kind::Soa), ["SOA"]);
    assert_eq!(ask(&zone, "", Kind::Ns), ["NS"]);
    assert_eq!(ask(&zone, "", Kind::A), ["NODATA"]);
    assert_eq!(ask(&zone, "svc", Kind::A), ["NODATA"]);
    assert_eq!(ask(&zone, "shop.svc", Kind::A), ["NXDOMAIN"]);
    assert_eq!(Data::Txt(DNS_VERSION).ttl(), 28800);
}

#[test]
fn mcs_33_to_36_a_clusterset_ip() {
    let zone = vip();
    assert_eq!(ask(&zone, "web.shop.svc", Kind::A), ["A 198.19.0.5"]);
    assert_eq!(ask(&zone, "web.shop.svc", Kind::Aaaa), ["AAAA fd19::5"]);
    assert_eq!(ask(&zone, "web.shop.svc", Kind::Txt), ["NODATA"]);
    assert_eq!(ask(&zone, "_http._tcp.web.shop.svc", Kind::Srv), ["SRV 80 web.shop.svc"]);
    assert_eq!(ask(&zone, "_http._tcp.web.shop.svc", Kind::A), ["NODATA"]);
    assert_eq!(ask(&zone, "_http._udp.web.shop.svc", Kind::Srv), ["NXDOMAIN"]);
    assert_eq!(ask(&zone, "_tcp.web.shop.svc", Kind::Srv), ["NODATA"]);
    assert_eq!(ask(&zone, "_sctp.web.shop.svc", Kind::Srv), ["NXDOMAIN"]);
    assert_eq!(ask(&zone, "__tcp.web.shop.svc", Kind::Srv), ["NXDOMAIN"]);
    // One record for a port, whatever its protocols.
    let bare = ["SRV 53 web.shop.svc", "SRV 80 web.shop.svc", "SRV 9 web.shop.svc"];
    assert_eq!(ask(&zone, "web.shop.svc", Kind::Srv), bare);
    for name in
        ["east.web.shop.svc", "x.east.web.shop.svc", "web.other.svc", "other.shop.svc", "web.shop.pod", "x"]
    {
        assert_eq!(ask(&zone, name, Kind::A), ["NXDOMAIN"], "{name}");
    }
    assert_eq!(ask(&zone, "shop.svc", Kind::A), ["NODATA"]);
    assert_eq!(ask(&zone, "web.shop.svc", Kind::Any), ["A 198.19.0.5"]);
}

#[test]
fn mcs_37_to_40_a_headless_service() {
    let zone = headless();
    assert_eq!(ask(&zone, "db.shop.svc", Kind::A), ["A 10.1.0.1", "A 10.1.0.2", "A 10.2.0.1"]);
    assert_eq!(ask(&zone, "db.shop.svc", Kind::Aaaa), ["AAAA ::1", "AAAA fd01::1"]);
    assert_eq!(ask(&zone, "db-0.east.db.shop.svc", Kind::A), ["A 10.1.0.1"]);
    assert_eq!(ask(&zone, "db-0.east.db.shop.svc", Kind::Aaaa), ["AAAA fd01::1"]);
    assert_eq!(ask(&zone, "db-0.west.db.shop.svc", Kind::A), ["A 10.2.0.1"]);
    assert_eq!(ask(&zone, "db-0.west.db.shop.svc", Kind::Aaaa), ["NODATA"]);
    assert_eq!(ask(&zone, "10-1-0-2.east.db.shop.svc", Kind::A), ["A 10.1.0.2"]);
    assert_eq!(ask(&zone, "10-2-0-2.west.db.shop.svc", Kind::A), ["NXDOMAIN"]);
    let written = "0000-0000-0000-0000-0000-0000-0000-0001.east.db.shop.svc";
    assert_eq!(ask(&zone, written, Kind::Aaaa), ["AAAA ::1"]);
    assert_eq!(ask(&zone, "east.db.shop.svc", Kind::A), ["NODATA"]);
    assert_eq!(ask(&zone, "north.db.shop.svc", Kind::A), ["NXDOMAIN"]);
    let targets = [
        format!("SRV 5432 {written}"),
        "SRV 5432 10-1-0-2.east.db.shop.svc".into(),
        "SRV 5432 db-0.east.db.shop.svc".into(),
        "SRV 5432 db-0.west.db.shop.svc".into(),
    ];
    assert_eq!(ask(&zone, "_sql._tcp.db.shop.svc", Kind::Srv), sorted(targets.clone()));
    assert_eq!(ask(&zone, "db.shop.svc", Kind::Srv), sorted(targets));
}

#[test]
fn mcs_38_no_ready_endpoint_no_name() {
    let key = service("shop", "db");
    let ports = [port("sql", Protocol::Tcp, 5432)];
    let slices = [slice(&key, "east", &ports, vec![backend("10.1.0.1", "db-0", false)])];
    let import = import(ServiceType::Headless, &[], ports.to_vec());
    let zone = Zone::build(&[(key, import)].into(), &slices.into());
    for name in ["db.shop.svc", "_sql._tcp.db.shop.svc", "db-0.east.db.shop.svc", "shop.svc"] {
        assert_eq!(ask(&zone, name, Kind::A), ["NXDOMAIN"], "{name}");
    }
}

#[test]
fn additional_addresses_are_the_targets() {
    let zone = headless();
    let Answer::Found(found) = zone.answer(&["_sql", "_tcp", "db", "shop", "svc"], Kind::Srv, 1, ALL) else {
        panic!("no records");
    };
    let targets: BTreeSet<_> = found.additional.iter().map(|(target, _)| *target).collect();
    let named: BTreeSet<_> = found
        .records
        .iter()
        .map(|record| match record {
            Data::Srv { target, .. } => *target,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(targets, named);
    assert_eq!(found.additional.len(), 5);
}

/// Thousands of backends: the bare name shows a constant subset that is fair to the clusters and the same in both
/// families; every endpoint keeps its own name.
#[test]
fn mcs_37_42_a_large_set_is_cut_fairly() {
    let key = service("shop", "db");
    let of = |cluster: u8, count: u16, v6: bool| -> Vec<Backend> {
        let address = |at: u16| match v6 {
            false => format!("10.{cluster}.{}.{}", at / 250, at % 250),
            true => format!("fd0{cluster}::1:{at:x}"),
        };
        (0..count).map(|at| backend(&address(at), &format!("db-{at}"), true)).collect()
    };
    let slices = [
        slice(&key, "east", &[], of(1, 3000, false)),
        slice(&key, "east", &[], of(1, 3000, true)),
        slice(&key, "west", &[], of(2, 100, false)),
        slice(&key, "west", &[], of(2, 100, true)),
    ];
    let zone = Zone::build(&[(key, import(ServiceType::Headless, &[], vec![]))].into(), &slices.into());
    let (v4, v6) = (ask(&zone, "db.shop.svc", Kind::A), ask(&zone, "db.shop.svc", Kind::Aaaa));
    assert_eq!((v4.len(), v6.len()), (MAX_HOSTS, MAX_HOSTS));
    assert_eq!(v4.iter().filter(|a| a.starts_with("A 10.2.")).count(), 100);
    assert_eq!(ask(&zone, "db-2999.east.db.shop.svc", Kind::A), ["A 10.1.11.249"]);
    let last =
        |text: &str, radix: u32| u16::from_str_radix(text.rsplit([':', '.']).next().unwrap(), radix).unwrap();
    let hosts4: BTreeSet<u16> = v4
        .iter()
        .filter(|a| a.starts_with("A 10.1."))
        .map(|a| a.split('.').nth(2).unwrap().parse::<u16>().unwrap() * 250 + last(a, 10))
        .collect();
    let hosts6 = v6.iter().filter(|a| a.contains("fd01")).map(|a| last(a, 16)).collect();
    assert_eq!(hosts4, hosts6);
}

#[test]
fn order_takes_turns_and_a_cut_is_said() {
    let zone = headless();
    let ask = |turn, most| match zone.answer(&["db", "shop", "svc"], Kind::A, turn, most) {
        Answer::Found(found) => (found.records, found.cut),
        other => panic!("{other:?}"),
    };
    let firsts: BTreeSet<_> = (0..3).map(|turn| ask(turn, ALL).0[0]).collect();
    assert_eq!(firsts.len(), 3);
    assert_eq!(ask(u32::MAX, 2).0.len(), 2);
    assert!(ask(7, 2).1 && !ask(7, 3).1);
}

#[test]
fn names_too_long_for_dns_do_not_exist() {
    let long = "a".repeat(63);
    let key = service(&long, &long);
    let ports = [port(&long, Protocol::Tcp, 1), port("ok", Protocol::Tcp, 1)];
    let slices = [slice(&key, &long, &ports, vec![backend("10.0.0.1", &long, true)])];
    let zone = Zone::build(&[(key, import(ServiceType::Headless, &[], vec![]))].into(), &slices.into());
    let bare = format!("{long}.{long}.svc");
    assert_eq!(ask(&zone, &bare, Kind::A), ["A 10.0.0.1"]);
    assert_eq!(ask(&zone, &bare, Kind::Srv), ["NODATA"]);
    for name in [format!("{long}.{long}.{bare}"), format!("_{long}._tcp.{bare}"), format!("_ok._tcp.{bare}")]
    {
        assert_eq!(ask(&zone, &name, Kind::Any), ["NXDOMAIN"], "{name}");
    }
}

/// The same zone, obviously right and slow: all its records, and names that exist without any.
struct Naive(Vec<(String, Option<String>)>);

impl Naive {
    fn build(imports: &Imports, slices: &Slices) -> Self {
        let mut all = vec![
            (String::new(), Some("SOA".into())),
            (String::new(), Some("NS".into())),
            ("dns-version".into(), Some("TXT 1.0.0".into())),
            ("ns.dns".into(), None),
            ("svc".into(), None),
        ];
        let address = |a: IpAddr| format!("{} {a}", if a.is_ipv4() { "A" } else { "AAAA" });
        for (key, import) in imports {
            let bare = format!("{}.{}.svc", key.name, key.namespace);
            let mut targets: Vec<(String, &[model::Port])> = Vec::new();
            if import.kind == ServiceType::ClusterSetIP {
                all.push((bare.clone(), None));
                all.extend(import.ips.iter().map(|ip| (bare.clone(), Some(address(*ip)))));
                targets.push((bare.clone(), &import.ports));
            } else {
                for (of, slice) in slices.iter().filter(|(of, _)| of.service == *key) {
                    for b in slice.backends.iter().filter(|b| b.ready && Family::of(b.address) == of.family) {
                        let name = match (&b.hostname, b.address) {
                            (Some(hostname), _) => hostname.to_string(),
                            (None, IpAddr::V4(a)) => a.octets().map(|o| o.to_string()).join("-"),
                            (None, a) => a.to_string().replace(':', "-"),
                        };
                        let name = format!("{name}.{}.{bare}", of.source);
                        all.push((bare.clone(), Some(address(b.address))));
                        all.push((name.clone(), Some(address(b.address))));
                        targets.push((name, &slice.ports));
                    }
                }
            }
            for (target, ports) in targets {
                for p in ports {
                    let record = Some(format!("SRV {} {target}", p.port));
                    all.push((bare.clone(), record.clone()));
                    if let Some(name) = &p.name {
                        let protocol = p.protocol.as_str().to_lowercase();
                        all.push((format!("_{name}._{protocol}.{bare}"), record));
                    }
                }
            }
        }
        Self(all)
    }

    fn ask(&self, name: &str, kind: &str) -> Vec<String> {
        let here = self.0.iter().filter(|(owner, _)| owner == name);
        let found: BTreeSet<String> = here
            .filter_map(|(_, record)| record.clone())
            .filter(|r| r.split(' ').next() == Some(kind))
            .collect();
        let below = format!(".{name}");
        match found.is_empty() {
            false => found.into_iter().collect(),
            true if self.0.iter().any(|(owner, _)| owner == name || owner.ends_with(&below)) => {
                vec!["NODATA".into()]
            }
            true => vec!["NXDOMAIN".into()],
        }
    }
}

fn one_of<T: Clone + std::fmt::Debug + 'static>(all: &'static [T]) -> impl Strategy<Value = T> {
    proptest::sample::select(all)
}

fn any_port() -> impl Strategy<Value = model::Port> {
    let protocols = one_of(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
    (one_of(&["", "http", "sql"]), protocols, 1u16..4).prop_map(|(n, p, number)| port(n, p, number))
}

fn any_service() -> impl Strategy<Value = ServiceKey> {
    (one_of(&["a", "b", "svc"]), one_of(&["web", "db", "svc"]))
        .prop_map(|(namespace, name)| service(namespace, name))
}

fn any_imports() -> impl Strategy<Value = Imports> {
    let kinds = one_of(&[ServiceType::ClusterSetIP, ServiceType::Headless]);
    let ips = vec(one_of(&["198.19.0.5", "fd19::5", "198.19.0.6"]), 0..3);
    let any = (kinds, ips, vec(any_port(), 0..4)).prop_map(|(kind, ips, ports)| import(kind, &ips, ports));
    btree_map(any_service(), any, 0..5)
}

fn any_slices() -> impl Strategy<Value = Slices> {
    let addresses = one_of(&["10.1.0.1", "10.1.0.2", "10.2.0.1", "fd01::1", "fd01::2", "fd02:1:2:3:4:5:6:7"]);
    let hosts = one_of(&["", "", "db-0", "10-1-0-1"]);
    let any =
        (addresses, hosts, any::<bool>()).prop_map(|(address, host, ready)| backend(address, host, ready));
    let key = (any_service(), one_of(&["east", "west"]), one_of(&Family::ALL), 0u32..2).prop_map(
        |(service, source, family, index)| SliceKey {
            service,
            source: source.parse().unwrap(),
            family,
            index,
        },
    );
    let slice = (vec(any_port(), 0..3), vec(any, 0..5)).prop_map(|(ports, backends)| Slice {
        ports,
        backends,
        ..Slice::default()
    });
    btree_map(key, slice, 0..8)
}

fn any_name() -> impl Strategy<Value = Option<String>> {
    let labels = [
        "svc", "a", "b", "web", "db", "east", "west", "db-0", "10-1-0-1", "_http", "_tcp", "_udp", "dns", "",
        "_",
    ];
    option::of(vec(proptest::sample::select(labels.to_vec()), 0..7).prop_map(|labels| labels.join(".")))
}

proptest! {
    #[test]
    fn equals_the_naive_zone(imports in any_imports(), slices in any_slices(), other in any_name(), turn: u32) {
        let shelves = (imports.clone().into(), slices.clone().into());
        let (zone, naive) = (Zone::build(&shelves.0, &shelves.1), Naive::build(&imports, &slices));
        prop_assert_eq!(&zone, &Zone::build(&shelves.0, &shelves.1));
        let mut names: BTreeSet<String> = other.into_iter().filter(|name| !name.contains("..")).collect();
        names = names.into_iter().map(|name| name.trim_matches('.').to_owned()).collect();
        for (owner, _) in &naive.0 {
            // It and everything above and beside it.
            names.extend(owner.match_indices('.').map(|(at, _)| owner[at + 1..].to_owned()));
            names.extend([owner.clone(), format!("x.{owner}").trim_matches('.').to_owned()]);
        }
        let kinds = [(Kind::A, "A"), (Kind::Aaaa, "AAAA"), (Kind::Srv, "SRV"), (Kind::Txt, "TXT"), (Kind::Soa, "SOA")];
        for name in names {
            for (kind, text) in kinds {
                prop_assert_eq!(ask(&zone, &name, kind), naive.ask(&name, text), "{} {}", name, text);
            }
            let labels: Vec<&str> = name.split('.').filter(|l| !l.is_empty()).collect();
            for most in [1, 2] {
                if let Answer::Found(found) = zone.answer(&labels, Kind::Srv, turn, most) {
                    prop_assert!((1..=most).contains(&found.records.len()));
                    prop_assert!(found.additional.len() <= most);
                    prop_assert_eq!(found.cut, naive.ask(&name, "SRV").len() > most);
                }
            }
        }
    }

    #[test]
    fn any_question_has_an_answer(labels in vec(".{0,9}", 0..7), turn: u32, most in 0usize..3) {
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        for zone in [vip(), headless(), Zone::default()] {
            for kind in [Kind::A, Kind::Any, Kind::Srv, Kind::Other] {
                let _ = zone.answer(&labels, kind, turn, most);
            }
        }
    }
}
