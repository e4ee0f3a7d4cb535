//! Aggregated discovery: all groups, versions and resources in one document (`apidiscovery.k8s.io`).

use super::plain::{VERBS, all_groups, kind_of, subresources};
use crate::auth::REVIEWS;
use crate::http::ranges;
use crate::kinds::Set;
use api::kind::{Kind, Scope};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    V2,
    V2Beta1,
}

impl Form {
    pub fn content_type(self) -> &'static str {
        match self {
            Form::V2 => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            Form::V2Beta1 => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
        }
    }
    fn api_version(self) -> &'static str {
        match self {
            Form::V2 => "apidiscovery.k8s.io/v2",
            Form::V2Beta1 => "apidiscovery.k8s.io/v2beta1",
        }
    }
}

/// The aggregated form the client asks for, if it comes before the plain one.
pub fn wanted(accept: &str) -> Option<Form> {
    for range in ranges(accept).iter().filter(|r| r.media == "application/json") {
        if range.param("as").is_empty() {
            return None;
        }
        if range.param("as") == "APIGroupDiscoveryList" && range.param("g") == "apidiscovery.k8s.io" {
            match range.param("v") {
                "v2" => return Some(Form::V2),
                "v2beta1" => return Some(Form::V2Beta1),
                _ => {}
            }
        }
    }
    None
}

pub fn list(set: &Set, core: bool, form: Form) -> Value {
    let items: Vec<Value> = all_groups(set)
        .iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions.iter().map(|version| version_value(set, group, version)).collect();
            let metadata = if core {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": group, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": form.api_version(), "metadata": {}, "items": items})
}

fn version_value(set: &Set, group: &str, version: &str) -> Value {
    let mut resources: Vec<Value> =
        set.in_version(group, version).map(|kind| resource_value(kind, group, version)).collect();
    if version == "v1" {
        for (_, plural, kind) in REVIEWS.iter().filter(|(g, _, _)| *g == group) {
            let scope = if *plural == "localsubjectaccessreviews" { "Namespaced" } else { "Cluster" };
            resources.push(json!({"resource": plural, "scope": scope, "singularResource": kind.to_ascii_lowercase(),
                                  "responseKind": {"group": group, "version": version, "kind": kind},
                                  "verbs": ["create"]}));
        }
    }
    json!({"version": version, "freshness": "Current", "resources": resources})
}

fn resource_value(kind: &Kind, group: &str, version: &str) -> Value {
    let scope = if kind.scope == Scope::Namespaced { "Namespaced" } else { "Cluster" };
    let mut value = json!({
        "resource": &*kind.resource.plural, "scope": scope, "singularResource": kind.singular,
        "responseKind": {"group": group, "version": version, "kind": kind.kind}, "verbs": VERBS});
    let subs: Vec<Value> = subresources(kind)
        .into_iter()
        .map(|sub| {
            let (group, version) = sub.group.unwrap_or((group, version));
            json!({"subresource": sub.name, "verbs": sub.verbs,
                   "responseKind": {"group": group, "version": version, "kind": kind_of(kind, &sub)}})
        })
        .collect();
    if let Some(fields) = value.as_object_mut() {
        for (name, list) in [("shortNames", &kind.short_names), ("categories", &kind.categories)] {
            if !list.is_empty() {
                fields.insert(name.into(), json!(list));
            }
        }
        if !subs.is_empty() {
            fields.insert("subresources".into(), subs.into());
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubectl_asks_for() {
        let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;\
                      g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        assert_eq!(wanted(accept), Some(Form::V2));
        assert_eq!(wanted("application/json"), None);
        assert_eq!(wanted("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList,*/*"), None);
    }
}
