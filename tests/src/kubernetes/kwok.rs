//! Nodes whose pods kwok runs: what the scheduler sends there is running and ready at once, at an address of the node's
//! pod range. All these pods are one place, to which the whole range belongs: programs run there by `kubectl exec` are
//! in it, and one server answers for all.

use anyhow::{Context, Result};

use super::binary::find;
use super::pki::{self, Authority};
use super::plane::url;
use crate::lab::Lab;
use crate::place::Place;
use crate::program::{self, STATE_DIR};
use crate::sandbox::which;
use crate::topology::{ControlPlane, Node};

/// The port at which an API server expects a kubelet.
const KUBELET: u16 = 10250;

/// The place of a node's kwok.
pub(crate) fn name(node: &Node) -> String {
    format!("kwok-{}", node.name)
}

/// Joins the place to its node; all of the node's pod range is local there.
pub(crate) fn wire(place: &Place, node: &Node, on: &Place) -> Result<()> {
    let (own4, own6) = addresses(node);
    on.ip(&format!(
        "link add kwok type veth peer name eth0 netns {}\nlink set kwok up\n\
         addr add {cni4}/32 dev kwok\naddr add {cni6}/128 dev kwok nodad\n\
         route add {own4}/32 dev kwok\nroute add {} via {own4}\n\
         -6 route add {own6}/128 dev kwok\n-6 route add {} via {own6}\n",
        place.path(),
        node.pods4,
        node.pods6,
        cni4 = node.cni4,
        cni6 = node.cni6,
    ))?;
    place.ip(&format!(
        "link set eth0 up\naddr add {own4}/32 dev eth0\naddr add {own6}/128 dev eth0 nodad\n\
         route add {cni4}/32 dev eth0\nroute add default via {cni4}\nroute add local {} dev lo\n\
         -6 route add {cni6}/128 dev eth0\n-6 route add default via {cni6}\n-6 route add local {} dev lo\n",
        node.pods4,
        node.pods6,
        cni4 = node.cni4,
        cni6 = node.cni6,
    ))?;
    // The API server asks the kubelet at the node's address. Who asks for a Service from within the place, and is sent to
    // a pod within it, must come from elsewhere: else the answer would not pass the node, which has to turn it back. Nor
    // would it to an address of the pods' range, all of which is the place's.
    let (pods4, pods6) = (node.pods4, node.pods6);
    on.nft(&format!(
        "table inet kubelet {{\n chain prerouting {{\n  type nat hook prerouting priority dstnat - 1;\n  \
         ip daddr {} tcp dport {KUBELET} dnat ip to {own4}:{KUBELET}\n }}\n chain postrouting {{\n  \
         type nat hook postrouting priority srcnat - 1;\n  ip saddr {own4} ip daddr {pods4} snat ip to {v4}\n  \
         ip6 saddr {own6} ip6 daddr {pods6} snat ip6 to {v6}\n }}\n}}\n",
        node.v4,
        v4 = node.v4,
        v6 = node.v6,
    ))
}

/// The place's own addresses: the last but one of IPv4, and its like.
fn addresses(node: &Node) -> (std::net::Ipv4Addr, std::net::Ipv6Addr) {
    let four = u32::from(node.pods4.network()) + 253;
    let six = u128::from(node.pods6.network()) + 253;
    (four.into(), six.into())
}

