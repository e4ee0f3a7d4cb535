//! Egress by name: the addresses that this router's resolver answered for names which policies let workloads reach, held
//! in nftables sets whose elements expire.
//!
//! [`Pattern`] says which names, `pins` is what is remembered (pure), [`Names`] keeps the kernel's sets like it.
//!
//! ```text
//! answer for a name that a pattern of the asker's namespace matches
//!   -> pinned until max(TTL, FLOOR) from now, at most MOST        the kernel has it before the asker has the answer
//!   -> time is up: some connection of the namespace's workloads to it lives ? FLOOR more : forgotten
//! ```
//!
//! *Invariant:* an address is pinned only as an answer to a question of the same namespace, and only if it is outside:
//! never one of a workload, a Service, a node, this machine, a link or a group. The rule that looks a set up matches only
//! what leaves by the uplink, so that no answer opens another workload either.
//!
//! Sets carry their namespace and elements their name as comments, so that the next process finds what was pinned.

mod kernel;
mod pins;

pub use kernel::Names;
pub(crate) use kernel::PREFIX;
pub(crate) use kernel::Pinned;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A name, or all names below one, however many labels deeper. In lower case, without a dot at the end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pattern {
    Exact(Box<str>),
    Below(Box<str>),
}

impl Pattern {
    /// `name` is in lower case, without a dot at the end.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Pattern::Exact(own) => **own == *name,
            Pattern::Below(own) => {
                name.strip_suffix(&**own).and_then(|rest| rest.strip_suffix('.')).is_some_and(|rest| !rest.is_empty())
            }
        }
    }
}

impl FromStr for Pattern {
    type Err = ();
    fn from_str(text: &str) -> Result<Pattern, ()> {
        let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let below = text.strip_prefix("*.");
        let name = below.unwrap_or(&text);
        let fine = |label: &str| {
            let plain = label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
            (1..=63).contains(&label.len()) && plain
        };
        if name.len() > 253 || !name.split('.').all(fine) {
            return Err(());
        }
        Ok(if below.is_some() { Pattern::Below(name.into()) } else { Pattern::Exact(name.into()) })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Exact(name) => f.write_str(name),
            Pattern::Below(name) => write!(f, "*.{name}"),
        }
    }
}

/// Names of one namespace that share a set in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameSet {
    pub namespace: Arc<str>,
    pub patterns: Vec<Pattern>,
}

impl NameSet {
    pub fn matches(&self, name: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(name)
    }

    #[test]
    fn names_match_whole_labels() {
        assert!(matches("api.example.org", "api.example.org") && matches("API.Example.ORG.", "api.example.org"));
        assert!(!matches("example.org", "api.example.org") && !matches("api.example.org", "xapi.example.org"));
        assert!(matches("*.example.org", "api.example.org") && matches("*.example.org", "a.b.example.org"));
        for other in ["example.org", ".example.org", "badexample.org", "example.org.evil.net", ""] {
            assert!(!matches("*.example.org", other), "{other}");
        }
        for bad in ["", "*", "*.", "a..b", "*.*.org", "a.*.org", "a b.org", &"a.".repeat(200)] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(text in "(\\*\\.)?[a-z0-9]{1,5}(\\.[a-z0-9-]{1,5}){0,4}") {
            let pattern: Pattern = text.parse().unwrap();
            prop_assert_eq!(pattern.to_string(), text);
        }
        #[test]
        fn a_wildcard_matches_what_is_below_and_nothing_else(below in "[a-z]{0,3}(\\.[a-z]{1,3}){0,2}", name in "[a-z]{1,3}\\.[a-z]{2}") {
            let pattern = Pattern::Below(name.as_str().into());
            prop_assert_eq!(pattern.matches(&format!("{below}.{name}")), !below.is_empty());
            let (glued, own) = (format!("{below}{name}"), format!(".{name}"));
            prop_assert_eq!(pattern.matches(&glued), glued.ends_with(&own) && glued.len() > own.len());
        }
    }
}
