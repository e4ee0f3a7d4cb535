//! Blobs, whole and in parts, and uploads, in one piece and in chunks.

use crate::answer::{Answer, Refusal, empty, set};
use crate::route::range;
use crate::server::blocking;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_RANGE, RANGE};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use image::{Digest, Error, Repository, Store, Upload};
use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

const PIECE: usize = 256 * 1024;
/// Pieces on their way between disk and network.
const QUEUE: usize = 8;
/// A client that sends nothing for this long has gone.
const SILENCE: Duration = Duration::from_secs(120);

pub(crate) async fn get(store: Arc<Store>, digest: Digest, headers: &HeaderMap, head: bool) -> Result<Answer, Refusal> {
    // A client told that a blob exists will leave it out of its push: claim it, not just look.
    if head {
        let size = blocking(move || store.blob_claim(&digest)).await?.ok_or(Error::BlobUnknown(digest))?;
        let mut answer = empty(StatusCode::OK);
        describe(&mut answer, &digest, size);
        return Ok(answer);
    }
    let blob = blocking(move || store.blob_open(&digest)).await?.ok_or(Error::BlobUnknown(digest))?;
    let asked = headers.get(RANGE).and_then(|v| v.to_str().ok()).and_then(|r| range(r, blob.size));
    let (first, last, status) = match asked {
        None => (0, blob.size.saturating_sub(1), StatusCode::OK),
        Some(Ok((first, last))) => (first, last, StatusCode::PARTIAL_CONTENT),
        Some(Err(())) => {
            let message = format!("the blob has {} bytes", blob.size);
            return Err(Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message)
                .with("content-range", format!("bytes */{}", blob.size)));
        }
    };
    let length = if blob.size == 0 { 0 } else { last - first + 1 };
    let (sender, mut receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let mut file = blob.file;
    tokio::task::spawn_blocking(move || {
        let mut left = length;
        let mut result = file.seek(SeekFrom::Start(first)).map(|_| ());
        while left > 0 && result.is_ok() {
            let mut buffer = vec![0u8; PIECE.min(left as usize)];
            result = file.read_exact(&mut buffer);
            left -= buffer.len() as u64;
            if result.is_ok() && sender.blocking_send(Ok(buffer.into())).is_err() {
                return;
            }
        }
        if let Err(error) = result {
            let _ = sender.blocking_send(Err(error));
        }
    });
    let pieces = stream::poll_fn(move |context| receiver.poll_recv(context).map(|p| p.map(|p| p.map(Frame::data))));
    let mut answer = Response::new(StreamBody::new(pieces).boxed_unsync());
    *answer.status_mut() = status;
    describe(&mut answer, &digest, length);
    if status == StatusCode::PARTIAL_CONTENT {
        set(&mut answer, "content-range", &format!("bytes {first}-{last}/{}", blob.size));
    }
    Ok(answer)
}

fn describe(answer: &mut Answer, digest: &Digest, length: u64) {
    set(answer, "content-type", "application/octet-stream");
    set(answer, "content-length", &length.to_string());
    set(answer, "accept-ranges", "bytes");
    set(answer, "docker-content-digest", &digest.to_string());
    set(answer, "etag", &format!("\"{digest}\""));
}

pub(crate) async fn delete(store: Arc<Store>, digest: Digest) -> Result<Answer, Refusal> {
    match blocking(move || store.blob_delete(&digest)).await? {
        true => Ok(empty(StatusCode::ACCEPTED)),
        false => Err(Error::BlobUnknown(digest).into()),
    }
}

