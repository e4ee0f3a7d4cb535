//! CustomResourceDefinitions: what is refused when they are written, the finalizer that lets their objects go first, and
//! the conditions that say whether they are served.

use super::{Effects, Operation};
use crate::core::{Core, Target};
use api::object::{Meta, Object};
use api::status::StatusResult;

/// Removed once no object of the kind is left.
pub const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

pub fn admit(_: &Core, _: &Target, operation: Operation<'_>, object: &mut Object) -> StatusResult<Effects> {
    if let Operation::Create = operation {
        let mut finalizers: Vec<String> = object.finalizers().into_iter().map(str::to_owned).collect();
        if !finalizers.iter().any(|f| f == FINALIZER) {
            finalizers.push(FINALIZER.to_owned());
        }
        object.metadata_mut().insert("finalizers".into(), finalizers.into());
    }
    Ok(Effects::default())
}
