//! Discovery as it always was: `APIVersions`, `APIGroupList`, `APIGroup`, `APIResourceList`.

use crate::admission::subresources::{Sub, special};
use crate::auth::REVIEWS;
use crate::kinds::Set;
use api::kind::{Kind, Scope};
use serde_json::{Map, Value, json};

/// Groups and their versions, preferred first; reviews among them though nothing of theirs is stored.
pub fn all_groups(set: &Set) -> Vec<(String, Vec<String>)> {
    let mut groups = set.groups();
    for group in ["authentication.k8s.io", "authorization.k8s.io"] {
        if !groups.iter().any(|(g, _)| g == group) {
            groups.push((group.into(), vec!["v1".into()]));
        }
    }
    for group in ["policy", "autoscaling"] {
        // Their objects (`Eviction`, `Scale`) exist only as subresources of other groups.
        groups.retain(|(g, _)| g != group);
    }
    groups
}

pub fn index(set: &Set) -> Value {
    let mut paths: Vec<String> =
        ["/.well-known/openid-configuration", "/api", "/api/v1", "/apis"].map(str::to_owned).into();
    for (group, versions) in all_groups(set).iter().filter(|(g, _)| !g.is_empty()) {
        paths.push(format!("/apis/{group}"));
        paths.extend(versions.iter().map(|v| format!("/apis/{group}/{v}")));
    }
    paths.extend(
        ["/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/openid/v1/jwks", "/readyz", "/version"]
            .map(str::to_owned),
    );
    json!({"paths": paths})
}

pub fn core_versions(set: &Set) -> Value {
    let versions: Vec<_> = set.groups().into_iter().filter(|(g, _)| g.is_empty()).flat_map(|(_, v)| v).collect();
    json!({"kind": "APIVersions", "versions": versions, "serverAddressByClientCIDRs": []})
}

fn group_value(group: &str, versions: &[String]) -> Value {
    let entries: Vec<Value> =
        versions.iter().map(|v| json!({"groupVersion": format!("{group}/{v}"), "version": v})).collect();
    json!({"name": group, "preferredVersion": entries.first(), "versions": entries})
}

pub fn groups(set: &Set) -> Value {
    let groups: Vec<Value> =
        all_groups(set).iter().filter(|(g, _)| !g.is_empty()).map(|(g, v)| group_value(g, v)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

pub fn group(set: &Set, group: &str) -> Option<Value> {
    let (_, versions) = all_groups(set).into_iter().find(|(g, _)| g == group && !g.is_empty())?;
    let mut value = group_value(group, &versions);
    let fields = value.as_object_mut()?;
    fields.insert("kind".into(), "APIGroup".into());
    fields.insert("apiVersion".into(), "v1".into());
    Some(value)
}

/// Verbs of a kind's own collection and objects.
pub const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// The subresources a kind is served with.
pub fn subresources(kind: &Kind) -> Vec<Sub> {
    let verbs = &["get", "patch", "update"];
    let own = |sub: &Sub| Sub { name: sub.name, kind: sub.kind, group: sub.group, verbs: sub.verbs };
    let mut list: Vec<Sub> = special(kind).iter().map(own).collect();
    if kind.subresources.status {
        list.push(Sub { name: "status", kind: "", group: None, verbs });
    }
    if kind.subresources.scale.is_some() {
        list.push(Sub { name: "scale", kind: "Scale", group: Some(("autoscaling", "v1")), verbs });
    }
    list.sort_by_key(|sub| sub.name);
    list
}

/// The kind of a subresource's object.
pub fn kind_of<'a>(kind: &'a Kind, sub: &Sub) -> &'a str {
    if sub.kind.is_empty() { &kind.kind } else { sub.kind }
}

pub fn resources(set: &Set, group: &str, version: &str) -> Option<Value> {
    let mut list = Vec::new();
    for kind in set.in_version(group, version) {
        let namespaced = kind.scope == Scope::Namespaced;
        let mut entry = Map::new();
        entry.insert("name".into(), (*kind.resource.plural).into());
        entry.insert("singularName".into(), kind.singular.as_str().into());
        entry.insert("namespaced".into(), namespaced.into());
        entry.insert("kind".into(), kind.kind.as_str().into());
        entry.insert("verbs".into(), json!(VERBS));
        if !kind.short_names.is_empty() {
            entry.insert("shortNames".into(), json!(kind.short_names));
        }
        if !kind.categories.is_empty() {
            entry.insert("categories".into(), json!(kind.categories));
        }
        list.push(Value::Object(entry));
        for sub in subresources(kind) {
            let mut entry = json!({"name": format!("{}/{}", kind.resource.plural, sub.name), "singularName": "",
                                   "namespaced": namespaced, "kind": kind_of(kind, &sub), "verbs": sub.verbs});
            if let (Some((group, version)), Some(fields)) = (sub.group, entry.as_object_mut()) {
                fields.insert("group".into(), group.into());
                fields.insert("version".into(), version.into());
            }
            list.push(entry);
        }
    }
    if version == "v1" {
        for (_, plural, kind) in REVIEWS.iter().filter(|(g, _, _)| *g == group) {
            list.push(json!({"name": plural, "singularName": kind.to_ascii_lowercase(),
                             "namespaced": *plural == "localsubjectaccessreviews", "kind": kind, "verbs": ["create"]}));
        }
    }
    if list.is_empty() {
        return None;
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}))
}

/// How holders of our tokens can check them.
pub fn open_id(issuer: &str) -> Value {
    json!({"issuer": issuer, "jwks_uri": format!("{issuer}/openid/v1/jwks"),
           "response_types_supported": ["id_token"], "subject_types_supported": ["public"],
           "id_token_signing_alg_values_supported": ["ES256"]})
}
