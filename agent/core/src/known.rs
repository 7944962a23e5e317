//! What is known, and what is therefore to be done.

use std::collections::{BTreeMap, BTreeSet};

/// What a source says. Unknown until it has spoken in full: unknown is neither empty nor dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Known<T> {
    /// The source has not spoken yet.
    #[default]
    No,
    /// All that the source says.
    Yes(T),
}

impl<T> Known<T> {
    /// The value, if known.
    pub fn get(&self) -> Option<&T> {
        match self {
            Self::Yes(value) => Some(value),
            Self::No => None,
        }
    }

    /// Whether the source has spoken.
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Yes(_))
    }
}

/// A part of Desired. `Keep` leaves what is there: one of its inputs is unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Section<T> {
    /// Change nothing, remove nothing.
    #[default]
    Keep,
    /// Make it so; what bears our marks and is not in here goes.
    Set(T),
}

impl<T> Section<T> {
    /// The content, if there is one.
    pub fn get(&self) -> Option<&T> {
        match self {
            Self::Set(value) => Some(value),
            Self::Keep => None,
        }
    }
}

/// Desired objects of one kind. What is ours, exists, and is in neither map goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objects<K: Ord, V> {
    /// To be made so.
    pub set: BTreeMap<K, V>,
    /// To be left as they are, present or not: something they depend on is unknown.
    pub keep: BTreeSet<K>,
}

impl<K: Ord, V> Default for Objects<K, V> {
    fn default() -> Self {
        Self { set: BTreeMap::new(), keep: BTreeSet::new() }
    }
}
