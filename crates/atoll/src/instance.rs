//! One data directory: its format version, its lock, and the run directory that goes with it.

use crate::cli::Failure;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Format of the data directory that this program writes.
const VERSION: u32 = 1;
const MARK: &str = "atoll-data";
/// How long a second `atoll up` waits for the first to let go of lock, ports and store.
const PATIENCE: Duration = Duration::from_secs(1);

pub struct Instance {
    pub data_dir: PathBuf,
    /// `/run/atoll/<8 hex>`: sockets and pinned namespaces.
    pub run_dir: PathBuf,
}

/// Held while `atoll up` runs.
pub struct Lock(#[allow(dead_code)] File);

fn fail(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let text = format!("{what} {}", path.display());
    move |error| Failure(format!("{text}: {error}"))
}

impl Instance {
    /// Makes the directory, or checks that what is there is ours and not from a newer program.
    pub fn open(data_dir: &Path) -> Result<Self, Failure> {
        let fresh = !data_dir.exists();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir)
            .map_err(fail("--data-dir: cannot create", data_dir))?;
        let data_dir = data_dir.canonicalize().map_err(fail("--data-dir:", data_dir))?;
        let version = data_dir.join("version");
        match fs::read_to_string(&version) {
            Ok(text) => check_version(&text, &version)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let strange = fs::read_dir(&data_dir)
                    .map_err(fail("read", &data_dir))?
                    .flatten()
                    .find(|e| e.file_name() != "images");
                if let (false, Some(entry)) = (fresh, strange) {
                    return Err(Failure(format!(
                        "--data-dir: {} is not empty and not Atoll's (it holds {:?}); name an empty or new directory",
                        data_dir.display(),
                        entry.file_name()
                    )));
                }
                write_synced(&version, format!("{MARK} {VERSION}\n").as_bytes())?;
            }
            Err(error) => return Err(fail("read", &version)(error)),
        }
        fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o700)).map_err(fail("set mode of", &data_dir))?;
        let hash = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
        let id: String = hash.iter().take(4).map(|b| format!("{b:02x}")).collect();
        Ok(Instance { run_dir: Path::new("/run/atoll").join(id), data_dir })
    }

    /// The data directory of something that must exist already.
    pub fn existing(data_dir: &Path) -> Result<Self, Failure> {
        if !data_dir.join("version").exists() {
            return Err(Failure(format!(
                "--data-dir: {} holds no Atoll; name the one given to `atoll up`",
                data_dir.display()
            )));
        }
        Self::open(data_dir)
    }

    fn lock_path(&self) -> PathBuf {
        self.data_dir.join("lock")
    }

    /// Refuses a second `atoll up` on the same directory.
    pub fn lock(&self) -> Result<Lock, Failure> {
        let path = self.lock_path();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(fail("open", &path))?;
        if patiently(|_| true, || file.try_lock()).is_err() {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            return Err(Failure(format!(
                "--data-dir: {} is in use by `atoll up`, pid {}; stop that one (atoll down) or name another directory",
                self.data_dir.display(),
                pid.trim()
            )));
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            write!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(fail("write", &path))?;
        Ok(Lock(file))
    }

    /// The pid of the running `atoll up`, if one holds the lock.
    pub fn running(&self) -> Option<i32> {
        let mut file = File::open(self.lock_path()).ok()?;
        if file.try_lock_shared().is_ok() {
            return None;
        }
        let mut pid = String::new();
        file.read_to_string(&mut pid).ok()?;
        pid.trim().parse().ok()
    }
}

/// Tries again for a moment while something is `busy`: the kernel needs one to clear up what a process held that was just
/// killed.
pub fn patiently<T, E>(busy: impl Fn(&E) -> bool, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if busy(&error) && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            outcome => return outcome,
        }
    }
}

fn check_version(text: &str, path: &Path) -> Result<(), Failure> {
    let found = text.trim().strip_prefix(MARK).and_then(|rest| rest.trim().parse::<u32>().ok());
    match found {
        Some(VERSION) => Ok(()),
        Some(newer) if newer > VERSION => Err(Failure(format!(
            "{}: data directory is of version {newer}; this atoll knows up to {VERSION}: run the newer atoll, or name another --data-dir",
            path.display()
        ))),
        _ => Err(Failure(format!(
            "{}: not a version Atoll wrote: {:?}",
            path.display(),
            text.chars().take(40).collect::<String>()
        ))),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let new = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(path))?.sync_all()
    };
    write().map_err(fail("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_foreign_and_busy_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let instance = Instance::open(&data).unwrap();
        let lock = instance.lock().unwrap();
        assert!(instance.lock().err().unwrap().0.contains("in use by `atoll up`"));
        assert_eq!(instance.running(), Some(std::process::id() as i32));
        drop(lock);
        assert_eq!(instance.running(), None);

        fs::write(data.join("version"), "atoll-data 2\n").unwrap();
        assert!(Instance::open(&data).err().unwrap().0.contains("knows up to 1"));
        fs::write(data.join("version"), "whatever").unwrap();
        assert!(Instance::open(&data).err().unwrap().0.contains("not a version"));

        let foreign = dir.path().join("home");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("letter.txt"), "dear").unwrap();
        assert!(Instance::open(&foreign).err().unwrap().0.contains("not empty"));
        assert!(!foreign.join("version").exists());
    }
}
