//! Deleting objects: at once, or marked first where a grace period, finalizers or the propagation asked for say so.
//!
//! ```text
//! live ── DELETE ──▶ gone                                   nothing to wait for
//! live ── DELETE ──▶ deletionTimestamp set ── finalizers removed / DELETE with grace 0 ──▶ gone
//! ```

use super::{ATTEMPTS, Preconditions, WriteOptions, storage};
use crate::admission::Operation;
use crate::auth::Permit;
use crate::core::{Core, Target};
use api::client::{DeleteOptions, Propagation};
use api::object::{Meta, Object};
use api::status::StatusResult;
use serde_json::Value;
use store::{Compare, KeyRange, Op, Txn};

/// What became of the object.
pub enum Deleted {
    /// It is gone; this was its last state.
    Gone(Object),
    /// It is marked and will go.
    Marked(Object),
}

/// How the request wants dependents treated, when it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `None` = the default: background, unless the object says otherwise by a finalizer.
    pub propagation: Option<Propagation>,
}

/// An object that is being deleted and has nothing left to wait for.
pub fn is_finished(object: &Object) -> bool {
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    object.is_deleting() && grace == 0 && object.finalizers().is_empty()
}

impl Core {
    pub async fn delete(
        &self,
        permit: &Permit,
        target: &Target,
        options: &DeleteOptions,
        wanted: Wanted,
        dry_run: bool,
    ) -> StatusResult<Deleted> {
        let kind = &target.kind;
        let key = storage::key(kind, &target.namespace, &target.name);
        let conditions = Preconditions { uid: options.uid.clone(), resource_version: options.resource_version.clone() };
        for _ in 0..ATTEMPTS {
            let Some(kv) = self.storage.get_kv(key.clone()).await? else { return Err(target.not_found()) };
            let live = storage::decode_kv(kind, &kv)?;
            conditions.check(target, &live)?;
            let mut new = live.clone();
            let mut effects = self.admit(permit, target, Operation::Delete, &mut new).await?;
            let grace = self.grace_period(target, &live, options.grace_period_seconds);
            mark(&mut new, grace, wanted);
            let gone = is_finished(&new) && !self.waits(target, &new);
            if dry_run || (!gone && new == live) {
                return Ok(if gone { Deleted::Gone(live) } else { Deleted::Marked(new) });
            }
            let mut then = if gone {
                let mut then = vec![Op::Delete(KeyRange::one(key.clone()))];
                then.extend(self.release(target, &live).then);
                then
            } else {
                vec![storage::put(key.clone(), storage::encode(kind, &new)?)]
            };
            then.append(&mut effects.then);
            let mut compare = vec![Compare::ModRevision(key.clone(), kv.mod_revision)];
            compare.append(&mut effects.compare);
            let answer = self.storage.txn(Txn { compare, then, otherwise: vec![] }).await?;
            if answer.succeeded {
                new.metadata_mut().insert("resourceVersion".into(), answer.revision.to_string().into());
                self.written(target, &new, gone);
                return Ok(if gone { Deleted::Gone(live) } else { Deleted::Marked(new) });
            }
        }
        Err(target.conflict(storage::MODIFIED))
    }

    /// Deletes all objects in a collection that match; the answer is what was there.
    pub async fn delete_collection(
        &self,
        permit: &Permit,
        list: &super::ListRequest,
        options: &DeleteOptions,
        wanted: Wanted,
        write: &WriteOptions,
    ) -> StatusResult<super::ListAnswer> {
        let answer = self.list(list).await?;
        for object in &answer.items {
            let target = Target::new(&list.kind, object.namespace(), object.name());
            let options = DeleteOptions { uid: Some(object.uid().to_owned()), ..options.clone() };
            match self.delete(permit, &target, &options, wanted, write.dry_run).await {
                Err(status) if status.is_not_found() || status.is_conflict() => {}
                Err(status) => return Err(status),
                Ok(_) => {}
            }
        }
        Ok(answer)
    }
}

/// Sets what a delete with this grace period and propagation sets.
fn mark(object: &mut Object, grace: i64, wanted: Wanted) {
    let first = !object.is_deleting();
    let before = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    let counted = object.generation();
    let mut finalizers: Vec<String> = object.finalizers().into_iter().map(str::to_owned).collect();
    let propagation = match wanted.propagation {
        // A choice made earlier, or by whoever made the object, holds until someone chooses again.
        None => None,
        Some(Propagation::Background) => Some(""),
        Some(Propagation::Foreground) => Some("foregroundDeletion"),
        Some(Propagation::Orphan) => Some("orphan"),
    };
    if let Some(finalizer) = propagation {
        finalizers.retain(|f| f != "orphan" && f != "foregroundDeletion");
        if !finalizer.is_empty() {
            finalizers.push(finalizer.to_owned());
        }
    }
    let metadata = object.metadata_mut();
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".into(), finalizers.into());
    }
    // A grace period may be made shorter, never longer.
    if first || before.is_some_and(|before| grace < before) {
        let at = api::time::now() + grace;
        metadata.insert("deletionTimestamp".into(), api::time::rfc3339(at).into());
        metadata.insert("deletionGracePeriodSeconds".into(), grace.into());
        if first && counted > 0 {
            metadata.insert("generation".into(), (counted + 1).into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn marks() {
        let object = json!({"metadata": {"name": "a", "generation": 3}});
        let wanted = |propagation| Wanted { propagation };
        let mut plain = object.clone();
        mark(&mut plain, 0, wanted(None));
        assert!(is_finished(&plain) && plain.generation() == 4);

        let mut graceful = object.clone();
        mark(&mut graceful, 30, wanted(None));
        assert!(!is_finished(&graceful));
        let first = graceful.clone();
        mark(&mut graceful, 60, wanted(None));
        assert_eq!(first, graceful, "never longer");
        mark(&mut graceful, 0, wanted(None));
        assert!(is_finished(&graceful) && graceful.generation() == 4);

        let mut foreground = object.clone();
        mark(&mut foreground, 0, wanted(Some(Propagation::Foreground)));
        assert_eq!(foreground.finalizers(), ["foregroundDeletion"]);
        assert!(!is_finished(&foreground));
        mark(&mut foreground, 0, wanted(Some(Propagation::Orphan)));
        assert_eq!(foreground.finalizers(), ["orphan"]);
        mark(&mut foreground, 0, wanted(Some(Propagation::Background)));
        assert!(is_finished(&foreground));
    }
}
