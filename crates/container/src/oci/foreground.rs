//! Standing in front of a process: signals go on to it, a terminal is passed through, its exit code is ours.

use crate::error::{During, Error, Result};
use crate::sys;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// All that can be sent on; the terminal's size is looked at instead.
const FORWARDED: &[i32] = &[
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGCONT,
    libc::SIGWINCH,
];
/// `struct signalfd_siginfo`, which begins with the signal's number.
const SIGNAL_RECORD: usize = 128;

pub struct Front {
    signals: OwnedFd,
}

impl Front {
    /// Before the process is there, so that no signal is lost.
    pub fn prepare() -> Result<Self> {
        Ok(Self { signals: sys::signals_as_descriptor(FORWARDED).during(|| "taking signals".into())? })
    }

    /// Until the process, a child of this one, has ended.
    pub fn wait(self, pid: u32, terminal: Option<OwnedFd>) -> Result<i32> {
        let raw =
            Pid::from_raw(pid as i32).ok_or_else(|| Error::Refused("the container's process is missing".into()))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).during(|| "watching the container".into())?;
        let _raw_mode = terminal.as_ref().and_then(|master| RawMode::enter(master.as_fd()));
        self.relay(pidfd.as_fd(), terminal)?;
        match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).during(|| "waiting".into())? {
            Some(status) => Ok(status.exit_status().or(status.terminating_signal().map(|s| 128 + s)).unwrap_or(255)),
            None => Ok(255),
        }
    }

    fn relay(&self, pidfd: BorrowedFd<'_>, terminal: Option<OwnedFd>) -> Result<()> {
        let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
        let mut input_open = true;
        loop {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
            if let Some(master) = &terminal {
                fds.push(PollFd::new(master, PollFlags::IN));
                if input_open {
                    fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
                }
            }
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => return Err(Error::step("waiting", e)),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            let at = |n: usize| ready.get(n).copied().unwrap_or(false);
            if let Some(master) = &terminal {
                if at(2) {
                    copy(master.as_fd(), stdout.as_fd());
                }
                if at(3) {
                    input_open = copy(stdin.as_fd(), master.as_fd());
                }
            }
            if at(1) {
                self.forward(pidfd, terminal.as_ref());
            }
            if at(0) {
                // What is still in the terminal is the process's last word.
                while terminal.as_ref().is_some_and(|master| readable(master) && copy(master.as_fd(), stdout.as_fd())) {
                }
                return Ok(());
            }
        }
    }

    fn forward(&self, pidfd: BorrowedFd<'_>, terminal: Option<&OwnedFd>) {
        let mut record = [0; SIGNAL_RECORD];
        while rustix::io::read(&self.signals, &mut record).is_ok_and(|n| n == SIGNAL_RECORD) {
            let Some(number) = record.first_chunk::<4>() else { return };
            match (i32::from_ne_bytes(*number), terminal) {
                (libc::SIGWINCH, Some(master)) => resize(master.as_fd()),
                (signal, _) => {
                    let _ = sys::send_signal(pidfd, signal);
                }
            }
        }
    }
}

fn readable(fd: &OwnedFd) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0) && fds.iter().any(|f| f.revents().contains(PollFlags::IN))
}

/// One turn; false at the end.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; 16 * 1024];
    let read = match rustix::io::read(from, &mut buffer) {
        Ok(0) => return false,
        Ok(n) => n,
        Err(Errno::INTR | Errno::AGAIN) => return true,
        // A terminal whose last user has gone says so with an error.
        Err(_) => return false,
    };
    let mut rest = buffer.get(..read).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(to, PollFlags::OUT)], None);
            }
            Err(_) => return false,
        }
    }
    true
}

fn resize(master: BorrowedFd<'_>) {
    if let Ok(size) = tcgetwinsize(std::io::stdin()) {
        let _ = tcsetwinsize(master, size);
    }
}

/// The caller's terminal passes everything through; given back at the end.
struct RawMode {
    before: Termios,
}

impl RawMode {
    fn enter(master: BorrowedFd<'_>) -> Option<Self> {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            return None;
        }
        resize(master);
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}
