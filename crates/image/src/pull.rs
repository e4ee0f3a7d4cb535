//! Pulling from a registry (OCI distribution spec 1.1, client side).
//!
//! Manifest first, then configuration and layers, a few at once; each blob into `partial/`, resumed where a former try
//! stopped, and a blob only when its digest fits. The name is given last.

mod auth;
pub(crate) mod client;
mod follow;
mod tls;

pub use auth::Credentials;

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io};
use crate::lookup::choose;
use crate::manifest::{Demand, MANIFEST_LIMIT};
use crate::reference::{DOCKER_HUB, Reference, Selector};
use crate::resolve::KindName;
use crate::spec::{Descriptor, Document, Manifest, Platform, media};
use crate::store::{Progress, ProgressFn, Store};
use client::Client;
use follow::{EndOnDrop, Watch};
use futures::stream;
use http_body_util::BodyExt;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) mod futures {
    /// Runs futures, at most `width` at once; the first error ends all.
    pub async fn stream<F, E>(tasks: Vec<F>, width: usize) -> Result<(), E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let mut waiting = tasks.into_iter();
        let mut running: Vec<std::pin::Pin<Box<F>>> = waiting.by_ref().take(width).map(Box::pin).collect();
        while !running.is_empty() {
            let (result, index) = std::future::poll_fn(|context| {
                for (index, task) in running.iter_mut().enumerate() {
                    if let std::task::Poll::Ready(result) = task.as_mut().poll(context) {
                        return std::task::Poll::Ready((result, index));
                    }
                }
                std::task::Poll::Pending
            })
            .await;
            result?;
            drop(running.swap_remove(index));
            running.extend(waiting.next().map(Box::pin));
        }
        Ok(())
    }
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Default: this machine's.
    pub platform: Option<Platform>,
    /// Default: those in `docker_config` for the registry's host, if any.
    pub credentials: Option<Credentials>,
    /// A `config.json` as docker and podman write it. Default: `~/.docker/config.json`.
    pub docker_config: Option<PathBuf>,
    /// `host[:port]`s spoken to without TLS. Loopback needs no mention.
    pub insecure_hosts: Vec<String>,
    /// PEM certificates trusted besides the system's.
    pub ca_certificates: Option<PathBuf>,
    /// Registries to ask first: for a host, `host[:port][/prefix]`, in this order.
    pub mirrors: Vec<(String, String)>,
    /// How long a registry may send or take nothing. Default: a minute.
    pub silence: Option<std::time::Duration>,
    /// How often one thing is asked for when a connection or the registry fails. Default (0): four times.
    pub tries: u32,
}

/// Begins to unpack a layer that is on its way.
type Unpack<'a> = &'a dyn Fn(Descriptor, Digest) -> Arc<Watch>;

/// Blobs downloaded at once.
const PARALLEL: usize = 3;
/// Tries to continue one blob after the connection broke.
pub(crate) const TRIES: u32 = 4;
/// Without a byte for so long, a mirror is left for the next one.
const MIRROR_SILENCE: std::time::Duration = std::time::Duration::from_secs(10);
/// Between looks at a blob that another process is downloading.
const LOCK_POLL: std::time::Duration = std::time::Duration::from_millis(100);

