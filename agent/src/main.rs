//! `tombolo-agent`: joins a node to the clusterset.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use tombolo_agent::app;
use tombolo_agent::config::Config;

fn main() -> ExitCode {
    match app::run(Config::parse()) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
