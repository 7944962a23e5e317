//! What is not believed or not taken, and why.

use std::fmt;

use tombolo_proto::model::{ClusterId, Position};
use tombolo_proto::trust::TrustError;
use tombolo_proto::wire::Alarm;

/// What a refusal is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// A version of the roots.
    Roots,
    /// The list of brokers.
    Brokers,
    /// The list of revocations.
    Revocations,
    /// A membership; whose, if it can be read at all. The name is the document's own claim.
    Membership(Option<ClusterId>),
    /// A cluster's statement and what it covers.
    Statement(ClusterId),
    /// A statement that cannot be read at all.
    UnreadableStatement,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Roots => f.write_str("the set's roots"),
            Self::Brokers => f.write_str("the list of brokers"),
            Self::Revocations => f.write_str("the list of revocations"),
            Self::Membership(Some(cluster)) => write!(f, "the membership of {cluster}"),
            Self::Membership(None) => f.write_str("a membership"),
            Self::Statement(cluster) => write!(f, "the statement of {cluster}"),
            Self::UnreadableStatement => f.write_str("a statement"),
        }
    }
}

/// Why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Not signed as it should be, or not readable.
    #[error("{0}")]
    Trust(TrustError),
    /// Two documents at one position: the first is kept.
    #[error("two different ones bear {0}; the first is kept (is the key used in two places?)")]
    Equivocation(String),
    /// Another binding of the same serial and generation was seen first.
    #[error(
        "another binding of serial {serial} was seen first and is pinned; if this one is right, revoke the grant and admit the cluster anew"
    )]
    Fork {
        /// Of the grant.
        serial: u64,
    },
    /// The administrator ended it.
    #[error("serials up to {up_to} were revoked by the administrator")]
    Revoked {
        /// Up to which grant.
        up_to: u64,
    },
    /// Nobody showed the membership it speaks under.
    #[error("no membership under serial {serial} is known")]
    NoMembership {
        /// Of the statement.
        serial: u64,
    },
    /// Not above what is held.
    #[error("position {offered} is not above {held}, which is held already")]
    Stale {
        /// What came.
        offered: Position,
        /// What is held.
        held: Position,
    },
    /// Leaves or records do not hash to what was signed.
    #[error("its {0} do not fit the signed hash")]
    Content(String),
    /// Too much.
    #[error("it has more than {max} {what}")]
    Quota {
        /// Of what.
        what: &'static str,
        /// The bound.
        max: usize,
    },
}

/// Something that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object} is refused: {reason}")]
pub struct Refusal {
    /// What.
    pub object: Object,
    /// Why.
    pub reason: Reason,
}

impl Refusal {
    pub(crate) fn new(object: Object, reason: Reason) -> Self {
        Self { object, reason }
    }

    /// For telling the peer.
    pub fn alarm(&self) -> Alarm {
        let cut = |text: String| text.chars().filter(|c| !c.is_control()).take(250).collect();
        Alarm { object: cut(self.object.to_string()), reason: cut(self.reason.to_string()) }
    }
}
