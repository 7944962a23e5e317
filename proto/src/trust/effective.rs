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

/// Judges all memberships together: of a cluster's memberships the highest serial counts, then the longest
/// chain of bindings; revoked ones go; of two grants that overlap the lower serial keeps the range; no grant
/// but `us`'s may touch `ours` or what `us` was granted, whatever the serials: a mistake in a grant of
/// another never takes our own pods from us. Independent of order.
pub fn effective<'a>(
    memberships: impl IntoIterator<Item = &'a Membership>,
    revocations: Option<&Revocations>,
    us: Option<&ClusterId>,
    ours: &BTreeSet<Prefix>,
) -> Effective {
    let mut newest: BTreeMap<&ClusterId, &Membership> = BTreeMap::new();
    for membership in memberships {
        let slot = newest.entry(membership.cluster()).or_insert(membership);
        if standing(membership) > standing(slot) {
            *slot = membership;
        }
    }
    let mut own: Ranges<()> = Ranges::default();
    own.extend(ours.iter().map(|p| (*p, ())));
    if let Some(grant) = us.and_then(|us| newest.get(us)).map(|m| m.grant()) {
        own.extend(grant.ranges().map(|p| (*p, ())));
    }
    let mut by_serial: Vec<&Membership> = newest.into_values().collect();
    by_serial.sort_by(|a, b| (a.grant().serial, a.cluster()).cmp(&(b.grant().serial, b.cluster())));

    let mut result = Effective::default();
    let mut taken: Ranges<&ClusterId> = Ranges::default();
    for membership in by_serial {
        let grant: &Grant = membership.grant();
        let cluster = membership.cluster();
        if revocations.is_some_and(|list| list.revokes(grant)) {
            result.refused.push(Refused::Revoked { cluster: cluster.clone(), serial: grant.serial });
            continue;
        }
        let mut keep = |prefix: &&Prefix| {
            let prefix = **prefix;
            if us != Some(cluster)
                && let Some((ours, ())) = own.overlapping(&prefix)
            {
                result.refused.push(Refused::Own { cluster: cluster.clone(), prefix, ours });
                return false;
            }
            if let Some((_, owner)) = taken.overlapping(&prefix) {
                let owner = (*owner).clone();
                result.refused.push(Refused::Overlap { cluster: cluster.clone(), prefix, owner });
                return false;
            }
            true
        };
        let owned: BTreeSet<Prefix> = grant.owned.iter().filter(&mut keep).copied().collect();
        let tunnel: BTreeSet<Prefix> = grant.tunnel.iter().filter(&mut keep).copied().collect();
        taken.extend(owned.iter().chain(&tunnel).map(|p| (*p, cluster)));
        let member = Member { membership: membership.clone(), owned, tunnel };
        result.members.insert(cluster.clone(), member);
    }
    result.refused.sort();
    result
}

/// Which of a cluster's memberships counts. The bytes decide between two of one serial and length, which no
/// honest administrator or cluster makes, so that every receiver that knows both decides alike.
fn standing(membership: &Membership) -> (u64, usize, &[u8], Vec<&[u8]>) {
    let bindings: Vec<&[u8]> = membership.bindings().iter().map(|b| &*b.envelope().payload).collect();
    (membership.grant().serial, bindings.len(), &membership.grant().envelope().payload, bindings)
}

/// Prefixes, asked for overlaps in logarithmic time.
struct Ranges<T>(BTreeMap<Prefix, T>);

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Ranges<T> {
    fn extend(&mut self, prefixes: impl Iterator<Item = (Prefix, T)>) {
        self.0.extend(prefixes);
    }

    /// The widest that holds `prefix`, else the first that lies in it. Prefixes sort by address, then
    /// length, so those inside follow at once.
    fn overlapping(&self, prefix: &Prefix) -> Option<(Prefix, &T)> {
        let wider = (0..=prefix.length()).find_map(|length| {
            let net = ipnet::IpNet::new(prefix.address(), length).ok()?.trunc();
            self.0.get_key_value(&Prefix::new(net).ok()?)
        });
        let inside = || self.0.range(prefix..).next().filter(|(p, _)| prefix.covers(p));
        wider.or_else(inside).map(|(p, value)| (*p, value))
    }
}
