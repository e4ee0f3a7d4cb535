//! What can go wrong, named after the operation that failed.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{field}: {value:?}: {why}")]
    Config { field: &'static str, value: String, why: String },
    #[error("{operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{operation}")]
    System {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel refused a netlink request; `detail` is its own explanation, if it gave one.
    #[error("{operation}: the kernel answered {source}{detail}")]
    Netlink { operation: &'static str, detail: String, source: io::Error },
    #[error("netlink: {0}")]
    Protocol(&'static str),
    #[error("{path} is of format version {found}, this program reads version {known}; use the program that wrote it")]
    JournalVersion { path: PathBuf, found: String, known: u32 },
    #[error("{path} is in use by another process: one instance only may run on a data directory")]
    InUse { path: PathBuf },
    #[error("no free address in {network}: {used} are in use; remove workloads or choose a larger {larger}")]
    Exhausted { network: String, used: usize, larger: &'static str },
    #[error("there is no Network {0} here")]
    NoSubnet(String),
    #[error("Network {name}: {why}")]
    Subnet { name: String, why: crate::subnets::Misfit },
    #[error("address {address} of key {key:?} is in use by workload {uid}; detach that one first")]
    KeyInUse { key: String, address: Ipv4Addr, uid: String },
    #[error("no link of that name: {0:?}")]
    NoLink(String),
    #[error("thread {0} panicked")]
    Panicked(&'static str),
}

impl Error {
    pub(crate) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { operation, path, source }
    }
    pub(crate) fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::System { operation, source }
    }
    pub(crate) fn errno(operation: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        move |source| Error::System { operation, source: source.into() }
    }
}
