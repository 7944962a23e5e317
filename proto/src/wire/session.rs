//! Messages of a session.

use std::sync::Arc;

use super::document::{position, position_pb};
use super::{
    Result, WireError, array, bad, bounded, decode_envelope, decode_membership_parts, encode_envelope, field,
};
use crate::model::{ClusterId, Namespace, Position, Record, RecordKey, Scope};
use crate::pb;
use crate::trust::{Digest, Envelope, Leaf, RootChain, ScopeDigest, SetId};

/// What is said in a session. Parsed and bounded; signatures are not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The first.
    Hello(Hello),
    /// The set's own documents.
    Documents(Documents),
    /// What the sender holds.
    Have(Have),
    /// A newer statement.
    Update(Update),
    /// Asks for scopes.
    Want(Want),
    /// A part of a scope.
    Chunk(Chunk),
    /// Something the receiver should know.
    Alarm(Alarm),
}

/// A grant and its bindings, not yet believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembershipParts {
    /// Signed by a root.
    pub grant: Envelope,
    /// Generations 0, 1, ...
    pub bindings: Vec<Envelope>,
}

/// The first message of each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Of which set the sender is.
    pub set: SetId,
    /// What it can beyond this version.
    pub features: Vec<String>,
    /// A member's proof, together with its TLS key.
    pub membership: Option<MembershipParts>,
    /// Its program's version.
    pub version: String,
    /// Namespaces whose records it wants; None = all.
    pub namespaces: Option<Vec<Namespace>>,
}

/// The set's own documents; told before any origin.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Documents {
    /// Versions of the roots.
    pub roots: Vec<Envelope>,
    /// The list of brokers.
    pub brokers: Option<Envelope>,
    /// The list of revocations.
    pub revocations: Option<Envelope>,
    /// Memberships.
    pub memberships: Vec<MembershipParts>,
}

impl Documents {
    /// Memberships of one message.
    pub const MAX_MEMBERSHIPS: usize = 1024;
}

/// Positions that the sender holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Have {
    /// By origin.
    pub origins: Vec<(ClusterId, Position)>,
}

/// A newer statement of an origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// Who speaks.
    pub origin: ClusterId,
    /// The position that the deltas start from; None: all leaves, no deltas.
    pub base: Option<Position>,
    /// The final statement.
    pub statement: Envelope,
    /// Leaves that changed, or all. None = the scope is empty now.
    pub leaves: Vec<(Scope, Option<ScopeDigest>)>,
    /// Changes of records.
    pub deltas: Vec<ScopeDelta>,
    /// Hash over the leaves of all namespaces under the final statement.
    pub namespaces_hash: Digest,
}

/// Changes of a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScopeDelta {
    /// Which.
    pub scope: Scope,
    /// New or changed.
    pub upserts: Vec<Record>,
    /// Gone.
    pub removed: Vec<RecordKey>,
}

/// Asks for whole scopes, or tells which namespaces the sender now wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// Whole scopes of an origin.
    Scopes {
        /// Whose.
        origin: ClusterId,
        /// Which.
        scopes: Vec<Scope>,
    },
    /// Replaces the namespaces of the hello.
    Namespaces(Vec<Namespace>),
}

/// A part of a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub origin: ClusterId,
    /// Which.
    pub scope: Scope,
    /// From 0.
    pub index: u32,
    /// Nothing follows.
    pub last: bool,
    /// Its records.
    pub records: Vec<Record>,
}

/// Something the receiver should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    /// On what.
    pub object: String,
    /// What and why.
    pub reason: String,
}

/// Namespaces of a cluster: more is not listed in one message.
const MAX_NAMESPACES: usize = 20_000;
/// Records of one message; their bytes are bounded by the message's.
const MAX_RECORDS: usize = 100_000;
/// Origins.
const MAX_ORIGINS: usize = 10_000;

fn namespaces(list: &[String]) -> Result<Vec<Namespace>> {
    bounded("namespaces", list, MAX_NAMESPACES)?;
    list.iter().map(|n| Ok(Namespace::new(n)?)).collect()
}

fn membership(value: &pb::Membership) -> Result<MembershipParts> {
    let (grant, bindings) = decode_membership_parts(value)?;
    Ok(MembershipParts { grant, bindings })
}

fn membership_pb(parts: &MembershipParts) -> pb::Membership {
    pb::Membership {
        grant: Some(encode_envelope(&parts.grant)),
        bindings: parts.bindings.iter().map(encode_envelope).collect(),
    }
}

fn scope(value: Option<&pb::Scope>) -> Result<Scope> {
    let value = field("scope", value)?;
    match value.kind() {
        pb::ScopeKind::Nodes if value.name.is_empty() => Ok(Scope::Nodes),
        pb::ScopeKind::Namespace => Ok(Scope::Namespace(Namespace::new(&value.name)?)),
        pb::ScopeKind::Nodes | pb::ScopeKind::Unspecified => Err(bad("scope", "not known")),
    }
}

