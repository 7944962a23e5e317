//! A sorted map whose copies share what they have in common: copying costs nothing, a change costs its surroundings, and
//! what differs between two copies is found without looking at the rest.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Index;
use std::slice;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// Entries that lie together, at most; one that has more is cut in two.
const MOST: usize = 64;

type Chunk<K, V> = Vec<(K, Arc<V>)>;

/// See the module.
pub struct Shelf<K, V> {
    /// None is empty; all keys of one are below all keys of the next.
    chunks: Arc<Vec<Arc<Chunk<K, V>>>>,
    len: usize,
}

impl<K, V> Shelf<K, V> {
    /// Empty.
    pub fn new() -> Self {
        Self { chunks: Arc::default(), len: 0 }
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All, in order.
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter { chunks: self.chunks.iter(), chunk: [].iter() }
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> + Clone {
        self.iter().map(|(key, _)| key)
    }

    /// All values, in order of key.
    pub fn values(&self) -> impl Iterator<Item = &V> + Clone {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Ord, V> Shelf<K, V> {
    /// In which chunk a key is, or would be put.
    fn chunk_of<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        let after =
            self.chunks.partition_point(|c| c.first().is_some_and(|(first, _)| first.borrow() <= key));
        after.saturating_sub(1)
    }

    fn entry<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&(K, Arc<V>)>
    where
        K: Borrow<Q>,
    {
        let chunk = self.chunks.get(self.chunk_of(key))?;
        let at = chunk.binary_search_by(|(k, _)| k.borrow().cmp(key)).ok()?;
        chunk.get(at)
    }

    /// The entry of a key.
    pub fn get_key_value<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        self.entry(key).map(|(key, value)| (key, &**value))
    }

    /// The value of a key, to be held by others too.
    pub fn get_shared<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&Arc<V>>
    where
        K: Borrow<Q>,
    {
        self.entry(key).map(|(_, value)| value)
    }

    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.get_key_value(key).map(|(_, value)| value)
    }

    /// Whether a key has a value.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// Entries from a key on, in order.
    pub fn starting_at<'a>(&'a self, key: &K) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V> {
        let place = self.chunk_of(key);
        let chunk = self.chunks.get(place).map_or(&[][..], |chunk| chunk.as_slice());
        let at = chunk.partition_point(|(k, _)| k < key);
        let rest = self.chunks.get(place + 1..).unwrap_or_default();
        Iter { chunks: rest.iter(), chunk: chunk.get(at..).unwrap_or_default().iter() }
    }

    /// Keys that have another value than in `old`, or that only one of both has.
    pub fn changed<'a>(&'a self, old: &'a Self) -> BTreeSet<&'a K>
    where
        V: PartialEq,
    {
        let mut changed = BTreeSet::new();
        if Arc::ptr_eq(&self.chunks, &old.chunks) {
            return changed;
        }
        // A chunk that both have begins with the same key in both, so that it is met at once by both walks.
        let (mut new_chunks, mut old_chunks) = (self.chunks.iter().peekable(), old.chunks.iter().peekable());
        let (mut new_part, mut old_part) = (Vec::new(), BTreeMap::new());
        loop {
            let (new, old) = (new_chunks.peek().copied(), old_chunks.peek().copied());
            let first =
                |chunk: Option<&'a Arc<Chunk<K, V>>>| chunk.and_then(|c| c.first()).map(|(key, _)| key);
            let (take_new, take_old) = match (first(new), first(old)) {
                (None, None) => break,
                (Some(_), None) => (true, false),
                (None, Some(_)) => (false, true),
                (Some(a), Some(b)) => (a <= b, b <= a),
            };
            let same = matches!((new, old), (Some(a), Some(b)) if Arc::ptr_eq(a, b));
            if take_new {
                new_chunks.next();
                new_part.extend(new.filter(|_| !same).into_iter().flat_map(|chunk| chunk.iter()));
            }
            if take_old {
                old_chunks.next();
                let part = old.filter(|_| !same).into_iter().flat_map(|chunk| chunk.iter());
                old_part.extend(part.map(|(key, value)| (key, value)));
            }
        }
        for (key, value) in new_part {
            let is = |old: &Arc<V>| Arc::ptr_eq(old, value) || old == value;
            if !old_part.remove(key).is_some_and(is) {
                changed.insert(key);
            }
        }
        changed.extend(old_part.into_keys());
        changed
    }
}

