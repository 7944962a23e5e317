//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::{Ipv4Net, Ipv6Net};
use tombolo_agent_core::object::ServiceKey;
use tombolo_agent_core::world::{Reach, Topology};
use tombolo_proto::model::{ClusterId, Namespace, NamespacePattern, NodeName, Prefix, ServiceName, SetName};
use tombolo_proto::trust::PublicKey;

use crate::output::{Color, Format};

/// Joins Kubernetes clusters: a service exported in one is reached from all others by name.
///
/// An administrator makes a set (`init`) and hands every cluster an invitation (`invite`, or `admit` where no secret
/// may travel). A cluster joins with it (`join`), and its users export services (`export`, or a ServiceExport
/// manifest). `status` and `check` tell how things are.
#[derive(Parser)]
#[command(name = "tombolo", version, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Form of the output.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub(crate) output: Format,
    /// When to use colours (NO_COLOR is obeyed).
    #[arg(long, global = true, value_enum, default_value_t)]
    pub(crate) color: Color,
    /// Leave out the headers of tables.
    #[arg(long, global = true)]
    pub(crate) no_headers: bool,
}

const EXAMPLES: &str = "\
Examples:
  tombolo init harbour --broker broker.example:4500
  tombolo invite eu-west --pod-cidr 10.1.0.0/16 > eu-west.token
  tombolo join --cluster-dir /var/lib/tombolo/cluster @eu-west.token
  tombolo export production/api-service
  tombolo resolve api-service.production.svc.clusterset.local
  tombolo explain 10.2.1.7 api-service.production:8080

Exit codes: 0 done, 1 failed (or a check found a failure), 2 wrong usage.
Manifests instead of commands: docs/directory.md.";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a new set: root keys, and an identity for each broker
    Init(Init),
    /// Grant a cluster membership and print a one-use token for it
    Invite(Invite),
    /// Grant membership to a cluster's own key: no secret travels
    Admit(Admit),
    /// End a cluster's membership and tell the brokers
    Revoke(Revoke),
    /// List the clusters that were granted membership
    Members(SetArgs),
    /// Make this cluster a member, by a token or by an admission
    Join(Join),
    /// Print this cluster's public key, for `tombolo admit`
    Key(ClusterArgs),
    /// Leave the set: this cluster says nothing any more, and forgets the others
    Leave(Leave),
    /// Change this cluster's keys, under traffic
    Rotate(Rotate),
    /// Export a service to the set
    Export(Export),
    /// Stop exporting a service
    Unexport(Export),
    /// Show members, nodes, exports and imports
    Status(Status),
    /// Check this node's kernel, firewall, forwarding and ranges
    Check(Check),
    /// Tell what a name answers, out of what this cluster imports
    Resolve(Resolve),
    /// Walk the way from a pod of this node to a service: where does it break, and what to do
    Explain(Explain),
    /// Print a shell's completion script, to be sourced
    Completion(Completion),
}

