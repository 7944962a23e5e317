//! Watches the API server, and tells what the agent observes.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, pin_mut};
use kube::api::{Api, DynamicObject, ListParams, WatchEvent, WatchParams};
use kube::core::{ApiResource, Status};
use kube::{Client, ResourceExt as _};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::object::{self, Scope, Source};
use super::table::{Entry, Name, Tables};
use crate::api::kind::{Kind, json};
use crate::api::observed::Observed;

/// Changes that come together are told together.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// However long telling takes, the next time is so long after it at the latest.
const BRAKE: Duration = Duration::from_millis(300);
/// After a failure; doubled up to [`RETRY_MAX`], so that an API server that is back is heard within seconds.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Whether the API serves a kind by now is asked again after so long.
const ABSENT: Duration = Duration::from_secs(30);
/// Objects that are listed at a time.
const PAGE: u32 = 500;

/// What watchers and writers share.
pub(super) struct Shared {
    tables: Mutex<Tables>,
    /// Something is to be told.
    news: Notify,
    /// What each kind is served as, where that is known: the version to write.
    served: Mutex<BTreeMap<Source, ApiResource>>,
    /// The cluster's definition of ServiceImports is older than `status.endpointSliceObjects` (mcs-api v0.5.2). A newer one
    /// is noticed by the next process.
    pub(super) older_imports: AtomicBool,
}

impl Shared {
    pub(super) fn new(tables: Tables) -> Self {
        Self {
            tables: Mutex::new(tables),
            news: Notify::new(),
            served: Mutex::default(),
            older_imports: AtomicBool::new(false),
        }
    }

    /// Looks at, or changes, what was told.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Tables) -> T) -> T {
        look(&mut self.tables.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What a kind is served as; before that is known, the newest version.
    pub(super) fn served(&self, source: Source) -> Option<ApiResource> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.get(&source).cloned().or_else(|| source.resources().into_iter().next())
    }

    /// The same, once it was listed.
    pub(super) fn listed(&self, source: Source) -> Option<ApiResource> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).get(&source).cloned()
    }

    fn serve(&self, source: Source, resource: ApiResource) {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).insert(source, resource);
    }

    /// There is something to tell.
    pub(super) fn tell(&self) {
        self.news.notify_one();
    }
}

/// The tasks; they end with this.
pub(super) struct Watching {
    tasks: Vec<JoinHandle<()>>,
    told: watch::Receiver<Arc<Observed>>,
}

impl Watching {
    /// Starts them in the present runtime.
    pub(super) fn start(client: &Client, shared: &Arc<Shared>, scope: &Scope) -> Self {
        let (tell, told) = watch::channel(Arc::new(Observed::default()));
        let mut tasks = vec![tokio::spawn(publish(shared.clone(), tell))];
        for source in scope.sources() {
            tasks.push(tokio::spawn(follow(client.clone(), shared.clone(), source, scope.clone())));
        }
        Self { tasks, told }
    }

