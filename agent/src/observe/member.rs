//! Members out of the cluster's API, verified again by every reader.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::Node;
use tombolo_agent_core::plan::is_stated;
use tombolo_agent_core::world::{self, ClustersetRanges, MemberNodes};
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Position, Prefix, Record, RecordKey, record_kind};
use tombolo_proto::trust::{
    Digest, Effective, Envelope, Membership, Refused, Revocations, RootChain, SetId, Statement, Verified,
    effective,
};
use tombolo_proto::wire::{decode_brokers, decode_endpoint, decode_statement};
use tombolo_replica::verify_nodes;

use crate::api::{ClusterSet, Member, Observed};

/// What is to be verified; equal inputs are not verified twice.
struct Input {
    clusterset: ClusterSet,
    members: BTreeMap<ClusterId, Member>,
    member_nodes: BTreeMap<ClusterId, BTreeMap<RecordKey, Record>>,
    ours: BTreeSet<Prefix>,
}

/// Verified members, and what is wrong with others.
#[derive(Clone, PartialEq)]
pub struct Members {
    /// By cluster, the own one too unless it was revoked.
    pub nodes: world::Members,
    /// Whether they may be acted upon: the own membership is verified, or known to be revoked. Else something here
    /// is damaged, and nothing may go because of that.
    pub usable: bool,
    /// What is refused, and why.
    pub findings: Vec<Finding>,
}

/// Verifies members, and remembers the last good value of each. What cannot be verified is not what was revoked: a
/// membership goes only by the administrator's word.
#[derive(Default)]
pub struct Verifier {
    addresses: BTreeSet<IpAddr>,
    last: Option<(Input, Arc<Members>)>,
    held: Held,
}

/// What was good, of one set and cluster.
#[derive(Default)]
struct Held {
    of: Option<(SetId, ClusterId)>,
    roots: Option<RootChain>,
    revocations: Option<Verified<Revocations>>,
    clusters: BTreeMap<ClusterId, Good>,
    /// The own membership was revoked.
    ended: bool,
}

#[derive(Default)]
struct Good {
    /// By serial: the newest, and the one it last spoke under.
    memberships: BTreeMap<u64, Membership>,
    spoken: Option<Spoken>,
    /// The objects that all of this was read from, when nothing was wrong with them.
    source: Option<(Member, BTreeMap<RecordKey, Record>)>,
}

struct Spoken {
    position: Position,
    root: Digest,
    nodes: BTreeMap<NodeName, Endpoint>,
    findings: Vec<Finding>,
}

impl Verifier {
    /// How far each cluster has spoken, as verified here.
    pub fn positions(&self) -> BTreeMap<ClusterId, Position> {
        let spoken = |good: &Good| good.spoken.as_ref().map(|spoken| spoken.position);
        self.held.clusters.iter().filter_map(|(id, good)| Some((id.clone(), spoken(good)?))).collect()
    }

