//! The static part of our table: chains, rules, declarations of sets and maps. Why each rule is there is told in
//! `docs/datapath.md`. All text in here is ours; numbers are typed.

use std::collections::BTreeMap;
use std::fmt::Write;

use ring::digest;
use tombolo_agent_core::desired::{DNS_PORT, LANE_KEPT, LANE_MASK, MARK, MARK_MASK, lane_mark};
use tombolo_agent_core::path_mtu::LEAST;
use tombolo_proto::model::Lanes;

use super::element::Column;

/// Backends of a VIP that are balanced over.
pub(super) const MAX_BACKENDS: u16 = 64;
/// UDP port of the hello between nodes, on tunnel addresses.
const HELLO_PORT: u16 = 4509;
/// UDP ports of tunnel devices.
const TUNNEL_PORTS: &str = "4510-4573";
/// How long clients stay with a backend: nft wants a rule for each time. The next longer one is used.
const AFFINITY: [u32; 14] = [10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
/// Seed of the hash of a client's v6 address.
const CLIENT_SEED: u32 = 0x746f_6d62;
/// Seed of the hash of a VIP's v6 address.
pub(super) const VIP_SEED: u32 = 0x6f6c_6f21;
/// What hashes are taken modulo.
pub(super) const HASH_MODULUS: u32 = u32::MAX;
/// Seed of the hash of flows.
const LANE_SEED: u32 = 0x746f_6c61;
/// Parts that flows are hashed into, shared out among the lanes.
pub(super) const LANE_BUCKETS: u16 = 64;
/// Clients remembered, of each family.
const AFFINITY_SIZE: u32 = 262_144;

/// The class of at least so many seconds, if there is one.
pub(super) fn affinity_class(seconds: u32) -> u32 {
    AFFINITY.into_iter().find(|class| *class >= seconds).unwrap_or(AFFINITY[AFFINITY.len() - 1])
}

/// A set or map whose elements we write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set {
    pub name: String,
    pub is_map: bool,
    pub key: &'static [Column],
    pub value: &'static [Column],
}

/// Everything that does not depend on data.
pub(super) struct Shape {
    /// Makes the table, without elements.
    pub script: String,
    /// Rules in each chain; one chain is empty, and its name tells which shape a table has.
    pub rules: BTreeMap<String, usize>,
    /// What has elements of ours.
    pub sets: Vec<Set>,
}

/// Names of the counters of dropped packets.
pub(super) const COUNTERS: [&str; 3] = ["reach_dropped", "clear_dropped", "hub_dropped"];

struct Builder {
    script: String,
    rules: BTreeMap<String, usize>,
    sets: Vec<Set>,
}

impl Builder {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.script, "{text}");
    }

    fn set(&mut self, name: String, declaration: &str, key: &'static [Column]) {
        self.line(format_args!("add set inet tombolo {name} {{ {declaration}; }}"));
        self.sets.push(Set { name, is_map: false, key, value: &[] });
    }

    fn map(&mut self, name: String, declaration: &str, key: &'static [Column], value: &'static [Column]) {
        self.line(format_args!("add map inet tombolo {name} {{ {declaration}; }}"));
        self.sets.push(Set { name, is_map: true, key, value });
    }

    fn chain(&mut self, name: &str) {
        self.line(format_args!("add chain inet tombolo {name}"));
        self.rules.insert(name.to_owned(), 0);
    }

    fn hook(&mut self, name: &str, hook: &str) {
        self.line(format_args!("add chain inet tombolo {name} {{ type {hook}; policy accept; }}"));
        self.rules.insert(name.to_owned(), 0);
    }

    fn rule(&mut self, chain: &str, rule: impl AsRef<str>) {
        self.line(format_args!("add rule inet tombolo {chain} {}", rule.as_ref()));
        *self.rules.entry(chain.to_owned()).or_default() += 1;
    }
}

/// The one shape of this version.
pub(super) fn shape() -> Shape {
    let mut b = Builder { script: String::new(), rules: BTreeMap::new(), sets: Vec::new() };
    for counter in COUNTERS {
        b.line(format_args!("add counter inet tombolo {counter}"));
    }
    b.set("out_devices".into(), "type ifname", &[Column::Device]);
    sets(&mut b, "4", "ip", "ipv4_addr");
    sets(&mut b, "6", "ip6", "ipv6_addr");
    b.set("narrow6".into(), "type ipv6_addr; flags interval", &[Column::Net]);

    transit(&mut b);
    lanes(&mut b);
    source(&mut b);
    reach(&mut b);
    service(&mut b);

    let digest = digest::digest(&digest::SHA256, b.script.as_bytes());
    let marker = format!("shape_{}", data_encoding::HEXLOWER.encode(&digest.as_ref()[..8]));
    b.chain(&marker);
    Shape { script: b.script, rules: b.rules, sets: b.sets }
}

