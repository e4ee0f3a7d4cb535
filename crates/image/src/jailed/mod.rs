//! Layers are decompressed and unpacked by processes that can do nothing else.
//!
//! ```text
//! blob --> image-decompress --> the store's process: counts, hashes (the diff id) --> image-unpack --> layer directory
//! ```
//!
//! Two roles, so that neither has to be believed: the decompressor has no files, so what it gives is what is hashed; the
//! unpacker has been given the bytes with that hash and one directory. Both have an empty root, no network, no other
//! descriptors, resource limits, Landlock and a seccomp filter. The unpacker is root of a user namespace whose ids are
//! nobody's outside; an id-mapped mount of the directory lets it set owners there and nowhere else. What needs more than
//! that, the mark of an opaque directory, it asks for.

pub(crate) mod child;
mod parent;

pub use child::{decompress, unpack};
pub(crate) use parent::{Input, Plain, Unpacker};

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The program that has the roles.
#[derive(Clone, Debug)]
pub struct Roles {
    pub exe: PathBuf,
}

pub const DECOMPRESS: &str = "image-decompress";
pub const UNPACK: &str = "image-unpack";

/// First of the ids that an unpacker's user namespace stands for outside; no pod, build or function has them.
const UNPACKER_BASE: u32 = 0xfffd_0000;
const DECOMPRESSOR: u32 = 0xfffc_ffff;
/// As many as a pod has.
const IDS: u32 = 65_536;
/// Bytes of what an unpacker says.
const REPORT_LIMIT: u64 = 64 << 20;
/// Characters of an error that it tells.
const WHY_LIMIT: usize = 4096;

/// What an unpacker says when it is done.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// Directories to be marked opaque.
    Done(Vec<Vec<u8>>),
    Entry {
        entry: String,
        why: String,
    },
    Archive(String),
}
