//! Exec and attach: a session's ends on one side, the client's streams on the other.
//!
//! Five streams: standard input, output and error, terminal sizes, and one for how it ended. WebSocket numbers them,
//! SPDY names them in a header.

use super::spdy::{self, Connection};
use super::websocket::{self, Channel, Channels, Encoding};
use api::status::StatusResult;
use api::streams::{Exit, Input, Output, Session, TerminalSize, Wanted};
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub const WEBSOCKET_PROTOCOLS: &[&str] =
    &["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io"];
pub const SPDY_PROTOCOLS: &[&str] = &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Since v5: the payload is the number of the channel that ends.
const CLOSE: u8 = 255;

/// How long a client may take to open its streams.
const STREAMS_WITHIN: Duration = Duration::from_secs(30);
/// How long output may stay silent after the process has ended, before we stop waiting for whoever else (a process it
/// left behind) holds the other end open.
const SILENCE: Duration = Duration::from_secs(5);
/// What a WebSocket client gets to be ready to listen.
const HEAD_START: Duration = Duration::from_millis(20);
/// How long a program waits for the size of its terminal; some clients never tell.
const SIZE_WITHIN: Duration = Duration::from_millis(500);
const BUFFER: usize = 32 << 10;
/// Longest text of one terminal size.
const MAX_SIZE_TEXT: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Exec,
    /// How the container ends is its status' matter: detaching and ending are both success.
    Attach,
}

/// Starts a session.
pub type Start = Box<dyn FnOnce(Wanted) -> BoxFuture<'static, StatusResult<Session>> + Send>;

pub enum Begin {
    Started(Box<Session>),
    /// To be started when the size of the client's terminal is known.
    WithSize(Start),
}

/// A session and what the client asked for.
pub struct Remote {
    pub begin: Begin,
    pub wanted: Wanted,
    pub purpose: Purpose,
    pub protocol: &'static str,
}

/// Where standard input comes from.
trait Source: Send {
    fn recv(&mut self) -> impl Future<Output = Option<Bytes>> + Send;
}

/// Where output goes.
trait Target: Send {
    /// False when no one will read it.
    fn send(&mut self, data: Bytes) -> impl Future<Output = bool> + Send;
    fn finish(self) -> impl Future<Output = ()> + Send;
}

impl Source for mpsc::Receiver<Bytes> {
    async fn recv(&mut self) -> Option<Bytes> {
        mpsc::Receiver::recv(self).await
    }
}

impl Source for spdy::Receive {
    async fn recv(&mut self) -> Option<Bytes> {
        spdy::Receive::recv(self).await
    }
}

impl Target for Channel {
    async fn send(&mut self, data: Bytes) -> bool {
        Channel::send(self, &data).await
    }
    async fn finish(self) {}
}

impl Target for spdy::Send {
    async fn send(&mut self, data: Bytes) -> bool {
        spdy::Send::send(self, data).await.is_ok()
    }
    async fn finish(self) {
        // Gone is gone.
        let _ = spdy::Send::finish(self).await;
    }
}

/// The client's streams.
struct Ends<S, T> {
    stdin: Option<S>,
    stdout: Option<T>,
    stderr: Option<T>,
    error: T,
    sizes: mpsc::Receiver<TerminalSize>,
}

