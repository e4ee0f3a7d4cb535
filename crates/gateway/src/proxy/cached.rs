//! Requests whose answer may be there already: found, fetched once for all that want it, asked for again when it is old.

use super::{Chosen, Reply, Visit};
use crate::cache::control::{
    Came, Directives, freshen, is_answerable, is_conditional, is_personal, is_unchanged, may_store, terms, validator,
};
use crate::cache::store::{Fetch, Look, Stored};
use crate::cache::{self, Cache};
use crate::counters::Counters;
use crate::policy::Grant;
use crate::reply::{self, ReplyBody};
use crate::request::{Length, Outgoing};
use crate::routing::Rule;
use crate::upstream::RequestBody;
use bytes::{Bytes, BytesMut};
use http::header::{
    AGE, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_LOCATION, CONTENT_TYPE, DATE, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    LOCATION,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use http_body::{Body, Frame};
use hyper::upgrade::OnUpgrade;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// How long a request waits for another one's answer before it asks itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is remembered that a target's answers are not stored; less where they were errors.
const PASS: Duration = Duration::from_secs(60);
const PASS_ERROR: Duration = Duration::from_secs(1);

/// A request that a cache may know the answer of.
pub(super) struct Wanted<'a> {
    pub cache: &'a Arc<Cache>,
    pub rule: &'a Rule,
    pub chosen: &'a Chosen<'a>,
    pub outgoing: &'a Outgoing<'a>,
    pub grant: &'a Grant,
}

/// A body that was read to its end, or as far as it may be kept.
enum Read {
    Whole(Bytes),
    /// What was read, and the rest.
    Part(Box<(VecDeque<io::Result<Frame<Bytes>>>, ReplyBody)>),
}

