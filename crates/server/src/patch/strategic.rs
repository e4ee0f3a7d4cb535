//! Kubernetes' strategic merge patch: a merge patch that knows, from the schema, which lists are merged by key or as
//! sets, and that takes directives
//! (<https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md>).
//!
//! - `$patch: replace | delete | merge` in an object or in an element of a merged list,
//! - `$retainKeys: [...]`: fields of the object that stay, all others go,
//! - `$deleteFromPrimitiveList/x: [...]`: scalars to take out of the list `x`,
//! - `$setElementOrder/x: [...]`: the order of the list `x` afterwards.

use super::typed::ANY;
use api::schema::{Schema, Shape, Strategic, Types};
use api::status::{Status, StatusResult};
use serde_json::{Map, Value};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// `doc` with the strategic merge patch `patch` applied.
pub fn strategic(doc: &Value, patch: &Value, schema: &Schema, types: &Types) -> StatusResult<Value> {
    let Value::Object(patch) = patch else {
        return Err(Status::bad_request("a strategic merge patch is a JSON object"));
    };
    let doc = doc.as_object().cloned().unwrap_or_default();
    Merger { types }.object(doc, patch, schema).map(Value::Object).map_err(Status::bad_request)
}

struct Merger<'a> {
    types: &'a Types,
}

type Merged<T> = Result<T, String>;

impl<'a> Merger<'a> {
    fn object(
        &self,
        mut doc: Map<String, Value>,
        patch: &Map<String, Value>,
        schema: &'a Schema,
    ) -> Merged<Map<String, Value>> {
        match patch.get(PATCH).map(|directive| directive.as_str().unwrap_or_default()) {
            None | Some("merge") => {}
            Some("replace") => return Ok(without_directives(patch)),
            Some("delete") => return Ok(Map::new()),
            Some(other) => return Err(unknown_directive(other)),
        }
        if let Some(retained) = patch.get(RETAIN_KEYS) {
            retain(&mut doc, retained, patch)?;
        }
        for (key, value) in patch {
            if key == PATCH || key == RETAIN_KEYS || key.starts_with(ORDER) {
                continue;
            }
            if let Some(list) = key.strip_prefix(DELETE_FROM) {
                delete_from(&mut doc, list, value)?;
                continue;
            }
            if value.is_null() {
                doc.remove(key);
                continue;
            }
            let field = self.field(schema, key);
            let order = patch.get(&format!("{ORDER}{key}"));
            let merged = self.value(doc.remove(key), value, field, order).map_err(|why| format!("{key}: {why}"))?;
            doc.insert(key.clone(), merged);
        }
        for (key, order) in patch {
            let Some(list) = key.strip_prefix(ORDER) else { continue };
            if patch.get(list).is_some_and(Value::is_array) {
                continue;
            }
            let Some(Value::Array(items)) = doc.get_mut(list) else { continue };
            let merge_key = self.list(self.field(schema, list)).and_then(|(strategic, _)| strategic.key.as_deref());
            let before = items.clone();
            *items = ordered(std::mem::take(items), &before, elements(order, key)?, merge_key);
        }
        Ok(doc)
    }

    fn value(&self, old: Option<Value>, patch: &Value, schema: &'a Schema, order: Option<&Value>) -> Merged<Value> {
        match (old, patch) {
            (Some(Value::Object(old)), Value::Object(patch)) => self.object(old, patch, schema).map(Value::Object),
            (None, Value::Object(patch)) => self.object(Map::new(), patch, schema).map(Value::Object),
            (Some(Value::Array(old)), Value::Array(patch)) => {
                let Some((strategic, items)) = self.list(schema) else {
                    return Ok(Value::Array(patch.iter().map(cleaned).collect()));
                };
                let order = order.map(|order| elements(order, ORDER)).transpose()?;
                self.merge_list(old, patch, strategic.key.as_deref(), items, order).map(Value::Array)
            }
            (_, Value::Array(patch)) => Ok(Value::Array(without_directive_elements(patch))),
            (_, patch) => Ok(cleaned(patch)),
        }
    }

