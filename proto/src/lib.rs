//! Tombolo's words and messages.
//!
//! - [`model`]: what things are, as types that can only be built valid.
//! - [`trust`]: signed documents, and who may say what (`docs/protocol.md`).
//! - [`wire`]: conversions between bytes and the two above; the only place that sees generated types.
//! - [`pb`]: the generated types, for [`wire`] and for the shells that move messages.
#![forbid(unsafe_code)]

#[cfg(feature = "grpc")]
pub mod codec;
pub mod model;
#[cfg(feature = "testing")]
pub mod testing;
pub mod trust;
pub mod wire;

/// Types generated from `proto/tombolo/v1/*.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/tombolo.v1.rs"));
}
