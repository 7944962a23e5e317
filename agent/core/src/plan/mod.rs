//! From a world to what should be. Pure: the same world gives the same bytes.

use crate::desired::{ClusterDesired, NodeDesired};
use crate::finding::Finding;
use crate::world::{ClusterWorld, NodeWorld};

/// Plans a node.
pub fn node(_world: &NodeWorld) -> (NodeDesired, Vec<Finding>) {
    (NodeDesired::default(), Vec::new())
}

/// Plans the cluster's objects and statement.
pub fn cluster(_world: &ClusterWorld) -> (ClusterDesired, Vec<Finding>) {
    (ClusterDesired::default(), Vec::new())
}
