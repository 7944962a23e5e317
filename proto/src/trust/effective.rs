//! What remains of all known memberships: nobody revoked, nobody on another's ranges.

use std::collections::{BTreeMap, BTreeSet};

use super::{Grant, Membership, Revocations};
use crate::model::{ClusterId, Prefix};

/// A membership that counts, with what is left of its ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its right to speak.
    pub membership: Membership,
    /// Pod ranges that nobody with a lower serial owns.
    pub owned: BTreeSet<Prefix>,
    /// Tunnel ranges, likewise.
    pub tunnel: BTreeSet<Prefix>,
}

impl Member {
    /// Whether it may speak about an address at all.
    pub fn owns(&self, address: std::net::IpAddr) -> bool {
        self.owned.iter().chain(&self.tunnel).any(|p| p.contains(address))
    }

    /// Whether it may speak about all of a prefix.
    pub fn owns_prefix(&self, prefix: &Prefix) -> bool {
        self.owned.iter().any(|p| p.covers(prefix))
    }
}

/// A range, or a whole membership, that does not count.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    /// Ended by the administrator.
    Revoked {
        /// Whose.
        cluster: ClusterId,
        /// The grant.
        serial: u64,
    },
    /// The range belongs to an earlier grant.
    Overlap {
        /// Whose range is refused.
        cluster: ClusterId,
        /// The range.
        prefix: Prefix,
        /// Who has it.
        owner: ClusterId,
    },
    /// The range touches one of our own (service range, node addresses, brokers, ...).
    Own {
        /// Whose range is refused.
        cluster: ClusterId,
        /// The range.
        prefix: Prefix,
        /// Ours.
        ours: Prefix,
    },
}

/// The members that count.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effective {
    /// By cluster.
    pub members: BTreeMap<ClusterId, Member>,
    /// What does not count, in order.
    pub refused: Vec<Refused>,
}

/// Judges all memberships together: revoked ones go; of two grants that overlap the lower serial keeps the
/// range; `ours` names the ranges that no grant but `us`'s may touch. Independent of order.
pub fn effective<'a>(
    memberships: impl IntoIterator<Item = &'a Membership>,
    revocations: Option<&Revocations>,
    us: Option<&ClusterId>,
    ours: &BTreeSet<Prefix>,
) -> Effective {
    let mut newest: BTreeMap<&ClusterId, &Membership> = BTreeMap::new();
    for membership in memberships {
        let slot = newest.entry(membership.cluster()).or_insert(membership);
        let key = |m: &Membership| (m.grant().serial, m.bindings().len());
        if key(membership) > key(slot) {
            *slot = membership;
        }
    }
    let mut by_serial: Vec<&Membership> = newest.into_values().collect();
    by_serial.sort_by_key(|m| (m.grant().serial, m.cluster().clone()));

    let mut result = Effective::default();
    let mut taken: Vec<(Prefix, ClusterId)> = Vec::new();
    for membership in by_serial {
        let grant: &Grant = membership.grant();
        let cluster = membership.cluster();
        if revocations.is_some_and(|list| list.revokes(grant)) {
            result.refused.push(Refused::Revoked { cluster: cluster.clone(), serial: grant.serial });
            continue;
        }
        let mut keep = |prefix: &&Prefix| {
            let prefix = **prefix;
            if let Some((_, owner)) = taken.iter().find(|(p, owner)| p.overlaps(&prefix) && owner != cluster)
            {
                let owner = owner.clone();
                result.refused.push(Refused::Overlap { cluster: cluster.clone(), prefix, owner });
                return false;
            }
            if us != Some(cluster)
                && let Some(ours) = ours.iter().find(|p| p.overlaps(&prefix))
            {
                result.refused.push(Refused::Own { cluster: cluster.clone(), prefix, ours: *ours });
                return false;
            }
            true
        };
        let owned: BTreeSet<Prefix> = grant.owned.iter().filter(&mut keep).copied().collect();
        let tunnel: BTreeSet<Prefix> = grant.tunnel.iter().filter(&mut keep).copied().collect();
        taken.extend(owned.iter().chain(&tunnel).map(|p| (*p, cluster.clone())));
        let member = Member { membership: membership.clone(), owned, tunnel };
        result.members.insert(cluster.clone(), member);
    }
    result.refused.sort();
    result
}
