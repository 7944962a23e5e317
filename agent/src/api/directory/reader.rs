//! Reads a directory's files, only those that changed, and remembers the last good value of each object.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tombolo_agent_core::finding::Finding;
use tombolo_agent_core::known::Known;

use super::assemble::{self, assemble};
use super::memory::Memory;
use super::object::{self, Object};
use super::shown::{Key, Services};
use super::tree::{self, ReadError, Stamp};
use super::{MANIFESTS, STATE, document};
use crate::api::kind::{Kind, ObjectId, ObjectName, Problem};
use crate::api::observed::Observed;
use tombolo_proto::model::Namespace;

/// Files people may write.
const MAX_MANIFESTS: usize = 10_000;
/// Objects of ours.
const MAX_STATE: usize = 200_000;
/// Bytes of all files together.
const MAX_TOTAL: u64 = 512 * 1024 * 1024;
/// A file written so recently may still be being written: a slow scan waits, unless told that it was closed.
pub(super) const SETTLED: Duration = Duration::from_secs(1);
/// File times are this coarse: what was written within it of our reading may have changed unseen.
const GRAIN: Duration = Duration::from_millis(50);

/// One half of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Half {
    Manifests,
    State,
}

/// What was read of a directory.
pub(super) struct Reader {
    manifests: Side,
    state: Side,
    /// All but imports and slices, until any of it changes.
    assembled: Option<Observed>,
}

struct Side {
    half: Half,
    top: PathBuf,
    known: bool,
    files: BTreeMap<String, Content>,
    findings: Vec<Finding>,
    dirs: BTreeSet<String>,
    memory: Option<Memory>,
    /// Imports and slices of the files.
    services: Services,
    /// Files with anything else: other objects, or something wrong.
    others: BTreeSet<String>,
    /// Something of `others`, or of the side as a whole, changed.
    changed: bool,
}

struct Content {
    stamp: Option<Stamp>,
    young: bool,
    items: Vec<(ObjectId, Arc<Object>)>,
    findings: Vec<Finding>,
    /// Something stands there that could not be read, and nothing is remembered in its place.
    lost: bool,
}

impl Reader {
    pub(super) fn new(root: &Path) -> Self {
        let side = |half, name| Side {
            half,
            top: root.join(name),
            known: false,
            files: BTreeMap::new(),
            findings: Vec::new(),
            dirs: BTreeSet::new(),
            memory: None,
            services: Services::default(),
            others: BTreeSet::new(),
            changed: true,
        };
        let (manifests, state) = (side(Half::Manifests, MANIFESTS), side(Half::State, STATE));
        Self { manifests, state, assembled: None }
    }

    /// Remembers over restarts what manifests said when they were last good.
    pub(super) fn remember(&mut self, memory: Memory) {
        self.manifests.memory = Some(memory);
    }

    /// Looks at every file, reading those that changed. `closed` were closed by their writers and are read at
    /// once. True if something may still be being written: look again after [`SETTLED`].
    pub(super) fn scan(&mut self, closed: &BTreeSet<(Half, String)>) -> bool {
        let again = self.manifests.scan(closed);
        self.state.scan(closed) || again
    }

    /// Looks at these files alone.
    pub(super) fn refresh(&mut self, paths: &BTreeSet<(Half, String)>) {
        for (half, path) in paths {
            let side = match half {
                Half::Manifests => &mut self.manifests,
                Half::State => &mut self.state,
            };
            if side.half.wants(path) {
                side.look(path);
            }
        }
    }

    /// Directories to be watched, below each half.
    pub(super) fn dirs(&self) -> impl Iterator<Item = (Half, &str)> {
        let of = |side: &'_ Side| side.half;
        [&self.manifests, &self.state]
            .into_iter()
            .flat_map(move |side| side.dirs.iter().map(move |dir| (of(side), dir.as_str())))
    }

