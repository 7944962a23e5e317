//! What one changed service costs while 10,000 services with 100,000 backends are imported:
//!
//!     cargo bench -p tombolo-agent-core --bench one_service
//!
//! prints microseconds, of the controller's plan of that service and of a node's plan after it, and beside them what
//! planning everything costs. Reading files, writing objects and running nft are not in them.
#![allow(clippy::print_stdout, reason = "it is a command")]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use tombolo_agent_core::known::{Known, Section};
use tombolo_agent_core::object::{
    Import, LocalKind, Preferences, Service, ServiceExport, ServiceKey, Slice, SliceKey,
};
use tombolo_agent_core::plan::piece::{self, Shared};
use tombolo_agent_core::plan::{self, Planner};
use tombolo_agent_core::shelf::Shelf;
use tombolo_agent_core::world::{
    ClusterWorld, ClustersetRanges, Foreign, Health, MemberNodes, NodeWorld, Reach, Topology,
};
use tombolo_proto::model::{
    Backend, BackendGroup, Backends, Export, Family, Port, Position, Preference, Prefix, Protocol,
    ServiceType,
};
use tombolo_proto::testing;
use tombolo_proto::trust::{Member, Membership};

type Fallible<T> = Result<T, Box<dyn Error>>;

const SERVICES: u32 = 10_000;
const BACKENDS: u32 = 10;
const ROUNDS: u32 = 2_000;

fn key(number: u32) -> Fallible<ServiceKey> {
    Ok(ServiceKey {
        namespace: format!("team-{}", number % 100).parse()?,
        name: format!("service-{number}").parse()?,
    })
}

fn port(number: u16) -> Fallible<Port> {
    Ok(Port { name: Some("http".parse()?), protocol: Protocol::Tcp, port: number, app_protocol: None })
}

/// Backends of a service, out of 10.2.0.0/15; after `round` changes.
fn backends(service: u32, round: u32) -> Vec<Backend> {
    let first = u32::from(Ipv4Addr::new(10, 2, 0, 1));
    let backend = |n: u32| Backend {
        address: IpAddr::V4(Ipv4Addr::from(first + service * BACKENDS + n)),
        hostname: None,
        ready: n != round % BACKENDS,
        serving: true,
        terminating: false,
    };
    (0..BACKENDS).map(backend).collect()
}

fn import(number: u32) -> Fallible<Import> {
    let vip = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 19, 0, 2)) + number);
    Ok(Import {
        kind: ServiceType::ClusterSetIP,
        ports: vec![port(80)?],
        ips: vec![vip.into()],
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        clusters: BTreeSet::from(["us".parse()?]),
        preferences: Preferences::default(),
    })
}

fn slice(number: u32, round: u32) -> Fallible<(SliceKey, Slice)> {
    let key = SliceKey { service: key(number)?, source: "us".parse()?, family: Family::V4, index: 0 };
    Ok((key, Slice { ports: vec![port(8080)?], backends: backends(number, round), ..Slice::default() }))
}

fn member(name: &str, number: u8, owned: &[&str]) -> Fallible<Member> {
    let (root, roots) = testing::set();
    let speaks = testing::key(number + 100);
    let grant = testing::grant(name, number.into(), owned, speaks.public());
    let binding = testing::binding(&grant, 0, speaks.public()).sign(&speaks);
    let membership = Membership::verify(&roots, &grant.sign(&root), &[binding])?;
    let owned = owned.iter().map(|net| testing::net(net)).collect();
    Ok(Member { membership, owned, tunnel: BTreeSet::new() })
}

fn ranges() -> Fallible<ClustersetRanges> {
    Ok(ClustersetRanges { v4: Some("198.19.0.0/16".parse()?), v6: None })
}

