//! What a TUN with offloads may hand over, and what peers may send to be joined: nothing is lost, and what is joined
//! is cut into as much as came.
#![no_main]

use tombolo_wireguard::checksum::Sum;
use tombolo_wireguard::coalesce::{Inbox, Joins};
use tombolo_wireguard::segment::{Packets, Segments};
use tombolo_wireguard::vnet::{LENGTH, Vnet};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((header, packet)) = bytes.split_first_chunk::<LENGTH>()
        && let Ok(vnet) = Vnet::parse(header)
    {
        cut(vnet, packet);
    }
    // Each packet has its length before it, in one byte; headers and sums are made right, so that they are joined.
    let mut inbox = Inbox::new(1 << 17, Joins { tcp: true, udp: true });
    let (mut rest, mut came, mut packets) = (bytes, 0, 0);
    while let Some((length, after)) = rest.split_first() {
        let (packet, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        let packet = mend(packet);
        if packet.is_empty() || !inbox.has_room(packet.len()) {
            break;
        }
        inbox.room()[..packet.len()].copy_from_slice(&packet);
        inbox.push(packet.len());
        (came, packets) = (came + packet.len(), packets + 1);
    }
    let (mut left, mut cuts) = (0, 0);
    inbox.drain(|parts| {
        let header = parts[0].first_chunk().expect("a header");
        let whole: Vec<u8> = parts[1..].iter().flat_map(|part| part.to_vec()).collect();
        let (count, length) = cut(Vnet::parse(header).expect("one of ours"), &whole).expect("one of ours");
        (left, cuts) = (left + length, cuts + count);
    });
    assert_eq!((left, cuts), (came, packets));
});

/// How many packets it is, and how long they are in all.
fn cut(vnet: Vnet, packet: &[u8]) -> Option<(usize, usize)> {
    let mut packet = packet.to_vec();
    let whole = packet.len();
    let mut segments = Segments::new(vnet, &mut packet).ok()?;
    let (mut count, mut length) = (0, 0);
    while let Some(segment) = segments.next() {
        assert!(segment.len() <= whole);
        (count, length) = (count + 1, length + segment.len());
    }
    Some((count, length))
}

fn mend(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let length = packet.len();
    if length < 48 {
        return packet;
    }
    let inner = if packet[0] & 1 == 0 { 20 } else { 40 };
    let tcp = packet[1] & 1 == 0 && length >= inner + 20;
    let (protocol, place) = if tcp { (6, 16) } else { (17, 6) };
    if inner == 20 {
        packet[..4].copy_from_slice(&[0x45, 0, 0, length as u8]);
        packet[6..12].copy_from_slice(&[0x40, 0, 64, protocol, 0, 0]);
        let sum = Sum::default().with(&packet[..20]).finish();
        packet[10..12].copy_from_slice(&sum);
    } else {
        packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, (length - 40) as u8, protocol, 64]);
    }
    if tcp {
        packet[inner + 12] = 0x50;
        packet[inner + 13] = 0x10;
    } else {
        packet[inner + 4..inner + 6].copy_from_slice(&[0, (length - inner) as u8]);
    }
    packet[inner + place..inner + place + 2].fill(0);
    let Ok(header) = tombolo_wireguard::packet::Header::parse(&packet) else { return packet };
    let sum = Sum::default().with_pseudo(header.source, header.destination, protocol, length - inner);
    let sum = sum.with(&packet[inner..]).finish();
    packet[inner + place..inner + place + 2].copy_from_slice(&sum);
    packet
}
