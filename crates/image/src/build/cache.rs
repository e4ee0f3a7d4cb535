//! The build cache: which layer a step made, by a digest of everything the step depends on. A record on disk for each;
//! garbage collection keeps what they name for as long as its budget allows.

use crate::digest::Digest;
use crate::error::Result;
use crate::spec::Descriptor;
use crate::store::Store;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::PathBuf;

const MAGIC: &str = "atoll build 1";
/// Bytes of a record.
const LIMIT: u64 = 64 << 10;

/// What a step made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cached {
    magic: String,
    /// `None`: it changed nothing.
    pub layer: Option<(Descriptor, Digest)>,
    /// Unix seconds.
    pub created: u64,
}

impl Cached {
    pub fn new(layer: Option<(Descriptor, Digest)>, created: u64) -> Cached {
        Cached { magic: MAGIC.into(), layer, created }
    }
}

impl Store {
    fn cache_path(&self, key: &Digest) -> PathBuf {
        self.root().join("build").join(key.hex())
    }

    /// What was made from the same, if all of it is still here. It stays for the grace period of garbage collection.
    pub(crate) fn cache_get(&self, key: &Digest) -> Result<Option<Cached>> {
        let path = self.cache_path(key);
        let Some(cached) = read(&path) else { return Ok(None) };
        if let Some((layer, diff_id)) = &cached.layer {
            if self.blob_claim(&layer.digest)? != Some(layer.size) {
                return Ok(None);
            }
            self.ensure_layer(diff_id, &layer.digest)?;
        }
        let _lock = self.shared()?;
        if path.exists() {
            crate::blob::touch(&path)?;
        }
        Ok(Some(cached))
    }

    pub(crate) fn cache_put(&self, key: &Digest, cached: &Cached) -> Result<()> {
        let _lock = self.shared()?;
        self.write_file(&self.cache_path(key), &crate::import::to_json(cached)?)
    }
}

/// A record that cannot be read is no record: the step is done again.
pub(crate) fn read(path: &std::path::Path) -> Option<Cached> {
    if fs::metadata(path).ok()?.len() > LIMIT {
        return None;
    }
    serde_json::from_slice::<Cached>(&fs::read(path).ok()?).ok().filter(|c| c.magic == MAGIC)
}
