//! A hostile member, through an honest broker and through one that lets everything pass.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tombolo_agent::api::directory::Directory;
use tombolo_lab::{Lab, wait_until};
use tombolo_proto::pb;

use crate::evil::Evil;
use crate::forged::{self, mark};
use crate::honest::{self, CLOSED, SOON, intact, told};
use crate::mallory::{self, Mallory, PODS, at, backends, endpoint, export, gateway, service};

const MALLORY: &str = "mallory";

fn admitted(lab: &Lab) -> Result<Mallory> {
    let mallory = Mallory::admitted(lab, MALLORY, &PODS, &["production", "team-*"])?;
    mallory.join();
    Ok(mallory)
}

/// Waits until both clusters have taken what was said last.
fn arrived(lab: &Lab, mark: &str) -> Result<()> {
    for pod in ["eu-c", "us-c"] {
        wait_until(&format!("{mark} to arrive"), SOON, || {
            let (code, addresses) = lab.ask(pod, &format!("{mark}.team-blue.svc.clusterset.local"), 1)?;
            ensure!(code == 0 && !addresses.is_empty(), "{pod}: {code}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn cve_2026_66785_foreign_cidr() {
    foreign_cidr("hostile::cve_2026_66785_foreign_cidr", false);
}

#[test]
fn cve_2026_66785_foreign_cidr_through_an_accomplice() {
    foreign_cidr("hostile::cve_2026_66785_foreign_cidr_through_an_accomplice", true);
}

fn foreign_cidr(name: &str, accomplice: bool) {
    honest::story(name, || {
        let lab = honest::up()?;
        let _evil = accomplice.then(|| Evil::accomplice(&lab)).transpose()?;
        let mut mallory = admitted(&lab)?;
        let pod = |name: &str| lab.topology().pod(name);
        // Of others: pods, tunnels, nodes, brokers, services, ClusterSetIPs, the internet; and the liar's own, so that
        // a test that looks at nothing fails.
        let (_, vips) = lab.ask("us-c", "api-service.production.svc.clusterset.local", 1)?;
        let vip = *vips.first().context("a ClusterSetIP")?;
        let mut foreign: Vec<IpAddr> =
            vec![vip, pod("eu-c")?.v4.into(), pod("eu-c")?.v6.into(), pod("us-c")?.v4.into()];
        foreign.extend(lab.topology().underlay("eu-gw1")?);
        foreign.extend(lab.topology().underlay("broker")?);
        for text in [
            "198.18.0.1",
            "198.18.1.1",
            "198.19.0.1",
            "10.96.1.10",
            "10.0.0.1",
            "8.8.8.8",
            "2001:db8::1",
            "fd19:746f:6d62::1",
        ] {
            foreign.push(text.parse()?);
        }
        let own: IpAddr = "10.66.9.9".parse()?;
        let named: Vec<(&str, IpAddr)> = foreign.iter().chain([&own]).map(|a| ("api-0", *a)).collect();
        let special = [
            "0.0.0.0",
            "127.0.0.1",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.1.2.10",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "64:ff9b::a01:20a",
            "2002:a01:20a::1",
        ];
        for (name, headless) in [("stolen", false), ("stolen-names", true)] {
            mallory.say([
                export("production", name, &service(headless))?,
                backends("production", name, 0, &at(&named))?,
            ])?;
            for (shard, address) in (1..).zip(special) {
                mallory.say([backends(
                    "production",
                    name,
                    shard,
                    &at(&[("api-0", address.parse()?), ("api-0", own)]),
                )?])?;
            }
        }
        // Joining a service of another with the other's own pods, and with others'.
        mallory.say([
            export("production", "db", &service(true))?,
            backends("production", "db", 0, &at(&named))?,
            export("production", "api-service", &service(false))?,
            backends("production", "api-service", 0, &at(&named))?,
        ])?;
        // Nodes that hold the world.
        let body = |rank, prefixes: &[&str], v4: &str| -> Result<pb::Endpoint> {
            let prefixes = prefixes.iter().map(|p| mallory::prefix(p)).collect::<Result<_>>()?;
            Ok(pb::Endpoint {
                prefixes,
                tunnel_v4: mallory::bytes(v4.parse()?).into(),
                ..gateway(rank, 0x50 + rank as u8)
            })
        };
        let others = [
            "10.1.0.0/16",
            "10.2.0.0/16",
            "10.1.2.0/24",
            "fd00:10:1::/48",
            "198.18.0.0/24",
            "198.19.0.0/16",
            "10.0.0.0/8",
            "10.66.3.0/24",
        ];
        mallory.say([
            endpoint("mal-gw1", &body(1, &others, "198.18.0.1")?)?,
            endpoint("mal-gw2", &body(2, &["0.0.0.0/0", "10.66.4.0/24"], "198.18.1.1")?)?,
            endpoint("mal-gw3", &body(3, &["127.0.0.0/8"], "169.254.169.254")?)?,
            endpoint("mal-w1", &body(0, &others, "172.30.1.1")?)?,
        ])?;
        mallory.say(mark("marked")?)?;
        arrived(&lab, "marked")?;
        for (reason, words) in [
            ("BackendOutsideGrant", "cluster mallory"),
            ("RecordInvalid", "cluster mallory"),
            ("PrefixOutsideGrant", "mallory/mal-gw1"),
            ("TunnelAddressOutsideGrant", "mallory/mal-gw1"),
        ] {
            told(&lab, "eu-west", reason, words)?;
            told(&lab, "us-east", reason, words)?;
        }
        intact(
            &lab,
            MALLORY,
            &["production/stolen", "production/stolen-names", "production/db", "production/api-service"]
                .map(dotted)
                .each_ref()
                .map(String::as_str),
        )?;
        // The true thing is there: the attack came through to where it was cut.
        for kind in ["stolen", "stolen-names"] {
            let observed = Directory::open(lab.cluster_dir("us-east"))?.read();
            let slices = observed.slices.get().context("slices")?;
            let there = slices
                .iter()
                .any(|(k, s)| k.service.name.as_str() == kind && s.backends.iter().any(|b| b.address == own));
            ensure!(there, "{kind} did not arrive at all");
        }
        let (_, answers) = lab.ask("us-c", "stolen-names.production.svc.clusterset.local", 1)?;
        ensure!(answers == [own], "stolen-names is {answers:?}");
        let (_, answers) =
            lab.ask("us-c", "api-0.mallory.stolen-names.production.svc.clusterset.local", 1)?;
        ensure!(answers == [own], "api-0.mallory of stolen-names is {answers:?}");
        honest::talk(&lab)
    });
}

fn dotted(text: &str) -> String {
    let (namespace, service) = text.split_once('/').unwrap_or_default();
    format!("{service}.{namespace}")
}

#[test]
fn cve_2026_66786_foreign_namespace() {
    foreign_namespace("hostile::cve_2026_66786_foreign_namespace", false);
}

#[test]
fn cve_2026_66786_foreign_namespace_through_an_accomplice() {
    foreign_namespace("hostile::cve_2026_66786_foreign_namespace_through_an_accomplice", true);
}

fn foreign_namespace(name: &str, accomplice: bool) {
    honest::story(name, || {
        let lab = honest::up()?;
        let _evil = accomplice.then(|| Evil::accomplice(&lab)).transpose()?;
        let before = Directory::open(lab.cluster_dir("us-east"))?.read();
        let mut mallory = admitted(&lab)?;
        let own = at(&[("a", "10.66.9.9".parse()?)]);
        for namespace in CLOSED {
            mallory.say([
                export(namespace, "api-service", &service(false))?,
                backends(namespace, "api-service", 0, &own)?,
            ])?;
            mallory.say([
                export(namespace, "kube-dns", &service(true))?,
                backends(namespace, "kube-dns", 0, &own)?,
            ])?;
        }
        // Older than anybody, with everything different: the type, the ports, the affinity.
        let older = pb::Export { client_ip_affinity_seconds: 1, ..service(true) };
        mallory.say([
            export("production", "api-service", &older)?,
            backends("production", "api-service", 0, &own)?,
        ])?;
        mallory.say(mark("marked")?)?;
        arrived(&lab, "marked")?;
        for cluster in ["eu-west", "us-east"] {
            for namespace in ["staging", "default"] {
                told(&lab, cluster, "NamespaceNotGranted", &format!("namespace {namespace},"))?;
            }
        }
        let names: Vec<String> =
            CLOSED.iter().flat_map(|n| [format!("api-service.{n}"), format!("kube-dns.{n}")]).collect();
        intact(&lab, MALLORY, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
        for name in &names {
            let (code, answer) = lab.ask("us-c", &format!("{name}.svc.clusterset.local"), 1)?;
            ensure!(code == 3 && answer.is_empty(), "{name} answers {code} {answer:?}");
        }
        // 1970 won nothing.
        let after = Directory::open(lab.cluster_dir("us-east"))?.read();
        let import = |observed: &tombolo_agent::api::Observed| {
            let all = observed.imports.get().context("imports")?;
            let found = all
                .iter()
                .find(|(k, _)| k.name.as_str() == "api-service" && k.namespace.as_str() == "production");
            found.map(|(_, i)| i.clone()).context("api-service is not imported")
        };
        let (before, after) = (import(&before)?, import(&after)?);
        ensure!(
            (before.kind, &before.ips, &before.ports, before.affinity)
                == (after.kind, &after.ips, &after.ports, after.affinity),
            "{before:?} became {after:?}"
        );
        honest::talk(&lab)
    });
}

#[test]
fn cve_2026_66787_endpoint_takeover() {
    endpoint_takeover("hostile::cve_2026_66787_endpoint_takeover", false);
}

#[test]
fn cve_2026_66787_endpoint_takeover_through_an_accomplice() {
    endpoint_takeover("hostile::cve_2026_66787_endpoint_takeover_through_an_accomplice", true);
}

fn endpoint_takeover(name: &str, accomplice: bool) {
    honest::story(name, || {
        let lab = honest::up()?;
        let _evil = accomplice.then(|| Evil::accomplice(&lab)).transpose()?;
        let mut mallory = admitted(&lab)?;
        mallory.say([endpoint("mal-gw1", &gateway(1, 0x51))?])?;
        wait_until("the liar to learn who is who", SOON, || {
            for (cluster, node) in [("eu-west", "eu-gw1"), ("us-east", "us-gw1")] {
                mallory.endpoint_of(cluster, node)?;
            }
            Ok(())
        })?;
        let (eu, us) = (mallory.endpoint_of("eu-west", "eu-gw1")?, mallory.endpoint_of("us-east", "us-gw1")?);
        let devices = |of: &tombolo_proto::model::Endpoint, shift: u8| -> Vec<pb::Device> {
            let list = of.devices.iter().filter(|(n, _)| n.get() < 8);
            list.map(|(n, d)| pb::Device {
                number: u32::from((n.get() + shift) % 8),
                key: d.key.0.to_vec().into(),
                port: 9,
            })
            .collect()
        };
        // Where nothing answers; our pods and nodes; ourselves.
        let candidates = |list: &[&str]| -> Result<Vec<_>> {
            list.iter().map(|a| Ok(mallory::bytes(a.parse()?).into())).collect()
        };
        let tunnel = |of: &tombolo_proto::model::Endpoint| -> Result<(Vec<u8>, Vec<u8>)> {
            Ok((
                of.tunnel_v4.context("a tunnel address")?.octets().to_vec(),
                of.tunnel_v6.context("one")?.octets().to_vec(),
            ))
        };
        let client = lab.topology().pod("eu-c")?.v4;
        let flow = lab.udp_flow("us-c", client.into(), 200)?;
        let (us4, us6) = tunnel(&us)?;
        let (eu4, eu6) = tunnel(&eu)?;
        mallory.say([
            endpoint(
                "mal-gw1",
                &pb::Endpoint {
                    devices: devices(&us, 0),
                    candidates: candidates(&["203.0.113.1", "10.1.2.10", "10.2.2.10"])?,
                    tunnel_v4: us4.into(),
                    tunnel_v6: us6.into(),
                    ..gateway(1, 0)
                },
            )?,
            endpoint(
                "mal-gw2",
                &pb::Endpoint {
                    devices: devices(&eu, 0),
                    candidates: candidates(&["172.30.1.1", "10.1.1.1", "203.0.113.2"])?,
                    tunnel_v4: eu4.into(),
                    tunnel_v6: eu6.into(),
                    ..gateway(2, 0)
                },
            )?,
            endpoint(
                "mal-gw3",
                &pb::Endpoint {
                    devices: devices(&eu, 1),
                    candidates: candidates(&["203.0.113.3"])?,
                    ..gateway(3, 0)
                },
            )?,
            // The same names as honest nodes.
            endpoint("eu-w1", &gateway(0, 0x53))?,
            endpoint("us-w1", &pb::Endpoint { devices: devices(&us, 4), ..gateway(0, 0) })?,
        ])?;
        mallory.say(mark("marked")?)?;
        arrived(&lab, "marked")?;
        told(&lab, "eu-west", "KeyTwice", "mallory/mal-gw")?;
        told(&lab, "us-east", "KeyTwice", "mallory/mal-gw")?;
        intact(&lab, MALLORY, &[])?;
        let report = flow.stop_udp()?;
        ensure!(report.sent > 50 && report.lost == 0, "traffic suffered: {report:?}");
        // Also those who begin now, and know no live peer: nobody waits for what the liar says.
        for node in ["eu-gw1", "us-gw1"] {
            lab.kill(node, "agent")?;
            lab.kill(node, "wireguard")?;
            lab.restart(node, "wireguard")?;
            lab.restart(node, "agent")?;
        }
        let start = Instant::now();
        wait_until("traffic between the honest", SOON, || honest::talk(&lab))?;
        let took = start.elapsed();
        ensure!(took < Duration::from_secs(8), "the honest met again only after {took:?}");
        intact(&lab, MALLORY, &[])
    });
}

#[test]
fn cve_2026_66788_rewriting_anothers_records() {
    honest::story("hostile::cve_2026_66788_rewriting_anothers_records", || {
        let lab = honest::up()?;
        lab.export("us-east", "production", "web")?;
        let mut mallory = honest::knowing(&lab, admitted(&lab)?)?;
        mallory.say(mark("marked")?)?;
        arrived(&lab, "marked")?;
        let before = honest::kept(&lab, "us-east")?;
        for (what, messages) in forged::statements(&mallory, "us-east")? {
            let told = mallory.shout(messages.iter().map(tombolo_proto::wire::encode_message).collect())?;
            // What brings nothing new is passed over without a word.
            let nothing_new = what.starts_with("true") && told.is_empty();
            ensure!(told.contains("us-east") || nothing_new, "{what}: the broker says only {told:?}");
            ensure!(!told.contains("not known"), "{what}: {told}");
        }
        for (what, documents) in forged::documents(&mallory, "us-east")? {
            let refusals = mallory.offer(documents.clone())?;
            ensure!(!refusals.is_empty(), "{what} was taken");
            let told = mallory.shout(vec![tombolo_proto::wire::encode_message(
                &tombolo_proto::wire::Message::Documents(documents),
            )])?;
            ensure!(told.starts_with("alarm: "), "{what}: the broker says {told:?}");
        }
        let metrics = lab.fetch("broker", "http://127.0.0.1:4501/metrics", &[])?.body;
        let refused = metrics
            .lines()
            .find_map(|l| l.strip_prefix("tombolo_broker_refusals_total ")?.parse::<f64>().ok());
        ensure!(refused.is_some_and(|n| n >= 16.0), "{refused:?} refusals counted");
        // News of the victim's still comes, and is what the victim said.
        lab.unexport("us-east", "production", "web")?;
        lab.export("us-east", "production", "web")?;
        wait_until("the victim's own words", SOON, || {
            ensure!(lab.ask("eu-c", "web.production.svc.clusterset.local", 1)?.0 == 0, "web is not there");
            Ok(())
        })?;
        ensure!(lab.ask("eu-c", "pwned.production.svc.clusterset.local", 1)?.0 == 3, "pwned is there");
        ensure!(honest::kept(&lab, "us-east")? == before, "what eu-west keeps of us-east changed");
        intact(&lab, MALLORY, &["pwned.production", "web.production"])?;
        honest::talk(&lab)
    });
}

#[test]
fn no_text_from_the_wire_is_obeyed() {
    texts("hostile::no_text_from_the_wire_is_obeyed", false);
}

#[test]
fn no_text_from_the_wire_is_obeyed_through_an_accomplice() {
    texts("hostile::no_text_from_the_wire_is_obeyed_through_an_accomplice", true);
}

fn texts(name: &str, accomplice: bool) {
    honest::story(name, || {
        let lab = honest::up()?;
        let _evil = accomplice.then(|| Evil::accomplice(&lab)).transpose()?;
        let mut mallory = admitted(&lab)?;
        let texts = [
            "\n",
            "\r\n2026-01-01T00:00:00Z ERROR forged",
            "\u{1b}[2J\u{1b}]0;pwned\u{7}",
            "\0",
            "\u{85}",
            "\u{202e}dlrow",
            "../../pwned",
            "/run/lab/pwned",
            "$(touch /run/lab/pwned)",
            "`touch /run/lab/pwned`",
            "; flush ruleset",
            "\" }",
            "a: b\n- c",
            "{{ pwned }}",
            "%s%n",
            "-rf",
            "A",
            "caf\u{e9}",
            "a\u{0}b",
            "'; drop",
            "\u{feff}",
            "\u{7f}",
        ];
        let mut said = Vec::new();
        for (number, text) in texts.iter().enumerate() {
            let pairs = || {
                [((*text).to_owned(), "v".to_owned()), ("tombolo.dev/k".to_owned(), (*text).to_owned())]
                    .into()
            };
            let port = |name: &str, app: &str| pb::Port {
                name: name.into(),
                app_protocol: app.into(),
                ..mallory::http()
            };
            let bodies = [
                pb::Export { ports: vec![port(text, "")], ..service(false) },
                pb::Export { ports: vec![port("http", text)], ..service(false) },
                pb::Export { labels: pairs(), ..service(false) },
                pb::Export { annotations: pairs(), ..service(true) },
                pb::Export { internal_traffic_policy: (*text).into(), ..service(false) },
                pb::Export { traffic_distribution: (*text).into(), ..service(true) },
                service(true),
            ];
            for (place, body) in bodies.iter().enumerate() {
                let name = format!("t{number}-{place}");
                said.push(export("production", &name, body)?);
                let named = at(&[(text, "10.66.7.7".parse()?), ("good", "10.66.7.8".parse()?)]);
                said.push(backends("production", &name, 0, &named)?);
                let mut ports = at(&[("good", "10.66.7.9".parse()?)]);
                ports.groups.iter_mut().for_each(|g| g.ports = vec![port(text, text)]);
                said.push(backends("production", &name, 1, &ports)?);
            }
        }
        for (kind, name) in forged::tricks() {
            for scope in [tombolo_proto::model::Scope::Nodes, mallory::scope("production")?] {
                for body in [
                    vec![],
                    vec![0xff; 40],
                    prost::Message::encode_to_vec(&service(true)),
                    prost::Message::encode_to_vec(&gateway(1, 9)),
                ] {
                    // More than 600 nodes would be refused whole.
                    if kind > 3 && !body.is_empty() && scope == tombolo_proto::model::Scope::Nodes {
                        continue;
                    }
                    let extra = body.len().to_string();
                    let mut name = name.clone();
                    if kind > 3 {
                        name.push(&extra);
                    }
                    said.push((scope.clone(), mallory::record(kind, &name, body)?));
                }
            }
        }
        said.extend(mark("marked")?);
        mallory.say(said)?;
        arrived(&lab, "marked")?;
        for cluster in ["eu-west", "us-east"] {
            told(&lab, cluster, "RecordInvalid", "cluster mallory")?;
        }
        // What no honest encoder makes: names with control characters, scopes that are paths. The session ends, that
        // of nobody else.
        let key = |part: &str| pb::RecordKey { kind: 2, name: vec![part.to_owned()] };
        let record = |part: &str| pb::Record { key: Some(key(part)), body: vec![1].into() };
        for text in texts.iter().chain(&["", " "]) {
            let scope = |kind: i32| Some(pb::Scope { kind, name: (*text).to_owned() });
            let chunk = |scope, record| pb::Chunk {
                origin: "mallory".into(),
                scope,
                index: 0,
                last: true,
                records: vec![record],
            };
            let production = Some(pb::Scope { kind: 2, name: "production".into() });
            let kinds = [
                pb::message::Kind::Chunk(chunk(production, record(text))),
                pb::message::Kind::Chunk(chunk(scope(2), record("a"))),
                pb::message::Kind::Chunk(chunk(scope(1), record("a"))),
                pb::message::Kind::Chunk(pb::Chunk {
                    origin: (*text).to_owned(),
                    ..chunk(scope(1), record("a"))
                }),
                pb::message::Kind::Want(pb::Want {
                    set_namespaces: true,
                    namespaces: vec![(*text).to_owned()],
                    ..pb::Want::default()
                }),
                pb::message::Kind::Alarm(pb::Alarm {
                    object: (*text).to_owned(),
                    reason: format!("pwned{text}"),
                }),
                pb::message::Kind::Hello(pb::Hello { version: (*text).to_owned(), ..pb::Hello::default() }),
            ];
            let messages = kinds.into_iter().map(|kind| pb::Message { kind: Some(kind) });
            mallory.shout_each(messages.collect())?;
        }
        let names: Vec<String> =
            (0..texts.len()).flat_map(|n| (0..7).map(move |p| format!("t{n}-{p}.production"))).collect();
        intact(&lab, MALLORY, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
        ensure!(!std::path::Path::new("/run/lab/pwned").exists(), "a text was obeyed");
        for pod in ["eu-c", "us-c"] {
            let (_, addresses) = lab.ask(pod, "t0-6.production.svc.clusterset.local", 1)?;
            ensure!(
                addresses.is_empty() || addresses == ["10.66.7.8".parse::<IpAddr>()?],
                "{pod}: {addresses:?}"
            );
        }
        honest::talk(&lab)
    });
}
