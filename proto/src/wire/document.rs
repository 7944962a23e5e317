//! Signed documents.

use std::collections::{BTreeMap, BTreeSet};

use zeroize::{Zeroize, Zeroizing};

use super::{Result, WireError, array, bad, bounded, field, parse, prefix, prefix_pb, to_bytes};
use crate::model::{ClusterId, NamespacePattern, Position, Prefix, SetName};
use crate::pb;
use crate::trust::{
    Binding, Broker, Brokers, Context, Digest, Envelope, Grant, Membership, PublicKey, Revocations, Roots,
    SetId, Statement,
};

/// Encodes an envelope around its untouched payload.
pub fn encode_envelope(envelope: &Envelope) -> pb::Envelope {
    let context = match envelope.context {
        Context::Roots => pb::Context::Roots,
        Context::Grant => pb::Context::Grant,
        Context::Binding => pb::Context::Binding,
        Context::Statement => pb::Context::Statement,
        Context::Revocations => pb::Context::Revocations,
        Context::Brokers => pb::Context::Brokers,
    };
    pb::Envelope {
        context: context.into(),
        payload: envelope.payload.to_vec().into(),
        signature: envelope.signature.to_vec().into(),
    }
}

/// Takes an envelope; nothing in it is believed yet.
pub fn decode_envelope(value: &pb::Envelope) -> Result<Envelope> {
    let context = match value.context() {
        pb::Context::Roots => Context::Roots,
        pb::Context::Grant => Context::Grant,
        pb::Context::Binding => Context::Binding,
        pb::Context::Statement => Context::Statement,
        pb::Context::Revocations => Context::Revocations,
        pb::Context::Brokers => Context::Brokers,
        pb::Context::Unspecified => return Err(bad("context", "not known")),
    };
    let max = context.max_payload();
    if value.payload.len() > max {
        return Err(bad("payload", format!("{} bytes long, at most {max} are allowed", value.payload.len())));
    }
    Ok(Envelope {
        context,
        payload: value.payload.as_ref().into(),
        signature: array("signature", &value.signature)?,
    })
}

fn set_bytes(set: SetId) -> prost::bytes::Bytes {
    set.0.to_vec().into()
}

fn set(bytes: &[u8]) -> Result<SetId> {
    Ok(SetId(array("set", bytes)?))
}

fn key(bytes: &[u8]) -> Result<PublicKey> {
    let key = PublicKey(array("key", bytes)?);
    if key.is_sound() { Ok(key) } else { Err(bad("key", "not an Ed25519 key that only one can hold")) }
}

fn prefixes(name: &'static str, list: &[pb::Prefix]) -> Result<BTreeSet<Prefix>> {
    bounded(name, list, Grant::MAX_PREFIXES)?;
    list.iter().map(prefix).collect()
}

/// Payload of a roots document.
pub fn encode_roots(roots: &Roots) -> Vec<u8> {
    to_bytes(&pb::Roots {
        version: roots.version,
        name: roots.name.to_string(),
        keys: roots.keys.iter().map(|k| k.0.to_vec().into()).collect(),
        previous: roots.previous.map(|h| h.to_vec()).unwrap_or_default().into(),
    })
}

/// Reads a roots document.
pub fn decode_roots(bytes: &[u8]) -> Result<Roots> {
    let value: pb::Roots = parse(bytes)?;
    bounded("keys", &value.keys, Roots::MAX_KEYS)?;
    if value.keys.is_empty() {
        return Err(WireError::Missing("keys"));
    }
    let previous = if value.previous.is_empty() { None } else { Some(array("previous", &value.previous)?) };
    Ok(Roots {
        version: value.version,
        name: SetName::new(&value.name)?,
        keys: value.keys.iter().map(|k| key(k)).collect::<Result<_>>()?,
        previous,
    })
}

/// Payload of a grant.
pub fn encode_grant(grant: &Grant) -> Vec<u8> {
    to_bytes(&pb::Grant {
        set: set_bytes(grant.set),
        cluster: grant.cluster.to_string(),
        serial: grant.serial,
        member_since: grant.member_since,
        owned: grant.owned.iter().map(prefix_pb).collect(),
        tunnel: grant.tunnel.iter().map(prefix_pb).collect(),
        namespaces: grant.namespaces.iter().map(ToString::to_string).collect(),
        subject: grant.subject.0.to_vec().into(),
        bind_before: grant.bind_before.unwrap_or(0),
    })
}

