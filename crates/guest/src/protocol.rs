//! What host and guest say to each other: the host opens a channel with a [`Request`], the guest answers on it. Between
//! versions as with the shim's ([`container::shim::protocol`]): fields are added with defaults, never changed.

use crate::tree::Tree;
use container::shim::protocol::{Command, Sandbox, Start, State, Streams};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};

pub const VERSION: u32 = 1;
/// The virtio-serial port's name.
pub const PORT_NAME: &str = "atoll.guest.0";
/// Where the agent listens if the machine has vsock.
pub const VSOCK_PORT: u32 = 1024;
/// Channels of one host at a time.
pub const MOST_CHANNELS: usize = 512;

/// Streams of a channel, as descriptors are numbered.
pub const INPUT: u8 = 0;
pub const OUTPUT: u8 = 1;
pub const ERRORS: u8 = 2;
pub const STREAMS: usize = 3;

/// Where things are in the guest.
pub const IMAGES: &str = "/images";
pub const VOLUMES: &str = "/volumes";
pub const LOGS: &str = "/logs";
pub const STATE: &str = "/state";
pub const RUN: &str = "/run/atoll";
pub const CGROUP: &str = "atoll/pod";

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// What the pod is; once.
    SetUp(Box<SetUp>),
    /// Brings files to what the host has.
    Files(Tree),
    /// A directory that containers share, and below it one more if `sub` is not empty.
    Directory {
        path: String,
        sub: String,
        mode: u32,
        group: u32,
    },
    Start(Box<Start>),
    List,
    /// Answered when something is no longer as it was at `seen`.
    Watch {
        seen: u64,
    },
    Signal {
        name: String,
        signal: i32,
    },
    Remove {
        name: String,
    },
    Exec {
        name: String,
        command: Box<Command>,
        streams: Streams,
    },
    Attach {
        name: String,
        streams: Streams,
    },
    /// On the channel of an exec or attach with a terminal.
    Resize {
        columns: u16,
        rows: u16,
    },
    Pause,
    Resume,
    Stats {
        name: String,
    },
    /// The bytes of a container's log that were not credited yet, until it has ended and all are.
    Logs {
        name: String,
        attempt: u32,
    },
    /// A connection to a port on the pod's loopback.
    Connect {
        port: u16,
    },
    /// The machine stood still and goes on: the time, unix nanoseconds, and what its random numbers are to begin with.
    Woke {
        clock: i64,
        seed: [u8; 32],
    },
    /// A file below [`VOLUMES`].
    Read {
        path: String,
        most: u32,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub struct SetUp {
    pub network: Network,
    /// Serial numbers of the disks with images; each is mounted below [`IMAGES`] by that name.
    pub images: Vec<String>,
    pub sandbox: Sandbox,
    /// Unix nanoseconds.
    pub clock: i64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Network {
    pub address: Option<Ipv4Addr>,
    pub address6: Option<Ipv6Addr>,
    pub gateway: Option<Ipv4Addr>,
    pub gateway6: Option<Ipv6Addr>,
    pub mtu: u32,
    /// Fixed neighbours: the next hops' hardware address.
    pub neighbour: Option<[u8; 6]>,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Started(State),
    List {
        sequence: u64,
        containers: Vec<State>,
    },
    Changed,
    Stats {
        cpu_nanos: u64,
        memory_bytes: u64,
        memory_working_set: u64,
        pids: u64,
    },
    Text(String),
    /// Streams follow, each with its bytes and its end; then [`Answer::Exited`].
    Streams(Streams),
    Exited {
        code: i32,
    },
    Error {
        kind: Failure,
        message: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    NoContainer,
    NotRunning,
    /// The program could not be executed: exit code that a shell would give.
    Exec(i32),
    Refused,
    Failed,
}
