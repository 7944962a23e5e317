//! Addresses and prefixes that may stand in grants, routes and answers.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4
    #[serde(rename = "IPv4")]
    V4,
    /// IPv6
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Why an address is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "address {0} is loopback, link-local, multicast, reserved or a cloud's metadata address, and never carried between clusters"
)]
pub struct AddressError(pub IpAddr);

/// Why a text or a net is not a prefix that can be owned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not of the form ADDRESS/LENGTH.
    #[error("{0:?} is not a CIDR such as 10.1.0.0/16")]
    Form(String),
    /// Bits behind the mask.
    #[error("{0} has bits set behind its length; did you mean {1}?")]
    HostBits(IpNet, IpNet),
    /// Touches a range that nobody may own.
    #[error(
        "{0} touches {1}, which is loopback, link-local, multicast, reserved or a cloud's metadata address"
    )]
    Special(IpNet, IpNet),
}

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

/// The first three groups and the last.
const fn v6(a: u16, b: u16, c: u16, last: u16, length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, last), length))
}

/// RFC 6890, RFC 4291 and their updates, and where clouds answer "who am I": what no grant may touch and no
/// answer may hold. Whoever owned one of the latter would be asked for the credentials of other clusters'
/// nodes.
const SPECIAL: [IpNet; 18] = [
    v4(0, 0, 0, 0, 8),
    v4(127, 0, 0, 0, 8),
    v4(169, 254, 0, 0, 16),
    v4(192, 0, 0, 0, 24), // IETF protocols: NAT64 discovery, DS-Lite, 464XLAT
    v4(224, 0, 0, 0, 4),
    v4(240, 0, 0, 0, 4),
    v6(0, 0, 0, 0, 8),       // unspecified, loopback, IPv4-mapped and -compatible
    v6(0x64, 0, 0, 0, 16),   // 64:ff9b::/96 and its kin, translation
    v6(0x100, 0, 0, 0, 64),  // discard
    v6(0x2001, 0, 0, 0, 32), // Teredo embeds any IPv4 address
    v6(0x2002, 0, 0, 0, 16), // 6to4 likewise
    v6(0xfe80, 0, 0, 0, 10),
    v6(0xfec0, 0, 0, 0, 10), // site-local, given up by RFC 3879
    v6(0xff00, 0, 0, 0, 8),
    v4(100, 100, 100, 200, 32),      // Alibaba Cloud
    v4(168, 63, 129, 16, 32),        // Azure
    v6(0xfd00, 0xec2, 0, 0, 32),     // AWS: fd00:ec2::253, ::254
    v6(0xfd20, 0xce, 0, 0x254, 128), // Google Cloud
];

/// Whether packets for `address` may cross between clusters at all.
pub fn usable_address(address: IpAddr) -> Result<IpAddr, AddressError> {
    if SPECIAL.iter().any(|net| net.contains(&address)) { Err(AddressError(address)) } else { Ok(address) }
}

/// A range of addresses that a cluster can own: canonical, and clear of every special range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(IpNet);

impl Prefix {
    /// Checks a net.
    pub fn new(net: IpNet) -> Result<Self, PrefixError> {
        let trunc = net.trunc();
        if trunc != net {
            return Err(PrefixError::HostBits(net, trunc));
        }
        for special in SPECIAL {
            if overlaps(net, special) {
                return Err(PrefixError::Special(net, special));
            }
        }
        Ok(Self(net))
    }

    /// The prefix of one address.
    pub fn host(address: IpAddr) -> Result<Self, AddressError> {
        usable_address(address).map(|a| Self(IpNet::from(a)))
    }

    /// The net.
    pub fn net(&self) -> IpNet {
        self.0
    }

    /// First address.
    pub fn address(&self) -> IpAddr {
        self.0.network()
    }

    /// Mask length in bits.
    pub fn length(&self) -> u8 {
        self.0.prefix_len()
    }

    /// The family.
    pub fn family(&self) -> Family {
        Family::of(self.address())
    }

    /// Whether the address lies in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// Whether `other` lies wholly in it.
    pub fn covers(&self, other: &Self) -> bool {
        match (self.0, other.0) {
            (IpNet::V4(a), IpNet::V4(b)) => a.contains(&b),
            (IpNet::V6(a), IpNet::V6(b)) => a.contains(&b),
            _ => false,
        }
    }

    /// Whether they share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

fn overlaps(a: IpNet, b: IpNet) -> bool {
    match (a, b) {
        (IpNet::V4(a), IpNet::V4(b)) => a.contains(&b) || b.contains(&a),
        (IpNet::V6(a), IpNet::V6(b)) => a.contains(&b) || b.contains(&a),
        _ => false,
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.to_string())
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let net = text.parse().map_err(|_| PrefixError::Form(text.chars().take(60).collect()))?;
        Self::new(net)
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;
    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_ranges_are_refused() {
        for bad in [
            "0.0.0.0/0",
            "127.0.0.0/8",
            "127.0.0.1/32",
            "169.254.169.254/32",
            "224.0.0.0/4",
            "128.0.0.0/1",
            "255.255.255.255/32",
            "::/0",
            "::1/128",
            "fe80::/64",
            "ff02::1/128",
            "::ffff:10.0.0.0/104",
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "2002::/16",
            "2001::/32",
            "2001:0:1::/48",
            "100::/64",
            "fec0::/16",
            "192.0.0.0/29",
            "128.0.0.0/2",
            "100.64.0.0/10",
            "168.63.129.16/32",
            "fd00:ec2::254/128",
            "fd20:ce::254/128",
            "fd00::/8",
        ] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
        for good in ["10.1.0.0/16", "100.64.0.0/16", "198.18.0.0/24", "fd00:10::/32", "2001:db8::/32"] {
            assert!(good.parse::<Prefix>().is_ok(), "{good}");
        }
        assert!(matches!("10.1.2.3/16".parse::<Prefix>(), Err(PrefixError::HostBits(..))));
    }

    #[test]
    fn covers_and_overlaps() {
        let p = |t: &str| t.parse::<Prefix>().unwrap();
        assert!(p("10.1.0.0/16").covers(&p("10.1.2.0/24")));
        assert!(!p("10.1.2.0/24").covers(&p("10.1.0.0/16")));
        assert!(p("10.1.2.0/24").overlaps(&p("10.1.0.0/16")));
        assert!(!p("10.1.0.0/16").overlaps(&p("fd12::/16")));
    }
}
