//! Conditions of a rule on a request, and which of two goes first.

use http::{HeaderMap, HeaderName, Method};
use regex::Regex;
use std::cmp::{Ordering, Reverse};

/// What of a request decides its route.
pub struct Seen<'a> {
    pub method: &'a Method,
    /// Normalised, with a leading slash, without the query.
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub headers: &'a HeaderMap,
}

#[derive(Clone, Debug)]
pub enum PathMatch {
    Exact(String),
    /// Matches the whole pattern.
    Regex(Regex),
    /// By elements, without a slash at the end: `/a` is a prefix of `/a/b`, not of `/ab`. Empty is everything.
    Prefix(String),
}

#[derive(Clone, Debug)]
pub enum TextMatch {
    Exact(String),
    Regex(Regex),
}

/// All conditions have to hold.
#[derive(Clone, Debug)]
pub struct Match {
    pub path: PathMatch,
    pub method: Option<Method>,
    pub headers: Vec<(HeaderName, TextMatch)>,
    pub query: Vec<(String, TextMatch)>,
}

impl PathMatch {
    pub fn prefix(value: &str) -> PathMatch {
        PathMatch::Prefix(value.trim_end_matches('/').to_owned())
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(value) => value == path,
            PathMatch::Regex(regex) => regex.is_match(path),
            PathMatch::Prefix(prefix) => {
                path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }

    /// The first segment of all paths that match, if they have the same.
    pub fn first_segment(&self) -> Option<&str> {
        match self {
            PathMatch::Exact(path) | PathMatch::Prefix(path) => first_segment(path),
            PathMatch::Regex(_) => None,
        }
    }

    /// Exact first, then regular expressions (the specification leaves their place open), then prefixes; the longer first.
    fn rank(&self) -> (u8, usize) {
        match self {
            PathMatch::Exact(_) => (2, 0),
            PathMatch::Regex(regex) => (1, regex.as_str().len()),
            PathMatch::Prefix(prefix) => (0, prefix.len()),
        }
    }
}

/// What is between the first slash and the second.
pub fn first_segment(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.split('/').next()
}

impl TextMatch {
    fn matches(&self, text: &str) -> bool {
        match self {
            TextMatch::Exact(value) => value == text,
            TextMatch::Regex(regex) => regex.is_match(text),
        }
    }
}

impl Match {
    /// A path and no further conditions.
    pub fn path(path: PathMatch) -> Match {
        Match { path, method: None, headers: Vec::new(), query: Vec::new() }
    }

    pub fn matches(&self, seen: &Seen<'_>) -> bool {
        self.path.matches(seen.path)
            && self.method.as_ref().is_none_or(|method| method == seen.method)
            && self.headers.iter().all(|(name, value)| header_matches(seen.headers, name, value))
            && self.query.iter().all(|(name, value)| query_matches(seen.query, name, value))
    }

    /// The specification's order of matches across all routes, most important first: kind and length of the path, a
    /// method, number of headers, number of query parameters. `Less` goes first.
    pub fn precedence(&self, other: &Match) -> Ordering {
        let key = |m: &Match| Reverse((m.path.rank(), m.method.is_some(), m.headers.len(), m.query.len()));
        key(self).cmp(&key(other))
    }
}

/// Several lines of a header count as one value with commas, as RFC 9110 has it.
fn header_matches(headers: &HeaderMap, name: &HeaderName, wanted: &TextMatch) -> bool {
    let mut lines = headers.get_all(name).iter();
    let Some(Ok(first)) = lines.next().map(|value| value.to_str()) else { return false };
    if headers.get_all(name).iter().nth(1).is_none() {
        return wanted.matches(first);
    }
    let mut joined = first.to_owned();
    for line in lines {
        let Ok(line) = line.to_str() else { return false };
        joined.push(',');
        joined.push_str(line);
    }
    wanted.matches(&joined)
}

/// The first parameter of that name counts.
fn query_matches(query: Option<&str>, name: &str, wanted: &TextMatch) -> bool {
    query
        .unwrap_or_default()
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| decode(key) == name)
        .is_some_and(|(_, value)| wanted.matches(&decode(value)))
}

