//! The API over HTTP: who asks, for what.
//! <https://docs.aws.amazon.com/lambda/latest/api/API_Operations.html>

use crate::answer::{Answer, Refused, empty, with};
use crate::dispatch::{Call, Error, Form, Outcome, PAYLOAD};
use crate::functions::{Functions, Packager, configuration, whole};
use crate::keys::Keys;
use crate::messages::{Event, LARGEST, Messages};
use crate::settings::{NewCode, Wanted, name, read};
use crate::signature::Claim;
use crate::tail;
use api::client::Client;
use api::object::{Meta, SharedObject};
use api::streams::PodStreams;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::HeaderValue;
use http::request::Parts;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

const CONNECTIONS: usize = 512;
/// Requests with a body of up to [`PACKAGE`] at a time.
const PACKAGES: usize = 2;
/// Bytes of a request with a package of 50 MiB in base64.
const PACKAGE: usize = 68 << 20;
const HEAD_TIME: Duration = Duration::from_secs(60);
const BODY_TIME: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(100);
/// Functions of an answer, at most.
const PAGE: usize = 50;
const CONTEXT: usize = 3583;

pub struct Shared {
    messages: Arc<Messages>,
    client: Arc<dyn Client>,
    streams: Arc<dyn PodStreams>,
    packager: Arc<dyn Packager>,
    keys: Keys,
    packages: Semaphore,
    random: SystemRandom,
}

impl Shared {
    pub fn new(messages: Arc<Messages>, streams: Arc<dyn PodStreams>, packager: Arc<dyn Packager>) -> Shared {
        let client = messages.dispatcher.client.clone();
        let (keys, random) = (Keys::new(client.clone()), SystemRandom::new());
        Shared { messages, client, streams, packager, keys, packages: Semaphore::new(PACKAGES), random }
    }
}