    /// Addresses of this machine, which no grant of another may touch.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) {
        self.addresses = addresses.iter().copied().collect();
    }

    /// Verifies what was observed. Unknown until the set, its members and their nodes, and the own nodes (whose
    /// addresses are nobody else's) were known once; after that the last result holds while any is unknown.
    pub fn verify(&mut self, observed: &Observed) -> Known<Arc<Members>> {
        let (
            Known::Yes(Some(clusterset)),
            Known::Yes(members),
            Known::Yes(member_nodes),
            Known::Yes(own_nodes),
        ) = (&observed.clusterset, &observed.members, &observed.member_nodes, &observed.nodes)
        else {
            return self.last.as_ref().map_or(Known::No, |(_, members)| Known::Yes(members.clone()));
        };
        let mut ours = own_ranges(clusterset, Some(own_nodes));
        ours.extend(self.addresses.iter().filter_map(|a| Prefix::host(*a).ok()));
        if let Some((last, result)) = &self.last
            && last.clusterset == *clusterset
            && last.members == *members
            && last.member_nodes == *member_nodes
            && last.ours == ours
        {
            return Known::Yes(result.clone());
        }
        let input = Input {
            clusterset: clusterset.clone(),
            members: members.clone(),
            member_nodes: member_nodes.clone(),
            ours,
        };
        let members = Arc::new(self.held.judge(&input));
        self.last = Some((input, members.clone()));
        Known::Yes(members)
    }

    /// What was observed, with only what is good of set and members: fit to be kept for a start without an API.
    pub fn good(&self, observed: &Observed) -> Option<Observed> {
        let (input, _) = self.last.as_ref()?;
        let mut clusterset = input.clusterset.clone();
        clusterset.roots = self.held.roots.as_ref()?.envelopes().cloned().collect();
        clusterset.revocations = self.held.revocations.as_ref().map(|list| list.envelope().clone());
        let (mut members, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        for (cluster, held) in &self.held.clusters {
            if let Some((member, records)) = &held.source {
                members.insert(cluster.clone(), member.clone());
                nodes.insert(cluster.clone(), records.clone());
            }
        }
        Some(Observed {
            clusterset: Known::Yes(Some(clusterset)),
            members: Known::Yes(members),
            member_nodes: Known::Yes(nodes),
            nodes: observed.nodes.clone(),
            imports: observed.imports.clone(),
            slices: observed.slices.clone(),
            ..Observed::default()
        })
    }
}

impl Held {
    fn judge(&mut self, input: &Input) -> Members {
        let us = &input.clusterset.cluster;
        let of = (input.clusterset.set, us.clone());
        if self.of.as_ref() != Some(&of) {
            *self = Self { of: Some(of), ..Self::default() };
        }
        let mut findings = Vec::new();
        let Some(roots) = self.roots(&input.clusterset, &mut findings) else {
            return Members { nodes: world::Members::new(), usable: false, findings };
        };
        self.revocations(&roots, &input.clusterset, &mut findings);

        let nothing = BTreeMap::new();
        for (cluster, member) in &input.members {
            let records = input.member_nodes.get(cluster).unwrap_or(&nothing);
            let good = self.clusters.entry(cluster.clone()).or_default();
            let known = good.source.as_ref().is_some_and(|(m, r)| m == member && r == records);
            if !known && good.take(&roots, (cluster, us), member, records, &mut findings) {
                good.source = Some((member.clone(), records.clone()));
            }
        }
        if let Some(list) = &self.revocations {
            for (cluster, good) in &mut self.clusters {
                good.memberships.retain(|serial, membership| {
                    let revoked = list.revokes(membership.grant());
                    if revoked {
                        let refused = Refused::Revoked { cluster: cluster.clone(), serial: *serial };
                        findings.push(refused_finding(&refused));
                        self.ended |= cluster == us;
                    }
                    !revoked
                });
            }
        }
        self.clusters.retain(|_, good| {
            good.spoken.take_if(|s| !good.memberships.contains_key(&s.position.serial));
            !good.memberships.is_empty()
        });

        let memberships = self.clusters.values().flat_map(|good| good.memberships.values());
        let Effective { members, refused } = effective(memberships, None, Some(us), &input.ours);
        findings.extend(refused.iter().map(refused_finding));
        let mut nodes = world::Members::new();
        for (cluster, effective) in members {
            let spoken = self.clusters.get(&cluster).and_then(|good| good.spoken.as_ref());
            findings.extend(spoken.into_iter().flat_map(|s| s.findings.iter().cloned()));
            let member = MemberNodes {
                serial: effective.membership.grant().serial,
                owned: effective.owned,
                tunnel: effective.tunnel,
                nodes: spoken.map(|s| s.nodes.clone()).unwrap_or_default(),
            };
            nodes.insert(cluster, member);
        }
        // Once its own nodes are withdrawn, and so the others were told.
        let withdrawn = |own: &MemberNodes| own.nodes.is_empty();
        if input.clusterset.leaving && nodes.get(us).is_none_or(withdrawn) {
            findings.push(Finding {
                severity: Severity::Warning,
                reason: "Leaving",
                object: format!("cluster {us}"),
                message: format!("{us} has left the set of its own will (tombolo leave): no tunnel, route or name of others is here"),
            });
            findings.sort();
            findings.dedup();
            return Members { nodes: world::Members::new(), usable: true, findings };
        }
        self.ended &= !nodes.contains_key(us);
        let usable = nodes.contains_key(us) || self.ended;
        if !usable {
            findings.push(finding(
                "NotAMember",
                &format!("cluster {us}"),
                "its own membership is not here or does not verify, and was not revoked: nothing changes until \
                 it is back; restore state/ from a backup, or join again with a new token"
                    .to_owned(),
            ));
        }
        findings.sort();
        findings.dedup();
        Members { nodes, usable, findings }
    }