fn sets(b: &mut Builder, f: &str, ip: &str, address: &str) {
    const TARGET: &[Column] = &[Column::Address, Column::Protocol, Column::Number];
    const BACKEND: &[Column] = &[Column::Address, Column::Protocol, Column::Number, Column::Number];
    let interval = format!("type {address}; flags interval");
    for name in ["foreign", "own", "here", "open", "clusterset"] {
        b.set(format!("{name}{f}"), &interval, &[Column::Net]);
    }
    for name in ["echo", "tunnel", "resolver"] {
        b.set(format!("{name}{f}"), &format!("type {address}"), &[Column::Address]);
    }
    let target = format!("{ip} daddr . meta l4proto . th dport");
    b.set(format!("exported{f}"), &format!("typeof {target}"), TARGET);
    b.map(format!("source{f}"), &format!("type nf_proto : {address}"), &[Column::Family], &[Column::Address]);
    b.map(format!("vip{f}"), &format!("typeof {target} : verdict"), TARGET, &[Column::Verdict]);
    b.map(format!("keep{f}"), &format!("typeof {target} : verdict"), TARGET, &[Column::Verdict]);
    b.map(
        format!("backend{f}"),
        &format!("typeof {target} . numgen random mod 65536 : {ip} daddr . th dport"),
        BACKEND,
        &[Column::Address, Column::Number],
    );
    // Written by packets. nft 1.0.6 writes keys of 16 bytes at most, and as much data: in v6 hashes stand for addresses.
    let dynamic = format!("flags dynamic,timeout; timeout 3h; size {AFFINITY_SIZE}");
    if f == "4" {
        b.line(format_args!(
            "add map inet tombolo affinity4 {{ typeof {ip} saddr . {target} : {ip} daddr . th dport; {dynamic}; }}"
        ));
    } else {
        let key = "numgen random mod 65536 . numgen random mod 65536 . meta l4proto . th dport";
        b.line(format_args!("add map inet tombolo affinity6 {{ typeof {key} : {ip} daddr; {dynamic}; }}"));
        b.line(format_args!("add map inet tombolo affinity6_port {{ typeof {key} : th dport; {dynamic}; }}"));
    }
}

/// `{v6 saddr and daddr, hashed}`
fn hashed(of: &str) -> String {
    format!(
        "jhash {of} saddr mod {HASH_MODULUS} seed {CLIENT_SEED:#x} . jhash {of} daddr mod {HASH_MODULUS} seed {VIP_SEED:#x}"
    )
}

/// What only passes is not tracked; what goes to other clusters never goes in clear, and never to a third one.
fn transit(b: &mut Builder) {
    b.hook("transit", "filter hook prerouting priority raw");
    for (f, ip) in FAMILIES {
        let from = format!("iifname \"tombolo*\" {ip}");
        b.rule(
            "transit",
            format!("{from} saddr @foreign{f} {ip} daddr @own{f} {ip} daddr != @here{f} notrack"),
        );
        b.rule(
            "transit",
            format!("{from} saddr @own{f} {ip} saddr != @here{f} {ip} daddr @foreign{f} notrack"),
        );
    }
    let keep = !MARK_MASK;
    b.hook("arrival", "filter hook prerouting priority mangle");
    for (f, ip) in FAMILIES {
        b.rule(
            "arrival",
            format!(
                "iifname != \"tombolo*\" {ip} saddr @foreign{f} fib daddr type local udp dport {TUNNEL_PORTS} \
                 meta mark set meta mark & {keep:#010x} | {MARK:#010x}"
            ),
        );
    }
    b.hook("clear", "filter hook postrouting priority filter");
    b.rule("clear", format!("meta mark & {MARK_MASK:#010x} == {MARK:#010x} accept"));
    b.rule("clear", "oifname \"tombolo*\" accept");
    for (f, ip) in FAMILIES {
        b.rule("clear", format!("{ip} daddr @foreign{f} counter name clear_dropped drop"));
    }
    b.hook("hub", "filter hook forward priority filter - 6");
    b.rule("hub", "iifname @out_devices oifname @out_devices counter name hub_dropped drop");
    b.hook("clamp", "filter hook forward priority mangle");
    b.rule("clamp", "oifname \"tombolo*\" tcp flags syn tcp option maxseg size set rt mtu");
    // No route is so narrow in IPv6; a path may be. Headers of IPv6 and TCP are 60 bytes.
    b.rule(
        "clamp",
        format!(
            "oifname \"tombolo*\" ip6 daddr @narrow6 tcp flags syn tcp option maxseg size set {}",
            LEAST - 60
        ),
    );
}

