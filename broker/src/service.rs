//! The gRPC service.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_proto::pb;
use tombolo_proto::pb::exchange_server::Exchange;
use tombolo_proto::trust::RootChain;
use tombolo_proto::wire::{self, Documents};
use tombolo_tls::server::Peer;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::session::{self, QUEUE};
use crate::shared::{Shared, lock, unix_now};

pub(crate) struct Service {
    pub(crate) shared: Arc<Shared>,
}

impl Service {
    fn limited(&self, rpc: &'static str, peer: Peer) -> Result<(), Status> {
        if lock(&self.shared.limiter).take(peer.address.ip(), self.shared.now()) {
            return Ok(());
        }
        self.shared.metrics.request(rpc, "limited");
        Err(Status::resource_exhausted("too many requests from this address; wait a few seconds"))
    }
}

fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    request.extensions().get().copied().ok_or_else(|| Status::internal("the connection has no peer"))
}

#[tonic::async_trait]
impl Exchange for Service {
    type SessionStream = ReceiverStream<Result<pb::Message, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::Message>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = peer(&request)?;
        let (out, outbound) = mpsc::channel(QUEUE);
        tokio::spawn(session::run(self.shared.clone(), peer, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(outbound)))
    }

    async fn offer(&self, request: Request<pb::OfferRequest>) -> Result<Response<pb::OfferResponse>, Status> {
        let peer = peer(&request)?;
        self.limited("offer", peer)?;
        let documents = request.into_inner().documents.unwrap_or_default();
        let documents = wire::decode_documents(&documents).map_err(|error| {
            self.shared.metrics.request("offer", "unreadable");
            Status::invalid_argument(error.to_string())
        })?;
        let (late, refused, new) = {
            let mut replica = self.shared.replica();
            let (documents, late) = self.shared.admission.sift(&replica, documents, unix_now());
            let before = replica.version();
            let refused = replica.offer_documents(&documents);
            self.shared.announce(&replica);
            (late, refused, replica.version() != before)
        };
        if new {
            info!(address = %peer.address, key = %peer.key, "documents taken by offer");
        }
        let late = late.into_iter().map(|denied| ("a membership".to_owned(), denied.to_string()));
        let refused = refused.into_iter().map(|r| (r.object.to_string(), r.reason.to_string()));
        let refusals: Vec<_> =
            late.chain(refused).map(|(object, reason)| pb::Refusal { object, reason }).collect();
        for refusal in &refusals {
            self.shared.metrics.refusals.inc();
            warn!(address = %peer.address, object = refusal.object, reason = refusal.reason, "offer refused");
        }
        self.shared.metrics.request("offer", if refusals.is_empty() { "taken" } else { "refused" });
        Ok(Response::new(pb::OfferResponse { refusals }))
    }

    async fn fetch(&self, request: Request<pb::FetchRequest>) -> Result<Response<pb::FetchResponse>, Status> {
        let peer = peer(&request)?;
        self.limited("fetch", peer)?;
        let set = request.into_inner().set;
        let (ours, mut documents) = {
            let replica = self.shared.replica();
            (replica.set(), replica.documents())
        };
        if !set.is_empty() && set.as_ref() != ours.0 {
            self.shared.metrics.request("fetch", "other set");
            return Err(Status::not_found(format!("this broker serves set {ours}")));
        }
        debug_assert!(documents.roots.len() <= RootChain::MAX_VERSIONS);
        documents.memberships.truncate(Documents::MAX_MEMBERSHIPS);
        self.shared.metrics.request("fetch", "answered");
        Ok(Response::new(pb::FetchResponse { documents: Some(wire::encode_documents(&documents)) }))
    }
}