/// Where the administrator keeps the set.
#[derive(Args)]
pub(crate) struct SetArgs {
    /// The administrator's directory, made by `tombolo init`.
    #[arg(long, env = "TOMBOLO_SET_DIR", default_value = "tombolo-set", value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

/// Which cluster.
#[derive(Args)]
pub(crate) struct ClusterArgs {
    /// The directory that is the cluster's API (docs/directory.md).
    #[arg(long, env = "TOMBOLO_CLUSTER_DIR", default_value = "/var/lib/tombolo/cluster", value_name = "DIR")]
    pub(crate) cluster_dir: PathBuf,
}

#[derive(Args)]
pub(crate) struct Init {
    /// What people call the set.
    pub(crate) name: SetName,
    /// Address of a broker as members reach it; may be repeated.
    #[arg(long, required = true, value_name = "HOST:PORT")]
    pub(crate) broker: Vec<String>,
    #[command(flatten)]
    pub(crate) set: SetArgs,
    /// Where members' tunnel addresses come from, a /24 each; must be nobody's pod, node or service range.
    #[arg(long, default_value_t = crate::set::default_tunnel_pool(), value_name = "CIDR")]
    pub(crate) tunnel_pool: Ipv4Net,
}

/// What a cluster will be.
#[derive(Args)]
pub(crate) struct GrantArgs {
    /// The cluster's id: one DNS label, unique in the set.
    pub(crate) cluster: ClusterId,
    /// A pod range of the cluster; may be repeated (IPv4 and IPv6).
    #[arg(long, required_unless_present_any = ["add_pod_cidr", "remove_pod_cidr"], value_name = "CIDR")]
    pub(crate) pod_cidr: Vec<Prefix>,
    /// Grant anew what the cluster has, and this pod range too; may be repeated.
    #[arg(long, conflicts_with = "pod_cidr", value_name = "CIDR")]
    pub(crate) add_pod_cidr: Vec<Prefix>,
    /// Grant anew what the cluster has, without this pod range; may be repeated.
    #[arg(long, conflicts_with = "pod_cidr", value_name = "CIDR")]
    pub(crate) remove_pod_cidr: Vec<Prefix>,
    /// Namespaces it may export: a name, or the beginning of one and '*'. Default: all, or what it has when ranges are
    /// added or removed.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    pub(crate) namespaces: Vec<NamespacePattern>,
    /// How many nodes its tunnel range has room for, at least; a renewed grant keeps the range that there is.
    #[arg(long, default_value_t = 254, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=65_534))]
    pub(crate) nodes: u32,
    /// Grant anew to a cluster that is granted already (a lost token or key, other ranges). Name all its ranges and
    /// namespaces; its tunnel range and its age stay, and the new grant replaces the old one when it joins with it.
    #[arg(long)]
    pub(crate) renew: bool,
    #[command(flatten)]
    pub(crate) set: SetArgs,
}

#[derive(Args)]
pub(crate) struct Invite {
    #[command(flatten)]
    pub(crate) grant: GrantArgs,
    /// Hours in which the token must be used; membership itself never ends by a clock. 0: no limit.
    #[arg(long, default_value_t = 24, value_name = "HOURS")]
    pub(crate) valid_for: u64,
}

#[derive(Args)]
pub(crate) struct Admit {
    #[command(flatten)]
    pub(crate) grant: GrantArgs,
    /// What `tombolo key` printed in that cluster.
    #[arg(long, value_name = "BASE64", value_parser = public_key)]
    pub(crate) key: PublicKey,
}

fn public_key(text: &str) -> Result<PublicKey, String> {
    PublicKey::try_from(text.to_owned())
}

#[derive(Args)]
pub(crate) struct Revoke {
    /// Which cluster.
    pub(crate) cluster: ClusterId,
    #[command(flatten)]
    pub(crate) set: SetArgs,
    /// Only sign the list; hand it to the brokers later, by the same command.
    #[arg(long)]
    pub(crate) offline: bool,
    /// End all its grants but the newest: the cluster stays a member if it has joined by that one.
    #[arg(long)]
    pub(crate) older: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Args)]
pub(crate) struct Join {
    /// The token or admission itself, @FILE, or '-' for standard input (a token is a secret: prefer these two).
    pub(crate) token: String,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// What foreign traffic may come to pods: exported ports only, or everything. [default: exports]
    #[arg(long, value_parser = reach_parser())]
    pub(crate) reach: Option<Reach>,
    /// Which nodes have tunnels to other clusters: gateways alone, or every node with every node of clusters that are
    /// meshed too. [default: gateway]
    #[arg(long, value_parser = topology_parser())]
    pub(crate) topology: Option<Topology>,
    /// Where this cluster takes its IPv4 ClusterSetIPs from; local, may be the same everywhere. [default: 198.19.0.0/16]
    #[arg(long, value_name = "CIDR")]
    pub(crate) clusterset_v4: Option<Ipv4Net>,
    /// Where this cluster takes its IPv6 ClusterSetIPs from. [default: fd19:746f:6d62::/112]
    #[arg(long, value_name = "CIDR")]
    pub(crate) clusterset_v6: Option<Ipv6Net>,
    /// Take the new grant with a new key instead of the one that the cluster has: for one that may be stolen.
    #[arg(long)]
    pub(crate) new_key: bool,
    /// Write nothing: print the manifests that make a Kubernetes cluster a member, for `kubectl apply -f -`. They hold
    /// the cluster's new key (docs/kubernetes.md).
    #[arg(long, conflicts_with_all = ["clusterset_v4", "clusterset_v6", "new_key"])]
    pub(crate) kubernetes: bool,
    /// A range of this cluster that no other may ever own here (Services, API server, ...); may be repeated.
    #[arg(long, value_name = "CIDR")]
    pub(crate) reserve: Vec<Prefix>,
}

