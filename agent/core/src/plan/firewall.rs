//! The data of our nft table (`docs/datapath.md`).

use std::collections::BTreeSet;

use tombolo_proto::model::{DeviceFamily, DeviceNumber, Lanes, Prefix};

use super::roster::Claim;
use crate::desired::Firewall;
use crate::shelf::Shelf;
use crate::world::{Members, NodeWorld};

/// Plans the table's data, yet without what the services and the routes bring.
pub(crate) fn firewall(world: &NodeWorld, members: &Members, claim: &Claim) -> Firewall {
    let own = members.get(&world.cluster);
    let remote: BTreeSet<Prefix> = members
        .iter()
        .filter(|(id, _)| own.is_some() && **id != world.cluster)
        .flat_map(|(_, m)| m.owned.union(&m.tunnel).copied())
        .collect();
    let devices = |family: DeviceFamily| -> BTreeSet<DeviceNumber> {
        DeviceNumber::all(Lanes::MOST).filter(|number| number.family() == family).collect()
    };
    Firewall {
        reach: world.reach,
        own: own.map(|m| m.owned.clone()).unwrap_or_default(),
        local: claim.prefixes.clone(),
        remote,
        own_tunnel: own.map(|m| m.tunnel.clone()).unwrap_or_default(),
        out_devices: devices(DeviceFamily::Out),
        in_devices: devices(DeviceFamily::In),
        exported: BTreeSet::new(),
        vips: Shelf::new(),
        clusterset: world.clusterset.map(|ranges| ranges.nets().collect()).unwrap_or_default(),
        resolvers: world.clusterset.map(|ranges| ranges.resolvers().collect()).unwrap_or_default(),
        narrow: BTreeSet::new(),
        lanes: Lanes::ONE,
        tunnel: claim.tunnel.clone(),
    }
}
