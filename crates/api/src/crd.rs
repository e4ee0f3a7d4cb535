//! CustomResourceDefinitions: from the object to the kinds it defines, one for each served version. Only structural
//! schemas are taken (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>);
//! what is wrong with another is named with its path.

mod structural;

use crate::jsonpath;
use crate::kind::{Cell, Column, Hooks, Kind, Resource, ScalePaths, Scope, Subresources};
use crate::names;
use crate::object::{Meta, Object};
use crate::schema::{Schema, builtin};
use crate::status::Cause;
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Arc;

/// Versions one definition may have.
const MAX_VERSIONS: usize = 20;
const MAX_COLUMNS: usize = 50;

/// What is wrong, collected.
#[derive(Default)]
struct Problems {
    causes: Vec<Cause>,
}

impl Problems {
    fn add(&mut self, reason: &str, path: &str, message: String) {
        if self.causes.len() < crate::schema::strict::MAX_PROBLEMS {
            self.causes.push(Cause { reason: reason.to_owned(), message, field: path.to_owned() });
        }
    }
    fn invalid(&mut self, path: &str, value: &str, detail: &str) {
        self.add("FieldValueInvalid", path, format!("Invalid value: {value:?}: {detail}"));
    }
    fn required(&mut self, path: &str, detail: &str) {
        let text = if detail.is_empty() { "Required value".to_owned() } else { format!("Required value: {detail}") };
        self.add("FieldValueRequired", path, text);
    }
    fn forbidden(&mut self, path: &str, detail: &str) {
        self.add("FieldValueForbidden", path, format!("Forbidden: {detail}"));
    }
    fn unsupported(&mut self, path: &str, value: &str, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|text| format!("{text:?}")).collect();
        let text = format!("Unsupported value: {value:?}: supported values: {}", list.join(", "));
        self.add("FieldValueNotSupported", path, text);
    }
    fn rule(&mut self, path: &str, value: &str, rule: fn(&str) -> Vec<String>) {
        for problem in rule(value) {
            self.invalid(path, value, &problem);
        }
    }
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn words(value: &Value, field: &str) -> Vec<String> {
    list(value, field).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn flag(value: &Value, field: &str) -> bool {
    value.get(field).and_then(Value::as_bool).unwrap_or(false)
}

/// The kinds that a definition defines, one for each served version, or what is wrong with it.
pub fn parse(definition: &Object) -> Result<Vec<Kind>, Vec<Cause>> {
    let mut problems = Problems::default();
    let spec = definition.get("spec").unwrap_or(&Value::Null);
    names_of(&mut problems, definition, spec);
    let versions = list(spec, "versions");
    check_versions(&mut problems, versions);
    let storage =
        versions.iter().find(|version| flag(version, "storage")).map_or("", |version| version.str_at("/name"));
    let mut kinds = Vec::new();
    for (index, version) in versions.iter().enumerate().take(MAX_VERSIONS) {
        let path = format!("spec.versions[{index}]");
        let schema = version.pointer("/schema/openAPIV3Schema").filter(|schema| schema.is_object());
        let schema = match schema {
            Some(schema) => structural::root(&mut problems, &format!("{path}.schema.openAPIV3Schema"), schema),
            None => {
                problems.required(&format!("{path}.schema.openAPIV3Schema"), "schemas are required");
                continue;
            }
        };
        let columns = columns(&mut problems, &path, version);
        let subresources = subresources(&mut problems, &path, version);
        if flag(version, "served") {
            kinds.push(kind(spec, version.str_at("/name"), storage, schema, columns, subresources));
        }
    }
    if problems.causes.is_empty() { Ok(kinds) } else { Err(problems.causes) }
}

fn kind(
    spec: &Value,
    version: &str,
    storage: &str,
    schema: Schema,
    columns: Vec<Column>,
    subresources: Subresources,
) -> Kind {
    let group = spec.str_at("/group");
    let name = spec.str_at("/names/kind");
    let named = |field: &str, default: String| {
        let text = spec.pointer("/names").map_or("", |names| names.get(field).and_then(Value::as_str).unwrap_or(""));
        if text.is_empty() { default } else { text.to_owned() }
    };
    let names = spec.get("names").unwrap_or(&Value::Null);
    Kind {
        resource: Resource::new(group, version, spec.str_at("/names/plural")),
        kind: name.to_owned(),
        list_kind: named("listKind", format!("{name}List")),
        singular: named("singular", name.to_lowercase()),
        short_names: words(names, "shortNames"),
        categories: words(names, "categories"),
        scope: if spec.str_at("/scope") == "Cluster" { Scope::Cluster } else { Scope::Namespaced },
        subresources,
        schema: Arc::new(schema),
        type_name: type_name(group, version, name),
        types: builtin::types(),
        columns,
        hooks: Hooks::default(),
        counts_generation: true,
        storage_version: storage.to_owned(),
    }
}

/// The OpenAPI definition name: the group reversed, then version and kind.
fn type_name(group: &str, version: &str, kind: &str) -> String {
    let mut parts: Vec<&str> = group.split('.').rev().collect();
    parts.extend([version, kind]);
    parts.join(".")
}

fn names_of(problems: &mut Problems, definition: &Object, spec: &Value) {
    let group = spec.str_at("/group");
    problems.rule("spec.group", group, names::dns_subdomain);
    if !group.contains('.') && !group.is_empty() {
        problems.invalid("spec.group", group, "should be a domain with at least one dot");
    }
    let protected =
        ["k8s.io", "kubernetes.io"].iter().any(|domain| group == *domain || group.ends_with(&format!(".{domain}")));
    if protected && definition.annotation("api-approved.kubernetes.io").unwrap_or("").is_empty() {
        let detail = "protected groups must have approval annotation \"api-approved.kubernetes.io\", see \
            https://github.com/kubernetes/enhancements/pull/1111";
        problems.required("metadata.annotations[api-approved.kubernetes.io]", detail);
    }
    let plural = spec.str_at("/names/plural");
    let wanted = format!("{plural}.{group}");
    if definition.name() != wanted {
        problems.invalid("metadata.name", definition.name(), "must be spec.names.plural+\".\"+spec.group");
    }
    match spec.str_at("/scope") {
        "Cluster" | "Namespaced" => {}
        "" => problems.required("spec.scope", ""),
        other => problems.unsupported("spec.scope", other, &["Cluster", "Namespaced"]),
    }
    if flag(spec, "preserveUnknownFields") {
        problems.invalid("spec.preserveUnknownFields", "true", "must be false in order to use schemas");
    }
    let strategy = spec.str_at("/conversion/strategy");
    if !strategy.is_empty() && strategy != "None" {
        problems.unsupported("spec.conversion.strategy", strategy, &["None"]);
    }
    problems.rule("spec.names.plural", plural, names::dns_1035_label);
    for field in ["kind", "listKind"] {
        let text = spec.pointer("/names").and_then(|names| names.get(field)).and_then(Value::as_str).unwrap_or("");
        if text.is_empty() && field == "kind" {
            problems.required("spec.names.kind", "");
        }
        for problem in names::dns_1035_label(&text.to_lowercase()).iter().filter(|_| !text.is_empty()) {
            let detail = format!("may have mixed case, but should otherwise match: {problem}");
            problems.invalid(&format!("spec.names.{field}"), text, &detail);
        }
    }
    let names = spec.get("names").unwrap_or(&Value::Null);
    let singular = spec.str_at("/names/singular");
    if !singular.is_empty() {
        problems.rule("spec.names.singular", singular, names::dns_1035_label);
    }
    for field in ["shortNames", "categories"] {
        for (index, word) in words(names, field).iter().enumerate() {
            problems.rule(&format!("spec.names.{field}[{index}]"), word, names::dns_1035_label);
        }
    }
    if spec.str_at("/names/kind") == spec.str_at("/names/listKind") && !spec.str_at("/names/kind").is_empty() {
        problems.invalid(
            "spec.names.listKind",
            spec.str_at("/names/listKind"),
            "kind and listKind may not be the same",
        );
    }
}

fn check_versions(problems: &mut Problems, versions: &[Value]) {
    if versions.is_empty() {
        problems.required("spec.versions", "must have at least one version");
        return;
    }
    if versions.len() > MAX_VERSIONS {
        problems.invalid(
            "spec.versions",
            &versions.len().to_string(),
            &format!("must have at most {MAX_VERSIONS} items"),
        );
    }
    let mut seen = HashSet::new();
    for (index, version) in versions.iter().enumerate() {
        let (path, name) = (format!("spec.versions[{index}].name"), version.str_at("/name"));
        problems.rule(&path, name, names::dns_1035_label);
        if !seen.insert(name) {
            problems.invalid(&path, name, "must contain unique version names");
        }
    }
    let stored = versions.iter().filter(|version| flag(version, "storage")).count();
    if stored != 1 {
        problems.invalid(
            "spec.versions",
            &stored.to_string(),
            "must have exactly one version marked as storage version",
        );
    }
}

fn columns(problems: &mut Problems, path: &str, version: &Value) -> Vec<Column> {
    let column = |name: &str, kind: &str, format: &str, description: &str, priority: i32, cell: Cell| Column {
        name: name.to_owned(),
        kind: kind.to_owned(),
        format: format.to_owned(),
        description: description.to_owned(),
        priority,
        cell,
    };
    let name = Cell::Code(|object, _| object.name().into());
    let mut all = vec![column("Name", "string", "name", "Name must be unique within a namespace.", 0, name)];
    let wanted = list(version, "additionalPrinterColumns");
    if wanted.len() > MAX_COLUMNS {
        let detail = format!("must have at most {MAX_COLUMNS} items");
        problems.invalid(&format!("{path}.additionalPrinterColumns"), &wanted.len().to_string(), &detail);
    }
    for (index, one) in wanted.iter().enumerate().take(MAX_COLUMNS) {
        let path = format!("{path}.additionalPrinterColumns[{index}]");
        let (name, kind, at) = (one.str_at("/name"), one.str_at("/type"), one.str_at("/jsonPath"));
        if name.is_empty() {
            problems.required(&format!("{path}.name"), "");
        }
        let kinds = ["boolean", "date", "integer", "number", "string"];
        if !kinds.contains(&kind) {
            problems.invalid(&format!("{path}.type"), kind, &format!("must be one of {}", kinds.join(",")));
        }
        if at.is_empty() {
            problems.required(&format!("{path}.jsonPath"), "");
        } else if !jsonpath::is_valid(at) {
            problems.invalid(&format!("{path}.jsonPath"), at, "is an invalid JSON path");
        }
        let priority = one.get("priority").and_then(Value::as_i64).and_then(|p| i32::try_from(p).ok()).unwrap_or(0);
        all.push(column(
            name,
            kind,
            one.str_at("/format"),
            one.str_at("/description"),
            priority,
            Cell::Path(at.to_owned()),
        ));
    }
    if wanted.is_empty() {
        let at = Cell::Path(".metadata.creationTimestamp".to_owned());
        all.push(column("Age", "date", "", "When it was made.", 0, at));
    }
    all
}

fn subresources(problems: &mut Problems, path: &str, version: &Value) -> Subresources {
    let given = version.get("subresources").unwrap_or(&Value::Null);
    let status = given.get("status").is_some_and(|status| !status.is_null());
    let Some(scale) = given.get("scale").filter(|scale| scale.is_object()) else {
        return Subresources { status, scale: None };
    };
    let path = format!("{path}.subresources.scale");
    let mut pointer = |field: &str, starts: &[&str], required: bool| {
        let text = scale.get(field).and_then(Value::as_str).unwrap_or("");
        let path = format!("{path}.{field}");
        if text.is_empty() {
            if required {
                problems.required(&path, "");
            }
            return String::new();
        }
        if !starts.iter().any(|start| text.starts_with(start)) || text.contains(['[', '\\']) {
            problems.invalid(
                &path,
                text,
                &format!("should be a json path under {}", starts.join(" or ").trim_end_matches('.')),
            );
        }
        text.replace('.', "/")
    };
    let scale = ScalePaths {
        spec_replicas: pointer("specReplicasPath", &[".spec."], true),
        status_replicas: pointer("statusReplicasPath", &[".status."], true),
        selector: pointer("labelSelectorPath", &[".spec.", ".status."], false),
    };
    Subresources { status, scale: Some(scale) }
}

/// What a definition asks for that is not done.
pub fn warnings(definition: &Object) -> Vec<String> {
    fn has_rules(schema: &Value, left: usize) -> bool {
        if left == 0 {
            return false;
        }
        match schema {
            Value::Object(fields) => {
                fields
                    .get("x-kubernetes-validations")
                    .is_some_and(|rules| rules.as_array().is_some_and(|r| !r.is_empty()))
                    || fields.values().any(|value| has_rules(value, left - 1))
            }
            Value::Array(items) => items.iter().any(|item| has_rules(item, left - 1)),
            _ => false,
        }
    }
    let mut all = Vec::new();
    for (index, version) in list(definition.get("spec").unwrap_or(&Value::Null), "versions").iter().enumerate() {
        if version.get("schema").is_some_and(|schema| has_rules(schema, 128)) {
            all.push(format!(
                "spec.versions[{index}].schema: x-kubernetes-validations rules are kept but not evaluated"
            ));
        }
    }
    all.truncate(10);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::strict;
    use crate::table;
    use serde_json::json;

    fn definition(schema: Value) -> Value {
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": "crontabs.stable.example.com"},
            "spec": {"group": "stable.example.com", "scope": "Namespaced",
                "names": {"plural": "crontabs", "singular": "crontab", "kind": "CronTab", "shortNames": ["ct"]},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.replicas",
                        "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.labelSelector"}},
                    "additionalPrinterColumns": [{"name": "Spec", "type": "string", "jsonPath": ".spec.cronSpec"},
                        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]}]}})
    }

    fn told(definition: &Value) -> Vec<String> {
        match parse(definition) {
            Ok(_) => Vec::new(),
            Err(causes) => causes.into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect(),
        }
    }

    #[test]
    fn a_definition_becomes_a_kind_that_checks_and_prints() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "required": ["cronSpec"], "properties": {
            "cronSpec": {"type": "string", "pattern": "^(\\d+|\\*)(/\\d+)?(\\s+(\\d+|\\*)(/\\d+)?){4}$"},
            "replicas": {"type": "integer", "minimum": 1, "maximum": 10, "default": 1},
            "port": {"x-kubernetes-int-or-string": true},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "rules": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                      "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}}}}}});
        let definition = definition(schema);
        let kind = parse(&definition).unwrap().remove(0);
        assert_eq!(kind.type_name, "com.example.stable.v1.CronTab");
        assert_eq!(kind.subresources.scale.as_ref().unwrap().selector, "/status/labelSelector");
        let mut object = json!({"apiVersion": "stable.example.com/v1", "kind": "CronTab",
            "metadata": {"name": "a", "labels": {"x": "y"}, "creationTimestamp": "1970-01-01T00:00:00Z"},
            "spec": {"cronSpec": "* * * * */5", "free": {"a": [1]}, "port": "http", "rules": [{"name": "r"}]}});
        assert!(strict::check(&kind.schema, &kind.types, &object).is_clean());
        strict::apply_defaults(&kind.schema, &kind.types, &mut object);
        assert_eq!(object["spec"]["replicas"], 1);
        assert!(strict::validate_values(&kind.schema, &kind.types, &object).is_empty());
        assert_eq!(table::cells(&kind, &object, 60), [json!("a"), json!("* * * * */5"), json!("60s")]);
        object["spec"] =
            json!({"cronSpec": "x", "replicas": 11, "image": "i", "rules": [{"name": "r"}, {"name": "r"}]});
        let report = strict::check(&kind.schema, &kind.types, &object);
        assert_eq!(report.unknown_fields, ["spec.image"]);
        let values = strict::validate_values(&kind.schema, &kind.types, &object);
        let fields: Vec<&str> = values.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(fields, ["spec.cronSpec", "spec.replicas", "spec.rules[1]"]);
        strict::prune(&kind.schema, &kind.types, &mut object);
        assert!(object["spec"].get("image").is_none() && object["metadata"]["labels"]["x"] == "y");
        // The definition itself fits its own kind.
        let own = crate::kinds::find("apiextensions.k8s.io", "customresourcedefinitions").unwrap();
        assert!(strict::check(&own.schema, &own.types, &definition).is_clean());
    }

    #[test]
    fn schemas_that_are_not_structural_are_refused() {
        let at = "spec.versions[0].schema.openAPIV3Schema";
        let cases = [
            (json!({"type": "string"}), "type: Invalid value: \"string\": must be object at the root"),
            (
                json!({"type": "object", "properties": {"a": {}}}),
                "properties[a].type: Required value: must not be empty for specified object fields",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "array"}}}),
                "properties[a].items: Required value: must be specified",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}),
                "properties[a].pattern: Invalid value: \"(\": must be a valid regular expression",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "integer", "default": "x"}}}),
                "properties[a].default: Invalid value: \"x\": must be of type integer",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "object", "$ref": "#/x"}}}),
                "properties[a].$ref: Forbidden: $ref is not supported",
            ),
            (
                json!({"type": "object", "allOf": [{"type": "object"}]}),
                "allOf[0].type: Forbidden: must be empty to be structural",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "map"}}}),
                "properties[a].items.type: Invalid value: \"string\": must be object if parent array's x-kubernetes-list-type is map",
            ),
        ];
        for (schema, expected) in cases {
            let problems = told(&definition(schema));
            assert!(
                problems.iter().any(|problem| problem.starts_with(&format!("{at}.{expected}"))),
                "{expected}: {problems:#?}"
            );
        }
        let mut deep = json!({"type": "object"});
        for _ in 0..80 {
            deep = json!({"type": "object", "properties": {"a": deep}});
        }
        assert!(told(&definition(deep)).iter().any(|problem| problem.contains("nested deeper")));
    }

    #[test]
    fn names_and_versions() {
        let mut wrong = definition(json!({"type": "object"}));
        wrong["metadata"]["name"] = "x".into();
        wrong["spec"]["scope"] = "Global".into();
        wrong["spec"]["versions"][0]["storage"] = false.into();
        wrong["spec"]["conversion"] = json!({"strategy": "Webhook"});
        assert_eq!(
            told(&wrong),
            [
                "metadata.name: Invalid value: \"x\": must be spec.names.plural+\".\"+spec.group",
                "spec.scope: Unsupported value: \"Global\": supported values: \"Cluster\", \"Namespaced\"",
                "spec.conversion.strategy: Unsupported value: \"Webhook\": supported values: \"None\"",
                "spec.versions: Invalid value: \"0\": must have exactly one version marked as storage version",
            ]
        );
    }
}
