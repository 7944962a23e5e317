//! What a node keeps of the cluster's API, for a start while the API cannot be reached.
//!
//! One file in the node's private `--state-dir`. Nothing in it is trusted more than what the API says: whoever
//! loads it verifies memberships and statements again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::Node;
use tombolo_proto::model::NodeName;
use tracing::{info, warn};

use super::kind::{self, Problem, cluster_set, member, multicluster, slice, typed};
use super::{Error, Observed};

/// The file's name in a state directory.
pub const FILE: &str = "world.json";
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
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let observed = decode(&value).map_err(|problem| damaged(problem.message))?;
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
        let value = encode(observed).map_err(|problem| Error::Object {
            object: format!("file {}", self.path.display()),
            message: problem.message,
        })?;
        self.write(&value)?;
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

    fn write(&self, value: &Value) -> Result<(), Error> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(Error::io("make the directory", dir))?;
        let temporary = self.path.with_extension("json.tmp");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(Error::io("make", &temporary))?;
        let bytes = serde_json::to_vec(value).map_err(|e| Error::io("encode", &temporary)(e.into()))?;
        let written = file.write_all(&bytes).and_then(|()| file.sync_all());
        written.map_err(Error::io("write", &temporary))?;
        fs::rename(&temporary, &self.path).map_err(Error::io("write", &self.path))
    }
}

fn encode(observed: &Observed) -> Result<Value, Problem> {
    let (mut members, mut nodes, mut imports, mut slices) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (cluster, value) in observed.members.get().into_iter().flatten() {
        members.push(kind::json(&member::write(cluster, value)?));
    }
    for (cluster, records) in observed.member_nodes.get().into_iter().flatten() {
        let shards = member::write_nodes(cluster, records, &BTreeMap::new())?;
        nodes.extend(shards.values().map(kind::json));
    }
    for (key, value) in observed.imports.get().into_iter().flatten() {
        imports.push(kind::json(&multicluster::write_import(key, value)?));
    }
    for (key, value) in observed.slices.get().into_iter().flatten() {
        slices.push(kind::json(&slice::write(key, value)?));
    }
    let set = observed.clusterset.get().and_then(Option::as_ref).map(cluster_set::write).transpose()?;
    Ok(json!({
        "apiVersion": "tombolo.dev/v1alpha1",
        "kind": "Cache",
        "clusterSet": set.as_ref().map(kind::json),
        "members": members,
        "memberNodes": nodes,
        "imports": imports,
        "slices": slices,
        "nodes": observed.nodes.get(),
    }))
}

fn decode(value: &Value) -> Result<Observed, Problem> {
    if value.get("apiVersion").and_then(Value::as_str) != Some("tombolo.dev/v1alpha1") {
        return Err(kind::bad("it is of another version"));
    }
    let list = |field: &str| value.get(field).and_then(Value::as_array).into_iter().flatten();
    let (mut members, mut imports, mut slices) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut nodes: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for object in list("members") {
        members.extend([member::read(&typed(object)?)?]);
    }
    for object in list("memberNodes") {
        let (cluster, _, records) = member::read_nodes(&typed(object)?)?;
        nodes.entry(cluster).or_default().extend(records.into_iter().map(|r| (r.key.clone(), r)));
    }
    for object in list("imports") {
        imports.extend([multicluster::read_import(&typed(object)?)?]);
    }
    for object in list("slices") {
        slices.extend([slice::read(&typed::<k8s_openapi::api::discovery::v1::EndpointSlice>(object)?)?]);
    }
    let set = match value.get("clusterSet") {
        None | Some(Value::Null) => None,
        Some(object) => Some(cluster_set::read(&typed(object)?)?),
    };
    let nodes_here: Option<BTreeMap<NodeName, Node>> = match value.get("nodes") {
        None => None,
        Some(nodes) => serde_json::from_value(nodes.clone()).map_err(|e| kind::bad(format!("nodes: {e}")))?,
    };
    Ok(Observed {
        nodes: nodes_here.map_or(Known::No, Known::Yes),
        members: Known::Yes(members),
        member_nodes: Known::Yes(nodes),
        imports: Known::Yes(imports.into()),
        slices: Known::Yes(slices.into()),
        clusterset: Known::Yes(set),
        ..Observed::default()
    })
}
