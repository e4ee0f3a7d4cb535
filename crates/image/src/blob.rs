//! Blobs: immutable files named by the digest of their content.

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io};
use crate::store::{Store, sync_dir};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// An open blob. Stays readable even if garbage collection takes its name.
pub struct Blob {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    pub file: File,
}

impl Store {
    /// Opens a blob, if it is here.
    pub fn blob_open(&self, digest: &Digest) -> Result<Option<Blob>> {
        let path = self.blob_path(digest);
        match File::open(&path) {
            Ok(file) => {
                let size = file.metadata().map_err(io("stat", &path))?.len();
                Ok(Some(Blob { digest: *digest, size, file }))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io("open", &path)(e)),
        }
    }

    /// Size of a blob that is here, and a promise: it stays for the grace period of garbage collection, so that a
    /// client told "it exists" can still refer to it.
    pub fn blob_claim(&self, digest: &Digest) -> Result<Option<u64>> {
        let _lock = self.shared()?;
        self.blob_claim_locked(digest)
    }

    pub(crate) fn blob_claim_locked(&self, digest: &Digest) -> Result<Option<u64>> {
        let path = self.blob_path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => {
                touch(&path)?;
                Ok(Some(metadata.len()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io("stat", &path)(e)),
        }
    }

    /// Reads a whole small blob, checking its digest.
    pub fn blob_read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let blob = self.blob_open(digest)?.ok_or(Error::BlobUnknown(*digest))?;
        let bytes = read_limited(blob.file, limit, &format!("blob {digest}"))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::DigestMismatch { what: format!("blob {digest}"), expected: *digest, actual });
        }
        Ok(bytes)
    }

    pub fn blob_writer(&self) -> Result<BlobWriter<'_>> {
        let (path, file) = self.temporary_file()?;
        Ok(BlobWriter { store: self, path: Some(path), file, hasher: Hasher::default(), hole: 0 })
    }

    pub(crate) fn blob_put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if self.blob_claim(&digest)?.is_some() {
            return Ok(digest);
        }
        let mut writer = self.blob_writer()?;
        writer.write(bytes)?;
        writer.commit(Some(digest)).map(|(digest, _)| digest)
    }

    /// Copies a reader into a blob; digest and size are checked where they are known.
    pub(crate) fn blob_copy(
        &self,
        what: &str,
        mut reader: impl Read,
        expected: Option<(Digest, u64)>,
        mut each: impl FnMut(u64),
    ) -> Result<(Digest, u64)> {
        let limit = expected.map_or(self.limits().blob_bytes, |(_, size)| size);
        let mut writer = self.blob_writer()?;
        let mut buffer = vec![0u8; 256 * 1024];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(io("read", what)(e)),
            };
            writer.write(buffer.get(..n).unwrap_or_default())?;
            if writer.length() > limit {
                return Err(match expected {
                    Some((_, size)) => {
                        Error::SizeMismatch { what: what.into(), expected: size, actual: writer.length() }
                    }
                    None => Error::TooLarge { what: what.into(), limit },
                });
            }
            each(writer.length());
        }
        if let Some((_, size)) = expected
            && writer.length() != size
        {
            return Err(Error::SizeMismatch { what: what.into(), expected: size, actual: writer.length() });
        }
        writer.commit_named(what, expected.map(|(digest, _)| digest))
    }

    /// Gives a complete, synced temporary file its final name.
    pub(crate) fn blob_adopt(&self, temporary: &Path, file: &File, digest: &Digest) -> Result<()> {
        let path = self.blob_path(digest);
        file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(io("chmod", temporary))?;
        file.sync_all().map_err(io("sync", temporary))?;
        let _lock = self.shared()?;
        if self.blob_claim_locked(digest)?.is_some() {
            let _ = fs::remove_file(temporary);
            return Ok(());
        }
        fs::rename(temporary, &path).map_err(io("rename into place", &path))?;
        touch(&path)?;
        sync_dir(&self.root().join("blobs/sha256"))
    }
}

/// Writes a blob whose digest may not be known yet. Dropped without `commit`, it leaves nothing. Long runs of zeros
/// become holes.
pub struct BlobWriter<'a> {
    store: &'a Store,
    path: Option<PathBuf>,
    file: File,
    hasher: Hasher,
    /// Zero bytes at the end not written yet.
    hole: u64,
}

const BLOCK: usize = 64 * 1024;

impl BlobWriter<'_> {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        for piece in bytes.chunks(BLOCK) {
            if piece.len() == BLOCK && is_zero(piece) {
                self.hole += BLOCK as u64;
                continue;
            }
            let result = if self.hole > 0 {
                let skip = self.hole as i64;
                self.hole = 0;
                self.file.seek(SeekFrom::Current(skip)).and_then(|_| self.file.write_all(piece))
            } else {
                self.file.write_all(piece)
            };
            result.map_err(|e| io("write", self.path.as_deref().unwrap_or(Path::new("")))(e))?;
        }
        Ok(())
    }

    /// Bytes written so far.
    pub fn length(&self) -> u64 {
        self.hasher.length()
    }

    /// Syncs, checks and names the blob. Returns digest and size.
    pub fn commit(self, expected: Option<Digest>) -> Result<(Digest, u64)> {
        self.commit_named("blob", expected)
    }

    fn commit_named(mut self, what: &str, expected: Option<Digest>) -> Result<(Digest, u64)> {
        let length = self.length();
        let actual = std::mem::take(&mut self.hasher).finish();
        if let Some(expected) = expected
            && expected != actual
        {
            return Err(Error::DigestMismatch { what: what.to_owned(), expected, actual });
        }
        let path = self.path.clone().unwrap_or_default();
        if self.hole > 0 {
            self.file.set_len(length).map_err(io("extend", &path))?;
        }
        self.store.blob_adopt(&path, &self.file, &actual)?;
        self.path = None;
        Ok((actual, length))
    }
}

impl Write for BlobWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        BlobWriter::write(self, bytes).map_err(std::io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for BlobWriter<'_> {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

/// Sets the modification time to now: garbage collection's grace begins anew.
pub(crate) fn touch(path: &Path) -> Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW as _ };
    let times = Timestamps { last_access: now, last_modification: now };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(io("touch", path))
}

pub(crate) fn read_limited(reader: impl Read, limit: u64, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(limit + 1).read_to_end(&mut bytes).map_err(io("read", what))?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge { what: what.to_owned(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn blobs_are_what_they_are_called_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = store.blob_put(b"hello").unwrap();
        assert_eq!(store.blob_read(&digest, 5).unwrap(), b"hello");
        assert!(matches!(store.blob_read(&digest, 4), Err(Error::TooLarge { .. })));
        assert!(store.blob_copy("x", &b"hellO"[..], Some((digest, 5)), |_| ()).is_err());
        assert!(store.blob_copy("x", &b"hell"[..], Some((digest, 5)), |_| ()).is_err());
        assert!(store.blob_copy("x", &b"hello!"[..], Some((digest, 5)), |_| ()).is_err());
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn zeros_become_holes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut content = vec![0u8; 8 << 20];
        content[5 << 20] = 7;
        content.extend([0; 100]);
        let (digest, size) = store.blob_copy("disk", &content[..], None, |_| ()).unwrap();
        assert_eq!((digest, size), (Digest::of(&content), content.len() as u64));
        assert_eq!(fs::read(store.blob_path(&digest)).unwrap(), content);
        assert!(fs::metadata(store.blob_path(&digest)).unwrap().blocks() * 512 < 1 << 20);
    }
}
