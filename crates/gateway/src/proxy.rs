//! The way of one request: checked, routed, changed by filters, sent to an endpoint (to another if the first cannot be
//! reached), and the answer streamed back.

use crate::counters::{Counters, Level};
use crate::gateway::Shared;
use crate::reply::{self, ReplyBody};
use crate::request::{self, Length, Outgoing, Place};
use crate::routing::{Entry, PathMatch, Rule, Target};
use crate::tunnel;
use crate::upstream::{Endpoint, Failure, Lease, Upstream, exchange, exchange_http2, has_token};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// Endpoints that are tried for one request, kept connections that turn out closed included.
const ATTEMPTS: usize = 3;

type Reply = Response<ReplyBody>;

/// Answers one request. Never fails: what goes wrong is an answer too.
pub async fn handle(shared: Arc<Shared>, client: SocketAddr, mut request: Request<Incoming>) -> Reply {
    let counters = &shared.counters;
    Counters::add(&counters.requests_total);
    let _active = Level::up(&counters.requests_active);
    let begin = Instant::now();
    let upgrade = wants_upgrade(&request).then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let mut route = None;
    let response = match Place::of(&parts) {
        Err((status, why)) => {
            Counters::add(&counters.refused_total);
            let mut refusal = reply::text(status, why);
            if parts.version <= Version::HTTP_11 {
                // Whoever is ambiguous once is not listened to any further.
                refusal.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            refusal
        }
        Ok(place) => {
            let visit = Visit { shared: &shared, client, parts: &parts, place: &place };
            visit.answer(body, upgrade, &mut route).await
        }
    };
    counters.response(response.status());
    tracing::debug!(
        target: "gateway::access",
        client = %client.ip(),
        method = %parts.method,
        host = parts.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default(),
        path = parts.uri.path(),
        status = response.status().as_u16(),
        route = route.as_deref().unwrap_or_default(),
        microseconds = begin.elapsed().as_micros() as u64,
        "request"
    );
    response
}

fn wants_upgrade(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    request.version() == Version::HTTP_11
        && headers.get(UPGRADE).is_some_and(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c"))
        && has_token(headers, &CONNECTION, "upgrade")
}

/// One request and what was found out about it.
struct Visit<'a> {
    shared: &'a Arc<Shared>,
    client: SocketAddr,
    parts: &'a Parts,
    place: &'a Place<'a>,
}

impl Visit<'_> {
    async fn answer(&self, body: Incoming, upgrade: Option<OnUpgrade>, route: &mut Option<Arc<str>>) -> Reply {
        let counters = &self.shared.counters;
        let Some(table) = self.shared.table() else {
            return reply::text(StatusCode::SERVICE_UNAVAILABLE, "the gateway has not read its routes yet");
        };
        let Some(entry) = table.find(&self.place.host, &self.place.seen(self.parts)) else {
            Counters::add(&counters.no_route_total);
            let path: String = self.place.path.chars().take(200).collect();
            let text = format!("no HTTPRoute matches host {:?} and path {path:?}", self.place.host);
            return reply::text(StatusCode::NOT_FOUND, &text);
        };
        let rule = &entry.rule;
        *route = Some(rule.route.clone());
        if let Some(why) = &rule.invalid {
            return self.invalid(rule, why);
        }
        let mut response = self.serve(entry, body, upgrade).await;
        rule.filters.response.apply(response.headers_mut());
        response
    }

    async fn serve(&self, entry: &Entry, body: Incoming, upgrade: Option<OnUpgrade>) -> Reply {
        let rule = &entry.rule;
        let prefix = match &entry.condition.path {
            PathMatch::Prefix(prefix) => prefix.as_str(),
            PathMatch::Exact(_) | PathMatch::Regex(_) => "",
        };
        if let Some(redirect) = &rule.filters.redirect {
            let location = redirect.location(self.place.authority, &self.place.path, self.place.query, prefix);
            return match location {
                Some(location) => reply::redirect(redirect.status, location),
                None => reply::text(StatusCode::BAD_REQUEST, "the redirect's target cannot be written"),
            };
        }
        let Some(backend) = rule.pick(random()) else {
            return self.invalid(rule, "the rule has no backend");
        };
        let upstream = match &backend.target {
            Target::Upstream(upstream) => upstream,
            Target::Invalid(why) => return self.invalid(rule, why),
        };
        let headers = request::changed(&self.parts.headers, [&rule.filters.request, &backend.filters.request]);
        let path = rule.filters.rewrite.path.as_ref().map(|change| change.apply(&self.place.path, prefix));
        let host = rule.filters.rewrite.host.as_ref().map(HeaderValue::as_bytes);
        let outgoing = Outgoing {
            method: &self.parts.method,
            headers: &headers,
            path: path.as_deref().unwrap_or(&self.place.path),
            query: self.place.query,
            // A filter may have set another host.
            host: host.unwrap_or_else(|| match headers.get(HOST) {
                Some(host) if rule.filters.request.set.iter().any(|(name, _)| name == HOST) => host.as_bytes(),
                _ => self.place.authority.as_bytes(),
            }),
            client_host: self.place.authority,
            client: self.client.ip(),
            length: self.length(&body),
            upgrade: upgrade.as_ref().and_then(|_| self.parts.headers.get(UPGRADE)),
        };
        self.mirror(rule, &outgoing);
        let mut response = match self.send(rule, upstream, &outgoing, body, upgrade).await {
            Ok(response) => response,
            Err(reply) => return *reply,
        };
        backend.filters.response.apply(response.headers_mut());
        response
    }

    fn length(&self, body: &Incoming) -> Length {
        match body.size_hint().exact() {
            _ if body.is_end_stream() && !self.parts.headers.contains_key(CONTENT_LENGTH) => Length::None,
            Some(length) => Length::Exactly(length),
            None => Length::Chunked,
        }
    }

    fn invalid(&self, rule: &Rule, why: &str) -> Reply {
        Counters::add(&self.shared.counters.invalid_backend_total);
        tracing::debug!(route = %rule.route, "answered 500: {why}");
        reply::text(StatusCode::INTERNAL_SERVER_ERROR, "the route's rule cannot be served")
    }

    /// Sends within the rule's time limits.
    async fn send(
        &self,
        rule: &Rule,
        upstream: &Arc<Upstream>,
        outgoing: &Outgoing<'_>,
        body: Incoming,
        upgrade: Option<OnUpgrade>,
    ) -> Result<Reply, Box<Reply>> {
        let limits = [rule.request_timeout, rule.backend_timeout];
        let Some(limit) = limits.into_iter().flatten().min() else {
            return self.attempt(upstream, outgoing, body, upgrade).await;
        };
        let begin = tokio::time::Instant::now();
        match tokio::time::timeout_at(begin + limit, self.attempt(upstream, outgoing, body, upgrade)).await {
            Ok(Ok(mut response)) => {
                if let (ReplyBody::Http1(body), Some(limit)) = (response.body_mut(), rule.request_timeout) {
                    body.set_deadline(begin + limit);
                }
                Ok(response)
            }
            Ok(refused) => refused,
            Err(_) => {
                Counters::add(&self.shared.counters.upstream_timeouts_total);
                Err(Box::new(reply::text(StatusCode::GATEWAY_TIMEOUT, "the service did not answer in time")))
            }
        }
    }

    async fn attempt(
        &self,
        upstream: &Arc<Upstream>,
        outgoing: &Outgoing<'_>,
        body: Incoming,
        upgrade: Option<OnUpgrade>,
    ) -> Result<Reply, Box<Reply>> {
        if upstream.http2 {
            return self.attempt_http2(upstream, outgoing, body).await;
        }
        let counters = &self.shared.counters;
        let repeatable = self.parts.method.is_idempotent();
        let has_body = outgoing.length != Length::None && outgoing.length != Length::Exactly(0);
        let mut body = has_body.then_some(body);
        let mut tried: Option<Arc<Endpoint>> = None;
        let mut stale = false;
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                Counters::add(&counters.retries_total);
            }
            let endpoint = self.pick(upstream, tried.as_ref())?;
            let lease = Lease::take(endpoint.clone());
            let connected = if stale { endpoint.connect_new().await } else { endpoint.connect(repeatable).await };
            let mut connection = match connected {
                Ok(connection) => connection,
                Err(error) => {
                    endpoint.failed();
                    (tried, last) = (Some(endpoint), Some(error));
                    continue;
                }
            };
            outgoing.write(&mut connection.out);
            let reused = connection.reused;
            let chunked = outgoing.length == Length::Chunked;
            match exchange(connection, lease, &self.parts.method, body.take(), chunked).await {
                Ok(exchange) => {
                    endpoint.succeeded();
                    return self.finish(exchange, upgrade);
                }
                Err(Failure { error, silent, body: rest }) => {
                    body = rest;
                    last = Some(error);
                    if !reused {
                        endpoint.failed();
                        tried = Some(endpoint);
                    }
                    stale = reused;
                    if !(silent && repeatable && (body.is_some() || !has_body)) {
                        break;
                    }
                }
            }
        }
        Err(self.failed(upstream, last))
    }

    fn pick(&self, upstream: &Upstream, avoid: Option<&Arc<Endpoint>>) -> Result<Arc<Endpoint>, Box<Reply>> {
        upstream.pick(random(), avoid).ok_or_else(|| {
            Counters::add(&self.shared.counters.no_endpoint_total);
            Box::new(reply::text(StatusCode::SERVICE_UNAVAILABLE, "the service has no ready endpoint"))
        })
    }

    fn failed(&self, upstream: &Upstream, error: Option<io::Error>) -> Box<Reply> {
        Counters::add(&self.shared.counters.upstream_failures_total);
        if let Some(error) = error {
            tracing::debug!(service = %upstream.service, namespace = %upstream.namespace, "no answer: {error}");
        }
        Box::new(reply::text(StatusCode::BAD_GATEWAY, "the service could not be reached or broke off"))
    }

    fn finish(&self, exchange: crate::upstream::Exchange, upgrade: Option<OnUpgrade>) -> Result<Reply, Box<Reply>> {
        let crate::upstream::Exchange { status, mut headers, body } = exchange;
        if status != StatusCode::SWITCHING_PROTOCOLS {
            request::strip_response(&mut headers);
            return Ok(reply::assemble(status, headers, ReplyBody::Http1(body)));
        }
        let (Some(upgrade), Some(protocol), Some((stream, read, lease))) =
            (upgrade, headers.get(UPGRADE).cloned(), body.into_tunnel())
        else {
            let text = "the service switched protocols unasked";
            return Err(Box::new(reply::text(StatusCode::BAD_GATEWAY, text)));
        };
        Counters::add(&self.shared.counters.upgrades_total);
        request::strip_response(&mut headers);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
        tunnel::spawn(self.shared, upgrade, stream, read, lease);
        Ok(reply::assemble(status, headers, ReplyBody::Text(None)))
    }

    async fn attempt_http2(
        &self,
        upstream: &Arc<Upstream>,
        outgoing: &Outgoing<'_>,
        body: Incoming,
    ) -> Result<Reply, Box<Reply>> {
        let mut request = match http2_request(outgoing, body) {
            Some(request) => request,
            None => return Err(Box::new(reply::text(StatusCode::BAD_REQUEST, "the target cannot be sent on"))),
        };
        let mut tried: Option<Arc<Endpoint>> = None;
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let endpoint = self.pick(upstream, tried.as_ref())?;
            let lease = Lease::take(endpoint.clone());
            match exchange_http2(&lease, request).await {
                Ok(response) => {
                    endpoint.succeeded();
                    let (mut parts, body) = response.into_parts();
                    request::strip_response(&mut parts.headers);
                    return Ok(reply::assemble(parts.status, parts.headers, ReplyBody::Http2 { body, _lease: lease }));
                }
                Err(refusal) => {
                    last = Some(refusal.error);
                    let Some(again) = refusal.request else { break };
                    endpoint.failed();
                    tried = Some(endpoint);
                    request = again;
                    Counters::add(&self.shared.counters.retries_total);
                }
            }
        }
        Err(self.failed(upstream, last))
    }

    /// Copies a request without a body to the rule's mirrors; their answers are read and forgotten. Requests with a body
    /// are not copied: that would mean to keep it.
    fn mirror(&self, rule: &Rule, outgoing: &Outgoing<'_>) {
        for (target, percent) in &rule.filters.mirrors {
            let Target::Upstream(upstream) = target else { continue };
            if outgoing.length != Length::None || outgoing.upgrade.is_some() || random() % 100 >= u64::from(*percent) {
                continue;
            }
            let Some(endpoint) = upstream.pick(random(), None) else { continue };
            let mut head = Vec::new();
            outgoing.write(&mut head);
            Counters::add(&self.shared.counters.mirrored_total);
            let method: Method = self.parts.method.clone();
            tokio::spawn(async move {
                let lease = Lease::take(endpoint.clone());
                let Ok(mut connection) = endpoint.connect(true).await else { return };
                connection.out = head;
                if let Ok(exchange) = exchange(connection, lease, &method, None, false).await {
                    let mut body = std::pin::pin!(exchange.body);
                    while let Some(Ok(_)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
                }
            });
        }
    }
}

fn http2_request(outgoing: &Outgoing<'_>, body: Incoming) -> Option<Request<Incoming>> {
    let mut target = outgoing.path.to_owned();
    if let Some(query) = outgoing.query {
        target.push('?');
        target.push_str(query);
    }
    let uri = Uri::builder().scheme("http").authority(outgoing.host).path_and_query(target).build().ok()?;
    let headers: HeaderMap = outgoing.http2_headers();
    let mut request = Request::new(body);
    *request.method_mut() = outgoing.method.clone();
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    Some(request)
}

/// Good enough to spread load: xorshift64* per thread.
pub(crate) fn random() -> u64 {
    thread_local! {
        static STATE: Cell<u64> = Cell::new(RandomState::new().hash_one(0u8) | 1);
    }
    STATE.with(|state| {
        let mut x = state.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        state.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    })
}
