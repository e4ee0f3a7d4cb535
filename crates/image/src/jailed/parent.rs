//! Starting the roles, feeding them, and believing them as little as can be.

use super::{DECOMPRESS, IDS, REPORT_LIMIT, Report, Roles, UNPACK, UNPACKER_BASE, WHY_LIMIT};
use crate::error::{Error, Result, io};
use crate::store::Limits;
use crate::unpack::Compression;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{self as stdio, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

/// How long a role may neither take nor give a byte. It may wait for a disk.
const PATIENCE: Timespec = Timespec { tv_sec: 600, tv_nsec: 0 };
const PIPE: usize = 1 << 20;

/// A role that is ended when nobody wants it any more.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn await_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> stdio::Result<()> {
    loop {
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&PATIENCE)) {
            Ok(0) => return Err(stdio::Error::new(stdio::ErrorKind::TimedOut, "it has not moved for ten minutes")),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// What is to be decompressed.
pub(crate) enum Input {
    File(File),
    Stream(Box<dyn Read + Send>),
}

/// The plain bytes that a decompressor gives.
pub(crate) struct Plain {
    output: ChildStdout,
    child: Running,
    feeder: Option<JoinHandle<stdio::Result<()>>>,
    ended: bool,
}

impl Plain {
    pub fn start(roles: &Roles, compression: Compression, source: Input) -> stdio::Result<Plain> {
        let format = match compression {
            Compression::Zstd => "zstd",
            Compression::Xz => "xz",
            Compression::Gzip | Compression::None => "gzip",
        };
        let (stdin, stream) = match source {
            Input::File(file) => (Stdio::from(file), None),
            Input::Stream(stream) => (Stdio::piped(), Some(stream)),
        };
        let mut child = Command::new(&roles.exe)
            .args([DECOMPRESS, format])
            .env_clear()
            .current_dir("/")
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| stdio::Error::other(format!("cannot start the decompressor: {e}")))?;
        let output = child.stdout.take().ok_or(stdio::ErrorKind::BrokenPipe)?;
        let _ = rustix::pipe::fcntl_setpipe_size(&output, PIPE);
        let input = child.stdin.take();
        let child = Running(child);
        let feeder = match (stream, input) {
            (Some(mut stream), Some(mut input)) => {
                let feed = move || stdio::copy(&mut stream, &mut input).map(drop);
                Some(std::thread::Builder::new().name("layer".into()).spawn(feed)?)
            }
            _ => None,
        };
        Ok(Plain { output, child, feeder, ended: false })
    }

    /// Whether all of it came, and if not why.
    fn end(&mut self) -> stdio::Result<()> {
        self.ended = true;
        let mut said = String::new();
        if let Some(stderr) = self.child.0.stderr.take() {
            let _ = stderr.take(WHY_LIMIT as u64).read_to_string(&mut said);
        }
        let status = self.child.0.wait()?;
        if status.success() {
            let fed = self.feeder.take().map(JoinHandle::join);
            return match fed {
                Some(Ok(Err(e))) if e.kind() != stdio::ErrorKind::BrokenPipe => Err(e),
                _ => Ok(()),
            };
        }
        let said = said.trim();
        let why = if said.is_empty() { format!("the decompressor ended ({status})") } else { said.to_owned() };
        Err(stdio::Error::other(why))
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> stdio::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        await_ready(self.output.as_fd(), PollFlags::IN)?;
        match self.output.read(buffer)? {
            0 => self.end().map(|()| 0),
            n => Ok(n),
        }
    }
}

/// An unpacker at work on one directory.
pub(crate) struct Unpacker {
    input: Option<ChildStdin>,
    socket: UnixStream,
    child: Running,
    layer: String,
}

impl Unpacker {
    pub fn start(roles: &Roles, layer: &str, root: &OwnedFd, limits: &Limits) -> Result<Unpacker> {
        let unpacker = Unpacker::spawn(roles, layer, limits)?;
        if unpacker.admit(root, true)? {
            return Ok(unpacker);
        }
        // This file system has no id-mapped mounts: the namespace's ids are the disk's.
        let unpacker = Unpacker::spawn(roles, layer, limits)?;
        unpacker.admit(root, false)?;
        Ok(unpacker)
    }

