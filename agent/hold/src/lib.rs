//! Keeps file descriptors over the death of the process that uses them.
//!
//! A [`Supervisor`] opens what must not be lost (sockets, a TUN, a [`Memory`]), gives it names, and starts the same
//! program again as its child. The child takes the descriptors by name ([`Held::from_env`]) and does the work. When
//! it dies it is started again at once and finds everything where it was: packets and queries wait in the kernel's
//! queues meanwhile. A child may also hand descriptors it opened later to the supervisor ([`Keeper`]).
//!
//! Linux only. The supervisor is deliberately small and does nothing that can fail after start.

mod held;
mod keeper;
mod memory;
mod restart;
mod supervisor;

use std::io;

use thiserror::Error;

pub use held::Held;
pub use keeper::Keeper;
pub use memory::{MAX_VALUE, Memory};
pub use restart::Restarts;
pub use supervisor::{Event, Supervisor};

/// The environment variable by which a child learns what it was given.
pub const ENV: &str = "TOMBOLO_HELD";

/// The most descriptors one supervisor holds.
pub const MAX_HELD: usize = 64;

/// What can go wrong with held descriptors.
#[derive(Debug, Error)]
pub enum HoldError {
    /// A name outside `[a-z0-9._-]{1,32}`.
    #[error("`{0}` cannot name a held descriptor: use 1 to 32 of a-z, 0-9, dot, dash and underscore")]
    Name(String),
    /// More than [`MAX_HELD`] descriptors.
    #[error("no more than {MAX_HELD} descriptors can be held")]
    TooMany,
    /// [`ENV`] is set but not by this process's parent, or unreadable.
    #[error("{ENV} is set but does not describe descriptors of this process: unset it")]
    Environment,
    /// [`Held::from_env`] was called twice.
    #[error("the held descriptors were taken already")]
    Taken,
    /// The supervisor refused to hold or release a descriptor.
    #[error("the supervisor refused: {0}")]
    Refused(String),
    /// The value is too long for a [`Memory`].
    #[error("a held value may have {MAX_VALUE} bytes, this one has {0}")]
    TooLong(usize),
    /// A system call failed.
    #[error("cannot {what}")]
    Io {
        /// The operation.
        what: &'static str,
        /// Its cause.
        #[source]
        source: io::Error,
    },
}

impl HoldError {
    pub(crate) fn io(what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io { what, source: source.into() }
    }
}

/// Checks that `name` may name a held descriptor.
pub(crate) fn check_name(name: &str) -> Result<(), HoldError> {
    let fits = (1..=32).contains(&name.len())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'));
    if fits { Ok(()) } else { Err(HoldError::Name(name.chars().take(64).collect())) }
}
