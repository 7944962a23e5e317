//! Tunnel devices and the nodes that terminate tunnels.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NodeName, Prefix};

/// A node's standing: 1 to 3 for gateways, 0 for every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Rank(u8);

impl Rank {
    /// A node that is no gateway.
    pub const NODE: Self = Self(0);
    /// The ranks of gateways, in order.
    pub const GATEWAYS: [Self; 3] = [Self(1), Self(2), Self(3)];

    /// 0 to 3.
    pub fn new(rank: u8) -> Option<Self> {
        (rank <= 3).then_some(Self(rank))
    }

    /// As a number.
    pub fn get(self) -> u8 {
        self.0
    }

    /// Whether a node of this rank carries its cluster's traffic.
    pub fn is_gateway(self) -> bool {
        self.0 > 0
    }
}

impl TryFrom<u8> for Rank {
    type Error = String;
    fn try_from(rank: u8) -> Result<Self, String> {
        Self::new(rank).ok_or_else(|| format!("rank {rank} is not 0 to 3"))
    }
}

impl From<Rank> for u8 {
    fn from(rank: Rank) -> Self {
        rank.0
    }
}

/// Devices of one scheme, side by side, for more cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
pub struct Lane(u8);

impl Lane {
    /// Lane 0, which every node has.
    pub const FIRST: Self = Self(0);

    /// 0 to 7.
    pub fn new(lane: u8) -> Option<Self> {
        (lane < Lanes::MOST.0).then_some(Self(lane))
    }

    /// As a number.
    pub fn get(self) -> u8 {
        self.0
    }
}

/// How many lanes a node has, 1 to 8: those from [`Lane::FIRST`] up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Lanes(u8);

impl Lanes {
    /// One lane.
    pub const ONE: Self = Self(1);
    /// As many as device numbers have room for.
    pub const MOST: Self = Self(8);

    /// 1 to 8.
    pub fn new(lanes: u8) -> Option<Self> {
        (1..=Self::MOST.0).contains(&lanes).then_some(Self(lanes))
    }

    /// As few as include this one.
    pub fn up_to(last: Lane) -> Self {
        Self(last.0 + 1)
    }

    /// As a number.
    pub fn get(self) -> u8 {
        self.0
    }

    /// All of them, in order.
    pub fn iter(self) -> impl Iterator<Item = Lane> + Clone {
        (0..self.0).map(Lane)
    }
}

impl Default for Lanes {
    fn default() -> Self {
        Self::ONE
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for Lanes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().ok().and_then(Self::new).ok_or_else(|| format!("a node has 1 to {} lanes", Self::MOST))
    }
}

/// Whom a device talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceFamily {
    /// Other clusters.
    Out,
    /// Nodes of the own cluster.
    In,
}

/// Number of a device on its node: rank of the *other end* + 4 for [`DeviceFamily::In`] + 8 x lane.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct DeviceNumber(u8);

impl DeviceNumber {
    /// All that a node with these lanes may have.
    pub fn all(lanes: Lanes) -> impl Iterator<Item = Self> {
        let ranks = [Rank::NODE].into_iter().chain(Rank::GATEWAYS);
        let families = [DeviceFamily::Out, DeviceFamily::In];
        let of_lane = move |lane| {
            let ranks = ranks.clone();
            families.into_iter().flat_map(move |f| ranks.clone().map(move |r| Self::of(f, r, lane)))
        };
        lanes.iter().flat_map(of_lane)
    }

    /// The same in another lane.
    pub fn in_lane(self, lane: Lane) -> Self {
        Self::of(self.family(), self.rank(), lane)
    }

    /// Of a family, for peers of `other`'s rank, in a lane.
    pub fn of(family: DeviceFamily, other: Rank, lane: Lane) -> Self {
        let family = match family {
            DeviceFamily::Out => 0,
            DeviceFamily::In => 4,
        };
        Self(other.0 + family + 8 * lane.0)
    }

    /// 0 to 63.
    pub fn new(number: u8) -> Option<Self> {
        (number < 64).then_some(Self(number))
    }

    /// As a number.
    pub fn get(self) -> u8 {
        self.0
    }

