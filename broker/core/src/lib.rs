//! What a broker decides beyond what [`tombolo_replica`] verifies: who is admitted to a session, which
//! documents are taken from strangers, how often anybody may ask, and how fast a member is heard. Sans-IO: time comes in as a value.
#![forbid(unsafe_code)]

mod admission;
mod limit;
mod pace;

pub use admission::{Admission, Admitted, Denied};
pub use limit::Limiter;
pub use pace::Pace;
