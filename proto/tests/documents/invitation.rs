//! Tokens: whole they work, in any other state they are refused with a sentence.

use proptest::prelude::*;
use tombolo_proto::testing::*;
use tombolo_proto::trust::{Invitation, InvitationError};

#[test]
fn roundtrip_and_accept() {
    let made = invitation("oslo", 3, &["10.1.0.0/16"]);
    let read = Invitation::parse(&made.to_text()).unwrap();
    assert_eq!((&read.roots, &read.brokers, &read.grant), (&made.roots, &made.brokers, &made.grant));
    assert_eq!(read.to_text(), made.to_text());
    let own = key(50);
    let member = read.accept(&own).unwrap();
    assert_eq!((member.cluster(), member.key()), (&cluster("oslo"), own.public()));

    // Lines broken on the way.
    let broken: String =
        made.to_text().as_bytes().chunks(64).map(|l| format!("{}\r\n", str::from_utf8(l).unwrap())).collect();
    assert!(Invitation::parse(&format!("  {broken}")).is_ok());
}

/// After `admit` there is no invite key: only the subject itself can accept.
#[test]
fn admitted_without_a_secret() {
    let mut made = invitation("oslo", 3, &["10.1.0.0/16"]);
    made.invite_key = None;
    let read = Invitation::parse(&made.to_text()).unwrap();
    assert!(read.invite_key.is_none());
    assert!(read.accept(&key(50)).is_err());
    assert_eq!(read.accept(&key(3)).unwrap().key(), key(3).public());
}

#[test]
fn an_invite_key_that_is_not_the_subject_s() {
    let mut made = invitation("oslo", 3, &["10.1.0.0/16"]);
    made.invite_key = Some(key(4));
    assert_eq!(Invitation::parse(&made.to_text()).err(), Some(InvitationError::Damaged));
}

#[test]
fn every_cut_is_told() {
    let text = invitation("oslo", 3, &["10.1.0.0/16"]).to_text();
    for end in 0..text.len() {
        let error = Invitation::parse(&text[..end]).err().unwrap_or_else(|| panic!("cut at {end}"));
        let form = end < Invitation::PREFIX.len();
        assert!(matches!((form, error), (true, InvitationError::Form) | (false, InvitationError::Damaged)));
    }
    for start in 1..text.len() {
        assert!(Invitation::parse(&text[start..]).is_err());
    }
}

/// Whoever alters a token can repair its checksum; the signatures do not follow.
#[test]
fn forged_documents_in_a_token() {
    let mut made = invitation("oslo", 3, &["10.1.0.0/16"]);
    let other = invitation("bergen", 4, &["10.2.0.0/16"]);
    made.grant = other.grant;
    assert!(Invitation::parse(&made.to_text()).is_err(), "another's grant does not fit the invite key");
}

proptest! {
    #[test]
    fn altered(at in any::<prop::sample::Index>(), with in "[ -~]") {
        let text = invitation("oslo", 3, &["10.1.0.0/16"]).to_text();
        let at = at.index(text.len());
        let altered = format!("{}{with}{}", &text[..at], &text[at + 1..]);
        prop_assert_eq!(Invitation::parse(&altered).is_ok(), altered == text);
    }

    #[test]
    fn arbitrary(text in "\\PC{0,200}", body in "[A-Za-z0-9_-]{0,200}") {
        prop_assert!(Invitation::parse(&text).is_err());
        let token = format!("tombolo1.{body}");
        prop_assert!(Invitation::parse(&token).is_err());
    }
}

#[test]
fn endless_text() {
    let text = format!("tombolo1.{}", "A".repeat(Invitation::MAX_TEXT));
    assert_eq!(Invitation::parse(&text).err(), Some(InvitationError::Form));
    assert!(Invitation::parse(&" ".repeat(4 << 20)).is_err());
}
