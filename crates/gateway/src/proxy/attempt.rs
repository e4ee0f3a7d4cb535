//! From a chosen backend to an answer: endpoints are tried within the rule's time limits, again where that is safe and
//! the route or a broken connection asks for it, never beyond the upstream's retry budget.

use super::{Chosen, Reply, Visit, random};
use crate::counters::Counters;
use crate::proxy_protocol;
use crate::reply::{self, ReplyBody};
use crate::request::{self, Length, Outgoing};
use crate::routing::{Retry, Rule};
use crate::tunnel;
use crate::upstream::{
    Endpoint, Exchange, Kept, Lease, Picked, ProxyVersion, RequestBody, Upstream, exchange, exchange_http2,
};
use api::demand::Share;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Endpoints that are tried for one request, kept connections that turn out closed included.
const ATTEMPTS: u32 = 3;
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// What an endpoint said.
// Nearly all are of the large variant; a box would cost each of them an allocation.
#[allow(clippy::large_enum_variant)]
enum Answer {
    Http1(Exchange),
    Http2(Response<Incoming>, Lease),
}

impl Answer {
    fn status(&self) -> StatusCode {
        match self {
            Answer::Http1(exchange) => exchange.status,
            Answer::Http2(response, _) => response.status(),
        }
    }
}

/// Why an endpoint gave no answer.
struct Miss {
    error: io::Error,
    kind: Kind,
    /// The body, if nothing was taken of it.
    body: Option<RequestBody>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The endpoint saw nothing of the request.
    Unsent,
    /// A kept connection had been closed meanwhile; whether that was before it took anything.
    Stale {
        unsent: bool,
    },
    /// It may have seen the request, but answered nothing.
    Silent,
    /// It broke off, or what it said was not HTTP.
    Broken,
    Timeout,
    /// The client's fault: its body stalled, or was too large.
    Client(StatusCode),
}

/// How an endpoint is spoken to.
#[derive(Clone, Copy)]
struct Way {
    http2: bool,
    proxy: Option<ProxyVersion>,
    /// The request can be sent again if a kept connection turns out to be closed.
    repeatable: bool,
    /// Not over a connection that was kept.
    fresh: bool,
}

/// What came of looking for an endpoint that has room.
enum Found {
    Lease(Lease),
    Full,
    Nobody,
}

/// What is known of a request's attempts so far.
struct Tries<'a> {
    retry: Option<&'a Retry>,
    idempotent: bool,
    left: u32,
    done: u32,
}

impl Tries<'_> {
    /// Whether to try again after a miss of this kind.
    fn after(&mut self, kind: Kind, upstream: &Upstream) -> bool {
        let safe = match kind {
            Kind::Unsent | Kind::Stale { unsent: true } => true,
            Kind::Stale { unsent: false } | Kind::Silent => self.idempotent,
            Kind::Timeout | Kind::Broken => self.idempotent && self.retry.is_some(),
            Kind::Client(_) => false,
        };
        // A connection that was closed while it was kept says nothing about the endpoint.
        safe && self.left > 1 && (matches!(kind, Kind::Stale { .. }) || upstream.may_retry())
    }

    fn status(&mut self, status: StatusCode, upstream: &Upstream) -> bool {
        self.idempotent
            && self.left > 1
            && self.retry.is_some_and(|retry| retry.codes.contains(&status.as_u16()))
            && upstream.may_retry()
    }

    async fn pause(&mut self) {
        self.left -= 1;
        self.done += 1;
        if let Some(retry) = self.retry {
            let backoff = retry.backoff.saturating_mul(1 << (self.done - 1).min(10)).min(MAX_BACKOFF);
            // Half of it by chance: requests that failed together must not come back together.
            let chance = random() % (backoff.as_micros() as u64 / 2 + 1);
            tokio::time::sleep(backoff / 2 + Duration::from_micros(chance)).await;
        }
    }
}

