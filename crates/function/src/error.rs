//! What can go wrong, named after what was attempted.

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
    /// The component's own fault: not compilable, imports what is not there, ...
    #[error("{0}")]
    Component(String),
    /// There is no host, or it went away.
    #[error("the function host is not running")]
    NotRunning,
    #[error("function {0:?} is not known to its host")]
    UnknownFunction(String),
    #[error("the function host could not start: {0}")]
    Start(String),
    #[error("function host: {0}")]
    Protocol(String),
}

pub(crate) fn io<E: Into<io::Error>>(operation: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Error {
    let path = path.as_ref().to_path_buf();
    move |source| Error::Io { operation, path, source: source.into() }
}

/// An error and its causes in one line.
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
