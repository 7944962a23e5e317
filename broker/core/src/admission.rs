//! Who may hold a session.

use tombolo_proto::model::ClusterId;
use tombolo_proto::trust::{Grant, Membership, PublicKey, SetId, TrustError};
use tombolo_proto::wire::{Documents, Hello, MembershipParts};
use tombolo_replica::Replica;

/// Judges peers by the first message of a session and the key that they proved to have in TLS.
///
/// A grant's `bind_before` bounds the time in which a token may be used: a membership that is not known yet is
/// refused after it, if its own holder or a stranger shows it. Two ways remain open, so that a broker that lost
/// its disk can admit everybody again: what an admitted peer passes on of others counts, and for a while after a
/// start with an empty store nobody's lateness counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Admission {
    /// Unix seconds up to which late bindings are taken; for a broker that began with an empty store.
    pub relearn_until: Option<u64>,
}

/// Who was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admitted {
    /// A cluster of the set.
    Member(ClusterId),
    /// Another broker of the set.
    Broker,
}

/// Why a peer is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Of another set.
    #[error("this broker serves set {ours}, not {theirs}")]
    OtherSet {
        /// The broker's.
        ours: SetId,
        /// The peer's.
        theirs: SetId,
    },
    /// Neither member nor broker.
    #[error("key {0} is no broker's of this set, and no membership was shown")]
    Stranger(PublicKey),
    /// The membership is not to be believed.
    #[error("the membership shown is not valid: {0}")]
    Membership(TrustError),
    /// Somebody else's membership.
    #[error("the membership shown is {cluster}'s, but key {key} is not one of its keys")]
    Key {
        /// Whose membership.
        cluster: ClusterId,
        /// The peer's.
        key: PublicKey,
    },
    /// Its own membership, by a key that was rotated since.
    #[error(
        "key {key} of {cluster} was replaced by its generation {generation}; an agent that has just rotated comes again with that one, a cluster that was restored from a backup needs a newer grant (tombolo invite {cluster} --renew)"
    )]
    Replaced {
        /// Whose membership.
        cluster: ClusterId,
        /// The peer's.
        key: PublicKey,
        /// Of the newest key.
        generation: u32,
    },
    /// It speaks under a newer grant by now.
    #[error(
        "{cluster} speaks under grant {newest} by now, and {serial} counts no more; a cluster that was restored from a backup needs a newer grant (tombolo invite {cluster} --renew)"
    )]
    Older {
        /// Whose membership.
        cluster: ClusterId,
        /// Of the grant that was shown.
        serial: u64,
        /// Of the grant that counts.
        newest: u64,
    },
    /// Ended.
    #[error("cluster {cluster} was revoked; it needs a new grant (tombolo admit)")]
    Revoked {
        /// Whose membership.
        cluster: ClusterId,
    },
    /// The token came too late.
    #[error("the invitation of {cluster} ran out before it was used; ask for a new one (tombolo invite)")]
    Late {
        /// Whose membership.
        cluster: ClusterId,
    },
    /// Somebody else used the token first.
    #[error(
        "another key of {cluster} was bound first under serial {serial}; if that was not you, have the cluster revoked and admitted anew"
    )]
    Fork {
        /// Whose membership.
        cluster: ClusterId,
        /// Of the grant.
        serial: u64,
    },
}

impl Admission {
    /// Judges a hello. `key` is what the peer proved in TLS; `now` is in unix seconds.
    pub fn judge(
        &self,
        replica: &Replica,
        key: &PublicKey,
        hello: &Hello,
        now: u64,
    ) -> Result<Admitted, Denied> {
        if hello.set != replica.set() {
            return Err(Denied::OtherSet { ours: replica.set(), theirs: hello.set });
        }
        let Some(parts) = &hello.membership else {
            let known = replica.brokers().is_some_and(|list| list.brokers.iter().any(|b| b.key == *key));
            return if known { Ok(Admitted::Broker) } else { Err(Denied::Stranger(*key)) };
        };
        let shown =
            Membership::verify(replica.roots(), &parts.grant, &parts.bindings).map_err(Denied::Membership)?;
        let cluster = shown.cluster().clone();
        if !shown.bindings().iter().any(|binding| binding.key == *key) {
            return Err(Denied::Key { cluster, key: *key });
        }
        if replica.revocations().is_some_and(|list| list.revokes(shown.grant())) {
            return Err(Denied::Revoked { cluster });
        }
        let serial = shown.grant().serial;
        let spoken = replica.origin(&cluster).map(|state| state.position().serial);
        if let Some(newest) = spoken.filter(|&spoken| spoken > serial) {
            return Err(Denied::Older { cluster, serial, newest });
        }
        match replica.membership_of(&cluster, serial) {
            Some(held) if shown.extends(held) || held.extends(&shown) => {
                let newest = if held.extends(&shown) { held } else { &shown };
                if newest.key() == *key {
                    Ok(Admitted::Member(cluster))
                } else {
                    Err(Denied::Replaced { cluster, key: *key, generation: newest.generation() })
                }
            }
            Some(_) => Err(Denied::Fork { cluster, serial }),
            None if self.is_late(shown.grant(), now) => Err(Denied::Late { cluster }),
            None if shown.key() != *key => {
                Err(Denied::Replaced { cluster, key: *key, generation: shown.generation() })
            }
            None => Ok(Admitted::Member(cluster)),
        }
    }

