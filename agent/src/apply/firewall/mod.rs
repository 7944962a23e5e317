//! Our nft table, `inet tombolo`. Its chains are static ([`shape`]), its data changes by element ([`element`]); the table
//! is replaced, in one transaction, only when its shape differs or somebody changed it. nft is a child that reads a
//! script from its standard input.

mod element;
pub(crate) mod event;
mod shape;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;
use tombolo_agent_core::desired::Firewall;

use super::{Action, ApplyError, Report, Subject, Writes};
use element::{Column, Datum, Elements, Tuple};
use event::Transactions;
use shape::Shape;

/// A table of 10,000 services takes 20 s.
const PATIENCE: Duration = Duration::from_secs(120);
/// Elements changed by one script, about.
const CHUNK: usize = 20_000;
/// Elements on one line.
const LINE: usize = 200;
/// The longest listing: a million elements.
const MAX_LISTING: u64 = 512 << 20;
/// Of nft's complaints that much is shown.
const MAX_COMPLAINT: usize = 2000;

/// Why the firewall is not as it should be.
#[derive(Debug, Error)]
pub enum FirewallError {
    /// No nft.
    #[error("cannot run `{}`: {source}; install nftables (Debian, Ubuntu: `apt-get install nftables`)", program.display())]
    Missing {
        /// What was run.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Talking to it failed.
    #[error("nft: {0}")]
    Io(io::Error),
    /// It took too long.
    #[error("nft did not end within {} s", PATIENCE.as_secs())]
    Slow,
    /// It refused.
    #[error("nft refused: {0}")]
    Refused(String),
    /// Its listing makes no sense.
    #[error("nft listed what cannot be read: {0}")]
    Listing(String),
}

/// What packets write: the maps, their keys (client, VIP, protocol, port) and what they hold.
const AFFINITY: [(&str, &[Column], &[Column]); 3] = [
    (
        "affinity4",
        &[Column::Address, Column::Address, Column::Protocol, Column::Number],
        &[Column::Address, Column::Number],
    ),
    ("affinity6", &[Column::Word, Column::Word, Column::Protocol, Column::Number], &[Column::Address]),
    ("affinity6_port", &[Column::Word, Column::Word, Column::Protocol, Column::Number], &[Column::Number]),
];

/// Runs nft.
pub struct Nft {
    program: PathBuf,
    shape: Shape,
    writes: Arc<Writes>,
    transactions: Option<Transactions>,
    /// What the table holds, as long as nobody else changes it.
    known: Option<Firewall>,
}

/// The table as it is.
#[derive(Default)]
struct Table {
    /// Rules by chain.
    rules: BTreeMap<String, usize>,
    /// `None`: holds what we never write.
    sets: BTreeMap<String, Option<Elements>>,
    /// Client and VIP, and the backend it stays with, by map.
    affinity: BTreeMap<&'static str, Elements>,
}

/// Elements to change in one set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    set: String,
    remove: Elements,
    add: Elements,
}

impl Nft {
    /// `program`: nft, or where it is. Works in the network namespace of the calling thread.
    pub fn new(program: PathBuf, writes: Arc<Writes>) -> Self {
        let transactions = Transactions::new().inspect_err(|error| {
            tracing::warn!("the nft table is listed each time: its changes are not told: {error}")
        });
        Self { program, shape: shape::shape(), writes, transactions: transactions.ok(), known: None }
    }

    /// Makes it so.
    pub(super) async fn apply(&mut self, firewall: &Firewall) -> Report {
        let mut report = Report::default();
        if let Err(error) = self.try_apply(firewall, &mut report).await {
            report.fail(Subject::Firewall, ApplyError::Firewall(error));
        }
        report
    }

    async fn try_apply(&mut self, firewall: &Firewall, report: &mut Report) -> Result<(), FirewallError> {
        let untouched = self.transactions() == Some(0);
        let (actual, desired, affinity) = match self.known.take().filter(|_| untouched) {
            Some(known) => match element::vips_apart(&known, firewall) {
                Some((old, new)) => (old, new, None),
                None => (element::desired(&known), element::desired(firewall), None),
            },
            None => {
                let table = self.read().await?;
                let existed = table.is_some();
                match table.and_then(|table| Some((self.same_shape(&table)?, Some(table.affinity)))) {
                    Some((actual, affinity)) => (actual, element::desired(firewall), affinity),
                    None => return self.replace(firewall, existed, report).await,
                }
            }
        };
        let changes = diff(&desired, &actual);
        let scripts = match self.change(&changes, report).await {
            Ok(scripts) => scripts,
            Err(error) => {
                // What was listed may be gone; whatever it is, a whole new table is right.
                tracing::warn!(%error, "elements could not be changed; the table is replaced");
                return self.replace(firewall, true, report).await;
            }
        };
        let forgotten = match affinity {
            Some(affinity) => self.forget(&affinity, &desired).await,
            None if changes.iter().any(|change| loses_clients(change, &actual)) => {
                let affinity = self.read_affinity().await?;
                self.forget(&affinity, &element::desired(firewall)).await
            }
            None => 0,
        };
        self.remember(firewall, scripts + forgotten);
        Ok(())
    }

