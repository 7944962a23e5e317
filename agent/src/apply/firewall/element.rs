//! Elements of sets and maps: typed values that are written as nft text and read out of nft's JSON. Nothing else ever
//! comes into a script.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::iter::repeat_n;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;
use tombolo_agent_core::desired::{Balance, Firewall, Vip};
use tombolo_agent_core::world::Reach;
use tombolo_proto::model::{DeviceNumber, Family, Lane, Lanes, Prefix, Protocol};

use super::super::netlink::device_number;
use super::shape::{HASH_MODULUS, LANE_BUCKETS, MAX_BACKENDS, VIP_SEED, affinity_class};

/// One value of a key or of what it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Datum {
    /// Of an interval set.
    Net(IpNet),
    /// An address.
    Address(IpAddr),
    /// A transport.
    Protocol(Protocol),
    /// A port, or the index of a backend.
    Number(u16),
    /// A hash.
    Word(u32),
    /// A link's name.
    Device(DeviceNumber),
    /// An IP family.
    Family(Family),
    /// `goto pick<family>_<n>`
    Pick(Family, u16),
    /// `goto keep<family>_<seconds>`
    Keep(Family, u32),
    /// `goto spread_<family>`
    Spread(Family),
    /// `goto lane_<n>`
    Lane(Lane),
}

impl fmt::Display for Datum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(net) if net.prefix_len() == net.max_prefix_len() => write!(f, "{}", net.addr()),
            Self::Net(net) => write!(f, "{net}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Protocol(protocol) => f.write_str(protocol_name(*protocol)),
            Self::Number(number) => write!(f, "{number}"),
            Self::Word(word) => write!(f, "{word}"),
            Self::Device(number) => write!(f, "\"{number}\""),
            Self::Family(Family::V4) => f.write_str("ipv4"),
            Self::Family(Family::V6) => f.write_str("ipv6"),
            Self::Pick(..) | Self::Keep(..) | Self::Spread(_) | Self::Lane(_) => {
                write!(f, "goto {}", Goto(self))
            }
        }
    }
}

/// Name of the chain of a verdict.
struct Goto<'a>(&'a Datum);

impl fmt::Display for Goto<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Datum::Pick(family, n) => write!(f, "pick{}_{n}", digit(*family)),
            Datum::Keep(family, seconds) => write!(f, "keep{}_{seconds}", digit(*family)),
            Datum::Spread(family) => write!(f, "spread_{}", digit(*family)),
            Datum::Lane(lane) => write!(f, "lane_{}", lane.get()),
            _ => Ok(()),
        }
    }
}

pub(super) fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// What stands in one place of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    Net,
    Address,
    Protocol,
    Number,
    Word,
    Device,
    Family,
    Verdict,
}

impl Column {
    fn parse(self, value: &Value) -> Option<Datum> {
        let text = value.as_str();
        match self {
            Self::Net => parse_net(value).map(Datum::Net),
            Self::Address => text?.parse().ok().map(Datum::Address),
            Self::Protocol => Some(Datum::Protocol(match (text, value.as_u64()) {
                (Some("tcp"), _) | (_, Some(6)) => Protocol::Tcp,
                (Some("udp"), _) | (_, Some(17)) => Protocol::Udp,
                (Some("sctp"), _) | (_, Some(132)) => Protocol::Sctp,
                _ => return None,
            })),
            Self::Number => value.as_u64().and_then(|n| n.try_into().ok()).map(Datum::Number),
            Self::Word => value.as_u64().and_then(|n| n.try_into().ok()).map(Datum::Word),
            Self::Device => device_number(text?).map(Datum::Device),
            Self::Family => match text? {
                "ipv4" => Some(Datum::Family(Family::V4)),
                "ipv6" => Some(Datum::Family(Family::V6)),
                _ => None,
            },
            Self::Verdict => parse_goto(value.get("goto")?.get("target")?.as_str()?),
        }
    }
}

fn parse_net(value: &Value) -> Option<IpNet> {
    match value {
        Value::String(text) => text.parse::<IpAddr>().ok().map(IpNet::from),
        other => {
            let prefix = other.get("prefix")?;
            let address: IpAddr = prefix.get("addr")?.as_str()?.parse().ok()?;
            IpNet::new(address, prefix.get("len")?.as_u64()?.try_into().ok()?).ok()
        }
    }
}

