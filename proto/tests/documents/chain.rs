//! From the first roots to a statement: what fits is believed, everything else is refused.

use proptest::prelude::*;
use ring::signature::{ED25519, UnparsedPublicKey};
use tombolo_proto::model::{Namespace, Position};
use tombolo_proto::testing::*;
use tombolo_proto::trust::{
    Brokers, Context, Digest, Envelope, Membership, PublicKey, Revocations, RootChain, Roots, SigningKey,
    Statement, TrustError,
};
use tombolo_proto::wire;

type Judge = Box<dyn Fn(&Envelope) -> bool>;

/// One well-signed document of each context, and a judge that knows who may sign it.
fn every_document() -> Vec<(Envelope, Judge)> {
    let (root, roots) = set();
    let (member, speaks) = membership("oslo", 1, &["10.1.0.0/16"]);
    let grant = member.grant().envelope().clone();
    let first = member.bindings()[0].envelope().clone();
    let revocations = Revocations { set: roots.set(), version: 1, up_to: [(cluster("moss"), 3)].into() };
    let brokers = Brokers { set: roots.set(), version: 1, brokers: Vec::new() };
    let statement = statement(&member, 1, 2, Digest([3; 32]), &speaks);
    let (r1, r2, r3, r4) = (roots.clone(), roots.clone(), roots.clone(), roots.clone());
    let bound = grant.clone();
    vec![
        (
            first_roots().sign(&root),
            Box::new(move |e| RootChain::pinned(r1.set(), std::slice::from_ref(e)).is_ok()),
        ),
        (grant, Box::new(move |e| r2.grant(e).is_ok())),
        (first, Box::new(move |e| Membership::verify(&r3, &bound, std::slice::from_ref(e)).is_ok())),
        (statement, Box::new(move |e| member.statement(e).is_ok())),
        (revocations.sign(&root), Box::new(move |e| r4.revocations(e).is_ok())),
        (brokers.sign(&root), Box::new(move |e| roots.brokers(e).is_ok())),
    ]
}

#[test]
fn every_flipped_bit_is_refused() {
    for (envelope, judge) in every_document() {
        assert!(judge(&envelope), "{envelope:?}");
        for bit in 0..envelope.payload.len() * 8 {
            let mut payload = envelope.payload.to_vec();
            payload[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !judge(&Envelope { payload: payload.into(), ..envelope.clone() }),
                "{envelope:?} bit {bit}"
            );
        }
        for bit in 0..512 {
            let mut altered = envelope.clone();
            altered.signature[bit / 8] ^= 1 << (bit % 8);
            assert!(!judge(&altered), "{envelope:?} signature bit {bit}");
        }
        for context in CONTEXTS.into_iter().filter(|c| *c != envelope.context) {
            assert!(!judge(&Envelope { context, ..envelope.clone() }), "{envelope:?} as {}", context.name());
        }
        for cut in 0..envelope.payload.len() {
            assert!(!judge(&Envelope { payload: envelope.payload[..cut].into(), ..envelope.clone() }));
        }
    }
}

/// The same bytes signed by the same key for something else.
#[test]
fn no_context_passes_for_another() {
    let (root, _) = set();
    let (_, speaks) = membership("oslo", 1, &["10.1.0.0/16"]);
    for (envelope, judge) in every_document() {
        for context in CONTEXTS {
            for signer in [&root, &speaks] {
                let other = signer.sign(context, envelope.payload.to_vec());
                let relabelled = Envelope { context: envelope.context, ..other.clone() };
                let same = context == envelope.context;
                assert!(same || !judge(&other), "{envelope:?} as {}", context.name());
                assert!(same || !judge(&relabelled), "{envelope:?} signed as {}", context.name());
            }
        }
    }
}