    /// Transactions on our table since the last call.
    fn transactions(&mut self) -> Option<u64> {
        self.transactions.as_mut()?.count()
    }

    /// What we wrote in so many transactions is what is there, if there were no others.
    fn remember(&mut self, firewall: &Firewall, transactions: u64) {
        self.known = (self.transactions() == Some(transactions)).then(|| firewall.clone());
    }

    /// Removes the table.
    pub(super) async fn cleanup(&mut self) -> Report {
        self.known = None;
        let mut report = Report::default();
        let result = match self.read().await {
            Ok(None) => return report,
            Ok(Some(_)) => self.write("delete table inet tombolo\n".to_owned()).await,
            Err(error) => Err(error),
        };
        report.note(Subject::Firewall, Action::Removed, result.map_err(ApplyError::Firewall));
        report
    }

    /// Packets dropped, by counter.
    pub(super) async fn drops(&self) -> Result<BTreeMap<String, u64>, FirewallError> {
        let Some(objects) = self.list("counters table", None).await? else { return Ok(BTreeMap::new()) };
        let counters = objects.iter().filter_map(|object| {
            let counter = object.get("counter")?;
            Some((counter.get("name")?.as_str()?.to_owned(), counter.get("packets")?.as_u64()?))
        });
        Ok(counters.filter(|(name, _)| shape::COUNTERS.contains(&name.as_str())).collect())
    }

    /// All elements, if the table is of our shape and nobody else changed it.
    fn same_shape(&self, table: &Table) -> Option<BTreeMap<String, Elements>> {
        if table.rules != self.shape.rules {
            return None;
        }
        self.shape
            .sets
            .iter()
            .map(|set| Some((set.name.clone(), table.sets.get(&set.name)?.clone()?)))
            .collect()
    }

    async fn replace(
        &mut self,
        firewall: &Firewall,
        existed: bool,
        report: &mut Report,
    ) -> Result<(), FirewallError> {
        let mut script =
            String::from("add table inet tombolo\ndelete table inet tombolo\nadd table inet tombolo\n");
        script.push_str(&self.shape.script);
        for (set, elements) in &element::desired(firewall) {
            render(&mut script, "add", set, elements);
        }
        // Of what was attempted before, nothing counts.
        let _ = self.transactions();
        self.write(script).await?;
        self.remember(firewall, 1);
        report.note(Subject::Firewall, if existed { Action::Changed } else { Action::Added }, Ok(()));
        Ok(())
    }

    /// In how many scripts.
    async fn change(&self, changes: &[Change], report: &mut Report) -> Result<u64, FirewallError> {
        let mut scripts = 0;
        for chunk in chunks(changes) {
            let mut script = String::new();
            for change in &chunk {
                render(&mut script, "delete", &change.set, &change.remove);
            }
            for change in &chunk {
                render(&mut script, "add", &change.set, &change.add);
            }
            self.write(script).await?;
            scripts += 1;
            for change in chunk {
                report.note(Subject::Elements(change.set), Action::Changed, Ok(()));
            }
        }
        Ok(scripts)
    }

    /// Clients do not stay with a backend that went. In how many scripts.
    async fn forget(
        &self,
        affinity: &BTreeMap<&'static str, Elements>,
        desired: &BTreeMap<String, Elements>,
    ) -> u64 {
        let mut scripts = 0;
        for (name, elements) in stale(affinity, desired) {
            let mut script = String::new();
            render(&mut script, "delete", name, &elements);
            if self.write(script).await.is_ok() {
                scripts += 1;
                continue;
            }
            // One of them ended by itself meanwhile, and nft does all or nothing.
            for (key, value) in elements {
                let mut script = String::new();
                render(&mut script, "delete", name, &Elements::from([(key, value)]));
                scripts += u64::from(self.write(script).await.is_ok());
            }
        }
        scripts
    }

