//! The meeting point: takes members' signed statements over gRPC and passes every change on. It can delay; it
//! cannot forge, since everybody verifies.
//!
//! [`Broker::start`] runs one; the program `tombolo-broker` is a command line around it. [`Hooks`] let a test
//! make a broker that lies.
#![forbid(unsafe_code)]

mod admin;
mod broker;
pub mod config;
mod metrics;
mod persist;
mod service;
mod session;
mod shared;
pub mod store;

pub use broker::{Broker, StartError};
pub use config::Config;
pub use shared::{Hooks, Outbound};