fn scope_pb(scope: &Scope) -> pb::Scope {
    match scope {
        Scope::Nodes => pb::Scope { kind: pb::ScopeKind::Nodes.into(), name: String::new() },
        Scope::Namespace(n) => pb::Scope { kind: pb::ScopeKind::Namespace.into(), name: n.to_string() },
    }
}

fn record_key(value: Option<&pb::RecordKey>) -> Result<RecordKey> {
    let value = field("key", value)?;
    let parts: Vec<&str> = value.name.iter().map(String::as_str).collect();
    RecordKey::new(value.kind, &parts).ok_or_else(|| bad("key", "not a record key"))
}

fn record_key_pb(key: &RecordKey) -> pb::RecordKey {
    pb::RecordKey { kind: key.kind(), name: key.name().iter().map(|p| p.to_string()).collect() }
}

fn record(value: &pb::Record) -> Result<Record> {
    if value.body.len() > Record::MAX_BODY {
        return Err(bad(
            "body",
            format!("{} bytes long, at most {} are allowed", value.body.len(), Record::MAX_BODY),
        ));
    }
    Ok(Record { key: record_key(value.key.as_ref())?, body: Arc::from(value.body.as_ref()) })
}

fn record_pb(record: &Record) -> pb::Record {
    pb::Record { key: Some(record_key_pb(&record.key)), body: record.body.to_vec().into() }
}

fn records(list: &[pb::Record]) -> Result<Vec<Record>> {
    bounded("records", list, MAX_RECORDS)?;
    list.iter().map(record).collect()
}

fn leaf(value: &pb::Leaf) -> Result<(Scope, Option<ScopeDigest>)> {
    let scope = scope(value.scope.as_ref())?;
    if value.count == 0 {
        return Ok((scope, None));
    }
    let digest = Digest(array("digest", &value.digest)?);
    Ok((scope, Some(ScopeDigest { count: value.count, digest })))
}

/// All leaves of a map, for an [`Update`].
impl From<Leaf> for (Scope, Option<ScopeDigest>) {
    fn from(leaf: Leaf) -> Self {
        (leaf.scope, Some(leaf.content))
    }
}

/// Reads the set's own documents.
pub fn decode_documents(value: &pb::Documents) -> Result<Documents> {
    bounded("roots", &value.roots, RootChain::MAX_VERSIONS)?;
    bounded("memberships", &value.memberships, Documents::MAX_MEMBERSHIPS)?;
    Ok(Documents {
        roots: value.roots.iter().map(decode_envelope).collect::<Result<_>>()?,
        brokers: value.brokers.as_ref().map(decode_envelope).transpose()?,
        revocations: value.revocations.as_ref().map(decode_envelope).transpose()?,
        memberships: value.memberships.iter().map(membership).collect::<Result<_>>()?,
    })
}

/// Encodes the set's own documents.
pub fn encode_documents(documents: &Documents) -> pb::Documents {
    pb::Documents {
        roots: documents.roots.iter().map(encode_envelope).collect(),
        brokers: documents.brokers.as_ref().map(encode_envelope),
        revocations: documents.revocations.as_ref().map(encode_envelope),
        memberships: documents.memberships.iter().map(membership_pb).collect(),
    }
}

