//! The table of built-in kinds. Everything the server does for a kind is read from its entry here.

mod columns;
mod hooks;

use crate::kind::{Column, Hooks, Kind, Resource, ScalePaths, Scope, Subresources};
use crate::schema::builtin;

/// One line of the table. Group, version, plural, kind; the singular is the kind in lower case.
struct Entry {
    address: (&'static str, &'static str, &'static str, &'static str),
    short_names: &'static [&'static str],
    categories: &'static [&'static str],
    scope: Scope,
    traits: Traits,
    /// Name of the type; the short form without Kubernetes' prefix will do.
    type_name: &'static str,
    columns: fn() -> Vec<Column>,
    hooks: Hooks,
}

/// What a kind has beyond its objects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Traits {
    /// Neither status nor generation (ConfigMap).
    Plain,
    /// A status, but no generation (Pod).
    Status,
    /// A generation, but no status (EndpointSlice).
    Generation,
    /// Both.
    Full,
    /// Both and a scale subresource.
    Scaled,
}

/// All built-in kinds.
pub fn builtin() -> Vec<Kind> {
    let mut all: Vec<Kind> = entries().into_iter().map(kind).collect();
    let older: Vec<Kind> = all.iter().flat_map(gateway::older).collect();
    all.extend(older);
    all
}

/// The built-in kind at an address.
pub fn find(group: &str, plural: &str) -> Option<Kind> {
    entries().into_iter().find(|entry| entry.address.0 == group && entry.address.2 == plural).map(kind)
}

fn kind(entry: Entry) -> Kind {
    let (group, version, plural, name) = entry.address;
    let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    let scale = (entry.traits == Traits::Scaled).then(|| ScalePaths {
        spec_replicas: "/spec/replicas".into(),
        status_replicas: "/status/replicas".into(),
        selector: "/spec/selector".into(),
    });
    let status = matches!(entry.traits, Traits::Status | Traits::Full | Traits::Scaled);
    Kind {
        resource: Resource::new(group, version, plural),
        kind: name.to_owned(),
        list_kind: format!("{name}List"),
        singular: name.to_ascii_lowercase(),
        short_names: owned(entry.short_names),
        categories: owned(entry.categories),
        scope: entry.scope,
        subresources: Subresources { status, scale },
        schema: builtin::schema(entry.type_name),
        type_name: entry.type_name.to_owned(),
        types: builtin::types(),
        columns: (entry.columns)(),
        hooks: entry.hooks,
        counts_generation: matches!(entry.traits, Traits::Generation | Traits::Full | Traits::Scaled),
        storage_version: version.to_owned(),
    }
}

fn entries() -> Vec<Entry> {
    let mut all = core();
    all.extend(apps());
    all.extend(gateway::entries());
    all.extend(network::entries());
    all.extend(machines::entries());
    all.extend(functions());
    all
}

macro_rules! entry {
    ($address:expr, $short:expr, $categories:expr, $scope:ident, $traits:ident, $type_name:expr, $module:ident) => {
        Entry {
            address: $address,
            short_names: $short,
            categories: $categories,
            scope: Scope::$scope,
            traits: Traits::$traits,
            type_name: $type_name,
            columns: columns::$module,
            hooks: hooks::$module(),
        }
    };
}

mod gateway;
mod machines;
mod network;

fn core() -> Vec<Entry> {
    vec![
        entry!(
            ("", "v1", "namespaces", "Namespace"),
            &["ns"],
            &[],
            Cluster,
            Status,
            "io.k8s.api.core.v1.Namespace",
            namespace
        ),
        entry!(("", "v1", "nodes", "Node"), &["no"], &[], Cluster, Status, "io.k8s.api.core.v1.Node", node),
        entry!(("", "v1", "pods", "Pod"), &["po"], &["all"], Namespaced, Status, "io.k8s.api.core.v1.Pod", pod),
        entry!(
            ("", "v1", "services", "Service"),
            &["svc"],
            &["all"],
            Namespaced,
            Status,
            "io.k8s.api.core.v1.Service",
            service
        ),
        entry!(
            ("", "v1", "configmaps", "ConfigMap"),
            &["cm"],
            &[],
            Namespaced,
            Plain,
            "io.k8s.api.core.v1.ConfigMap",
            config_map
        ),
        entry!(("", "v1", "secrets", "Secret"), &[], &[], Namespaced, Plain, "io.k8s.api.core.v1.Secret", secret),
        entry!(("", "v1", "events", "Event"), &["ev"], &[], Namespaced, Plain, "io.k8s.api.core.v1.Event", event),
        entry!(
            ("", "v1", "serviceaccounts", "ServiceAccount"),
            &["sa"],
            &[],
            Namespaced,
            Plain,
            "io.k8s.api.core.v1.ServiceAccount",
            service_account
        ),
        entry!(
            ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
            &[],
            &[],
            Namespaced,
            Generation,
            "io.k8s.api.discovery.v1.EndpointSlice",
            endpoint_slice
        ),
        entry!(
            ("coordination.k8s.io", "v1", "leases", "Lease"),
            &[],
            &[],
            Namespaced,
            Plain,
            "io.k8s.api.coordination.v1.Lease",
            lease
        ),
        entry!(
            ("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass"),
            &[],
            &[],
            Cluster,
            Plain,
            "io.k8s.api.node.v1.RuntimeClass",
            runtime_class
        ),
        entry!(
            ("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition"),
            &["crd", "crds"],
            &["api-extensions"],
            Cluster,
            Full,
            "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition",
            custom_resource_definition
        ),
    ]
}

