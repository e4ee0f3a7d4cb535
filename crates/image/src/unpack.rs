//! From a layer blob to a directory that overlayfs can have as a lower one.
//!
//! The stream passes, in this order: a counter of compressed bytes, the decompressor, a guard that hashes (the diff id)
//! and stops bombs, the tar reader, the [`tree::Tree`] that makes files beneath one directory descriptor. Decompressor and
//! everything from the tar reader on are processes of their own ([`crate::jailed`]) where the store was told of a program
//! that has the roles.

pub(crate) mod tree;

use crate::blob::touch;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io};
use crate::jailed::{Input, Plain, Roles, Unpacker};
use crate::store::{Limits, Store, sync_dir};
use crate::tar::Archive;
use std::fs::{self, File};
use std::io::{self as stdio, BufReader, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tree::Tree;

/// How a layer blob is compressed: told by its first bytes, not by its media type, which may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
    /// Of kernel packages alone; layers in it are refused.
    Xz,
}

impl Compression {
    /// From the first bytes. Formats known but not supported are refused by name.
    pub fn detect(head: &[u8]) -> std::result::Result<Compression, &'static str> {
        match head {
            [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err("it is compressed with xz; unpack it with `xz -d` first"),
            [b'B', b'Z', b'h', ..] => Err("it is compressed with bzip2; unpack it with `bzip2 -d` first"),
            _ => Ok(Compression::None),
        }
    }

    pub fn decoder<'a>(self, reader: impl Read + 'a) -> stdio::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Compression::None => Box::new(reader),
            Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(reader)),
            Compression::Zstd => Box::new(zstd::Decoder::new(reader)?),
            Compression::Xz => Box::new(lzma_rust2::XzReader::new(reader, true)),
        })
    }
}

/// Counts bytes on their way into a decompressor.
struct Counting<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> stdio::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Hashes decompressed bytes and refuses too many of them.
pub(crate) struct Guard<R> {
    inner: R,
    hasher: Hasher,
    compressed: Arc<AtomicU64>,
    limits: Limits,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> stdio::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..n).unwrap_or_default());
        let out = self.hasher.length();
        let compressed = self.compressed.load(Ordering::Relaxed);
        if out > self.limits.layer_bytes {
            return Err(stdio::Error::other(format!("it unpacks to more than {} bytes", self.limits.layer_bytes)));
        }
        if out > self.limits.ratio_floor && out / self.limits.ratio > compressed {
            return Err(stdio::Error::other(format!(
                "it unpacks to more than {} times its size: a decompression bomb",
                self.limits.ratio
            )));
        }
        Ok(n)
    }
}

/// Decompresses under limits, in a process of its own if there is a program for it.
pub(crate) fn guarded(
    source: Input,
    compression: Compression,
    limits: &Limits,
    roles: Option<&Roles>,
) -> stdio::Result<Guard<Box<dyn Read>>> {
    let count = Arc::new(AtomicU64::new(0));
    let source = match source {
        Input::File(file) => {
            count.store(file.metadata()?.len(), Ordering::Relaxed);
            Input::File(file)
        }
        Input::Stream(inner) => Input::Stream(Box::new(Counting { inner, count: count.clone() })),
    };
    let inner: Box<dyn Read> = match (roles, source) {
        (Some(roles), source) if compression != Compression::None => {
            Box::new(Plain::start(roles, compression, source)?)
        }
        (_, Input::File(file)) => compression.decoder(BufReader::with_capacity(256 << 10, file))?,
        (_, Input::Stream(stream)) => compression.decoder(BufReader::with_capacity(256 << 10, stream))?,
    };
    Ok(Guard { inner, hasher: Hasher::default(), compressed: count, limits: limits.clone() })
}

/// Reads until the buffer is full or nothing is left.
pub(crate) fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> stdio::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|r| !r.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == stdio::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

impl<R> Guard<R> {
    pub fn into_hasher(self) -> Hasher {
        self.hasher
    }
}

impl Store {
    /// Makes sure a layer is unpacked. Other processes wanting the same wait.
    pub(crate) fn ensure_layer(&self, diff_id: &Digest, blob: &Digest) -> Result<()> {
        if self.layer_claim(diff_id)? {
            return Ok(());
        }
        let name = format!("layer-{}", diff_id.hex());
        let lock = self.named_lock(&name)?;
        if !self.layer_claim(diff_id)? {
            self.unpack_blob(blob, Some(diff_id))?;
        }
        self.forget_lock(&name, lock);
        Ok(())
    }

