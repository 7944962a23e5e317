//! All memberships judged together.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use tombolo_proto::model::{ClusterId, Prefix};
use tombolo_proto::testing::*;
use tombolo_proto::trust::{Membership, Refused, Revocations, SigningKey, effective};

fn revoked(list: &[(&str, u64)]) -> Revocations {
    let up_to = list.iter().map(|(name, serial)| (cluster(name), *serial)).collect();
    Revocations { set: set().1.set(), version: 1, up_to }
}

fn none() -> BTreeSet<Prefix> {
    BTreeSet::new()
}

#[test]
fn lower_serial_keeps_the_range() {
    let (a, _) = membership("oslo", 1, &["10.1.0.0/16"]);
    let (b, _) = membership("bergen", 2, &["10.1.2.0/24", "10.2.0.0/16"]);
    let all = effective([&b, &a], None, None, &none());
    assert_eq!(all.members[&cluster("oslo")].owned, BTreeSet::from([net("10.1.0.0/16")]));
    assert_eq!(all.members[&cluster("bergen")].owned, BTreeSet::from([net("10.2.0.0/16")]));
    let refused =
        Refused::Overlap { cluster: cluster("bergen"), prefix: net("10.1.2.0/24"), owner: cluster("oslo") };
    assert_eq!(all.refused, [refused]);
    assert!(all.members[&cluster("oslo")].owns("10.1.2.3".parse().unwrap()));
    assert!(!all.members[&cluster("bergen")].owns("10.1.2.3".parse().unwrap()));
    assert!(!all.members[&cluster("bergen")].owns_prefix(&net("10.0.0.0/8")));
}

#[test]
fn newest_grant_counts_and_gives_up_what_it_left_out() {
    let (old, _) = membership("oslo", 1, &["10.1.0.0/16"]);
    let (new, _) = membership("oslo", 5, &["10.5.0.0/16"]);
    let (other, _) = membership("bergen", 2, &["10.1.0.0/16"]);
    let all = effective([&old, &new, &other], None, None, &none());
    assert_eq!(all.members[&cluster("oslo")].membership, new);
    assert_eq!(all.members[&cluster("bergen")].owned, BTreeSet::from([net("10.1.0.0/16")]));
    assert!(all.refused.is_empty());
}

#[test]
fn revoked_members_are_gone_and_leave_their_ranges() {
    let (a, _) = membership("oslo", 1, &["10.1.0.0/16"]);
    let (b, _) = membership("bergen", 2, &["10.1.0.0/16"]);
    let all = effective([&a, &b], Some(&revoked(&[("oslo", 1)])), None, &none());
    assert_eq!(all.members.keys().collect::<Vec<_>>(), [&cluster("bergen")]);
    assert_eq!(all.members[&cluster("bergen")].owned.len(), 1);
    assert_eq!(all.refused, [Refused::Revoked { cluster: cluster("oslo"), serial: 1 }]);
    // Admitted anew under a higher serial.
    let (again, _) = membership("oslo", 3, &["10.3.0.0/16"]);
    let all = effective([&a, &b, &again], Some(&revoked(&[("oslo", 1)])), None, &none());
    assert_eq!(all.members.len(), 2);
    // An old grant never comes back beside a revoked newer one.
    let all = effective([&a, &again], Some(&revoked(&[("oslo", 3)])), None, &none());
    assert!(all.members.is_empty());
}

#[test]
fn our_own_ranges_are_ours() {
    let (us, _) = membership("oslo", 7, &["10.1.0.0/16"]);
    let (other, _) = membership("bergen", 2, &["10.1.0.0/16", "10.96.0.0/16", "10.2.0.0/16"]);
    let ours = BTreeSet::from([net("10.96.0.0/12")]);
    let oslo = cluster("oslo");
    let all = effective([&us, &other], None, Some(&oslo), &ours);
    assert_eq!(all.members[&oslo].owned, BTreeSet::from([net("10.1.0.0/16")]), "despite the higher serial");
    assert_eq!(all.members[&cluster("bergen")].owned, BTreeSet::from([net("10.2.0.0/16")]));
    let own = |prefix: &str, ours: &str| Refused::Own {
        cluster: cluster("bergen"),
        prefix: net(prefix),
        ours: net(ours),
    };
    assert_eq!(all.refused, [own("10.1.0.0/16", "10.1.0.0/16"), own("10.96.0.0/16", "10.96.0.0/12")]);
    // Also when we are revoked: our pods are here all the same.
    let all = effective([&us, &other], Some(&revoked(&[("oslo", 7)])), Some(&oslo), &none());
    assert!(
        !all.members.contains_key(&oslo) && !all.members[&cluster("bergen")].owns_prefix(&net("10.1.0.0/16"))
    );
    // Elsewhere the serial decides.
    let all = effective([&us, &other], None, None, &none());
    assert!(all.members[&oslo].owned.is_empty());
}

