//! The walk on a node that is a gateway, with a kernel of our own making.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tombolo_agent::api::{ClusterSet, Observed};
use tombolo_agent::apply::device::DeviceState;
use tombolo_agent::observe::member::Members;
use tombolo_agent_core::desired::Vip;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::{Import, Slice, SliceKey};
use tombolo_agent_core::plan;
use tombolo_agent_core::world::{ClustersetRanges, Health, MemberNodes, NodeWorld, Reach, Topology};
use tombolo_proto::model::{
    Backend, Device, DeviceFamily, DeviceNumber, Endpoint, Family, Lane, Namespace, Port, PortName, Priority,
    Rank, ServiceName, ServiceType, Share, WireguardKey,
};
use tombolo_proto::trust::SetId;

use super::super::kernel::{Link, Reply, Way};
use super::*;

fn id(text: &str) -> ClusterId {
    ClusterId::new(text).unwrap()
}

fn key() -> ServiceKey {
    ServiceKey { namespace: Namespace::new("shop").unwrap(), name: ServiceName::new("web").unwrap() }
}

fn number(family: DeviceFamily) -> DeviceNumber {
    DeviceNumber::of(family, Rank::GATEWAYS[0], Lane::FIRST)
}

/// Cluster `n` has 10.n.0.0/16 and one gateway.
fn member(n: u8) -> MemberNodes {
    let device = |d: u8| Device { key: WireguardKey([n * 16 + d + 1; 32]), port: 4510 + u16::from(d) };
    let devices = (0..8).filter_map(|d| Some((DeviceNumber::new(d)?, device(d)))).collect();
    let name = NodeName::new(&format!("gw{n}")).unwrap();
    let gateway = Endpoint {
        node: name.clone(),
        rank: Rank::GATEWAYS[0],
        devices,
        candidates: vec![Ipv4Addr::new(192, 0, 2, n).into()],
        tunnel_v4: Some(Ipv4Addr::new(198, 18, n, 1)),
        tunnel_v6: None,
        prefixes: BTreeSet::from([format!("10.{n}.0.0/24").parse().unwrap()]),
        mesh: false,
    };
    MemberNodes {
        serial: u64::from(n),
        owned: BTreeSet::from([format!("10.{n}.0.0/16").parse().unwrap()]),
        tunnel: BTreeSet::from([format!("198.18.{n}.0/24").parse().unwrap()]),
        nodes: BTreeMap::from([(name, gateway)]),
    }
}

fn port(number: u16) -> Port {
    let name = Some(PortName::new("http").unwrap());
    Port { name, protocol: Protocol::Tcp, port: number, app_protocol: None }
}

/// Cluster a with b and c, which both have shop/web; `change` may alter it.
fn here(change: impl FnOnce(&mut Observed, &mut Members)) -> Here {
    let ranges = ClustersetRanges { v4: Some("198.19.0.0/16".parse().unwrap()), v6: None };
    let set = ClusterSet {
        set: SetId([1; 16]),
        cluster: id("a"),
        roots: Vec::new(),
        brokers: None,
        revocations: None,
        reach: Reach::Exports,
        topology: Topology::Gateway,
        clusterset: Some(ranges),
        reserved: BTreeSet::new(),
        rotations: BTreeMap::new(),
        leaving: false,
    };
    let import = Import {
        kind: ServiceType::ClusterSetIP,
        ports: vec![port(80)],
        ips: vec![Ipv4Addr::new(198, 19, 0, 9).into()],
        families: vec![Family::V4],
        affinity: None,
        internal_local: false,
        traffic_distribution: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        clusters: BTreeSet::from([id("b"), id("c")]),
        preferences: Default::default(),
    };
    let slice = |n: u8| Slice {
        ports: vec![port(8080)],
        backends: vec![Backend {
            address: Ipv4Addr::new(10, n, 0, 5).into(),
            hostname: None,
            ready: true,
            serving: true,
            terminating: false,
        }],
        ..Slice::default()
    };
    let slice_key =
        |source: &str| SliceKey { service: key(), source: id(source), family: Family::V4, index: 0 };
    let mut observed = Observed {
        namespaces: Known::Yes(BTreeSet::from([key().namespace])),
        imports: Known::Yes([(key(), import)].into()),
        slices: Known::Yes([(slice_key("b"), slice(2)), (slice_key("c"), slice(3))].into()),
        ..Observed::default()
    };
    let nodes = [(id("a"), member(1)), (id("b"), member(2)), (id("c"), member(3))].into();
    let mut members = Members { nodes, usable: true, findings: Vec::new() };
    change(&mut observed, &mut members);
    let world = NodeWorld {
        cluster: id("a"),
        node: NodeName::new("gw1").unwrap(),
        reach: Reach::Exports,
        clusterset: Some(ranges),
        underlay_mtu: 1500,
        underlay: BTreeSet::from([Family::V4]),
        inner: BTreeSet::new(),
        hosts: Known::Yes(BTreeMap::new()),
        members: Known::Yes(members.nodes.clone()),
        health: Health::default(),
        imports: observed.imports.clone(),
        slices: observed.slices.clone(),
    };
    let (desired, _) = plan::node(&world);
    Here { observed, set, members: members.into(), world, desired, revoked: BTreeMap::new() }
}

