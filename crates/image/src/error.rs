//! What can go wrong, named after what was attempted.

use crate::digest::Digest;
use std::io;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation} {path}", path = path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("image {0:?}: no such image here; atoll image ls shows what there is")]
    NotFound(String),
    #[error("image {prefix:?} is ambiguous, it could be any of {matches}; write more of its digest")]
    Ambiguous { prefix: String, matches: String },
    #[error("image reference {reference:?}: {why}")]
    InvalidReference { reference: String, why: String },
    #[error("digest {0:?} is not `sha256:` and 64 lower-case hexadecimal digits, the only algorithm kept here")]
    InvalidDigest(String),
    #[error("{what}: expected digest {expected}, its content has {actual}; it is damaged or was tampered with")]
    DigestMismatch { what: String, expected: Digest, actual: Digest },
    #[error("{what}: expected {expected} bytes, there are {actual}")]
    SizeMismatch { what: String, expected: u64, actual: u64 },
    #[error("{what} is larger than the limit of {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("{what}: {why}")]
    Invalid { what: String, why: String },
    #[error("layer {layer}: entry {entry:?}: {why}")]
    Layer { layer: String, entry: String, why: String },
    #[error("layer {layer}: {why}")]
    Archive { layer: String, why: String },
    #[error("image {reference:?} is not for {wanted}; it is there for {available}")]
    Platform { reference: String, wanted: String, available: String },
    #[error("image {reference:?} is a {found}, a {wanted} is needed here")]
    WrongKind { reference: String, found: &'static str, wanted: &'static str },
    #[error("image {reference:?} has no file {path:?}")]
    NoFile { reference: String, path: String },
    /// A Containerfile's line.
    #[error("{file}:{line}: {why}")]
    Build { file: String, line: usize, why: String },
    #[error("{path}: {why}", path = path.display())]
    Unrecognised { path: PathBuf, why: String },
    #[error("blob {0} is not here")]
    BlobUnknown(Digest),
    #[error("blob {0} is still part of an image; remove that first")]
    BlobInUse(Digest),
    #[error("the manifest names {what} {digest}, which is not here; push it first")]
    MissingReferenced { what: &'static str, digest: Digest },
    #[error("no upload {0:?}: it was finished, cancelled or has expired")]
    UploadUnknown(String),
    #[error("upload {0:?} is being written by another request")]
    UploadBusy(String),
    #[error("upload {id:?} stands at byte {at}; the piece sent begins at {sent}")]
    UploadRange { id: String, at: u64, sent: u64 },
    #[error("{path} holds images in format {found:?}; this program knows {supported:?}: use the program that wrote it, or a newer one", path = path.display())]
    Version { path: PathBuf, found: String, supported: &'static str },
    #[error("registry {host}: {why}")]
    Registry { host: String, why: String },
    #[error("registry {host} does not know {what} (404); check the name and the tag")]
    RegistryNotFound { host: String, what: String },
    /// Said again it would be refused again.
    #[error("registry {host} refused {what} ({status}): {said}")]
    Refused { host: String, what: String, status: u16, said: String },
    #[error(
        "registry {host} refuses access to {what} ({status}); give credentials that may (docker login, or --authfile)"
    )]
    Unauthorized { host: String, what: String, status: u16 },
}

impl Error {
    pub(crate) fn invalid(what: impl Into<String>, why: impl ToString) -> Error {
        Error::Invalid { what: what.into(), why: why.to_string() }
    }

    /// Whether trying again later, unchanged, could help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Error::Io { .. } | Error::Registry { .. } | Error::UploadBusy(_))
    }

    /// This error and its causes in one line, for where the chain is printed once.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

/// `.map_err(io("open", path))`.
pub(crate) fn io<E: Into<io::Error>>(operation: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Error {
    let path = path.as_ref().to_path_buf();
    move |source| Error::Io { operation, path, source: source.into() }
}
