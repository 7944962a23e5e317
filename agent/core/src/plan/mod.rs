//! From a world to what should be. Pure: the same world gives the same bytes.

mod address;
mod backend;
mod conflict;
pub mod eligible;
mod endpoint;
mod export;
mod findings;
mod firewall;
mod hash;
mod peer;
pub mod piece;
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

use self::eligible::View;
pub use self::endpoint::is_stated;
use self::findings::Findings;
pub(crate) use self::hash::stable as stable_hash;
use self::service::Sources;
use crate::desired::{ClusterDesired, NodeDesired};
use crate::finding::Finding;
use crate::known::Section;
use crate::world::{ClusterWorld, NodeWorld};
use crate::zone::Zone;

/// Plans a node.
///
/// While any input is unknown every section that it reaches is kept: devices and routes too hang on imports and slices,
/// since nothing may come in before the firewall knows what is exported. Only a cluster that is known to be no member
/// (any longer) has no tunnels at once.
pub fn node(world: &NodeWorld) -> (NodeDesired, Vec<Finding>) {
    let mut findings = Findings::default();
    let desired = plan_node(world, &mut findings);
    (desired, findings.into_vec())
}

fn plan_node(world: &NodeWorld, findings: &mut Findings) -> NodeDesired {
    let mut desired = NodeDesired::default();
    let Some(members) = world.members.get() else { return desired };
    if !members.contains_key(&world.cluster) {
        desired.devices = Section::Set(Default::default());
        desired.routes = Section::Set(Default::default());
        desired.rules = Section::Set(Default::default());
    }
    let (Some(imports), Some(slices), Some(hosts)) =
        (world.imports.get(), world.slices.get(), world.hosts.get())
    else {
        return desired;
    };
    let imports = &*vip::honest(world, imports, findings);
    let slices = backend::owned(slices, members, (&world.cluster, hosts), findings);
    let stations = roster::stations(world, members, findings);
    let devices = peer::devices(world, members, &stations, findings);
    let unreached = eligible::unreached(world, &devices);
    let view = View { cluster: &world.cluster, unreached: &unreached };
    desired.zone = Section::Set(Zone::eligible(imports, &slices, view));
    let firewall = firewall::firewall(world, members, &stations, hosts, view, (imports, &*slices), findings);
    desired.firewall = Section::Set(firewall);
    if members.contains_key(&world.cluster) {
        let routes = route::routes(world, members, &stations, &devices, findings);
        desired.rules = Section::Set(rule::rules(&routes, &devices));
        desired.devices = Section::Set(devices);
        desired.routes = Section::Set(routes);
    }
    desired
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
    let exports = export::exports(world, endpoints.as_ref(), findings);
    let sources = Sources { world, own: exports.as_ref().map(|e| &e.good) };

    let services = service::services(&sources, findings);
    if let (Some(services), Some(existing)) = (&services, world.imports.get()) {
        let mut imports = service::imports(services);
        let us = &world.cluster;
        address::assign(us, world.clusterset.as_ref(), existing, &mut imports, findings);
        if let Some(slices) = world.slices.get() {
            let slices = slice::slices(&sources, services, &imports, (existing, slices), findings);
            desired.slices = Section::Set(slices);
        }
        desired.imports = Section::Set(imports);
    }
    if let (Some(endpoints), Some(exports)) = (&endpoints, &exports) {
        let mut records = export::records(&exports.good, findings);
        let nodes = node_records(endpoints, is_stated);
        if !nodes.is_empty() {
            records.insert(Scope::Nodes, nodes);
        }
        desired.records = Section::Set(records);
        let mut statuses = exports.statuses.clone();
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