impl Remote {
    pub async fn over_websocket<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, io: IO) {
        let encoding = if self.protocol.contains("base64") { Encoding::Base64 } else { Encoding::Binary };
        let channels = Channels::start(websocket::server(io).await, encoding);
        let gone = channels.gone();
        let (stdin, input) = mpsc::channel(8);
        let (resize, sizes) = mpsc::channel(8);
        let ends = Ends {
            stdin: self.wanted.stdin.then_some(input),
            stdout: self.wanted.stdout.then(|| channels.channel(STDOUT)),
            stderr: self.wanted.stderr.then(|| channels.channel(STDERR)),
            error: channels.channel(ERROR),
            sizes,
        };
        // kubectl starts reading before it has made its streams and drops what comes for one that is not there yet.
        tokio::time::sleep(HEAD_START).await;
        // Clients take the first message, an empty one, as the sign that the session has begun.
        let first = ends.stdout.as_ref().or(ends.stderr.as_ref()).unwrap_or(&ends.error);
        first.send(&[]).await;
        let (incoming, ending) = channels.split();
        let closes = self.protocol.starts_with("v5.");
        let mut reading = tokio::spawn({
            let gone = gone.clone();
            async move {
                read_channels(incoming, stdin, resize, closes).await;
                gone.cancel();
            }
        });
        let ended = pump(self.begin, self.wanted, ends, self.protocol, self.purpose, &gone).await;
        if ended {
            let reading = async {
                let _ = (&mut reading).await;
            };
            ending.finish(reading).await;
        }
        gone.cancel();
        reading.abort();
    }

    pub async fn over_spdy<IO: AsyncRead + AsyncWrite + Send + 'static>(self, io: IO) {
        let mut connection = Connection::start(io);
        let gone = connection.closed();
        let opened = Opened::collect(&mut connection, self.wanted, self.protocol);
        let Ok(Some(opened)) = tokio::time::timeout(STREAMS_WITHIN, opened).await else {
            tracing::debug!("the client did not open the streams it asked for");
            return;
        };
        // Halves that carry nothing stay open until the end.
        let mut idle_send = Vec::new();
        let mut idle_receive = Vec::new();
        let mut sender = |stream: Option<spdy::Stream>| {
            stream.map(|stream| {
                idle_receive.push(stream.receive);
                stream.send
            })
        };
        let (stdout, stderr, error) = (sender(opened.stdout), sender(opened.stderr), sender(opened.error));
        let Some(error) = error else { return };
        let mut receiver = |stream: Option<spdy::Stream>| {
            stream.map(|stream| {
                idle_send.push(stream.send);
                stream.receive
            })
        };
        let (stdin, told) = (receiver(opened.stdin), receiver(opened.resize));
        let (resize, sizes) = mpsc::channel(8);
        let resizing = async move {
            if let Some(told) = told {
                read_sizes(told, resize).await;
            }
            std::future::pending::<()>().await;
        };
        let ends = Ends { stdin, stdout, stderr, error, sizes };
        let ended = tokio::select! {
            ended = pump(self.begin, self.wanted, ends, self.protocol, self.purpose, &gone) => ended,
            () = resizing => false,
        };
        if ended {
            for send in idle_send {
                Target::finish(send).await;
            }
            connection.finish().await;
        }
    }
}

/// The streams that a SPDY client opens.
#[derive(Default)]
struct Opened {
    stdin: Option<spdy::Stream>,
    stdout: Option<spdy::Stream>,
    stderr: Option<spdy::Stream>,
    error: Option<spdy::Stream>,
    resize: Option<spdy::Stream>,
}

impl Opened {
    async fn collect(connection: &mut Connection, wanted: Wanted, protocol: &str) -> Option<Opened> {
        let mut opened = Opened::default();
        let resizes = wanted.tty && matches!(protocol, "v3.channel.k8s.io" | "v4.channel.k8s.io");
        loop {
            let has = |asked: bool, stream: &Option<spdy::Stream>| !asked || stream.is_some();
            let complete = opened.error.is_some()
                && has(wanted.stdin, &opened.stdin)
                && has(wanted.stdout, &opened.stdout)
                && has(wanted.stderr, &opened.stderr)
                && has(resizes, &opened.resize);
            if complete {
                return Some(opened);
            }
            let stream = connection.accept().await?;
            let place = match stream.headers.get("streamtype") {
                "error" => &mut opened.error,
                "stdin" if wanted.stdin => &mut opened.stdin,
                "stdout" if wanted.stdout => &mut opened.stdout,
                "stderr" if wanted.stderr => &mut opened.stderr,
                "resize" if resizes => &mut opened.resize,
                other => {
                    tracing::debug!(kind = other, "stream that was not asked for");
                    stream.send.reset(spdy::frame::ResetReason::ProtocolError);
                    continue;
                }
            };
            if place.is_none() {
                *place = Some(stream);
            } else {
                stream.send.reset(spdy::frame::ResetReason::ProtocolError);
            }
        }
    }
}

