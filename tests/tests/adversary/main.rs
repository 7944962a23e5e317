//! Adversaries, kept for ever: whatever a member or a broker says, nothing outside of the grants comes to be in an
//! honest cluster, each refusal is told, and the honest go on as before.
//!
//! In August and September 2026 four CVEs of Submariner (2026-66785 to -66788) had one root: what a member says is
//! believed. The tests that answer them bear their numbers.

#![allow(unreachable_pub, missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod brokers;
mod evil;
mod flood;
mod forged;
mod honest;
mod hostile;
mod mallory;
mod raw;
mod silent;
