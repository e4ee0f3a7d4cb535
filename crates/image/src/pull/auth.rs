//! Credentials and the challenges that ask for them (RFC 7235; distribution's token scheme).

use crate::error::{Error, Result, io};
use crate::reference::DOCKER_HUB;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

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

    /// From `config.json` as docker and podman write it, or a Secret's `.dockerconfigjson`. Credential helpers it names are
    /// not asked: a stranger may have written it.
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

/// What the user's own configuration has for a registry: by its helper for that host, by its store, or in the file.
pub(super) fn configured(file: Option<&Path>, host: &str) -> Result<Option<Credentials>> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Helpers {
        cred_helpers: HashMap<String, String>,
        creds_store: Option<String>,
    }
    let (path, required) = match (file, std::env::var_os("HOME")) {
        (Some(path), _) => (path.to_path_buf(), true),
        (None, Some(home)) => (PathBuf::from(home).join(".docker/config.json"), false),
        (None, None) => return Ok(None),
    };
    let json = match std::fs::read(&path) {
        Ok(json) => json,
        Err(_) if !required => return Ok(None),
        Err(e) => return Err(io("read", &path)(e)),
    };
    let helpers: Helpers = serde_json::from_slice(&json).map_err(|e| Error::invalid(path.display().to_string(), e))?;
    // Docker's name for its hub in every configuration.
    let server = if host == DOCKER_HUB { "https://index.docker.io/v1/" } else { host };
    let own = helpers.cred_helpers.iter().find(|(name, _)| *name == host || *name == server).map(|(_, helper)| helper);
    if let Some(helper) = own.or(helpers.creds_store.as_ref()) {
        if helper.is_empty() || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
            let what = format!("{}: credential helper {helper:?}", path.display());
            return Err(Error::invalid(what, "letters, digits, `.`, `_`, `-` only"));
        }
        let program = PathBuf::from(format!("docker-credential-{helper}"));
        if let Some(found) = from_helper(&program, server, HELPER_LIMIT)? {
            return Ok(Some(found));
        }
    }
    Ok(Credentials::from_docker_config(&json, host))
}

/// A helper that asks a person on a screen nobody sees must not stop a pull for ever.
const HELPER_LIMIT: Duration = Duration::from_secs(60);

/// `docker-credential-NAME get`: the server's name in, JSON out.
fn from_helper(program: &Path, server: &str, limit: Duration) -> Result<Option<Credentials>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let told = |why: String| Error::invalid(format!("credential helper {}", program.display()), why);
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| told(e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that has its answer without reading may be gone.
        let _ = stdin.write_all(server.as_bytes());
    }
    let stdout = child.stdout.take();
    let (tell, answer) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = stdout.map(|s| s.take(64 << 10).read_to_end(&mut text));
        let _ = tell.send(read.unwrap_or(Ok(0)).map(|_| text));
    });
    let text = match answer.recv_timeout(limit) {
        Ok(text) => text.map_err(|e| told(e.to_string()))?,
        Err(_) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(told(format!("no answer for {} s", limit.as_secs())));
        }
    };
    if !child.wait().map_err(|e| told(e.to_string()))?.success() {
        let said: String = String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).take(200).collect();
        // The protocol's words for "there are none".
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(told(format!("failed: {said}")));
    }
    let answer: Answer =
        serde_json::from_slice(&text).map_err(|_| told("its answer is not what a helper says".into()))?;
    if answer.username == "<token>" {
        return Err(told(
            "it keeps an identity token, not a password; log in with a password or an access token".into(),
        ));
    }
    Ok(Some(Credentials { username: answer.username, password: answer.secret }))
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

    #[test]
    fn helpers_are_asked_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let helper = |name: &str, script: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            path
        };
        let limit = Duration::from_secs(30);
        let good =
            helper("good", r#"read host; echo "{\"ServerURL\":\"$host\",\"Username\":\"$1-$host\",\"Secret\":\"s\"}""#);
        let found = from_helper(&good, "r.example", limit).unwrap().unwrap();
        assert_eq!((found.username.as_str(), found.password.as_str()), ("get-r.example", "s"));
        let none = helper("none", "echo 'credentials not found in native keychain'; exit 1");
        assert_eq!(from_helper(&none, "h", limit).unwrap(), None);
        let broken = helper("broken", "echo no keychain; exit 1");
        assert!(from_helper(&broken, "h", limit).unwrap_err().to_string().contains("no keychain"));
        let hangs = helper("hangs", "exec sleep 1000000");
        assert!(from_helper(&hangs, "h", Duration::ZERO).unwrap_err().to_string().contains("no answer"));
        let strange = helper("strange", "echo {}");
        assert!(from_helper(&strange, "h", limit).is_err());
        let config = dir.path().join("config.json");
        std::fs::write(&config, r#"{"credHelpers":{"h.example":"../evil"}}"#).unwrap();
        assert!(configured(Some(&config), "h.example").unwrap_err().to_string().contains("../evil"));
        assert!(configured(Some(&config), "other.example").unwrap().is_none());
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,60}") {
            let _ = Challenge::parse(&text);
            let _ = Challenge::parse(&format!("Bearer {text}"));
        }
    }
}