    /// Whether a member that was admitted with `key` still is who speaks for its cluster: not after a rotation, since
    /// whoever has an old key would go on to read.
    pub fn is_replaced(replica: &Replica, cluster: &ClusterId, key: &PublicKey) -> bool {
        let mut held = replica.memberships().filter(|m| m.cluster() == cluster).peekable();
        held.peek().is_some() && !held.any(|membership| membership.key() == *key)
    }

    /// What may be taken of documents that a stranger offers: all but memberships that are new and late, which
    /// are returned apart.
    pub fn sift(&self, replica: &Replica, mut documents: Documents, now: u64) -> (Documents, Vec<Denied>) {
        let mut late = Vec::new();
        documents.memberships.retain(|parts| match self.judge_offer(replica, parts, now) {
            Some(denied) => {
                late.push(denied);
                false
            }
            None => true,
        });
        (documents, late)
    }

    fn judge_offer(&self, replica: &Replica, parts: &MembershipParts, now: u64) -> Option<Denied> {
        // What cannot be read or believed is the replica's to refuse.
        let grant = replica.roots().grant(&parts.grant).ok()?;
        let known = replica.membership_of(&grant.cluster, grant.serial).is_some();
        (!known && self.is_late(&grant, now)).then(|| Denied::Late { cluster: grant.cluster.clone() })
    }

    fn is_late(&self, grant: &Grant, now: u64) -> bool {
        grant.bind_before.is_some_and(|end| now > end) && self.relearn_until.is_none_or(|end| now > end)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tombolo_proto::model::SetName;
    use tombolo_proto::trust::{Binding, Broker, Brokers, Revocations, RootChain, Roots, SigningKey};
    use tombolo_replica::Interest;

    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_seed(&[seed; 32])
    }

    fn roots() -> RootChain {
        let name = SetName::new("harbour").unwrap();
        let roots = Roots { version: 1, name, keys: vec![key(7).public()], previous: None };
        RootChain::first(&roots.sign(&key(7))).unwrap()
    }

    fn replica() -> Replica {
        let mut replica = Replica::new(roots(), Interest::All);
        let broker = Broker { address: "b.example:4500".into(), key: key(8).public() };
        let brokers = Brokers { set: roots().set(), version: 1, brokers: vec![broker] }.sign(&key(7));
        let documents = Documents { brokers: Some(brokers), ..Documents::default() };
        assert_eq!(replica.offer_documents(&documents), []);
        replica
    }

    /// Bound to `own` by invite key 20, until second 100.
    fn parts(own: &SigningKey) -> MembershipParts {
        let (set, cluster) = (roots().set(), ClusterId::new("east").unwrap());
        let grant = Grant {
            set,
            cluster: cluster.clone(),
            serial: 1,
            member_since: 1,
            owned: BTreeSet::new(),
            tunnel: BTreeSet::new(),
            namespaces: Vec::new(),
            subject: key(20).public(),
            bind_before: Some(100),
        };
        let binding = Binding { set, cluster, serial: 1, generation: 0, key: own.public() };
        MembershipParts { grant: grant.sign(&key(7)), bindings: vec![binding.sign(&key(20))] }
    }

    fn hello(membership: Option<MembershipParts>) -> Hello {
        Hello {
            set: roots().set(),
            features: Vec::new(),
            membership,
            version: String::new(),
            namespaces: None,
        }
    }

