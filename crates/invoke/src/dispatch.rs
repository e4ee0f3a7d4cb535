//! Calling functions, through the gateway: it finds their pods, wakes them and holds what waits.

use api::client::{Client, ListOptions};
use api::informer::Informer;
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub type InvokeKey = Arc<dyn Fn(&str, &str) -> String + Send + Sync>;

/// Bytes of an event, and of its result.
pub const PAYLOAD: usize = 6 << 20;
const LONGEST: Duration = Duration::from_secs(3700);
/// As `function::lambda` has them.
const KEY: &str = "atoll-invoke-key";
const POD: &str = "atoll-pod";
pub const INTERFACE: &str = "functions.atoll.dev/interface";

/// One call.
pub struct Call {
    pub event: Bytes,
    pub client_context: Option<HeaderValue>,
    pub request: Form,
}

/// How a call is put as a request.
pub struct Form {
    pub path: String,
    /// Without a content type it is JSON.
    pub headers: HeaderMap,
    pub limit: Duration,
}

impl Default for Form {
    fn default() -> Form {
        Form { path: "/".into(), headers: HeaderMap::new(), limit: LONGEST }
    }
}

/// What became of a call that reached its function.
#[derive(Debug)]
pub struct Outcome {
    pub payload: Bytes,
    /// The function failed; the payload says how.
    pub failed: bool,
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub request_id: Option<String>,
    /// The pod that worked on it, of a Lambda function.
    pub pod: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("function {0:?} not found")]
    NotFound(String),
    #[error("too many requests wait for the function")]
    TooMany,
    #[error("the event or the result has more than {PAYLOAD} bytes")]
    TooLarge,
    #[error("the function cannot be reached now: {0}")]
    Unavailable(String),
}

pub struct Dispatcher {
    pub client: Arc<dyn Client>,
    pub functions: Informer,
    slices: Informer,
    gateway: SocketAddr,
    key: InvokeKey,
    pub domain: String,
}

pub fn functions() -> Resource {
    Resource::new("serving.knative.dev", "v1", "services")
}

/// Whether a Knative Service speaks Lambda's runtime API.
pub fn is_lambda(function: &SharedObject) -> bool {
    let annotations = function.pointer("/spec/template/metadata/annotations");
    annotations.and_then(|all| all.get(INTERFACE)).is_some_and(|value| value == "lambda")
}

impl Dispatcher {
    pub fn new(client: Arc<dyn Client>, gateway: SocketAddr, key: InvokeKey, domain: String) -> Dispatcher {
        let functions = Informer::spawn(client.clone(), functions(), "", ListOptions::default());
        let resource = Resource::new("discovery.k8s.io", "v1", "endpointslices");
        let slices = Informer::spawn(client.clone(), resource, "", ListOptions::default());
        Dispatcher { client, functions, slices, gateway, key, domain }
    }

    pub fn find(&self, namespace: &str, name: &str) -> Result<SharedObject, Error> {
        let found = self.functions.get(namespace, name).filter(|function| !function.is_deleting());
        found.ok_or_else(|| Error::NotFound(name.to_owned()))
    }

    /// Sends an event and waits for the result. A Lambda function gets it as it is, any other as the body of a POST.
    pub async fn call(&self, namespace: &str, name: &str, call: Call) -> Result<Outcome, Error> {
        let function = self.find(namespace, name)?;
        let mut request = self.request(namespace, name, &call.request);
        if is_lambda(&function) {
            request = request.header(KEY, (self.key)(namespace, name));
            if let Some(context) = call.client_context {
                request = request.header("lambda-runtime-client-context", context);
            }
        }
        let request = request.body(Full::new(call.event)).map_err(|e| Error::Unavailable(e.to_string()))?;
        let exchanged = tokio::time::timeout(call.request.limit, exchange(self.gateway, request)).await;
        let (status, headers, payload) = exchanged.map_err(|_| Error::Unavailable("no answer in time".into()))??;
        let told = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (request_id, pod) = (told("x-amzn-requestid"), told(POD));
        let of_lambda = request_id.is_some();
        match status {
            StatusCode::TOO_MANY_REQUESTS => Err(Error::TooMany),
            StatusCode::PAYLOAD_TOO_LARGE => Err(Error::TooLarge),
            StatusCode::SERVICE_UNAVAILABLE => Err(Error::Unavailable(beginning(&payload))),
            // Not what the runtime said: the gateway's own words.
            _ if is_lambda(&function) && !of_lambda => Err(Error::Unavailable(beginning(&payload))),
            status => {
                let failed = headers.contains_key("x-amz-function-error") || !status.is_success();
                let payload = match (failed, of_lambda) {
                    (true, false) => {
                        let message = format!("the function answered {status}: {}", beginning(&payload));
                        serde_json::json!({"errorType": "Unhandled", "errorMessage": message}).to_string().into()
                    }
                    _ => payload,
                };
                Ok(Outcome { payload, failed, status, headers, request_id, pod })
            }
        }
    }

