//! Watches over HTTP: one JSON document per line, for as long as the client listens.

use super::negotiate::{Accepted, Form};
use super::objects::{Include, metadata_only, table};
use super::{Query, Response, Service, respond};
use crate::core::Core;
use crate::rest::{ListRequest, VersionMatch, storage};
use crate::watch::{Change, Event, Filter, Watcher};
use api::kind::Kind;
use api::object::Object;
use api::status::{Reason, Status, StatusResult};
use bytes::{BufMut, Bytes, BytesMut};
use http::StatusCode;
use serde_json::json;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use store::Revision;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Watches end by themselves between this and twice this, so that clients spread.
const SHORTEST: u64 = 1800;
const BOOKMARKS: Duration = Duration::from_secs(60);
/// Bytes put into one frame.
const FRAME: usize = 64 << 10;

struct Stream {
    kind: Arc<Kind>,
    filter: Filter,
    form: Form,
    include: Include,
    /// The first table carries the column definitions.
    headers: bool,
    bookmarks: bool,
    next_bookmark: Instant,
    deadline: Instant,
    stop: CancellationToken,
    watcher: Option<Watcher>,
    /// Written before anything else.
    first: VecDeque<Bytes>,
}

pub async fn serve(
    service: &Service,
    kind: &Arc<Kind>,
    filter: Filter,
    query: &Query,
    accepted: Accepted,
) -> StatusResult<Response> {
    let include = Include::parse(query.get("includeObject"))?;
    let timeout = query.number::<u64>("timeoutSeconds")?.filter(|s| *s > 0);
    let seconds = timeout.unwrap_or_else(|| SHORTEST + api::names::random_u64() % SHORTEST);
    let now = Instant::now();
    let mut stream = Stream {
        kind: kind.clone(),
        filter,
        form: accepted.form,
        include,
        headers: true,
        bookmarks: query.flag("allowWatchBookmarks"),
        next_bookmark: now + BOOKMARKS,
        deadline: now + Duration::from_secs(seconds.min(24 * 3600)),
        stop: service.stop.clone(),
        watcher: None,
        first: VecDeque::new(),
    };
    begin(&service.core, &mut stream, query).await?;
    let body = futures_util::stream::unfold(stream, |mut stream| async move {
        let bytes = stream.next().await?;
        Some((Ok(bytes), stream))
    });
    let content_type = if accepted.yaml { "application/yaml" } else { "application/json" };
    let mut response = respond::bytes(StatusCode::OK, content_type, Bytes::new());
    *response.body_mut() = respond::stream(body);
    Ok(response)
}

/// Finds where to begin: after a resource version, or with all there is now.
async fn begin(core: &Core, stream: &mut Stream, query: &Query) -> StatusResult<()> {
    let asked = query.get("resourceVersion");
    let version: Revision = if asked.is_empty() {
        0
    } else {
        asked.parse::<u64>().ok().and_then(|n| Revision::try_from(n).ok()).ok_or_else(|| {
            Status::bad_request(format!("resourceVersion: Invalid value: \"{asked}\": must be an unsigned integer"))
        })?
    };
    let initial = query.has("sendInitialEvents").then(|| query.flag("sendInitialEvents"));
    let forbidden = |why: &str| {
        let text = format!("Forbidden: {why}");
        let causes = vec![crate::rest::cause("FieldValueForbidden", "resourceVersionMatch", text)];
        Status::invalid("meta.k8s.io", "ListOptions", "", causes)
    };
    let version_match = query.version_match()?;
    match (initial, version_match) {
        (Some(_), VersionMatch::NotOlderThan) => {}
        (Some(_), _) => {
            return Err(forbidden("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"));
        }
        (None, VersionMatch::Unset) => {}
        (None, _) => {
            return Err(forbidden("resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"));
        }
    }
    let after = if initial.unwrap_or(version == 0) {
        send_all(core, stream, version, initial == Some(true)).await?
    } else if version == 0 {
        core.storage.store.revision().await.map_err(storage::status_of)?
    } else {
        version
    };
    match core.feeds.watch(&stream.kind, after).await {
        Ok(watcher) => stream.watcher = Some(watcher),
        Err(error) => stream.first.push_back(error_line(&watch_error(error, after))),
    }
    Ok(())
}

