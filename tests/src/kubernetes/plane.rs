//! The control plane and what runs of Kubernetes on the nodes.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::binary::find;
use super::object;
use super::pki::{self, Authority, Identity};
use crate::lab::{Lab, wait_until};
use crate::member::{READY, run};
use crate::probe::{Question, ask};
use crate::topology::{CLUSTER_DNS, Cluster, ControlPlane, Node, SERVICES4, SERVICES6};

/// The directory of a control plane, there.
const PLANE: &str = "/run/lab/cluster";
/// The kubeconfig of the cluster's administrator, in the place of the API.
const ADMIN: &str = "/run/lab/cluster/admin.kubeconfig";
/// A node's or pod's private directory, there.
const STATE: &str = crate::program::STATE_DIR;

impl Lab {
    /// Makes the certificates of a cluster and starts its etcd and its kube-apiserver, in a place that is there
    /// already. Does not wait for them.
    pub(crate) fn start_plane(&self, cluster: &Cluster, control: &ControlPlane) -> Result<()> {
        let dir = self.cluster_dir(&cluster.id);
        let authority = Authority::create()?;
        pki::write(&dir, "ca.crt", &authority.pem())?;
        pki::token_key(&dir)?;
        let names = [
            "kubernetes.default.svc".to_owned(),
            "127.0.0.1".to_owned(),
            "10.96.0.1".to_owned(),
            control.v4.to_string(),
            control.v6.to_string(),
        ];
        keep(&dir, "api", &authority.server(names.into())?)?;
        let admin = authority.client("admin", Some("system:masters"))?;
        for (file, server) in
            [("admin.kubeconfig", "https://127.0.0.1:6443".to_owned()), ("remote.kubeconfig", url(control))]
        {
            pki::write(&dir, file, &authority.kubeconfig(&cluster.id, &server, &admin))?;
        }
        for node in &cluster.nodes {
            let identity = authority.client("system:kube-proxy", None)?;
            let text = authority.kubeconfig(&cluster.id, &url(control), &identity);
            pki::write(&self.state_dir(&node.name), "kube-proxy.kubeconfig", &text)?;
            if node.kwok {
                self.prepare_kwok(&authority, control, node)?;
            }
        }
        let identity = authority.client("system:serviceaccount:kube-system:coredns", None)?;
        let text = authority.kubeconfig(&cluster.id, &url(control), &identity);
        pki::write(&self.state_dir(&control.dns.name), "coredns.kubeconfig", &text)?;
        self.start(&control.place, "etcd", &etcd()?)?;
        self.start(&control.place, "kube-apiserver", &api_server(control)?)
    }

    /// Waits for the API servers of these clusters, writes what people and kubelets would, starts the controllers, the
    /// proxies and the DNS, and waits until names resolve on every node.
    ///
    /// # Errors
    /// What did not come up, with its last words.
    pub(crate) fn finish_planes(&self, clusters: &[Cluster]) -> Result<()> {
        let planes = || clusters.iter().filter_map(|c| c.kubernetes().map(|control| (c, control)));
        for (cluster, control) in planes() {
            self.wait_api(cluster, control)?;
            self.start(&control.place, "kube-controller-manager", &controllers()?)?;
            self.start(&control.place, "kube-scheduler", &scheduler()?)?;
            self.kubectl(&cluster.id, &["create", "--filename=-"], &object::nodes(cluster).to_string())?;
            self.apply(&cluster.id, &[], &object::all(cluster, control))?;
            self.apply(&cluster.id, &["--subresource=status"], &object::statuses(cluster, control))?;
            self.write_corefile(&cluster.id, None)?;
            self.start(&control.dns.name, "coredns", &coredns()?)?;
            for node in &cluster.nodes {
                self.start_proxy(cluster, control, node)?;
                if node.kwok {
                    self.start_kwok(node)?;
                }
            }
        }
        planes().try_for_each(|(cluster, control)| self.wait_names(cluster, control))
    }

    fn wait_api(&self, cluster: &Cluster, control: &ControlPlane) -> Result<()> {
        wait_until(&format!("the API of {} to be ready", cluster.id), READY, || {
            self.pid(&control.place, "etcd")?;
            self.pid(&control.place, "kube-apiserver")?;
            let place = self.place(&control.place)?;
            let port = std::net::SocketAddr::from(([127, 0, 0, 1], 6443));
            place.run(|| std::net::TcpStream::connect_timeout(&port, Duration::from_secs(1)))??;
            self.kubectl(&cluster.id, &["get", "--raw=/readyz"], "").map(drop)
        })
        .map(drop)
        .with_context(|| self.tail(&control.place, "kube-apiserver"))
    }

