//! Budgets: what is dropped although something still names it, because it is old or takes too much.

use super::{GcOptions, Marked};
use crate::build::cache;
use crate::digest::Digest;
use crate::error::Result;
use crate::lookup::Found;
use crate::store::Store;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A pulled image.
struct Pulled {
    name: String,
    used: SystemTime,
    /// Its blobs that are here, and the file system made of it.
    files: BTreeSet<PathBuf>,
}

impl Store {
    /// Takes the names of pulled images that are over the budget; what only they had is garbage then. How many.
    pub(super) fn evict(&self, options: &GcOptions) -> Result<u64> {
        if options.image_age.is_none() && options.image_bytes.is_none() {
            return Ok(0);
        }
        let mut images = self.unpinned()?;
        images.sort_by_key(|image| image.used);
        let mut uses: BTreeMap<PathBuf, (u64, u64)> = BTreeMap::new();
        for file in images.iter().flat_map(|i| &i.files) {
            // What it takes on the disk, where that is less than it seems: holes.
            let size = fs::metadata(file).map_or(0, |m| m.len().min(m.blocks() * 512));
            uses.entry(file.clone()).or_insert((0, size)).0 += 1;
        }
        let mut total: u64 = uses.values().map(|(_, size)| size).sum();
        let mut count = 0;
        for image in images {
            let old = options.image_age.is_some_and(|age| since(image.used) >= age);
            let over = options.image_bytes.is_some_and(|limit| total > limit);
            // One that is being pulled or started just now.
            if !(old || over) || since(image.used) < options.grace {
                continue;
            }
            self.remove(&image.name)?;
            count += 1;
            for file in &image.files {
                if let Some((left, size)) = uses.get_mut(file) {
                    *left -= 1;
                    if *left == 0 {
                        total -= *size;
                    }
                }
            }
        }
        Ok(count)
    }

    fn unpinned(&self) -> Result<Vec<Pulled>> {
        let mut pinned = BTreeSet::new();
        for owner in self.pin_owners()? {
            let entries = fs::read_dir(self.root().join("pins").join(owner)).into_iter().flatten().flatten();
            pinned.extend(entries.filter_map(|e| Digest::from_hex(e.file_name().to_str()?)));
        }
        let mut found = Vec::new();
        for repository in self.all_repositories()?.into_iter().filter(|r| r.host.is_some()) {
            for (tag, record) in self.tag_records(&repository)? {
                let mut marked = Marked::default();
                self.mark_manifest(&record.digest, &mut marked)?;
                let here = |digest: &Digest| fs::metadata(self.blob_path(digest)).and_then(|m| m.modified()).ok();
                if marked.blobs.iter().any(|d| pinned.contains(d)) {
                    continue;
                }
                // Whoever resolves an image touches its manifest, and its layers.
                let used = marked.blobs.iter().filter_map(here).max().unwrap_or(SystemTime::UNIX_EPOCH);
                let layers = marked
                    .layers
                    .iter()
                    .filter_map(|l| fs::symlink_metadata(self.layer_dir(l)).and_then(|m| m.modified()).ok());
                let used = layers.max().map_or(used, |layers| layers.max(used));
                let found_at = Found { repository: repository.clone(), tag: Some(tag), record };
                let blobs = marked.blobs.iter().map(|d| self.blob_path(d));
                let files = blobs.chain(marked.chains.iter().map(|c| self.block_path(c)));
                found.push(Pulled { name: found_at.name(), used, files: files.filter(|f| f.exists()).collect() });
            }
        }
        Ok(found)
    }

    /// Marks what the build cache keeps alive and forgets the steps that are over the budget. How many.
    pub(super) fn mark_build_cache(&self, options: &GcOptions, marked: &mut Marked) -> Result<u64> {
        let mut records: Vec<_> =
            self.digests_in("build")?.into_iter().map(|(_, path)| (modified(&path), path)).collect();
        records.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        let (mut bytes, mut count) = (0u64, 0);
        for (used, path) in records {
            let mut keep = since(used) < options.build_age;
            if keep && let Some((layer, diff_id)) = cache::read(&path).and_then(|c| c.layer) {
                let own = if marked.blobs.contains(&layer.digest) { 0 } else { layer.size };
                keep = bytes.saturating_add(own) <= options.build_bytes || since(used) < options.grace;
                if keep {
                    bytes += own;
                    marked.blobs.insert(layer.digest);
                    marked.layers.insert(diff_id);
                }
            }
            if keep {
                continue;
            }
            let _lock = self.exclusive()?;
            if modified(&path) == used && fs::remove_file(&path).is_ok() {
                count += 1;
            }
        }
        Ok(count)
    }
}

