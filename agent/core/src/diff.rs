//! What to do to make what is into what should be.

use std::collections::{BTreeMap, BTreeSet};

use crate::known::Objects;

/// Steps from actual to desired. To be done in this order: adds and changes before removes, so that nothing is missing
/// in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff<'a, K, V> {
    /// Desired and not there.
    pub add: Vec<(&'a K, &'a V)>,
    /// There, but otherwise: what is, then what should be.
    pub change: Vec<(&'a K, &'a V, &'a V)>,
    /// There and not desired.
    pub remove: Vec<(&'a K, &'a V)>,
}

impl<'a, K: Ord, V: PartialEq> Diff<'a, K, V> {
    /// Compares whole values. `actual` holds only what bears our marks.
    pub fn new(desired: &'a BTreeMap<K, V>, actual: &'a BTreeMap<K, V>) -> Self {
        Self::keeping(desired, actual, |_| false)
    }

    /// The same, but what is to be kept is neither changed nor removed.
    pub fn objects(desired: &'a Objects<K, V>, actual: &'a BTreeMap<K, V>) -> Self {
        Self::keeping(&desired.set, actual, |key| desired.keep.contains(key))
    }

    fn keeping(desired: &'a BTreeMap<K, V>, actual: &'a BTreeMap<K, V>, kept: impl Fn(&K) -> bool) -> Self {
        let mut diff = Self { add: Vec::new(), change: Vec::new(), remove: Vec::new() };
        for (key, value) in desired.iter().filter(|(key, _)| !kept(key)) {
            match actual.get(key) {
                None => diff.add.push((key, value)),
                Some(old) if old != value => diff.change.push((key, old, value)),
                Some(_) => {}
            }
        }
        diff.remove = actual.iter().filter(|(key, _)| !desired.contains_key(key) && !kept(key)).collect();
        diff
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.change.is_empty() && self.remove.is_empty()
    }
}

/// Steps from an actual set to a desired one; adds come first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetDiff<'a, K> {
    /// Desired and not there.
    pub add: Vec<&'a K>,
    /// There and not desired.
    pub remove: Vec<&'a K>,
}

impl<'a, K: Ord> SetDiff<'a, K> {
    /// Compares. `actual` holds only what bears our marks.
    pub fn new(desired: &'a BTreeSet<K>, actual: &'a BTreeSet<K>) -> Self {
        Self { add: desired.difference(actual).collect(), remove: actual.difference(desired).collect() }
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn leads_to_desired_and_is_then_empty(
            set in prop::collection::btree_map(0_u8..20, 0_u8..3, 0..20),
            keep in prop::collection::btree_set(0_u8..20, 0..5),
            actual in prop::collection::btree_map(0_u8..20, 0_u8..3, 0..20),
        ) {
            let desired = Objects { set, keep };
            let mut now = actual.clone();
            let diff = Diff::objects(&desired, &actual);
            for (key, value) in diff.add.iter().chain(diff.change.iter().map(|(k, _, v)| (*k, *v)).collect::<Vec<_>>().iter()) {
                now.insert(**key, **value);
            }
            for (key, _) in &diff.remove {
                prop_assert!(now.remove(key).is_some());
            }
            prop_assert!(Diff::objects(&desired, &now).is_empty());
            for key in &desired.keep {
                prop_assert_eq!(now.get(key), actual.get(key));
            }
            for (key, value) in desired.set.iter().filter(|(k, _)| !desired.keep.contains(k)) {
                prop_assert_eq!(now.get(key), Some(value));
            }
        }
    }
}
