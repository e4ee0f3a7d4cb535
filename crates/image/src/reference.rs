//! Image references: `[host/]path[:tag][@digest]`, the grammar of docker's `reference` package.

use crate::digest::Digest;
use crate::error::{Error, Result};
use std::fmt;

/// Where images of one name are kept: a registry's host, or none for this store's own names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    /// `host[:port]`; `None`: pushed to the built-in registry or imported.
    pub host: Option<String>,
    pub path: String,
}

/// A tag or a digest within a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    Tag(String),
    Digest(Digest),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub repository: Repository,
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

pub(crate) const DOCKER_HUB: &str = "docker.io";

impl Repository {
    /// A repository of the built-in registry (distribution spec: `name`).
    pub fn local(path: &str) -> Result<Repository> {
        check_path(path, path)?;
        Ok(Repository { host: None, path: path.to_owned() })
    }
}

impl Reference {
    /// Parses. A host in `local_hosts` names this store itself.
    pub fn parse(text: &str, local_hosts: &[String]) -> Result<Reference> {
        let bad =
            |why: &str| Error::InvalidReference { reference: text.chars().take(300).collect(), why: why.to_owned() };
        if text.is_empty() || text.len() > 600 {
            return Err(bad("it must have 1 to 600 characters"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        let (name, tag) = match rest.rfind(':') {
            Some(colon) if !rest.get(colon..).unwrap_or_default().contains('/') => {
                (rest.get(..colon).unwrap_or_default(), rest.get(colon + 1..))
            }
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag).map_err(|why| bad(&why))?;
        }
        let (host, path) = match name.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), path),
            _ => (None, name),
        };
        check_path(path, text)?;
        let mut path = path.to_owned();
        let host = match host {
            Some(h) if h == "localhost" || local_hosts.iter().any(|l| l == h) => None,
            Some("index.docker.io" | "registry-1.docker.io" | DOCKER_HUB) => {
                if !path.contains('/') {
                    path.insert_str(0, "library/");
                }
                Some(DOCKER_HUB.to_owned())
            }
            Some(h) => {
                check_host(h).map_err(|why| bad(&why))?;
                Some(h.to_ascii_lowercase())
            }
            None => None,
        };
        Ok(Reference { repository: Repository { host, path }, tag: tag.map(str::to_owned), digest })
    }

    /// The same reference where names without a host mean Docker Hub.
    pub fn on_docker_hub(&self) -> Reference {
        let mut other = self.clone();
        if other.repository.host.is_none() {
            other.repository.host = Some(DOCKER_HUB.to_owned());
            if !other.repository.path.contains('/') {
                other.repository.path.insert_str(0, "library/");
            }
        }
        other
    }

    /// The digest if there is one, else the tag, else `latest`.
    pub fn selector(&self) -> Selector {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => Selector::Digest(*digest),
            (None, Some(tag)) => Selector::Tag(tag.clone()),
            (None, None) => Selector::Tag("latest".to_owned()),
        }
    }
}

impl Selector {
    /// As in a registry's URL: `sha256:...` or a tag.
    pub fn parse(text: &str) -> Result<Selector> {
        if text.contains(':') {
            return text.parse().map(Selector::Digest);
        }
        check_tag(text).map_err(|why| Error::InvalidReference { reference: text.chars().take(200).collect(), why })?;
        Ok(Selector::Tag(text.to_owned()))
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Some(host) => write!(f, "{host}/{}", self.path),
            None => f.write_str(&self.path),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository)?;
        match (&self.tag, &self.digest) {
            (Some(tag), _) => write!(f, ":{tag}")?,
            (None, None) => f.write_str(":latest")?,
            (None, Some(_)) => {}
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Distribution spec: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` between slashes.
fn check_path(path: &str, whole: &str) -> Result<()> {
    let bad = |why: String| Error::InvalidReference { reference: whole.chars().take(300).collect(), why };
    if path.is_empty() || path.len() > 255 {
        return Err(bad("its name must have 1 to 255 characters".into()));
    }
    for part in path.split('/') {
        let mut runs = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let separators_fine = runs.all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'));
        let ends_fine =
            part.bytes().next().is_some_and(is_alphanumeric) && part.bytes().last().is_some_and(is_alphanumeric);
        if !separators_fine || !ends_fine {
            return Err(bad(format!(
                "{part:?} in its name: only lower-case letters and digits, joined by single `.`, `_`, `__` or dashes"
            )));
        }
    }
    Ok(())
}

fn is_alphanumeric(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

fn check_tag(tag: &str) -> std::result::Result<(), String> {
    let first_fine = tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let rest_fine = tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if first_fine && rest_fine && tag.len() <= 128 {
        return Ok(());
    }
    Err(format!(
        "tag {:?}: 1 to 128 letters, digits, `_`, `.`, `-`, beginning with none of the last two",
        tag.chars().take(200).collect::<String>()
    ))
}

fn check_host(host: &str) -> std::result::Result<(), String> {
    let (name, port) = match host.rfind(':') {
        Some(colon) if !host.get(colon..).unwrap_or_default().contains(']') => {
            (host.get(..colon).unwrap_or_default(), host.get(colon + 1..))
        }
        _ => (host, None),
    };
    let inner = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
    let name_fine = match inner {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            name.len() <= 253
                && name.split('.').all(|label| {
                    !label.is_empty()
                        && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                        && !label.starts_with('-')
                        && !label.ends_with('-')
                })
        }
    };
    if name_fine && port.is_none_or(|p| p.parse::<u16>().is_ok_and(|p| p > 0)) {
        return Ok(());
    }
    Err(format!("{host:?} is not a registry's host[:port]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Reference> {
        Reference::parse(text, &["127.0.0.1:5000".to_owned()])
    }

    #[test]
    fn names() {
        let shown = |t: &str| parse(t).unwrap().to_string();
        assert_eq!(shown("nginx"), "nginx:latest");
        assert_eq!(shown("127.0.0.1:5000/shop/catalog:1.0"), "shop/catalog:1.0");
        assert_eq!(shown("localhost/foo"), "foo:latest");
        assert_eq!(shown("docker.io/nginx:1"), "docker.io/library/nginx:1");
        assert_eq!(shown("Registry.Example:443/a/b_c/d--e:V1"), "registry.example:443/a/b_c/d--e:V1");
        assert_eq!(shown("[::1]:5000/a"), "[::1]:5000/a:latest");
        let digest = Digest::of(b"");
        assert_eq!(shown(&format!("a@{digest}")), format!("a@{digest}"));
        assert_eq!(parse("nginx").unwrap().on_docker_hub().to_string(), "docker.io/library/nginx:latest");
    }

    #[test]
    fn refused() {
        for bad in [
            "",
            "A",
            "a//b",
            "a/../b",
            "../a",
            "a:",
            "a:-x",
            "a@sha256:00",
            "a b",
            "a__-b",
            "-a",
            "a.",
            "h.x:0/a",
            "h..x/a",
            "a/",
            "/a",
            "a:b:c",
        ] {
            assert!(parse(bad).is_err(), "{bad:?} was taken: {:?}", parse(bad));
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_is_a_safe_path_and_round_trips(text in "[a-zA-Z0-9./:@_-]{0,40}") {
            if let Ok(reference) = parse(&text) {
                prop_assert!(reference.repository.path.split('/').all(|p| !p.is_empty() && p != "." && p != ".." && !p.starts_with('_')));
                prop_assert_eq!(parse(&reference.to_string()).unwrap().selector(), reference.selector());
            }
        }
    }
}
