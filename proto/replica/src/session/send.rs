//! What goes to the peer. Every message is made when it can be sent, from what is newest then.

use std::collections::BTreeMap;
use std::ops::Bound;

use tombolo_proto::model::{ClusterId, Record};
use tombolo_proto::wire::{Chunk, Documents, Have, Hello, Message, ScopeDelta, Update, Want};

use super::{Ask, Session, Stream};
use crate::document::parts;
use crate::history::Touched;
use crate::origin::OriginState;
use crate::quota::Interest;
use crate::records::key_size;
use crate::replica::Replica;

/// Bytes of records in a chunk or in an update's deltas.
const MAX_BYTES: usize = 1024 * 1024;
/// Bytes of one `Want`'s scopes or one message's memberships, roughly.
const MAX_LISTED: usize = 1024;

impl Session {
    pub(super) fn hello(&mut self, replica: &Replica) -> Hello {
        self.sent.interest = Some(replica.interest().clone());
        Hello {
            set: replica.set(),
            features: self.introduction.features.clone(),
            membership: self.introduction.membership.clone(),
            version: self.introduction.version.clone(),
            namespaces: match replica.interest() {
                Interest::All => None,
                Interest::Namespaces(list) => Some(list.iter().cloned().collect()),
            },
        }
    }

    pub(super) fn next_message(&mut self, replica: &Replica) -> Option<Message> {
        if let Some(documents) = self.documents(replica) {
            return Some(Message::Documents(documents));
        }
        if !self.sent.have {
            self.sent.have = true;
            return Some(Message::Have(self.have(replica)));
        }
        if let Some(alarm) = self.alarms.pop_front() {
            return Some(Message::Alarm(alarm));
        }
        if let Some(want) = self.want(replica) {
            return Some(Message::Want(want));
        }
        if !self.peer_have {
            return None;
        }
        // By turns, so that neither many small updates nor one large scope holds back the other.
        self.streamed = !self.streamed;
        if self.streamed {
            self.chunk(replica).or_else(|| self.update(replica))
        } else {
            self.update(replica).or_else(|| self.chunk(replica))
        }
    }

    /// Documents that the peer was not sent yet, a bounded part at a time.
    fn documents(&mut self, replica: &Replica) -> Option<Documents> {
        let sent = &mut self.sent;
        if sent.documents && !sent.documents_dirty {
            return None;
        }
        let mut documents = Documents {
            roots: replica.roots().envelopes().skip(sent.roots).cloned().collect(),
            ..Documents::default()
        };
        sent.roots += documents.roots.len();
        if let Some(list) = replica.brokers().filter(|list| list.version > sent.brokers) {
            sent.brokers = list.version;
            documents.brokers = Some(list.envelope().clone());
        }
        if let Some(list) = replica.revocations().filter(|list| list.version > sent.revocations) {
            sent.revocations = list.version;
            documents.revocations = Some(list.envelope().clone());
        }
        let mut room = MAX_LISTED;
        for membership in replica.memberships() {
            let count = membership.bindings().len();
            let known = sent
                .memberships
                .entry((membership.cluster().clone(), membership.grant().serial))
                .or_default();
            if *known == count {
                continue;
            }
            // A grant may be 64 KiB, a binding is about 200 bytes; a thousand bindings' worth a message.
            let weight = 1 + count + membership.grant().envelope().payload.len() / 512;
            if room < weight && !documents.memberships.is_empty() {
                room = 0;
                break;
            }
            room = room.saturating_sub(weight);
            *known = count;
            documents.memberships.push(parts(membership));
        }
        sent.documents_dirty = room == 0;
        let first = !std::mem::replace(&mut sent.documents, true);
        (first || documents != Documents::default()).then_some(documents)
    }

    fn have(&mut self, replica: &Replica) -> Have {
        let mut have = Have::default();
        for (cluster, state) in replica.origins() {
            self.talks.entry(cluster.clone()).or_default().told = Some(state.position());
            have.origins.push((cluster.clone(), state.position()));
            self.dirty.insert(cluster.clone());
        }
        have
    }

    fn want(&mut self, replica: &Replica) -> Option<Want> {
        if let Interest::Namespaces(list) = replica.interest()
            && self.sent.interest.as_ref() != Some(replica.interest())
        {
            self.sent.interest = Some(replica.interest().clone());
            return Some(Want::Namespaces(list.iter().cloned().collect()));
        }
        for (origin, talk) in &mut self.talks {
            if talk.ask_whole == Ask::Due {
                talk.ask_whole = Ask::Done;
                return Some(Want::Scopes { origin: origin.clone(), scopes: Vec::new() });
            }
            let Some(stage) = &mut talk.stage else { continue };
            let pending = stage.candidate.pending();
            let scopes: Vec<_> = pending.difference(&stage.asked).take(MAX_LISTED).cloned().collect();
            if !scopes.is_empty() {
                stage.asked.extend(scopes.iter().cloned());
                return Some(Want::Scopes { origin: origin.clone(), scopes });
            }
        }
        None
    }

