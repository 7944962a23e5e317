//! What anybody may send to a device's UDP port, and what a peer may send through its tunnel.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use tombolo_wireguard::key::PrivateKey;
use tombolo_wireguard::noise::{COOKIE, Identity, data_run};
use tombolo_wireguard::packet::Header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some(key) = PrivateKey::new([7; 32]) {
        let identity = Identity::new(key);
        let _ = identity.read(bytes);
        let _ = identity.prove(IpAddr::V4(Ipv4Addr::LOCALHOST), bytes, &mut [0; COOKIE]);
        let _ = identity.caller(bytes);
    }
    for size in [0, 32, 1452] {
        if let Some((_, length)) = data_run(bytes, size) {
            assert!(length > 0 && length <= bytes.len());
        }
    }
    if let Ok(header) = Header::parse(bytes) {
        assert!(header.length <= bytes.len());
    }
});
