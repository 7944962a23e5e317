//! What comes from the peer.

use std::sync::Arc;

use tombolo_proto::model::{ClusterId, Position};
use tombolo_proto::wire::{Chunk, Have, Hello, Update, Want};

use super::{Ask, Partial, Session, SessionError, Stage, Talk};
use crate::origin::Candidate;
use crate::quota::Interest;
use crate::refusal::{Object, Reason, Refusal};
use crate::replica::{Change, Replica};

impl Session {
    pub(super) fn handle_hello(&mut self, replica: &mut Replica, hello: Hello) -> Result<(), SessionError> {
        if self.peer.is_some() {
            return Err(SessionError::Order("a second hello"));
        }
        if hello.set != replica.set() {
            return Err(SessionError::OtherSet { ours: replica.set(), theirs: hello.set });
        }
        if let Some(membership) = &hello.membership
            && let Err(refusal) = replica.offer_membership(membership)
        {
            self.refuse(refusal);
        }
        self.peer_interest = match &hello.namespaces {
            None => Interest::All,
            Some(list) => Interest::Namespaces(list.iter().cloned().collect()),
        };
        self.peer = Some(Hello { membership: None, ..hello });
        Ok(())
    }

    pub(super) fn handle_have(&mut self, have: Have) -> Result<(), SessionError> {
        if self.peer_have {
            return Err(SessionError::Order("a second list of what it has"));
        }
        self.peer_have = true;
        for (cluster, position) in have.origins {
            let talk = self.talks.entry(cluster).or_default();
            talk.peer_has = talk.peer_has.max(Some(position));
        }
        Ok(())
    }

    pub(super) fn handle_want(&mut self, replica: &Replica, want: Want) {
        match want {
            Want::Namespaces(list) => {
                self.peer_interest = Interest::Namespaces(list.into_iter().collect());
                self.dirty.extend(replica.origins().map(|(cluster, _)| cluster.clone()));
            }
            // Also of one whose statement is still to come from elsewhere.
            Want::Scopes { origin, scopes } if replica.membership(&origin).is_some() => {
                let talk = self.talks.entry(origin.clone()).or_default();
                talk.whole |= scopes.is_empty();
                let room = replica.quota().scopes.saturating_sub(talk.peer_wants.len());
                talk.peer_wants.extend(scopes.into_iter().take(room));
                self.dirty.insert(origin);
            }
            Want::Scopes { .. } => {}
        }
    }

