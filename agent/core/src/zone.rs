//! What the resolver answers.

/// An immutable snapshot of `clusterset.local`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Zone {}
