//! Names of devices.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A name that Linux takes for an interface and `wg-quick` for a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceName(String);

/// The text is no interface name.
#[derive(Debug, Error)]
#[error("`{0}` is no interface name: use 1 to 15 of a-z, A-Z, 0-9 and _ = + . -, not starting with a dash")]
pub struct InvalidName(String);

impl DeviceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let fits = (1..=15).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_=+.-".contains(&b))
            && !text.starts_with('-')
            && !matches!(text, "." | ".." | "all" | "default");
        if fits { Ok(Self(text.to_owned())) } else { Err(InvalidName(text.chars().take(64).collect())) }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_interface_names_only() {
        for good in ["tombolo0", "tombolo123", "wg0", "a", "a.b-c_d=e+f", "exactly15chars_"] {
            assert!(good.parse::<DeviceName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-x", "a b", "16-characters-xx", "tömbolo", "a\n", "all"] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad}");
        }
    }
}
