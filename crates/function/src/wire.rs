//! The control protocol between daemon and host: packets on a `SOCK_SEQPACKET` socket.
//!
//! A packet is one byte and then JSON. Byte 0: the JSON follows. Byte 1: it is in a memory file, the first descriptor that
//! comes with the packet. Further descriptors belong to the request. One reply per request, in order.

use crate::error::{Error, Result};
use crate::host::Buckets;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Grows when a message changes its meaning; a host of another version is replaced when it has no functions left.
pub(crate) const VERSION: u32 = 2;

const INLINE: usize = 32 << 10;
/// Bytes of one message: environments are large, not huge.
const LIMIT: u64 = 16 << 20;
const DESCRIPTORS: usize = 8;

/// What one function may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionLimits {
    /// Linear memory of one request's instance, bytes.
    pub memory_bytes: u64,
    /// Requests served at once; four times as many may wait.
    pub concurrency: u32,
    /// From a request's arrival to the beginning of its answer; the whole may take ten times as long. Milliseconds.
    pub timeout_ms: u64,
    /// Processor time of one request, milliseconds; 0 is as much as its time limit lets it have.
    pub cpu_ms: u64,
    /// Bytes of one answer's body.
    pub response_bytes: u64,
    /// Requests that one request's instance may send itself.
    pub outbound_requests: u32,
    /// Bytes of the body of such a request, and of its answer's.
    pub outbound_bytes: u64,
}

impl Default for FunctionLimits {
    fn default() -> Self {
        FunctionLimits {
            memory_bytes: 256 << 20,
            concurrency: 64,
            timeout_ms: 60_000,
            cpu_ms: 0,
            response_bytes: 64 << 20,
            outbound_requests: 64,
            outbound_bytes: 64 << 20,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FunctionSpec {
    /// Unique in the host.
    pub id: String,
    /// Of the compiled code: functions of the same code share its memory.
    pub code: String,
    pub env: Vec<(String, String)>,
    pub args: Vec<String>,
    pub limits: FunctionLimits,
    /// The log is rotated from outside; this is how large it should get. The host stops writing at four times as much.
    pub log_max_bytes: u64,
}

/// Times are unix nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    pub id: String,
    pub started: i64,
    pub exit: Option<Exit>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    pub signal: Option<i32>,
    pub finished: i64,
    pub message: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionStats {
    /// Time in which the function's code or the host for it ran.
    pub cpu_nanos: u64,
    /// Linear memory of the instances alive now.
    pub memory_bytes: u64,
    /// The most that one instance had.
    pub memory_peak_bytes: u64,
    pub requests: u64,
    /// Requests that were the first since the function's code was loaded.
    pub cold_starts: u64,
    /// Requests that wait for a place now, and how long those waited that have got one, microseconds.
    pub waiting: u64,
    pub queue_micros: u64,
    /// Requests by how long they took, arrival to end, and all their time, microseconds. Bounds: [`crate::BOUNDS`].
    pub durations: Buckets,
    pub duration_micros: u64,
    /// Bytes of requests' bodies.
    pub received_bytes: u64,
    /// Requests answered with an error of the host's: traps, time limits, too many at once.
    pub failures: u64,
    pub in_flight: u64,
    /// Time in which requests had an instance, microseconds.
    pub run_micros: u64,
    /// What they are charged: for each its time times its memory at the end, KiB by microseconds.
    pub memory_kib_micros: u64,
    /// Bytes of answers' bodies.
    pub sent_bytes: u64,
    /// Requests that instances sent themselves, and bytes of their connections.
    pub outbound_requests: u64,
    pub outbound_sent_bytes: u64,
    pub outbound_received_bytes: u64,
}

impl FunctionStats {
    /// GiB by seconds.
    pub fn gib_seconds(&self) -> f64 {
        self.memory_kib_micros as f64 / (1u64 << 20) as f64 / 1e6
    }
}

/// A span of one function's invocation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// The function's id.
    pub function: String,
    pub span: spans::Span,
}

/// What a host has, and the number of the last change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    pub sequence: u64,
    pub functions: Vec<FunctionState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    Hello,
    /// With three descriptors: compiled code, listening socket, log; or five, with a connector's socket and the list of
    /// certificate authorities.
    Add(Box<FunctionSpec>),
    /// Lets requests under way finish for so long, then ends them.
    Stop {
        id: String,
        drain_ms: u64,
        signal: Option<i32>,
    },
    /// Forgets a function that has ended.
    Forget {
        id: String,
    },
    /// With one descriptor: the log from now on.
    Log {
        id: String,
    },
    List,
    Stats {
        id: String,
    },
    /// Spans of invocations; while they are fetched, new ones are kept.
    Spans,
    /// Answered when the number of the last change is greater.
    Changed {
        since: u64,
    },
    /// Ends the host if it has no functions.
    Retire,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Hello { version: u32 },
    Done,
    Started { started: i64 },
    Listing(Listing),
    Stats(FunctionStats),
    Changed { sequence: u64 },
    Spans { spans: Vec<Recorded>, dropped: u64 },
    Unknown { id: String },
    Refused { message: String },
}

pub(crate) fn send(socket: impl AsFd, message: &impl Serialize, descriptors: &[BorrowedFd]) -> Result<()> {
    let json = serde_json::to_vec(message).map_err(|e| Error::Protocol(e.to_string()))?;
    let failed = |e: std::io::Error| Error::Protocol(format!("memory file: {e}"));
    let mut all: Vec<BorrowedFd> = Vec::new();
    let mut packet = vec![0u8];
    let outside;
    if json.len() <= INLINE {
        packet.extend_from_slice(&json);
    } else {
        let mut file = File::from(memfd_create("message", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
        file.write_all(&json).map_err(failed)?;
        outside = OwnedFd::from(file);
        packet = vec![1u8];
        all.push(outside.as_fd());
    }
    all.extend_from_slice(descriptors);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !all.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&all)) {
        return Err(Error::Protocol("too many descriptors in one message".into()));
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(&packet)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(Error::NotRunning),
            Err(e) => return Err(Error::Protocol(format!("send: {e}"))),
        }
    }
}

