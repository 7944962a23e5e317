//! A whole session with a replica: each message after its length in two bytes. What is not signed is never held.
#![no_main]

#[path = "../../../proto/replica/tests/common/mod.rs"]
mod common;

use common::{Link, Member, held, record, scope};
use tombolo_replica::{Interest, Introduction, Replica};

include!("../oslo.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut replica = Replica::new(common::roots(), Interest::All);
    let mut link = Link::new(Introduction::default(), Introduction::default());
    let mut rest = bytes;
    while let Some((length, tail)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(tail.len());
        let (message, tail) = tail.split_at(length);
        rest = tail;
        if link.handle(0, &mut replica, message).is_err() {
            break;
        }
        for _ in 0..8 {
            if link.sessions[0].poll_transmit(&replica).is_none() {
                break;
            }
        }
    }
    // Whatever came, of the one who can sign only what was said is held.
    let member = oslo();
    if let Some((position, records)) = held(&replica, &member.id()) {
        assert!(
            member
                .said
                .get(&position)
                .is_some_and(|said| { records.iter().all(|(scope, held)| said.get(scope) == Some(held)) })
        );
    }
});