impl Visit<'_> {
    pub(super) async fn send_cached(
        &self,
        wanted: &Wanted<'_>,
        body: RequestBody,
        upgrade: Option<OnUpgrade>,
        served: &mut Option<u64>,
    ) -> Result<Reply, Box<Reply>> {
        let Wanted { cache, rule, chosen, outgoing, grant } = wanted;
        let (asked, key) = (&self.parts.headers, self.key());
        let fits = matches!(self.parts.method, Method::GET | Method::HEAD)
            && upgrade.is_none()
            && outgoing.length == Length::None
            && is_answerable(asked);
        if !fits {
            let response = self.send(rule, chosen, outgoing, body, upgrade, served).await?;
            self.invalidate(cache, &key, &response);
            return Ok(response);
        }
        let counters = &self.shared.counters;
        let wants = Directives::read(asked);
        let harmless = cache.knows(asked.keys().filter(|name| !grant.remove.contains(name)));
        let mut fetches = self.parts.method == Method::GET && harmless && !wants.no_store;
        let (fetch, stale) = loop {
            match cache.store.look(&key, (rule.id, outgoing.headers), &wants, fetches) {
                Look::Fresh(stored) => {
                    Counters::add(&counters.cache_hits_total);
                    return Ok(self.give(&stored, "atoll; hit"));
                }
                Look::Fetch(fetch, stale) => break (Some(fetch), stale),
                Look::Nothing => break (None, None),
                Look::Wait(mut ended) => {
                    Counters::add(&counters.cache_waits_total);
                    // Once: what the other one did not leave behind is not to be shared.
                    fetches = false;
                    let _ = tokio::time::timeout(PATIENCE, ended.changed()).await;
                }
            }
        };
        if wants.only_if_cached {
            return Err(Box::new(reply::text(StatusCode::GATEWAY_TIMEOUT, "the answer is not in the cache")));
        }
        Counters::add(&counters.cache_misses_total);
        match fetch {
            // Without anything to hold its condition against a request is the endpoint's to answer.
            Some(fetch) if stale.is_some() || !is_conditional(asked) => {
                self.fetch(wanted, fetch, stale, body, served).await
            }
            _ => {
                let response = self.send(rule, chosen, outgoing, body, None, served).await?;
                Ok(tell(response, "atoll; fwd=bypass"))
            }
        }
    }

    /// Asks the endpoint, keeps what may be kept, and answers.
    async fn fetch(
        &self,
        wanted: &Wanted<'_>,
        fetch: Fetch,
        stale: Option<Arc<Stored>>,
        body: RequestBody,
        served: &mut Option<u64>,
    ) -> Result<Reply, Box<Reply>> {
        let Wanted { cache, rule, chosen, outgoing, grant } = wanted;
        let mut headers = outgoing.headers.clone();
        // The client's conditions are held against what is stored, not sent on.
        headers.remove(IF_NONE_MATCH);
        headers.remove(IF_MODIFIED_SINCE);
        let condition = stale.as_ref().and_then(|stale| validator(&stale.headers));
        headers.extend(condition.clone());
        let outgoing = Outgoing { headers: &headers, ..**outgoing };
        let (at, begin) = (SystemTime::now(), Instant::now());
        let mut response = self.send(rule, chosen, &outgoing, body, None, served).await?;
        let came = Came { at, delay: begin.elapsed() };
        let personal = is_personal(&self.parts.headers) || !grant.is_empty();
        if response.status() == StatusCode::NOT_MODIFIED
            && let Some(stale) = stale.filter(|_| condition.is_some())
        {
            return Ok(self.validated(
                wanted,
                &fetch,
                (&stale, response.headers()),
                (came, personal),
                outgoing.headers,
            ));
        }
        let directives = Directives::read(response.headers());
        let may = may_store(response.status(), response.headers(), &directives, personal)
            && terms(response.headers(), &directives, came)
                .is_some_and(|terms| terms.lifetime > terms.age || validator(response.headers()).is_some());
        if !may {
            // That it was kept from this one only says nothing of others.
            if !may_store(response.status(), response.headers(), &directives, false) || !personal {
                let failed = response.status().as_u16() >= 400;
                fetch.pass(if failed { PASS_ERROR } else { PASS });
            }
            return Ok(tell(response, "atoll; fwd=miss"));
        }
        if response.body().size_hint().lower() > cache.most_object as u64 {
            fetch.pass(PASS);
            return Ok(tell(response, "atoll; fwd=miss"));
        }
        let body = std::mem::replace(response.body_mut(), ReplyBody::Stored(None));
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        match read(body, cache.most_object).await {
            Read::Whole(bytes) => Ok(match self.stored(wanted, (status, headers), bytes.clone(), came, personal) {
                Ok(stored) => {
                    fetch.store(outgoing.headers, stored.clone());
                    self.give(&stored, "atoll; fwd=miss; stored")
                }
                Err(headers) => {
                    tell(reply::assemble(status, headers, ReplyBody::Stored(Some(bytes))), "atoll; fwd=miss")
                }
            }),
            Read::Part(part) => {
                if part.0.back().is_some_and(Result::is_ok) {
                    fetch.pass(PASS);
                }
                Ok(tell(reply::assemble(status, headers, ReplyBody::Ahead(part)), "atoll; fwd=miss"))
            }
        }
    }

    /// What is stored is the current one, as `news` say.
    fn validated(
        &self,
        wanted: &Wanted<'_>,
        fetch: &Fetch,
        (stale, news): (&Stored, &HeaderMap),
        (came, personal): (Came, bool),
        asked: &HeaderMap,
    ) -> Reply {
        const HOW: &str = "atoll; fwd=stale; fwd-status=304";
        Counters::add(&self.shared.counters.cache_validated_total);
        let mut headers = stale.headers.clone();
        freshen(&mut headers, news);
        match self.stored(wanted, (stale.status, headers), stale.body.clone(), came, personal) {
            Ok(stored) => {
                fetch.store(asked, stored.clone());
                self.give(&stored, HOW)
            }
            // but no longer to be kept
            Err(headers) => {
                wanted.cache.store.invalidate(&self.key());
                let (status, body, terms) = (stale.status, stale.body.clone(), stale.terms.clone());
                self.give(
                    &Stored { status, headers, body, terms, since: Instant::now(), rule: 0, vary: Vec::new() },
                    HOW,
                )
            }
        }
    }

    fn key(&self) -> String {
        cache::key(self.peer.secure, self.place.authority, &self.place.path, self.place.query)
    }

    /// What is kept of an answer; the headers are given back if nothing is to be.
    fn stored(
        &self,
        wanted: &Wanted<'_>,
        (status, mut headers): (StatusCode, HeaderMap),
        body: Bytes,
        came: Came,
        personal: bool,
    ) -> Result<Arc<Stored>, HeaderMap> {
        let directives = Directives::read(&headers);
        if !may_store(status, &headers, &directives, personal) {
            return Err(headers);
        }
        let vary = wanted.cache.vary(&headers, wanted.outgoing.headers);
        let (Some(terms), Some(vary)) = (terms(&headers, &directives, came), vary) else { return Err(headers) };
        if !headers.contains_key(DATE)
            && let Ok(date) = HeaderValue::try_from(httpdate::fmt_http_date(came.at))
        {
            headers.insert(DATE, date);
        }
        headers.remove(AGE);
        if status != StatusCode::NO_CONTENT {
            headers.insert(CONTENT_LENGTH, body.len().into());
        }
        Ok(Arc::new(Stored { status, headers, body, terms, since: Instant::now(), rule: wanted.rule.id, vary }))
    }

    /// Answers with what is stored, or that the client has it already (RFC 9111, section 4.3.2).
    fn give(&self, stored: &Stored, how: &'static str) -> Reply {
        let (asked, mut headers) = (&self.parts.headers, stored.headers.clone());
        headers.insert(AGE, stored.age().as_secs().into());
        let (mut status, mut body) = (stored.status, Some(stored.body.clone()).filter(|body| !body.is_empty()));
        if is_unchanged(asked, status, &headers) {
            for name in [CONTENT_LENGTH, CONTENT_TYPE, CONTENT_ENCODING] {
                headers.remove(name);
            }
            (status, body) = (StatusCode::NOT_MODIFIED, None);
        }
        let body = body.filter(|_| self.parts.method != Method::HEAD);
        tell(reply::assemble(status, headers, ReplyBody::Stored(body)), how)
    }

    /// What a request changed is not what it was before (RFC 9111, section 4.4).
    fn invalidate(&self, cache: &Cache, key: &str, response: &Reply) {
        let status = response.status();
        if self.parts.method.is_safe() || !(status.is_success() || status.is_redirection()) {
            return;
        }
        cache.store.invalidate(key);
        for name in [LOCATION, CONTENT_LOCATION] {
            let Some(target) = response.headers().get(name).and_then(|value| value.to_str().ok()) else { continue };
            let Ok(uri) = target.parse::<Uri>() else { continue };
            // Of others nobody may say that.
            let here = uri.authority().is_none_or(|other| other.as_str().eq_ignore_ascii_case(self.place.authority));
            if here && uri.path().starts_with('/') {
                let path = crate::request::normalise(uri.path());
                cache.store.invalidate(&cache::key(self.peer.secure, self.place.authority, &path, uri.query()));
            }
        }
    }
}

