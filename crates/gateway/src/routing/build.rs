//! From API objects to the routing table: which routes attach to which listeners, and what their references mean.
//!
//! What is wrong with one route, rule or backend concerns only that: a rule that cannot be understood answers 500, a
//! route that does not attach is not there.

use super::filter::Filters;
use super::host::{HostPattern, intersect};
use super::matching::{Match, PathMatch, TextMatch};
use super::table::{Backend, Entry, Rule, Table, Target};
use super::wire::{BackendRef, GatewaySpec, Listener, MatchSpec, ParentRef, RouteSpec, RuleSpec, TextSpec};
use crate::upstream::Upstreams;
use api::object::{Meta, SharedObject};
use api::selector::Selector;
use http::{HeaderName, Method};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

const GROUP: &str = "gateway.networking.k8s.io";
/// Bytes of a compiled regular expression; they come from tenants.
const REGEX_SIZE: usize = 256 << 10;

/// Everything the table is made from.
#[derive(Default)]
pub struct Objects {
    pub classes: Vec<SharedObject>,
    pub gateways: Vec<SharedObject>,
    pub routes: Vec<SharedObject>,
    pub services: Vec<SharedObject>,
    pub namespaces: Vec<SharedObject>,
    pub grants: Vec<SharedObject>,
}

struct Gateway {
    namespace: String,
    name: String,
    listeners: Vec<(Listener, HostPattern)>,
}

struct Builder<'a> {
    objects: &'a Objects,
    services: HashMap<(&'a str, &'a str), &'a SharedObject>,
    upstreams: &'a mut Upstreams,
}

/// Builds the table for Gateways of `class` (or of a class that names Atoll as its controller). `upstreams` is told
/// which Service ports are in use.
pub fn build(objects: &Objects, class: &str, upstreams: &mut Upstreams) -> Table {
    let services = objects.services.iter().map(|s| ((s.namespace(), s.name()), s)).collect();
    let mut builder = Builder { objects, services, upstreams };
    let gateways = gateways(objects, class);
    let mut routes: Vec<&SharedObject> = objects.routes.iter().filter(|route| !route.is_deleting()).collect();
    // Ties between equal matches: the oldest route, then the first by name.
    routes.sort_by_key(|r| (r.str_at("/metadata/creationTimestamp").to_owned(), r.namespace(), r.name()));
    let mut entries = Vec::new();
    for route in routes {
        match RouteSpec::deserialize(route.get("spec").unwrap_or(&Value::Null)) {
            Ok(spec) => builder.route(route, &spec, &gateways, &mut entries),
            Err(error) => {
                tracing::warn!(route = %format_args!("{}/{}", route.namespace(), route.name()), "not served: {error}");
            }
        }
    }
    Table::new(entries)
}

fn gateways(objects: &Objects, class: &str) -> Vec<Gateway> {
    let mut classes: HashSet<&str> = HashSet::from([class]);
    let ours = |c: &&SharedObject| c.str_at("/spec/controllerName").starts_with("atoll.dev/");
    classes.extend(objects.classes.iter().filter(ours).map(|class| class.name()));
    let mut all = Vec::new();
    for object in &objects.gateways {
        let Ok(spec) = GatewaySpec::deserialize(object.get("spec").unwrap_or(&Value::Null)) else { continue };
        if !classes.contains(spec.gateway_class_name.as_str()) || object.is_deleting() {
            continue;
        }
        let http = spec.listeners.into_iter().filter(|listener| listener.protocol == "HTTP");
        let listeners = http.map(|listener| {
            let host = HostPattern::parse(&listener.hostname);
            (listener, host)
        });
        let (namespace, name) = (object.namespace().to_owned(), object.name().to_owned());
        all.push(Gateway { namespace, name, listeners: listeners.collect() });
    }
    all
}

