//! Streams of processes and connections, between descriptors and a channel.

use super::channel::{Channel, Input};
use crate::frame::MAX_DATA;
use crate::protocol::{Answer, ERRORS, Failure, INPUT, OUTPUT, Request};
use container::client::Live;
use container::shim::protocol::Streams;
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// From a descriptor to the host, until either ends.
fn pump(channel: &Channel, fd: impl AsFd, stream: u8) {
    let mut buffer = vec![0; MAX_DATA];
    loop {
        match rustix::io::read(&fd, &mut buffer) {
            // EIO: the last process has closed the terminal
            Ok(0) | Err(Errno::IO) => break,
            Ok(read) => {
                if !channel.data(stream, buffer.get(..read).unwrap_or_default()) {
                    return;
                }
            }
            Err(Errno::AGAIN) => {
                if !channel.ready(&fd, PollFlags::IN) {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    channel.end(stream);
}

/// All of it, or as much as there is somebody for.
fn write(channel: &Channel, fd: impl AsFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(&fd, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::AGAIN) => {
                if !channel.ready(&fd, PollFlags::OUT) {
                    return false;
                }
            }
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

/// What the host sends, to a descriptor.
fn feed(channel: &Channel, messages: &Receiver<Input>, mut input: Option<OwnedFd>, terminal: Option<&OwnedFd>) {
    while let Ok(message) = messages.recv() {
        match message {
            Input::Data(INPUT, bytes) => {
                let fd = input.as_ref().map(AsFd::as_fd).or(terminal.map(AsFd::as_fd));
                // what nobody reads any more is taken all the same
                if let Some(fd) = fd
                    && !write(channel, fd, &bytes)
                {
                    input = None;
                }
                channel.credit(INPUT, bytes.len());
            }
            Input::End(INPUT) => input = None,
            Input::Data(..) | Input::End(_) => {}
            Input::Message(text) => {
                if let (Ok(Request::Resize { columns, rows }), Some(terminal)) =
                    (serde_json::from_slice(&text), terminal)
                {
                    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
                    let _ = rustix::termios::tcsetwinsize(terminal, size);
                }
            }
        }
    }
}

/// An executed or attached process.
pub fn process(channel: &Channel, messages: &Receiver<Input>, live: Live, wanted: Streams) {
    let Live { connection, mut ending, terminal, stdin, stdout, stderr } = live;
    let by_terminal = terminal.as_ref().filter(|_| stdout.is_none() && wanted.stdout);
    let told =
        Streams { stdin: wanted.stdin, stdout: stdout.is_some() || by_terminal.is_some(), stderr: stderr.is_some() };
    if !channel.answer(&Answer::Streams(told)) {
        return;
    }
    thread::scope(|scope| {
        if let Some(fd) = stdout {
            scope.spawn(move || pump(channel, fd, OUTPUT));
        } else if let Some(fd) = by_terminal {
            scope.spawn(move || pump(channel, fd, OUTPUT));
        }
        if let Some(fd) = stderr {
            scope.spawn(move || pump(channel, fd, ERRORS));
        }
        let terminal = terminal.as_ref();
        scope.spawn(move || {
            loop {
                match ending.exit_code(&connection) {
                    Ok(code) => {
                        channel.answer(&Answer::Exited { code });
                        break;
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                        if !channel.ready(&connection, PollFlags::IN) {
                            break;
                        }
                    }
                    Err(e) => {
                        channel.fail(Failure::Failed, format!("the container's supervisor went away: {e}"));
                        break;
                    }
                }
            }
            // held open until the host has had its say: closing it ends an executed process
            drop(connection);
        });
        feed(channel, messages, stdin, terminal);
    });
}

/// A connection to a port on loopback.
pub fn connect(channel: &Channel, messages: &Receiver<Input>, port: u16) {
    let v4 = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), CONNECT_LIMIT);
    let connected = v4.or_else(|e| {
        TcpStream::connect_timeout(&SocketAddr::from((Ipv6Addr::LOCALHOST, port)), CONNECT_LIMIT).map_err(|_| e)
    });
    let stream = match connected {
        Ok(stream) => stream,
        Err(e) => {
            channel.fail(Failure::Failed, format!("connecting to port {port} in the pod: {e}"));
            return;
        }
    };
    if stream.set_nonblocking(true).is_err()
        || !channel.answer(&Answer::Streams(Streams { stdin: true, stdout: true, stderr: false }))
    {
        return;
    }
    let stream = &stream;
    thread::scope(|scope| {
        scope.spawn(move || pump(channel, stream, OUTPUT));
        while let Ok(message) = messages.recv() {
            match message {
                Input::Data(INPUT, bytes) => {
                    if !write(channel, stream, &bytes) {
                        break;
                    }
                    channel.credit(INPUT, bytes.len());
                }
                Input::End(INPUT) => drop(stream.shutdown(Shutdown::Write)),
                Input::Data(..) | Input::End(_) | Input::Message(_) => {}
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    });
}
