//! From an `openAPIV3Schema` to our [`Schema`], refusing what is not structural.

use super::{Problems, flag, list, words};
use crate::object::Meta;
use crate::schema::strict::{self, MAX_DEPTH};
use crate::schema::{Checks, ListKind, ObjectShape, Schema, Shape, builtin};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Nodes a schema may have.
const MAX_NODES: usize = 20_000;

const UNSUPPORTED: [&str; 7] =
    ["$ref", "definitions", "dependencies", "additionalItems", "patternProperties", "id", "$schema"];

/// What may not stand inside `allOf`, `anyOf`, `oneOf` and `not`.
const FORBIDDEN_IN_LOGIC: [&str; 11] = [
    "type",
    "description",
    "default",
    "title",
    "example",
    "nullable",
    "additionalProperties",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
];

struct Reader<'a> {
    problems: &'a mut Problems,
    nodes: usize,
}

/// The schema of whole objects; `apiVersion`, `kind` and `metadata` are always known.
pub fn root(problems: &mut Problems, path: &str, json: &Value) -> Schema {
    let kind = json.str_at("/type");
    if kind != "object" {
        if kind.is_empty() {
            problems.required(&format!("{path}.type"), "must not be empty at the root");
        } else {
            problems.invalid(&format!("{path}.type"), kind, "must be object at the root");
        }
    }
    if let Some(metadata) = json.pointer("/properties/metadata/properties").and_then(Value::as_object)
        && metadata.keys().any(|key| key != "name" && key != "generateName")
    {
        let detail = "must not specify anything other than name and generateName, but metadata is implicitly specified";
        problems.forbidden(&format!("{path}.properties[metadata]"), detail);
    }
    let mut reader = Reader { problems, nodes: 0 };
    let mut schema = reader.schema(json, path, 0);
    if let Shape::Object(object) = &mut schema.shape {
        add_identity(object, true);
    }
    schema
}

/// `apiVersion`, `kind` and `metadata` of an object, on top of what the schema says of them.
fn add_identity(object: &mut ObjectShape, root: bool) {
    let text = Arc::new(Schema { shape: Shape::String { format: String::new() }, ..Default::default() });
    for field in ["apiVersion", "kind"] {
        object.fields.entry(field.to_owned()).or_insert_with(|| text.clone());
        if !root && !object.required.iter().any(|name| name == field) {
            object.required.push(field.to_owned());
        }
    }
    let metadata = Schema { shape: Shape::Ref(builtin::OBJECT_META.into()), ..Default::default() };
    object.fields.insert("metadata".to_owned(), Arc::new(metadata));
    object.required.retain(|name| name != "metadata");
}