impl Builder<'_> {
    fn route(
        &mut self,
        route: &SharedObject,
        spec: &RouteSpec,
        gateways: &[Gateway],
        entries: &mut Vec<(HostPattern, Entry)>,
    ) {
        let hosts = self.hosts(route, spec, gateways);
        if hosts.is_empty() {
            return;
        }
        let name: Arc<str> = format!("{}/{}", route.namespace(), route.name()).into();
        let everything = [RuleSpec::default()];
        for spec in spec.rules.as_deref().unwrap_or(&everything) {
            let (conditions, bad) = conditions(spec);
            let rule = Arc::new(self.rule(&name, route.namespace(), spec, bad));
            for condition in conditions {
                for (host, hidden) in &hosts {
                    let entry = Entry { condition: condition.clone(), rule: rule.clone(), hidden: hidden.clone() };
                    entries.push((host.clone(), entry));
                }
            }
        }
    }

    /// Under which hostnames the route is served, each with the hosts that other listeners of that Gateway take.
    fn hosts(
        &self,
        route: &SharedObject,
        spec: &RouteSpec,
        gateways: &[Gateway],
    ) -> Vec<(HostPattern, Arc<[HostPattern]>)> {
        let wanted: Vec<HostPattern> = if spec.hostnames.is_empty() {
            vec![HostPattern::Any]
        } else {
            spec.hostnames.iter().map(|host| HostPattern::parse(host)).collect()
        };
        let mut hosts: Vec<(HostPattern, Arc<[HostPattern]>)> = Vec::new();
        for (gateway, index) in spec.parent_refs.iter().flat_map(|parent| attached(route, parent, gateways)) {
            let Some((listener, own)) = gateway.listeners.get(index) else { continue };
            if !self.allows(listener, &gateway.namespace, route.namespace()) {
                continue;
            }
            let others = gateway.listeners.iter().map(|(_, host)| host);
            let hidden: Arc<[HostPattern]> = others
                .filter(|other| other.specificity() > own.specificity() && intersect(other, own).is_some())
                .cloned()
                .collect();
            for host in wanted.iter().filter_map(|host| intersect(host, own)) {
                if !hosts.iter().any(|(h, hid)| *h == host && *hid == hidden) {
                    hosts.push((host, hidden.clone()));
                }
            }
        }
        hosts
    }

    fn allows(&self, listener: &Listener, gateway: &str, route: &str) -> bool {
        let allowed = &listener.allowed_routes;
        let kind = |k: &super::wire::RouteKind| k.kind == "HTTPRoute" && k.group.as_deref().unwrap_or(GROUP) == GROUP;
        if !allowed.kinds.is_empty() && !allowed.kinds.iter().any(kind) {
            return false;
        }
        match allowed.namespaces.from.as_str() {
            "All" => true,
            "Selector" => {
                let Ok(selector) = Selector::from_object(&allowed.namespaces.selector) else { return false };
                let namespace = self.objects.namespaces.iter().find(|namespace| namespace.name() == route);
                namespace.is_some_and(|namespace| selector.matches_object(namespace))
            }
            "Same" | "" => gateway == route,
            _ => false,
        }
    }

    fn rule(&mut self, route: &Arc<str>, namespace: &str, spec: &RuleSpec, bad: Option<String>) -> Rule {
        let mut filters = Filters::default();
        let mut invalid = bad;
        for filter in &spec.filters {
            let result = match (filter.r#type.as_str(), &filter.request_mirror) {
                ("RequestMirror", Some(mirror)) => {
                    let target = self.target(namespace, &mirror.backend_ref);
                    filters.mirrors.push((target, mirror.percent.unwrap_or(100)));
                    Ok(())
                }
                _ => filters.read(filter),
            };
            invalid = invalid.or(result.err());
        }
        let backends: Vec<Backend> = spec.backend_refs.iter().map(|backend| self.backend(namespace, backend)).collect();
        let timeout = |text: &Option<String>, invalid: &mut Option<String>| match text.as_deref().map(duration) {
            None => None,
            Some(Some(Duration::ZERO)) => None,
            Some(Some(time)) => Some(time),
            Some(None) => {
                invalid.get_or_insert_with(|| format!("timeout {text:?} is not a duration"));
                None
            }
        };
        let request_timeout = timeout(&spec.timeouts.request, &mut invalid);
        let backend_timeout = timeout(&spec.timeouts.backend_request, &mut invalid);
        Rule {
            route: route.clone(),
            filters,
            total_weight: backends.iter().map(|backend| u64::from(backend.weight)).sum(),
            backends,
            request_timeout,
            backend_timeout,
            invalid: invalid.map(Into::into),
        }
    }

    fn backend(&mut self, namespace: &str, reference: &BackendRef) -> Backend {
        let mut filters = Filters::default();
        let mut target = self.target(namespace, reference);
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

    fn target(&mut self, route_namespace: &str, reference: &BackendRef) -> Target {
        let invalid = |why: String| Target::Invalid(why.into());
        let (group, kind) = (reference.group.as_deref().unwrap_or(""), reference.kind.as_deref().unwrap_or("Service"));
        let (namespace, name) = (reference.namespace.as_deref().unwrap_or(route_namespace), reference.name.as_str());
        if (group, kind) != ("", "Service") {
            return invalid(format!("backend {name:?} is a {kind} of group {group:?}; only Services are served"));
        }
        let Some(port) = reference.port else {
            return invalid(format!("backend {name:?} names no port"));
        };
        if namespace != route_namespace && !self.granted(route_namespace, namespace, name) {
            return invalid(format!("no ReferenceGrant in {namespace:?} lets {route_namespace:?} refer to {name:?}"));
        }
        let Some(service) = self.services.get(&(namespace, name)) else {
            return invalid(format!("there is no service {namespace}/{name}"));
        };
        if service.str_at("/spec/type") == "ExternalName" {
            return invalid(format!("service {namespace}/{name} is of type ExternalName"));
        }
        let ports = service.pointer("/spec/ports").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let number = |p: &&Value| p.get("port").and_then(Value::as_u64) == Some(u64::from(port));
        let Some(found) = ports.iter().find(number) else {
            return invalid(format!("service {namespace}/{name} has no port {port}"));
        };
        let http2 = matches!(found.str_at("/appProtocol"), "kubernetes.io/h2c" | "grpc");
        Target::Upstream(self.upstreams.want(namespace, name, port, found.str_at("/name"), http2))
    }

    fn granted(&self, from: &str, to: &str, name: &str) -> bool {
        let list = |grant: &SharedObject, at: &str| -> Vec<Value> {
            grant.pointer(at).and_then(Value::as_array).cloned().unwrap_or_default()
        };
        self.objects.grants.iter().filter(|grant| grant.namespace() == to).any(|grant| {
            let sources = list(grant, "/spec/from");
            let source = sources
                .iter()
                .any(|f| (f.str_at("/group"), f.str_at("/kind"), f.str_at("/namespace")) == (GROUP, "HTTPRoute", from));
            let targets = list(grant, "/spec/to");
            source
                && targets.iter().any(|t| {
                    (t.str_at("/group"), t.str_at("/kind")) == ("", "Service")
                        && ["", name].contains(&t.str_at("/name"))
                })
        })
    }
}

