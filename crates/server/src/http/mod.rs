//! HTTP: connections in, requests authenticated, authorised, routed and answered.
//!
//! The way of one request: TLS connection -> [`Service::answer`] -> who is it (`auth`) -> what is asked (`route`) -> may
//! they (`Permit`) -> the handler, which is handed the permit.

mod connection;
pub(crate) mod decode;
mod inspect;
mod logs;
mod machines;
mod metrics;
mod negotiate;
mod objects;
mod proxy;
mod query;
mod resources;
mod respond;
mod route;
mod watch;
mod wire;

pub use connection::serve;
pub(crate) use decode::{Decoded, Format, decode};
pub(crate) use negotiate::ranges;
pub(crate) use query::Query;
pub(crate) use respond::{COMPRESS_FROM, accepts_gzip, bytes, gunzip, gzip};
pub(crate) use route::Discovery as DiscoveryRoute;
pub(crate) use watch::watch_error;

use crate::admission::tokens;
use crate::auth::{Permit, User, authorize, impersonated, serve_review};
use crate::core::Core;
use crate::discovery::Discovery;
use api::status::{Reason, Status, StatusResult};
use http::{Method, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use route::Route;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub type Body = UnsyncBoxBody<bytes::Bytes, std::io::Error>;
pub type Response = hyper::Response<Body>;
pub(crate) use hyper::body::Incoming;
pub(crate) type Request = hyper::Request<Incoming>;

/// Largest body of a request.
pub const BODY_LIMIT: usize = 3 << 20;
/// The store has this long to say that it is well.
const STORE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
/// Requests worked on at once, beside watches and streams.
const IN_FLIGHT: usize = 512;

/// What all connections share.
pub struct Service {
    pub core: Arc<Core>,
    pub discovery: Discovery,
    slots: tokio::sync::Semaphore,
    requests: metrics::Requests,
    /// Cancelled when the server stops: watches and log streams end.
    pub stop: CancellationToken,
}

impl Service {
    pub fn new(core: Arc<Core>, stop: CancellationToken) -> Self {
        let discovery = Discovery::new(core.clone());
        Service { core, discovery, slots: tokio::sync::Semaphore::new(IN_FLIGHT), requests: Default::default(), stop }
    }

    /// Answers one request from whoever holds the certificate `peer`.
    pub async fn answer(&self, request: Request, peer: Option<Arc<User>>) -> Response {
        let method = request.method().clone();
        let response = match self.try_answer(request, peer).await {
            Ok(response) => response,
            Err(status) => respond::status(&status),
        };
        self.requests.count(&method, response.status());
        response
    }

    async fn try_answer(&self, request: Request, peer: Option<Arc<User>>) -> StatusResult<Response> {
        let user = self.authenticate(&request, peer).await?;
        let user = impersonated(user, request.headers())?;
        let path = request.uri().path().to_owned();
        let query = Query::parse(request.uri().query().unwrap_or(""));
        let route = route::parse(&path);
        let asked = route::attributes(&route, request.method(), &path, query.flag("watch"));
        let permit = authorize(&user, asked)?;
        // The seam for the audit log: `permit` says who asked for what, the response says what came of it.
        let Ok(_slot) = self.slots.try_acquire() else {
            let mut status = Status::new(Reason::TooManyRequests, "too many requests are being worked on");
            status.retry_after_seconds = Some(1);
            return Err(status);
        };
        match route {
            Route::Resource(resource) => resources::handle(self, &permit, request, resource, query).await,
            Route::Health => self.health(&path, &query).await,
            Route::Metrics if *request.method() == Method::GET => Ok(metrics::answer(self).await),
            Route::Metrics => Err(method_not_allowed()),
            Route::Unknown => Err(no_such_path()),
            Route::Discovery(asked) => {
                if !matches!(*request.method(), Method::GET | Method::HEAD) {
                    return Err(method_not_allowed());
                }
                self.discovery.answer(&permit, &asked, request.headers())
            }
        }
    }

    /// Alive: it answers. Ready and healthy: the store does, too.
    async fn health(&self, path: &str, query: &Query) -> StatusResult<Response> {
        let check = path.trim_matches('/').split('/').next().unwrap_or("");
        let asked = async {
            check == "livez"
                || matches!(tokio::time::timeout(STORE_PATIENCE, self.core.storage.store.revision()).await, Ok(Ok(_)))
        };
        let well = asked.await;
        let (code, mark, word) = if well {
            (StatusCode::OK, "[+]store ok", "passed")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "[-]store failed", "failed")
        };
        let body = match (query.has("verbose"), well) {
            (false, true) => "ok".to_owned(),
            _ => format!("[+]ping ok\n{mark}\n{check} check {word}\n"),
        };
        Ok(respond::text(code, body))
    }

    /// The certificate's user, else the token's, else anonymous.
    async fn authenticate(&self, request: &Request, peer: Option<Arc<User>>) -> StatusResult<Arc<User>> {
        if let Some(user) = peer {
            return Ok(user);
        }
        let Some(value) = request.headers().get(header::AUTHORIZATION) else { return Ok(Arc::new(User::anonymous())) };
        let unauthorized = || Status::new(Reason::Unauthorized, "Unauthorized");
        let value = value.to_str().map_err(|_| unauthorized())?;
        let (scheme, token) = value.split_once(' ').ok_or_else(unauthorized)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(unauthorized());
        }
        tokens::authenticate(&self.core, token.trim()).await.map(Arc::new)
    }
}

fn no_such_path() -> Status {
    Status::new(Reason::NotFound, "the server could not find the requested resource")
}

fn method_not_allowed() -> Status {
    Status::new(Reason::MethodNotAllowed, "the server does not allow this method on the requested resource")
}

/// Virtual resources that are answered and never stored.
async fn review(
    service: &Service,
    permit: &Permit,
    request: Request,
    path: &route::ResourcePath,
) -> StatusResult<Response> {
    if request.method() != Method::POST {
        return Err(method_not_allowed());
    }
    let format = decode::format_of(header_text(request.headers(), header::CONTENT_TYPE))?;
    let body = decode::read(request.into_body()).await?;
    let object = decode::decode(&body, format)?.value;
    let answer = serve_review(&service.core, permit, &path.group, &path.plural, object).await?;
    Ok(respond::json(StatusCode::CREATED, &answer))
}

pub(crate) fn header_text(headers: &http::HeaderMap, name: header::HeaderName) -> &str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("")
}