    pub(super) fn receiver(&self) -> watch::Receiver<Arc<Observed>> {
        self.told.clone()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn publish(shared: Arc<Shared>, tell: watch::Sender<Arc<Observed>>) {
    loop {
        shared.news.notified().await;
        tokio::time::sleep(DEBOUNCE).await;
        let begun = Instant::now();
        let all = shared.clone();
        // Much of it takes long, and holds up nobody there.
        let built = tokio::task::spawn_blocking(move || all.with(|tables| tables.observed())).await;
        let Ok(observed) = built else { continue };
        tell.send_if_modified(|old| {
            let news = **old != observed;
            if news {
                *old = Arc::new(observed);
            }
            news
        });
        tokio::time::sleep(begun.elapsed().min(BRAKE)).await;
    }
}

/// Follows a source for ever. Whatever fails, what was told last stays.
async fn follow(client: Client, shared: Arc<Shared>, source: Source, scope: Scope) {
    let follower = Follower { client, shared, source, scope };
    let mut patience = Patience::default();
    loop {
        let mut absent = true;
        for resource in source.resources() {
            absent = follower.version(&resource, &mut patience).await;
            if !absent {
                break;
            }
        }
        if absent {
            follower.absent().await;
        }
    }
}

struct Follower {
    client: Client,
    shared: Arc<Shared>,
    source: Source,
    scope: Scope,
}

/// Why a list or a watch ended.
enum End {
    /// The API has no such kind, in this version.
    NotServed,
    /// What was known of is too old: list again.
    Expired,
    /// As watches do after some minutes.
    Done,
    Failed(String),
}

impl End {
    fn of(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::answered(status),
            other => Self::Failed(problem(other)),
        }
    }

    fn answered(status: &Status) -> Self {
        match status.code {
            404 => Self::NotServed,
            410 => Self::Expired,
            _ => Self::Failed(status.message.clone()),
        }
    }
}

impl Follower {
    /// Lists and watches by one version of the kind, until it is not served. True if it never was.
    async fn version(&self, resource: &ApiResource, patience: &mut Patience) -> bool {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), resource);
        // The version of the list that is followed; none: list first.
        let mut place: Option<String> = None;
        let mut served = false;
        loop {
            let outcome = match &mut place {
                None => match self.list(&api).await {
                    Ok(version) => {
                        self.shared.serve(self.source, resource.clone());
                        served = true;
                        place = Some(version);
                        Ok(())
                    }
                    Err(end) => Err(end),
                },
                Some(place) => Err(self.watch(&api, place, patience).await),
            };
            match outcome {
                Ok(()) | Err(End::Done) => {}
                Err(End::NotServed) => return !served,
                Err(End::Expired) => place = None,
                Err(End::Failed(why)) => {
                    self.trouble(&why);
                    tokio::time::sleep(patience.wait()).await;
                }
            }
        }
    }

    /// Lists all, a page at a time; the version to go on from.
    async fn list(&self, api: &Api<DynamicObject>) -> Result<String, End> {
        let (label_selector, field_selector) = self.source.selectors(&self.scope);
        let mut params =
            ListParams { label_selector, field_selector, limit: Some(PAGE), ..ListParams::default() };
        self.shared.with(|tables| tables.begin(self.source));
        loop {
            let page = api.list(&params).await.map_err(|error| End::of(&error))?;
            for object in page.items {
                let (name, entry) = parse(self.source, object);
                self.shared.with(|tables| tables.put(self.source, name, entry));
            }
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                self.shared.with(|tables| tables.end(self.source));
                self.fine();
                self.shared.tell();
                return Ok(page.metadata.resource_version.unwrap_or_default());
            }
        }
    }

    /// Watches from a version on, which it moves.
    async fn watch(&self, api: &Api<DynamicObject>, place: &mut String, patience: &mut Patience) -> End {
        let (label_selector, field_selector) = self.source.selectors(&self.scope);
        let params = WatchParams { label_selector, field_selector, ..WatchParams::default() };
        let events = match api.watch(&params, place).await {
            Ok(events) => events,
            Err(error) => return End::of(&error),
        };
        pin_mut!(events);
        self.fine();
        patience.reset();
        while let Some(event) = events.next().await {
            let (object, gone) = match event {
                Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => (object, false),
                Ok(WatchEvent::Deleted(object)) => (object, true),
                Ok(WatchEvent::Bookmark(mark)) => {
                    *place = mark.metadata.resource_version;
                    continue;
                }
                Ok(WatchEvent::Error(status)) => return End::answered(&status),
                Err(error) => return End::of(&error),
            };
            let (name, entry) = parse(self.source, object);
            place.clone_from(&entry.version);
            let news = self.shared.with(|tables| {
                if gone { tables.remove(self.source, &name) } else { tables.put(self.source, name, entry) }
            });
            if news {
                self.shared.tell();
            }
        }
        End::Done
    }

    fn trouble(&self, why: &str) {
        if self.shared.with(|tables| tables.trouble(self.source, why.to_owned())) {
            self.shared.tell();
            warn!(kind = self.source.name(), "cannot watch the cluster's API, retrying: {why}");
        }
    }

    fn fine(&self) {
        if self.shared.with(|tables| tables.fine(self.source)) {
            self.shared.tell();
            info!(kind = self.source.name(), "the cluster's API is watched again");
        }
    }

    /// The API serves no version of the kind, for now.
    async fn absent(&self) {
        if self.source.is_optional() {
            if self.shared.with(|tables| tables.absent(self.source)) {
                self.shared.tell();
            }
            tokio::time::sleep(ABSENT).await;
        } else {
            self.trouble("the API server does not serve this kind; apply deploy/crds");
            tokio::time::sleep(RETRY_MAX).await;
        }
    }
}

fn name(object: &DynamicObject) -> Name {
    Name { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
}

/// Reads an object; nothing else of it is kept.
pub(super) fn parse(source: Source, mut object: DynamicObject) -> (Name, Entry) {
    object.metadata.managed_fields = None;
    let name = name(&object);
    let version = object.metadata.resource_version.clone().unwrap_or_default();
    let generation = object.metadata.generation;
    let bears_events = matches!(source, Source::Kind(Kind::ServiceExport | Kind::Member));
    let uid = object.metadata.uid.take().filter(|_| bears_events).map(String::into_boxed_str);
    let (object, problem) = match object::read(source, &mut json(&object)) {
        Ok(object) => (Some(Arc::new(object)), None),
        Err(problem) => (None, Some(problem)),
    };
    (name, Entry { version, generation, uid, object, problem })
}

/// An error of the client, in one line and each part once.
pub(super) fn problem(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return status.message.clone();
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// How long to wait after a failure.
#[derive(Debug, Default)]
pub(super) struct Patience {
    failures: u32,
}

impl Patience {
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Doubles, up to a bound; somewhere in its upper half, so that not all come at once.
    pub(super) fn wait(&mut self) -> Duration {
        let most = RETRY.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        let mut random = [0_u8; 1];
        // Without randomness all come at once, which is no harm.
        let _ = getrandom::fill(&mut random);
        most / 2 + most * u32::from(random[0]) / 512
    }
}
