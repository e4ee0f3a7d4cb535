//! How the daemon talks to a pod's Lambda runtime. Blocking.

use super::{LambdaSpec, ROLE, Reply, Request};
use crate::client;
use crate::error::{Error, Result};
use crate::wire::{receive, send};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Starts one that runs as `uid`, with its socket in `run_dir`; it is no child of the caller.
pub fn launch(exe: &Path, run_dir: &Path, uid: u32) -> Result<LambdaClient> {
    client::launch_role(exe, ROLE, run_dir, uid)?;
    LambdaClient::connect(run_dir)
}

/// A connection to a pod's Lambda runtime.
pub struct LambdaClient {
    socket: OwnedFd,
}

impl LambdaClient {
    /// `NotRunning` if there is none.
    pub fn connect(run_dir: &Path) -> Result<LambdaClient> {
        Ok(LambdaClient { socket: client::connect_to(run_dir)? })
    }

    /// `runtime_api` listens, `port` is bound only.
    pub fn serve(&self, spec: LambdaSpec, runtime_api: impl AsFd, port: impl AsFd) -> Result<()> {
        self.done(&Request::Serve(spec), &[runtime_api.as_fd(), port.as_fd()])
    }

    /// Tells that the function's process ended.
    pub fn exited(&self, how: &str) -> Result<()> {
        self.done(&Request::Exited { how: how.to_owned() }, &[])
    }

    /// Waits until the function has to be restarted more often than `seen`; without, tells how often it was. May wait for
    /// ever: use a connection of its own.
    pub fn restarts(&self, seen: Option<u64>) -> Result<u64> {
        client::wait_for_ever(&self.socket)?;
        match self.ask(&Request::Restarts { seen }, &[])? {
            Reply::Restarts { count } => Ok(count),
            other => Err(unexpected(other)),
        }
    }

    /// Ends it.
    pub fn stop(&self) -> Result<()> {
        match self.done(&Request::Stop, &[]) {
            Err(Error::NotRunning) => Ok(()),
            other => other,
        }
    }

    fn done(&self, request: &Request, descriptors: &[BorrowedFd]) -> Result<()> {
        match self.ask(request, descriptors)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn ask(&self, request: &Request, descriptors: &[BorrowedFd]) -> Result<Reply> {
        send(&self.socket, request, descriptors)?;
        match receive::<Reply>(&self.socket)? {
            Some((reply, _)) => Ok(reply),
            None => Err(Error::NotRunning),
        }
    }
}

fn unexpected(reply: Reply) -> Error {
    match reply {
        Reply::Refused { message } => Error::Protocol(message),
        other => Error::Protocol(format!("an answer to another question: {other:?}")),
    }
}
