//! Creating objects.

use super::{ATTEMPTS, WriteOptions, Written, meta, schema, storage};
use crate::admission::Operation;
use crate::auth::Permit;
use crate::core::{Core, Target};
use crate::patch;
use api::kind::Scope;
use api::object::{Meta, Object};
use api::status::{Cause, Reason, Status, StatusResult};
use store::{Compare, Op, Txn};

/// How often a name is generated anew when it is taken.
const NAMES: usize = 8;

impl Core {
    pub async fn create(
        &self,
        permit: &Permit,
        target: &Target,
        object: Object,
        options: &WriteOptions,
    ) -> StatusResult<Written> {
        let generated = object.name().is_empty() && !object.str_at("/metadata/generateName").is_empty();
        let mut last = None;
        for _ in 0..if generated { NAMES } else { 1 } {
            match self.create_named(permit, target, object.clone(), options).await {
                Err(status) if generated && status.reason == Reason::AlreadyExists => last = Some(status),
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| Status::internal("no free name was found")))
    }

    async fn create_named(
        &self,
        permit: &Permit,
        target: &Target,
        mut object: Object,
        options: &WriteOptions,
    ) -> StatusResult<Written> {
        let mut target = target.clone();
        meta::identify(&target, &mut object)?;
        meta::begin(&mut target, &mut object)?;
        let kind = target.kind.clone();
        let custom = self.is_custom(&kind);
        if custom && self.kinds.current().is_ending(&kind) {
            let text = "create not allowed while custom resource definition is terminating";
            return Err(Status::new(Reason::MethodNotAllowed, text));
        }
        let told = schema::settle(&target, &mut object, options, custom)?;
        schema::prepare_create(&kind, &mut object);
        schema::apply_defaults(&kind, &mut object);
        for _ in 0..ATTEMPTS {
            let mut new = object.clone();
            let mut compare = Vec::new();
            if kind.scope == Scope::Namespaced {
                compare.push(self.open_namespace(&target).await?);
            }
            let mut effects = self.admit(permit, &target, Operation::Create, &mut new).await?;
            let mut causes = meta::validate(&target, &new, None);
            causes.extend(schema::validate(&kind, &new, None));
            refuse(&target, causes)?;
            track(&target, None, &mut new, options);
            effects.warnings.extend(told.iter().cloned());
            effects.warnings.extend(schema::warnings(&kind, &new));
            let key = storage::key(&kind, &target.namespace, &target.name);
            let value = storage::encode(&kind, &new)?;
            if options.dry_run {
                if self.storage.get_kv(key).await?.is_some() {
                    return Err(already_exists(&target));
                }
                return Ok(Written { object: new, created: true, warnings: effects.warnings });
            }
            compare.push(Compare::ModRevision(key.clone(), 0));
            compare.append(&mut effects.compare);
            let lease = self.lease_for(&kind).await?;
            let mut then = vec![Op::Put { key: key.clone(), value, lease }];
            then.append(&mut effects.then);
            let answer = self.storage.txn(Txn { compare, then, otherwise: vec![] }).await?;
            if answer.succeeded {
                new.metadata_mut().insert("resourceVersion".into(), answer.revision.to_string().into());
                self.written(&target, &new, false);
                return Ok(Written { object: new, created: true, warnings: effects.warnings });
            }
            if self.storage.get_kv(key).await?.is_some() {
                return Err(already_exists(&target));
            }
        }
        Err(target.conflict("what it depends on keeps changing; try again"))
    }

    /// The namespace must exist and must not be on its way out: the answer is a comparison that makes the write fail if
    /// that changes meanwhile.
    async fn open_namespace(&self, target: &Target) -> StatusResult<Compare> {
        let kinds = self.kinds.current();
        let Some(kind) = kinds.get("", "v1", "namespaces") else {
            return Err(Status::internal("namespaces are not served"));
        };
        let key = storage::key(kind, "", &target.namespace);
        let Some(kv) = self.storage.get_kv(key.clone()).await? else {
            return Err(meta::no_namespace(&target.namespace));
        };
        let namespace = storage::decode_kv(kind, &kv)?;
        if namespace.is_deleting() {
            let why = format!(
                "unable to create new content in namespace {} because it is being terminated",
                target.namespace
            );
            let mut status = target.forbidden(&why);
            status.causes = vec![super::cause(
                "NamespaceTerminating",
                "metadata.namespace",
                format!("namespace {} is being terminated", target.namespace),
            )];
            return Err(status);
        }
        Ok(Compare::ModRevision(key, kv.mod_revision))
    }
}

fn already_exists(target: &Target) -> Status {
    Status::already_exists(&target.kind.resource.group, &target.kind.resource.plural, &target.name)
}

pub(super) fn refuse(target: &Target, causes: Vec<Cause>) -> StatusResult<()> {
    if causes.is_empty() { Ok(()) } else { Err(target.invalid(causes)) }
}

/// Notes who owns the fields of `new`.
pub(super) fn track(target: &Target, live: Option<&Object>, new: &mut Object, options: &WriteOptions) {
    if options.manager.is_empty() {
        return;
    }
    let api_version = target.kind.resource.api_version();
    let time = api::time::now_rfc3339();
    let writer = patch::Writer {
        manager: &options.manager,
        api_version: &api_version,
        subresource: &options.subresource,
        time: &time,
    };
    patch::track_update(live, new, &writer, &target.kind.schema, &target.kind.types);
}
