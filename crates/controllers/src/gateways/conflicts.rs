//! Routes that want the same requests: the older one gets them (Gateway API, "Conflicts"), the younger one is told.

use crate::objects::list;
use api::object::{Meta, Object, SharedObject};
use serde_json::Value;

/// What decides between two routes.
fn age(route: &Object) -> (&str, &str, &str) {
    (route.str_at("/metadata/creationTimestamp"), route.namespace(), route.name())
}

fn hosts(route: &Object) -> Vec<&str> {
    match list(route, "/spec/hostnames") {
        [] => vec![""],
        hosts => hosts.iter().filter_map(Value::as_str).collect(),
    }
}

fn matches(route: &Object) -> impl Iterator<Item = &Value> {
    list(route, "/spec/rules").iter().flat_map(|rule| list(rule, "/matches"))
}

/// The oldest route that takes requests which `route` names too: same Gateway (by `same_parent`), same host, same match.
pub(super) fn winner(
    route: &Object,
    others: &[SharedObject],
    same_parent: impl Fn(&Object) -> bool,
) -> Option<SharedObject> {
    let own_hosts = hosts(route);
    let own: Vec<&Value> = matches(route).collect();
    let takes = |other: &&SharedObject| {
        age(other) < age(route)
            && !other.is_deleting()
            && hosts(other).iter().any(|host| own_hosts.contains(host))
            && matches(other).any(|one| own.contains(&one))
            && same_parent(other)
    };
    others.iter().filter(takes).min_by(|a, b| age(a).cmp(&age(b))).cloned()
}

/// Routes whose state depends on this one's.
pub(super) fn neighbours(route: &Object, all: &[SharedObject]) -> Vec<api::informer::Key> {
    let own = hosts(route);
    let near = |other: &&SharedObject| hosts(other).iter().any(|host| own.contains(host));
    all.iter().filter(near).map(api::informer::Key::of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    fn route(name: &str, second: u8, host: &str, path: &str) -> SharedObject {
        Arc::new(
            json!({"metadata": {"name": name, "namespace": "x", "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z")},
            "spec": {"hostnames": [host], "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": path}}]}]}}),
        )
    }

    #[test]
    fn the_oldest_wins() {
        let all = [route("c", 3, "h", "/"), route("b", 2, "h", "/"), route("a", 2, "h", "/"), route("o", 1, "h", "/o")];
        let of = |index: usize| winner(&all[index], &all, |_| true).map(|found| found.name().to_owned());
        assert_eq!(of(0).as_deref(), Some("a"));
        assert_eq!(of(1).as_deref(), Some("a"), "of one age the first by name");
        assert_eq!((of(2), of(3)), (None, None));
        assert!(winner(&route("d", 9, "other", "/"), &all, |_| true).is_none());
        assert!(winner(&all[0], &all, |_| false).is_none());
    }
}