    fn request(&self, namespace: &str, name: &str, form: &Form) -> http::request::Builder {
        let mut request = Request::builder()
            .method("POST")
            .uri(&form.path)
            .header(HOST, format!("{name}.{namespace}.svc.{}", self.domain));
        if !form.headers.contains_key(CONTENT_TYPE) {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        form.headers.iter().fold(request, |request, (name, value)| request.header(name, value))
    }

    /// Sends an event to a ready endpoint of a Service, at its first port.
    pub async fn call_service(&self, namespace: &str, name: &str, call: Call) -> Result<Outcome, Error> {
        let endpoint = self.endpoint(namespace, name).ok_or_else(|| {
            Error::Unavailable(format!("Service {name:?} has no ready endpoint in namespace {namespace}"))
        })?;
        let request = self.request(namespace, name, &call.request).body(Full::new(call.event));
        let request = request.map_err(|e| Error::Unavailable(e.to_string()))?;
        let exchanged = tokio::time::timeout(call.request.limit, exchange(endpoint, request)).await;
        let (status, headers, payload) = exchanged.map_err(|_| Error::Unavailable("no answer in time".into()))??;
        let failed = !status.is_success();
        let said = || format!("the Service answered {status}: {}", beginning(&payload)).into();
        let payload = if failed { said() } else { payload };
        Ok(Outcome { payload, failed, status, headers, request_id: None, pod: None })
    }

    /// Any of those that are ready.
    fn endpoint(&self, namespace: &str, service: &str) -> Option<SocketAddr> {
        let slices = self.slices.list_in(namespace);
        let own = slices.iter().filter(|slice| {
            let labels = slice.pointer("/metadata/labels");
            labels.and_then(|l| l.get("kubernetes.io/service-name")).is_some_and(|name| name == service)
        });
        let mut ready = Vec::new();
        for slice in own {
            let port =
                slice.pointer("/ports/0/port").and_then(serde_json::Value::as_u64).and_then(|p| u16::try_from(p).ok());
            let endpoints = slice.get("endpoints").and_then(serde_json::Value::as_array);
            for endpoint in endpoints.into_iter().flatten() {
                let is_ready = endpoint.pointer("/conditions/ready") != Some(&serde_json::Value::Bool(false));
                let address =
                    endpoint.pointer("/addresses/0").and_then(|a| a.as_str()?.parse::<std::net::IpAddr>().ok());
                ready.extend(address.zip(port).filter(|_| is_ready).map(SocketAddr::from));
            }
        }
        let at = usize::try_from(api::names::random_u64()).unwrap_or(0).checked_rem(ready.len())?;
        ready.get(at).copied()
    }
}

async fn exchange(at: SocketAddr, request: Request<Full<Bytes>>) -> Result<(StatusCode, HeaderMap, Bytes), Error> {
    let unavailable = |e: &dyn std::fmt::Display| Error::Unavailable(format!("{at}: {e}"));
    let stream = tokio::net::TcpStream::connect(at).await.map_err(|e| unavailable(&e))?;
    stream.set_nodelay(true).map_err(|e| unavailable(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| unavailable(&e))?;
    let connection = tokio::spawn(connection);
    let answered = async {
        let (parts, body) = sender.send_request(request).await.map_err(|e| unavailable(&e))?.into_parts();
        let body = match Limited::new(body, PAYLOAD).collect().await {
            Ok(whole) => whole.to_bytes(),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => return Err(Error::TooLarge),
            Err(error) => return Err(unavailable(&error)),
        };
        Ok((parts.status, parts.headers, body))
    }
    .await;
    connection.abort();
    answered
}

/// The beginning of what was said.
fn beginning(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload.get(..payload.len().min(512)).unwrap_or_default()).trim().to_owned()
}
