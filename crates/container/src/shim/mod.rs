//! The shim: one small process for each pod, the parent of its containers. It holds the pod's namespaces, writes the
//! logs, keeps the exit codes, and goes on when the daemon is killed; a new daemon finds it by its socket.
//!
//! One thread, one loop over `epoll`. The daemon executes the same binary in the role `shim` rather than forking: its
//! own address space is large, this one is what containers are cloned from.
//!
//! ```text
//! container:  (start) -> Starting -> Running -> Exited -> (remove)
//!                           '-> (failed: nothing is left)
//! ```

mod containers;
mod execs;
mod log;
pub mod protocol;
mod server;
mod state;
pub(crate) mod title;
mod viewers;

pub use log::MAX_LINE;
pub use state::directory as container_directory;

use crate::cgroup::{Cgroup, DefaultDevices, Hierarchies};
use crate::error::{During, Error, Result};
use crate::runtime::clone_into;
use crate::sys::{self, Cloned, MountAttr, SingleThreaded, mount_setattr};
use protocol::Sandbox;
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatvfs, open};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// What standard output says when the shim is ready.
pub(crate) const READY: &[u8; 5] = b"ready";

/// The role `shim` of the binary. `args` are those after the role's name; they only tell people which pod this is. The
/// sandbox comes as JSON on standard input, maybe long after. Returns once the shim proper, a child of its own, is ready
/// or has failed; the child has said [`READY`] on standard output by then, or this says on standard error what failed.
pub fn main(args: &[String]) -> i32 {
    match run(args) {
        Ok(()) => 0,
        Err(e) => {
            let _ = writeln!(io::stderr(), "{e}");
            1
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    shield(args)?;
    // What the daemon, or whoever started it, left open.
    sys::close_all_but(&[]).during(|| "closing descriptors".into())?;
    let alone = SingleThreaded::prove().during(|| "starting the shim".into())?;
    let hierarchies = Hierarchies::discover()?;
    // All that does not depend on the sandbox comes before it is known.
    let devices = DefaultDevices::load(&hierarchies);
    let sandbox = read_sandbox()?;
    let cgroup = Cgroup::new(hierarchies, &sandbox.cgroup)?;
    // Out of the daemon's control group, so that what ends the daemon's group does not end this one.
    let shims = cgroup.sibling("shims")?;
    let left = shims.create();
    let (mut ours, theirs) = UnixStream::pair().during(|| "making a socket pair".into())?;
    let told = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3).during(|| "standard output".into())?;
    match clone_into(alone, left.is_ok().then_some(&shims), 0).during(|| "detaching the shim".into())? {
        (Cloned::Parent { .. }, _) => {
            drop((theirs, told));
            let mut text = String::new();
            ours.read_to_string(&mut text).during(|| "waiting for the shim".into())?;
            if text.as_bytes() == READY {
                Ok(())
            } else {
                Err(Error::Shim(if text.is_empty() { "the shim died".into() } else { text }))
            }
        }
        (Cloned::Child, joined_v2) => {
            drop(ours);
            let left = left.and_then(|()| shims.join(alone, !joined_v2));
            match become_shim(alone, sandbox, cgroup, devices) {
                Ok(mut server) => {
                    if let Err(e) = left {
                        server.warn(&format!("leaving the daemon's control group: {e}"));
                    }
                    let _ = rustix::io::write(&told, READY);
                    let _ = (&theirs).write_all(READY);
                    drop((theirs, told));
                    server.run();
                    sys::exit_now(0)
                }
                Err(e) => {
                    let _ = (&theirs).write_all(e.to_string().as_bytes());
                    sys::exit_now(1)
                }
            }
        }
    }
}

fn read_sandbox() -> Result<Sandbox> {
    let mut text = Vec::new();
    io::stdin().take(crate::wire::MAX_FRAME as u64).read_to_end(&mut text).during(|| "reading the sandbox".into())?;
    serde_json::from_slice(&text).map_err(|e| Error::Refused(format!("the sandbox on standard input: {e}")))
}

fn become_shim(
    alone: SingleThreaded,
    sandbox: Sandbox,
    cgroup: Cgroup,
    devices: Option<DefaultDevices>,
) -> Result<server::Server> {
    title::set(&sandbox.title);
    detach(&sandbox)?;
    server::Server::new(alone, sandbox, cgroup, devices)
}

/// Away from the daemon: a session, a working directory and standard streams of its own.
fn detach(sandbox: &Sandbox) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    rustix::process::setsid().during(|| "setsid".into())?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    for directory in [&sandbox.dir, &sandbox.run_dir] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .during(|| format!("making {}", directory.display()))?;
    }
    let path = sandbox.dir.join("shim.log");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
    let log = open(&path, flags, Mode::from_raw_mode(0o640)).during(|| format!("opening {}", path.display()))?;
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).during(|| "/dev/null".into())?;
    for (fd, number) in [(&null, 0), (&log, 1), (&log, 2)] {
        sys::dup_onto(fd.as_fd(), number).during(|| "setting the standard streams".into())?;
    }
    rustix::process::chdir("/").during(|| "chdir /".into())?;
    let _ = rustix::thread::set_name(c"atoll-shim");
    // Processes of a container that share its PID namespace must not look into those on their way in.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .during(|| "PR_SET_DUMPABLE".into())?;
    // Needs CAP_SYS_RESOURCE; without it the shim is as killable as any other process.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-998");
    Ok(())
}

/// Makes sure that `/proc/self/exe` cannot be written through: a container whose program is `/proc/self/exe` holds
/// exactly that of the process which executed it (CVE-2019-5736). The daemon executes through such a mount already;
/// this catches a shim that was started otherwise.
fn shield(args: &[String]) -> Result<()> {
    let own =
        open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during(|| "/proc/self/exe".into())?;
    if fstatvfs(&own).is_ok_and(|s| s.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        return Ok(());
    }
    if args.iter().any(|a| a == SHIELDED) {
        return Err(Error::Refused("the shim's own executable could not be made read-only".into()));
    }
    let sealed = sealed_executable(Path::new("/proc/self/exe"))?;
    let text = |s: Vec<u8>| CString::new(s).map_err(|_| Error::Refused("zero byte in an argument".into()));
    let program = text(format!("/proc/self/fd/{}", sealed.as_raw_fd()).into_bytes())?;
    let mut argv = std::env::args_os().map(|a| text(a.into_vec())).collect::<Result<Vec<_>>>()?;
    argv.push(text(SHIELDED.into())?);
    Err(Error::step("executing the shielded shim", sys::execve(&program, &argv, &[])))
}

const SHIELDED: &str = "--shielded";

/// The executable behind a read-only mount of its own that is nowhere in the file system.
pub(crate) fn sealed_executable(path: &Path) -> Result<OwnedFd> {
    let what = || format!("a read-only view of {}", path.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags).during(what)?;
    let attr = MountAttr {
        set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID,
        propagation: libc::MS_PRIVATE,
        ..Default::default()
    };
    mount_setattr(tree.as_fd(), false, &attr).during(what)?;
    Ok(tree)
}
