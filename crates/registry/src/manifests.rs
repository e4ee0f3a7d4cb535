//! Manifests, tags, the catalogue and referrers.

use crate::answer::{Answer, Refusal, bytes, empty, json, set};
use crate::route::page;
use crate::server::blocking;
use http::header::CONTENT_TYPE;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use image::{Digest, Document, MANIFEST_LIMIT, Repository, Selector, Store};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// A manifest is small: it has to come within this time.
const BODY: Duration = Duration::from_secs(60);

pub(crate) async fn get(store: Arc<Store>, repository: Repository, selector: Selector) -> Result<Answer, Refusal> {
    let shown = format!("{repository}: {}", name(&selector));
    let found = blocking(move || store.manifest_get(&repository, &selector)).await?;
    let manifest = found.ok_or_else(|| unknown(&shown))?;
    let mut answer = bytes(StatusCode::OK, &manifest.media_type, manifest.bytes);
    set(&mut answer, "docker-content-digest", &manifest.digest.to_string());
    set(&mut answer, "etag", &format!("\"{}\"", manifest.digest));
    Ok(answer)
}

pub(crate) async fn put(
    store: Arc<Store>,
    repository: Repository,
    selector: Selector,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let media_type = request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let body = Limited::new(request.into_body(), MANIFEST_LIMIT as usize);
    let late = || Refusal::new(StatusCode::REQUEST_TIMEOUT, "MANIFEST_INVALID", "the manifest did not arrive in time");
    let collected = tokio::time::timeout(BODY, body.collect()).await.map_err(|_| late())?.map_err(|error| {
        if error.is::<LengthLimitError>() {
            let message = format!("a manifest may have {MANIFEST_LIMIT} bytes, this one has more");
            return Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message);
        }
        Refusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", error.to_string())
    })?;
    let content = collected.to_bytes();
    let target = repository.clone();
    let (stored, subject) = blocking(move || {
        let stored = store.manifest_put(&target, &selector, media_type.as_deref(), &content)?;
        let subject = Document::parse(Some(&stored.media_type), &stored.bytes)?.0.subject().map(|s| s.digest);
        Ok((stored, subject))
    })
    .await?;
    let mut answer = empty(StatusCode::CREATED);
    set(&mut answer, "location", &format!("/v2/{repository}/manifests/{}", stored.digest));
    set(&mut answer, "docker-content-digest", &stored.digest.to_string());
    if let Some(subject) = subject {
        set(&mut answer, "oci-subject", &subject.to_string());
    }
    Ok(answer)
}

pub(crate) async fn delete(store: Arc<Store>, repository: Repository, selector: Selector) -> Result<Answer, Refusal> {
    let shown = format!("{repository}: {}", name(&selector));
    match blocking(move || store.manifest_delete(&repository, &selector)).await? {
        true => Ok(empty(StatusCode::ACCEPTED)),
        false => Err(unknown(&shown)),
    }
}

pub(crate) async fn tags(
    store: Arc<Store>,
    repository: Repository,
    query: HashMap<String, String>,
) -> Result<Answer, Refusal> {
    let name = repository.path.clone();
    let all = blocking(move || store.tags(&repository.path)).await?;
    let missing = || Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", format!("no repository {name:?} here"));
    let all = all.ok_or_else(missing)?;
    listing(&format!("/v2/{name}/tags/list"), all, &query, |tags| json!({"name": name, "tags": tags}))
}

pub(crate) async fn catalog(store: Arc<Store>, query: HashMap<String, String>) -> Result<Answer, Refusal> {
    let all = blocking(move || store.repositories()).await?;
    listing("/v2/_catalog", all, &query, |names| json!({"repositories": names}))
}

fn listing(
    path: &str,
    all: Vec<String>,
    query: &HashMap<String, String>,
    body: impl Fn(&[String]) -> serde_json::Value,
) -> Result<Answer, Refusal> {
    let bad = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "PAGINATION_NUMBER_INVALID", message);
    let (shown, more) = page(all, query).map_err(bad)?;
    let mut answer = json(StatusCode::OK, &body(&shown));
    if let (true, Some(last), Some(n)) = (more, shown.last(), query.get("n")) {
        let last = percent_encoding::utf8_percent_encode(last, percent_encoding::NON_ALPHANUMERIC);
        set(&mut answer, "link", &format!("<{path}?n={n}&last={last}>; rel=\"next\""));
    }
    Ok(answer)
}

pub(crate) async fn referrers(
    store: Arc<Store>,
    repository: Repository,
    digest: Digest,
    query: HashMap<String, String>,
) -> Result<Answer, Refusal> {
    let mut found = blocking(move || store.referrers(&repository, &digest)).await?;
    let wanted = query.get("artifactType");
    if let Some(wanted) = wanted {
        found.retain(|d| d.artifact_type.as_ref() == Some(wanted));
    }
    let index = json!({"schemaVersion": 2, "mediaType": image::media::OCI_INDEX, "manifests": found});
    let mut answer = bytes(StatusCode::OK, image::media::OCI_INDEX, index.to_string());
    if wanted.is_some() {
        set(&mut answer, "oci-filters-applied", "artifactType");
    }
    Ok(answer)
}

fn name(selector: &Selector) -> String {
    match selector {
        Selector::Tag(tag) => tag.clone(),
        Selector::Digest(digest) => digest.to_string(),
    }
}

fn unknown(shown: &str) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format!("{shown}: no such manifest"))
}
