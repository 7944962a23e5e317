//! Talking to brokers: `Offer` and `Fetch`, which need no membership.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tombolo_proto::pb;
use tombolo_proto::trust::{Broker, PublicKey, SetId, SigningKey};
use tombolo_proto::wire::{Documents, decode_documents, encode_documents};
use tombolo_tls::client::connect;

use crate::output::plain;
use crate::set::new_key;

/// How long one broker may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of it, by the address of the broker, in the order of the list.
pub(super) type Results<T> = Vec<(String, Result<T>)>;

/// Hands documents to all brokers.
pub(super) fn offer(brokers: &[Broker], documents: &Documents) -> Result<Results<()>> {
    let request = pb::OfferRequest { documents: Some(encode_documents(documents)) };
    each(brokers, |broker, keys, own| {
        let request = request.clone();
        async move {
            let mut client = connect(&broker, &keys, &own).await?;
            let answer = client.offer(request).await.map_err(status)?.into_inner();
            if let Some(refusal) = answer.refusals.first() {
                bail!("it refuses {}: {}", text(&refusal.object), text(&refusal.reason));
            }
            Ok(())
        }
    })
}

/// Asks all brokers for the set's own documents. Nothing in them is verified yet.
pub(super) fn fetch(brokers: &[Broker], set: SetId) -> Result<Results<Documents>> {
    each(brokers, |broker, keys, own| async move {
        let mut client = connect(&broker, &keys, &own).await?;
        let request = pb::FetchRequest { set: set.0.to_vec().into() };
        let answer = client.fetch(request).await.map_err(status)?.into_inner();
        let documents = answer.documents.context("it answers with nothing")?;
        decode_documents(&documents).context("its answer cannot be read")
    })
}

/// Runs `work` with all brokers at once, on a small runtime of its own.
fn each<T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
    brokers: &[Broker],
    work: impl Fn(String, Vec<PublicKey>, Arc<SigningKey>) -> F,
) -> Result<Results<T>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    // Any key will do: neither call needs a membership.
    let own = Arc::new(new_key()?);
    let keys: Vec<PublicKey> = brokers.iter().map(|b| b.key).collect();
    let mut results: Vec<(usize, Result<T>)> = runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for (index, broker) in brokers.iter().enumerate() {
            let work = work(broker.address.clone(), keys.clone(), own.clone());
            tasks.spawn(async move {
                let late = || format!("no answer within {} s", PATIENCE.as_secs());
                (index, timeout(PATIENCE, work).await.with_context(late).and_then(|result| result))
            });
        }
        tasks.join_all().await
    });
    // A resolver that hangs is not waited for.
    runtime.shutdown_background();
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().filter_map(|(i, r)| Some((brokers.get(i)?.address.clone(), r))).collect())
}

fn status(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("it answers {:?}: {}", status.code(), text(status.message()))
}

/// A text from the wire, for people.
fn text(text: &str) -> String {
    plain(&text.chars().take(300).collect::<String>())
}