    fn merge_list(
        &self,
        old: Vec<Value>,
        patch: &[Value],
        merge_key: Option<&str>,
        items: &'a Schema,
        order: Option<&[Value]>,
    ) -> Merged<Vec<Value>> {
        let before = old.clone();
        let mut merged = old;
        let Some(key) = merge_key else {
            merged.extend(patch.iter().cloned());
            let mut unique: Vec<Value> = Vec::with_capacity(merged.len());
            for value in merged {
                if !unique.contains(&value) {
                    unique.push(value);
                }
            }
            check_order(patch, order, None)?;
            return Ok(ordered(unique, &before, order.unwrap_or(patch), None));
        };
        if patch.iter().any(|element| directive(element) == Some("replace")) {
            return Ok(without_directive_elements(patch));
        }
        let mut listed = Vec::new();
        for element in patch {
            let Value::Object(fields) = element else {
                return Err(format!("an element of a list merged by {key:?} must be an object, not {element}"));
            };
            let Some(id) = fields.get(key) else {
                return Err(format!("map: {element} does not contain declared merge key: {key}"));
            };
            match directive(element) {
                Some("delete") => merged.retain(|item| item.get(key) != Some(id)),
                None | Some("merge") => {
                    listed.push(element.clone());
                    match merged.iter_mut().find(|item| item.get(key) == Some(id)) {
                        Some(item) => {
                            *item = self
                                .value(Some(item.take()), element, items, None)
                                .map_err(|why| format!("[{key}={id}].{why}"))?;
                        }
                        None => merged.push(self.value(None, element, items, None)?),
                    }
                }
                Some(other) => return Err(unknown_directive(other)),
            }
        }
        check_order(&listed, order, Some(key))?;
        Ok(ordered(merged, &before, order.unwrap_or(&listed), Some(key)))
    }

    fn field(&self, schema: &'a Schema, key: &str) -> &'a Schema {
        match &self.types.resolve(schema).shape {
            Shape::Object(object) => object.fields.get(key).map_or(&ANY, |field| field.as_ref()),
            Shape::Map(values) => values,
            _ => &ANY,
        }
    }

    fn list(&self, schema: &'a Schema) -> Option<(&'a Strategic, &'a Schema)> {
        match &self.types.resolve(schema).shape {
            Shape::List { items, strategic: Some(strategic), .. } => Some((strategic, items)),
            _ => None,
        }
    }
}

fn unknown_directive(directive: &str) -> String {
    format!("unknown patch type found: {directive:?}; $patch takes replace, delete and merge")
}

fn directive(element: &Value) -> Option<&str> {
    element.get(PATCH).map(|directive| directive.as_str().unwrap_or_default())
}

fn elements<'v>(order: &'v Value, what: &str) -> Merged<&'v [Value]> {
    order.as_array().map(Vec::as_slice).ok_or_else(|| format!("{what} must be a list"))
}

fn retain(doc: &mut Map<String, Value>, retained: &Value, patch: &Map<String, Value>) -> Merged<()> {
    let names = elements(retained, RETAIN_KEYS)?;
    let listed = |key: &str| names.iter().any(|name| name.as_str() == Some(key));
    let unlisted = patch.iter().find(|(key, value)| !key.starts_with('$') && !value.is_null() && !listed(key));
    if let Some((key, _)) = unlisted {
        return Err(format!("{RETAIN_KEYS} must list every field of the patch; {key:?} is missing"));
    }
    doc.retain(|key, _| listed(key));
    Ok(())
}

fn delete_from(doc: &mut Map<String, Value>, list: &str, values: &Value) -> Merged<()> {
    let values = elements(values, DELETE_FROM)?;
    match doc.get_mut(list) {
        Some(Value::Array(items)) => items.retain(|item| !values.contains(item)),
        None => {}
        Some(_) => return Err(format!("{DELETE_FROM}{list}: {list} is not a list")),
    }
    Ok(())
}

/// A value of the patch that has nothing to merge with: directives and nulls go.
fn cleaned(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(without_directives(map)),
        Value::Array(list) => Value::Array(without_directive_elements(list)),
        scalar => scalar.clone(),
    }
}

fn without_directives(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter()
        .filter(|(key, value)| {
            let order_or_delete = key.starts_with(ORDER) || key.starts_with(DELETE_FROM);
            !value.is_null() && key.as_str() != PATCH && key.as_str() != RETAIN_KEYS && !order_or_delete
        })
        .map(|(key, value)| (key.clone(), cleaned(value)))
        .collect()
}

