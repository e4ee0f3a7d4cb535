//! Lines of text with open descriptors beside them, over a unix socket.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Descriptors with one line; more are closed.
pub const MOST_DESCRIPTORS: usize = 4;

/// Sends `line`, which ends with a newline; the descriptors go with its first byte.
pub fn send(stream: &UnixStream, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one line"));
    }
    let mut done = sendmsg(stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    while let Some(rest) = line.get(done..).filter(|rest| !rest.is_empty()) {
        done += sendmsg(stream, &[IoSlice::new(rest)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// Reads such lines.
pub struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Lines {
    pub fn new(stream: UnixStream) -> Self {
        Lines { stream, buffer: Vec::new(), descriptors: Vec::new() }
    }

    /// The next line and what came with it; `None` at the end, and for a line longer than `limit`.
    pub fn next(&mut self, limit: usize) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line = self.buffer.drain(..=end).collect();
                return Ok(Some((line, std::mem::take(&mut self.descriptors))));
            }
            if self.buffer.len() >= limit || self.receive()? == 0 {
                return Ok(None);
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0u8; 1024];
        let got = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?.bytes,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                let room = MOST_DESCRIPTORS.saturating_sub(self.descriptors.len());
                self.descriptors.extend(descriptors.take(room));
            }
        }
        self.buffer.extend(bytes.get(..got).unwrap_or_default());
        Ok(got)
    }
}

/// What follows the lines, as it comes.
impl Read for Lines {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.buffer.is_empty() {
            return self.stream.read(to);
        }
        let n = self.buffer.len().min(to.len());
        for (to, byte) in to.iter_mut().zip(self.buffer.drain(..n)) {
            *to = byte;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn lines_carry_descriptors_and_the_rest_is_a_stream() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&ours, b"one\n", &[file.as_fd(), file.as_fd()]).unwrap();
        (&ours).write_all(b"two\nrest").unwrap();
        let mut lines = Lines::new(theirs);
        let (line, descriptors) = lines.next(100).unwrap().unwrap();
        assert_eq!((line.as_slice(), descriptors.len()), (&b"one\n"[..], 2));
        let (line, descriptors) = lines.next(100).unwrap().unwrap();
        assert_eq!((line.as_slice(), descriptors.len()), (&b"two\n"[..], 0));
        drop(ours);
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "rest");
    }

    #[test]
    fn a_line_without_end_is_the_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(&[b'x'; 5000]).unwrap();
        assert!(Lines::new(theirs).next(4096).unwrap().is_none());
    }
}
