//! Observation: the outside, parsed and verified.

pub mod member;
pub mod netlink;
pub mod origin;
