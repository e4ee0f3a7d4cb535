//! What daemon and shim say to each other. A daemon may be newer than a shim: fields are added with defaults, never
//! changed; a request that a shim does not know is answered with an error, and the version in [`Response::Hello`] tells
//! what it knows.

use crate::process::Confinement;
use crate::spec::{ConsoleSize, IdMapping, Resources, Spec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

pub const VERSION: u32 = 1;
/// Below the run directory.
pub const SOCKET: &str = "shim.sock";

/// A pod's sandbox, given to a new shim on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sandbox {
    /// For people: `namespace/name`.
    pub title: String,
    /// The shim's own directory on disk.
    pub dir: PathBuf,
    pub run_dir: PathBuf,
    pub hostname: String,
    /// Container ids 0 to `size` - 1; absent: the host's user namespace.
    pub id_map: Option<IdMapping>,
    pub network: Network,
    /// `network` is the host's: its settings are not the pod's to change.
    #[serde(default)]
    pub host_network: bool,
    /// Relative to each hierarchy's mount.
    pub cgroup: PathBuf,
    pub resources: Resources,
    #[serde(default)]
    pub sysctl: BTreeMap<String, String>,
    #[serde(default)]
    pub share_pid: bool,
    /// By Landlock, where the kernel has it, abstract sockets and processes of others are out of reach even should a
    /// namespace be shared with them; all containers of the sandbox are one domain.
    #[serde(default)]
    pub scoped: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Network {
    Host,
    New,
    At(PathBuf),
}

/// One container. Namespaces and the id map in `spec` are the sandbox's: the shim fills them in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    pub name: String,
    pub attempt: u32,
    pub spec: Spec,
    /// Lowest first.
    pub layers: Vec<PathBuf>,
    pub confinement: Confinement,
    pub stdin: bool,
    pub stdin_once: bool,
    pub log_path: PathBuf,
    pub log_max_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Streams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// What to execute in a running container; user, environment, working directory, capabilities and limits are the
/// container's own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Command {
    pub args: Vec<String>,
    /// `NAME=value`, over the container's.
    pub env: Vec<String>,
    pub terminal: bool,
    pub console_size: Option<ConsoleSize>,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Hello {
        version: u32,
    },
    Start(Box<Start>),
    List,
    /// Answered when the sequence number is no longer `seen`.
    Watch {
        seen: u64,
    },
    Signal {
        name: String,
        signal: i32,
    },
    /// Forgets an ended container.
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
    Pause,
    Resume,
    /// Kills all and ends.
    Shutdown,
}

/// Descriptors that come along are named by `Streams`, in this order: terminal, stdin, stdout, stderr.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    Hello {
        version: u32,
        pid: u32,
    },
    Started(State),
    List {
        sequence: u64,
        containers: Vec<State>,
    },
    Changed {
        sequence: u64,
    },
    Done,
    /// An exec or attach is under way; `Exited` follows on the same connection.
    Streams {
        terminal: bool,
        streams: Streams,
    },
    Exited {
        code: i32,
    },
    Error {
        kind: ErrorKind,
        message: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    NoContainer,
    NotRunning,
    /// The program could not be executed: exit code that a shell would give.
    Exec(i32),
    /// The request itself asks for what cannot be.
    Refused,
    Failed,
}

/// A container as the shim knows it, also on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub name: String,
    pub attempt: u32,
    pub pid: Option<u32>,
    /// Relative to each hierarchy's mount.
    pub cgroup: PathBuf,
    pub phase: Phase,
}

/// Times are unix nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    Running { started: i64 },
    Exited { started: i64, finished: i64, code: i32, signal: Option<i32>, oom_killed: bool, message: String },
}
