//! What the resolver answers: an immutable snapshot of `clusterset.local`, built from ServiceImports and imported
//! EndpointSlices and nothing else (KEP-1645, specification.md; numbers below are those of its sections).
//!
//! Only facts are here: which records a name has. Wire format, sizes and flags are the server's.

mod build;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tombolo_proto::model::{PortName, Protocol};

use crate::shelf::Shelf;

/// The zone, without its final dot.
pub const APEX: &str = "clusterset.local";
/// Seconds for which a record may be kept (the specification's example).
pub const TTL: u32 = 4;
/// The same for `dns-version` and the apex's own records (2.2).
pub const TTL_VERSION: u32 = 28800;
/// Seconds for which a denial may be kept: a name that has just been exported should be found at once.
pub const TTL_DENIAL: u32 = 1;
/// What `dns-version` says (2.2).
pub const DNS_VERSION: &str = "1.0.0";
/// The name server that SOA and NS name, relative to the apex; it has no address of its own.
pub const NAME_SERVER: [&str; 2] = ["ns", "dns"];
/// Endpoints of a headless service that its bare name answers with; more are cut to a fair and constant subset,
/// the same for A and AAAA (2.4.1).
pub const MAX_HOSTS: usize = 1000;
/// Octets of a name on the wire (RFC 1035).
const MAX_NAME: usize = 255;

/// An immutable snapshot of `clusterset.local`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Zone {
    /// Namespace to service to entry. No namespace is empty.
    namespaces: Shelf<String, Shelf<String, Entry>>,
}

/// A service that has names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    ClusterSetIP(ClusterSetIP),
    Headless(Headless),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterSetIP {
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
    ports: BTreeSet<Port>,
}

/// At least one endpoint is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Headless {
    /// Those of eligible clusters first, in fair order: the clusters take turns.
    hosts: Vec<Host>,
    /// How many of them the bare name answers with: at most [`MAX_HOSTS`].
    shown: usize,
    /// Cluster to hostname to place in `hosts`, of those whose name fits into DNS.
    names: BTreeMap<String, BTreeMap<String, usize>>,
    /// Addresses of the hosts that are shown.
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
}

impl Headless {
    fn shown(&self) -> &[Host] {
        self.hosts.get(..self.shown).unwrap_or(&self.hosts)
    }
}

/// The ready endpoints of one cluster that share a hostname.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Host {
    cluster: String,
    name: String,
    /// Whether its own name fits into DNS.
    named: bool,
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
    ports: BTreeSet<Port>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    protocol: Protocol,
    name: Option<PortName>,
    port: u16,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Ports.
    Srv,
    /// `dns-version`.
    Txt,
    /// The apex's.
    Soa,
    /// The apex's.
    Ns,
    /// One set of records, whichever there is (RFC 8482).
    Any,
    /// A type that no name here has.
    Other,
}

/// Answer to a question inside the zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// Neither the name nor one below it exists: NXDOMAIN.
    NoName,
    /// The name exists, without records of this type: NODATA.
    NoData,
    /// Its records.
    Found(Found<'a>),
}

/// Records of the asked name, all of one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found<'a> {
    /// Never empty, at most as many as wanted.
    pub records: Vec<Data<'a>>,
    /// There are more.
    pub cut: bool,
    /// Addresses of the targets in `records`, in their order.
    pub additional: Vec<(Target<'a>, IpAddr)>,
}

/// Content of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Data<'a> {
    /// A
    A(Ipv4Addr),
    /// AAAA
    Aaaa(Ipv6Addr),
    /// SRV
    Srv {
        /// Where it listens.
        port: u16,
        /// On which name.
        target: Target<'a>,
    },
    /// TXT
    Txt(&'static str),
    /// SOA, of which the server knows the content.
    Soa,
    /// NS, likewise.
    Ns,
}

impl Data<'_> {
    /// Seconds.
    pub fn ttl(&self) -> u32 {
        match self {
            Self::A(_) | Self::Aaaa(_) | Self::Srv { .. } => TTL,
            Self::Txt(_) | Self::Soa | Self::Ns => TTL_VERSION,
        }
    }
}

/// Name of a service or, of a headless one, of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target<'a> {
    /// Hostname and cluster id.
    pub host: Option<(&'a str, &'a str)>,
    /// The service.
    pub service: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
}

