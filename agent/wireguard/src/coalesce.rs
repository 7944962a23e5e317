//! Joins packets of one flow into few that a TUN with offloads takes at once.
//!
//! The rules are those of the kernel's receive offload: nothing is joined that could not be cut again into what came
//! ([`crate::segment`]), but for the numbers of IPv4 packets that may not be fragmented, which mean nothing (RFC 6864).
//! A packet is joined only if its checksums are right: a wrong one stays as it is, for the host to refuse. Packets of
//! one flow keep their order.

use std::io::IoSlice;

use crate::checksum::Sum;
use crate::packet::Header;
use crate::vnet::{Checksum, Cut, Kind, Vnet};

/// Packets in one at most: what the kernel takes of UDP, and more than 64 KiB of full TCP packets.
pub const MOST: usize = 64;

/// The longest that an IP header can describe.
const LONGEST: usize = 65535;

/// Packets in the box at most.
const PIECES: usize = 512;

/// How many of the newest joined packets are looked through for a packet's flow.
const WINDOW: usize = 32;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const DONT_FRAGMENT: u8 = 0x40;

/// What is joined. Changed where the host takes less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joins {
    /// TCP of both families.
    pub tcp: bool,
    /// UDP of both families.
    pub udp: bool,
}

/// A box for packets to the host, which are made in it, and leave it joined.
#[derive(Debug)]
pub struct Inbox {
    buffer: Box<[u8]>,
    used: usize,
    pieces: Vec<Piece>,
    items: Vec<Item>,
    joins: Joins,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    start: usize,
    end: usize,
    /// The piece that follows in the same item.
    next: Option<usize>,
}

/// One or more packets that leave as one.
#[derive(Debug, Clone, Copy)]
struct Item {
    head: usize,
    tail: usize,
    count: usize,
    /// What of the head's headers is needed, if it belongs to a flow.
    shape: Option<Shape>,
    /// Whether more can be joined.
    open: bool,
    /// Whether the head's checksums were looked at; a wrong one closes the item.
    checked: bool,
    /// The length of all in one.
    length: usize,
    /// The TCP sequence number that comes next.
    sequence: u32,
    push: bool,
}

/// Where things are in a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    kind: Kind,
    header: Header,
    /// Where the TCP or UDP header begins.
    inner: usize,
    /// The length of all headers.
    headers: usize,
    ports: [u8; 4],
}

impl Inbox {
    /// A box of which at least `room` bytes are free when it is empty.
    pub fn new(room: usize, joins: Joins) -> Self {
        Self {
            buffer: vec![0; room].into_boxed_slice(),
            used: 0,
            pieces: Vec::with_capacity(PIECES),
            items: Vec::with_capacity(PIECES),
            joins,
        }
    }

    /// What is joined from now on.
    pub fn set_joins(&mut self, joins: Joins) {
        self.joins = joins;
    }

    /// What is joined.
    pub fn joins(&self) -> Joins {
        self.joins
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether a packet of so many bytes can be made in it.
    pub fn has_room(&self, length: usize) -> bool {
        self.buffer.len() - self.used >= length && self.pieces.len() < PIECES
    }

    /// Where the next packet is made.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[self.used..]
    }

    /// Takes what was made in the room: the first so many bytes of it, one whole IP packet.
    pub fn push(&mut self, length: usize) {
        let (start, end) = (self.used, (self.used + length).min(self.buffer.len()));
        if start == end || self.pieces.len() == PIECES {
            return;
        }
        self.used = end;
        let at = self.pieces.len();
        self.pieces.push(Piece { start, end, next: None });
        let shape = Shape::of(&self.buffer[start..end]).filter(|shape| self.joins.allow(shape.kind));
        let joined = shape.is_some_and(|shape| self.join(at, &shape));
        if !joined {
            self.items.push(Item::new(at, shape, &self.buffer[start..end]));
        }
    }