/// Serves for ever.
pub async fn serve<F, A>(listener: TcpListener, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let answer = answer.clone();
                tokio::spawn(async move {
                    connection(answer, stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("the Invoke API or the brokers cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection<F, A>(answer: F, stream: TcpStream)
where
    F: Fn(Request<Incoming>) -> A + Send + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let _ = stream.set_nodelay(true);
    let answer = service_fn(move |request| {
        let answered = answer(request);
        async move { Ok::<_, Infallible>(answered.await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    let served =
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = served.await {
        tracing::debug!("a connection to the Invoke API or a broker ended: {error}");
    }
}

/// What a path asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Operation {
    List,
    Create,
    Get(String),
    GetConfiguration(String),
    Change(String),
    ChangeCode(String),
    Delete(String),
    Invoke(String),
}

pub fn operation(method: &Method, path: &str) -> Result<Operation, Refused> {
    let unknown = || Refused::new(404, "UnknownOperationException", format!("{method} {path}: no such operation here"));
    let rest = path.strip_prefix("/2015-03-31/functions").filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let rest = rest.ok_or_else(unknown)?;
    let segments: Vec<&str> = rest.split('/').filter(|segment| !segment.is_empty()).collect();
    let decoded = |segment: &str| {
        let text = percent_encoding::percent_decode_str(segment).decode_utf8();
        text.map_err(|_| Refused::parameter("FunctionName: it is not UTF-8")).and_then(|text| name(&text))
    };
    Ok(match (method.as_str(), segments.as_slice()) {
        ("GET", []) => Operation::List,
        ("POST", []) => Operation::Create,
        ("GET", [name]) => Operation::Get(decoded(name)?),
        ("DELETE", [name]) => Operation::Delete(decoded(name)?),
        ("GET", [name, "configuration"]) => Operation::GetConfiguration(decoded(name)?),
        ("PUT", [name, "configuration"]) => Operation::Change(decoded(name)?),
        ("PUT", [name, "code"]) => Operation::ChangeCode(decoded(name)?),
        ("POST", [name, "invocations"]) => Operation::Invoke(decoded(name)?),
        _ => return Err(unknown()),
    })
}

/// A parameter of the query, decoded.
fn parameter(parts: &Parts, name: &str) -> Option<String> {
    let pairs = parts.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs.into_iter().find(|(known, _)| *known == name)?.1;
    Some(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
}

fn header<'a>(parts: &'a Parts, name: &str) -> &'a str {
    parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

impl Shared {
    pub async fn answer(&self, request: Request<Incoming>) -> Answer {
        let id = self.request_id();
        let mut answer = self.handle(request, &id).await.unwrap_or_else(Refused::into_answer);
        if let Ok(id) = HeaderValue::from_str(&id) {
            answer.headers_mut().entry("x-amzn-requestid").or_insert(id);
        }
        answer
    }

    /// A UUID of version 4.
    fn request_id(&self) -> String {
        let mut bytes = [0u8; 16];
        // It names a request and guards nothing.
        let _ = self.random.fill(&mut bytes);
        let number = u128::from_be_bytes(bytes) & !(0xf << 76) & !(0x3 << 62) | 4 << 76 | 2 << 62;
        let hex = format!("{number:032x}");
        let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
        format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
    }

    async fn handle(&self, request: Request<Incoming>, id: &str) -> Result<Answer, Refused> {
        let (parts, body) = request.into_parts();
        let unauthorised = |refusal: &crate::signature::Refusal| Refused::new(403, refusal.code(), refusal.to_string());
        let claim = Claim::read(&parts.headers, api::time::now()).map_err(|e| unauthorised(&e))?;
        let (namespace, secret) =
            self.keys.find(&claim.key_id).ok_or_else(|| unauthorised(&crate::signature::Refusal::UnknownKey))?;
        let operation = operation(&parts.method, parts.uri.path())?;
        let is_large = matches!(operation, Operation::Create | Operation::ChangeCode(_));
        // The semaphore is never closed.
        let _place = if is_large { self.packages.acquire().await.ok() } else { None };
        let limit = if is_large { PACKAGE } else { PAYLOAD };
        let whole = tokio::time::timeout(BODY_TIME, Limited::new(body, limit).collect()).await;
        let body = match whole {
            Ok(Ok(whole)) => whole.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let message = format!("the request has more than {limit} bytes");
                return Err(Refused::new(413, "RequestTooLargeException", message));
            }
            Ok(Err(_)) | Err(_) => {
                return Err(Refused::new(400, "InvalidRequestContentException", "the request's body broke off"));
            }
        };
        claim.verify(&parts, &body, &secret).map_err(|e| unauthorised(&e))?;
        let qualifier = parameter(&parts, "Qualifier").unwrap_or_else(|| "$LATEST".into());
        if qualifier != "$LATEST" {
            return Err(Refused::parameter(format!("Qualifier: {qualifier:?}: only $LATEST is there")));
        }
        self.perform(operation, &namespace, &parts, body, id).await
    }

    async fn perform(
        &self,
        what: Operation,
        namespace: &str,
        parts: &Parts,
        body: Bytes,
        id: &str,
    ) -> Result<Answer, Refused> {
        let functions = Functions { client: &self.client, packager: &self.packager, namespace };
        let of = |service: &SharedObject| configuration(service);
        Ok(match what {
            Operation::List => with(StatusCode::OK, &self.list(namespace, parts)?),
            Operation::Create => with(StatusCode::CREATED, &of(&functions.create(&read::<Wanted>(&body)?).await?)),
            Operation::Get(name) => with(StatusCode::OK, &whole(functions.get(&name).await?.as_ref())),
            Operation::GetConfiguration(name) => with(StatusCode::OK, &of(&functions.get(&name).await?)),
            Operation::Change(name) => {
                with(StatusCode::OK, &of(&functions.change(&name, &read::<Wanted>(&body)?).await?))
            }
            Operation::ChangeCode(name) => {
                with(StatusCode::OK, &of(&functions.change_code(&name, &read::<NewCode>(&body)?).await?))
            }
            Operation::Delete(name) => {
                functions.delete(&name).await?;
                empty(StatusCode::NO_CONTENT)
            }
            Operation::Invoke(name) => self.invoke(namespace, &name, parts, body, id).await?,
        })
    }

    fn list(&self, namespace: &str, parts: &Parts) -> Result<Value, Refused> {
        let most = match parameter(parts, "MaxItems") {
            None => PAGE,
            Some(text) => text
                .parse()
                .ok()
                .filter(|n| (1..=10_000).contains(n))
                .ok_or_else(|| Refused::parameter(format!("MaxItems: {text:?} is not a number from 1 to 10000")))?,
        };
        let after = parameter(parts, "Marker").unwrap_or_default();
        let mut all = self.messages.dispatcher.functions.list_in(namespace);
        all.retain(|function| !function.is_deleting() && function.name() > after.as_str());
        all.sort_by(|a, b| a.name().cmp(b.name()));
        let page = most.min(PAGE);
        let next = (all.len() > page).then(|| all.get(page - 1).map(|last| last.name().to_owned())).flatten();
        let told: Vec<Value> = all.iter().take(page).map(|function| configuration(function)).collect();
        let mut answer = json!({"Functions": told});
        if let Some(next) = next {
            answer["NextMarker"] = next.into();
        }
        Ok(answer)
    }

    async fn invoke(
        &self,
        namespace: &str,
        name: &str,
        parts: &Parts,
        body: Bytes,
        id: &str,
    ) -> Result<Answer, Refused> {
        let function = self.messages.dispatcher.find(namespace, name).map_err(|e| refused(e, name))?;
        let body = if body.is_empty() { Bytes::from_static(b"{}") } else { body };
        if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&body) {
            let message = format!("Could not parse request body into json: {error}");
            return Err(Refused::new(400, "InvalidRequestContentException", message));
        }
        match header(parts, "x-amz-invocation-type") {
            "" | "RequestResponse" => self.call(&function, parts, body, id).await,
            "Event" => {
                if body.len() > LARGEST {
                    let message = format!("an event that is not waited for has at most {LARGEST} bytes");
                    return Err(Refused::new(413, "RequestTooLargeException", message));
                }
                let event = Event { name: None, body: &body, attempts: None };
                self.messages.put(&function, event).await?;
                Ok(empty(StatusCode::ACCEPTED))
            }
            "DryRun" => Ok(empty(StatusCode::NO_CONTENT)),
            other => Err(Refused::parameter(format!(
                "InvocationType: {other:?} is none of RequestResponse, Event and DryRun"
            ))),
        }
    }

    async fn call(&self, function: &SharedObject, parts: &Parts, body: Bytes, id: &str) -> Result<Answer, Refused> {
        let context = parts.headers.get("x-amz-client-context").map(client_context).transpose()?;
        let (name, begun, clock) = (function.name(), clock::now_nanos(), Instant::now());
        let call = Call { event: body, client_context: context, request: Form::default() };
        let outcome = self.messages.dispatcher.call(function.namespace(), name, call).await;
        let Outcome { payload, failed, request_id, pod, .. } = outcome.map_err(|error| refused(error, name))?;
        let took = clock.elapsed();
        let mut answer = Answer::new(Full::new(payload));
        let headers = answer.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        headers.insert("x-amz-executed-version", HeaderValue::from_static("$LATEST"));
        if failed {
            headers.insert("x-amz-function-error", HeaderValue::from_static("Unhandled"));
        }
        let id = request_id.as_deref().unwrap_or(id);
        if let Ok(id) = HeaderValue::from_str(id) {
            headers.insert("x-amzn-requestid", id);
        }
        if let ("Tail", Some(pod)) = (header(parts, "x-amz-log-type"), &pod) {
            let memory = configuration(function)["MemorySize"].as_i64().unwrap_or_default();
            let told = tail::Told { namespace: function.namespace(), pod, request_id: id, begun, took, memory };
            let log = STANDARD.encode(tail::of(&self.client, &self.streams, &told).await);
            if let Ok(log) = HeaderValue::from_str(&log) {
                headers.insert("x-amz-log-result", log);
            }
        }
        Ok(answer)
    }
}

/// Base64 of a JSON object for the client; the JSON itself for the runtime.
fn client_context(given: &HeaderValue) -> Result<HeaderValue, Refused> {
    let bad = |why: &str| Refused::parameter(format!("ClientContext: {why}"));
    if given.len() > CONTEXT {
        return Err(bad("more than 3583 bytes of base64"));
    }
    let bytes = STANDARD.decode(given.as_bytes()).map_err(|_| bad("it is not base64"))?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|_| bad("it is not JSON"))?;
    HeaderValue::from_str(&value.to_string()).map_err(|_| bad("it has characters that no header can have"))
}

fn refused(error: Error, name: &str) -> Refused {
    let message = error.to_string();
    match error {
        Error::NotFound(_) => Refused::not_found(name),
        Error::TooMany => Refused::new(429, "TooManyRequestsException", "Rate Exceeded."),
        Error::TooLarge => Refused::new(413, "RequestTooLargeException", message),
        Error::Unavailable(_) => Refused::new(502, "ServiceException", message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_operations() {
        let of = |method: &str, path: &str| operation(&method.parse().unwrap(), path);
        assert_eq!(of("GET", "/2015-03-31/functions/").unwrap(), Operation::List);
        assert_eq!(of("POST", "/2015-03-31/functions").unwrap(), Operation::Create);
        let arn = "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Af/invocations";
        assert_eq!(of("POST", arn).unwrap(), Operation::Invoke("f".into()));
        assert_eq!(of("PUT", "/2015-03-31/functions/f/code").unwrap(), Operation::ChangeCode("f".into()));
        assert_eq!(of("GET", "/2015-03-31/functions/f/versions").unwrap_err().code, "UnknownOperationException");
        assert_eq!(of("GET", "/2015-03-31/functionsf").unwrap_err().code, "UnknownOperationException");
        assert_eq!(of("GET", "/2015-03-31/functions/%ff").unwrap_err().code, "InvalidParameterValueException");
    }

    #[test]
    fn contexts_are_unwrapped() {
        let of = |text: &str| client_context(&HeaderValue::from_str(text).unwrap());
        assert_eq!(of(&STANDARD.encode("{\"a\": 1}")).unwrap(), "{\"a\":1}");
        assert!(of("%").is_err() && of(&STANDARD.encode("nonsense")).is_err());
        assert!(of(&STANDARD.encode("\"\u{e4}\"")).is_ok(), "UTF-8 is opaque bytes of a header");
    }
}