impl<'a> Target<'a> {
    /// Labels relative to the apex, leftmost first.
    pub fn labels(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let host = self.host.into_iter().flat_map(|(host, cluster)| [host, cluster]);
        host.chain([self.service, self.namespace, "svc"])
    }

    /// Octets on the wire, apex and all, uncompressed.
    pub fn wire_len(&self) -> usize {
        self.labels().chain(APEX.split('.')).map(|label| label.len() + 1).sum::<usize>() + 1
    }
}

impl Zone {
    /// Answers a question. `labels` are those before the apex, leftmost first and in lower case; `turn` rotates
    /// the order of records, so that clients that take the first spread; at most `most` records (and as many
    /// additional ones) are given.
    pub fn answer(&self, labels: &[&str], kind: Kind, turn: u32, most: usize) -> Answer<'_> {
        match labels {
            [] => match kind {
                Kind::Soa | Kind::Any => found([Data::Soa]),
                Kind::Ns => found([Data::Ns]),
                _ => Answer::NoData,
            },
            ["dns-version"] => match kind {
                Kind::Txt | Kind::Any => found([Data::Txt(DNS_VERSION)]),
                _ => Answer::NoData,
            },
            ["dns"] | ["ns", "dns"] | ["svc"] => Answer::NoData,
            [namespace, "svc"] if self.namespaces.contains_key(*namespace) => Answer::NoData,
            [rest @ .., service, namespace, "svc"] => {
                let found = self
                    .namespaces
                    .get_key_value(*namespace)
                    .and_then(|(ns, services)| services.get_key_value(*service).map(|(s, e)| (ns, s, e)));
                let Some((namespace, service, entry)) = found else { return Answer::NoName };
                Asked { namespace, service, kind, turn: turn as usize, most }.of(entry, rest)
            }
            _ => Answer::NoName,
        }
    }

    /// How many services have names.
    pub fn services(&self) -> usize {
        self.namespaces.values().map(Shelf::len).sum()
    }
}

fn found<'a>(records: impl Into<Vec<Data<'a>>>) -> Answer<'a> {
    Answer::Found(Found { records: records.into(), cut: false, additional: Vec::new() })
}

/// A question about a service.
#[derive(Clone, Copy)]
struct Asked<'a> {
    namespace: &'a str,
    service: &'a str,
    kind: Kind,
    turn: usize,
    most: usize,
}

impl<'a> Asked<'a> {
    fn of(self, entry: &'a Entry, rest: &[&str]) -> Answer<'a> {
        match (rest, entry) {
            ([], Entry::ClusterSetIP(e)) => {
                self.any(|kind| self.addresses(kind, &e.v4, &e.v6), || self.ports_of_vip(e, None))
            }
            ([], Entry::Headless(e)) => {
                self.any(|kind| self.addresses(kind, &e.v4, &e.v6), || self.ports_of_hosts(e, None))
            }
            ([protocol], _) if protocol.starts_with('_') => {
                let Some(protocol) = protocol_of(protocol) else { return Answer::NoName };
                let exists = |ports: &BTreeSet<Port>| {
                    ports.iter().any(|p| p.protocol == protocol && p.label().is_some())
                };
                let exists = match entry {
                    Entry::ClusterSetIP(e) => exists(&e.ports),
                    Entry::Headless(e) => e.shown().iter().any(|h| h.named && exists(&h.ports)),
                };
                if exists { Answer::NoData } else { Answer::NoName }
            }
            ([port, protocol], _) if protocol.starts_with('_') => {
                let (Some(name), Some(protocol)) = (port.strip_prefix('_'), protocol_of(protocol)) else {
                    return Answer::NoName;
                };
                let records = match entry {
                    Entry::ClusterSetIP(e) => self.ports_of_vip(e, Some((protocol, name))),
                    Entry::Headless(e) => self.ports_of_hosts(e, Some((protocol, name))),
                };
                match (records, self.kind) {
                    (Answer::Found(found), Kind::Srv | Kind::Any) => Answer::Found(found),
                    (Answer::Found(_), _) => Answer::NoData,
                    _ => Answer::NoName,
                }
            }
            // Nothing stands at a cluster's name, but names stand below it (2.4.4, RFC 8020).
            ([cluster], Entry::Headless(e)) if e.names.contains_key(*cluster) => Answer::NoData,
            ([host, cluster], Entry::Headless(e)) => {
                match e.names.get(*cluster).and_then(|hosts| hosts.get(*host)).and_then(|at| e.hosts.get(*at))
                {
                    Some(h) => self.any(|kind| self.addresses(kind, &h.v4, &h.v6), || Answer::NoData),
                    None => Answer::NoName,
                }
            }
            _ => Answer::NoName,
        }
    }

    /// The records of the asked type at a name that has addresses and perhaps ports.
    fn any(self, addresses: impl Fn(Kind) -> Answer<'a>, ports: impl Fn() -> Answer<'a>) -> Answer<'a> {
        match self.kind {
            Kind::Srv => ports(),
            Kind::Any => [addresses(Kind::A), addresses(Kind::Aaaa), ports()]
                .into_iter()
                .find(|answer| matches!(answer, Answer::Found(_)))
                .unwrap_or(Answer::NoData),
            kind => addresses(kind),
        }
    }