/// Reads a grant.
pub fn decode_grant(bytes: &[u8]) -> Result<Grant> {
    let value: pb::Grant = parse(bytes)?;
    bounded("namespaces", &value.namespaces, Grant::MAX_PATTERNS)?;
    let owned = prefixes("owned", &value.owned)?;
    let tunnel = prefixes("tunnel", &value.tunnel)?;
    if let Some((a, b)) =
        owned.iter().flat_map(|a| tunnel.iter().map(move |b| (a, b))).find(|(a, b)| a.overlaps(b))
    {
        return Err(bad("tunnel", format!("{b}, which overlaps the owned range {a}")));
    }
    if value.serial == 0 {
        return Err(bad("serial", "0"));
    }
    Ok(Grant {
        set: set(&value.set)?,
        cluster: ClusterId::new(&value.cluster)?,
        serial: value.serial,
        member_since: value.member_since,
        owned,
        tunnel,
        namespaces: value.namespaces.iter().map(|p| Ok(NamespacePattern::new(p)?)).collect::<Result<_>>()?,
        subject: key(&value.subject)?,
        bind_before: (value.bind_before > 0).then_some(value.bind_before),
    })
}

/// Payload of a binding.
pub fn encode_binding(binding: &Binding) -> Vec<u8> {
    to_bytes(&pb::Binding {
        set: set_bytes(binding.set),
        cluster: binding.cluster.to_string(),
        serial: binding.serial,
        generation: binding.generation,
        key: binding.key.0.to_vec().into(),
    })
}

/// Reads a binding.
pub fn decode_binding(bytes: &[u8]) -> Result<Binding> {
    let value: pb::Binding = parse(bytes)?;
    Ok(Binding {
        set: set(&value.set)?,
        cluster: ClusterId::new(&value.cluster)?,
        serial: value.serial,
        generation: value.generation,
        key: key(&value.key)?,
    })
}

/// Encodes a membership out of its untouched envelopes.
pub fn encode_membership(membership: &Membership) -> pb::Membership {
    pb::Membership {
        grant: Some(encode_envelope(membership.grant().envelope())),
        bindings: membership.bindings().iter().map(|b| encode_envelope(b.envelope())).collect(),
    }
}

/// The envelopes of a membership, not yet believed.
pub fn decode_membership_parts(value: &pb::Membership) -> Result<(Envelope, Vec<Envelope>)> {
    bounded("bindings", &value.bindings, Membership::MAX_BINDINGS)?;
    let grant = decode_envelope(field("grant", value.grant.as_ref())?)?;
    let bindings = value.bindings.iter().map(decode_envelope).collect::<Result<_>>()?;
    Ok((grant, bindings))
}

pub(super) fn position_pb(position: Position) -> pb::Position {
    pb::Position {
        serial: position.serial,
        generation: position.generation,
        epoch: position.epoch,
        sequence: position.sequence,
    }
}

pub(super) fn position(value: &pb::Position) -> Position {
    Position {
        serial: value.serial,
        generation: value.generation,
        epoch: value.epoch,
        sequence: value.sequence,
    }
}

/// Payload of a statement.
pub fn encode_statement(statement: &Statement) -> Vec<u8> {
    to_bytes(&pb::Statement {
        set: set_bytes(statement.set),
        cluster: statement.cluster.to_string(),
        position: Some(position_pb(statement.position)),
        root: statement.root.0.to_vec().into(),
    })
}

/// Reads a statement.
pub fn decode_statement(bytes: &[u8]) -> Result<Statement> {
    let value: pb::Statement = parse(bytes)?;
    Ok(Statement {
        set: set(&value.set)?,
        cluster: ClusterId::new(&value.cluster)?,
        position: position(field("position", value.position.as_ref())?),
        root: Digest(array("root", &value.root)?),
    })
}