/// Flows to other clusters bear their lane in their mark, once translations are done. A node of one lane looks up one byte.
fn lanes(b: &mut Builder) {
    b.map("spread".into(), "type nf_proto : verdict", &[Column::Family], &[Column::Verdict]);
    b.map(
        "lanes".into(),
        &format!("typeof numgen random mod {LANE_BUCKETS} : verdict"),
        &[Column::Number],
        &[Column::Verdict],
    );
    for lane in Lanes::MOST.iter() {
        let chain = format!("lane_{}", lane.get());
        b.chain(&chain);
        let (keep, mark) = (!LANE_MASK, lane_mark(lane));
        b.rule(&chain, format!("meta mark set meta mark & {keep:#010x} | {mark:#010x}"));
    }
    for (f, ip) in FAMILIES {
        let chain = format!("spread_{f}");
        b.chain(&chain);
        b.rule(&chain, format!("{ip} daddr != @foreign{f} return"));
        // Of the rest there is little; and answers to echoes of lane 0, which tell what lives, must not hang on another.
        b.rule(
            &chain,
            format!(
                "meta l4proto {{ tcp, udp, sctp }} jhash {ip} saddr . {ip} daddr . th sport . th dport \
                 mod {LANE_BUCKETS} seed {LANE_SEED:#x} vmap @lanes"
            ),
        );
    }
    b.hook("lane", "filter hook prerouting priority dstnat + 10");
    b.rule("lane", "meta nfproto vmap @spread");
    b.hook("lane_output", "route hook output priority -90");
    b.rule("lane_output", format!("meta mark & {:#010x} != 0 accept", LANE_KEPT | MARK_MASK));
    b.rule("lane_output", "meta nfproto vmap @spread");
}

/// Source kept between pods, the tunnel address for everything else.
fn source(b: &mut Builder) {
    b.hook("hairpin", "nat hook postrouting priority srcnat - 11");
    for (f, ip) in FAMILIES {
        // A backend on the client's own node would answer past this node's NAT.
        b.rule(
            "hairpin",
            format!(
                "ct status dnat ct original {ip} daddr @clusterset{f} {ip} saddr @here{f} {ip} daddr @here{f} \
                 snat {ip} to meta nfproto map @source{f}"
            ),
        );
    }
    b.hook("source", "nat hook postrouting priority srcnat - 10");
    for (f, ip) in FAMILIES {
        b.rule("source", format!("{ip} saddr @here{f} {ip} daddr @foreign{f} snat {ip} to {ip} saddr"));
        b.rule("source", format!("{ip} saddr @foreign{f} {ip} daddr @here{f} snat {ip} to {ip} saddr"));
        b.rule("source", format!("oifname \"tombolo*\" snat {ip} to meta nfproto map @source{f}"));
    }
}

/// What other clusters may send to pods of this node, and to the node itself.
fn reach(b: &mut Builder) {
    for (f, ip) in FAMILIES {
        let admit = format!("admit{f}");
        let (icmp, errors) = if f == "4" {
            ("icmp", "destination-unreachable, time-exceeded, parameter-problem")
        } else {
            ("icmpv6", "destination-unreachable, packet-too-big, time-exceeded, parameter-problem")
        };
        b.chain(&admit);
        b.rule(&admit, "ct state established,related accept");
        b.rule(&admit, format!("{ip} daddr . meta l4proto . th dport @exported{f} accept"));
        b.rule(&admit, format!("{icmp} type {{ {errors} }} accept"));
        b.rule(&admit, format!("{icmp} type echo-request {ip} daddr @echo{f} accept"));
        b.rule(&admit, format!("{ip} daddr @tunnel{f} udp dport {HELLO_PORT} accept"));
        b.rule(&admit, "counter name reach_dropped drop");
    }
    b.hook("reach_forward", "filter hook forward priority filter - 5");
    b.rule("reach_forward", "iifname != \"tombolo*\" accept");
    b.hook("reach_input", "filter hook input priority filter - 5");
    b.rule("reach_input", "iifname != \"tombolo*\" accept");
    for (f, ip) in FAMILIES {
        // Of a cluster that was just revoked, while its peer is still there.
        for chain in ["reach_forward", "reach_input"] {
            b.rule(
                chain,
                format!("iifname @out_devices {ip} saddr != @foreign{f} counter name reach_dropped drop"),
            );
        }
        b.rule("reach_forward", format!("{ip} saddr @open{f} {ip} daddr @here{f} accept"));
        b.rule("reach_forward", format!("{ip} saddr @foreign{f} {ip} daddr @here{f} goto admit{f}"));
        // To own pods of other nodes by a tunnel, whose far end judges. Past it only under reach `all`: a flat network's
        // nodes, and pods that no node is known to have.
        b.rule(
            "reach_forward",
            format!("oifname != \"tombolo*\" {ip} saddr @open{f} {ip} daddr @own{f} accept"),
        );
        b.rule(
            "reach_forward",
            format!("oifname != \"tombolo*\" {ip} saddr @foreign{f} counter name reach_dropped drop"),
        );
        // Neither through this cluster to elsewhere.
        b.rule(
            "reach_forward",
            format!("{ip} saddr @foreign{f} {ip} daddr != @own{f} counter name reach_dropped drop"),
        );
        // Nor in clear: a gateway that does not know a cluster yet gets its own nodes' packets for it, and would send
        // them by the default route.
        b.rule(
            "reach_forward",
            format!("oifname != \"tombolo*\" {ip} daddr != @own{f} counter name clear_dropped drop"),
        );
        b.rule("reach_input", format!("{ip} saddr @foreign{f} goto admit{f}"));
    }
}

