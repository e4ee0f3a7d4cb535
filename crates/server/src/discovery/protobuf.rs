//! The OpenAPI v2 document as protocol buffers (`openapi.v2.Document` of gnostic's OpenAPIv2.proto), which older clients
//! ask for. What clients read is there: definitions, and paths as far as they carry operations' kinds and parameters.

use serde_json::{Map, Value};

/// Wire types of protocol buffers.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;

/// A message being written.
#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }
    fn tag(&mut self, field: u64, wire: u64) {
        self.varint(field << 3 | wire);
    }
    fn raw(&mut self, field: u64, bytes: &[u8]) {
        self.tag(field, BYTES);
        self.varint(bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
    }
    /// Empty text is the default and not written.
    fn text(&mut self, field: u64, value: Option<&Value>) {
        if let Some(text) = value.and_then(Value::as_str).filter(|t| !t.is_empty()) {
            self.raw(field, text.as_bytes());
        }
    }
    fn texts(&mut self, field: u64, value: Option<&Value>) {
        for text in value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            self.raw(field, text.as_bytes());
        }
    }
    fn flag(&mut self, field: u64, value: Option<&Value>) {
        if value.and_then(Value::as_bool) == Some(true) {
            self.tag(field, VARINT);
            self.varint(1);
        }
    }
    fn integer(&mut self, field: u64, value: Option<&Value>) {
        if let Some(number) = value.and_then(Value::as_u64).filter(|n| *n != 0) {
            self.tag(field, VARINT);
            self.varint(number);
        }
    }
    fn double(&mut self, field: u64, value: Option<&Value>) {
        if let Some(number) = value.and_then(Value::as_f64) {
            self.tag(field, FIXED64);
            self.bytes.extend_from_slice(&number.to_le_bytes());
        }
    }
    fn message(&mut self, field: u64, message: Message) {
        self.raw(field, &message.bytes);
    }
}

/// `Any { string yaml = 2 }`; JSON is YAML.
fn any(value: &Value) -> Message {
    let mut message = Message::default();
    message.raw(2, format!("{value}\n").as_bytes());
    message
}

/// `NamedX { string name = 1; X value = 2 }`
fn named(name: &str, value: Message) -> Message {
    let mut message = Message::default();
    message.raw(1, name.as_bytes());
    message.message(2, value);
    message
}

fn extensions(message: &mut Message, field: u64, object: &Map<String, Value>) {
    for (name, value) in object.iter().filter(|(name, _)| name.starts_with("x-")) {
        message.message(field, named(name, any(value)));
    }
}

fn schema(value: &Value) -> Message {
    let mut message = Message::default();
    let Some(object) = value.as_object() else { return message };
    let get = |name: &str| object.get(name);
    for (field, name) in [(1, "$ref"), (2, "format"), (3, "title"), (4, "description"), (13, "pattern")] {
        message.text(field, get(name));
    }
    if let Some(default) = get("default") {
        message.message(5, any(default));
    }
    for (field, name) in [(6, "multipleOf"), (7, "maximum"), (9, "minimum")] {
        message.double(field, get(name));
    }
    for (field, name) in [(8, "exclusiveMaximum"), (10, "exclusiveMinimum"), (16, "uniqueItems"), (27, "readOnly")] {
        message.flag(field, get(name));
    }
    for (field, name) in [
        (11, "maxLength"),
        (12, "minLength"),
        (14, "maxItems"),
        (15, "minItems"),
        (17, "maxProperties"),
        (18, "minProperties"),
    ] {
        message.integer(field, get(name));
    }
    message.texts(19, get("required"));
    for value in get("enum").and_then(Value::as_array).into_iter().flatten() {
        message.message(20, any(value));
    }
    match get("additionalProperties") {
        Some(Value::Bool(allowed)) => {
            let mut item = Message::default();
            item.tag(2, VARINT);
            item.varint(u64::from(*allowed));
            message.message(21, item);
        }
        Some(values) => {
            let mut item = Message::default();
            item.message(1, schema(values));
            message.message(21, item);
        }
        None => {}
    }
    let mut kinds = Message::default();
    match get("type") {
        Some(Value::String(kind)) => kinds.raw(1, kind.as_bytes()),
        list => kinds.texts(1, list),
    }
    if !kinds.bytes.is_empty() {
        message.message(22, kinds);
    }
    if let Some(items) = get("items") {
        let mut item = Message::default();
        item.message(1, schema(items));
        message.message(23, item);
    }
    for part in get("allOf").and_then(Value::as_array).into_iter().flatten() {
        message.message(24, schema(part));
    }
    if let Some(Value::Object(fields)) = get("properties") {
        let mut properties = Message::default();
        for (name, value) in fields {
            properties.message(1, named(name, schema(value)));
        }
        message.message(25, properties);
    }
    extensions(&mut message, 31, object);
    message
}

