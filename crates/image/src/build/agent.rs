//! `RUN --mount=type=ssh`: a socket in the sandbox that leads to an agent outside, for listing keys and signing alone.
//!
//! draft-miller-ssh-agent: a message is four bytes of length (big-endian), a type and what belongs to it.

use crate::error::{Error, Result, io};
use crate::store::Store;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// As OpenSSH's agent has it.
const MESSAGE_LIMIT: u32 = 256 << 10;
const CONNECTIONS: usize = 64;
const REQUEST_IDENTITIES: u8 = 11;
const SIGN_REQUEST: u8 = 13;
const FAILURE: [u8; 5] = [0, 0, 0, 1, 5];

/// One way to an agent; it ends when dropped.
pub(crate) struct Agent {
    directory: PathBuf,
    held: OwnedFd,
    stop: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl Agent {
    /// Ids are those of the sandbox.
    pub fn start(store: &Store, agent: &Path, mode: u32, owner: (u32, u32)) -> Result<Agent> {
        UnixStream::connect(agent).map_err(|e| {
            Error::invalid(format!("--ssh {}", agent.display()), format!("no agent answers there: {e}"))
        })?;
        let (directory, held) = store.temporary_dir()?;
        match serve(&short(&held), agent, mode, owner) {
            Ok((stop, listening)) => Ok(Agent { directory, held, stop, listening: Some(listening) }),
            Err(e) => {
                let _ = std::fs::remove_dir_all(&directory);
                Err(io("make a socket in", &directory)(e))
            }
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("s")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = UnixStream::connect(short(&self.held));
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn serve(
    path: &Path,
    agent: &Path,
    mode: u32,
    owner: (u32, u32),
) -> std::io::Result<(Arc<AtomicBool>, JoinHandle<()>)> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    chown(path, Some(owner.0), Some(owner.1))?;
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, agent) = (stop.clone(), agent.to_path_buf());
    let listening = std::thread::Builder::new().name("ssh".into());
    Ok((stop, listening.spawn(move || listen(&listener, &agent, &stopped))?))
}

/// A socket's path may have 107 bytes; that of the data directory is anyone's.
fn short(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/s", directory.as_raw_fd()))
}

fn listen(listener: &UnixListener, agent: &Path, stop: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (agent, count) = (agent.to_path_buf(), open.clone());
        let relayed = std::thread::Builder::new().name("ssh".into()).spawn(move || {
            // Ends with the command that holds the other end.
            let _ = relay(stream, &agent);
            count.fetch_sub(1, Ordering::Relaxed);
        });
        if relayed.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn relay(mut client: UnixStream, agent: &Path) -> std::io::Result<()> {
    let mut agent = UnixStream::connect(agent)?;
    loop {
        let message = receive(&mut client)?;
        match message.get(4) {
            Some(&(REQUEST_IDENTITIES | SIGN_REQUEST)) => {
                agent.write_all(&message)?;
                client.write_all(&receive(&mut agent)?)?;
            }
            // Adding and removing keys, locking: not a build's business.
            _ => client.write_all(&FAILURE)?,
        }
    }
}

/// A message with its length.
fn receive(stream: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let mut head = [0u8; 4];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes(head);
    if length == 0 || length > MESSAGE_LIMIT {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut message = head.to_vec();
    stream.take(u64::from(length)).read_to_end(&mut message)?;
    if message.len() != length as usize + 4 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_listed_and_used_but_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("images")).unwrap();
        let real = dir.path().join("agent");
        let listener = UnixListener::bind(&real).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    while let Ok(message) = receive(&mut stream) {
                        stream.write_all(&[0, 0, 0, 2, 12, message[4]]).unwrap();
                    }
                });
            }
        });
        let agent = Agent::start(&store, &real, 0o600, (0, 0)).unwrap();
        let mut client = UnixStream::connect(agent.socket()).unwrap();
        for (sent, answer) in [
            (&[0, 0, 0, 1, REQUEST_IDENTITIES][..], &[0, 0, 0, 2, 12, REQUEST_IDENTITIES][..]),
            (&[0, 0, 0, 2, SIGN_REQUEST, 9], &[0, 0, 0, 2, 12, SIGN_REQUEST]),
            (&[0, 0, 0, 1, 19], &FAILURE),
            (&[0, 0, 0, 3, 17, 1, 2], &FAILURE),
        ] {
            client.write_all(sent).unwrap();
            assert_eq!(receive(&mut client).unwrap(), answer, "{sent:?}");
        }
        client.write_all(&[0xff; 8]).unwrap();
        assert!(receive(&mut client).is_err(), "a message without an end");
        drop(agent);
        assert_eq!(std::fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
        assert!(Agent::start(&store, Path::new("/nothing/there"), 0o600, (0, 0)).is_err());
    }
}
