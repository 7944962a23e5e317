//! The objects of a lab cluster: those that people write, and those that kubelets would.

use serde_json::{Value, json};

use crate::directory::backends;
use crate::topology::{CLUSTER_DNS, Cluster, ControlPlane, Node, Pod, Service};

/// Everything as `kubectl apply` takes it: namespaces first.
pub(super) fn all(cluster: &Cluster, control: &ControlPlane) -> Value {
    let mut namespaces: Vec<&str> = pods(cluster).map(|p| &*p.namespace).collect();
    namespaces.extend(cluster.services.iter().map(|s| &*s.namespace));
    namespaces.extend(["default", "kube-system"]);
    namespaces.sort_unstable();
    namespaces.dedup();
    let mut items = Vec::new();
    for namespace in namespaces {
        items.push(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }));
        // The controller would make it too; a pod cannot be written before it is there.
        items.push(json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "default", "namespace": namespace },
        }));
    }
    items.extend(dns(control));
    items.extend(pods(cluster).map(|p| pod(cluster, p)));
    items.extend(cluster.services.iter().map(service));
    list(&items)
}

/// The nodes, with what their kubelets report, as `kubectl create` takes them. (Not `apply`: it takes two addresses of a
/// type for one twice.)
pub(super) fn nodes(cluster: &Cluster) -> Value {
    list(&cluster.nodes.iter().map(|n| node(cluster, n)).collect::<Vec<_>>())
}

/// What kubelets would report of their pods, as `kubectl apply --subresource=status` takes it.
pub(super) fn statuses(cluster: &Cluster, control: &ControlPlane) -> Value {
    let mut items = Vec::new();
    for pod in pods(cluster).chain([&control.dns]) {
        let node = cluster.nodes.iter().find(|n| n.name == pod.node);
        items.extend(node.map(|node| pod_status(node, pod, true)));
    }
    list(&items)
}

/// A list, which kubectl takes apart.
pub(super) fn list(items: &[Value]) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "items": items })
}

fn pods(cluster: &Cluster) -> impl Iterator<Item = &Pod> {
    cluster.nodes.iter().flat_map(|n| &n.pods)
}

fn node(cluster: &Cluster, node: &Node) -> Value {
    let mut labels = json!({
        "kubernetes.io/hostname": node.name,
        "kubernetes.io/os": "linux",
        "topology.kubernetes.io/zone": cluster.id,
    });
    if node.gateway {
        labels["tombolo.dev/gateway"] = "true".into();
    }
    let mut spec =
        json!({ "podCIDR": node.pods4, "podCIDRs": [node.pods4.to_string(), node.pods6.to_string()] });
    if !node.kwok {
        // Its pods are the lab's: nobody would run what the scheduler sent.
        spec["taints"] = json!([{ "key": "lab", "effect": "NoSchedule" }]);
    }
    let room = json!({ "cpu": "8", "memory": "16Gi", "pods": "250" });
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node.name, "labels": labels },
        "spec": spec,
        "status": {
            "addresses": [
                { "type": "InternalIP", "address": node.v4 },
                { "type": "InternalIP", "address": node.v6 },
                { "type": "Hostname", "address": node.name },
            ],
            "capacity": room,
            "allocatable": room,
            "conditions": [{ "type": "Ready", "status": "True", "reason": "Lab" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": 10250 } },
        },
    })
}

fn pod(cluster: &Cluster, pod: &Pod) -> Value {
    // As a StatefulSet does it: a pod of a headless service has a name of its own there.
    let governing = cluster
        .services
        .iter()
        .find(|s| s.headless && backends(cluster, s).any(|b| b.name == pod.name))
        .map(|s| &s.name);
    let mut spec = json!({
        "nodeName": pod.node,
        "hostname": pod.name,
        "automountServiceAccountToken": false,
        "containers": [{ "name": "serve", "image": "lab" }],
    });
    if let Some(service) = governing {
        spec["subdomain"] = service.as_str().into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": pod.name, "namespace": pod.namespace, "labels": { "app": pod.app } },
        "spec": spec,
    })
}

/// What the kubelet of `node` reports of a pod.
pub(super) fn pod_status(node: &Node, pod: &Pod, ready: bool) -> Value {
    let is =
        |kind: &str, true_: bool| json!({ "type": kind, "status": if true_ { "True" } else { "False" } });
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": pod.name, "namespace": pod.namespace },
        "status": {
            "phase": "Running",
            "podIP": pod.v4,
            "podIPs": [{ "ip": pod.v4 }, { "ip": pod.v6 }],
            "hostIP": node.v4,
            "hostIPs": [{ "ip": node.v4 }, { "ip": node.v6 }],
            "conditions": [
                is("PodScheduled", true), is("Initialized", true), is("ContainersReady", ready), is("Ready", ready),
            ],
        },
    })
}

/// A pod of Tombolo's own programs.
pub(super) fn agent(pod: &Pod, account: &str, host_network: bool) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name, "namespace": pod.namespace, "labels": { "app.kubernetes.io/name": pod.app },
        },
        "spec": {
            "nodeName": pod.node,
            "serviceAccountName": account,
            "hostNetwork": host_network,
            "containers": [{ "name": "agent", "image": "lab" }],
        },
    })
}

fn service(service: &Service) -> Value {
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|p| {
            let target = p.target.unwrap_or(p.port);
            json!({ "name": p.name, "port": p.port, "targetPort": target, "protocol": p.protocol })
        })
        .collect();
    let mut spec = json!({
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "RequireDualStack",
        "selector": { "app": service.app },
        "ports": ports,
    });
    if service.headless {
        spec["clusterIP"] = "None".into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": service.name, "namespace": service.namespace },
        "spec": spec,
    })
}

/// CoreDNS as installers set it up: an account with its role, a pod, the Service that everybody asks.
fn dns(control: &ControlPlane) -> Vec<Value> {
    let in_system = |name: &str| json!({ "name": name, "namespace": "kube-system" });
    let watch = |group: &str, resources: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": ["list", "watch"] });
    let port = |name: &str, protocol: &str| json!({ "name": name, "port": 53, "protocol": protocol });
    let mut pod_metadata = in_system(&control.dns.name);
    pod_metadata["labels"] = json!({ "k8s-app": control.dns.app });
    vec![
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": in_system("coredns") }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": { "name": "system:coredns" },
            "rules": [
                watch("", &["endpoints", "services", "pods", "namespaces"]),
                watch("discovery.k8s.io", &["endpointslices"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": { "name": "system:coredns" },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns" },
            "subjects": [{ "kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system" }],
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": pod_metadata,
            "spec": {
                "nodeName": control.dns.node,
                "serviceAccountName": "coredns",
                "automountServiceAccountToken": false,
                "containers": [{ "name": "coredns", "image": "lab" }],
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": in_system("kube-dns"),
            "spec": {
                "clusterIP": CLUSTER_DNS,
                "selector": { "k8s-app": control.dns.app },
                "ports": [port("dns", "UDP"), port("dns-tcp", "TCP")],
            },
        }),
    ]
}