    /// Every node's kube-proxy leads to the DNS, and that knows the API's Service.
    fn wait_names(&self, cluster: &Cluster, control: &ControlPlane) -> Result<()> {
        let question = Question { name: "kubernetes.default.svc.cluster.local".to_owned(), kind: 1 };
        let server = (CLUSTER_DNS, 53).into();
        for node in &cluster.nodes {
            wait_until(&format!("{} to resolve names", node.name), READY, || {
                self.pid(&control.dns.name, "coredns")?;
                self.pid(&node.name, "kube-proxy")?;
                let place = self.place(&node.name)?;
                let (code, addresses) =
                    place.run(|| ask(server, &question, Duration::from_millis(500)))??;
                ensure!(code == 0 && !addresses.is_empty(), "answered {code} {addresses:?}");
                Ok(())
            })
            .with_context(|| self.tail(&node.name, "kube-proxy"))
            .with_context(|| self.tail(&control.dns.name, "coredns"))?;
        }
        Ok(())
    }

    /// Runs kubectl as the administrator of a cluster of `api: kubernetes`; what it printed.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl(&self, cluster: &str, words: &[&str], input: &str) -> Result<String> {
        let control = self.control_plane(cluster)?;
        let words: Vec<_> = words.iter().map(|w| (*w).to_owned()).collect();
        run(self.command(&control.place, &kubectl(&words)?)?, input)
    }

    /// Writes objects (one, or a List) into a cluster of `api: kubernetes`, as the administrator.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn apply(&self, cluster: &str, options: &[&str], objects: &serde_json::Value) -> Result<()> {
        let words = ["apply", "--server-side", "--force-conflicts", "--field-manager=lab", "--filename=-"];
        self.kubectl(cluster, &[&words[..], options].concat(), &objects.to_string()).map(drop)
    }

    /// Tells the kubelet's word on a pod: whether it is ready.
    ///
    /// # Errors
    /// If there is no such pod, or what kubectl said.
    pub fn set_ready(&self, pod: &str, ready: bool) -> Result<()> {
        let pod = self.topology().pod(pod)?;
        let node = self.topology().node(&pod.node)?;
        self.apply(&pod.cluster, &["--subresource=status"], &object::pod_status(node, pod, ready))
    }

    /// Points the stub domain `clusterset.local` of a cluster's DNS at this server.
    ///
    /// # Errors
    /// If the cluster has no CoreDNS.
    pub fn stub_domain(&self, cluster: &str, server: std::net::IpAddr) -> Result<()> {
        self.write_corefile(cluster, Some(server))?;
        let control = self.control_plane(cluster)?;
        // CoreDNS's word for: read your Corefile again. It serves on meanwhile.
        self.signal(&control.dns.name, "coredns", nix::sys::signal::Signal::SIGUSR1)
    }

    fn write_corefile(&self, cluster: &str, stub: Option<std::net::IpAddr>) -> Result<()> {
        let control = self.control_plane(cluster)?;
        pki::write(&self.state_dir(&control.dns.name), "Corefile", &corefile(stub))
    }

    pub(super) fn control_plane(&self, cluster: &str) -> Result<&ControlPlane> {
        let found = self.topology().cluster(cluster)?.kubernetes();
        found.with_context(|| format!("{cluster} is a directory: write `api: kubernetes` in the topology"))
    }

    fn start_proxy(&self, cluster: &Cluster, control: &ControlPlane, node: &Node) -> Result<()> {
        // As on every real node: traffic between two pods of a node passes its firewall too.
        self.place(&node.name)?
            .sysctl(&[("bridge/bridge-nf-call-iptables", "1"), ("bridge/bridge-nf-call-ip6tables", "1")])
            .context("the lab's Kubernetes needs br_netfilter: modprobe br_netfilter")?;
        pki::write(
            &self.state_dir(&node.name),
            "kube-proxy.json",
            &proxy_configuration(cluster, control, node),
        )?;
        let config = format!("--config={STATE}/kube-proxy.json");
        self.start(&node.name, "kube-proxy", &[find("kube-proxy")?, config])
    }
}

pub(super) fn url(control: &ControlPlane) -> String {
    format!("https://{}:6443", control.v4)
}

fn keep(dir: &Path, name: &str, identity: &Identity) -> Result<()> {
    pki::write(dir, &format!("{name}.crt"), &identity.certificate)?;
    pki::write(dir, &format!("{name}.key"), &identity.key)
}

fn line(program: &str, args: &[&str]) -> Result<Vec<String>> {
    let mut line = vec![find(program)?];
    line.extend(args.iter().map(|a| (*a).to_owned()));
    Ok(line)
}

