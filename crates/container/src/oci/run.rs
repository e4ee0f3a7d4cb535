//! What `create`, `run` and `exec` share: following a launch to its end, and what is handed on on the way.

use super::Context;
use crate::error::{During, Error, Result};
use crate::runtime::{Launch, Progress};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Steps of a launch that its owner has something to do in.
pub trait Owner {
    /// The process is there and has not run anything yet.
    fn created(&mut self, pid: u32, launch: &Launch) -> Result<()>;
    /// Hooks of the runtime are due.
    fn mounted(&mut self, pid: u32) -> Result<()>;
}

/// Until the program runs, or waits for its start.
pub fn follow(launch: &mut Launch, owner: &mut dyn Owner) -> Result<u32> {
    loop {
        match launch.progress() {
            Progress::Pending => {
                match poll(&mut [PollFd::new(&launch.socket(), PollFlags::IN)], None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(Error::step("waiting for the set-up", e)),
                };
            }
            Progress::Created(pid) => owner.created(pid, launch)?,
            Progress::Mounted => {
                let pid = launch.pid.unwrap_or_default();
                owner.mounted(pid)?;
                launch.pivot(pid);
                launch.go();
            }
            Progress::Ready | Progress::Executed => {
                return launch.pid.ok_or_else(|| Error::Refused("the container's process is missing".into()));
            }
            Progress::Failed(e) => return Err(e),
        }
    }
}

/// Sends a terminal's master to who waits on `path`.
pub fn send_console(path: &Path, master: &OwnedFd) -> Result<()> {
    let what = || format!("console socket {}", path.display());
    let socket = UnixStream::connect(path).during(what)?;
    send_fd(socket.as_fd(), b"/dev/ptmx", master.as_fd()).during(what)
}

pub fn send_fd(socket: BorrowedFd<'_>, text: &[u8], fd: BorrowedFd<'_>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[IoSlice::new(text)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

pub fn write_pid_file(path: Option<&str>, pid: u32) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    super::record::replace(Path::new(path), pid.to_string().as_bytes()).during(|| format!("pid file {path}"))
}

/// How many descriptors from 3 on are handed on: `--preserve-fds`, and those of socket activation before them.
pub fn preserved(flag: Option<u32>, env: &mut Vec<String>) -> Result<u32> {
    const MOST: u32 = 1024;
    let listen = std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse::<u32>().ok()).filter(|n| *n > 0).unwrap_or(0);
    let count = flag.unwrap_or(0).saturating_add(listen);
    if count > MOST {
        return Err(Error::Refused(format!("--preserve-fds: {count}: {MOST} are possible")));
    }
    for fd in 3..3 + count {
        if !Path::new(&format!("/proc/self/fd/{fd}")).exists() {
            return Err(Error::Refused(format!("--preserve-fds: descriptor {fd} is not open")));
        }
    }
    if listen > 0 {
        env.retain(|e| !e.starts_with("LISTEN_FDS=") && !e.starts_with("LISTEN_PID="));
        env.extend([format!("LISTEN_FDS={listen}"), "LISTEN_PID=1".into()]);
    }
    Ok(count)
}

/// A terminal has to go somewhere.
pub fn check_console(terminal: bool, stays: bool, socket: Option<&str>) -> Result<()> {
    match (terminal, stays, socket) {
        (true, false, None) => {
            Err(Error::Refused("process.terminal: needs --console-socket where nobody stays in front".into()))
        }
        (false, _, Some(_)) => Err(Error::Refused("--console-socket: process.terminal is not set".into())),
        _ => Ok(()),
    }
}

pub fn tell(context: &Context, warnings: &[String]) {
    warnings.iter().for_each(|w| context.notices.warning(w));
}
