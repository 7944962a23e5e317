//! What a broker decides beyond what [`tombolo_replica`] verifies: who is admitted to a session, which
//! documents are taken from strangers, and how often anybody may ask. Sans-IO: time comes in as a value.
#![forbid(unsafe_code)]

mod admission;
mod limit;

pub use admission::{Admission, Admitted, Denied};
pub use limit::Limiter;