/// The document.
pub fn document(value: &Value) -> Vec<u8> {
    let mut message = Message::default();
    message.text(1, value.get("swagger"));
    let mut info = Message::default();
    info.text(1, value.pointer("/info/title"));
    info.text(2, value.pointer("/info/version"));
    message.message(2, info);
    message.message(8, paths(value.get("paths")));
    let mut definitions = Message::default();
    for (name, value) in value.get("definitions").and_then(Value::as_object).into_iter().flatten() {
        definitions.message(1, named(name, schema(value)));
    }
    message.message(9, definitions);
    message.bytes
}

/// `Paths { NamedAny vendor_extension = 1; NamedPathItem path = 2 }`
fn paths(value: Option<&Value>) -> Message {
    let mut message = Message::default();
    for (name, item) in value.and_then(Value::as_object).into_iter().flatten() {
        let mut path = Message::default();
        for (field, verb) in
            [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (6, "options"), (7, "head"), (8, "patch")]
        {
            if let Some(Value::Object(operation_value)) = item.get(verb) {
                path.message(field, operation(operation_value));
            }
        }
        message.message(2, named(name, path));
    }
    message
}

/// `Operation { summary = 2, description = 3, operation_id = 5, consumes = 7, parameters = 8, vendor_extension = 13 }`
fn operation(value: &Map<String, Value>) -> Message {
    let mut message = Message::default();
    message.text(3, value.get("description"));
    message.text(5, value.get("operationId"));
    message.texts(6, value.get("produces"));
    message.texts(7, value.get("consumes"));
    for parameter in value.get("parameters").and_then(Value::as_array).into_iter().flatten() {
        if let Some(item) = query_parameter(parameter) {
            message.message(8, item);
        }
    }
    extensions(&mut message, 13, value);
    message
}

/// `ParametersItem { Parameter parameter = 1 }`, `Parameter { NonBodyParameter = 2 }`, `NonBodyParameter {
/// QueryParameterSubSchema = 3 }`, `QueryParameterSubSchema { in = 2, description = 3, name = 4, type = 6 }`
fn query_parameter(value: &Value) -> Option<Message> {
    if value.get("in").and_then(Value::as_str) != Some("query") {
        return None;
    }
    let mut query = Message::default();
    query.text(2, value.get("in"));
    query.text(3, value.get("description"));
    query.text(4, value.get("name"));
    query.text(6, value.get("type"));
    let wrap = |field: u64, inner: Message| {
        let mut outer = Message::default();
        outer.message(field, inner);
        outer
    };
    Some(wrap(1, wrap(2, wrap(3, query))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bytes_on_the_wire() {
        let value = json!({"swagger": "2.0", "info": {"title": "K", "version": "v1"}, "paths": {},
                           "definitions": {"A": {"type": "object", "x-a": [1]}}});
        let expected: Vec<u8> = [
            b"\x0a\x032.0".as_slice(),
            b"\x12\x07\x0a\x01K\x12\x02v1",
            b"\x42\x00",
            // definitions: one NamedSchema "A" with its type and its extension
            b"\x4a\x22\x0a\x20\x0a\x01A\x12\x1b\xb2\x01\x08\x0a\x06object\xfa\x01\x0d\x0a\x03x-a\x12\x06\x12\x04[1]\n",
        ]
        .concat();
        assert_eq!(document(&value), expected);
    }
}
