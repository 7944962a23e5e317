//! v1 Node and Namespace.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use tombolo_agent_core::object::Node;
use tombolo_proto::model::{NodeName, Prefix};

use super::{Problem, bad, shorten};

/// Label by which people choose gateways.
pub const GATEWAY_LABEL: &str = "tombolo.dev/gateway";
/// Ranges or addresses of a node.
const MAX: usize = 256;

/// A Node as plans see it. Without conditions (as in a directory) it is ready.
pub fn read(object: &core::Node) -> Result<(NodeName, Node), Problem> {
    let name = NodeName::new(object.metadata.name.as_deref().unwrap_or(""))
        .map_err(|e| bad(format!("metadata.name: {e}")))?;
    let labels = object.metadata.labels.as_ref();
    let gateway = labels.and_then(|l| l.get(GATEWAY_LABEL)).is_some_and(|v| v == "true");
    let spec = object.spec.clone().unwrap_or_default();
    let mut pod_cidrs = BTreeSet::new();
    for (index, text) in spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr).take(MAX).enumerate() {
        let cidr: Prefix = text.parse().map_err(|e| bad(format!("spec.podCIDRs[{index}]: {e}")))?;
        pod_cidrs.insert(cidr);
    }
    let status = object.status.clone().unwrap_or_default();
    let mut addresses = Vec::new();
    for entry in status.addresses.iter().flatten().take(MAX) {
        if entry.type_ != "InternalIP" && entry.type_ != "ExternalIP" {
            continue;
        }
        let address: IpAddr = entry.address.parse().map_err(|_| {
            bad(format!("status.addresses: {:?} is not an IP address", shorten(&entry.address)))
        })?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let ready = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "Ready")
        .is_none_or(|condition| condition.status == "True");
    Ok((name, Node { gateway, ready, pod_cidrs, addresses }))
}
