//! Members out of the cluster's API, verified again by every reader.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tombolo_agent_core::finding::{Finding, Severity};
use tombolo_agent_core::known::Known;
use tombolo_agent_core::object::Node;
use tombolo_agent_core::world::MemberNodes;
use tombolo_proto::model::{ClusterId, Endpoint, NodeName, Position, Prefix, Record, RecordKey, record_kind};
use tombolo_proto::trust::{Effective, Membership, Refused, Revocations, RootChain, Verified, effective};
use tombolo_proto::wire::decode_endpoint;
use tombolo_replica::verify_nodes;

use crate::api::{ClusterSet, Member, Observed};

/// What is to be verified; equal inputs are not verified twice.
#[derive(Clone, PartialEq)]
struct Input {
    clusterset: ClusterSet,
    members: BTreeMap<ClusterId, Member>,
    member_nodes: BTreeMap<ClusterId, BTreeMap<RecordKey, Record>>,
    ours: BTreeSet<Prefix>,
}

/// Verified members, and what is wrong with others.
#[derive(Clone, PartialEq)]
pub struct Members {
    /// By cluster, the own one too.
    pub nodes: BTreeMap<ClusterId, MemberNodes>,
    /// What is refused, and why.
    pub findings: Vec<Finding>,
}

/// Verifies members, and remembers the last good value of each.
#[derive(Default)]
pub struct Verifier {
    last: Option<(Input, Arc<Members>)>,
    good: BTreeMap<ClusterId, (Position, BTreeMap<NodeName, Endpoint>)>,
}

impl Verifier {
    /// Verifies what was observed. Unknown until the set, members and their nodes are known.
    pub fn verify(&mut self, observed: &Observed) -> Known<Arc<Members>> {
        let (Known::Yes(Some(clusterset)), Known::Yes(members), Known::Yes(member_nodes)) =
            (&observed.clusterset, &observed.members, &observed.member_nodes)
        else {
            return Known::No;
        };
        let ours = own_ranges(clusterset, observed.nodes.get());
        let input = Input {
            clusterset: clusterset.clone(),
            members: members.clone(),
            member_nodes: member_nodes.clone(),
            ours,
        };
        if let Some((last, members)) = &self.last
            && *last == input
        {
            return Known::Yes(members.clone());
        }
        let members = Arc::new(self.judge(&input));
        self.last = Some((input, members.clone()));
        Known::Yes(members)
    }

    fn judge(&mut self, input: &Input) -> Members {
        let mut findings = Vec::new();
        let roots = match RootChain::pinned(input.clusterset.set, &input.clusterset.roots) {
            Ok(roots) => roots,
            Err(error) => {
                findings.push(finding("RootsInvalid", "clusterset", format!(
                    "the set's roots do not verify ({error}); every member is refused: join again with a new token"
                )));
                return Members { nodes: BTreeMap::new(), findings };
            }
        };
        let revocations = verified_revocations(&roots, &input.clusterset, &mut findings);
        let mut memberships: BTreeMap<ClusterId, Membership> = BTreeMap::new();
        for (cluster, member) in &input.members {
            match Membership::verify(&roots, &member.grant, &member.bindings) {
                Ok(membership) if membership.cluster() == cluster => {
                    memberships.insert(cluster.clone(), membership);
                }
                Ok(other) => findings.push(finding(
                    "MemberInvalid",
                    &format!("cluster {cluster}"),
                    format!("its Member object holds the membership of {}; it is refused", other.cluster()),
                )),
                Err(error) => findings.push(finding(
                    "MemberInvalid",
                    &format!("cluster {cluster}"),
                    format!("its membership does not verify ({error}); it is refused"),
                )),
            }
        }
        let Effective { members, refused } = effective(
            memberships.values(),
            revocations.as_deref(),
            Some(&input.clusterset.cluster),
            &input.ours,
        );
        findings.extend(refused.iter().map(refused_finding));

        let mut nodes = BTreeMap::new();
        self.good.retain(|cluster, _| members.contains_key(cluster));
        let empty = BTreeMap::new();
        for (cluster, effective) in members {
            if let Some(statement) =
                input.members.get(&cluster).and_then(|m| Some((m.statement.as_ref()?, m.namespaces?)))
            {
                let records = input.member_nodes.get(&cluster).unwrap_or(&empty);
                let checked =
                    effective.membership.statement(statement.0).map_err(|error| error.to_string()).and_then(
                        |s| {
                            if verify_nodes(&s, &statement.1, records.values()) {
                                Ok(s.position)
                            } else {
                                Err("its nodes do not fit what it signed".to_owned())
                            }
                        },
                    );
                match checked {
                    Ok(position) if self.good.get(&cluster).is_some_and(|(held, _)| position < *held) => {
                        findings.push(finding(
                            "StatementStale",
                            &format!("cluster {cluster}"),
                            format!(
                                "position {position} is behind one seen before; the newer one stays in use"
                            ),
                        ));
                    }
                    Ok(position) => {
                        let endpoints = endpoints(&cluster, records.values(), &mut findings);
                        self.good.insert(cluster.clone(), (position, endpoints));
                    }
                    Err(error) => findings.push(finding(
                        "StatementInvalid",
                        &format!("cluster {cluster}"),
                        format!("{error}; what was verified before stays in use"),
                    )),
                }
            }
            let endpoints = self.good.get(&cluster).map(|(_, e)| e.clone()).unwrap_or_default();
            nodes.insert(
                cluster,
                MemberNodes { owned: effective.owned, tunnel: effective.tunnel, nodes: endpoints },
            );
        }
        findings.sort();
        Members { nodes, findings }
    }
}

/// Ranges that no grant of another may touch: reserved ones, the clusterset ranges, and addresses of own nodes.
pub fn own_ranges(clusterset: &ClusterSet, nodes: Option<&BTreeMap<NodeName, Node>>) -> BTreeSet<Prefix> {
    let mut ours = clusterset.reserved.clone();
    let ranges = &clusterset.clusterset;
    ours.extend(ranges.v4.and_then(|net| Prefix::new(net.into()).ok()));
    ours.extend(ranges.v6.and_then(|net| Prefix::new(net.into()).ok()));
    for node in nodes.into_iter().flat_map(BTreeMap::values) {
        ours.extend(node.addresses.iter().filter_map(|a| Prefix::host(*a).ok()));
    }
    ours
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
