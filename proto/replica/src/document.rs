//! The set's own documents.

use std::collections::BTreeMap;

use tombolo_proto::model::ClusterId;
use tombolo_proto::trust::{
    Brokers, Context, Envelope, Membership, Revocations, RootChain, Statement, TrustError, Verified,
};
use tombolo_proto::wire::{self, Documents, MembershipParts};

use crate::refusal::{Object, Reason, Refusal};

/// Roots, brokers, revocations and memberships, all verified.
#[derive(Debug, Clone)]
pub(crate) struct SetDocuments {
    pub(crate) roots: RootChain,
    pub(crate) brokers: Option<Verified<Brokers>>,
    pub(crate) revocations: Option<Verified<Revocations>>,
    /// By cluster and serial: the newest, that of the current statement, and few between.
    pub(crate) memberships: BTreeMap<ClusterId, BTreeMap<u64, Membership>>,
}

/// Memberships kept of one cluster.
const MAX_SERIALS: usize = 4;

impl SetDocuments {
    pub(crate) fn new(roots: RootChain) -> Self {
        Self { roots, brokers: None, revocations: None, memberships: BTreeMap::new() }
    }

    pub(crate) fn offer_root(&mut self, envelope: &Envelope) -> Result<bool, Refusal> {
        self.roots.advance(envelope).map_err(|error| Refusal::new(Object::Roots, Reason::Trust(error)))
    }

    pub(crate) fn offer_brokers(&mut self, envelope: &Envelope) -> Result<bool, Refusal> {
        let held = self.brokers.as_ref();
        if held.is_some_and(|held| held.envelope() == envelope) {
            return Ok(false);
        }
        let refuse = |reason| Refusal::new(Object::Brokers, reason);
        let new = self.roots.brokers(envelope).map_err(|error| refuse(Reason::Trust(error)))?;
        match held.map_or(0, |held| held.version) {
            held if new.version < held => Ok(false),
            held if new.version == held && self.brokers.is_some() => {
                Err(refuse(Reason::Equivocation(format!("version {held}"))))
            }
            _ => {
                self.brokers = Some(new);
                Ok(true)
            }
        }
    }

    pub(crate) fn offer_revocations(&mut self, envelope: &Envelope) -> Result<bool, Refusal> {
        let held = self.revocations.as_ref();
        if held.is_some_and(|held| held.envelope() == envelope) {
            return Ok(false);
        }
        let refuse = |reason| Refusal::new(Object::Revocations, reason);
        let new = self.roots.revocations(envelope).map_err(|error| refuse(Reason::Trust(error)))?;
        match held.map_or(0, |held| held.version) {
            held if new.version < held => Ok(false),
            held if new.version == held && self.revocations.is_some() => {
                Err(refuse(Reason::Equivocation(format!("version {held}"))))
            }
            _ => {
                for serials in self.memberships.values_mut() {
                    serials.retain(|_, membership| !new.revokes(membership.grant()));
                }
                self.memberships.retain(|_, serials| !serials.is_empty());
                self.revocations = Some(new);
                Ok(true)
            }
        }
    }