/// kubectl as a cluster's administrator, in the place of its API.
///
/// # Errors
/// If it is not there.
pub fn kubectl(words: &[String]) -> Result<Vec<String>> {
    let line = std::iter::once(find("kubectl")?).chain(words.iter().cloned()).collect();
    Ok(crate::program::with(
        &[&format!("KUBECONFIG={ADMIN}"), &format!("KUBECACHEDIR={STATE}/kubectl")],
        line,
    ))
}

fn etcd() -> Result<Vec<String>> {
    let client = "http://127.0.0.1:2379";
    let peer = "http://127.0.0.1:2380";
    line(
        "etcd",
        &[
            &format!("--data-dir={PLANE}/etcd"),
            &format!("--listen-client-urls={client}"),
            &format!("--advertise-client-urls={client}"),
            &format!("--listen-peer-urls={peer}"),
            &format!("--initial-advertise-peer-urls={peer}"),
            &format!("--initial-cluster=default={peer}"),
            // Its disk is memory, and ends with the lab.
            "--unsafe-no-fsync",
            "--log-level=warn",
        ],
    )
}

fn api_server(control: &ControlPlane) -> Result<Vec<String>> {
    line(
        "kube-apiserver",
        &[
            "--etcd-servers=http://127.0.0.1:2379",
            "--bind-address=::",
            &format!("--advertise-address={}", control.v4),
            &format!("--cert-dir={STATE}/kube-apiserver"),
            &format!("--tls-cert-file={PLANE}/api.crt"),
            &format!("--tls-private-key-file={PLANE}/api.key"),
            &format!("--client-ca-file={PLANE}/ca.crt"),
            "--service-account-issuer=https://kubernetes.default.svc",
            &format!("--service-account-key-file={PLANE}/sa.pub"),
            &format!("--service-account-signing-key-file={PLANE}/sa.key"),
            &format!("--service-cluster-ip-range={SERVICES4},{SERVICES6}"),
            "--authorization-mode=RBAC",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged",
            // No kubelet takes the taint of a new node away.
            "--disable-admission-plugins=TaintNodesByCondition",
            "--profiling=false",
        ],
    )
}

/// Of the controllers those that a cluster of Services, Deployments and namespaces needs: two cores carry it all.
const CONTROLLERS: [&str; 9] = [
    "serviceaccount-controller",
    "namespace-controller",
    "garbage-collector-controller",
    "endpointslice-controller",
    "deployment-controller",
    "replicaset-controller",
    "statefulset-controller",
    "root-ca-certificate-publisher-controller",
    "validatingadmissionpolicy-status-controller",
];

fn controllers() -> Result<Vec<String>> {
    line(
        "kube-controller-manager",
        &[
            &format!("--kubeconfig={ADMIN}"),
            &format!("--controllers={}", CONTROLLERS.join(",")),
            &format!("--root-ca-file={PLANE}/ca.crt"),
            &format!("--cert-dir={STATE}/kube-controller-manager"),
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--profiling=false",
        ],
    )
}

fn scheduler() -> Result<Vec<String>> {
    line(
        "kube-scheduler",
        &[
            &format!("--kubeconfig={ADMIN}"),
            &format!("--cert-dir={STATE}/kube-scheduler"),
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--profiling=false",
        ],
    )
}

fn proxy_configuration(cluster: &Cluster, control: &ControlPlane, node: &Node) -> String {
    serde_json::json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": control.proxy.as_str(),
        "hostnameOverride": node.name,
        "clusterCIDR": format!("{},{}", cluster.pods4, cluster.pods6),
        "clientConnection": { "kubeconfig": format!("{STATE}/kube-proxy.kubeconfig") },
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        // These keys are the machine's, not the namespace's.
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
    .to_string()
}

fn coredns() -> Result<Vec<String>> {
    line("coredns", &["-conf", &format!("{STATE}/Corefile")])
}

/// The Corefile of kubeadm, with what a user adds for the set (deploy/): a stub domain.
fn corefile(stub: Option<std::net::IpAddr>) -> String {
    let mut text = format!(
        ".:53 {{\n    errors\n    health\n    ready\n    \
         kubernetes cluster.local in-addr.arpa ip6.arpa {{\n        kubeconfig {STATE}/coredns.kubeconfig\n        \
         pods insecure\n        fallthrough in-addr.arpa ip6.arpa\n        ttl 30\n    }}\n    \
         cache 30\n    reload\n    loadbalance\n}}\n"
    );
    if let Some(server) = stub {
        let _ = write!(text, "clusterset.local:53 {{\n    errors\n    forward . {server}\n}}\n");
    }
    text
}

/// The kubeconfig of a cluster's administrator as seen from the lab.
#[must_use]
pub fn admin_kubeconfig(lab: &Lab, cluster: &str) -> PathBuf {
    lab.cluster_dir(cluster).join("remote.kubeconfig")
}
