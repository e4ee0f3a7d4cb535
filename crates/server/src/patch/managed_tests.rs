use super::super::samples::{deployment_schema, no_types};
use super::*;
use proptest::prelude::*;

const THEN: &str = "2024-01-01T00:00:00Z";
const NOW: &str = "2024-02-02T00:00:00Z";

fn writer<'a>(manager: &'a str, time: &'a str) -> Writer<'a> {
    Writer { manager, api_version: "apps/v1", subresource: "", time }
}

fn deployment(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "default"}, "spec": spec})
}

fn labelled(labels: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": labels}})
}

fn containers(list: Value) -> Value {
    deployment(json!({"template": {"spec": {"containers": list}}}))
}

fn ssa(live: Option<&Value>, applied: &Value, manager: &str, force: bool) -> StatusResult<Value> {
    apply(live, applied, &writer(manager, NOW), force, &deployment_schema(), &no_types())
}

fn updated(live: Option<&Value>, new: &Value, manager: &str, time: &str) -> Value {
    let mut new = new.clone();
    track_update(live, &mut new, &writer(manager, time), &deployment_schema(), &no_types());
    new
}

/// `live` with a value set by an update of `manager`.
fn set(live: &Value, pointer: &str, value: Value, manager: &str, time: &str) -> Value {
    let mut new = live.clone();
    *new.pointer_mut(pointer).expect("there") = value;
    updated(Some(live), &new, manager, time)
}

#[test]
fn a_create_owns_what_it_wrote_but_no_system_field() {
    let mut object = deployment(json!({"replicas": 1, "selector": {"matchLabels": {"a": "b"}}}));
    object["metadata"]["labels"] = json!({"app": "web"});
    object["metadata"]["uid"] = json!("1234");
    object["metadata"]["creationTimestamp"] = json!(THEN);
    object["spec"]["template"] =
        json!({"spec": {"containers": [{"name": "a", "image": "x", "ports": [{"containerPort": 80}]}]}});
    let object = updated(None, &object, "kubectl-create", THEN);
    let entries = object.pointer("/metadata/managedFields").expect("tracked");
    assert_eq!(
        entries,
        &json!([{
            "manager": "kubectl-create", "operation": "Update", "apiVersion": "apps/v1", "time": THEN, "fieldsType": "FieldsV1",
            "fieldsV1": {
                "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
                "f:spec": {
                    ".": {}, "f:replicas": {}, "f:selector": {},
                    "f:template": {".": {}, "f:spec": {".": {}, "f:containers": {".": {}, "k:{\"name\":\"a\"}": {
                        ".": {}, "f:image": {}, "f:name": {},
                        "f:ports": {".": {}, "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}
                    }}}}
                }
            }
        }])
    );
}

#[test]
fn an_update_takes_what_it_changes_and_only_that() {
    let live = updated(None, &deployment(json!({"replicas": 1, "paused": true})), "creator", THEN);
    let new = set(&live, "/spec/replicas", json!(3), "scaler", NOW);
    assert_eq!(owned(&new, "scaler"), [".spec.replicas"]);
    assert_eq!(owned(&new, "creator"), [".spec", ".spec.paused"]);
    // Nothing changed: nothing moves, not even a time.
    assert_eq!(updated(Some(&new), &new.clone(), "someone", NOW), new);
    // What is removed belongs to no one.
    let mut gone = new.clone();
    gone["spec"].as_object_mut().expect("object").remove("paused");
    let gone = updated(Some(&new), &gone, "third", NOW);
    assert_eq!(owned(&gone, "creator"), [".spec"]);
    assert!(owned(&gone, "third").is_empty());
}

#[test]
fn subresources_are_owned_apart_and_cannot_rewrite_ownership() {
    let live = updated(None, &deployment(json!({"replicas": 1})), "m", THEN);
    let mut new = live.clone();
    new["status"] = json!({"replicas": 1});
    new["metadata"]["managedFields"] = json!([{}]);
    let status = Writer { subresource: "status", ..writer("m", NOW) };
    track_update(Some(&live), &mut new, &status, &deployment_schema(), &no_types());
    let entries = new.pointer("/metadata/managedFields").and_then(Value::as_array).expect("tracked");
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[1]["subresource"], "status");
    assert_eq!(entries[1]["fieldsV1"], json!({"f:status": {".": {}, "f:replicas": {}}}));
}