    /// Takes a membership. `spoken` tells the serial of the cluster's current statement: older ones are no
    /// longer of use. Ok(None) if it says nothing new.
    pub(crate) fn offer_membership(
        &mut self,
        parts: &MembershipParts,
        spoken: impl Fn(&ClusterId) -> Option<u64>,
        max_clusters: usize,
    ) -> Result<Option<ClusterId>, Refusal> {
        let claimed = wire::decode_grant(&parts.grant.payload).map_err(|source| {
            let error = TrustError::Decode { context: Context::Grant, source };
            Refusal::new(Object::Membership(None), Reason::Trust(error))
        })?;
        let cluster = claimed.cluster;
        let held = self.memberships.get(&cluster).and_then(|serials| serials.get(&claimed.serial));
        if held.is_some_and(|held| says(held, parts)) {
            return Ok(None);
        }
        let refuse = |reason| Refusal::new(Object::Membership(Some(cluster.clone())), reason);
        let new = Membership::verify(&self.roots, &parts.grant, &parts.bindings)
            .map_err(|error| refuse(Reason::Trust(error)))?;
        let serial = new.grant().serial;
        if let Some(list) = self.revocations.as_ref().filter(|list| list.revokes(new.grant())) {
            let up_to = list.up_to.get(&cluster).copied().unwrap_or(serial);
            return Err(refuse(Reason::Revoked { up_to }));
        }
        if spoken(&cluster).is_some_and(|spoken| serial < spoken) {
            return Ok(None);
        }
        if held.is_some_and(|held| !new.extends(held)) {
            return Err(refuse(Reason::Fork { serial }));
        }
        if !self.memberships.contains_key(&cluster) && self.memberships.len() >= max_clusters {
            return Err(refuse(Reason::Quota { what: "clusters in the set", max: max_clusters }));
        }
        let serials = self.memberships.entry(cluster.clone()).or_default();
        serials.insert(serial, new);
        prune(serials, spoken(&cluster));
        Ok(Some(cluster))
    }

    /// Forgets memberships under serials that the cluster's statements have left behind.
    pub(crate) fn prune(&mut self, cluster: &ClusterId, spoken: u64) {
        if let Some(serials) = self.memberships.get_mut(cluster) {
            prune(serials, Some(spoken));
        }
    }

    pub(crate) fn statement(&self, envelope: &Envelope) -> Result<Verified<Statement>, Refusal> {
        let claimed = wire::decode_statement(&envelope.payload).map_err(|source| {
            let error = TrustError::Decode { context: Context::Statement, source };
            Refusal::new(Object::UnreadableStatement, Reason::Trust(error))
        })?;
        let refuse = |reason| Refusal::new(Object::Statement(claimed.cluster.clone()), reason);
        let serial = claimed.position.serial;
        let membership = self
            .memberships
            .get(&claimed.cluster)
            .and_then(|serials| serials.get(&serial))
            .ok_or_else(|| refuse(Reason::NoMembership { serial }))?;
        membership.statement(envelope).map_err(|error| refuse(Reason::Trust(error)))
    }

    pub(crate) fn membership(&self, cluster: &ClusterId, serial: u64) -> Option<&Membership> {
        self.memberships.get(cluster)?.get(&serial)
    }
}

fn prune(serials: &mut BTreeMap<u64, Membership>, spoken: Option<u64>) {
    if let Some(spoken) = spoken {
        serials.retain(|&serial, _| serial >= spoken);
    }
    while serials.len() > MAX_SERIALS {
        let Some(oldest) = serials.keys().copied().find(|&serial| Some(serial) != spoken) else { break };
        serials.remove(&oldest);
    }
}

/// Whether a held membership says everything that `parts` does.
fn says(held: &Membership, parts: &MembershipParts) -> bool {
    held.grant().envelope() == &parts.grant
        && parts.bindings.len() <= held.bindings().len()
        && held.bindings().iter().zip(&parts.bindings).all(|(a, b)| a.envelope() == b)
}

/// As it travels.
pub(crate) fn parts(membership: &Membership) -> MembershipParts {
    MembershipParts {
        grant: membership.grant().envelope().clone(),
        bindings: membership.bindings().iter().map(|b| b.envelope().clone()).collect(),
    }
}

impl SetDocuments {
    pub(crate) fn all(&self) -> Documents {
        Documents {
            roots: self.roots.envelopes().cloned().collect(),
            brokers: self.brokers.as_ref().map(|list| list.envelope().clone()),
            revocations: self.revocations.as_ref().map(|list| list.envelope().clone()),
            memberships: self.memberships.values().flat_map(BTreeMap::values).map(parts).collect(),
        }
    }
}