fn parse_goto(chain: &str) -> Option<Datum> {
    let (head, number) = chain.split_once('_')?;
    Some(match head {
        "pick4" => Datum::Pick(Family::V4, number.parse().ok()?),
        "pick6" => Datum::Pick(Family::V6, number.parse().ok()?),
        "keep4" => Datum::Keep(Family::V4, number.parse().ok()?),
        "keep6" => Datum::Keep(Family::V6, number.parse().ok()?),
        "spread" => {
            Datum::Spread(Family::ALL.into_iter().find(|family| number == digit(*family).to_string())?)
        }
        "lane" => Datum::Lane(Lane::new(number.parse().ok()?)?),
        _ => return None,
    })
}

/// A key; and what it leads to, empty for sets.
pub(super) type Elements = BTreeMap<Vec<Datum>, Vec<Datum>>;

/// Reads the `elem` of a set or map out of nft's JSON.
pub(super) fn parse(elements: &Value, key: &[Column], value: &[Column]) -> Option<Elements> {
    elements
        .as_array()?
        .iter()
        .map(|element| {
            if value.is_empty() {
                return Some((parse_tuple(element, key)?, Vec::new()));
            }
            let [k, v] = element.as_array()?.as_slice() else { return None };
            Some((parse_tuple(k, key)?, parse_tuple(v, value)?))
        })
        .collect()
}

fn parse_tuple(value: &Value, columns: &[Column]) -> Option<Vec<Datum>> {
    // An element that has a timeout or a comment is wrapped.
    let value = value.get("elem").and_then(|elem| elem.get("val")).unwrap_or(value);
    match (columns, value.get("concat").and_then(Value::as_array)) {
        ([column], None) => Some(vec![column.parse(value)?]),
        (columns, Some(all)) if all.len() == columns.len() => {
            columns.iter().zip(all).map(|(column, value)| column.parse(value)).collect()
        }
        _ => None,
    }
}

/// `a . b . c`
pub(super) struct Tuple<'a>(pub &'a [Datum]);

impl fmt::Display for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, datum) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(" . ")?;
            }
            write!(f, "{datum}")?;
        }
        Ok(())
    }
}

/// All sets and maps that have data, by name.
pub(super) fn desired(firewall: &Firewall) -> BTreeMap<String, Elements> {
    let mut all = BTreeMap::new();
    for family in Family::ALL {
        one_family(firewall, family, &mut all);
    }
    let devices = firewall.out_devices.iter().map(|n| (vec![Datum::Device(*n)], Vec::new()));
    all.insert("out_devices".to_owned(), devices.collect());
    all.insert("narrow6".to_owned(), nets(firewall.narrow.iter().map(Prefix::net), Family::V6));
    put_lanes(firewall.lanes, &mut all);
    all
}

/// One lane needs no hash of anything.
fn put_lanes(lanes: Lanes, all: &mut BTreeMap<String, Elements>) {
    let several = lanes > Lanes::ONE;
    let spread = |family: Family| (vec![Datum::Family(family)], vec![Datum::Spread(family)]);
    all.insert("spread".to_owned(), Family::ALL.into_iter().filter(|_| several).map(spread).collect());
    let buckets = (0..LANE_BUCKETS).filter(|_| several).zip(lanes.iter().cycle());
    let bucket = |(bucket, lane)| (vec![Datum::Number(bucket)], vec![Datum::Lane(lane)]);
    all.insert("lanes".to_owned(), buckets.map(bucket).collect());
}

fn one_family(firewall: &Firewall, family: Family, all: &mut BTreeMap<String, Elements>) {
    let mut put = |name: &str, elements: Elements| {
        all.insert(format!("{name}{}", digit(family)), elements);
    };
    let ours = |address: &IpAddr| Family::of(*address) == family;
    let tunnel: BTreeSet<IpAddr> = firewall.tunnel.iter().copied().filter(ours).collect();

    put("foreign", nets(firewall.remote.iter().map(Prefix::net), family));
    put("own", nets(firewall.own.iter().chain(&firewall.own_tunnel).map(Prefix::net), family));
    let hosts = tunnel.iter().map(|address| IpNet::from(*address));
    put("here", nets(firewall.local.iter().map(Prefix::net).chain(hosts), family));
    let open = firewall.remote.iter().filter(|_| firewall.reach == Reach::All);
    put("open", nets(open.map(Prefix::net), family));

    let exported = firewall.exported.iter().filter(|(address, ..)| ours(address));
    put(
        "exported",
        exported
            .clone()
            .map(|(a, protocol, port)| {
                (vec![Datum::Address(*a), Datum::Protocol(*protocol), Datum::Number(*port)], Vec::new())
            })
            .collect(),
    );
    put("echo", addresses(exported.map(|(address, ..)| *address).chain(tunnel.iter().copied())));
    put("tunnel", addresses(tunnel.iter().copied()));
    put(
        "source",
        tunnel.first().map(|a| (vec![Datum::Family(family)], vec![Datum::Address(*a)])).into_iter().collect(),
    );

    let resolvers = firewall.resolvers.iter().copied().filter(ours);
    put("resolver", addresses(resolvers));
    put("clusterset", nets(firewall.clusterset.iter().copied(), family));
    put_vips(firewall.vips.iter(), family, all);
}

