//! Runs the tests that measure promises, as often as asked, and gathers their figures.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::{Budget, COLLECTING, FULL, Figure, RUNS, budgets, starving, tidy};
use crate::program;

/// Runs in one lab; then a new one is built.
const PER_LAB: u32 = 10;
/// Labs beyond one a run: chance may lead an event past all flows, and then a run has no figure.
const SPARE: u32 = 5;
/// A test that failed so often is not tried again.
const FAILURES: usize = 3;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Runs of each event.
    pub runs: u32,
    /// Events, or files of tests; empty: all.
    pub only: Vec<String>,
    /// The short forms of tests.
    pub short: bool,
    /// Set figures aside that were taken while the machine was starved, by the witness of the control flow, and take
    /// them again: for machines that do other things too.
    pub calm: bool,
    /// A file to which the card goes as JSON after each test: hours of figures must not be lost. What the tests said
    /// goes beside it, with the ending `.log`: a figure alone says nothing about its cause.
    pub keep: Option<PathBuf>,
}

/// One event's figures beside its budget.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// The event.
    pub event: String,
    /// The promise.
    #[serde(flatten)]
    pub budget: Budget,
    /// The figures, in the order in which they were taken.
    pub figures: Vec<f64>,
    /// Half were not above it.
    pub median: Option<f64>,
    /// The highest.
    pub worst: Option<f64>,
    /// The longest gap of the control flow beside any of them, in milliseconds: what the machine itself cost.
    pub control_ms: Option<f64>,
    /// Figures set aside, since the machine was starved: they count for nothing.
    pub starved: Vec<f64>,
    /// Why runs failed.
    pub failures: Vec<String>,
    /// All runs ended well and none was above the budget.
    pub pass: bool,
}

/// All of them.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Card {
    /// One line an event.
    pub rows: Vec<Row>,
}

impl Card {
    /// Whether every promise held.
    #[must_use]
    pub fn pass(&self) -> bool {
        self.rows.iter().all(|row| row.pass)
    }
}

impl std::fmt::Display for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wide = self.rows.iter().map(|r| r.event.len()).max().unwrap_or_default().max(5);
        let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), tidy);
        write!(
            f,
            "{:wide$}   {:>4}   {:>7}   {:>8}   {:>8}   {:>8}   {:<8}   {:>10}   VERDICT",
            "EVENT", "RUNS", "STARVED", "MEDIAN", "WORST", "BUDGET", "UNIT", "CONTROL MS"
        )?;
        for row in &self.rows {
            write!(
                f,
                "\n{:wide$}   {:>4}   {:>7}   {:>8}   {:>8}   {:>8}   {:<8}   {:>10}   {}",
                row.event,
                row.figures.len(),
                row.starved.len(),
                cell(row.median),
                cell(row.worst),
                tidy(row.budget.budget),
                row.budget.unit,
                cell(row.control_ms),
                if row.pass { "pass" } else { "FAIL" }
            )?;
        }
        for row in &self.rows {
            for failure in &row.failures {
                write!(f, "\n{}: {failure}", row.event)?;
            }
        }
        Ok(())
    }
}