/// Payload of a list of revocations.
pub fn encode_revocations(list: &Revocations) -> Vec<u8> {
    to_bytes(&pb::Revocations {
        set: set_bytes(list.set),
        version: list.version,
        entries: list
            .up_to
            .iter()
            .map(|(cluster, &up_to_serial)| pb::Revocation { cluster: cluster.to_string(), up_to_serial })
            .collect(),
    })
}

/// Reads a list of revocations.
pub fn decode_revocations(bytes: &[u8]) -> Result<Revocations> {
    let value: pb::Revocations = parse(bytes)?;
    bounded("entries", &value.entries, Revocations::MAX_ENTRIES)?;
    let mut up_to = BTreeMap::new();
    for entry in &value.entries {
        let slot: &mut u64 = up_to.entry(ClusterId::new(&entry.cluster)?).or_default();
        *slot = entry.up_to_serial.max(*slot);
    }
    Ok(Revocations { set: set(&value.set)?, version: value.version, up_to })
}

/// Payload of the list of brokers.
pub fn encode_brokers(list: &Brokers) -> Vec<u8> {
    to_bytes(&pb::Brokers {
        set: set_bytes(list.set),
        version: list.version,
        brokers: list
            .brokers
            .iter()
            .map(|b| pb::Broker { address: b.address.clone(), key: b.key.0.to_vec().into() })
            .collect(),
    })
}

/// Reads the list of brokers.
pub fn decode_brokers(bytes: &[u8]) -> Result<Brokers> {
    let value: pb::Brokers = parse(bytes)?;
    bounded("brokers", &value.brokers, Brokers::MAX_BROKERS)?;
    let broker = |b: &pb::Broker| {
        if !Broker::is_address(&b.address) {
            return Err(bad("broker address", "not HOST:PORT or [IPv6]:PORT"));
        }
        Ok(Broker { address: b.address.clone(), key: key(&b.key)? })
    };
    Ok(Brokers {
        set: set(&value.set)?,
        version: value.version,
        brokers: value.brokers.iter().map(broker).collect::<Result<_>>()?,
    })
}

/// An invitation's parts, not yet believed.
pub struct InvitationParts {
    /// Versions 1, 2, ...
    pub roots: Vec<Envelope>,
    /// Where to go.
    pub brokers: Envelope,
    /// What the cluster will be.
    pub grant: Envelope,
    /// Private half of the grant's subject.
    pub invite_seed: Option<Zeroizing<[u8; 32]>>,
}

/// Encodes an invitation. The seed is the last field, so that it stands in no buffer but the result.
pub fn encode_invitation(
    roots: &[&Envelope],
    brokers: &Envelope,
    grant: &Envelope,
    invite_seed: Option<&[u8; 32]>,
) -> Zeroizing<Vec<u8>> {
    let public = pb::Invitation {
        roots: roots.iter().map(|e| encode_envelope(e)).collect(),
        brokers: Some(encode_envelope(brokers)),
        grant: Some(encode_envelope(grant)),
        invite_seed: prost::bytes::Bytes::new(),
    };
    // Room for all from the start: a vector that grows leaves its old bytes behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(prost::Message::encoded_len(&public) + 64));
    bytes.extend(to_bytes(&public));
    if let Some(seed) = invite_seed {
        bytes.extend([4 << 3 | 2, 32]); // invite_seed = 4, length-delimited
        bytes.extend(seed);
    }
    bytes
}

/// Reads an invitation.
pub fn decode_invitation(bytes: &[u8]) -> Result<InvitationParts> {
    let mut value: pb::Invitation = parse(bytes)?;
    let seed = std::mem::take(&mut value.invite_seed);
    let invite_seed =
        if seed.is_empty() { None } else { Some(array("invite_seed", &seed).map(Zeroizing::new)) };
    if let Ok(mut seed) = seed.try_into_mut() {
        seed.as_mut().zeroize();
    }
    let invite_seed = invite_seed.transpose()?;
    bounded("roots", &value.roots, crate::trust::RootChain::MAX_VERSIONS)?;
    Ok(InvitationParts {
        roots: value.roots.iter().map(decode_envelope).collect::<Result<_>>()?,
        brokers: decode_envelope(field("brokers", value.brokers.as_ref())?)?,
        grant: decode_envelope(field("grant", value.grant.as_ref())?)?,
        invite_seed,
    })
}