/// Puts everything there is now before the changes; the answer is the revision it was read at.
async fn send_all(core: &Core, stream: &mut Stream, version: Revision, mark: bool) -> StatusResult<Revision> {
    let request = ListRequest {
        resource_version: if version > 0 { version.to_string() } else { String::new() },
        ..ListRequest::all(&stream.kind, stream.filter.clone())
    };
    let answer = core.list(&request).await?;
    let mut buffer = BytesMut::new();
    for object in &answer.items {
        let body = stream.encode(object);
        line(&mut buffer, Change::Added.name(), &body);
        if buffer.len() >= FRAME {
            stream.first.push_back(buffer.split().freeze());
        }
    }
    if mark && stream.bookmarks {
        let bookmark = stream.bookmark(answer.revision, true);
        line(&mut buffer, "BOOKMARK", &bookmark);
    }
    if !buffer.is_empty() {
        stream.first.push_back(buffer.freeze());
    }
    Ok(answer.revision)
}

fn line(buffer: &mut BytesMut, kind: &str, object: &[u8]) {
    buffer.reserve(kind.len() + object.len() + 32);
    buffer.put_slice(b"{\"type\":\"");
    buffer.put_slice(kind.as_bytes());
    buffer.put_slice(b"\",\"object\":");
    buffer.put_slice(object);
    buffer.put_slice(b"}\n");
}

fn error_line(status: &Status) -> Bytes {
    let mut buffer = BytesMut::new();
    line(&mut buffer, "ERROR", status.to_json().to_string().as_bytes());
    buffer.freeze()
}

/// The store's refusal to go on, in the words clients know.
pub fn watch_error(error: store::Error, after: Revision) -> Status {
    match error {
        store::Error::Compacted { oldest } => {
            Status::new(Reason::Expired, format!("too old resource version: {after} ({oldest})"))
        }
        other => storage::status_of(other),
    }
}

impl Stream {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(bytes) = self.first.pop_front() {
            return Some(bytes);
        }
        loop {
            let watcher = self.watcher.as_mut()?;
            let bookmark_at = if self.bookmarks { self.next_bookmark } else { self.deadline };
            let events = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep_until(self.deadline) => return None,
                events = watcher.next() => events?,
                () = tokio::time::sleep_until(bookmark_at), if self.bookmarks => {
                    self.next_bookmark = Instant::now() + BOOKMARKS;
                    let bookmark = self.bookmark(self.watcher.as_ref()?.position(), false);
                    let mut buffer = BytesMut::new();
                    line(&mut buffer, "BOOKMARK", &bookmark);
                    return Some(buffer.freeze());
                }
            };
            match events {
                Ok(events) => {
                    let mut buffer = BytesMut::new();
                    for event in &events {
                        self.write(&mut buffer, event);
                    }
                    if !buffer.is_empty() {
                        return Some(buffer.freeze());
                    }
                }
                Err(error) => {
                    self.watcher = None;
                    return Some(error_line(&watch_error(error, 0)));
                }
            }
        }
    }

    fn write(&mut self, buffer: &mut BytesMut, event: &Event) {
        let Some((change, object)) = self.filter.see(event) else { return };
        // An object as it stands in the event is serialised once for everybody; what a filter made of it is not.
        let shared = Arc::ptr_eq(&object, &event.object) && !(self.headers && matches!(self.form, Form::Table { .. }));
        let body = if shared {
            let id = self.form.id() << 8 | self.include as u64;
            event.encoded(id, || encode(&self.kind, &object, self.form, self.include, false))
        } else {
            self.encode(&object)
        };
        line(buffer, change.name(), &body);
    }

    fn encode(&mut self, object: &Object) -> Bytes {
        let headers = std::mem::replace(&mut self.headers, false);
        encode(&self.kind, object, self.form, self.include, headers)
    }

    fn bookmark(&self, revision: Revision, initial_end: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if let (true, Some(fields)) = (initial_end, metadata.as_object_mut()) {
            fields.insert("annotations".into(), json!({"k8s.io/initial-events-end": "true"}));
        }
        let version = self.form.meta_version();
        let value = match self.form {
            Form::Full => {
                json!({"kind": self.kind.kind, "apiVersion": self.kind.resource.api_version(), "metadata": metadata})
            }
            Form::Metadata { .. } => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": version, "metadata": metadata})
            }
            Form::Table { .. } => {
                json!({"kind": "Table", "apiVersion": version, "metadata": metadata, "columnDefinitions": null, "rows": []})
            }
        };
        value.to_string().into()
    }
}

fn encode(kind: &Kind, object: &Object, form: Form, include: Include, headers: bool) -> Bytes {
    let version = form.meta_version();
    let bytes = match form {
        Form::Full => serde_json::to_vec(object),
        Form::Metadata { .. } => serde_json::to_vec(&metadata_only(object, version)),
        Form::Table { .. } => {
            let list = json!({"resourceVersion": api::object::Meta::resource_version(object)});
            serde_json::to_vec(&table(kind, std::iter::once(object), version, include, list, headers))
        }
    };
    bytes.unwrap_or_default().into()
}
