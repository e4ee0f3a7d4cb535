//! JSON patch, RFC 6902.

use api::status::{Reason, Status, StatusResult};
use serde_json::Value;

/// Kubernetes' bound on the length of one patch.
pub const MAX_OPERATIONS: usize = 10_000;
/// What all `copy` operations of one patch may add, as JSON text.
const MAX_COPIED_BYTES: usize = 16 << 20;
/// How deep what a patch puts in may reach; as deep as a body may be nested. Without it a patch could build what no
/// recursive code can walk.
const MAX_DEPTH: usize = 100;

/// `doc` after all operations, or nothing of it: the first operation that cannot be done refuses the whole patch.
pub fn json_patch(doc: &Value, operations: &Value) -> StatusResult<Value> {
    let Value::Array(operations) = operations else {
        return Err(Status::bad_request("a JSON patch is a list of operations"));
    };
    if operations.len() > MAX_OPERATIONS {
        return Err(Status::new(
            Reason::RequestEntityTooLarge,
            format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}", operations.len()),
        ));
    }
    let mut result = doc.clone();
    let mut copied = 0;
    for (index, operation) in operations.iter().enumerate() {
        let operation = Operation::parse(operation)
            .map_err(|why| Status::bad_request(format!("JSON patch operation {index}: {why}")))?;
        let described = operation.describe();
        operation.apply(&mut result, &mut copied).map_err(|why| {
            Status::new(
                Reason::Invalid,
                format!(
                    "the server rejected our request due to an error in our request: operation {index} ({described}): {why}"
                ),
            )
        })?;
    }
    Ok(result)
}

