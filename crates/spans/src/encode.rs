//! `ExportTraceServiceRequest` in OTLP's JSON (<https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding>): ids in
//! hexadecimal, 64-bit numbers as text.

use crate::{Origin, Span, Value};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const KIND_SERVER: u8 = 2;
const STATUS_ERROR: u8 = 2;

pub(crate) fn request(batch: &[(Arc<Origin>, Span)]) -> Json {
    let mut by_origin: BTreeMap<&Origin, Vec<Json>> = BTreeMap::new();
    for (origin, span) in batch {
        by_origin.entry(origin).or_default().push(one(span));
    }
    let resources: Vec<Json> = by_origin
        .into_iter()
        .map(|(origin, spans)| {
            let attributes: Vec<Json> = origin
                .attributes
                .iter()
                .map(|(key, text)| json!({"key": key, "value": {"stringValue": text}}))
                .collect();
            let scope = json!({"name": "atoll", "version": env!("CARGO_PKG_VERSION")});
            json!({"resource": {"attributes": attributes}, "scopeSpans": [{"scope": scope, "spans": spans}]})
        })
        .collect();
    json!({ "resourceSpans": resources })
}

fn one(span: &Span) -> Json {
    let attributes: Vec<Json> =
        span.attributes.iter().map(|(key, value)| json!({"key": key, "value": any(value)})).collect();
    let mut text = json!({
        "traceId": format!("{:032x}", span.trace),
        "spanId": format!("{:016x}", span.id),
        "name": span.name,
        "kind": KIND_SERVER,
        "startTimeUnixNano": span.start.to_string(),
        "endTimeUnixNano": span.end.max(span.start).to_string(),
        "attributes": attributes,
        "status": {},
    });
    if let Some(parent) = span.parent {
        text["parentSpanId"] = format!("{parent:016x}").into();
    }
    if !span.state.is_empty() {
        text["traceState"] = span.state.as_str().into();
    }
    if let Some(why) = &span.error {
        text["status"] = json!({"code": STATUS_ERROR, "message": why});
    }
    text
}

fn any(value: &Value) -> Json {
    match value {
        Value::Flag(flag) => json!({ "boolValue": flag }),
        // OTLP's numbers are signed.
        Value::Number(number) => json!({"intValue": i64::try_from(*number).unwrap_or(i64::MAX).to_string()}),
        Value::Text(text) => json!({ "stringValue": text }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_otlp_writes_it() {
        let origin = |name: &str| Arc::new(Origin { attributes: vec![("service.name", name.to_owned())] });
        let span = |id: u64| Span {
            trace: 0xabc,
            id,
            parent: (id > 1).then_some(1),
            state: String::new(),
            name: "GET".into(),
            start: 1_700_000_000_000_000_001,
            end: 1_700_000_000_000_000_002,
            error: (id > 2).then(|| "trap".into()),
            attributes: vec![("cold".into(), Value::Flag(id == 1)), ("bytes".into(), Value::Number(u64::MAX))],
        };
        let text = request(&[(origin("b"), span(1)), (origin("a"), span(2)), (origin("b"), span(3))]);
        let resources = text["resourceSpans"].as_array().unwrap();
        assert_eq!(resources.len(), 2, "one for each origin");
        assert_eq!(resources[1]["resource"]["attributes"][0]["value"]["stringValue"], "b");
        let spans = resources[1]["scopeSpans"][0]["spans"].as_array().unwrap();
        assert_eq!(spans[0]["traceId"], format!("{:032x}", 0xabc));
        assert_eq!((&spans[0]["spanId"], spans[0].get("parentSpanId")), (&"0000000000000001".into(), None));
        assert_eq!(spans[0]["startTimeUnixNano"], "1700000000000000001");
        assert_eq!(spans[0]["attributes"][1]["value"]["intValue"], i64::MAX.to_string());
        assert_eq!((&spans[1]["status"]["code"], &spans[1]["parentSpanId"]), (&2.into(), &"0000000000000001".into()));
    }
}