    /// All of it. What did not change since the last time is not looked at.
    pub(super) fn observed(&mut self) -> Observed {
        let mut changed = false;
        for side in [&mut self.manifests, &mut self.state] {
            changed |= std::mem::take(&mut side.changed);
        }
        let mut observed = match self.assembled.take() {
            Some(assembled) if !changed => assembled,
            _ => {
                let mut findings = Vec::new();
                for side in [&self.manifests, &self.state] {
                    findings.extend(side.findings.iter().cloned());
                    findings.extend(side.others().flat_map(|(_, content)| content.findings.iter().cloned()));
                }
                assemble(&self.manifests.objects(), &self.state.objects(), findings)
            }
        };
        self.assembled = Some(observed.clone());
        if self.state.known {
            observed.imports = Known::Yes(self.state.services.imports.clone());
            observed.slices = Known::Yes(self.state.services.slices.clone());
        }
        observed
    }

    /// In which manifest files an object stands.
    pub(super) fn files_of(&self, id: &ObjectId) -> Vec<String> {
        let has =
            |content: &Content| content.items.iter().any(|(i, object)| i == id && **object != Object::Other);
        self.manifests.files.iter().filter(|(_, c)| has(c)).map(|(path, _)| path.clone()).collect()
    }
}

impl Half {
    fn endings(self) -> &'static [&'static str] {
        match self {
            Self::Manifests => &[".yaml", ".yml", ".json"],
            Self::State => &[".json"],
        }
    }

    fn wants(self, path: &str) -> bool {
        self.endings().iter().any(|ending| path.ends_with(ending))
    }

    /// Whether we make this object again, just as it was, when it is damaged.
    fn is_made_anew(self, path: &str) -> bool {
        let kind = match self {
            Self::Manifests => return false,
            Self::State => state_id(path).map(|id| id.kind),
        };
        matches!(kind, Ok(Kind::EndpointSlice | Kind::TunnelNode | Kind::Lease | Kind::Secret))
    }

    fn place(self, path: &str) -> String {
        let half = match self {
            Self::Manifests => MANIFESTS,
            Self::State => STATE,
        };
        format!("{half}/{path}")
    }
}

impl Content {
    fn keys(&self) -> BTreeSet<Key> {
        self.items.iter().filter_map(|(_, object)| Key::of(object)).collect()
    }

    fn has_others(&self) -> bool {
        !self.findings.is_empty() || self.items.iter().any(|(_, object)| Key::of(object).is_none())
    }
}

impl Side {
    fn scan(&mut self, closed: &BTreeSet<(Half, String)>) -> bool {
        let before = (self.known, std::mem::take(&mut self.findings));
        let again = self.scan_files(closed);
        self.changed |= before.0 != self.known || before.1 != self.findings;
        again
    }

    fn scan_files(&mut self, closed: &BTreeSet<(Half, String)>) -> bool {
        let max = match self.half {
            Half::Manifests => MAX_MANIFESTS,
            Half::State => MAX_STATE,
        };
        let listing = match tree::list(&self.top, self.half.endings(), max) {
            Ok(listing) => listing,
            Err(error) => {
                // An unmounted disk looks just like this: nothing is known, and nothing is taken away.
                self.known = false;
                let problem = Problem::error(
                    "DirectoryMissing",
                    format!(
                        "{} cannot be read ({error}); nothing changes until it is back (is a disk not mounted? else `tombolo join` makes it)",
                        self.top.display()
                    ),
                );
                self.findings.push(problem.on(format!("directory {}", self.half.place("")), "observing"));
                return true;
            }
        };
        for (path, problem) in &listing.problems {
            let place = self.half.place(path);
            self.findings.push(problem.on(format!("file {place}"), &place));
        }
        let unknown = |path: &str| {
            listing.unknown.iter().any(|dir| {
                dir.is_empty() || path.strip_prefix(dir.as_str()).is_some_and(|rest| rest.starts_with('/'))
            })
        };
        let stays = |path: &str| listing.files.contains_key(path) || unknown(path);
        let gone: Vec<String> = self.files.keys().filter(|path| !stays(path)).cloned().collect();
        gone.iter().for_each(|path| self.put(path, None));
        if !self.known
            && let Some(memory) = &self.memory
        {
            memory.retain(stays);
        }
        let mut again = false;
        let mut total = 0_u64;
        let mut whole = listing.unknown.is_empty();
        for (path, stamp) in &listing.files {
            total = total.saturating_add(stamp.size().min(tree::MAX_BYTES));
            if total > MAX_TOTAL {
                let place = self.half.place(path);
                let message = format!(
                    "the files before it have more than {MAX_TOTAL} bytes; this one and those after it are not read"
                );
                let problem = Problem::error("TooManyFiles", message);
                self.findings.push(problem.on(format!("file {place}"), &place));
                whole = false;
                break;
            }
            let known = self.files.get(path);
            if known.is_some_and(|file| file.stamp == Some(*stamp) && !file.young) {
                continue;
            }
            // Half of a new file takes nothing away, half of a known one would.
            let new = known.is_none();
            let settled = self.half == Half::State
                || stamp.age() >= SETTLED
                || stamp.is_ahead()
                || closed.contains(&(self.half, path.clone()))
                || known.is_some_and(|file| file.stamp == Some(*stamp));
            again |= !settled && self.known;
            if settled || new {
                self.load(path);
            }
        }
        self.dirs = listing.dirs;
        // Half of it, read as all of it, would take the other half away.
        if !self.known && whole && !self.files.values().any(|content| content.lost) {
            self.known = true;
        }
        if !self.known {
            let problem = Problem::error(
                "DirectoryIncomplete",
                "not all of it could be read since this agent started, so nothing of it counts and nothing \
                 changes; other findings name what to repair or remove"
                    .to_owned(),
            );
            let place = self.half.place("");
            self.findings.push(problem.on(format!("directory {place}"), "observing"));
        }
        again || !self.known
    }