fn node_world() -> Fallible<NodeWorld> {
    let of = |number: u8, owned: &[&str]| MemberNodes {
        serial: number.into(),
        owned: owned.iter().map(|net| testing::net(net)).collect::<BTreeSet<Prefix>>(),
        tunnel: BTreeSet::new(),
        nodes: BTreeMap::new(),
    };
    let (mut imports, mut slices) = (BTreeMap::new(), BTreeMap::new());
    for number in 0..SERVICES {
        imports.insert(key(number)?, import(number)?);
        slices.extend([slice(number, 0)?]);
    }
    Ok(NodeWorld {
        cluster: "eu".parse()?,
        node: "node".parse()?,
        reach: Reach::Exports,
        clusterset: Some(ranges()?),
        underlay_mtu: 1500,
        underlay: BTreeSet::from([Family::V4]),
        inner: BTreeSet::new(),
        hosts: Known::Yes(BTreeMap::new()),
        members: Known::Yes(
            [("eu".parse()?, of(1, &["10.1.0.0/16"])), ("us".parse()?, of(2, &["10.2.0.0/15"]))].into(),
        ),
        imports: Known::Yes(imports.into()),
        slices: Known::Yes(slices.into()),
        health: Health::default(),
    })
}

/// As the controller has it for one service.
fn cluster_world() -> Fallible<ClusterWorld> {
    let namespaces = (0..100).map(|n| format!("team-{n}").parse()).collect::<Result<BTreeSet<_>, _>>()?;
    let us = Foreign {
        member: member("us", 2, &["10.2.0.0/15"])?,
        position: Position::default(),
        nodes: BTreeMap::new(),
        exports: BTreeMap::new(),
        backends: BTreeMap::new(),
        unknown_namespaces: BTreeSet::new(),
    };
    Ok(ClusterWorld {
        cluster: "eu".parse()?,
        own: member("eu", 1, &["10.1.0.0/16"])?,
        clusterset: Some(ranges()?),
        topology: Topology::Gateway,
        nodes: Known::No,
        tunnel_nodes: Known::No,
        stated: Known::No,
        namespaces: Known::Yes(namespaces),
        services: Known::No,
        exports: Known::No,
        backends: Known::No,
        imports: Known::Yes(BTreeMap::new()),
        slices: Known::Yes(BTreeSet::new()),
        derived: Known::No,
        service_families: BTreeSet::new(),
        foreign: BTreeMap::from([("us".parse()?, us)]),
        unknown: BTreeSet::new(),
    })
}

/// A service as `us` states it.
fn state(world: &mut ClusterWorld, number: u32, round: u32) -> Fallible<ServiceKey> {
    let key = key(number)?;
    let us = world.foreign.values_mut().next().ok_or("no foreign cluster")?;
    let export = Export {
        kind: ServiceType::ClusterSetIP,
        ports: vec![port(80)?],
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: 1,
        preference: Preference::default(),
    };
    let group = BackendGroup { ports: vec![port(8080)?], backends: backends(number, round) };
    us.exports = BTreeMap::from([(key.clone(), export)]);
    us.backends = BTreeMap::from([(key.clone(), BTreeMap::from([(1, Backends { groups: vec![group] })]))]);
    Ok(key)
}

/// Prints the median and the worst of many.
fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let micros = |at: Option<&Duration>| at.map_or(0.0, |t| t.as_secs_f64() * 1e6);
    let (median, worst) = (micros(times.get(times.len() / 2)), micros(times.last()));
    println!("{what:<52} {median:>10.1} {worst:>10.1}   {:>6}", times.len());
}

/// A service of the own cluster.
fn service(round: u32) -> Fallible<Service> {
    Ok(Service {
        kind: LocalKind::ClusterIP,
        ports: vec![port(u16::try_from(80 + round % 2)?)?],
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
    })
}

/// As the controller has it of the own cluster, which exports nothing.
fn own_world() -> Fallible<ClusterWorld> {
    let mut world = cluster_world()?;
    world.nodes = Known::Yes(BTreeMap::new());
    world.tunnel_nodes = Known::Yes(BTreeMap::new());
    world.stated = Known::Yes(BTreeMap::new());
    world.services = Known::Yes(Shelf::new());
    world.exports = Known::Yes(Shelf::new());
    world.backends = Known::Yes(Shelf::new());
    Ok(world)
}

