//! Changing objects: replace, patch and server-side apply, of the object or of one of its subresources.

use super::create::{refuse, track};
use super::{ATTEMPTS, Preconditions, WriteOptions, Written, meta, scale, schema, storage};
use crate::admission::{Effects, Operation};
use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::patch;
use api::client::Patch;
use api::object::{Meta, Object};
use api::status::{Reason, Status, StatusResult};
use serde_json::Value;
use store::{Compare, Op, Txn};

/// What a change made of the live object.
enum Proposal {
    /// Ownership still has to be noted.
    New(Object),
    /// Server-side apply has noted it.
    Applied(Object),
}

impl Core {
    /// Replaces the object (or the part of it that `options.subresource` names).
    pub async fn update(
        &self,
        permit: &Permit,
        target: &Target,
        object: Object,
        options: &WriteOptions,
    ) -> StatusResult<Written> {
        let mut object = object;
        if options.subresource == "scale" {
            let change = |live: &Object| scale::replace(target, live, &object).map(Proposal::New);
            return self.change(permit, target, options, &Preconditions::default(), change).await;
        }
        meta::identify(target, &mut object)?;
        let change = |_: &Object| Ok(Proposal::New(object.clone()));
        self.change(permit, target, options, &Preconditions::default(), change).await
    }

    /// Patches the object. An apply patch makes it if it is not there.
    pub async fn patch(
        &self,
        permit: &Permit,
        target: &Target,
        patch: &Patch,
        options: &WriteOptions,
    ) -> StatusResult<Written> {
        let change = |live: &Object| propose(target, live, patch, options);
        let Patch::Apply { object, .. } = patch else {
            return self.change(permit, target, options, &Preconditions::default(), change).await;
        };
        check_applied(target, object)?;
        for _ in 0..ATTEMPTS {
            match self.change(permit, target, options, &Preconditions::default(), change).await {
                Err(status) if status.reason == Reason::NotFound && options.subresource.is_empty() => {}
                other => return other,
            }
            match self.create_applied(permit, target, patch, options).await {
                Err(status) if status.reason == Reason::AlreadyExists => {}
                other => return other,
            }
        }
        Err(target.conflict(storage::MODIFIED))
    }

    async fn create_applied(
        &self,
        permit: &Permit,
        target: &Target,
        patch: &Patch,
        options: &WriteOptions,
    ) -> StatusResult<Written> {
        let Patch::Apply { object, manager, force } = patch else { return Err(target.not_found()) };
        if !object.uid().is_empty() {
            let why = format!(
                "uid mismatch: the provided object specified uid {}, and no existing object was found",
                object.uid()
            );
            return Err(target.conflict(&why));
        }
        let made = applied(target, None, object, manager, *force, options)?;
        let untracked = WriteOptions { manager: String::new(), ..options.clone() };
        self.create(permit, target, made, &untracked).await
    }

    /// Writes what `make` makes of the live object.
    pub(crate) async fn modify<F>(
        &self,
        permit: &Permit,
        target: &Target,
        options: &WriteOptions,
        preconditions: &Preconditions,
        make: F,
    ) -> StatusResult<Written>
    where
        F: Fn(&Object) -> StatusResult<Object>,
    {
        self.change(permit, target, options, preconditions, |live| make(live).map(Proposal::New)).await
    }

    async fn change<F>(
        &self,
        permit: &Permit,
        target: &Target,
        options: &WriteOptions,
        preconditions: &Preconditions,
        propose: F,
    ) -> StatusResult<Written>
    where
        F: Fn(&Object) -> StatusResult<Proposal>,
    {
        let kind = &target.kind;
        let key = storage::key(kind, &target.namespace, &target.name);
        let custom = self.is_custom(kind);
        for attempt in 0..ATTEMPTS {
            let Some(kv) = self.storage.get_kv(key.clone()).await? else { return Err(target.not_found()) };
            let mut live = storage::decode_kv(kind, &kv)?;
            schema::default_on_read(kind, &mut live, custom);
            preconditions.check(target, &live)?;
            let (mut new, mut effects) = self.complete(permit, target, &live, propose(&live)?, options).await?;
            let warnings = std::mem::take(&mut effects.warnings);
            if meta::same(&live, &new) && effects.is_empty() {
                return Ok(Written { object: live, created: false, warnings });
            }
            let value = storage::encode(kind, &new)?;
            if options.dry_run {
                return Ok(Written { object: new, created: false, warnings });
            }
            let removed = super::delete::is_finished(&new) && !self.waits(target, &new);
            let mut compare = vec![Compare::ModRevision(key.clone(), kv.mod_revision)];
            compare.append(&mut effects.compare);
            let mut then = if removed {
                let mut then = vec![Op::Delete(store::KeyRange::one(key.clone()))];
                then.extend(self.release(target, &live).then);
                then
            } else {
                let lease = self.lease_for(kind).await?;
                vec![Op::Put { key: key.clone(), value, lease }]
            };
            then.append(&mut effects.then);
            let answer = self.storage.txn(Txn { compare, then, otherwise: vec![] }).await?;
            if answer.succeeded {
                new.metadata_mut().insert("resourceVersion".into(), answer.revision.to_string().into());
                self.written(target, &new, removed);
                return Ok(Written { object: new, created: false, warnings });
            }
            if attempt > 4 {
                tokio::task::yield_now().await;
            }
        }
        Err(target.conflict(storage::MODIFIED))
    }

