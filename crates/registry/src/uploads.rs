//! Uploads: mounted, in one piece, in chunks.

use crate::access::{Caller, Permit};
use crate::answer::{Answer, Refusal, empty, set};
use crate::blobs::{Sources, mount};
use crate::route::content_range;
use crate::server::{Registry, blocking};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use image::{Digest, Error, Repository};
use std::collections::HashMap;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// Pieces on their way from the network to the disk.
const QUEUE: usize = 8;
/// A client that sends nothing for this long has gone.
const SILENCE: Duration = Duration::from_secs(120);
/// An upload waits this long for its turn; until then it is held back by its own socket.
const TURN: Duration = Duration::from_secs(30);

/// POST: mount, the whole blob at once, or the beginning of an upload.
pub(crate) async fn begin(
    registry: &Registry,
    permit: Permit,
    caller: &Caller,
    query: &HashMap<String, String>,
    headers: &HeaderMap,
    body: &mut Incoming,
) -> Result<Answer, Refusal> {
    let repository = permit.repository();
    if let Some(digest) = query.get("mount").map(|d| d.parse::<Digest>()).transpose()? {
        let from = query.get("from").filter(|f| !f.is_empty()).cloned();
        if mounted(registry, repository, caller, digest, from).await? {
            return Ok(created(repository, &digest));
        }
    }
    let digest = query.get("digest").map(|d| d.parse::<Digest>()).transpose()?;
    check_size(registry, headers)?;
    let id = session(registry).await?;
    let Some(digest) = digest else { return Ok(accepted(repository, &id, 0)) };
    let result = receive(registry, repository, &id, None, body, Some(digest)).await;
    if result.is_err() {
        let store = registry.store.clone();
        let _ = blocking(move || store.upload_cancel(&id)).await;
    }
    result.map(|_| created(repository, &digest))
}

async fn mounted(
    registry: &Registry,
    into: &Repository,
    caller: &Caller,
    digest: Digest,
    from: Option<String>,
) -> Result<bool, Refusal> {
    let (store, access) = (registry.store.clone(), registry.access.clone());
    let (into, caller) = (into.clone(), caller.clone());
    blocking(move || {
        let sources = match from {
            Some(from) => match Permit::to_pull(&*access, &caller, &from) {
                Ok(permit) => Sources::These(permit.into_iter().collect()),
                Err(_) => Sources::These(Vec::new()),
            },
            None if access.sees_everything(&caller) => Sources::Any,
            None => {
                let names = store.repositories()?;
                let permits = names.iter().filter_map(|n| Permit::to_pull(&*access, &caller, n).ok().flatten());
                Sources::These(permits.collect())
            }
        };
        mount(&store, &into, &digest, &sources)
    })
    .await
}

/// A new upload, if there are not too many already.
async fn session(registry: &Registry) -> Result<String, Refusal> {
    let (store, limit) = (registry.store.clone(), registry.limits.sessions);
    let id = blocking(move || {
        if store.upload_count()? >= limit {
            return Ok(None);
        }
        Ok(Some(store.upload_new()?.id().to_owned()))
    });
    id.await?.ok_or_else(|| {
        let message = format!("{limit} uploads are unfinished; finish or cancel some, or wait until they expire");
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message).with("retry-after", "60")
    })
}

pub(crate) async fn append(
    registry: &Registry,
    permit: Permit,
    id: &str,
    headers: &HeaderMap,
    body: &mut Incoming,
) -> Result<Answer, Refusal> {
    let repository = permit.repository();
    let result = match chunk_of(registry, headers) {
        Ok(chunk) => receive(registry, repository, id, chunk, body, None).await,
        Err(refusal) => Err(refusal),
    };
    result.map(|length| accepted(repository, id, length)).map_err(|refusal| located(refusal, repository, id))
}

pub(crate) async fn finish(
    registry: &Registry,
    permit: Permit,
    id: &str,
    query: &HashMap<String, String>,
    headers: &HeaderMap,
    body: &mut Incoming,
) -> Result<Answer, Refusal> {
    let repository = permit.repository();
    let missing = || Refusal::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the parameter `digest` is missing");
    let digest = query.get("digest").ok_or_else(missing)?.parse::<Digest>()?;
    let result = match chunk_of(registry, headers) {
        Ok(chunk) => receive(registry, repository, id, chunk, body, Some(digest)).await,
        Err(refusal) => Err(refusal),
    };
    result.map(|_| created(repository, &digest)).map_err(|refusal| located(refusal, repository, id))
}

pub(crate) async fn status(registry: &Registry, permit: Permit, id: String) -> Result<Answer, Refusal> {
    let (store, asked) = (registry.store.clone(), id.clone());
    let length = blocking(move || store.upload_length(&asked)).await?;
    let mut answer = accepted(permit.repository(), &id, length);
    *answer.status_mut() = StatusCode::NO_CONTENT;
    answer.headers_mut().remove("content-length");
    Ok(answer)
}

