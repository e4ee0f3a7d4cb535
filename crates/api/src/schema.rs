//! Structural schemas: what is known of every field of every kind. One form serves strict decoding, defaulting,
//! server-side apply, strategic merge, OpenAPI documents and `kubectl explain`; built-in kinds and
//! CustomResourceDefinitions are turned into it.

pub mod builtin;
mod defaults;
mod lists;
mod notation;
mod path;
pub mod strict;
mod values;

use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// The schema of one value.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    pub description: String,
    pub shape: Shape,
    pub default: Option<Value>,
    pub nullable: bool,
    /// Allowed values; empty = any.
    pub one_of: Vec<Value>,
    pub checks: Checks,
}

#[derive(Clone, Debug, Default)]
pub enum Shape {
    /// Anything at all, kept as it is (`x-kubernetes-preserve-unknown-fields`, RawExtension, JSON).
    #[default]
    Any,
    Boolean,
    Integer {
        /// `int32`, `int64` or empty.
        format: String,
    },
    Number,
    String {
        /// `date-time`, `byte`, ... or empty.
        format: String,
    },
    IntOrString,
    /// A resource quantity: string or number on the wire.
    Quantity,
    Object(ObjectShape),
    /// Free keys, values of one schema.
    Map(Arc<Schema>),
    List {
        items: Arc<Schema>,
        kind: ListKind,
        /// Strategic merge patch: merge elements (by key if there is one) instead of replacing the list.
        strategic: Option<Strategic>,
    },
    /// A named type in [`Types`], `io.k8s.api.core.v1.PodSpec`.
    Ref(Arc<str>),
}

#[derive(Clone, Debug, Default)]
pub struct ObjectShape {
    pub fields: BTreeMap<String, Arc<Schema>>,
    pub required: Vec<String>,
    /// `x-kubernetes-preserve-unknown-fields` beside named fields.
    pub keep_unknown: bool,
    /// What fields that are not named hold, when they are kept; absent = anything.
    pub values: Option<Arc<Schema>>,
    /// `x-kubernetes-map-type: atomic`: owned and replaced as a whole by server-side apply.
    pub atomic: bool,
    /// `x-kubernetes-embedded-resource`.
    pub embedded: bool,
    /// Strategic merge patch strategy `retainKeys` (Deployment strategy, pod volumes).
    pub retain_keys: bool,
}

impl ObjectShape {
    /// A map that is owned and replaced as a whole (`x-kubernetes-map-type: atomic` on free keys).
    pub fn atomic_map(values: Arc<Schema>) -> Self {
        ObjectShape { keep_unknown: true, values: Some(values), atomic: true, ..Default::default() }
    }
}

/// `x-kubernetes-list-type`: how server-side apply merges and owns a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListKind {
    Atomic,
    Set,
    /// Elements are objects identified by the values of these fields.
    Map(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strategic {
    /// Merge key of object elements; `None` for a list of scalars merged as a set.
    pub key: Option<String>,
}

/// Value checks of CRD schemas (OpenAPI v3 subset that structural schemas allow).
#[derive(Clone, Debug, Default)]
pub struct Checks {
    pub minimum: Option<f64>,
    pub maximum: Option<f64>,
    pub exclusive_minimum: bool,
    pub exclusive_maximum: bool,
    pub min_length: Option<u64>,
    pub max_length: Option<u64>,
    pub pattern: Option<String>,
    pub min_items: Option<u64>,
    pub max_items: Option<u64>,
    pub min_properties: Option<u64>,
    pub max_properties: Option<u64>,
    pub unique_items: bool,
    pub multiple_of: Option<f64>,
    /// `allOf`/`anyOf`/`oneOf`/`not` value validations, kept as JSON and checked by `validate`.
    pub logic: Option<Value>,
}

/// Named types that [`Shape::Ref`] points at.
#[derive(Clone, Debug, Default)]
pub struct Types {
    pub by_name: HashMap<Arc<str>, Arc<Schema>>,
}

impl Types {
    /// Follows references until a shape that is not one; an unknown name reads as `Any`.
    pub fn resolve<'a>(&'a self, schema: &'a Schema) -> &'a Schema {
        let mut at = schema;
        for _ in 0..16 {
            match &at.shape {
                Shape::Ref(name) => match self.by_name.get(name) {
                    Some(next) => at = next,
                    None => break,
                },
                _ => return at,
            }
        }
        static ANY: std::sync::LazyLock<Schema> = std::sync::LazyLock::new(Schema::default);
        &ANY
    }
}
