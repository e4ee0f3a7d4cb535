//! Which events a Trigger wants: `filters`, in the dialects of the CloudEvents Subscriptions API that Knative has, or
//! without them the older `filter.attributes`.
//! <https://knative.dev/docs/eventing/triggers/#trigger-filtering>

use crate::cloudevent::CloudEvent;
use serde_json::{Map, Value};

/// Filters within filters; admission allows fewer.
const DEPTH: usize = 16;

pub fn wants(spec: &Value, event: &CloudEvent) -> bool {
    match spec.get("filters").and_then(Value::as_array).filter(|filters| !filters.is_empty()) {
        Some(filters) => filters.iter().all(|filter| passes(filter, event, DEPTH)),
        None => {
            let nothing = Map::new();
            event.matches(spec.pointer("/filter/attributes").and_then(Value::as_object).unwrap_or(&nothing))
        }
    }
}

/// What is not understood lets nothing pass, also within `not`.
fn passes(filter: &Value, event: &CloudEvent, depth: usize) -> bool {
    judge(filter, event, depth).unwrap_or(false)
}

fn judge(filter: &Value, event: &CloudEvent, depth: usize) -> Option<bool> {
    let depth = depth.checked_sub(1)?;
    let mut result = true;
    for (dialect, value) in filter.as_object().filter(|dialects| !dialects.is_empty())? {
        result &= match dialect.as_str() {
            "exact" => each(value, event, |value, wanted| value == wanted)?,
            "prefix" => each(value, event, |value, wanted| value.starts_with(wanted))?,
            "suffix" => each(value, event, |value, wanted| value.ends_with(wanted))?,
            "not" => !judge(value, event, depth)?,
            "all" => judged(value, event, depth)?.into_iter().all(|one| one),
            "any" => judged(value, event, depth)?.into_iter().any(|one| one),
            _ => return None,
        };
    }
    Some(result)
}

fn judged(filters: &Value, event: &CloudEvent, depth: usize) -> Option<Vec<bool>> {
    filters.as_array()?.iter().map(|filter| judge(filter, event, depth)).collect()
}

fn each(wanted: &Value, event: &CloudEvent, fits: fn(&str, &str) -> bool) -> Option<bool> {
    let mut result = true;
    for (name, wanted) in wanted.as_object()? {
        let wanted = wanted.as_str()?;
        result &= event.get(name).is_some_and(|value| fits(value, wanted));
    }
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn event() -> CloudEvent {
        let attributes =
            [("specversion", "1.0"), ("id", "1"), ("source", "/shop/eu"), ("type", "order.placed"), ("size", "")];
        CloudEvent::new(attributes.map(|(name, value)| (name.to_owned(), value.to_owned())), &json!({})).unwrap()
    }

    #[test]
    fn dialects() {
        let wanted = |filters: Value| wants(&json!({ "filters": filters }), &event());
        let table = [
            (json!([]), true),
            (json!([{"exact": {"type": "order.placed"}}]), true),
            (json!([{"exact": {"type": "order.placed", "source": "/x"}}]), false),
            (json!([{"exact": {"colour": "red"}}]), false),
            (json!([{"prefix": {"type": "order."}}, {"suffix": {"source": "/eu"}}]), true),
            (json!([{"prefix": {"type": "order."}}, {"suffix": {"source": "/us"}}]), false),
            (json!([{"not": {"exact": {"type": "order.lost"}}}]), true),
            (json!([{"not": {"prefix": {"type": "order"}}}]), false),
            (json!([{"not": {"exact": {"colour": "red"}}}]), true),
            (json!([{"any": [{"exact": {"type": "x"}}, {"suffix": {"type": "placed"}}]}]), true),
            (json!([{"any": []}]), false),
            (json!([{"all": [{"exact": {"id": "1"}}, {"not": {"any": [{"prefix": {"source": "/shop/us"}}]}}]}]), true),
            (json!([{"cesql": "true"}]), false),
            (json!([{"not": {"cesql": "false"}}]), false),
            (json!([{"not": {}}]), false),
            (json!([{"exact": {"id": 1}}]), false),
        ];
        for (filters, fits) in table {
            assert_eq!(wanted(filters.clone()), fits, "{filters}");
        }
        assert!(wants(&json!({"filter": {"attributes": {"type": "order.placed", "size": ""}}}), &event()));
        let both = json!({"filters": [{"exact": {"id": "1"}}], "filter": {"attributes": {"type": "x"}}});
        assert!(wants(&both, &event()), "the newer ones count");
        let mut deep = json!({"exact": {"id": "1"}});
        for _ in 0..100 {
            deep = json!({ "all": [deep] });
        }
        assert!(!wanted(json!([deep])));
    }

    fn filter() -> impl Strategy<Value = Value> {
        let leaf = (prop_oneof![Just("exact"), Just("prefix"), Just("suffix")], "(id|type|none)", "[a-z1.]{1,5}")
            .prop_map(|(dialect, name, value)| json!({dialect: {name: value}}));
        leaf.prop_recursive(4, 16, 3, |inner| {
            prop_oneof![
                inner.clone().prop_map(|one| json!({ "not": one })),
                proptest::collection::vec(inner.clone(), 0..3).prop_map(|all| json!({ "all": all })),
                proptest::collection::vec(inner, 0..3).prop_map(|any| json!({ "any": any })),
            ]
        })
    }

    proptest! {
        #[test]
        fn de_morgan(filters in proptest::collection::vec(filter(), 0..4)) {
            let negated: Vec<Value> = filters.iter().map(|one| json!({ "not": one })).collect();
            let event = event();
            let any = passes(&json!({ "any": filters }), &event, DEPTH);
            prop_assert_eq!(any, !passes(&json!({ "all": negated }), &event, DEPTH));
        }
    }
}
