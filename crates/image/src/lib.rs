//! Images: a content-addressed store on disk, and everything that fills it or reads it.
//!
//! Three kinds of image live side by side, each an OCI manifest: container images, WebAssembly components (CNCF Wasm OCI
//! layout) and disks of virtual machines. The store is a directory that several processes share (the daemon and the
//! command line) through file locks; there is no database to repair. Synchronous; only [`Store::pull`] runs a small
//! runtime of its own.
//!
//! ```text
//! DATA/images/version          marker: format and version
//! DATA/images/lock             flock: shared while references are made, exclusive while garbage is taken
//! DATA/images/blobs/sha256/H   blobs, immutable, mode 0444
//! DATA/images/refs/HOST/PATH/_tags/TAG        what a tag points at; HOST is `_local` for names without a registry
//! DATA/images/refs/HOST/PATH/_manifests/H     manifests that belong to a repository
//! DATA/images/refs/HOST/PATH/_blobs/H         blobs that were sent there lately
//! DATA/images/layers/H/fs      unpacked layer, by diff id, ready to be an overlayfs lower directory
//! DATA/images/disks/H          decompressed disks, by the digest of the compressed blob
//! DATA/images/blocks/H         root file systems as one EROFS file, by the chain id of the layers
//! DATA/images/pins/NAME        what is in use, by whom: garbage collection leaves it alone
//! DATA/images/uploads/ID       unfinished uploads of the registry
//! DATA/images/partial/H        unfinished downloads
//! DATA/images/build/H         which layer a build step made, by a digest of what it depends on
//! DATA/images/caches/H        directories of `RUN --mount=type=cache`
//! DATA/images/tmp/             what is being written; flocked while its writer lives
//! ```
//!
//! *Invariant:* what has a final name is complete, verified and synced; a crash leaves garbage, never a half image.
//! *Invariant:* a tenant's path is only ever resolved beneath a directory descriptor, without following symbolic links.
#![forbid(unsafe_code)]

mod blob;
mod build;
mod digest;
mod disk;
mod erofs;
mod error;
mod export;
mod foreign;
#[doc(hidden)]
pub mod fuzz;
mod gc;
mod import;
mod inspect;
pub mod jailed;
pub mod kernels;
mod links;
mod lookup;
mod manifest;
mod ova;
mod pull;
mod push;
mod reference;
mod refs;
mod resolve;
mod spec;
mod store;
mod tar;
mod unpack;
mod upload;
pub mod zip;

pub use blob::{Blob, BlobWriter};
pub use build::{BuildOptions, Built, Executor, MountSource, RunEnd, RunMount, RunSpec, Secret};
pub use digest::{Digest, Hasher};
pub use disk::DiskImage;
pub use error::{Error, Result};
pub use gc::{GcOptions, GcReport};
pub use import::{ImportOptions, Imported};
pub use inspect::{ImageInfo, Inspect, Removed};
pub use manifest::{MANIFEST_LIMIT, StoredManifest};
pub use ova::{Disk, Machine};
pub use pull::{Credentials, PullOptions};
pub use reference::{Reference, Repository, Selector};
pub use resolve::{Kind, KindName, Resolved};
pub use spec::{Descriptor, Document, ImageConfig, Index, Manifest, Platform, RunConfig, media};
pub use store::{Limits, Progress, ProgressFn, Store, silent};
pub use upload::Upload;
