//! How every other cluster stands, by what all nodes of this one say: for people, and for nothing else.

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{ClusterId, NodeName};

use crate::object::{Node, TunnelNode};

/// Whether this cluster's nodes reach another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// None: nobody can tell yet.
    pub reached: Option<bool>,
    /// As in a condition: one word.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
}

/// Nodes that are named in a message.
const NAMED: usize = 5;

/// How `members` stand. `members`: every cluster of the set, and whether it has said anything.
pub fn standings(
    us: &ClusterId,
    members: &BTreeMap<ClusterId, bool>,
    nodes: &BTreeMap<NodeName, Node>,
    told: &BTreeMap<NodeName, TunnelNode>,
) -> BTreeMap<ClusterId, Standing> {
    let mut total = 0_usize;
    let mut without: BTreeMap<&ClusterId, BTreeSet<&NodeName>> = BTreeMap::new();
    for (name, node) in told.iter().filter(|(name, _)| nodes.get(*name).is_some_and(|node| node.ready)) {
        total += 1;
        for cluster in &node.unreached {
            without.entry(cluster).or_default().insert(name);
        }
    }
    let none = BTreeSet::new();
    let stand = |(cluster, spoken): (&ClusterId, &bool)| {
        let without = without.get(cluster).unwrap_or(&none);
        let (reached, reason, message) = if cluster == us {
            (Some(true), "ThisCluster", "this cluster itself".to_owned())
        } else if !spoken {
            (None, "NotSpoken", "it was admitted, and has said nothing yet".to_owned())
        } else if total == 0 {
            (None, "NoNodes", "no node of this cluster is ready and has said what it reaches".to_owned())
        } else if without.is_empty() {
            let nodes = if total == 1 {
                "the one node reaches it".to_owned()
            } else {
                format!("all {total} nodes reach it")
            };
            (Some(true), "Reached", nodes)
        } else if without.len() < total {
            let named: Vec<&str> = without.iter().take(NAMED).map(|name| name.as_str()).collect();
            let more = if without.len() > NAMED { ", ..." } else { "" };
            let (few, list) = (without.len(), named.join(", "));
            (Some(true), "PartlyReached", format!("{few} of {total} nodes do not reach it: {list}{more}"))
        } else {
            let text = "no node reaches it; `tombolo explain` on one tells at which step it ends";
            (Some(false), "Unreached", text.to_owned())
        };
        (cluster.clone(), Standing { reached, reason, message })
    };
    members.iter().map(stand).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ready: bool) -> Node {
        Node { gateway: false, ready, pod_cidrs: BTreeSet::new(), addresses: Vec::new() }
    }

    fn told(unreached: &[&str]) -> TunnelNode {
        TunnelNode {
            devices: BTreeMap::new(),
            candidates: Vec::new(),
            outside: BTreeSet::new(),
            prefixes: BTreeSet::new(),
            unreached: unreached.iter().map(|c| c.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_cluster_is_reached_while_any_ready_node_reaches_it() {
        let us: ClusterId = "eu".parse().unwrap();
        let members: BTreeMap<ClusterId, bool> = [("eu", true), ("us", true), ("ap", true), ("new", false)]
            .map(|(c, spoken)| (c.parse().unwrap(), spoken))
            .into();
        let name = |n: &str| -> NodeName { n.parse().unwrap() };
        let nodes: BTreeMap<NodeName, Node> =
            [("a", true), ("b", true), ("c", false)].map(|(n, ready)| (name(n), node(ready))).into();
        let tell = |all: &[(&str, &[&str])]| {
            let told = all.iter().map(|(n, unreached)| (name(n), told(unreached))).collect();
            let standings = standings(&us, &members, &nodes, &told);
            standings.values().map(|s| (s.reached, s.reason)).collect::<Vec<_>>()
        };
        // In the order ap, eu, new, us. What a node says that is not ready, or is none any more, does not count.
        assert_eq!(
            tell(&[("a", &["us", "ap"]), ("b", &["us"]), ("c", &[]), ("gone", &[])]),
            [
                (Some(true), "PartlyReached"),
                (Some(true), "ThisCluster"),
                (None, "NotSpoken"),
                (Some(false), "Unreached"),
            ]
        );
        assert_eq!(tell(&[("c", &[])])[3], (None, "NoNodes"));
        assert_eq!(tell(&[("a", &[])])[3], (Some(true), "Reached"));
    }
}
