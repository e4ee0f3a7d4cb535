//! What RFC 9111 says of one request and one response: whether it may be stored, how long it is fresh, how old it is.
//!
//! Where the RFC leaves a choice the careful one is made: nothing is fresh by guess (section 4.2.2), nothing stale is
//! served, and what a directive names in particular (`private="x"`) holds for the whole response.

use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, AGE, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE,
    COOKIE, DATE, ETAG, EXPIRES, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE,
    LAST_MODIFIED, PRAGMA, RANGE, SET_COOKIE, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use std::time::{Duration, SystemTime};

/// Header fields that a response may vary by; one that names more is not stored.
const MAX_VARY: usize = 16;
/// RFC 9111, section 1.2.2: what does not fit is as good as for ever.
const MAX_DELTA: u64 = 1 << 31;

/// Directives of Cache-Control that mean something here, of a request or a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directives {
    pub no_store: bool,
    pub no_cache: bool,
    pub private: bool,
    pub public: bool,
    /// `must-revalidate` or `proxy-revalidate`.
    pub must_revalidate: bool,
    pub only_if_cached: bool,
    pub max_age: Option<u64>,
    pub s_maxage: Option<u64>,
    pub min_fresh: Option<u64>,
}

impl Directives {
    pub fn read(headers: &HeaderMap) -> Directives {
        let mut all = Directives::default();
        for value in headers.get_all(CACHE_CONTROL) {
            // What cannot be read may have been anything.
            let Ok(text) = value.to_str() else {
                all.no_store = true;
                continue;
            };
            for (name, argument) in elements(text) {
                all.take(&name, argument.as_deref());
            }
        }
        if !headers.contains_key(CACHE_CONTROL) && headers.get(PRAGMA).is_some_and(|value| value == "no-cache") {
            all.no_cache = true;
        }
        all
    }

    fn take(&mut self, name: &str, argument: Option<&str>) {
        // Of two that differ the shorter counts, and one that is none makes the response stale (section 4.2.1).
        let least = |known: &mut Option<u64>| {
            let seconds = argument.and_then(delta).unwrap_or(0);
            *known = Some(known.map_or(seconds, |known| known.min(seconds)));
        };
        match name {
            "no-store" => self.no_store = true,
            "no-cache" => self.no_cache = true,
            "private" => self.private = true,
            "public" => self.public = true,
            "must-revalidate" | "proxy-revalidate" => self.must_revalidate = true,
            "only-if-cached" => self.only_if_cached = true,
            "max-age" => least(&mut self.max_age),
            "s-maxage" => least(&mut self.s_maxage),
            "min-fresh" => least(&mut self.min_fresh),
            _ => {}
        }
    }
}

/// Elements of a list, name in lower case and argument; commas within quotes part nothing.
fn elements(text: &str) -> Vec<(String, Option<String>)> {
    let (mut all, mut current, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for char in text.chars() {
        match char {
            _ if escaped => escaped = false,
            '\\' if quoted => {
                escaped = true;
                continue;
            }
            '"' => {
                quoted = !quoted;
                continue;
            }
            ',' if !quoted => {
                all.push(std::mem::take(&mut current));
                continue;
            }
            _ => {}
        }
        current.push(char);
    }
    all.push(current);
    let part = |element: String| match element.split_once('=') {
        Some((name, argument)) => (name.trim().to_ascii_lowercase(), Some(argument.trim().to_owned())),
        None => (element.trim().to_ascii_lowercase(), None),
    };
    all.into_iter().map(part).collect()
}

/// Seconds (section 1.2.2).
fn delta(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(text.parse::<u64>().unwrap_or(MAX_DELTA).min(MAX_DELTA))
}

fn date(headers: &HeaderMap, name: &HeaderName) -> Option<SystemTime> {
    let mut values = headers.get_all(name).iter();
    let date = httpdate::parse_http_date(values.next()?.to_str().ok()?).ok()?;
    values.next().is_none().then_some(date)
}

/// What is stored of a response besides its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How long it is fresh, from its creation on.
    pub lifetime: Duration,
    /// Its age when it came (section 4.2.3).
    pub age: Duration,
    /// Asked for again each time (`no-cache`).
    pub always_validate: bool,
}

/// Times around a response: when it was asked for, how long that took.
#[derive(Clone, Copy, Debug)]
pub struct Came {
    pub at: SystemTime,
    pub delay: Duration,
}