/// What differs of two, if that is VIPs alone: the elements of those in the first one and in the second. None: more differs,
/// or VIPs hang on one another.
pub(super) fn vips_apart(
    old: &Firewall,
    new: &Firewall,
) -> Option<(BTreeMap<String, Elements>, BTreeMap<String, Elements>)> {
    let Firewall {
        reach,
        own,
        local,
        remote,
        tunnel,
        own_tunnel,
        out_devices,
        in_devices,
        exported,
        vips: _,
        clusterset,
        resolvers,
        narrow,
        lanes,
    } = new;
    let same = old.reach == *reach
        && old.own == *own
        && old.local == *local
        && old.remote == *remote
        && old.tunnel == *tunnel
        && old.own_tunnel == *own_tunnel
        && old.out_devices == *out_devices
        && old.in_devices == *in_devices
        && old.exported == *exported
        && old.clusterset == *clusterset
        && old.resolvers == *resolvers
        && old.narrow == *narrow
        && old.lanes == *lanes;
    if !same {
        return None;
    }
    let changed = new.vips.changed(&old.vips);
    let of = |firewall: &'_ Firewall| {
        let mut all = BTreeMap::new();
        for family in Family::ALL {
            let vips = changed.iter().filter_map(|vip| firewall.vips.get_key_value(vip));
            put_vips(vips, family, &mut all);
        }
        all
    };
    let parts = (of(old), of(new));
    let hashed = |part: &BTreeMap<String, Elements>| part.get("keep6").is_some_and(|keeps| !keeps.is_empty());
    let alone = !(hashed(&parts.0) || hashed(&parts.1)) || (are_apart(old) && are_apart(new));
    alone.then_some(parts)
}

/// Whether no two v6 VIPs with affinity have one hash.
fn are_apart(firewall: &Firewall) -> bool {
    let mut identities = BTreeSet::new();
    let kept = firewall.vips.iter().filter(|(vip, b)| vip.address.is_ipv6() && b.affinity.is_some());
    kept.map(|(vip, _)| identity(&vip_key(vip))).all(|identity| identities.insert(identity))
}

fn put_vips<'a>(
    vips: impl Iterator<Item = (&'a Vip, &'a Balance)>,
    family: Family,
    all: &mut BTreeMap<String, Elements>,
) {
    let ours = |address: &IpAddr| Family::of(*address) == family;
    let (mut verdicts, mut backends, mut keeps) = (Elements::new(), Elements::new(), Elements::new());
    let mut identities = BTreeSet::new();
    for (vip, balance) in vips.filter(|(vip, _)| ours(&vip.address)) {
        let key = vip_key(vip);
        let entries = balance.backends.iter().filter(|((a, _), _)| ours(a));
        let entries = entries.flat_map(|(backend, count)| repeat_n(*backend, count.get().into()));
        let chosen = fair_subset(entries.collect());
        let Ok(count @ 1..) = u16::try_from(chosen.len()) else { continue };
        verdicts.insert(key.clone(), vec![Datum::Pick(family, count)]);
        for (index, (address, port)) in (0..).zip(chosen) {
            let key = key.iter().copied().chain([Datum::Number(index)]).collect();
            backends.insert(key, vec![Datum::Address(address), Datum::Number(port)]);
        }
        // Two v6 VIPs of one hash (one pair in 2^32) would share their clients: the second goes without.
        if let Some(seconds) = balance.affinity
            && identities.insert(identity(&key))
        {
            keeps.insert(key, vec![Datum::Keep(family, affinity_class(seconds.get()))]);
        }
    }
    for (name, elements) in [("vip", verdicts), ("backend", backends), ("keep", keeps)] {
        all.insert(format!("{name}{}", digit(family)), elements);
    }
}

