//! Cuts what a TUN with offloads hands over into the packets that it stands for.

use crate::checksum::Sum;
use crate::packet::Header;
use crate::vnet::{Checksum, Kind, Vnet};

/// The longest headers: IPv4 and TCP with all options have 120 bytes; IPv6 may have more before its payload.
const HEADERS: usize = 256;

const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Packets of one source and one destination, one after the other.
pub trait Packets {
    /// The next.
    fn next(&mut self) -> Option<&[u8]>;
}

/// One packet.
#[derive(Debug)]
pub struct Single<'p>(Option<&'p [u8]>);

impl<'p> Single<'p> {
    /// Of these bytes.
    pub fn new(packet: &'p [u8]) -> Self {
        Self(Some(packet))
    }
}

impl Packets for Single<'_> {
    fn next(&mut self) -> Option<&[u8]> {
        self.0.take()
    }
}

/// The header and what is to be done do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// The packets of one that was read from a TUN. Each is made in the buffer of the whole: its headers are written over
/// the end of the one before, which is then used up, so that no payload is moved.
#[derive(Debug)]
pub struct Segments<'b> {
    buffer: &'b mut [u8],
    /// None: as it is, once.
    cut: Option<Cut>,
    at: usize,
}

#[derive(Debug)]
struct Cut {
    /// As the headers were before the first was written over.
    template: [u8; HEADERS],
    /// Their length.
    headers: usize,
    /// Where the TCP or UDP header begins.
    inner: usize,
    size: usize,
    count: usize,
    kind: Kind,
    header: Header,
}

impl<'b> Segments<'b> {
    /// Of `packet`, by what its header says is to be done.
    pub fn new(vnet: Vnet, packet: &'b mut [u8]) -> Result<Self, Malformed> {
        let cut = match (vnet.cut, vnet.checksum) {
            (Some(cut), Some(checksum)) => Some(Cut::new(cut.kind, cut.size, checksum, packet)?),
            (Some(_), None) => return Err(Malformed),
            (None, checksum) => {
                checksum.map_or(Ok(()), |checksum| complete(checksum, packet))?;
                None
            }
        };
        Ok(Self { buffer: packet, cut, at: 0 })
    }
}

impl Packets for Segments<'_> {
    fn next(&mut self) -> Option<&[u8]> {
        let at = self.at;
        self.at += 1;
        match &self.cut {
            None => (at == 0).then_some(&*self.buffer),
            Some(cut) => (at < cut.count).then(|| cut.make(at, self.buffer))?,
        }
    }
}

/// Completes a checksum that holds the sum of its pseudo header.
fn complete(checksum: Checksum, packet: &mut [u8]) -> Result<(), Malformed> {
    let (start, offset) = (usize::from(checksum.start), usize::from(checksum.offset));
    let covered = packet.get_mut(start..).ok_or(Malformed)?;
    let mut sum = Sum::default().with(covered).finish();
    if checksum.offset == UDP_CHECKSUM && sum == [0, 0] {
        // Zero would say that there is none (RFC 768).
        sum = [0xff, 0xff];
    }
    covered.get_mut(offset..offset + 2).ok_or(Malformed)?.copy_from_slice(&sum);
    Ok(())
}

impl Cut {
    fn new(kind: Kind, size: u16, checksum: Checksum, packet: &[u8]) -> Result<Self, Malformed> {
        let inner = usize::from(checksum.start);
        let header = Header::parse(packet).map_err(|_| Malformed)?;
        let (version, least) = if header.source.is_ipv4() { (4, 20) } else { (6, 40) };
        let (length, offset) = match kind {
            Kind::Tcp4 | Kind::Tcp6 => {
                let length = usize::from(packet.get(inner + 12).ok_or(Malformed)? >> 4) * 4;
                (length.max(20), TCP_CHECKSUM)
            }
            Kind::Udp => (8, UDP_CHECKSUM),
        };
        let fits = match kind {
            Kind::Tcp4 => version == 4,
            Kind::Tcp6 => version == 6,
            Kind::Udp => true,
        };
        let headers = inner + length;
        if !fits || inner < least || checksum.offset != offset || headers > HEADERS || packet.len() < headers
        {
            return Err(Malformed);
        }
        let mut template = [0; HEADERS];
        template[..headers].copy_from_slice(&packet[..headers]);
        let size = usize::from(size);
        let count = (packet.len() - headers).div_ceil(size).max(1);
        Ok(Self { template, headers, inner, size, count, kind, header })
    }

    /// Makes packet `at`, where it is.
    fn make<'b>(&self, at: usize, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        let start = at * self.size;
        let end = buffer.len().min(start + self.headers + self.size);
        let packet = buffer.get_mut(start..end)?;
        let (headers, payload) = packet.split_at_mut_checked(self.headers)?;
        headers.copy_from_slice(&self.template[..self.headers]);
        let (outer, inner) = headers.split_at_mut_checked(self.inner)?;
        let length = inner.len() + payload.len();
        let protocol = self.fix_inner(at, length, inner);
        let (Header { source, destination, .. }, kind) = (self.header, self.kind);
        let sum = Sum::default().with_pseudo(source, destination, protocol, length).with(inner).with(payload);
        let mut sum = sum.finish();
        let place = match kind {
            Kind::Tcp4 | Kind::Tcp6 => usize::from(TCP_CHECKSUM),
            Kind::Udp => usize::from(UDP_CHECKSUM),
        };
        if kind == Kind::Udp && sum == [0, 0] {
            sum = [0xff, 0xff];
        }
        inner[place..place + 2].copy_from_slice(&sum);
        fix_outer(at, length, outer);
        Some(packet)
    }

    /// The TCP or UDP header of packet `at`, with no checksum.
    fn fix_inner(&self, at: usize, length: usize, inner: &mut [u8]) -> u8 {
        match self.kind {
            Kind::Tcp4 | Kind::Tcp6 => {
                let before = u32::from_be_bytes([inner[4], inner[5], inner[6], inner[7]]);
                let sequence = before.wrapping_add((at * self.size) as u32);
                inner[4..8].copy_from_slice(&sequence.to_be_bytes());
                if at > 0 {
                    inner[13] &= !CWR;
                }
                if at + 1 < self.count {
                    inner[13] &= !FIN_PSH;
                }
                inner[16..18].fill(0);
                TCP
            }
            Kind::Udp => {
                inner[4..6].copy_from_slice(&(length as u16).to_be_bytes());
                inner[6..8].fill(0);
                UDP
            }
        }
    }
}

/// The IP header of packet `at`.
fn fix_outer(at: usize, length: usize, outer: &mut [u8]) {
    if outer[0] >> 4 == 4 {
        let total = (outer.len() + length) as u16;
        outer[2..4].copy_from_slice(&total.to_be_bytes());
        let id = u16::from_be_bytes([outer[4], outer[5]]).wrapping_add(at as u16);
        outer[4..6].copy_from_slice(&id.to_be_bytes());
        outer[10..12].fill(0);
        let sum = Sum::default().with(outer).finish();
        outer[10..12].copy_from_slice(&sum);
    } else {
        let length = (outer.len() - 40 + length) as u16;
        outer[4..6].copy_from_slice(&length.to_be_bytes());
    }
}