/// Reads a message. None for one of a kind that this version does not know: to be passed over.
pub fn decode_message(value: &pb::Message) -> Result<Option<Message>> {
    use pb::message::Kind;
    let Some(kind) = &value.kind else { return Ok(None) };
    Ok(Some(match kind {
        Kind::Hello(hello) => {
            bounded("features", &hello.features, 64)?;
            let word = |w: &String| w.len() <= 64 && w.bytes().all(|b| b.is_ascii_graphic());
            if !word(&hello.version) || !hello.features.iter().all(word) {
                return Err(bad("version or features", "longer than 64 bytes or not printable ASCII"));
            }
            Message::Hello(Hello {
                set: SetId(array("set", &hello.set)?),
                features: hello.features.clone(),
                membership: hello.membership.as_ref().map(membership).transpose()?,
                version: hello.version.clone(),
                namespaces: if hello.all_namespaces { None } else { Some(namespaces(&hello.namespaces)?) },
            })
        }
        Kind::Documents(documents) => Message::Documents(decode_documents(documents)?),
        Kind::Have(have) => {
            bounded("origins", &have.origins, MAX_ORIGINS)?;
            let held = |h: &pb::Held| {
                Ok((ClusterId::new(&h.cluster)?, position(field("position", h.position.as_ref())?)))
            };
            Message::Have(Have { origins: have.origins.iter().map(held).collect::<Result<_>>()? })
        }
        Kind::Update(update) => {
            bounded("leaves", &update.leaves, MAX_NAMESPACES)?;
            bounded("deltas", &update.deltas, MAX_NAMESPACES)?;
            let delta = |d: &pb::ScopeDelta| {
                bounded("removed", &d.removed, MAX_RECORDS)?;
                Ok(ScopeDelta {
                    scope: scope(d.scope.as_ref())?,
                    upserts: records(&d.upserts)?,
                    removed: d.removed.iter().map(|k| record_key(Some(k))).collect::<Result<_>>()?,
                })
            };
            Message::Update(Update {
                origin: ClusterId::new(&update.origin)?,
                base: update.base.as_ref().map(position),
                statement: decode_envelope(field("statement", update.statement.as_ref())?)?,
                leaves: update.leaves.iter().map(leaf).collect::<Result<_>>()?,
                deltas: update.deltas.iter().map(delta).collect::<Result<_>>()?,
                namespaces_hash: Digest(array("namespaces_hash", &update.namespaces_hash)?),
            })
        }
        Kind::Want(want) if want.set_namespaces => {
            Message::Want(Want::Namespaces(namespaces(&want.namespaces)?))
        }
        Kind::Want(want) => {
            bounded("scopes", &want.scopes, MAX_NAMESPACES)?;
            Message::Want(Want::Scopes {
                origin: ClusterId::new(&want.origin)?,
                scopes: want.scopes.iter().map(|s| scope(Some(s))).collect::<Result<_>>()?,
            })
        }
        Kind::Chunk(chunk) => Message::Chunk(Chunk {
            origin: ClusterId::new(&chunk.origin)?,
            scope: scope(chunk.scope.as_ref())?,
            index: chunk.index,
            last: chunk.last,
            records: records(&chunk.records)?,
        }),
        Kind::Alarm(alarm) => {
            Message::Alarm(Alarm { object: printable(&alarm.object)?, reason: printable(&alarm.reason)? })
        }
    }))
}

fn printable(text: &str) -> Result<String> {
    if text.len() > 1024 || text.chars().any(char::is_control) {
        return Err(WireError::Field {
            field: "alarm",
            problem: "longer than 1024 bytes or not printable".to_owned(),
        });
    }
    Ok(text.to_owned())
}

/// Encodes a message.
pub fn encode_message(message: &Message) -> pb::Message {
    use pb::message::Kind;
    let kind = match message {
        Message::Hello(hello) => Kind::Hello(pb::Hello {
            set: hello.set.0.to_vec().into(),
            features: hello.features.clone(),
            membership: hello.membership.as_ref().map(membership_pb),
            version: hello.version.clone(),
            namespaces: hello.namespaces.iter().flatten().map(ToString::to_string).collect(),
            all_namespaces: hello.namespaces.is_none(),
        }),
        Message::Documents(documents) => Kind::Documents(encode_documents(documents)),
        Message::Have(have) => Kind::Have(pb::Have {
            origins: have
                .origins
                .iter()
                .map(|(cluster, p)| pb::Held {
                    cluster: cluster.to_string(),
                    position: Some(position_pb(*p)),
                })
                .collect(),
        }),
        Message::Update(update) => Kind::Update(pb::Update {
            origin: update.origin.to_string(),
            base: update.base.map(position_pb),
            statement: Some(encode_envelope(&update.statement)),
            leaves: update
                .leaves
                .iter()
                .map(|(scope, content)| pb::Leaf {
                    scope: Some(scope_pb(scope)),
                    count: content.map_or(0, |c| c.count),
                    digest: content.map(|c| c.digest.0.to_vec()).unwrap_or_default().into(),
                })
                .collect(),
            deltas: update
                .deltas
                .iter()
                .map(|d| pb::ScopeDelta {
                    scope: Some(scope_pb(&d.scope)),
                    upserts: d.upserts.iter().map(record_pb).collect(),
                    removed: d.removed.iter().map(record_key_pb).collect(),
                })
                .collect(),
            namespaces_hash: update.namespaces_hash.0.to_vec().into(),
        }),
        Message::Want(Want::Scopes { origin, scopes }) => Kind::Want(pb::Want {
            origin: origin.to_string(),
            scopes: scopes.iter().map(scope_pb).collect(),
            set_namespaces: false,
            namespaces: Vec::new(),
        }),
        Message::Want(Want::Namespaces(namespaces)) => Kind::Want(pb::Want {
            origin: String::new(),
            scopes: Vec::new(),
            set_namespaces: true,
            namespaces: namespaces.iter().map(ToString::to_string).collect(),
        }),
        Message::Chunk(chunk) => Kind::Chunk(pb::Chunk {
            origin: chunk.origin.to_string(),
            scope: Some(scope_pb(&chunk.scope)),
            index: chunk.index,
            last: chunk.last,
            records: chunk.records.iter().map(record_pb).collect(),
        }),
        Message::Alarm(alarm) => {
            Kind::Alarm(pb::Alarm { object: alarm.object.clone(), reason: alarm.reason.clone() })
        }
    };
    pb::Message { kind: Some(kind) }
}
