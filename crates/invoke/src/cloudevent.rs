//! CloudEvents 1.0.2 over HTTP: binary, structured and batched content in; binary content, or JSON, out.
//! <https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md>

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Events of a batch, and attributes of an event.
const BATCH: usize = 100;
const ATTRIBUTES: usize = 64;
const VALUE: usize = 8 << 10;
const NAME: usize = 64;
const PREFIX: &str = "ce-";
const STRUCTURED: &str = "application/cloudevents+json";
const BATCHED: &str = "application/cloudevents-batch+json";
/// Section 3.1.3.2 of the HTTP binding; what is not ASCII is encoded anyway.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// What is wrong with what was sent, and the attribute that is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("{0}")]
    Content(String),
    #[error("content type {0:?}: JSON is the only format of structured events here")]
    Format(String),
    #[error("attribute {name}: {why}")]
    Attribute { name: String, why: String },
}

fn attribute<T>(name: &str, why: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid::Attribute { name: name.to_owned(), why: why.into() })
}

/// One event, whose attributes are as the specification wants them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudEvent {
    /// All but `datacontenttype`.
    attributes: BTreeMap<String, String>,
    content_type: Option<String>,
    pub data: Bytes,
}

impl CloudEvent {
    pub fn new(attributes: impl IntoIterator<Item = (String, String)>, json: &Value) -> Result<CloudEvent, Invalid> {
        let event = CloudEvent {
            attributes: attributes.into_iter().collect(),
            content_type: Some("application/json".into()),
            data: json.to_string().into(),
        };
        event.checked()
    }

    /// An attribute, by its name; `datacontenttype` is one.
    pub fn get(&self, name: &str) -> Option<&str> {
        match name {
            "datacontenttype" => self.content_type.as_deref(),
            name => self.attributes.get(name).map(String::as_str),
        }
    }

    /// Whether it has all of these attributes with these values; an empty value is any.
    pub fn matches(&self, wanted: &Map<String, Value>) -> bool {
        wanted.iter().all(|(name, value)| {
            let wanted = value.as_str().unwrap_or_default();
            self.get(name).is_some_and(|value| wanted.is_empty() || value == wanted)
        })
    }

    /// The headers of its binary form, whose body is its data.
    pub fn headers(&self) -> Vec<(String, String)> {
        let encoded = |(name, value): (&String, &String)| {
            (format!("{PREFIX}{name}"), utf8_percent_encode(value, ENCODED).to_string())
        };
        let content_type = self.content_type.iter().map(|value| (CONTENT_TYPE.as_str().to_owned(), value.clone()));
        self.attributes.iter().map(encoded).chain(content_type).collect()
    }

    /// Its structured form.
    pub fn to_json(&self) -> Value {
        let mut object: Map<String, Value> =
            self.attributes.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect();
        if let Some(content_type) = &self.content_type {
            object.insert("datacontenttype".into(), content_type.as_str().into());
        }
        if !self.data.is_empty() {
            let json = self.is_json().then(|| serde_json::from_slice(&self.data).ok()).flatten();
            match (json, std::str::from_utf8(&self.data)) {
                (Some(json), _) => object.insert("data".into(), json),
                (None, Ok(text)) if !self.is_json() => object.insert("data".into(), text.into()),
                (None, _) => object.insert("data_base64".into(), STANDARD.encode(&self.data).into()),
            };
        }
        Value::Object(object)
    }

    fn is_json(&self) -> bool {
        self.content_type.as_deref().is_none_or(is_json)
    }

    fn checked(self) -> Result<CloudEvent, Invalid> {
        if self.attributes.len() > ATTRIBUTES {
            return Err(Invalid::Content(format!(
                "{} attributes; at most {ATTRIBUTES} are allowed",
                self.attributes.len()
            )));
        }
        match self.get("specversion") {
            None => return attribute("specversion", "it is missing; 1.0 is what is spoken here"),
            Some("1.0") => {}
            Some(other) => return attribute("specversion", format!("{other:?} is not spoken here; 1.0 is")),
        }
        for name in ["id", "source", "type"] {
            if self.get(name).is_none_or(str::is_empty) {
                return attribute(name, "it is missing or empty");
            }
        }
        for (name, value) in &self.attributes {
            check(name, value)?;
        }
        match &self.content_type {
            Some(value) if HeaderValue::from_str(value).is_err() || !value.contains('/') => {
                attribute("datacontenttype", format!("{value:?} is not a media type"))
            }
            _ => Ok(self),
        }
    }
}

