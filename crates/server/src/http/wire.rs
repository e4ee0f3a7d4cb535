//! Bodies in protocol buffers: what typed clients (`kubectl create`) send for built-in kinds, whether they are asked to
//! or not. They are turned into the JSON the same client would have sent; nothing is ever answered in this form.
//!
//! The envelope is `k8s\0` and a `runtime.Unknown`
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding>); field numbers are in `wire.types`.

use super::decode::Decoded;
use api::status::{Status, StatusResult};
use base64::Engine as _;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::LazyLock;

pub const MEDIA: &str = "application/vnd.kubernetes.protobuf";
const MAGIC: &[u8] = b"k8s\0";
const DEPTH: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Text,
    Bytes,
    Bool,
    Integer,
    Double,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// A message whose field 1 is JSON text.
    Json,
    /// A message whose field 1 is a list of texts (`ExtraValue`).
    List,
    Message(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    One,
    Repeated,
    Map,
    /// Its fields stand in the message around it.
    Inline,
}

#[derive(Clone, Copy, Debug)]
struct Field {
    name: &'static str,
    kind: Type,
    shape: Shape,
}

type Message = HashMap<u64, Field>;

static MESSAGES: LazyLock<HashMap<&'static str, Message>> = LazyLock::new(|| {
    let mut messages = HashMap::new();
    for line in include_str!("wire.types").lines().filter(|line| !line.starts_with('#')) {
        let mut parts = line.split(' ');
        let Some(name) = parts.next() else { continue };
        messages.insert(name, parts.filter_map(field).collect());
    }
    messages
});

fn field(text: &'static str) -> Option<(u64, Field)> {
    let mut parts = text.splitn(3, ':');
    let (number, name, kind) = (parts.next()?.parse().ok()?, parts.next()?, parts.next()?);
    let (shape, kind) = match kind.as_bytes().first()? {
        b'*' => (Shape::Repeated, kind.get(1..)?),
        b'%' => (Shape::Map, kind.get(1..)?),
        b'&' => (Shape::Inline, kind.get(1..)?),
        _ => (Shape::One, kind),
    };
    let kind = match kind {
        "s" => Type::Text,
        "bytes" => Type::Bytes,
        "bool" => Type::Bool,
        "int" => Type::Integer,
        "double" => Type::Double,
        "time" => Type::Time,
        "microtime" => Type::MicroTime,
        "quantity" => Type::Quantity,
        "intorstring" => Type::IntOrString,
        "json" => Type::Json,
        "list" => Type::List,
        message => Type::Message(message),
    };
    Some((number, Field { name, kind, shape }))
}

/// Scalars that are pointers in Kubernetes' types: zero is a value there, everywhere else it means "not set" and is
/// written all the same.
const ZERO_COUNTS: [&str; 42] = [
    "activeDeadlineSeconds",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "automountServiceAccountToken",
    "blockOwnerDeletion",
    "controller",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "expirationSeconds",
    "fsGroup",
    "gracePeriodSeconds",
    "hostProcess",
    "hostUsers",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "minDomains",
    "mode",
    "optional",
    "orphanDependents",
    "priority",
    "privileged",
    "procMount",
    "progressDeadlineSeconds",
    "readOnlyRootFilesystem",
    "replicas",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "started",
    "terminating",
    "terminationGracePeriodSeconds",
    "timeoutSeconds",
    "tolerationSeconds",
    "ready",
    "allowed",
    "denied",
];

fn malformed(what: &str) -> Status {
    Status::bad_request(format!("the body of the request is not a valid protocol buffer: {what}"))
}

/// Bytes being read.
struct Reader<'a> {
    bytes: &'a [u8],
}

enum Raw<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    /// 32 bits; none of the fields known here has them.
    Skipped,
}