    async fn read_affinity(&self) -> Result<BTreeMap<&'static str, Elements>, FirewallError> {
        let mut table = Table::default();
        for (name, ..) in AFFINITY {
            for object in self.list("map", Some(name)).await?.unwrap_or_default() {
                if let Some(map) = object.get("map") {
                    self.read_set(map, &mut table);
                }
            }
        }
        Ok(table.affinity)
    }

    async fn write(&self, script: String) -> Result<(), FirewallError> {
        self.writes.nft();
        self.run(&["-f", "-"], script).await.map(drop)
    }

    async fn read(&self) -> Result<Option<Table>, FirewallError> {
        let Some(objects) = self.list("table", None).await? else { return Ok(None) };
        let mut table = Table::default();
        let name = |object: &Value| object.get("name").and_then(Value::as_str).map(str::to_owned);
        for object in &objects {
            if let Some(chain) = object.get("chain").and_then(name) {
                table.rules.entry(chain).or_default();
            } else if let Some(rule) = object.get("rule") {
                let chain = rule.get("chain").and_then(Value::as_str).unwrap_or_default();
                *table.rules.entry(chain.to_owned()).or_default() += 1;
            } else if let Some(set) = object.get("set").or_else(|| object.get("map")) {
                self.read_set(set, &mut table);
            }
        }
        Ok(Some(table))
    }

    fn read_set(&self, set: &Value, table: &mut Table) {
        let Some(name) = set.get("name").and_then(Value::as_str) else { return };
        let none = Value::Array(Vec::new());
        let elements = set.get("elem").unwrap_or(&none);
        if let Some((name, key, value)) = AFFINITY.iter().find(|(affinity, ..)| *affinity == name) {
            table.affinity.insert(name, element::parse(elements, key, value).unwrap_or_default());
        }
        if let Some(ours) = self.shape.sets.iter().find(|ours| ours.name == name) {
            table.sets.insert(name.to_owned(), element::parse(elements, ours.key, ours.value));
        }
    }

    /// `nft -j list WHAT inet tombolo NAME`; `None`: there is no such thing.
    async fn list(
        &self,
        what: &'static str,
        name: Option<&'static str>,
    ) -> Result<Option<Vec<Value>>, FirewallError> {
        let what = what.split(' ');
        let arguments: Vec<&str> =
            ["-j", "list"].into_iter().chain(what).chain(["inet", "tombolo"]).chain(name).collect();
        let text = match self.run(&arguments, String::new()).await {
            Err(FirewallError::Refused(why)) if why.contains("No such file or directory") => return Ok(None),
            other => other?,
        };
        let bad = |what: String| FirewallError::Listing(what);
        let mut document: Value = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        match document.get_mut("nftables").map(Value::take) {
            Some(Value::Array(objects)) => Ok(Some(objects)),
            _ => Err(bad("no array `nftables`".into())),
        }
    }

    async fn run(&self, arguments: &[&str], input: String) -> Result<Vec<u8>, FirewallError> {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| FirewallError::Missing { program: self.program.clone(), source })?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Err(FirewallError::Io(io::ErrorKind::BrokenPipe.into()));
        };
        let exchange = async {
            let mut output = Vec::new();
            let mut complaint = Vec::new();
            let mut stdout = stdout.take(MAX_LISTING);
            let mut stderr = stderr.take(1 << 20);
            let feed = async {
                // It may end before it has read all, and says why on stderr.
                let _ = stdin.write_all(input.as_bytes()).await;
                drop(stdin);
                Ok(0)
            };
            tokio::try_join!(feed, stdout.read_to_end(&mut output), stderr.read_to_end(&mut complaint))?;
            Ok::<_, io::Error>((child.wait().await?, output, complaint))
        };
        let (status, output, complaint) =
            timeout(PATIENCE, exchange).await.map_err(|_| FirewallError::Slow)?.map_err(FirewallError::Io)?;
        if status.success() {
            return Ok(output);
        }
        let why: String = String::from_utf8_lossy(&complaint).trim().chars().take(MAX_COMPLAINT).collect();
        Err(FirewallError::Refused(if why.is_empty() { status.to_string() } else { why }))
    }
}

fn render(script: &mut String, verb: &str, set: &str, elements: &Elements) {
    for line in elements.iter().collect::<Vec<_>>().chunks(LINE) {
        // Writing to a String cannot fail.
        let _ = write!(script, "{verb} element inet tombolo {set} {{ ");
        for (i, (key, value)) in line.iter().enumerate() {
            let _ = write!(script, "{}{}", if i > 0 { ", " } else { "" }, Tuple(key));
            if !value.is_empty() && verb == "add" {
                let _ = write!(script, " : {}", Tuple(value));
            }
        }
        script.push_str(" }\n");
    }
}