#[test]
fn clients_may_rewrite_or_reset_ownership() {
    let live = updated(None, &deployment(json!({"replicas": 1})), "old", THEN);
    let mut renamed = live.clone();
    renamed["metadata"]["managedFields"][0]["manager"] = json!("new");
    let renamed = updated(Some(&live), &renamed, "kubectl-patch", NOW);
    assert_eq!(owned(&renamed, "new"), [".spec", ".spec.replicas"]);
    assert!(owned(&renamed, "old").is_empty());
    let mut reset = live.clone();
    reset["metadata"]["managedFields"] = json!([{}]);
    let reset = updated(Some(&live), &reset, "kubectl-patch", NOW);
    assert_eq!(reset.pointer("/metadata/managedFields"), None);
    let mut omitted = live.clone();
    omitted["metadata"].as_object_mut().expect("object").remove("managedFields");
    assert_eq!(updated(Some(&live), &omitted, "x", NOW), live);
    let mut broken = live.clone();
    broken["metadata"]["managedFields"] = json!([{"manager": "x", "operation": "Jump"}]);
    assert_eq!(updated(Some(&live), &broken, "x", NOW), live);
}

#[test]
fn many_update_managers_are_merged_into_ancient_changes() {
    let mut object = labelled(json!({"l0": "x"}));
    object = updated(None, &object, "m00", THEN);
    for n in 1..15 {
        let mut new = object.clone();
        new["metadata"]["labels"][format!("l{n}")] = json!("x");
        object = updated(Some(&object), &new, &format!("m{n:02}"), &format!("2024-01-01T00:00:{n:02}Z"));
    }
    let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array).expect("tracked");
    assert_eq!(entries.len(), MAX_UPDATE_MANAGERS);
    let ancient = owned(&object, ANCIENT_CHANGES);
    assert!(
        ancient.contains(&".metadata.labels.l0".to_owned()) && ancient.contains(&".metadata.labels.l5".to_owned()),
        "{ancient:?}"
    );
    assert_eq!(owned(&object, "m14"), [".metadata.labels.l14"]);
}