impl<'a> Reader<'a> {
    fn byte(&mut self) -> StatusResult<u8> {
        let (first, rest) = self.bytes.split_first().ok_or_else(|| malformed("it ends early"))?;
        self.bytes = rest;
        Ok(*first)
    }
    fn take(&mut self, length: usize) -> StatusResult<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or_else(|| malformed("it ends early"))?;
        self.bytes = rest;
        Ok(taken)
    }
    fn varint(&mut self) -> StatusResult<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed("a number is too long"))
    }
    /// The next field's number and value.
    fn field(&mut self) -> StatusResult<Option<(u64, Raw<'a>)>> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Raw::Varint(self.varint()?),
            1 => {
                let bytes: [u8; 8] = self.take(8)?.try_into().map_err(|_| malformed("it ends early"))?;
                Raw::Fixed64(u64::from_le_bytes(bytes))
            }
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| malformed("a length is too large"))?;
                Raw::Bytes(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Raw::Skipped
            }
            _ => return Err(malformed("unknown wire type")),
        };
        Ok(Some((tag >> 3, value)))
    }
}

fn text(bytes: &[u8]) -> StatusResult<&str> {
    std::str::from_utf8(bytes).map_err(|_| malformed("text is not UTF-8"))
}

/// The JSON form of a body.
pub fn decode(body: &[u8]) -> StatusResult<Decoded> {
    let raw = body.strip_prefix(MAGIC).ok_or_else(|| malformed("it does not begin with \"k8s\\0\""))?;
    let mut reader = Reader { bytes: raw };
    let (mut api_version, mut kind, mut inner) = ("", "", &[][..]);
    while let Some((number, value)) = reader.field()? {
        match (number, value) {
            (1, Raw::Bytes(bytes)) => {
                let mut reader = Reader { bytes };
                while let Some((number, value)) = reader.field()? {
                    match (number, value) {
                        (1, Raw::Bytes(bytes)) => api_version = text(bytes)?,
                        (2, Raw::Bytes(bytes)) => kind = text(bytes)?,
                        _ => {}
                    }
                }
            }
            (2, Raw::Bytes(bytes)) => inner = bytes,
            _ => {}
        }
    }
    let Some((name, _)) = message_of(api_version, kind) else {
        return Err(Status::new(
            api::status::Reason::UnsupportedMediaType,
            format!(
                "{kind} in version \"{api_version}\" is not known in the form {MEDIA}; send it as application/json"
            ),
        ));
    };
    let mut object = Map::new();
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    read(name, inner, &mut object, 0)?;
    Ok(Decoded { value: Value::Object(object), duplicates: Vec::new() })
}

/// The message of a kind: `apps.v1.Deployment` of `apps/v1` and `Deployment`.
fn message_of(api_version: &str, kind: &str) -> Option<(&'static str, &'static Message)> {
    let package = match api_version.split_once('/') {
        None => format!("core.{api_version}"),
        Some((group, version)) => format!("{}.{version}", group.strip_suffix(".k8s.io").unwrap_or(group)),
    };
    let full = format!("{package}.{kind}");
    let own = MESSAGES.get_key_value(full.as_str());
    // `DeleteOptions` belongs to every group.
    own.or_else(|| MESSAGES.get_key_value(format!("meta.v1.{kind}").as_str())).map(|(k, v)| (*k, v))
}

