//! The cryptokey routing table: which peer may own which addresses.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Prefixes to owners, longest match first. A prefix has one owner: to give it to another takes it from the first,
/// in one step, as in WireGuard.
#[derive(Clone)]
pub struct AllowedIps<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T: Copy + Eq> AllowedIps<T> {
    /// An empty table.
    pub fn new() -> Self {
        Self { v4: PrefixMap::new(), v6: PrefixMap::new() }
    }

    /// Gives `prefix` (host bits are ignored) to `owner`, from whoever has it.
    pub fn insert(&mut self, prefix: IpNet, owner: T) {
        match prefix.trunc() {
            IpNet::V4(net) => self.v4.insert(net, owner).map_or((), drop),
            IpNet::V6(net) => self.v6.insert(net, owner).map_or((), drop),
        }
    }

    /// Takes `prefix` from `owner`; nothing happens if it is not this owner's.
    pub fn remove(&mut self, prefix: IpNet, owner: T) {
        match prefix.trunc() {
            IpNet::V4(net) if self.v4.get(&net) == Some(&owner) => self.v4.remove(&net).map_or((), drop),
            IpNet::V6(net) if self.v6.get(&net) == Some(&owner) => self.v6.remove(&net).map_or((), drop),
            _ => {}
        }
    }

    /// Takes everything from `owner`.
    pub fn remove_owner(&mut self, owner: T) {
        self.v4.retain(|_, o| *o != owner);
        self.v6.retain(|_, o| *o != owner);
    }

    /// The owner of the longest prefix that holds `address`.
    pub fn owner(&self, address: IpAddr) -> Option<T> {
        match address {
            IpAddr::V4(a) => self.v4.get_lpm(&Ipv4Net::from(a)).map(|(_, owner)| *owner),
            IpAddr::V6(a) => self.v6.get_lpm(&Ipv6Net::from(a)).map(|(_, owner)| *owner),
        }
    }

    /// All prefixes with their owners, v4 first, in order.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, T)> + '_ {
        let v4 = self.v4.iter().map(|(net, owner)| (IpNet::V4(*net), *owner));
        v4.chain(self.v6.iter().map(|(net, owner)| (IpNet::V6(*net), *owner)))
    }
}

impl<T: Copy + Eq> Default for AllowedIps<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(IpNet, u8),
        Remove(IpNet, u8),
        RemoveOwner(u8),
    }

    /// Few addresses and owners, so that they meet.
    fn prefix() -> impl Strategy<Value = IpNet> {
        let v4 = (0u8..4, 0u8..4, 0u8..=32)
            .prop_map(|(a, b, len)| Ipv4Net::new([a << 6, 0, 0, b].into(), len).unwrap().into());
        let v6 = (0u16..4, 0u16..4, 0u8..=128)
            .prop_map(|(a, b, len)| Ipv6Net::new([a << 14, 0, 0, 0, 0, 0, 0, b].into(), len).unwrap().into());
        prop_oneof![v4, v6]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (prefix(), 0u8..4).prop_map(|(p, o)| Step::Insert(p, o)),
            3 => (prefix(), 0u8..4).prop_map(|(p, o)| Step::Remove(p, o)),
            1 => (0u8..4).prop_map(Step::RemoveOwner),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_plain_list_searched_whole(steps in prop::collection::vec(step(), 0..60), asked in prop::collection::vec(prefix(), 0..20)) {
            let mut table = AllowedIps::new();
            let mut model: BTreeMap<IpNet, u8> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(p, o) => {
                        table.insert(p, o);
                        model.insert(p.trunc(), o);
                    }
                    Step::Remove(p, o) => {
                        table.remove(p, o);
                        if model.get(&p.trunc()) == Some(&o) {
                            model.remove(&p.trunc());
                        }
                    }
                    Step::RemoveOwner(o) => {
                        table.remove_owner(o);
                        model.retain(|_, owner| *owner != o);
                    }
                }
            }
            prop_assert_eq!(table.iter().collect::<BTreeMap<_, _>>(), model.clone());
            for address in asked.iter().map(IpNet::addr) {
                let expected = model.iter().filter(|(p, _)| p.contains(&address)).max_by_key(|(p, _)| p.prefix_len());
                prop_assert_eq!(table.owner(address), expected.map(|(_, o)| *o));
            }
        }
    }
}
