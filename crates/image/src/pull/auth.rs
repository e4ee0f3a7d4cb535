//! Credentials and the challenges that ask for them (RFC 7235; distribution's token scheme).

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;

/// User name and password (or a token in its place) for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials {{ username: {:?}, .. }}", self.username)
    }
}

impl Credentials {
    pub(super) fn basic(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:{}", self.username, self.password)))
    }

    /// From `config.json` as docker and podman write it, or a Secret's `.dockerconfigjson`. Credential helpers are not
    /// asked: they are other people's programs.
    pub fn from_docker_config(json: &[u8], host: &str) -> Option<Credentials> {
        #[derive(Deserialize)]
        struct Config {
            #[serde(default)]
            auths: HashMap<String, Auth>,
        }
        #[derive(Deserialize)]
        struct Auth {
            auth: Option<String>,
            username: Option<String>,
            password: Option<String>,
        }
        let config: Config = serde_json::from_slice(json).ok()?;
        let key = |k: &str| {
            let bare = k.trim_start_matches("https://").trim_start_matches("http://");
            let found = bare.split('/').next().unwrap_or(bare);
            let hub = ["docker.io", "index.docker.io", "registry-1.docker.io"];
            found == host || (hub.contains(&found) && hub.contains(&host))
        };
        let auth = config.auths.iter().find(|(k, _)| key(k))?.1;
        if let (Some(username), Some(password)) = (&auth.username, &auth.password) {
            return Some(Credentials { username: username.clone(), password: password.clone() });
        }
        let text = auth.auth.as_ref()?.trim();
        let decoded = STANDARD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text)).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (username, password) = decoded.split_once(':')?;
        Some(Credentials { username: username.to_owned(), password: password.to_owned() })
    }
}

/// A `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    pub fn parse(header: &str) -> Option<Challenge> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") || header.len() > 8192 {
            return None;
        }
        let mut parameters = HashMap::new();
        let mut rest = rest;
        while let Some((name, after)) = rest.split_once('=') {
            let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
            let (value, left) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            parameters.insert(name, value.to_owned());
            rest = left;
        }
        Some(Challenge::Bearer {
            realm: parameters.remove("realm")?,
            service: parameters.remove("service"),
            scope: parameters.remove("scope"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges() {
        assert_eq!(Challenge::parse("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(
            Challenge::parse(r#"Bearer realm="https://auth.x/token",service="reg, istry",scope="repository:a/b:pull""#),
            Some(Challenge::Bearer {
                realm: "https://auth.x/token".into(),
                service: Some("reg, istry".into()),
                scope: Some("repository:a/b:pull".into())
            })
        );
        assert_eq!(Challenge::parse("Negotiate"), None);
    }

    #[test]
    fn docker_config() {
        let json = br#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="},"r.example:5000":{"username":"a","password":"b"}}}"#;
        let of = |host| Credentials::from_docker_config(json, host).map(|c| (c.username, c.password));
        assert_eq!(of("docker.io"), Some(("u".into(), "p:q".into())));
        assert_eq!(of("r.example:5000"), Some(("a".into(), "b".into())));
        assert_eq!(of("r.example"), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,60}") {
            let _ = Challenge::parse(&text);
            let _ = Challenge::parse(&format!("Bearer {text}"));
        }
    }
}
