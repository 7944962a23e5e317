//! A broker that speaks the transport and nothing more: whatever bytes it likes, framed as gRPC.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use prost::bytes::{Buf, BufMut};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_broker::config;
use tombolo_lab::{Lab, program, wait_until};
use tombolo_proto::pb;
use tombolo_tls::server::{Accepted, Acceptor};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};

use crate::honest::{self, SOON, intact, logged, metric};
use crate::mallory::runtime;

/// Bytes as they are.
#[derive(Clone, Copy, Default)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

/// Says one of its things to everybody who calls, in turn, until there is none left; then it only listens.
#[derive(Clone)]
struct Says {
    things: Arc<Vec<Vec<u8>>>,
    said: Arc<AtomicUsize>,
}

impl StreamingService<Vec<u8>> for Says {
    type Response = Vec<u8>;
    type ResponseStream = ReceiverStream<Result<Vec<u8>, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let says = self.clone();
        Box::pin(async move {
            let (out, stream) = mpsc::channel(4);
            tokio::spawn(async move {
                let mut inbound = request.into_inner();
                // Whoever called said hello first.
                let _ = inbound.message().await;
                let number = says.said.fetch_add(1, Ordering::Relaxed);
                if let Some(thing) = says.things.get(number % says.things.len().max(1)) {
                    let _ = out.send(Ok(thing.clone())).await;
                }
                while let Ok(Some(_)) = inbound.message().await {}
            });
            Ok(Response::new(ReceiverStream::new(stream)))
        })
    }
}

impl<B> Service<http::Request<B>> for Says
where
    B: tonic::codegen::Body<Data: Send, Error: Into<tonic::codegen::StdError> + Send> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let says = self.clone();
        Box::pin(async move { Ok(Grpc::new(Bytes).streaming(says, request).await) })
    }
}

impl NamedService for Says {
    const NAME: &'static str = "tombolo.v1.Exchange";
}

/// Takes a broker's place with its key, and says these things.
fn replace(lab: &Lab, place: &str, things: Vec<Vec<u8>>) -> Result<(Runtime, Arc<AtomicUsize>)> {
    lab.kill(place, "broker")?;
    let identity = config::read_identity(&lab.state_dir(place).join(program::BROKER_KEY))?;
    let acceptor = Acceptor::new(&identity)?;
    let says = Says { things: Arc::new(things), said: Arc::default() };
    let said = says.said.clone();
    let runtime = runtime(lab, place)?;
    let address = SocketAddr::from(([0u16; 8], program::BROKER_PORT));
    runtime.spawn(async move {
        let listener = TcpListener::bind(address).await?;
        let (accepted, incoming) = mpsc::channel::<std::io::Result<Accepted>>(4);
        let serve = tonic::transport::Server::builder()
            .add_service(says)
            .serve_with_incoming(ReceiverStream::new(incoming));
        tokio::spawn(serve);
        loop {
            let (stream, address) = listener.accept().await?;
            let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
            tokio::spawn(async move {
                if let Ok(connection) = acceptor.accept(stream, address).await {
                    let _ = accepted.send(Ok(connection)).await;
                }
            });
        }
        #[allow(unreachable_code)]
        anyhow::Ok(())
    });
    Ok((runtime, said))
}

/// What no honest broker sends.
fn things() -> Vec<Vec<u8>> {
    use pb::message::Kind;
    let message = |kind| pb::Message { kind: Some(kind) }.encode_to_vec();
    let key = |part: &str| Some(pb::RecordKey { kind: 2, name: vec![part.to_owned()] });
    let scope = |name: &str| Some(pb::Scope { kind: 2, name: name.to_owned() });
    let chunk = |scope, key, body: Vec<u8>| {
        message(Kind::Chunk(pb::Chunk {
            origin: "us-east".into(),
            scope,
            index: 0,
            last: true,
            records: vec![pb::Record { key, body: body.into() }],
        }))
    };
    let envelope = |signature: Vec<u8>| {
        Some(pb::Envelope {
            payload: vec![1, 2, 3].into(),
            signature: signature.into(),
            ..Default::default()
        })
    };
    vec![
        // No protobuf: a tag that never ends, a length beyond the end, groups.
        vec![0xff; 64],
        vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f],
        [0x0b_u8; 4096].to_vec(),
        // Larger than any message may be.
        vec![0; 64 << 20],
        // A record larger than any may be, names and scopes that are paths, texts that move cursors.
        chunk(scope("production"), key("a"), vec![1; 64 * 1024 + 1]),
        chunk(scope("../../pwned"), key("a"), vec![1]),
        chunk(scope("production"), key("\u{1b}[2J\r\npwned"), vec![1]),
        // A signature that is none.
        message(Kind::Update(pb::Update {
            origin: "us-east".into(),
            statement: envelope(vec![7; 3]),
            ..Default::default()
        })),
        message(Kind::Alarm(pb::Alarm { object: "\n\n".into(), reason: "\u{1b}]0;pwned\u{7}".into() })),
        message(Kind::Hello(pb::Hello::default())),
    ]
}

#[test]
fn an_evil_broker_that_sends_no_messages_at_all() {
    honest::story("raw::an_evil_broker_that_sends_no_messages_at_all", || {
        let lab = honest::up()?;
        let things = things();
        let count = things.len();
        let before = metric(&lab, "eu-west", "tombolo_refusals_total")?;
        let flow = lab.udp_flow("us-c", lab.topology().pod("eu-c")?.v4.into(), 200)?;
        let (runtime, said) = replace(&lab, "broker", things)?;
        wait_until("everything to be said to both", SOON * 2, || {
            let now = said.load(Ordering::Relaxed);
            ensure!(now >= 2 * count, "{now} of {}", 2 * count);
            Ok(())
        })?;
        for cluster in ["eu-west", "us-east"] {
            logged(&lab, cluster, &["no session, retrying; nothing is withdrawn"])?;
        }
        let now = metric(&lab, "eu-west", "tombolo_refusals_total")?;
        ensure!(now > before, "{now} refusals counted, {before} before");
        intact(&lab, "nobody", &["web.production", "api-service.production", "db.production"])?;
        honest::talk(&lab)?;
        let report = flow.stop_udp()?;
        ensure!(report.sent > 50 && report.lost == 0, "traffic suffered: {report:?}");
        // An honest one again: it goes on where it was.
        runtime.shutdown_timeout(SOON);
        honest::port_free(&lab, "broker", program::BROKER_PORT)?;
        lab.restart("broker", "broker").context("the honest broker")?;
        lab.export("us-east", "production", "web")?;
        wait_until("news", SOON, || {
            ensure!(lab.ask("eu-c", "web.production.svc.clusterset.local", 1)?.0 == 0, "web is not there");
            Ok(())
        })
        .map(drop)
    });
}