impl Reader<'_> {
    fn schema(&mut self, json: &Value, path: &str, depth: usize) -> Schema {
        self.nodes += 1;
        if depth > MAX_DEPTH || self.nodes > MAX_NODES {
            let detail = format!("nested deeper than {MAX_DEPTH} levels or more than {MAX_NODES} parts");
            // Said once; the reader stops here.
            if self.problems.causes.iter().all(|cause| !cause.message.contains("nested deeper")) {
                self.problems.forbidden(path, &detail);
            }
            return Schema::default();
        }
        for key in UNSUPPORTED.iter().filter(|key| json.get(**key).is_some_and(|value| !value.is_null())) {
            self.problems.forbidden(&format!("{path}.{key}"), &format!("{key} is not supported"));
        }
        if flag(json, "uniqueItems") {
            let detail = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
            self.problems.forbidden(&format!("{path}.uniqueItems"), detail);
        }
        let mut schema = Schema {
            description: json.str_at("/description").to_owned(),
            shape: self.shape(json, path, depth),
            default: None,
            nullable: flag(json, "nullable"),
            one_of: list(json, "enum").to_vec(),
            checks: self.checks(json, path),
        };
        if let Some(default) = json.get("default").filter(|default| !default.is_null()) {
            self.default(&mut schema, default, path);
        }
        schema
    }

    fn default(&mut self, schema: &mut Schema, default: &Value, path: &str) {
        let types = builtin::types();
        let report = strict::check(schema, &types, default);
        let path = format!("{path}.default");
        if let Some(error) = report.type_errors.first() {
            let wanted = error
                .message
                .split(" in body ")
                .nth(1)
                .map_or(error.message.as_str(), |rest| rest.rsplit_once(": ").map_or(rest, |(start, _)| start));
            self.problems.add("FieldValueInvalid", &path, format!("Invalid value: {default}: {wanted}"));
        }
        if let Some(field) = report.unknown_fields.first() {
            self.problems.add(
                "FieldValueInvalid",
                &path,
                format!("Invalid value: {default}: must not have unknown field {field:?}"),
            );
        }
        let mut filled = default.clone();
        strict::apply_defaults(schema, &types, &mut filled);
        for cause in strict::validate_values(schema, &types, &filled) {
            let at = if cause.field == "<nil>" { String::new() } else { format!("{}: ", cause.field) };
            self.problems.add("FieldValueInvalid", &path, format!("{at}{}", cause.message));
        }
        schema.default = Some(filled);
    }

    fn shape(&mut self, json: &Value, path: &str, depth: usize) -> Shape {
        let kind = json.str_at("/type");
        if flag(json, "x-kubernetes-int-or-string") {
            if !kind.is_empty() {
                let detail = "must be empty if x-kubernetes-int-or-string is true";
                self.problems.invalid(&format!("{path}.type"), kind, detail);
            }
            return Shape::IntOrString;
        }
        let format = json.str_at("/format").to_owned();
        match kind {
            "boolean" => Shape::Boolean,
            "integer" => Shape::Integer { format },
            "number" => Shape::Number,
            "string" => Shape::String { format },
            "array" => self.list(json, path, depth),
            "object" => self.object(json, path, depth),
            "" if flag(json, "x-kubernetes-preserve-unknown-fields") => {
                if json.get("properties").is_some() {
                    self.object(json, path, depth)
                } else {
                    Shape::Any
                }
            }
            "" => {
                let detail = if path.ends_with(".items") {
                    "must not be empty for specified array items"
                } else {
                    "must not be empty for specified object fields"
                };
                if depth > 0 {
                    self.problems.required(&format!("{path}.type"), detail);
                }
                Shape::Any
            }
            other => {
                let kinds = ["array", "boolean", "integer", "number", "object", "string"];
                self.problems.unsupported(&format!("{path}.type"), other, &kinds);
                Shape::Any
            }
        }
    }

    fn object(&mut self, json: &Value, path: &str, depth: usize) -> Shape {
        let properties = json.get("properties").and_then(Value::as_object);
        let values = json.get("additionalProperties").filter(|values| !values.is_null());
        let atomic = match json.str_at("/x-kubernetes-map-type") {
            "" | "granular" => false,
            "atomic" => true,
            other => {
                let path = format!("{path}.x-kubernetes-map-type");
                self.problems.unsupported(&path, other, &["atomic", "granular"]);
                false
            }
        };
        if let Some(values) = values {
            if properties.is_some_and(|properties| !properties.is_empty()) {
                let detail = "additionalProperties and properties are mutual exclusive";
                self.problems.forbidden(&format!("{path}.additionalProperties"), detail);
            }
            let values = match values {
                Value::Bool(true) => Schema::default(),
                Value::Bool(false) => {
                    self.problems.forbidden(&format!("{path}.additionalProperties"), "must not be false");
                    Schema::default()
                }
                values => self.schema(values, &format!("{path}.additionalProperties"), depth + 1),
            };
            let values = Arc::new(values);
            return if atomic { Shape::Object(ObjectShape::atomic_map(values)) } else { Shape::Map(values) };
        }
        let mut object = ObjectShape {
            required: words(json, "required"),
            keep_unknown: flag(json, "x-kubernetes-preserve-unknown-fields"),
            atomic,
            embedded: flag(json, "x-kubernetes-embedded-resource"),
            ..Default::default()
        };
        for (name, property) in properties.into_iter().flatten() {
            let schema = self.schema(property, &format!("{path}.properties[{name}]"), depth + 1);
            object.fields.insert(name.clone(), Arc::new(schema));
        }
        if object.embedded {
            add_identity(&mut object, false);
        }
        Shape::Object(object)
    }

    fn list(&mut self, json: &Value, path: &str, depth: usize) -> Shape {
        let items = match json.get("items").filter(|items| items.is_object()) {
            Some(items) => self.schema(items, &format!("{path}.items"), depth + 1),
            None => {
                self.problems.required(&format!("{path}.items"), "must be specified");
                Schema::default()
            }
        };
        let keys = words(json, "x-kubernetes-list-map-keys");
        let kind = match json.str_at("/x-kubernetes-list-type") {
            "" | "atomic" => ListKind::Atomic,
            "set" => ListKind::Set,
            "map" => {
                self.map_list(&items, &keys, json, path);
                ListKind::Map(keys.clone())
            }
            other => {
                let supported = ["atomic", "map", "set"];
                self.problems.unsupported(&format!("{path}.x-kubernetes-list-type"), other, &supported);
                ListKind::Atomic
            }
        };
        if !keys.is_empty() && !matches!(kind, ListKind::Map(_)) {
            let detail = "must be empty if x-kubernetes-list-type is not map";
            self.problems.forbidden(&format!("{path}.x-kubernetes-list-map-keys"), detail);
        }
        Shape::List { items: Arc::new(items), kind, strategic: None }
    }

    fn map_list(&mut self, items: &Schema, keys: &[String], json: &Value, path: &str) {
        let Shape::Object(object) = &items.shape else {
            let kind = json.str_at("/items/type");
            let detail = "must be object if parent array's x-kubernetes-list-type is map";
            self.problems.invalid(&format!("{path}.items.type"), kind, detail);
            return;
        };
        let at = format!("{path}.x-kubernetes-list-map-keys");
        if keys.is_empty() {
            self.problems.required(&at, "must not be empty if x-kubernetes-list-type is map");
        }
        for (index, key) in keys.iter().enumerate() {
            match object.fields.get(key) {
                None => {
                    let detail = "entries must all be names of item properties";
                    self.problems.invalid(&format!("{at}[{index}]"), key, detail);
                }
                Some(field) => {
                    if !object.required.contains(key) && field.default.is_none() {
                        let detail = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required \
                            property";
                        self.problems.required(&format!("{path}.items.properties[{key}].default"), detail);
                    }
                }
            }
        }
    }

    fn checks(&mut self, json: &Value, path: &str) -> Checks {
        let number = |key: &str| json.get(key).and_then(Value::as_f64);
        let count = |key: &str| json.get(key).and_then(Value::as_u64);
        let pattern = json.get("pattern").and_then(Value::as_str).filter(|pattern| !pattern.is_empty());
        if let Some(error) = pattern.and_then(|pattern| regex::Regex::new(pattern).err()) {
            let detail =
                format!("must be a valid regular expression, but isn't: {}", error.to_string().replace('\n', " "));
            self.problems.invalid(&format!("{path}.pattern"), pattern.unwrap_or(""), &detail);
        }
        let mut logic = Map::new();
        for key in ["allOf", "anyOf", "oneOf", "not"] {
            if let Some(value) = json.get(key).filter(|value| !value.is_null()) {
                match value {
                    Value::Array(all) => {
                        for (index, one) in all.iter().enumerate() {
                            self.logic(
                                one,
                                &format!("{path}.{key}[{index}]"),
                                flag(json, "x-kubernetes-int-or-string"),
                                0,
                            );
                        }
                    }
                    one => self.logic(one, &format!("{path}.{key}"), false, 0),
                }
                logic.insert(key.to_owned(), value.clone());
            }
        }
        Checks {
            minimum: number("minimum"),
            maximum: number("maximum"),
            exclusive_minimum: flag(json, "exclusiveMinimum"),
            exclusive_maximum: flag(json, "exclusiveMaximum"),
            min_length: count("minLength"),
            max_length: count("maxLength"),
            pattern: pattern.map(str::to_owned),
            min_items: count("minItems"),
            max_items: count("maxItems"),
            min_properties: count("minProperties"),
            max_properties: count("maxProperties"),
            unique_items: false,
            multiple_of: number("multipleOf"),
            logic: (!logic.is_empty()).then_some(Value::Object(logic)),
        }
    }

    /// Pieces of `allOf` and the like only check values; they say nothing of structure.
    fn logic(&mut self, json: &Value, path: &str, int_or_string: bool, depth: usize) {
        self.nodes += 1;
        if depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return;
        }
        for key in FORBIDDEN_IN_LOGIC {
            // `anyOf: [{type: integer}, {type: string}]` is how integer-or-string is spelled.
            let spelled = int_or_string && key == "type";
            if json.get(key).is_some_and(|value| !value.is_null() && *value != Value::Bool(false)) && !spelled {
                self.problems.forbidden(&format!("{path}.{key}"), "must be empty to be structural");
            }
        }
        if let Some(error) =
            json.get("pattern").and_then(Value::as_str).and_then(|pattern| regex::Regex::new(pattern).err())
        {
            let detail =
                format!("must be a valid regular expression, but isn't: {}", error.to_string().replace('\n', " "));
            self.problems.invalid(&format!("{path}.pattern"), json.str_at("/pattern"), &detail);
        }
        for (name, property) in json.get("properties").and_then(Value::as_object).into_iter().flatten() {
            self.logic(property, &format!("{path}.properties[{name}]"), false, depth + 1);
        }
        if let Some(items) = json.get("items").filter(|items| items.is_object()) {
            self.logic(items, &format!("{path}.items"), false, depth + 1);
        }
        for key in ["allOf", "anyOf", "oneOf"] {
            for (index, one) in list(json, key).iter().enumerate() {
                self.logic(one, &format!("{path}.{key}[{index}]"), false, depth + 1);
            }
        }
        if let Some(not) = json.get("not").filter(|not| not.is_object()) {
            self.logic(not, &format!("{path}.not"), false, depth + 1);
        }
    }
}
