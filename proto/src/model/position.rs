//! How far a cluster has spoken.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Orders a cluster's statements: compared field by field in this order; of two statements the one at
/// the higher position counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Position {
    /// Of the grant it speaks under.
    pub serial: u64,
    /// Of the key that signed it.
    pub generation: u32,
    /// One for each taking of the lead.
    pub epoch: u64,
    /// Counts within the epoch.
    pub sequence: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}.{}", self.serial, self.generation, self.epoch, self.sequence)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