/// Sections 3 and 3.1 of the specification.
fn check(name: &str, value: &str) -> Result<(), Invalid> {
    if name.is_empty() || name.len() > NAME || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
        return attribute(name, format!("names have 1 to {NAME} lower-case letters and digits"));
    }
    if name == "data" {
        return attribute(name, "no attribute may have this name");
    }
    if value.len() > VALUE || value.chars().any(char::is_control) {
        return attribute(name, format!("values have at most {VALUE} bytes and no control characters"));
    }
    let uri = |absolute: bool| {
        let fine = value.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"\\^`{|}".contains(&b));
        let scheme = value.split_once(':').is_some_and(|(scheme, _)| {
            scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
        });
        fine && (scheme || !absolute)
    };
    match name {
        "source" if !uri(false) => attribute(name, format!("{value:?} is not a URI reference")),
        "dataschema" if !uri(true) => attribute(name, format!("{value:?} is not a URI")),
        "subject" if value.is_empty() => attribute(name, "it may be left out, but not be empty"),
        "time" if api::time::parse(value).is_none() => {
            attribute(name, format!("{value:?} is not a time as RFC 3339 has it"))
        }
        _ => Ok(()),
    }
}

fn is_json(content_type: &str) -> bool {
    let media = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    media == "application/json" || media == "text/json" || media.ends_with("+json")
}

/// Whether a request or an answer says that it is one or more events.
pub fn says_so(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    headers.contains_key("ce-specversion") || content_type.trim_start().starts_with("application/cloudevents")
}

/// The events of one request.
pub fn read(headers: &HeaderMap, body: Bytes) -> Result<Vec<CloudEvent>, Invalid> {
    let content_type = match headers.get(CONTENT_TYPE).map(HeaderValue::to_str) {
        None => None,
        Some(Ok(text)) => Some(text),
        Some(Err(_)) => return Err(Invalid::Content("content-type: it is not ASCII".into())),
    };
    let media = content_type.and_then(|t| t.split(';').next()).unwrap_or_default().trim().to_ascii_lowercase();
    let json =
        || serde_json::from_slice::<Value>(&body).map_err(|e| Invalid::Content(format!("the event is not JSON: {e}")));
    match media.as_str() {
        STRUCTURED => Ok(vec![structured(json()?)?]),
        BATCHED => match json()? {
            Value::Array(events) if events.len() <= BATCH => events.into_iter().map(structured).collect(),
            Value::Array(events) => {
                Err(Invalid::Content(format!("{} events; a batch has at most {BATCH}", events.len())))
            }
            _ => Err(Invalid::Content("a batch is a JSON array".into())),
        },
        media if media.starts_with("application/cloudevents") => Err(Invalid::Format(media.to_owned())),
        _ => Ok(vec![binary(headers, content_type, body)?]),
    }
}

fn binary(headers: &HeaderMap, content_type: Option<&str>, data: Bytes) -> Result<CloudEvent, Invalid> {
    let mut attributes = BTreeMap::new();
    for (header, value) in headers {
        let Some(name) = header.as_str().strip_prefix(PREFIX) else { continue };
        if name == "datacontenttype" {
            return attribute(name, "in binary content it is the header Content-Type");
        }
        let Ok(text) = value.to_str() else { return attribute(name, "its header is not ASCII; encode it by percent") };
        let bare = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
        let Ok(decoded) = percent_decode_str(bare).decode_utf8() else { return attribute(name, "it is not UTF-8") };
        if attributes.insert(name.to_owned(), decoded.into_owned()).is_some() {
            return attribute(name, "it is there twice");
        }
    }
    if attributes.is_empty() {
        return Err(Invalid::Content(format!(
            "not a CloudEvent: headers ce-specversion, ce-id, ce-source, ce-type, or the content type {STRUCTURED}"
        )));
    }
    CloudEvent { attributes, content_type: content_type.map(str::to_owned), data }.checked()
}

fn structured(event: Value) -> Result<CloudEvent, Invalid> {
    let Value::Object(object) = event else { return Err(Invalid::Content("an event is a JSON object".into())) };
    let (mut attributes, mut content_type, mut data, mut encoded) = (BTreeMap::new(), None, None, None);
    for (name, value) in object {
        let text = match (name.as_str(), value) {
            ("data", value) => {
                data = Some(value);
                continue;
            }
            ("data_base64", Value::String(text)) => {
                encoded = Some(text);
                continue;
            }
            (_, Value::Null) => continue,
            (_, Value::String(text)) => text,
            (_, Value::Bool(value)) => value.to_string(),
            (_, Value::Number(number)) if number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => {
                number.to_string()
            }
            (name, _) => return attribute(name, "it is neither a string, a boolean nor a 32-bit integer"),
        };
        match name.as_str() {
            "datacontenttype" => content_type = Some(text),
            _ => drop(attributes.insert(name, text)),
        }
    }
    let json = content_type.as_deref().is_none_or(is_json);
    let data: Bytes = match (data, encoded) {
        (Some(_), Some(_)) => return attribute("data_base64", "an event has data or data_base64, not both"),
        (None, None) => Bytes::new(),
        (None, Some(text)) => match STANDARD.decode(text) {
            Ok(bytes) => bytes.into(),
            Err(error) => return attribute("data_base64", error.to_string()),
        },
        (Some(Value::String(text)), None) if !json => text.into(),
        (Some(value), None) => value.to_string().into(),
    };
    if content_type.is_none() && !data.is_empty() {
        content_type = Some("application/json".into());
    }
    CloudEvent { attributes, content_type, data }.checked()
}

