//! The way of one request: checked, routed, changed by filters, sent to an endpoint (to another if the first cannot be
//! reached), and the answer streamed back.
//!
//! `attempt` is what happens between rule and endpoint, `mirror` the copies.

mod attempt;
mod cached;
mod mirror;

use crate::access::Line;
use crate::counters::{Counters, Level};
use crate::gateway::Shared;
use crate::peer::Peer;
use crate::policy::Grant;
use crate::reply::{self, ReplyBody};
use crate::request::{self, Length, Outgoing, Place};
use crate::routing::{Backend, Came, Entry, PathMatch, Rule, Seen, Table, Target, is_preflight};
use crate::trace::{TRACEPARENT, Trace};
use crate::upstream::{Endpoint, RequestBody, Upstream, has_token};
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, CONNECTION, CONTENT_LENGTH, HOST, ORIGIN, UPGRADE};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Bytes and time for which the rest of a body is read that nobody wants.
const UNREAD: usize = 64 << 10;
const UNREAD_TIME: Duration = Duration::from_millis(50);

type Reply = Response<ReplyBody>;

/// Answers one request. Never fails: what goes wrong is an answer too.
pub async fn handle(shared: Arc<Shared>, peer: Arc<Peer>, mut request: Request<Incoming>) -> Reply {
    let upgrade = wants_upgrade(&request).then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let mut body = Some(body);
    let response = respond(&shared, &peer, &parts, &mut body, upgrade).await;
    if let Some(unread) = body.filter(|body| parts.version == Version::HTTP_2 && !body.is_end_stream()) {
        Box::pin(forget(unread)).await;
    }
    response
}