    /// Reads a file if it is another than it was.
    fn look(&mut self, path: &str) {
        let known = self.files.get(path);
        match tree::stamp(&self.top, path) {
            Ok(stamp) if known.is_some_and(|f| f.stamp == Some(stamp) && !f.young) => {}
            _ => self.load(path),
        }
    }

    fn load(&mut self, path: &str) {
        let place = self.half.place(path);
        let (stamp, bytes) = match tree::read(&self.top, path) {
            Ok(read) => read,
            Err(ReadError::Gone) => {
                self.put(path, None);
                if let Some(memory) = &self.memory {
                    memory.forget(path);
                }
                return;
            }
            Err(error) => {
                let items = self.last_good(path, &place);
                // Whoever put a link or a monster here is told; a disk that fails says nothing of what it holds.
                let io = matches!(error, ReadError::Io(_));
                let lost = io && items.is_empty() && !self.was_read(path) && !self.half.is_made_anew(path);
                let mut findings = vec![error.problem().on(format!("file {place}"), &place)];
                kept(&mut findings, !items.is_empty());
                self.put(path, Some(Content { stamp: None, young: false, items, findings, lost }));
                return;
            }
        };
        let mut parsed = match self.half {
            Half::Manifests => document::parse(&place, &bytes),
            Half::State => parse_state(path, &place, &bytes),
        };
        let mut lost = false;
        if !parsed.lost && parsed.failed.is_empty() {
            if let Some(memory) = &self.memory {
                memory.keep(path, &bytes);
            }
        } else {
            let before = parsed.items.len();
            let live: BTreeSet<ObjectId> = parsed.items.iter().map(|(id, _)| id.clone()).collect();
            for (id, object) in self.last_good(path, &place) {
                if !live.contains(&id) && (parsed.lost || parsed.failed.contains(&id)) {
                    parsed.items.push((id, object));
                }
            }
            kept(&mut parsed.findings, parsed.items.len() > before);
            // Manifests are people's, and a new mistake takes nothing away; objects of ours were whole once, and
            // creation times, addresses and ranks stand nowhere else.
            let nothing = parsed.items.is_empty() && !parsed.failed.is_empty();
            lost = self.half == Half::State && nothing && !self.half.is_made_anew(path);
        }
        let young = stamp.age() < GRAIN || stamp.is_ahead();
        let content =
            Content { stamp: Some(stamp), young, items: parsed.items, findings: parsed.findings, lost };
        self.put(path, Some(content));
    }

