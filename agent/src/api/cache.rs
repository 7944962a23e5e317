//! What a node keeps of the cluster's API, for a start while the API cannot be reached.
//!
//! One file in the node's private `--state-dir`. Nothing in it is trusted more than what the API says: whoever
//! loads it verifies memberships and statements again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::ser::{Error as _, SerializeMap as _, SerializeSeq as _};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::Node;
use tombolo_proto::model::NodeName;
use tracing::{info, warn};

use super::kind::{self, Problem, cluster_set, member, multicluster, slice};
use super::{Error, Observed};

/// The file's name in a state directory.
pub const FILE: &str = "world.json";
const API_VERSION: &str = "tombolo.dev/v1alpha1";
/// Bytes of it.
const MAX_BYTES: u64 = 256 * 1024 * 1024;

/// A node's cache of set, members, their nodes, own nodes, imports and slices.
pub struct Cache {
    path: PathBuf,
    last: Option<Observed>,
    /// Why the last save failed, until one does not.
    failed: Option<String>,
}

impl Cache {
    /// The cache in a state directory; nothing is read yet.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE), last: None, failed: None }
    }

    /// What was saved last: an [`Observed`] that knows only the cached kinds. None if nothing was saved.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged; then start without it.
    pub fn load(&mut self) -> Result<Option<Observed>, Error> {
        let mut bytes = Vec::new();
        match File::open(&self.path) {
            Ok(file) => {
                file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", &self.path))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &self.path)(error)),
        };
        let damaged = |problem: String| Error::Object {
            object: format!("file {}", self.path.display()),
            message: format!("the cache is damaged ({problem}) and not used; it is written anew"),
        };
        let observed = decode(&bytes).map_err(|problem| damaged(problem.message))?;
        self.last = Some(observed.clone());
        Ok(Some(observed))
    }

    /// As [`Self::save`], but tells by itself when saving begins to fail and when it works again. True if it tried.
    pub fn keep(&mut self, observed: &Observed) -> bool {
        match self.save(observed) {
            Ok(wrote) => {
                if wrote && self.failed.take().is_some() {
                    info!("what was verified is kept again for a start without the cluster's API");
                }
                wrote
            }
            Err(error) => {
                let text = error.to_string();
                if self.failed.as_ref() != Some(&text) {
                    warn!(
                        "what was verified cannot be kept for a start without the cluster's API: {text}; trying again"
                    );
                    self.failed = Some(text);
                }
                true
            }
        }
    }

    /// Saves what changed since the last time; true if it wrote. Does nothing while one of the kinds is unknown.
    ///
    /// # Errors
    /// If the file cannot be written; the old one stays.
    pub fn save(&mut self, observed: &Observed) -> Result<bool, Error> {
        let known = observed.members.is_known()
            && observed.member_nodes.is_known()
            && observed.imports.is_known()
            && observed.slices.is_known()
            && observed.nodes.is_known()
            && observed.clusterset.is_known();
        if !known {
            return Ok(false);
        }
        if let Some(last) = &self.last
            && last.members == observed.members
            && last.member_nodes == observed.member_nodes
            && last.imports == observed.imports
            && last.slices == observed.slices
            && last.nodes == observed.nodes
            && last.clusterset == observed.clusterset
        {
            return Ok(false);
        }
        self.write(&Saved(observed))?;
        self.last = Some(Observed {
            members: observed.members.clone(),
            member_nodes: observed.member_nodes.clone(),
            imports: observed.imports.clone(),
            slices: observed.slices.clone(),
            nodes: observed.nodes.clone(),
            clusterset: observed.clusterset.clone(),
            ..Observed::default()
        });
        Ok(true)
    }

    fn write(&self, saved: &Saved<'_>) -> Result<(), Error> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(Error::io("make the directory", dir))?;
        let temporary = self.path.with_extension("json.tmp");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(Error::io("make", &temporary))?;
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, saved).map_err(|error| {
            if error.is_io() {
                return Error::io("write", &temporary)(error.into());
            }
            Error::Object { object: format!("file {}", self.path.display()), message: error.to_string() }
        })?;
        let file = out.into_inner().map_err(|error| Error::io("write", &temporary)(error.into_error()))?;
        file.sync_all().map_err(Error::io("write", &temporary))?;
        fs::rename(&temporary, &self.path).map_err(Error::io("write", &self.path))
    }
}