async fn read_channels(
    mut incoming: websocket::Incoming,
    stdin: mpsc::Sender<Bytes>,
    resize: mpsc::Sender<TerminalSize>,
    closes: bool,
) {
    let mut stdin = Some(stdin);
    while let Some((channel, payload)) = incoming.next().await {
        match channel {
            STDIN => {
                if let Some(open) = &stdin
                    && open.send(payload).await.is_err()
                {
                    // The process takes no more; the rest is read and dropped.
                    stdin = None;
                }
            }
            RESIZE => {
                if let Some(size) = parse_size(&payload) {
                    // A full queue means that a newer size is about to be set anyway.
                    let _ = resize.try_send(size);
                }
            }
            CLOSE if closes && payload.first() == Some(&STDIN) => stdin = None,
            _ => {}
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SizeMessage {
    width: u16,
    height: u16,
}

/// `{"Width":80,"Height":24}`.
fn parse_size(text: &[u8]) -> Option<TerminalSize> {
    let size: SizeMessage = serde_json::from_slice(text).ok()?;
    Some(TerminalSize { columns: size.width, rows: size.height })
}

async fn read_sizes(mut sizes: spdy::Receive, resize: mpsc::Sender<TerminalSize>) {
    let mut text = BytesMut::new();
    while let Some(bytes) = sizes.recv().await {
        for byte in bytes {
            if text.len() >= MAX_SIZE_TEXT {
                text.clear();
            }
            text.extend_from_slice(&[byte]);
            if byte == b'}' {
                let size = parse_size(&text.split());
                if let Some(size) = size
                    && resize.send(size).await.is_err()
                {
                    return;
                }
            }
        }
    }
}

/// Starts what is to be started and moves bytes until the process has ended and its output is delivered; false when
/// the client went away before.
async fn pump<S: Source, T: Target>(
    begin: Begin,
    wanted: Wanted,
    mut ends: Ends<S, T>,
    protocol: &str,
    purpose: Purpose,
    gone: &CancellationToken,
) -> bool {
    let beginning = async {
        match begin {
            Begin::Started(session) => (Ok(*session), None),
            Begin::WithSize(start) => {
                let first = tokio::time::timeout(SIZE_WITHIN, ends.sizes.recv()).await.ok().flatten();
                (start(Wanted { size: first, ..wanted }).await, first)
            }
        }
    };
    let (session, first_size) = tokio::select! {
        begun = beginning => begun,
        () = gone.cancelled() => return false,
    };
    let mut error = ends.error;
    let report = match session {
        Ok(session) => {
            let resizing = resize(session.resize.clone(), first_size, ends.sizes);
            let running = run(session, ends.stdin, ends.stdout, ends.stderr);
            let exit = tokio::select! {
                exit = running => exit,
                () = resizing => return false,
                () = gone.cancelled() => return false,
            };
            report(exit, purpose, protocol)
        }
        Err(status) if has_statuses(protocol) => status.to_json().to_string(),
        Err(status) => status.message,
    };
    let reported = report.is_empty() || error.send(report.into()).await;
    error.finish().await;
    reported
}

/// Passes terminal sizes on; never ends.
async fn resize(
    resize: Option<mpsc::Sender<TerminalSize>>,
    first: Option<TerminalSize>,
    mut sizes: mpsc::Receiver<TerminalSize>,
) {
    let mut next = first;
    loop {
        if let (Some(size), Some(resize)) = (next, &resize) {
            // A process that has ended needs no size.
            let _ = resize.send(size).await;
        }
        next = sizes.recv().await;
        if next.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

async fn run<S: Source, T: Target>(session: Session, source: Option<S>, out: Option<T>, err: Option<T>) -> Exit {
    let Session { stdin, stdout, stderr, resize: _, exit } = session;
    let exited = CancellationToken::new();
    let ended = async {
        let exit = exit.await.unwrap_or_else(|_| Exit::Failed("the container went away".to_owned()));
        exited.cancel();
        exit
    };
    let work = async {
        let (exit, (), ()) = tokio::join!(ended, deliver(stdout, out, &exited), deliver(stderr, err, &exited));
        exit
    };
    let feeding = async {
        feed(source, stdin).await;
        std::future::pending().await
    };
    tokio::select! {
        exit = work => exit,
        exit = feeding => exit,
    }
}

async fn feed<S: Source>(source: Option<S>, input: Option<Input>) {
    let (Some(mut source), Some(mut input)) = (source, input) else { return };
    while let Some(bytes) = source.recv().await {
        if input.write_all(&bytes).await.is_err() || input.flush().await.is_err() {
            return;
        }
    }
    // A process that is gone does not mind.
    let _ = input.shutdown().await;
}

async fn deliver<T: Target>(output: Option<Output>, target: Option<T>, exited: &CancellationToken) {
    let Some(mut target) = target else { return };
    let Some(mut output) = output else {
        // Asked for and not there: a container's terminal has no standard error.
        return target.finish().await;
    };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(BUFFER);
        let mut limited = (&mut output).take(BUFFER as u64);
        let reading = limited.read_buf(&mut buffer);
        tokio::pin!(reading);
        let read = tokio::select! {
            biased;
            read = &mut reading => read,
            () = exited.cancelled() => match tokio::time::timeout(SILENCE, reading).await {
                Ok(read) => read,
                Err(_) => break,
            },
        };
        match read {
            Ok(0) => break,
            Ok(_) => {
                if !target.send(buffer.split().freeze()).await {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "reading a process' output");
                break;
            }
        }
    }
    target.finish().await;
}

fn has_statuses(protocol: &str) -> bool {
    protocol.starts_with("v4.") || protocol.starts_with("v5.")
}

/// What goes on the error stream: a `Status` since v4, before that a text, nothing for success.
fn report(exit: Exit, purpose: Purpose, protocol: &str) -> String {
    let statuses = has_statuses(protocol);
    match exit {
        Exit::Code(code) if code == 0 || purpose == Purpose::Attach => {
            if statuses {
                json!({"metadata": {}, "status": "Success"}).to_string()
            } else {
                String::new()
            }
        }
        Exit::Code(code) if statuses => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        })
        .to_string(),
        Exit::Code(code) => format!("command terminated with exit code {code}"),
        Exit::Failed(why) if statuses => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("Internal error occurred: {why}"),
            "reason": "InternalError",
            "details": {"causes": [{"message": why}]},
            "code": 500,
        })
        .to_string(),
        Exit::Failed(why) => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reports_by_protocol() {
        let code = |text: String| serde_json::from_str::<serde_json::Value>(&text).expect("JSON");
        let failed = code(report(Exit::Code(7), Purpose::Exec, "v4.channel.k8s.io"));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0], json!({"reason": "ExitCode", "message": "7"}));
        assert_eq!(code(report(Exit::Code(7), Purpose::Attach, "v5.channel.k8s.io"))["status"], "Success");
        assert_eq!(report(Exit::Code(0), Purpose::Exec, "channel.k8s.io"), "");
        assert_eq!(report(Exit::Code(3), Purpose::Exec, "v2.channel.k8s.io"), "command terminated with exit code 3");
        assert_eq!(report(Exit::Failed("no".into()), Purpose::Attach, ""), "no");
    }

    #[test]
    fn sizes() {
        let size = parse_size(br#"{"Width":80,"Height":24}"#);
        assert_eq!(size, Some(TerminalSize { columns: 80, rows: 24 }));
        assert_eq!(parse_size(br#"{"Width":80000,"Height":24}"#), None);
        assert_eq!(parse_size(b""), None);
    }

    proptest! {
        #[test]
        fn sizes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse_size(&bytes);
        }
    }
}
