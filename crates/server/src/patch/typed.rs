//! Objects seen through their schema, as structured merge sees them: which fields they have, what changed between two
//! of them, one laid over the other, fields taken out again.
//!
//! Scalars, atomic objects and atomic lists are leaves. Elements of a list are told apart by their keys (list type
//! map) or by their value (set). Where a schema says nothing (`Any`), objects are granular and lists atomic.

use super::fields::{Element, Set, path_text};
use api::schema::{ListKind, ObjectShape, Schema, Shape, Types};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

pub(super) static ANY: LazyLock<Schema> = LazyLock::new(Schema::default);

/// What [`super::managed`] never lists: identity, and what the server sets.
const SYSTEM_ROOT: [&str; 2] = ["apiVersion", "kind"];
const SYSTEM_METADATA: [&str; 10] = [
    "name",
    "namespace",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
    "uid",
    "generation",
    "managedFields",
    "resourceVersion",
];

/// How a value is taken apart.
enum View<'a> {
    Leaf,
    Struct(&'a ObjectShape),
    Map(&'a Schema),
    /// Unknown: told by the value itself.
    Deduced,
    Set,
    Keyed(&'a [String], &'a Schema),
}

#[derive(Clone, Copy)]
pub(super) struct Typed<'a> {
    schema: &'a Schema,
    types: &'a Types,
}

