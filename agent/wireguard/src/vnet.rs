//! The header before each packet of a TUN with offloads (`struct virtio_net_hdr`, virtio 1.2, 5.1.6): what of a checksum
//! or of cutting is left to the reader.

/// Its length.
pub const LENGTH: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
/// Set beside a kind: the first packet says that the window was reduced.
const ECN: u8 = 0x80;

/// What is left to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Vnet {
    /// The checksum to complete.
    pub checksum: Option<Checksum>,
    /// It is several packets in one, to be cut.
    pub cut: Option<Cut>,
}

/// A checksum that holds only the sum of its pseudo header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// Where what it covers begins.
    pub start: u16,
    /// Where the checksum is, from there.
    pub offset: u16,
}

/// How a packet is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// What it carries.
    pub kind: Kind,
    /// The length of its headers. Advice only.
    pub headers: u16,
    /// The payload of each packet but the last.
    pub size: u16,
}

/// What can be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// What the header cannot mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl Vnet {
    /// Reads one.
    pub fn parse(header: &[u8; LENGTH]) -> Result<Self, Malformed> {
        let number = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let kind = match header[1] & !ECN {
            0 => None,
            1 => Some(Kind::Tcp4),
            4 => Some(Kind::Tcp6),
            5 => Some(Kind::Udp),
            _ => return Err(Malformed),
        };
        let cut = kind.map(|kind| Cut { kind, headers: number(2), size: number(4) });
        if cut.is_some_and(|cut| cut.size == 0) {
            return Err(Malformed);
        }
        let checksum =
            (header[0] & NEEDS_CHECKSUM != 0).then(|| Checksum { start: number(6), offset: number(8) });
        // Who cuts needs to know where the inner header is.
        if cut.is_some() && checksum.is_none() { Err(Malformed) } else { Ok(Self { checksum, cut }) }
    }

    /// Writes it.
    pub fn bytes(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let mut put = |at: usize, number: u16| bytes[at..at + 2].copy_from_slice(&number.to_ne_bytes());
        if let Some(cut) = self.cut {
            put(2, cut.headers);
            put(4, cut.size);
        }
        if let Some(checksum) = self.checksum {
            put(6, checksum.start);
            put(8, checksum.offset);
        }
        bytes[0] = self.checksum.map_or(0, |_| NEEDS_CHECKSUM);
        bytes[1] = match self.cut.map(|cut| cut.kind) {
            None => 0,
            Some(Kind::Tcp4) => 1,
            Some(Kind::Tcp6) => 4,
            Some(Kind::Udp) => 5,
        };
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_read_is_written_the_same(bytes: [u8; LENGTH]) {
            if let Ok(vnet) = Vnet::parse(&bytes) {
                prop_assert_eq!(Vnet::parse(&vnet.bytes()), Ok(vnet));
            }
        }
    }
}