    fn addresses(self, kind: Kind, v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> Answer<'a> {
        let records: Vec<Data<'a>> = match kind {
            Kind::A => rotated(v4, self.turn).take(self.most).map(|a| Data::A(*a)).collect(),
            Kind::Aaaa => rotated(v6, self.turn).take(self.most).map(|a| Data::Aaaa(*a)).collect(),
            _ => Vec::new(),
        };
        let all = if kind == Kind::A { v4.len() } else { v6.len() };
        if records.is_empty() {
            return Answer::NoData;
        }
        Answer::Found(Found { cut: records.len() < all, records, additional: Vec::new() })
    }

    fn ports_of_vip(self, entry: &'a ClusterSetIP, only: Option<(Protocol, &str)>) -> Answer<'a> {
        let target = Target { host: None, service: self.service, namespace: self.namespace };
        let ports: BTreeSet<u16> = entry.ports.iter().filter(|p| p.is(only)).map(|p| p.port).collect();
        let records: Vec<_> = ports.iter().take(self.most).map(|&port| Data::Srv { port, target }).collect();
        if records.is_empty() {
            return Answer::NoData;
        }
        let v4 = entry.v4.iter().map(|a| IpAddr::V4(*a));
        let additional = v4.chain(entry.v6.iter().map(|a| IpAddr::V6(*a))).map(|a| (target, a));
        let additional = additional.take(self.most).collect();
        Answer::Found(Found { cut: records.len() < ports.len(), records, additional })
    }

    fn ports_of_hosts(self, entry: &'a Headless, only: Option<(Protocol, &str)>) -> Answer<'a> {
        let hosts = entry.shown();
        let mut found = Found { records: Vec::new(), cut: false, additional: Vec::new() };
        for host in rotated(hosts, self.turn).filter(|h| h.named) {
            let target = Target {
                host: Some((&host.name, &host.cluster)),
                service: self.service,
                namespace: self.namespace,
            };
            let ports: BTreeSet<u16> = host.ports.iter().filter(|p| p.is(only)).map(|p| p.port).collect();
            if ports.is_empty() {
                continue;
            }
            let room = self.most - found.records.len();
            found.cut |= ports.len() > room;
            found.records.extend(ports.iter().take(room).map(|&port| Data::Srv { port, target }));
            if found.cut {
                break;
            }
            let room = self.most.saturating_sub(found.additional.len());
            let v4 = host.v4.iter().map(|a| IpAddr::V4(*a));
            let addresses = v4.chain(host.v6.iter().map(|a| IpAddr::V6(*a)));
            found.additional.extend(addresses.take(room).map(|a| (target, a)));
        }
        if found.records.is_empty() { Answer::NoData } else { Answer::Found(found) }
    }
}

impl Port {
    /// The label under which it has an SRV record: unnamed ports have none (2.3.2), and one of 63 characters has
    /// no room for the underscore.
    fn label(&self) -> Option<&str> {
        self.name.as_ref().map(PortName::as_str).filter(|name| name.len() < 63)
    }

    fn is(&self, only: Option<(Protocol, &str)>) -> bool {
        only.is_none_or(|(protocol, name)| self.protocol == protocol && self.label() == Some(name))
    }
}

fn protocol_of(label: &str) -> Option<Protocol> {
    match label {
        "_tcp" => Some(Protocol::Tcp),
        "_udp" => Some(Protocol::Udp),
        "_sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}

fn rotated<T>(all: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let at = if all.is_empty() { 0 } else { turn % all.len() };
    let (tail, head) = all.split_at(at);
    head.iter().chain(tail)
}
