//! What other clusters state, out of the verified replica.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::object::ServiceKey;
use tombolo_proto::model::{
    Backends, ClusterId, Export, Namespace, Prefix, RecordKey, Scope, Subject, record_kind,
};
use tombolo_proto::trust::{Effective, Grant, Member, Membership, Revocations, Verified, effective};
use tombolo_proto::wire::{decode_backends, decode_export};
use tombolo_replica::{Interest, OriginState, Replica, ScopeRecords};

/// A replica at one moment: taken out in one step, and read while sessions go on.
#[derive(Clone)]
pub struct View {
    memberships: Vec<Membership>,
    revocations: Option<Verified<Revocations>>,
    /// Whose records are held.
    pub interest: Interest,
    /// What every cluster says.
    pub states: BTreeMap<ClusterId, Arc<OriginState>>,
}

impl View {
    /// Of a replica. Records are shared, not copied.
    pub fn of(replica: &Replica) -> Self {
        Self {
            memberships: replica.memberships().cloned().collect(),
            revocations: replica.revocations().cloned(),
            interest: replica.interest().clone(),
            states: replica.origins().map(|(c, s)| (c.clone(), s.clone())).collect(),
        }
    }

    /// The newest membership of a cluster that is not revoked.
    pub fn newest(&self, cluster: &ClusterId) -> Option<&Membership> {
        let own = self.memberships.iter().filter(|m| m.cluster() == cluster);
        own.max_by_key(|m| m.grant().serial)
    }

    /// Clusters with a membership that is not revoked.
    pub fn clusters(&self) -> BTreeSet<&ClusterId> {
        self.memberships.iter().map(|m| m.cluster()).collect()
    }

    /// A membership by its serial.
    pub fn membership(&self, cluster: &ClusterId, serial: u64) -> Option<&Membership> {
        self.memberships.iter().find(|m| m.cluster() == cluster && m.grant().serial == serial)
    }

    /// Whether the administrator ended a grant.
    pub fn revokes(&self, grant: &Grant) -> bool {
        self.revocations.as_ref().is_some_and(|list| list.revokes(grant))
    }
}

/// Who is a member, and with which ranges: what all services hang on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The own cluster; None if its membership is not known, or revoked.
    pub own: Option<Member>,
    /// All others.
    pub others: BTreeMap<ClusterId, Member>,
    /// What is wrong with any.
    pub findings: Vec<Finding>,
}

impl Frame {
    /// Of a replica at one moment. `ours`: ranges that are nobody else's here.
    pub fn of(view: &View, us: &ClusterId, ours: &BTreeSet<Prefix>) -> Self {
        let Effective { mut members, refused } =
            effective(&view.memberships, view.revocations.as_deref(), Some(us), ours);
        let mut findings: Vec<Finding> = refused.iter().map(super::member::refused_finding).collect();
        findings.sort();
        Self { own: members.remove(us), others: members, findings }
    }
}

/// Records whose keys are no subject's: so many are remembered of one scope.
const MAX_ODD: usize = 16;

/// What was seen of the records of every cluster: tells which services changed since.
#[derive(Default)]
pub struct Seen {
    scopes: BTreeMap<(ClusterId, Namespace), Arc<ScopeRecords>>,
    odd: BTreeMap<(ClusterId, Namespace), Vec<String>>,
}

impl Seen {
    /// Which services' records are others than the last time, by cluster.
    pub fn news(&mut self, view: &View, us: &ClusterId) -> BTreeMap<ClusterId, BTreeSet<ServiceKey>> {
        let mut news: BTreeMap<ClusterId, BTreeSet<ServiceKey>> = BTreeMap::new();
        let mut live = BTreeSet::new();
        let nothing = Arc::new(ScopeRecords::default());
        for (cluster, state) in view.states.iter().filter(|(cluster, _)| *cluster != us) {
            for (scope, records) in state.scopes() {
                let Scope::Namespace(namespace) = scope else { continue };
                let place = (cluster.clone(), namespace.clone());
                let old = self.scopes.get(&place).unwrap_or(&nothing);
                if !Arc::ptr_eq(old, records) {
                    let keys = old.changed(records);
                    let news = news.entry(cluster.clone()).or_default();
                    self.take(&place, scope, &keys, records, news);
                    self.scopes.insert(place.clone(), records.clone());
                }
                live.insert(place);
            }
        }
        // Withdrawn, revoked, or of a namespace that is not here any more.
        let gone: Vec<_> = self.scopes.keys().filter(|place| !live.contains(*place)).cloned().collect();
        for place in gone {
            self.odd.remove(&place);
            let Some(old) = self.scopes.remove(&place) else { continue };
            let keys: Vec<RecordKey> = old.iter().map(|(key, _)| key.clone()).collect();
            let news = news.entry(place.0.clone()).or_default();
            services(&Scope::Namespace(place.1.clone()), &keys, news);
        }
        news
    }

