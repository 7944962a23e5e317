//! A hash that is the same in every build and on every machine: what it places must not move.

/// FNV-1a, 64 bits, with a last mix so that its high bits are as good as its low ones. Parts are told apart by their
/// lengths. Not for secrets: a cluster that finds collisions harms only the spread of its own backends.
pub(crate) fn stable(parts: &[&[u8]]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut take = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    for part in parts {
        part.len().to_be_bytes().into_iter().for_each(&mut take);
        part.iter().copied().for_each(&mut take);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// An address as bytes to hash.
pub(crate) fn octets(address: std::net::IpAddr) -> [u8; 16] {
    match address {
        std::net::IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(a) => a.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_changes() {
        // Shards and ClusterSetIPs hang on these values: another value moves them in every cluster at once.
        assert_eq!(stable(&[]), 0xefd0_1f60_ba99_2926);
        assert_ne!(stable(&[b"a", b"b"]), stable(&[b"ab"]));
        assert_ne!(stable(&[b"a", b""]), stable(&[b"", b"a"]));
    }
}
