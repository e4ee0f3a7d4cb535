//! The role `atoll function-host`: one process per namespace that serves its functions. It outlives the daemon, which
//! finds it again by its socket.
//!
//! Order of the start: bind the control socket (root) -> leave the PID namespace and execute itself again, so that the
//! second process is first of its own -> empty network and mount namespaces, own user, filters ([`crate::jail`]) -> report
//! that it serves. The first process then ends.
//!
//! ```text
//!   add -> running -> (stop) draining -> exited -> (forget) gone
//! ```

mod context;
mod control;
mod durations;
mod function;
mod invocation;
mod log;
mod outbound;
mod recorder;
mod ticker;
mod trace;

pub use durations::BOUNDS;
pub(crate) use durations::Buckets;
pub(crate) use trace::{PARENT, Trace};

use crate::error::{Error, Result, chain, io};
use crate::{client, jail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::thread::UnshareFlags;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// The second process's argument; its standard input is the listening control socket, its standard output the report.
const SERVE: &str = "--serve";
const READY: &[u8] = b"ready";
const LIMITS: jail::Limits =
    jail::Limits { processes: Some(512), descriptors: Some(65536), address_space: None, cpu: None, file: None };

const ROLE: &str = "function-host";

/// Entry of `atoll function-host RUN_DIR UID`. Returns 0 when the host serves, detached.
pub fn main(args: &[String]) -> i32 {
    role(ROLE, args, serve_jailed)
}

/// A role that serves a control socket from a jail: started, it starts itself again, detached.
pub(crate) fn role(role: &str, args: &[String], serve: fn(OwnedFd, &Path, u32) -> Result<()>) -> i32 {
    started(role, args, serve, listening_socket)
}

/// A role that serves the socket it finds as its standard input.
pub(crate) fn detached(role: &str, args: &[String], serve: fn(OwnedFd, &Path, u32) -> Result<()>) -> i32 {
    started(role, args, serve, |_| standard_input())
}

fn started(
    role: &str,
    args: &[String],
    serve: fn(OwnedFd, &Path, u32) -> Result<()>,
    socket: fn(&Path) -> Result<OwnedFd>,
) -> i32 {
    let result = match args {
        [again, run_dir, uid] if again == SERVE => {
            parse(uid).and_then(|uid| control_socket().and_then(|socket| serve(socket, Path::new(run_dir), uid)))
        }
        [run_dir, uid] => parse(uid).and_then(|uid| start(role, Path::new(run_dir), uid, socket)),
        _ => {
            eprintln!("usage: atoll {role} RUN_DIR UID (started by the node agent)");
            return 2;
        }
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}", chain(&error));
            1
        }
    }
}

/// The second process's standard input.
fn control_socket() -> Result<OwnedFd> {
    let _ = rustix::process::setsid();
    standard_input()
}

fn standard_input() -> Result<OwnedFd> {
    std::io::stdin().as_fd().try_clone_to_owned().map_err(io("take over", "the control socket"))
}

fn parse(uid: &str) -> Result<u32> {
    match uid.parse() {
        Ok(uid) if uid > 0 => Ok(uid),
        _ => Err(Error::Start(format!("{uid:?} is not an unprivileged user's id"))),
    }
}

/// The first process.
fn start(role: &str, run_dir: &Path, uid: u32, socket: fn(&Path) -> Result<OwnedFd>) -> Result<()> {
    let socket = socket(run_dir)?;
    let log_path = run_dir.join("host.log");
    let log = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(io("create", &log_path))?;
    ::jail::unshare(UnshareFlags::NEWPID).map_err(io("leave the PID namespace of", "the host"))?;
    let exe = Path::new("/proc/self/exe");
    let mut child = Command::new(exe)
        .args([role, SERVE])
        .arg(run_dir)
        .arg(uid.to_string())
        .env_clear()
        .stdin(Stdio::from(socket))
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(io("run", exe))?;
    let mut report = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        let _ = stdout.read_to_end(&mut report);
    }
    if report == READY {
        return Ok(());
    }
    let _ = child.wait();
    let said = fs::read_to_string(&log_path).unwrap_or_default();
    Err(Error::Start(if said.trim().is_empty() { "it ended without a word".into() } else { said.trim().to_owned() }))
}

fn listening_socket(run_dir: &Path) -> Result<OwnedFd> {
    let path = client::socket_path(run_dir);
    let _ = fs::remove_file(&path);
    let failed = |e: rustix::io::Errno| io("listen on", &path)(e);
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed)?;
    bind(&socket, &SocketAddrUnix::new(&path).map_err(failed)?).map_err(failed)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(io("chmod", &path))?;
    listen(&socket, 16).map_err(failed)?;
    Ok(socket)
}

/// The second process, first of its PID namespace.
fn serve_jailed(socket: OwnedFd, run_dir: &Path, uid: u32) -> Result<()> {
    // The engine opens /proc/self/pagemap, which will not be there later.
    let engine = jail::as_user(uid, crate::engine::serving)?.map_err(|e| Error::Start(format!("{e:#}")))?;
    jail::leave_the_host(run_dir)?;
    jail::drop_privilege(uid, &LIMITS)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 16)))
        .thread_name("function")
        .enable_all()
        .build()
        .map_err(io("start", "the runtime"))?;
    let host = control::Host::new(engine, runtime.handle().clone())?;
    report_ready()?;
    control::serve(&socket, &host);
    runtime.shutdown_background();
    Ok(())
}

/// From here on whoever started us may go. Standard output, the report's pipe, becomes a second standard error: the
/// reader waits for its end.
pub(crate) fn report_ready() -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(READY).and_then(|()| stdout.flush()).map_err(io("report to", "the starter"))?;
    rustix::stdio::dup2_stdout(std::io::stderr()).map_err(io("redirect", "standard output"))
}