fn diff(desired: &BTreeMap<String, Elements>, actual: &BTreeMap<String, Elements>) -> Vec<Change> {
    let none = Elements::new();
    let names: BTreeSet<&String> = desired.keys().chain(actual.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let (wanted, there) = (desired.get(name).unwrap_or(&none), actual.get(name).unwrap_or(&none));
            let difference = |a: &Elements, b: &Elements| -> Elements {
                a.iter().filter(|(k, v)| b.get(*k) != Some(v)).map(|(k, v)| (k.clone(), v.clone())).collect()
            };
            let (remove, add) = (difference(there, wanted), difference(wanted, there));
            (!remove.is_empty() || !add.is_empty()).then(|| Change { set: name.clone(), remove, add })
        })
        .collect()
}

/// Cut into scripts of about [`CHUNK`] elements, such that what belongs to one VIP, or to one interval set, changes
/// at once.
fn chunks(changes: &[Change]) -> Vec<Vec<Change>> {
    let total: usize = changes.iter().map(|c| c.remove.len() + c.add.len()).sum();
    if total <= CHUNK {
        return if changes.is_empty() { Vec::new() } else { vec![changes.to_vec()] };
    }
    // Grouped by what must change together: everything of a VIP or target, else the set.
    let mut groups: BTreeMap<&[Datum], BTreeMap<&str, Change>> = BTreeMap::new();
    for change in changes {
        let removes = change.remove.iter().map(|element| (element, true));
        for ((key, value), is_removal) in removes.chain(change.add.iter().map(|element| (element, false))) {
            let group = if key.len() >= 3 { &key[..3] } else { &[] };
            let entry = groups.entry(group).or_default().entry(&change.set).or_insert_with(|| Change {
                set: change.set.clone(),
                remove: Elements::new(),
                add: Elements::new(),
            });
            let elements = if is_removal { &mut entry.remove } else { &mut entry.add };
            elements.insert(key.clone(), value.clone());
        }
    }
    let mut scripts: Vec<BTreeMap<&str, Change>> = vec![BTreeMap::new()];
    let mut size = 0;
    for group in groups.into_values() {
        let more: usize = group.values().map(|c| c.remove.len() + c.add.len()).sum();
        if size > 0 && size + more > CHUNK {
            scripts.push(BTreeMap::new());
            size = 0;
        }
        size += more;
        let Some(script) = scripts.last_mut() else { continue };
        for (name, change) in group {
            match script.get_mut(name) {
                Some(all) => {
                    all.remove.extend(change.remove);
                    all.add.extend(change.add);
                }
                None => drop(script.insert(name, change)),
            }
        }
    }
    scripts.into_iter().map(|script| script.into_values().collect()).collect()
}

/// Whether clients may stay with what this change takes away.
fn loses_clients(change: &Change, before: &BTreeMap<String, Elements>) -> bool {
    let keep = match change.set.as_str() {
        "backend4" | "keep4" => "keep4",
        "backend6" | "keep6" => "keep6",
        _ => return false,
    };
    let kept = before.get(keep);
    change
        .remove
        .keys()
        .any(|key| key.get(..3).is_some_and(|vip| kept.is_some_and(|kept| kept.contains_key(vip))))
}

