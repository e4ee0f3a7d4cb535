//! Objects in the store: `/registry/<group>/<plural>/[<namespace>/]<name>` holds the object's JSON without its
//! `resourceVersion`, which is the key's mod revision.

use api::kind::{Kind, Scope};
use api::object::{Meta, Object};
use api::status::{Reason, Status, StatusResult};
use bytes::Bytes;
use std::sync::Arc;
use store::{KeyRange, KeyValue, Op, RangeRequest, RangeResponse, Revision, Store, Txn, TxnResponse};

/// What `resourceVersion` conflicts say.
pub const MODIFIED: &str =
    "the object has been modified; please apply your changes to the latest version and try again";

/// All objects of a kind, or those of one namespace.
pub fn prefix(kind: &Kind, namespace: &str) -> Bytes {
    let group: &str = if kind.resource.group.is_empty() { "core" } else { &kind.resource.group };
    let plural = &kind.resource.plural;
    if kind.scope == Scope::Cluster || namespace.is_empty() {
        format!("/registry/{group}/{plural}/").into()
    } else {
        format!("/registry/{group}/{plural}/{namespace}/").into()
    }
}

pub fn key(kind: &Kind, namespace: &str, name: &str) -> Bytes {
    let mut key = prefix(kind, namespace).to_vec();
    key.extend_from_slice(name.as_bytes());
    key.into()
}

/// The stored form: no `resourceVersion`, the storage version's `apiVersion`.
pub fn encode(kind: &Kind, object: &Object) -> StatusResult<Bytes> {
    let serialized = |object: &Object| serde_json::to_vec(object).map(Bytes::from).map_err(Status::internal);
    let served_as_stored = *kind.resource.version == *kind.storage_version;
    if served_as_stored && object.resource_version().is_empty() {
        return serialized(object);
    }
    let mut object = object.clone();
    object.metadata_mut().remove("resourceVersion");
    if !served_as_stored && let Some(fields) = object.as_object_mut() {
        let group = &kind.resource.group;
        let version = &kind.storage_version;
        let stored = if group.is_empty() { version.clone() } else { format!("{group}/{version}") };
        fields.insert("apiVersion".into(), stored.into());
    }
    serialized(&object)
}

/// The object as `kind`'s version shows it.
pub fn decode(kind: &Kind, value: &[u8], revision: Revision) -> StatusResult<Object> {
    let mut object: Object = serde_json::from_slice(value)
        .map_err(|e| Status::internal(format!("stored {} is not readable: {e}", kind.resource.plural)))?;
    object.metadata_mut().insert("resourceVersion".into(), revision.to_string().into());
    if kind.storage_version != *kind.resource.version
        && let Some(fields) = object.as_object_mut()
    {
        fields.insert("apiVersion".into(), kind.resource.api_version().into());
    }
    Ok(object)
}

pub fn decode_kv(kind: &Kind, kv: &KeyValue) -> StatusResult<Object> {
    decode(kind, &kv.value, kv.mod_revision)
}

/// The store's errors as clients of the API understand them.
pub fn status_of(error: store::Error) -> Status {
    match &error {
        store::Error::Compacted { oldest } => {
            Status::new(Reason::Expired, format!("The resourceVersion is too old; the oldest kept is {oldest}"))
        }
        store::Error::FutureRevision { asked, newest } => too_new(*asked, *newest),
        store::Error::Busy => {
            let mut status = Status::new(Reason::TooManyRequests, "the store has too many requests waiting");
            status.retry_after_seconds = Some(1);
            status
        }
        store::Error::TooLarge { .. } => Status::new(Reason::RequestEntityTooLarge, error.to_string()),
        store::Error::Closed | store::Error::Lagged { .. } => {
            Status::new(Reason::ServiceUnavailable, error.to_string())
        }
        _ => Status::internal(error),
    }
}

/// A resource version that has not been reached.
pub fn too_new(asked: Revision, newest: Revision) -> Status {
    let mut status = Status::new(Reason::Timeout, format!("Too large resource version: {asked}, current: {newest}"));
    status.causes = vec![api::status::Cause {
        reason: "ResourceVersionTooLarge".into(),
        message: "Too large resource version".into(),
        field: String::new(),
    }];
    status.retry_after_seconds = Some(1);
    status
}

/// The store with errors turned into `Status`.
#[derive(Clone)]
pub struct Storage {
    pub store: Arc<dyn Store>,
}

impl Storage {
    pub async fn range(&self, request: RangeRequest) -> StatusResult<RangeResponse> {
        self.store.range(request).await.map_err(status_of)
    }

    pub async fn txn(&self, txn: Txn) -> StatusResult<TxnResponse> {
        self.store.txn(txn).await.map_err(status_of)
    }

    pub async fn get_kv(&self, key: Bytes) -> StatusResult<Option<KeyValue>> {
        let request = RangeRequest { range: KeyRange::one(key), revision: 0, limit: 1, count_only: false };
        Ok(self.range(request).await?.kvs.into_iter().next())
    }

    /// The object and its revision.
    pub async fn get(&self, kind: &Kind, namespace: &str, name: &str) -> StatusResult<Option<(Object, Revision)>> {
        match self.get_kv(key(kind, namespace, name)).await? {
            Some(kv) => Ok(Some((decode_kv(kind, &kv)?, kv.mod_revision))),
            None => Ok(None),
        }
    }

    pub async fn must_get(&self, kind: &Kind, namespace: &str, name: &str) -> StatusResult<(Object, Revision)> {
        self.get(kind, namespace, name).await?.ok_or_else(|| not_found(kind, name))
    }
}

pub fn not_found(kind: &Kind, name: &str) -> Status {
    Status::not_found(&kind.resource.group, &kind.resource.plural, name)
}

pub fn put(key: Bytes, value: Bytes) -> Op {
    Op::Put { key, value, lease: 0 }
}
