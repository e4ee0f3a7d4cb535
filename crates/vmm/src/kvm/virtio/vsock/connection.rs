//! One stream: `Asking -> Requested -> Open -> Closing`, any of them may end at once.

use super::packet::{CREDIT, Header, Op, SIZE};
use crate::kvm::Fault;
use crate::kvm::memory::Memory;
use crate::kvm::virtio::queue::{self, Segment};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

/// The longest `CONNECT` line.
const LONGEST_LINE: usize = 32;
const MOST_AT_ONCE: usize = 64 << 10;
/// In a shutdown: nothing more will be received, nothing more will be sent.
const BOTH: u32 = 3;

pub enum Stage {
    /// The client's line so far.
    Asking(Vec<u8>),
    Requested,
    Open,
    /// The host's side has ended; the guest has been told.
    Closing,
}

pub struct Connection {
    pub stream: UnixStream,
    pub stage: Stage,
    port: u32,
    pub guest_port: u32,
    over: bool,
    /// From the guest, not yet taken by the client; the guest's credit bounds it.
    pending: Vec<u8>,
    forwarded: u32,
    told: u32,
    /// The guest's credit and what of it is used.
    peer_credit: u32,
    peer_forwarded: u32,
    sent: u32,
    ended: bool,
}

impl Connection {
    pub fn new(stream: UnixStream, port: u32) -> Self {
        Connection {
            stream,
            stage: Stage::Asking(Vec::new()),
            port,
            guest_port: 0,
            over: false,
            pending: Vec::new(),
            forwarded: 0,
            told: 0,
            peer_credit: 0,
            peer_forwarded: 0,
            sent: 0,
            ended: false,
        }
    }

    fn say(&self, op: Op) -> Header {
        Header { forwarded: self.forwarded, ..Header::to_guest(self.port, self.guest_port, op) }
    }

    pub fn over(&self) -> bool {
        self.over
    }

    fn credit(&self) -> u32 {
        self.peer_credit.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    pub fn wants_input(&self) -> bool {
        match self.stage {
            Stage::Asking(_) => true,
            Stage::Open => self.credit() > 0,
            Stage::Requested | Stage::Closing => false,
        }
    }

    pub fn wants_output(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Reads the client's line, byte by byte so that nothing after it is taken; then asks the guest.
    pub fn ask(&mut self) -> Option<Header> {
        let Stage::Asking(line) = &mut self.stage else { return None };
        let mut byte = [0u8];
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) if byte != *b"\n" && line.len() < LONGEST_LINE => line.extend(byte),
                Ok(1) if byte == *b"\n" => break,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
                _ => {
                    self.over = true;
                    return None;
                }
            }
        }
        let port =
            std::str::from_utf8(line).ok().and_then(|l| l.strip_prefix("CONNECT ")).and_then(|p| p.trim().parse().ok());
        let Some(port) = port else {
            self.over = true;
            return None;
        };
        self.guest_port = port;
        self.stage = Stage::Requested;
        Some(self.say(Op::Request))
    }

    /// Moves the client's bytes into a receive buffer; the number of bytes there, `None` if there is nothing.
    pub fn read(&mut self, memory: &Memory, room: &[Segment]) -> Result<Option<u32>, Fault> {
        let space = (queue::length(room) as usize).checked_sub(SIZE);
        let space = space.ok_or_else(|| Fault("a receive buffer smaller than a header".into()))?;
        let mut buffer = vec![0u8; space.min(self.credit() as usize).min(MOST_AT_ONCE)];
        if buffer.is_empty() {
            return Ok(None);
        }
        let n = match self.stream.read(&mut buffer) {
            Ok(0) => {
                self.ended = true;
                return Ok(None);
            }
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(None),
            Err(_) => {
                self.ended = true;
                return Ok(None);
            }
        };
        let header = Header { length: n as u32, ..self.say(Op::Data) };
        self.told = self.forwarded;
        queue::scatter(memory, room, &header.encode())?;
        queue::scatter(memory, &queue::part(room, SIZE as u64, n as u64), &buffer)?;
        self.sent = self.sent.wrapping_add(n as u32);
        Ok(Some((SIZE + n) as u32))
    }

    /// After a read that found nothing: what to tell the guest if that was the end.
    pub fn ended(&mut self) -> Option<Header> {
        if !self.ended {
            return None;
        }
        self.stage = Stage::Closing;
        Some(Header { flags: BOTH, ..self.say(Op::Shutdown) })
    }

    /// Gives the client what waits for it; the guest is told of its new credit when half of it was used.
    pub fn drain(&mut self) -> Option<Header> {
        while !self.pending.is_empty() {
            match self.stream.write(&self.pending) {
                Ok(n) if n > 0 => {
                    self.pending.drain(..n.min(self.pending.len()));
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                _ => {
                    self.pending.clear();
                    self.ended = true;
                    return self.ended();
                }
            }
        }
        if self.forwarded.wrapping_sub(self.told) < CREDIT / 2 {
            return None;
        }
        self.told = self.forwarded;
        Some(self.say(Op::CreditUpdate))
    }

    /// What the guest sent on this connection; the answer, if it needs one.
    pub fn packet(&mut self, header: &Header, data: Vec<u8>) -> Option<Header> {
        (self.peer_credit, self.peer_forwarded) = (header.credit, header.forwarded);
        match (header.op, &self.stage) {
            (Op::Response, Stage::Requested) => {
                self.stage = Stage::Open;
                self.pending = format!("OK {}\n", self.port).into_bytes();
                // these bytes are ours, not the guest's: they do not count
                self.forwarded = self.forwarded.wrapping_sub(self.pending.len() as u32);
                self.drain();
                None
            }
            (Op::Data, Stage::Open | Stage::Closing) => {
                if self.pending.len() + data.len() > CREDIT as usize + LONGEST_LINE {
                    self.over = true;
                    return Some(self.say(Op::Reset));
                }
                self.pending.extend(data);
                self.drain()
            }
            (Op::CreditRequest, _) => Some(self.say(Op::CreditUpdate)),
            (Op::CreditUpdate, _) => None,
            (Op::Shutdown, _) if header.flags & BOTH != BOTH => {
                let _ = self.drain();
                None
            }
            (Op::Shutdown, _) => {
                let _ = self.drain();
                self.over = true;
                Some(self.say(Op::Reset))
            }
            (Op::Reset, _) => {
                let _ = self.drain();
                self.over = true;
                None
            }
            (Op::Request | Op::Response | Op::Data | Op::Unknown, _) => {
                self.over = true;
                Some(self.say(Op::Reset))
            }
        }
    }
}