    /// Whether a layer is here; if so it stays for the grace period.
    pub(crate) fn layer_claim(&self, diff_id: &Digest) -> Result<bool> {
        let _lock = self.shared()?;
        let dir = self.layer_dir(diff_id);
        match fs::symlink_metadata(&dir) {
            Ok(_) => touch(&dir).map(|()| true),
            Err(e) if e.kind() == stdio::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io("stat", &dir)(e)),
        }
    }

    /// Unpacks a layer blob into its place and tells its diff id, which must be the expected one if that is known.
    pub(crate) fn unpack_blob(&self, blob: &Digest, expected: Option<&Digest>) -> Result<Digest> {
        let opened = self.blob_open(blob)?.ok_or(Error::BlobUnknown(*blob))?;
        let (temporary, dir) = self.temporary_dir()?;
        let result = self.unpack_into(blob, opened.file, &temporary, expected);
        drop(dir);
        match result {
            Ok(diff_id) => Ok(diff_id),
            Err(e) => {
                let _ = fs::remove_dir_all(&temporary);
                Err(e)
            }
        }
    }

    fn unpack_into(
        &self,
        blob: &Digest,
        mut file: File,
        temporary: &std::path::Path,
        expected: Option<&Digest>,
    ) -> Result<Digest> {
        let layer = blob.to_string();
        let archive_error = |why: String| Error::Archive { layer: layer.clone(), why };
        let compression = sniff(&mut file).map_err(io("read", &layer))?.map_err(|why| archive_error(why.to_owned()))?;
        let diff_id = self.unpack_source(&layer, compression, Input::File(file), temporary, expected)?;
        self.layer_adopt(temporary, &diff_id)?;
        Ok(diff_id)
    }

    /// Unpacks into a directory that has no final name yet; all of it is on the disk then.
    pub(crate) fn unpack_source(
        &self,
        layer: &str,
        compression: Compression,
        source: Input,
        temporary: &std::path::Path,
        expected: Option<&Digest>,
    ) -> Result<Digest> {
        let archive_error = |why: String| Error::Archive { layer: layer.to_owned(), why };
        let content = temporary.join("fs");
        crate::store::make_dir(&content, 0o755)?;
        let root = crate::store::open_dir(&content)?;
        // Modes are set explicitly, but `mkdir` above obeyed the umask.
        rustix::fs::fchmod(&root, rustix::fs::Mode::from_raw_mode(0o755)).map_err(io("chmod", &content))?;

        let guard =
            guarded(source, compression, self.limits(), self.roles()).map_err(|e| archive_error(e.to_string()))?;
        let (opaque, diff_id) = match self.roles() {
            Some(roles) => self.unpack_jailed(roles, layer, guard, &root)?,
            None => {
                let mut archive = Archive::new(guard);
                let own = root.try_clone().map_err(io("open", &content))?;
                let opaque = Tree::new(own, layer).fill(&mut archive, self.limits().layer_entries)?;
                // The diff id covers what follows the end mark too.
                let mut guard = archive.into_inner();
                stdio::copy(&mut guard, &mut stdio::sink()).map_err(|e| archive_error(e.to_string()))?;
                (opaque, guard.into_hasher().finish())
            }
        };
        if let Some(expected) = expected
            && *expected != diff_id
        {
            return Err(Error::DigestMismatch {
                what: format!("layer {layer} unpacked"),
                expected: *expected,
                actual: diff_id,
            });
        }
        tree::mark_opaque(&root, layer, &opaque)?;
        rustix::fs::syncfs(&root).map_err(io("sync", &content))?;
        Ok(diff_id)
    }

    fn unpack_jailed(
        &self,
        roles: &Roles,
        layer: &str,
        mut plain: Guard<Box<dyn Read>>,
        root: &OwnedFd,
    ) -> Result<(Vec<Vec<u8>>, Digest)> {
        let mut unpacker = Unpacker::start(roles, layer, root, self.limits())?;
        let mut buffer = vec![0u8; 256 << 10];
        loop {
            let n = fill(&mut plain, &mut buffer)
                .map_err(|e| Error::Archive { layer: layer.to_owned(), why: e.to_string() })?;
            if n == 0 || !unpacker.feed(buffer.get(..n).unwrap_or_default())? {
                break;
            }
        }
        let opaque = unpacker.finish()?;
        Ok((opaque, plain.into_hasher().finish()))
    }

    pub(crate) fn layer_adopt(&self, temporary: &std::path::Path, diff_id: &Digest) -> Result<()> {
        let dir = self.layer_dir(diff_id);
        let _lock = self.shared()?;
        match fs::rename(temporary, &dir) {
            Ok(()) => {}
            // Someone else unpacked the same content meanwhile.
            Err(e) if matches!(e.kind(), stdio::ErrorKind::AlreadyExists | stdio::ErrorKind::DirectoryNotEmpty) => {
                fs::remove_dir_all(temporary).map_err(io("remove", temporary))?;
            }
            Err(e) => return Err(io("rename into place", &dir)(e)),
        }
        touch(&dir)?;
        sync_dir(&self.root().join("layers"))
    }
}

/// Looks at the first bytes of a file and goes back to its beginning.
pub(crate) fn sniff(file: &mut File) -> stdio::Result<std::result::Result<Compression, &'static str>> {
    use std::os::unix::fs::FileExt;
    let mut head = [0u8; 6];
    let mut done = 0;
    while done < head.len() {
        match file.read_at(head.get_mut(done..).unwrap_or_default(), done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(Compression::detect(head.get(..done).unwrap_or_default()))
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
