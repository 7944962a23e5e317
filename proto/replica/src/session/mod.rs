//! The exchange with one peer. The same on both sides.

mod receive;
mod send;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tombolo_proto::model::{ClusterId, Position, RecordKey, Scope};
use tombolo_proto::trust::SetId;
use tombolo_proto::wire::{Alarm, Hello, MembershipParts, Message};

use crate::origin::Candidate;
use crate::quota::Interest;
use crate::records::ScopeRecords;
use crate::refusal::Refusal;
use crate::replica::Replica;

/// How the own side presents itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Introduction {
    /// Of the program.
    pub version: String,
    /// What it can beyond this version of the protocol.
    pub features: Vec<String>,
    /// A member's proof; None for brokers.
    pub membership: Option<MembershipParts>,
}

/// Why a session ends. Whatever was verified before stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Something else than Hello came first, or something twice that comes once.
    #[error("the peer broke the order of the session: {0}")]
    Order(&'static str),
    /// The peer is of another set.
    #[error("the peer belongs to set {theirs}, we to {ours}: check which broker or token is used")]
    OtherSet {
        /// The own one.
        ours: SetId,
        /// The peer's.
        theirs: SetId,
    },
    /// What was sent does not fit what was signed: the peer or something on the way is faulty.
    #[error("what the peer sent of {origin} does not fit what {origin} signed ({what})")]
    Content {
        /// Whose.
        origin: ClusterId,
        /// What of it.
        what: String,
    },
}

/// One peer's session; see the crate's documentation for the loop around it.
#[derive(Debug)]
pub struct Session {
    introduction: Introduction,
    peer: Option<Hello>,
    peer_interest: Interest,
    peer_have: bool,
    sent: Sent,
    /// Version of the replica that was caught up with.
    seen: u64,
    talks: BTreeMap<ClusterId, Talk>,
    /// Origins that may be ahead of the peer.
    dirty: BTreeSet<ClusterId>,
    /// Origins whose stage may have to be dropped or begun.
    untended: BTreeSet<ClusterId>,
    /// The origin that had its turn last.
    turn: Option<ClusterId>,
    stream: Option<Stream>,
    /// Whether the stream had the last turn.
    streamed: bool,
    alarms: VecDeque<Alarm>,
    alarmed: BTreeSet<Alarmed>,
    refusals: Vec<Refusal>,
    peer_alarms: VecDeque<Alarm>,
}

type Alarmed = (String, String);

/// What was sent of the things that are no origin's.
#[derive(Debug, Default)]
struct Sent {
    hello: bool,
    documents: bool,
    documents_dirty: bool,
    roots: usize,
    brokers: u64,
    revocations: u64,
    memberships: BTreeMap<(ClusterId, u64), usize>,
    have: bool,
    interest: Option<Interest>,
}

/// How it stands with the peer about one origin.
#[derive(Debug, Default)]
struct Talk {
    /// The peer told that it holds this.
    peer_has: Option<Position>,
    /// The peer was sent everything up to this.
    sent: Option<Position>,
    /// The peer knows that we are here.
    told: Option<Position>,
    /// The peer asked for all leaves.
    whole: bool,
    /// Scopes that the peer asked for.
    peer_wants: BTreeSet<Scope>,
    /// What is being received.
    stage: Option<Stage>,
    /// Ask for all leaves: not yet, to do, done.
    ask_whole: Ask,
    /// The peer's newest statement was not taken; nothing is awaited.
    refused: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Ask {
    #[default]
    No,
    Due,
    Done,
}

impl Talk {
    /// The newest position from which the peer can go on.
    fn known(&self) -> Option<Position> {
        self.sent.max(self.peer_has)
    }
}

/// A newer state of an origin, waiting for records.
#[derive(Debug)]
struct Stage {
    candidate: Candidate,
    partial: BTreeMap<Scope, Partial>,
    asked: BTreeSet<Scope>,
    /// Answers that were of another position; to be asked for again when the peer has moved.
    missed: BTreeSet<Scope>,
}

#[derive(Debug, Default)]
struct Partial {
    records: ScopeRecords,
    next: u32,
}

impl Stage {
    fn new(candidate: Candidate) -> Self {
        Self { candidate, partial: BTreeMap::new(), asked: BTreeSet::new(), missed: BTreeSet::new() }
    }