impl Lab {
    /// Writes what a node's kwok needs into its private directory.
    pub(super) fn prepare_kwok(
        &self,
        authority: &Authority,
        control: &ControlPlane,
        node: &Node,
    ) -> Result<()> {
        let dir = self.state_dir(&name(node));
        let (own4, _) = addresses(node);
        let server = authority.server(vec![node.v4.to_string(), own4.to_string()])?;
        pki::write(&dir, "kubelet.crt", &server.certificate)?;
        pki::write(&dir, "kubelet.key", &server.key)?;
        let client = authority.client(&format!("system:node:{}", node.name), Some("system:masters"))?;
        let text = authority.kubeconfig(&node.cluster, &url(control), &client);
        pki::write(&dir, "kubeconfig", &text)?;
        pki::write(&dir, "kwok.yaml", STAGES)?;
        // What the suite's images have, and print: busybox's `nc` and `nslookup`; of newer suites those of OpenBSD and BIND.
        let found = |program, package| {
            which(program).with_context(|| format!("{program} is missing: apt-get install {package}"))
        };
        let busybox = found("busybox", "busybox")?;
        let (nc, nslookup) = if super::conformance::is_newer() {
            (found("nc.openbsd", "netcat-openbsd")?, found("nslookup", "bind9-dnsutils")?)
        } else {
            (busybox.clone(), busybox.clone())
        };
        let bin = dir.join("bin");
        std::fs::create_dir_all(&bin)?;
        for (applet, program) in [("sh", &busybox), ("echo", &busybox), ("nc", &nc), ("nslookup", &nslookup)]
        {
            std::os::unix::fs::symlink(program, bin.join(applet))?;
        }
        Ok(())
    }

    /// Starts a node's kwok and the server of its pods.
    pub(super) fn start_kwok(&self, node: &Node) -> Result<()> {
        let place = name(node);
        let path = std::env::var("PATH").unwrap_or_default();
        let line = vec![
            find("kwok")?,
            format!("--kubeconfig={STATE_DIR}/kubeconfig"),
            format!("--config={STATE_DIR}/kwok.yaml"),
            format!("--manage-single-node={}", node.name),
            format!("--node-ip={}", node.v4),
            format!("--node-port={KUBELET}"),
            "--server-address=127.0.0.1:10247".to_owned(),
        ];
        self.start(&place, "kwok", &line)?;
        let line = vec![
            find("kubelet")?,
            format!("--address=0.0.0.0:{KUBELET}"),
            format!("--tls-cert-file={STATE_DIR}/kubelet.crt"),
            format!("--tls-private-key-file={STATE_DIR}/kubelet.key"),
        ];
        self.start(&place, "kubelet", &program::with(&[&format!("PATH={STATE_DIR}/bin:{path}")], line))?;
        self.start(&place, "hello", &program::lab(&["hello"])?)
    }
}

/// What kwok does with pods: running and ready at once, gone as soon as somebody deletes them.
const STAGES: &str = r#"apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  name: ready
spec:
  resourceRef: { apiGroup: v1, kind: Pod }
  selector:
    matchExpressions:
      - { key: .metadata.deletionTimestamp, operator: DoesNotExist }
      - { key: .status.podIP, operator: DoesNotExist }
  next:
    statusTemplate: |
      {{ $ips := PodIPsWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace }}
      phase: Running
      startTime: {{ Now | Quote }}
      podIP: {{ index $ips 0 | Quote }}
      podIPs: [ {{ range $ips }}{ ip: {{ . | Quote }} }, {{ end }} ]
      conditions:
        - { type: Initialized, status: "True", lastTransitionTime: {{ Now | Quote }} }
        - { type: ContainersReady, status: "True", lastTransitionTime: {{ Now | Quote }} }
        - { type: Ready, status: "True", lastTransitionTime: {{ Now | Quote }} }
      containerStatuses:
        {{ range .spec.containers }}
        - name: {{ .name | Quote }}
          image: {{ .image | Quote }}
          ready: true
          restartCount: 0
          state: { running: { startedAt: {{ Now | Quote }} } }
        {{ end }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  name: gone
spec:
  resourceRef: { apiGroup: v1, kind: Pod }
  selector:
    matchExpressions:
      - { key: .metadata.deletionTimestamp, operator: Exists }
  next:
    delete: true
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  # The lab speaks for nodes; kwok looks after the pods of those alone for which it has a stage.
  name: node
spec:
  resourceRef: { apiGroup: v1, kind: Node }
  selector:
    matchExpressions:
      - { key: .metadata.deletionTimestamp, operator: Exists }
  next:
    delete: true
"#;