/// A kernel in which all is well, but for what is named.
struct Fake {
    vip: Option<usize>,
    way: Way,
    links: BTreeMap<DeviceNumber, Link>,
    silent: Vec<IpAddr>,
    largest: usize,
    closed: bool,
}

impl Default for Fake {
    fn default() -> Self {
        let out = number(DeviceFamily::Out);
        Self {
            vip: Some(2),
            way: Way::Link(out.link()),
            links: BTreeMap::from([(out, Link { up: true, mtu: 1420 })]),
            silent: Vec::new(),
            largest: 1420,
            closed: false,
        }
    }
}

const TIME: Duration = Duration::from_millis(1);

impl Kernel for Fake {
    fn resolve(&self, name: &str, _: Family) -> Result<Vec<IpAddr>, String> {
        assert_eq!(name, "web.shop.svc.clusterset.local");
        Ok(vec![Ipv4Addr::new(198, 19, 0, 9).into()])
    }

    fn vip(&self, vip: &Vip) -> Result<Option<usize>, String> {
        assert_eq!(vip.port, 80);
        Ok(self.vip)
    }

    fn route(&self, _: IpAddr, _: Option<IpAddr>) -> Result<Way, String> {
        Ok(self.way.clone())
    }

    fn links(&self) -> Result<BTreeMap<DeviceNumber, Link>, String> {
        Ok(self.links.clone())
    }

    fn device(&self, _: DeviceNumber) -> Result<DeviceState, String> {
        Ok(DeviceState::default())
    }

    fn echo(&self, to: IpAddr, _: Option<DeviceNumber>, bytes: usize) -> Result<Reply, String> {
        let good = !self.silent.contains(&to) && bytes <= self.largest;
        Ok(if good { Reply::Answered(TIME) } else { Reply::Silent })
    }

    fn connect(&self, to: SocketAddr) -> Reply {
        assert_eq!(to.port(), 8080, "the target port, not the service's");
        if self.closed { Reply::Refused } else { Reply::Answered(TIME) }
    }
}

fn steps(here: &Here, kernel: &Fake, to: To) -> Vec<Step> {
    walk(here, kernel, &From::Here, &to, &[])
}

fn name() -> To {
    To::Name(key(), Some(80))
}

/// Steps that fail, with the cluster they are the way to.
fn broken(steps: &[Step]) -> Vec<(&str, &str)> {
    let failed = steps.iter().filter(|s| s.outcome == Outcome::Failure);
    failed.map(|s| (s.step, s.cluster.as_ref().map_or("", ClusterId::as_str))).collect()
}

#[test]
fn all_is_well() {
    let steps = steps(&here(|_, _| {}), &Fake::default(), name());
    assert!(steps.iter().all(|s| s.outcome == Outcome::Ok), "{steps:#?}");
    // The service once, the way to each cluster.
    assert_eq!(steps.len(), 2 + 5 + 2 * WAY.len());
}

#[test]
fn one_cluster_of_two_is_broken_and_the_other_still_walked() {
    let kernel = Fake { silent: vec!["198.18.2.1".parse().unwrap()], ..Fake::default() };
    let steps = steps(&here(|_, _| {}), &kernel, name());
    assert_eq!(broken(&steps), [("peer", "b")]);
    let of = |cluster: &str| steps.iter().filter(|s| s.cluster == Some(id(cluster))).collect::<Vec<_>>();
    let not = of("b").iter().filter(|s| s.outcome == Outcome::NotReached).count();
    assert_eq!((not, of("b").len(), of("c").len()), (2, WAY.len(), WAY.len()));
    assert!(of("c").iter().all(|s| s.outcome == Outcome::Ok));
}

#[test]
fn each_step_fails_by_its_own_name() {
    let good = || here(|_, _| {});
    let both = |step: &'static str| vec![(step, "b"), (step, "c")];
    let far = Fake { vip: Some(1), ..Fake::default() };
    assert_eq!(broken(&steps(&good(), &far, name())), [("vip", "")]);
    let clear = Fake { way: Way::Link("eth0".to_owned()), ..Fake::default() };
    assert_eq!(broken(&steps(&good(), &clear, name())), both("route"));
    let refused = Fake { way: Way::Refused("No route to host".to_owned()), ..Fake::default() };
    assert_eq!(broken(&steps(&good(), &refused, name())), both("route"));
    let none = Fake { links: BTreeMap::new(), ..Fake::default() };
    assert_eq!(broken(&steps(&good(), &none, name())), both("slot"));
    let narrow = Fake { largest: 1400, ..Fake::default() };
    assert_eq!(broken(&steps(&good(), &narrow, name())), both("mtu"));
    let closed = Fake { closed: true, ..Fake::default() };
    assert_eq!(broken(&steps(&good(), &closed, name())), both("answer"));

    let fake = Fake::default();
    let unready = here(|observed, _| {
        let Known::Yes(slices) = &mut observed.slices else { return };
        slices.values_mut().for_each(|slice| slice.backends[0].ready = false);
    });
    assert_eq!(broken(&steps(&unready, &Fake { vip: None, ..Fake::default() }, name())), [("eligible", "")]);
    let homeless = here(|observed, _| observed.namespaces = Known::Yes(BTreeSet::new()));
    assert_eq!(broken(&steps(&homeless, &fake, name())), [("import", "")]);
    let alone = here(|_, members| {
        for other in ["b", "c"] {
            members.nodes.remove(&id(other));
        }
    });
    assert_eq!(broken(&steps(&alone, &fake, name())), [("set", "")]);
    let silent = here(|_, members| {
        members.nodes.get_mut(&id("b")).unwrap().nodes.clear();
    });
    assert_eq!(broken(&steps(&silent, &fake, name())), [("route", "b")]);
}