    /// Appends a packet to its flow's newest item, if that is possible.
    fn join(&mut self, at: usize, shape: &Shape) -> bool {
        let mut newest = self.items.iter_mut().rev().take(WINDOW);
        let Some(item) = newest.find(|item| item.shape.is_some_and(|s| s.is_same_flow(shape))) else {
            return false;
        };
        let of = |piece: &Piece| &self.buffer[piece.start..piece.end];
        let (head, packet) = (of(&self.pieces[item.head]), of(&self.pieces[at]));
        if !item.open || !item.fits(shape, head, packet) || !shape.is_intact(packet) {
            return false;
        }
        if !item.checked {
            item.checked = true;
            item.open = shape.is_intact(head);
            if !item.open {
                return false;
            }
        }
        let (size, payload) = (head.len() - shape.headers, packet.len() - shape.headers);
        let push = shape.flags(packet) & PSH != 0;
        self.pieces[item.tail].next = Some(at);
        item.tail = at;
        item.count += 1;
        item.length += payload;
        item.sequence = item.sequence.wrapping_add(payload as u32);
        item.push = push;
        item.open = payload == size && !push && item.count < MOST;
        true
    }

    /// Hands out all, in order, and is empty then. Each comes as a [`Vnet`] header and the parts of its packet.
    pub fn drain(&mut self, mut write: impl FnMut(&[IoSlice<'_>])) {
        for item in &self.items {
            let head = self.pieces[item.head];
            let vnet = match item.shape.filter(|_| item.count > 1) {
                Some(shape) => item.finish(&shape, &mut self.buffer[head.start..head.end]),
                None => Vnet::default(),
            }
            .bytes();
            let mut parts = [IoSlice::new(&[]); MOST + 1];
            parts[0] = IoSlice::new(&vnet);
            let headers = item.shape.map_or(0, |shape| shape.headers);
            let (mut next, mut skip, mut count) = (Some(item.head), 0, 1);
            while let Some(at) = next.filter(|_| count < parts.len()) {
                let piece = self.pieces[at];
                parts[count] = IoSlice::new(&self.buffer[piece.start + skip..piece.end]);
                (next, skip, count) = (piece.next, headers, count + 1);
            }
            write(&parts[..count]);
        }
        self.items.clear();
        self.pieces.clear();
        self.used = 0;
    }
}

impl Joins {
    fn allow(self, kind: Kind) -> bool {
        match kind {
            Kind::Tcp4 | Kind::Tcp6 => self.tcp,
            Kind::Udp => self.udp,
        }
    }
}

impl Item {
    fn new(at: usize, shape: Option<Shape>, packet: &[u8]) -> Self {
        let (mut open, mut sequence) = (false, 0);
        if let Some(shape) = &shape {
            let payload = packet.len() - shape.headers;
            open = payload > 0 && shape.may_begin(packet);
            sequence = shape.sequence(packet).wrapping_add(payload as u32);
        }
        let (head, tail, count, length) = (at, at, 1, packet.len());
        Self { head, tail, count, shape, open, checked: false, length, sequence, push: false }
    }

    /// Whether a packet of its flow continues it.
    fn fits(&self, shape: &Shape, head: &[u8], packet: &[u8]) -> bool {
        let Some(own) = &self.shape else { return false };
        let (size, payload) = (head.len() - own.headers, packet.len().saturating_sub(shape.headers));
        let same = |range: std::ops::Range<usize>| head.get(range.clone()) == packet.get(range);
        let outer = if own.header.source.is_ipv4() {
            let id = |packet: &[u8]| u16::from_be_bytes([packet[4], packet[5]]);
            let next = id(head).wrapping_add(self.count as u16);
            same(0..2) && same(6..10) && (packet[6] & DONT_FRAGMENT != 0 || id(packet) == next)
        } else {
            same(0..4) && same(6..8)
        };
        let inner = match own.kind {
            Kind::Udp => true,
            Kind::Tcp4 | Kind::Tcp6 => {
                let at = own.inner;
                shape.sequence(packet) == self.sequence
                    && same(at + 8..at + 13)
                    && shape.flags(packet) | PSH == ACK | PSH
                    && same(at + 14..at + 16)
                    && same(at + 18..own.headers)
            }
        };
        own.headers == shape.headers
            && outer
            && inner
            && payload > 0
            && payload <= size
            && self.length + payload <= LONGEST
            && (own.kind != Kind::Udp || shape.has_checksum(packet))
    }

    /// Makes the head's headers those of the whole.
    fn finish(&self, shape: &Shape, head: &mut [u8]) -> Vnet {
        let size = (head.len() - shape.headers) as u16;
        let inner = self.length - shape.inner;
        if shape.header.source.is_ipv4() {
            head[2..4].copy_from_slice(&(self.length as u16).to_be_bytes());
            head[10..12].fill(0);
            let sum = Sum::default().with(&head[..shape.inner]).finish();
            head[10..12].copy_from_slice(&sum);
        } else {
            head[4..6].copy_from_slice(&(inner as u16).to_be_bytes());
        }
        let (protocol, offset) = match shape.kind {
            Kind::Udp => {
                head[shape.inner + 4..shape.inner + 6].copy_from_slice(&(inner as u16).to_be_bytes());
                (UDP, 6)
            }
            Kind::Tcp4 | Kind::Tcp6 => {
                head[shape.inner + 13] |= if self.push { PSH } else { 0 };
                (TCP, 16)
            }
        };
        let Header { source, destination, .. } = shape.header;
        let sum = Sum::default().with_pseudo(source, destination, protocol, inner).fold();
        head[shape.inner + offset..shape.inner + offset + 2].copy_from_slice(&sum);
        Vnet {
            checksum: Some(Checksum { start: shape.inner as u16, offset: offset as u16 }),
            cut: Some(Cut { kind: shape.kind, headers: shape.headers as u16, size }),
        }
    }
}

impl Shape {
    /// Of a TCP or UDP packet without IP options, whole, with nothing behind it.
    fn of(packet: &[u8]) -> Option<Self> {
        let header = Header::parse(packet).ok().filter(|header| header.length == packet.len())?;
        let (inner, protocol) = if header.source.is_ipv4() {
            let whole = packet[0] == 0x45 && packet[6] & !DONT_FRAGMENT == 0 && packet[7] == 0;
            (20, whole.then_some(packet[9])?)
        } else {
            (40, packet[6])
        };
        let (kind, length) = match (protocol, inner) {
            (TCP, _) => {
                let length = usize::from(packet.get(inner + 12)? >> 4) * 4;
                (if inner == 20 { Kind::Tcp4 } else { Kind::Tcp6 }, (length >= 20).then_some(length)?)
            }
            (UDP, _) => {
                let length = packet.get(inner + 4..inner + 6)?;
                let whole = usize::from(u16::from_be_bytes([length[0], length[1]])) == packet.len() - inner;
                (Kind::Udp, whole.then_some(8)?)
            }
            _ => return None,
        };
        let headers = inner + length;
        let ports = *packet.get(inner..headers)?.first_chunk()?;
        Some(Self { kind, header, inner, headers, ports })
    }

    fn is_same_flow(&self, other: &Self) -> bool {
        self.ports == other.ports
            && self.kind == other.kind
            && self.header.source == other.header.source
            && self.header.destination == other.header.destination
    }

    /// The flags of TCP; none of UDP.
    fn flags(&self, packet: &[u8]) -> u8 {
        if self.kind == Kind::Udp { 0 } else { packet[self.inner + 13] }
    }

    fn sequence(&self, packet: &[u8]) -> u32 {
        if self.kind == Kind::Udp {
            return 0;
        }
        packet[self.inner + 4..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    /// Whether there is a checksum: UDP over IPv4 may have none.
    fn has_checksum(&self, packet: &[u8]) -> bool {
        self.kind != Kind::Udp || packet[self.inner + 6..self.inner + 8] != [0, 0]
    }

    /// Whether others can be joined to it.
    fn may_begin(&self, packet: &[u8]) -> bool {
        self.has_checksum(packet) && (self.kind == Kind::Udp || self.flags(packet) == ACK)
    }

    /// Whether all its checksums are right.
    fn is_intact(&self, packet: &[u8]) -> bool {
        let Header { source, destination, .. } = self.header;
        let inner = &packet[self.inner..];
        let protocol = if self.kind == Kind::Udp { UDP } else { TCP };
        let outer = source.is_ipv6() || Sum::default().with(&packet[..self.inner]).is_right();
        let sum = Sum::default().with_pseudo(source, destination, protocol, inner.len()).with(inner);
        outer && sum.is_right()
    }
}
