//! The verbs over any kind: what a kind is comes from its table entry, what is special about it from `admission`.
//!
//! The way of a write: identity and metadata, defaults, admission, validation, field ownership, one store transaction.
//! An update reads, makes the new object and writes it if the old one is still there; if not it begins again.

mod create;
mod delete;
mod list;
mod meta;
pub mod scale;
mod schema;
pub mod storage;
mod update;

pub use delete::{Deleted, Wanted};
pub use list::{ListAnswer, ListRequest, VersionMatch};
pub use schema::FieldValidation;

use crate::core::{Core, Target};
use api::object::Object;
use api::status::{Cause, StatusResult};

/// What a write may be told beside the object.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    pub dry_run: bool,
    /// Field manager, resolved; empty = ownership is not tracked.
    pub manager: String,
    /// Path after the name: ``, `status`, `scale`, `finalize`.
    pub subresource: String,
    /// What is done about fields that the kind does not have.
    pub validation: FieldValidation,
    /// Paths of fields that stood twice in the request's body.
    pub duplicates: Vec<String>,
}

/// What a write did.
#[derive(Clone, Debug)]
pub struct Written {
    pub object: Object,
    pub created: bool,
    pub warnings: Vec<String>,
}

/// Conditions a write or delete depends on.
#[derive(Clone, Debug, Default)]
pub struct Preconditions {
    pub uid: Option<String>,
    pub resource_version: Option<String>,
}

impl Preconditions {
    pub fn check(&self, target: &Target, live: &Object) -> StatusResult<()> {
        use api::object::Meta;
        if let Some(uid) = self.uid.as_deref().filter(|uid| *uid != live.uid()) {
            let why = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", live.uid());
            return Err(target.conflict(&why));
        }
        if let Some(version) = self.resource_version.as_deref().filter(|v| *v != live.resource_version()) {
            let why = format!(
                "Precondition failed: ResourceVersion in precondition: {version}, ResourceVersion in object meta: {}",
                live.resource_version()
            );
            return Err(target.conflict(&why));
        }
        Ok(())
    }
}

/// How often a write begins again because someone else was faster, before it gives up.
const ATTEMPTS: usize = 64;

pub(crate) fn cause(reason: &str, field: &str, message: impl Into<String>) -> Cause {
    Cause { reason: reason.into(), field: field.into(), message: message.into() }
}

impl Core {
    /// Whether the kind is that of a CustomResourceDefinition.
    pub(crate) fn is_custom(&self, kind: &api::kind::Kind) -> bool {
        kind.resource.group.contains('.') && self.kinds.current().is_custom(kind)
    }

    pub async fn get(&self, target: &Target) -> StatusResult<Object> {
        let (mut object, _) = self.storage.must_get(&target.kind, &target.namespace, &target.name).await?;
        schema::default_on_read(&target.kind, &mut object, self.is_custom(&target.kind));
        Ok(object)
    }
}
