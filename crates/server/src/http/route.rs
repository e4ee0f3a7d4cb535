//! What a path means.

use crate::auth::Attributes;
use http::Method;
use percent_encoding::percent_decode_str;

/// Longest path looked at.
const PATH_LIMIT: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/healthz`, `/livez`, `/readyz` and their checks.
    Health,
    /// `/metrics`
    Metrics,
    /// What tells clients what is served.
    Discovery(Discovery),
    Resource(ResourcePath),
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    Version,
    /// `/api`
    CoreVersions,
    /// `/apis`
    Groups,
    /// `/apis/G`
    Group(String),
    /// `/api/v1`, `/apis/G/V`
    Resources {
        group: String,
        version: String,
    },
    OpenApiV2,
    OpenApiV3,
    /// `/openapi/v3/api/v1`, `/openapi/v3/apis/G/V`, `/openapi/v3/apis/G`
    OpenApiV3Of(String),
    OpenId,
    KeySet,
    /// `/`
    Index,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourcePath {
    pub group: String,
    pub version: String,
    pub plural: String,
    pub namespace: String,
    pub name: String,
    pub subresource: String,
    /// What follows the subresource (`proxy`).
    pub rest: Vec<String>,
}

/// Splits and decodes a path. Nothing in it may climb or hide a separator.
pub fn parse(path: &str) -> Route {
    if path.len() > PATH_LIMIT {
        return Route::Unknown;
    }
    let mut parts = Vec::new();
    for part in path.split('/').filter(|p| !p.is_empty()) {
        match percent_decode_str(part).decode_utf8() {
            Ok(text) if !text.contains('/') && !text.contains('\0') && text != "." && text != ".." => {
                parts.push(text.into_owned());
            }
            _ => return Route::Unknown,
        }
    }
    let text: Vec<&str> = parts.iter().map(String::as_str).collect();
    let discovery = match text.as_slice() {
        ["healthz" | "livez" | "readyz", ..] => return Route::Health,
        ["metrics"] => return Route::Metrics,
        ["api", version, rest @ ..] if !rest.is_empty() => return resource("", version, rest),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => return resource(group, version, rest),
        [] => Discovery::Index,
        ["version"] => Discovery::Version,
        ["openapi", "v2"] => Discovery::OpenApiV2,
        ["openapi", "v3"] => Discovery::OpenApiV3,
        ["openapi", "v3", rest @ ..] => Discovery::OpenApiV3Of(rest.join("/")),
        [".well-known", "openid-configuration"] => Discovery::OpenId,
        ["openid", "v1", "jwks"] => Discovery::KeySet,
        ["api"] => Discovery::CoreVersions,
        ["api", version] => Discovery::Resources { group: String::new(), version: (*version).into() },
        ["apis"] => Discovery::Groups,
        ["apis", group] => Discovery::Group((*group).into()),
        ["apis", group, version] => Discovery::Resources { group: (*group).into(), version: (*version).into() },
        _ => return Route::Unknown,
    };
    Route::Discovery(discovery)
}

fn resource(group: &str, version: &str, rest: &[&str]) -> Route {
    let base = ResourcePath { group: group.into(), version: version.into(), ..ResourcePath::default() };
    let path = match rest {
        // A namespace's own subresources, not resources in it.
        ["namespaces", name, sub @ ("status" | "finalize")] if group.is_empty() => ResourcePath {
            plural: "namespaces".into(),
            name: (*name).into(),
            subresource: (*sub).into(),
            namespace: (*name).into(),
            ..base
        },
        ["namespaces", namespace, plural, rest @ ..] => {
            let namespace = (*namespace).to_owned();
            below(ResourcePath { namespace, plural: (*plural).into(), ..base }, rest)
        }
        [plural, rest @ ..] => {
            let mut path = below(ResourcePath { plural: (*plural).into(), ..base }, rest);
            if path.plural == "namespaces" && group.is_empty() {
                path.namespace = path.name.clone();
            }
            path
        }
        [] => return Route::Unknown,
    };
    Route::Resource(path)
}

fn below(base: ResourcePath, rest: &[&str]) -> ResourcePath {
    let text = |index: usize| rest.get(index).map(|s| (*s).to_owned()).unwrap_or_default();
    let tail = rest.iter().skip(2).map(|s| (*s).to_owned()).collect();
    ResourcePath { name: text(0), subresource: text(1), rest: tail, ..base }
}

/// The request in the terms of an access rule.
pub fn attributes(route: &Route, method: &Method, path: &str, watch: bool) -> Attributes {
    let Route::Resource(resource) = route else {
        return Attributes {
            verb: method.as_str().to_ascii_lowercase(),
            path: path.to_owned(),
            ..Attributes::default()
        };
    };
    let verb = match (method, resource.name.is_empty()) {
        (&Method::GET | &Method::HEAD, _) if watch && resource.subresource.is_empty() => "watch",
        (&Method::GET | &Method::HEAD, true) => "list",
        (&Method::GET | &Method::HEAD, false) => "get",
        (&Method::POST, _) => "create",
        (&Method::PUT, _) => "update",
        (&Method::PATCH, _) => "patch",
        (&Method::DELETE, true) => "deletecollection",
        (&Method::DELETE, false) => "delete",
        _ => "other",
    };
    // Reaching into a pod is making something, whatever the method a protocol begins with.
    let reaches = matches!(resource.subresource.as_str(), "exec" | "attach" | "portforward" | "capture");
    Attributes {
        verb: if reaches { "create" } else { verb }.to_owned(),
        group: resource.group.clone(),
        version: resource.version.clone(),
        resource: resource.plural.clone(),
        subresource: resource.subresource.clone(),
        namespace: resource.namespace.clone(),
        name: resource.name.clone(),
        path: path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn resource_of(path: &str) -> ResourcePath {
        match parse(path) {
            Route::Resource(path) => path,
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn paths() {
        let pod = resource_of("/api/v1/namespaces/n/pods/p/log");
        assert_eq!((pod.namespace.as_str(), pod.plural.as_str()), ("n", "pods"));
        assert_eq!((pod.name.as_str(), pod.subresource.as_str()), ("p", "log"));
        assert_eq!(resource_of("/api/v1/pods").plural, "pods");
        let namespace = resource_of("/api/v1/namespaces/n");
        assert_eq!((namespace.plural.as_str(), namespace.name.as_str()), ("namespaces", "n"));
        assert_eq!(resource_of("/api/v1/namespaces/n/finalize").subresource, "finalize");
        assert_eq!(resource_of("/apis/apps/v1/namespaces/n/deployments/d/scale").group, "apps");
        assert_eq!(resource_of("/api/v1/namespaces/n/pods/p/proxy/a/b").rest, ["a", "b"]);
        assert_eq!(
            parse("/apis/apps/v1/"),
            Route::Discovery(Discovery::Resources { group: "apps".into(), version: "v1".into() })
        );
        assert_eq!(parse("/openapi/v3/apis/apps/v1"), Route::Discovery(Discovery::OpenApiV3Of("apis/apps/v1".into())));
        for bad in
            ["/api/v1/namespaces/a%2Fb/pods", "/api/v1/pods/..", "/api/v1/pods/%2e%2e", "/nothing", "/api/v1/x/%00"]
        {
            assert_eq!(parse(bad), Route::Unknown, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_path_panics(path in "(/[a-z%.0-9]{0,12}){0,9}") {
            let route = parse(&path);
            let _ = attributes(&route, &Method::GET, &path, false);
        }
    }
}
