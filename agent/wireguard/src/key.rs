//! Keys. Secret ones have no `Debug`, are wiped when dropped, and leave only as UAPI text.

use std::fmt;

use boringtun::x25519;
use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// A Curve25519 private key, never all zero.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; 32]);

/// A Curve25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

/// A preshared key, never all zero.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; 32]);

impl PrivateKey {
    /// From 32 bytes; `None` if they are all zero, which UAPI takes for "no key".
    pub fn new(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then_some(Self(bytes))
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.secret()).to_bytes())
    }

    /// As the noise engine wants it.
    pub(crate) fn secret(&self) -> x25519::StaticSecret {
        x25519::StaticSecret::from(self.0)
    }

    /// Lower case hexadecimal, as UAPI writes it.
    pub fn hex(&self) -> Zeroizing<String> {
        Zeroizing::new(HEXLOWER.encode(&self.0))
    }
}

impl PresharedKey {
    /// From 32 bytes; `None` if they are all zero, which UAPI takes for "no key".
    pub fn new(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then_some(Self(bytes))
    }

    pub(crate) fn bytes(&self) -> [u8; 32] {
        self.0
    }

    /// Lower case hexadecimal, as UAPI writes it.
    pub fn hex(&self) -> Zeroizing<String> {
        Zeroizing::new(HEXLOWER.encode(&self.0))
    }
}

impl PublicKey {
    /// From 32 bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) fn noise(&self) -> x25519::PublicKey {
        x25519::PublicKey::from(self.0)
    }

    /// Lower case hexadecimal, as UAPI writes it.
    pub fn hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }
}

impl fmt::Display for PublicKey {
    /// Base64, as `wg` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// 64 hexadecimal digits.
pub(crate) fn parse_hex(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    if text.len() != 64 {
        return None;
    }
    let bytes = Zeroizing::new(HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok()?);
    let mut key = Zeroizing::new([0u8; 32]);
    key.copy_from_slice(&bytes);
    Some(key)
}
