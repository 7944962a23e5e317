//! Clusters of every shape: one node or many gateways, behind a NAT, coming and going, meshed.

#![allow(unreachable_pub, missing_docs, clippy::unwrap_used, clippy::print_stderr)]

mod churn;
mod common;
mod lanes;
mod live;
mod mesh;
mod nat;
mod small;