fn read(message: &'static str, bytes: &[u8], object: &mut Map<String, Value>, depth: usize) -> StatusResult<()> {
    if depth > DEPTH {
        return Err(malformed("nested too deeply"));
    }
    let Some(fields) = MESSAGES.get(message) else { return Ok(()) };
    let mut reader = Reader { bytes };
    while let Some((number, raw)) = reader.field()? {
        let Some(field) = fields.get(&number) else { continue };
        match field.shape {
            Shape::Inline => {
                if let (Type::Message(inner), Raw::Bytes(bytes)) = (field.kind, raw) {
                    read(inner, bytes, object, depth + 1)?;
                }
            }
            Shape::Map => {
                let Raw::Bytes(bytes) = raw else { return Err(malformed("a map is no message")) };
                let (key, value) = entry(field.kind, bytes, depth)?;
                if let Value::Object(map) = object.entry(field.name).or_insert_with(|| json!({})) {
                    map.insert(key, value);
                }
            }
            Shape::Repeated => {
                let item = value(field.kind, raw, depth)?;
                if let Value::Array(list) = object.entry(field.name).or_insert_with(|| json!([])) {
                    list.push(item);
                }
            }
            Shape::One => {
                let value = value(field.kind, raw, depth)?;
                let unset = match &value {
                    Value::Null => true,
                    Value::String(text) => text.is_empty(),
                    Value::Bool(false) => !ZERO_COUNTS.contains(&field.name),
                    Value::Number(number) => number.as_f64() == Some(0.0) && !ZERO_COUNTS.contains(&field.name),
                    _ => false,
                };
                if !unset {
                    object.insert(field.name.into(), value);
                }
            }
        }
    }
    Ok(())
}

/// One entry of a map: key 1, value 2.
fn entry(kind: Type, bytes: &[u8], depth: usize) -> StatusResult<(String, Value)> {
    let mut reader = Reader { bytes };
    let (mut key, mut found) = (String::new(), None);
    while let Some((number, raw)) = reader.field()? {
        match (number, raw) {
            (1, Raw::Bytes(bytes)) => key = text(bytes)?.to_owned(),
            (2, raw) => found = Some(value(kind, raw, depth)?),
            _ => {}
        }
    }
    let absent = || match kind {
        Type::Message(_) => json!({}),
        _ => "".into(),
    };
    Ok((key, found.unwrap_or_else(absent)))
}

fn value(kind: Type, raw: Raw<'_>, depth: usize) -> StatusResult<Value> {
    Ok(match (kind, raw) {
        (Type::Text, Raw::Bytes(bytes)) => text(bytes)?.into(),
        (Type::Bytes, Raw::Bytes(bytes)) => base64::engine::general_purpose::STANDARD.encode(bytes).into(),
        (Type::Bool, Raw::Varint(n)) => (n != 0).into(),
        // Negative numbers are sent as 64-bit two's complement.
        (Type::Integer, Raw::Varint(n)) => (n as i64).into(),
        (Type::Double, Raw::Fixed64(n)) => f64::from_bits(n).into(),
        (Type::Time | Type::MicroTime, Raw::Bytes(bytes)) => time(kind, bytes)?,
        (Type::Quantity, Raw::Bytes(bytes)) => match first(bytes, 1)? {
            Some(bytes) => text(bytes)?.into(),
            None => "0".into(),
        },
        (Type::IntOrString, Raw::Bytes(bytes)) => int_or_string(bytes)?,
        (Type::Json, Raw::Bytes(bytes)) => match first(bytes, 1)? {
            Some(bytes) => super::decode::decode(bytes, super::decode::Format::Json)?.value,
            None => Value::Null,
        },
        (Type::List, Raw::Bytes(bytes)) => {
            let mut reader = Reader { bytes };
            let mut list = Vec::new();
            while let Some((number, raw)) = reader.field()? {
                if let (1, Raw::Bytes(bytes)) = (number, raw) {
                    list.push(Value::from(text(bytes)?));
                }
            }
            list.into()
        }
        (Type::Message(inner), Raw::Bytes(bytes)) => {
            let mut object = Map::new();
            read(inner, bytes, &mut object, depth + 1)?;
            Value::Object(object)
        }
        _ => return Err(malformed("a field is of the wrong type")),
    })
}