/// As many exports of the own cluster, of which one changes.
fn own() -> Fallible<()> {
    let mut world = own_world()?;
    world.own = member("eu", 1, &["10.2.0.0/15"])?;
    let (mut services, mut exports, mut local) = (Shelf::new(), Shelf::new(), Shelf::new());
    for number in 0..SERVICES {
        let key = key(number)?;
        let export = ServiceExport {
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            created: 1,
            preference: Preference::default(),
            misread: None,
        };
        services.insert(key.clone(), service(0)?);
        exports.insert(key.clone(), export);
        let group = BackendGroup { ports: vec![port(80)?], backends: backends(number, 0) };
        local.insert(key, vec![group]);
    }
    world.services = Known::Yes(services.clone());
    world.exports = Known::Yes(exports);
    world.backends = Known::Yes(local);
    let begun = Instant::now();
    let mut plan = piece::own(&world, None).ok_or("unknown")?;
    let all = begun.elapsed();
    let mut times = Vec::new();
    for round in 1..=ROUNDS {
        services.insert(key(round * 7 % SERVICES)?, service(round)?);
        world.services = Known::Yes(services.clone());
        let begun = Instant::now();
        plan = black_box(piece::own(&world, Some(&plan))).ok_or("unknown")?;
        times.push(begun.elapsed());
    }
    tell("controller: one own export", times);
    tell("controller: all own exports", vec![all]);
    Ok(())
}

fn controller() -> Fallible<()> {
    let mut world = cluster_world()?;
    let own = piece::own(&own_world()?, None).ok_or("unknown")?;
    let mut shared = Shared::new(world.cluster.clone(), world.clusterset, &BTreeMap::new());
    let mut imports = BTreeMap::new();
    let begun = Instant::now();
    for number in 0..SERVICES {
        let key = state(&mut world, number, 0)?;
        let piece = piece::service(&mut world, Some(&own), &key, &mut shared).ok_or("unknown")?;
        imports.insert(key, piece.import.ok_or("it is not imported")?);
    }
    let all = begun.elapsed();
    let mut times = Vec::new();
    for round in 1..=ROUNDS {
        let key = state(&mut world, round * 7 % SERVICES, round)?;
        let existing = imports.get(&key).cloned().ok_or("it has no import")?;
        world.imports = Known::Yes(BTreeMap::from([(key.clone(), existing)]));
        let begun = Instant::now();
        let piece = black_box(piece::service(&mut world, Some(&own), &key, &mut shared));
        times.push(begun.elapsed());
        piece.ok_or("unknown")?;
    }
    tell("controller: one service", times);
    tell("controller: all, one after the other", vec![all]);
    Ok(())
}

fn node() -> Fallible<()> {
    let mut world = node_world()?;
    let mut planner = Planner::default();
    let (mut last, findings) = planner.plan(&world);
    if !findings.is_empty() {
        return Err(format!("{findings:?}").into());
    }
    let mut times = Vec::new();
    for round in 1..=ROUNDS {
        // Another backend than at first is not ready.
        let (key, value) = slice(round * 7 % SERVICES, 1 + round % (BACKENDS - 1))?;
        let Known::Yes(slices) = &mut world.slices else { return Err("unknown".into()) };
        let begun = Instant::now();
        slices.insert(key, value);
        let (desired, _) = planner.plan(&world);
        // What is applied: VIPs that are others than before, and a zone that is another.
        let changed = match (&desired.firewall, &last.firewall) {
            (Section::Set(new), Section::Set(old)) => new.vips.changed(&old.vips).len(),
            _ => return Err("nothing is planned".into()),
        };
        black_box(desired.zone == last.zone);
        times.push(begun.elapsed());
        if changed != 1 {
            return Err(format!("{changed} VIPs changed").into());
        }
        last = desired;
    }
    tell("node: one service", times);
    let mut times = Vec::new();
    for _ in 0..3 {
        let begun = Instant::now();
        black_box(plan::node(&world));
        times.push(begun.elapsed());
    }
    tell("node: all", times);
    let copy: Shelf<SliceKey, Slice> = match &world.slices {
        Known::Yes(slices) => slices.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        Known::No => return Err("unknown".into()),
    };
    let begun = Instant::now();
    black_box(world.slices == Known::Yes(copy));
    tell("node: comparing all slices that share nothing", vec![begun.elapsed()]);
    Ok(())
}

fn main() -> Fallible<()> {
    println!("{SERVICES} services imported, {} backends\n", SERVICES * BACKENDS);
    println!("{:<52} {:>10} {:>10}   {:>6}", "microseconds", "median", "worst", "rounds");
    own()?;
    controller()?;
    node()
}
