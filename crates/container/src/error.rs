//! What can go wrong, by the operation that failed.

use std::io;
use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One step of the set-up. `what` names the step and what it was done to.
    #[error("{what}: {source}")]
    Step {
        what: String,
        #[source]
        source: io::Error,
    },
    /// The configuration asks for what is not allowed or not possible.
    #[error("{0}")]
    Refused(String),
    /// The program of the container could not be executed. 126: found but not executable; 127: not found.
    #[error("{message}")]
    Exec { code: i32, message: String },
    #[error("the shim of this sandbox is gone ({socket}): {source}")]
    NoShim {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("container {0} is not running")]
    NotRunning(String),
    #[error("container {0} is not there")]
    NoContainer(String),
    /// What the shim said.
    #[error("{0}")]
    Shim(String),
}

impl Error {
    pub fn step(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Step { what: what.into(), source: source.into() }
    }
}

/// Names the step that failed.
pub trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::step(what(), e))
    }
}
