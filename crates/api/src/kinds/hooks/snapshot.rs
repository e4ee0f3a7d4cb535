//! Snapshots, restores and clones of machines: what they are of is said once and does not change.

use super::field::{Problems, at, text};
use crate::names;
use crate::object::Object;
use crate::status::Cause;

const MACHINE: (&str, &str) = ("kubevirt.io", "VirtualMachine");
const SNAPSHOT: (&str, &str) = ("snapshot.kubevirt.io", "VirtualMachineSnapshot");

fn reference(p: &mut Problems, field: &str, new: &Object, kinds: &[(&str, &str)], name_needed: bool) {
    let value = at(at(new, "spec"), field);
    let (group, kind, name) = (text(value, "apiGroup"), text(value, "kind"), text(value, "name"));
    let path = format!("spec.{field}");
    if !kinds.iter().any(|(_, known)| *known == kind) {
        let known: Vec<&str> = kinds.iter().map(|(_, kind)| *kind).collect();
        p.invalid_text(&format!("{path}.kind"), kind, &format!("must be {}", known.join(" or ")));
    } else if !kinds.contains(&(group, kind)) {
        p.invalid_text(&format!("{path}.apiGroup"), group, "must be the group of its kind");
    }
    match name {
        "" if name_needed => p.required(&format!("{path}.name"), ""),
        "" => {}
        name => p.optional_rule(&format!("{path}.name"), name, names::dns_subdomain),
    }
}

fn same(p: &mut Problems, new: &Object, old: Option<&Object>) {
    if old.is_some_and(|old| at(old, "spec") != at(new, "spec")) {
        p.forbidden("spec", "does not change; make another");
    }
}

pub fn validate_snapshot(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    // what becomes of the files may be decided later
    let strip = |object: &Object| {
        let mut object = object.clone();
        if let Some(spec) = object.get_mut("spec").and_then(serde_json::Value::as_object_mut) {
            spec.remove("deletionPolicy");
        }
        object
    };
    same(&mut p, &strip(new), old.map(strip).as_ref());
    reference(&mut p, "source", new, &[MACHINE], true);
    let deadline = text(at(new, "spec"), "failureDeadline");
    if !deadline.is_empty() && crate::time::duration(deadline).is_none() {
        p.invalid_text("spec.failureDeadline", deadline, "must be a duration such as 90s, 5m or 1h30m");
    }
    p.into_causes()
}

pub fn validate_content(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    same(&mut p, new, old);
    p.into_causes()
}

pub fn validate_restore(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    same(&mut p, new, old);
    reference(&mut p, "target", new, &[MACHINE], true);
    p.into_causes()
}

pub fn validate_clone(new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut p = Problems::default();
    same(&mut p, new, old);
    reference(&mut p, "source", new, &[MACHINE, SNAPSHOT], true);
    if !at(at(new, "spec"), "target").is_null() {
        reference(&mut p, "target", new, &[MACHINE], false);
    }
    let filters = |field: &'static str| super::field::items(at(new, "spec"), field).to_vec();
    for field in ["annotationFilters", "labelFilters"] {
        for (index, filter) in filters(field).iter().enumerate() {
            let pattern = filter.as_str().unwrap_or_default();
            let bare = pattern.strip_prefix('!').unwrap_or(pattern);
            if bare.is_empty() || bare.trim_end_matches('*').contains(['*', '!']) {
                let why = "must be a key, or the beginning of one and *, and may have ! in front";
                p.invalid_text(&format!("spec.{field}[{index}]"), pattern, why);
            }
        }
    }
    p.into_causes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn told(causes: Vec<Cause>) -> Vec<String> {
        causes.into_iter().map(|c| c.field).collect()
    }

    #[test]
    fn references_name_a_kind_in_its_group() {
        let of = |group: &str, kind: &str, name: &str| -> Value {
            json!({"spec": {"source": {"apiGroup": group, "kind": kind, "name": name}}})
        };
        assert!(told(validate_snapshot(&of("kubevirt.io", "VirtualMachine", "db"), None)).is_empty());
        assert_eq!(told(validate_snapshot(&of("", "VirtualMachine", "db"), None)), ["spec.source.apiGroup"]);
        assert_eq!(
            told(validate_snapshot(&of("kubevirt.io", "Pod", ""), None)),
            ["spec.source.kind", "spec.source.name"]
        );
        let snapshot = of("snapshot.kubevirt.io", "VirtualMachineSnapshot", "s");
        assert!(told(validate_clone(&snapshot, None)).is_empty());
        assert_eq!(told(validate_snapshot(&snapshot, None)), ["spec.source.kind"]);
    }

    #[test]
    fn what_it_is_of_stays() {
        let mut old = json!({"spec": {"source": {"apiGroup": "kubevirt.io", "kind": "VirtualMachine", "name": "db"}}});
        let mut new = old.clone();
        new["spec"]["deletionPolicy"] = "Retain".into();
        assert!(told(validate_snapshot(&new, Some(&old))).is_empty());
        new["spec"]["failureDeadline"] = "soon".into();
        assert_eq!(told(validate_snapshot(&new, Some(&old))), ["spec", "spec.failureDeadline"]);
        old["spec"]["annotationFilters"] = json!(["*", "!a/*", "b*c", ""]);
        assert_eq!(told(validate_clone(&old, None)), ["spec.annotationFilters[2]", "spec.annotationFilters[3]"]);
    }
}
