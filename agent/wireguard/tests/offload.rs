//! Packets that are joined and cut again are the packets that came.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::net::IpAddr;

use proptest::prelude::*;
use tombolo_wireguard::checksum::Sum;
use tombolo_wireguard::coalesce::{Inbox, Joins};
use tombolo_wireguard::noise::BUFFER;
use tombolo_wireguard::segment::{Packets, Segments};
use tombolo_wireguard::vnet::{Checksum, Kind, LENGTH, Vnet};

const ALL: Joins = Joins { tcp: true, udp: true };

/// A packet as a flow sends it.
#[derive(Debug, Clone)]
struct Sent {
    flow: usize,
    payload: usize,
    flags: u8,
    /// Gaps, repetitions and other acknowledgements.
    skip: u8,
    options: bool,
    dont_fragment: bool,
    /// A bit that turned over on the way.
    broken: Option<prop::sample::Index>,
}

fn sent() -> impl Strategy<Value = Sent> {
    let payload = prop_oneof![6 => Just(1000usize), 1 => 0usize..1400, 1 => Just(1)];
    let flags = prop_oneof![8 => Just(0x10u8), 1 => Just(0x18), 1 => any::<u8>()];
    let skip = prop_oneof![8 => Just(0u8), 1 => any::<u8>()];
    let broken = prop_oneof![8 => Just(None), 1 => any::<prop::sample::Index>().prop_map(Some)];
    // One in sixteen is another kind of packet than its neighbours.
    (0usize..6, payload, flags, skip, prop::bool::weighted(0.06), prop::bool::weighted(0.94), broken)
        .prop_map(|(flow, payload, flags, skip, options, dont_fragment, broken)| Sent {
            flow,
            payload,
            flags,
            skip,
            options,
            dont_fragment,
            broken,
        })
}

