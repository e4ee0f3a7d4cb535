//! Garbage collection. Runs beside pushes and pulls: nothing is ever read-only.
//!
//! Mark: tags, pins, untagged manifests that are young, and what those name. Sweep: what is unmarked *and* was not
//! touched within the grace period. Whoever relies on something first touches it under the shared lock; each removal
//! looks at the time again under the exclusive lock, so between the two nothing can slip through.

mod budget;

use crate::digest::Digest;
use crate::erofs::chain_id;
use crate::error::{Error, Result, io};
use crate::manifest::now;
use crate::reference::Selector;
use crate::resolve::KindName;
use crate::spec::Document;
use crate::store::Store;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Unreferenced blobs and layers younger than this stay: a push sends blobs before the manifest that names them.
    pub grace: Duration,
    /// Manifests without a tag stay this long after they came: they may have been pushed to be used by digest.
    pub untagged: Duration,
    /// Unfinished uploads and downloads stay this long after their last byte.
    pub unfinished: Duration,
    /// Build steps and cache directories stay this long after their last use.
    pub build_age: Duration,
    /// Bytes of blobs that the build cache alone may keep alive; what was not used for longest goes first.
    pub build_bytes: u64,
    /// Pulled images that nothing pins go so long after their last use. They can be pulled again; those that were built,
    /// imported or pushed here stay.
    pub image_age: Option<Duration>,
    /// Bytes that blobs of pulled images may take; unpinned ones go, the longest unused first.
    pub image_bytes: Option<u64>,
}

