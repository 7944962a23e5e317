//! `tombolo export` and `tombolo unexport`: one file of our own among the users', edited by whole documents.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tombolo_agent_core::object::ServiceKey;

use super::object::{Document, manifest};
use super::tree::{self, ReadError};
use super::{Directory, MANIFESTS, document, own};
use crate::api::Error;
use crate::api::kind::{Kind, ObjectId};

/// The file that `tombolo export` writes in `manifests/`.
pub(super) const FILE: &str = "tombolo-exports.yaml";
/// Not read by anybody: it begins with a dot.
const TEMPORARY: &str = ".tombolo-exports.yaml.tmp";
const HEAD: &str =
    "# ServiceExports written by `tombolo export`. Edit it as you like: other documents and comments stay.\n";

/// What an edit of the manifests did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edited {
    /// This file was changed.
    Changed(PathBuf),
    /// It was so already, in these files (none if it is not exported at all).
    Already(Vec<PathBuf>),
}

impl Directory {
    /// Writes a ServiceExport into `manifests/tombolo-exports.yaml`, unless some manifest has it already.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn export(&self, key: &ServiceKey) -> Result<Edited, Error> {
        let id = own(ObjectId::of_service(Kind::ServiceExport, key))?;
        self.edit(|text| {
            let files = self.reader().files_of(&id);
            if !files.is_empty() {
                return Err(Edited::Already(
                    files.iter().map(|f| self.root.join(MANIFESTS).join(f)).collect(),
                ));
            }
            let mut text = if text.is_empty() { HEAD.to_owned() } else { text.to_owned() };
            if !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&format!(
                "---\napiVersion: {}\nkind: ServiceExport\nmetadata:\n  name: {}\n  namespace: {}\n",
                Kind::ServiceExport.api_version(),
                key.name,
                key.namespace
            ));
            Ok(text)
        })
    }

    /// Removes a ServiceExport from `manifests/tombolo-exports.yaml`.
    ///
    /// # Errors
    /// [`Error::Object`] if it stands in another file, which is people's; or if a file cannot be read or written.
    pub fn unexport(&self, key: &ServiceKey) -> Result<Edited, Error> {
        let id = own(ObjectId::of_service(Kind::ServiceExport, key))?;
        let others: Vec<String> = self.reader().files_of(&id).into_iter().filter(|f| f != FILE).collect();
        if let Some(file) = others.first() {
            return Err(Error::Object {
                object: id.to_string(),
                message: format!(
                    "it stands in {}, which you wrote; remove it there",
                    self.root.join(MANIFESTS).join(file).display()
                ),
            });
        }
        self.edit(|text| {
            let mut kept = String::new();
            let mut found = false;
            let parts = document::split(text);
            for (index, part) in parts.iter().enumerate() {
                let body = &text[part.range.clone()];
                // With the marker that begins it, as it was written.
                let start = if index == 0 { 0 } else { parts[index - 1].range.end };
                if is_object(body, &id) {
                    found = true;
                } else {
                    kept.push_str(&text[start..part.range.end]);
                }
            }
            if found { Ok(kept) } else { Err(Edited::Already(Vec::new())) }
        })
    }

    /// Reads, changes and replaces the file under the directory's lock. A file left with nothing but comments of
    /// ours is removed.
    fn edit(&self, change: impl FnOnce(&str) -> Result<String, Edited>) -> Result<Edited, Error> {
        let top = self.root.join(MANIFESTS);
        let path = top.join(FILE);
        let mut edited = Edited::Already(Vec::new());
        self.store.transact(|_| {
            let text = match tree::read(&top, FILE) {
                Ok((_, bytes)) => String::from_utf8(bytes).map_err(|_| Error::Object {
                    object: format!("file {}", path.display()),
                    message: "it is not UTF-8 text; mend or remove it".to_owned(),
                })?,
                Err(ReadError::Gone) => String::new(),
                Err(error) => {
                    return Err(Error::Object {
                        object: format!("file {}", path.display()),
                        message: error.problem().message,
                    });
                }
            };
            match change(&text) {
                Err(already) => edited = already,
                Ok(new) if new.trim() == HEAD.trim() || new.trim().is_empty() => {
                    fs::remove_file(&path).map_err(Error::io("remove", &path))?;
                    edited = Edited::Changed(path.clone());
                }
                Ok(new) => {
                    replace(&top, &path, &new)?;
                    edited = Edited::Changed(path.clone());
                }
            }
            Ok(())
        })?;
        Ok(edited)
    }
}

fn is_object(body: &str, id: &ObjectId) -> bool {
    let Ok(value) = document::value(body) else { return false };
    let documents = manifest(value);
    // A list is people's work, of which no part is taken out.
    matches!(documents.as_slice(), [Document::Objects(objects)] if objects.iter().any(|(i, _, _)| i == id))
}

fn replace(top: &Path, path: &Path, text: &str) -> Result<(), Error> {
    let temporary = top.join(TEMPORARY);
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)
        .map_err(Error::io("make", &temporary))?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(Error::io("write", &temporary))?;
    fs::rename(&temporary, path).map_err(Error::io("write", path))?;
    File::open(top).and_then(|dir| dir.sync_all()).map_err(Error::io("flush", top))
}
