//! API Gateway's HTTP API payload, format 2.0: requests to events, results to answers.
//! <https://docs.aws.amazon.com/apigateway/latest/developerguide/http-api-develop-integrations-lambda.html>

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, COOKIE, HeaderMap, HeaderName, HeaderValue, SET_COOKIE};
use http::request::Parts;
use http::{Response, StatusCode};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Headers of one connection, not of the answer (RFC 9110, section 7.6.1), and those that the server itself writes.
const NOT_OURS: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "content-length",
];
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// What an event says besides the request itself.
pub(super) struct About<'a> {
    pub function: &'a str,
    pub request_id: &'a str,
    pub peer: String,
    /// Unix nanoseconds.
    pub now: i64,
}

/// The event of a request.
pub(super) fn of_request(parts: &Parts, body: &[u8], about: &About) -> Value {
    let (headers, cookies) = headers(&parts.headers);
    let host = headers.get("host").and_then(Value::as_str).unwrap_or_default().to_owned();
    let agent = headers.get("user-agent").cloned().unwrap_or_else(|| "".into());
    // The gateway in front adds the client it saw at the end.
    let forwarded = headers.get("x-forwarded-for").and_then(Value::as_str).and_then(|list| list.rsplit(',').next());
    let source = forwarded.map_or_else(|| about.peer.clone(), |last| last.trim().to_owned());
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let mut event = json!({
        "version": "2.0", "routeKey": "$default", "rawPath": path, "rawQueryString": query, "headers": headers,
        "requestContext": {
            "accountId": super::ACCOUNT, "apiId": about.function, "domainName": host,
            "domainPrefix": host.split('.').next().unwrap_or_default(),
            "http": {"method": parts.method.as_str(), "path": path, "protocol": format!("{:?}", parts.version),
                     "sourceIp": source, "userAgent": agent},
            "requestId": about.request_id, "routeKey": "$default", "stage": "$default",
            "time": common_log_time(about.now), "timeEpoch": about.now / 1_000_000,
        },
        "isBase64Encoded": false,
    });
    if !cookies.is_empty() {
        event["cookies"] = cookies.into();
    }
    let parameters = parameters(query);
    if !parameters.is_empty() {
        event["queryStringParameters"] = Value::Object(parameters);
    }
    if !body.is_empty() {
        let (text, encoded) = body_text(&parts.headers, body);
        event["body"] = text.into();
        event["isBase64Encoded"] = encoded.into();
    }
    event
}

/// Lower-case names, several values of one joined by commas; cookies by themselves.
fn headers(headers: &HeaderMap) -> (Map<String, Value>, Vec<String>) {
    let (mut joined, mut cookies) = (BTreeMap::<String, String>::new(), Vec::new());
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        if name == COOKIE {
            cookies.extend(value.split(';').map(|cookie| cookie.trim().to_owned()).filter(|cookie| !cookie.is_empty()));
            continue;
        }
        let entry = joined.entry(name.as_str().to_owned()).or_default();
        if !entry.is_empty() {
            entry.push(',');
        }
        entry.push_str(&value);
    }
    (joined.into_iter().map(|(name, value)| (name, value.into())).collect(), cookies)
}

/// Decoded; several values of one name joined by commas.
fn parameters(query: &str) -> Map<String, Value> {
    let mut joined = BTreeMap::<String, String>::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decoded(value);
        joined
            .entry(decoded(name))
            .and_modify(|known| {
                known.push(',');
                known.push_str(&value);
            })
            .or_insert(value);
    }
    joined.into_iter().map(|(name, value)| (name, value.into())).collect()
}

fn decoded(text: &str) -> String {
    let spaced = text.replace('+', " ");
    percent_encoding::percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
}

/// Text as it is, everything else in base64.
fn body_text(headers: &HeaderMap, body: &[u8]) -> (String, bool) {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let textual = kind.starts_with("text/")
        || kind.ends_with("+json")
        || kind.ends_with("+xml")
        || matches!(kind.as_str(), "application/json" | "application/xml" | "application/javascript");
    let plain = textual && !headers.contains_key(http::header::CONTENT_ENCODING);
    match std::str::from_utf8(body) {
        Ok(text) if plain => (text.to_owned(), false),
        _ => (STANDARD.encode(body), true),
    }
}