/// Flows 0, 1: TCP over IPv4; 2: TCP over IPv6; 3, 4: UDP over IPv4; 5: UDP over IPv6.
fn build(sent: &Sent, number: u16, sequence: u32) -> Vec<u8> {
    let tcp = sent.flow < 3;
    let v4 = !matches!(sent.flow, 2 | 5);
    let address = |last: u8| -> IpAddr {
        if v4 { [10, 0, 0, last].into() } else { [0xfd00, 0, 0, 0, 0, 0, 0, last.into()].into() }
    };
    let (source, destination) = (address(1), address(2));
    let mut inner = Vec::new();
    inner.extend((1000 + sent.flow as u16).to_be_bytes());
    inner.extend(80u16.to_be_bytes());
    let place = if tcp {
        inner.extend(sequence.to_be_bytes());
        inner.extend(u32::from(sent.skip & 1).to_be_bytes());
        inner.extend([if sent.options { 0x60 } else { 0x50 }, sent.flags, 1, 1, 0, 0, 0, 0]);
        inner.extend(if sent.options { &[1u8; 4][..] } else { &[] });
        16
    } else {
        inner.extend((8 + sent.payload as u16).to_be_bytes());
        inner.extend([0, 0]);
        6
    };
    inner.extend((0..sent.payload).map(|i| (i as u16 ^ number) as u8));
    let protocol = if tcp { 6 } else { 17 };
    let sum = Sum::default().with_pseudo(source, destination, protocol, inner.len()).with(&inner).finish();
    inner[place..place + 2].copy_from_slice(&sum);
    let mut packet = Vec::new();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + inner.len() as u16).to_be_bytes());
            packet.extend(number.to_be_bytes());
            packet.extend([if sent.dont_fragment { 0x40 } else { 0 }, 0, 64, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            let sum = Sum::default().with(&packet).finish();
            packet[10..12].copy_from_slice(&sum);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((inner.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
        }
        _ => unreachable!("one family"),
    }
    packet.extend(inner);
    if let Some(bit) = sent.broken {
        let bit = bit.index(packet.len() * 8);
        packet[bit / 8] ^= 1 << (bit % 8);
    }
    packet
}

/// All packets that flows send, in their order.
fn traffic(all: &[Sent]) -> Vec<Vec<u8>> {
    let mut state = [(1u16, 4_294_960_000u32); 6];
    let mut packets = Vec::new();
    for sent in all {
        let (number, sequence) = &mut state[sent.flow];
        *sequence = sequence.wrapping_add(u32::from(sent.skip) * 7);
        packets.push(build(sent, *number, *sequence));
        *number += 1;
        *sequence = sequence.wrapping_add(sent.payload as u32);
    }
    packets
}

fn join(packets: &[Vec<u8>], joins: Joins) -> Vec<(Vnet, Vec<u8>)> {
    let mut inbox = Inbox::new(2 * BUFFER, joins);
    let mut out = Vec::new();
    let mut drain = |inbox: &mut Inbox| {
        inbox.drain(|parts: &[IoSlice<'_>]| {
            let header: &[u8; LENGTH] = parts[0].as_ref().try_into().unwrap();
            out.push((Vnet::parse(header).unwrap(), parts[1..].iter().flat_map(|p| p.to_vec()).collect()));
        });
    };
    for packet in packets {
        if !inbox.has_room(packet.len()) {
            drain(&mut inbox);
        }
        inbox.room()[..packet.len()].copy_from_slice(packet);
        inbox.push(packet.len());
    }
    drain(&mut inbox);
    assert!(inbox.is_empty());
    out
}

fn cut(vnet: Vnet, mut packet: Vec<u8>) -> Vec<Vec<u8>> {
    let mut segments = Segments::new(vnet, &mut packet).unwrap();
    std::iter::from_fn(|| segments.next().map(<[u8]>::to_vec)).collect()
}

/// Packets by flow, in order; those in `loose` apart, since what is broken belongs to no flow. Without the numbers of
/// IPv4 packets that may not be fragmented.
fn flows(packets: &[Vec<u8>], loose: &[Vec<u8>]) -> BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for packet in packets {
        if loose.contains(packet) {
            flows.entry(Vec::new()).or_default().push(packet.clone());
            continue;
        }
        let (key, mut packet) = (if packet[0] >> 4 == 4 { 12..24 } else { 8..44 }, packet.clone());
        if packet[0] == 0x45 && packet[6] == 0x40 {
            assert!(Sum::default().with(&packet[..20]).is_right());
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        flows.entry(packet[key].to_vec()).or_default().push(packet);
    }
    if let Some(loose) = flows.get_mut(&Vec::new()) {
        loose.sort();
    }
    flows
}

proptest! {
    #[test]
    fn what_is_joined_is_cut_into_what_came(all in prop::collection::vec(sent(), 0..80), tcp: bool, udp: bool) {
        let packets = traffic(&all);
        let joins = Joins { tcp, udp };
        let joined = join(&packets, joins);
        for (vnet, packet) in &joined {
            prop_assert!(packet.len() <= 65535);
            match vnet.cut {
                Some(cut) => prop_assert_eq!(true, if cut.kind == Kind::Udp { udp } else { tcp }),
                // A packet that stands alone is not touched.
                None => prop_assert_eq!(vnet.checksum, None),
            }
        }
        let again: Vec<_> = joined.into_iter().flat_map(|(vnet, packet)| cut(vnet, packet)).collect();
        let broken = all.iter().zip(&packets).filter(|(sent, _)| sent.broken.is_some());
        let broken: Vec<_> = broken.map(|(_, packet)| packet.clone()).collect();
        prop_assert_eq!(flows(&again, &broken), flows(&packets, &broken));
    }

    #[test]
    fn whatever_comes_is_handed_on(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..120), 0..40), like in 0usize..4) {
        let packets: Vec<_> = packets.into_iter().map(|mut packet| {
            // Near enough to a packet that more than its first byte is looked at.
            let length = packet.len();
            packet[0] = if like & 1 == 0 { 0x45 } else { 0x60 };
            if like < 2 && length >= 40 {
                let field = if packet[0] == 0x45 { length } else { length - 40 } as u16;
                let at = if packet[0] == 0x45 { 2 } else { 4 };
                packet[at..at + 2].copy_from_slice(&field.to_be_bytes());
                let place = if packet[0] == 0x45 { 9 } else { 6 };
                packet[place] = if length % 2 == 0 { 6 } else { 17 };
            }
            packet
        }).collect();
        let out = join(&packets, ALL);
        let all: Vec<_> = out.into_iter().flat_map(|(vnet, packet)| cut(vnet, packet)).collect();
        prop_assert_eq!(all, packets);
    }

    #[test]
    fn any_header_with_any_packet_is_cut_or_refused(header: [u8; LENGTH], small: bool, mut packet in prop::collection::vec(any::<u8>(), 0..3000)) {
        if let Ok(mut vnet) = Vnet::parse(&header) {
            if let (true, Some(checksum)) = (small, &mut vnet.checksum) {
                *checksum = Checksum { start: 20 + checksum.start % 40, offset: if checksum.offset % 2 == 0 { 6 } else { 16 } };
            }
            let length = packet.len();
            if let Ok(mut segments) = Segments::new(vnet, &mut packet) {
                let mut count = 0;
                while let Some(segment) = segments.next() {
                    prop_assert!(segment.len() <= length);
                    count += 1;
                }
                prop_assert!(count <= length.max(1));
            }
        }
    }
}

