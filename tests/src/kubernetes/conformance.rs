//! The upstream conformance suite of the Multi-Cluster Services API, run in a lab of its own.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::binary::find;
use super::plane::admin_kubeconfig;
use crate::lab::Lab;
use crate::place::words;
use crate::sandbox::ROOT;
use crate::topology::{Proxy, Topology};

/// Two tests of the suite at the version of tests/kube want a ServiceExport's own labels on the import, which the
/// specification forbids; later versions want those of `spec.exportedLabels`.
const KNOWN_WRONG: &str = "!ExportedLabels";
/// What the suite at this version wants and the specification does not: one ClusterSetIP for the whole set. Ours is each
/// cluster's own; later versions take either.
pub const OPEN: &str = "A DNS lookup of the <service>.<ns>.svc.clusterset.local domain for a ClusterIP service should resolve to \
                        the clusterset IP";
/// How long the suite may take.
const WITHIN: Duration = Duration::from_secs(1800);

/// What became of one test of the suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As the specification has it.
    Passed,
    /// It wants more clusters than there are, or is known to be wrong.
    Skipped,
    /// Why not.
    Failed(String),
}

/// One test of the suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its words.
    pub test: String,
    /// What became of it.
    pub verdict: Verdict,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Passed => write!(f, "ok    {}", self.test),
            Verdict::Skipped => write!(f, "skip  {}", self.test),
            Verdict::Failed(why) => write!(f, "FAIL  {}: {why}", self.test),
        }
    }
}

/// The whole suite's outcome.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Every test, in the suite's order.
    pub lines: Vec<Line>,
    /// The suite's own report, HTML.
    pub report: String,
}

impl Outcome {
    /// Tests that failed, but for the one that is [`OPEN`].
    #[must_use]
    pub fn broken(&self) -> Vec<&str> {
        let failed = self.lines.iter().filter(|line| matches!(line.verdict, Verdict::Failed(_)));
        failed.map(|line| &*line.test).filter(|test| *test != OPEN).collect()
    }

    /// How many passed, and how many were run.
    #[must_use]
    pub fn score(&self) -> (usize, usize) {
        let count = |wanted: fn(&Verdict) -> bool| self.lines.iter().filter(|l| wanted(&l.verdict)).count();
        let passed = count(|v| matches!(v, Verdict::Passed));
        (passed, passed + count(|v| matches!(v, Verdict::Failed(_))))
    }
}

/// The clusters that the suite runs in: a gateway and a node of kwok each.
///
/// # Errors
/// Never with one or two clusters.
pub fn topology(clusters: u8, proxy: Proxy) -> Result<Topology> {
    ensure!((1..=2).contains(&clusters), "the suite knows what to do with one or two clusters");
    let mut text = "name: conformance\nclusters:\n".to_owned();
    for (number, (id, node)) in (1..=clusters).zip([("eu-west", "eu"), ("us-east", "us")]) {
        text += &format!(
            "  - id: {id}\n    api: kubernetes\n    proxy: {}\n    \
             pod_cidrs: [10.{number}.0.0/16, \"fd00:10:{number}::/48\"]\n    nodes:\n      \
             - {{ name: {node}-gw1, gateway: true }}\n      - {{ name: {node}-w1, kwok: true }}\n",
            proxy.as_str()
        );
    }
    Topology::parse(&text)
}

