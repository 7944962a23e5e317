//! Clusters of `api: kubernetes`: a real control plane in a place of its own, kube-proxy on every node, CoreDNS as the
//! cluster's DNS.
//!
//! What a kubelet would do is done by the lab: it writes Nodes and Pods, with the addresses of the namespaces that
//! stand for them, as running and ready. All else is made by the real controllers out of that: EndpointSlices,
//! virtual addresses, rules.

mod binary;
pub mod conformance;
mod install;
pub(crate) mod kwok;
mod object;
mod pki;
mod plane;

pub use binary::{find, missing};
pub use install::SYSTEM;
pub use plane::{admin_kubeconfig, kubectl};
