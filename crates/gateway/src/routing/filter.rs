//! What a rule changes on the way: headers, host, path; or an answer of its own, the redirect.

use super::cors::Cors;
use super::table::Target;
use super::wire::{FilterSpec, HeaderSpec, PathChangeSpec, RedirectSpec, RewriteSpec};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// Filters of a rule or of one backend, in effect order.
#[derive(Debug, Default)]
pub struct Filters {
    pub request: HeaderChanges,
    pub response: HeaderChanges,
    pub redirect: Option<Redirect>,
    pub rewrite: Rewrite,
    pub mirrors: Vec<Mirror>,
    pub cors: Option<Cors>,
}

/// Copies `share.0` of every `share.1` requests to `target`.
#[derive(Debug)]
pub struct Mirror {
    pub target: Target,
    pub share: (u64, u64),
}

#[derive(Debug, Default)]
pub struct HeaderChanges {
    pub set: Vec<(HeaderName, HeaderValue)>,
    pub add: Vec<(HeaderName, HeaderValue)>,
    pub remove: Vec<HeaderName>,
}

#[derive(Debug, Default)]
pub struct Rewrite {
    pub host: Option<HeaderValue>,
    pub path: Option<PathChange>,
}

#[derive(Debug, Clone)]
pub enum PathChange {
    Full(String),
    /// Replaces what the rule's prefix matched.
    Prefix(String),
}

#[derive(Debug)]
pub struct Redirect {
    pub scheme: Option<String>,
    pub host: Option<String>,
    pub path: Option<PathChange>,
    pub port: Option<u16>,
    pub status: StatusCode,
}

/// What a request asked for.
pub struct Came<'a> {
    /// Over TLS.
    pub secure: bool,
    /// As the client wrote it, with its port.
    pub host: &'a str,
    pub path: &'a str,
    pub query: Option<&'a str>,
}

impl Filters {
    /// Reads the filters that need no other object. What is not known is an error: leaving a filter out silently would
    /// change what the route means.
    pub fn read(&mut self, spec: &FilterSpec) -> Result<(), String> {
        let missing = |field: &str| format!("filter {}: {field} is missing", spec.r#type);
        match spec.r#type.as_str() {
            "RequestHeaderModifier" => {
                let changes = spec.request_header_modifier.as_ref().ok_or_else(|| missing("requestHeaderModifier"))?;
                self.request.read(changes)
            }
            "ResponseHeaderModifier" => {
                let changes =
                    spec.response_header_modifier.as_ref().ok_or_else(|| missing("responseHeaderModifier"))?;
                self.response.read(changes)
            }
            "RequestRedirect" => {
                let spec = spec.request_redirect.as_ref().ok_or_else(|| missing("requestRedirect"))?;
                self.redirect = Some(Redirect::read(spec)?);
                Ok(())
            }
            "URLRewrite" => {
                let spec = spec.url_rewrite.as_ref().ok_or_else(|| missing("urlRewrite"))?;
                self.rewrite = Rewrite::read(spec)?;
                Ok(())
            }
            "CORS" => {
                let spec = spec.cors.as_ref().ok_or_else(|| missing("cors"))?;
                self.cors = Some(Cors::read(spec)?);
                Ok(())
            }
            other => Err(format!("filter {other} is not supported")),
        }
    }
}

impl HeaderChanges {
    fn read(&mut self, spec: &HeaderSpec) -> Result<(), String> {
        let name = |text: &str| text.parse::<HeaderName>().map_err(|_| format!("header name {text:?} is not valid"));
        let pair = |pair: &super::wire::HeaderPair| {
            let value = HeaderValue::from_str(&pair.value);
            let value = value.map_err(|_| format!("value {:?} of header {} is not valid", pair.value, pair.name))?;
            Ok::<_, String>((name(&pair.name)?, value))
        };
        for entry in &spec.set {
            self.set.push(pair(entry)?);
        }
        for entry in &spec.add {
            self.add.push(pair(entry)?);
        }
        for entry in &spec.remove {
            self.remove.push(name(entry)?);
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
    }
}

impl Rewrite {
    fn read(spec: &RewriteSpec) -> Result<Rewrite, String> {
        let host = match &spec.hostname {
            Some(host) => Some(HeaderValue::from_str(host).map_err(|_| format!("hostname {host:?} is not valid"))?),
            None => None,
        };
        Ok(Rewrite { host, path: spec.path.as_ref().map(PathChange::read).transpose()? })
    }
}

impl Redirect {
    fn read(spec: &RedirectSpec) -> Result<Redirect, String> {
        let code = spec.status_code.unwrap_or(302);
        let status = StatusCode::from_u16(code).ok().filter(|_| matches!(code, 301 | 302 | 303 | 307 | 308));
        Ok(Redirect {
            scheme: spec.scheme.clone(),
            host: spec.hostname.clone(),
            path: spec.path.as_ref().map(PathChange::read).transpose()?,
            port: spec.port,
            status: status.ok_or_else(|| format!("statusCode {code} is not one of a redirect"))?,
        })
    }

