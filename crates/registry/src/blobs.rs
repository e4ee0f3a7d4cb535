//! Blobs, whole and in parts: to see, to fetch, to take out of a repository, to mount into one.

use crate::access::Permit;
use crate::answer::{Answer, Refusal, empty, not_modified, set};
use crate::route::range;
use crate::sendfile::Parts;
use crate::server::{Registry, blocking};
use http::header::RANGE;
use http::{HeaderMap, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use image::{Blob, Digest, Error, Repository, Store};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Blobs up to this size are read at once, larger ones are sent by the kernel.
const SMALL: u64 = 64 * 1024;

pub(crate) async fn head(registry: &Registry, permit: Permit, digest: Digest) -> Result<Answer, Refusal> {
    let store = registry.store.clone();
    // A client told that a blob exists will leave it out of its push: claim it, not just look.
    let size = blocking(move || {
        let size = store.blob_claim(&digest)?.ok_or(Error::BlobUnknown(digest))?;
        belongs(&store, permit.repository(), &digest).map(|()| size)
    });
    let mut answer = empty(StatusCode::OK);
    describe(&mut answer, &digest, size.await?);
    Ok(answer)
}

pub(crate) async fn get(
    registry: &Registry,
    permit: Permit,
    digest: Digest,
    headers: &HeaderMap,
    parts: &Parts,
) -> Result<Answer, Refusal> {
    let store = registry.store.clone();
    let opened = blocking(move || {
        let blob = store.blob_open(&digest)?.ok_or(Error::BlobUnknown(digest))?;
        belongs(&store, permit.repository(), &digest)?;
        let content = if blob.size <= SMALL { Some(whole(&blob)?) } else { None };
        Ok((blob, content))
    });
    let (blob, content) = opened.await?;
    if not_modified(headers, &digest) {
        let mut answer = empty(StatusCode::NOT_MODIFIED);
        set(&mut answer, "etag", &format!("\"{digest}\""));
        return Ok(answer);
    }
    let asked = match headers.get(RANGE).and_then(|v| v.to_str().ok()).and_then(|r| range(r, blob.size)) {
        Some(Err(())) => {
            let message = format!("the blob has {} bytes", blob.size);
            return Err(Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message)
                .with("content-range", format!("bytes */{}", blob.size)));
        }
        Some(Ok(part)) => Some(part),
        None => None,
    };
    let (offset, length) = asked.map_or((0, blob.size), |(first, last)| (first, last - first + 1));
    let body = match content {
        Some(content) => {
            let end = (offset + length) as usize;
            let part = content.get(offset as usize..end).unwrap_or_default().to_vec();
            Full::new(part.into()).map_err(|never| match never {}).boxed_unsync()
        }
        None => parts.body(blob.file, offset, length).boxed_unsync(),
    };
    let mut answer = Response::new(body);
    describe(&mut answer, &digest, length);
    if let Some((first, last)) = asked {
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        set(&mut answer, "content-range", &format!("bytes {first}-{last}/{}", blob.size));
    }
    Ok(answer)
}

fn whole(blob: &Blob) -> Result<Vec<u8>, Error> {
    let mut content = vec![0u8; blob.size as usize];
    let read = blob.file.read_exact_at(&mut content, 0);
    read.map(|()| content).map_err(|source: io::Error| Error::Io {
        operation: "read",
        path: blob.digest.to_string().into(),
        source,
    })
}

fn describe(answer: &mut Answer, digest: &Digest, length: u64) {
    set(answer, "content-type", "application/octet-stream");
    set(answer, "content-length", &length.to_string());
    set(answer, "accept-ranges", "bytes");
    set(answer, "cache-control", "max-age=31536000, immutable");
    set(answer, "docker-content-digest", &digest.to_string());
    set(answer, "etag", &format!("\"{digest}\""));
}

/// A blob of another repository is as unknown as one that is nowhere.
pub(crate) fn belongs(store: &Store, repository: &Repository, digest: &Digest) -> Result<(), Error> {
    if store.blob_in(repository, digest)? { Ok(()) } else { Err(Error::BlobUnknown(*digest)) }
}

/// Takes a blob out of a repository. Its bytes go when garbage collection finds that no one else has them.
pub(crate) async fn delete(registry: &Registry, permit: Permit, digest: Digest) -> Result<Answer, Refusal> {
    let store = registry.store.clone();
    blocking(move || {
        let repository = permit.repository();
        store.blob_open(&digest)?.ok_or(Error::BlobUnknown(digest))?;
        if store.blob_is_named(repository, &digest)? {
            return Err(Error::BlobInUse(digest));
        }
        if store.blob_unlink(repository, &digest)? { Ok(()) } else { Err(Error::BlobUnknown(digest)) }
    })
    .await?;
    Ok(empty(StatusCode::ACCEPTED))
}

/// Mounts a blob into a repository: from where the client says, or from wherever it may pull it. Whether it could.
pub(crate) fn mount(store: &Arc<Store>, into: &Repository, digest: &Digest, sources: &Sources) -> Result<bool, Error> {
    if store.blob_claim(digest)?.is_none() {
        return Ok(false);
    }
    let found = match sources {
        Sources::Any => true,
        Sources::These(permits) => {
            let mut found = false;
            for permit in permits {
                found = found || store.blob_in(permit.repository(), digest)?;
            }
            found
        }
    };
    if found {
        store.blob_link(into, digest)?;
    }
    Ok(found)
}

/// Where a blob may be mounted from.
pub(crate) enum Sources {
    /// The caller sees every repository.
    Any,
    These(Vec<Permit>),
}