fn vip_key(vip: &Vip) -> Vec<Datum> {
    vec![Datum::Address(vip.address), Datum::Protocol(vip.protocol), Datum::Number(vip.port)]
}

/// A VIP, as the affinity maps name it: for v6 its address is hashed, as the kernel does it (`nft_jhash`).
pub(super) fn identity(vip: &[Datum]) -> Vec<Datum> {
    let name = |datum: &Datum| match datum {
        Datum::Address(IpAddr::V6(address)) => {
            let hash = u64::from(jhash(address.octets(), VIP_SEED)) * u64::from(HASH_MODULUS);
            Datum::Word((hash >> 32) as u32)
        }
        other => *other,
    };
    vip.iter().map(name).collect()
}

/// Bob Jenkins' lookup3 of 16 bytes, as Linux has it (`include/linux/jhash.h`).
fn jhash(bytes: [u8; 16], seed: u32) -> u32 {
    let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    let start = 0xdead_beef_u32.wrapping_add(16).wrapping_add(seed);
    let mut a = start.wrapping_add(word(0));
    let mut b = start.wrapping_add(word(4));
    let mut c = start.wrapping_add(word(8));
    a = a.wrapping_sub(c) ^ c.rotate_left(4);
    c = c.wrapping_add(b);
    b = b.wrapping_sub(a) ^ a.rotate_left(6);
    a = a.wrapping_add(c);
    c = c.wrapping_sub(b) ^ b.rotate_left(8);
    b = b.wrapping_add(a);
    a = a.wrapping_sub(c) ^ c.rotate_left(16);
    c = c.wrapping_add(b);
    b = b.wrapping_sub(a) ^ a.rotate_left(19);
    a = a.wrapping_add(c);
    c = c.wrapping_sub(b) ^ b.rotate_left(4);
    b = b.wrapping_add(a);
    // The last four bytes, which the kernel puts together one by one.
    a = a.wrapping_add(u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]));
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    (c ^ b).wrapping_sub(b.rotate_left(24))
}

/// Of more than nft chooses from, equally many out of every part.
fn fair_subset(backends: Vec<(IpAddr, u16)>) -> Vec<(IpAddr, u16)> {
    let max = usize::from(MAX_BACKENDS);
    if backends.len() <= max {
        return backends;
    }
    (0..max).map(|i| backends[i * backends.len() / max]).collect()
}

fn addresses(all: impl Iterator<Item = IpAddr>) -> Elements {
    all.map(|address| (vec![Datum::Address(address)], Vec::new())).collect()
}

