//! What a rule says, read and checked: conditions, filters, time limits. What cannot be understood marks the rule.

use super::filter::{Filters, Mirror};
use super::matching::{Match, PathMatch, TextMatch};
use super::references::References;
use super::session::Session;
use super::table::{Backend, Retry, Rule, Target};
use super::wire::{BackendRef, MatchSpec, MirrorSpec, RetrySpec, RuleSpec, TextSpec};
use http::{HeaderName, Method};
use regex::{Regex, RegexBuilder};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a compiled regular expression; they come from tenants.
const REGEX_SIZE: usize = 256 << 10;
/// Retries that a route may ask for.
const MAX_RETRIES: u32 = 10;
const DEFAULT_BACKOFF: Duration = Duration::from_millis(25);

/// Who has a rule.
pub struct Owner<'a> {
    /// `namespace/name`.
    pub name: Arc<str>,
    pub namespace: &'a str,
    pub kind: &'static str,
    /// Its backends are spoken to in HTTP/2.
    pub http2: bool,
}

pub fn rule(owner: &Owner<'_>, spec: &RuleSpec, bad: Option<String>, references: &mut References<'_>) -> Rule {
    let mut filters = Filters::default();
    let mut invalid = bad;
    for filter in &spec.filters {
        let result = match (filter.r#type.as_str(), &filter.request_mirror) {
            ("RequestMirror", Some(mirror)) => {
                let target = references.target(owner, &mirror.backend_ref);
                filters.mirrors.push(Mirror { target, share: share(mirror) });
                Ok(())
            }
            _ => filters.read(filter),
        };
        invalid = invalid.or(result.err());
    }
    let backends: Vec<Backend> =
        spec.backend_refs.iter().map(|backend| self::backend(owner, backend, references)).collect();
    let mut timeout = |text: &Option<String>| match text.as_deref().map(duration) {
        None | Some(Some(Duration::ZERO)) => None,
        Some(Some(time)) => Some(time),
        Some(None) => {
            invalid.get_or_insert_with(|| format!("timeout {text:?} is not a duration"));
            None
        }
    };
    let request_timeout = timeout(&spec.timeouts.request);
    let backend_timeout = timeout(&spec.timeouts.backend_request);
    let retry = spec.retry.as_ref().map(|spec| retry(spec, &mut invalid));
    let session = match spec.session_persistence.as_ref().map(|spec| Session::read(spec, &owner.name)).transpose() {
        Ok(session) => session,
        Err(why) => {
            invalid.get_or_insert(why);
            None
        }
    };
    Rule {
        route: owner.name.clone(),
        id: 0,
        filters,
        total_weight: backends.iter().map(|backend| u64::from(backend.weight)).sum(),
        backends,
        request_timeout,
        backend_timeout,
        retry,
        session,
        invalid: invalid.map(Into::into),
    }
}

/// Of how many requests how many are copied.
fn share(mirror: &MirrorSpec) -> (u64, u64) {
    match (&mirror.fraction, mirror.percent) {
        (Some(fraction), _) => (fraction.numerator.into(), fraction.denominator.unwrap_or(100).max(1).into()),
        (None, percent) => (percent.unwrap_or(100).into(), 100),
    }
}

fn retry(spec: &RetrySpec, invalid: &mut Option<String>) -> Retry {
    let backoff = match spec.backoff.as_deref().map(duration) {
        None => DEFAULT_BACKOFF,
        Some(Some(time)) => time,
        Some(None) => {
            invalid.get_or_insert_with(|| format!("retry.backoff {:?} is not a duration", spec.backoff));
            DEFAULT_BACKOFF
        }
    };
    Retry { codes: spec.codes.clone(), attempts: spec.attempts.unwrap_or(1).min(MAX_RETRIES), backoff }
}

fn backend(owner: &Owner<'_>, reference: &BackendRef, references: &mut References<'_>) -> Backend {
    let mut filters = Filters::default();
    let mut target = references.target(owner, reference);
    for filter in &reference.filters {
        let result = match filter.r#type.as_str() {
            "RequestHeaderModifier" | "ResponseHeaderModifier" => filters.read(filter),
            other => Err(format!("filter {other} is not supported on a backend")),
        };
        if let Err(why) = result {
            target = Target::Invalid(why.into());
        }
    }
    Backend { weight: reference.weight.unwrap_or(1), target, filters }
}

/// The matches of a rule, and what is wrong with one of them. A match that cannot be understood is left out: it is not
/// known what it would have matched.
pub fn conditions(spec: &RuleSpec) -> (Vec<Match>, Option<String>) {
    if spec.matches.is_empty() {
        return (vec![Match::path(PathMatch::prefix("/"))], None);
    }
    let mut all = Vec::new();
    let mut bad = None;
    for one in &spec.matches {
        match condition(one) {
            Ok(condition) => all.push(condition),
            Err(why) => bad = bad.or(Some(why)),
        }
    }
    (all, bad)
}

fn condition(spec: &MatchSpec) -> Result<Match, String> {
    let path = match &spec.path {
        None => PathMatch::prefix("/"),
        Some(path) => {
            let value = path.value.as_deref().unwrap_or("/");
            match path.r#type.as_deref().unwrap_or("PathPrefix") {
                "Exact" => PathMatch::Exact(value.to_owned()),
                "PathPrefix" => PathMatch::prefix(value),
                "RegularExpression" => PathMatch::Regex(regex(value)?),
                other => return Err(format!("path type {other:?} is not known")),
            }
        }
    };
    let method = match spec.method.as_deref() {
        None => None,
        Some(text) => Some(text.parse::<Method>().map_err(|_| format!("method {text:?} is not valid"))?),
    };
    let mut headers: Vec<(HeaderName, TextMatch)> = Vec::new();
    for header in &spec.headers {
        let name = &header.name;
        let name: HeaderName = name.parse().map_err(|_| format!("header name {name:?} is not valid"))?;
        // Of several conditions on one name only the first counts.
        if !headers.iter().any(|(other, _)| *other == name) {
            headers.push((name, text_match(header)?));
        }
    }
    let mut query: Vec<(String, TextMatch)> = Vec::new();
    for parameter in &spec.query_params {
        if !query.iter().any(|(other, _)| *other == parameter.name) {
            query.push((parameter.name.clone(), text_match(parameter)?));
        }
    }
    Ok(Match { path, method, headers, query })
}

fn text_match(spec: &TextSpec) -> Result<TextMatch, String> {
    match spec.r#type.as_deref().unwrap_or("Exact") {
        "Exact" => Ok(TextMatch::Exact(spec.value.clone())),
        "RegularExpression" => Ok(TextMatch::Regex(regex(&spec.value)?)),
        other => Err(format!("match type {other:?} is not known")),
    }
}

fn regex(text: &str) -> Result<Regex, String> {
    let whole = format!("^(?:{text})$");
    let built = RegexBuilder::new(&whole).size_limit(REGEX_SIZE).dfa_size_limit(REGEX_SIZE).build();
    built.map_err(|error| format!("regular expression {text:?}: {error}"))
}

/// Durations of the Gateway API (GEP-2257): `1h30m`, `500ms`, `0s`.
pub fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|n| (1..=5).contains(n))?;
        let (number, after) = rest.split_at_checked(digits)?;
        let number: u64 = number.parse().ok()?;
        let unit = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at_checked(unit)?;
        total += match unit {
            "h" => Duration::from_secs(number * 3600),
            "m" => Duration::from_secs(number * 60),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            _ => return None,
        };
        rest = after;
    }
    Some(total)
}
