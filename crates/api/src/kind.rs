//! What a kind is: one table entry. The server knows no kind by name; everything it does is read from here.

use crate::object::Object;
use crate::schema::{Schema, Types};
use crate::status::Cause;
use serde_json::Value;
use std::sync::Arc;

/// Group, version and plural: the address of a resource, `apps/v1/deployments`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Resource {
    pub group: Arc<str>,
    pub version: Arc<str>,
    pub plural: Arc<str>,
}

impl Resource {
    pub fn new(group: &str, version: &str, plural: &str) -> Self {
        Resource { group: group.into(), version: version.into(), plural: plural.into() }
    }
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_string() } else { format!("{}/{}", self.group, self.version) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Cluster,
    Namespaced,
}

/// Which subresources the generic machinery serves for a kind.
#[derive(Clone, Debug, Default)]
pub struct Subresources {
    pub status: bool,
    /// JSON pointers (`/spec/replicas`, `/status/replicas`, `/status/selector` or `/spec/selector`).
    pub scale: Option<ScalePaths>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScalePaths {
    pub spec_replicas: String,
    pub status_replicas: String,
    /// Where a label selector (object or string) stands.
    pub selector: String,
}

/// A printed column of `kubectl get`.
#[derive(Clone)]
pub struct Column {
    pub name: String,
    /// `string`, `integer`, `date`, `boolean`, `number`.
    pub kind: String,
    pub format: String,
    pub description: String,
    /// 0 = always shown, above = only with `-o wide`.
    pub priority: i32,
    pub cell: Cell,
}

#[derive(Clone)]
pub enum Cell {
    /// Computed in code; `now` is unix seconds, for ages.
    Code(fn(&Object, now: i64) -> Value),
    /// A CRD's simple JSON path, `.spec.replicas`.
    Path(String),
}

/// What is wrong with `new`; `old` is what it replaces, absent on create.
pub type Validate = fn(new: &Object, old: Option<&Object>) -> Vec<Cause>;

/// Kind-specific work that schemas cannot express. All optional; pure functions.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Fills defaults that depend on other fields. Runs after schema defaults, on create and update and when read.
    pub default: Option<fn(&mut Object)>,
    /// Called on create only, before `default`: what the server itself decides (a Pod's initial `status.phase`, ...).
    pub prepare_create: Option<fn(&mut Object)>,
    /// Semantic checks on create (`old` = None) and update.
    pub validate: Option<Validate>,
    /// Warnings shown by clients (deprecated fields and the like).
    pub warnings: Option<fn(new: &Object) -> Vec<String>>,
}

/// One kind in one version.
#[derive(Clone)]
pub struct Kind {
    pub resource: Resource,
    pub kind: String,
    pub list_kind: String,
    pub singular: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub scope: Scope,
    pub subresources: Subresources,
    pub schema: Arc<Schema>,
    /// The OpenAPI definition name, `io.k8s.api.core.v1.Pod`.
    pub type_name: String,
    pub types: Arc<Types>,
    pub columns: Vec<Column>,
    pub hooks: Hooks,
    /// `metadata.generation` goes up when anything but metadata and status changes.
    pub counts_generation: bool,
    /// Other versions served of the same stored objects (CRDs); objects are stored as this version.
    pub storage_version: String,
}
