//! Accepting.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tombolo_proto::trust::{PublicKey, SigningKey};
use tonic::transport::server::Connected;

use crate::{TlsError, certificate_key, server_config};

/// Does handshakes with the broker's key.
#[derive(Clone)]
pub struct Acceptor {
    tls: TlsAcceptor,
}

impl Acceptor {
    /// With the broker's own key.
    pub fn new(own: &SigningKey) -> Result<Self, TlsError> {
        Ok(Self { tls: TlsAcceptor::from(Arc::new(server_config(own)?)) })
    }

    /// Shakes hands. The caller bounds the time.
    pub async fn accept(&self, stream: TcpStream, address: SocketAddr) -> io::Result<Accepted> {
        stream.set_nodelay(true)?;
        let stream = self.tls.accept(stream).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let key = certificate.and_then(certificate_key);
        let key = key.ok_or_else(|| io::Error::other("the client has no Ed25519 certificate"))?;
        Ok(Accepted { stream, peer: Peer { address, key }, guard: None })
    }
}

/// Who called: found in a request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Where it calls from.
    pub address: SocketAddr,
    /// The key whose possession it proved.
    pub key: PublicKey,
}

/// A connection that shook hands.
pub struct Accepted {
    stream: tokio_rustls::server::TlsStream<TcpStream>,
    peer: Peer,
    guard: Option<Box<dyn Send + Sync + Unpin>>,
}

impl Accepted {
    /// Who called.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Keeps something, such as a permit, for as long as the connection is open.
    #[must_use]
    pub fn with_guard(mut self, guard: impl Send + Sync + Unpin + 'static) -> Self {
        self.guard = Some(Box::new(guard));
        self
    }
}

impl Connected for Accepted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer
    }
}

impl AsyncRead for Accepted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
