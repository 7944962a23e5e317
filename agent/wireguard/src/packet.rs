//! The little of an IP header that a tunnel must know.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Source, destination and true length of an inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Who it says sent it.
    pub source: IpAddr,
    /// Whom it is for.
    pub destination: IpAddr,
    /// Its length by its own header; what follows in the buffer is padding.
    pub length: usize,
}

/// Why bytes are no IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// The first four bits say neither 4 nor 6.
    Version,
    /// Shorter than its header, or than its header says.
    Short,
}

impl Header {
    /// Reads the header of an IPv4 or IPv6 packet (RFC 791, RFC 8200).
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => {
                let header: &[u8; 20] = packet.first_chunk().ok_or(Malformed::Short)?;
                let header_length = usize::from(header[0] & 0x0f) * 4;
                let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
                if header_length < header.len() || length < header_length || length > packet.len() {
                    return Err(Malformed::Short);
                }
                let address =
                    |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
                Ok(Self { source: address(12).into(), destination: address(16).into(), length })
            }
            Some(6) => {
                let header: &[u8; 40] = packet.first_chunk().ok_or(Malformed::Short)?;
                let length = header.len() + usize::from(u16::from_be_bytes([header[4], header[5]]));
                if length > packet.len() {
                    return Err(Malformed::Short);
                }
                let address = |at: usize| {
                    let mut bytes = [0u8; 16];
                    bytes.copy_from_slice(&header[at..at + 16]);
                    Ipv6Addr::from(bytes)
                };
                Ok(Self { source: address(8).into(), destination: address(24).into(), length })
            }
            Some(_) => Err(Malformed::Version),
            None => Err(Malformed::Short),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A packet with nothing but addresses and a payload.
    pub(crate) fn build(source: IpAddr, destination: IpAddr, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        match (source, destination) {
            (IpAddr::V4(s), IpAddr::V4(d)) => {
                packet.extend([0x45, 0]);
                packet.extend((20 + payload.len() as u16).to_be_bytes());
                packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
                packet.extend(s.octets());
                packet.extend(d.octets());
            }
            (IpAddr::V6(s), IpAddr::V6(d)) => {
                packet.extend([0x60, 0, 0, 0]);
                packet.extend((payload.len() as u16).to_be_bytes());
                packet.extend([17, 64]);
                packet.extend(s.octets());
                packet.extend(d.octets());
            }
            _ => panic!("one family"),
        }
        packet.extend(payload);
        packet
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.length <= bytes.len() && header.length >= 20);
                prop_assert_eq!(header.source.is_ipv4(), bytes[0] >> 4 == 4);
            }
        }

        #[test]
        fn what_is_built_is_read(s in any::<[u8; 16]>(), d in any::<[u8; 16]>(), v4: bool, payload in prop::collection::vec(any::<u8>(), 0..64), pad in 0usize..16) {
            let address = |b: [u8; 16]| -> IpAddr { if v4 { [b[0], b[1], b[2], b[3]].into() } else { b.into() } };
            let mut packet = build(address(s), address(d), &payload);
            let length = packet.len();
            packet.resize(length + pad, 0);
            prop_assert_eq!(Header::parse(&packet), Ok(Header { source: address(s), destination: address(d), length }));
            prop_assert!(Header::parse(&packet[..length - 1]).is_err());
        }
    }

    #[test]
    fn a_lying_header_is_refused() {
        let mut packet = build([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), b"x");
        packet[0] = 0x44;
        assert_eq!(Header::parse(&packet), Err(Malformed::Short));
        packet[0] = 0x55;
        assert_eq!(Header::parse(&packet), Err(Malformed::Version));
        packet[0] = 0x45;
        packet[3] = 19;
        assert_eq!(Header::parse(&packet), Err(Malformed::Short));
        assert_eq!(Header::parse(&[]), Err(Malformed::Short));
    }
}