/// Runs them; `progress` is told of each figure.
///
/// # Errors
/// If an event is unknown or the tests do not build. (A test that fails is in the card.)
pub fn run(options: &Options, mut progress: impl FnMut(&str)) -> Result<Card> {
    let chosen = choose(budgets()?, &options.only)?;
    let mut tests: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for (event, budget) in &chosen {
        tests.entry(budget.test()).or_default().push(event);
    }
    progress("building the programs and the tests");
    program::ensure_built()?;
    let files: BTreeSet<&str> = tests.keys().map(|(file, _)| *file).collect();
    let built = build(&files)?;
    let mut card = Card { rows: Vec::new() };
    let log = options.keep.as_ref().map(|file| file.with_extension("log"));
    let mut log =
        log.map(|file| File::create(&file).with_context(|| file.display().to_string())).transpose()?;
    for ((file, function), events) in tests {
        let program = built.get(file).with_context(|| format!("cargo built no test {file}"))?;
        let wanted = |event: &str| chosen[event].runs.unwrap_or(u32::MAX).min(options.runs) as usize;
        let mut taken: BTreeMap<&str, Vec<Figure>> = events.iter().map(|e| (*e, Vec::new())).collect();
        let (mut failures, mut aside, mut labs) = (Vec::new(), Vec::<Figure>::new(), 0);
        loop {
            let missing = |e: &&str| wanted(e).saturating_sub(taken.get(e).map_or(0, Vec::len));
            let left = events.iter().map(missing).max().unwrap_or(0);
            if left == 0 || failures.len() >= FAILURES {
                break;
            }
            labs += 1;
            if labs > options.runs + SPARE {
                failures.push(format!("after {} labs there are not enough figures", labs - 1));
                break;
            }
            let before = taken.values().map(Vec::len).sum::<usize>() + aside.len();
            let ended =
                once(program, function, (left as u32).min(PER_LAB), options.short, &mut log, |figure| {
                    let Some(list) = taken.get_mut(figure.event.as_str()) else { return };
                    let bound = starving(chosen[figure.event.as_str()]);
                    if options.calm && figure.control.is_some_and(|gap| gap >= bound) {
                        progress(&format!(
                            "{} set aside: {} {}",
                            figure.event,
                            tidy(figure.value),
                            figure.unit
                        ));
                        aside.push(figure.clone());
                        return;
                    }
                    list.push(figure.clone());
                    let (count, of) = (list.len(), wanted(&figure.event).max(list.len()));
                    progress(&format!(
                        "{} {count}/{of}: {} {}",
                        figure.event,
                        tidy(figure.value),
                        figure.unit
                    ));
                });
            if let Err(error) = ended {
                progress(&format!("{function}: {error:#}"));
                failures.push(format!("{error:#}"));
            } else if taken.values().map(Vec::len).sum::<usize>() + aside.len() == before {
                failures.push(format!("{file}::{function} ended well and measured nothing"));
                break;
            }
        }
        for event in events {
            let figures = taken.remove(event).unwrap_or_default();
            let mut row = row(event, chosen[event], &figures, &failures);
            row.starved = aside.iter().filter(|f| f.event == event).map(|f| f.value).collect();
            card.rows.push(row);
        }
        card.rows.sort_by(|a, b| a.event.cmp(&b.event));
        if let Some(file) = &options.keep {
            let text = serde_json::to_string_pretty(&card)?;
            std::fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
        }
    }
    Ok(card)
}

fn choose<'a>(all: &'a BTreeMap<String, Budget>, only: &[String]) -> Result<BTreeMap<&'a str, &'a Budget>> {
    let mut chosen = BTreeMap::new();
    for word in only {
        let before = chosen.len();
        chosen.extend(
            all.iter().filter(|(e, b)| *e == word || b.test().0 == word).map(|(e, b)| (e.as_str(), b)),
        );
        if chosen.len() == before {
            let names: Vec<_> = all.keys().map(String::as_str).collect();
            bail!("there is no event {word}; there are: {}", names.join(", "));
        }
    }
    if only.is_empty() {
        chosen.extend(all.iter().map(|(e, b)| (e.as_str(), b)));
    }
    Ok(chosen)
}

fn row(event: &str, budget: &Budget, figures: &[Figure], failures: &[String]) -> Row {
    let mut sorted: Vec<_> = figures.iter().map(|f| f.value).collect();
    sorted.sort_by(f64::total_cmp);
    let worst = sorted.last().copied();
    Row {
        event: event.to_owned(),
        budget: budget.clone(),
        figures: figures.iter().map(|f| f.value).collect(),
        median: sorted.get(sorted.len().saturating_sub(1) / 2).copied(),
        worst,
        control_ms: figures.iter().filter_map(|f| f.control).max_by(f64::total_cmp),
        starved: Vec::new(),
        failures: failures.to_vec(),
        pass: failures.is_empty() && worst.is_some_and(|worst| worst <= budget.budget),
    }
}

