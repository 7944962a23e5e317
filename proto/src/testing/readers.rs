//! What must hold of whatever the readers of bytes take: within bounds, and the same when written and read again.

use prost::Message as _;

use crate::model::{Backends, ClusterId, Endpoint, Export, NodeName, Prefix, Record, usable_address};
use crate::pb;
use crate::trust::{Brokers, Grant, Invitation, Membership, Revocations, RootChain, Roots};
use crate::wire::{self, Documents, Message};

/// Every reader, with what must hold of whatever it takes.
///
/// # Panics
/// If it does not hold.
pub fn check(bytes: &[u8]) {
    if let Ok(roots) = wire::decode_roots(bytes) {
        assert!((1..=Roots::MAX_KEYS).contains(&roots.keys.len()));
        assert!(roots.keys.iter().all(|key| key.is_sound()));
        assert_eq!(wire::decode_roots(&wire::encode_roots(&roots)), Ok(roots));
    }
    if let Ok(grant) = wire::decode_grant(bytes) {
        assert!(grant.owned.len() <= Grant::MAX_PREFIXES && grant.tunnel.len() <= Grant::MAX_PREFIXES);
        assert!(grant.namespaces.len() <= Grant::MAX_PATTERNS && grant.serial > 0);
        assert!(grant.ranges().all(ownable) && grant.subject.is_sound());
        assert!(!grant.owned.iter().any(|a| grant.tunnel.iter().any(|b| a.overlaps(b))));
        assert_eq!(wire::decode_grant(&wire::encode_grant(&grant)), Ok(grant));
    }
    if let Ok(binding) = wire::decode_binding(bytes) {
        assert!(binding.key.is_sound());
        assert_eq!(wire::decode_binding(&wire::encode_binding(&binding)), Ok(binding));
    }
    if let Ok(statement) = wire::decode_statement(bytes) {
        assert_eq!(wire::decode_statement(&wire::encode_statement(&statement)), Ok(statement));
    }
    if let Ok(list) = wire::decode_revocations(bytes) {
        assert!(list.up_to.len() <= Revocations::MAX_ENTRIES);
        assert_eq!(wire::decode_revocations(&wire::encode_revocations(&list)), Ok(list));
    }
    if let Ok(list) = wire::decode_brokers(bytes) {
        assert!(list.brokers.len() <= Brokers::MAX_BROKERS);
        assert_eq!(wire::decode_brokers(&wire::encode_brokers(&list)), Ok(list));
    }
    let node = NodeName::new("node").expect("a name");
    if let Ok(endpoint) = wire::decode_endpoint(node.clone(), bytes) {
        assert!(endpoint.candidates.len() <= 2 * Endpoint::MAX_CANDIDATES && endpoint.devices.len() <= 64);
        assert!(endpoint.prefixes.len() <= Endpoint::MAX_PREFIXES && endpoint.prefixes.iter().all(ownable));
        assert!(
            endpoint.tunnel().chain(endpoint.candidates.iter().copied()).all(|a| usable_address(a).is_ok())
        );
        assert_eq!(wire::decode_endpoint(node, &wire::encode_endpoint(&endpoint)), Ok(endpoint));
    }
    if let Ok(export) = wire::decode_export(bytes) {
        assert!(export.ports.len() <= Export::MAX_PORTS && (1..=2).contains(&export.families.len()));
        assert_eq!(wire::decode_export(&wire::encode_export(&export)), Ok(export));
    }
    if let Ok(backends) = wire::decode_backends(bytes) {
        assert!(backends.groups.iter().map(|g| g.backends.len()).sum::<usize>() <= Backends::MAX_SHARD);
        assert!(backends.addresses().into_iter().all(|a| usable_address(a).is_ok()));
        assert_eq!(wire::decode_backends(&wire::encode_backends(&backends)), Ok(backends));
    }
    if let Ok(value) = pb::Envelope::decode(bytes)
        && let Ok(envelope) = wire::decode_envelope(&value)
    {
        assert!(envelope.payload.len() <= envelope.context.max_payload());
        assert_eq!(wire::decode_envelope(&wire::encode_envelope(&envelope)), Ok(envelope));
    }
    if let Ok(value) = pb::Documents::decode(bytes)
        && let Ok(documents) = wire::decode_documents(&value)
    {
        assert!(documents.roots.len() <= RootChain::MAX_VERSIONS);
        assert!(documents.memberships.len() <= Documents::MAX_MEMBERSHIPS);
        assert!(documents.memberships.iter().all(|m| m.bindings.len() <= Membership::MAX_BINDINGS));
        assert_eq!(wire::decode_documents(&wire::encode_documents(&documents)), Ok(documents));
    }
    if let Ok(value) = pb::Message::decode(bytes)
        && let Ok(Some(message)) = wire::decode_message(&value)
    {
        if let Message::Chunk(chunk) = &message {
            assert!(chunk.records.iter().all(|r| r.body.len() <= Record::MAX_BODY));
        }
        assert_eq!(wire::decode_message(&wire::encode_message(&message)), Ok(Some(message)));
    }
    // What prost reads passes the count before it (but for groups, which proto3 does not have).
    if let (Ok(_), Err(error)) = (pb::Message::decode(bytes), wire::check_fields::<pb::Message>(bytes)) {
        assert!(error.to_string().contains("unknown wire type"), "{error}");
    }
    let _ = wire::decode_invitation(bytes).is_ok();
    let text = String::from_utf8_lossy(bytes);
    let _ = (ClusterId::new(&text).is_ok(), text.parse::<Prefix>().is_ok());
    assert!(Invitation::parse(&text).is_err());
    assert!(
        Invitation::parse(&format!("tombolo1.{}", data_encoding::BASE64URL_NOPAD.encode(bytes))).is_err()
    );
}

fn ownable(prefix: &Prefix) -> bool {
    Prefix::new(prefix.net()).is_ok()
}