impl Store {
    /// Pulls an image and unpacks it. Gives the digest of what the name points at now.
    ///
    /// Blocking; runs a single-threaded runtime of its own, so it must not be called from an async task.
    pub fn pull(&self, reference: &str, options: &PullOptions, progress: ProgressFn) -> Result<Digest> {
        let named = Reference::parse(reference, self.local_hosts())?;
        let remote = named.on_docker_hub();
        if named.repository.host.is_none() && self.names_local_host(reference) {
            // Its registry is this store: there is nothing to fetch.
            return self.find(reference).map(|found| found.record.digest);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io("start a runtime for", reference))?;
        let (manifest, digest) = std::thread::scope(|scope| {
            let unpack = |layer: Descriptor, diff_id: Digest| {
                let watch = Arc::new(Watch::default());
                let followed = watch.clone();
                let work = move || self.unpack_following(&layer, &diff_id, &followed);
                if let Err(error) = std::thread::Builder::new().name("unpack".into()).spawn_scoped(scope, work) {
                    tracing::debug!(%error, "layers are unpacked once they are here");
                }
                watch
            };
            let pulled = runtime.block_on(self.pull_from_any(&remote, options, progress, &unpack));
            drop(runtime);
            pulled
        })?;
        let wanted = options.platform.clone().unwrap_or_else(Platform::host);
        self.check_and_unpack(&remote.to_string(), &manifest, &wanted, progress)?;
        progress(Progress::Step("done".into()));
        Ok(digest)
    }

    fn names_local_host(&self, reference: &str) -> bool {
        reference.split_once('/').is_some_and(|(first, _)| self.local_hosts().iter().any(|h| h == first))
    }

    /// From the first mirror that has it, else from the registry itself. Blobs that one has given stay.
    async fn pull_from_any(
        &self,
        remote: &Reference,
        options: &PullOptions,
        progress: ProgressFn<'_>,
        unpack: Unpack<'_>,
    ) -> Result<(Manifest, Digest)> {
        let host = remote.repository.host.clone().unwrap_or_else(|| DOCKER_HUB.into());
        for (_, mirror) in options.mirrors.iter().filter(|(of, _)| *of == host) {
            let (at, prefix) = mirror.split_once('/').unwrap_or((mirror, ""));
            let path = format!("{prefix}/{}", remote.repository.path);
            // The registry's credentials are not the mirror's, and the registry is there if it stands still.
            let silence = options.silence.unwrap_or(MIRROR_SILENCE).min(MIRROR_SILENCE);
            let options = PullOptions { credentials: None, silence: Some(silence), tries: 1, ..options.clone() };
            let client = Client::new(at, path.trim_start_matches('/'), &options, "pull")?;
            match self.pull_async(&client, at, remote, &options, progress, unpack).await {
                Ok(pulled) => return Ok(pulled),
                // This machine's own trouble is the same with any registry.
                Err(error @ Error::Io { .. }) => return Err(error),
                Err(error) => progress(Progress::Step(format!("mirror {at}: {}", error.chain()))),
            }
        }
        let client = Client::new(&host, &remote.repository.path, options, "pull")?;
        self.pull_async(&client, &host, remote, options, progress, unpack).await
    }

