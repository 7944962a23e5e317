//! The internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum in progress, in the order of the bytes of this machine; the parts of what it covers have an even number of
/// bytes each, but for the last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[must_use]
    pub fn with(self, bytes: &[u8]) -> Self {
        Self(self.0 + sum(bytes))
    }

    /// Adds a number of 16 bits, given as this machine has it.
    #[must_use]
    pub fn with_u16(self, number: u16) -> Self {
        Self(self.0 + u64::from(number.to_be()))
    }

    /// Adds what a TCP or UDP checksum covers beside its own packet: addresses, protocol and length.
    #[must_use]
    pub fn with_pseudo(self, source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let addresses = |sum: Self, address: IpAddr| match address {
            IpAddr::V4(a) => sum.with(&a.octets()),
            IpAddr::V6(a) => sum.with(&a.octets()),
        };
        // A length of more than 16 bits counts as two numbers, which is the same sum.
        let (high, low) = ((length >> 16) as u16, length as u16);
        addresses(addresses(self, source), destination).with_u16(protocol.into()).with_u16(high).with_u16(low)
    }

    /// The sum in 16 bits, in network order.
    pub fn fold(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// What is written into a packet, in network order.
    pub fn finish(self) -> [u8; 2] {
        self.fold().map(|byte| !byte)
    }

    /// Whether a packet with its checksum in it, all added up, is what was sent.
    pub fn is_right(self) -> bool {
        self.fold() == [0xff, 0xff]
    }
}

fn sum(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= 128 && std::arch::is_x86_feature_detected!("avx2") {
        #[expect(unsafe_code, reason = "the same code, compiled for wider vectors")]
        // SAFETY: the processor has the feature; nothing else is asked of the caller.
        let sum = unsafe { wide_sum(bytes) };
        return sum;
    }
    plain_sum(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn wide_sum(bytes: &[u8]) -> u64 {
    plain_sum(bytes)
}

/// Written so that the compiler adds in vectors. Numbers of 32 bits have the same sum as their halves.
#[inline(always)]
fn plain_sum(bytes: &[u8]) -> u64 {
    let (blocks, rest) = bytes.as_chunks::<64>();
    let mut lanes = [0u64; 16];
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, rest) = rest.as_chunks::<2>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum();
    if let [last] = rest {
        sum += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    // 64 KiB fill 2^14 words of 32 bits: far from overflow, however many parts are added.
    let lanes: u64 = lanes.iter().map(|lane| (lane & 0xffff_ffff) + (lane >> 32)).sum();
    sum + lanes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_the_book(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_be_bytes()
    }

    proptest! {
        #[test]
        fn it_is_the_sum_of_the_book(bytes in prop::collection::vec(any::<u8>(), 0..3000), at in 0usize..3000) {
            let whole = Sum::default().with(&bytes);
            // 0 and 0xffff are the same number, and only nothing but zeros gives 0.
            prop_assert_eq!(whole.fold(), by_the_book(&bytes));
            let at = at.min(bytes.len()) & !1;
            prop_assert_eq!(Sum::default().with(&bytes[..at]).with(&bytes[at..]).fold(), whole.fold());
        }

        #[test]
        fn what_was_finished_is_right_and_a_changed_bit_is_not(mut bytes in prop::collection::vec(any::<u8>(), 2..300), bit in any::<prop::sample::Index>()) {
            bytes[..2].fill(0);
            let sum = Sum::default().with(&bytes).finish();
            bytes[..2].copy_from_slice(&sum);
            prop_assert!(Sum::default().with(&bytes).is_right());
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!Sum::default().with(&bytes).is_right());
        }
    }

    #[test]
    fn full_buffers_of_ones_do_not_overflow() {
        let sum = (0..1000).fold(Sum::default(), |sum, _| sum.with(&[0xff; 65536]));
        assert!(sum.is_right());
    }
}
