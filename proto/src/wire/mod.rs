//! Between bytes and types. Everything from outside comes in here, bounded and checked.

mod document;
mod record;
mod session;
mod shape;

pub use document::{
    InvitationParts, decode_binding, decode_brokers, decode_envelope, decode_grant, decode_invitation,
    decode_membership_parts, decode_revocations, decode_roots, decode_statement, encode_binding,
    encode_brokers, encode_envelope, encode_grant, encode_invitation, encode_membership, encode_revocations,
    encode_roots, encode_statement,
};
pub use record::{
    decode_backends, decode_endpoint, decode_export, encode_backends, encode_endpoint, encode_export,
};
pub use session::{
    Alarm, Chunk, Documents, Have, Hello, MembershipParts, Message, ScopeDelta, Update, Want,
    decode_documents, decode_message, encode_documents, encode_message,
};

pub use shape::{MAX_FIELDS, Shape, Shaped, check_fields, decode_shaped};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::model::{AddressError, NameError, Prefix, PrefixError};
use crate::pb;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not protobuf of this type.
    #[error("not a valid message: {0}")]
    Protobuf(String),
    /// A needed field is absent.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// A field has another size or value than it may.
    #[error("field {field} is {problem}")]
    Field {
        /// Which.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A list or text is longer than allowed.
    #[error("field {field} has {count} entries, at most {max} are allowed")]
    TooMany {
        /// Which.
        field: &'static str,
        /// How many came.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// Not a name.
    #[error(transparent)]
    Name(NameError),
    /// Not a prefix that can be owned.
    #[error(transparent)]
    Prefix(PrefixError),
    /// Not an address that may cross.
    #[error(transparent)]
    Address(AddressError),
}

impl From<NameError> for WireError {
    fn from(error: NameError) -> Self {
        Self::Name(error)
    }
}

impl From<PrefixError> for WireError {
    fn from(error: PrefixError) -> Self {
        Self::Prefix(error)
    }
}

impl From<AddressError> for WireError {
    fn from(error: AddressError) -> Self {
        Self::Address(error)
    }
}

type Result<T> = std::result::Result<T, WireError>;

fn parse<M: prost::Message + Default>(bytes: &[u8]) -> Result<M> {
    M::decode(bytes).map_err(|error| WireError::Protobuf(error.to_string()))
}

fn bounded<T>(field: &'static str, list: &[T], max: usize) -> Result<()> {
    if list.len() > max { Err(WireError::TooMany { field, count: list.len(), max }) } else { Ok(()) }
}

fn field<T>(field: &'static str, value: Option<T>) -> Result<T> {
    value.ok_or(WireError::Missing(field))
}

fn bad(field: &'static str, problem: impl Into<String>) -> WireError {
    WireError::Field { field, problem: problem.into() }
}

fn array<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N]> {
    bytes.try_into().map_err(|_| bad(field, format!("{} bytes long, not {N}", bytes.len())))
}

fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr> {
    match bytes.len() {
        4 => Ok(IpAddr::V4(Ipv4Addr::from(array::<4>(field, bytes)?))),
        16 => Ok(IpAddr::V6(Ipv6Addr::from(array::<16>(field, bytes)?))),
        length => Err(bad(field, format!("{length} bytes long, not an IP address"))),
    }
}

fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn prefix(value: &pb::Prefix) -> Result<Prefix> {
    let address = address("prefix", &value.address)?;
    let length = u8::try_from(value.length).map_err(|_| bad("prefix length", value.length.to_string()))?;
    let net = IpNet::new(address, length).map_err(|_| bad("prefix length", length.to_string()))?;
    Ok(Prefix::new(net)?)
}

fn prefix_pb(prefix: &Prefix) -> pb::Prefix {
    pb::Prefix { address: address_bytes(prefix.address()).into(), length: u32::from(prefix.length()) }
}

fn to_bytes<M: prost::Message>(message: &M) -> Vec<u8> {
    message.encode_to_vec()
}