    #[test]
    fn members_come_by_their_key_and_in_time() {
        let mut replica = replica();
        let judge = |replica: &Replica, own: u8, tls: u8, now| {
            Admission::default().judge(replica, &key(tls).public(), &hello(Some(parts(&key(own)))), now)
        };
        let east = || ClusterId::new("east").unwrap();
        assert_eq!(judge(&replica, 1, 1, 100), Ok(Admitted::Member(east())));
        assert_eq!(judge(&replica, 1, 1, 101), Err(Denied::Late { cluster: east() }));
        assert!(matches!(judge(&replica, 1, 2, 100), Err(Denied::Key { .. })));
        assert!(
            matches!(judge(&replica, 1, 20, 100), Err(Denied::Key { .. })),
            "an invite key is no member's"
        );
        let relearning = Admission { relearn_until: Some(200) };
        let late = |now| relearning.judge(&replica, &key(1).public(), &hello(Some(parts(&key(1)))), now);
        assert!(late(200).is_ok() && late(201).is_err());
        replica.offer_membership(&parts(&key(1))).unwrap();
        assert_eq!(judge(&replica, 1, 1, 999), Ok(Admitted::Member(east())), "once bound, for good");
        assert_eq!(judge(&replica, 3, 3, 50), Err(Denied::Fork { cluster: east(), serial: 1 }));
        let list = Revocations { set: roots().set(), version: 1, up_to: [(east(), 1)].into() };
        let documents = Documents { revocations: Some(list.sign(&key(7))), ..Documents::default() };
        assert_eq!(replica.offer_documents(&documents), []);
        assert_eq!(judge(&replica, 1, 1, 50), Err(Denied::Revoked { cluster: east() }));
    }

    /// The same after rotations to these keys.
    fn rotated(keys: &[u8]) -> MembershipParts {
        let (set, cluster) = (roots().set(), ClusterId::new("east").unwrap());
        let mut parts = parts(&key(keys[0]));
        for (generation, pair) in (1..).zip(keys.windows(2)) {
            let next = key(pair[1]).public();
            let binding = Binding { set, cluster: cluster.clone(), serial: 1, generation, key: next };
            parts.bindings.push(binding.sign(&key(pair[0])));
        }
        parts
    }

    #[test]
    fn an_old_key_holds_no_session() {
        let mut replica = replica();
        let judge = |replica: &Replica, shown: &[u8], tls: u8| {
            Admission::default().judge(replica, &key(tls).public(), &hello(Some(rotated(shown))), 50)
        };
        let east = ClusterId::new("east").unwrap();
        let admitted = Ok(Admitted::Member(east.clone()));
        let replaced = |seed: u8, generation| {
            Err(Denied::Replaced { cluster: east.clone(), key: key(seed).public(), generation })
        };
        // Of a cluster that is not known yet, and of one that is.
        assert_eq!(judge(&replica, &[1, 2], 2), admitted);
        assert_eq!(judge(&replica, &[1, 2], 1), replaced(1, 1));
        replica.offer_membership(&rotated(&[1, 2])).unwrap();
        assert_eq!(judge(&replica, &[1, 2], 2), admitted);
        assert_eq!(judge(&replica, &[1], 1), replaced(1, 1));
        // It has rotated twice since the broker heard of it.
        assert_eq!(judge(&replica, &[1, 2, 3, 4], 4), admitted);
        assert_eq!(judge(&replica, &[1, 2, 3, 4], 2), replaced(2, 3));
        // A thief with the first key makes another second one.
        assert_eq!(judge(&replica, &[1, 9], 9), Err(Denied::Fork { cluster: east.clone(), serial: 1 }));
        assert!(!Admission::is_replaced(&replica, &east, &key(2).public()));
        assert!(Admission::is_replaced(&replica, &east, &key(1).public()));
        replica.offer_membership(&rotated(&[1, 2, 3])).unwrap();
        assert!(Admission::is_replaced(&replica, &east, &key(2).public()));
    }

    #[test]
    fn others_come_only_as_brokers_of_the_set() {
        let replica = replica();
        let judge =
            |tls: u8, hello: Hello| Admission::default().judge(&replica, &key(tls).public(), &hello, 0);
        assert_eq!(judge(8, hello(None)), Ok(Admitted::Broker));
        assert_eq!(judge(9, hello(None)), Err(Denied::Stranger(key(9).public())));
        let other = Hello { set: SetId([0; 16]), ..hello(None) };
        assert!(matches!(judge(8, other), Err(Denied::OtherSet { .. })));
        let mut forged = parts(&key(1));
        forged.grant.signature[0] ^= 1;
        assert!(matches!(judge(1, hello(Some(forged))), Err(Denied::Membership(_))));
    }

    #[test]
    fn strangers_cannot_bring_late_bindings() {
        let mut replica = replica();
        let documents = Documents { memberships: vec![parts(&key(1))], ..Documents::default() };
        let sift = |replica: &Replica, now| {
            let (kept, late) = Admission::default().sift(replica, documents.clone(), now);
            (kept.memberships.len(), late.len())
        };
        assert_eq!((sift(&replica, 100), sift(&replica, 101)), ((1, 0), (0, 1)));
        replica.offer_membership(&parts(&key(1))).unwrap();
        assert_eq!(sift(&replica, 101), (1, 0));
    }
}
