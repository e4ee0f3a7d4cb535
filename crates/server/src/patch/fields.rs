//! Sets of fields, and `FieldsV1`, their form on the wire
//! (<https://github.com/kubernetes-sigs/structured-merge-diff>, `fieldpath`).
//!
//! A set is a tree of path elements. A path is in the set when its last element is a member of the node that the rest
//! leads to; an element can be a member, lead further, or both. On the wire `f:name` is a field, `k:{...}` the element
//! of a list identified by those keys, `v:...` the element of a list of scalars, `i:n` a position, and `.` says that
//! the node itself is a member.

use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// No field of any kind lies deeper; deeper input is refused.
const MAX_DEPTH: usize = 120;

/// One step of a path. JSON in it is canonical (keys sorted, no spaces), so that equal steps are equal text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    Field(String),
    /// A JSON object of key fields.
    Key(String),
    /// A JSON scalar.
    Value(String),
    Index(u64),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldsError {
    #[error("FieldsV1: {0} is not an object")]
    NotAnObject(&'static str),
    #[error("FieldsV1: {0:?} is not a path element")]
    Element(String),
    #[error("FieldsV1: nested more than {MAX_DEPTH} deep")]
    TooDeep,
    #[error("FieldsV1: {0}")]
    Json(String),
}

/// Text of `value` with the keys of all objects sorted.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            let parts: Vec<String> = sorted
                .into_iter()
                .map(|(key, value)| format!("{}:{}", Value::from(key.as_str()), canonical(value)))
                .collect();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(canonical).collect::<Vec<_>>().join(",")),
        scalar => scalar.to_string(),
    }
}

impl Element {
    pub fn field(name: &str) -> Self {
        Element::Field(name.to_owned())
    }
    /// The element of a list that these key fields identify.
    pub fn key(keys: Map<String, Value>) -> Self {
        Element::Key(canonical(&Value::Object(keys)))
    }
    pub fn value(value: &Value) -> Self {
        Element::Value(canonical(value))
    }

    fn parse(text: &str) -> Result<Self, FieldsError> {
        let bad = || FieldsError::Element(text.chars().take(200).collect());
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        match kind {
            "f" => Ok(Element::field(rest)),
            "k" => match serde_json::from_str(rest) {
                Ok(Value::Object(keys)) => Ok(Element::key(keys)),
                _ => Err(bad()),
            },
            "v" => serde_json::from_str(rest).map(|value: Value| Element::value(&value)).map_err(|_| bad()),
            "i" => rest.parse().map(Element::Index).map_err(|_| bad()),
            _ => Err(bad()),
        }
    }

    fn to_text(&self) -> String {
        match self {
            Element::Field(name) => format!("f:{name}"),
            Element::Key(keys) => format!("k:{keys}"),
            Element::Value(value) => format!("v:{value}"),
            Element::Index(index) => format!("i:{index}"),
        }
    }
}

/// As in conflict messages: `.spec`, `[name="web"]`, `[="value"]`, `[3]`.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Field(name) => write!(f, ".{name}"),
            Element::Key(keys) => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let parts: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
                write!(f, "[{}]", parts.join(","))
            }
            Element::Value(value) => write!(f, "[={value}]"),
            Element::Index(index) => write!(f, "[{index}]"),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    members: BTreeSet<Element>,
    /// Never holds an empty set.
    children: BTreeMap<Element, Set>,
}

impl Set {
    pub fn is_empty(&self) -> bool {
        self.members.is_empty() && self.children.is_empty()
    }

    pub fn insert(&mut self, element: Element) {
        self.members.insert(element);
    }

    /// Takes out a member; what is below it stays.
    pub fn remove(&mut self, element: &Element) {
        self.members.remove(element);
    }

    pub fn has(&self, element: &Element) -> bool {
        self.members.contains(element)
    }

    pub fn child(&self, element: &Element) -> Option<&Set> {
        self.children.get(element)
    }

    /// Adds a whole subtree below `element`.
    pub fn attach(&mut self, element: Element, child: Set) {
        if child.is_empty() {
            return;
        }
        match self.children.get_mut(&element) {
            Some(old) => *old = old.union(&child),
            None => {
                self.children.insert(element, child);
            }
        }
    }

