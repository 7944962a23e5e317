//! Rules that lead into our tables (`docs/datapath.md`).

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{DeviceNumber, Family};

use crate::desired::{PRIORITY_IN, PRIORITY_OUT, Route, Rule, Selector, TABLE_IN, TABLE_OUT, TunnelDevice};

/// For each family that has routes: one rule into OUT, and for each device one into IN. A rule for every device that
/// exists, whether or not IN has a route today: rules then change with devices only.
pub(crate) fn rules(
    routes: &BTreeSet<Route>,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
) -> BTreeSet<Rule> {
    let families: BTreeSet<Family> = routes.iter().map(|r| r.prefix.family()).collect();
    let mut rules = BTreeSet::new();
    for family in families {
        rules.insert(Rule { family, priority: PRIORITY_OUT, selector: Selector::NotMark, table: TABLE_OUT });
        let device = |&number: &DeviceNumber| Rule {
            family,
            priority: PRIORITY_IN,
            selector: Selector::Device(number),
            table: TABLE_IN,
        };
        rules.extend(devices.keys().map(device));
    }
    rules
}
