//! Names. Each is checked once, where it enters.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing where a name must be.
    #[error("{kind} is empty")]
    Empty {
        /// What the name is for.
        kind: &'static str,
    },
    /// Longer than allowed.
    #[error("{kind} {text:?} is longer than {max} characters")]
    TooLong {
        /// What the name is for.
        kind: &'static str,
        /// The text, cut to a printable length.
        text: String,
        /// The limit, in characters.
        max: usize,
    },
    /// Not of the form.
    #[error("{kind} {text:?} is not {form}")]
    Form {
        /// What the name is for.
        kind: &'static str,
        /// The text.
        text: String,
        /// What it should have been.
        form: &'static str,
    },
}

fn label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(&first), Some(&last)) => {
            bytes.len() <= 63 && inner(first) && inner(last) && bytes.iter().all(|&b| inner(b) || b == b'-')
        }
        _ => false,
    }
}

fn subdomain(text: &str) -> bool {
    text.split('.').all(label)
}

/// One part of the name of a label or annotation, or a label's value that is not empty: up to 63 letters, digits, `-`,
/// `_` and `.`, a letter or digit at both ends.
fn part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

/// Whether Kubernetes takes it as the name of a label or annotation, such as `example.org/team`.
pub fn is_label_name(text: &str) -> bool {
    match text.split_once('/') {
        None => part(text),
        Some((prefix, name)) => prefix.len() <= 253 && subdomain(prefix) && part(name),
    }
}

/// Whether Kubernetes takes it as the value of a label.
pub fn is_label_value(text: &str) -> bool {
    text.is_empty() || part(text)
}

fn port_name(text: &str) -> bool {
    label(text)
}

fn pattern(text: &str) -> bool {
    text == "*" || label(text) || text.strip_suffix('*').is_some_and(|head| label(&format!("{head}a")))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $max:literal, $check:ident, $form:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and takes a name.
            pub fn new(text: &str) -> Result<Self, NameError> {
                if text.is_empty() {
                    return Err(NameError::Empty { kind: $kind });
                }
                if text.len() > $max {
                    let text = text.chars().take(40).collect();
                    return Err(NameError::TooLong { kind: $kind, text, max: $max });
                }
                if !$check(text) {
                    return Err(NameError::Form { kind: $kind, text: text.to_owned(), form: $form });
                }
                Ok(Self(Arc::from(text)))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(&text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

name! {
    /// A member's identity, as in ClusterProperty `cluster.clusterset.k8s.io` (KEP-2149). One DNS label,
    /// since it stands in DNS names and label values.
    ClusterId, "cluster id", 63, label, "a DNS label (lower-case letters, digits and '-', not at the ends)"
}
name! {
    /// What people call the set.
    SetName, "set name", 63, label, "a DNS label (lower-case letters, digits and '-', not at the ends)"
}
name! {
    /// A Kubernetes namespace.
    Namespace, "namespace", 63, label, "a DNS label (lower-case letters, digits and '-', not at the ends)"
}
name! {
    /// A Kubernetes Service's name.
    ServiceName, "service name", 63, label, "a DNS label (lower-case letters, digits and '-', not at the ends)"
}
name! {
    /// A pod's hostname, or the name made of its address.
    Hostname, "hostname", 63, label, "a DNS label (lower-case letters, digits and '-', not at the ends)"
}
name! {
    /// A Kubernetes Node's name.
    NodeName, "node name", 253, subdomain, "a DNS name (labels of lower-case letters, digits and '-', joined by '.')"
}
name! {
    /// A Service port's name.
    PortName, "port name", 63, port_name, "a DNS label (lower-case letters, digits and '-', not at the ends)"
}
name! {
    /// Which namespaces a grant lets a cluster export: a name, a head followed by `*`, or `*`.
    NamespacePattern, "namespace pattern", 64, pattern, "a namespace, or the beginning of one followed by '*', or '*'"
}

impl Namespace {
    /// Namespaces of the cluster itself, never taken from others: `kube-*` and our own.
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with("kube-") || &*self.0 == "tombolo-system"
    }
}

impl NamespacePattern {
    /// Whether `namespace` falls under this pattern.
    pub fn matches(&self, namespace: &Namespace) -> bool {
        match self.0.strip_suffix('*') {
            Some(head) => namespace.0.starts_with(head),
            None => *self.0 == *namespace.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_values_of_labels() {
        for good in ["team", "example.org/team", "a-b_c.D", "a.b-c.example/0"] {
            assert!(is_label_name(good), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "/", "a/", "/a", "a/b/c", "-a", "a-", "A.b/c", "a_b/c", "ä", "a b", "a/../b", &long]
        {
            assert!(!is_label_name(bad), "{bad}");
        }
        for good in ["", "a", "A.b_c-1", &long[1..]] {
            assert!(is_label_value(good), "{good}");
        }
        for bad in ["-a", "a.", "a/b", "a b", "a\n", &long] {
            assert!(!is_label_value(bad), "{bad:?}");
        }
    }

    #[test]
    fn labels() {
        for good in ["a", "eu-west", "0", "a--b", &"a".repeat(63)] {
            assert!(ClusterId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", "a\0", "../x", &"a".repeat(64)] {
            assert!(ClusterId::new(bad).is_err(), "{bad:?}");
        }
        assert!(NodeName::new("ip-10-0-0-1.eu.internal").is_ok());
        assert!(NodeName::new("a..b").is_err());
    }

    #[test]
    fn patterns() {
        let matches =
            |p: &str, n: &str| NamespacePattern::new(p).unwrap().matches(&Namespace::new(n).unwrap());
        assert!(matches("*", "x") && matches("team-*", "team-a") && matches("a", "a"));
        assert!(!matches("team-*", "tea") && !matches("a", "ab"));
        for bad in ["", "**", "a*b", "*a", "A*"] {
            assert!(NamespacePattern::new(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,300}") {
            let _ = (ClusterId::new(&text).is_ok(), NodeName::new(&text).is_ok(), NamespacePattern::new(&text).is_ok());
        }
    }
}
