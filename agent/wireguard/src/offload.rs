//! What of the kernel's help with many packets at once is used.

/// The variable that names what is *not* to be used, by commas: to find faults, and to test what is done without.
pub const VARIABLE: &str = "TOMBOLO_WIREGUARD_WITHOUT";

/// Each is used if the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// A header before each packet of the TUN (`vnet`): without it the TUN has none of the next three.
    pub vnet: bool,
    /// Packets of up to 64 KiB from the TUN, TCP (`tso`) and UDP (`uso`).
    pub tso: bool,
    /// See [`Self::tso`].
    pub uso: bool,
    /// Packets of up to 64 KiB to the TUN (`join`).
    pub join: bool,
    /// Many datagrams to one peer by one call (`segment`).
    pub segment: bool,
    /// Many datagrams of one peer by one call (`gro`).
    pub gro: bool,
}

impl Offloads {
    /// All.
    pub const ALL: Self = Self { vnet: true, tso: true, uso: true, join: true, segment: true, gro: true };

    /// All but those that [`VARIABLE`] names.
    pub fn from_env() -> Self {
        Self::without(&std::env::var(VARIABLE).unwrap_or_default())
    }

    fn without(names: &str) -> Self {
        let mut offloads = Self::ALL;
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match name {
                "vnet" => offloads.vnet = false,
                "tso" => offloads.tso = false,
                "uso" => offloads.uso = false,
                "join" => offloads.join = false,
                "segment" => offloads.segment = false,
                "gro" => offloads.gro = false,
                _ => tracing::warn!(name, "{VARIABLE} names no offload"),
            }
        }
        offloads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_left_out() {
        assert_eq!(Offloads::without(""), Offloads::ALL);
        let without = Offloads::without("gro, segment,nonsense");
        assert_eq!(without, Offloads { gro: false, segment: false, ..Offloads::ALL });
    }
}