#[test]
fn apply_creates_and_lists_only_what_was_applied() {
    let mut applied = containers(json!([{"name": "a", "image": "x"}]));
    applied["metadata"]["creationTimestamp"] = Value::Null;
    let made = ssa(None, &applied, "ci", false).expect("applies");
    assert_eq!(
        made.pointer("/metadata/managedFields/0/fieldsV1"),
        Some(
            &json!({"f:spec": {"f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}, "f:name": {}}}}}}})
        )
    );
    assert_eq!(made.pointer("/metadata/creationTimestamp"), None);
    assert_eq!(made.pointer("/metadata/name"), Some(&json!("web")));
    assert_eq!(made.pointer("/apiVersion"), Some(&json!("apps/v1")));
}

#[test]
fn applying_the_same_again_changes_nothing_at_all() {
    let applied =
        deployment(json!({"replicas": 2, "template": {"spec": {"containers": [{"name": "a"}, {"name": "b"}]}}}));
    let mut live =
        apply(None, &applied, &writer("ci", THEN), false, &deployment_schema(), &no_types()).expect("applies");
    live["metadata"]["uid"] = json!("u");
    live["metadata"]["resourceVersion"] = json!("7");
    live["status"] = json!({"replicas": 2});
    assert_eq!(ssa(Some(&live), &applied, "ci", false).expect("applies"), live);
    // A keyed list in another order is the same list.
    let turned =
        deployment(json!({"replicas": 2, "template": {"spec": {"containers": [{"name": "b"}, {"name": "a"}]}}}));
    assert_eq!(ssa(Some(&live), &turned, "ci", false).expect("applies"), live);
}

#[test]
fn conflicts_are_reported_as_kubernetes_reports_them() {
    let live = updated(None, &deployment(json!({"replicas": 1, "paused": true})), "kubectl-client-side-apply", THEN);
    let applied = deployment(json!({"replicas": 2}));
    let status = ssa(Some(&live), &applied, "ci", false).expect_err("conflict");
    assert_eq!(
        status.message,
        "Apply failed with 1 conflict: conflict with \"kubectl-client-side-apply\" using apps/v1: .spec.replicas"
    );
    assert_eq!((status.code(), status.causes.len()), (409, 1));
    let cause = status.causes.first().expect("one cause");
    assert_eq!((cause.reason.as_str(), cause.field.as_str()), ("FieldManagerConflict", ".spec.replicas"));
    let both = deployment(json!({"replicas": 2, "paused": false}));
    let status = ssa(Some(&live), &both, "ci", false).expect_err("conflicts");
    assert_eq!(
        status.message,
        "Apply failed with 2 conflicts: conflicts with \"kubectl-client-side-apply\" using apps/v1:\n- .spec.paused\n- .spec.replicas"
    );
    let forced = ssa(Some(&live), &both, "ci", true).expect("forced");
    assert_eq!(forced.pointer("/spec/replicas"), Some(&json!(2)));
    assert_eq!(owned(&forced, "kubectl-client-side-apply"), [".spec"]);
    // An applier is named without version and time.
    let other = ssa(Some(&forced), &deployment(json!({"replicas": 3})), "cd", false).expect_err("conflict");
    assert_eq!(other.message, "Apply failed with 1 conflict: conflict with \"ci\": .spec.replicas");
}

#[test]
fn equal_values_are_owned_together_and_go_with_the_last_owner() {
    let one = ssa(None, &labelled(json!({"x": "1", "a": "1"})), "a", false).expect("applies");
    let both = ssa(Some(&one), &labelled(json!({"x": "1", "b": "1"})), "b", false).expect("applies");
    let kept = ssa(Some(&both), &labelled(json!({"a": "1"})), "a", false).expect("applies");
    assert_eq!(kept.pointer("/metadata/labels"), Some(&json!({"x": "1", "a": "1", "b": "1"})));
    let gone = ssa(Some(&kept), &labelled(json!({"b": "1"})), "b", false).expect("applies");
    assert_eq!(gone.pointer("/metadata/labels"), Some(&json!({"a": "1", "b": "1"})));
}

#[test]
fn what_is_no_longer_applied_goes_away() {
    let applied = deployment(
        json!({"replicas": 2, "template": {"spec": {"nodeName": "n", "containers": [{"name": "a", "image": "x"}, {"name": "b"}]}}}),
    );
    let mut live = ssa(None, &applied, "ci", false).expect("applies");
    live["spec"]["template"]["spec"]["containers"][0]["resources"] = json!({"limits": {"cpu": "1"}});
    let less = deployment(json!({"template": {"spec": {"containers": [{"name": "a"}]}}}));
    let now = ssa(Some(&live), &less, "ci", false).expect("applies");
    // What a default or another hand added to `a` without owning it stays.
    assert_eq!(
        now.get("spec"),
        Some(&json!({"template": {"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}]}}}))
    );
    let nothing = ssa(Some(&now), &labelled(json!({})), "ci", false).expect("applies");
    assert_eq!(nothing.get("spec"), None);
}

#[test]
fn an_item_someone_else_owns_survives() {
    let live = ssa(None, &containers(json!([{"name": "a", "image": "x"}])), "a", false).expect("applies");
    let live = ssa(Some(&live), &containers(json!([{"name": "a", "env": [{"name": "X", "value": "1"}]}])), "b", false)
        .expect("applies");
    let now = ssa(Some(&live), &labelled(json!({})), "a", false).expect("applies");
    assert_eq!(
        now.pointer("/spec/template/spec/containers"),
        Some(&json!([{"name": "a", "env": [{"name": "X", "value": "1"}]}]))
    );
}

#[test]
fn sets_are_owned_element_by_element() {
    let finalizers = |list: Value| json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "finalizers": list}});
    let live = ssa(None, &finalizers(json!(["a/x", "a/y"])), "a", false).expect("applies");
    let live = ssa(Some(&live), &finalizers(json!(["b/z"])), "b", false).expect("applies");
    assert_eq!(live.pointer("/metadata/finalizers"), Some(&json!(["a/x", "a/y", "b/z"])));
    let live = ssa(Some(&live), &finalizers(json!(["a/y"])), "a", false).expect("applies");
    assert_eq!(live.pointer("/metadata/finalizers"), Some(&json!(["a/y", "b/z"])));
}

#[test]
fn the_first_apply_meets_what_was_there_before() {
    let mut live = deployment(json!({"replicas": 1}));
    live["metadata"]["uid"] = json!("u");
    assert_eq!(
        updated(Some(&live), &set(&live, "/spec/replicas", json!(2), "m", THEN), "m", THEN)
            .pointer("/metadata/managedFields"),
        None
    );
    let status = ssa(Some(&live), &deployment(json!({"replicas": 5})), "ci", false).expect_err("conflict");
    assert!(status.message.contains("conflict with \"before-first-apply\" using apps/v1"), "{status}");
}

#[test]
fn kubectl_takes_over_what_client_side_apply_wrote() {
    let mut object = deployment(json!({"replicas": 1, "paused": true}));
    let last = object.clone();
    object.set_annotation(LAST_APPLIED, &format!("{last}\n"));
    let live = updated(None, &object, "kubectl-client-side-apply", THEN);
    let applied = deployment(json!({"replicas": 2, "paused": true}));
    let status = ssa(Some(&live), &applied, "other", false).expect_err("only kubectl upgrades");
    assert_eq!(status.causes.len(), 1);
    let now = ssa(Some(&live), &applied, KUBECTL, false).expect("upgrades");
    assert_eq!(now.pointer("/spec/replicas"), Some(&json!(2)));
    assert_eq!(
        now.annotation(LAST_APPLIED).map(|text| serde_json::from_str::<Value>(text).expect("JSON")),
        Some(applied.clone())
    );
    assert_eq!(ssa(Some(&now), &applied, KUBECTL, false).expect("no change"), now);
    // A value someone changed since is a conflict again.
    let scaled = set(&live, "/spec/replicas", json!(7), "scaler", NOW);
    let status = ssa(Some(&scaled), &applied, KUBECTL, false).expect_err("scaled");
    assert!(status.message.contains("conflict with \"scaler\""), "{status}");
}

#[test]
fn malformed_applies_say_where() {
    let refused = |applied: &Value| ssa(None, applied, "ci", false).expect_err("malformed");
    let unknown = refused(&deployment(json!({"replica": 1})));
    assert_eq!(unknown.code(), 400);
    assert_eq!(
        unknown.message,
        "failed to create typed patch object (default/web; apps/v1, Kind=Deployment): .spec.replica: field not declared in schema"
    );
    assert!(
        refused(&deployment(json!({"replicas": "x"})))
            .message
            .contains(".spec.replicas: expected numeric (int or float), got \"x\"")
    );
    let twice = refused(&containers(json!([{"name": "a"}, {"name": "a"}])));
    assert!(
        twice.message.contains(".spec.template.spec.containers: duplicate entries for key [name=\"a\"]"),
        "{twice}"
    );
    assert!(refused(&containers(json!([{"image": "a"}]))).message.contains("omits a key field"));
    let mut managed = deployment(json!({}));
    managed["metadata"]["managedFields"] = json!([{"manager": "x"}]);
    assert_eq!(refused(&managed).message, "metadata.managedFields must be nil");
    assert_eq!(ssa(None, &deployment(json!({})), "", false).expect_err("no manager").code(), 422);
    let mut version = deployment(json!({}));
    version["apiVersion"] = json!("apps/v1beta1");
    assert!(refused(&version).message.starts_with("Incorrect version specified in apply patch."));
}

#[test]
fn unknown_parts_are_granular_objects_and_atomic_lists() {
    let extra = |value: Value| deployment(json!({"template": {"spec": {"extra": value}}}));
    let live = ssa(None, &extra(json!({"a": {"x": 1}, "list": [1, 2]})), "a", false).expect("applies");
    let live = ssa(Some(&live), &extra(json!({"a": {"y": 2}})), "b", false).expect("applies");
    assert_eq!(live.pointer("/spec/template/spec/extra"), Some(&json!({"a": {"x": 1, "y": 2}, "list": [1, 2]})));
    assert_eq!(ssa(Some(&live), &extra(json!({"list": [1]})), "b", false).expect_err("atomic").causes.len(), 1);
}

#[test]
fn preconditions_stay_in_the_result() {
    let live = ssa(None, &deployment(json!({"replicas": 1})), "ci", false).expect("applies");
    let mut applied = deployment(json!({"replicas": 1}));
    applied["metadata"]["resourceVersion"] = json!("3");
    let result = ssa(Some(&live), &applied, "ci", false).expect("applies");
    assert_eq!(result.pointer("/metadata/resourceVersion"), Some(&json!("3")));
}

#[test]
fn managers_are_named_by_parameter_or_agent() {
    assert_eq!(manager_name(Some("me"), Some("kubectl/1.32")).expect("given"), "me");
    assert_eq!(manager_name(None, Some("kubectl/v1.32.4 (linux/amd64)")).expect("agent"), "kubectl");
    assert_eq!(manager_name(Some(""), None).expect("none"), "unknown");
    assert_eq!(manager_name(Some(&"x".repeat(129)), None).expect_err("long").code(), 422);
    assert_eq!(manager_name(Some("a\nb"), None).expect_err("control").code(), 422);
}

#[test]
fn each_endpoint_applies_its_part() {
    let mut object = deployment(json!({"replicas": 1}));
    object["status"] = json!({"replicas": 1});
    object["metadata"]["labels"] = json!({"a": "b"});
    let mut main = object.clone();
    keep_part(&mut main, "", true);
    assert_eq!(main.get("status"), None);
    let mut status = object;
    keep_part(&mut status, "status", true);
    assert_eq!((status.get("spec"), status.pointer("/metadata/labels")), (None, None));
    assert!(status.get("status").is_some() && status.pointer("/metadata/name").is_some());
}

/// A deployment of a few labels, containers and finalizers.
fn any_deployment() -> impl Strategy<Value = Value> {
    let labels = prop::collection::btree_map("[a-c]", "[xy]", 0..3);
    let container =
        prop::collection::btree_map("[a-c]", ("[xy]", prop::collection::btree_map("[A-C]", "[12]", 0..3)), 0..3);
    let finalizers = prop::collection::btree_set("[a-c]", 0..3);
    (labels, container, finalizers, prop::option::of(0..3i64)).prop_map(|(labels, list, finalizers, replicas)| {
        let list: Vec<Value> = list
            .into_iter()
            .map(|(name, (image, env))| {
                let env: Vec<Value> =
                    env.into_iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
                json!({"name": name, "image": image, "env": env})
            })
            .collect();
        let mut object = containers(list.into());
        object["metadata"]["labels"] = json!(labels);
        object["metadata"]["finalizers"] = json!(finalizers);
        if let Some(replicas) = replicas {
            object["spec"]["replicas"] = json!(replicas);
        }
        object
    })
}

/// Whether every leaf of `part` is in `whole` (keyed lists by `name`, sets by value).
fn includes(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|whole| includes(whole, value)))
        }
        (Value::Array(whole), Value::Array(part)) => part.iter().all(|item| match item.get("name") {
            Some(name) => whole.iter().any(|other| other.get("name") == Some(name) && includes(other, item)),
            None => whole.contains(item),
        }),
        _ => whole == part,
    }
}

