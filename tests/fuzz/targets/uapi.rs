//! Requests to the WireGuard device, and the state that a restarted worker reads.
#![no_main]

use tombolo_wireguard::uapi::{parse_request, parse_state};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = parse_request(text);
    let _ = parse_state(text);
});
