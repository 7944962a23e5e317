//! How an exporting cluster wants connections to be shared out. Priority and weight can only put a cluster behind others:
//! who says nothing has the best of both, so no member draws traffic to itself.

use serde::{Deserialize, Serialize};

/// What an export states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Preference {
    /// None: it leaves that to others.
    pub prefer: Option<Prefer>,
    /// Of its own cluster.
    pub share: Share,
}

/// Where an importing cluster that has eligible backends of its own sends its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// To its own only.
    Local,
    /// To all alike.
    Any,
}

/// What a cluster takes of a service's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Share {
    /// Only clusters of the best priority that have eligible backends are used.
    pub priority: Priority,
    /// Among these.
    pub weight: Weight,
}

/// 0, the default, is the first choice; 100 the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Priority(u8);

impl Priority {
    /// The last choice.
    pub const MAX: u8 = 100;

    /// 0 to 100.
    pub fn new(priority: u8) -> Option<Self> {
        (priority <= Self::MAX).then_some(Self(priority))
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for Priority {
    type Error = String;
    fn try_from(number: u8) -> Result<Self, String> {
        Self::new(number).ok_or_else(|| format!("priority {number} is not 0 to {}", Self::MAX))
    }
}

impl From<Priority> for u8 {
    fn from(priority: Priority) -> Self {
        priority.0
    }
}

/// A cluster's part of the connections, against the others' weights: 1 to 100, by default 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Weight(u8);

impl Weight {
    /// The largest part.
    pub const MAX: u8 = 100;
    /// What counts where nothing is stated.
    pub const DEFAULT: Self = Self(Self::MAX);

    /// 1 to 100.
    pub fn new(weight: u8) -> Option<Self> {
        (1..=Self::MAX).contains(&weight).then_some(Self(weight))
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl TryFrom<u8> for Weight {
    type Error = String;
    fn try_from(number: u8) -> Result<Self, String> {
        Self::new(number).ok_or_else(|| format!("weight {number} is not 1 to {}", Self::MAX))
    }
}

impl From<Weight> for u8 {
    fn from(weight: Weight) -> Self {
        weight.0
    }
}
