//! The project's promises as figures: one file of budgets, [`measured`] for tests, and the command that prints both
//! side by side.

mod run;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::Lab;
use crate::machine::Machine;

pub use run::{Card, Options, Row, run};

/// The file of budgets.
const BUDGETS: &str = include_str!("../budgets.yaml");
/// Set by the scorecard: figures are collected, and judged by it alone.
const COLLECTING: &str = "TOMBOLO_SCORECARD";
/// How many runs of an event a test is to make.
const RUNS: &str = "TOMBOLO_RUNS";
/// Set by `.ci/full`: the long forms of tests, held to the letter of the promise.
const FULL: &str = "TOMBOLO_FULL";

/// A promise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// In the words of whoever gave it.
    pub says: String,
    /// `ms`, `packets`, `changes`, ...
    pub unit: String,
    /// The figure must not be above it.
    pub budget: f64,
    /// The same for a landing: a shared machine, unoptimised programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landing: Option<f64>,
    /// FILE::FUNCTION of the test that measures it.
    pub test: String,
    /// At most so many runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs: Option<u32>,
}

impl Budget {
    /// The file and the function of the test.
    #[must_use]
    pub fn test(&self) -> (&str, &str) {
        self.test.split_once("::").unwrap_or((&self.test, ""))
    }

    /// What a test holds its figure to: the letter in the long form, a landing's bound else.
    #[must_use]
    pub fn bound(&self) -> f64 {
        if strict() { self.budget } else { self.landing.unwrap_or(self.budget) }
    }
}

/// All promises, by the name of their event.
///
/// # Errors
/// If the file is malformed: a test reads it, so no release has one that is.
pub fn budgets() -> Result<&'static BTreeMap<String, Budget>> {
    static PARSED: LazyLock<Result<BTreeMap<String, Budget>, String>> = LazyLock::new(|| {
        let all: BTreeMap<String, Budget> =
            serde_saphyr::from_str(BUDGETS).map_err(|e| format!("tests/budgets.yaml: {e}"))?;
        // The line of a figure is read word by word.
        match all.iter().find(|(_, budget)| budget.unit.contains(char::is_whitespace)) {
            Some((event, _)) => Err(format!("tests/budgets.yaml: the unit of {event} is more than one word")),
            None => Ok(all),
        }
    });
    PARSED.as_ref().map_err(|e| anyhow::anyhow!("{e}"))
}

/// The promise about an event.
///
/// # Errors
/// If `tests/budgets.yaml` has none of this name.
pub fn budget(event: &str) -> Result<&'static Budget> {
    budgets()?.get(event).with_context(|| format!("tests/budgets.yaml has no event {event}: add it"))
}

/// Reports the figure of one run of an event: prints the line that the scorecard collects, and holds the figure to the
/// event's budget (the letter of it under `TOMBOLO_FULL`, a landing's bound else; the scorecard judges by itself).
///
/// # Errors
/// If the figure is above the bound, or the event or its unit is not that of `tests/budgets.yaml`.
pub fn measured(event: &str, value: f64, unit: &str) -> Result<()> {
    let budget = budget(event)?;
    ensure!(budget.unit == unit, "{event} is measured in {}, not {unit}", budget.unit);
    print(event, value, unit, None);
    if collecting() || value <= budget.bound() {
        return Ok(());
    }
    bail!("{event}: {} {unit}, allowed are {} {unit}: {}", tidy(value), budget.bound(), budget.says)
}

/// Runs an event under a control flow that crosses no tunnel ([`Machine`]), and reports its figures as [`measured`]
/// does, with the longest gap of that flow beside each. `touched` are the nodes that the event breaks.
///
/// A landing shares its machine: where a time is above its bound *and* the control flow had a gap of a tenth of the
/// budget or more at the same time, the machine was starved; the event is then run once more, and that is said. The
/// long form and the scorecard never do so.
///
/// # Errors
/// If the event fails, or a figure is above its bound.
pub fn event(
    lab: &Lab,
    touched: &[&str],
    mut run: impl FnMut() -> Result<Vec<(&'static str, f64, &'static str)>>,
) -> Result<()> {
    let mut again = !strict() && !collecting();
    loop {
        let machine = Machine::watch(lab, touched)?;
        let figures = run()?;
        let gap = machine.stop()?;
        let mut over = Vec::new();
        for (event, value, unit) in figures {
            let budget = budget(event)?;
            ensure!(budget.unit == unit, "{event} is measured in {}, not {unit}", budget.unit);
            print(event, value, unit, Some(gap));
            if value > budget.bound() && !collecting() {
                over.push((event, value, budget));
            }
        }
        let Some((event, value, budget)) = over.first().copied() else { return Ok(()) };
        let starved = over.iter().all(|(_, _, b)| gap >= starving(b));
        if !(again && starved) {
            bail!(
                "{event}: {} {}, allowed are {}: {} (the control flow's longest gap at the same time: {gap:.0} ms)",
                tidy(value),
                budget.unit,
                budget.bound(),
                budget.says
            );
        }
        again = false;
        shout(&format!(
            "REPEATED: {event} took {} {}, but a flow that crosses no tunnel had a gap of {gap:.0} ms at the same time: \
             the machine was starved. Once more.",
            tidy(value),
            budget.unit
        ));
    }
}