fn first(bytes: &[u8], wanted: u64) -> StatusResult<Option<&[u8]>> {
    let mut reader = Reader { bytes };
    while let Some((number, raw)) = reader.field()? {
        if let (true, Raw::Bytes(bytes)) = (number == wanted, raw) {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// `Time { seconds = 1; nanos = 2 }`; the zero time is absent.
fn time(kind: Type, bytes: &[u8]) -> StatusResult<Value> {
    let mut reader = Reader { bytes };
    let (mut seconds, mut nanos, mut there) = (0i64, 0i64, false);
    while let Some((number, raw)) = reader.field()? {
        match (number, raw) {
            (1, Raw::Varint(n)) => (seconds, there) = (n as i64, true),
            (2, Raw::Varint(n)) => nanos = n as i64,
            _ => {}
        }
    }
    const LAST: i64 = 253_402_300_799;
    const FIRST: i64 = -62_135_596_800;
    if !there || seconds <= FIRST || seconds > LAST {
        return Ok(Value::Null);
    }
    Ok(match kind {
        Type::MicroTime => api::time::micro_time(seconds * 1_000_000 + nanos.clamp(0, 999_999_999) / 1000).into(),
        _ => api::time::rfc3339(seconds).into(),
    })
}

/// `IntOrString { type = 1; intVal = 2; strVal = 3 }`
fn int_or_string(bytes: &[u8]) -> StatusResult<Value> {
    let mut reader = Reader { bytes };
    let (mut is_text, mut number, mut string) = (false, 0i64, "");
    while let Some((field, raw)) = reader.field()? {
        match (field, raw) {
            (1, Raw::Varint(n)) => is_text = n == 1,
            (2, Raw::Varint(n)) => number = n as i64,
            (3, Raw::Bytes(bytes)) => string = text(bytes)?,
            _ => {}
        }
    }
    Ok(if is_text { string.into() } else { number.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(field: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![field << 3 | 2, inner.len() as u8];
        out.extend_from_slice(inner);
        out
    }

    fn envelope(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [bytes(1, api_version.as_bytes()), bytes(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes(1, &meta), bytes(2, raw), bytes(3, b""), bytes(4, b"")].concat()
    }

    #[test]
    fn a_config_map_and_a_secret() {
        // metadata { name: "a", generateName: "", generation: 0, creationTimestamp: {} }, data { "k": "v" }
        let metadata = [bytes(1, b"a"), bytes(2, b""), vec![7 << 3, 0], bytes(8, b"")].concat();
        let data = [bytes(1, b"k"), bytes(2, b"v")].concat();
        let raw = [bytes(1, &metadata), bytes(2, &data)].concat();
        let decoded = decode(&envelope("v1", "ConfigMap", &raw)).unwrap().value;
        assert_eq!(
            decoded,
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}})
        );
        let secret = decode(&envelope("v1", "Secret", &raw)).unwrap().value;
        assert_eq!(secret["data"], json!({"k": "dg=="}));
    }

    #[test]
    fn pointers_keep_their_zero() {
        let spec = vec![1 << 3, 0, 5 << 3, 0];
        let decoded = decode(&envelope("apps/v1", "Deployment", &bytes(2, &spec))).unwrap().value;
        assert_eq!(decoded["spec"], json!({"replicas": 0}), "minReadySeconds is no pointer");
    }

    #[test]
    fn kinds_without_a_table_are_told_so() {
        assert_eq!(decode(&envelope("example.com/v1", "Thing", b"")).unwrap_err().code(), 415);
        assert_eq!(decode(b"{}").unwrap_err().code(), 400);
        assert!(decode(&envelope("policy/v1", "Eviction", b"")).is_ok());
        assert!(decode(&envelope("authorization.k8s.io/v1", "SelfSubjectAccessReview", b"")).is_ok());
    }

    #[test]
    fn every_named_message_is_there() {
        for message in MESSAGES.values() {
            for field in message.values() {
                if let Type::Message(name) = field.kind {
                    assert!(MESSAGES.contains_key(name), "{name}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut body = MAGIC.to_vec();
            body.extend_from_slice(&raw);
            let _ = decode(&body);
            let mut object = Map::new();
            let _ = read("core.v1.Pod", &raw, &mut object, 0);
        }
    }
}