#[derive(Args)]
pub(crate) struct Leave {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Seconds to wait until the leading agent has withdrawn everything. 0: do not wait.
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub(crate) wait: u64,
    /// Do not ask.
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Args)]
pub(crate) struct Rotate {
    #[command(subcommand)]
    pub(crate) what: RotateWhat,
}

/// Which keys.
#[derive(Subcommand)]
pub(crate) enum RotateWhat {
    /// The key that signs what this cluster says: a new one, bound by the present one
    ClusterKey(RotateClusterKey),
    /// The WireGuard keys of nodes, made by the nodes themselves
    Wireguard(RotateWireguard),
}

#[derive(Args)]
pub(crate) struct RotateClusterKey {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Seconds to wait until the leading agent speaks with the new key. 0: do not wait.
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub(crate) wait: u64,
}

fn topology_parser() -> impl TypedValueParser<Value = Topology> {
    PossibleValuesParser::new(["gateway", "mesh"])
        .map(|text| if text == "mesh" { Topology::Mesh } else { Topology::Gateway })
}

#[derive(Args)]
pub(crate) struct RotateWireguard {
    /// Which nodes of this cluster.
    #[arg(value_name = "NODE", required_unless_present = "all", conflicts_with = "all")]
    pub(crate) nodes: Vec<NodeName>,
    /// All nodes of this cluster.
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Seconds to wait until the nodes have told their new keys. 0: do not wait.
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub(crate) wait: u64,
}

fn reach_parser() -> impl TypedValueParser<Value = Reach> {
    PossibleValuesParser::new(["exports", "all"])
        .map(|text| if text == "all" { Reach::All } else { Reach::Exports })
}

#[derive(Args)]
pub(crate) struct Export {
    /// Which service, as NAMESPACE/SERVICE.
    #[arg(value_name = "NAMESPACE/SERVICE", value_parser = service_key)]
    pub(crate) service: ServiceKey,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

fn service_key(text: &str) -> Result<ServiceKey, String> {
    let (namespace, name) =
        text.split_once('/').ok_or("NAMESPACE/SERVICE is expected, such as production/api")?;
    let namespace = Namespace::new(namespace).map_err(|e| e.to_string())?;
    let name = ServiceName::new(name).map_err(|e| e.to_string())?;
    Ok(ServiceKey { namespace, name })
}

/// The agent of this node.
#[derive(Args)]
pub(crate) struct AgentArgs {
    /// Where the agent of this node serves its admin pages.
    #[arg(long, env = "TOMBOLO_ADMIN", default_value = "127.0.0.1:4505", value_name = "ADDRESS:PORT")]
    pub(crate) admin: SocketAddr,
}

#[derive(Args)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) agent: AgentArgs,
}

#[derive(Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) agent: AgentArgs,
    /// Only what can be checked before joining.
    #[arg(long)]
    pub(crate) pre: bool,
    /// Warnings fail too.
    #[arg(long)]
    pub(crate) strict: bool,
}

#[derive(Args)]
pub(crate) struct Resolve {
    /// SERVICE.NAMESPACE.svc.clusterset.local, or SERVICE.NAMESPACE
    pub(crate) name: String,
    /// Type of the records.
    #[arg(long = "type", short = 't', value_enum, ignore_case = true)]
    pub(crate) kind: Option<RecordKind>,
    /// Say of every address behind the name why it is, or is not, used.
    #[arg(long)]
    pub(crate) explain: bool,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

#[derive(Args)]
pub(crate) struct Explain {
    /// From a pod's address or this node's name, to SERVICE.NAMESPACE, perhaps with :PORT, or an address of another cluster.
    /// An arrow may stand between the two, in quotes; FROM may be left out and is this node then.
    #[arg(value_name = "FROM TO", required = true, num_args = 1..=3)]
    pub(crate) words: Vec<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// This node's name, as in its Node object. Default: the node whose addresses are this machine's.
    #[arg(long, env = "TOMBOLO_NODE", value_name = "NAME")]
    pub(crate) node: Option<NodeName>,
    #[command(flatten)]
    pub(crate) agent: AgentArgs,
}

/// Types of records that names here have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub(crate) enum RecordKind {
    /// IPv4 addresses
    A,
    /// IPv6 addresses
    Aaaa,
    /// Ports
    Srv,
    /// dns-version
    Txt,
}

#[derive(Args)]
pub(crate) struct Completion {
    /// For which shell.
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}
