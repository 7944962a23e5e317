//! From a world to what should be. Pure: the same world gives the same bytes.

mod address;
mod backend;
mod conflict;
mod derived;
pub mod eligible;
mod endpoint;
mod export;
mod findings;
mod firewall;
mod hash;
mod lane;
mod local;
mod peer;
pub mod piece;
mod planner;
mod rank;
mod roster;
mod route;
mod rule;
mod service;
mod shard;
mod slice;
mod vip;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use tombolo_proto::model::{Endpoint, NodeName, Record, RecordKey, Scope, record_kind};
use tombolo_proto::wire;

pub use self::endpoint::is_stated;
use self::export::Exports;
use self::findings::Findings;
pub(crate) use self::hash::stable as stable_hash;
pub use self::planner::Planner;
use self::service::Sources;
use crate::desired::{ClusterDesired, NodeDesired};
use crate::finding::Finding;
use crate::known::Section;
use crate::shelf::Shelf;
use crate::world::{ClusterWorld, NodeWorld};

/// Plans a node.
///
/// While any input is unknown every section that it reaches is kept: devices and routes too hang on imports and slices,
/// since nothing may come in before the firewall knows what is exported. Only a cluster that is known to be no member
/// (any longer) has no tunnels at once.
pub fn node(world: &NodeWorld) -> (NodeDesired, Vec<Finding>) {
    Planner::default().plan(world)
}

/// Plans the cluster's objects and statement.
///
/// A ServiceExport's condition that is not in the planned status stays as it is.
pub fn cluster(world: &ClusterWorld) -> (ClusterDesired, Vec<Finding>) {
    let mut findings = Findings::default();
    let desired = plan_cluster(world, &mut findings);
    (desired, findings.into_vec())
}

fn plan_cluster(world: &ClusterWorld, findings: &mut Findings) -> ClusterDesired {
    let mut desired = ClusterDesired::default();
    let endpoints = endpoint::endpoints(world, findings);
    let exports = export::exports(world, endpoints.as_ref(), None);
    exports.iter().for_each(|exports| exports.tell(findings));
    let sources = Sources { world, own: exports.as_ref().map(|e| &e.good) };

    let services = service::services(&sources, findings);
    if let (Some(services), Some(existing), true) = (&services, world.imports.get(), derived::is_known(world))
    {
        let mut imports = service::imports(services);
        let us = &world.cluster;
        address::assign(us, world.clusterset.as_ref(), existing, &mut imports, findings);
        let (carriers, waiting) = derived::carriers(world, &mut imports, findings);
        if let Some(slices) = world.slices.get() {
            let slices = slice::slices(&sources, services, &imports, (existing, slices), findings);
            desired.slices = Section::Set(slices);
        }
        imports.set.retain(|key, _| !waiting.contains(key));
        desired.imports = Section::Set(imports);
        desired.derived = Section::Set(carriers);
    }
    if let (Some(endpoints), Some(exports)) = (&endpoints, &exports) {
        desired.records = Section::Set(records(exports, endpoints));
        let mut statuses =
            exports.statuses.iter().map(|(key, status)| (key.clone(), status.clone())).collect();
        if let Some(services) = &services {
            conflict::conflicts(&sources, services, &mut statuses);
        }
        desired.statuses = Section::Set(statuses);
    }
    if let Some(endpoints) = endpoints {
        desired.nodes = Section::Set(endpoints);
    }
    desired
}

/// A cluster's statement.
fn records(
    exports: &Exports,
    endpoints: &BTreeMap<NodeName, Endpoint>,
) -> BTreeMap<Scope, Shelf<RecordKey, Record>> {
    let mut records = exports.records.clone();
    let nodes = node_records(endpoints, is_stated);
    if !nodes.is_empty() {
        records.insert(Scope::Nodes, nodes.into());
    }
    records
}

fn node_records(
    endpoints: &BTreeMap<NodeName, Endpoint>,
    which: impl Fn(&Endpoint) -> bool,
) -> BTreeMap<RecordKey, Record> {
    let record = |(name, endpoint): (&NodeName, &Endpoint)| {
        let key = RecordKey::new(record_kind::ENDPOINT, &[name.as_str()])?;
        let body = wire::encode_endpoint(endpoint).into();
        Some((key.clone(), Record { key, body }))
    };
    endpoints.iter().filter(|(_, endpoint)| which(endpoint)).filter_map(record).collect()
}
