//! Exported services and their backends, as a cluster states them (KEP-1645).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Family, Hostname, PortName, Preference};

/// A transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Protocol {
    /// As Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "TCP" => Ok(Self::Tcp),
            "UDP" => Ok(Self::Udp),
            "SCTP" => Ok(Self::Sctp),
            other => Err(format!("protocol {other:?} is not TCP, UDP or SCTP")),
        }
    }
}

/// A port of a service or, in a [`BackendGroup`], the target port of the same name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Port {
    /// A service with one port need not name it.
    pub name: Option<PortName>,
    /// Transport.
    pub protocol: Protocol,
    /// 1 to 65535.
    pub port: u16,
    /// `appProtocol`, at most 317 characters (RFC 6335 name or a prefixed one); for display and copies only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

/// The two types of ServiceImport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ServiceType {
    /// One virtual address a family.
    ClusterSetIP,
    /// Names of the backends themselves.
    Headless,
}

/// A service that its cluster exports: one constituent of a derived service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// ClusterSetIP, or Headless for `clusterIP: None`.
    pub kind: ServiceType,
    /// The service's ports; at most [`Self::MAX_PORTS`].
    pub ports: Vec<Port>,
    /// At most two, without repetition, as the service lists them.
    pub families: Vec<Family>,
    /// `sessionAffinity: ClientIP` with its time limit in seconds.
    pub affinity: Option<NonZeroU32>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `trafficDistribution`.
    pub traffic_distribution: Option<String>,
    /// `exportedLabels`
    pub labels: BTreeMap<String, String>,
    /// `exportedAnnotations`
    pub annotations: BTreeMap<String, String>,
    /// Creation of the ServiceExport, unix seconds, as its cluster claims. Effective is the later of this
    /// and the grant's `member_since`.
    pub created: u64,
    /// How connections should be shared out among the clusters that export it.
    #[serde(default)]
    pub preference: Preference,
}

impl Export {
    /// Ports of a service.
    pub const MAX_PORTS: usize = 100;
}

/// A pod address behind a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Backend {
    /// Where it is.
    pub address: IpAddr,
    /// For names of headless services.
    pub hostname: Option<Hostname>,
    /// Takes new connections.
    pub ready: bool,
    /// Answers, though perhaps about to end.
    pub serving: bool,
    /// About to end.
    pub terminating: bool,
}

/// Backends that serve the same ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackendGroup {
    /// Target ports, by the names of the service's ports.
    pub ports: Vec<Port>,
    /// At most [`Backends::MAX_SHARD`] in all groups of a shard.
    pub backends: Vec<Backend>,
}

/// One shard of a service's backends.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Backends {
    /// Groups of equal ports.
    pub groups: Vec<BackendGroup>,
}

impl Backends {
    /// Backends of a shard: as many as an EndpointSlice may hold.
    pub const MAX_SHARD: usize = 1000;
    /// Shards of a service.
    pub const MAX_SHARDS: u32 = 1024;

    /// All addresses.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        self.groups.iter().flat_map(|g| g.backends.iter().map(|b| b.address)).collect()
    }
}
