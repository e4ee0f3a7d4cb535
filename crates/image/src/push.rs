//! Pushing to a registry (OCI distribution spec 1.1, client side).
//!
//! Blobs first, a few at once: one that is there is left alone, one that another repository of the same registry has is
//! mounted, all others are sent. Then manifests, children before their index, the name last.

use crate::digest::Digest;
use crate::error::{Error, Result, io};
use crate::export::Exported;
use crate::lookup::Found;
use crate::manifest::MANIFEST_LIMIT;
use crate::pull::client::{Client, Payload, header};
use crate::pull::futures::stream;
use crate::pull::{PullOptions, retried};
use crate::reference::{DOCKER_HUB, Reference};
use crate::spec::{Descriptor, Document};
use crate::store::{Progress, ProgressFn, Store};
use http::{Method, StatusCode};
use std::collections::HashMap;
use std::sync::Arc;

/// Blobs sent at once.
const PARALLEL: usize = 3;

impl Store {
    /// Pushes an image to the registry that `target`, or the image's own name, has in front. Gives the digest of what the
    /// name points at there.
    ///
    /// Blocking; runs a runtime of its own, as [`Store::pull`] does.
    pub fn push(
        &self,
        reference: &str,
        target: Option<&str>,
        options: &PullOptions,
        progress: ProgressFn,
    ) -> Result<Digest> {
        let found = self.find(reference)?;
        // A host that means this store is a registry like any other to whoever pushes to it by name.
        let remote = Reference::parse(target.unwrap_or(reference), &[])?;
        let Some(host) = remote.repository.host.clone() else {
            return Err(Error::InvalidReference {
                reference: target.unwrap_or(reference).to_owned(),
                why: "it names no registry; write it as host/name:tag".into(),
            });
        };
        if remote.digest.is_some() {
            return Err(Error::invalid(remote.to_string(), "a name to push to may not contain a digest"));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io("start a runtime for", reference))?;
        let client = Client::new(&host, &remote.repository.path, options, "pull,push")?;
        let pushing = Pushing { store: self, client, progress, origins: self.origins(&host, &remote)? };
        let digest = runtime.block_on(pushing.image(&found, &remote))?;
        progress(Progress::Step("done".into()));
        Ok(digest)
    }

    /// Blobs that other repositories of the same registry have, as far as is known here.
    fn origins(&self, host: &str, remote: &Reference) -> Result<HashMap<Digest, String>> {
        let mut known = HashMap::new();
        let same = |r: &crate::reference::Repository| r.host.as_deref() == Some(host);
        for repository in self.all_repositories()?.iter().filter(|r| same(r) && **r != remote.repository) {
            for record in self.manifest_records(repository)? {
                if let Ok((Document::Manifest(manifest), _)) = self.document(&record.digest, Some(&record.media_type)) {
                    let blobs = manifest.layers.iter().chain([&manifest.config]);
                    known.extend(blobs.map(|b| (b.digest, repository.path.clone())));
                }
            }
        }
        Ok(known)
    }
}

struct Pushing<'a> {
    store: &'a Store,
    client: Client,
    progress: ProgressFn<'a>,
    origins: HashMap<Digest, String>,
}

impl Pushing<'_> {
    async fn image(&self, found: &Found, remote: &Reference) -> Result<Digest> {
        let Exported { root, manifests, blobs } = self.store.exported(found)?;
        let host = remote.repository.host.as_deref().unwrap_or(DOCKER_HUB);
        (self.progress)(Progress::Step(format!("pushing {} blobs to {host} as {remote}", blobs.len())));
        let count = blobs.len();
        let tasks: Vec<_> = blobs
            .iter()
            .enumerate()
            .map(|(number, blob)| async move {
                let label = format!("blob {} of {count}", number + 1);
                retried(self.client.tries, &label, self.progress, || self.blob(blob, &label)).await
            })
            .collect();
        stream(tasks, PARALLEL).await?;
        for manifest in manifests.iter().rev().filter(|m| m.digest != root.digest) {
            let name = manifest.digest.to_string();
            retried(self.client.tries, "manifest", self.progress, || self.manifest(manifest, &name)).await?;
        }
        let name = remote.tag.clone().unwrap_or_else(|| "latest".into());
        retried(self.client.tries, "manifest", self.progress, || self.manifest(&root, &name)).await?;
        Ok(root.digest)
    }

    async fn blob(&self, blob: &Descriptor, label: &str) -> Result<()> {
        let what = format!("blob {}", blob.digest);
        let head = self.client.ask(Method::HEAD, &format!("blobs/{}", blob.digest), &[], &Payload::None, &what).await?;
        match head.status() {
            StatusCode::OK => {
                (self.progress)(Progress::Step(format!("{label}: is there already")));
                return Ok(());
            }
            StatusCode::NOT_FOUND => {}
            status => return Err(self.client.refusal(head, status, &what).await),
        }
        let begin = match self.origins.get(&blob.digest) {
            Some(from) => format!("blobs/uploads/?mount={}&from={from}", blob.digest),
            None => "blobs/uploads/".to_owned(),
        };
        let length = [("content-length", "0")];
        let begun = self.client.ask(Method::POST, &begin, &length, &Payload::None, &what).await?;
        match begun.status() {
            StatusCode::CREATED => {
                (self.progress)(Progress::Step(format!("{label}: mounted from another repository")));
                return Ok(());
            }
            StatusCode::ACCEPTED => {}
            status => return Err(self.client.refusal(begun, status, &what).await),
        }
        let location = self.client.location(&begin, &begun)?;
        let url = format!("{location}{}digest={}", if location.contains('?') { '&' } else { '?' }, blob.digest);
        let opened = self.store.blob_open(&blob.digest)?.ok_or(Error::BlobUnknown(blob.digest))?;
        (self.progress)(Progress::Bytes { what: label.to_owned(), done: 0, total: Some(blob.size) });
        let payload = Payload::File(Arc::new(opened.file), opened.size, Arc::default());
        let size = opened.size.to_string();
        let headers = [("content-type", "application/octet-stream"), ("content-length", size.as_str())];
        let sent = self.client.ask(Method::PUT, &url, &headers, &payload, &what).await?;
        match sent.status() {
            StatusCode::CREATED => {
                (self.progress)(Progress::Bytes { what: label.to_owned(), done: blob.size, total: Some(blob.size) });
                Ok(())
            }
            status => Err(self.client.refusal(sent, status, &what).await),
        }
    }

    async fn manifest(&self, manifest: &Descriptor, name: &str) -> Result<()> {
        let bytes = self.store.blob_read(&manifest.digest, MANIFEST_LIMIT)?;
        let what = format!("manifest {name}");
        let size = bytes.len().to_string();
        let headers = [("content-type", manifest.media_type.as_str()), ("content-length", size.as_str())];
        let path = format!("manifests/{name}");
        let sent = self.client.ask(Method::PUT, &path, &headers, &Payload::Bytes(bytes.into()), &what).await?;
        if sent.status() != StatusCode::CREATED {
            let status = sent.status();
            return Err(self.client.refusal(sent, status, &what).await);
        }
        match header(&sent, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok()) {
            Some(other) if other != manifest.digest => {
                Err(Error::DigestMismatch { what, expected: manifest.digest, actual: other })
            }
            _ => Ok(()),
        }
    }
}
