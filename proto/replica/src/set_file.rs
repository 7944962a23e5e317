//! The file by which a broker knows its set.

use data_encoding::BASE64URL_NOPAD;
use prost::Message as _;
use tombolo_proto::pb;
use tombolo_proto::trust::{Brokers, RootChain, TrustError, Verified};
use tombolo_proto::wire::{self, Documents, WireError};

/// A set's roots and brokers, verified: `tombolo init` writes it as `broker.set`, a broker starts from it. It
/// holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetFile {
    /// Root keys.
    pub roots: RootChain,
    /// Who may be a broker.
    pub brokers: Verified<Brokers>,
}

impl SetFile {
    /// Head of the text.
    pub const PREFIX: &'static str = "tombolo-set1.";
    /// Characters of the text.
    pub const MAX_TEXT: usize = 256 * 1024;

    /// Reads and checks the text.
    pub fn parse(text: &str) -> Result<Self, SetFileError> {
        let text = text.trim();
        let body = text.strip_prefix(Self::PREFIX).ok_or(SetFileError::Form)?;
        if text.len() > Self::MAX_TEXT {
            return Err(SetFileError::Form);
        }
        let bytes = BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|_| SetFileError::Damaged)?;
        let value = pb::Documents::decode(bytes.as_slice()).map_err(|_| SetFileError::Damaged)?;
        let documents = wire::decode_documents(&value).map_err(SetFileError::Wire)?;
        let (first, rest) = documents.roots.split_first().ok_or(SetFileError::Damaged)?;
        let mut roots = RootChain::first(first).map_err(SetFileError::Trust)?;
        for envelope in rest {
            roots.advance(envelope).map_err(SetFileError::Trust)?;
        }
        let brokers = documents.brokers.ok_or(SetFileError::Damaged)?;
        let brokers = roots.brokers(&brokers).map_err(SetFileError::Trust)?;
        Ok(Self { roots, brokers })
    }

    /// The text, one line.
    pub fn to_text(&self) -> String {
        let documents = wire::encode_documents(&Documents {
            roots: self.roots.envelopes().cloned().collect(),
            brokers: Some(self.brokers.envelope().clone()),
            ..Documents::default()
        });
        format!("{}{}", Self::PREFIX, BASE64URL_NOPAD.encode(&documents.encode_to_vec()))
    }
}

/// Why a text is not a set file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetFileError {
    /// Something else altogether.
    #[error(
        "this is not a Tombolo set file: it should begin with {:?}; `tombolo init` writes one",
        SetFile::PREFIX
    )]
    Form,
    /// Cut or altered.
    #[error("the set file is damaged (cut off or altered on the way?); copy it again, whole")]
    Damaged,
    /// Not readable.
    #[error("the set file is damaged; copy it again, whole")]
    Wire(#[source] WireError),
    /// Not signed as it should be.
    #[error("the set file is not to be trusted; take it again from where `tombolo init` was run")]
    Trust(#[source] TrustError),
}

#[cfg(test)]
mod tests {
    use tombolo_proto::model::SetName;
    use tombolo_proto::trust::{Roots, SigningKey};

    use super::*;

    fn file() -> SetFile {
        let root = SigningKey::from_seed(&[7; 32]);
        let name = SetName::new("harbour").unwrap();
        let first = Roots { version: 1, name, keys: vec![root.public()], previous: None };
        let roots = RootChain::first(&first.sign(&root)).unwrap();
        let brokers = Brokers { set: roots.set(), version: 1, brokers: Vec::new() }.sign(&root);
        let brokers = roots.brokers(&brokers).unwrap();
        SetFile { roots, brokers }
    }

    #[test]
    fn goes_through_text() {
        let text = file().to_text();
        assert_eq!(SetFile::parse(&format!("{text}\n")).unwrap(), file());
        for cut in 0..text.len() {
            assert!(SetFile::parse(&text[..cut]).is_err(), "cut at {cut}");
        }
    }
}
