//! What things are. Every type here is valid once built; parsing happens in its constructor.

pub mod address;
pub mod device;
pub mod name;
pub mod position;
pub mod preference;
pub mod record;
pub mod service;

pub use address::{AddressError, Family, Prefix, PrefixError, usable_address};
pub use device::{Device, DeviceFamily, DeviceNumber, Endpoint, Lane, Lanes, Rank, WireguardKey};
pub use name::{
    ClusterId, Hostname, NameError, Namespace, NamespacePattern, NodeName, PortName, ServiceName, SetName,
    is_label_name, is_label_value,
};
pub use position::Position;
pub use preference::{Prefer, Preference, Priority, Share, Weight};
pub use record::{Record, RecordKey, Scope, Subject, record_kind};
pub use service::{Backend, BackendGroup, Backends, Export, Port, Protocol, ServiceType};