/// ring alone takes a signature by nobody for a point of small order; we do not.
#[test]
fn keys_that_anybody_holds_are_refused() {
    let mut identity = [0; 32];
    identity[0] = 1;
    let mut forged = [0; 64];
    forged[..32].copy_from_slice(&identity);
    let anybody = PublicKey(identity);
    assert!(UnparsedPublicKey::new(&ED25519, identity).verify(b"anything at all", &forged).is_ok());

    let payload = wire::encode_roots(&Roots { keys: vec![anybody], ..first_roots() });
    let roots = Envelope { context: Context::Roots, payload: payload.into(), signature: forged };
    assert!(matches!(RootChain::first(&roots), Err(TrustError::Decode { .. })));

    let (root, roots) = set();
    let grant = grant("oslo", 1, &["10.1.0.0/16"], anybody).sign(&root);
    assert!(matches!(roots.grant(&grant), Err(TrustError::Decode { .. })));

    let p_minus = |n: u8| {
        let mut y = [0xff; 32];
        y[0] = 0xed - n;
        y[31] = 0x7f;
        y
    };
    let mut weak = vec![identity, [0; 32], p_minus(1), p_minus(0)];
    for n in 1..=18 {
        let mut y = p_minus(0);
        y[0] += n;
        weak.push(y);
    }
    for mut y in weak {
        assert!(!PublicKey(y).is_sound(), "{y:02x?}");
        y[31] |= 0x80;
        assert!(!PublicKey(y).is_sound(), "{y:02x?}");
        assert!(PublicKey::try_from(PublicKey(y).to_string()).is_err());
    }
}

/// The list of points of order 8 is right: multiplied by 8 they vanish, so a forged signature fits for one
/// message in eight under ring alone.
#[test]
fn points_of_order_eight_are_on_the_list() {
    for y in [
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    ] {
        let y: [u8; 32] = data_encoding::HEXLOWER.decode(y.as_bytes()).unwrap().try_into().unwrap();
        let mut forged = [0; 64];
        forged[0] = 1;
        let fits = (0_u32..64)
            .filter(|n| UnparsedPublicKey::new(&ED25519, y).verify(&n.to_be_bytes(), &forged).is_ok());
        assert!(fits.count() > 0);
        assert!(!PublicKey(y).is_sound());
    }
}

proptest! {
    #[test]
    fn honest_keys_are_sound(key in any_key()) {
        prop_assert!(key.is_sound());
        prop_assert_eq!(PublicKey::try_from(key.to_string()), Ok(key));
    }

    /// Nothing that nobody signed is believed, whatever the bytes.
    #[test]
    fn arbitrary_envelopes(envelope in any_envelope()) {
        for (_, judge) in every_document() {
            prop_assert!(!judge(&envelope));
        }
    }
}

/// The signature of a key can be made without our code: prefix, zero byte, payload.
#[test]
fn what_is_signed() {
    let (root, roots) = set();
    let envelope = grant("oslo", 1, &["10.1.0.0/16"], key(1).public()).sign(&root);
    let message = [b"tombolo.dev/v1/grant\0", &*envelope.payload].concat();
    UnparsedPublicKey::new(&ED25519, root.public().0).verify(&message, &envelope.signature).unwrap();
    assert!(roots.grant(&envelope).is_ok());
}

#[test]
fn documents_of_another_set() {
    let (_, roots) = set();
    // Another set of the same administrator: same keys, another name.
    let other = Roots { name: tombolo_proto::model::SetName::new("island").unwrap(), ..first_roots() };
    let other = RootChain::first(&other.sign(&key(7))).unwrap();
    assert_ne!(other.set(), roots.set());
    let grant = grant("oslo", 1, &["10.1.0.0/16"], key(1).public());
    let envelope = grant.sign(&key(7));
    assert_eq!(other.grant(&envelope), Err(TrustError::OtherSet(Context::Grant)));
    let list = Revocations { set: roots.set(), version: 1, up_to: Default::default() }.sign(&key(7));
    assert_eq!(other.revocations(&list), Err(TrustError::OtherSet(Context::Revocations)));
    let list = Brokers { set: roots.set(), version: 1, brokers: Vec::new() }.sign(&key(7));
    assert_eq!(other.brokers(&list), Err(TrustError::OtherSet(Context::Brokers)));
    let mut foreign = binding(&grant, 0, key(1).public());
    foreign.set = other.set();
    let verdict = Membership::verify(&roots, &envelope, &[foreign.sign(&key(1))]);
    assert_eq!(verdict, Err(TrustError::OtherSet(Context::Binding)));
    let (member, speaks) = membership("oslo", 1, &["10.1.0.0/16"]);
    let position = Position { serial: 1, generation: 0, epoch: 1, sequence: 1 };
    let foreign = Statement { set: other.set(), cluster: cluster("oslo"), position, root: Digest([0; 32]) }
        .sign(&speaks);
    assert_eq!(member.statement(&foreign), Err(TrustError::OtherSet(Context::Statement)));
    assert!(RootChain::pinned(other.set(), &[first_roots().sign(&key(7))]).is_err());
}