    /// Rank of the other end.
    pub fn rank(self) -> Rank {
        Rank(self.0 & 3)
    }

    /// The family.
    pub fn family(self) -> DeviceFamily {
        if self.0 & 4 == 0 { DeviceFamily::Out } else { DeviceFamily::In }
    }

    /// The lane.
    pub fn lane(self) -> Lane {
        Lane(self.0 >> 3)
    }

    /// The link's name.
    pub fn link(self) -> String {
        format!("tombolo{}", self.0)
    }

    /// The UDP port it listens on unless its node says otherwise.
    pub fn default_port(self) -> u16 {
        4510 + u16::from(self.0)
    }
}

impl TryFrom<u8> for DeviceNumber {
    type Error = String;
    fn try_from(number: u8) -> Result<Self, String> {
        Self::new(number).ok_or_else(|| format!("device number {number} is not 0 to 63"))
    }
}

impl From<DeviceNumber> for u8 {
    fn from(number: DeviceNumber) -> Self {
        number.0
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tombolo{}", self.0)
    }
}

impl fmt::Debug for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A WireGuard public key (Curve25519, 32 bytes); printed in base64 as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WireguardKey(pub [u8; 32]);

impl fmt::Display for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::BASE64.encode(&self.0))
    }
}

impl fmt::Debug for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for WireguardKey {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        data_encoding::BASE64
            .decode(text.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| "not a WireGuard key: 32 bytes in base64 are expected".to_owned())
    }
}

impl From<WireguardKey> for String {
    fn from(key: WireguardKey) -> Self {
        key.to_string()
    }
}

/// What others must know to talk to one device of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Device {
    /// The device's own identity.
    pub key: WireguardKey,
    /// UDP port it listens on.
    pub port: u16,
}

/// A node that terminates tunnels, as its cluster states it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Name of the node.
    pub node: NodeName,
    /// Its standing.
    pub rank: Rank,
    /// Its devices.
    pub devices: BTreeMap<DeviceNumber, Device>,
    /// Where it may be reached, best first, at most [`Self::MAX_CANDIDATES`] a family.
    pub candidates: Vec<IpAddr>,
    /// Its address inside the tunnels.
    pub tunnel_v4: Option<Ipv4Addr>,
    /// Its address inside the tunnels.
    pub tunnel_v6: Option<Ipv6Addr>,
    /// Pod ranges that are on this node.
    pub prefixes: BTreeSet<Prefix>,
    /// Whether other clusters' nodes may talk to it directly.
    pub mesh: bool,
}

impl Endpoint {
    /// Candidates a family.
    pub const MAX_CANDIDATES: usize = 4;
    /// Prefixes (or single pods) of a node.
    pub const MAX_PREFIXES: usize = 256;

    /// Its tunnel addresses.
    pub fn tunnel(&self) -> impl Iterator<Item = IpAddr> {
        self.tunnel_v4.map(IpAddr::V4).into_iter().chain(self.tunnel_v6.map(IpAddr::V6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_design_s() {
        let n = |f, r, l| DeviceNumber::of(f, Rank::new(r).unwrap(), Lane::new(l).unwrap());
        assert_eq!(n(DeviceFamily::Out, 2, 0).get(), 2);
        assert_eq!(n(DeviceFamily::In, 0, 0).get(), 4);
        assert_eq!(n(DeviceFamily::In, 3, 1).get(), 15);
        assert_eq!(n(DeviceFamily::In, 3, 1).default_port(), 4525);
        for number in 0..64 {
            let n = DeviceNumber::new(number).unwrap();
            assert_eq!(DeviceNumber::of(n.family(), n.rank(), n.lane()), n);
        }
        let all: Vec<u8> = DeviceNumber::all(Lanes::MOST).map(DeviceNumber::get).collect();
        assert_eq!(all, (0..64).collect::<Vec<_>>());
        assert_eq!(DeviceNumber::all(Lanes::ONE).count(), 8);
        assert_eq!("3".parse(), Ok(Lanes(3)));
        assert!(["0", "9", "-1", ""].iter().all(|text| text.parse::<Lanes>().is_err()));
    }
}
