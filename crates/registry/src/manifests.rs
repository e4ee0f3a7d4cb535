//! Manifests and tags: to fetch, to put, to delete.

use crate::access::Permit;
use crate::answer::{Answer, Refusal, bytes, empty, not_modified, set, warn};
use crate::server::{Pushed, Registry, blocking};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use image::{Descriptor, Digest, Document, Error, MANIFEST_LIMIT, Repository, Selector, Store, StoredManifest};
use std::sync::Arc;
use std::time::Duration;

/// A manifest is small: it has to come within this time.
const BODY: Duration = Duration::from_secs(60);

pub(crate) async fn get(
    registry: &Registry,
    permit: Permit,
    selector: Selector,
    headers: &HeaderMap,
) -> Result<Answer, Refusal> {
    let shown = shown(permit.repository(), &selector);
    let store = registry.store.clone();
    let found = blocking(move || store.manifest_get(permit.repository(), &selector)).await?;
    let manifest = found.ok_or_else(|| unknown(&shown))?;
    let mut answer = match not_modified(headers, &manifest.digest) {
        true => empty(StatusCode::NOT_MODIFIED),
        false => bytes(StatusCode::OK, &manifest.media_type, manifest.bytes),
    };
    set(&mut answer, "docker-content-digest", &manifest.digest.to_string());
    set(&mut answer, "etag", &format!("\"{}\"", manifest.digest));
    Ok(answer)
}

/// What a put has to say beyond the manifest's place.
struct Put {
    stored: StoredManifest,
    subject: Option<Digest>,
    warnings: Vec<String>,
}

pub(crate) async fn put(
    registry: &Arc<Registry>,
    permit: Permit,
    selector: Selector,
    headers: &HeaderMap,
    body: &mut Incoming,
) -> Result<Answer, Refusal> {
    let media_type = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let content = receive(body).await?;
    let (own, target) = (registry.clone(), permit.repository().clone());
    let (tag, told_type) = match &selector {
        Selector::Tag(tag) => (Some(tag.to_string()), media_type.clone()),
        Selector::Digest(_) => (None, media_type.clone()),
    };
    let put = blocking_refusing(move || own.put(permit, &selector, media_type.as_deref(), &content)).await?;
    if let Some(pushed) = &registry.pushed {
        let (digest, media_type) = (put.stored.digest.to_string(), told_type.unwrap_or_default());
        pushed(Pushed { repository: target.to_string(), tag, digest, media_type });
    }
    let mut answer = empty(StatusCode::CREATED);
    set(&mut answer, "location", &format!("/v2/{target}/manifests/{}", put.stored.digest));
    set(&mut answer, "docker-content-digest", &put.stored.digest.to_string());
    if let Some(subject) = put.subject {
        set(&mut answer, "oci-subject", &subject.to_string());
    }
    put.warnings.iter().for_each(|text| warn(&mut answer, text));
    Ok(answer)
}

async fn receive(body: &mut Incoming) -> Result<bytes::Bytes, Refusal> {
    let late = || Refusal::new(StatusCode::REQUEST_TIMEOUT, "MANIFEST_INVALID", "the manifest did not arrive in time");
    let collected = tokio::time::timeout(BODY, Limited::new(body, MANIFEST_LIMIT as usize).collect());
    let collected = collected.await.map_err(|_| late())?.map_err(|error| {
        if error.is::<LengthLimitError>() {
            let message = format!("a manifest may have {MANIFEST_LIMIT} bytes, this one has more");
            return Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message);
        }
        Refusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", error.to_string())
    })?;
    Ok(collected.to_bytes())
}