    pub fn insert_path(&mut self, path: &[Element]) {
        match path {
            [] => {}
            [last] => self.insert(last.clone()),
            [first, rest @ ..] => self.children.entry(first.clone()).or_default().insert_path(rest),
        }
    }

    pub fn contains_path(&self, path: &[Element]) -> bool {
        match path {
            [] => false,
            [last] => self.has(last),
            [first, rest @ ..] => self.child(first).is_some_and(|child| child.contains_path(rest)),
        }
    }

    pub fn union(&self, other: &Set) -> Set {
        let mut result = self.clone();
        result.members.extend(other.members.iter().cloned());
        for (element, theirs) in &other.children {
            match result.children.get_mut(element) {
                Some(ours) => *ours = ours.union(theirs),
                None => {
                    result.children.insert(element.clone(), theirs.clone());
                }
            }
        }
        result
    }

    pub fn intersection(&self, other: &Set) -> Set {
        let mut result =
            Set { members: self.members.intersection(&other.members).cloned().collect(), children: BTreeMap::new() };
        for (element, ours) in &self.children {
            if let Some(theirs) = other.children.get(element) {
                result.attach(element.clone(), ours.intersection(theirs));
            }
        }
        result
    }

    /// The paths of `self` that are not in `other`.
    pub fn difference(&self, other: &Set) -> Set {
        let mut result =
            Set { members: self.members.difference(&other.members).cloned().collect(), children: BTreeMap::new() };
        for (element, ours) in &self.children {
            match other.children.get(element) {
                Some(theirs) => result.attach(element.clone(), ours.difference(theirs)),
                None => {
                    result.children.insert(element.clone(), ours.clone());
                }
            }
        }
        result
    }

    /// Every path in the set, parents before what is in them.
    pub fn paths(&self) -> Vec<Vec<Element>> {
        let mut paths = Vec::new();
        self.walk(&mut Vec::new(), &mut paths);
        paths
    }

    fn walk(&self, prefix: &mut Vec<Element>, paths: &mut Vec<Vec<Element>>) {
        let elements: BTreeSet<&Element> = self.members.iter().chain(self.children.keys()).collect();
        for element in elements {
            prefix.push(element.clone());
            if self.members.contains(element) {
                paths.push(prefix.clone());
            }
            if let Some(child) = self.children.get(element) {
                child.walk(prefix, paths);
            }
            prefix.pop();
        }
    }

    /// From the `fieldsV1` of a `managedFields` entry.
    pub fn from_json(fields: &Value) -> Result<Set, FieldsError> {
        Set::read(fields, "the set", 0).map(|(set, _)| set)
    }

    /// From `FieldsV1` as text.
    pub fn parse(bytes: &[u8]) -> Result<Set, FieldsError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| FieldsError::Json(error.to_string()))?;
        Set::from_json(&value)
    }

    /// The set below a node, and whether the node is a member itself.
    fn read(fields: &Value, what: &'static str, depth: usize) -> Result<(Set, bool), FieldsError> {
        if depth > MAX_DEPTH {
            return Err(FieldsError::TooDeep);
        }
        let Value::Object(fields) = fields else {
            return Err(FieldsError::NotAnObject(what));
        };
        let mut set = Set::default();
        let mut own = false;
        for (text, below) in fields {
            if text == "." {
                own = true;
                continue;
            }
            let element = Element::parse(text)?;
            let (child, member) = Set::read(below, "an element", depth + 1)?;
            if member || child.is_empty() {
                set.insert(element.clone());
            }
            set.attach(element, child);
        }
        Ok((set, own))
    }

    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        for element in &self.members {
            if !self.children.contains_key(element) {
                fields.insert(element.to_text(), Value::Object(Map::new()));
            }
        }
        for (element, child) in &self.children {
            let mut below = child.to_json();
            if let (true, Value::Object(map)) = (self.members.contains(element), &mut below) {
                map.insert(".".to_owned(), Value::Object(Map::new()));
            }
            fields.insert(element.to_text(), below);
        }
        Value::Object(fields)
    }
}

impl FromIterator<Vec<Element>> for Set {
    fn from_iter<T: IntoIterator<Item = Vec<Element>>>(paths: T) -> Self {
        let mut set = Set::default();
        for path in paths {
            set.insert_path(&path);
        }
        set
    }
}