enum Operation<'a> {
    Add(Pointer, &'a Value),
    Remove(Pointer),
    Replace(Pointer, &'a Value),
    Move { from: Pointer, path: Pointer },
    Copy { from: Pointer, path: Pointer },
    Test(Pointer, &'a Value),
}

impl<'a> Operation<'a> {
    fn parse(operation: &'a Value) -> Result<Self, String> {
        let text = |key: &str| {
            operation.get(key).and_then(Value::as_str).ok_or_else(|| format!("{key:?} must be there and be a string"))
        };
        let pointer = |key: &str| text(key).and_then(Pointer::parse);
        let value = || operation.get("value").ok_or_else(|| "\"value\" must be there".to_owned());
        Ok(match text("op")? {
            "add" => Operation::Add(pointer("path")?, value()?),
            "remove" => Operation::Remove(pointer("path")?),
            "replace" => Operation::Replace(pointer("path")?, value()?),
            "move" => Operation::Move { from: pointer("from")?, path: pointer("path")? },
            "copy" => Operation::Copy { from: pointer("from")?, path: pointer("path")? },
            "test" => Operation::Test(pointer("path")?, value()?),
            other => return Err(format!("unknown op {other:?}: there are add, remove, replace, move, copy and test")),
        })
    }

    fn describe(&self) -> String {
        match self {
            Operation::Add(path, _) => format!("add {path}"),
            Operation::Remove(path) => format!("remove {path}"),
            Operation::Replace(path, _) => format!("replace {path}"),
            Operation::Move { from, path } => format!("move {from} to {path}"),
            Operation::Copy { from, path } => format!("copy {from} to {path}"),
            Operation::Test(path, _) => format!("test {path}"),
        }
    }

    fn apply(&self, doc: &mut Value, copied: &mut usize) -> Result<(), String> {
        match self {
            Operation::Add(path, value) => path.add(doc, (*value).clone()),
            Operation::Remove(path) => path.remove(doc).map(drop),
            Operation::Replace(path, value) => {
                path.get_mut(doc)?;
                path.remove(doc)?;
                path.add(doc, (*value).clone())
            }
            Operation::Move { from, path } => {
                if path.is_inside(from) {
                    return Err("a value cannot be moved into itself".to_owned());
                }
                let value = from.remove(doc)?;
                path.add(doc, value)
            }
            Operation::Copy { from, path } => {
                let value = from.get(doc)?.clone();
                *copied = copied.saturating_add(value.to_string().len());
                if *copied > MAX_COPIED_BYTES {
                    return Err(format!("the patch copies more than {MAX_COPIED_BYTES} bytes"));
                }
                path.add(doc, value)
            }
            Operation::Test(path, expected) => {
                // A missing member passes a test for null, as in the implementation that Kubernetes uses.
                let actual = match path.get(doc) {
                    Ok(value) => value,
                    Err(_) if expected.is_null() => return Ok(()),
                    Err(why) => return Err(format!("testing value {path} failed: {why}")),
                };
                if equal(actual, expected) {
                    return Ok(());
                }
                Err(format!("testing value {path} failed: it is {}, not {}", short(actual), short(expected)))
            }
        }
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Numbers are equal when their values are (RFC 6902, section 4.6).
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || (!(x.is_i64() && y.is_i64()) && x.as_f64() == y.as_f64()),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| equal(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(key, x)| y.get(key).is_some_and(|y| equal(x, y)))
        }
        _ => a == b,
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// A JSON pointer, RFC 6901.
struct Pointer {
    text: String,
    tokens: Vec<String>,
}

impl std::fmt::Display for Pointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

impl Pointer {
    fn parse(text: &str) -> Result<Self, String> {
        let tokens = match text.strip_prefix('/') {
            None if text.is_empty() => Vec::new(),
            None => return Err(format!("path {text:?} must be empty or begin with /")),
            Some(rest) => rest.split('/').map(|token| token.replace("~1", "/").replace("~0", "~")).collect(),
        };
        Ok(Pointer { text: text.to_owned(), tokens })
    }

    fn is_inside(&self, outer: &Pointer) -> bool {
        self.tokens.len() > outer.tokens.len() && self.tokens.starts_with(&outer.tokens)
    }

    fn get<'v>(&self, doc: &'v Value) -> Result<&'v Value, String> {
        self.tokens.iter().try_fold(doc, |at, token| match at {
            Value::Object(map) => map.get(token).ok_or_else(|| missing(token)),
            Value::Array(list) => list.get(index(token, list.len())?).ok_or_else(|| missing(token)),
            _ => Err(no_container(token)),
        })
    }

    fn get_mut<'v>(&self, doc: &'v mut Value) -> Result<&'v mut Value, String> {
        descend(doc, &self.tokens)
    }

    fn add(&self, doc: &mut Value, value: Value) -> Result<(), String> {
        if self.tokens.len() + depth(&value) > MAX_DEPTH {
            return Err(format!("the object would be nested more than {MAX_DEPTH} deep"));
        }
        let Some((last, parents)) = self.tokens.split_last() else {
            *doc = value;
            return Ok(());
        };
        match descend(doc, parents)? {
            Value::Object(map) => {
                map.insert(last.clone(), value);
            }
            Value::Array(list) => {
                let at = if last == "-" { list.len() } else { index(last, list.len() + 1)? };
                list.insert(at, value);
            }
            _ => return Err(no_container(last)),
        }
        Ok(())
    }

    fn remove(&self, doc: &mut Value) -> Result<Value, String> {
        let Some((last, parents)) = self.tokens.split_last() else {
            return Ok(std::mem::take(doc));
        };
        match descend(doc, parents)? {
            Value::Object(map) => map.remove(last).ok_or_else(|| missing(last)),
            Value::Array(list) => {
                let at = index(last, list.len())?;
                Ok(list.remove(at))
            }
            _ => Err(no_container(last)),
        }
    }
}

fn descend<'v>(doc: &'v mut Value, tokens: &[String]) -> Result<&'v mut Value, String> {
    tokens.iter().try_fold(doc, |at, token| match at {
        Value::Object(map) => map.get_mut(token).ok_or_else(|| missing(token)),
        Value::Array(list) => {
            let at = index(token, list.len())?;
            list.get_mut(at).ok_or_else(|| missing(token))
        }
        _ => Err(no_container(token)),
    })
}

