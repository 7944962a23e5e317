//! TLS by pinned keys. Both sides show a self-signed Ed25519 certificate, of which only the key counts: its
//! names and dates are never looked at, so nothing expires while a cluster is away. TLS 1.3 only.
//!
//! - [`client`]: for whoever calls a broker and knows by which key.
//! - [`server`]: for brokers, who take any key and judge by the session's first message.
#![forbid(unsafe_code)]

pub mod client;
pub mod server;

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};
use tombolo_proto::trust::{PublicKey, SigningKey};

/// Largest message in either direction, bytes.
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024;

/// Why a key or certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate could be made of the key.
    #[error("no TLS certificate can be made of the key")]
    Certificate(#[source] rcgen::Error),
    /// rustls does not take the set-up.
    #[error("TLS cannot be set up")]
    Setup(#[source] Error),
}

/// The key of a certificate; None if it is not an Ed25519 one.
pub fn certificate_key(certificate: &CertificateDer<'_>) -> Option<PublicKey> {
    // RFC 8410: SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING of 32 bytes }
    const HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    let info = parsed.subject_public_key_info();
    let key = info.as_ref().strip_prefix(&HEAD)?;
    Some(PublicKey(key.try_into().ok()?))
}

/// TLS of a client with the key `own`, which takes a server only by one of `servers`.
pub fn client_config(servers: &[PublicKey], own: &SigningKey) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = Servers { keys: servers.to_vec(), provider: provider.clone() };
    let (certificate, key) = certificate(own)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![certificate], key)
        .map_err(TlsError::Setup)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed connection would not show the key again.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS of a server with the key `own`, which takes every client that has an Ed25519 key and proves it.
pub fn server_config(own: &SigningKey) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let verifier = Clients { provider: provider.clone() };
    let (certificate, key) = certificate(own)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![certificate], key)
        .map_err(TlsError::Setup)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificate(own: &SigningKey) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError> {
    let der = PrivatePkcs8KeyDer::from(own.pkcs8().to_vec());
    let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ED25519)
        .map_err(TlsError::Certificate)?;
    // rcgen's own dates reach to the year 4096; nobody looks at them.
    let parameters =
        rcgen::CertificateParams::new(vec!["tombolo".to_owned()]).map_err(TlsError::Certificate)?;
    let certificate = parameters.self_signed(&pair).map_err(TlsError::Certificate)?;
    Ok((certificate.der().clone(), der.into()))
}

#[derive(Debug)]
struct Servers {
    keys: Vec<PublicKey>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match certificate_key(end_entity) {
            Some(key) if self.keys.contains(&key) => Ok(ServerCertVerified::assertion()),
            _ => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

#[derive(Debug)]
struct Clients {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match certificate_key(end_entity) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}