#[test]
fn bindings_are_a_chain() {
    let (root, roots) = set();
    let grant = grant("oslo", 4, &["10.1.0.0/16"], key(10).public());
    let signed = grant.sign(&root);
    let link = |generation: u32, by: u8, to: u8| binding(&grant, generation, key(to).public()).sign(&key(by));
    let judge = |bindings: &[Envelope]| Membership::verify(&roots, &signed, bindings);

    let good = [link(0, 10, 11), link(1, 11, 12), link(2, 12, 13)];
    let member = judge(&good).unwrap();
    assert_eq!((member.key(), member.bindings().len()), (key(13).public(), 3));

    assert!(judge(&[]).is_err(), "no binding");
    assert!(judge(&[link(0, 11, 11)]).is_err(), "not by the subject");
    assert!(judge(&[link(0, 10, 11), link(1, 10, 12)]).is_err(), "the subject binds only once");
    assert!(judge(&[link(0, 10, 11), link(2, 11, 12)]).is_err(), "gap");
    assert!(judge(&[link(1, 10, 11)]).is_err(), "does not begin at 0");
    assert!(judge(&[link(0, 10, 11), link(0, 11, 12)]).is_err(), "generation repeated");
    assert!(judge(&[good[0].clone(), good[0].clone()]).is_err(), "replayed");
    assert!(judge(&[good[1].clone(), good[0].clone()]).is_err(), "out of order");
    assert!(judge(&[good[0].clone(), good[2].clone()]).is_err(), "left out");
    let mut other = binding(&grant, 0, key(11).public());
    other.serial = 5;
    assert!(judge(&[other.sign(&key(10))]).is_err(), "another serial");
    let mut other = binding(&grant, 0, key(11).public());
    other.cluster = cluster("bergen");
    assert!(judge(&[other.sign(&key(10))]).is_err(), "another cluster");

    let mut many: Vec<Envelope> = vec![link(0, 10, 10)];
    many.extend((1..).take(Membership::MAX_BINDINGS).map(|n| link(n, 10, 10)));
    assert!(judge(&many[..Membership::MAX_BINDINGS]).is_ok());
    assert!(judge(&many).is_err(), "too many");

    // Pins: more is an extension, another key is not, a second signature of the same document is.
    let (one, three) = (judge(&good[..1]).unwrap(), judge(&good).unwrap());
    assert!(three.extends(&one) && three.extends(&three) && !one.extends(&three));
    let fork = judge(&[link(0, 10, 14), link(1, 14, 15)]).unwrap();
    assert!(!fork.extends(&one) && !one.extends(&fork));
    let again = Membership::verify(&roots, &grant.sign(&key(8)), &good).unwrap();
    assert!(again.extends(&three) && three.extends(&again));
    let mut renewed = grant.clone();
    renewed.namespaces = vec!["team-*".parse().unwrap()];
    let renewed = Membership::verify(&roots, &renewed.sign(&root), &good).unwrap();
    assert!(!renewed.extends(&three), "another grant of one serial");
}