impl<K: Ord + Clone, V> Shelf<K, V> {
    /// Gives a key a value.
    pub fn insert(&mut self, key: K, value: V) {
        self.insert_shared(key, Arc::new(value));
    }

    /// Gives a key a value that others hold too.
    pub fn insert_shared(&mut self, key: K, value: Arc<V>) {
        let place = self.chunk_of(&key);
        let chunks = Arc::make_mut(&mut self.chunks);
        let Some(chunk) = chunks.get_mut(place) else {
            chunks.push(Arc::new(vec![(key, value)]));
            self.len += 1;
            return;
        };
        let chunk = Arc::make_mut(chunk);
        match chunk.binary_search_by(|(k, _)| k.cmp(&key)) {
            Ok(at) => chunk[at].1 = value,
            Err(at) => {
                chunk.insert(at, (key, value));
                self.len += 1;
                if chunk.len() > MOST {
                    let upper = chunk.split_off(chunk.len() / 2);
                    chunks.insert(place + 1, Arc::new(upper));
                }
            }
        }
    }

    /// Takes a key's value away. Whether it had one.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        let place = self.chunk_of(key);
        let found = |chunk: &Chunk<K, V>| chunk.binary_search_by(|(k, _)| k.borrow().cmp(key)).ok();
        let Some(at) = self.chunks.get(place).and_then(|chunk| found(chunk)) else { return false };
        let chunks = Arc::make_mut(&mut self.chunks);
        let empty = chunks.get_mut(place).is_some_and(|chunk| {
            let chunk = Arc::make_mut(chunk);
            chunk.remove(at);
            chunk.is_empty()
        });
        if empty {
            chunks.remove(place);
        }
        self.len -= 1;
        true
    }

    /// Adds and replaces.
    pub fn extend(&mut self, entries: impl IntoIterator<Item = (K, V)>) {
        entries.into_iter().for_each(|(key, value)| self.insert(key, value));
    }
}

impl<K: Ord + Clone, V: Clone> Shelf<K, V> {
    /// The value of a key, to be changed.
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let place = self.chunk_of(key);
        let at = self.chunks.get(place)?.binary_search_by(|(k, _)| k.borrow().cmp(key)).ok()?;
        let chunk = Arc::make_mut(Arc::make_mut(&mut self.chunks).get_mut(place)?);
        chunk.get_mut(at).map(|(_, value)| Arc::make_mut(value))
    }

    /// All, the values to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        let chunks = Arc::make_mut(&mut self.chunks).iter_mut();
        let entries = chunks.flat_map(|chunk| Arc::make_mut(chunk).iter_mut());
        entries.map(|(key, value)| (&*key, Arc::make_mut(value)))
    }

    /// All values, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.iter_mut().map(|(_, value)| value)
    }
}

impl<K, V> Default for Shelf<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, V> Clone for Shelf<K, V> {
    fn clone(&self) -> Self {
        Self { chunks: self.chunks.clone(), len: self.len }
    }
}

impl<K: Ord, V: PartialEq> PartialEq for Shelf<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.changed(other).is_empty()
    }
}

impl<K: Ord, V: Eq> Eq for Shelf<K, V> {}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Shelf<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Serialize, V: Serialize> Serialize for Shelf<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<K: Ord, V> From<BTreeMap<K, V>> for Shelf<K, V> {
    fn from(map: BTreeMap<K, V>) -> Self {
        let len = map.len();
        let mut chunks = Vec::new();
        let mut chunk = Vec::new();
        for (key, value) in map {
            chunk.push((key, Arc::new(value)));
            // Half full: there is room for what comes.
            if chunk.len() == MOST / 2 {
                chunks.push(Arc::new(std::mem::take(&mut chunk)));
            }
        }
        if !chunk.is_empty() {
            chunks.push(Arc::new(chunk));
        }
        Self { chunks: Arc::new(chunks), len }
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for Shelf<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        BTreeMap::from(entries).into()
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for Shelf<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        entries.into_iter().collect::<BTreeMap<K, V>>().into()
    }
}

