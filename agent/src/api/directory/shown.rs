//! Imports and imported slices out of their files, one file at a time: there are many, and few change at once.

use std::collections::{BTreeMap, BTreeSet};

use tombolo_agent_core::object::{Import, ServiceKey, Slice, SliceKey};
use tombolo_agent_core::shelf::Shelf;

use super::object::Object;

/// What a file's object is the value of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Import(ServiceKey),
    Slice(SliceKey),
}

impl Key {
    /// None for objects of other kinds.
    pub(super) fn of(object: &Object) -> Option<Self> {
        match object {
            Object::Import(key, _) => Some(Self::Import(key.clone())),
            Object::Slice(key, _) => Some(Self::Slice(key.clone())),
            _ => None,
        }
    }
}

/// Imports and slices. Of two files with one object the last by path counts.
#[derive(Debug, Default)]
pub(super) struct Services {
    pub(super) imports: Shelf<ServiceKey, Import>,
    pub(super) slices: Shelf<SliceKey, Slice>,
    places: BTreeMap<Key, BTreeSet<String>>,
}

impl Services {
    /// A file has held `before` and holds `now`; `object` gives a file's object of a key.
    pub(super) fn change<'a>(
        &mut self,
        path: &str,
        before: BTreeSet<Key>,
        now: &BTreeSet<Key>,
        object: impl Fn(&str, &Key) -> Option<&'a Object>,
    ) {
        for key in before.union(now) {
            let places = self.places.entry(key.clone()).or_default();
            if now.contains(key) {
                places.insert(path.to_owned());
            } else {
                places.remove(path);
            }
            match (key, places.last().and_then(|path| object(path, key))) {
                (Key::Import(key), Some(Object::Import(_, value))) => {
                    self.imports.insert(key.clone(), value.clone());
                }
                (Key::Slice(key), Some(Object::Slice(_, value))) => {
                    self.slices.insert(key.clone(), value.clone());
                }
                (Key::Import(key), _) => {
                    self.imports.remove(key);
                }
                (Key::Slice(key), _) => {
                    self.slices.remove(key);
                }
            }
            if places.is_empty() {
                self.places.remove(key);
            }
        }
    }
}