/// Section 4.2: freshness by `s-maxage`, `max-age`, `Expires` in that order, age by `Date`, `Age` and the delay.
pub fn terms(headers: &HeaderMap, directives: &Directives, came: Came) -> Option<Terms> {
    let created = date(headers, &DATE).unwrap_or(came.at);
    let expires = || {
        let expires = headers.contains_key(EXPIRES).then(|| date(headers, &EXPIRES))?;
        // One that is no date is in the past (section 5.3).
        Some(expires.and_then(|expires| expires.duration_since(created).ok()).unwrap_or_default())
    };
    let named = directives.s_maxage.or(directives.max_age).map(Duration::from_secs);
    let lifetime = named.or_else(expires);
    if lifetime.is_none() && !directives.no_cache {
        return None;
    }
    let apparent = came.at.duration_since(created).unwrap_or_default();
    let told = headers.get_all(AGE).iter().filter_map(|value| value.to_str().ok().and_then(delta)).max();
    let age = apparent.max(Duration::from_secs(told.unwrap_or(0)) + came.delay);
    Some(Terms { lifetime: lifetime.unwrap_or_default(), age, always_validate: directives.no_cache })
}

/// Whether a response may be stored for everybody (sections 3 and 3.5). `personal` says that the request said who asks.
pub fn may_store(status: StatusCode, headers: &HeaderMap, directives: &Directives, personal: bool) -> bool {
    // Those that are about what was asked for, not about how it was asked.
    let lasting = matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 302 | 307 | 308 | 404 | 410);
    let for_all = directives.public || directives.s_maxage.is_some() || directives.must_revalidate;
    let events = headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
    // Whoever may read it should have been named: an answer for one origin is none for another.
    let other_origins = headers.get(ACCESS_CONTROL_ALLOW_ORIGIN).is_some_and(|value| value != "*")
        && !crate::upstream::has_token(headers, &VARY, "origin");
    lasting
        && !directives.no_store
        && !directives.private
        && (!personal || for_all)
        && !headers.contains_key(SET_COOKIE)
        && !headers.contains_key(CONTENT_RANGE)
        && !events
        && !other_origins
        && varies_by(headers).is_some()
}

/// Names that a response varies by (section 4.1); `None` if no other request can ever be the same.
pub fn varies_by(headers: &HeaderMap) -> Option<Vec<HeaderName>> {
    let mut names = Vec::new();
    for value in headers.get_all(VARY) {
        for name in value.to_str().ok()?.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            if name == "*" {
                return None;
            }
            names.push(HeaderName::from_bytes(name.as_bytes()).ok()?);
        }
    }
    if headers.contains_key(CONTENT_ENCODING) {
        names.push(http::header::ACCEPT_ENCODING);
    }
    names.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    names.dedup();
    (names.len() <= MAX_VARY).then_some(names)
}

/// Requests that are about a part, or depend on what the client has.
pub fn is_conditional(headers: &HeaderMap) -> bool {
    [IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_MATCH, IF_UNMODIFIED_SINCE, IF_RANGE, RANGE]
        .iter()
        .any(|name| headers.contains_key(name))
}

/// Conditions that a stored response can be held against (section 4.3.2); the others are the endpoint's.
pub fn is_answerable(headers: &HeaderMap) -> bool {
    ![IF_MATCH, IF_UNMODIFIED_SINCE, IF_RANGE, RANGE].iter().any(|name| headers.contains_key(name))
}

/// Who asks is part of the request.
pub fn is_personal(headers: &HeaderMap) -> bool {
    headers.contains_key(AUTHORIZATION) || headers.contains_key(COOKIE)
}

/// Request headers whose meaning is known: none of them leads an honest server to answer for another resource. With any
/// other one in the request (`x-original-url`, say) the answer is not kept: it might be what somebody else must not get.
pub fn is_known(name: &HeaderName) -> bool {
    const KNOWN: [&str; 24] = [
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "authorization",
        "cache-control",
        "connection",
        "cookie",
        "dnt",
        "forwarded",
        "host",
        "keep-alive",
        "origin",
        "pragma",
        "priority",
        "referer",
        "te",
        "traceparent",
        "upgrade-insecure-requests",
        "user-agent",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
    ];
    let name = name.as_str();
    KNOWN.contains(&name) || name.starts_with("sec-fetch-") || name.starts_with("sec-ch-ua")
}

