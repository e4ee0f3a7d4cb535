//! Bodies of requests: bounded in size and depth, JSON or YAML, with duplicate keys noticed.

use super::{BODY_LIMIT, Incoming};
use api::status::{Reason, Status, StatusResult};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;
use std::fmt;

/// A body has this long to come.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);
/// Deeper than any object is.
const DEPTH: usize = 100;
/// Duplicates told of, at most.
const DUPLICATES: usize = 32;

/// A decoded body.
#[derive(Debug)]
pub struct Decoded {
    pub value: Value,
    /// Paths of keys that stood more than once (the last one counts).
    pub duplicates: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
    Protobuf,
}

/// The format of a body by its content type; JSON when there is none.
pub fn format_of(content_type: &str) -> StatusResult<Format> {
    let media = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    match media.as_str() {
        "" | "application/json" => Ok(Format::Json),
        "application/yaml" | "application/x-yaml" | "text/yaml" => Ok(Format::Yaml),
        super::wire::MEDIA => Ok(Format::Protobuf),
        _ => Err(Status::new(
            Reason::UnsupportedMediaType,
            format!(
                "the body of the request was in an unknown format ({media}) - accepted media types include: \
                 application/json, application/yaml, application/vnd.kubernetes.protobuf"
            ),
        )),
    }
}

/// A body over the limit is read on and thrown away up to this much, so that its sender hears why it is refused instead
/// of finding the connection cut.
const DRAIN_LIMIT: usize = 4 * BODY_LIMIT;

/// The whole body, refused when it is over the limit.
pub async fn read(mut body: Incoming) -> StatusResult<Bytes> {
    let late = || Status::new(Reason::Timeout, "the body of the request did not come in time");
    tokio::time::timeout(PATIENCE, collect(&mut body)).await.map_err(|_| late())?
}

async fn collect(body: &mut Incoming) -> StatusResult<Bytes> {
    let (mut whole, mut length) = (Vec::new(), 0usize);
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| Status::bad_request(format!("the body of the request could not be read: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        length = length.saturating_add(data.len());
        if length <= BODY_LIMIT {
            whole.extend_from_slice(&data);
        } else if length > DRAIN_LIMIT {
            break;
        }
    }
    if length > BODY_LIMIT {
        let message = format!("Request entity too large: limit is {BODY_LIMIT}");
        return Err(Status::new(Reason::RequestEntityTooLarge, message));
    }
    Ok(whole.into())
}

pub fn decode(bytes: &[u8], format: Format) -> StatusResult<Decoded> {
    let notes = RefCell::new(Notes::default());
    let node = Node { notes: &notes, depth: 0 };
    let value = match format {
        Format::Protobuf => return super::wire::decode(bytes),
        Format::Json => {
            let mut deserializer = serde_json::Deserializer::from_slice(bytes);
            node.deserialize(&mut deserializer)
                .and_then(|value| deserializer.end().map(|()| value))
                .map_err(|e| Status::bad_request(format!("the body of the request is not valid JSON: {e}")))?
        }
        Format::Yaml => {
            let text = std::str::from_utf8(bytes)
                .map_err(|_| Status::bad_request("the body of the request is not UTF-8 text"))?;
            serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(), |deserializer| {
                node.deserialize(deserializer)
            })
            .map_err(|e| Status::bad_request(format!("the body of the request is not valid YAML: {e}")))?
        }
    };
    Ok(Decoded { value, duplicates: notes.into_inner().duplicates })
}

fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
        with_snippet: false,
    }
}

#[derive(Default)]
struct Notes {
    path: Vec<Segment>,
    duplicates: Vec<String>,
}

enum Segment {
    Key(String),
    Index(usize),
}

impl Notes {
    fn duplicate(&mut self, key: &str) {
        if self.duplicates.len() >= DUPLICATES {
            return;
        }
        let mut text = String::new();
        for segment in &self.path {
            match segment {
                Segment::Key(key) if text.is_empty() => text.push_str(key),
                Segment::Key(key) => {
                    text.push('.');
                    text.push_str(key);
                }
                Segment::Index(index) => text.push_str(&format!("[{index}]")),
            }
        }
        let path = if text.is_empty() { key.to_owned() } else { format!("{text}.{key}") };
        if !self.duplicates.contains(&path) {
            self.duplicates.push(path);
        }
    }
}

#[derive(Clone, Copy)]
struct Node<'a> {
    notes: &'a RefCell<Notes>,
    depth: usize,
}

impl<'a> Node<'a> {
    fn below<E: Error>(self) -> Result<Self, E> {
        if self.depth >= DEPTH {
            return Err(E::custom(format!("nested deeper than {DEPTH} levels")));
        }
        Ok(Node { notes: self.notes, depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a finite number"))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut list = Vec::new();
        loop {
            self.notes.borrow_mut().path.push(Segment::Index(list.len()));
            let item = seq.next_element_seed(below)?;
            self.notes.borrow_mut().path.pop();
            match item {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                self.notes.borrow_mut().duplicate(&key);
            }
            self.notes.borrow_mut().path.push(Segment::Key(key));
            let value = map.next_value_seed(below)?;
            if let Some(Segment::Key(key)) = self.notes.borrow_mut().path.pop() {
                object.insert(key, value);
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn duplicates_are_told_with_their_path() {
        let text = br#"{"a":1,"spec":{"list":[{"x":1},{"x":1,"x":2}],"y":1,"y":2},"a":3}"#;
        let decoded = decode(text, Format::Json).unwrap();
        assert_eq!(decoded.duplicates, ["spec.list[1].x", "spec.y", "a"]);
        assert_eq!(decoded.value, json!({"a": 3, "spec": {"list": [{"x": 1}, {"x": 2}], "y": 2}}));
    }

    #[test]
    fn yaml_is_read_and_its_duplicates_too() {
        let decoded = decode(b"a: 1\nb:\n  c: x\n  c: [true, null, 1.5, \"1\"]\n", Format::Yaml).unwrap();
        assert_eq!(decoded.value, json!({"a": 1, "b": {"c": [true, null, 1.5, "1"]}}));
        assert_eq!(decoded.duplicates, ["b.c"]);
    }

    #[test]
    fn hostile_bodies_are_refused() {
        let deep = "[".repeat(5000);
        assert_eq!(decode(deep.as_bytes(), Format::Json).unwrap_err().code(), 400);
        assert_eq!(decode(deep.as_bytes(), Format::Yaml).unwrap_err().code(), 400);
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for n in 1..12 {
            let before = format!("*a{}", n - 1);
            bomb.push_str(&format!("a{n}: &a{n} [{}]\n", vec![before; 10].join(",")));
        }
        assert_eq!(decode(bomb.as_bytes(), Format::Yaml).unwrap_err().code(), 400);
        assert!(decode(b"{} {}", Format::Json).is_err());
        assert!(decode(b"\xff", Format::Yaml).is_err());
        assert_eq!(format_of("application/cbor").unwrap_err().code(), 415);
    }

    proptest! {
        #[test]
        fn agrees_with_serde_json(text in "[\\[\\]{}:,\"a-c0-9. ]{0,40}") {
            let ours = decode(text.as_bytes(), Format::Json).map(|d| d.value).ok();
            let theirs: Option<Value> = serde_json::from_str(&text).ok();
            prop_assert_eq!(ours, theirs);
        }
        #[test]
        fn foreign_yaml_never_panics(text in "\\PC{0,60}") {
            let _ = decode(text.as_bytes(), Format::Yaml);
        }
    }
}
