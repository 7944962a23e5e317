//! How the API server is reached.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{Config, KubeConfigOptions, Kubeconfig};

use crate::api::Error;

/// To connect.
const CONNECT: Duration = Duration::from_secs(5);
/// Without a byte on a connection; a watch has a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(150);

/// Where the API server and the own identity are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// By the pod that this runs in. Its token is read again when it was renewed.
    InCluster,
    /// By a file as of kubectl.
    Kubeconfig(PathBuf),
}

impl Access {
    /// Reads it.
    pub(super) async fn config(&self) -> Result<Config, Error> {
        let mut config = match self {
            Self::InCluster => Config::incluster().map_err(|error| Error::Access {
                from: "the pod's service account".to_owned(),
                cause: error.to_string(),
            }),
            Self::Kubeconfig(path) => {
                let told = |error: kube::config::KubeconfigError| Error::Access {
                    from: path.display().to_string(),
                    cause: error.to_string(),
                };
                let file = Kubeconfig::read_from(path).map_err(told)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(told)
            }
        }?;
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(SILENCE);
        config.reset_reader_on_write = true;
        // Whoever asks tries again by itself, and knows how long it can wait.
        config.default_retry = false;
        Ok(config)
    }
}
