//! The monitor's control socket, from the node agent's side. Blocking; one line of JSON each way.

use crate::channel;
use crate::engine::{SNAPSHOT_DEADLINE, SnapshotFiles};
use crate::machine::{Error, Machine, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    State,
    /// Answered at once; the connection then stays open until the monitor ends.
    Watch,
    PowerButton,
    Reset,
    Pause,
    Resume,
    Kill,
    /// The guest shall give up this many pages of 4 KiB in all.
    Balloon(u32),
    /// Answered at once; the connection then is the serial console.
    Console,
    /// See [`Client::snapshot`].
    Snapshot,
    /// See [`Client::hold`].
    Hold,
    Release,
    /// The power button, and a reset in place of the power-off that the guest answers it with.
    SoftReboot,
    /// See [`Client::display`].
    Display,
}

/// Times are unix nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub engine: String,
    pub engine_pid: u32,
    pub started: i64,
    pub paused: bool,
    pub exit: Option<Exit>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    pub signal: Option<i32>,
    pub finished: i64,
    /// The engine's last words, empty if it had none.
    pub message: String,
}

/// Starts a machine's monitor (`exe vmm RUN_DIR`) and returns once the engine runs. The monitor is no child of the caller.
/// `admit` is given the role's pid before it does anything: what it joins (control groups) holds for all it starts.
pub fn launch(
    exe: &Path,
    machine: &Machine,
    admit: impl FnOnce(i32) -> std::result::Result<(), String>,
) -> Result<State> {
    machine.validate()?;
    for dir in [&machine.run_dir, &machine.state_dir] {
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    }
    // the machine's user must reach nothing through the directories above, but write in its own state
    std::fs::set_permissions(&machine.state_dir, PermissionsExt::from_mode(0o700))
        .map_err(Error::io("set mode", &machine.state_dir))?;
    let _ = std::fs::remove_file(machine.state_dir.join("exit.json"));
    let path = machine.run_dir.join("machine.json");
    let text = serde_json::to_vec(machine).map_err(|e| Error::Monitor(e.to_string()))?;
    std::fs::write(&path, text).map_err(Error::io("write", &path))?;
    let mut child = std::process::Command::new(exe)
        .arg("vmm")
        .arg(&machine.run_dir)
        .env_clear()
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .map_err(Error::io("run", exe))?;
    let admitted = admit(i32::try_from(child.id()).unwrap_or(i32::MAX));
    if let Err(message) = admitted {
        let _ = child.kill();
        let _ = child.wait();
        return Err(Error::Monitor(message));
    }
    drop(child.stdin.take());
    let output = child.wait_with_output().map_err(Error::io("wait for", exe))?;
    if !output.status.success() {
        return Err(Error::Monitor(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Client::connect(&machine.run_dir)?.request(Request::State)
}

/// Below the run directory: the byte stream of [`Machine::channel`] in QEMU, and the vsock of our own engine.
pub(crate) const CHANNEL: &str = "channel.sock";
pub(crate) const VSOCK: &str = "vsock.sock";
const LONGEST_GREETING: usize = 32;

/// For root alone.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(Error::io("listen on", path))?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(Error::io("set mode", path))?;
    Ok(listener)
}

/// A machine's [`Machine::channel`], whichever way its engine has it: one client at a time with virtio-serial, on our
/// own engine a connection to `port`.
pub fn channel(run_dir: &Path, port: u32) -> Result<UnixStream> {
    if let Ok(stream) = UnixStream::connect(run_dir.join(CHANNEL)) {
        return Ok(stream);
    }
    let mut stream = UnixStream::connect(run_dir.join(VSOCK)).map_err(|_| Error::NotRunning)?;
    let fail = |e: std::io::Error| Error::Monitor(format!("channel: {e}"));
    stream.set_read_timeout(Some(DEADLINE)).map_err(fail)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(fail)?;
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && line.len() < LONGEST_GREETING {
        if stream.read(&mut byte).map_err(fail)? == 0 {
            return Err(Error::Monitor("channel: nothing listens in the guest".into()));
        }
        line.extend_from_slice(&byte);
    }
    if !line.starts_with(b"OK ") {
        return Err(Error::Monitor("channel: nothing listens in the guest".into()));
    }
    stream.set_read_timeout(None).map_err(fail)?;
    Ok(stream)
}

/// What is on disk of a machine that ended, whose monitor is gone.
pub fn recorded(state_dir: &Path) -> Option<State> {
    serde_json::from_slice(&std::fs::read(state_dir.join("exit.json")).ok()?).ok()
}

const DEADLINE: Duration = Duration::from_secs(35);

pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Client {
    /// `NotRunning` if there is no monitor.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        let stream = UnixStream::connect(run_dir.join("vmm.sock")).map_err(|_| Error::NotRunning)?;
        let fail = |e: std::io::Error| Error::Monitor(e.to_string());
        stream.set_read_timeout(Some(DEADLINE)).map_err(fail)?;
        let writer = stream.try_clone().map_err(fail)?;
        Ok(Client { reader: BufReader::new(stream), writer })
    }

    pub fn request(&mut self, request: Request) -> Result<State> {
        self.ask(request, &[])
    }

    fn ask(&mut self, request: Request, files: &[BorrowedFd<'_>]) -> Result<State> {
        let mut text = serde_json::to_vec(&request).map_err(|e| Error::Monitor(e.to_string()))?;
        text.push(b'\n');
        channel::send(&self.writer, &text, files).map_err(|_| Error::NotRunning)?;
        let mut line = Vec::new();
        let read = (&mut self.reader).take(64 << 10).read_until(b'\n', &mut line);
        if read.map_err(|e| Error::Monitor(e.to_string()))? == 0 {
            return Err(Error::NotRunning);
        }
        let reply: std::result::Result<State, String> =
            serde_json::from_slice(&line).map_err(|e| Error::Monitor(e.to_string()))?;
        reply.map_err(Error::Monitor)
    }

    /// Saves the machine, disks aside, as it is at one moment into files that are open and empty. It goes on then, or stays
    /// paused if it was; also when this fails.
    pub fn snapshot(&mut self, files: &SnapshotFiles) -> Result<State> {
        let base = files.base.as_ref().map(AsFd::as_fd);
        let all: Vec<_> = [files.state.as_fd(), files.memory.as_fd()].into_iter().chain(base).collect();
        let fail = |e: std::io::Error| Error::Monitor(e.to_string());
        self.writer.set_read_timeout(Some(SNAPSHOT_DEADLINE + DEADLINE)).map_err(fail)?;
        let answer = self.ask(Request::Snapshot, &all);
        self.writer.set_read_timeout(Some(DEADLINE)).map_err(fail)?;
        answer
    }

    /// Keeps the machine, its devices too, from doing anything, so that its disks' files can be copied: until
    /// [`Held::release`], or the end of the connection, whatever ends it. Refused while another connection holds it.
    pub fn hold(mut self) -> Result<Held> {
        self.request(Request::Hold).map(|_| Held(self))
    }

    /// The machine's screen, keyboard and pointer: a new connection of the RFB protocol (RFC 6143).
    pub fn display(mut self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make channel", "display"))?;
        self.ask(Request::Display, &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// Returns when the monitor is gone.
    pub fn wait(mut self) -> Result<()> {
        self.request(Request::Watch)?;
        self.writer.set_read_timeout(None).map_err(|e| Error::Monitor(e.to_string()))?;
        let mut rest = [0u8; 64];
        while matches!(self.reader.read(&mut rest), Ok(n) if n > 0) {}
        Ok(())
    }

    /// The serial console as a stream.
    pub fn console(mut self) -> Result<UnixStream> {
        self.request(Request::Console)?;
        self.writer.set_read_timeout(None).map_err(|e| Error::Monitor(e.to_string()))?;
        Ok(self.writer)
    }
}

/// A machine that does nothing for as long as this lives.
pub struct Held(Client);

impl Held {
    pub fn snapshot(&mut self, files: &SnapshotFiles) -> Result<State> {
        self.0.snapshot(files)
    }

    /// It goes on, unless it was paused before.
    pub fn release(mut self) -> Result<State> {
        self.0.request(Request::Release)
    }
}