#[test]
fn statements_fit_their_membership() {
    let (root, roots) = set();
    let grant = grant("oslo", 4, &["10.1.0.0/16"], key(10).public());
    let bindings = [
        binding(&grant, 0, key(11).public()).sign(&key(10)),
        binding(&grant, 1, key(12).public()).sign(&key(11)),
    ];
    let member = Membership::verify(&roots, &grant.sign(&root), &bindings).unwrap();
    let say = |name: &str, serial, generation, by: &SigningKey| {
        let position = Position { serial, generation, epoch: 9, sequence: 1 };
        let said = Statement { set: roots.set(), cluster: cluster(name), position, root: Digest([1; 32]) };
        member.statement(&said.sign(by)).map(|s| s.position)
    };
    assert_eq!(say("oslo", 4, 1, &key(12)).unwrap().generation, 1);
    assert!(say("oslo", 4, 0, &key(11)).is_ok(), "what was said before the rotation stays readable");
    assert!(say("oslo", 4, 0, &key(12)).is_err(), "new key for the old generation");
    assert!(say("oslo", 4, 1, &key(11)).is_err(), "old key for the new generation");
    assert!(say("oslo", 4, 2, &key(12)).is_err(), "unknown generation");
    assert!(say("oslo", 4, u32::MAX, &key(12)).is_err());
    assert!(say("oslo", 4, 0, &key(10)).is_err(), "the invite key speaks for nobody");
    assert!(say("oslo", 3, 1, &key(12)).is_err() && say("oslo", 5, 1, &key(12)).is_err(), "another serial");
    assert!(say("bergen", 4, 1, &key(12)).is_err(), "another cluster");
    assert!(say("oslo", 4, 1, &root).is_err(), "not even a root speaks for a cluster");
}

#[test]
fn positions_compare_field_by_field() {
    let p = |serial, generation, epoch, sequence| Position { serial, generation, epoch, sequence };
    let sorted = [
        p(0, 9, 9, 9),
        p(1, 0, 0, 0),
        p(1, 0, 0, 1),
        p(1, 0, 1, 0),
        p(1, 1, 0, 0),
        p(1, 1, 0, u64::MAX),
        p(1, 1, u64::MAX, 0),
        p(2, 0, 0, 0),
    ];
    assert!(sorted.is_sorted());
}

fn next(chain: &RootChain, keys: &[u8]) -> Roots {
    let hash = ring::digest::digest(&ring::digest::SHA256, &chain.current().envelope().payload);
    Roots {
        version: chain.current().version + 1,
        keys: keys.iter().map(|&k| key(k).public()).collect(),
        previous: Some(hash.as_ref().try_into().unwrap()),
        ..first_roots()
    }
}

#[test]
fn roots_advance_one_by_one() {
    let (_, first) = set();
    let v2 = next(&first, &[7, 8, 20]).sign(&key(8));
    let mut chain = first.clone();
    assert_eq!(chain.advance(&v2), Ok(true));
    assert_eq!(chain.advance(&v2), Ok(false), "known");
    assert_eq!(chain.advance(&first_roots().sign(&key(8))), Ok(false), "known, by its other key");
    let v3 = next(&chain, &[20]).sign(&key(20));
    assert!(first.clone().advance(&v3).is_err(), "skipped");
    assert_eq!(chain.advance(&v3), Ok(true));
    assert_eq!(chain.set(), first.set(), "a set keeps its name");

    let envelopes: Vec<Envelope> = chain.envelopes().cloned().collect();
    assert_eq!(RootChain::pinned(first.set(), &envelopes), Ok(chain.clone()));
    assert!(RootChain::pinned(first.set(), &envelopes[1..]).is_err(), "does not begin at 1");
    assert!(RootChain::pinned(first.set(), &[]).is_err());

    let before = chain.clone();
    let foreign = next(&chain, &[30]).sign(&key(30));
    assert_eq!(chain.advance(&foreign), Err(TrustError::Signature(Context::Roots)), "signed by its own key");
    let gone = next(&chain, &[7]).sign(&key(7));
    assert!(chain.advance(&gone).is_err(), "signed by a key taken off the list");
    let mut wrong = next(&chain, &[20]);
    wrong.previous = Some([0; 32]);
    assert!(chain.advance(&wrong.sign(&key(20))).is_err(), "wrong previous");
    let mut wrong = next(&chain, &[20]);
    wrong.previous = None;
    assert!(chain.advance(&wrong.sign(&key(20))).is_err(), "no previous");
    let mut wrong = next(&chain, &[20]);
    wrong.version += 1;
    assert!(chain.advance(&wrong.sign(&key(20))).is_err(), "wrong version");
    let fork = next(&first, &[31]).sign(&key(7));
    let told = chain.advance(&fork).unwrap_err().to_string();
    assert!(told.contains("stolen"), "{told}");
    assert_eq!(chain, before, "what is refused changes nothing");
}

