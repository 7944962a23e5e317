//! What an agent decides: a world goes in, what should be comes out. No I/O, no clock, no randomness.
//!
//! Two pairs: a node's ([`world::NodeWorld`] to [`desired::NodeDesired`]) and the controller's
//! ([`world::ClusterWorld`] to [`desired::ClusterDesired`]).
#![forbid(unsafe_code)]

pub mod bucket;
pub mod desired;
pub mod diff;
pub mod finding;
pub mod hello;
pub mod keep;
pub mod known;
pub mod lease;
pub mod liveness;
pub mod merge;
pub mod object;
pub mod outside;
pub mod path_mtu;
pub mod plan;
pub mod shelf;
pub mod speak;
pub mod standing;
pub mod steady;
pub mod world;
pub mod zone;