/// Headers of a stored event, as they go out; what is none is left out.
pub fn out(headers: &Map<String, Value>) -> HeaderMap {
    let header = |(name, value): (&String, &Value)| {
        let ours = name.starts_with(PREFIX) || name == CONTENT_TYPE.as_str();
        let name = HeaderName::from_bytes(name.as_bytes()).ok().filter(|_| ours)?;
        Some((name, HeaderValue::from_str(value.as_str()?).ok()?))
    };
    headers.iter().filter_map(header).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (n.parse::<HeaderName>().unwrap(), HeaderValue::from_str(v).unwrap())).collect()
    }

    const LEAST: [(&str, &str); 4] =
        [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/shop"), ("ce-type", "order.placed")];

    #[test]
    fn binary_content_goes_out_as_it_came() {
        let sent =
            headers(&[&LEAST[..], &[("content-type", "text/plain"), ("ce-subject", "Euro%20%E2%82%AC")]].concat());
        let event = read(&sent, Bytes::from_static(b"hi")).unwrap().remove(0);
        assert_eq!((event.get("subject"), event.get("datacontenttype")), (Some("Euro €"), Some("text/plain")));
        let stored = event.headers().into_iter().map(|(n, v)| (n, Value::from(v))).collect();
        assert_eq!(out(&stored), sent);
        assert_eq!(event.to_json()["data"], "hi");
    }

    #[test]
    fn structured_content_is_the_same_event() {
        let text = json!({"specversion": "1.0", "id": "1", "source": "/shop", "type": "t", "level": 3, "urgent": true,
                          "data": {"a": [1]}});
        let sent = headers(&[("content-type", "application/cloudevents+json; charset=utf-8")]);
        let event = read(&sent, text.to_string().into()).unwrap().remove(0);
        assert_eq!(
            (event.get("level"), event.get("urgent"), &event.data[..]),
            (Some("3"), Some("true"), &b"{\"a\":[1]}"[..])
        );
        let wanted = |filter: Value| event.matches(filter.as_object().unwrap());
        assert!(wanted(json!({})) && wanted(json!({"type": "t", "level": ""})));
        assert!(!wanted(json!({"type": "other"})) && !wanted(json!({"subject": ""})));
        let batch = headers(&[("content-type", "application/cloudevents-batch+json")]);
        assert_eq!(read(&batch, json!([text, text]).to_string().into()).unwrap().len(), 2);
        let raw = json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data_base64": "AP8="});
        let event = read(&sent, raw.to_string().into()).unwrap().remove(0);
        assert_eq!((&event.data[..], event.to_json()["data_base64"].as_str()), (&[0u8, 255][..], Some("AP8=")));
    }

    #[test]
    fn errors_name_the_attribute() {
        let said = |change: &[(&str, &str)]| {
            let mut all: BTreeMap<&str, &str> = LEAST.into_iter().collect();
            all.extend(change.iter().copied());
            let kept: Vec<(&str, &str)> = all.into_iter().filter(|(_, value)| *value != "-").collect();
            read(&headers(&kept), Bytes::new()).map(drop).unwrap_err().to_string()
        };
        for (name, value) in [
            ("ce-id", "-"),
            ("ce-id", ""),
            ("ce-source", "-"),
            ("ce-source", "a b"),
            ("ce-type", "-"),
            ("ce-specversion", "0.3"),
            ("ce-specversion", "-"),
            ("ce-time", "yesterday"),
            ("ce-dataschema", "relative"),
            ("ce-subject", ""),
            ("ce-x_y", "1"),
            ("ce-data", "1"),
            ("ce-datacontenttype", "a/b"),
            ("ce-ext", "%0a"),
            ("ce-ext", "%ff"),
        ] {
            let said = said(&[(name, value)]);
            assert!(said.starts_with(&format!("attribute {}:", &name[3..])), "{name}={value}: {said}");
        }
        assert!(read(&headers(&[]), Bytes::new()).unwrap_err().to_string().contains("not a CloudEvent"));
        let avro = headers(&[("content-type", "application/cloudevents+avro")]);
        assert_eq!(read(&avro, Bytes::new()).unwrap_err(), Invalid::Format("application/cloudevents+avro".into()));
    }

    proptest! {
        #[test]
        fn whatever_is_read_can_go_out(subject in "[^\\p{Cc}]{1,20}", body in proptest::collection::vec(any::<u8>(), 0..40)) {
            let event = json!({"specversion": "1.0", "id": "i", "source": "/s", "type": "t", "subject": subject,
                               "data_base64": STANDARD.encode(&body), "datacontenttype": "application/octet-stream"});
            let event = structured(event).unwrap();
            let stored: Map<String, Value> = event.headers().into_iter().map(|(n, v)| (n, v.into())).collect();
            let again = read(&out(&stored), event.data.clone()).unwrap().remove(0);
            if !(subject.starts_with('"') && subject.ends_with('"')) {
                prop_assert_eq!(&again, &event);
            }
            prop_assert_eq!(structured(event.to_json()).unwrap().data, event.data);
        }

        #[test]
        fn no_bytes_are_trusted(body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = read(&headers(&[("content-type", STRUCTURED)]), body.into());
        }
    }
}