    async fn pull_async(
        &self,
        client: &Client,
        host: &str,
        remote: &Reference,
        options: &PullOptions,
        progress: ProgressFn<'_>,
        unpack: Unpack<'_>,
    ) -> Result<(Manifest, Digest)> {
        progress(Progress::Step(format!("asking {host} for {remote}")));
        let selector = remote.selector();
        let top =
            retried(client.tries, "manifest", progress, || self.fetch_manifest(client, &selector, remote)).await?;
        let wanted = options.platform.clone().unwrap_or_else(Platform::host);
        let (document, _) = Document::parse(Some(&top.media_type), &top.bytes)?;
        let (manifest, child) = match document {
            Document::Manifest(manifest) => (manifest, None),
            Document::Index(index) => {
                let chosen = choose(&remote.to_string(), &index.manifests, &wanted)?;
                let selector = Selector::Digest(chosen.digest);
                let fetched =
                    retried(client.tries, "manifest", progress, || self.fetch_manifest(client, &selector, remote))
                        .await?;
                match Document::parse(Some(&fetched.media_type), &fetched.bytes)?.0 {
                    Document::Manifest(manifest) => (manifest, Some(fetched)),
                    Document::Index(_) => return Err(Error::invalid(remote.to_string(), "an index within an index")),
                }
            }
        };
        if manifest.layers.len() > self.limits().layers {
            return Err(Error::invalid(remote.to_string(), format!("more than {} layers", self.limits().layers)));
        }
        // The configuration first: an image for another machine is refused before its layers travel.
        self.fetch_blob(client, &manifest.config, "configuration", progress, None).await?;
        self.refuse_other_platform(remote, &manifest, &wanted)?;
        let diff_ids = match KindName::of(&manifest) {
            KindName::Container => self.config_of(&manifest)?.rootfs.diff_ids,
            KindName::Component | KindName::Disk | KindName::Artifact => Vec::new(),
        };
        let count = manifest.layers.len();
        let mut once = std::collections::BTreeSet::new();
        let layers = manifest.layers.iter().enumerate().filter(|(_, l)| !l.is_foreign() && once.insert(l.digest)).map(
            |(number, layer)| {
                let diff_id = diff_ids.get(number).filter(|_| diff_ids.len() == count).copied();
                async move {
                    let label = format!("layer {} of {count}", number + 1);
                    let unpack = diff_id.map(|diff_id| (unpack, diff_id));
                    self.fetch_blob(client, layer, &label, progress, unpack).await
                }
            },
        );
        stream(layers.collect(), PARALLEL).await?;
        if let Some(child) = &child {
            let selector = Selector::Digest(Digest::of(&child.bytes));
            self.manifest_put_demanding(
                &remote.repository,
                &selector,
                Some(&child.media_type),
                &child.bytes,
                Demand::Everything,
            )?;
        }
        let stored = self.manifest_put_demanding(
            &remote.repository,
            &selector,
            Some(&top.media_type),
            &top.bytes,
            Demand::ChildrenOptional,
        )?;
        Ok((manifest, stored.digest))
    }

    fn refuse_other_platform(&self, remote: &Reference, manifest: &Manifest, wanted: &Platform) -> Result<()> {
        if KindName::of(manifest) != KindName::Container {
            return Ok(());
        }
        let own = self.config_of(manifest)?.platform();
        if own.satisfies(&Platform { variant: None, ..wanted.clone() }) {
            return Ok(());
        }
        Err(Error::Platform { reference: remote.to_string(), wanted: wanted.to_string(), available: own.to_string() })
    }

    async fn fetch_manifest(&self, client: &Client, selector: &Selector, remote: &Reference) -> Result<Fetched> {
        let name = match selector {
            Selector::Tag(tag) => tag.clone(),
            Selector::Digest(digest) => digest.to_string(),
        };
        let accept = [media::OCI_INDEX, media::OCI_MANIFEST, media::DOCKER_LIST, media::DOCKER_MANIFEST].join(", ");
        let path = format!("manifests/{name}");
        let response = client.get(&path, &[("accept", &accept)], &remote.to_string()).await?;
        let media_type = client::header(&response, "content-type").unwrap_or_default();
        let bytes = client.small_body(response, MANIFEST_LIMIT, "manifest").await?;
        let actual = Digest::of(&bytes);
        if let Selector::Digest(expected) = selector
            && *expected != actual
        {
            return Err(Error::DigestMismatch { what: remote.to_string(), expected: *expected, actual });
        }
        let generic =
            media_type.is_empty() || media_type.starts_with("application/json") || media_type.starts_with("text/");
        let (_, media_type) = Document::parse((!generic).then_some(media_type.as_str()), &bytes)?;
        Ok(Fetched { bytes, media_type })
    }