/// The permit is the right to push to the repository.
pub(crate) async fn cancel(registry: &Registry, _permit: Permit, id: String) -> Result<Answer, Refusal> {
    let store = registry.store.clone();
    blocking(move || store.upload_cancel(&id)).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// What a client says of the piece that it sends.
#[derive(Clone, Copy)]
struct Chunk {
    start: u64,
    length: u64,
}

/// Appends a request's body to an upload, and finishes it if a digest is given. Gives the upload's length. What came
/// before a broken connection stays, so that the client can go on.
async fn receive(
    registry: &Registry,
    repository: &Repository,
    id: &str,
    chunk: Option<Chunk>,
    body: &mut Incoming,
    digest: Option<Digest>,
) -> Result<u64, Refusal> {
    let _turn = turn(registry).await?;
    let (sender, mut receiver) = mpsc::channel::<Option<Bytes>>(QUEUE);
    let (store, repository, id) = (registry.store.clone(), repository.clone(), id.to_owned());
    let writing = blocking(move || {
        let mut upload = store.upload_open(&id)?;
        let mut end = u64::MAX;
        if let Some(chunk) = chunk {
            upload.expect_at(chunk.start)?;
            end = chunk.start.saturating_add(chunk.length);
        }
        let mut complete = false;
        while let Some(piece) = receiver.blocking_recv() {
            let Some(piece) = piece else {
                complete = true;
                continue;
            };
            if upload.length() + piece.len() as u64 > end {
                let actual = upload.length() + piece.len() as u64;
                return Err(Error::SizeMismatch { what: format!("chunk of upload {id}"), expected: end, actual });
            }
            upload.append(&piece)?;
        }
        match digest {
            Some(digest) if complete => upload.finish(&digest, Some(&repository)),
            Some(_) | None => Ok(upload.length()),
        }
    });
    let (written, whole) = tokio::join!(writing, send(body, sender));
    let length = written?;
    if !whole {
        let message = "the request's body ended early; what arrived is kept";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message));
    }
    Ok(length)
}

/// Passes a body on piece by piece; whether all of it came. The last message is `None`.
async fn send(body: &mut Incoming, sender: mpsc::Sender<Option<Bytes>>) -> bool {
    loop {
        match tokio::time::timeout(SILENCE, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data()
                    && sender.send(Some(data)).await.is_err()
                {
                    return true;
                }
            }
            Ok(None) => return sender.send(None).await.is_ok(),
            Ok(Some(Err(_))) | Err(_) => return false,
        }
    }
}

/// Waits for one of the places for bodies that are being received.
async fn turn(registry: &Registry) -> Result<OwnedSemaphorePermit, Refusal> {
    match tokio::time::timeout(TURN, registry.receiving.clone().acquire_owned()).await {
        Ok(Ok(permit)) => Ok(permit),
        Ok(Err(_)) | Err(_) => {
            let message = "too many uploads at once; try again";
            Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message).with("retry-after", "5"))
        }
    }
}

/// Refuses a body that says it is too large before it is sent.
fn check_size(registry: &Registry, headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let length = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    let limit = registry.store.limits().blob_bytes;
    if length.is_some_and(|l| l > limit) {
        return Err(Error::TooLarge { what: "the blob".into(), limit }.into());
    }
    Ok(length)
}

/// The chunk that `Content-Range: START-END` announces; it has to agree with the body's length.
fn chunk_of(registry: &Registry, headers: &HeaderMap) -> Result<Option<Chunk>, Refusal> {
    let body = check_size(registry, headers)?;
    let Some(value) = headers.get(CONTENT_RANGE) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let Some((start, length)) = content_range(text) else {
        let message = format!("Content-Range {text:?}: write it as START-END");
        return Err(Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message));
    };
    if let Some(body) = body
        && body != length
    {
        let message = format!("Content-Range {text:?} is {length} bytes, the body has {body}");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message));
    }
    Ok(Some(Chunk { start, length }))
}

/// A refused chunk is told where the upload is; a GET there tells how far.
fn located(refusal: Refusal, repository: &Repository, id: &str) -> Refusal {
    if refusal.status == StatusCode::RANGE_NOT_SATISFIABLE {
        return refusal.with("location", format!("/v2/{repository}/blobs/uploads/{id}"));
    }
    refusal
}

fn created(repository: &Repository, digest: &Digest) -> Answer {
    let mut answer = empty(StatusCode::CREATED);
    set(&mut answer, "location", &format!("/v2/{repository}/blobs/{digest}"));
    set(&mut answer, "docker-content-digest", &digest.to_string());
    answer
}

fn accepted(repository: &Repository, id: &str, length: u64) -> Answer {
    let mut answer = empty(StatusCode::ACCEPTED);
    set(&mut answer, "location", &format!("/v2/{repository}/blobs/uploads/{id}"));
    set(&mut answer, "docker-upload-uuid", id);
    set(&mut answer, "range", &format!("0-{}", length.saturating_sub(1)));
    answer
}
