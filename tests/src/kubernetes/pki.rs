//! The certificates of a cluster's control plane and the kubeconfigs of who talks to it.

use std::path::Path;

use anyhow::{Context, Result};
use data_encoding::BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// A cluster's certificate authority, for servers and clients.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
pub(super) struct Identity {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Authority {
    pub(super) fn create() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "lab");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    pub(super) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// For a server with these names and addresses.
    pub(super) fn server(&self, names: Vec<String>) -> Result<Identity> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "server");
        self.issue(params, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// For a client: the API server takes the common name for the user, the organization for a group.
    pub(super) fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String(user.to_owned()));
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, DnValue::Utf8String(group.to_owned()));
        }
        self.issue(params, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(&self, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> Result<Identity> {
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The kubeconfig of who talks to the API server of this cluster at this URL.
    pub(super) fn kubeconfig(&self, cluster: &str, server: &str, identity: &Identity) -> String {
        let user = serde_json::json!({
            "client-certificate-data": BASE64.encode(identity.certificate.as_bytes()),
            "client-key-data": BASE64.encode(identity.key.as_bytes()),
        });
        let authority = BASE64.encode(self.pem().as_bytes());
        // JSON is YAML.
        serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": cluster,
                "cluster": { "server": server, "certificate-authority-data": authority },
            }],
            "users": [{ "name": cluster, "user": user }],
            "contexts": [{ "name": cluster, "context": { "cluster": cluster, "user": cluster } }],
            "current-context": cluster,
        })
        .to_string()
    }
}

/// The key that signs ServiceAccounts' tokens: `sa.key` and `sa.pub`.
pub(super) fn token_key(dir: &Path) -> Result<()> {
    let key = KeyPair::generate()?;
    write(dir, "sa.key", &key.serialize_pem())?;
    write(dir, "sa.pub", &key.public_key_pem())
}

pub(super) fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    let file = dir.join(name);
    std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
}