/// What differs between two objects.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub added: Set,
    pub modified: Set,
    pub removed: Set,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }

    fn attach(&mut self, element: Element, below: Changes) {
        self.added.attach(element.clone(), below.added);
        self.modified.attach(element.clone(), below.modified);
        self.removed.attach(element, below.removed);
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn present(value: Option<&Value>) -> Option<&Value> {
    value.filter(|value| !value.is_null())
}

/// `value` without what is never owned. Kinds whose schema does not spell out `metadata` get [`OBJECT_META`].
pub(super) fn without_system_fields(object: &Value) -> Value {
    let mut object = object.clone();
    if let Value::Object(root) = &mut object {
        root.retain(|key, _| !SYSTEM_ROOT.contains(&key.as_str()));
        let empty = match root.get_mut("metadata") {
            Some(Value::Object(metadata)) => {
                metadata.retain(|key, _| !SYSTEM_METADATA.contains(&key.as_str()));
                metadata.is_empty()
            }
            Some(Value::Null) => true,
            _ => false,
        };
        if empty {
            root.remove("metadata");
        }
    }
    object
}

/// The granular parts of ObjectMeta, for schemas that leave `metadata` open.
static OBJECT_META: LazyLock<Schema> = LazyLock::new(|| {
    let schema = |shape| Arc::new(Schema { shape, ..Schema::default() });
    let text = || schema(Shape::String { format: String::new() });
    let list = |items, kind| schema(Shape::List { items, kind, strategic: None });
    let fields = [
        ("labels", schema(Shape::Map(text()))),
        ("annotations", schema(Shape::Map(text()))),
        ("finalizers", list(text(), ListKind::Set)),
        ("ownerReferences", list(schema(Shape::Any), ListKind::Map(vec!["uid".into()]))),
        ("generateName", text()),
    ];
    let fields = fields.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect();
    let shape = Shape::Object(ObjectShape { fields, keep_unknown: true, ..ObjectShape::default() });
    Schema { shape, ..Schema::default() }
});

impl<'a> Typed<'a> {
    pub fn new(schema: &'a Schema, types: &'a Types) -> Self {
        Typed { schema: types.resolve(schema), types }
    }

    fn at(self, schema: &'a Schema) -> Self {
        Typed { schema: self.types.resolve(schema), types: self.types }
    }

    fn view(self, value: &Value) -> View<'a> {
        match (&self.schema.shape, value) {
            (Shape::Object(shape), Value::Object(_)) if !shape.atomic => View::Struct(shape),
            (Shape::Map(values), Value::Object(_)) => View::Map(values),
            (Shape::Any, Value::Object(_)) => View::Deduced,
            (Shape::List { kind: ListKind::Set, .. }, Value::Array(_)) => View::Set,
            (Shape::List { kind: ListKind::Map(keys), items, .. }, Value::Array(_)) => View::Keyed(keys, items),
            _ => View::Leaf,
        }
    }

    /// The schema of a field, and whether the schema names it.
    fn field(self, view: &View<'a>, name: &str, root: bool) -> (Typed<'a>, bool) {
        match view {
            View::Struct(shape) => match shape.fields.get(name) {
                Some(field) => {
                    let field = self.at(field);
                    let open = match &field.schema.shape {
                        Shape::Any => true,
                        Shape::Object(shape) => shape.fields.is_empty(),
                        _ => false,
                    };
                    if root && name == "metadata" && open { (self.at(&OBJECT_META), true) } else { (field, true) }
                }
                None if root && name == "metadata" => (self.at(&OBJECT_META), true),
                None => (self.at(&ANY), false),
            },
            View::Map(values) => (self.at(values), false),
            View::Deduced if root && name == "metadata" => (self.at(&OBJECT_META), true),
            View::Leaf | View::Deduced | View::Set | View::Keyed(..) => (self.at(&ANY), false),
        }
    }

    /// What identifies an element of a keyed list; `None` if a key is missing and has no default.
    fn key_of(self, item: &Value, keys: &[String], items: &'a Schema) -> Option<Element> {
        let item_fields = match &self.types.resolve(items).shape {
            Shape::Object(shape) => Some(&shape.fields),
            _ => None,
        };
        let mut found = Map::new();
        for key in keys {
            let value = present(item.get(key)).cloned().or_else(|| {
                let field = item_fields?.get(key)?;
                field.default.clone().or_else(|| self.types.resolve(field).default.clone())
            })?;
            found.insert(key.clone(), value);
        }
        Some(Element::key(found))
    }

    /// Elements of a list by what identifies them, in order; `None` where a key is missing.
    fn elements<'v>(self, view: &View<'a>, list: &'v [Value]) -> Vec<(Option<Element>, &'v Value)> {
        list.iter()
            .map(|item| match view {
                View::Keyed(keys, items) => (self.key_of(item, keys, items), item),
                _ => (Some(Element::value(item)), item),
            })
            .collect()
    }

    fn item(self, view: &View<'a>) -> Typed<'a> {
        match view {
            View::Keyed(_, items) => self.at(items),
            _ => self.at(&ANY),
        }
    }

    // ---- which fields an applied object has -------------------------------------------------------------------

    /// The fields of what a client applied. Unknown fields, values of the wrong form and list elements that cannot be
    /// told apart are errors, one line each.
    pub fn applied_fields(self, object: &Value) -> Result<Set, Vec<String>> {
        let mut errors = Vec::new();
        let set = self.collect(object, true, &mut Vec::new(), &mut errors);
        if errors.is_empty() { Ok(set) } else { Err(errors) }
    }

    /// The fields of an object that is taken as it is.
    pub fn fields(self, object: &Value) -> Set {
        self.collect(object, true, &mut Vec::new(), &mut Vec::new())
    }

    fn collect(self, value: &Value, root: bool, path: &mut Vec<Element>, errors: &mut Vec<String>) -> Set {
        let mut set = Set::default();
        let view = self.view(value);
        match (&view, value) {
            (View::Struct(_) | View::Map(_) | View::Deduced, Value::Object(map)) => {
                for (name, below) in map {
                    let (field, named) = self.field(&view, name, root);
                    let element = Element::field(name);
                    path.push(element.clone());
                    if let View::Struct(shape) = &view
                        && !named
                        && !shape.keep_unknown
                    {
                        errors.push(format!("{}: field not declared in schema", path_text(path)));
                    }
                    field.insert(&mut set, element, below, !named, path, errors);
                    path.pop();
                }
            }
            (View::Set | View::Keyed(..), Value::Array(list)) => {
                for (element, below) in self.elements(&view, list) {
                    let Some(element) = element else {
                        errors.push(format!(
                            "{}: associative list with keys has an element that omits a key field: {below}",
                            path_text(path)
                        ));
                        continue;
                    };
                    if set.has(&element) {
                        errors.push(format!("{}: duplicate entries for key {element}", path_text(path)));
                        continue;
                    }
                    path.push(element.clone());
                    self.item(&view).insert(&mut set, element, below, true, path, errors);
                    path.pop();
                }
            }
            _ => {}
        }
        set
    }

    fn insert(
        self,
        set: &mut Set,
        element: Element,
        value: &Value,
        member: bool,
        path: &mut Vec<Element>,
        errors: &mut Vec<String>,
    ) {
        if let Some(expected) = self.mismatch(value) {
            errors.push(format!("{}: expected {expected}, got {}", path_text(path), short(value)));
        }
        let leaf = is_empty(value) || matches!(self.view(value), View::Leaf);
        if leaf || member {
            set.insert(element.clone());
        }
        if !leaf {
            set.attach(element, self.collect(value, false, path, errors));
        }
    }

    /// What the schema wants instead of `value`, if it is of another form.
    fn mismatch(self, value: &Value) -> Option<&'static str> {
        let (fits, expected) = match &self.schema.shape {
            Shape::Any | Shape::Ref(_) => (true, ""),
            Shape::Boolean => (value.is_boolean(), "boolean"),
            Shape::Integer { .. } | Shape::Number => (value.is_number(), "numeric (int or float)"),
            Shape::String { .. } => (value.is_string(), "string"),
            Shape::IntOrString | Shape::Quantity => (value.is_string() || value.is_number(), "string or number"),
            Shape::Object(_) | Shape::Map(_) => (value.is_object(), "map"),
            Shape::List { .. } => (value.is_array(), "list"),
        };
        (!fits && !value.is_null()).then_some(expected)
    }

    // ---- what changed -----------------------------------------------------------------------------------------

    /// What it takes to get from `old` to `new`. Absent and null are the same; so are lists with other order only.
    pub fn compare(self, old: &Value, new: &Value) -> Changes {
        let mut changes = self.compare_below(Some(old), Some(new), true);
        let metadata = Element::field("metadata");
        // Every object has it; it is no one's.
        for set in [&mut changes.added, &mut changes.modified, &mut changes.removed] {
            set.remove(&metadata);
        }
        changes
    }

    /// Fields of two values that are both taken apart in the same way (or of one, if the other is absent).
    fn compare_below(self, old: Option<&Value>, new: Option<&Value>, root: bool) -> Changes {
        let mut changes = Changes::default();
        let Some(shown) = new.or(old) else { return changes };
        let view = self.view(shown);
        match (&view, shown) {
            (View::Struct(_) | View::Map(_) | View::Deduced, Value::Object(_)) => {
                static NONE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
                let old = old.and_then(Value::as_object).unwrap_or(&NONE);
                let new = new.and_then(Value::as_object).unwrap_or(&NONE);
                for name in old.keys().chain(new.keys().filter(|name| !old.contains_key(*name))) {
                    let (field, _) = self.field(&view, name, root);
                    field.compare_at(Element::field(name), old.get(name), new.get(name), &mut changes);
                }
            }
            (View::Set | View::Keyed(..), Value::Array(_)) => {
                let old = old.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                let new = new.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                let mut found: BTreeMap<Element, (Vec<&Value>, Vec<&Value>)> = BTreeMap::new();
                for (element, item) in self.elements(&view, old) {
                    found.entry(element.unwrap_or(Element::Index(0))).or_default().0.push(item);
                }
                for (element, item) in self.elements(&view, new) {
                    found.entry(element.unwrap_or(Element::Index(0))).or_default().1.push(item);
                }
                for (element, (old, new)) in found {
                    match (old.as_slice(), new.as_slice()) {
                        ([] | [_], [] | [_]) => {
                            let item = self.item(&view);
                            item.compare_at(element, old.first().copied(), new.first().copied(), &mut changes);
                        }
                        (old, new) if old == new => {}
                        (_, []) => changes.removed.insert(element),
                        ([], _) => changes.added.insert(element),
                        _ => changes.modified.insert(element),
                    }
                }
            }
            _ => {}
        }
        changes
    }

    fn compare_at(self, element: Element, old: Option<&Value>, new: Option<&Value>, changes: &mut Changes) {
        let (old, new) = (present(old), present(new));
        if old == new {
            return;
        }
        let leaf = |value: &Value| is_empty(value) || matches!(self.view(value), View::Leaf);
        match (old, new) {
            (Some(old), Some(new)) => {
                let same_form = old.is_object() == new.is_object() && old.is_array() == new.is_array();
                match (leaf(old), leaf(new)) {
                    (false, false) if same_form => {
                        changes.attach(element, self.compare_below(Some(old), Some(new), false))
                    }
                    // An emptied or newly filled container: only what is in it changed.
                    (false, true) if same_form => changes.attach(element, self.compare_below(Some(old), None, false)),
                    (true, false) if same_form => changes.attach(element, self.compare_below(None, Some(new), false)),
                    (old_leaf, new_leaf) => {
                        if !old_leaf {
                            changes.attach(element.clone(), self.compare_below(Some(old), None, false));
                        }
                        if !new_leaf {
                            changes.attach(element.clone(), self.compare_below(None, Some(new), false));
                        }
                        changes.modified.insert(element);
                    }
                }
            }
            (Some(old), None) => {
                changes.removed.insert(element.clone());
                if !leaf(old) {
                    changes.attach(element, self.compare_below(Some(old), None, false));
                }
            }
            (None, Some(new)) => {
                changes.added.insert(element.clone());
                if !leaf(new) {
                    changes.attach(element, self.compare_below(None, Some(new), false));
                }
            }
            (None, None) => {}
        }
    }

    // ---- one laid over the other ------------------------------------------------------------------------------

    /// `live` with `applied` over it. Nulls remove, except where the schema allows them.
    pub fn merge(self, live: Option<&Value>, applied: &Value) -> Value {
        self.merge_at(live, applied, true)
    }

    fn merge_at(self, live: Option<&Value>, applied: &Value, root: bool) -> Value {
        let view = self.view(applied);
        match (&view, applied) {
            (View::Struct(_) | View::Map(_) | View::Deduced, Value::Object(applied)) => {
                let mut merged = live.and_then(Value::as_object).cloned().unwrap_or_default();
                for (name, value) in applied {
                    let (field, _) = self.field(&view, name, root);
                    if value.is_null() && !field.schema.nullable {
                        merged.remove(name);
                        continue;
                    }
                    let value = field.merge_at(merged.get(name), value, false);
                    merged.insert(name.clone(), value);
                }
                Value::Object(merged)
            }
            (View::Set | View::Keyed(..), Value::Array(applied)) => {
                let live = live.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                Value::Array(self.merge_lists(&view, live, applied))
            }
            _ => applied.clone(),
        }
    }

    /// The applied elements in their order; elements only in `live` stay where they were relative to shared ones.
    fn merge_lists(self, view: &View<'a>, live: &[Value], applied: &[Value]) -> Vec<Value> {
        let left = self.elements(view, live);
        let right = self.elements(view, applied);
        let mut first_left: BTreeMap<&Element, &Value> = BTreeMap::new();
        for (element, item) in &left {
            if let Some(element) = element {
                first_left.entry(element).or_insert(item);
            }
        }
        let in_right: BTreeMap<&Element, ()> =
            right.iter().filter_map(|(element, _)| element.as_ref().map(|element| (element, ()))).collect();
        let shared: Vec<&Element> = right
            .iter()
            .filter_map(|(element, _)| element.as_ref())
            .filter(|element| first_left.contains_key(*element))
            .collect();
        let mut merged = Vec::with_capacity(left.len() + right.len());
        let (mut at, mut next_shared) = (0, 0);
        for (element, item) in &right {
            while let Some((candidate, kept)) = left.get(at) {
                match candidate {
                    Some(candidate) if in_right.contains_key(candidate) => {
                        if shared.get(next_shared) == Some(&candidate) {
                            break;
                        }
                    }
                    _ => merged.push((*kept).clone()),
                }
                at += 1;
            }
            let old = element.as_ref().and_then(|element| first_left.get(element)).copied();
            merged.push(self.item(view).merge_at(old, item, false));
            if old.is_some() {
                next_shared += 1;
                if left.get(at).is_some_and(|(candidate, _)| candidate == element) {
                    at += 1;
                }
            }
        }
        let rest = left.get(at..).unwrap_or_default();
        merged.extend(
            rest.iter()
                .filter(|(element, _)| element.as_ref().is_none_or(|element| !in_right.contains_key(element)))
                .map(|(_, item)| (*item).clone()),
        );
        merged
    }

    // ---- fields taken out again -------------------------------------------------------------------------------

    /// Takes out of `value` what `last` lists and `managed` (everyone's sets now) does not.
    pub fn prune(self, value: &mut Value, last: &Set, managed: &Set) {
        self.prune_at(value, last, managed, true);
    }

    fn prune_at(self, value: &mut Value, last: &Set, managed: &Set, root: bool) {
        static NOTHING: LazyLock<Set> = LazyLock::new(Set::default);
        let view = self.view(value);
        // A named field is in a set already when something below it is; anything else only by itself.
        let inside =
            |set: &Set, element: &Element, named: bool| set.has(element) || (named && set.child(element).is_some());
        match value {
            Value::Object(map) if !matches!(view, View::Leaf) => {
                map.retain(|name, below| {
                    let (field, named) = self.field(&view, name, root);
                    let element = Element::field(name);
                    if inside(last, &element, named) && !inside(managed, &element, named) {
                        return false;
                    }
                    if let Some(last) = last.child(&element) {
                        field.prune_at(below, last, managed.child(&element).unwrap_or(&NOTHING), false);
                    }
                    true
                });
            }
            Value::Array(list) if !matches!(view, View::Leaf) => {
                list.retain_mut(|item| {
                    let element = match &view {
                        View::Keyed(keys, items) => self.key_of(item, keys, items),
                        _ => Some(Element::value(item)),
                    };
                    let Some(element) = element else { return true };
                    if last.has(&element) && !managed.has(&element) {
                        return false;
                    }
                    if let Some(last) = last.child(&element) {
                        self.item(&view).prune_at(item, last, managed.child(&element).unwrap_or(&NOTHING), false);
                    }
                    true
                });
            }
            _ => {}
        }
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
