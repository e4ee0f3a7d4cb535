//! Where the machinery meets what a kind's table entry says: strict decoding, defaults, validation.

use super::WriteOptions;
use crate::admission::keeps_status;
use crate::core::Target;
use api::kind::Kind;
use api::object::Object;
use api::schema::strict;
use api::status::{Cause, Status, StatusResult};

/// What is done about fields that a kind does not have, or that stand twice in a body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    #[default]
    Ignore,
    Warn,
    Strict,
}

/// Holds `object` against the kind's schema: wrong types are refused, unknown fields refused, warned of or just dropped.
/// The answer is the warnings.
pub fn settle(target: &Target, object: &mut Object, options: &WriteOptions, custom: bool) -> StatusResult<Vec<String>> {
    let kind = &target.kind;
    let report = strict::check(&kind.schema, &kind.types, object);
    if !report.type_errors.is_empty() {
        if custom {
            return Err(target.invalid(report.type_errors));
        }
        let list: Vec<String> = report.type_errors.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        return Err(cannot_be_handled(kind, &list.join(", "), report.type_errors));
    }
    let mut warnings = Vec::new();
    match options.validation {
        FieldValidation::Ignore => {}
        FieldValidation::Warn => {
            warnings.extend(options.duplicates.iter().map(|path| format!("duplicate field \"{path}\"")));
            warnings.extend(report.warnings());
        }
        FieldValidation::Strict => {
            if let Some(text) = report.strict_error(&options.duplicates) {
                return Err(cannot_be_handled(kind, &text, Vec::new()));
            }
        }
    }
    strict::prune(&kind.schema, &kind.types, object);
    Ok(warnings)
}

fn cannot_be_handled(kind: &Kind, why: &str, causes: Vec<Cause>) -> Status {
    let (name, version) = (&kind.kind, &kind.resource.version);
    let mut status =
        Status::bad_request(format!("{name} in version \"{version}\" cannot be handled as a {name}: {why}"));
    status.causes = causes;
    status
}

/// What the server decides about a new object, and not the client.
pub fn prepare_create(kind: &Kind, object: &mut Object) {
    if kind.subresources.status
        && !keeps_status(kind)
        && let Some(fields) = object.as_object_mut()
    {
        fields.remove("status");
    }
    if let Some(hook) = kind.hooks.prepare_create {
        hook(object);
    }
}

pub fn apply_defaults(kind: &Kind, object: &mut Object) {
    strict::apply_defaults(&kind.schema, &kind.types, object);
    if let Some(hook) = kind.hooks.default {
        hook(object);
    }
}

/// Defaults for what was stored before the schema had them. Only the schemas of custom kinds change.
pub fn default_on_read(kind: &Kind, object: &mut Object, custom: bool) {
    if custom {
        strict::apply_defaults(&kind.schema, &kind.types, object);
    }
}

pub fn validate(kind: &Kind, new: &Object, old: Option<&Object>) -> Vec<Cause> {
    let mut causes = strict::validate_values(&kind.schema, &kind.types, new);
    if let Some(hook) = kind.hooks.validate {
        causes.extend(hook(new, old));
    }
    causes
}

pub fn warnings(kind: &Kind, new: &Object) -> Vec<String> {
    kind.hooks.warnings.map(|hook| hook(new)).unwrap_or_default()
}