    /// The longest chain that was ever good. What a removed root signed is no membership any more.
    fn roots(&mut self, clusterset: &ClusterSet, findings: &mut Vec<Finding>) -> Option<RootChain> {
        match RootChain::pinned(clusterset.set, &clusterset.roots) {
            Ok(chain) => {
                let held = self.roots.as_ref().map_or(0, |held| held.current().version);
                if chain.current().version > held {
                    for good in self.clusters.values_mut() {
                        good.memberships.retain(|_, membership| {
                            let bindings: Vec<Envelope> =
                                membership.bindings().iter().map(|b| b.envelope().clone()).collect();
                            Membership::verify(&chain, membership.grant().envelope(), &bindings).is_ok()
                        });
                        good.source = None;
                    }
                    self.roots = Some(chain);
                }
            }
            Err(error) => findings.push(finding(
                "RootsInvalid",
                "clusterset",
                format!(
                    "the set's roots do not verify ({error}); what was verified before stays in use: restore \
                     state/ from a backup, or join again with a new token"
                ),
            )),
        }
        self.roots.clone()
    }

    /// The highest list that was ever good.
    fn revocations(&mut self, roots: &RootChain, clusterset: &ClusterSet, findings: &mut Vec<Finding>) {
        if self.revocations.as_ref().is_some_and(|list| roots.revocations(list.envelope()).is_err()) {
            self.revocations = None;
        }
        if let Some(list) = verified_revocations(roots, clusterset, findings)
            && self.revocations.as_ref().is_none_or(|held| list.version > held.version)
        {
            self.revocations = Some(list);
        }
    }
}

impl Good {
    /// Takes what verifies; what was good before stays in use where it does not. True if all of it did.
    fn take(
        &mut self,
        roots: &RootChain,
        (cluster, us): (&ClusterId, &ClusterId),
        member: &Member,
        records: &BTreeMap<RecordKey, Record>,
        findings: &mut Vec<Finding>,
    ) -> bool {
        let object = format!("cluster {cluster}");
        let mut whole = true;
        let newest = (&member.grant, member.bindings.as_slice());
        let older = member.spoken.as_ref().map(|s| (&s.grant, s.bindings.as_slice()));
        for (grant, bindings) in [newest].into_iter().chain(older) {
            let taken = Membership::verify(roots, grant, bindings)
                .map_err(|error| format!("its membership does not verify ({error})"))
                .and_then(|membership| self.take_membership(cluster, membership));
            if let Err(error) = taken {
                whole = false;
                let message = format!("{error}; it is refused, and what was verified before stays in use");
                findings.push(finding("MemberInvalid", &object, message));
            }
        }
        if let (Some(statement), Some(namespaces)) = (&member.statement, &member.namespaces) {
            match self.statement(statement, namespaces, records, cluster == us) {
                Ok(statement) => whole &= self.take_statement(cluster, &statement, records, findings),
                Err(error) => {
                    whole = false;
                    let message = format!("{error}; what was verified before stays in use");
                    findings.push(finding("StatementInvalid", &object, message));
                }
            }
        }
        // Of those in between nothing is said any more.
        let newest = self.memberships.keys().next_back().copied();
        let spoken = self.spoken.as_ref().map(|s| s.position.serial);
        self.memberships.retain(|serial, _| Some(*serial) == newest || Some(*serial) == spoken);
        whole
    }

