//! The Lease, and whether it still is ours.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kube::core::ApiResource;
use kube::{Client, Config};
use tokio::sync::{Mutex, OnceCell};

use super::object::Source;
use super::{client, own, write};
use crate::api::kind::{Kind, json, lease, typed};
use crate::api::{Error, Lease, Version, Versioned};

/// Writes begin so long after the Lease was seen to be ours at most.
const FRESH: Duration = Duration::from_secs(1);

/// Reads and writes the Lease, and refuses writes once it bears another's epoch.
///
/// The API cannot compare the Lease within the write of another object. What a leader that slept writes late is bounded:
/// a request is given up before a successor can lead, and bears the version of the object that it knows, so it fails
/// where the successor has written; what remains the successor sees, and mends.
pub(super) struct Fence {
    main: Client,
    config: Config,
    /// Made where the Lease is renewed first: its connections live in that thread, however busy the others are.
    renewing: OnceCell<Client>,
    epoch: AtomicU64,
    checked: Mutex<Option<(u64, Instant)>>,
}

impl Fence {
    pub(super) fn new(main: Client, config: Config) -> Self {
        Self { main, config, renewing: OnceCell::new(), epoch: AtomicU64::new(0), checked: Mutex::new(None) }
    }

    /// See [`crate::api::ClusterApi::lead_as`].
    pub(super) fn lead_as(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }

    /// Fails if another leads by now.
    pub(super) async fn check(&self) -> Result<(), Error> {
        let epoch = self.epoch.load(Ordering::Acquire);
        if epoch == 0 {
            return Ok(());
        }
        let mut checked = self.checked.lock().await;
        if checked.is_some_and(|(of, at)| of == epoch && at.elapsed() < FRESH) {
            return Ok(());
        }
        let begun = Instant::now();
        let lease = read(&self.main).await?;
        if lease.is_none_or(|lease| lease.value.epoch != epoch) {
            return Err(Error::NotLeading);
        }
        *checked = Some((epoch, begun));
        Ok(())
    }

    /// Who leads.
    pub(super) async fn lease(&self) -> Result<Option<Versioned<Lease>>, Error> {
        read(self.renewing().await?).await
    }

    /// Replaces the Lease.
    pub(super) async fn write_lease(
        &self,
        lease: &Lease,
        expected: Option<&Version>,
    ) -> Result<Version, Error> {
        let (id, body) = (own(lease::id())?, json(&own(lease::write(lease))?));
        let expected = expected.map(|version| version.0.as_str());
        let written = write::swap(self.renewing().await?, &resource()?, &id, body, expected).await?;
        Ok(Version(written.metadata.resource_version.unwrap_or_default()))
    }

    async fn renewing(&self) -> Result<&Client, Error> {
        self.renewing.get_or_try_init(|| async { client(self.config.clone()) }).await
    }
}

async fn read(client: &Client) -> Result<Option<Versioned<Lease>>, Error> {
    let id = own(lease::id())?;
    let Some(object) = write::get(client, &resource()?, &id).await? else { return Ok(None) };
    let version = Version(object.metadata.resource_version.clone().unwrap_or_default());
    let value = typed(&json(&object)).and_then(|object| lease::read(&object));
    let value =
        value.map_err(|problem| Error::Object { object: id.to_string(), message: problem.message })?;
    Ok(Some(Versioned { value, version }))
}

fn resource() -> Result<ApiResource, Error> {
    Source::Kind(Kind::Lease).resources().into_iter().next().ok_or(Error::Ending)
}