/// What is saved. Objects become JSON one at a time: as a tree in memory, those of 10,000 imports are 200 MB.
struct Saved<'a>(&'a Observed);

/// A list whose entries are made as they are written.
struct Each<F>(F);

impl<F, I, T> Serialize for Each<F>
where
    F: Fn() -> I,
    I: Iterator<Item = Result<T, Problem>>,
    T: Serialize,
{
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut list = to.serialize_seq(None)?;
        for entry in (self.0)() {
            list.serialize_element(&entry.map_err(|problem| S::Error::custom(problem.message))?)?;
        }
        list.end()
    }
}

impl Serialize for Saved<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let observed = self.0;
        let set = observed.clusterset.get().and_then(Option::as_ref).map(cluster_set::write).transpose();
        let members = || {
            let all = observed.members.get().into_iter().flatten();
            all.map(|(cluster, value)| member::write(cluster, value))
        };
        let nodes = || {
            let all = observed.member_nodes.get().into_iter().flatten();
            all.flat_map(|(cluster, records)| match member::write_nodes(cluster, records, &BTreeMap::new()) {
                Ok(shards) => shards.into_values().map(Ok).collect(),
                Err(problem) => vec![Err(problem)],
            })
        };
        let imports = || {
            let all = observed.imports.get().into_iter().flatten();
            all.map(|(key, value)| multicluster::write_import(key, value))
        };
        let slices = || {
            let all = observed.slices.get().into_iter().flatten();
            all.map(|(key, value)| slice::write(key, value))
        };
        let mut map = to.serialize_map(Some(8))?;
        map.serialize_entry("apiVersion", API_VERSION)?;
        map.serialize_entry("kind", "Cache")?;
        map.serialize_entry("clusterSet", &set.map_err(|problem| S::Error::custom(problem.message))?)?;
        map.serialize_entry("members", &Each(members))?;
        map.serialize_entry("memberNodes", &Each(nodes))?;
        map.serialize_entry("imports", &Each(imports))?;
        map.serialize_entry("slices", &Each(slices))?;
        map.serialize_entry("nodes", &observed.nodes.get())?;
        map.end()
    }
}

/// The same as it is read: objects as text, and then one at a time.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Loaded<'a> {
    api_version: String,
    #[serde(borrow, default)]
    cluster_set: Option<&'a RawValue>,
    #[serde(borrow, default)]
    members: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    member_nodes: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    imports: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    slices: Vec<&'a RawValue>,
    #[serde(default)]
    nodes: Option<BTreeMap<NodeName, Node>>,
}

fn typed<T: DeserializeOwned>(text: &RawValue) -> Result<T, Problem> {
    serde_json::from_str(text.get()).map_err(|error| kind::bad(error.to_string()))
}

fn decode(bytes: &[u8]) -> Result<Observed, Problem> {
    let loaded: Loaded<'_> = serde_json::from_slice(bytes).map_err(|error| kind::bad(error.to_string()))?;
    if loaded.api_version != API_VERSION {
        return Err(kind::bad("it is of another version"));
    }
    let (mut members, mut imports, mut slices) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut nodes: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for object in loaded.members {
        members.extend([member::read(&typed(object)?)?]);
    }
    for object in loaded.member_nodes {
        let (cluster, _, records) = member::read_nodes(&typed(object)?)?;
        nodes.entry(cluster).or_default().extend(records.into_iter().map(|r| (r.key.clone(), r)));
    }
    for object in loaded.imports {
        imports.extend([multicluster::read_import(&typed(object)?)?]);
    }
    for object in loaded.slices {
        slices.extend([slice::read(&typed::<k8s_openapi::api::discovery::v1::EndpointSlice>(object)?)?]);
    }
    let set = loaded.cluster_set.map(|object| cluster_set::read(&typed(object)?)).transpose()?;
    Ok(Observed {
        nodes: loaded.nodes.map_or(Known::No, Known::Yes),
        members: Known::Yes(members),
        member_nodes: Known::Yes(nodes),
        imports: Known::Yes(imports.into()),
        slices: Known::Yes(slices.into()),
        clusterset: Known::Yes(set),
        ..Observed::default()
    })
}
