//! The agent: observes, plans, applies. What it decides is in `tombolo-agent-core`.

pub mod admin;
pub mod api;
pub mod app;
pub mod apply;
pub mod config;
pub mod control;
pub mod dns;
pub mod hold;
pub mod metrics;
pub mod observe;
pub mod tell;
