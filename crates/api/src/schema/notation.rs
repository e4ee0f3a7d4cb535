//! A compact notation for the types of kinds that are not Kubernetes' own:
//!
//! ```text
//! prefix io.kubevirt.v1                       names below are in here
//! kind VirtualMachine: what it is             a type with apiVersion, kind and metadata
//! type Disk: what it is
//!   name! string minlen:1 -- what it holds    `!` = required
//!   bus string enum:virtio|sata ="virtio"     default as JSON without blanks
//!   ports [Port]name                          a list told apart by `name`; `[T]set`, `[T]` = atomic
//!   labels {string}                           a map
//!   probe core.Probe                          core. = Kubernetes' core v1, meta. = its meta v1
//! ```
//!
//! Other attributes: `min: max: minlen: maxlen: minitems: maxitems: pattern:`. The files are part of the program, so a
//! mistake in them is a failing test, never an error at run time: what cannot be read is left out.

use super::{Checks, ListKind, ObjectShape, Schema, Shape, Types, builtin};
use serde_json::Value;
use std::sync::Arc;

pub const SOURCES: &[&str] = &[
    include_str!("kubevirt.types"),
    include_str!("snapshot.types"),
    include_str!("knative.types"),
    include_str!("gateway.types"),
    include_str!("policy.types"),
    include_str!("network.types"),
    include_str!("functions.types"),
    include_str!("eventing.types"),
    include_str!("egress.types"),
    include_str!("subnet.types"),
];

/// Adds the types that `source` describes.
pub fn read(source: &str, types: &mut Types) {
    let mut prefix = "";
    let mut open: Option<(String, Schema)> = None;
    for line in source.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        if line.starts_with(' ') {
            if let Some((_, Schema { shape: Shape::Object(object), .. })) = &mut open {
                field(line.trim(), prefix, object);
            }
            continue;
        }
        if let Some((name, schema)) = open.take() {
            types.by_name.insert(name.into(), Arc::new(schema));
        }
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "prefix" {
            prefix = rest;
            continue;
        }
        let (name, description) = rest.split_once(':').unwrap_or((rest, ""));
        let mut object = ObjectShape::default();
        if word == "kind" {
            kind_fields(&mut object);
        }
        let schema =
            Schema { description: description.trim().to_owned(), shape: Shape::Object(object), ..Default::default() };
        open = Some((format!("{prefix}.{name}"), schema));
    }
    if let Some((name, schema)) = open {
        types.by_name.insert(name.into(), Arc::new(schema));
    }
}

fn kind_fields(object: &mut ObjectShape) {
    let add = |object: &mut ObjectShape, name: &str, shape: Shape, description: &str| {
        let schema = Schema { description: description.to_owned(), shape, ..Default::default() };
        object.fields.insert(name.to_owned(), Arc::new(schema));
    };
    let text = || Shape::String { format: String::new() };
    add(object, "apiVersion", text(), "Version of this representation of the object, group/version.");
    add(object, "kind", text(), "What this object is, in CamelCase.");
    add(object, "metadata", Shape::Ref(builtin::OBJECT_META.into()), "Standard object's metadata.");
}

fn field(line: &str, prefix: &str, object: &mut ObjectShape) {
    let (left, description) = line.split_once(" -- ").unwrap_or((line, ""));
    let mut words = left.split_whitespace();
    let (Some(name), Some(kind)) = (words.next(), words.next()) else { return };
    let bare = name.trim_end_matches('!');
    if bare.len() < name.len() {
        object.required.push(bare.to_owned());
    }
    let mut schema = Schema { description: description.to_owned(), shape: shape(kind, prefix), ..Default::default() };
    for word in words {
        attribute(word, &mut schema);
    }
    object.fields.insert(bare.to_owned(), Arc::new(schema));
}

