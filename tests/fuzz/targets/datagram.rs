//! What anybody may send to a device's UDP port, and what a peer may send through its tunnel.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use tombolo_wireguard::key::PrivateKey;
use tombolo_wireguard::noise::Identity;
use tombolo_wireguard::packet::Header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some(key) = PrivateKey::new([7; 32]) {
        let _ = Identity::new(key).read(bytes);
    }
    if let Ok(header) = Header::parse(bytes) {
        assert!(header.length <= bytes.len());
    }
});
