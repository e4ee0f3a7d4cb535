//! Session persistence: the client carries the name of the endpoint that served it first (GEP-1619).

use super::rules::duration;
use super::wire::SessionSpec;
use http::header::{COOKIE, SET_COOKIE};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::time::Duration;

#[derive(Debug)]
pub struct Session {
    carrier: Carrier,
    absolute: Option<Duration>,
    idle: Option<Duration>,
}

#[derive(Debug)]
enum Carrier {
    Cookie { name: String, permanent: bool },
    Header(HeaderName),
}

/// What a client carries. Times are Unix seconds. A client that changes it only changes which endpoint it is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub endpoint: u64,
    pub issued: u64,
    pub seen: u64,
}

impl Session {
    /// `route` gives the session its name where none is said.
    pub fn read(spec: &SessionSpec, route: &str) -> Result<Session, String> {
        let time = |text: &Option<String>| match text {
            None => Ok(None),
            Some(text) => match duration(text) {
                Some(time) => Ok(Some(time).filter(|time| !time.is_zero())),
                None => Err(format!("sessionPersistence: {text:?} is not a duration")),
            },
        };
        let default = || format!("atoll-{:08x}", crate::upstream::fingerprint(&[route]) as u32);
        let name = spec.session_name.clone().filter(|name| !name.is_empty()).unwrap_or_else(default);
        let bad = || format!("sessionPersistence: {name:?} cannot be the name of a cookie or header");
        let header: HeaderName = name.parse().map_err(|_| bad())?;
        let carrier = match spec.r#type.as_deref().unwrap_or("Cookie") {
            "Cookie" => {
                let permanent = spec.cookie_config.lifetime_type.as_deref() == Some("Permanent");
                Carrier::Cookie { name, permanent }
            }
            "Header" => Carrier::Header(header),
            other => return Err(format!("sessionPersistence: type {other:?} is not known")),
        };
        Ok(Session { carrier, absolute: time(&spec.absolute_timeout)?, idle: time(&spec.idle_timeout)? })
    }

    /// The ticket of a request, unless it is too old.
    pub fn ticket(&self, headers: &HeaderMap, now: u64) -> Option<Ticket> {
        let ticket = match &self.carrier {
            Carrier::Header(name) => Ticket::parse(headers.get(name)?.to_str().ok()?),
            Carrier::Cookie { name, .. } => headers
                .get_all(COOKIE)
                .iter()
                .filter_map(|line| line.to_str().ok())
                .flat_map(|line| line.split(';'))
                .filter_map(|pair| pair.trim().split_once('='))
                .find(|(key, _)| key == name)
                .and_then(|(_, value)| Ticket::parse(value)),
        }?;
        let within = |since: u64, limit: Option<Duration>| {
            limit.is_none_or(|limit| since <= now && now - since < limit.as_secs().max(1))
        };
        (within(ticket.issued, self.absolute) && within(ticket.seen, self.idle)).then_some(ticket)
    }

    /// Hands the client its ticket, where it has none for that endpoint yet or has to be told that it was seen.
    pub fn answer(&self, had: Option<Ticket>, endpoint: u64, now: u64, secure: bool, headers: &mut HeaderMap) {
        let ticket = match had.filter(|had| had.endpoint == endpoint) {
            Some(had) if self.idle.is_none() || had.seen == now => return,
            Some(had) => Ticket { seen: now, ..had },
            None => Ticket { endpoint, issued: now, seen: now },
        };
        let text = ticket.to_text();
        match &self.carrier {
            Carrier::Header(name) => {
                if let Ok(value) = HeaderValue::try_from(text) {
                    headers.insert(name, value);
                }
            }
            Carrier::Cookie { name, permanent } => {
                let mut cookie = format!("{name}={text}; Path=/; HttpOnly; SameSite=Lax");
                if secure {
                    cookie.push_str("; Secure");
                }
                if let (true, Some(absolute)) = (*permanent, self.absolute) {
                    let left = (ticket.issued + absolute.as_secs()).saturating_sub(now);
                    cookie.push_str(&format!("; Max-Age={left}"));
                }
                if let Ok(value) = HeaderValue::try_from(cookie) {
                    headers.append(SET_COOKIE, value);
                }
            }
        }
    }
}

impl Ticket {
    fn to_text(self) -> String {
        format!("{:016x}.{:x}.{:x}", self.endpoint, self.issued, self.seen)
    }

    fn parse(text: &str) -> Option<Ticket> {
        let mut parts = text.splitn(3, '.');
        let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
        Some(Ticket { endpoint: number()?, issued: number()?, seen: number()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn session(spec: serde_json::Value) -> Session {
        Session::read(&serde_json::from_value(spec).unwrap(), "ns/route").unwrap()
    }

    #[test]
    fn a_ticket_lives_as_long_as_its_limits_say() {
        let session = session(serde_json::json!({"sessionName": "s", "absoluteTimeout": "100s", "idleTimeout": "10s",
            "cookieConfig": {"lifetimeType": "Permanent"}}));
        let mut answer = HeaderMap::new();
        session.answer(None, 7, 1000, true, &mut answer);
        let cookie = answer[SET_COOKIE].to_str().unwrap().to_owned();
        assert!(cookie.starts_with("s=0000000000000007.3e8.3e8; Path=/; HttpOnly; SameSite=Lax; Secure; Max-Age=100"));
        let mut asked = HeaderMap::new();
        asked.insert(COOKIE, format!("a=b; {}", cookie.split(';').next().unwrap()).parse().unwrap());
        let ticket = session.ticket(&asked, 1009).unwrap();
        assert_eq!(ticket.endpoint, 7);
        assert!(session.ticket(&asked, 1010).is_none(), "idle for too long");
        let mut again = HeaderMap::new();
        session.answer(Some(ticket), 7, 1009, true, &mut again);
        assert!(again[SET_COOKIE].to_str().unwrap().contains("Max-Age=91"));
    }

    #[test]
    fn headers_and_default_names() {
        let session = session(serde_json::json!({"type": "Header"}));
        let mut answer = HeaderMap::new();
        session.answer(None, 7, 1000, false, &mut answer);
        assert_eq!(session.ticket(&answer, u64::MAX).unwrap().endpoint, 7);
        let mut again = HeaderMap::new();
        session.answer(session.ticket(&answer, 2000), 7, 2000, false, &mut again);
        assert!(again.is_empty(), "nothing new to say");
    }

    proptest! {
        #[test]
        fn foreign_tickets_never_panic(text in "\\PC{0,40}", now: u64) {
            let session = session(serde_json::json!({"sessionName": "s", "absoluteTimeout": "1s"}));
            if let Ok(value) = HeaderValue::try_from(format!("s={text}")) {
                let mut headers = HeaderMap::new();
                headers.insert(COOKIE, value);
                let _ = session.ticket(&headers, now);
            }
        }
        #[test]
        fn tickets_are_read_as_written(endpoint: u64, issued: u64, seen: u64) {
            let ticket = Ticket { endpoint, issued, seen };
            prop_assert_eq!(Ticket::parse(&ticket.to_text()), Some(ticket));
        }
    }
}
