//! Ed25519 keys (RFC 8032).

use std::fmt;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Context, Envelope};

/// A public key; printed in base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

/// y of the points whose order divides 8 (RFC 8032, section 5.1; the two of order 8 are roots of
/// d y^4 + 2 y^2 - 1 = 0), little-endian, without the sign bit.
const SMALL_ORDER: [[u8; 32]; 5] = [
    small(0x00, 0x00),
    small(0x01, 0x00),
    [
        0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5,
        0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
    ],
    [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a,
        0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
    ],
    small(0xec, 0xff),
];

const fn small(first: u8, rest: u8) -> [u8; 32] {
    let mut y = [rest; 32];
    y[0] = first;
    y[31] &= 0x7f;
    y
}

impl PublicKey {
    /// Whether this can be one person's key: the only encoding of a point whose order is not small. For a
    /// point of small order signatures that fit many or all messages can be made by everybody, and ring
    /// does not ask.
    pub fn is_sound(&self) -> bool {
        let mut y = self.0;
        y[31] &= 0x7f;
        let canonical = !(y[0] >= 0xed && y[1..31].iter().all(|&b| b == 0xff) && y[31] == 0x7f);
        canonical && !SMALL_ORDER.contains(&y)
    }

    /// Whether `signature` is this key's over `message`. Nobody can alter a signature into another: ring
    /// refuses s >= L (RFC 8032, section 5.1.7).
    pub(crate) fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        self.is_sound() && UnparsedPublicKey::new(&ED25519, &self.0).verify(message, signature).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::BASE64.encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        data_encoding::BASE64
            .decode(text.trim().as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .filter(Self::is_sound)
            .ok_or_else(|| "not a public key: an Ed25519 key, 32 bytes in base64, is expected".to_owned())
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

/// A private key. No Debug, no Default; the seed is wiped when dropped.
pub struct SigningKey {
    seed: Zeroizing<[u8; 32]>,
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// A new key from the system's randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(seed.as_mut())?;
        Ok(Self::from_seed(&seed))
    }

    /// The key of a seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed)
            .unwrap_or_else(|_| unreachable!("a seed of 32 bytes is always a key"));
        Self { seed: Zeroizing::new(*seed), pair }
    }

    /// The seed, for storing in a place that only its owner can read.
    pub fn seed(&self) -> &Zeroizing<[u8; 32]> {
        &self.seed
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(bytes)
    }

    /// PKCS #8 (RFC 8410), for a TLS certificate of this key.
    pub fn pkcs8(&self) -> Zeroizing<Vec<u8>> {
        let head = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        Zeroizing::new(head.iter().chain(self.seed.iter()).copied().collect())
    }

    /// Signs `payload` under `context`.
    pub fn sign(&self, context: Context, payload: Vec<u8>) -> Envelope {
        let signature = self.pair.sign(&context.signed_bytes(&payload));
        let mut bytes = [0; 64];
        bytes.copy_from_slice(signature.as_ref());
        Envelope { context, payload: payload.into(), signature: bytes }
    }
}