/// An array index below `length`: digits without leading zeros.
fn index(token: &str, length: usize) -> Result<usize, String> {
    let digits = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (token.len() > 1 && token.starts_with('0')) {
        return Err(format!("{token:?} is not an index of a list"));
    }
    match token.parse::<usize>() {
        Ok(at) if at < length => Ok(at),
        _ => Err(format!("index {token} is out of bounds")),
    }
}

fn missing(token: &str) -> String {
    format!("{token:?} is not there")
}

fn no_container(token: &str) -> String {
    format!("{token:?} would be inside a value that is neither object nor list")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    pub fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-3i64..4).prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c]{1,2}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    #[test]
    fn examples_of_rfc_6902_appendix_a() {
        let ok = [
            (
                json!({"foo": "bar"}),
                json!([{"op": "add", "path": "/baz", "value": "qux"}]),
                json!({"foo": "bar", "baz": "qux"}),
            ),
            (
                json!({"foo": ["bar", "baz"]}),
                json!([{"op": "add", "path": "/foo/1", "value": "qux"}]),
                json!({"foo": ["bar", "qux", "baz"]}),
            ),
            (json!({"baz": "qux", "foo": "bar"}), json!([{"op": "remove", "path": "/baz"}]), json!({"foo": "bar"})),
            (
                json!({"foo": ["bar", "qux", "baz"]}),
                json!([{"op": "remove", "path": "/foo/1"}]),
                json!({"foo": ["bar", "baz"]}),
            ),
            (
                json!({"baz": "qux", "foo": "bar"}),
                json!([{"op": "replace", "path": "/baz", "value": "boo"}]),
                json!({"baz": "boo", "foo": "bar"}),
            ),
            (
                json!({"foo": {"bar": "baz", "waldo": "fred"}, "qux": {"corge": "grault"}}),
                json!([{"op": "move", "from": "/foo/waldo", "path": "/qux/thud"}]),
                json!({"foo": {"bar": "baz"}, "qux": {"corge": "grault", "thud": "fred"}}),
            ),
            (
                json!({"foo": ["all", "grass", "cows", "eat"]}),
                json!([{"op": "move", "from": "/foo/1", "path": "/foo/3"}]),
                json!({"foo": ["all", "cows", "eat", "grass"]}),
            ),
            (
                json!({"baz": "qux", "foo": ["a", 2, "c"]}),
                json!([{"op": "test", "path": "/baz", "value": "qux"}, {"op": "test", "path": "/foo/1", "value": 2}]),
                json!({"baz": "qux", "foo": ["a", 2, "c"]}),
            ),
            (
                json!({"foo": "bar"}),
                json!([{"op": "add", "path": "/child", "value": {"grandchild": {}}}]),
                json!({"foo": "bar", "child": {"grandchild": {}}}),
            ),
            (
                json!({"foo": "bar"}),
                json!([{"op": "add", "path": "/baz", "value": "qux", "xyz": 123}]),
                json!({"foo": "bar", "baz": "qux"}),
            ),
            (
                json!({"/": 9, "~1": 10}),
                json!([{"op": "test", "path": "/~01", "value": 10}]),
                json!({"/": 9, "~1": 10}),
            ),
            (
                json!({"foo": ["bar"]}),
                json!([{"op": "add", "path": "/foo/-", "value": ["abc", "def"]}]),
                json!({"foo": ["bar", ["abc", "def"]]}),
            ),
        ];
        for (doc, patch, expected) in ok {
            assert_eq!(json_patch(&doc, &patch).expect("applies"), expected, "{doc} {patch}");
        }
        let refused = [
            (json!({"baz": "qux"}), json!([{"op": "test", "path": "/baz", "value": "bar"}])),
            (json!({"foo": "bar"}), json!([{"op": "add", "path": "/baz/bat", "value": "qux"}])),
            (json!({"/": 9, "~1": 10}), json!([{"op": "test", "path": "/~01", "value": "10"}])),
            (json!({"foo": 1}), json!([{"op": "remove", "path": "/bar"}])),
            (json!({"foo": 1}), json!([{"op": "replace", "path": "/bar", "value": 1}])),
            (json!({"foo": {"a": 1}}), json!([{"op": "move", "from": "/foo", "path": "/foo/a/b"}])),
            (json!({"foo": [1]}), json!([{"op": "add", "path": "/foo/3", "value": 1}])),
            (json!({"foo": [1]}), json!([{"op": "add", "path": "/foo/01", "value": 1}])),
        ];
        for (doc, patch) in refused {
            let status = json_patch(&doc, &patch).expect_err("does not apply");
            assert_eq!(status.code(), 422, "{doc} {patch}");
        }
    }

    #[test]
    fn malformed_patches_are_bad_requests() {
        for patch in [
            json!({}),
            json!([{"op": "add"}]),
            json!([{"op": "jump", "path": "/a"}]),
            json!([{"op": "add", "path": "a", "value": 1}]),
            json!([{"op": "add", "path": "/a"}]),
            json!([3]),
        ] {
            assert_eq!(json_patch(&json!({}), &patch).expect_err("malformed").code(), 400, "{patch}");
        }
    }

    #[test]
    fn too_many_operations_and_too_much_copying_are_refused() {
        let many: Vec<Value> = (0..=MAX_OPERATIONS).map(|_| json!({"op": "test", "path": "", "value": {}})).collect();
        assert_eq!(json_patch(&json!({}), &many.into()).expect_err("too many").code(), 413);
        let doubling: Vec<Value> = (0..40).map(|_| json!({"op": "copy", "from": "/a", "path": "/a/-"})).collect();
        assert_eq!(json_patch(&json!({"a": ["xxxxxxxx"]}), &doubling.into()).expect_err("grows").code(), 422);
    }

    #[test]
    fn nothing_is_nested_too_deep() {
        let mut doc = json!({"a": {}});
        let mut length = 1;
        // Each copy puts the whole chain at its own end.
        let status = loop {
            assert!(length < 1000, "not refused");
            match json_patch(&doc, &json!([{"op": "copy", "from": "/a", "path": "/a".repeat(length + 1)}])) {
                Ok(deeper) => doc = deeper,
                Err(status) => break status,
            }
            length *= 2;
        };
        assert!(status.message.ends_with("nested more than 100 deep"), "{status}");
        let long = "/a".repeat(200);
        assert_eq!(json_patch(&doc, &json!([{"op": "add", "path": long, "value": 1}])).expect_err("deep").code(), 422);
    }

    #[test]
    fn a_failed_test_says_what_is_there() {
        let status =
            json_patch(&json!({"a": 1}), &json!([{"op": "test", "path": "/a", "value": 2}])).expect_err("differs");
        assert!(
            status.message.ends_with("operation 0 (test \"/a\"): testing value \"/a\" failed: it is 1, not 2"),
            "{status}"
        );
    }

    proptest! {
        #[test]
        fn never_panics(doc in any_json(), ops in prop::collection::vec((0..6usize, "(/[a-c01-]{0,2}){0,3}", "(/[a-c01-]{0,2}){0,3}", any_json()), 0..6)) {
            let names = ["add", "remove", "replace", "move", "copy", "test"];
            let ops: Vec<Value> = ops
                .into_iter()
                .map(|(op, path, from, value)| json!({"op": names[op], "path": path, "from": from, "value": value}))
                .collect();
            let _ = json_patch(&doc, &ops.into());
        }

        #[test]
        fn arbitrary_json_as_patch_never_panics(doc in any_json(), ops in any_json()) {
            let _ = json_patch(&doc, &ops);
        }

        #[test]
        fn what_is_added_can_be_tested_and_removed(doc in any_json(), value in any_json()) {
            prop_assume!(doc.is_object());
            let ops = json!([
                {"op": "add", "path": "/new~1~0", "value": value},
                {"op": "test", "path": "/new~1~0", "value": value},
                {"op": "remove", "path": "/new~1~0"},
            ]);
            prop_assert_eq!(json_patch(&doc, &ops).expect("applies"), doc);
        }
    }
}