fn attribute(word: &str, schema: &mut Schema) {
    if let Some(json) = word.strip_prefix('=') {
        schema.default = serde_json::from_str(json).ok();
        return;
    }
    let Some((name, value)) = word.split_once(':') else { return };
    let checks: &mut Checks = &mut schema.checks;
    match name {
        "enum" => schema.one_of = value.split('|').map(Value::from).collect(),
        "min" => checks.minimum = value.parse().ok(),
        "max" => checks.maximum = value.parse().ok(),
        "minlen" => checks.min_length = value.parse().ok(),
        "maxlen" => checks.max_length = value.parse().ok(),
        "minitems" => checks.min_items = value.parse().ok(),
        "maxitems" => checks.max_items = value.parse().ok(),
        "pattern" => checks.pattern = Some(value.to_owned()),
        _ => {}
    }
}

fn shape(kind: &str, prefix: &str) -> Shape {
    let items = |kind: &str| Arc::new(Schema { shape: shape(kind, prefix), ..Default::default() });
    if let Some(inner) = kind.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
        return Shape::Map(items(inner));
    }
    if let Some((inner, list)) = kind.strip_prefix('[').and_then(|rest| rest.rsplit_once(']')) {
        let list = match list {
            "" => ListKind::Atomic,
            "set" => ListKind::Set,
            keys => ListKind::Map(keys.split(',').map(str::to_owned).collect()),
        };
        return Shape::List { items: items(inner), kind: list, strategic: None };
    }
    let text = |format: &str| Shape::String { format: format.to_owned() };
    match kind {
        "string" => text(""),
        "time" => text("date-time"),
        "bytes" => text("byte"),
        "bool" => Shape::Boolean,
        "int" => Shape::Integer { format: String::new() },
        "int32" | "int64" => Shape::Integer { format: kind.to_owned() },
        "number" => Shape::Number,
        "any" => Shape::Any,
        "object" => Shape::Object(ObjectShape { keep_unknown: true, ..Default::default() }),
        "quantity" => Shape::Quantity,
        "intorstring" => Shape::IntOrString,
        _ => Shape::Ref(match kind.split_once('.') {
            Some(("core", name)) => format!("io.k8s.api.core.v1.{name}").into(),
            Some(("meta", name)) => format!("{}.{name}", builtin::META).into(),
            Some(_) => kind.into(),
            None => format!("{prefix}.{kind}").into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The leniency above must not hide mistakes in the files.
    #[test]
    fn every_line_of_the_files_is_understood() {
        for source in SOURCES {
            for line in source.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
                if !line.starts_with(' ') {
                    assert!(["prefix ", "kind ", "type "].iter().any(|word| line.starts_with(word)), "{line}");
                    continue;
                }
                let (left, description) = line.split_once(" -- ").unwrap_or_else(|| panic!("no description: {line}"));
                assert!(line.starts_with("  ") && !description.is_empty(), "{line}");
                let words: Vec<&str> = left.split_whitespace().collect();
                assert!(words.len() >= 2, "{line}");
                for word in &words[2..] {
                    let mut schema = Schema::default();
                    attribute(word, &mut schema);
                    let set = schema.default.is_some()
                        || !schema.one_of.is_empty()
                        || format!("{:?}", schema.checks) != format!("{:?}", Checks::default());
                    assert!(set, "{word} in {line}");
                }
            }
        }
    }

    #[test]
    fn reads_what_it_is_told() {
        let mut types = Types::default();
        read(
            "prefix a.v1\nkind K: Text: more.\n  x! [T]name minitems:1 -- many\ntype T: t\n  name string =\"n\" enum:n|m -- its name\n",
            &mut types,
        );
        let Shape::Object(kind) = &types.by_name["a.v1.K"].shape else { panic!() };
        assert_eq!(
            (kind.required.as_slice(), types.by_name["a.v1.K"].description.as_str()),
            (["x".to_owned()].as_slice(), "Text: more.")
        );
        assert!(kind.fields.contains_key("metadata"));
        assert!(matches!(&kind.fields["x"].shape, Shape::List { kind: ListKind::Map(keys), .. } if keys == &["name"]));
        let Shape::Object(t) = &types.by_name["a.v1.T"].shape else { panic!() };
        assert_eq!(t.fields["name"].default, Some("n".into()));
        assert_eq!(t.fields["name"].one_of.len(), 2);
    }
}