fn plain(flow: usize, payload: usize) -> Sent {
    Sent { flow, payload, flags: 0x10, skip: 0, options: false, dont_fragment: true, broken: None }
}

#[test]
fn a_full_stream_needs_few_packets_and_flows_do_not_disturb_each_other() {
    for flow in 0..6 {
        let packets = traffic(&vec![plain(flow, 1000); 128]);
        let joined = join(&packets, ALL);
        // 64 KiB or 64 packets each.
        assert!(joined.len() <= 3, "flow {flow}: {}", joined.len());
    }
    let mixed: Vec<_> = (0..100).map(|i| plain(i % 6, 1000)).collect();
    assert_eq!(join(&traffic(&mixed), ALL).len(), 6);
    assert_eq!(join(&traffic(&mixed), Joins { tcp: false, udp: false }).len(), 100);
}

#[test]
fn a_packet_with_a_wrong_checksum_is_neither_joined_nor_lost_nor_mended() {
    for flow in 0..6 {
        for broken in 0..3 {
            let mut packets = traffic(&vec![plain(flow, 1000); 3]);
            *packets[broken].last_mut().unwrap() ^= 1;
            let joined = join(&packets, ALL);
            let alone =
                joined.iter().filter(|(vnet, packet)| vnet.cut.is_none() && *packet == packets[broken]);
            assert_eq!(alone.count(), 1, "flow {flow}, packet {broken}");
        }
    }
}

#[test]
fn a_checksum_that_was_left_to_us_is_completed() {
    for flow in 0..6 {
        let packet = build(&plain(flow, 999), 1, 5);
        let (start, offset, protocol) = match flow {
            0 | 1 => (20, 16, 6),
            2 => (40, 16, 6),
            3 | 4 => (20, 6, 17),
            _ => (40, 6, 17),
        };
        let mut partial = packet.clone();
        let header = tombolo_wireguard::packet::Header::parse(&packet).unwrap();
        let pseudo = Sum::default()
            .with_pseudo(header.source, header.destination, protocol, packet.len() - start)
            .fold();
        partial[start + offset..start + offset + 2].copy_from_slice(&pseudo);
        let checksum = Some(Checksum { start: start as u16, offset: offset as u16 });
        assert_eq!(cut(Vnet { checksum, cut: None }, partial), [packet], "flow {flow}");
    }
}