impl Registry {
    fn put(
        &self,
        permit: Permit,
        selector: &Selector,
        media_type: Option<&str>,
        content: &[u8],
    ) -> Result<Put, Refusal> {
        let (store, repository) = (&self.store, permit.repository());
        let (document, _) = Document::parse(media_type, content)?;
        let absent = unknown_to(store, repository, &document)?;
        if !absent.is_empty() {
            return Err(Refusal::each(StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN", absent));
        }
        let mut warnings = warnings(store, repository, &document)?;
        let stored = {
            // Between looking at a tag that may not be moved and setting it nobody else may set it.
            let _held = match selector {
                Selector::Tag(tag) if self.rules.is_immutable(repository, tag) => {
                    let held = self.fixed_tags();
                    let stands = store.tag_digest(repository, tag)?;
                    if stands.is_some_and(|d| d != Digest::of(content)) {
                        return Err(immutable(repository, tag));
                    }
                    Some(held)
                }
                Selector::Tag(_) | Selector::Digest(_) => None,
            };
            store.manifest_put(repository, selector, media_type, content)?
        };
        let subject = document.subject().map(|s| s.digest);
        if let Some(subject) = subject
            && !store.manifest_in(repository, &subject)?
        {
            warnings.push(format!("subject {subject} is not in {repository}; without it this manifest expires"));
        }
        Ok(Put { stored, subject, warnings })
    }

    fn delete(&self, permit: Permit, selector: &Selector) -> Result<bool, Refusal> {
        let repository = permit.repository();
        let _held = if self.rules.is_empty() {
            None
        } else {
            let held = self.fixed_tags();
            let tags = match selector {
                Selector::Tag(tag) => vec![tag.clone()],
                Selector::Digest(digest) => self.store.tags_of(repository, digest)?,
            };
            for tag in tags {
                if self.rules.is_immutable(repository, &tag) && self.store.tag_digest(repository, &tag)?.is_some() {
                    return Err(immutable(repository, &tag));
                }
            }
            Some(held)
        };
        Ok(self.store.manifest_delete(repository, selector)?)
    }
}

pub(crate) async fn delete(registry: &Arc<Registry>, permit: Permit, selector: Selector) -> Result<Answer, Refusal> {
    let shown = shown(permit.repository(), &selector);
    let registry = registry.clone();
    match blocking_refusing(move || registry.delete(permit, &selector)).await? {
        true => Ok(empty(StatusCode::ACCEPTED)),
        false => Err(unknown(&shown)),
    }
}

/// What a manifest names and the repository does not have. Who may push here may not thereby read another repository.
fn unknown_to(store: &Store, repository: &Repository, document: &Document) -> Result<Vec<String>, Error> {
    let mut absent = Vec::new();
    let mut check = |what: &str, descriptor: &Descriptor, there: bool| {
        if !there && absent.len() < 20 {
            absent.push(format!(
                "the manifest names {what} {}, which is not in {repository}; push it first",
                descriptor.digest
            ));
        }
    };
    match document {
        Document::Manifest(manifest) => {
            let limit = store.limits().layers;
            if manifest.layers.len() > limit {
                let why = format!("it has {} layers; {limit} are the most taken", manifest.layers.len());
                return Err(Error::Invalid { what: "manifest".into(), why });
            }
            check("config", &manifest.config, store.blob_in(repository, &manifest.config.digest)?);
            for layer in &manifest.layers {
                check("layer", layer, is_foreign(layer) || store.blob_in(repository, &layer.digest)?);
            }
        }
        Document::Index(index) => {
            for child in &index.manifests {
                check("manifest", child, store.manifest_in(repository, &child.digest)?);
            }
        }
    }
    Ok(absent)
}

fn is_foreign(layer: &Descriptor) -> bool {
    layer.media_type.contains("nondistributable") || layer.media_type.contains("foreign")
}

fn warnings(store: &Store, repository: &Repository, document: &Document) -> Result<Vec<String>, Error> {
    let Document::Manifest(manifest) = document else { return Ok(Vec::new()) };
    let mut warnings = Vec::new();
    for layer in manifest.layers.iter().filter(|l| is_foreign(l)).take(5) {
        if !store.blob_in(repository, &layer.digest)? {
            warnings
                .push(format!("layer {} is to be fetched from elsewhere; it cannot be pulled from here", layer.digest));
        }
    }
    Ok(warnings)
}

/// As [`blocking`], for work that refuses by itself.
async fn blocking_refusing<T, F>(work: F) -> Result<T, Refusal>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Refusal> + Send + 'static,
{
    blocking(move || Ok(work())).await?
}

fn shown(repository: &Repository, selector: &Selector) -> String {
    match selector {
        Selector::Tag(tag) => format!("{repository}: {tag}"),
        Selector::Digest(digest) => format!("{repository}: {digest}"),
    }
}

fn unknown(shown: &str) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format!("{shown}: no such manifest"))
}

fn immutable(repository: &Repository, tag: &str) -> Refusal {
    let message =
        format!("{repository}:{tag} may not be moved or deleted, by a rule of this registry; choose another tag");
    Refusal::new(StatusCode::CONFLICT, "DENIED", message)
}
