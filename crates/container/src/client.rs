//! The daemon's side: starts shims, finds them again, talks to them. Blocking, with time limits; one connection for
//! one conversation.

use crate::cgroup::{Cgroup, Hierarchies};
use crate::error::{During, Error, Result};
use crate::shim::protocol::{ErrorKind, Request, Response, SOCKET, Sandbox, Start, State, Streams, VERSION};
use crate::shim::{self, container_directory, sealed_executable};
use crate::wire::{self, Filled, Reader};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longer than the shim's own limit for a set-up.
const PATIENCE: Duration = Duration::from_secs(90);
/// What is read of a shim's last words.
const MAX_COMPLAINT: u64 = 4096;

/// A connection to a shim.
pub struct Client {
    stream: UnixStream,
    reader: Reader,
    /// The protocol version that the shim speaks.
    pub version: u32,
    pub shim_pid: u32,
}

/// The live ends of an executed or attached process. The connection tells how it ended; closing it ends an executed
/// process and detaches from an attached one.
pub struct Live {
    pub connection: UnixStream,
    pub ending: Ending,
    /// Both ways, for input, output and the window's size of a terminal. Non-blocking.
    pub terminal: Option<OwnedFd>,
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// Reads from the connection of a [`Live`] how its process ended.
pub struct Ending(Reader);

/// A shim that is executed and waits to be told its sandbox. What it took to load the binary nobody waits for then. Ends
/// when it is dropped.
pub struct Waiting {
    child: Child,
}

impl Waiting {
    /// `exe` has a role `shim` that calls [`crate::shim::main`].
    ///
    /// The child is not a fork of this process: it is executed at once, in a clean environment, through a read-only view
    /// of the binary.
    pub fn execute(exe: &Path) -> Result<Self> {
        // An upgrade may have replaced the file; what runs here is still there.
        let exe = if exe.exists() { exe } else { Path::new("/proc/self/exe") };
        let sealed = sealed_executable(exe)?;
        let program = format!("/proc/self/fd/{}", sealed.as_raw_fd());
        let child = Command::new(&program)
            .arg0("atoll")
            .args(["shim", &shim::title::blank()])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .during(|| format!("executing {} as a shim", exe.display()))?;
        Ok(Self { child })
    }

    /// Whether it still waits.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Leaves it to itself, as the end of this process does.
    pub fn hang_up(&mut self) {
        self.child.stdin = None;
    }

    /// Returns when it is ready. What is left to do for this is then to be dropped, which may wait a little.
    pub fn launch(&mut self, sandbox: &Sandbox) -> Result<()> {
        let text = serde_json::to_vec(sandbox).map_err(|e| Error::step("describing the sandbox", e))?;
        if let Some(mut stdin) = self.child.stdin.take() {
            // If it dies before it has read all, its exit status says so.
            let _ = stdin.write_all(&text);
        }
        let mut told = [0; shim::READY.len()];
        if self.child.stdout.take().is_some_and(|mut stdout| stdout.read_exact(&mut told).is_ok())
            && told == *shim::READY
        {
            return Ok(());
        }
        let mut said = String::new();
        if let Some(stderr) = self.child.stderr.take() {
            let read = stderr.take(MAX_COMPLAINT).read_to_string(&mut said);
            read.during(|| "waiting for the shim".into())?;
        }
        let status = self.child.wait().during(|| "waiting for the shim".into())?;
        Err(Error::Shim(format!("the shim did not start ({status}): {}", said.trim())))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // The end of its input is its own.
        self.hang_up();
        let _ = self.child.wait();
    }
}

/// Starts a shim and returns when it is ready.
pub fn launch(exe: &Path, sandbox: &Sandbox) -> Result<()> {
    Waiting::execute(exe)?.launch(sandbox)
}

impl Client {
    /// [`Error::NoShim`] if there is none.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        let socket = run_dir.join(SOCKET);
        let gone = |source| Error::NoShim { socket: socket.clone(), source };
        let stream = UnixStream::connect(&socket).map_err(gone)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(gone)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(gone)?;
        let mut client = Self { stream, reader: Reader::default(), version: 0, shim_pid: 0 };
        match client.ask(&Request::Hello { version: VERSION }).map_err(|e| gone(io::Error::other(e.to_string())))? {
            Response::Hello { version, pid } => (client.version, client.shim_pid) = (version, pid),
            other => return Err(unexpected(&other)),
        }
        Ok(client)
    }

    fn ask(&mut self, request: &Request) -> Result<Response> {
        wire::send(&self.stream, request, &[]).during(|| "asking the shim".into())?;
        match wire::receive(&self.stream, &mut self.reader).during(|| "waiting for the shim".into())? {
            Response::Error { kind, message } => Err(match kind {
                ErrorKind::NoContainer => Error::NoContainer(message),
                ErrorKind::NotRunning => Error::NotRunning(message),
                ErrorKind::Exec(code) => Error::Exec { code, message },
                ErrorKind::Refused => Error::Refused(message),
                ErrorKind::Failed => Error::Shim(message),
            }),
            response => Ok(response),
        }
    }