/// Interval sets take no overlaps.
fn nets(all: impl Iterator<Item = IpNet>, family: Family) -> Elements {
    let mut v4 = Vec::<Ipv4Net>::new();
    let mut v6 = Vec::<Ipv6Net>::new();
    for net in all {
        match net {
            IpNet::V4(net) => v4.push(net),
            IpNet::V6(net) => v6.push(net),
        }
    }
    let nets: Vec<IpNet> = match family {
        Family::V4 => Ipv4Net::aggregate(&v4).into_iter().map(IpNet::V4).collect(),
        Family::V6 => Ipv6Net::aggregate(&v6).into_iter().map(IpNet::V6).collect(),
    };
    nets.into_iter().map(|net| (vec![Datum::Net(net)], Vec::new())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nft_lists_is_read() {
        let read = |value: Value, key: &[Column], data: &[Column]| parse(&value, key, data);
        let vip = [Column::Address, Column::Protocol, Column::Number];
        let elements = read(
            json!([[{"concat": ["198.19.0.10", "tcp", 80]}, {"goto": {"target": "pick4_2"}}],
                   [{"concat": ["198.19.0.10", 132, 80]}, {"goto": {"target": "pick4_64"}}]]),
            &vip,
            &[Column::Verdict],
        )
        .unwrap();
        assert_eq!(elements.values().next().unwrap(), &[Datum::Pick(Family::V4, 2)]);
        let nets =
            read(json!(["10.3.0.7", {"prefix": {"addr": "10.0.0.0", "len": 16}}]), &[Column::Net], &[])
                .unwrap();
        let text: Vec<String> = nets.keys().map(|k| Tuple(k).to_string()).collect();
        assert_eq!(text, ["10.0.0.0/16", "10.3.0.7"]);
        let kept = read(
            json!([[{"elem": {"val": {"concat": ["10.1.1.1", "198.19.0.10", "udp", 80]}, "timeout": 100, "expires": 99}},
                    {"concat": ["10.2.3.4", 8080]}]]),
            &[Column::Address, Column::Address, Column::Protocol, Column::Number],
            &[Column::Address, Column::Number],
        )
        .unwrap();
        assert_eq!(Tuple(kept.keys().next().unwrap()).to_string(), "10.1.1.1 . 198.19.0.10 . udp . 80");
    }

    #[test]
    fn what_we_never_wrote_is_not_read() {
        let range = json!([{"range": ["10.4.0.5", "10.4.0.9"]}]);
        assert_eq!(parse(&range, &[Column::Net], &[]), None);
        for odd in [json!(["tombolo0; flush ruleset"]), json!(["eth0"]), json!([7]), json!({}), json!(null)] {
            assert_eq!(parse(&odd, &[Column::Device], &[]), None, "{odd}");
        }
        let verdict =
            json!([["10.0.0.1", {"goto": {"target": "elsewhere_1"}}], ["10.0.0.2", {"accept": null}]]);
        assert_eq!(parse(&verdict, &[Column::Address], &[Column::Verdict]), None);
    }

    #[test]
    fn weights_are_repeated_entries() {
        let vip = Vip { address: [198, 19, 0, 9].into(), protocol: Protocol::Tcp, port: 80 };
        let entries = |last: u8, count: u16| {
            ((IpAddr::from([10, 2, 0, last]), 8080), std::num::NonZeroU16::new(count).unwrap())
        };
        let balance = Balance { backends: [entries(1, 4), entries(2, 1)].into(), affinity: None };
        let firewall = Firewall {
            reach: Reach::Exports,
            own: BTreeSet::new(),
            local: BTreeSet::new(),
            remote: BTreeSet::new(),
            tunnel: BTreeSet::new(),
            own_tunnel: BTreeSet::new(),
            out_devices: BTreeSet::new(),
            in_devices: BTreeSet::new(),
            exported: BTreeSet::new(),
            vips: [(vip, balance)].into(),
            clusterset: BTreeSet::new(),
            resolvers: BTreeSet::new(),
            narrow: BTreeSet::new(),
            lanes: Lanes::ONE,
        };
        let all = desired(&firewall);
        assert_eq!(all["vip4"].values().next().unwrap(), &[Datum::Pick(Family::V4, 5)]);
        let to = |last: u8| {
            let wanted = Datum::Address([10, 2, 0, last].into());
            all["backend4"].values().filter(|value| value[0] == wanted).count()
        };
        assert_eq!((all["backend4"].len(), to(1), to(2)), (5, 4, 1));
    }

    #[test]
    fn lanes_have_even_shares_and_one_has_none() {
        let of = |lanes| {
            let mut all = BTreeMap::new();
            put_lanes(Lanes::new(lanes).unwrap(), &mut all);
            let lane = |n| {
                let wanted = [Datum::Lane(Lane::new(n).unwrap())];
                all["lanes"].values().filter(|value| **value == wanted).count()
            };
            ([lane(0), lane(1), lane(2), lane(3)], all["spread"].len())
        };
        assert_eq!(of(1), ([0, 0, 0, 0], 0));
        assert_eq!(of(3), ([22, 21, 21, 0], 2));
        assert_eq!(of(4), ([16, 16, 16, 16], 2));
        for datum in [Datum::Spread(Family::V6), Datum::Lane(Lane::new(7).unwrap())] {
            let value = serde_json::json!({ "goto": { "target": Goto(&datum).to_string() } });
            assert_eq!(Column::Verdict.parse(&value), Some(datum));
        }
    }

    #[test]
    fn of_many_backends_a_fair_part_is_taken() {
        let many: Vec<_> =
            (0..1000u16).map(|i| (IpAddr::from([10, 0, (i >> 8) as u8, i as u8]), 80)).collect();
        let some = fair_subset(many.clone());
        assert_eq!(some.len(), 64);
        assert_eq!(some[0], many[0]);
        assert!(some[63].0 > many[950].0);
        assert_eq!(fair_subset(many[..64].to_vec()), many[..64]);
    }
}