    fn take_membership(&mut self, cluster: &ClusterId, membership: Membership) -> Result<(), String> {
        if membership.cluster() != cluster {
            return Err(format!("its Member object holds the membership of {}", membership.cluster()));
        }
        match self.memberships.get(&membership.grant().serial) {
            Some(held) if !membership.extends(held) => {
                if held.extends(&membership) {
                    Ok(())
                } else {
                    Err("its membership is another than the one that was seen first".to_owned())
                }
            }
            _ => {
                self.memberships.insert(membership.grant().serial, membership);
                Ok(())
            }
        }
    }

    /// Checks a statement by the membership it was given under. The own cluster keeps nodes beside those that it states.
    fn statement(
        &self,
        envelope: &Envelope,
        namespaces: &Digest,
        records: &BTreeMap<RecordKey, Record>,
        own: bool,
    ) -> Result<Verified<Statement>, String> {
        let claimed = decode_statement(&envelope.payload).map_err(|error| error.to_string())?;
        let serial = claimed.position.serial;
        let membership = self.memberships.get(&serial);
        let membership =
            membership.ok_or_else(|| format!("its membership of serial {serial} is not here"))?;
        let statement = membership.statement(envelope).map_err(|error| error.to_string())?;
        let stated = || records.values().filter(|record| !is_own_matter(record));
        let fits = verify_nodes(&statement, namespaces, records.values())
            || (own && verify_nodes(&statement, namespaces, stated()));
        if !fits {
            return Err("its nodes do not fit what it signed".to_owned());
        }
        Ok(statement)
    }

    fn take_statement(
        &mut self,
        cluster: &ClusterId,
        statement: &Statement,
        records: &BTreeMap<RecordKey, Record>,
        findings: &mut Vec<Finding>,
    ) -> bool {
        let Statement { position, root, .. } = statement;
        let object = format!("cluster {cluster}");
        if let Some(held) = &self.spoken {
            if *position < held.position {
                let message =
                    format!("position {position} is behind one seen before; the newer one stays in use");
                findings.push(finding("StatementStale", &object, message));
                return false;
            }
            if *position == held.position {
                if *root != held.root {
                    let message = format!(
                        "it signed two statements at position {position}; the first stays in use. Is its key used twice?"
                    );
                    findings.push(finding("Equivocation", &object, message));
                }
                // The same statement; beside it own nodes may have come that are not stated.
                if *root != held.root {
                    return false;
                }
            }
        }
        let mut unread = Vec::new();
        let nodes = endpoints(cluster, records.values(), &mut unread);
        self.spoken = Some(Spoken { position: *position, root: *root, nodes, findings: unread });
        true
    }
}

/// Whether a record of the own MemberNodes is a node that the cluster states to nobody.
fn is_own_matter(record: &Record) -> bool {
    let node = match (record.key.kind(), record.key.name()) {
        (record_kind::ENDPOINT, [node]) => NodeName::new(node).ok(),
        _ => None,
    };
    node.and_then(|node| decode_endpoint(node, &record.body).ok()).is_some_and(|e| !is_stated(&e))
}

/// Ranges that no grant of another may touch: reserved ones, the clusterset ranges, addresses of own nodes and of
/// brokers. Who may write the set's object may reserve ranges too, so the list of brokers in it is not verified here.
pub fn own_ranges(clusterset: &ClusterSet, nodes: Option<&BTreeMap<NodeName, Node>>) -> BTreeSet<Prefix> {
    let mut ours = inner_ranges(clusterset, nodes);
    let brokers = clusterset.brokers.as_ref().and_then(|envelope| decode_brokers(&envelope.payload).ok());
    let addresses = brokers.iter().flat_map(|list| &list.brokers).filter_map(|b| literal(&b.address));
    ours.extend(addresses.filter_map(|a| Prefix::host(a).ok()));
    ours
}

