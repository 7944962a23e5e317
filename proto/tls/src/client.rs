//! Calling a broker.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tombolo_proto::pb::exchange_client::ExchangeClient;
use tombolo_proto::trust::{PublicKey, SigningKey};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{MAX_MESSAGE, TlsError, client_config};

/// Why a broker was not reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The key or TLS.
    #[error("TLS cannot be set up")]
    Tls(#[source] TlsError),
    /// Nobody of that name.
    #[error("the name of broker {address} cannot be resolved")]
    Resolve {
        /// As configured.
        address: String,
        /// From the resolver.
        #[source]
        source: io::Error,
    },
    /// No answer.
    #[error("broker {address} does not answer")]
    Reach {
        /// As configured.
        address: String,
        /// From the system.
        #[source]
        source: io::Error,
    },
    /// Somebody else answered.
    #[error(
        "who answers at {address} is none of this set's brokers, by its key: nothing was told to it (is the address right, or was the broker given a new identity?)"
    )]
    Stranger {
        /// As configured.
        address: String,
    },
    /// The handshake failed otherwise.
    #[error("no TLS with broker {address}")]
    Handshake {
        /// As configured.
        address: String,
        /// From rustls.
        #[source]
        source: io::Error,
    },
    /// No HTTP/2.
    #[error("no HTTP/2 with broker {address}")]
    Transport {
        /// As configured.
        address: String,
        /// From tonic.
        #[source]
        source: tonic::transport::Error,
    },
}

/// How long one address, and then the handshake, may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a silent connection is asked whether it lives, and how long the answer may take.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Connects to the broker at `address` (`host:port`) if it has one of the keys `brokers`, as `own`. The first
/// connection is made now; the channel makes it anew by the same rules when it breaks.
pub async fn connect(
    address: &str,
    brokers: &[PublicKey],
    own: &SigningKey,
) -> Result<ExchangeClient<Channel>, ConnectError> {
    let config = client_config(brokers, own).map_err(ConnectError::Tls)?;
    let dialer = Dialer { address: address.into(), tls: TlsConnector::from(Arc::new(config)) };
    let first = Arc::new(Mutex::new(Some(dialer.dial().await?)));
    let connector = tower::service_fn(move |_: Uri| {
        let (dialer, first) = (dialer.clone(), first.clone());
        async move {
            let ready = first.lock().ok().and_then(|mut first| first.take());
            let stream = match ready {
                Some(stream) => stream,
                None => dialer.dial().await?,
            };
            Ok::<_, ConnectError>(TokioIo::new(stream))
        }
    });
    let transport = |source| ConnectError::Transport { address: address.to_owned(), source };
    let channel = Endpoint::from_static("http://tombolo-broker")
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .connect_with_connector(connector)
        .await
        .map_err(transport)?;
    Ok(ExchangeClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE))
}

#[derive(Clone)]
struct Dialer {
    address: Arc<str>,
    tls: TlsConnector,
}

impl Dialer {
    async fn dial(&self) -> Result<TlsStream<TcpStream>, ConnectError> {
        let address = || self.address.to_string();
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let stream = self.reach().await?;
        let name = ServerName::try_from("tombolo").unwrap_or_else(|_| unreachable!("it is a DNS name"));
        let shaken = tokio::time::timeout(PATIENCE, self.tls.connect(name, stream)).await;
        shaken.unwrap_or_else(|_| Err(late())).map_err(|source| {
            let inner = source.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
            match inner {
                Some(rustls::Error::InvalidCertificate(_)) => ConnectError::Stranger { address: address() },
                _ => ConnectError::Handshake { address: address(), source },
            }
        })
    }

    async fn reach(&self) -> Result<TcpStream, ConnectError> {
        let address = || self.address.to_string();
        let found = tokio::net::lookup_host(&*self.address)
            .await
            .map_err(|source| ConnectError::Resolve { address: address(), source })?;
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for socket in found.take(8) {
            match tokio::time::timeout(PATIENCE, TcpStream::connect(socket)).await {
                Ok(Ok(stream)) => {
                    let set = stream.set_nodelay(true);
                    return set
                        .map(|()| stream)
                        .map_err(|source| ConnectError::Reach { address: address(), source });
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(ConnectError::Reach { address: address(), source: last })
    }
}
