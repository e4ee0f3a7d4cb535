//! What `atoll up` tells the relay, over a socket in a directory that only root may enter: one JSON object a line, of
//! workloads' addresses and their sources outside. The relay says first what it was started with.

use super::{Links, Settings, Token};
use crate::error::{Error, Result};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// A line's length at most.
const LINE: usize = 16 << 20;

pub(crate) fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("relay.sock")
}

pub struct Control {
    listener: OwnedFd,
    open: Option<OwnedFd>,
    line: Vec<u8>,
    hello: String,
}

impl Control {
    pub fn listen(settings: &Settings) -> Result<Control> {
        let path = socket_path(&settings.run_dir);
        let _ = std::fs::remove_file(&path);
        let make = || -> rustix::io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
            rustix::net::listen(&socket, 4)?;
            Ok(socket)
        };
        let listener = make().map_err(|errno| Error::file("listen on", &path)(errno.into()))?;
        Ok(Control { listener, open: None, line: Vec::new(), hello: format!("{}\n", settings.hello()) })
    }

    pub fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// The last who connects is listened to.
    pub fn accept(&mut self, links: &Links) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        let said = rustix::io::write(&socket, self.hello.as_bytes());
        if said == Ok(self.hello.len()) && links.watch(&socket, Token::Control).is_ok() {
            self.open = Some(socket);
            self.line.clear();
        }
    }

    /// The last whole line that has come.
    pub fn read(&mut self) -> Option<BTreeMap<IpAddr, IpAddr>> {
        let socket = self.open.as_ref()?;
        let mut buffer = [0; 64 << 10];
        loop {
            let ended = match rustix::io::read(socket, &mut buffer[..]) {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Ok(0) | Err(_) => true,
                Ok(length) => {
                    self.line.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    self.line.len() > LINE
                }
            };
            if ended {
                self.open = None;
                break;
            }
        }
        let end = self.line.iter().rposition(|byte| *byte == b'\n')?;
        let rest = self.line.split_off(end + 1);
        let lines = std::mem::replace(&mut self.line, rest);
        let last = lines.trim_ascii_end().rsplit(|byte| *byte == b'\n').next()?;
        serde_json::from_slice(last).ok()
    }
}