/// Elements to be deleted and elements that are nothing but a directive go.
fn without_directive_elements(list: &[Value]) -> Vec<Value> {
    list.iter()
        .filter(|element| match directive(element) {
            None => true,
            Some("delete") => false,
            Some(_) => element.as_object().is_some_and(|map| map.len() > 1),
        })
        .map(cleaned)
        .collect()
}

/// Whether two list elements are the same one.
fn same(a: &Value, b: &Value, merge_key: Option<&str>) -> bool {
    match merge_key {
        None => a == b,
        Some(key) => a.get(key).is_some() && a.get(key) == b.get(key),
    }
}

fn check_order(patch: &[Value], order: Option<&[Value]>, merge_key: Option<&str>) -> Merged<()> {
    let Some(order) = order else { return Ok(()) };
    match patch.iter().find(|item| !order.iter().any(|listed| same(item, listed, merge_key))) {
        None => Ok(()),
        Some(item) => Err(format!("the order in {ORDER} does not list {item}, which the patch has")),
    }
}

/// `items` with those in `listed` in its order, the others in the order they had in `before`; where both are known in
/// `before` the two sequences interleave as they did there.
fn ordered(items: Vec<Value>, before: &[Value], listed: &[Value], merge_key: Option<&str>) -> Vec<Value> {
    let rank = |item: &Value, list: &[Value]| list.iter().position(|other| same(item, other, merge_key));
    let (mut named, others): (Vec<Value>, Vec<Value>) =
        items.into_iter().partition(|item| rank(item, listed).is_some());
    named.sort_by_key(|item| rank(item, listed));
    let mut result: Vec<Value> = Vec::with_capacity(named.len() + others.len());
    let mut named = named.into_iter().peekable();
    for other in others {
        let place = rank(&other, before);
        // Everything named up to the first that stood behind `other` goes before it.
        let remaining: Vec<Value> = named.collect();
        let split = remaining
            .iter()
            .position(|item| rank(item, before).zip(place).is_some_and(|(item, place)| item > place))
            .unwrap_or(remaining.len());
        let mut remaining = remaining.into_iter();
        result.extend(remaining.by_ref().take(split));
        result.push(other);
        named = remaining.collect::<Vec<_>>().into_iter().peekable();
    }
    result.extend(named);
    result
}

#[cfg(test)]
mod tests {
    use super::super::samples::{deployment_schema, no_types};
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn patched(doc: Value, patch: Value) -> Value {
        strategic(&doc, &patch, &deployment_schema(), &no_types()).expect("applies")
    }

    fn pod(containers: Value) -> Value {
        json!({"spec": {"template": {"spec": {"containers": containers}}}})
    }

    #[test]
    fn merges_containers_by_name_and_puts_new_ones_first() {
        let doc = pod(json!([{"name": "a", "image": "nginx", "env": [{"name": "X", "value": "1"}]}]));
        let patch = pod(json!([{"name": "b", "image": "redis"}]));
        assert_eq!(
            patched(doc.clone(), patch),
            pod(
                json!([{"name": "b", "image": "redis"}, {"name": "a", "image": "nginx", "env": [{"name": "X", "value": "1"}]}])
            )
        );
        let patch = pod(
            json!([{"name": "a", "image": "nginx:2", "env": [{"name": "Y", "value": "2"}, {"name": "X", "$patch": "delete"}]}]),
        );
        assert_eq!(
            patched(doc, patch),
            pod(json!([{"name": "a", "image": "nginx:2", "env": [{"name": "Y", "value": "2"}]}]))
        );
    }

    #[test]
    fn replace_delete_and_atomic_lists() {
        let doc = pod(json!([{"name": "a", "command": ["x", "y"]}, {"name": "b"}]));
        assert_eq!(
            patched(doc.clone(), pod(json!([{"$patch": "replace"}, {"name": "c"}]))),
            pod(json!([{"name": "c"}]))
        );
        assert_eq!(
            patched(doc.clone(), pod(json!([{"name": "a", "command": ["z"]}, {"name": "b", "$patch": "delete"}]))),
            pod(json!([{"name": "a", "command": ["z"]}]))
        );
        let gone = json!({"spec": {"template": {"spec": {"$patch": "delete"}}}});
        assert_eq!(patched(doc.clone(), gone), json!({"spec": {"template": {"spec": {}}}}));
        let replaced = json!({"spec": {"$patch": "replace", "replicas": 2}});
        assert_eq!(patched(doc, replaced), json!({"spec": {"replicas": 2}}));
    }

