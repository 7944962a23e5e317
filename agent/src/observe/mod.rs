//! Observation: the outside, parsed and verified.

pub mod hello;
pub mod liveness;
pub mod member;
pub mod netlink;
pub mod origin;
