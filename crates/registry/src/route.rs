//! Which endpoint a request means. Pure: text in, a typed endpoint out.

use crate::access::Verb;
use http::Method;
use image::{Digest, Error, Repository, Selector};
use std::cmp::Ordering;
use std::collections::HashMap;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Version,
    Catalog,
    Tags(Repository),
    Manifest(Repository, Selector),
    Blob(Repository, Digest),
    /// Begins an upload.
    Uploads(Repository),
    Upload(Repository, String),
    Referrers(Repository, Digest),
}

#[derive(Debug)]
pub(crate) enum Miss {
    /// No such path.
    Path,
    /// The path is one of ours; a part of it is not well-formed.
    Malformed(Error),
}

impl Endpoint {
    pub fn parse(path: &str) -> Result<Endpoint, Miss> {
        let path = percent_encoding::percent_decode_str(path).decode_utf8().map_err(|_| Miss::Path)?;
        let rest = match path.strip_prefix("/v2") {
            Some("" | "/") => return Ok(Endpoint::Version),
            Some(rest) => rest.strip_prefix('/').ok_or(Miss::Path)?,
            None => return Err(Miss::Path),
        };
        if rest == "_catalog" {
            return Ok(Endpoint::Catalog);
        }
        let repository = |name: &str| Repository::local(name).map_err(Miss::Malformed);
        if let Some(name) = rest.strip_suffix("/tags/list") {
            return repository(name).map(Endpoint::Tags);
        }
        if let Some(name) = rest.strip_suffix("/blobs/uploads").or_else(|| rest.strip_suffix("/blobs/uploads/")) {
            return repository(name).map(Endpoint::Uploads);
        }
        let (front, last) = rest.rsplit_once('/').ok_or(Miss::Path)?;
        if let Some(name) = front.strip_suffix("/blobs/uploads") {
            return Ok(Endpoint::Upload(repository(name)?, last.to_owned()));
        }
        let digest = |text: &str| text.parse::<Digest>().map_err(Miss::Malformed);
        if let Some(name) = front.strip_suffix("/blobs") {
            return Ok(Endpoint::Blob(repository(name)?, digest(last)?));
        }
        if let Some(name) = front.strip_suffix("/manifests") {
            return Ok(Endpoint::Manifest(repository(name)?, Selector::parse(last).map_err(Miss::Malformed)?));
        }
        if let Some(name) = front.strip_suffix("/referrers") {
            return Ok(Endpoint::Referrers(repository(name)?, digest(last)?));
        }
        Err(Miss::Path)
    }

    /// What a method on it means to the rule of access, and for which repository.
    pub fn wants(&self, method: &Method) -> (Verb, Option<&Repository>) {
        let (repository, read, write) = match self {
            Endpoint::Version => return (Verb::Enter, None),
            Endpoint::Catalog => return (Verb::List, None),
            Endpoint::Tags(r) | Endpoint::Referrers(r, _) => (r, Verb::Pull, Verb::Pull),
            Endpoint::Manifest(r, _) | Endpoint::Blob(r, _) => (r, Verb::Pull, Verb::Push),
            Endpoint::Uploads(r) | Endpoint::Upload(r, _) => (r, Verb::Push, Verb::Push),
        };
        let deletes = *method == Method::DELETE && !matches!(self, Endpoint::Upload(..));
        let reads = matches!(*method, Method::GET | Method::HEAD);
        let verb = if deletes {
            Verb::Delete
        } else if reads {
            read
        } else {
            write
        };
        (verb, Some(repository))
    }

    /// What may be done with it, for the `Allow` header.
    pub fn methods(&self) -> &'static [Method] {
        match self {
            Endpoint::Version | Endpoint::Catalog | Endpoint::Tags(_) | Endpoint::Referrers(..) => {
                &[Method::GET, Method::HEAD]
            }
            Endpoint::Manifest(..) => &[Method::GET, Method::HEAD, Method::PUT, Method::DELETE],
            Endpoint::Blob(..) => &[Method::GET, Method::HEAD, Method::DELETE],
            Endpoint::Uploads(_) => &[Method::POST],
            Endpoint::Upload(..) => &[Method::GET, Method::PATCH, Method::PUT, Method::DELETE],
        }
    }
}

/// The query's parameters, decoded; the first of equals counts.
pub(crate) fn query(text: Option<&str>) -> HashMap<String, String> {
    let mut all = HashMap::new();
    for pair in text.unwrap_or_default().split('&').take(32) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if let Ok(value) = percent_encoding::percent_decode_str(value).decode_utf8() {
            all.entry(name.to_owned()).or_insert_with(|| value.into_owned());
        }
    }
    all
}

/// The spec's order of tags: without regard to case; where that is equal, capitals first.
pub(crate) fn lexical(a: &str, b: &str) -> Ordering {
    let folded = |s: &str| s.to_ascii_lowercase();
    folded(a).cmp(&folded(b)).then_with(|| a.cmp(b))
}

/// One page of a sorted list (spec: `n` and `last`), and whether more follows.
pub(crate) fn page(all: Vec<String>, query: &HashMap<String, String>) -> Result<(Vec<String>, bool), String> {
    let limit = match query.get("n") {
        None => usize::MAX,
        Some(text) => text.parse::<usize>().map_err(|_| format!("n={text:?} is not a number"))?,
    };
    let mut rest: Vec<String> = match query.get("last") {
        Some(last) => all.into_iter().filter(|t| lexical(t, last).is_gt()).collect(),
        None => all,
    };
    let more = rest.len() > limit && limit > 0;
    rest.truncate(limit);
    Ok((rest, more))
}