fn apps() -> Vec<Entry> {
    vec![
        entry!(
            ("apps", "v1", "deployments", "Deployment"),
            &["deploy"],
            &["all"],
            Namespaced,
            Scaled,
            "io.k8s.api.apps.v1.Deployment",
            deployment
        ),
        entry!(
            ("apps", "v1", "replicasets", "ReplicaSet"),
            &["rs"],
            &["all"],
            Namespaced,
            Scaled,
            "io.k8s.api.apps.v1.ReplicaSet",
            replica_set
        ),
    ]
}

const KNATIVE: &str = "serving.knative.dev";
const KNATIVE_CATEGORIES: &[&str] = &["all", "knative", "serving"];
const EVENTING: &str = "eventing.knative.dev";
const EVENTING_CATEGORIES: &[&str] = &["all", "knative", "eventing"];

fn functions() -> Vec<Entry> {
    vec![
        entry!(
            (KNATIVE, "v1", "services", "Service"),
            &["kservice", "ksvc"],
            KNATIVE_CATEGORIES,
            Namespaced,
            Full,
            "dev.knative.serving.v1.Service",
            knative_service
        ),
        entry!(
            (KNATIVE, "v1", "configurations", "Configuration"),
            &["config", "cfg"],
            KNATIVE_CATEGORIES,
            Namespaced,
            Full,
            "dev.knative.serving.v1.Configuration",
            configuration
        ),
        entry!(
            (KNATIVE, "v1", "revisions", "Revision"),
            &["rev"],
            KNATIVE_CATEGORIES,
            Namespaced,
            Full,
            "dev.knative.serving.v1.Revision",
            revision
        ),
        entry!(
            (KNATIVE, "v1", "routes", "Route"),
            &["rt"],
            KNATIVE_CATEGORIES,
            Namespaced,
            Full,
            "dev.knative.serving.v1.Route",
            route
        ),
        entry!(
            ("functions.atoll.dev", "v1alpha1", "messages", "Message"),
            &[],
            &[],
            Namespaced,
            Status,
            "dev.atoll.functions.v1alpha1.Message",
            message
        ),
        entry!(
            ("functions.atoll.dev", "v1alpha1", "schedules", "Schedule"),
            &[],
            &[],
            Namespaced,
            Full,
            "dev.atoll.functions.v1alpha1.Schedule",
            schedule
        ),
        entry!(
            (EVENTING, "v1", "brokers", "Broker"),
            &[],
            EVENTING_CATEGORIES,
            Namespaced,
            Full,
            "dev.knative.eventing.v1.Broker",
            broker
        ),
        entry!(
            (EVENTING, "v1", "triggers", "Trigger"),
            &[],
            EVENTING_CATEGORIES,
            Namespaced,
            Full,
            "dev.knative.eventing.v1.Trigger",
            trigger
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{Schema, Shape, Types};
    use std::collections::HashSet;

    fn resolves(schema: &Schema, types: &Types, seen: &mut HashSet<String>) {
        match &schema.shape {
            Shape::Ref(name) => {
                assert!(types.by_name.contains_key(name), "{name}");
                if seen.insert(name.to_string()) {
                    resolves(types.resolve(schema), types, seen);
                }
            }
            Shape::Map(values) => resolves(values, types, seen),
            Shape::List { items, .. } => resolves(items, types, seen),
            Shape::Object(object) => object.fields.values().for_each(|field| resolves(field, types, seen)),
            _ => {}
        }
    }

    #[test]
    fn every_kind_has_a_schema_that_resolves_and_a_name_column() {
        for kind in builtin() {
            let mut seen = HashSet::new();
            resolves(&kind.schema, &kind.types, &mut seen);
            assert!(!seen.is_empty(), "{} has no schema", kind.kind);
            if kind.kind != "Event" {
                assert_eq!(kind.columns[0].format, "name", "{}", kind.kind);
            }
            let Shape::Object(object) = &kind.schema.shape else { panic!("{}", kind.kind) };
            assert_eq!(object.fields.contains_key("status"), kind.subresources.status, "{}", kind.kind);
        }
    }

    #[test]
    fn short_names_are_unique() {
        let mut seen = HashSet::new();
        for name in builtin().iter().flat_map(|kind| kind.short_names.clone()) {
            assert!(seen.insert(name.clone()), "{name}");
        }
    }
}