/// The same without brokers: one may well run on another cluster's node.
pub fn inner_ranges(clusterset: &ClusterSet, nodes: Option<&BTreeMap<NodeName, Node>>) -> BTreeSet<Prefix> {
    let mut ours = clusterset.reserved.clone();
    let ranges = clusterset.clusterset.iter().flat_map(ClustersetRanges::nets);
    ours.extend(ranges.filter_map(|net| Prefix::new(net).ok()));
    for node in nodes.into_iter().flat_map(BTreeMap::values) {
        ours.extend(node.addresses.iter().filter_map(|a| Prefix::host(*a).ok()));
    }
    ours
}

/// The address in `address:port` or `[v6]:port`; None for a name.
fn literal(text: &str) -> Option<IpAddr> {
    text.parse::<SocketAddr>().ok().map(|a| a.ip())
}

/// The list of revocations, if it verifies.
pub fn verified_revocations(
    roots: &RootChain,
    clusterset: &ClusterSet,
    findings: &mut Vec<Finding>,
) -> Option<Verified<Revocations>> {
    let envelope = clusterset.revocations.as_ref()?;
    match roots.revocations(envelope) {
        Ok(list) => Some(list),
        Err(error) => {
            findings.push(finding(
                "RevocationsInvalid",
                "clusterset",
                format!("the list of revocations does not verify: {error}"),
            ));
            None
        }
    }
}

/// Endpoints out of the records of scope `nodes`; one that cannot be read is left out and named.
pub fn endpoints<'a>(
    cluster: &ClusterId,
    records: impl IntoIterator<Item = &'a Record>,
    findings: &mut Vec<Finding>,
) -> BTreeMap<NodeName, Endpoint> {
    let mut nodes = BTreeMap::new();
    for record in records {
        if record.key.kind() != record_kind::ENDPOINT {
            continue;
        }
        let read = match record.key.name() {
            [node] => NodeName::new(node)
                .map_err(|e| e.to_string())
                .and_then(|node| decode_endpoint(node, &record.body).map_err(|e| e.to_string())),
            _ => Err("its key is not a node's name".to_owned()),
        };
        match read {
            Ok(endpoint) => {
                nodes.insert(endpoint.node.clone(), endpoint);
            }
            Err(error) => findings.push(finding(
                "RecordInvalid",
                &format!("cluster {cluster}"),
                format!("endpoint {:?} cannot be read and is left out: {error}", record.key),
            )),
        }
    }
    nodes
}

/// What a person should know of a refused range or membership.
pub fn refused_finding(refused: &Refused) -> Finding {
    match refused {
        Refused::Revoked { cluster, serial } => Finding {
            severity: Severity::Warning,
            reason: "Revoked",
            object: format!("cluster {cluster}"),
            message: format!("its grant {serial} was revoked by the administrator"),
        },
        Refused::Overlap { cluster, prefix, owner } => finding(
            "RangeOverlap",
            &format!("cluster {cluster}"),
            format!(
                "its range {prefix} overlaps one of {owner}, which was granted first and keeps it; give {cluster} another range"
            ),
        ),
        Refused::Own { cluster, prefix, ours } => finding(
            "RangeIsOurs",
            &format!("cluster {cluster}"),
            format!("its range {prefix} touches {ours}, which this cluster uses itself; it is refused here"),
        ),
    }
}

fn finding(reason: &'static str, object: &str, message: String) -> Finding {
    Finding { severity: Severity::Error, reason, object: object.to_owned(), message }
}

#[cfg(test)]
mod tests;