/// `12/Mar/2020:19:03:58 +0000`
fn common_log_time(nanos: i64) -> String {
    let seconds = nanos.div_euclid(1_000_000_000);
    let (year, month, day) = clock::civil(seconds.div_euclid(86_400));
    let of_day = seconds.rem_euclid(86_400);
    let name = usize::try_from(month - 1).ok().and_then(|at| MONTHS.get(at)).copied().unwrap_or("Jan");
    format!("{day:02}/{name}/{year}:{:02}:{:02}:{:02} +0000", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Head and body that a function's result stands for, or what is wrong with it.
pub(super) fn to_answer(result: &[u8]) -> Result<Response<Bytes>, String> {
    let value: Value = match serde_json::from_slice(result) {
        Ok(value) => value,
        Err(error) => return Err(format!("the result is not JSON: {error}")),
    };
    // Format 2.0: without a status code the result itself is the body.
    let Some(fields) = value.as_object().filter(|fields| fields.contains_key("statusCode")) else {
        let body = match value {
            Value::String(text) => Bytes::from(text),
            Value::Null => Bytes::new(),
            _ => Bytes::copy_from_slice(result),
        };
        let mut answer = Response::new(body);
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        return Ok(answer);
    };
    let body = match fields.get("body") {
        None | Some(Value::Null) => Bytes::new(),
        Some(Value::String(text)) if fields.get("isBase64Encoded").and_then(Value::as_bool) == Some(true) => {
            STANDARD.decode(text).map_err(|error| format!("body is not base64: {error}"))?.into()
        }
        Some(Value::String(text)) => Bytes::copy_from_slice(text.as_bytes()),
        Some(other) => Bytes::from(other.to_string()),
    };
    let mut answer = head(fields)?;
    if !answer.headers().contains_key(CONTENT_TYPE) {
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    *answer.body_mut() = body;
    Ok(answer)
}

/// Status, headers and cookies: of a result, or of the JSON that a streamed answer begins with.
pub(super) fn head(fields: &Map<String, Value>) -> Result<Response<Bytes>, String> {
    let code = match fields.get("statusCode") {
        None => Some(200),
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => text.parse().ok(),
        Some(_) => None,
    };
    let status = code.and_then(|code| u16::try_from(code).ok()).filter(|code| (200..600).contains(code));
    let status = status.and_then(|code| StatusCode::from_u16(code).ok());
    let mut answer = Response::new(Bytes::new());
    *answer.status_mut() = status.ok_or("statusCode is not a number from 200 to 599")?;
    let headers = answer.headers_mut();
    let several = fields.get("multiValueHeaders").and_then(Value::as_object);
    for (name, values) in several.into_iter().flatten() {
        for value in values.as_array().into_iter().flatten() {
            append(headers, name, value)?;
        }
    }
    for (name, value) in fields.get("headers").and_then(Value::as_object).into_iter().flatten() {
        let given = several.is_some_and(|several| several.keys().any(|known| known.eq_ignore_ascii_case(name)));
        if !given {
            append(headers, name, value)?;
        }
    }
    for cookie in fields.get("cookies").and_then(Value::as_array).into_iter().flatten() {
        append(headers, SET_COOKIE.as_str(), cookie)?;
    }
    Ok(answer)
}

fn append(headers: &mut HeaderMap, name: &str, value: &Value) -> Result<(), String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => return Ok(()),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(_) | Value::Object(_) => return Err(format!("header {name:?} is neither text nor a number")),
    };
    let known = HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{name:?} is no header's name"))?;
    if NOT_OURS.contains(&known.as_str()) {
        return Ok(());
    }
    let value = HeaderValue::from_str(&text).map_err(|_| format!("header {name:?}: its value cannot be sent"))?;
    headers.append(known, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    fn event(request: Request<&[u8]>) -> Value {
        let (parts, body) = request.into_parts();
        let about =
            About { function: "greet", request_id: "r", peer: "10.0.0.1".into(), now: 1_584_039_838_000_000_000 };
        of_request(&parts, body, &about)
    }

    #[test]
    fn a_request_is_an_event_of_format_2() {
        let request = Request::builder()
            .method("POST")
            .uri("/a%20b/c?x=1&x=2&y=a%20b&z")
            .header("Host", "greet.example.com")
            .header("X-A", "1")
            .header("x-a", "2")
            .header("cookie", "a=b; c=d")
            .header("x-forwarded-for", "6.6.6.6, 192.0.2.1")
            .header("content-type", "application/json; charset=utf-8")
            .body(b"{}".as_slice())
            .unwrap();
        let event = event(request);
        assert_eq!(event["rawPath"], "/a%20b/c");
        assert_eq!(event["rawQueryString"], "x=1&x=2&y=a%20b&z");
        assert_eq!(event["queryStringParameters"], json!({"x": "1,2", "y": "a b", "z": ""}));
        assert_eq!(event["cookies"], json!(["a=b", "c=d"]));
        assert_eq!(event["headers"]["x-a"], "1,2");
        assert!(event["headers"].get("cookie").is_none());
        assert_eq!((&event["body"], &event["isBase64Encoded"]), (&json!("{}"), &json!(false)));
        let context = &event["requestContext"];
        assert_eq!(context["http"]["sourceIp"], "192.0.2.1");
        assert_eq!(context["http"]["protocol"], "HTTP/1.1");
        assert_eq!(context["domainPrefix"], "greet");
        assert_eq!(context["time"], "12/Mar/2020:19:03:58 +0000");
    }

    #[test]
    fn bytes_travel_in_base64() {
        let binary = event(Request::builder().uri("/").body([0xff, 0].as_slice()).unwrap());
        assert_eq!((&binary["body"], &binary["isBase64Encoded"]), (&json!("/wA="), &json!(true)));
        let lying = Request::builder().header("content-type", "text/plain").body([0xff, 0].as_slice()).unwrap();
        assert_eq!(event(lying)["isBase64Encoded"], true);
        let none = event(Request::builder().body([].as_slice()).unwrap());
        assert!(none.get("body").is_none() && none.get("cookies").is_none());
    }

    #[test]
    fn results_become_answers() {
        let of = |value: Value| to_answer(value.to_string().as_bytes());
        let answer = of(json!({"statusCode": 201, "headers": {"X-A": "1", "x-n": 2, "Content-Length": "9", "x-m": "lost"},
            "multiValueHeaders": {"X-M": ["a", "b"]}, "cookies": ["a=1", "b=2"], "body": "aGk=", "isBase64Encoded": true}))
        .unwrap();
        assert_eq!((answer.status().as_u16(), answer.body().as_ref()), (201, b"hi".as_slice()));
        let all = |name: &str| answer.headers().get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("x-a"), all("x-n"), all("x-m")), (vec!["1"], vec!["2"], vec!["a", "b"]));
        assert_eq!((all("set-cookie"), all("content-length")), (vec!["a=1", "b=2"], vec![]));
        assert_eq!(all("content-type"), ["application/json"]);
        assert_eq!(of(json!("Hello")).unwrap().body(), "Hello");
        assert_eq!(of(json!({"a": 1})).unwrap().body(), "{\"a\":1}");
        for (bad, why) in [
            (json!({"statusCode": 99}), "statusCode"),
            (json!({"statusCode": "x"}), "statusCode"),
            (json!({"statusCode": 200, "headers": {"a b": "c"}}), "no header's name"),
            (json!({"statusCode": 200, "headers": {"a": "b\r\nc: d"}}), "cannot be sent"),
            (json!({"statusCode": 200, "headers": {"a": ["b"]}}), "neither text"),
            (json!({"statusCode": 200, "body": "%", "isBase64Encoded": true}), "base64"),
        ] {
            let told = of(bad).unwrap_err();
            assert!(told.contains(why), "{told}");
        }
        assert!(to_answer(b"nonsense").unwrap_err().contains("not JSON"));
    }

    proptest! {
        #[test]
        fn no_result_harms(bytes in proptest::collection::vec(any::<u8>(), 0..64), text in "\\PC{0,64}") {
            let _ = to_answer(&bytes);
            let _ = to_answer(json!({"statusCode": 200, "headers": {(text.clone()): (text.clone())}, "body": text}).to_string().as_bytes());
        }

        #[test]
        fn no_query_harms(query in "[ -~]{0,80}") {
            parameters(&query);
        }
    }
}