    /// Bytes of all records that are held for it.
    fn bytes(&self) -> usize {
        self.candidate.bytes() + self.partial.values().map(|partial| partial.records.bytes()).sum::<usize>()
    }

    /// Goes on to a newer candidate; what was asked for is still on its way.
    fn advanced(candidate: Candidate, old: Option<Self>) -> Self {
        let mut stage = Self::new(candidate);
        if let Some(old) = old {
            stage.asked = &old.asked & stage.candidate.pending();
            stage.missed = &old.missed & stage.candidate.pending();
        }
        stage
    }
}

/// A scope on its way to the peer.
#[derive(Debug)]
struct Stream {
    origin: ClusterId,
    scope: Scope,
    records: Arc<ScopeRecords>,
    after: Option<RecordKey>,
    index: u32,
}

/// Alarms kept in each direction.
const MAX_ALARMS: usize = 32;

impl Session {
    /// A session over a new connection.
    pub fn new(introduction: Introduction) -> Self {
        Self {
            introduction,
            peer: None,
            peer_interest: Interest::Namespaces(BTreeSet::new()),
            peer_have: false,
            sent: Sent::default(),
            seen: 0,
            talks: BTreeMap::new(),
            dirty: BTreeSet::new(),
            untended: BTreeSet::new(),
            turn: None,
            stream: None,
            streamed: false,
            alarms: VecDeque::new(),
            alarmed: BTreeSet::new(),
            refusals: Vec::new(),
            peer_alarms: VecDeque::new(),
        }
    }

    /// Takes a message. On an error the session is over: close the stream and drop it.
    pub fn handle_message(&mut self, replica: &mut Replica, message: Message) -> Result<(), SessionError> {
        if self.peer.is_none() && !matches!(message, Message::Hello(_)) {
            return Err(SessionError::Order("the first message is not a hello"));
        }
        match message {
            Message::Hello(hello) => self.handle_hello(replica, hello),
            Message::Documents(documents) => {
                let refusals = replica.offer_documents(&documents);
                refusals.into_iter().for_each(|refusal| self.refuse(refusal));
                Ok(())
            }
            Message::Have(have) => self.handle_have(have),
            Message::Update(update) => self.handle_update(replica, update),
            Message::Want(want) => {
                self.handle_want(replica, want);
                Ok(())
            }
            Message::Chunk(chunk) => self.handle_chunk(replica, chunk),
            Message::Alarm(alarm) => {
                if self.peer_alarms.len() < MAX_ALARMS {
                    self.peer_alarms.push_back(alarm);
                }
                Ok(())
            }
        }
    }

    /// The next message for the peer, made now; None if there is nothing to say until the replica changes or a
    /// message comes.
    pub fn poll_transmit(&mut self, replica: &Replica) -> Option<Message> {
        if !self.sent.hello {
            self.sent.hello = true;
            return Some(Message::Hello(self.hello(replica)));
        }
        self.peer.as_ref()?;
        self.catch_up(replica);
        self.next_message(replica)
    }

    /// The peer's hello, once it came.
    pub fn peer(&self) -> Option<&Hello> {
        self.peer.as_ref()
    }

    /// Whether all that the peer had at the beginning of the session is held by now.
    pub fn is_synced(&self, replica: &Replica) -> bool {
        let behind = |(cluster, talk): (&ClusterId, &Talk)| {
            !talk.refused
                && replica.own() != Some(cluster)
                && (talk.stage.is_some()
                    || talk.peer_has > replica.origin(cluster).map(|state| state.position()))
        };
        self.peer_have && !self.talks.iter().any(behind)
    }

    /// What was refused since the last call, each once in a session.
    pub fn take_refusals(&mut self) -> Vec<Refusal> {
        std::mem::take(&mut self.refusals)
    }

    /// What the peer complained of since the last call.
    pub fn take_peer_alarms(&mut self) -> Vec<Alarm> {
        self.peer_alarms.drain(..).collect()
    }

    fn refuse(&mut self, refusal: Refusal) {
        let alarm = refusal.alarm();
        if self.alarmed.len() < 16 * MAX_ALARMS
            && self.alarmed.insert((alarm.object.clone(), alarm.reason.clone()))
        {
            if self.alarms.len() < MAX_ALARMS {
                self.alarms.push_back(alarm);
            }
            self.refusals.push(refusal);
        }
    }
}