/// A single range of a blob: first and last byte. `None`: the whole (no range, several, or another unit).
pub(crate) fn range(header: &str, size: u64) -> Option<Result<(u64, u64), ()>> {
    let (first, last) = header.strip_prefix("bytes=")?.split_once('-')?;
    if last.contains(',') {
        return None;
    }
    let parsed = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if last < first => return None,
        (Ok(first), Ok(last)) => (first, last.min(size.saturating_sub(1))),
        (Ok(first), Err(_)) if last.is_empty() => (first, size.saturating_sub(1)),
        // The last so many bytes.
        (Err(_), Ok(count)) if first.is_empty() && count > 0 => (size.saturating_sub(count), size.saturating_sub(1)),
        _ => return None,
    };
    Some(if parsed.0 < size { Ok(parsed) } else { Err(()) })
}

/// First byte and length of a chunk that is sent: `START-END`, both included.
pub(crate) fn content_range(text: &str) -> Option<(u64, u64)> {
    let number = |digits: &str| {
        let fine = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if fine { digits.parse::<u64>().ok() } else { None }
    };
    let bare = text.strip_prefix("bytes ").unwrap_or(text);
    let (start, end) = bare.split_once('-')?;
    let (start, end) = (number(start)?, number(end.split('/').next()?)?);
    Some((start, end.checked_sub(start)?.checked_add(1)?))
}

/// For `fuzz/`: everything here that reads what a client wrote.
pub fn fuzz(path: &str, header: &str, size: u64) {
    for text in [path, header] {
        if let Ok(endpoint) = Endpoint::parse(text) {
            for method in endpoint.methods() {
                let _ = endpoint.wants(method);
            }
        }
    }
    if let Some(Ok((first, last))) = range(header, size) {
        assert!(first <= last && last < size);
    }
    if let Some((start, length)) = content_range(header) {
        assert!(length > 0 && start.checked_add(length - 1).is_some());
    }
    let parameters = query(Some(header));
    let names: Vec<String> = path.split('/').map(str::to_owned).collect();
    if let Ok((shown, _)) = page(names.clone(), &parameters) {
        assert!(shown.len() <= names.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn endpoints() {
        let repository = Repository::local("a/b").unwrap();
        let digest = Digest::of(b"");
        for (path, expected) in [
            ("/v2".to_owned(), Endpoint::Version),
            ("/v2/".into(), Endpoint::Version),
            ("/v2/_catalog".into(), Endpoint::Catalog),
            ("/v2/a/b/tags/list".into(), Endpoint::Tags(repository.clone())),
            ("/v2/a/b/blobs/uploads/".into(), Endpoint::Uploads(repository.clone())),
            ("/v2/a/b/blobs/uploads/x1".into(), Endpoint::Upload(repository.clone(), "x1".into())),
            (format!("/v2/a/b/blobs/{digest}"), Endpoint::Blob(repository.clone(), digest)),
            (
                format!("/v2/a/b/manifests/sha256%3A{}", digest.hex()),
                Endpoint::Manifest(repository.clone(), Selector::Digest(digest)),
            ),
            ("/v2/a/b/manifests/v1".into(), Endpoint::Manifest(repository.clone(), Selector::Tag("v1".into()))),
            (format!("/v2/a/b/referrers/{digest}"), Endpoint::Referrers(repository.clone(), digest)),
        ] {
            assert_eq!(Endpoint::parse(&path).unwrap(), expected, "{path}");
        }
        assert!(matches!(Endpoint::parse("/v2/../../etc/manifests/x"), Err(Miss::Malformed(_))));
        assert!(matches!(Endpoint::parse("/v2/a/blobs/sha256:00"), Err(Miss::Malformed(_))));
        assert!(matches!(Endpoint::parse("/v1/"), Err(Miss::Path)));
    }

    #[test]
    fn ranges() {
        assert_eq!(range("bytes=0-3", 10), Some(Ok((0, 3))));
        assert_eq!(range("bytes=5-", 10), Some(Ok((5, 9))));
        assert_eq!(range("bytes=-4", 10), Some(Ok((6, 9))));
        assert_eq!(range("bytes=0-99", 10), Some(Ok((0, 9))));
        assert_eq!(range("bytes=10-", 10), Some(Err(())));
        assert_eq!(range("bytes=0-1,3-4", 10), None);
        assert_eq!(range("lines=1-2", 10), None);
    }

    #[test]
    fn pages() {
        let all: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let get = |q: &str| page(all.clone(), &query(Some(q))).unwrap();
        assert_eq!(get("n=2"), (vec!["a".into(), "b".into()], true));
        assert_eq!(get("n=2&last=b"), (vec!["c".into()], false));
        assert_eq!(get("n=0"), (vec![], false));
        assert!(page(all.clone(), &query(Some("n=x"))).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(path in "/v2/[a-z/%0-9.:_]{0,40}", header in "bytes=[0-9,-]{0,30}", size: u64) {
            let _ = Endpoint::parse(&path);
            if let Some(Ok((first, last))) = range(&header, size) {
                prop_assert!(first <= last && last < size);
            }
        }
    }
}
