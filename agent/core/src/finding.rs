//! What a person should know.

use serde::Serialize;

/// How much it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Part of what was asked for is not done.
    Error,
    /// Works, but not as it should.
    Warning,
}

/// Something wrong with an object, and what to do about it. Ordered, so that equal worlds give equal lists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// CamelCase, stable, bounded in number: a metric label and the anchor in docs/troubleshooting.md.
    pub reason: &'static str,
    /// On what, as `kind namespace/name` or `cluster name`.
    pub object: String,
    /// What happened and what to do.
    pub message: String,
}