proptest! {
    #[test]
    fn apply_twice_is_apply_once(live in any_deployment(), first in any_deployment(), applied in any_deployment()) {
        let live = updated(None, &live, "creator", THEN);
        let live = ssa(Some(&live), &first, "ci", true).expect("forced");
        let once = ssa(Some(&live), &applied, "ci", true).expect("forced");
        let again = apply(Some(&once), &applied, &writer("ci", "2030-01-01T00:00:00Z"), false, &deployment_schema(), &no_types());
        prop_assert_eq!(again.expect("no conflict with itself"), once.clone());
        prop_assert!(includes(&once, &applied), "{} lacks part of {}", once, applied);
    }

    #[test]
    fn what_was_applied_and_is_not_any_more_is_gone(first in any_deployment(), second in any_deployment()) {
        let live = ssa(None, &first, "ci", false).expect("applies");
        let now = ssa(Some(&live), &second, "ci", false).expect("applies");
        let fresh = ssa(None, &second, "ci", false).expect("applies");
        let typed_schema = deployment_schema();
        let types = no_types();
        let differs = Typed::new(&typed_schema, &types).compare(&without_system_fields(&fresh), &without_system_fields(&now));
        // Only emptied containers may be left of what was there before.
        prop_assert!(differs.modified.is_empty() && differs.removed.is_empty(), "{:?}", differs);
        prop_assert!(owned(&now, "ci") == owned(&fresh, "ci"));
    }

    #[test]
    fn disjoint_managers_both_survive(a in any_deployment(), b in any_deployment()) {
        // Disjoint by construction: one writes labels and finalizers, the other the spec.
        let mine = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": a["metadata"]});
        let mut theirs = b.clone();
        theirs["metadata"] = json!({"name": "web", "namespace": "default"});
        let live = ssa(None, &mine, "a", false).expect("applies");
        let live = ssa(Some(&live), &theirs, "b", false).expect("disjoint");
        let live = ssa(Some(&live), &mine, "a", false).expect("disjoint");
        prop_assert!(includes(&live, &mine) && includes(&live, &theirs));
    }

    #[test]
    fn a_forced_apply_leaves_no_conflict(live in any_deployment(), applied in any_deployment()) {
        let live = updated(None, &live, "creator", THEN);
        let forced = ssa(Some(&live), &applied, "ci", true).expect("forced");
        prop_assert!(ssa(Some(&forced), &applied, "ci", false).is_ok());
    }

    #[test]
    fn updates_own_exactly_what_they_changed(old in any_deployment(), new in any_deployment()) {
        let live = updated(None, &old, "a", THEN);
        let new = updated(Some(&live), &new, "b", NOW);
        let (mine, theirs) = (owned(&new, "b"), owned(&new, "a"));
        prop_assert!(mine.iter().all(|path| !theirs.contains(path)));
    }

    #[test]
    fn arbitrary_objects_never_panic(live in super::super::json::tests::any_json(), applied in super::super::json::tests::any_json()) {
        let mut object = deployment(applied.clone());
        object["metadata"]["managedFields"] = live.clone();
        let mut new = object.clone();
        track_update(Some(&live), &mut new, &writer("m", NOW), &deployment_schema(), &no_types());
        let _ = ssa(Some(&object), &deployment(json!({"template": {"spec": live}})), "m", true);
        let _ = ssa(Some(&live), &deployment(applied), "m", true);
    }
}
