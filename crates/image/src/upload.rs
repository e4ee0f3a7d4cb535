//! Uploads of the registry: blobs that arrive in pieces. An upload is a file; it survives a restart of the program.

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io};
use crate::reference::Repository;
use crate::store::Store;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Hash states remembered between the pieces of uploads.
const REMEMBERED: usize = 64;

/// An upload, held by one request at a time.
pub struct Upload<'a> {
    store: &'a Store,
    id: String,
    path: PathBuf,
    file: File,
    /// `None` until the bytes already there have been read.
    hasher: Option<Hasher>,
    length: u64,
}

impl Store {
    /// Begins an upload.
    pub fn upload_new(&self) -> Result<Upload<'_>> {
        let mut random = [0u8; 16];
        let source = PathBuf::from("/dev/urandom");
        File::open(&source).and_then(|mut f| f.read_exact(&mut random)).map_err(io("read", &source))?;
        let id: String = random.iter().map(|b| format!("{b:02x}")).collect();
        let path = self.root().join("uploads").join(&id);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io("create", &path))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io("lock", &path))?;
        Ok(Upload { store: self, id, path, file, hasher: Some(Hasher::default()), length: 0 })
    }

    /// Continues an upload, also one begun before a restart.
    pub fn upload_open(&self, id: &str) -> Result<Upload<'_>> {
        let path = self.upload_path(id)?;
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(Error::UploadUnknown(id.to_owned())),
            Err(e) => return Err(io("open", &path)(e)),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::UploadBusy(id.to_owned())),
            Err(e) => return Err(io("lock", &path)(e)),
        }
        let length = file.metadata().map_err(io("stat", &path))?.len();
        let remembered = self.upload_hashers.lock().ok().and_then(|mut all| all.remove(id));
        let hasher = remembered.filter(|h| h.length() == length).or((length == 0).then(Hasher::default));
        let mut upload = Upload { store: self, id: id.to_owned(), path, file, hasher, length };
        upload.file.seek(SeekFrom::Start(length)).map_err(io("seek", &upload.path))?;
        Ok(upload)
    }

    /// Bytes an upload has, without taking hold of it.
    pub fn upload_length(&self, id: &str) -> Result<u64> {
        match fs::metadata(self.upload_path(id)?) {
            Ok(metadata) => Ok(metadata.len()),
            Err(_) => Err(Error::UploadUnknown(id.to_owned())),
        }
    }

    /// Uploads that are neither finished, cancelled nor expired.
    pub fn upload_count(&self) -> Result<usize> {
        let path = self.root().join("uploads");
        Ok(fs::read_dir(&path).map_err(io("list", &path))?.count())
    }

    pub fn upload_cancel(&self, id: &str) -> Result<()> {
        let upload = self.upload_open(id)?;
        fs::remove_file(&upload.path).map_err(io("remove", &upload.path))
    }

    fn upload_path(&self, id: &str) -> Result<PathBuf> {
        if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Error::UploadUnknown(id.chars().take(64).collect()));
        }
        Ok(self.root().join("uploads").join(id))
    }
}

impl Upload<'_> {
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Refuses a piece that does not begin where the upload stands.
    pub fn expect_at(&self, sent: u64) -> Result<()> {
        if sent == self.length {
            return Ok(());
        }
        Err(Error::UploadRange { id: self.id.clone(), at: self.length, sent })
    }

    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let limit = self.store.limits().blob_bytes;
        if self.length + bytes.len() as u64 > limit {
            return Err(Error::TooLarge { what: format!("upload {}", self.id), limit });
        }
        self.file.write_all(bytes).map_err(io("write", &self.path))?;
        self.length += bytes.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        Ok(())
    }

    /// Checks the digest and makes it a blob, of a repository if one is named. On a mismatch the upload stays, to be
    /// cancelled or expire.
    pub fn finish(mut self, expected: &Digest, repository: Option<&Repository>) -> Result<u64> {
        let actual = match self.hasher.take() {
            Some(hasher) => hasher.finish(),
            None => {
                let mut hasher = Hasher::default();
                self.file.seek(SeekFrom::Start(0)).map_err(io("seek", &self.path))?;
                hasher.consume(&self.file).map_err(io("read", &self.path))?;
                hasher.finish()
            }
        };
        if actual != *expected {
            return Err(Error::DigestMismatch { what: format!("upload {}", self.id), expected: *expected, actual });
        }
        if let Some(repository) = repository {
            self.store.blob_link(repository, expected)?;
        }
        self.store.blob_adopt(&self.path, &self.file, expected)?;
        Ok(self.length)
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if let Some(hasher) = self.hasher.take()
            && let Ok(mut all) = self.store.upload_hashers.lock()
        {
            if all.len() >= REMEMBERED {
                all.clear();
            }
            all.insert(std::mem::take(&mut self.id), hasher);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_survives_a_restart_and_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut upload = store.upload_new().unwrap();
        let id = upload.id().to_owned();
        upload.append(b"hel").unwrap();
        assert!(matches!(store.upload_open(&id), Err(Error::UploadBusy(_))));
        drop(upload);
        drop(store);

        let store = Store::open(dir.path()).unwrap();
        let mut upload = store.upload_open(&id).unwrap();
        assert_eq!(upload.length(), 3);
        assert!(matches!(upload.expect_at(2), Err(Error::UploadRange { at: 3, sent: 2, .. })));
        upload.append(b"lo").unwrap();
        assert!(upload.finish(&Digest::of(b"other"), None).is_err());
        store.upload_open(&id).unwrap().finish(&Digest::of(b"hello"), None).unwrap();
        assert!(matches!(store.upload_open(&id), Err(Error::UploadUnknown(_))));
        assert_eq!(store.blob_read(&Digest::of(b"hello"), 10).unwrap(), b"hello");
        for bad in ["", "../../../etc/passwd", &"x".repeat(32)] {
            assert!(matches!(store.upload_open(bad), Err(Error::UploadUnknown(_))));
        }
    }
}
