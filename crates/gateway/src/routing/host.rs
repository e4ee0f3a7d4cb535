//! Hostnames of listeners and routes: exact, `*.suffix`, or any.

use std::fmt;

/// Lower case, without a dot at the end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    Any,
    /// What comes after `*.`; matches one or more labels before it.
    Wildcard(Box<str>),
    Exact(Box<str>),
}

impl HostPattern {
    /// Reads a hostname as the Gateway API writes it; empty is any.
    pub fn parse(text: &str) -> HostPattern {
        let text = text.trim_end_matches('.').to_ascii_lowercase();
        match text.strip_prefix("*.") {
            _ if text.is_empty() || text == "*" => HostPattern::Any,
            Some(suffix) => HostPattern::Wildcard(suffix.into()),
            None => HostPattern::Exact(text.into()),
        }
    }

    /// `host` is lower case and has no port.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            HostPattern::Any => true,
            HostPattern::Exact(name) => **name == *host,
            HostPattern::Wildcard(suffix) => {
                host.strip_suffix(&**suffix).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
        }
    }

    /// Greater is more specific: exact before wildcard before any, then the longer.
    pub fn specificity(&self) -> (u8, usize) {
        match self {
            HostPattern::Any => (0, 0),
            HostPattern::Wildcard(suffix) => (1, suffix.len()),
            HostPattern::Exact(name) => (2, name.len()),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPattern::Any => f.write_str("*"),
            HostPattern::Wildcard(suffix) => write!(f, "*.{suffix}"),
            HostPattern::Exact(name) => f.write_str(name),
        }
    }
}

/// The hosts that both patterns match, which is always one of the two or none.
pub fn intersect(a: &HostPattern, b: &HostPattern) -> Option<HostPattern> {
    let (general, special) = if a.specificity() <= b.specificity() { (a, b) } else { (b, a) };
    let covered = match (general, special) {
        (HostPattern::Any, _) => true,
        (HostPattern::Wildcard(_), HostPattern::Exact(name)) => general.matches(name),
        (HostPattern::Wildcard(outer), HostPattern::Wildcard(inner)) => outer == inner || general.matches(inner),
        (HostPattern::Exact(one), HostPattern::Exact(other)) => one == other,
        (HostPattern::Wildcard(_) | HostPattern::Exact(_), HostPattern::Any)
        | (HostPattern::Exact(_), HostPattern::Wildcard(_)) => false,
    };
    covered.then(|| special.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_as_the_specification_says() {
        for (pattern, host, wanted) in [
            ("", "anything", true),
            ("*.example.com", "test.example.com", true),
            ("*.example.com", "foo.test.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "testexample.com", false),
            ("Example.COM.", "example.com", true),
            ("example.com", "www.example.com", false),
        ] {
            assert_eq!(HostPattern::parse(pattern).matches(host), wanted, "{pattern} {host}");
        }
    }

    #[test]
    fn intersections() {
        for (a, b, wanted) in [
            ("", "", Some("*")),
            ("", "a.b", Some("a.b")),
            ("*.b", "a.b", Some("a.b")),
            ("*.b", "*.a.b", Some("*.a.b")),
            ("*.b", "b", None),
            ("a.b", "c.b", None),
            ("*.a", "*.b", None),
        ] {
            let (a, b) = (HostPattern::parse(a), HostPattern::parse(b));
            assert_eq!(intersect(&a, &b).map(|p| p.to_string()).as_deref(), wanted, "{a} {b}");
        }
    }

    fn pattern() -> impl Strategy<Value = HostPattern> {
        "(\\*\\.)?([ab]\\.){0,2}[ab]|".prop_map(|text| HostPattern::parse(&text))
    }

    proptest! {
        #[test]
        fn an_intersection_is_exactly_what_both_match(a in pattern(), b in pattern(), host in "([ab]\\.){0,4}[ab]") {
            let both = a.matches(&host) && b.matches(&host);
            prop_assert_eq!(intersect(&a, &b).is_some_and(|p| p.matches(&host)), both);
            prop_assert_eq!(intersect(&a, &b), intersect(&b, &a));
        }
    }
}