/// POST: mount, the whole blob at once, or the beginning of an upload.
pub(crate) async fn begin(
    store: Arc<Store>,
    repository: Repository,
    query: HashMap<String, String>,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    if let Some(digest) = query.get("mount").and_then(|d| d.parse::<Digest>().ok()) {
        let claimed = {
            let store = store.clone();
            blocking(move || store.blob_claim(&digest)).await?
        };
        if claimed.is_some() {
            return Ok(created(&repository, &digest));
        }
    }
    let digest = query.get("digest").map(|d| d.parse::<Digest>()).transpose()?;
    let id = {
        let store = store.clone();
        blocking(move || Ok(store.upload_new()?.id().to_owned())).await?
    };
    match digest {
        None => Ok(accepted(&repository, &id, 0)),
        Some(digest) => {
            let result = receive(store.clone(), id.clone(), None, request.into_body(), Some(digest)).await;
            if result.is_err() {
                let _ = blocking(move || store.upload_cancel(&id)).await;
            }
            result.map(|_| created(&repository, &digest))
        }
    }
}

pub(crate) async fn append(
    store: Arc<Store>,
    repository: Repository,
    id: String,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let start = start_of(request.headers())?;
    let length = receive(store, id.clone(), start, request.into_body(), None)
        .await
        .map_err(|refusal| located(refusal, &repository, &id))?;
    Ok(accepted(&repository, &id, length))
}

pub(crate) async fn finish(
    store: Arc<Store>,
    repository: Repository,
    id: String,
    query: HashMap<String, String>,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let missing = || Refusal::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the parameter `digest` is missing");
    let digest = query.get("digest").ok_or_else(missing)?.parse::<Digest>()?;
    let start = start_of(request.headers())?;
    receive(store, id.clone(), start, request.into_body(), Some(digest))
        .await
        .map_err(|refusal| located(refusal, &repository, &id))?;
    Ok(created(&repository, &digest))
}

pub(crate) async fn status(store: Arc<Store>, repository: Repository, id: String) -> Result<Answer, Refusal> {
    let asked = id.clone();
    let length = blocking(move || store.upload_length(&asked)).await?;
    let mut answer = accepted(&repository, &id, length);
    *answer.status_mut() = StatusCode::NO_CONTENT;
    answer.headers_mut().remove("content-length");
    Ok(answer)
}

pub(crate) async fn cancel(store: Arc<Store>, id: String) -> Result<Answer, Refusal> {
    blocking(move || store.upload_cancel(&id)).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Appends a request's body to an upload, and finishes it if a digest is given. Gives the upload's length. What came
/// before a broken connection stays, so that the client can go on.
async fn receive(
    store: Arc<Store>,
    id: String,
    start: Option<u64>,
    mut body: Incoming,
    digest: Option<Digest>,
) -> Result<u64, Refusal> {
    let (sender, mut receiver) = mpsc::channel::<Option<Bytes>>(QUEUE);
    let writing = blocking(move || {
        let mut upload: Upload = store.upload_open(&id)?;
        if let Some(start) = start {
            upload.expect_at(start)?;
        }
        let mut complete = false;
        while let Some(piece) = receiver.blocking_recv() {
            match piece {
                Some(piece) => upload.append(&piece)?,
                None => complete = true,
            }
        }
        match digest {
            Some(digest) if complete => upload.finish(&digest, None),
            Some(_) | None => Ok(upload.length()),
        }
    });
    let reading = async move {
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
    };
    let (written, whole) = tokio::join!(writing, reading);
    let length = written?;
    if !whole {
        let message = "the request's body ended early; what arrived is kept";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message));
    }
    Ok(length)
}

/// First byte of a chunk, if the client says so: `Content-Range: START-END`.
fn start_of(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let Some(value) = headers.get(CONTENT_RANGE) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let bare = text.strip_prefix("bytes ").unwrap_or(text);
    let start = bare.split_once('-').and_then(|(start, end)| {
        let (start, end) = (start.parse::<u64>().ok()?, end.split('/').next()?.parse::<u64>().ok()?);
        (start <= end).then_some(start)
    });
    let wrong = || {
        let message = format!("Content-Range {text:?}: write it as START-END");
        Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message)
    };
    start.map(Some).ok_or_else(wrong)
}

/// A refused chunk is told where the upload is and how far.
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