/// ClusterSetIPs of a directory, and the name server.
fn service(b: &mut Builder) {
    for (f, ip) in FAMILIES {
        let target = format!("{ip} daddr . meta l4proto . th dport");
        for n in 1..=MAX_BACKENDS {
            let pick = format!("pick{f}_{n}");
            b.chain(&pick);
            b.rule(&pick, format!("dnat {ip} to {target} . numgen random mod {n} map @backend{f}"));
        }
        for seconds in AFFINITY {
            let keep = format!("keep{f}_{seconds}");
            b.chain(&keep);
            for protocol in PROTOCOLS {
                let port = "meta l4proto . ct original proto-dst";
                let update = if f == "4" {
                    let key = format!("ct original ip saddr . ct original ip daddr . {port}");
                    format!("update @affinity4 {{ {key} timeout {seconds}s : ip daddr . th dport }}")
                } else {
                    let key = format!("{} . {port} timeout {seconds}s", hashed("ct original ip6"));
                    format!(
                        "update @affinity6 {{ {key} : ip6 daddr }} update @affinity6_port {{ {key} : th dport }}"
                    )
                };
                b.rule(&keep, format!("meta l4proto {protocol} {update}"));
            }
        }
    }
    b.chain("service");
    // Other clusters resolve for themselves.
    b.rule("service", "iifname \"tombolo*\" return");
    for (f, ip) in FAMILIES {
        let target = format!("{ip} daddr . meta l4proto . th dport");
        b.rule(
            "service",
            format!(
                "{ip} daddr @resolver{f} meta l4proto {{ tcp, udp }} th dport 53 redirect to :{DNS_PORT}"
            ),
        );
        if f == "4" {
            b.rule("service", format!("dnat ip to ip saddr . {target} map @affinity4"));
        } else {
            let key = format!("{} . meta l4proto . th dport", hashed("ip6"));
            b.rule("service", format!("dnat ip6 to {key} map @affinity6 : {key} map @affinity6_port"));
        }
        b.rule("service", format!("{target} vmap @vip{f}"));
    }
    b.hook("service_prerouting", "nat hook prerouting priority dstnat - 10");
    b.rule("service_prerouting", "jump service");
    b.hook("service_output", "nat hook output priority -110");
    b.rule("service_output", "jump service");

    b.chain("remember");
    for (f, ip) in FAMILIES {
        for protocol in PROTOCOLS {
            b.rule(
                "remember",
                format!(
                    "meta l4proto {protocol} ct original {ip} daddr . meta l4proto . ct original proto-dst vmap @keep{f}"
                ),
            );
        }
    }

    b.hook("affinity", "filter hook postrouting priority mangle");
    b.rule("affinity", "ct status dnat ct state new jump remember");

    // A port or address that nothing answers is refused at once and never leaves. A TCP reset is not rate-limited.
    b.chain("refuse");
    b.rule("refuse", "meta l4proto tcp reject with tcp reset");
    b.rule("refuse", "reject");
    for hook in ["forward", "output"] {
        let chain = format!("unclaimed_{hook}");
        b.hook(&chain, &format!("filter hook {hook} priority filter - 5"));
        for (f, ip) in FAMILIES {
            b.rule(&chain, format!("{ip} daddr @clusterset{f} goto refuse"));
        }
    }
}

const FAMILIES: [(&str, &str); 2] = [("4", "ip"), ("6", "ip6")];
const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_is_one_and_the_same() {
        let (a, b) = (shape(), shape());
        assert_eq!((&a.script, &a.rules), (&b.script, &b.rules));
        assert_eq!(a.rules.iter().filter(|(name, n)| name.starts_with("shape_") && **n == 0).count(), 1);
        assert_eq!(a.rules["admit4"], 6);
        assert!(a.sets.iter().any(|set| set.name == "backend6" && set.is_map));
    }

    #[test]
    fn affinity_lasts_at_least_as_long_as_asked() {
        assert_eq!(
            [1, 10, 11, 10800, 86400, u32::MAX].map(affinity_class),
            [10, 10, 30, 10800, 86400, 86400]
        );
    }
}