/// Runs the suite on all clusters of a lab that is up, as the administrator of each.
///
/// # Errors
/// If it could not be run, or left no report; not if tests fail.
pub fn run(lab: &Lab) -> Result<Outcome> {
    let dir = Path::new(ROOT).join("conformance");
    std::fs::create_dir_all(&dir)?;
    let (mut contexts, mut files) = (Vec::new(), Vec::new());
    for cluster in &lab.topology().clusters {
        let file = dir.join(format!("{}.kubeconfig", cluster.id));
        std::fs::copy(admin_kubeconfig(lab, &cluster.id), &file)?;
        contexts.push(&*cluster.id);
        files.push(file.to_string_lossy().into_owned());
    }
    // A place has a root of its own, in which a working directory has to be entered anew.
    let mut command = lab.wire().command("env");
    command.arg("--chdir").arg(&dir).arg(find("conformance")?);
    command.arg(format!("-contexts={}", contexts.join(",")));
    command.arg("-ginkgo.no-color").arg("-ginkgo.json-report=report.json");
    command.arg(format!("-ginkgo.timeout={}s", WITHIN.as_secs()));
    if !is_newer() {
        command.arg(format!("-ginkgo.label-filter={KNOWN_WRONG}"));
    }
    let output =
        command.env("KUBECONFIG", files.join(":")).output().context("starting the conformance suite")?;
    let json = std::fs::read_to_string(dir.join("report.json"))
        .with_context(|| format!("the suite left no report: {}", words(&output)))?;
    let report = std::fs::read_to_string(dir.join("report.html")).context("the suite left no report.html")?;
    Ok(Outcome { lines: lines(&json)?, report })
}

/// Whether a suite is run that is newer than the published one.
pub(super) fn is_newer() -> bool {
    std::env::var_os("TOMBOLO_CONFORMANCE").is_some()
}

/// Of ginkgo's report what is of use here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: String,
}

fn lines(json: &str) -> Result<Vec<Line>> {
    let suites: Vec<Suite> = serde_json::from_str(json).context("the suite's report")?;
    let mut lines = Vec::new();
    for spec in suites.into_iter().flat_map(|s| s.spec_reports) {
        let said = || {
            let message = spec.failure.as_ref().map_or(&*spec.state, |f| &f.message);
            message.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        // What is set up before all tests has no words of its own.
        let is_test = spec.leaf_node_type == "It";
        ensure!(is_test || spec.state == "passed", "{}: {}", spec.leaf_node_type, said());
        if !is_test {
            continue;
        }
        let verdict = match &*spec.state {
            "passed" => Verdict::Passed,
            "skipped" | "pending" => Verdict::Skipped,
            _ => Verdict::Failed(said()),
        };
        let texts = spec.container_hierarchy_texts.unwrap_or_default();
        let texts = texts.iter().map(String::as_str).chain([&*spec.leaf_node_text]);
        let test = texts.filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ");
        lines.push(Line { test, verdict });
    }
    ensure!(!lines.is_empty(), "the suite ran no test");
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_topologies_are_possible() {
        for clusters in 1..=2 {
            let topology = topology(clusters, Proxy::Iptables).unwrap();
            assert_eq!(topology.clusters.len(), usize::from(clusters));
            assert_eq!(topology.node("eu-w1").unwrap().cni4.to_string(), "10.1.2.254");
        }
        assert!(topology(3, Proxy::Nftables).is_err());
    }

    #[test]
    fn the_report_of_ginkgo_becomes_lines() {
        let spec = |kind: &str, state: &str| {
            serde_json::json!({
                "ContainerHierarchyTexts": ["", "Connectivity"], "LeafNodeType": kind, "LeafNodeText": "works",
                "State": state, "Failure": { "Message": "not\n so" },
            })
        };
        let report = |specs: &[serde_json::Value]| serde_json::json!([{ "SpecReports": specs }]).to_string();
        let specs = [
            spec("BeforeSuite", "passed"),
            spec("It", "passed"),
            spec("It", "skipped"),
            spec("It", "failed"),
        ];
        let lines = lines(&report(&specs)).unwrap();
        let shown: Vec<_> = lines.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            ["ok    Connectivity works", "skip  Connectivity works", "FAIL  Connectivity works: not so"]
        );
        assert_eq!(Outcome { lines, report: String::new() }.score(), (1, 2));
        assert!(super::lines(&report(&[spec("BeforeSuite", "failed")])).is_err());
        assert!(super::lines(&report(&[])).is_err());
    }
}