    pub(super) fn handle_update(
        &mut self,
        replica: &mut Replica,
        update: Update,
    ) -> Result<(), SessionError> {
        let statement = match replica.statement(&update.statement) {
            Ok(statement) if statement.cluster == update.origin => statement,
            Ok(_) => {
                let what = "the statement is another cluster's".to_owned();
                return Err(SessionError::Content { origin: update.origin, what });
            }
            // Said under a membership that was given up here when newer words came: late, and no lie.
            Err(refusal) if is_outrun(replica, &update.origin, &refusal) => {
                self.untended.insert(update.origin);
                return Ok(());
            }
            Err(refusal) => {
                if let Some(talk) = self.talks.get_mut(&update.origin) {
                    talk.stage = None;
                    talk.refused = true;
                }
                self.untended.insert(update.origin);
                replica.find(&refusal);
                self.refuse(refusal);
                return Ok(());
            }
        };
        let origin = update.origin.clone();
        let target = statement.position;
        let talk = self.talks.entry(origin.clone()).or_default();
        talk.peer_has = talk.peer_has.max(Some(target));
        talk.refused = false;
        self.untended.insert(origin.clone());
        if let Some(stage) = &mut talk.stage {
            let missed = std::mem::take(&mut stage.missed);
            stage.asked.retain(|scope| !missed.contains(scope));
        }
        if update.base.is_none() {
            talk.ask_whole = Ask::No;
        }
        if replica.own() == Some(&origin) {
            replica.note_own(target);
        }
        let held = replica.origin(&origin).cloned();
        if let Some(held) = held.as_ref().filter(|held| held.position() >= target) {
            if held.position() == target && held.statement().root != statement.root {
                self.refuse_statement(replica, &origin, Reason::Equivocation(format!("position {target}")));
            }
            return Ok(());
        }
        if replica.own() == Some(&origin) {
            return Ok(());
        }
        if let Some(reason) = replica.below_floor(&statement) {
            // The peer is behind what is known here, or lies; either way its next statement may be better.
            talk.refused = true;
            self.refuse_statement(replica, &origin, reason);
            return Ok(());
        }

        let old = talk.stage.take();
        let wanted = replica.wanted(&origin);
        let quota = replica.quota();
        let candidate = match update.base {
            None => {
                let mut leaves = std::collections::BTreeMap::new();
                leaves.extend(update.leaves.into_iter().filter_map(|(scope, leaf)| Some((scope, leaf?))));
                let staged = old.as_ref().map(|stage| stage.candidate.state());
                let sources: Vec<_> = staged.into_iter().chain(held.as_deref()).collect();
                let hash = update.namespaces_hash;
                Candidate::whole(statement, leaves, hash, wanted, &sources, quota)
            }
            Some(base) => {
                let fits = |position: Position| base <= position && position < target;
                let staged = old.as_ref().map(|stage| stage.candidate.state());
                let from = staged.into_iter().chain(held.as_deref()).find(|state| fits(state.position()));
                match from.map(|from| Candidate::delta(from, statement, update, wanted, quota)) {
                    Some(Err(Reason::Content(_))) | None => {
                        // Unknown base, or the peer's history is not ours: begin again from all leaves.
                        if talk.ask_whole == Ask::No {
                            talk.ask_whole = Ask::Due;
                        }
                        return Ok(());
                    }
                    Some(result) => result,
                }
            }
        };
        match candidate {
            Ok(candidate) => {
                talk.stage = Some(Stage::advanced(candidate, old));
                self.settle(replica, &origin);
                Ok(())
            }
            Err(Reason::Content(what)) => Err(SessionError::Content { origin, what }),
            Err(reason) => {
                self.drop_stage(replica, &origin, reason);
                Ok(())
            }
        }
    }

    pub(super) fn handle_chunk(&mut self, replica: &mut Replica, chunk: Chunk) -> Result<(), SessionError> {
        let Chunk { origin, scope, index, last, records } = chunk;
        let Some(talk) = self.talks.get_mut(&origin) else { return Ok(()) };
        let peer_has = talk.peer_has;
        let Some(stage) = &mut talk.stage else { return Ok(()) };
        let Some(leaf) = stage.candidate.awaited(&scope) else { return Ok(()) };
        if peer_has != Some(stage.candidate.position()) {
            // Of a position that is not the one awaited.
            stage.partial.remove(&scope);
            stage.missed.insert(scope);
            return Ok(());
        }
        if index == 0 {
            stage.partial.insert(scope.clone(), Partial::default());
        }
        let Some(partial) = stage.partial.get_mut(&scope).filter(|partial| partial.next == index) else {
            // The rest of an answer whose beginning was passed over.
            return Ok(());
        };
        partial.next += 1;
        records.into_iter().for_each(|record| partial.records.insert(record));
        let error = |what: String| SessionError::Content { origin: origin.clone(), what };
        if partial.records.len() as u64 > leaf.count {
            return Err(error(format!("too many records in {scope}")));
        }
        let over = stage.bytes() > replica.quota().bytes;
        if last && !over {
            let records = stage.partial.remove(&scope).map(|partial| partial.records).unwrap_or_default();
            stage.asked.remove(&scope);
            match stage.candidate.take(&scope, Arc::new(records)) {
                Ok(()) => self.settle(replica, &origin),
                Err(Reason::Content(what)) => return Err(error(what)),
                Err(reason) => self.drop_stage(replica, &origin, reason),
            }
        } else if over {
            let max = replica.quota().bytes;
            self.drop_stage(replica, &origin, Reason::Quota { what: "bytes of records", max });
        }
        Ok(())
    }

