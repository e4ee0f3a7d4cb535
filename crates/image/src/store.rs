//! The store's directory: opening, locking, temporary names, durable writes.

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// First line of the marker file.
const FORMAT: &str = "atoll images 1";
/// Kinds of directories the store is made of.
const DIRECTORIES: [&str; 12] = [
    "blobs/sha256",
    "refs",
    "layers",
    "disks",
    "blocks",
    "pins",
    "uploads",
    "partial",
    "tmp",
    "locks",
    "build",
    "caches",
];

/// What one foreign image may cost.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes one layer may unpack to.
    pub layer_bytes: u64,
    /// Entries of one layer.
    pub layer_entries: u64,
    /// A layer may unpack to this many times its compressed size, once past `ratio_floor` bytes.
    pub ratio: u64,
    pub ratio_floor: u64,
    /// Bytes of a blob pushed, pulled or imported.
    pub blob_bytes: u64,
    /// Bytes of an image configuration.
    pub config_bytes: u64,
    /// Layers of one image.
    pub layers: usize,
    /// Files and directories of an image's file system, all layers together, where it is made one block device.
    pub block_inodes: u64,
    /// Bytes of that device, holes included.
    pub block_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            layer_bytes: 64 << 30,
            layer_entries: 2_000_000,
            ratio: 200,
            ratio_floor: 1 << 30,
            blob_bytes: 1 << 40,
            config_bytes: 8 << 20,
            layers: 500,
            block_inodes: 4_000_000,
            block_bytes: 256 << 30,
        }
    }
}

/// What a long operation is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Step(String),
    Bytes { what: String, done: u64, total: Option<u64> },
}

pub type ProgressFn<'a> = &'a (dyn Fn(Progress) + Sync);

/// For callers who do not care about progress.
pub fn silent(_: Progress) {}

/// An open store. Cheap to share behind an `Arc`; any number of processes may have the same directory open.
pub struct Store {
    root: PathBuf,
    local_hosts: Vec<String>,
    limits: Limits,
    collection: crate::gc::GcOptions,
    roles: Option<crate::jailed::Roles>,
    /// Hash states of uploads under way, so that an upload in many pieces is read once.
    pub(crate) upload_hashers: Mutex<HashMap<String, Hasher>>,
}

