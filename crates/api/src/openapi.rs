//! OpenAPI documents of the kinds served: v2 (one document) and v3 (one for each group and version), with the extensions
//! that clients of Kubernetes read: `kubectl explain`, server-side field validation, merge keys for client-side apply.

mod paths;

use crate::kind::Kind;
use crate::schema::{Checks, ListKind, ObjectShape, Schema, Shape, Types, builtin};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V2,
    V3,
}

impl Version {
    fn reference(self, name: &str) -> String {
        match self {
            Version::V2 => format!("#/definitions/{name}"),
            Version::V3 => format!("#/components/schemas/{name}"),
        }
    }
}

/// The version that documents claim to be of.
const RELEASE: &str = "v1.33.0";

/// The whole API as one swagger document.
pub fn v2<'a>(kinds: impl IntoIterator<Item = &'a Kind>) -> Value {
    let kinds: Vec<&Kind> = kinds.into_iter().collect();
    let mut document = Documents::new(Version::V2);
    let paths = paths::of(&kinds, Version::V2);
    document.kinds(&kinds);
    json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": RELEASE}, "paths": paths,
           "definitions": document.definitions,
           "securityDefinitions": {"BearerToken": {"description": "Bearer Token authentication", "type": "apiKey",
               "name": "authorization", "in": "header"}},
           "security": [{"BearerToken": []}]})
}

/// The document of one group and version; `None` when nothing of it is served.
pub fn v3<'a>(group: &str, version: &str, kinds: impl IntoIterator<Item = &'a Kind>) -> Option<Value> {
    let of_it = |kind: &&Kind| &*kind.resource.group == group && &*kind.resource.version == version;
    let kinds: Vec<&Kind> = kinds.into_iter().filter(of_it).collect();
    if kinds.is_empty() {
        return None;
    }
    let mut document = Documents::new(Version::V3);
    let paths = paths::of(&kinds, Version::V3);
    document.kinds(&kinds);
    Some(json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": RELEASE}, "paths": paths,
                "components": {"schemas": document.definitions,
                    "securitySchemes": {"BearerToken": {"description": "Bearer Token authentication", "type": "apiKey",
                        "name": "authorization", "in": "header"}}}}))
}

/// Paths of the v3 documents as they stand below `/openapi/v3/`: `api/v1`, `apis/apps/v1`.
pub fn v3_paths<'a>(kinds: impl IntoIterator<Item = &'a Kind>) -> Vec<String> {
    let path = |kind: &Kind| match &*kind.resource.group {
        "" => format!("api/{}", kind.resource.version),
        group => format!("apis/{group}/{}", kind.resource.version),
    };
    let mut all: Vec<String> = kinds.into_iter().map(path).collect();
    all.sort();
    all.dedup();
    all
}

/// Whether a kind takes strategic merge patches: Kubernetes' own types do, custom ones do not.
pub fn takes_strategic(kind: &Kind) -> bool {
    ["io.k8s.api.", "io.k8s.apiextensions-apiserver."].iter().any(|prefix| kind.type_name.starts_with(prefix))
}

fn group_version_kind(kind: &Kind, name: &str) -> Value {
    json!({"group": &*kind.resource.group, "version": &*kind.resource.version, "kind": name})
}

/// Definitions being collected.
struct Documents {
    version: Version,
    definitions: BTreeMap<String, Value>,
}

impl Documents {
    fn new(version: Version) -> Self {
        Documents { version, definitions: BTreeMap::new() }
    }

    fn kinds(&mut self, kinds: &[&Kind]) {
        let builtin = builtin::types();
        for name in
            [builtin::LIST_META, &format!("{}.DeleteOptions", builtin::META), &format!("{}.Status", builtin::META)]
        {
            self.named(name, &builtin);
        }
        for kind in kinds {
            let mut schema = self.write(&kind.schema, &kind.types);
            let identity = json!([group_version_kind(kind, &kind.kind)]);
            set(&mut schema, "x-kubernetes-group-version-kind", identity);
            self.definitions.insert(kind.type_name.clone(), schema);
            let list = self.list(kind);
            self.definitions.insert(format!("{}List", kind.type_name), list);
        }
    }

    fn list(&self, kind: &Kind) -> Value {
        let items = json!({"description": format!("List of {}.", kind.resource.plural), "type": "array",
                           "items": self.reference(&kind.type_name, "")});
        json!({"description": format!("{} is a list of {}.", kind.list_kind, kind.resource.plural), "type": "object",
               "required": ["items"], "properties": {
                   "apiVersion": {"description": "Version of this representation of the list.", "type": "string"},
                   "kind": {"description": "What this list is.", "type": "string"},
                   "metadata": self.reference(builtin::LIST_META, "Standard list metadata."),
                   "items": items},
               "x-kubernetes-group-version-kind": [group_version_kind(kind, &kind.list_kind)]})
    }

