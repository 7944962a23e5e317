//! The lab: clusters, nodes, gateways and pods as namespaces of one Linux machine, with the real programs inside and
//! faults on demand. For trying, for the project's end-to-end tests, and for drills.
//!
//! A test is one function that hands its story to [`scenario()`]; inside, [`Lab::build`] makes the world of a
//! [`Topology`], and dropping everything (or SIGKILL) leaves nothing behind.
#![deny(unsafe_code)]

pub mod bench;
#[allow(unsafe_code)]
pub mod capture;
mod change;
#[allow(unsafe_code)]
pub mod control;
pub mod count;
pub mod demo;
pub mod directory;
pub mod fault;
pub mod fetch;
pub mod foreign;
pub mod hello;
pub mod kubernetes;
mod lab;
pub mod machine;
pub mod measure;
mod member;
#[allow(unsafe_code)]
pub mod place;
mod pod;
pub mod probe;
pub mod program;
#[allow(unsafe_code)]
pub mod sandbox;
mod scenario;
pub mod scorecard;
pub mod serve;
pub mod topology;

pub use lab::{Lab, Running, host, wait_until};
pub use pod::Flow;
pub use scenario::{scenario, scenario_alone, scenario_kubernetes};
pub use scorecard::{event, measured, runs, strict};
pub use topology::Topology;