impl Default for GcOptions {
    fn default() -> Self {
        GcOptions {
            grace: Duration::from_secs(3600),
            untagged: Duration::from_secs(14 * 24 * 3600),
            unfinished: Duration::from_secs(24 * 3600),
            build_age: Duration::from_secs(14 * 24 * 3600),
            build_bytes: 20 << 30,
            image_age: None,
            image_bytes: None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GcReport {
    /// Images that were over the budget.
    pub images: u64,
    /// Build steps forgotten.
    pub steps: u64,
    pub blobs: u64,
    pub layers: u64,
    pub manifests: u64,
    pub unfinished: u64,
    /// Bytes of blobs.
    pub bytes: u64,
}

#[derive(Default)]
pub(super) struct Marked {
    pub blobs: BTreeSet<Digest>,
    pub layers: BTreeSet<Digest>,
    /// Chains of layers.
    pub chains: BTreeSet<Digest>,
}

/// Temporary names without a living writer are garbage once this old: between creating and locking one is a moment.
const TEMPORARY: Duration = Duration::from_secs(60);

impl Store {
    pub fn gc(&self, options: &GcOptions) -> Result<GcReport> {
        let _one = self.named_lock("gc")?;
        let mut report = GcReport::default();
        self.sweep_links(options.grace)?;
        report.images = self.evict(options)?;
        let mut marked = self.mark(options, &mut report)?;
        report.steps = self.mark_build_cache(options, &mut marked)?;
        self.sweep_files("blobs/sha256", &marked.blobs, options.grace, |size| {
            report.blobs += 1;
            report.bytes += size;
        })?;
        self.sweep_files("disks", &marked.blobs, options.grace, |_| ())?;
        self.sweep_files("blocks", &marked.chains, options.grace, |_| ())?;
        self.sweep_layers(&marked.layers, options.grace, &mut report)?;
        for name in ["uploads", "partial"] {
            report.unfinished += self.sweep_old(name, options.unfinished)?;
        }
        report.unfinished += self.sweep_old("tmp", TEMPORARY.min(options.unfinished))?;
        self.sweep_old("caches", options.build_age)?;
        // Locks of work that was killed; whoever holds one keeps it.
        self.sweep_old("locks", options.unfinished)?;
        Ok(report)
    }

    fn mark(&self, options: &GcOptions, report: &mut GcReport) -> Result<Marked> {
        let mut marked = Marked::default();
        let pins = self.root().join("pins");
        for owner in self.pin_owners()? {
            for entry in fs::read_dir(pins.join(owner)).into_iter().flatten().flatten() {
                if let Some(digest) = entry.file_name().to_str().and_then(Digest::from_hex) {
                    self.mark_manifest(&digest, &mut marked)?;
                }
            }
        }
        for repository in self.all_repositories()? {
            let mut alive = BTreeSet::new();
            for (_, record) in self.tag_records(&repository)? {
                self.alive_with_children(&record.digest, &mut alive)?;
            }
            let records = self.manifest_records(&repository)?;
            let young = now().saturating_sub(options.untagged.as_secs());
            for record in records.iter().filter(|r| r.created > young) {
                self.alive_with_children(&record.digest, &mut alive)?;
            }
            // What is about a living manifest lives (signatures of signatures, too).
            loop {
                let before = alive.len();
                for record in &records {
                    if record.subject.is_some_and(|s| alive.contains(&s)) {
                        self.alive_with_children(&record.digest, &mut alive)?;
                    }
                }
                if alive.len() == before {
                    break;
                }
            }
            for record in &records {
                if alive.contains(&record.digest) {
                    continue;
                }
                let _lock = self.exclusive()?;
                let selector = Selector::Digest(record.digest);
                // It may have been pushed again, or tagged, while this looked.
                let again = self.record_get(&repository, &selector)?.is_some_and(|r| r.created > record.created);
                let tagged = self.tag_records(&repository)?.iter().any(|(_, r)| r.digest == record.digest);
                if again || tagged {
                    alive.insert(record.digest);
                } else if self.record_delete(&repository, &selector)? {
                    report.manifests += 1;
                }
            }
            for digest in alive {
                self.mark_manifest(&digest, &mut marked)?;
            }
        }
        Ok(marked)
    }

    fn alive_with_children(&self, digest: &Digest, alive: &mut BTreeSet<Digest>) -> Result<()> {
        if alive.insert(*digest)
            && let Some((Document::Index(index), _)) = absent_is_none(self.document(digest, None))?
        {
            alive.extend(index.manifests.iter().map(|m| m.digest));
        }
        Ok(())
    }

    /// Marks what a manifest names. A list, not recursion: indexes of indexes may be nested by a stranger.
    pub(super) fn mark_manifest(&self, digest: &Digest, marked: &mut Marked) -> Result<()> {
        let mut todo = vec![*digest];
        while let Some(digest) = todo.pop() {
            if !marked.blobs.insert(digest) {
                continue;
            }
            match absent_is_none(self.document(&digest, None))? {
                Some((Document::Manifest(manifest), _)) => {
                    marked.blobs.insert(manifest.config.digest);
                    marked.blobs.extend(manifest.layers.iter().map(|l| l.digest));
                    if KindName::of(&manifest) == KindName::Container
                        && let Ok(config) = self.config_of(&manifest)
                    {
                        marked.chains.insert(chain_id(&config.rootfs.diff_ids));
                        marked.layers.extend(config.rootfs.diff_ids);
                    }
                }
                Some((Document::Index(index), _)) => todo.extend(index.manifests.iter().map(|m| m.digest)),
                None => {}
            }
        }
        Ok(())
    }

    fn sweep_files(
        &self,
        dir: &str,
        keep: &BTreeSet<Digest>,
        grace: Duration,
        mut each: impl FnMut(u64),
    ) -> Result<()> {
        for (digest, path) in self.digests_in(dir)? {
            if keep.contains(&digest) || !is_older(&path, grace) {
                continue;
            }
            let _lock = self.exclusive()?;
            let size = fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
            if is_older(&path, grace) && fs::remove_file(&path).is_ok() {
                each(size);
            }
        }
        Ok(())
    }

    fn sweep_layers(&self, keep: &BTreeSet<Digest>, grace: Duration, report: &mut GcReport) -> Result<()> {
        for (digest, path) in self.digests_in("layers")? {
            if keep.contains(&digest) || !is_older(&path, grace) {
                continue;
            }
            let temporary = self.temporary_name();
            {
                let _lock = self.exclusive()?;
                if !is_older(&path, grace) {
                    continue;
                }
                fs::rename(&path, &temporary).map_err(io("rename", &path))?;
            }
            fs::remove_dir_all(&temporary).map_err(io("remove", &temporary))?;
            report.layers += 1;
        }
        Ok(())
    }

    pub(super) fn digests_in(&self, dir: &str) -> Result<Vec<(Digest, std::path::PathBuf)>> {
        let path = self.root().join(dir);
        let entries = fs::read_dir(&path).map_err(io("list", &path))?;
        Ok(entries.flatten().filter_map(|e| Some((Digest::from_hex(e.file_name().to_str()?)?, e.path()))).collect())
    }

    /// Removes what is old and not held by anyone.
    fn sweep_old(&self, dir: &str, age: Duration) -> Result<u64> {
        let path = self.root().join(dir);
        let mut count = 0;
        for entry in fs::read_dir(&path).map_err(io("list", &path))?.flatten() {
            let path = entry.path();
            if !is_older(&path, age) {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(held) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
            if flock(&held, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let removed = match entry.file_type() {
                Ok(t) if t.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            count += u64::from(removed.is_ok());
        }
        Ok(count)
    }

    /// Deletes one blob at once, if no image has it. Whether it was there.
    pub fn blob_delete(&self, digest: &Digest) -> Result<bool> {
        let path = self.blob_path(digest);
        if !path.exists() {
            return Ok(false);
        }
        let _lock = self.exclusive()?;
        let mut marked = Marked::default();
        for repository in self.all_repositories()? {
            for record in self.manifest_records(&repository)? {
                self.mark_manifest(&record.digest, &mut marked)?;
            }
        }
        if marked.blobs.contains(digest) {
            return Err(Error::BlobInUse(*digest));
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io("remove", &path)(e)),
        }
    }
}

/// Children of another platform were never pulled.
fn absent_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        // A child that is no manifest (or a damaged one) names nothing; it must not stop the collection.
        Err(Error::BlobUnknown(_) | Error::Invalid { .. } | Error::TooLarge { .. } | Error::DigestMismatch { .. }) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

pub(crate) fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|m| m.modified());
    modified.is_ok_and(|m| SystemTime::now().duration_since(m).is_ok_and(|d| d >= age))
}
