//! Those who are attached to a container: they see its output as it comes and may write to its input.

use super::protocol::{Response, Streams};
use super::server::Server;
use crate::error::{During, Result};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A viewer that is further behind loses output; a workload never waits for one.
const VIEWER_BUFFER: usize = 1 << 20;

/// Somebody who is attached.
pub struct Viewer {
    pub connection: u32,
    pub outputs: [Option<OwnedFd>; 2],
}

impl Server {
    pub fn attach(&mut self, connection: u32, name: &str, wanted: Streams) -> Result<()> {
        let (_, container) = self.running(name)?;
        let mut give: Vec<OwnedFd> = Vec::new();
        let mut outputs = [None, None];
        let mut given = Streams::default();
        let terminal = container.terminal.is_some();
        if let Some(master) = &container.terminal {
            give.push(master.try_clone().during(|| "sharing the terminal".into())?);
        } else if wanted.stdin && container.stdin.is_some() {
            // With stdinOnce the first one attached has the only end: closing it is the end of the input.
            let end = if container.stdin_once { container.stdin.take() } else { None };
            let end = match (end, &container.stdin) {
                (Some(end), _) => Some(end),
                (None, Some(end)) => Some(end.try_clone().during(|| "sharing standard input".into())?),
                (None, None) => None,
            };
            given.stdin = end.is_some();
            give.extend(end);
        }
        for (which, wish) in [wanted.stdout, wanted.stderr && !terminal].into_iter().enumerate() {
            if wish && container.streams.get(which).is_some_and(Option::is_some) {
                let (read, write) =
                    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).during(|| "making a pipe".into())?;
                let _ = rustix::pipe::fcntl_setpipe_size(&write, VIEWER_BUFFER);
                give.push(read);
                if let Some(output) = outputs.get_mut(which) {
                    *output = Some(write);
                }
            }
        }
        (given.stdout, given.stderr) = (outputs[0].is_some(), outputs[1].is_some());
        container.viewers.push(Viewer { connection, outputs });
        let fds: Vec<BorrowedFd<'_>> = give.iter().map(AsFd::as_fd).collect();
        self.respond(connection, &Response::Streams { terminal, streams: given }, &fds);
        Ok(())
    }
}

/// Copies of what was read of one stream.
pub fn show(viewers: &mut [Viewer], which: usize, data: &[u8]) {
    for viewer in viewers {
        let Some(output) = viewer.outputs.get_mut(which) else { continue };
        let mut rest = data;
        while let Some(pipe) = output.as_ref().filter(|_| !rest.is_empty()) {
            match rustix::io::write(pipe, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => *output = None,
            }
        }
    }
}
