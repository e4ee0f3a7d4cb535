//! What there is: repositories, tags, referrers.

use crate::access::{Access, Caller, Permit, Verb};
use crate::answer::{Answer, Refusal, bytes, json, set};
use crate::route::{lexical, page};
use crate::server::{Registry, blocking};
use http::StatusCode;
use image::{Digest, MANIFEST_LIMIT};
use serde_json::json;
use std::collections::HashMap;

type Query = HashMap<String, String>;

pub(crate) async fn tags(registry: &Registry, permit: Permit, query: &Query) -> Result<Answer, Refusal> {
    let name = permit.repository().path.clone();
    let store = registry.store.clone();
    let all = blocking(move || store.tags(&permit.repository().path)).await?;
    let missing = || Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", format!("no repository {name:?} here"));
    let mut all = all.ok_or_else(missing)?;
    all.sort_by(|a, b| lexical(a, b));
    listing(&format!("/v2/{name}/tags/list"), all, query, |tags| json!({"name": name, "tags": tags}))
}

pub(crate) async fn catalog(registry: &Registry, caller: &Caller, query: &Query) -> Result<Answer, Refusal> {
    let store = registry.store.clone();
    let mut all = blocking(move || store.repositories()).await?;
    let access: &dyn Access = &*registry.access;
    if !access.sees_everything(caller) {
        all.retain(|name| access.decide(caller, Verb::Pull, Some(name)).is_ok());
    }
    listing("/v2/_catalog", all, query, |names| json!({"repositories": names}))
}

fn listing(
    path: &str,
    all: Vec<String>,
    query: &Query,
    body: impl Fn(&[String]) -> serde_json::Value,
) -> Result<Answer, Refusal> {
    let bad = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message);
    let (shown, more) = page(all, query).map_err(bad)?;
    let mut answer = json(StatusCode::OK, &body(&shown));
    if let (true, Some(last), Some(n)) = (more, shown.last(), query.get("n")) {
        set(&mut answer, "link", &format!("<{path}?n={n}&last={}>; rel=\"next\"", escaped(last)));
    }
    Ok(answer)
}

fn escaped(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

pub(crate) async fn referrers(
    registry: &Registry,
    permit: Permit,
    digest: Digest,
    query: &Query,
) -> Result<Answer, Refusal> {
    let path = format!("/v2/{}/referrers/{digest}", permit.repository());
    let store = registry.store.clone();
    let mut found = blocking(move || store.referrers(permit.repository(), &digest)).await?;
    let wanted = query.get("artifactType");
    if let Some(wanted) = wanted {
        found.retain(|d| d.artifact_type.as_ref() == Some(wanted));
    }
    // Sorted by digest; `last` is ours, in the link that is given.
    if let Some(last) = query.get("last").map(|d| d.parse::<Digest>()).transpose()? {
        found.retain(|d| d.digest > last);
    }
    let mut room = MANIFEST_LIMIT as usize - 1024;
    let fits = found
        .iter()
        .take_while(|d| {
            let size = serde_json::to_string(d).map_or(0, |text| text.len() + 1);
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        })
        .count();
    // One that fits nowhere is a page of its own.
    let shown = fits.max(1).min(found.len());
    let next = if shown < found.len() { found.get(shown - 1).map(|d| d.digest) } else { None };
    found.truncate(shown);
    let index = json!({"schemaVersion": 2, "mediaType": image::media::OCI_INDEX, "manifests": found});
    let mut answer = bytes(StatusCode::OK, image::media::OCI_INDEX, index.to_string());
    if let Some(last) = next {
        let filter = wanted.map(|w| format!("&artifactType={}", escaped(w))).unwrap_or_default();
        set(&mut answer, "link", &format!("<{path}?last={last}{filter}>; rel=\"next\""));
    }
    if wanted.is_some() {
        set(&mut answer, "oci-filters-applied", "artifactType");
    }
    Ok(answer)
}