    fn spawn(roles: &Roles, layer: &str, limits: &Limits) -> Result<Unpacker> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::invalid(format!("layer {layer}"), "unpacking sets owners, for which it has to be root"));
        }
        let failed = |what| io(what, "the unpacker");
        let (socket, theirs) = UnixStream::pair().map_err(failed("make a socket for"))?;
        let mut child = Command::new(&roles.exe)
            .arg(UNPACK)
            .args([limits.layer_entries.to_string(), limits.layer_bytes.to_string()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed("start"))?;
        let input = child.stdin.take();
        if let Some(input) = &input {
            let _ = rustix::pipe::fcntl_setpipe_size(input, PIPE);
            rustix::io::ioctl_fionbio(input, true).map_err(io("make a pipe for", "the unpacker"))?;
        }
        Ok(Unpacker { input, socket, child: Running(child), layer: layer.to_owned() })
    }

    /// Gives its user namespace ids, and it the directory. False if that needs `mapped` to be false.
    fn admit(&self, root: &OwnedFd, mapped: bool) -> Result<bool> {
        let failed = |what| io(what, "the unpacker's user namespace");
        await_ready(self.socket.as_fd(), PollFlags::IN).map_err(failed("wait for"))?;
        let mut byte = [0u8; 1];
        (&self.socket).read_exact(&mut byte).map_err(|_| {
            Error::invalid(
                format!("layer {}", self.layer),
                "the unpacker could not enter namespaces of its own; does `sysctl user.max_user_namespaces` allow any?",
            )
        })?;
        let proc = format!("/proc/{}", self.child.0.id());
        map(&proc, if mapped { UNPACKER_BASE } else { 0 }).map_err(failed("map"))?;
        let directory = match mapped {
            true => id_mapped(root, &proc).map_err(failed("map owners by"))?,
            false => Some(root.try_clone().map_err(failed("copy a directory for"))?),
        };
        let Some(directory) = directory else { return Ok(false) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [directory.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&self.socket, &[IoSlice::new(b"d")], &mut ancillary, SendFlags::NOSIGNAL)
            .map_err(io("hand a directory to", "the unpacker"))?;
        Ok(true)
    }

    /// False when it takes no more: it has something to say.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<bool> {
        let Some(input) = &mut self.input else { return Ok(false) };
        while !bytes.is_empty() {
            match input.write(bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == stdio::ErrorKind::WouldBlock => {
                    await_ready(input.as_fd(), PollFlags::OUT).map_err(io("write to", "the unpacker"))?;
                }
                Err(e) if e.kind() == stdio::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == stdio::ErrorKind::BrokenPipe => return Ok(false),
                Err(e) => return Err(io("write to", "the unpacker")(e)),
            }
        }
        Ok(true)
    }

    /// The directories it wants marked opaque, when all is unpacked.
    pub fn finish(mut self) -> Result<Vec<Vec<u8>>> {
        self.input = None;
        let mut said = Vec::new();
        let mut reader = Patient(&self.socket).take(REPORT_LIMIT + 1);
        reader.read_to_end(&mut said).map_err(io("listen to", "the unpacker"))?;
        let status = self.child.0.wait().map_err(io("wait for", "the unpacker"))?;
        let layer = self.layer.clone();
        let short = |text: String| text.chars().take(WHY_LIMIT).collect::<String>();
        match serde_json::from_slice(&said) {
            Ok(Report::Done(opaque)) if status.success() => Ok(opaque),
            Ok(Report::Entry { entry, why }) => Err(Error::Layer { layer, entry: short(entry), why: short(why) }),
            Ok(Report::Archive(why)) => Err(Error::Archive { layer, why: short(why) }),
            _ => {
                let mut last_words = String::new();
                if let Some(stderr) = self.child.0.stderr.take() {
                    let _ = Patient(stderr).take(WHY_LIMIT as u64).read_to_string(&mut last_words);
                }
                let why = format!("the unpacker ended without an answer ({status}) {}", last_words.trim());
                Err(Error::Archive { layer, why })
            }
        }
    }
}

struct Patient<R>(R);

impl<R: Read + AsFd> Read for Patient<R> {
    fn read(&mut self, buffer: &mut [u8]) -> stdio::Result<usize> {
        await_ready(self.0.as_fd(), PollFlags::IN)?;
        self.0.read(buffer)
    }
}

fn map(proc: &str, base: u32) -> stdio::Result<()> {
    for file in ["uid_map", "gid_map"] {
        std::fs::write(format!("{proc}/{file}"), format!("0 {base} {IDS}"))?;
    }
    Ok(())
}

/// The directory as a mount of its own, its owners seen through the unpacker's namespace, which has nobody's ids. `None`
/// where the file system cannot do that.
fn id_mapped(root: &OwnedFd, proc: &str) -> stdio::Result<Option<OwnedFd>> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = rustix::mount::open_tree(root, "", flags)?;
    let namespace = File::open(format!("{proc}/ns/user"))?;
    match jail::map_owners(mount.as_fd(), &namespace) {
        Ok(()) => {}
        Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INVAL | Errno::OPNOTSUPP)) => return Ok(None),
        Err(e) => return Err(e),
    }
    // What `open_tree` gives is but a path.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    Ok(Some(rustix::fs::openat(&mount, ".", flags, rustix::fs::Mode::empty())?))
}