    /// The `Location`; `None` if it cannot be written as a header.
    pub fn location(&self, came: &Came<'_>, prefix: &str) -> Option<HeaderValue> {
        let Came { secure, host, path, query } = *came;
        let (name, client_port) = split_port(host);
        let scheme = self.scheme.as_deref().unwrap_or(if secure { "https" } else { "http" });
        let default = if scheme == "https" { 443 } else { 80 };
        let port = match (self.port, &self.scheme) {
            (Some(port), _) => port,
            (None, Some(_)) => default,
            // The listener's own port, as the client knows it.
            (None, None) => client_port.unwrap_or(default),
        };
        let mut text = format!("{scheme}://{}", self.host.as_deref().unwrap_or(name));
        if port != default {
            text.push_str(&format!(":{port}"));
        }
        match &self.path {
            Some(change) => text.push_str(&change.apply(path, prefix)),
            None => text.push_str(path),
        }
        if let Some(query) = query {
            text.push('?');
            text.push_str(query);
        }
        HeaderValue::try_from(text).ok()
    }
}

impl PathChange {
    fn read(spec: &PathChangeSpec) -> Result<PathChange, String> {
        match (spec.r#type.as_str(), &spec.replace_full_path, &spec.replace_prefix_match) {
            ("ReplaceFullPath", Some(path), _) => Ok(PathChange::Full(path.clone())),
            ("ReplacePrefixMatch", _, Some(prefix)) => Ok(PathChange::Prefix(prefix.clone())),
            (other, _, _) => Err(format!("path type {other:?} without its value, or not known")),
        }
    }

    /// `prefix` is what the rule matched, without a slash at the end.
    pub fn apply(&self, path: &str, prefix: &str) -> String {
        let new = match self {
            PathChange::Full(full) => full.clone(),
            PathChange::Prefix(new) => {
                let rest = path.strip_prefix(prefix).unwrap_or(path);
                format!("{}{rest}", new.trim_end_matches('/'))
            }
        };
        if new.starts_with('/') { new } else { format!("/{new}") }
    }
}

/// Name and port of a `Host`; IPv6 literals keep their brackets.
pub fn split_port(host: &str) -> (&str, Option<u16>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, port.parse().ok()),
        _ => (host, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_replaced_as_in_the_specifications_table() {
        for (path, prefix, replacement, wanted) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/a", "", "/x", "/x/a"),
        ] {
            assert_eq!(PathChange::Prefix(replacement.into()).apply(path, prefix), wanted, "{path} {replacement}");
        }
    }

    #[test]
    fn locations_keep_what_is_not_said() {
        let redirect = |scheme: Option<&str>, host: Option<&str>, port| Redirect {
            scheme: scheme.map(str::to_owned),
            host: host.map(str::to_owned),
            path: None,
            port,
            status: StatusCode::FOUND,
        };
        let at = |r: Redirect, host| {
            let came = Came { secure: false, host, path: "/p", query: Some("q=1") };
            r.location(&came, "").unwrap()
        };
        assert_eq!(at(redirect(None, Some("b"), None), "a:8080"), "http://b:8080/p?q=1");
        assert_eq!(at(redirect(Some("https"), None, None), "a:8080"), "https://a/p?q=1");
        assert_eq!(at(redirect(None, None, Some(80)), "a"), "http://a/p?q=1");
        assert_eq!(at(redirect(None, None, Some(81)), "[::1]:90"), "http://[::1]:81/p?q=1");
    }
}