/// The listeners that a parent reference names.
fn attached<'a>(route: &SharedObject, parent: &ParentRef, gateways: &'a [Gateway]) -> Vec<(&'a Gateway, usize)> {
    let kind = parent.kind.as_deref().unwrap_or("Gateway");
    if parent.group.as_deref().unwrap_or(GROUP) != GROUP || kind != "Gateway" {
        return Vec::new();
    }
    let namespace = parent.namespace.as_deref().unwrap_or(route.namespace());
    let named = gateways.iter().filter(|gateway| gateway.namespace == namespace && gateway.name == parent.name);
    named
        .flat_map(|gateway| gateway.listeners.iter().enumerate().map(move |(index, (l, _))| (gateway, index, l)))
        .filter(|(_, _, listener)| parent.section_name.as_ref().is_none_or(|section| *section == listener.name))
        .filter(|(_, _, listener)| parent.port.is_none_or(|port| port == listener.port))
        .map(|(gateway, index, _)| (gateway, index))
        .collect()
}

/// The matches of a rule, and what is wrong with one of them. A match that cannot be understood is left out: it is not
/// known what it would have matched.
fn conditions(spec: &RuleSpec) -> (Vec<Match>, Option<String>) {
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
pub(crate) fn duration(text: &str) -> Option<Duration> {
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