    /// What a file holds now; None: there is none.
    fn put(&mut self, path: &str, content: Option<Content>) {
        let new = content.as_ref().is_some_and(Content::has_others);
        let keys = content.as_ref().map(Content::keys).unwrap_or_default();
        let old = match content {
            Some(content) => self.files.insert(path.to_owned(), content),
            None => self.files.remove(path),
        };
        self.changed |= new || self.others.contains(path);
        if new {
            self.others.insert(path.to_owned());
        } else {
            self.others.remove(path);
        }
        let before = old.as_ref().map(Content::keys).unwrap_or_default();
        let files = &self.files;
        let object = |path: &str, key: &Key| {
            let items = files.get(path).into_iter().flat_map(|content| &content.items);
            items.map(|(_, object)| &**object).rfind(|object| Key::of(object).as_ref() == Some(key))
        };
        self.services.change(path, before, &keys, object);
    }

    fn others(&self) -> impl Iterator<Item = (&str, &Content)> {
        self.others.iter().filter_map(|path| Some((path.as_str(), self.files.get(path)?)))
    }

    /// Whether a file was read before, be it empty.
    fn was_read(&self, path: &str) -> bool {
        self.files.get(path).is_some_and(|content| !content.lost)
            || self.memory.as_ref().is_some_and(|memory| memory.recall(path).is_some())
    }

    /// What a file said before.
    fn last_good(&self, path: &str, place: &str) -> Vec<(ObjectId, Arc<Object>)> {
        match (self.files.get(path), &self.memory) {
            (Some(content), _) => content.items.clone(),
            (None, Some(memory)) => {
                memory.recall(path).map(|bytes| document::parse(place, &bytes).items).unwrap_or_default()
            }
            (None, None) => Vec::new(),
        }
    }

    /// All but imports and slices.
    fn objects(&self) -> assemble::Objects<'_> {
        self.known.then(|| {
            self.others()
                .flat_map(|(path, content)| content.items.iter().map(move |(id, object)| (path, id, object)))
                .collect()
        })
    }
}

/// Says that what was good before stays in use.
fn kept(findings: &mut [Finding], any: bool) {
    if any {
        for finding in findings {
            finding.message.push_str("; what was good before stays in use");
        }
    }
}

fn parse_state(path: &str, place: &str, bytes: &[u8]) -> document::Parsed {
    let mut parsed = document::Parsed::default();
    let result = match state_id(path) {
        Err(problem) => Err((None, problem)),
        Ok(id) => serde_json::from_slice(bytes)
            .map_err(|error| Problem::error("BadObject", format!("it is damaged: {error}")))
            .and_then(|mut value| object::state(&id, &mut value))
            .map(|object| (id.clone(), object))
            .map_err(|problem| (Some(id), problem)),
    };
    match result {
        Ok((id, object)) => parsed.items.push((id, Arc::new(object))),
        Err((id, problem)) => {
            let object = id.as_ref().map_or_else(|| format!("file {place}"), ToString::to_string);
            let message = format!("{} (Tombolo alone writes in state/)", problem.message);
            parsed.findings.push(Problem { message, ..problem }.on(object, place));
            parsed.failed.extend(id);
        }
    }
    parsed
}

/// The object that a path in `state/` names.
pub(super) fn state_id(path: &str) -> Result<ObjectId, Problem> {
    let stray = || Problem::warning("StrayFile", "Tombolo keeps no object at this path; remove it");
    let parts: Vec<&str> = path.split('/').collect();
    let [plural, namespace, file] = parts.as_slice() else {
        return Err(stray());
    };
    let kind = Kind::ALL.into_iter().find(|kind| kind.plural() == *plural).ok_or_else(stray)?;
    let name = ObjectName::new(file.strip_suffix(".json").ok_or_else(stray)?).map_err(|_| stray())?;
    let namespace = match (kind.is_namespaced(), *namespace) {
        (false, "_") => None,
        (true, namespace) => Some(Namespace::new(namespace).map_err(|_| stray())?),
        (false, _) => return Err(stray()),
    };
    Ok(ObjectId { kind, namespace, name })
}

/// Where an object lies in `state/`.
pub(super) fn state_path(id: &ObjectId) -> String {
    let namespace = id.namespace.as_ref().map_or("_", Namespace::as_str);
    format!("{}/{namespace}/{}.json", id.kind.plural(), id.name.as_str())
}
