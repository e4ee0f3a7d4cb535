//! The four forms of PATCH, and who owns which field. Pure functions over JSON values and a [`Schema`]; nothing here
//! reads or writes the store, fills defaults or validates: the caller does that with what comes back.
//!
//! ```text
//! application/json-patch+json             json_patch(&live, &body)?                     RFC 6902
//! application/merge-patch+json            merge_patch(&live, &body)                     RFC 7386
//! application/strategic-merge-patch+json  strategic(&live, &body, schema, types)?       built-in kinds only
//! application/apply-patch+yaml            apply(Some(&live), &body, &writer, force, schema, types)?
//! ```
//!
//! Field ownership (`metadata.managedFields`):
//! - create, update and the first three patches: after defaulting and before the write, call
//!   [`track_update`]`(live, &mut new, &writer, schema, types)`. On create `live` is `None`. It takes
//!   `metadata.managedFields` from the request where that is allowed (a client may rewrite or reset it), otherwise from
//!   `live`, so the caller need not copy it.
//! - server-side apply: [`apply`] returns the merged object with its `managedFields` set; run defaults, validation and
//!   the write on it and do *not* call [`track_update`]. If nothing changed the result equals `live`, times included,
//!   so that "equal to live, so not written" keeps the resource version. With `live` = `None` it makes the object.
//!   When the main resource of a kind with a status subresource is applied, drop `status` from the body first
//!   ([`keep_part`] does it); through `/status` keep only `status`.
//! - [`manager_name`] gives the manager of a request from `?fieldManager=` and `User-Agent`.
//!
//! All errors are ready to be sent: 400 for a malformed patch, 422 for one that does not fit the object, 409 for apply
//! conflicts (`FieldManagerConflict` causes), 413 for too many operations.

mod fields;
mod json;
mod managed;
mod merge;
#[cfg(test)]
mod samples;
mod strategic;
mod typed;

pub use fields::{Element, FieldsError, Set};
pub use json::{MAX_OPERATIONS, json_patch};
pub use managed::{Writer, apply, keep_part, manager_name, track_update};
pub use merge::merge_patch;
pub use strategic::strategic;

// The signatures, in one place:
//
// pub fn json_patch(doc: &Value, operations: &Value) -> StatusResult<Value>
// pub fn merge_patch(doc: &Value, patch: &Value) -> Value
// pub fn strategic(doc: &Value, patch: &Value, schema: &Schema, types: &Types) -> StatusResult<Value>
//
// pub struct Writer<'a> {
//     pub manager: &'a str,      // `kubectl-client-side-apply`, see manager_name
//     pub api_version: &'a str,  // version of the request, `apps/v1`
//     pub subresource: &'a str,  // "", "status", "scale", ...
//     pub time: &'a str,         // now, RFC 3339 in UTC with whole seconds, `2024-01-01T00:00:00Z`
// }
// pub fn track_update(live: Option<&Object>, new: &mut Object, writer: &Writer, schema: &Schema, types: &Types)
// pub fn apply(live: Option<&Object>, applied: &Object, writer: &Writer, force: bool, schema: &Schema, types: &Types)
//     -> StatusResult<Object>
// pub fn keep_part(applied: &mut Object, subresource: &str, has_status: bool)
// pub fn manager_name(field_manager: Option<&str>, user_agent: Option<&str>) -> StatusResult<String>
