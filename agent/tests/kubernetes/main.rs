//! The Kubernetes form of the cluster's API on a real API server. Needs etcd, kube-apiserver and kubectl: `.ci/kube`
//! builds them; KUBEBUILDER_ASSETS names others. Without them these tests say so and do nothing, except in CI.

// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::unwrap_in_result, clippy::print_stdout)]

mod deploy;
mod objects;
mod outage;
mod server;
