//! The CORS filter: which origins may read answers (Fetch standard, section 3.3; GEP-1767).

use super::wire::CorsSpec;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderName, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method};

#[derive(Debug)]
pub struct Cors {
    origins: Vec<Origin>,
    credentials: bool,
    methods: List,
    headers: List,
    expose: List,
    max_age: HeaderValue,
}

#[derive(Debug)]
enum Origin {
    Any,
    Exact(String),
    /// Scheme with `://`, and what comes after `*` (with its dot).
    Under(String, String),
}

#[derive(Debug)]
struct List {
    any: bool,
    text: Option<HeaderValue>,
}

impl List {
    fn read(names: &[String]) -> Result<List, String> {
        let any = names.iter().any(|name| name == "*");
        let text = (!names.is_empty()).then(|| HeaderValue::from_str(&names.join(", ")));
        let text = text.transpose().map_err(|_| format!("CORS: {names:?} cannot be written as a header"))?;
        Ok(List { any, text })
    }

    /// With credentials `*` is a name like any other, so what was asked for is repeated instead.
    fn value(&self, credentials: bool, asked: Option<&HeaderValue>) -> Option<HeaderValue> {
        match (self.any, credentials) {
            (true, true) => asked.cloned(),
            (true, false) => Some(HeaderValue::from_static("*")),
            (false, _) => self.text.clone(),
        }
    }
}

/// Whether this asks for leave to send another request.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS && headers.contains_key(ORIGIN) && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

impl Cors {
    pub fn read(spec: &CorsSpec) -> Result<Cors, String> {
        let origin = |text: &String| match text.split_once("://") {
            _ if text == "*" => Ok(Origin::Any),
            Some((scheme, host)) => Ok(match host.strip_prefix('*') {
                Some(suffix) => Origin::Under(format!("{scheme}://"), suffix.to_ascii_lowercase()),
                None => Origin::Exact(text.to_ascii_lowercase()),
            }),
            None => Err(format!("CORS: origin {text:?} has no scheme")),
        };
        Ok(Cors {
            origins: spec.allow_origins.iter().map(origin).collect::<Result<_, _>>()?,
            credentials: spec.allow_credentials.unwrap_or(false),
            methods: List::read(&spec.allow_methods)?,
            headers: List::read(&spec.allow_headers)?,
            expose: List::read(&spec.expose_headers)?,
            max_age: spec.max_age.unwrap_or(5).into(),
        })
    }

    fn allows(&self, origin: &str) -> bool {
        let origin = origin.to_ascii_lowercase();
        self.origins.iter().any(|known| match known {
            Origin::Any => true,
            Origin::Exact(known) => *known == origin,
            Origin::Under(scheme, suffix) => {
                let host = origin.strip_prefix(scheme.as_str()).and_then(|host| host.strip_suffix(suffix.as_str()));
                host.is_some_and(|rest| !rest.is_empty() && !rest.contains('/'))
            }
        })
    }

    /// The origin to name in the answer, if it may read it.
    fn named(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(ORIGIN)?;
        let any = self.origins.iter().any(|known| matches!(known, Origin::Any));
        match self.allows(origin.to_str().ok()?) {
            true if any && !self.credentials => Some(HeaderValue::from_static("*")),
            true => Some(origin.clone()),
            false => None,
        }
    }

    /// The headers of a preflight's answer. An origin that is not allowed gets none.
    pub fn preflight(&self, asked: &HeaderMap) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(VARY, HeaderValue::from_static("origin, access-control-request-method"));
        let Some(origin) = self.named(asked) else { return headers };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        self.credentials(&mut headers);
        let lists: [(HeaderName, &List, HeaderName); 2] = [
            (ACCESS_CONTROL_ALLOW_METHODS, &self.methods, ACCESS_CONTROL_REQUEST_METHOD),
            (ACCESS_CONTROL_ALLOW_HEADERS, &self.headers, ACCESS_CONTROL_REQUEST_HEADERS),
        ];
        for (name, list, wanted) in lists {
            if let Some(value) = list.value(self.credentials, asked.get(wanted)) {
                headers.insert(name, value);
            }
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
        headers
    }

    fn credentials(&self, headers: &mut HeaderMap) {
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }

    /// Says in an answer who may read it; what the service said of that itself does not count.
    pub fn apply(&self, asked: &HeaderMap, answer: &mut HeaderMap) {
        for name in [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS] {
            answer.remove(name);
        }
        answer.append(VARY, HeaderValue::from_static("origin"));
        let Some(origin) = self.named(asked) else { return };
        answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        self.credentials(answer);
        if let Some(value) = self.expose.value(self.credentials, None) {
            answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: &[&str], credentials: bool) -> Cors {
        let allow_origins = origins.iter().map(|origin| (*origin).to_owned()).collect();
        let allow_headers = vec!["*".to_owned()];
        let spec =
            CorsSpec { allow_origins, allow_headers, allow_credentials: Some(credentials), ..Default::default() };
        Cors::read(&spec).unwrap()
    }

    fn answer(cors: &Cors, origin: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(ORIGIN, origin.parse().unwrap());
        let mut answer = HeaderMap::new();
        cors.apply(&headers, &mut answer);
        answer.get(ACCESS_CONTROL_ALLOW_ORIGIN).map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn origins_are_compared_as_a_whole() {
        let some = cors(&["https://a.example", "https://*.b.example"], false);
        assert_eq!(answer(&some, "https://A.example").as_deref(), Some("https://A.example"));
        assert_eq!(answer(&some, "https://x.b.example").as_deref(), Some("https://x.b.example"));
        for bad in
            ["http://a.example", "https://a.example.evil", "https://b.example", "https://evil/x.b.example", "null"]
        {
            assert_eq!(answer(&some, bad), None, "{bad}");
        }
        assert_eq!(answer(&cors(&["*"], false), "https://x").as_deref(), Some("*"));
        assert_eq!(answer(&cors(&["*"], true), "https://x").as_deref(), Some("https://x"));
    }

    #[test]
    fn with_credentials_nothing_is_a_star() {
        let mut asked = HeaderMap::new();
        asked.insert(ORIGIN, "https://x".parse().unwrap());
        asked.insert(ACCESS_CONTROL_REQUEST_HEADERS, "x-one, x-two".parse().unwrap());
        let with = cors(&["*"], true).preflight(&asked);
        assert_eq!(with[ACCESS_CONTROL_ALLOW_HEADERS], "x-one, x-two");
        assert_eq!(with[ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
        assert_eq!(cors(&["*"], false).preflight(&asked)[ACCESS_CONTROL_ALLOW_HEADERS], "*");
    }
}