impl<K: Ord, V> Index<&K> for Shelf<K, V> {
    type Output = V;

    /// # Panics
    /// Without such a key.
    fn index(&self, key: &K) -> &V {
        match self.get(key) {
            Some(value) => value,
            None => panic!("no entry found for key"),
        }
    }
}

/// See [`Shelf::iter`].
pub struct Iter<'a, K, V> {
    chunks: slice::Iter<'a, Arc<Chunk<K, V>>>,
    chunk: slice::Iter<'a, (K, Arc<V>)>,
}

impl<K, V> Clone for Iter<'_, K, V> {
    fn clone(&self) -> Self {
        Self { chunks: self.chunks.clone(), chunk: self.chunk.clone() }
    }
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((key, value)) = self.chunk.next() {
                return Some((key, value));
            }
            self.chunk = self.chunks.next()?.iter();
        }
    }
}

impl<'a, K, V> IntoIterator for &'a Shelf<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Iter<'a, K, V> {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u16, u8),
        Remove(u16),
        Change(u16, u8),
        /// From here on compared with this.
        Mark,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let key = || 0..400_u16;
        let step = prop_oneof![
            6 => (key(), 0..3_u8).prop_map(|(k, v)| Step::Insert(k, v)),
            3 => key().prop_map(Step::Remove),
            1 => (key(), 0..3_u8).prop_map(|(k, v)| Step::Change(k, v)),
            1 => Just(Step::Mark),
        ];
        prop::collection::vec(step, 0..600)
    }

    proptest! {
        #[test]
        fn it_is_a_sorted_map_and_tells_what_changed(
            begin in prop::collection::btree_map(0..400_u16, 0..3_u8, 0..300),
            steps in steps(),
            from in 0..400_u16,
        ) {
            let mut plain = begin.clone();
            let mut shelf: Shelf<u16, u8> = begin.clone().into();
            let mut mark = (begin, shelf.clone());
            for step in steps {
                match step {
                    Step::Insert(key, value) => {
                        plain.insert(key, value);
                        shelf.insert(key, value);
                    }
                    Step::Remove(key) => prop_assert_eq!(shelf.remove(&key), plain.remove(&key).is_some()),
                    Step::Change(key, value) => {
                        plain.get_mut(&key).into_iter().for_each(|v| *v = value);
                        shelf.get_mut(&key).into_iter().for_each(|v| *v = value);
                    }
                    Step::Mark => mark = (plain.clone(), shelf.clone()),
                }
                prop_assert!(shelf.chunks.iter().all(|c| (1..=MOST).contains(&c.len())));
            }
            let all: Vec<_> = shelf.iter().collect();
            prop_assert_eq!(&all, &plain.iter().collect::<Vec<_>>());
            prop_assert_eq!(shelf.len(), plain.len());
            prop_assert!((0..400).all(|key| shelf.get(&key) == plain.get(&key)));
            let tail: Vec<_> = shelf.starting_at(&from).collect();
            prop_assert_eq!(tail, plain.range(from..).collect::<Vec<_>>());
            let differs = |key: &u16| mark.0.get(key) != plain.get(key);
            let expected: BTreeSet<u16> = (0..400).filter(differs).collect();
            prop_assert_eq!(shelf.changed(&mark.1).into_iter().copied().collect::<BTreeSet<_>>(), expected.clone());
            prop_assert_eq!(shelf == mark.1, expected.is_empty());
            prop_assert_eq!(shelf, plain.into_iter().collect::<Shelf<_, _>>());
        }
    }
}