/// Receives one message; `None` when the other side is gone.
pub(crate) fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<(T, Vec<OwnedFd>)>> {
    match packet(socket.as_fd()) {
        Ok(Some(packet)) => unpack(packet).map(Some),
        Ok(None) => Ok(None),
        Err(e) => Err(Error::Protocol(format!("receive: {e}"))),
    }
}

/// What came with one packet; `None` when the other side is gone.
pub(crate) type Packet = (Vec<u8>, Vec<OwnedFd>);

pub(crate) fn packet(socket: BorrowedFd) -> rustix::io::Result<Option<Packet>> {
    let mut packet = vec![0u8; INLINE + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut packet)];
        match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET | Errno::NOTCONN) => return Ok(None),
            Err(e) => return Err(e),
        }
    };
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    packet.truncate(received.bytes);
    Ok(Some((packet, descriptors)))
}

pub(crate) fn unpack<T: DeserializeOwned>((packet, mut descriptors): Packet) -> Result<(T, Vec<OwnedFd>)> {
    let bad = |why: &str| Error::Protocol(why.to_owned());
    let json = match packet.split_first() {
        Some((0, json)) => json.to_vec(),
        Some((1, _)) if !descriptors.is_empty() => read_all(File::from(descriptors.remove(0)))?,
        _ => return Err(bad("a packet of unknown form")),
    };
    let message = serde_json::from_slice(&json).map_err(|e| bad(&format!("a message that cannot be read: {e}")))?;
    Ok((message, descriptors))
}

fn read_all(file: File) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::Protocol(format!("memory file: {e}"));
    let length = file.metadata().map_err(failed)?.len();
    if length > LIMIT {
        return Err(Error::Protocol(format!("a message of {length} bytes; the limit is {LIMIT}")));
    }
    let mut content = vec![0u8; length as usize];
    file.read_exact_at(&mut content, 0).map_err(failed)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn messages_of_any_size_carry_descriptors() {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        for length in [1, INLINE, INLINE * 10] {
            let env = vec![("A".to_owned(), "x".repeat(length))];
            let spec = FunctionSpec {
                id: "a".into(),
                code: "c".into(),
                env: env.clone(),
                args: vec![],
                limits: FunctionLimits::default(),
                log_max_bytes: 1,
            };
            let passed = File::open("/dev/null").unwrap();
            send(&a, &Request::Add(Box::new(spec)), &[passed.as_fd(), passed.as_fd(), passed.as_fd()]).unwrap();
            let (request, descriptors) = receive::<Request>(&b).unwrap().unwrap();
            let Request::Add(got) = request else { panic!("another request") };
            assert_eq!((got.env, descriptors.len()), (env, 3));
        }
        drop(a);
        assert!(receive::<Request>(&b).unwrap().is_none());
    }
}