/// Builds files of tests as this program was built; where each lies.
fn build(files: &BTreeSet<&str>) -> Result<BTreeMap<String, PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the project's directory")?;
    let mut command = program::cargo();
    command.current_dir(root).args(["test", "--package", "tombolo-lab", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics");
    for file in files {
        command.args(["--test", file]);
    }
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output =
        command.stderr(Stdio::inherit()).output().context("running cargo, which builds the tests")?;
    ensure!(output.status.success(), "the tests do not build: see above");
    let mut built = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (name, path) = (message["target"]["name"].as_str(), message["executable"].as_str());
        if let (Some(name), Some(path)) = (name, path) {
            built.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(built)
}

/// Runs a test once and hands on each figure as it comes.
fn once(
    program: &Path,
    test: &str,
    runs: u32,
    short: bool,
    log: &mut Option<File>,
    mut take: impl FnMut(&Figure),
) -> Result<()> {
    let mut command = Command::new(program);
    command.args([test, "--exact", "--nocapture", "--include-ignored"]);
    command.env(COLLECTING, "1").env(RUNS, runs.to_string()).env_remove(FULL);
    if !short {
        command.env(FULL, "1");
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut last = VecDeque::new();
    for line in BufReader::new(child.stderr.take().context("no output")?).lines().map_while(Result::ok) {
        if let Some(figure) = Figure::read(&line) {
            take(&figure);
        }
        if let Some(log) = log {
            writeln!(log, "{line}")?;
        }
        last.push_back(line);
        if last.len() > 20 {
            last.pop_front();
        }
    }
    let status = child.wait()?;
    if !status.success() {
        let reason = last.iter().find(|l| l.contains(&format!("{test}: "))).or(last.back());
        bail!("{}", reason.map_or("failed without a word", |l| l.trim()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(runs: Option<u32>) -> Budget {
        Budget {
            says: String::new(),
            unit: "ms".into(),
            budget: 10.0,
            landing: None,
            test: "file::function".into(),
            runs,
        }
    }

    fn figures(values: &[f64]) -> Vec<Figure> {
        let figure =
            |v: &f64| Figure { event: "e".into(), value: *v, unit: "ms".into(), control: Some(v / 2.0) };
        values.iter().map(figure).collect()
    }

    #[test]
    fn a_row_tells_median_worst_and_verdict() {
        let good = row("e", &budget(None), &figures(&[3.0, 10.0, 1.0, 2.0]), &[]);
        assert_eq!(
            (good.median, good.worst, good.control_ms, good.pass),
            (Some(2.0), Some(10.0), Some(5.0), true)
        );
        assert!(!row("e", &budget(None), &figures(&[3.0, 10.1]), &[]).pass);
        assert!(!row("e", &budget(None), &[], &[]).pass, "nothing measured is not a pass");
        let failed = row("e", &budget(None), &figures(&[1.0]), &["it broke".to_owned()]);
        let card = Card { rows: vec![good, failed] };
        assert!(!card.pass());
        assert!(card.to_string().ends_with("e: it broke"), "{card}");
    }

    #[test]
    fn events_are_chosen_by_name_and_by_file() {
        let all = BTreeMap::from([("a".to_owned(), budget(None)), ("b".to_owned(), budget(Some(1)))]);
        assert_eq!(choose(&all, &[]).unwrap().len(), 2);
        assert_eq!(choose(&all, &["b".into()]).unwrap().len(), 1);
        assert_eq!(choose(&all, &["file".into()]).unwrap().len(), 2);
        assert!(choose(&all, &["c".into()]).unwrap_err().to_string().contains("a, b"));
    }
}
