//! Who belongs to whom: an owner takes over objects that its selector matches and nobody controls, and lets go of those
//! that it controls but its selector no longer matches.

use crate::context::Context;
use crate::objects::is_controlled_by;
use crate::runner::is_race;
use api::client::Patch;
use api::kind::Resource;
use api::object::{Meta, SharedObject};
use api::selector::Selector;
use api::status::{Found, StatusResult};
use serde_json::{Value, json};

pub(crate) struct Claim<'a> {
    pub owner_resource: &'a Resource,
    pub owner: &'a SharedObject,
    /// The reference that adopted objects get.
    pub reference: Value,
    pub selector: &'a Selector,
    /// What is claimed.
    pub resource: &'a Resource,
}

impl Claim<'_> {
    /// Those of `all` that belong to the owner now. An owner on its way out adopts nothing.
    pub async fn of(&self, context: &Context, all: Vec<SharedObject>) -> StatusResult<Vec<SharedObject>> {
        let mut owned = Vec::new();
        let mut may_adopt: Option<bool> = None;
        for object in all {
            let matches = self.selector.matches_object(&object);
            if is_controlled_by(&object, self.owner.uid()) {
                if matches || self.owner.is_deleting() {
                    owned.push(object);
                } else {
                    self.release(context, &object).await?;
                }
                continue;
            }
            let orphan = object.controller_ref().is_none() && !object.is_deleting();
            if !matches || !orphan || self.owner.is_deleting() {
                continue;
            }
            let allowed = match may_adopt {
                Some(allowed) => allowed,
                None => *may_adopt.insert(self.is_still_there(context).await?),
            };
            if allowed && let Some(adopted) = self.adopt(context, &object).await? {
                owned.push(adopted);
            }
        }
        Ok(owned)
    }

    async fn is_still_there(&self, context: &Context) -> StatusResult<bool> {
        let live = context.client.get(self.owner_resource, self.owner.namespace(), self.owner.name()).await.found()?;
        Ok(live.is_some_and(|live| live.uid() == self.owner.uid() && !live.is_deleting()))
    }

    async fn adopt(&self, context: &Context, object: &SharedObject) -> StatusResult<Option<SharedObject>> {
        let mut owners = object.pointer("/metadata/ownerReferences").cloned().unwrap_or_else(|| json!([]));
        if let Value::Array(list) = &mut owners {
            list.retain(|owner| owner.str_at("/uid") != self.owner.uid());
            list.push(self.reference.clone());
        }
        self.set_owners(context, object, owners).await
    }

    async fn release(&self, context: &Context, object: &SharedObject) -> StatusResult<()> {
        let mut owners = object.pointer("/metadata/ownerReferences").cloned().unwrap_or_else(|| json!([]));
        if let Value::Array(list) = &mut owners {
            list.retain(|owner| owner.str_at("/uid") != self.owner.uid());
        }
        self.set_owners(context, object, owners).await.map(drop)
    }

    /// `None` when the object has changed or gone meanwhile: its event brings the owner back.
    async fn set_owners(
        &self,
        context: &Context,
        object: &SharedObject,
        owners: Value,
    ) -> StatusResult<Option<SharedObject>> {
        let patch = json!({"metadata": {"uid": object.uid(), "resourceVersion": object.resource_version(),
                                        "ownerReferences": owners}});
        let patch = Patch::Merge(patch);
        match context.client.patch(self.resource, object.namespace(), object.name(), "", patch).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if is_race(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
