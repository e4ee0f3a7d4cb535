//! A terminal's master side as tokio streams.

use api::streams::{Input, Output, TerminalSize};
use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::unix::pipe;

/// A terminal is polled, read and written as a pipe is. The descriptor does not block.
pub fn terminal_input(master: OwnedFd) -> io::Result<Input> {
    Ok(Box::pin(pipe::Sender::from_file_unchecked(File::from(master))?))
}

pub fn terminal_output(master: OwnedFd) -> io::Result<Output> {
    Ok(Box::pin(TerminalOutput(pipe::Receiver::from_file_unchecked(File::from(master))?)))
}

pub fn resize(master: &OwnedFd, size: TerminalSize) {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // A terminal that has just been closed has no size; nobody is there to see it.
    let _ = tcsetwinsize(master, size);
}

struct TerminalOutput(pipe::Receiver);

impl AsyncRead for TerminalOutput {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.0).poll_read(cx, buf) {
            // The last process with the terminal has closed it: the end.
            Poll::Ready(Err(e)) if e.raw_os_error() == Some(Errno::IO.raw_os_error()) => Poll::Ready(Ok(())),
            other => other,
        }
    }
}
