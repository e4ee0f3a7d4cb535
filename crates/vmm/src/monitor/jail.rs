//! The engine's jail: a user of its own, an empty root with the programs' directory read-only in it, and no network,
//! no processes and no IPC but its own. What it works on it is handed open.

use crate::engine::{Plan, Program, Work};
use crate::kvm;
use crate::kvm::snapshot::memory::Pagemap;
use crate::machine::{Error, Machine, Result};
use crate::sys;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, mount_remount, unmount,
};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;

/// What the engine wrote on stderr, kept in memory, bounded by its file limit.
pub struct Complaints(File);

impl Complaints {
    /// The last 2 KiB, on one line.
    pub fn last_words(&self) -> String {
        let mut file = &self.0;
        let len = file.metadata().map(|m| m.len()).unwrap_or(0);
        let mut bytes = Vec::new();
        let _ = file.seek(SeekFrom::Start(len.saturating_sub(2048)));
        let _ = file.take(2048).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).trim().replace('\n', "; ")
    }
}

/// Starts the engine. Returns its pid (in this namespace) once it has been executed.
pub fn start(machine: &Machine, plan: Plan) -> Result<(i32, Complaints)> {
    let fail = |what: &'static str| Error::io(what, &machine.run_dir);
    let complaints = rustix::fs::memfd_create("engine-stderr", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|e| fail("make stderr")(e.into()))?;
    let complaints = File::from(complaints);
    let (mut report, tell) = UnixStream::pair().map_err(fail("make report channel"))?;

    // only the child goes into the new PID namespace; threads could not be started while it is pending here
    let own: std::os::fd::OwnedFd = File::open("/proc/self/ns/pid").map_err(fail("open own PID namespace"))?.into();
    sys::unshare(libc::CLONE_NEWPID).map_err(fail("make a PID namespace"))?;
    let forked = sys::fork().map_err(fail("fork"))?;
    let sys::Fork::Parent { child } = forked else {
        drop(report);
        enter(machine, plan.work, &complaints, tell);
        std::process::exit(127)
    };
    drop(tell);
    sys::setns(&own, libc::CLONE_NEWPID).map_err(fail("leave the PID namespace"))?;
    let mut text = String::new();
    report.read_to_string(&mut text).map_err(fail("read report"))?;
    if text.is_empty() {
        return Ok((child, Complaints(complaints)));
    }
    let _ = sys::wait(child);
    Err(Error::Monitor(text))
}

/// In the child. Returns only if it failed.
fn enter(machine: &Machine, work: Work, complaints: &File, tell: UnixStream) -> Error {
    let report = |error: Error| {
        let _ = (&tell).write_all(error.to_string().as_bytes());
        error
    };
    let fail = |what: &'static str| Error::io(what, &machine.run_dir);
    let leave = || -> Result<()> {
        let flags = libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        sys::unshare(flags).map_err(fail("make namespaces"))?;
        rustix::stdio::dup2_stderr(complaints.as_fd()).map_err(|e| fail("redirect stderr")(e.into()))
    };
    if let Err(error) = leave() {
        return report(error);
    }
    match work {
        Work::Execute(program) => report(execute(machine, program)),
        Work::Inside { mut keep, main } => {
            keep.push(tell.as_raw_fd());
            // without it a snapshot reads all of the memory
            let pagemap = Pagemap::open().ok();
            keep.extend(pagemap.iter().map(Pagemap::descriptor));
            let mut step = || -> Result<()> {
                empty_root(&machine.run_dir).map_err(fail("build the jail"))?;
                kvm::sys::close_all_but(&mut keep).map_err(fail("close descriptors"))?;
                sys::become_user(machine.uid).map_err(fail("change user"))?;
                sys::die_with_parent().map_err(fail("set death signal"))
            };
            if let Err(error) = step() {
                return report(error);
            }
            drop(tell);
            std::process::exit(main(pagemap))
        }
    }
}

fn execute(machine: &Machine, program: Program) -> Error {
    let step = || -> Result<std::io::Error> {
        let fail = |what: &'static str| Error::io(what, &machine.run_dir);
        build_root(machine, &program).map_err(fail("build the jail"))?;
        sys::close_on_exec_from(3).map_err(fail("close descriptors"))?;
        sys::place(program.descriptors).map_err(fail("place descriptors"))?;
        sys::become_user(machine.uid).map_err(fail("change user"))?;
        sys::die_with_parent().map_err(fail("set death signal"))?;
        let mut command = std::process::Command::new(&program.path);
        command.args(&program.args).env_clear().env("PATH", "/usr/bin").env("TMPDIR", "/tmp").current_dir("/");
        Ok(command.exec())
    };
    match step() {
        Ok(error) => Error::io("execute engine", "/")(error),
        Err(error) => error,
    }
}

/// A root with nothing in it.
fn empty_root(run_dir: &Path) -> std::io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let root = run_dir.join("root");
    fs::create_dir_all(&root)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", &root, "tmpfs", flags, c"size=4k,nr_inodes=2,mode=0555")?;
    rustix::process::chdir(&root)?;
    // pivot_root(2): with both the same directory, the old root ends up on top of the new one and is let go
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    mount_remount("/", flags | MountFlags::RDONLY, "")?;
    rustix::process::chdir("/").map_err(Into::into)
}

fn build_root(machine: &Machine, program: &Program) -> std::io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let root = machine.run_dir.join("root");
    fs::create_dir_all(&root)?;
    mount("tmpfs", &root, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"size=16m,mode=0755")?;
    for dir in ["usr", "dev", "etc", "tmp", "boot", "old"] {
        fs::create_dir(root.join(dir))?;
    }
    bind(Path::new("/usr"), &root.join("usr"))?;
    for name in ["bin", "sbin", "lib", "lib64"] {
        let host = Path::new("/").join(name);
        match fs::read_link(&host) {
            Ok(target) => std::os::unix::fs::symlink(target, root.join(name))?,
            Err(_) if host.is_dir() => {
                fs::create_dir(root.join(name))?;
                bind(&host, &root.join(name))?;
            }
            Err(_) => {}
        }
    }
    let mut files = vec![("/etc/ld.so.cache".into(), "/etc/ld.so.cache".into())];
    files.extend(["/dev/null", "/dev/urandom"].map(|d| (d.into(), d.into())));
    if program.needs_kvm {
        files.push(("/dev/kvm".into(), "/dev/kvm".into()));
    }
    files.extend(program.files.iter().cloned());
    for (inside, source) in &files {
        let target = root.join(inside.strip_prefix("/").unwrap_or(inside));
        File::create(&target)?;
        if inside.starts_with("/dev") {
            mount_bind_recursive(source, &target)?;
        } else {
            bind(source, &target)?;
        }
    }
    rustix::process::chdir(&root)?;
    rustix::process::pivot_root(".", "old")?;
    unmount("/old", UnmountFlags::DETACH)?;
    mount(
        "tmpfs",
        "/tmp",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        c"size=64m,mode=1777",
    )?;
    mount_remount("/", MountFlags::RDONLY | MountFlags::NOSUID, "")?;
    Ok(())
}

fn bind(source: &Path, target: &Path) -> std::io::Result<()> {
    mount_bind_recursive(source, target)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(target, flags, "").map_err(Into::into)
}
