//! Every named type of the kinds served: Kubernetes' own, read from the field's wire crate (which carries their full
//! documentation), completed by what is not in those schemas ([`super::lists`], [`super::defaults`]), and the types of
//! KubeVirt, Knative and Gateway API written down in `*.types` ([`super::notation`]).

use super::{ObjectShape, Schema, Shape, Types, defaults, lists, notation};
use k8s_openapi::api::{apps, coordination, core, discovery, networking, node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions;
use schemars::generate::SchemaSettings;
use serde_json::Value;
use std::sync::{Arc, LazyLock};

pub const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
pub const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
pub const LIST_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";
pub const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
pub const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
pub const TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Time";
pub const MICRO_TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime";
pub const FIELDS_V1: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1";
pub const RAW_EXTENSION: &str = "io.k8s.apimachinery.pkg.runtime.RawExtension";
const JSON_TYPES: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON";

/// The types of all built-in kinds. Built on first use.
pub fn types() -> Arc<Types> {
    static TYPES: LazyLock<Arc<Types>> = LazyLock::new(|| Arc::new(build()));
    TYPES.clone()
}

/// The schema of a named type; anything at all if there is none of that name.
pub fn schema(type_name: &str) -> Arc<Schema> {
    types().by_name.get(type_name).cloned().unwrap_or_default()
}

fn build() -> Types {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    macro_rules! roots {
        ($($root:ty),* $(,)?) => { $( generator.subschema_for::<$root>(); )* };
    }
    roots!(
        core::v1::Namespace,
        core::v1::Node,
        core::v1::Pod,
        core::v1::Service,
        core::v1::ConfigMap,
        core::v1::Secret,
        core::v1::Event,
        core::v1::ServiceAccount,
        discovery::v1::EndpointSlice,
        coordination::v1::Lease,
        node::v1::RuntimeClass,
        networking::v1::Ingress,
        networking::v1::IngressClass,
        networking::v1::NetworkPolicy,
        apps::v1::Deployment,
        apps::v1::ReplicaSet,
        apiextensions::v1::CustomResourceDefinition,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Status,
        k8s_openapi::apimachinery::pkg::api::resource::Quantity,
        k8s_openapi::apimachinery::pkg::util::intstr::IntOrString,
    );
    let mut types = Types::default();
    for (name, definition) in generator.take_definitions(false) {
        let mut schema = named(&name).unwrap_or_else(|| convert(&definition));
        if schema.description.is_empty() {
            schema.description = text(&definition, "description");
        }
        complete(&name, &mut schema);
        types.by_name.insert(name.into(), Arc::new(schema));
    }
    for source in notation::SOURCES {
        notation::read(source, &mut types);
    }
    types
}

/// Types whose wire form is not what their definition says.
fn named(name: &str) -> Option<Schema> {
    let shape = match name {
        QUANTITY => Shape::Quantity,
        INT_OR_STRING => Shape::IntOrString,
        TIME | MICRO_TIME => Shape::String { format: "date-time".into() },
        FIELDS_V1 | RAW_EXTENSION => Shape::Object(ObjectShape { keep_unknown: true, ..Default::default() }),
        // JSON, JSONSchemaPropsOrBool, JSONSchemaPropsOrArray, JSONSchemaPropsOrStringArray: any of several forms.
        _ if name.starts_with(JSON_TYPES) && !name.ends_with("JSONSchemaProps") => Shape::Any,
        _ => return None,
    };
    Some(Schema { shape, ..Default::default() })
}

/// Whether a reference is replaced by the shape itself instead of being kept as one.
fn inlined(name: &str) -> bool {
    matches!(name, QUANTITY | INT_OR_STRING | TIME | MICRO_TIME | FIELDS_V1 | RAW_EXTENSION)
        || (name.starts_with(JSON_TYPES) && !name.ends_with("JSONSchemaProps"))
}

fn convert(json: &Value) -> Schema {
    let shape = match json.get("$ref").and_then(Value::as_str) {
        Some(reference) => {
            let name = reference.rsplit('/').next().unwrap_or(reference);
            match named(name).filter(|_| inlined(name)) {
                Some(schema) => schema.shape,
                None => Shape::Ref(name.into()),
            }
        }
        None => shape(json),
    };
    Schema { description: text(json, "description"), shape, ..Default::default() }
}

fn shape(json: &Value) -> Shape {
    match json.get("type").and_then(Value::as_str).unwrap_or("") {
        "string" => Shape::String { format: text(json, "format") },
        "boolean" => Shape::Boolean,
        "integer" => Shape::Integer { format: text(json, "format") },
        "number" => Shape::Number,
        "array" => Shape::List {
            items: Arc::new(json.get("items").map(convert).unwrap_or_default()),
            kind: super::ListKind::Atomic,
            strategic: None,
        },
        "object" => match (json.get("properties").and_then(Value::as_object), json.get("additionalProperties")) {
            (None, Some(values)) => Shape::Map(Arc::new(convert(values))),
            (properties, _) => Shape::Object(ObjectShape {
                fields: properties
                    .into_iter()
                    .flatten()
                    .map(|(name, field)| (name.clone(), Arc::new(convert(field))))
                    .collect(),
                required: required(json),
                ..Default::default()
            }),
        },
        _ => Shape::Any,
    }
}

fn text(json: &Value, key: &str) -> String {
    json.get(key).and_then(Value::as_str).unwrap_or("").to_owned()
}

/// Required fields without `metadata`, which the server itself provides.
fn required(json: &Value) -> Vec<String> {
    let names = json.get("required").and_then(Value::as_array).into_iter().flatten();
    names.filter_map(Value::as_str).filter(|name| *name != "metadata").map(str::to_owned).collect()
}

/// Adds what the definitions lack: kinds of lists, merge keys, defaults.
fn complete(type_name: &str, schema: &mut Schema) {
    let short = short_name(type_name);
    let Shape::Object(object) = &mut schema.shape else { return };
    object.atomic = lists::ATOMIC_TYPES.contains(&short);
    if short == "discovery.v1.EndpointSlice" {
        // Written without endpoints while nothing is ready.
        object.required.retain(|name| name != "endpoints");
    }
    object.retain_keys = lists::RETAIN_KEYS_TYPES.contains(&short);
    for (name, field) in &mut object.fields {
        if let Some((kind, strategic)) = lists::of(short, name)
            && let Shape::List { kind: at, strategic: merge, .. } = &mut Arc::make_mut(field).shape
        {
            (*at, *merge) = (kind, strategic);
        }
        if lists::ATOMIC_MAPS.contains(&(short, name)) {
            let field = Arc::make_mut(field);
            if let Shape::Map(values) = &field.shape {
                field.shape = Shape::Object(ObjectShape::atomic_map(values.clone()));
            }
        }
        if let Some(default) = defaults::of(short, name) {
            Arc::make_mut(field).default = Some(default);
        }
    }
}

/// `core.v1.Container` of `io.k8s.api.core.v1.Container`, `meta.v1.ObjectMeta` of the machinery's.
pub fn short_name(type_name: &str) -> &str {
    for prefix in ["io.k8s.api.", "io.k8s.apimachinery.pkg.apis.", "io.k8s.apiextensions-apiserver.pkg.apis."] {
        if let Some(short) = type_name.strip_prefix(prefix) {
            return short;
        }
    }
    type_name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{ListKind, Strategic};

    fn field<'a>(types: &'a Types, type_name: &str, name: &str) -> &'a Schema {
        match &types.by_name[type_name].shape {
            Shape::Object(object) => &object.fields[name],
            other => panic!("{type_name}: {other:?}"),
        }
    }

    fn references(schema: &Schema, found: &mut Vec<Arc<str>>) {
        match &schema.shape {
            Shape::Ref(name) => found.push(name.clone()),
            Shape::Map(values) => references(values, found),
            Shape::List { items, .. } => references(items, found),
            Shape::Object(object) => object.fields.values().for_each(|field| references(field, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_resolves() {
        let types = types();
        assert!(types.by_name.len() > 200);
        for (name, schema) in &types.by_name {
            let mut found = Vec::new();
            references(schema, &mut found);
            for reference in found {
                assert!(types.by_name.contains_key(&reference), "{name} refers to {reference}");
            }
        }
    }

    #[test]
    fn the_tables_name_real_fields() {
        let types = types();
        let full = |short: &str| {
            types
                .by_name
                .keys()
                .find(|name| short_name(name) == short)
                .unwrap_or_else(|| panic!("{short}: no such type"))
                .clone()
        };
        for (type_name, name, ..) in lists::TABLE {
            assert!(matches!(field(&types, &full(type_name), name).shape, Shape::List { .. }), "{type_name}.{name}");
        }
        for (type_name, name) in lists::ATOMIC_MAPS {
            let Shape::Object(map) = &field(&types, &full(type_name), name).shape else { panic!("{type_name}.{name}") };
            assert!(map.atomic && map.values.is_some(), "{type_name}.{name}");
        }
        for (type_name, name, _) in defaults::TABLE {
            assert!(field(&types, &full(type_name), name).default.is_some(), "{type_name}.{name}");
        }
        for type_name in lists::ATOMIC_TYPES.iter().chain(lists::RETAIN_KEYS_TYPES) {
            full(type_name);
        }
    }

    #[test]
    fn a_few_fields_are_what_kubernetes_says() {
        let types = types();
        let ports = field(&types, "io.k8s.api.core.v1.Container", "ports");
        let Shape::List { kind, strategic, .. } = &ports.shape else { panic!("{ports:?}") };
        assert_eq!(*kind, ListKind::Map(vec!["containerPort".into(), "protocol".into()]));
        assert_eq!(*strategic, Some(Strategic { key: Some("containerPort".into()) }));
        let protocol = field(&types, "io.k8s.api.core.v1.ContainerPort", "protocol");
        assert_eq!(protocol.default, Some("TCP".into()));
        assert!(matches!(field(&types, "io.k8s.api.core.v1.ResourceRequirements", "limits").shape, Shape::Map(_)));
        assert!(matches!(field(&types, "io.k8s.api.core.v1.ServicePort", "targetPort").shape, Shape::IntOrString));
        let containers = field(&types, "io.k8s.api.core.v1.PodSpec", "containers");
        assert!(containers.description.starts_with("List of containers"));
    }
}