/// A path as conflict messages show it.
pub(super) fn path_text(path: &[Element]) -> String {
    path.iter().map(Element::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn any_element() -> impl Strategy<Value = Element> {
        prop_oneof![
            "[a-c.]{1,2}".prop_map(Element::Field),
            ("[a-c]", 0..3i64).prop_map(|(name, port)| {
                let mut keys = Map::new();
                keys.insert("port".into(), port.into());
                keys.insert("name".into(), name.into());
                Element::key(keys)
            }),
            "[a-c]".prop_map(|text| Element::value(&text.into())),
            (0..3u64).prop_map(Element::Index),
        ]
    }

    fn any_set() -> impl Strategy<Value = Set> {
        prop::collection::vec(prop::collection::vec(any_element(), 1..4), 0..12)
            .prop_map(|paths| paths.into_iter().collect())
    }

    #[test]
    fn reads_and_writes_what_kubernetes_writes() {
        let fields = json!({
            "f:metadata": {"f:labels": {".": {}, "f:app": {}}, "f:finalizers": {".": {}, "v:\"a/b\"": {}}},
            "f:spec": {
                "f:replicas": {},
                "f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"web\"}": {
                    ".": {}, "f:image": {}, "f:ports": {".": {}, "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}
                }}}}
            }
        });
        let set = Set::from_json(&fields).expect("valid");
        assert_eq!(set.to_json(), fields);
        let shown: Vec<String> = set.paths().iter().map(|path| path_text(path)).collect();
        assert!(shown.contains(&".spec.template.spec.containers[name=\"web\"].image".to_owned()), "{shown:?}");
        assert!(shown.contains(&".metadata.finalizers[=\"a/b\"]".to_owned()), "{shown:?}");
        assert!(shown.iter().any(|path| path.ends_with("[containerPort=80,protocol=\"TCP\"]")), "{shown:?}");
    }

    #[test]
    fn refuses_what_is_not_a_set() {
        for bad in [
            json!(1),
            json!({"x": {}}),
            json!({"f:a": 1}),
            json!({"k:[1]": {}}),
            json!({"i:-1": {}}),
            json!({"z:a": {}}),
        ] {
            assert!(Set::from_json(&bad).is_err(), "{bad}");
        }
        let mut deep = json!({});
        for _ in 0..200 {
            deep = json!({"f:a": deep});
        }
        assert_eq!(Set::from_json(&deep), Err(FieldsError::TooDeep));
    }

    proptest! {
        #[test]
        fn wire_form_keeps_the_set(set in any_set()) {
            prop_assert_eq!(Set::from_json(&set.to_json()).expect("own output"), set);
        }

        #[test]
        fn algebra(a in any_set(), b in any_set(), c in any_set()) {
            prop_assert_eq!(a.union(&b), b.union(&a));
            prop_assert_eq!(a.union(&b).union(&c), a.union(&b.union(&c)));
            prop_assert_eq!(a.intersection(&b), b.intersection(&a));
            prop_assert_eq!(a.union(&a), a.clone());
            prop_assert_eq!(a.intersection(&a), a.clone());
            prop_assert!(a.difference(&a).is_empty());
            prop_assert_eq!(a.difference(&b).union(&a.intersection(&b)), a.clone());
            prop_assert!(a.difference(&b).intersection(&b).is_empty());
            prop_assert_eq!(a.intersection(&b.union(&c)), a.intersection(&b).union(&a.intersection(&c)));
            prop_assert_eq!(a.difference(&b.union(&c)), a.difference(&b).difference(&c));
            for path in a.paths() {
                prop_assert!(a.contains_path(&path));
                prop_assert_eq!(a.difference(&b).contains_path(&path), !b.contains_path(&path));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Set::parse(&bytes);
        }

        #[test]
        fn arbitrary_keys_never_panic(keys in prop::collection::vec("([fkvi.]:?)?.{0,12}", 0..8)) {
            let map: Map<String, Value> = keys.into_iter().map(|key| (key, json!({}))).collect();
            let _ = Set::from_json(&Value::Object(map));
        }
    }
}
