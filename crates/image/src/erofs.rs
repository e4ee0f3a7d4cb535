//! One read-only file system from the layers of an image: EROFS, uncompressed, in one file that machines share.
//!
//! ```text
//! block 0   1024 bytes of nothing, superblock, then inodes: 64 bytes, extended attributes, the tail of the content
//! ...       more inodes, in the order of their directories
//! ...       whole blocks of contents: directories, files
//! ```
//!
//! The same layers give the same bytes. Holes of files stay holes of the image on the disk. Nothing that a stranger wrote
//! is interpreted: names, attributes and contents are copied from what was unpacked, whiteouts are what unpacking made of
//! them. Format: `erofs.docs.kernel.org`, "Core on-disk format" and "Extended attributes".

mod format;
mod layout;
mod merge;
mod write;

use crate::digest::Digest;
use crate::error::{Error, Result, io};
use crate::resolve::{Kind, KindName, Resolved};
use crate::store::{Limits, Progress, ProgressFn, Store, sync_dir};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

impl Store {
    /// The root file system of a container image as one read-only EROFS file, a whole number of blocks of 4096 bytes.
    /// Made when it is first asked for, and shared by all images of the same layers; others who want the same wait.
    ///
    /// It stays as long as the image, or for the grace period of garbage collection.
    pub fn block_image(&self, image: &Resolved, progress: ProgressFn) -> Result<PathBuf> {
        let (chain, layers) = chained(image)?;
        if let Some(path) = self.block_claim(&chain)? {
            return Ok(path);
        }
        let name = format!("block-{}", chain.hex());
        let lock = self.named_lock(&name)?;
        let path = match self.block_claim(&chain)? {
            Some(path) => path,
            None => self.block_make(image, &chain, layers, progress)?,
        };
        self.forget_lock(&name, lock);
        Ok(path)
    }

    /// The same, if it was made before.
    pub fn block_image_made(&self, image: &Resolved) -> Result<Option<PathBuf>> {
        self.block_claim(&chained(image)?.0)
    }

    pub(crate) fn block_path(&self, chain: &Digest) -> PathBuf {
        self.root().join("blocks").join(chain.hex())
    }

    fn block_claim(&self, chain: &Digest) -> Result<Option<PathBuf>> {
        let path = self.block_path(chain);
        let _lock = self.shared()?;
        match fs::symlink_metadata(&path) {
            Ok(_) => crate::blob::touch(&path).map(|()| Some(path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io("stat", &path)(e)),
        }
    }

    fn block_make(
        &self,
        image: &Resolved,
        chain: &Digest,
        layers: &[PathBuf],
        progress: ProgressFn,
    ) -> Result<PathBuf> {
        progress(Progress::Step(format!("making one file system of {} layers", layers.len())));
        let (temporary, file) = self.temporary_file()?;
        let made = build(&image.reference, layers, chain, &file, self.limits(), progress).and_then(|()| {
            file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(io("chmod", &temporary))?;
            file.sync_all().map_err(io("sync", &temporary))?;
            let path = self.block_path(chain);
            let _lock = self.shared()?;
            fs::rename(&temporary, &path).map_err(io("rename into place", &path))?;
            crate::blob::touch(&path)?;
            sync_dir(&self.root().join("blocks"))?;
            Ok(path)
        });
        if made.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        made
    }
}

fn chained(image: &Resolved) -> Result<(Digest, &[PathBuf])> {
    match &image.kind {
        Kind::Container { config, layers } => Ok((chain_id(&config.rootfs.diff_ids), layers)),
        other @ (Kind::Component { .. } | Kind::Disk(_)) => Err(Error::WrongKind {
            reference: image.reference.clone(),
            found: KindName::from(other).as_str(),
            wanted: "container image",
        }),
    }
}

/// OCI image spec, "Layer ChainID".
pub(crate) fn chain_id(diff_ids: &[Digest]) -> Digest {
    let mut ids = diff_ids.iter();
    let Some(first) = ids.next() else { return Digest::of(b"") };
    ids.fold(*first, |chain, id| Digest::of(format!("{chain} {id}").as_bytes()))
}

/// Writes the file system of layers (lowest first) into an empty file.
pub(crate) fn build(
    what: &str,
    layers: &[PathBuf],
    chain: &Digest,
    to: &File,
    limits: &Limits,
    progress: ProgressFn,
) -> Result<()> {
    let tree = merge::Tree::of(what, layers, limits.block_inodes)?;
    let layout = layout::Layout::of(what, &tree, limits.block_bytes)?;
    write::Writer::new(what, &tree, &layout, to, progress).write(&uuid(chain))
}

/// A volume's name is that of its content (RFC 9562, version 8).
fn uuid(chain: &Digest) -> [u8; 16] {
    let mut id = [0u8; 16];
    let hex = chain.hex();
    for (byte, digits) in id.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = std::str::from_utf8(digits).ok().and_then(|d| u8::from_str_radix(d, 16).ok()).unwrap_or(0);
    }
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// For tests, which bring layers that no archive would.
pub(crate) fn for_tests(layers: &[PathBuf], to: &Path, limits: &Limits) -> Result<()> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(to).map_err(io("create", to))?;
    build("test", layers, &Digest::of(b"test"), &file, limits, &crate::store::silent)
}