/// The same with the request taken apart. What is left in `body` was not read.
pub async fn respond(
    shared: &Arc<Shared>,
    peer: &Peer,
    parts: &Parts,
    body: &mut Option<Incoming>,
    upgrade: Option<OnUpgrade>,
) -> Reply {
    let counters = &shared.counters;
    Counters::add(&counters.requests_total);
    let _active = Level::up(&counters.requests_active);
    let begin = Instant::now();
    let trace = match &shared.access {
        _ if parts.headers.contains_key(TRACEPARENT) => Trace::read(&parts.headers, random()),
        Some(_) => Some(Trace::begin(u128::from(random()) << 64 | u128::from(random()), random())),
        None => None,
    };
    let mut route = None;
    let response = match Place::of(parts) {
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
            let visit = Visit { shared, peer, parts, place: &place, trace };
            let mut response = visit.answer(body, upgrade, &mut route).await;
            reply::speak_grpc(parts, &mut response);
            response
        }
    };
    counters.response(response.status());
    if let Some(log) = &shared.access {
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let host = parts.uri.authority().map(|authority| authority.as_str());
        let host = host.or_else(|| parts.headers.get(HOST).and_then(|host| host.to_str().ok()));
        let line = Line {
            client: peer.client.ip(),
            method: parts.method.as_str(),
            host: host.unwrap_or_default(),
            target,
            version: parts.version,
            status: response.status().as_u16(),
            bytes: response.body().size_hint().exact(),
            microseconds: begin.elapsed().as_micros() as u64,
            route: route.as_deref().unwrap_or_default(),
            trace: trace.map(|trace| trace.id),
        };
        log.write(&line, api::time::now());
    }
    tracing::debug!(
        target: "gateway::access",
        client = %peer.client.ip(),
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

/// Takes the rest of a small body. Clients of HTTP/2 take an answer for broken when the stream is reset before they have
/// said all; but none is waited for, and a large body is reset.
async fn forget(body: Incoming) {
    let mut body = pin!(http_body_util::Limited::new(body, UNREAD));
    let rest = async { while let Some(Ok(_)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {} };
    let _ = tokio::time::timeout(UNREAD_TIME, rest).await;
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
    peer: &'a Peer,
    parts: &'a Parts,
    place: &'a Place<'a>,
    trace: Option<Trace>,
}

/// Where a request is sent, and what its client is told for next time.
struct Chosen<'r> {
    backend: &'r Backend,
    upstream: &'r Arc<Upstream>,
    /// The endpoint of the client's session.
    endpoint: Option<Arc<Endpoint>>,
}

impl Visit<'_> {
    /// Answers. What is left in `body` was not read.
    async fn answer(
        &self,
        body: &mut Option<Incoming>,
        upgrade: Option<OnUpgrade>,
        route: &mut Option<Arc<str>>,
    ) -> Reply {
        let counters = &self.shared.counters;
        let Some(table) = self.shared.table() else {
            return reply::text(StatusCode::SERVICE_UNAVAILABLE, "the gateway has not read its routes yet");
        };
        if self.peer.secure && !self.shared.sites().same_listener(self.peer, &self.place.host) {
            // RFC 9110, section 15.5.20: what was agreed on in TLS does not hold for that host.
            let text = "the TLS connection was made for another host";
            return reply::text(StatusCode::MISDIRECTED_REQUEST, text);
        }
        let Some(entry) = self.find(&table) else {
            Counters::add(&counters.no_route_total);
            let path: String = self.place.path.chars().take(200).collect();
            let text = format!("no HTTPRoute matches host {:?} and path {path:?}", self.place.host);
            return reply::text(StatusCode::NOT_FOUND, &text);
        };
        let rule = &entry.rule;
        *route = Some(rule.route.clone());
        let mut grant = Grant::default();
        if !entry.policies.is_empty() {
            let now = unix_now();
            for policy in entry.policies.iter() {
                if let Err(refusal) = policy.check(self.peer, self.parts, &rule.route, now, counters, &mut grant) {
                    return *refusal;
                }
            }
        }
        if let Some(why) = &rule.invalid {
            return self.invalid(rule, why);
        }
        let mut response = match &rule.filters.cors {
            Some(cors) if is_preflight(&self.parts.method, &self.parts.headers) => {
                return reply::empty(StatusCode::NO_CONTENT, cors.preflight(&self.parts.headers));
            }
            _ => self.serve(entry, &grant, body, upgrade).await,
        };
        rule.filters.response.apply(response.headers_mut());
        if let Some(cors) = &rule.filters.cors
            && self.parts.headers.contains_key(ORIGIN)
        {
            cors.apply(&self.parts.headers, response.headers_mut());
        }
        match entry.policies.iter().rev().find_map(|policy| policy.compression.as_ref()) {
            Some(compression) => compression.apply(self.parts, response, counters),
            None => response,
        }
    }

    fn find<'t>(&self, table: &'t Table) -> Option<&'t Entry> {
        let hosts = table.of(self.peer.secure);
        let seen = self.place.seen(self.parts);
        let found = hosts.find(&self.place.host, &seen);
        if found.is_some() || !is_preflight(&self.parts.method, &self.parts.headers) {
            return found;
        }
        // A preflight goes where the request that it asks for would go.
        let method: Method = self.parts.headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes().try_into().ok()?;
        let found = hosts.find(&self.place.host, &Seen { method: &method, ..seen });
        found.filter(|entry| entry.rule.filters.cors.is_some())
    }

    async fn serve(
        &self,
        entry: &Entry,
        grant: &Grant,
        body: &mut Option<Incoming>,
        upgrade: Option<OnUpgrade>,
    ) -> Reply {
        let rule = &entry.rule;
        let prefix = match &entry.condition.path {
            PathMatch::Prefix(prefix) => prefix.as_str(),
            PathMatch::Exact(_) | PathMatch::Regex(_) => "",
        };
        let place = self.place;
        if let Some(redirect) = &rule.filters.redirect {
            let came = Came { secure: self.peer.secure, host: place.authority, path: &place.path, query: place.query };
            return match redirect.location(&came, prefix) {
                Some(location) => reply::redirect(redirect.status, location),
                None => reply::text(StatusCode::BAD_REQUEST, "the redirect's target cannot be written"),
            };
        }
        let now = rule.session.as_ref().map_or(0, |_| unix_now());
        let ticket = rule.session.as_ref().and_then(|session| session.ticket(&self.parts.headers, now));
        let chosen = match self.choose(rule, ticket.map(|ticket| ticket.endpoint)) {
            Ok(chosen) => chosen,
            Err(why) => return self.invalid(rule, why),
        };
        let filters = &chosen.backend.filters;
        let headers = request::changed(&self.parts.headers, [&rule.filters.request, &filters.request]);
        let headers = request::granted(headers, grant);
        let path = rule.filters.rewrite.path.as_ref().map(|change| change.apply(&place.path, prefix));
        let host = rule.filters.rewrite.host.as_ref().map(HeaderValue::as_bytes);
        let outgoing = Outgoing {
            method: &self.parts.method,
            headers: &headers,
            path: path.as_deref().unwrap_or(&place.path),
            query: place.query,
            // A filter may have set another host.
            host: host.unwrap_or_else(|| match headers.get(HOST) {
                Some(host) if rule.filters.request.set.iter().any(|(name, _)| name == HOST) => host.as_bytes(),
                _ => place.authority.as_bytes(),
            }),
            client_host: place.authority,
            client: &self.peer.address,
            secure: self.peer.secure,
            trace: self.trace,
            length: body.as_ref().map_or(Length::None, |body| self.length(body)),
            upgrade: upgrade.as_ref().and_then(|_| self.parts.headers.get(UPGRADE)),
        };
        let mut served = None;
        let body = body.take().map_or_else(RequestBody::empty, RequestBody::new).stalls_after(self.shared.body_timeout);
        let body = match entry.policies.iter().filter_map(|policy| policy.max_body).min() {
            Some(most) => body.at_most(most),
            None => body,
        };
        let answer = match entry.policies.iter().rev().find_map(|policy| policy.cache.as_ref()) {
            None => self.send(rule, &chosen, &outgoing, body, upgrade, &mut served).await,
            Some(cache) => {
                let wanted = cached::Wanted { cache, rule, chosen: &chosen, outgoing: &outgoing, grant };
                Box::pin(self.send_cached(&wanted, body, upgrade, &mut served)).await
            }
        };
        let mut response = match answer {
            Ok(response) => response,
            Err(reply) => return *reply,
        };
        filters.response.apply(response.headers_mut());
        if let (Some(session), Some(endpoint)) = (&rule.session, served) {
            session.answer(ticket, endpoint, now, self.peer.secure, response.headers_mut());
        }
        response
    }

    /// The backend that a session names, or one by weight.
    fn choose<'r>(&self, rule: &'r Rule, session: Option<u64>) -> Result<Chosen<'r>, &'r str> {
        if let Some(id) = session {
            for backend in &rule.backends {
                let Target::Upstream(upstream) = &backend.target else { continue };
                if let Some(endpoint) = upstream.endpoint(id) {
                    return Ok(Chosen { backend, upstream, endpoint: Some(endpoint) });
                }
            }
        }
        let backend = rule.pick(random()).ok_or("the rule has no backend")?;
        match &backend.target {
            Target::Upstream(upstream) => Ok(Chosen { backend, upstream, endpoint: None }),
            Target::Invalid(why) => Err(why),
        }
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
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
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
