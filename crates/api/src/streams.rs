//! How the API server reaches into a running pod: exec, attach, port-forward and logs. The node agent implements it.

use crate::status::StatusResult;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use std::pin::Pin;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};

pub type Input = Pin<Box<dyn AsyncWrite + Send>>;
pub type Output = Pin<Box<dyn AsyncRead + Send>>;

/// Which pod and container. `container` may be empty when the pod has one.
#[derive(Clone, Debug)]
pub struct Target {
    pub namespace: String,
    pub pod: String,
    pub pod_uid: String,
    pub container: String,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
    /// The size a terminal begins with, if it is known by then; later ones come through `Session::resize`.
    pub size: Option<TerminalSize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

/// How an exec'd process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Exit code; 128 + n for a signal.
    Code(i32),
    /// It could not be run, or its container went away.
    Failed(String),
}

/// The live ends of a process. Dropping `stdin` closes it; dropping the session detaches.
pub struct Session {
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    /// Absent with a terminal: it comes merged in `stdout`.
    pub stderr: Option<Output>,
    pub resize: Option<mpsc::Sender<TerminalSize>>,
    pub exit: oneshot::Receiver<Exit>,
}

#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub tail_lines: Option<u64>,
    pub limit_bytes: Option<u64>,
    /// Only lines at or after this time, unix nanoseconds.
    pub since_nanos: Option<i128>,
    /// `All`, `Stdout` or `Stderr`.
    pub stream: String,
}

/// What is done to a running virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineAction {
    Pause,
    Unpause,
    /// Its power button is pressed, and it starts again when it has shut down.
    SoftReboot,
}

/// What of a running virtual machine a stream leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineStream {
    /// The serial line.
    Console,
    /// Screen, keyboard and pointer, in the RFB protocol.
    Display,
}

/// A byte stream both ways: one forwarded connection.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

#[async_trait]
pub trait PodStreams: Send + Sync + 'static {
    async fn exec(&self, target: &Target, command: Vec<String>, wanted: Wanted) -> StatusResult<Session>;
    async fn attach(&self, target: &Target, wanted: Wanted) -> StatusResult<Session>;
    async fn port_forward(&self, target: &Target, port: u16) -> StatusResult<Box<dyn Duplex>>;
    async fn logs(
        &self,
        target: &Target,
        options: LogOptions,
    ) -> StatusResult<BoxStream<'static, std::io::Result<Bytes>>>;

    /// What pods printed that are gone, of the object whose uid is `owner`; empty without any.
    async fn kept_logs(
        &self,
        _namespace: &str,
        owner: &str,
        _options: LogOptions,
    ) -> StatusResult<BoxStream<'static, std::io::Result<Bytes>>> {
        Err(crate::Status::bad_request(format!("no logs are kept of {owner}")))
    }

    /// `target.pod` may be empty when its uid is known.
    async fn machine(&self, target: &Target, _action: MachineAction) -> StatusResult<()> {
        Err(crate::Status::bad_request(format!("pod {} is no virtual machine here", target.pod_uid)))
    }

    /// `target.pod` may be empty when its uid is known.
    async fn machine_stream(&self, target: &Target, _stream: MachineStream) -> StatusResult<Box<dyn Duplex>> {
        Err(crate::Status::bad_request(format!("pod {} is no virtual machine here", target.pod_uid)))
    }
}