    /// Adds the named type and all it refers to.
    fn named(&mut self, name: &str, types: &Types) {
        if self.definitions.contains_key(name) {
            return;
        }
        let Some(schema) = types.by_name.get(name) else { return };
        // The entry stands before its fields are written, so that types may contain themselves.
        self.definitions.insert(name.to_owned(), Value::Null);
        let written = match name {
            builtin::QUANTITY => self.quantity(schema),
            builtin::INT_OR_STRING => self.int_or_string(schema),
            _ => self.write(schema, types),
        };
        self.definitions.insert(name.to_owned(), written);
    }

    fn quantity(&self, schema: &Schema) -> Value {
        match self.version {
            Version::V2 => json!({"description": schema.description, "type": "string"}),
            Version::V3 => {
                json!({"description": schema.description, "oneOf": [{"type": "string"}, {"type": "number"}]})
            }
        }
    }

    fn int_or_string(&self, schema: &Schema) -> Value {
        match self.version {
            Version::V2 => json!({"description": schema.description, "type": "string", "format": "int-or-string"}),
            Version::V3 => json!({"description": schema.description, "format": "int-or-string",
                                  "oneOf": [{"type": "integer"}, {"type": "string"}]}),
        }
    }

    fn reference(&self, name: &str, description: &str) -> Value {
        let reference = self.version.reference(name);
        match (self.version, description.is_empty()) {
            (_, true) => json!({"$ref": reference}),
            (Version::V2, false) => json!({"description": description, "$ref": reference}),
            (Version::V3, false) => json!({"description": description, "allOf": [{"$ref": reference}]}),
        }
    }

    fn write(&mut self, schema: &Schema, types: &Types) -> Value {
        let mut out = match &schema.shape {
            Shape::Ref(name) => {
                self.named(name, types);
                self.reference(name, &schema.description)
            }
            Shape::Quantity => self.builtin(builtin::QUANTITY, schema),
            Shape::IntOrString => self.builtin(builtin::INT_OR_STRING, schema),
            shape => {
                let mut out = self.shape(shape, types);
                if !schema.description.is_empty() {
                    set(&mut out, "description", schema.description.as_str().into());
                }
                out
            }
        };
        if retains_keys(schema, types) && matches!(schema.shape, Shape::Ref(_)) {
            set(&mut out, "x-kubernetes-patch-strategy", "retainKeys".into());
        }
        if !schema.one_of.is_empty() {
            set(&mut out, "enum", schema.one_of.clone().into());
        }
        if self.version == Version::V3 {
            if let Some(default) = &schema.default {
                set(&mut out, "default", default.clone());
            }
            if schema.nullable {
                set(&mut out, "nullable", true.into());
            }
        }
        checks(&mut out, &schema.checks, self.version);
        out
    }

    fn builtin(&mut self, name: &str, schema: &Schema) -> Value {
        self.named(name, &builtin::types());
        self.reference(name, &schema.description)
    }

    fn shape(&mut self, shape: &Shape, types: &Types) -> Value {
        let with_format = |kind: &str, format: &str| match format {
            "" => json!({"type": kind}),
            format => json!({"type": kind, "format": format}),
        };
        match shape {
            Shape::Any => json!({"x-kubernetes-preserve-unknown-fields": true}),
            Shape::Boolean => json!({"type": "boolean"}),
            Shape::Integer { format } => with_format("integer", format),
            Shape::Number => json!({"type": "number", "format": "double"}),
            Shape::String { format } => with_format("string", format),
            Shape::Map(values) => json!({"type": "object", "additionalProperties": self.write(values, types)}),
            Shape::Object(object) => self.object(object, types),
            Shape::List { items, kind, strategic } => {
                let mut out = json!({"type": "array", "items": self.write(items, types)});
                let (name, keys) = match kind {
                    ListKind::Atomic => ("atomic", None),
                    ListKind::Set => ("set", None),
                    ListKind::Map(keys) => ("map", Some(keys)),
                };
                set(&mut out, "x-kubernetes-list-type", name.into());
                if let Some(keys) = keys {
                    set(&mut out, "x-kubernetes-list-map-keys", keys.clone().into());
                }
                if let Some(strategic) = strategic {
                    let strategy = if retains_keys(items, types) { "merge,retainKeys" } else { "merge" };
                    set(&mut out, "x-kubernetes-patch-strategy", strategy.into());
                    if let Some(key) = &strategic.key {
                        set(&mut out, "x-kubernetes-patch-merge-key", key.as_str().into());
                    }
                }
                out
            }
            // Written as references by the caller.
            Shape::Ref(_) | Shape::Quantity | Shape::IntOrString => json!({}),
        }
    }

    fn object(&mut self, object: &ObjectShape, types: &Types) -> Value {
        let mut out = json!({"type": "object"});
        if !object.fields.is_empty() {
            let fields: Map<String, Value> =
                object.fields.iter().map(|(name, field)| (name.clone(), self.write(field, types))).collect();
            set(&mut out, "properties", fields.into());
        }
        if !object.required.is_empty() {
            set(&mut out, "required", object.required.clone().into());
        }
        match &object.values {
            Some(values) => {
                let values = self.write(values, types);
                set(&mut out, "additionalProperties", values);
            }
            None if object.keep_unknown => set(&mut out, "x-kubernetes-preserve-unknown-fields", true.into()),
            None => {}
        }
        if object.atomic {
            set(&mut out, "x-kubernetes-map-type", "atomic".into());
        }
        if object.embedded {
            set(&mut out, "x-kubernetes-embedded-resource", true.into());
        }
        out
    }
}