#[test]
fn a_refused_cluster_is_said_and_not_walked() {
    let gone = here(|_, members| {
        members.nodes.remove(&id("b"));
    });
    let steps = steps(&gone, &Fake { vip: Some(1), ..Fake::default() }, name());
    assert_eq!(broken(&steps), []);
    let export = steps.iter().find(|s| s.step == "export").unwrap();
    assert!(export.outcome == Outcome::Warning && export.message.contains("cluster b is not known here"));
    let eligible = steps.iter().find(|s| s.step == "eligible").unwrap();
    assert!(
        eligible.message.contains("1 of c; not 10.2.0.5 (b): cluster b is not known here"),
        "{eligible:?}"
    );
}

#[test]
fn what_policy_leaves_out_is_said() {
    let passive = here(|observed, _| {
        let Known::Yes(imports) = &mut observed.imports else { panic!() };
        let share = Share { priority: Priority::new(10).unwrap(), ..Share::default() };
        imports.get_mut(&key()).unwrap().preferences.shares.insert(id("c"), share);
    });
    let told = steps(&passive, &Fake { vip: Some(1), ..Fake::default() }, name());
    assert_eq!(broken(&told), []);
    let eligible = told.iter().find(|s| s.step == "eligible").unwrap();
    assert!(
        eligible.message.contains("1 of b; not 10.3.0.5 (c): cluster c has priority 10")
            && eligible.message.contains("backends of priority 0"),
        "{eligible:?}"
    );
    let local = here(|observed, members| {
        let Known::Yes(imports) = &mut observed.imports else { panic!() };
        imports.get_mut(&key()).unwrap().preferences.local = true;
        let Known::Yes(slices) = &mut observed.slices else { panic!() };
        let (mut place, mut slice) = slices.iter().next().map(|(k, v)| (k.clone(), v.clone())).unwrap();
        slices.remove(&place);
        place.source = id("a");
        let own = members.nodes[&id("a")].owned.iter().next().unwrap().net().network();
        slice.backends[0].address = own;
        slices.insert(place, slice);
    });
    let rows = super::super::backend::rows(&local, &key(), &local.observed.imports.get().unwrap()[&key()]);
    let left: Vec<&str> = rows.iter().filter(|r| !r.used).map(|r| r.reason.as_str()).collect();
    assert!(left.iter().any(|reason| reason.contains("prefers local backends")), "{left:?}");
}

#[test]
fn addresses_are_walked_to_and_doubts_are_told() {
    let to = |text: &str| To::Address(text.parse().unwrap(), Some(8080));
    let fake = Fake::default();
    let world = here(|_, _| {});
    assert!(steps(&world, &fake, to("10.2.0.5")).iter().all(|s| s.outcome == Outcome::Ok));
    let unexported = steps(&world, &fake, to("10.2.0.6"));
    let doubts: Vec<_> =
        unexported.iter().filter(|s| s.outcome == Outcome::Warning).map(|s| s.step).collect();
    assert_eq!(doubts, ["reach"]);
    assert_eq!(broken(&steps(&world, &fake, to("203.0.113.1"))), [("reach", "")]);
    assert_eq!(broken(&steps(&world, &fake, to("198.19.3.3"))), [("reach", "")]);
    // A ClusterSetIP is its name.
    let vip = steps(&world, &fake, To::Address("198.19.0.9".parse().unwrap(), Some(80)));
    assert!(vip.iter().any(|s| s.step == "eligible") && broken(&vip).is_empty());
    // What a foreign firewall drops concerns pods, not the node.
    let drops = [("chain ip filter FORWARD drops".to_owned(), vec!["let it".to_owned()])];
    let pod = From::Address("10.1.0.7".parse().unwrap());
    let dropped = walk(&world, &fake, &pod, &to("10.2.0.5"), &drops);
    assert_eq!(broken(&dropped), [("reach", "")]);
    assert_eq!(broken(&walk(&world, &fake, &From::Here, &to("10.2.0.5"), &drops)), []);
}
