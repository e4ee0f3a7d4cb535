//! How the daemon talks to a host. Blocking.

use crate::error::{Error, Result, io};
use crate::wire::{FunctionSpec, FunctionStats, Listing, Recorded, Reply, Request, VERSION, receive, send};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A host answers at once, but for loading code.
const ANSWER: Duration = Duration::from_secs(30);

pub(crate) fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

/// Starts a host that runs as `uid`, with its socket in `run_dir`. Returns when it serves; it is no child of the caller.
pub fn launch(exe: &Path, run_dir: &Path, uid: u32) -> Result<Client> {
    launch_role(exe, "function-host", run_dir, uid)?;
    Client::connect(run_dir)
}

pub(crate) fn launch_role(exe: &Path, role: &str, run_dir: &Path, uid: u32) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(io("create", run_dir))?;
    let output = Command::new(exe)
        .arg(role)
        .arg(run_dir)
        .arg(uid.to_string())
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(io("run", exe))?;
    if !output.status.success() {
        return Err(Error::Start(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(())
}

/// A connection to the control socket in `run_dir`; `NotRunning` if nobody listens.
pub(crate) fn connect_to(run_dir: &Path) -> Result<OwnedFd> {
    let path = socket_path(run_dir);
    let failed = |e: rustix::io::Errno| io("connect to", &path)(e);
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed)?;
    let address = SocketAddrUnix::new(&path).map_err(failed)?;
    connect(&socket, &address).map_err(|_| Error::NotRunning)?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(ANSWER)).map_err(failed)?;
    }
    Ok(socket)
}

/// Takes the limit off the wait for an answer.
pub(crate) fn wait_for_ever(socket: &OwnedFd) -> Result<()> {
    set_socket_timeout(socket, Timeout::Recv, None).map_err(io("configure", "the socket"))
}

/// A connection to a host.
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// `NotRunning` if there is no host.
    pub fn connect(run_dir: &Path) -> Result<Client> {
        let socket = connect_to(run_dir)?;
        let client = Client { socket };
        match client.ask(&Request::Hello, &[])? {
            Reply::Hello { version: VERSION } => Ok(client),
            Reply::Hello { version } => Err(Error::Protocol(format!(
                "it speaks version {version}, this program {VERSION}; delete its pods to have it replaced"
            ))),
            other => Err(unexpected(other)),
        }
    }

    /// Adds a function: `code` is compiled code, `listener` a listening TCP socket, `log` a file open for appending.
    /// Returns when it started, unix nanoseconds.
    pub fn add(&self, spec: FunctionSpec, code: impl AsFd, listener: impl AsFd, log: impl AsFd) -> Result<i64> {
        self.add_with(spec, &[code.as_fd(), listener.as_fd(), log.as_fd()])
    }

    /// As [`Client::add`], a function that sends requests itself: `connector` is what [`launch_connector`] gave, `roots` a
    /// list of certificate authorities, in PEM.
    ///
    /// [`launch_connector`]: crate::launch_connector
    pub fn add_outbound(
        &self,
        spec: FunctionSpec,
        [code, listener, log]: [BorrowedFd; 3],
        connector: impl AsFd,
        roots: impl AsFd,
    ) -> Result<i64> {
        self.add_with(spec, &[code, listener, log, connector.as_fd(), roots.as_fd()])
    }

    fn add_with(&self, spec: FunctionSpec, descriptors: &[BorrowedFd]) -> Result<i64> {
        match self.ask(&Request::Add(Box::new(spec)), descriptors)? {
            Reply::Started { started } => Ok(started),
            Reply::Refused { message } => Err(Error::Component(message)),
            other => Err(unexpected(other)),
        }
    }

    /// Takes no new requests, lets those under way finish for up to `drain`, then ends the function; with a signal, it
    /// counts as ended by it. Returns at once.
    pub fn stop(&self, id: &str, drain: Duration, signal: Option<i32>) -> Result<()> {
        let drain_ms = u64::try_from(drain.as_millis()).unwrap_or(u64::MAX);
        self.done(&Request::Stop { id: id.to_owned(), drain_ms, signal })
    }

    /// Forgets a function, which is ended first if need be.
    pub fn forget(&self, id: &str) -> Result<()> {
        self.done(&Request::Forget { id: id.to_owned() })
    }

    /// Gives a function another log file.
    pub fn set_log(&self, id: &str, log: impl AsFd) -> Result<()> {
        match self.ask(&Request::Log { id: id.to_owned() }, &[log.as_fd()])? {
            Reply::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    pub fn list(&self) -> Result<Listing> {
        match self.ask(&Request::List, &[])? {
            Reply::Listing(listing) => Ok(listing),
            other => Err(unexpected(other)),
        }
    }

    pub fn stats(&self, id: &str) -> Result<FunctionStats> {
        match self.ask(&Request::Stats { id: id.to_owned() }, &[])? {
            Reply::Stats(stats) => Ok(stats),
            other => Err(unexpected(other)),
        }
    }

    /// The oldest spans that the host has kept, and how many it had no room for since the last time. It keeps them while
    /// somebody asks.
    pub fn spans(&self) -> Result<(Vec<Recorded>, u64)> {
        match self.ask(&Request::Spans, &[])? {
            Reply::Spans { spans, dropped } => Ok((spans, dropped)),
            other => Err(unexpected(other)),
        }
    }

    /// Waits until something changed after `since`; gives the number of the last change. May wait for ever: use a
    /// connection of its own.
    pub fn changed(&self, since: u64) -> Result<u64> {
        wait_for_ever(&self.socket)?;
        match self.ask(&Request::Changed { since }, &[])? {
            Reply::Changed { sequence } => Ok(sequence),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the host if it has no functions. Whether it did.
    pub fn retire(&self) -> Result<bool> {
        match self.ask(&Request::Retire, &[]) {
            Ok(Reply::Done) | Err(Error::NotRunning) => Ok(true),
            Ok(Reply::Refused { .. }) => Ok(false),
            Ok(other) => Err(unexpected(other)),
            Err(error) => Err(error),
        }
    }

    fn done(&self, request: &Request) -> Result<()> {
        match self.ask(request, &[])? {
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
        Reply::Unknown { id } => Error::UnknownFunction(id),
        Reply::Refused { message } => Error::Protocol(message),
        other => Error::Protocol(format!("an answer to another question: {other:?}")),
    }
}