/// Says what the cache had to do with it (RFC 9211).
fn tell(mut response: Reply, how: &'static str) -> Reply {
    response.headers_mut().append(CACHE_STATUS, HeaderValue::from_static(how));
    response
}

/// Reads a body that is not longer than `most` and has no trailers.
async fn read(mut body: ReplyBody, most: usize) -> Read {
    let (mut frames, mut bytes) = (VecDeque::new(), 0);
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let length = frame.as_ref().ok().and_then(|frame| frame.data_ref().map(Bytes::len));
        frames.push_back(frame);
        match length {
            Some(length) if bytes + length <= most => bytes += length,
            _ => return Read::Part(Box::new((frames, body))),
        }
    }
    let mut data = frames.into_iter().filter_map(|frame| frame.ok()?.into_data().ok());
    match (data.next(), data.next()) {
        (None, _) => Read::Whole(Bytes::new()),
        // A piece may be part of a larger buffer, which would be kept as a whole.
        (Some(only), None) => Read::Whole(Bytes::copy_from_slice(&only)),
        (Some(first), Some(second)) => {
            let mut whole = BytesMut::with_capacity(bytes);
            [first, second].into_iter().chain(data).for_each(|piece| whole.extend_from_slice(&piece));
            Read::Whole(whole.freeze())
        }
    }
}