/// `%41` and `+` of a query; what is not valid stays as it is.
fn decode(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return text.into();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        match (first, after) {
            (b'+', _) => bytes.push(b' '),
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                bytes.push(hex(*high) << 4 | hex(*low));
                rest = after;
            }
            (byte, _) => bytes.push(*byte),
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()).into()
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit.to_ascii_lowercase() - b'a') + 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen<'a>(method: &'a Method, path: &'a str, query: Option<&'a str>, headers: &'a HeaderMap) -> Seen<'a> {
        Seen { method, path, query, headers }
    }

    #[test]
    fn prefixes_match_whole_elements() {
        let none = HeaderMap::new();
        for (prefix, path, wanted) in [
            ("/", "/", true),
            ("/", "/a/b", true),
            ("/a", "/a", true),
            ("/a", "/a/", true),
            ("/a", "/a/b", true),
            ("/a", "/ab", false),
            ("/a/", "/a", true),
            ("/a/", "/ab", false),
            ("/a/b", "/a", false),
        ] {
            let m = Match::path(PathMatch::prefix(prefix));
            assert_eq!(m.matches(&seen(&Method::GET, path, None, &none)), wanted, "{prefix} {path}");
        }
    }

    #[test]
    fn headers_and_queries() {
        let mut headers = HeaderMap::new();
        headers.append("x", "1".parse().unwrap());
        let m = Match {
            headers: vec![("x".parse().unwrap(), TextMatch::Exact("1".into()))],
            query: vec![("a b".into(), TextMatch::Regex(Regex::new("^(?:\\d+)$").unwrap()))],
            ..Match::path(PathMatch::prefix("/"))
        };
        assert!(m.matches(&seen(&Method::GET, "/", Some("z&a+b=42&a+b=x"), &headers)));
        assert!(m.matches(&seen(&Method::GET, "/", Some("%61%20b=4%32"), &headers)));
        assert!(!m.matches(&seen(&Method::GET, "/", Some("a+b=x"), &headers)));
        assert!(!m.matches(&seen(&Method::GET, "/", None, &headers)));
        headers.append("x", "2".parse().unwrap());
        assert!(!m.matches(&seen(&Method::GET, "/", Some("a+b=42"), &headers)));
    }

    fn any_match() -> impl Strategy<Value = Match> {
        let path = prop_oneof![
            "(/[ab]){0,3}/?".prop_map(|p| PathMatch::Exact(if p.is_empty() { "/".into() } else { p })),
            "(/[ab]){0,3}/?".prop_map(|p| PathMatch::prefix(&p)),
        ];
        let method = prop_oneof![Just(None), Just(Some(Method::GET)), Just(Some(Method::PUT))];
        (path, method, 0usize..3, 0usize..3).prop_map(|(path, method, headers, query)| {
            let text = || TextMatch::Exact("1".into());
            let name = |n: usize| HeaderName::from_bytes(format!("h{n}").as_bytes()).unwrap();
            Match {
                path,
                method,
                headers: (0..headers).map(|n| (name(n), text())).collect(),
                query: (0..query).map(|n| (format!("q{n}"), text())).collect(),
            }
        })
    }

    /// The specification's words, one criterion after another.
    fn goes_first(a: &Match, b: &Match) -> bool {
        let exact = |m: &Match| matches!(m.path, PathMatch::Exact(_));
        if exact(a) != exact(b) {
            return exact(a);
        }
        if let (PathMatch::Prefix(x), PathMatch::Prefix(y)) = (&a.path, &b.path)
            && x.len() != y.len()
        {
            return x.len() > y.len();
        }
        if a.method.is_some() != b.method.is_some() {
            return a.method.is_some();
        }
        if a.headers.len() != b.headers.len() {
            return a.headers.len() > b.headers.len();
        }
        a.query.len() > b.query.len()
    }

    proptest! {
        #[test]
        fn precedence_is_the_specifications(a in any_match(), b in any_match()) {
            prop_assert_eq!(a.precedence(&b) == Ordering::Less, goes_first(&a, &b));
            prop_assert_eq!(a.precedence(&b), b.precedence(&a).reverse());
        }
        #[test]
        fn decoding_never_panics(text in ".{0,40}") {
            let _ = decode(&text);
        }
    }
}