/// Some clusters with some grants each, on crowded ranges. Serials may collide, as if a root key were abused.
fn any_memberships() -> impl Strategy<Value = Vec<Membership>> {
    let ranges = btree_set(crowded_prefix(), 0..4);
    vec((0_usize..5, 1_u64..8, ranges, any::<bool>(), any::<u8>()), 0..9).prop_map(|all| {
        let (root, roots) = set();
        let made = all.into_iter().map(|(name, serial, owned, rotated, seed)| {
            let name = ["oslo", "bergen", "tromso", "moss", "voss"][name];
            let first = SigningKey::from_seed(&[seed; 32]);
            let mut grant = grant(name, serial, &[], first.public());
            grant.owned = owned;
            grant.tunnel.clear();
            let mut bindings = vec![binding(&grant, 0, first.public()).sign(&first)];
            if rotated {
                bindings.push(binding(&grant, 1, key(99).public()).sign(&first));
            }
            Membership::verify(&roots, &grant.sign(&root), &bindings).unwrap()
        });
        made.collect()
    })
}

proptest! {
    #[test]
    fn independent_of_order(
        all in any_memberships(), shift in 0_usize..9, ours in btree_set(crowded_prefix(), 0..2),
        ended in btree_map("oslo|moss", 0_u64..9, 0..2),
    ) {
        let list: Vec<(&str, u64)> = ended.iter().map(|(name, serial)| (name.as_str(), *serial)).collect();
        let list = revoked(&list);
        let us = cluster("voss");
        let forward = effective(&all, Some(&list), Some(&us), &ours);
        let backward = effective(all.iter().rev(), Some(&list), Some(&us), &ours);
        let turned = effective(all.iter().cycle().skip(shift).take(all.len()), Some(&list), Some(&us), &ours);
        prop_assert_eq!(&forward, &backward);
        prop_assert_eq!(&forward, &turned);
    }

    /// Compared with the rule said plainly.
    #[test]
    fn as_the_rule_says(all in any_memberships(), ours in btree_set(crowded_prefix(), 0..2)) {
        let us = cluster("voss");
        let result = effective(&all, None, Some(&us), &ours);
        let mut newest: BTreeMap<&ClusterId, u64> = BTreeMap::new();
        for m in &all {
            let slot = newest.entry(m.cluster()).or_default();
            *slot = m.grant().serial.max(*slot);
        }
        prop_assert_eq!(newest.keys().copied().collect::<Vec<_>>(), result.members.keys().collect::<Vec<_>>());
        let own = newest.get(&us).map(|_| &result.members[&us]);
        for (a, member) in &result.members {
            prop_assert_eq!(member.membership.grant().serial, newest[a]);
            for prefix in &member.owned {
                for (b, other) in &result.members {
                    let disjoint = other.owned.iter().chain(&other.tunnel).all(|p| !p.overlaps(prefix));
                    prop_assert!(a == b || disjoint, "{} of {} and {}", prefix, a, b);
                }
                prop_assert!(*a == us || !ours.iter().any(|o| o.overlaps(prefix)));
            }
            // Whatever was refused was refused for a reason that still stands.
            for prefix in member.membership.grant().ranges().filter(|p| !member.owned.contains(p)) {
                let rank = |m: &Membership| (m.grant().serial, m.cluster().clone());
                let earlier = result.members.values().any(|o| {
                    rank(&o.membership) < rank(&member.membership) && o.owned.iter().any(|p| p.overlaps(prefix))
                });
                let here = *a != us
                    && (ours.iter().any(|o| o.overlaps(prefix))
                        || own.is_some_and(|us| us.membership.grant().ranges().any(|o| o.overlaps(prefix))));
                prop_assert!(earlier || here, "{prefix} of {a} refused without a reason");
            }
        }
        // Our own grant is never taken from us.
        if let Some(own) = own {
            prop_assert_eq!(&own.owned, &own.membership.grant().owned);
        }
    }
}
