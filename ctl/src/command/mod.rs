//! One file a command.

mod admin;
mod broker;
mod check;
mod explain;
mod export;
mod join;
mod leave;
mod membership;
mod resolve;
mod rotate;
mod status;

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::CommandFactory as _;

use crate::cli::{Cli, Command};
use crate::output::Printer;

/// Runs a command; its exit code.
pub(crate) fn run(cli: Cli) -> Result<ExitCode> {
    let printer = Printer { format: cli.output, color: cli.color, headers: !cli.no_headers };
    match cli.command {
        Command::Init(args) => membership::init(&printer, args)?,
        Command::Invite(args) => membership::invite(&printer, args)?,
        Command::Admit(args) => membership::admit(&printer, args)?,
        Command::Revoke(args) => membership::revoke(&printer, &args)?,
        Command::Members(args) => membership::members(&printer, &args)?,
        Command::Join(args) => join::join(&printer, &args)?,
        Command::Key(args) => join::key(&printer, &args)?,
        Command::Leave(args) => leave::leave(&printer, &args)?,
        Command::Rotate(args) => rotate::rotate(&printer, &args)?,
        Command::Export(args) => export::export(&printer, &args)?,
        Command::Unexport(args) => export::unexport(&printer, &args)?,
        Command::Status(args) => status::status(&printer, &args)?,
        Command::Check(args) => return check::check(&printer, &args),
        Command::Resolve(args) => return resolve::resolve(&printer, &args),
        Command::Explain(args) => return explain::explain(&printer, &args),
        Command::Completion(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "tombolo", &mut script);
            printer.text(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Unix seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Progress and remarks go to standard error.
fn say(text: impl std::fmt::Display) {
    anstream::eprintln!("{text}");
}