fn modified(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn since(time: SystemTime) -> Duration {
    SystemTime::now().duration_since(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::cache::Cached;
    use crate::reference::Reference;
    use crate::spec::{Descriptor, media};

    /// An artifact of one blob, pulled or not by what its name says.
    fn image(store: &Store, name: &str, size: usize, used: u64) -> Digest {
        let content: Vec<u8> = name.bytes().cycle().take(size).collect();
        let blob = store.blob_put(&content).unwrap();
        let layer = Descriptor::new("application/x", blob, size as u64);
        let names = [Reference::parse(name, &[]).unwrap()];
        let stored = store.store_manifest(&names, "application/y", None, name.as_bytes(), vec![layer]).unwrap();
        for digest in [blob, stored.digest, Digest::of(name.as_bytes())] {
            age(&store.blob_path(&digest), used);
        }
        stored.digest
    }

    fn age(path: &Path, hours: u64) {
        let time = SystemTime::now() - Duration::from_secs(hours * 3600);
        fs::File::open(path).unwrap().set_modified(time).unwrap();
    }

    fn names(store: &Store) -> Vec<String> {
        store.list().unwrap().into_iter().map(|i| i.name).collect()
    }

    #[test]
    fn pulled_images_go_by_age_and_size_but_pinned_and_own_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        image(&store, "own:1", 1000, 900);
        image(&store, "r.example/ancient:1", 1000, 800);
        image(&store, "r.example/old/er:1", 1000, 50);
        image(&store, "r.example/old:1", 1000, 40);
        image(&store, "r.example/recent/ly:1", 1000, 10);
        image(&store, "r.example/now:1", 1000, 0);
        let pinned = image(&store, "r.example/pinned/one:1", 1000, 900);
        store.pin("pod", &pinned).unwrap();
        let hours = |n: u64| Duration::from_secs(n * 3600);
        assert_eq!(store.gc(&GcOptions::default()).unwrap().images, 0, "without a budget none goes");
        let by_age = GcOptions { image_age: Some(hours(500)), ..GcOptions::default() };
        assert_eq!(store.gc(&by_age).unwrap().images, 1);
        let left = [
            "own:1",
            "r.example/now:1",
            "r.example/old/er:1",
            "r.example/old:1",
            "r.example/pinned/one:1",
            "r.example/recent/ly:1",
        ];
        assert_eq!(names(&store), left);
        // Four are evictable; each takes something over 1,000 bytes.
        let by_size = GcOptions { image_bytes: Some(3500), ..GcOptions::default() };
        let report = store.gc(&by_size).unwrap();
        assert_eq!((report.images, names(&store).len()), (2, 4), "{report:?}");
        assert!(!names(&store).iter().any(|n| n.contains("old")));
        assert!(report.bytes >= 2000);
        // What is used just now stays, however little there may be.
        store.gc(&GcOptions { image_bytes: Some(0), ..GcOptions::default() }).unwrap();
        assert_eq!(names(&store), ["own:1", "r.example/now:1", "r.example/pinned/one:1"]);
    }

    #[test]
    fn the_build_cache_keeps_to_its_budget() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let step = |n: u8, used: u64| {
            let blob = store.blob_put(&vec![n; 1000]).unwrap();
            let layer = Descriptor::new(media::OCI_LAYER, blob, 1000);
            let key = Digest::of(&[n]);
            store.cache_put(&key, &Cached::new(Some((layer, Digest::of(b"diff"))), 0)).unwrap();
            age(&store.root().join("build").join(key.hex()), used);
            age(&store.blob_path(&blob), used);
            blob
        };
        let blobs: Vec<Digest> = [(1, 2), (2, 20), (3, 200), (4, 2000)].map(|(n, used)| step(n, used)).to_vec();
        let there = || blobs.iter().map(|b| store.blob_open(b).unwrap().is_some()).collect::<Vec<_>>();
        let report = store.gc(&GcOptions::default()).unwrap();
        assert_eq!((report.steps, there()), (1, vec![true, true, true, false]), "by age");
        let report = store.gc(&GcOptions { build_bytes: 2500, ..GcOptions::default() }).unwrap();
        assert_eq!((report.steps, there()), (1, vec![true, true, false, false]), "by size, the longest unused first");
        fs::write(store.root().join("build").join(Digest::of(b"x").hex()), "damaged").unwrap();
        store.gc(&GcOptions { build_bytes: 0, ..GcOptions::default() }).unwrap();
        assert_eq!(there(), [false; 4]);
        fs::create_dir(store.root().join("caches").join(Digest::of(b"c").hex())).unwrap();
        let at_once = Duration::ZERO;
        store.gc(&GcOptions { build_age: at_once, ..GcOptions::default() }).unwrap();
        assert_eq!(fs::read_dir(store.root().join("caches")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(store.root().join("build")).unwrap().count(), 0);
    }
}