    fn take(
        &mut self,
        place: &(ClusterId, Namespace),
        scope: &Scope,
        keys: &[RecordKey],
        records: &ScopeRecords,
        news: &mut BTreeSet<ServiceKey>,
    ) {
        let odd = services(scope, keys, news);
        let known = self.odd.entry(place.clone()).or_default();
        known.retain(|text| !odd.iter().any(|key| format!("{key:?}") == *text));
        for key in odd.iter().filter(|key| records.get(key).is_some()) {
            if known.len() < MAX_ODD {
                known.push(format!("{key:?}"));
            }
        }
    }

    /// All services that a cluster says anything about.
    pub fn all(&self, of: &ClusterId, all: &mut BTreeSet<ServiceKey>) {
        for ((_, namespace), records) in self.scopes.iter().filter(|((cluster, _), _)| cluster == of) {
            for (key, _) in records.iter() {
                services(&Scope::Namespace(namespace.clone()), std::slice::from_ref(key), all);
            }
        }
    }

    /// Records that name nothing.
    pub fn findings(&self) -> Vec<Finding> {
        let finding = |(cluster, namespace): &(ClusterId, Namespace), key: &String| {
            invalid(cluster, format!("record {key} in namespace {namespace} names nothing and is left out"))
        };
        self.odd.iter().flat_map(|(place, keys)| keys.iter().map(|key| finding(place, key))).collect()
    }
}

/// Adds the services that keys are about; returns the keys that are about nothing.
fn services<'a>(scope: &Scope, keys: &'a [RecordKey], news: &mut BTreeSet<ServiceKey>) -> Vec<&'a RecordKey> {
    let Scope::Namespace(namespace) = scope else { return Vec::new() };
    let mut odd = Vec::new();
    for key in keys {
        match key.subject(scope) {
            Some(Subject::Export(name) | Subject::Backends(name, _)) => {
                news.insert(ServiceKey { namespace: namespace.clone(), name });
            }
            // Of a newer version: not for us.
            Some(Subject::Unknown(_) | Subject::Endpoint(_)) => {}
            None => odd.push(key),
        }
    }
    odd
}

/// A cluster's part in one service. A record that cannot be read is left out and named; its neighbours count.
pub fn part(
    cluster: &ClusterId,
    state: &OriginState,
    key: &ServiceKey,
    findings: &mut Vec<Finding>,
) -> (Option<Export>, BTreeMap<u32, Backends>) {
    let mut shards = BTreeMap::new();
    let scope = Scope::Namespace(key.namespace.clone());
    let Some(records) = state.records(&scope) else { return (None, shards) };
    let mut left_out = |record: &RecordKey, error: String| {
        if findings.len() < MAX_ODD {
            let text = format!(
                "record {record:?} in namespace {} cannot be read and is left out: {error}",
                key.namespace
            );
            findings.push(invalid(cluster, text));
        }
    };
    let mut export = None;
    let name = RecordKey::export(&key.name);
    if let Some(body) = records.get(&name) {
        match decode_export(body) {
            Ok(read) => export = Some(read),
            Err(error) => left_out(&name, error.to_string()),
        }
    }
    for (record, body) in records.of(record_kind::BACKENDS, key.name.as_str()) {
        let Some(Subject::Backends(_, shard)) = record.subject(&scope) else { continue };
        match decode_backends(body) {
            Ok(backends) => {
                shards.insert(shard, backends);
            }
            Err(error) => left_out(record, error.to_string()),
        }
    }
    (export, shards)
}

fn invalid(cluster: &ClusterId, message: String) -> Finding {
    Finding {
        severity: Severity::Error,
        reason: "RecordInvalid",
        object: format!("cluster {cluster}"),
        message,
    }
}

/// Namespaces that are wanted and stated, and not here yet.
pub fn missing(interest: &Interest, state: &OriginState) -> BTreeSet<Namespace> {
    state
        .leaves()
        .keys()
        .filter(|scope| interest.wants(scope) && state.records(scope).is_none())
        .filter_map(|scope| match scope {
            Scope::Namespace(namespace) => Some(namespace.clone()),
            Scope::Nodes => None,
        })
        .collect()
}
