//! Netlink: messages are built into batches, sent in one system call, and answered before that call returns, since the
//! kernel works them off synchronously.

pub mod conntrack;
pub mod nft;
pub mod parse;
pub mod qdisc;
pub mod route;
pub mod rules;
mod writer;

use crate::error::{Error, Result};
use crate::sys;
use parse::{Answer, Messages};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink::NETFILTER};
use std::io;
pub use writer::Writer;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

/// Largest batch; the kernel takes one in a single allocation.
const MAX_BATCH: usize = 256 << 20;

/// Requests in order, each with the name of what it does and the errors that mean "already so".
#[derive(Default)]
pub struct Batch {
    pub(crate) writer: Writer,
    steps: Vec<(&'static str, &'static [Errno])>,
}

impl Batch {
    pub fn new() -> Batch {
        Batch::default()
    }
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
    /// Adds one request; `fill` writes what follows the netlink header.
    pub(crate) fn request(
        &mut self,
        operation: &'static str,
        kind: u16,
        flags: u16,
        tolerated: &'static [Errno],
        fill: impl FnOnce(&mut Writer),
    ) {
        // The sequence number is the step's place; the socket is not shared between batches.
        let sequence = self.steps.len() as u32 + 1;
        self.writer.message(kind, flags | NLM_F_REQUEST, sequence, fill);
        self.steps.push((operation, tolerated));
    }
}

/// A netlink socket. It acts on the network namespace in which it was opened, whatever thread uses it.
pub struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl Socket {
    /// rtnetlink, in the calling thread's namespace.
    pub fn route() -> Result<Socket> {
        Socket::open(None)
    }
    /// nfnetlink (nf_tables, conntrack), in the calling thread's namespace.
    pub fn netfilter() -> Result<Socket> {
        Socket::open(Some(NETFILTER))
    }
    fn open(protocol: Option<rustix::net::Protocol>) -> Result<Socket> {
        let open = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
            sys::netlink_options(fd.as_fd())?;
            // Without CAP_NET_ADMIN in the initial namespace the forced sizes are refused; small batches still pass.
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&fd, 8 << 20);
            Ok(fd)
        };
        Ok(Socket { fd: open().map_err(Error::system("open a netlink socket"))?, buffer: vec![0; 64 << 10] })
    }

    /// Sends all requests at once; each was asked to be acknowledged. The first that failed is the error.
    pub fn send(&mut self, batch: Batch) -> Result<()> {
        let Batch { writer, steps } = batch;
        if steps.is_empty() {
            return Ok(());
        }
        self.write(writer.bytes())?;
        let mut failure: Option<(u32, Error)> = None;
        let mut answered = false;
        self.drain(|sequence, answer| {
            answered = true;
            if let Answer::Error { code, detail } = answer {
                let (operation, tolerated) =
                    steps.get((sequence as usize).wrapping_sub(1)).copied().unwrap_or(("commit the transaction", &[]));
                let first = failure.as_ref().is_none_or(|(earlier, _)| sequence < *earlier);
                if first && !tolerated.iter().any(|errno| errno.raw_os_error() == code) {
                    failure = Some((sequence, refusal(operation, code, detail)));
                }
            }
            Ok(())
        })?;
        match failure {
            Some((_, error)) => Err(error),
            None if !answered => Err(Error::Protocol("the kernel gave no answer")),
            None => Ok(()),
        }
    }

    /// Sends one request and hands every answering message (type, payload) to `each`. With `NLM_F_DUMP` in the request
    /// that may be many.
    pub(crate) fn query(&mut self, batch: Batch, mut each: impl FnMut(u16, &[u8])) -> Result<()> {
        let operation = batch.steps.first().map_or("query", |step| step.0);
        let tolerated = batch.steps.first().map_or(&[][..], |step| step.1);
        self.write(batch.writer.bytes())?;
        self.drain(|_, answer| match answer {
            Answer::Error { code, .. } if tolerated.iter().any(|errno| errno.raw_os_error() == code) => Ok(()),
            Answer::Error { code, detail } => Err(refusal(operation, code, detail)),
            Answer::Message { kind, payload } => {
                each(kind, payload);
                Ok(())
            }
            Answer::Acknowledged => Ok(()),
        })
    }

    /// Hands over datagrams that came without being asked for, until none is queued.
    pub(crate) fn receive(&mut self, mut each: impl FnMut(&[u8])) -> Result<()> {
        loop {
            match rustix::io::read(&self.fd, &mut self.buffer[..]) {
                Ok(read) => each(self.buffer.get(..read).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(Error::errno("receive from netlink")(errno)),
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > MAX_BATCH {
            return Err(Error::Protocol("more changes at once than the kernel takes"));
        }
        if bytes.len() > 64 << 10 {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&self.fd, bytes.len() * 2);
        }
        let written = loop {
            match rustix::io::write(&self.fd, bytes) {
                Err(Errno::INTR) => continue,
                other => break other.map_err(Error::errno("send to netlink"))?,
            }
        };
        if written == bytes.len() { Ok(()) } else { Err(Error::Protocol("a request was cut short")) }
    }

    /// Reads until nothing is queued. All answers are handed out before an error of `each` is returned, so that the
    /// socket is clean for its next use.
    fn drain(&mut self, mut each: impl FnMut(u32, Answer<'_>) -> Result<()>) -> Result<()> {
        let mut outcome = Ok(());
        loop {
            let read = match rustix::io::read(&self.fd, &mut self.buffer[..]) {
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return outcome,
                Err(errno) => return Err(Error::errno("receive from netlink")(errno)),
            };
            for message in Messages::new(self.buffer.get(..read).unwrap_or_default()) {
                let sequence = message.sequence;
                if let Some(answer) = message.answer() {
                    let result = each(sequence, answer);
                    outcome = outcome.and(result);
                }
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn refusal(operation: &'static str, code: i32, detail: &str) -> Error {
    let detail = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
    Error::Netlink { operation, detail, source: io::Error::from_raw_os_error(code) }
}
