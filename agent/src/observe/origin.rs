//! What other clusters state, out of the verified replica.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::object::ServiceKey;
use tombolo_agent_core::world::Foreign;
use tombolo_proto::model::{
    Backends, ClusterId, Export, Namespace, Prefix, Record, Scope, ServiceName, record_kind,
};
use tombolo_proto::trust::{Effective, Grant, Member, Membership, Revocations, Verified, effective};
use tombolo_proto::wire::{decode_backends, decode_export};
use tombolo_replica::{Interest, OriginState, Replica, ScopeRecords};

use super::member::endpoints;

/// Records of a namespace, read.
#[derive(Default)]
struct Read {
    exports: BTreeMap<ServiceKey, Export>,
    backends: BTreeMap<ServiceKey, BTreeMap<u32, Backends>>,
    findings: Vec<Finding>,
}

/// Reads records, each set of them once.
#[derive(Default)]
pub struct Reader {
    read: BTreeMap<(ClusterId, Scope), (Arc<ScopeRecords>, Read)>,
}

/// A replica at one moment: taken out in one step, and read while sessions go on.
#[derive(Clone)]
pub struct View {
    memberships: Vec<Membership>,
    revocations: Option<Verified<Revocations>>,
    interest: Interest,
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

    /// A membership by its serial.
    pub fn membership(&self, cluster: &ClusterId, serial: u64) -> Option<&Membership> {
        self.memberships.iter().find(|m| m.cluster() == cluster && m.grant().serial == serial)
    }

    /// Whether the administrator ended a grant.
    pub fn revokes(&self, grant: &Grant) -> bool {
        self.revocations.as_ref().is_some_and(|list| list.revokes(grant))
    }
}

/// Own and other clusters as the plan wants them.
pub struct Origins {
    /// The own cluster; None if its membership is not known, or revoked.
    pub own: Option<Member>,
    /// All others that have spoken.
    pub foreign: BTreeMap<ClusterId, Foreign>,
    /// Members that have not, as far as is known here.
    pub silent: BTreeSet<ClusterId>,
    /// What is wrong with any.
    pub findings: Vec<Finding>,
}

impl Reader {
    /// Reads all that is new.
    pub fn read(&mut self, view: &View, us: &ClusterId, ours: &BTreeSet<Prefix>) -> Origins {
        let Effective { mut members, refused } =
            effective(&view.memberships, view.revocations.as_deref(), Some(us), ours);
        let mut findings: Vec<Finding> = refused.iter().map(super::member::refused_finding).collect();
        let own = members.remove(us);
        let mut foreign = BTreeMap::new();
        let mut silent = BTreeSet::new();
        let mut live = BTreeSet::new();
        for (cluster, member) in members {
            match view.states.get(&cluster) {
                Some(state) => {
                    let missing = missing(&view.interest, state);
                    let found = self.foreign(&cluster, member, state, missing, &mut live, &mut findings);
                    foreign.insert(cluster, found);
                }
                None => {
                    silent.insert(cluster);
                }
            }
        }
        self.read.retain(|key, _| live.contains(key));
        findings.sort();
        Origins { own, foreign, silent, findings }
    }

    fn foreign(
        &mut self,
        cluster: &ClusterId,
        member: Member,
        state: &OriginState,
        unknown_namespaces: BTreeSet<Namespace>,
        live: &mut BTreeSet<(ClusterId, Scope)>,
        findings: &mut Vec<Finding>,
    ) -> Foreign {
        let mut foreign = Foreign {
            member,
            position: state.position(),
            nodes: BTreeMap::new(),
            exports: BTreeMap::new(),
            backends: BTreeMap::new(),
            unknown_namespaces,
        };
        for (scope, records) in state.scopes() {
            match scope {
                Scope::Nodes => {
                    let all: Vec<Record> = whole(records);
                    foreign.nodes = endpoints(cluster, &all, findings);
                }
                Scope::Namespace(namespace) => {
                    let key = (cluster.clone(), scope.clone());
                    let known = self.read.get(&key).is_some_and(|(old, _)| Arc::ptr_eq(old, records));
                    if !known {
                        let read = read(cluster, namespace, records);
                        self.read.insert(key.clone(), (records.clone(), read));
                    }
                    if let Some((_, read)) = self.read.get(&key) {
                        foreign.exports.extend(read.exports.iter().map(|(k, v)| (k.clone(), v.clone())));
                        foreign.backends.extend(read.backends.iter().map(|(k, v)| (k.clone(), v.clone())));
                        findings.extend(read.findings.iter().cloned());
                    }
                    live.insert(key);
                }
            }
        }
        foreign
    }
}

fn whole(records: &ScopeRecords) -> Vec<Record> {
    records.iter().map(|(key, body)| Record { key: key.clone(), body: body.clone() }).collect()
}

/// Namespaces that are wanted and stated, and not here yet.
fn missing(interest: &Interest, state: &OriginState) -> BTreeSet<Namespace> {
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

/// A record that cannot be read is left out and named; its neighbours count.
fn read(cluster: &ClusterId, namespace: &Namespace, records: &ScopeRecords) -> Read {
    let mut read = Read::default();
    for (key, body) in records.iter() {
        let service = |name: &str| {
            ServiceName::new(name)
                .map(|name| ServiceKey { namespace: namespace.clone(), name })
                .map_err(|error| error.to_string())
        };
        let outcome = match (key.kind(), key.name()) {
            (record_kind::EXPORT, [name]) => service(name).and_then(|service| {
                let export = decode_export(body).map_err(|error| error.to_string())?;
                read.exports.insert(service, export);
                Ok(())
            }),
            (record_kind::BACKENDS, [name, shard]) => service(name).and_then(|service| {
                let shard = shard
                    .parse::<u32>()
                    .ok()
                    .filter(|s| *s < Backends::MAX_SHARDS && s.to_string() == **shard)
                    .ok_or_else(|| "its shard is not a number".to_owned())?;
                let backends = decode_backends(body).map_err(|error| error.to_string())?;
                read.backends.entry(service).or_default().insert(shard, backends);
                Ok(())
            }),
            (record_kind::EXPORT | record_kind::BACKENDS, _) => Err("its key has another form".to_owned()),
            // Of a newer version: not for us.
            _ => Ok(()),
        };
        if let Err(error) = outcome
            && read.findings.len() < 16
        {
            read.findings.push(Finding {
                severity: Severity::Error,
                reason: "RecordInvalid",
                object: format!("cluster {cluster}"),
                message: format!(
                    "record {key:?} in namespace {namespace} cannot be read and is left out: {error}"
                ),
            });
        }
    }
    read
}
