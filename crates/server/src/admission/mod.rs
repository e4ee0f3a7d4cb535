//! What is special about single kinds. The machinery in `rest` knows none by name; here are the few tables and functions
//! that do: what is filled in or refused when an object is written, what else is written with it, and what is given back
//! when it goes.

pub mod crds;
mod families;
mod fields;
pub mod namespaces;
pub mod pods;
mod services;
pub mod subresources;
pub mod tokens;

pub use fields::selectable;

use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::rest::storage;
use api::kind::Kind;
use api::object::Object;
use api::status::StatusResult;
use std::time::Duration;
use store::{Compare, Op};

/// What is being done to the object that [`Core::admit`] is given.
#[derive(Clone, Copy)]
pub enum Operation<'a> {
    Create,
    Update { live: &'a Object, subresource: &'a str },
    Delete,
}

/// What goes into the same transaction, and what the client is told.
#[derive(Default)]
pub struct Effects {
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
    pub warnings: Vec<String>,
}

impl Effects {
    /// Whether nothing else is written.
    pub fn is_empty(&self) -> bool {
        self.then.is_empty()
    }
}

impl Core {
    /// Completes `object` and refuses what may not be. Run again for every attempt of a write.
    pub async fn admit(
        &self,
        permit: &Permit,
        target: &Target,
        operation: Operation<'_>,
        object: &mut Object,
    ) -> StatusResult<Effects> {
        let resource = &target.kind.resource;
        match (&*resource.group, &*resource.plural) {
            ("", "pods") => pods::admit(self, target, operation, object).await,
            ("", "services") => services::admit(self, target, operation, object).await,
            ("", "namespaces") => namespaces::admit(self, permit, target, operation, object),
            ("apiextensions.k8s.io", "customresourcedefinitions") => crds::admit(self, target, operation, object),
            _ => Ok(Effects::default()),
        }
    }

    /// What goes when `live` is removed.
    pub fn release(&self, target: &Target, live: &Object) -> Effects {
        if target.is("", "services") { services::release(live) } else { Effects::default() }
    }

    /// Seconds between the request to delete and the removal.
    pub fn grace_period(&self, target: &Target, live: &Object, asked: Option<i64>) -> i64 {
        if target.is("", "pods") { pods::grace_period(live, asked) } else { 0 }
    }

    /// Whether an object that is being deleted has something to wait for beside its finalizers.
    pub fn waits(&self, target: &Target, object: &Object) -> bool {
        target.is("", "namespaces") && namespaces::has_finalizers(object)
    }
}

/// Kinds whose objects expire by themselves.
pub fn time_to_live(kind: &Kind) -> Option<Duration> {
    let is_event = *kind.resource.plural == *"events" && matches!(&*kind.resource.group, "" | "events.k8s.io");
    is_event.then_some(Duration::from_secs(3600))
}

/// Kinds whose removal is answered with the object as it was; all others with a `Status`.
pub fn returns_deleted(kind: &Kind) -> bool {
    kind.resource.group.is_empty() && matches!(&*kind.resource.plural, "pods" | "services" | "serviceaccounts")
}

/// Kinds that bring their status with them on creation: whoever makes them is what they describe.
pub fn keeps_status(kind: &Kind) -> bool {
    kind.resource.group.is_empty() && *kind.resource.plural == *"nodes"
}

/// The object of a cluster-scoped or namespaced resource that admission depends on.
async fn lookup(core: &Core, group: &str, plural: &str, namespace: &str, name: &str) -> StatusResult<Option<Object>> {
    let kinds = core.kinds.current();
    let Some(kind) = kinds.any_version(group, plural) else { return Ok(None) };
    Ok(core.storage.get(kind, namespace, name).await?.map(|(object, _)| object))
}

/// The write of an object of another kind beside the one asked for; nothing if it is there.
fn also(core: &Core, group: &str, plural: &str, object: Object, effects: &mut Effects) -> StatusResult<()> {
    use api::object::Meta;
    let kinds = core.kinds.current();
    let Some(kind) = kinds.any_version(group, plural) else { return Ok(()) };
    let key = storage::key(kind, object.namespace(), object.name());
    effects.then.push(storage::put(key, storage::encode(kind, &object)?));
    Ok(())
}
