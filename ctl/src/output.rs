//! What people and programs read: tables that align, JSON and YAML with a version.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use unicode_width::UnicodeWidthStr as _;
use zeroize::Zeroizing;

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// Columns.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// For programs.
    Json,
    /// For programs.
    Yaml,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl Color {
    fn on(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => std::env::var_os("NO_COLOR").is_none() && std::io::stdout().is_terminal(),
        }
    }
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but look at it.
    Warning,
    /// Does not work.
    Failure,
}

/// Prints to standard output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    pub(crate) format: Format,
    pub(crate) color: Color,
    pub(crate) headers: bool,
}

/// Rows of text; the last columns may be for `-o wide` alone.
pub(crate) struct Table {
    pub(crate) headers: Vec<&'static str>,
    /// Columns shown without `-o wide`.
    pub(crate) narrow: usize,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Printer {
    /// Prints a value as the format asks: `table` is only made for people.
    pub(crate) fn print<T: Serialize>(
        &self,
        kind: &str,
        value: &T,
        table: impl FnOnce(&Self) -> String,
    ) -> Result<()> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Versioned<'a, T> {
            api_version: &'static str,
            kind: &'a str,
            #[serde(flatten)]
            value: &'a T,
        }
        let versioned = Versioned { api_version: "cli.tombolo.dev/v1alpha1", kind, value };
        // What is printed may be a token.
        let text = Zeroizing::new(match self.format {
            Format::Json => format!("{}\n", serde_json::to_string_pretty(&versioned)?),
            Format::Yaml => {
                // Through JSON values: the flattened form is the same in both.
                serde_saphyr::to_string(&serde_json::to_value(&versioned)?)?
            }
            Format::Table | Format::Wide => table(self),
        });
        self.text(&text)
    }

    /// Prints text as it is. A closed pipe is not an error.
    #[allow(clippy::unused_self)]
    pub(crate) fn text(&self, text: &str) -> Result<()> {
        match std::io::stdout().lock().write_all(text.as_bytes()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    /// Aligns columns with three spaces between, as kubectl does.
    pub(crate) fn table(&self, table: &Table) -> String {
        let columns = if self.format == Format::Wide { table.headers.len() } else { table.narrow };
        let header: Vec<String> = table.headers.iter().map(|h| (*h).to_owned()).collect();
        let cells: Vec<Vec<String>> =
            table.rows.iter().map(|row| row.iter().map(|c| cell(c)).collect()).collect();
        let rows: Vec<&Vec<String>> = self.headers.then_some(&header).into_iter().chain(&cells).collect();
        let width =
            |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.width()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width + 3 - cell.width()));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// ✓ ⚠ ✗, coloured on a terminal; words where the locale is not UTF-8.
    pub(crate) fn mark(&self, verdict: Verdict) -> String {
        let utf8 = ["LC_ALL", "LC_CTYPE", "LANG"]
            .iter()
            .find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
            .is_some_and(|v| v.to_lowercase().replace('-', "").contains("utf8"));
        let (sign, word, color) = match verdict {
            Verdict::Ok => ("✓", "ok  ", 32),
            Verdict::Warning => ("⚠", "warn", 33),
            Verdict::Failure => ("✗", "FAIL", 31),
        };
        let text = if utf8 { sign } else { word };
        if self.color.on() { format!("\x1b[{color}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// What a column shows of a text: something, and nothing that moves a terminal's cursor.
fn cell(text: &str) -> String {
    if text.is_empty() { "<none>".to_owned() } else { plain(text) }
}

/// A text from elsewhere on one line: control characters become spaces.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_wide_shows_more() {
        let table = Table {
            headers: vec!["NAME", "AGE", "MORE"],
            narrow: 2,
            rows: vec![
                vec!["eu-west".into(), "1d".into(), "x".into()],
                vec!["ü".into(), "20h".into(), "y".into()],
            ],
        };
        let printer = Printer { format: Format::Table, color: Color::Never, headers: true };
        assert_eq!(printer.table(&table), "NAME      AGE\neu-west   1d\nü         20h\n");
        let printer = Printer { format: Format::Wide, headers: false, ..printer };
        assert_eq!(printer.table(&table), "eu-west   1d    x\nü         20h   y\n");
    }
}
