//! Rules that lead into our tables (`docs/datapath.md`).

use std::collections::{BTreeMap, BTreeSet};

use tombolo_proto::model::{DeviceNumber, Family, Lanes};

use crate::desired::{
    PRIORITY_IN, PRIORITY_LANE, PRIORITY_OUT, Route, Rule, Selector, TABLE_IN, TABLE_OUT, TunnelDevice,
};

/// For each family that has routes: one rule into OUT of each lane, and for each device one into IN of its lane. A rule for
/// every device that exists, whether or not IN has a route today: rules then change with devices only.
pub(crate) fn rules(
    routes: &BTreeSet<Route>,
    devices: &BTreeMap<DeviceNumber, TunnelDevice>,
    lanes: Lanes,
) -> BTreeSet<Rule> {
    let families: BTreeSet<Family> = routes.iter().map(|r| r.prefix.family()).collect();
    let mut rules = BTreeSet::new();
    for family in families {
        rules.insert(Rule { family, priority: PRIORITY_OUT, selector: Selector::NotMark, table: TABLE_OUT });
        rules.extend(lanes.iter().skip(1).map(|lane| Rule {
            family,
            priority: PRIORITY_LANE,
            selector: Selector::Lane(lane),
            table: TABLE_OUT + u32::from(lane.get()),
        }));
        let device = |&number: &DeviceNumber| Rule {
            family,
            priority: PRIORITY_IN,
            selector: Selector::Device(number),
            table: TABLE_IN + u32::from(number.lane().get()),
        };
        rules.extend(devices.keys().map(device));
    }
    rules
}
