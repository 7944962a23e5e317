//! How an agent is started.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use tombolo_proto::model::{Lanes, NodeName};

use crate::api::kubernetes::{Access, Scope};
use crate::apply::driver::Choice;

/// Joins this node to the clusterset: tunnels, routes, firewall, and the names under clusterset.local.
///
/// Starts as a small holder that keeps the resolver's sockets and restarts the agent proper at once when it dies.
#[derive(Debug, Clone, Parser)]
#[command(name = "tombolo-agent", version, max_term_width = 110)]
pub struct Config {
    /// The directory that is the cluster's API, shared by its nodes (docs/directory.md).
    #[arg(long, env = "TOMBOLO_CLUSTER_DIR", default_value = "/var/lib/tombolo/cluster", value_name = "DIR")]
    pub cluster_dir: PathBuf,
    /// Take the cluster's API from the API server that this file names (as of kubectl), instead of a directory.
    #[arg(long, env = "TOMBOLO_KUBECONFIG", value_name = "FILE", conflicts_with = "in_cluster")]
    pub kubeconfig: Option<PathBuf>,
    /// Take it from the API server of the pod that this runs in.
    #[arg(long, env = "TOMBOLO_IN_CLUSTER")]
    pub in_cluster: bool,
    /// This node's own directory: its keys and what it last verified.
    #[arg(long, env = "TOMBOLO_STATE_DIR", default_value = "/var/lib/tombolo/node", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// This node's name, as in its Node object. Default: the host's name.
    #[arg(long, env = "TOMBOLO_NODE", visible_alias = "node-name", value_name = "NAME")]
    pub node: Option<NodeName>,
    /// What to be. With a directory every agent is both; of those that are controllers the Lease decides who leads.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Role::Node, Role::Controller])]
    pub role: Vec<Role>,
    /// Where names are answered; several may be given.
    #[arg(long, value_delimiter = ',', default_values_t = default_dns(), value_name = "ADDRESS:PORT")]
    pub dns: Vec<SocketAddr>,
    /// Health, readiness, metrics and state over HTTP.
    #[arg(long, default_value = "127.0.0.1:4505", value_name = "ADDRESS:PORT")]
    pub admin: SocketAddr,
    /// What new tunnel devices are. `auto`: the kernel's WireGuard where there is one, else userspace; devices that are there
    /// stay what they are. The kernel's carries most; while a key is rotated, its packets wait for a handshake.
    #[arg(long, env = "TOMBOLO_TUNNEL_DRIVER", value_enum, default_value_t)]
    pub tunnel_driver: Choice,
    /// Tunnels side by side to each peer that has as many, over which flows are spread, 1 to 8: a userspace device is one
    /// thread. Needs UDP ports 4510 to 4509 + 8 x LANES; a lane that does not get through is not used.
    #[arg(long, env = "TOMBOLO_LANES", default_value_t)]
    pub lanes: Lanes,
    /// Where userspace devices are asked for; `tombolo-wireguard serve` watches it.
    #[arg(long, default_value = "/run/tombolo/devices", value_name = "DIR")]
    pub devices_dir: PathBuf,
    /// Form of the log on standard error; TOMBOLO_LOG sets its level (info, debug, ...).
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Remove everything the agent made on this node, and end.
    #[arg(long)]
    pub cleanup: bool,
}

/// What an agent does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Tunnels, routes, firewall and names of this node.
    Node,
    /// The cluster's statements and objects, while it leads.
    Controller,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

fn default_dns() -> Vec<SocketAddr> {
    let port = tombolo_agent_core::desired::DNS_PORT;
    vec![SocketAddr::from(([0, 0, 0, 0], port)), SocketAddr::from(([0u16; 8], port))]
}

impl Config {
    /// Where the API server is; none with a directory.
    pub fn access(&self) -> Option<Access> {
        match &self.kubeconfig {
            Some(path) => Some(Access::Kubeconfig(path.clone())),
            None => self.in_cluster.then_some(Access::InCluster),
        }
    }

    /// What this agent needs to know of the cluster.
    pub fn scope(&self) -> anyhow::Result<Scope> {
        let (is_node, controller) = (self.role.contains(&Role::Node), self.role.contains(&Role::Controller));
        Ok(Scope { node: self.node_name()?, is_node, controller })
    }

    /// This node's name.
    pub fn node_name(&self) -> anyhow::Result<NodeName> {
        if let Some(node) = &self.node {
            return Ok(node.clone());
        }
        let host = nix::unistd::gethostname()?.to_string_lossy().to_lowercase();
        NodeName::new(&host)
            .map_err(|error| anyhow::anyhow!("the host's name will not do as a node's: {error}; give --node"))
    }
}