/// Whether the client has this response already (RFC 9110, section 13.2.2).
pub fn is_unchanged(asked: &HeaderMap, status: StatusCode, stored: &HeaderMap) -> bool {
    if status != StatusCode::OK {
        return false;
    }
    if asked.contains_key(IF_NONE_MATCH) {
        let Some(tag) = stored.get(ETAG).and_then(|tag| tag.to_str().ok()) else { return false };
        let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
        let lists = asked.get_all(IF_NONE_MATCH).iter().filter_map(|list| list.to_str().ok());
        return lists.flat_map(|list| list.split(',')).any(|one| one.trim() == "*" || opaque(one) == opaque(tag));
    }
    let since = date(asked, &IF_MODIFIED_SINCE);
    since.zip(date(stored, &LAST_MODIFIED)).is_some_and(|(since, modified)| modified <= since)
}

/// The condition that asks whether a stored response is still the current one (section 4.3.1).
pub fn validator(stored: &HeaderMap) -> Option<(HeaderName, HeaderValue)> {
    let tag = stored.get(ETAG).map(|tag| (IF_NONE_MATCH, tag.clone()));
    tag.or_else(|| stored.get(LAST_MODIFIED).map(|date| (IF_MODIFIED_SINCE, date.clone())))
}

/// Takes what a 304 says over into what is stored (section 3.2).
pub fn freshen(stored: &mut HeaderMap, news: &HeaderMap) {
    let fixed = ["content-length", "content-encoding", "content-type", "content-range", "set-cookie", "vary"];
    let names = || news.keys().filter(|name| !fixed.contains(&name.as_str()));
    for name in names() {
        stored.remove(name);
    }
    for name in names() {
        for value in news.get_all(name) {
            stored.append(name, value.clone());
        }
    }
    if !news.contains_key(AGE) {
        stored.remove(AGE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_000_000_000;

    fn headers(text: &str) -> HeaderMap {
        let mut map = HeaderMap::new();
        for line in text.lines() {
            let (name, value) = line.split_once(':').unwrap();
            map.append(name.trim().parse::<HeaderName>().unwrap(), value.trim().parse().unwrap());
        }
        map
    }

    fn at(seconds: i64) -> String {
        httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs((NOW as i64 + seconds) as u64))
    }

    fn of(text: &str) -> Option<(u64, u64, bool)> {
        let map = headers(text);
        let came = Came { at: SystemTime::UNIX_EPOCH + Duration::from_secs(NOW), delay: Duration::from_secs(2) };
        let terms = terms(&map, &Directives::read(&map), came)?;
        Some((terms.lifetime.as_secs(), terms.age.as_secs(), terms.always_validate))
    }

    /// Sections 4.2.1, 4.2.3, 5.1 and 5.3.
    #[test]
    fn how_long_and_how_old() {
        assert_eq!(of("cache-control: max-age=60"), Some((60, 2, false)));
        assert_eq!(of("cache-control: max-age=60, s-maxage=10"), Some((10, 2, false)));
        assert_eq!(of("cache-control: max-age=\"60\""), Some((60, 2, false)));
        assert_eq!(of("cache-control: max-age=60\ncache-control: max-age=30"), Some((30, 2, false)));
        assert_eq!(of("cache-control: max-age=-1"), Some((0, 2, false)));
        assert_eq!(of("cache-control: max-age=99999999999999999999"), Some((1 << 31, 2, false)));
        assert_eq!(of("cache-control: no-cache"), Some((0, 2, true)));
        assert_eq!(of("pragma: no-cache\nexpires: 0"), Some((0, 2, true)));
        assert_eq!(of("cache-control: public"), None, "nothing is fresh by guess");
        assert_eq!(of("etag: \"a\""), None);
        let (past, future) = (at(-100), at(50));
        assert_eq!(of(&format!("expires: {future}")), Some((50, 2, false)));
        assert_eq!(of(&format!("date: {past}\nexpires: {future}")), Some((150, 100, false)));
        assert_eq!(of(&format!("expires: {past}")), Some((0, 2, false)));
        assert_eq!(of(&format!("expires: {future}\nexpires: {past}")), Some((0, 2, false)));
        assert_eq!(of(&format!("date: {past}\ncache-control: max-age=60\nexpires: {future}")), Some((60, 100, false)));
        assert_eq!(of("cache-control: max-age=60\nage: 50"), Some((60, 52, false)));
        assert_eq!(of("cache-control: max-age=60\nage: x"), Some((60, 2, false)));
        assert_eq!(of(&format!("date: {future}\ncache-control: max-age=60")), Some((60, 2, false)));
    }

    /// Sections 3, 3.5, 4.1, 5.2.2.
    #[test]
    fn what_may_be_stored() {
        let may = |status: u16, text: &str, personal: bool| {
            let map = headers(text);
            may_store(StatusCode::from_u16(status).unwrap(), &map, &Directives::read(&map), personal)
        };
        assert!(may(200, "cache-control: max-age=1", false));
        for (status, text) in [
            (500, "cache-control: max-age=1"),
            (400, "cache-control: max-age=1"),
            (206, "cache-control: max-age=1"),
            (200, "cache-control: max-age=1, no-store"),
            (200, "cache-control: max-age=1, PRIVATE"),
            (200, "cache-control: max-age=1, private=\"x-a, x-b\""),
            (200, "cache-control: public\nset-cookie: a=b"),
            (200, "cache-control: public\nvary: *"),
            (200, "cache-control: public\nvary: accept, *"),
            (200, "cache-control: public\naccess-control-allow-origin: https://a.test"),
            (200, "cache-control: public\ncontent-type: text/event-stream"),
            (200, "cache-control: public\ncontent-range: bytes 0-1/2"),
        ] {
            assert!(!may(status, text, false), "{status} {text}");
        }
        assert!(may(200, "cache-control: public\nvary: origin\naccess-control-allow-origin: https://a.test", false));
        assert!(!may(200, "cache-control: max-age=1", true));
        for text in ["public", "s-maxage=1", "must-revalidate", "proxy-revalidate"] {
            assert!(may(200, &format!("cache-control: {text}"), true), "{text}");
        }
        assert!(may(200, "cache-control: x=\"no-store\", max-age=1", false), "a quoted word is no directive");
        assert!(!may(
            200,
            &format!("vary: {}", (0..20).map(|n| format!("x-{n}")).collect::<Vec<_>>().join(",")),
            false
        ));
    }

    /// RFC 9110, section 13.1.
    #[test]
    fn who_has_it_already() {
        let has = |asked: &str, stored: &str| is_unchanged(&headers(asked), StatusCode::OK, &headers(stored));
        assert!(has("if-none-match: \"a\"", "etag: W/\"a\""));
        assert!(has("if-none-match: \"b\", W/\"a\"", "etag: \"a\"") && has("if-none-match: *", "etag: \"a\""));
        assert!(!has("if-none-match: \"b\"", "etag: \"a\"") && !has("if-none-match: \"a\"", "x: y"));
        let (past, now) = (at(-10), at(0));
        assert!(has(&format!("if-modified-since: {now}"), &format!("last-modified: {past}")));
        assert!(!has(&format!("if-modified-since: {past}"), &format!("last-modified: {now}")));
        let both = format!("if-none-match: \"b\"\nif-modified-since: {now}");
        assert!(!has(&both, &format!("etag: \"a\"\nlast-modified: {past}")), "the tag counts");
    }

    #[test]
    fn news_replace_what_was_known() {
        let mut stored = headers("etag: \"a\"\nage: 5\nx: 1\ncontent-length: 9\ncache-control: max-age=1");
        freshen(&mut stored, &headers("cache-control: max-age=9\nx: 2\nx: 3\ncontent-length: 0\nset-cookie: a=b"));
        assert_eq!(stored["cache-control"], "max-age=9");
        assert_eq!((stored.get_all("x").iter().count(), &stored["content-length"]), (2, &"9".parse().unwrap()));
        assert!(!stored.contains_key("age") && !stored.contains_key("set-cookie"));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(32u8..255, 0..80)) {
            let mut map = HeaderMap::new();
            for name in [CACHE_CONTROL, EXPIRES, DATE, AGE, VARY, ETAG, IF_NONE_MATCH, IF_MODIFIED_SINCE] {
                if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                    map.append(name, value);
                }
            }
            let directives = Directives::read(&map);
            let came = Came { at: SystemTime::UNIX_EPOCH, delay: Duration::from_secs(MAX_DELTA) };
            let _ = (terms(&map, &directives, came), varies_by(&map), is_unchanged(&map, StatusCode::OK, &map));
        }
    }
}
