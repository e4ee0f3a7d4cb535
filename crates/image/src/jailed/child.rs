//! The roles themselves: from being executed to the last byte.

use super::{DECOMPRESSOR, REPORT_LIMIT, Report};
use crate::error::Error;
use crate::tar::Archive;
use crate::unpack::tree::Tree;
use crate::unpack::{Compression, fill};
use jail::{Failed, Filter, Limits};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::thread::{CapabilitySet, UnshareFlags};
use std::fs::File;
use std::io::{self, BufReader, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A directory that every Linux has, to be covered by the empty root.
const MOUNT_POINT: &str = "/proc";

/// What any of the roles does.
const COMMON: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What the unpacker does besides, beneath its directory.
const UNPACK: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fsetxattr,
    libc::SYS_utimensat,
    libc::SYS_ftruncate,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_sendto,
    libc::SYS_dup,
];

/// Entry of `atoll image-decompress FORMAT`: standard input to standard output.
pub fn decompress(args: &[String]) -> i32 {
    let compression = match args {
        [format] if format == "gzip" => Compression::Gzip,
        [format] if format == "zstd" => Compression::Zstd,
        [format] if format == "xz" => Compression::Xz,
        _ => {
            eprintln!(
                "usage: atoll image-decompress gzip|zstd|xz <compressed >plain (started when a layer is unpacked)"
            );
            return 2;
        }
    };
    if let Err(error) = leave_all() {
        return complain(&error);
    }
    let (input, output) = (io::stdin().as_fd().try_clone_to_owned(), io::stdout().as_fd().try_clone_to_owned());
    let (Ok(input), Ok(mut output)) = (input.map(File::from), output.map(File::from)) else { return 1 };
    let copied = compression.decoder(BufReader::with_capacity(256 << 10, input)).and_then(|mut plain| {
        let mut buffer = vec![0u8; 256 << 10];
        loop {
            match fill(&mut plain, &mut buffer)? {
                0 => return Ok(()),
                n => output.write_all(buffer.get(..n).unwrap_or_default())?,
            }
        }
    });
    match copied {
        Ok(()) => 0,
        // The reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            eprintln!("{error}");
            3
        }
    }
}

fn complain(error: &Failed) -> i32 {
    eprintln!("{error}: {}", error.source);
    1
}

fn leave_all() -> jail::Result {
    let _ = jail::close_from(3);
    let limits = Limits {
        processes: Some(1),
        descriptors: Some(16),
        address_space: Some(1 << 30),
        file: Some(0),
        ..Limits::default()
    };
    limits.set()?;
    // Whoever is not root has no host to leave.
    if rustix::process::geteuid().is_root() {
        jail::unshare(jail::NAMESPACES).map_err(|source| Failed { step: "leave the host's namespaces", source })?;
        jail::empty_root(Path::new(MOUNT_POINT))?;
        jail::become_user(DECOMPRESSOR)?;
    }
    jail::no_way_back()?;
    jail::die_with_parent()?;
    jail::confine(None)?;
    Filter { calls: COMMON, ..Filter::default() }.apply()
}

/// Entry of `atoll image-unpack ENTRIES BYTES`: the archive on standard input; standard output is a socket that brings the
/// directory and takes the report.
pub fn unpack(args: &[String]) -> i32 {
    let numbers: Vec<u64> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let [entries, bytes] = numbers[..] else {
        eprintln!("usage: atoll image-unpack ENTRIES BYTES (started when a layer is unpacked)");
        return 2;
    };
    let root = match enter(bytes) {
        Ok(root) => root,
        Err(error) => return complain(&error),
    };
    let report = match unpack_all(root, entries) {
        Ok(opaque) => Report::Done(opaque),
        Err(Error::Layer { entry, why, .. }) => Report::Entry { entry, why },
        Err(Error::Archive { why, .. }) => Report::Archive(why),
        Err(other) => Report::Archive(other.chain()),
    };
    let Ok(bytes) = serde_json::to_vec(&report) else { return 1 };
    if bytes.len() as u64 > REPORT_LIMIT {
        return 1;
    }
    let Ok(mut output) = io::stdout().as_fd().try_clone_to_owned().map(File::from) else { return 1 };
    i32::from(output.write_all(&bytes).is_err())
}

/// Into the jail. Gives the directory.
fn enter(file_limit: u64) -> jail::Result<OwnedFd> {
    let _ = jail::close_from(3);
    let failed = |step| move |source| Failed { step, source };
    jail::unshare(jail::NAMESPACES | UnshareFlags::NEWUSER).map_err(failed("leave the host's namespaces"))?;
    let socket = io::stdout();
    rustix::io::write(&socket, b"u").map_err(|e| failed("report")(e.into()))?;
    let root = receive(socket).map_err(failed("get the directory"))?;
    // Now the namespace has its ids.
    jail::become_user(0)?;
    jail::empty_root(Path::new(MOUNT_POINT))?;
    let limits = Limits { processes: Some(1), descriptors: Some(4096), file: Some(file_limit), ..Limits::default() };
    Limits { address_space: Some(1 << 30), ..limits }.set()?;
    jail::keep_capabilities(
        CapabilitySet::CHOWN
            | CapabilitySet::FOWNER
            | CapabilitySet::FSETID
            | CapabilitySet::DAC_OVERRIDE
            | CapabilitySet::SETFCAP,
    )?;
    jail::no_way_back()?;
    jail::die_with_parent()?;
    jail::confine(Some(root.as_fd()))?;
    let calls = [COMMON, UNPACK].concat();
    Filter { calls: &calls, ..Filter::default() }.apply()?;
    Ok(root)
}

fn receive(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd);
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

fn unpack_all(root: OwnedFd, entries: u64) -> Result<Vec<Vec<u8>>, Error> {
    let failed = |e: io::Error| Error::Archive { layer: String::new(), why: e.to_string() };
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut archive = Archive::new(BufReader::with_capacity(128 << 10, File::from(input)));
    let opaque = Tree::new(root, "").fill(&mut archive, entries)?;
    // What follows the end mark belongs to the layer too; the writer is not to be turned away.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(failed)?;
    Ok(opaque)
}
