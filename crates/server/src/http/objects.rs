//! Objects and lists in the form the client wants.

use super::negotiate::{Accepted, Form};
use super::{Response, respond};
use crate::rest::ListAnswer;
use api::kind::Kind;
use api::object::{Meta, Object};
use api::status::{Status, StatusResult};
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

/// What a `Table` carries of each object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Include {
    None,
    #[default]
    Metadata,
    Object,
}

impl Include {
    pub fn parse(text: &str) -> StatusResult<Self> {
        match text {
            "" | "Metadata" => Ok(Include::Metadata),
            "None" => Ok(Include::None),
            "Object" => Ok(Include::Object),
            other => Err(Status::bad_request(format!(
                "includeObject: Unsupported value: \"{other}\": supported values: \"None\", \"Metadata\", \"Object\""
            ))),
        }
    }
}

/// `PartialObjectMetadata` of `object`.
pub fn metadata_only(object: &Object, version: &str) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": version,
           "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({}))})
}

/// A `Table` of `objects`. `list` becomes its metadata; `headers` = with column definitions.
pub fn table<'a>(
    kind: &Kind,
    objects: impl Iterator<Item = &'a Object>,
    version: &str,
    include: Include,
    list: Value,
    headers: bool,
) -> Value {
    let now = api::time::now();
    let rows: Vec<Value> = objects
        .map(|object| {
            let cells = api::table::cells(kind, object, now);
            let mut row = json!({"cells": cells});
            let shown = match include {
                Include::None => None,
                Include::Metadata => Some(metadata_only(object, version)),
                Include::Object => Some(object.clone()),
            };
            if let (Some(shown), Some(fields)) = (shown, row.as_object_mut()) {
                fields.insert("object".into(), shown);
            }
            row
        })
        .collect();
    let columns = if headers { api::table::columns(kind) } else { Value::Null };
    json!({"kind": "Table", "apiVersion": version, "metadata": list, "columnDefinitions": columns, "rows": rows})
}

fn to_bytes(value: &Value, pretty: bool) -> StatusResult<Bytes> {
    let bytes = if pretty {
        serde_json::to_vec_pretty(value).map(|mut bytes| {
            bytes.push(b'\n');
            bytes
        })
    } else {
        serde_json::to_vec(value)
    };
    bytes.map(Bytes::from).map_err(Status::internal)
}

fn content_type(accepted: Accepted) -> &'static str {
    // Every JSON document is a YAML document.
    if accepted.yaml { "application/yaml" } else { "application/json" }
}

/// One object.
pub fn object(
    kind: &Kind,
    object: &Object,
    accepted: Accepted,
    include: Include,
    code: StatusCode,
) -> StatusResult<Response> {
    let version = accepted.form.meta_version();
    let body = match accepted.form {
        Form::Full => to_bytes(object, accepted.pretty)?,
        Form::Metadata { .. } => to_bytes(&metadata_only(object, version), accepted.pretty)?,
        Form::Table { .. } => {
            let list = json!({"resourceVersion": object.resource_version()});
            to_bytes(&table(kind, std::iter::once(object), version, include, list, true), accepted.pretty)?
        }
    };
    Ok(respond::bytes(code, content_type(accepted), body))
}

/// A list.
pub fn list(
    kind: &Kind,
    answer: &ListAnswer,
    accepted: Accepted,
    include: Include,
    gzip: bool,
) -> StatusResult<Response> {
    let mut metadata = json!({"resourceVersion": answer.revision.to_string()});
    if let Some(fields) = metadata.as_object_mut() {
        if !answer.continue_token.is_empty() {
            fields.insert("continue".into(), answer.continue_token.as_str().into());
        }
        if let Some(remaining) = answer.remaining {
            fields.insert("remainingItemCount".into(), remaining.into());
        }
    }
    let version = accepted.form.meta_version();
    let body = match accepted.form {
        Form::Full if !accepted.pretty => plain_list(kind, &answer.items, &metadata)?,
        Form::Full => to_bytes(
            &json!({"kind": kind.list_kind, "apiVersion": kind.resource.api_version(), "metadata": metadata,
                    "items": answer.items}),
            true,
        )?,
        Form::Metadata { .. } => {
            let items: Vec<Value> = answer.items.iter().map(|o| metadata_only(o, version)).collect();
            to_bytes(
                &json!({"kind": "PartialObjectMetadataList", "apiVersion": version, "metadata": metadata,
                        "items": items}),
                accepted.pretty,
            )?
        }
        Form::Table { .. } => {
            to_bytes(&table(kind, answer.items.iter(), version, include, metadata, true), accepted.pretty)?
        }
    };
    Ok(respond::compressed(content_type(accepted), body, gzip))
}

/// Written straight to bytes: lists are the largest answers.
fn plain_list(kind: &Kind, items: &[Object], metadata: &Value) -> StatusResult<Bytes> {
    let mut out = Vec::with_capacity(256 + items.len() * 1024);
    let text = |value: &str| Value::from(value).to_string();
    out.extend_from_slice(
        format!(
            "{{\"kind\":{},\"apiVersion\":{},\"metadata\":{metadata},\"items\":[",
            text(&kind.list_kind),
            text(&kind.resource.api_version())
        )
        .as_bytes(),
    );
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        serde_json::to_writer(&mut out, item).map_err(Status::internal)?;
    }
    out.extend_from_slice(b"]}");
    Ok(out.into())
}
