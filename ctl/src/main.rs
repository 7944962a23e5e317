//! `tombolo`: the operator's command.
#![forbid(unsafe_code)]

mod cli;
mod command;
mod output;
mod set;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // The arrow of `explain A -> B`, in quotes, is no option.
    let words = std::env::args_os().map(|word| if word == "->" { "to".into() } else { word });
    let cli = cli::Cli::parse_from(words);
    match command::run(cli) {
        Ok(code) => code,
        Err(error) => {
            anstream::eprintln!("\x1b[31merror:\x1b[0m {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// What happened, then why, on one line; a cause that its context already tells is not repeated.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}