/// The control flow's gap, in milliseconds, from which on a machine is called starved.
fn starving(budget: &Budget) -> f64 {
    if budget.unit == "ms" { (budget.budget / 10.0).max(20.0) } else { 100.0 }
}

#[allow(clippy::print_stderr)]
fn shout(text: &str) {
    eprintln!("{text}");
}

/// How many runs of its event a test makes: what the scorecard asks for, else so many.
#[must_use]
pub fn runs(otherwise: usize) -> usize {
    std::env::var(RUNS).ok().and_then(|runs| runs.parse().ok()).unwrap_or(otherwise).max(1)
}

/// Whether promises are held to the letter and tests run in their long form: by `.ci/full` and the scorecard, on a
/// machine that does nothing else.
#[must_use]
pub fn strict() -> bool {
    std::env::var_os(FULL).is_some()
}

/// Whether a scorecard runs this test and judges its figures.
#[must_use]
pub fn collecting() -> bool {
    std::env::var_os(COLLECTING).is_some()
}

/// A figure's line on the standard error, which libtest leaves alone. `control` is the longest gap of the control flow
/// at the same time, in milliseconds.
#[allow(clippy::print_stderr)]
pub(crate) fn print(event: &str, value: f64, unit: &str, control: Option<f64>) {
    let control = control.map(|gap| format!(" control {}", tidy(gap))).unwrap_or_default();
    eprintln!("measured {event} {} {unit}{control}", tidy(value));
}

/// One line of [`measured`], read back.
#[derive(Debug, Clone, PartialEq)]
struct Figure {
    event: String,
    value: f64,
    unit: String,
    control: Option<f64>,
}

impl Figure {
    fn read(line: &str) -> Option<Self> {
        let words: Vec<_> = line.strip_prefix("measured ")?.split_whitespace().collect();
        let (event, value, unit, control) = match words.as_slice() {
            [event, value, unit] => (event, value, unit, None),
            [event, value, unit, "control", gap] => (event, value, unit, Some(gap.parse().ok()?)),
            _ => return None,
        };
        let value: f64 = value.parse().ok().filter(|v: &f64| v.is_finite())?;
        Some(Self { event: (*event).to_owned(), value, unit: (*unit).to_owned(), control })
    }
}

/// One decimal, none if it is zero.
fn tidy(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_promise_has_a_test_that_exists() {
        for (event, budget) in budgets().unwrap() {
            let (file, function) = budget.test();
            let source = source(file);
            let function = function.rsplit("::").next().unwrap_or_default();
            assert!(source.contains(&format!("fn {function}()")), "{event}: {file} has no test {function}");
            assert!(source.contains(&format!("\"{event}\"")), "{event}: {file} never reports it");
            assert!(budget.landing.is_none_or(|l| l >= budget.budget), "{event}: a landing is no stricter");
            assert!(
                event.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
                "{event}"
            );
        }
    }

    /// A file of tests, or all files of a directory of them.
    fn source(name: &str) -> String {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name);
        if let Ok(text) = std::fs::read_to_string(path.with_extension("rs")) {
            return text;
        }
        let files = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        files.flatten().filter_map(|f| std::fs::read_to_string(f.path()).ok()).collect()
    }

    #[test]
    fn a_line_reads_back() {
        let figure = Figure { event: "x-y".into(), value: 1.5, unit: "ms".into(), control: None };
        assert_eq!(Figure::read("measured x-y 1.5 ms"), Some(figure.clone()));
        assert_eq!(
            Figure::read("measured x-y 1.5 ms control 3"),
            Some(Figure { control: Some(3.0), ..figure })
        );
        for bad in
            ["", "measured", "measured x", "measured x y ms", "measured x NaN ms", "measured x 1 ms control"]
        {
            assert_eq!(Figure::read(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_unknown_event_or_another_unit_is_refused() {
        assert!(measured("no-such-event", 1.0, "ms").unwrap_err().to_string().contains("budgets.yaml"));
        assert!(measured("export", 1.0, "packets").is_err());
    }
}