    fn drop_stage(&mut self, replica: &mut Replica, origin: &ClusterId, reason: Reason) {
        if let Some(talk) = self.talks.get_mut(origin) {
            talk.stage = None;
            talk.refused = true;
        }
        self.refuse_statement(replica, origin, reason);
    }

    fn refuse_statement(&mut self, replica: &mut Replica, origin: &ClusterId, reason: Reason) {
        let refusal = Refusal::new(Object::Statement(origin.clone()), reason);
        replica.find(&refusal);
        self.refuse(refusal);
    }

    /// Makes a stage count if nothing is missing.
    fn settle(&mut self, replica: &mut Replica, origin: &ClusterId) {
        let Some(talk) = self.talks.get_mut(origin) else { return };
        if let Some(stage) = talk.stage.take_if(|stage| stage.candidate.pending().is_empty())
            && let Some(state) = stage.candidate.complete()
        {
            replica.commit(state);
        }
    }

    /// Looks at what changed in the replica since the last time.
    pub(super) fn catch_up(&mut self, replica: &Replica) {
        let mut tend = std::mem::take(&mut self.untended);
        for change in replica.changes_since(self.seen) {
            match change {
                Change::Documents => self.sent.documents_dirty = true,
                Change::Interest => {
                    for (cluster, talk) in &mut self.talks {
                        if let Some(stage) = &mut talk.stage {
                            let held = replica.origin(cluster);
                            let sources: Vec<_> = held.map(|held| &**held).into_iter().collect();
                            stage.candidate.refocus(replica.wanted(cluster), &sources);
                            stage.partial.retain(|scope, _| stage.candidate.pending().contains(scope));
                            stage.asked.retain(|scope| stage.candidate.pending().contains(scope));
                        }
                    }
                    tend.extend(replica.origins().map(|(cluster, _)| cluster.clone()));
                }
                Change::Origin(cluster) if replica.origin(cluster).is_some() => {
                    tend.insert(cluster.clone());
                    self.dirty.insert(cluster.clone());
                }
                Change::Origin(cluster) => {
                    // Revoked: what comes next is another beginning.
                    if let Some(talk) = self.talks.get_mut(cluster) {
                        *talk = Talk { peer_has: talk.peer_has, sent: talk.sent, ..Talk::default() };
                    }
                    self.stream.take_if(|stream| stream.origin == *cluster);
                }
            }
        }
        tend.iter().for_each(|cluster| self.tend(replica, cluster));
        self.seen = replica.version();
    }

    /// Drops a stage that was overtaken, and begins one for scopes that are wanted and missing.
    fn tend(&mut self, replica: &Replica, cluster: &ClusterId) {
        let Some(held) = replica.origin(cluster) else { return };
        let talk = self.talks.entry(cluster.clone()).or_default();
        let complete = replica.is_complete(cluster);
        let position = held.position();
        talk.stage.take_if(|stage| {
            let staged = stage.candidate.position();
            staged < position || (staged == position && complete)
        });
        if talk.stage.is_none() && !complete && talk.ask_whole == Ask::No && !talk.refused {
            let fill = Candidate::fill(held, replica.wanted(cluster), replica.quota());
            talk.stage = Some(Stage::new(fill));
        }
    }
}

/// Whether what was refused was said under an older membership than what is held.
fn is_outrun(replica: &Replica, origin: &ClusterId, refusal: &Refusal) -> bool {
    let Reason::NoMembership { serial } = refusal.reason else { return false };
    refusal.object == Object::Statement(origin.clone())
        && replica.origin(origin).is_some_and(|held| held.position().serial > serial)
}
