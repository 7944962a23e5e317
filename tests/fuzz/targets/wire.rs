//! Signed documents, records and messages of the session, each by its own reader.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tombolo_proto::testing::readers::check(bytes));
