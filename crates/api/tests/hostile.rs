//! Objects of every kind, half of them shaped by the schema and half by chance, through everything the server does with
//! an object before it stores it. Nothing may panic, whatever a client sends; and what is done twice must be the same as
//! what is done once.

use api::kind::Kind;
use api::schema::{Schema, Shape, Types, strict};
use api::{crd, kinds, table};
use serde_json::{Map, Value, json};

/// A small generator of repeatable chance (xorshift).
struct Chance(u64);

impl Chance {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn word(&mut self) -> String {
        const WORDS: [&str; 24] = [
            "",
            "a",
            "web",
            "TCP",
            "Always",
            "1Gi",
            "-5",
            "100m",
            "25%",
            "None",
            "10.43.0.1",
            "RollingUpdate",
            "Recreate",
            "/etc/../x",
            "..",
            "metadata.name",
            "2020-01-01T00:00:00Z",
            "eA==",
            "*.example.com",
            "é\u{0}\n",
            "In",
            "Exists",
            "NoExecute",
            "ClientIP",
        ];
        WORDS[self.next(WORDS.len() as u64) as usize].to_owned()
    }

    fn anything(&mut self, depth: usize) -> Value {
        match self.next(if depth == 0 { 5 } else { 7 }) {
            0 => Value::Null,
            1 => (self.next(2) == 0).into(),
            2 => json!(self.next(1 << 40) as i64 - (1 << 39)),
            3 => json!(self.next(1000) as f64 / 7.0),
            4 => self.word().into(),
            5 => (0..self.next(3)).map(|_| self.anything(depth - 1)).collect(),
            _ => (0..self.next(3)).map(|_| (self.word(), self.anything(depth - 1))).collect::<Map<_, _>>().into(),
        }
    }

    /// A value of the schema, now and then something else.
    fn value(&mut self, schema: &Schema, types: &Types, depth: usize) -> Value {
        if self.next(25) == 0 || depth == 0 {
            return self.anything(2);
        }
        match &types.resolve(schema).shape {
            Shape::Any | Shape::Ref(_) => self.anything(2),
            Shape::Boolean => (self.next(2) == 0).into(),
            Shape::Integer { .. } | Shape::Number => json!(self.next(70_000) as i64 - 10),
            Shape::String { .. } | Shape::Quantity | Shape::IntOrString => self.word().into(),
            Shape::Map(values) => (0..self.next(3))
                .map(|_| (self.word(), self.value(values, types, depth - 1)))
                .collect::<Map<_, _>>()
                .into(),
            Shape::List { items, .. } => (0..self.next(3)).map(|_| self.value(items, types, depth - 1)).collect(),
            Shape::Object(object) => {
                let mut fields = Map::new();
                for (name, field) in &object.fields {
                    let often = matches!(name.as_str(), "spec" | "metadata" | "template" | "containers" | "domain");
                    if often || self.next(3) == 0 {
                        fields.insert(name.clone(), self.value(field, types, depth - 1));
                    }
                }
                if self.next(10) == 0 {
                    fields.insert(self.word(), self.anything(1));
                }
                fields.into()
            }
        }
    }
}

fn through_everything(kind: &Kind, object: &Value, old: &Value) {
    let (schema, types) = (&kind.schema, &kind.types);
    let report = strict::check(schema, types, object);
    let _ = (report.warnings(), report.strict_error(&[]));
    let refused = !object.is_object() || !report.type_errors.is_empty();
    let mut object = object.clone();
    strict::prune(schema, types, &mut object);
    assert!(strict::check(schema, types, &object).unknown_fields.is_empty(), "{}: {object}", kind.kind);
    if let Some(prepare) = kind.hooks.prepare_create {
        prepare(&mut object);
    }
    let fill = |object: &mut Value| {
        strict::apply_defaults(schema, types, object);
        if let Some(default) = kind.hooks.default {
            default(object);
        }
    };
    fill(&mut object);
    let once = object.clone();
    fill(&mut object);
    // Objects with wrong types are refused before they get here; for them it is enough not to panic.
    assert!(once == object || refused, "{}: defaults are not idempotent: {once}", kind.kind);
    strict::validate_values(schema, types, &object);
    if let Some(validate) = kind.hooks.validate {
        assert!(validate(&object, None).len() <= 200);
        validate(&object, Some(old));
        validate(&Value::Null, Some(&object));
    }
    if let Some(warnings) = kind.hooks.warnings {
        warnings(&object);
    }
    assert_eq!(table::cells(kind, &object, 0).len(), kind.columns.len());
}

#[test]
fn nothing_a_client_sends_panics() {
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    for kind in kinds::builtin() {
        let mut old = json!({});
        for _ in 0..150 {
            let object = chance.value(&kind.schema, &kind.types, 12);
            through_everything(&kind, &object, &old);
            old = object;
        }
        for _ in 0..50 {
            let object = chance.anything(4);
            through_everything(&kind, &object, &old);
        }
    }
}

/// Definitions by chance; what is accepted must then work as a kind.
#[test]
fn no_definition_panics_and_what_is_taken_works() {
    let mut chance = Chance(0x2545_f491_4f6c_dd1d);
    let mut taken = 0;
    for _ in 0..600 {
        let schema = schema(&mut chance, 4);
        let definition = json!({"metadata": {"name": "foos.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "foos", "kind": "Foo"}, "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": schema}, "subresources": chance.anything(3)}]}});
        crd::warnings(&definition);
        for kind in crd::parse(&definition).unwrap_or_default() {
            taken += 1;
            for _ in 0..5 {
                let object = chance.value(&kind.schema, &kind.types, 6);
                through_everything(&kind, &object, &json!({}));
            }
            assert!(api::openapi::v3("example.com", "v1", [&kind]).is_some());
            api::openapi::v2([&kind]);
        }
    }
    assert!(taken > 50, "{taken}");
}

fn schema(chance: &mut Chance, depth: usize) -> Value {
    let mut out = Map::new();
    let kinds = ["object", "object", "array", "string", "integer", "boolean", "number"];
    let kind = if depth == 4 { "object" } else { kinds[chance.next(kinds.len() as u64) as usize] };
    out.insert("type".into(), kind.into());
    match kind {
        "object" if depth > 0 => {
            let fields = (0..chance.next(4)).map(|index| (format!("f{index}"), schema(chance, depth - 1)));
            out.insert("properties".into(), fields.collect::<Map<_, _>>().into());
        }
        "array" => drop(out.insert("items".into(), schema(chance, depth.saturating_sub(1)))),
        _ => {}
    }
    if chance.next(6) == 0 {
        const KEYS: [&str; 16] = [
            "default",
            "enum",
            "pattern",
            "minimum",
            "maxLength",
            "nullable",
            "x-kubernetes-list-type",
            "anyOf",
            "not",
            "x-kubernetes-preserve-unknown-fields",
            "x-kubernetes-embedded-resource",
            "required",
            "multipleOf",
            "format",
            "x-kubernetes-int-or-string",
            "additionalProperties",
        ];
        let key = KEYS[chance.next(KEYS.len() as u64) as usize];
        out.insert(key.into(), chance.anything(2));
    }
    out.into()
}
