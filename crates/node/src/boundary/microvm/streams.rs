//! A channel's streams as the API's sessions have them.

use super::link::Channel;
use super::*;
use api::streams::Exit;
use guest::protocol::{Answer, ERRORS, INPUT, OUTPUT, Request};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, oneshot};

const BUFFER: usize = 64 << 10;
/// What a process left running may still say after its own end.
const LINGER: Duration = Duration::from_secs(10);

/// From the guest to whoever reads, with credit for what was taken.
fn output(channel: Arc<Channel>, stream: u8) -> (DuplexStream, tokio::task::JoinHandle<()>) {
    let (ours, mut feed) = tokio::io::duplex(BUFFER);
    let task = tokio::spawn(async move {
        while let Some(bytes) = channel.read(stream).await {
            if feed.write_all(&bytes).await.is_err() {
                return;
            }
            channel.credit(stream, bytes.len());
        }
    });
    (ours, task)
}

async fn input(channel: &Channel, mut from: impl tokio::io::AsyncRead + Unpin) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return channel.finish(INPUT),
            Ok(read) => {
                if !channel.write(INPUT, buffer.get(..read).unwrap_or_default()).await {
                    return;
                }
            }
        }
    }
}

/// An exec or attach that was answered.
pub fn session(channel: Arc<Channel>, wanted: Wanted) -> Session {
    let mut pumps = Vec::new();
    let mut open = |stream: u8, is_wanted: bool| {
        is_wanted.then(|| {
            let (ours, task) = output(channel.clone(), stream);
            pumps.push(task);
            Box::pin(ours) as api::streams::Output
        })
    };
    let stdout = open(OUTPUT, wanted.stdout);
    let stderr = open(ERRORS, wanted.stderr && !wanted.tty);
    let stdin = wanted.stdin.then(|| {
        let (ours, from) = tokio::io::duplex(BUFFER);
        let channel = channel.clone();
        tokio::spawn(async move { input(&channel, from).await });
        Box::pin(ours) as api::streams::Input
    });
    let resize = wanted.tty.then(|| {
        let (sender, mut sizes) = mpsc::channel::<api::streams::TerminalSize>(4);
        let channel = channel.clone();
        tokio::spawn(async move {
            while let Some(size) = sizes.recv().await {
                let _ = channel.tell(&Request::Resize { columns: size.columns, rows: size.rows });
            }
        });
        sender
    });
    let (mut tell, exit) = oneshot::channel();
    tokio::spawn(async move {
        let outcome = tokio::select! {
            answer = channel.answer() => match answer {
                Ok(Answer::Exited { code }) => Exit::Code(code),
                Ok(Answer::Error { message, .. }) => Exit::Failed(message),
                Ok(_) => Exit::Failed("the guest answered something else than was asked".into()),
                Err(error) => Exit::Failed(error.to_string()),
            },
            () = tell.closed() => return channel.close(),
        };
        let _ = tell.send(outcome);
        let all = async {
            for pump in pumps {
                let _ = pump.await;
            }
        };
        let _ = tokio::time::timeout(LINGER, all).await;
        channel.close();
    });
    Session { stdin, stdout, stderr, resize, exit }
}

/// A process that could not be executed: no streams, and the reason as its end.
pub fn not_executed(why: String) -> Session {
    let (tell, exit) = oneshot::channel();
    let _ = tell.send(Exit::Failed(why));
    Session { stdin: None, stdout: None, stderr: None, resize: None, exit }
}

/// A connection in the guest.
pub fn connection(channel: Arc<Channel>) -> Box<dyn Duplex> {
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    let (from, mut to) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let sends = async {
            input(&channel, from).await;
        };
        let receives = async {
            while let Some(bytes) = channel.read(OUTPUT).await {
                if to.write_all(&bytes).await.is_err() {
                    break;
                }
                channel.credit(OUTPUT, bytes.len());
            }
            let _ = to.shutdown().await;
        };
        // what the other side still says comes through although this one has finished
        tokio::join!(sends, receives);
        channel.close();
    });
    Box::new(ours)
}
