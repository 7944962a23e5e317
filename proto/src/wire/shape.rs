//! How many things a message holds, counted before it is read.
//!
//! Two bytes of protobuf can make a value of 72 bytes in memory: 4 MiB of empty envelopes would become
//! 150 MiB, for whoever connects. Counting first costs a pass over the bytes and no memory.

use super::{Result, WireError};
use crate::pb;

/// Fields of one message of a session or call, at all levels that are read at once.
pub const MAX_FIELDS: usize = 400_000;

/// A message that comes from outside, and what in it are messages again.
pub trait Shaped {
    /// Its fields that hold messages.
    const SHAPE: Shape;
}

/// Fields that hold messages, and the shapes of these.
#[derive(Debug, Clone, Copy)]
pub struct Shape(&'static [(u64, Self)]);

const FLAT: Shape = Shape(&[]);
const MEMBERSHIP: Shape = Shape(&[(1, FLAT), (2, FLAT)]);
const DOCUMENTS: Shape = Shape(&[(1, FLAT), (2, FLAT), (3, FLAT), (4, MEMBERSHIP)]);
const RECORD: Shape = Shape(&[(1, FLAT)]);
const DELTA: Shape = Shape(&[(1, FLAT), (2, RECORD), (3, FLAT)]);
const UPDATE: Shape = Shape(&[(2, FLAT), (3, FLAT), (4, Shape(&[(1, FLAT)])), (5, DELTA)]);
const MESSAGE: Shape = Shape(&[
    (1, Shape(&[(3, MEMBERSHIP)])),
    (2, DOCUMENTS),
    (3, Shape(&[(1, Shape(&[(2, FLAT)]))])),
    (4, UPDATE),
    (5, Shape(&[(2, FLAT)])),
    (6, Shape(&[(2, FLAT), (5, RECORD)])),
    (7, FLAT),
]);

impl Shaped for pb::Message {
    const SHAPE: Shape = MESSAGE;
}
impl Shaped for pb::OfferRequest {
    const SHAPE: Shape = Shape(&[(1, DOCUMENTS)]);
}
impl Shaped for pb::OfferResponse {
    const SHAPE: Shape = Shape(&[(1, FLAT)]);
}
impl Shaped for pb::FetchRequest {
    const SHAPE: Shape = FLAT;
}
impl Shaped for pb::FetchResponse {
    const SHAPE: Shape = Shape(&[(1, DOCUMENTS)]);
}

/// Reads a message whole from bytes, if it holds no more than [`MAX_FIELDS`] fields.
pub fn decode_shaped<M: Shaped + prost::Message + Default>(bytes: prost::bytes::Bytes) -> Result<M> {
    check_fields::<M>(&bytes)?;
    M::decode(bytes).map_err(|error| WireError::Protobuf(error.to_string()))
}

/// Refuses bytes that would be read as more than [`MAX_FIELDS`] fields.
pub fn check_fields<M: Shaped>(bytes: &[u8]) -> Result<()> {
    let mut count = 0;
    M::SHAPE.count(bytes, &mut count)
}

impl Shape {
    fn count(self, mut bytes: &[u8], count: &mut usize) -> Result<()> {
        while !bytes.is_empty() {
            *count += 1;
            if *count > MAX_FIELDS {
                return Err(WireError::TooMany { field: "message", count: *count, max: MAX_FIELDS });
            }
            let tag = varint(&mut bytes)?;
            match tag & 7 {
                0 => drop(varint(&mut bytes)?),
                1 => drop(take(&mut bytes, 8)?),
                2 => {
                    let length = varint(&mut bytes)?;
                    let content = take(&mut bytes, usize::try_from(length).unwrap_or(usize::MAX))?;
                    if let Some((_, shape)) = self.0.iter().find(|(field, _)| *field == tag >> 3) {
                        shape.count(content, count)?;
                    }
                }
                5 => drop(take(&mut bytes, 4)?),
                // Groups have been out of use since proto3; nobody honest sends them.
                _ => return Err(WireError::Protobuf("unknown wire type".to_owned())),
            }
        }
        Ok(())
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8]> {
    let (head, rest) =
        bytes.split_at_checked(length).ok_or_else(|| WireError::Protobuf("cut off".to_owned()))?;
    *bytes = rest;
    Ok(head)
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0_u64;
    for n in 0..10 {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(WireError::Protobuf("a number without an end".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;

    fn bomb<M: Shaped>(path: &[u8], item: &[u8]) -> bool {
        let mut bytes = item.repeat((4 << 20) / item.len());
        for field in path.iter().rev() {
            let mut wrapped = vec![field << 3 | 2];
            prost::encoding::encode_varint(bytes.len() as u64, &mut wrapped);
            wrapped.extend(bytes);
            bytes = wrapped;
        }
        check_fields::<M>(&bytes).is_err()
    }

    #[test]
    fn bombs_are_refused() {
        for field in [1, 2, 3, 4] {
            assert!(bomb::<pb::OfferRequest>(&[1], &[field << 3 | 2, 0]));
            assert!(bomb::<pb::Message>(&[2], &[field << 3 | 2, 0]));
        }
        assert!(bomb::<pb::Message>(&[2, 4], &[2 << 3 | 2, 0]), "bindings");
        assert!(bomb::<pb::Message>(&[3], &[1 << 3 | 2, 0]), "origins");
        assert!(bomb::<pb::Message>(&[4], &[4 << 3 | 2, 0]), "leaves");
        assert!(bomb::<pb::Message>(&[4, 5], &[2 << 3 | 2, 0]), "upserts");
        assert!(bomb::<pb::Message>(&[4, 5, 2, 1], &[2 << 3 | 2, 0]), "parts of a key");
        assert!(bomb::<pb::Message>(&[5], &[4 << 3 | 2, 0]), "namespaces");
        assert!(bomb::<pb::Message>(&[6], &[5 << 3 | 2, 0]), "records");
    }

    proptest! {
        /// What is counted is what is read: whatever passes prost passes here, unless it is too much.
        #[test]
        fn as_prost_reads(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let groups = |e: &WireError| matches!(e, WireError::Protobuf(t) if t == "unknown wire type");
            if pb::Message::decode(&*bytes).is_ok() {
                let counted = check_fields::<pb::Message>(&bytes);
                prop_assert!(counted.is_ok() || counted.is_err_and(|e| groups(&e)));
            }
        }
    }

    #[test]
    fn large_honest_messages_pass() {
        let record = pb::Record {
            key: Some(pb::RecordKey { kind: 3, name: vec!["service".into(), "12".into()] }),
            body: vec![8; 60].into(),
        };
        let chunk = pb::Chunk { origin: "oslo".into(), records: vec![record; 14_000], ..Default::default() };
        let message = pb::Message { kind: Some(pb::message::Kind::Chunk(chunk)) };
        let bytes = message.encode_to_vec();
        assert!(bytes.len() > 1 << 20);
        assert_eq!(decode_shaped::<pb::Message>(bytes.into()), Ok(message));
    }
}
