//! What nodes tell each other over their tunnels.
#![no_main]

use tombolo_agent_core::hello::Hello;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(hello) = Hello::decode(bytes) {
        // One datagram need not hold all of a hello; what it holds is read back.
        assert!(Hello::decode(&hello.encode(0)).is_ok());
    }
});