    /// The next part of a scope on its way, or of one that the peer asked for.
    fn chunk(&mut self, replica: &Replica) -> Option<Message> {
        if self.stream.is_none() {
            self.stream = self.next_stream(replica);
        }
        let stream = self.stream.as_mut()?;
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut last = true;
        for (key, body) in stream.records.after(stream.after.as_ref()) {
            bytes += key_size(key) + body.len();
            if bytes > MAX_BYTES && !records.is_empty() {
                last = false;
                break;
            }
            records.push(Record { key: key.clone(), body: body.clone() });
        }
        let index = stream.index;
        stream.index += 1;
        stream.after = records.last().map(|record| record.key.clone());
        let (origin, scope) = (stream.origin.clone(), stream.scope.clone());
        if last {
            self.dirty.insert(origin.clone());
            self.stream = None;
        }
        Some(Message::Chunk(Chunk { origin, scope, index, last, records }))
    }

    fn next_stream(&mut self, replica: &Replica) -> Option<Stream> {
        for (origin, talk) in &mut self.talks {
            if talk.peer_wants.is_empty() {
                continue;
            }
            let Some(state) = replica.origin(origin) else { continue };
            // The peer reads a chunk as of the position it was told last.
            if talk.told != Some(state.position()) || talk.peer_has > Some(state.position()) || talk.whole {
                continue;
            }
            talk.peer_wants.retain(|scope| state.leaves().contains_key(scope));
            let ready = talk.peer_wants.iter().find_map(|scope| Some((scope, state.records(scope)?)));
            let Some((scope, records)) = ready else { continue };
            let (scope, records) = (scope.clone(), records.clone());
            talk.peer_wants.remove(&scope);
            return Some(Stream { origin: origin.clone(), scope, records, after: None, index: 0 });
        }
        None
    }

    /// An update of the next origin in turn that is ahead of the peer.
    fn update(&mut self, replica: &Replica) -> Option<Message> {
        let streaming = self.stream.as_ref().map(|stream| stream.origin.clone());
        loop {
            let after = self.turn.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
            let next = self
                .dirty
                .range::<ClusterId, _>((after, Bound::Unbounded))
                .chain(&self.dirty)
                .find(|cluster| streaming.as_ref() != Some(cluster))
                .cloned()?;
            self.dirty.remove(&next);
            self.turn = Some(next.clone());
            if let Some(update) = self.update_of(replica, &next) {
                return Some(Message::Update(update));
            }
        }
    }

    fn update_of(&mut self, replica: &Replica, cluster: &ClusterId) -> Option<Update> {
        let state = replica.origin(cluster)?;
        let position = state.position();
        let talk = self.talks.entry(cluster.clone()).or_default();
        let ahead = talk.known() < Some(position);
        let tell =
            !talk.peer_wants.is_empty() && talk.told != Some(position) && talk.peer_has <= Some(position);
        if !(ahead || tell || talk.whole) {
            return None;
        }
        // Who does not hold all that the peer wants cannot bring it to this statement.
        if !state.missing(|scope| self.peer_interest.wants(scope)).is_empty() {
            return None;
        }
        let base = talk.known().filter(|_| ahead && !talk.whole);
        let touched = base.and_then(|base| Some((base, replica.touched_since(cluster, base)?)));
        talk.whole = false;
        talk.sent = talk.sent.max(Some(position));
        talk.told = Some(position);
        let mut update = Update {
            origin: cluster.clone(),
            base: None,
            statement: state.statement().envelope().clone(),
            leaves: Vec::new(),
            deltas: Vec::new(),
            namespaces_hash: state.namespaces_hash(),
        };
        match touched {
            None => {
                update.leaves =
                    state.leaves().iter().map(|(scope, leaf)| (scope.clone(), Some(*leaf))).collect();
            }
            Some((base, touched)) => {
                update.base = Some(base);
                update.leaves =
                    touched.keys().map(|scope| (scope.clone(), state.leaves().get(scope).copied())).collect();
                update.deltas = deltas(state, touched, &self.peer_interest);
            }
        }
        Some(update)
    }
}

/// The changes of the scopes that the peer wants. A scope whose changes are unknown or do not fit is left out:
/// the peer sees by the leaf that it must ask for it.
fn deltas(state: &OriginState, touched: Touched, interest: &Interest) -> Vec<ScopeDelta> {
    let mut result = Vec::new();
    let mut room = MAX_BYTES;
    let mut by_size: BTreeMap<(usize, usize), ScopeDelta> = BTreeMap::new();
    for (scope, keys) in touched {
        let Some(keys) = keys.filter(|_| interest.wants(&scope)) else { continue };
        let Some(records) = state.records(&scope) else { continue };
        let mut delta = ScopeDelta { scope, upserts: Vec::new(), removed: Vec::new() };
        let mut bytes = 128;
        for key in keys {
            bytes += key_size(&key);
            match records.get(&key) {
                Some(body) => {
                    bytes += body.len();
                    delta.upserts.push(Record { key, body: body.clone() });
                }
                None => delta.removed.push(key),
            }
        }
        by_size.insert((bytes, by_size.len()), delta);
    }
    for ((bytes, _), delta) in by_size {
        if bytes > room {
            break;
        }
        room -= bytes;
        result.push(delta);
    }
    result
}
