//! What an administrator hands to a cluster that is to join.

use zeroize::Zeroizing;

use super::{Binding, Brokers, Envelope, Grant, Membership, RootChain, SigningKey, TrustError, Verified};
use crate::wire::{self, WireError};

/// Everything a cluster needs to become a member, verified. As text it is a token (`tombolo invite`, with the
/// private half of a one-use key) or a file without secrets (`tombolo admit`).
pub struct Invitation {
    /// The set.
    pub roots: RootChain,
    /// Where to go.
    pub brokers: Verified<Brokers>,
    /// What the cluster will be.
    pub grant: Verified<Grant>,
    /// The grant's subject, if it is a one-use key made for this invitation.
    pub invite_key: Option<SigningKey>,
}

impl Invitation {
    /// Head of the text form.
    pub const PREFIX: &'static str = "tombolo1.";
    /// Characters of the text form.
    pub const MAX_TEXT: usize = 256 * 1024;

    /// Reads and checks the text form. The set it names is to be shown to the person who joins.
    pub fn parse(text: &str) -> Result<Self, InvitationError> {
        if text.len() > 2 * Self::MAX_TEXT {
            return Err(InvitationError::Form);
        }
        // Terminals and mail programs break long lines.
        let mut text = Zeroizing::new(text.to_owned());
        text.retain(|c| !c.is_ascii_whitespace());
        let body = text.strip_prefix(Self::PREFIX).ok_or(InvitationError::Form)?;
        if text.len() > Self::MAX_TEXT {
            return Err(InvitationError::Form);
        }
        let bytes = data_encoding::BASE64URL_NOPAD
            .decode(body.as_bytes())
            .map(Zeroizing::new)
            .map_err(|_| InvitationError::Damaged)?;
        let (bytes, check) = bytes.split_last_chunk::<CHECK>().ok_or(InvitationError::Damaged)?;
        if checksum(bytes) != *check {
            return Err(InvitationError::Damaged);
        }
        let parts = wire::decode_invitation(bytes).map_err(InvitationError::Wire)?;
        let (first, rest) = parts.roots.split_first().ok_or(InvitationError::Damaged)?;
        let mut roots = RootChain::first(first).map_err(InvitationError::Trust)?;
        for envelope in rest {
            roots.advance(envelope).map_err(InvitationError::Trust)?;
        }
        let brokers = roots.brokers(&parts.brokers).map_err(InvitationError::Trust)?;
        let grant = roots.grant(&parts.grant).map_err(InvitationError::Trust)?;
        let invite_key = parts.invite_seed.map(|seed| SigningKey::from_seed(&seed));
        if invite_key.as_ref().is_some_and(|key| key.public() != grant.subject) {
            return Err(InvitationError::Damaged);
        }
        Ok(Self { roots, brokers, grant, invite_key })
    }

    /// The text form.
    pub fn to_text(&self) -> String {
        let roots: Vec<&Envelope> = self.roots.envelopes().collect();
        let seed = self.invite_key.as_ref().map(SigningKey::seed);
        let mut bytes = wire::encode_invitation(
            &roots,
            self.brokers.envelope(),
            self.grant.envelope(),
            seed.map(|s| &**s),
        );
        let check = checksum(&bytes);
        bytes.extend(check);
        let body = Zeroizing::new(data_encoding::BASE64URL_NOPAD.encode(&bytes));
        format!("{}{}", Self::PREFIX, *body)
    }

    /// Makes the membership: binding 0 for `key`, signed by the invite key or, after `admit`, by `key`
    /// itself, which then must be the grant's subject.
    pub fn accept(&self, key: &SigningKey) -> Result<Membership, TrustError> {
        let binding = Binding {
            set: self.grant.set,
            cluster: self.grant.cluster.clone(),
            serial: self.grant.serial,
            generation: 0,
            key: key.public(),
        };
        let binding = binding.sign(self.invite_key.as_ref().unwrap_or(key));
        Membership::verify(&self.roots, self.grant.envelope(), &[binding])
    }
}

/// Bytes of the checksum at the end of the text form. Signatures protect against forgers; this protects
/// people who copy: a token without its tail would otherwise read as one without an invite key.
const CHECK: usize = 8;

fn checksum(bytes: &[u8]) -> [u8; CHECK] {
    let mut hasher = ring::digest::Context::new(&ring::digest::SHA256);
    hasher.update(b"tombolo.dev/v1/invitation\0");
    hasher.update(bytes);
    let mut check = [0; CHECK];
    check.copy_from_slice(&hasher.finish().as_ref()[..CHECK]);
    check
}

/// Why a text is not an invitation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvitationError {
    /// Something else altogether.
    #[error("this is not a Tombolo token: it should begin with {:?}", Invitation::PREFIX)]
    Form,
    /// Cut or altered.
    #[error("the token is damaged (cut off or altered on the way?); copy it again, whole")]
    Damaged,
    /// Not readable.
    #[error("the token is damaged")]
    Wire(#[source] WireError),
    /// Not signed as it should be.
    #[error("the token is not to be trusted")]
    Trust(#[source] TrustError),
}