    /// Makes a proposal fit to be written: what it may not change as it was, defaults, admission, validation, ownership.
    async fn complete(
        &self,
        permit: &Permit,
        target: &Target,
        live: &Object,
        proposal: Proposal,
        options: &WriteOptions,
    ) -> StatusResult<(Object, Effects)> {
        let kind = &target.kind;
        let (mut new, tracked) = match proposal {
            Proposal::New(new) => (new, false),
            Proposal::Applied(new) => (new, true),
        };
        meta::identify(target, &mut new)?;
        meta::carry(target, live, &mut new)?;
        let told = schema::settle(target, &mut new, options, self.is_custom(kind))?;
        self.settle_parts(target, live, &mut new, options);
        schema::apply_defaults(kind, &mut new);
        let operation = Operation::Update { live, subresource: &options.subresource };
        let mut effects = self.admit(permit, target, operation, &mut new).await?;
        let mut causes = meta::validate(target, &new, Some(live));
        // What a binding changes, an update may not.
        if options.subresource != "binding" {
            causes.extend(schema::validate(kind, &new, Some(live)));
        }
        refuse(target, causes)?;
        if kind.counts_generation && meta::spec_differs(live, &new) {
            let next = live.generation() + 1;
            new.metadata_mut().insert("generation".into(), next.into());
        }
        if !tracked {
            track(target, Some(live), &mut new, options);
        }
        effects.warnings.extend(told);
        effects.warnings.extend(schema::warnings(kind, &new));
        Ok((new, effects))
    }

    /// Which part of the object this request may change; the rest stays as it is in `live`.
    fn settle_parts(&self, target: &Target, live: &Object, new: &mut Object, options: &WriteOptions) {
        let copy = |from: &Object, to: &mut Object, field: &str| {
            let Some(fields) = to.as_object_mut() else { return };
            match from.get(field) {
                Some(value) => drop(fields.insert(field.into(), value.clone())),
                None => drop(fields.remove(field)),
            }
        };
        match options.subresource.as_str() {
            "" if target.kind.subresources.status => copy(live, new, "status"),
            "status" => {
                let mut result = live.clone();
                copy(new, &mut result, "status");
                // Which fields someone applied through /status is part of the request.
                match new.metadata_mut().remove("managedFields") {
                    Some(managed) => drop(result.metadata_mut().insert("managedFields".into(), managed)),
                    None => drop(result.metadata_mut().remove("managedFields")),
                }
                *new = result;
            }
            "finalize" => {
                let mut result = live.clone();
                let finalizers = new.pointer("/spec/finalizers").cloned();
                if let Some(spec) = result.get_mut("spec").and_then(Value::as_object_mut) {
                    match finalizers {
                        Some(list) => drop(spec.insert("finalizers".into(), list)),
                        None => drop(spec.remove("finalizers")),
                    }
                }
                *new = result;
            }
            _ => {}
        }
    }
}

fn propose(target: &Target, live: &Object, patch: &Patch, options: &WriteOptions) -> StatusResult<Proposal> {
    let kind = &target.kind;
    if options.subresource == "scale" {
        return propose_scale(target, live, patch, options);
    }
    let new = match patch {
        Patch::Merge(body) => patch::merge_patch(live, body),
        Patch::Json(body) => patch::json_patch(live, body)?,
        Patch::Strategic(body) => patch::strategic(live, body, &kind.schema, &kind.types)?,
        Patch::Apply { object, manager, force } => {
            return applied(target, Some(live), object, manager, *force, options).map(Proposal::Applied);
        }
    };
    if !new.is_object() {
        return Err(Status::bad_request("the patch makes the object something else than a JSON object"));
    }
    Ok(Proposal::New(new))
}

fn propose_scale(target: &Target, live: &Object, patch: &Patch, options: &WriteOptions) -> StatusResult<Proposal> {
    let shown = scale::show(target, live)?;
    let new = match patch {
        Patch::Merge(body) | Patch::Strategic(body) => patch::merge_patch(&shown, body),
        Patch::Json(body) => patch::json_patch(&shown, body)?,
        Patch::Apply { object, manager, force } => {
            let Some(replicas) = object.pointer("/spec/replicas").cloned() else {
                return Err(Status::bad_request("spec.replicas: Required value"));
            };
            let body = scale::applied_body(target, live, replicas)?;
            return applied(target, Some(live), &body, manager, *force, options).map(Proposal::Applied);
        }
    };
    scale::replace(target, live, &new).map(Proposal::New)
}

fn applied(
    target: &Target,
    live: Option<&Object>,
    object: &Object,
    manager: &str,
    force: bool,
    options: &WriteOptions,
) -> StatusResult<Object> {
    let kind = &target.kind;
    let mut body = object.clone();
    patch::keep_part(&mut body, &options.subresource, kind.subresources.status);
    let (api_version, time) = (kind.resource.api_version(), api::time::now_rfc3339());
    let writer = patch::Writer { manager, api_version: &api_version, subresource: &options.subresource, time: &time };
    patch::apply(live, &body, &writer, force, &kind.schema, &kind.types)
}

/// What must be so of an applied configuration whatever the live object is.
fn check_applied(target: &Target, object: &Object) -> StatusResult<()> {
    let name = object.name();
    if !name.is_empty() && name != target.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            target.name
        )));
    }
    if object.pointer("/metadata/managedFields").and_then(Value::as_array).is_some_and(|l| !l.is_empty()) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    Ok(())
}