/// What clients stay with that is no backend of a VIP with affinity any more, by map.
fn stale<'a>(
    affinity: &BTreeMap<&'a str, Elements>,
    desired: &BTreeMap<String, Elements>,
) -> BTreeMap<&'a str, Elements> {
    let none = Elements::new();
    let mut valid: BTreeSet<(Vec<Datum>, &[Datum])> = BTreeSet::new();
    for digit in ['4', '6'] {
        let keeps = desired.get(&format!("keep{digit}")).unwrap_or(&none);
        for (key, backend) in desired.get(&format!("backend{digit}")).unwrap_or(&none) {
            if let Some(vip) = key.get(..3).filter(|vip| keeps.contains_key(*vip)) {
                valid.insert((element::identity(vip), backend));
            }
        }
    }
    let is_valid = |key: &[Datum], backend: &[Datum]| {
        key.get(1..).is_some_and(|vip| valid.contains(&(vip.to_vec(), backend)))
    };
    let in_map = |name| affinity.get(name).unwrap_or(&none);
    let ports = in_map("affinity6_port");
    let whole = |key: &Vec<Datum>, address: &Vec<Datum>| -> Vec<Datum> {
        address.iter().chain(ports.get(key).into_iter().flatten()).copied().collect()
    };
    let v6_valid: BTreeSet<&Vec<Datum>> = in_map("affinity6")
        .iter()
        .filter(|(key, a)| is_valid(key, &whole(key, a)))
        .map(|(key, _)| key)
        .collect();
    let mut stale = BTreeMap::new();
    for (name, elements) in affinity {
        let gone: Elements = elements
            .iter()
            .filter(
                |(key, value)| {
                    !if *name == "affinity4" { is_valid(key, value) } else { v6_valid.contains(key) }
                },
            )
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if !gone.is_empty() {
            stale.insert(*name, gone);
        }
    }
    stale
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tombolo_proto::model::{Family, Protocol};

    use super::*;

    fn vip(n: u8, index: u16) -> Vec<Datum> {
        vec![
            Datum::Address(IpAddr::from([198, 19, 0, n])),
            Datum::Protocol(Protocol::Tcp),
            Datum::Number(80),
            Datum::Number(index),
        ]
    }

    fn backend(n: u8) -> Vec<Datum> {
        vec![Datum::Address(IpAddr::from([10, 0, 0, n])), Datum::Number(80)]
    }

    #[test]
    fn scripts_name_what_changes_alone() {
        let before = BTreeMap::from([(
            "backend4".to_owned(),
            Elements::from([(vip(1, 0), backend(1)), (vip(1, 1), backend(2))]),
        )]);
        let after = BTreeMap::from([(
            "backend4".to_owned(),
            Elements::from([(vip(1, 0), backend(1)), (vip(1, 1), backend(3))]),
        )]);
        let changes = diff(&after, &before);
        let mut script = String::new();
        render(&mut script, "delete", &changes[0].set, &changes[0].remove);
        render(&mut script, "add", &changes[0].set, &changes[0].add);
        assert_eq!(
            script,
            "delete element inet tombolo backend4 { 198.19.0.1 . tcp . 80 . 1 }\n\
             add element inet tombolo backend4 { 198.19.0.1 . tcp . 80 . 1 : 10.0.0.3 . 80 }\n"
        );
        assert!(diff(&after, &after).is_empty());
    }

    #[test]
    fn large_changes_are_cut_between_vips() {
        let elements = |add: u8| -> Elements {
            (0..200u8).flat_map(|n| (0..64).map(move |i| (vip(n, i), backend(add)))).collect()
        };
        let before = BTreeMap::from([("backend4".to_owned(), elements(1))]);
        let after = BTreeMap::from([("backend4".to_owned(), elements(2))]);
        let scripts = chunks(&diff(&after, &before));
        assert_eq!(scripts.len(), 2);
        let mut seen = BTreeSet::new();
        for script in &scripts {
            let vips: BTreeSet<Vec<Datum>> = script
                .iter()
                .flat_map(|c| c.add.keys().chain(c.remove.keys()))
                .map(|k| k[..3].to_vec())
                .collect();
            assert!(script.iter().all(|c| c.add.len() == c.remove.len()));
            assert!(vips.is_disjoint(&seen));
            seen.extend(vips);
        }
        assert_eq!(seen.len(), 200);
    }

    #[test]
    fn clients_of_a_backend_that_went_are_forgotten() {
        let client = |n: u8| -> Vec<Datum> {
            let from = Datum::Address(IpAddr::from([10, 1, 0, 1]));
            [from].into_iter().chain(vip(n, 0)[..3].iter().copied()).collect()
        };
        let desired = BTreeMap::from([
            (
                "keep4".to_owned(),
                Elements::from([(vip(1, 0)[..3].to_vec(), vec![Datum::Keep(Family::V4, 10)])]),
            ),
            ("backend4".to_owned(), Elements::from([(vip(1, 0), backend(1)), (vip(2, 0), backend(2))])),
        ]);
        let kept = |n, b| BTreeMap::from([("affinity4", Elements::from([(client(n), backend(b))]))]);
        assert!(stale(&kept(1, 1), &desired).is_empty());
        assert_eq!(stale(&kept(1, 2), &desired).len(), 1);
        assert_eq!(stale(&kept(2, 2), &desired).len(), 1);
    }

    #[tokio::test]
    async fn a_missing_nft_is_one_clear_sentence() {
        let nft = Nft::new("/nonexistent/nft".into(), Arc::default());
        let error = nft.read().await.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("install nftables"), "{error}");
    }
}
