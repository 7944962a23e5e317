//! A lab cluster's API: the manifests that people would write, in the cluster's directory (docs/directory.md).

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::topology::{Cluster, Pod, Service};

/// Writes a cluster's manifests: namespaces, nodes, services and their EndpointSlices.
///
/// # Errors
/// If a file cannot be written.
pub fn write(dir: &Path, cluster: &Cluster) -> Result<()> {
    let manifests = dir.join("manifests");
    std::fs::create_dir_all(&manifests)?;
    let mut namespaces: Vec<&str> =
        cluster.nodes.iter().flat_map(|n| &n.pods).map(|p| &*p.namespace).collect();
    namespaces.extend(cluster.services.iter().map(|s| &*s.namespace));
    namespaces.push("default");
    namespaces.sort_unstable();
    namespaces.dedup();
    for namespace in namespaces {
        let text = format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n");
        put(&manifests, &format!("namespace-{namespace}.yaml"), &text)?;
    }
    for node in &cluster.nodes {
        put(&manifests, &format!("node-{}.yaml", node.name), &node_manifest(node))?;
    }
    for service in &cluster.services {
        let pods: Vec<_> = backends(cluster, service).collect();
        let name = format!("service-{}-{}.yaml", service.namespace, service.name);
        put(&manifests, &name, &service_manifest(cluster, service, &pods, |_| true))?;
    }
    Ok(())
}

/// Writes one manifest whole: a reader never sees half of it.
///
/// # Errors
/// If it cannot be written.
pub fn put(manifests: &Path, name: &str, text: &str) -> Result<()> {
    let temporary = manifests.join(format!(".{name}.new"));
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, manifests.join(name)).with_context(|| format!("writing {name}"))
}

/// The ServiceExport that makes a service known to the set.
#[must_use]
pub fn export_manifest(namespace: &str, service: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata:\n  name: {service}\n  namespace: {namespace}\n"
    )
}

/// The pods behind a service.
pub fn backends<'a>(cluster: &'a Cluster, service: &'a Service) -> impl Iterator<Item = &'a Pod> {
    let pods = cluster.nodes.iter().flat_map(|n| &n.pods);
    pods.filter(|p| p.app == service.app && p.namespace == service.namespace)
}

/// A Service and its two EndpointSlices; `ready` says which pods serve.
pub fn service_manifest(
    cluster: &Cluster,
    service: &Service,
    pods: &[&Pod],
    ready: impl Fn(&Pod) -> bool,
) -> String {
    let Service { name, namespace, app, .. } = service;
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n"
    );
    if service.headless {
        text.push_str("  clusterIP: None\n  clusterIPs: [None]\n");
    } else {
        // Nobody inside a lab cluster balances these; a Service of a real cluster has them.
        let host = 10 + cluster.services.iter().position(|s| s.name == *name).unwrap_or_default();
        let index = cluster.index;
        let _ = write!(
            text,
            "  clusterIP: 10.96.{index}.{host}\n  clusterIPs: [10.96.{index}.{host}, \"fd00:96:{index}::{host:x}\"]\n"
        );
    }
    let _ = write!(
        text,
        "  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  selector:\n    app: {app}\n  ports:\n"
    );
    for port in &service.ports {
        let target = port.target.unwrap_or(port.port);
        let _ = writeln!(
            text,
            "    - {{ name: {}, port: {}, targetPort: {target}, protocol: {} }}",
            port.name, port.port, port.protocol
        );
    }
    for (family, suffix) in [("IPv4", "v4"), ("IPv6", "v6")] {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{suffix}\n  \
             namespace: {namespace}\n  labels:\n    kubernetes.io/service-name: {name}\naddressType: {family}\nports:\n"
        );
        for port in &service.ports {
            let target = port.target.unwrap_or(port.port);
            let _ =
                writeln!(text, "  - {{ name: {}, port: {target}, protocol: {} }}", port.name, port.protocol);
        }
        text.push_str(if pods.is_empty() { "endpoints: []\n" } else { "endpoints:\n" });
        for pod in pods {
            let address = if family == "IPv4" { pod.v4.to_string() } else { pod.v6.to_string() };
            let ready = ready(pod);
            let _ = write!(
                text,
                "  - addresses: [\"{address}\"]\n    hostname: {}\n    nodeName: {}\n    \
                 conditions: {{ ready: {ready}, serving: {ready}, terminating: false }}\n",
                pod.name, pod.node
            );
        }
    }
    text
}

/// A Node.
#[must_use]
pub fn node_manifest(node: &crate::topology::Node) -> String {
    let mut text = format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: {}\n", node.name);
    if node.gateway {
        text.push_str("  labels:\n    tombolo.dev/gateway: \"true\"\n");
    }
    let _ = write!(
        text,
        "spec:\n  podCIDR: {p4}\n  podCIDRs: [\"{p4}\", \"{p6}\"]\nstatus:\n  addresses:\n    \
         - {{ type: InternalIP, address: \"{}\" }}\n    - {{ type: InternalIP, address: \"{}\" }}\n    \
         - {{ type: Hostname, address: {} }}\n  conditions:\n    - {{ type: Ready, status: \"True\" }}\n",
        node.v4,
        node.v6,
        node.name,
        p4 = node.pods4,
        p6 = node.pods6
    );
    text
}