#[test]
fn first_roots_sign_themselves() {
    assert!(RootChain::first(&first_roots().sign(&key(1))).is_err(), "not by one of its keys");
    let second = Roots { version: 2, ..first_roots() };
    assert!(RootChain::first(&second.sign(&key(7))).is_err());
    let late = Roots { previous: Some([1; 32]), ..first_roots() };
    assert!(RootChain::first(&late.sign(&key(7))).is_err());
    let zero = Roots { version: 0, ..first_roots() };
    assert!(RootChain::first(&zero.sign(&key(7))).is_err());
}

#[test]
fn a_key_off_the_list_signs_nothing() {
    let (_, mut chain) = set();
    let grant = grant("oslo", 1, &["10.1.0.0/16"], key(1).public());
    let (by_old, by_kept) = (grant.sign(&key(7)), grant.sign(&key(8)));
    let list = Revocations { set: chain.set(), version: u64::MAX, up_to: Default::default() };
    let brokers = Brokers { set: chain.set(), version: u64::MAX, brokers: Vec::new() };
    assert!(chain.grant(&by_old).is_ok() && chain.grant(&by_kept).is_ok());
    assert!(chain.revocations(&list.sign(&key(7))).is_ok() && chain.brokers(&brokers.sign(&key(7))).is_ok());
    chain.advance(&next(&chain, &[8, 20]).sign(&key(8))).unwrap();
    assert!(chain.grant(&by_old).is_err());
    assert!(
        chain.revocations(&list.sign(&key(7))).is_err() && chain.brokers(&brokers.sign(&key(7))).is_err()
    );
    assert!(chain.grant(&by_kept).is_ok() && chain.grant(&grant.sign(&key(20))).is_ok());
}

#[test]
fn chains_end() {
    let (_, mut chain) = set();
    for _ in 1..RootChain::MAX_VERSIONS {
        chain.advance(&next(&chain, &[7]).sign(&key(7))).unwrap();
    }
    assert!(chain.advance(&next(&chain, &[7]).sign(&key(7))).is_err());
}

#[test]
fn revocations_end_grants_up_to_a_serial() {
    let list = Revocations { set: set().1.set(), version: 1, up_to: [(cluster("oslo"), 5)].into() };
    let grant = |name: &str, serial| grant(name, serial, &[], key(1).public());
    assert!(list.revokes(&grant("oslo", 1)) && list.revokes(&grant("oslo", 5)));
    assert!(!list.revokes(&grant("oslo", 6)) && !list.revokes(&grant("bergen", 1)));
}

#[test]
fn namespaces_of_a_grant() {
    let mut grant = grant("oslo", 1, &[], key(1).public());
    let may = |g: &tombolo_proto::trust::Grant, n: &str| g.may_export(&Namespace::new(n).unwrap());
    assert!(may(&grant, "team-a") && may(&grant, "default"));
    assert!(!may(&grant, "kube-system") && !may(&grant, "tombolo-system"));
    grant.namespaces = vec!["team-*".parse().unwrap(), "kube-*".parse().unwrap()];
    assert!(may(&grant, "team-a") && !may(&grant, "default"));
    assert!(!may(&grant, "kube-system"), "reserved, whatever the grant says");
}
