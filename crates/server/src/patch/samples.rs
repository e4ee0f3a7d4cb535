//! A small Deployment-like schema for the tests of this module and its neighbours.

use api::schema::{ListKind, ObjectShape, Schema, Shape, Strategic, Types};
use serde_json::{Value, json};
use std::sync::Arc;

pub fn no_types() -> Types {
    Types::default()
}

fn schema(shape: Shape) -> Arc<Schema> {
    Arc::new(Schema { shape, ..Schema::default() })
}

fn text() -> Arc<Schema> {
    schema(Shape::String { format: String::new() })
}

fn defaulted(shape: Shape, default: Value) -> Arc<Schema> {
    Arc::new(Schema { shape, default: Some(default), ..Schema::default() })
}

fn integer() -> Arc<Schema> {
    schema(Shape::Integer { format: "int32".into() })
}

fn object(fields: Vec<(&str, Arc<Schema>)>) -> Arc<Schema> {
    schema(Shape::Object(object_shape(fields)))
}

fn object_shape(fields: Vec<(&str, Arc<Schema>)>) -> ObjectShape {
    ObjectShape {
        fields: fields.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect(),
        ..ObjectShape::default()
    }
}

fn list(items: Arc<Schema>, kind: ListKind, merge_key: Option<Option<&str>>) -> Arc<Schema> {
    let strategic = merge_key.map(|key| Strategic { key: key.map(str::to_owned) });
    schema(Shape::List { items, kind, strategic })
}

fn by(keys: &[&str]) -> ListKind {
    ListKind::Map(keys.iter().map(|key| (*key).to_owned()).collect())
}

pub fn deployment_schema() -> Schema {
    let port = object(vec![
        ("containerPort", integer()),
        ("protocol", defaulted(Shape::String { format: String::new() }, json!("TCP"))),
        ("name", text()),
    ]);
    let env = object(vec![("name", text()), ("value", text())]);
    let container = object(vec![
        ("name", text()),
        ("image", text()),
        ("command", list(text(), ListKind::Atomic, None)),
        ("env", list(env, by(&["name"]), Some(Some("name")))),
        ("ports", list(port, by(&["containerPort", "protocol"]), Some(Some("containerPort")))),
        ("resources", object(vec![("limits", schema(Shape::Map(schema(Shape::Quantity))))])),
    ]);
    let pod = object(vec![
        ("containers", list(container, by(&["name"]), Some(Some("name")))),
        ("nodeName", text()),
        ("extra", schema(Shape::Any)),
    ]);
    let metadata = object(vec![
        ("name", text()),
        ("namespace", text()),
        ("uid", text()),
        ("resourceVersion", text()),
        ("creationTimestamp", text()),
        ("managedFields", list(schema(Shape::Any), ListKind::Atomic, None)),
        ("labels", schema(Shape::Map(text()))),
        ("annotations", schema(Shape::Map(text()))),
        ("finalizers", list(text(), ListKind::Set, Some(None))),
    ]);
    let selector = schema(Shape::Object(ObjectShape {
        atomic: true,
        ..object_shape(vec![("matchLabels", schema(Shape::Map(text())))])
    }));
    let strategy = schema(Shape::Object(ObjectShape {
        retain_keys: true,
        ..object_shape(vec![
            ("type", text()),
            ("rollingUpdate", object(vec![("maxSurge", schema(Shape::IntOrString))])),
        ])
    }));
    let spec = object(vec![
        ("replicas", integer()),
        ("paused", schema(Shape::Boolean)),
        ("selector", selector),
        ("strategy", strategy),
        ("template", object(vec![("metadata", metadata.clone()), ("spec", pod)])),
    ]);
    let status = object(vec![("replicas", integer())]);
    Schema {
        shape: Shape::Object(object_shape(vec![
            ("apiVersion", text()),
            ("kind", text()),
            ("metadata", metadata),
            ("spec", spec),
            ("status", status),
        ])),
        ..Schema::default()
    }
}