impl Visit<'_> {
    /// Sends within the rule's time limit. `served` is told which endpoint answered.
    pub(super) async fn send(
        &self,
        rule: &Rule,
        chosen: &Chosen<'_>,
        outgoing: &Outgoing<'_>,
        mut body: RequestBody,
        upgrade: Option<OnUpgrade>,
        served: &mut Option<u64>,
    ) -> Result<Reply, Box<Reply>> {
        let begin = Instant::now();
        let has_body = outgoing.length != Length::None && outgoing.length != Length::Exactly(0);
        let wanted = has_body && (rule.retry.is_some() || !rule.filters.mirrors.is_empty());
        let kept = wanted.then(|| body.keep());
        if !rule.filters.mirrors.is_empty() {
            self.mirror(rule, outgoing, kept.as_ref());
        }
        let body = has_body.then_some(body);
        // Pinned, so that it is there once whichever way it is awaited: what a request holds is moved about by its size.
        let mut attempts = pin!(self.attempts(rule, chosen, outgoing, (body, kept), served));
        let answer = match rule.request_timeout {
            None => attempts.await?,
            Some(limit) => match tokio::time::timeout_at(begin + limit, attempts.as_mut()).await {
                Ok(answer) => answer?,
                Err(_) => return Err(self.too_late()),
            },
        };
        let mut response = self.finish(answer, upgrade)?;
        if let Some(limit) = [rule.request_timeout, rule.backend_timeout].into_iter().flatten().min() {
            response.body_mut().set_deadline(begin + limit);
        }
        Ok(response)
    }

    fn too_late(&self) -> Box<Reply> {
        Counters::add(&self.shared.counters.upstream_timeouts_total);
        Box::new(reply::text(StatusCode::GATEWAY_TIMEOUT, "the service did not answer in time"))
    }

    async fn attempts(
        &self,
        rule: &Rule,
        chosen: &Chosen<'_>,
        outgoing: &Outgoing<'_>,
        (mut body, kept): (Option<RequestBody>, Option<watch::Receiver<Option<Kept>>>),
        served: &mut Option<u64>,
    ) -> Result<Answer, Box<Reply>> {
        let (upstream, has_body) = (chosen.upstream, body.is_some());
        let retry = rule.retry.as_ref();
        let idempotent = self.parts.method.is_idempotent();
        let left = retry.map_or(ATTEMPTS, |retry| retry.attempts + 1);
        let mut tries = Tries { retry, idempotent, left, done: 0 };
        let mut pinned = chosen.endpoint.clone();
        let mut tried: Option<Arc<Endpoint>> = None;
        let mut stale = false;
        let rules = upstream.group().rules.clone();
        let key = rules.key(self.peer.client.ip(), &self.parts.headers);
        upstream.deposit();
        loop {
            let lease = self.endpoint(upstream, pinned.take(), (key, tried.as_ref())).await?;
            let endpoint = lease.endpoint().clone();
            *served = Some(endpoint.id);
            let result = {
                let repeatable = idempotent && (body.is_none() || kept.is_some());
                let way = Way { http2: upstream.http2, proxy: rules.proxy_protocol, repeatable, fresh: stale };
                let once = self.once(way, lease, outgoing, body.take());
                let mut once = pin!(once);
                match rule.backend_timeout {
                    None => once.await,
                    Some(limit) => tokio::time::timeout(limit, once.as_mut()).await.unwrap_or_else(|_| {
                        Err(Miss { error: io::ErrorKind::TimedOut.into(), kind: Kind::Timeout, body: None })
                    }),
                }
            };
            let again = |rest: Option<RequestBody>| match (has_body, rest) {
                (false, _) => Some(None),
                (true, Some(rest)) => Some(Some(rest)),
                (true, None) => kept.as_ref()?.borrow().as_ref().map(|kept| Some(RequestBody::again(kept))),
            };
            match result {
                Ok(answer) => {
                    endpoint.succeeded();
                    let Some(next) = again(None).filter(|_| tries.status(answer.status(), upstream)) else {
                        return Ok(answer);
                    };
                    body = next;
                }
                Err(miss) => {
                    let (kind, error) = (miss.kind, miss.error);
                    if !matches!(kind, Kind::Stale { .. } | Kind::Client(_)) {
                        endpoint.failed();
                    }
                    let Some(next) = again(miss.body).filter(|_| tries.after(kind, upstream)) else {
                        return Err(self.failed(upstream, kind, &error));
                    };
                    body = next;
                    stale = matches!(kind, Kind::Stale { .. });
                    if stale {
                        Counters::add(&self.shared.counters.retries_total);
                        tries.left -= u32::from(tries.retry.is_none());
                        // The endpoint itself is as good as before.
                        pinned = Some(endpoint);
                        continue;
                    }
                }
            }
            Counters::add(&self.shared.counters.retries_total);
            tried = Some(endpoint);
            Box::pin(tries.pause()).await;
        }
    }

    /// One attempt at one endpoint.
    async fn once(
        &self,
        way: Way,
        lease: Lease,
        outgoing: &Outgoing<'_>,
        body: Option<RequestBody>,
    ) -> Result<Answer, Miss> {
        if way.http2 {
            return Box::pin(self.once_http2(lease, outgoing, body)).await;
        }
        let endpoint = lease.endpoint();
        let connected = if way.fresh || way.proxy.is_some() {
            Box::pin(endpoint.connect_new()).await
        } else {
            endpoint.connect(way.repeatable).await
        };
        let mut connection = match connected {
            Ok(connection) => connection,
            Err(error) => return Err(Miss { error, kind: Kind::Unsent, body }),
        };
        outgoing.write(&mut connection.out);
        if let Some(version) = way.proxy {
            // Who is at the other end was said: nobody else's request may follow.
            connection.once = true;
            connection.out.splice(0..0, proxy_protocol::header(version, self.peer.client, self.peer.local));
        }
        let (reused, chunked) = (connection.reused, outgoing.length == Length::Chunked);
        match exchange(connection, lease, &self.parts.method, body, chunked).await {
            Ok(exchange) => Ok(Answer::Http1(exchange)),
            Err(failure) => {
                let kind = match (failure.silent, reused) {
                    _ if failure.client => blame(&failure.error),
                    (true, true) => Kind::Stale { unsent: failure.unsent },
                    (true, false) if failure.unsent => Kind::Unsent,
                    (true, false) => Kind::Silent,
                    (false, _) => Kind::Broken,
                };
                Err(Miss { error: failure.error, kind, body: failure.body })
            }
        }
    }

    async fn once_http2(
        &self,
        lease: Lease,
        outgoing: &Outgoing<'_>,
        body: Option<RequestBody>,
    ) -> Result<Answer, Miss> {
        let Some(request) = http2_request(outgoing, body.unwrap_or_else(RequestBody::empty)) else {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "the target cannot be sent on");
            return Err(Miss { error, kind: Kind::Client(StatusCode::BAD_REQUEST), body: None });
        };
        match exchange_http2(&lease, request).await {
            Ok(response) => Ok(Answer::Http2(response, lease)),
            Err(refusal) => {
                let kind = if refusal.request.is_some() { Kind::Unsent } else { Kind::Silent };
                Err(Miss { error: refusal.error, kind, body: refusal.request.map(Request::into_body) })
            }
        }
    }

    /// An endpoint to send to, with the request's share of its load and its Service's. Where endpoints come and go with
    /// requests, this waits for one to come; where all have as many requests as they may, for room.
    async fn endpoint(
        &self,
        upstream: &Upstream,
        pinned: Option<Arc<Endpoint>>,
        (key, avoid): (Option<u64>, Option<&Arc<Endpoint>>),
    ) -> Result<Lease, Box<Reply>> {
        let load = &upstream.load;
        loop {
            if !load.is_managed() {
                // Nothing to wait for: most Services.
                let share = load.enter();
                if !load.is_held() {
                    match self.lease(upstream, pinned.clone(), key, avoid, share) {
                        Found::Lease(lease) => return Ok(lease),
                        Found::Full => {
                            Box::pin(self.stand_by(upstream)).await?;
                            continue;
                        }
                        Found::Nobody => {}
                    }
                }
            }
            let mut changed = std::pin::pin!(load.changed());
            changed.as_mut().enable();
            let share = load.enter();
            let held = load.is_held();
            let found = if held { Found::Nobody } else { self.lease(upstream, pinned.clone(), key, avoid, share) };
            match found {
                Found::Lease(lease) => return Ok(lease),
                Found::Full => {
                    Box::pin(self.stand_by(upstream)).await?;
                    continue;
                }
                Found::Nobody => {}
            }
            let place = if held || load.is_managed() { load.stand_in_line() } else { None };
            if place.is_none() {
                Counters::add(&self.shared.counters.no_endpoint_total);
                let text = "the service has no ready endpoint";
                return Err(Box::new(reply::text(StatusCode::SERVICE_UNAVAILABLE, text)));
            }
            changed.await;
        }
    }

    fn lease(
        &self,
        upstream: &Upstream,
        pinned: Option<Arc<Endpoint>>,
        key: Option<u64>,
        avoid: Option<&Arc<Endpoint>>,
        share: Share,
    ) -> Found {
        let picked = pinned.map_or_else(|| upstream.pick(random(), key, avoid), Picked::Endpoint);
        match picked {
            Picked::Nobody => Found::Nobody,
            Picked::Full => Found::Full,
            // Another request may have taken the room meanwhile.
            Picked::Endpoint(endpoint) => {
                Lease::within(upstream.group().most, &endpoint, share).map_or(Found::Full, Found::Lease)
            }
        }
    }

    /// Waits until an endpoint may have room.
    async fn stand_by(&self, upstream: &Upstream) -> Result<(), Box<Reply>> {
        let group = upstream.group();
        let mut freed = pin!(upstream.room.freed());
        freed.as_mut().enable();
        let place = upstream.room.wait(group.rules.max_pending);
        if place.is_some() {
            // Room that came free before this one stood here was told to nobody.
            let room = upstream.pick(random(), None, None);
            let waited = match room {
                Picked::Full => tokio::time::timeout(self.shared.body_timeout, freed).await,
                Picked::Endpoint(_) | Picked::Nobody => Ok(()),
            };
            if waited.is_ok() {
                return Ok(());
            }
        }
        Counters::add(&self.shared.counters.overflow_total);
        let text = "the service has as many requests as it may";
        Err(Box::new(reply::text(StatusCode::SERVICE_UNAVAILABLE, text)))
    }

    fn failed(&self, upstream: &Upstream, kind: Kind, error: &io::Error) -> Box<Reply> {
        tracing::debug!(service = %upstream.service, namespace = %upstream.namespace, "no answer: {error}");
        match kind {
            Kind::Timeout => self.too_late(),
            Kind::Client(status) => Box::new(reply::close(reply::text(status, "the request's body was not taken"))),
            Kind::Unsent | Kind::Stale { .. } | Kind::Silent | Kind::Broken => {
                Counters::add(&self.shared.counters.upstream_failures_total);
                let text = "the service could not be reached or broke off";
                Box::new(reply::text(StatusCode::BAD_GATEWAY, text))
            }
        }
    }

    fn finish(&self, answer: Answer, upgrade: Option<OnUpgrade>) -> Result<Reply, Box<Reply>> {
        let Exchange { status, mut headers, body } = match answer {
            Answer::Http1(exchange) => exchange,
            Answer::Http2(response, lease) => {
                let (mut parts, body) = response.into_parts();
                request::strip_response(&mut parts.headers);
                let body = ReplyBody::Http2 { body, deadline: None, _lease: lease };
                return Ok(reply::assemble(parts.status, parts.headers, body));
            }
        };
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
}

/// The status for a client whose body could not be read.
fn blame(error: &io::Error) -> Kind {
    Kind::Client(match error.kind() {
        io::ErrorKind::TimedOut => StatusCode::REQUEST_TIMEOUT,
        io::ErrorKind::FileTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        _ => StatusCode::BAD_REQUEST,
    })
}

pub(super) fn http2_request(outgoing: &Outgoing<'_>, body: RequestBody) -> Option<Request<RequestBody>> {
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