/// Held while references are made (shared) or garbage is taken (exclusive).
pub(crate) struct StoreLock(#[allow(dead_code, reason = "dropping it unlocks")] File);

impl Store {
    /// Opens the store, making it if the directory is absent or empty.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        let root = dir.as_ref().to_path_buf();
        make_dir(&root, 0o700)?;
        let root = root.canonicalize().map_err(io("open", &root))?;
        let lock_path = root.join("lock");
        let lock = lock_file(&lock_path)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(io("lock", &lock_path))?;
        let marker = root.join("version");
        match fs::read_to_string(&marker) {
            Ok(text) if text.trim_end() == FORMAT => {}
            Ok(text) => {
                let found = text.chars().take(80).collect::<String>().trim_end().to_owned();
                return Err(Error::Version { path: root, found, supported: FORMAT });
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let strangers = fs::read_dir(&root).map_err(io("list", &root))?.flatten().any(|e| {
                    let name = e.file_name();
                    name != "lock" && !DIRECTORIES.iter().any(|d| name == d.split('/').next().unwrap_or(d))
                });
                if strangers {
                    return Err(Error::Unrecognised {
                        path: root,
                        why: "it is neither empty nor an image store; choose another directory".into(),
                    });
                }
                for name in DIRECTORIES {
                    make_dir(&root.join(name), 0o700)?;
                }
                write_durably(&root, &marker, format!("{FORMAT}\n").as_bytes(), 0o644)?;
            }
            Err(e) => return Err(io("read", &marker)(e)),
        }
        for name in DIRECTORIES {
            make_dir(&root.join(name), 0o700)?;
        }
        drop(lock);
        Ok(Store {
            root,
            local_hosts: vec!["127.0.0.1:5000".into(), "localhost:5000".into(), "localhost".into()],
            limits: Limits::default(),
            collection: crate::gc::GcOptions::default(),
            roles: None,
            upload_hashers: Mutex::default(),
        })
    }

    /// Replaces the registry hosts (`host:port`) that mean this store itself.
    pub fn with_local_hosts(mut self, hosts: impl IntoIterator<Item = String>) -> Store {
        self.local_hosts = hosts.into_iter().collect();
        self
    }

    /// Decompresses and unpacks in processes of their own. Without it (tests, fuzz targets) this process does it.
    pub fn with_roles(mut self, exe: PathBuf) -> Store {
        self.roles = Some(crate::jailed::Roles { exe });
        self
    }

    pub(crate) fn roles(&self) -> Option<&crate::jailed::Roles> {
        self.roles.as_ref()
    }

    pub fn with_limits(mut self, limits: Limits) -> Store {
        self.limits = limits;
        self
    }

    /// How whoever collects garbage regularly is to do it.
    pub fn with_collection(mut self, options: crate::gc::GcOptions) -> Store {
        self.collection = options;
        self
    }

    pub fn collection(&self) -> &crate::gc::GcOptions {
        &self.collection
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn local_hosts(&self) -> &[String] {
        &self.local_hosts
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn shared(&self) -> Result<StoreLock> {
        self.lock(FlockOperation::LockShared)
    }

    pub(crate) fn exclusive(&self) -> Result<StoreLock> {
        self.lock(FlockOperation::LockExclusive)
    }

    fn lock(&self, operation: FlockOperation) -> Result<StoreLock> {
        let path = self.root.join("lock");
        let file = lock_file(&path)?;
        flock(&file, operation).map_err(io("lock", &path))?;
        Ok(StoreLock(file))
    }

    /// One writer per name across processes: unpacking one layer, downloading one blob. Waits.
    pub(crate) fn named_lock(&self, name: &str) -> Result<File> {
        loop {
            if let Some(lock) = self.lock_named(name, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// The same without waiting.
    pub(crate) fn try_named_lock(&self, name: &str) -> Result<Option<File>> {
        self.lock_named(name, FlockOperation::NonBlockingLockExclusive)
    }

    fn lock_named(&self, name: &str, operation: FlockOperation) -> Result<Option<File>> {
        let path = self.root.join("locks").join(name);
        let file = lock_file(&path)?;
        match flock(&file, operation) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(io("lock", &path)(e)),
        }
        // The previous holder may have removed the file while this one waited for it.
        match (rustix::fs::fstat(&file), rustix::fs::stat(&path)) {
            (Ok(a), Ok(b)) if a.st_ino == b.st_ino => Ok(Some(file)),
            (Ok(_), Ok(_) | Err(rustix::io::Errno::NOENT)) => Ok(None),
            (Err(e), _) | (_, Err(e)) => Err(io("stat", &path)(e)),
        }
    }

    /// Removes the lock file of a name whose work is done for good. Call it while the lock is held.
    pub(crate) fn forget_lock(&self, name: &str, held: File) {
        let _ = fs::remove_file(self.root.join("locks").join(name));
        drop(held);
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    /// A name in `tmp/` that no one has used.
    pub(crate) fn temporary_name(&self) -> PathBuf {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        self.root.join("tmp").join(format!("{now:x}-{}-{n}", std::process::id()))
    }

    /// A new file in `tmp/`, flocked so that garbage collection knows its writer lives.
    pub(crate) fn temporary_file(&self) -> Result<(PathBuf, File)> {
        let path = self.temporary_name();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io("create", &path))?;
        flock(&file, FlockOperation::LockExclusive).map_err(io("lock", &path))?;
        Ok((path, file))
    }

    /// A new directory in `tmp/`, flocked likewise.
    pub(crate) fn temporary_dir(&self) -> Result<(PathBuf, OwnedFd)> {
        let path = self.temporary_name();
        DirBuilder::new().mode(0o700).create(&path).map_err(io("create", &path))?;
        let fd = open_dir(&path)?;
        flock(&fd, FlockOperation::LockExclusive).map_err(io("lock", &path))?;
        Ok((path, fd))
    }

    /// Writes a small file under its final name: temporary, synced, renamed, directory synced.
    pub(crate) fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        write_durably(&self.root, path, bytes, 0o600)
    }
}

fn lock_file(path: &Path) -> Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(io("open", path))
}

pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(io("create directory", path))
}

pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::empty()).map_err(io("open directory", path))
}

pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    let fd = open_dir(path)?;
    rustix::fs::fsync(fd).map_err(io("sync directory", path))
}

fn write_durably(root: &Path, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = root.join("tmp").join(format!("small-{}-{n}", std::process::id()));
    let result = (|| {
        let _ = fs::remove_file(&temporary);
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if let Err(source) = result {
        let _ = fs::remove_file(&temporary);
        return Err(io("write", path)(source));
    }
    match path.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_store_is_refused_and_a_strange_directory_too() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        drop(Store::open(dir.path()).unwrap());
        fs::write(dir.path().join("version"), "atoll images 2\n").unwrap();
        assert!(matches!(Store::open(dir.path()), Err(Error::Version { .. })));
        let strange = tempfile::tempdir().unwrap();
        fs::write(strange.path().join("thesis.txt"), "").unwrap();
        assert!(matches!(Store::open(strange.path()), Err(Error::Unrecognised { .. })));
    }
}