    async fn fetch_blob(
        &self,
        client: &Client,
        blob: &Descriptor,
        label: &str,
        progress: ProgressFn<'_>,
        unpack: Option<(Unpack<'_>, Digest)>,
    ) -> Result<()> {
        if self.blob_claim(&blob.digest)? == Some(blob.size) {
            return Ok(());
        }
        if blob.size > self.limits().blob_bytes {
            return Err(Error::TooLarge { what: label.to_owned(), limit: self.limits().blob_bytes });
        }
        let name = format!("pull-{}", blob.digest.hex());
        // Another process may be fetching the same. To block here would stop the other downloads, and two processes
        // that wait for each other's layers would do so for ever.
        let lock = loop {
            match self.try_named_lock(&name)? {
                Some(lock) => break lock,
                None => tokio::time::sleep(LOCK_POLL).await,
            }
        };
        if self.blob_claim(&blob.digest)? != Some(blob.size) {
            let watch = match unpack {
                Some((unpack, diff_id)) if !self.layer_claim(&diff_id)? => unpack(blob.clone(), diff_id),
                _ => Arc::default(),
            };
            let _ends = EndOnDrop(&watch);
            retried(client.tries, label, progress, || self.fetch_into_partial(client, blob, label, progress, &watch))
                .await?;
            watch.end(true);
        }
        self.forget_lock(&name, lock);
        Ok(())
    }

    async fn fetch_into_partial(
        &self,
        client: &Client,
        blob: &Descriptor,
        label: &str,
        progress: ProgressFn<'_>,
        watch: &Watch,
    ) -> Result<()> {
        let path = self.root().join("partial").join(blob.digest.hex());
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).map_err(io("lock", &path))?;
        let mut have = file.metadata().map_err(io("stat", &path))?.len();
        if have > blob.size {
            have = 0;
        }
        let mut hasher = Hasher::default();
        if have < blob.size || blob.size == 0 {
            let range = format!("bytes={have}-");
            let headers: &[(&str, &str)] = if have > 0 { &[("range", &range)] } else { &[] };
            let response = client.get(&format!("blobs/{}", blob.digest), headers, label).await?;
            let continued = response.status() == http::StatusCode::PARTIAL_CONTENT
                && client::header(&response, "content-range").is_some_and(|r| r.starts_with(&format!("bytes {have}-")));
            if !continued {
                have = 0;
            }
            file.set_len(have).map_err(io("truncate", &path))?;
            file.seek(SeekFrom::Start(0)).map_err(io("seek", &path))?;
            if have > 0 {
                hasher.consume(&mut file).map_err(io("read", &path))?;
            }
            watch.begin(&path, have);
            let mut body = response.into_body();
            while let Some(frame) = client.timed(body.frame(), label).await? {
                let frame = frame.map_err(|e| client.failed(format!("{label}: {}", client::chain(&e))))?;
                let Ok(data) = frame.into_data() else { continue };
                have += data.len() as u64;
                if have > blob.size {
                    drop(file);
                    let _ = std::fs::remove_file(&path);
                    return Err(Error::SizeMismatch { what: label.to_owned(), expected: blob.size, actual: have });
                }
                file.write_all(&data).map_err(io("write", &path))?;
                hasher.update(&data);
                watch.grown(have);
                progress(Progress::Bytes { what: label.to_owned(), done: have, total: Some(blob.size) });
            }
            if have < blob.size {
                return Err(client.failed(format!("{label}: the connection ended after {have} of {} bytes", blob.size)));
            }
        } else {
            hasher.consume(&mut file).map_err(io("read", &path))?;
        }
        let actual = hasher.finish();
        if actual != blob.digest {
            let _ = std::fs::remove_file(&path);
            return Err(Error::DigestMismatch { what: label.to_owned(), expected: blob.digest, actual });
        }
        self.blob_adopt(&path, &file, &blob.digest)
    }
}

/// Tries again, each time after twice the pause, what may go better then.
pub(crate) async fn retried<T, F: Future<Output = Result<T>>>(
    most: u32,
    what: &str,
    progress: ProgressFn<'_>,
    mut work: impl FnMut() -> F,
) -> Result<T> {
    let mut tries = 0;
    loop {
        match work().await {
            Err(error) if error.is_transient() && tries + 1 < most => {
                tries += 1;
                progress(Progress::Step(format!("{what}: {}; trying again", error.chain())));
                tokio::time::sleep(std::time::Duration::from_millis(300 << tries)).await;
            }
            other => return other,
        }
    }
}

struct Fetched {
    bytes: Vec<u8>,
    media_type: String,
}
