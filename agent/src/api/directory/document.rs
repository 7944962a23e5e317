//! Documents of a manifest file: YAML or JSON, several in a file, each on its own.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;
use tombolo_agent_core::finding::Finding;

use super::object::{Document, Object, manifest};
use crate::api::kind::{ObjectId, Problem};

/// Documents of a file.
const MAX_DOCUMENTS: usize = 10_000;

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// In the order of the file.
    pub(super) items: Vec<(ObjectId, Arc<Object>)>,
    /// What is wrong.
    pub(super) findings: Vec<Finding>,
    /// Objects that are there but cannot be used.
    pub(super) failed: BTreeSet<ObjectId>,
    /// There is something of which nobody knows what object it is.
    pub(super) lost: bool,
}

/// Reads a file. `place` names it in findings.
pub(super) fn parse(place: &str, bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed::default();
    let Ok(text) = std::str::from_utf8(bytes) else {
        parsed.lose(place, &Problem::error("BadManifest", "it is not UTF-8 text"));
        return parsed;
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if place.ends_with(".json") {
        parsed.read_json(place, text);
    } else {
        parsed.read_yaml(place, text);
    }
    parsed
}

impl Parsed {
    fn read_json(&mut self, place: &str, text: &str) {
        for value in serde_json::Deserializer::from_str(text).into_iter::<Value>().take(MAX_DOCUMENTS) {
            match value {
                Ok(value) => self.take(place, value),
                Err(error) => {
                    self.lose(
                        place,
                        &Problem::error("BadManifest", format!("it is not valid JSON: {error}")),
                    );
                    return;
                }
            }
        }
    }

    fn read_yaml(&mut self, place: &str, text: &str) {
        let documents = split(text);
        if documents.len() > MAX_DOCUMENTS {
            let message = format!("it has more than {MAX_DOCUMENTS} documents; split it into several files");
            self.lose(place, &Problem::error("BadManifest", message));
        }
        for document in documents.into_iter().take(MAX_DOCUMENTS) {
            let body = &text[document.range.clone()];
            if is_blank(body) {
                continue;
            }
            match value(body) {
                Ok(Value::Null) => {}
                Ok(value) => self.take(&format!("{place}, line {}", document.line), value),
                Err((line, message)) => {
                    let place = format!("{place}, line {}", document.line + line);
                    let problem = Problem::error(
                        "BadManifest",
                        format!(
                            "this is not valid YAML: {message}; other documents of the file are not affected"
                        ),
                    );
                    self.lose(&place, &problem);
                }
            }
        }
    }

    fn take(&mut self, place: &str, value: Value) {
        for document in manifest(value) {
            match document {
                Document::Ignored => {}
                Document::Unknown(problem) => self.lose(place, &problem),
                Document::Objects(objects) => {
                    for (id, object, warning) in objects {
                        self.findings.extend(warning.map(|w| w.on(id.to_string(), place)));
                        match object {
                            Ok(object) => self.items.push((id, Arc::new(object))),
                            Err(problem) => {
                                self.findings.push(problem.on(id.to_string(), place));
                                self.failed.insert(id);
                            }
                        }
                    }
                }
            }
        }
    }

    fn lose(&mut self, place: &str, problem: &Problem) {
        let file = place.split(',').next().unwrap_or(place);
        self.findings.push(problem.on(format!("file {file}"), place));
        self.lost = true;
    }
}

/// A document of a YAML stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// Its bytes, without the line that begins it.
    pub(super) range: Range<usize>,
    /// First line of `range`, from 1.
    pub(super) line: u64,
}

/// Splits a YAML stream at its document markers. They stand at a line's beginning, where no content may look
/// like them (YAML 1.2, 9.1.2), so a broken document does not take the others with it.
pub(super) fn split(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let (mut start, mut first, mut offset, mut number) = (0, 1, 0, 0);
    for line in text.split_inclusive('\n') {
        number += 1;
        let bare = line.trim_end_matches(['\n', '\r']);
        let marker = |m: &str| {
            bare.strip_prefix(m).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        };
        if marker("---") {
            parts.push(Part { range: start..offset, line: first });
            // Content may follow the marker on its line.
            (start, first) = (offset + 3, number);
        } else if marker("...") {
            parts.push(Part { range: start..offset, line: first });
            (start, first) = (offset + line.len(), number + 1);
        }
        offset += line.len();
    }
    parts.push(Part { range: start..text.len(), line: first });
    parts
}

/// Whether a document has nothing but comments and directives.
pub(super) fn is_blank(body: &str) -> bool {
    body.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line.starts_with('%')
    })
}

/// One document's value, or the line (from 0) and the words of what is wrong.
pub(super) fn value(body: &str) -> Result<Value, (u64, String)> {
    // As in YAML 1.2, `no` and `n` are texts: somebody's cluster is Norway's.
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(body, options).map_err(|error| {
        let line = error.location().map_or(0, |l| l.line().saturating_sub(1));
        let text = error.without_snippet().to_string();
        let text = text.lines().next().unwrap_or("not readable");
        // It counts lines within the document; ours, within the file, stands before it.
        let text = text.split(" at line ").next().unwrap_or(text).chars().take(200).collect();
        (line, text)
    })
}