    fn command(&mut self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            Response::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns when the container's program is executed. Asked again for the same attempt, tells how it stands.
    pub fn start(&mut self, start: Start) -> Result<State> {
        match self.ask(&Request::Start(Box::new(start)))? {
            Response::Started(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    /// The sequence number is for [`Self::watch`].
    pub fn list(&mut self) -> Result<(u64, Vec<State>)> {
        match self.ask(&Request::List)? {
            Response::List { sequence, containers } => Ok((sequence, containers)),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes this connection readable when something has changed since `seen`, or the shim has gone.
    pub fn watch(self, seen: u64) -> Result<UnixStream> {
        wire::send(&self.stream, &Request::Watch { seen }, &[]).during(|| "asking the shim".into())?;
        self.stream.set_nonblocking(true).during(|| "making a socket non-blocking".into())?;
        Ok(self.stream)
    }

    pub fn signal(&mut self, name: &str, signal: i32) -> Result<()> {
        self.command(&Request::Signal { name: name.into(), signal })
    }

    /// Forgets an ended container and deletes its directory. Nothing is done if it is not there.
    pub fn remove(&mut self, dir: &Path, name: &str) -> Result<()> {
        let ended = self.list()?.1.into_iter().find(|s| s.name == name);
        self.command(&Request::Remove { name: name.into() })?;
        if let Some(state) = ended {
            delete(&container_directory(dir, name, state.attempt))?;
        }
        Ok(())
    }

    pub fn exec(mut self, name: &str, command: shim::protocol::Command, streams: Streams) -> Result<Live> {
        let request = Request::Exec { name: name.into(), command: Box::new(command), streams };
        let response = self.ask(&request)?;
        self.live(response)
    }

    pub fn attach(mut self, name: &str, streams: Streams) -> Result<Live> {
        let response = self.ask(&Request::Attach { name: name.into(), streams })?;
        self.live(response)
    }

    fn live(mut self, response: Response) -> Result<Live> {
        let Response::Streams { terminal, streams } = response else { return Err(unexpected(&response)) };
        let mut next = |wanted: bool| -> Result<Option<OwnedFd>> {
            if !wanted {
                return Ok(None);
            }
            self.reader.take_fd().map(Some).ok_or_else(|| Error::Shim("the shim sent no descriptor".into()))
        };
        let (terminal, stdin) = (next(terminal)?, next(streams.stdin)?);
        let (stdout, stderr) = (next(streams.stdout)?, next(streams.stderr)?);
        self.stream.set_nonblocking(true).during(|| "making a socket non-blocking".into())?;
        Ok(Live { connection: self.stream, ending: Ending(self.reader), terminal, stdin, stdout, stderr })
    }

    pub fn pause(&mut self) -> Result<()> {
        self.command(&Request::Pause)
    }

    pub fn resume(&mut self) -> Result<()> {
        self.command(&Request::Resume)
    }

    pub fn shutdown(mut self) -> Result<()> {
        self.command(&Request::Shutdown)
    }
}

impl Ending {
    /// When it is known; the connection does not block and is readable then. Ask before waiting: it may have come with
    /// what was read before. `WouldBlock` until then; another error if the shim is gone.
    pub fn exit_code(&mut self, connection: impl AsFd) -> io::Result<i32> {
        loop {
            match self.0.next::<Response>()? {
                Some(Response::Exited { code }) => return Ok(code),
                Some(other) => return Err(io::Error::other(unexpected(&other).to_string())),
                None => match self.0.fill(&connection)? {
                    Filled::Some => {}
                    Filled::Nothing => return Err(io::ErrorKind::WouldBlock.into()),
                    Filled::End => return Err(io::ErrorKind::UnexpectedEof.into()),
                },
            }
        }
    }
}

fn unexpected(response: &Response) -> Error {
    Error::Shim(format!("the shim answered something else than was asked: {response:?}"))
}

/// Ends a sandbox, whether its shim still runs or not, and removes what it left: processes, control groups, its
/// directory, its socket. Done again, it does nothing.
pub fn destroy(cgroup: &Path, dir: &Path, run_dir: &Path) -> Result<()> {
    match Client::connect(run_dir) {
        Ok(client) => {
            let process = rustix::process::Pid::from_raw(client.shim_pid as i32)
                .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
            client.shutdown()?;
            // It has answered and is about to exit: its control group and its lock are free after that.
            if let Some(process) = process {
                use rustix::event::{PollFd, PollFlags, Timespec, poll};
                let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
                let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
            }
        }
        Err(Error::NoShim { .. }) => {}
        Err(e) => return Err(e),
    }
    let group = Cgroup::new(Hierarchies::discover()?, cgroup)?;
    let patience = Duration::from_secs(10);
    if !group.kill(patience) {
        return Err(Error::Shim(format!("processes in cgroup {} do not end", cgroup.display())));
    }
    group.remove(patience)?;
    for name in [SOCKET, "shim.lock"] {
        let _ = std::fs::remove_file(run_dir.join(name));
    }
    delete(dir)?;
    // Shared with the other shims: stays if there are any.
    let _ = group.sibling("shims")?.remove(Duration::ZERO);
    group.remove_empty_parents();
    Ok(())
}

fn delete(directory: &Path) -> Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::step(format!("deleting {}", directory.display()), e))
        }
        _ => Ok(()),
    }
}

/// What the group at `cgroup` uses.
pub fn stats(cgroup: &Path) -> Result<crate::cgroup::Stats> {
    Ok(Cgroup::new(Hierarchies::discover()?, cgroup)?.stats())
}

/// Connects to a port on the loopback of a network namespace, of this process's own if there is no path. Call it on a
/// thread of its own, which then ends: it stays in that namespace.
pub fn connect_in(network: Option<&Path>, port: u16) -> io::Result<std::net::TcpStream> {
    if let Some(network) = network {
        let namespace = std::fs::File::open(network)?;
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))?;
    }
    let limit = Duration::from_secs(10);
    let v4 = std::net::TcpStream::connect_timeout(&(std::net::Ipv4Addr::LOCALHOST, port).into(), limit);
    v4.or_else(|e| {
        std::net::TcpStream::connect_timeout(&(std::net::Ipv6Addr::LOCALHOST, port).into(), limit).map_err(|_| e)
    })
}