fn retains_keys(schema: &Schema, types: &Types) -> bool {
    matches!(&types.resolve(schema).shape, Shape::Object(object) if object.retain_keys)
}

fn set(value: &mut Value, key: &str, to: Value) {
    crate::object::object_of(value).insert(key.to_owned(), to);
}

fn checks(out: &mut Value, checks: &Checks, version: Version) {
    let floats = [("minimum", checks.minimum), ("maximum", checks.maximum), ("multipleOf", checks.multiple_of)];
    for (key, value) in floats {
        if let Some(value) = value {
            // Whole numbers are written without a fraction.
            let whole = value.fract() == 0.0 && value.abs() < 9e15;
            set(out, key, if whole { json!(value as i64) } else { json!(value) });
        }
    }
    for (key, value) in [("exclusiveMinimum", checks.exclusive_minimum), ("exclusiveMaximum", checks.exclusive_maximum)]
    {
        if value {
            set(out, key, true.into());
        }
    }
    let counts = [
        ("minLength", checks.min_length),
        ("maxLength", checks.max_length),
        ("minItems", checks.min_items),
        ("maxItems", checks.max_items),
        ("minProperties", checks.min_properties),
        ("maxProperties", checks.max_properties),
    ];
    for (key, value) in counts {
        if let Some(value) = value {
            set(out, key, value.into());
        }
    }
    if let Some(pattern) = &checks.pattern {
        set(out, "pattern", pattern.as_str().into());
    }
    // v2 knows no anyOf, oneOf and not.
    if let (Version::V3, Some(Value::Object(logic))) = (version, &checks.logic) {
        for (key, value) in logic {
            if out.get(key).is_none() {
                set(out, key, value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
                    found.push(reference.to_owned());
                }
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_in_the_documents_resolves() {
        let kinds = kinds::builtin();
        let mut documents = vec![(v2(&kinds), "/definitions")];
        for path in v3_paths(&kinds) {
            let parts: Vec<&str> = path.split('/').collect();
            let (group, version) = if parts[0] == "api" { ("", parts[1]) } else { (parts[1], parts[2]) };
            documents.push((v3(group, version, &kinds).unwrap(), "/components/schemas"));
        }
        assert!(documents.len() >= 13, "{}", documents.len());
        for (document, at) in documents {
            let mut found = Vec::new();
            references(&document, &mut found);
            assert!(found.len() > 10);
            for reference in found {
                let name = reference.strip_prefix(&format!("#{at}/")).unwrap();
                assert!(document.pointer(at).unwrap().get(name).is_some_and(Value::is_object), "{reference}");
            }
        }
    }

    #[test]
    fn what_clients_look_for_is_there() {
        let kinds = kinds::builtin();
        let document = v3("", "v1", &kinds).unwrap();
        let schemas = &document["components"]["schemas"];
        let pod = &schemas["io.k8s.api.core.v1.Pod"];
        assert_eq!(pod["x-kubernetes-group-version-kind"], json!([{"group": "", "version": "v1", "kind": "Pod"}]));
        assert_eq!(pod["properties"]["spec"]["allOf"][0]["$ref"], "#/components/schemas/io.k8s.api.core.v1.PodSpec");
        let spec = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"];
        assert_eq!(spec["containers"]["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(spec["volumes"]["x-kubernetes-patch-strategy"], "merge,retainKeys");
        assert_eq!(spec["nodeSelector"]["x-kubernetes-map-type"], "atomic");
        assert_eq!(spec["nodeSelector"]["additionalProperties"]["type"], "string");
        let item = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"];
        let parameters: Vec<&str> =
            item["patch"]["parameters"].as_array().unwrap().iter().filter_map(|p| p["name"].as_str()).collect();
        assert!(["dryRun", "fieldManager", "fieldValidation", "force"].iter().all(|name| parameters.contains(name)));
        assert_eq!(item["patch"]["x-kubernetes-group-version-kind"]["kind"], "Pod");
        assert!(item["patch"]["requestBody"]["content"].get("application/strategic-merge-patch+json").is_some());
        let machines = v3("kubevirt.io", "v1", &kinds).unwrap();
        let item = &machines["paths"]["/apis/kubevirt.io/v1/namespaces/{namespace}/virtualmachines/{name}"];
        assert!(item["patch"]["requestBody"]["content"].get("application/strategic-merge-patch+json").is_none());
        let apps = v3("apps", "v1", &kinds).unwrap();
        let spec = &apps["components"]["schemas"]["io.k8s.api.apps.v1.DeploymentSpec"]["properties"];
        assert_eq!(spec["strategy"]["x-kubernetes-patch-strategy"], "retainKeys");
    }
}