    #[test]
    fn retain_keys_drops_the_other_strategy() {
        let doc = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(patched(doc.clone(), patch), json!({"spec": {"strategy": {"type": "Recreate"}}}));
        let wrong = json!({"spec": {"strategy": {"$retainKeys": ["rollingUpdate"], "type": "Recreate"}}});
        let status = strategic(&doc, &wrong, &deployment_schema(), &no_types()).expect_err("type is not retained");
        assert_eq!(status.code(), 400);
    }

    #[test]
    fn sets_of_scalars() {
        let doc = json!({"metadata": {"finalizers": ["a", "b", "c"]}});
        let patch = json!({"metadata": {
            "$deleteFromPrimitiveList/finalizers": ["b"],
            "$setElementOrder/finalizers": ["c", "d", "a"],
            "finalizers": ["d"]
        }});
        assert_eq!(patched(doc, patch), json!({"metadata": {"finalizers": ["c", "d", "a"]}}));
    }

    #[test]
    fn element_order_without_elements_only_reorders() {
        let doc = pod(json!([{"name": "a"}, {"name": "injected"}, {"name": "b"}]));
        let patch =
            json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}}}});
        let names = |value: &Value| -> Vec<String> {
            value
                .pointer("/spec/template/spec/containers")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .map(|item| item["name"].as_str().unwrap_or_default().to_owned())
                .collect()
        };
        // `injected` goes before the first listed element that stood behind it.
        assert_eq!(names(&patched(doc.clone(), patch)), ["injected", "b", "a"]);
        let same =
            json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "a"}, {"name": "b"}]}}}});
        assert_eq!(names(&patched(doc, same)), ["a", "injected", "b"]);
    }

    #[test]
    fn an_order_that_misses_a_patched_element_is_refused() {
        let patch = json!({"spec": {"template": {"spec": {
            "$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "b"}]
        }}}});
        let doc = pod(json!([{"name": "a"}]));
        assert_eq!(strategic(&doc, &patch, &deployment_schema(), &no_types()).expect_err("no b").code(), 400);
        let keyless = pod(json!([{"image": "x"}]));
        let status = strategic(&doc, &keyless, &deployment_schema(), &no_types()).expect_err("no name");
        assert!(status.message.contains("does not contain declared merge key: name"), "{status}");
    }

    #[test]
    fn nulls_delete_and_never_stay() {
        let doc = json!({"metadata": {"labels": {"a": "1", "b": "2"}}});
        let patch = json!({"metadata": {"labels": {"a": null}, "annotations": {"x": null, "y": "1"}}});
        assert_eq!(patched(doc, patch), json!({"metadata": {"labels": {"b": "2"}, "annotations": {"y": "1"}}}));
        let fresh = json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": null}]}}}});
        assert_eq!(patched(json!({}), fresh), pod(json!([{"name": "a"}])));
    }

    proptest! {
        #[test]
        fn never_panics(doc in super::super::json::tests::any_json(), patch in super::super::json::tests::any_json()) {
            let _ = strategic(&doc, &patch, &deployment_schema(), &no_types());
            let wrapped = json!({"spec": {"template": {"spec": {"containers": patch, "$setElementOrder/containers": doc}}}});
            let _ = strategic(&pod(doc.clone()), &wrapped, &deployment_schema(), &no_types());
        }

        #[test]
        fn nothing_is_lost_by_ordering(items in prop::collection::vec(0..9u8, 0..7), before in prop::collection::vec(0..9u8, 0..7), listed in prop::collection::vec(0..9u8, 0..7)) {
            let values = |list: Vec<u8>| list.into_iter().map(Value::from).collect::<Vec<_>>();
            let (items, before, listed) = (values(items), values(before), values(listed));
            let mut sorted = ordered(items.clone(), &before, &listed, None);
            let mut expected = items;
            sorted.sort_by_key(Value::to_string);
            expected.sort_by_key(Value::to_string);
            prop_assert_eq!(sorted, expected);
        }
    }
}
