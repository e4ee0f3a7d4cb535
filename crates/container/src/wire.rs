//! Frames on a Unix stream socket: four bytes of length (little-endian), then that many bytes of JSON. Descriptors ride
//! on a frame's length. Used between daemon and shim and between shim and the processes that set a container up.

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A container's arguments and environment may be large; the kernel's own limit for them is 2 MiB.
pub const MAX_FRAME: usize = 4 << 20;
const MAX_FDS: usize = 4;

/// Sends one frame. On a non-blocking socket a full buffer is an error: the receiver is not one that reads slowly.
pub fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("message of {length} bytes, limit {MAX_FRAME}"),
        ));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());

    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    let mut rest = frame.as_slice();
    while !rest.is_empty() {
        match sendmsg(&socket, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                ancillary.clear();
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Collects frames from a socket, blocking or not.
#[derive(Default)]
pub struct Reader {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    Some,
    /// Nothing there now (non-blocking sockets).
    Nothing,
    End,
}

impl Reader {
    pub fn fill(&mut self, socket: impl AsFd) -> io::Result<Filled> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut chunk = [0; 4096];
        let received = loop {
            match recvmsg(&socket, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Filled::Nothing),
                Err(Errno::CONNRESET) => return Ok(Filled::End),
                other => break other?,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > 2 * MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors"));
        }
        self.bytes.extend_from_slice(chunk.get(..received.bytes).unwrap_or_default());
        Ok(if received.bytes == 0 { Filled::End } else { Filled::Some })
    }

    /// The next whole frame, if it is there.
    pub fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some(header) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("message of {length} bytes, limit {MAX_FRAME}"),
            ));
        }
        let Some(frame) = self.bytes.get(4..4 + length) else { return Ok(None) };
        let message = serde_json::from_slice(frame);
        self.bytes.drain(..4 + length);
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(Some(message?))
    }

    /// A descriptor that came with what was read so far.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }
}

/// Waits for one frame on a blocking socket.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd, reader: &mut Reader) -> io::Result<T> {
    loop {
        if let Some(message) = reader.next()? {
            return Ok(message);
        }
        match reader.fill(&socket)? {
            Filled::Some => {}
            Filled::Nothing => return Err(io::ErrorKind::WouldBlock.into()),
            Filled::End => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn carries_large_messages_and_descriptors() {
        let (a, b) = UnixStream::pair().expect("pair");
        let text = "x".repeat(1 << 20);
        let expected = text.clone();
        let sender = std::thread::spawn(move || {
            send(&a, &text, &[a.as_fd(), a.as_fd()]).expect("sent");
            send(&a, &7, &[]).expect("sent");
        });
        let mut reader = Reader::default();
        let got: String = receive(&b, &mut reader).expect("received");
        assert!(got == expected);
        assert!(reader.take_fd().is_some() && reader.take_fd().is_some() && reader.take_fd().is_none());
        assert_eq!(receive::<u32>(&b, &mut reader).expect("received"), 7);
        sender.join().expect("sender");
        assert_eq!(receive::<u32>(&b, &mut reader).expect_err("end").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn refuses_what_is_too_long_or_no_json() {
        for bytes in [&[0xff, 0xff, 0xff, 0xff][..], &[2, 0, 0, 0, b'{', b'x']] {
            let (mut a, b) = UnixStream::pair().expect("pair");
            a.write_all(bytes).expect("written");
            let outcome = receive::<u32>(&b, &mut Reader::default());
            assert_eq!(outcome.expect_err("refused").kind(), io::ErrorKind::InvalidData);
        }
    }
}
