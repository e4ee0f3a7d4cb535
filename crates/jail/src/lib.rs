//! What a role gives up before it touches a tenant's bytes: the host's files, network and users, capabilities, resources
//! without a bound, and the system calls it has no need of. Each role says in what order and what it keeps.

mod landlock;
mod seccomp;
mod sys;

pub use landlock::{confine, confine_files};
pub use seccomp::Filter;
pub use sys::{close_from, map_owners, unshare};

use rustix::fs::{Gid, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities};
use rustix::{fs, process, thread};
use std::io;
use std::path::Path;

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct Failed {
    pub step: &'static str,
    #[source]
    pub source: io::Error,
}

pub type Result<T = ()> = std::result::Result<T, Failed>;

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Failed {
    move |source| Failed { step, source: source.into() }
}

/// Namespaces without the host's files, links, queues and name.
pub const NAMESPACES: UnshareFlags =
    UnshareFlags::NEWNS.union(UnshareFlags::NEWNET).union(UnshareFlags::NEWIPC).union(UnshareFlags::NEWUTS);

/// Makes an empty, read-only file system the root. For a process of one thread, in a mount namespace of its own.
/// `mount_point` is any directory; it is covered in that namespace only.
pub fn empty_root(mount_point: &Path) -> Result {
    // rustix reads the auxiliary vector at its first need; that needs /proc, which will be gone.
    let _ = rustix::param::page_size();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("make the mounts private"))?;
    let options = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", mount_point, "tmpfs", options, c"size=4k,nr_inodes=4,mode=0555")
        .map_err(step("mount an empty file system"))?;
    process::chdir(mount_point).map_err(step("enter the empty file system"))?;
    // pivot_root(2): with both the same directory, the old root ends up on top of the new one and is let go.
    process::pivot_root(".", ".").map_err(step("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("let go of the old root"))?;
    let read_only = options | MountFlags::RDONLY;
    rustix::mount::mount_remount("/", read_only, c"").map_err(step("make the root read-only"))?;
    process::chdir("/").map_err(step("enter the root"))
}

/// Bounds of one role. `None` leaves a limit as it is.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub processes: Option<u64>,
    pub descriptors: Option<u64>,
    /// Bytes of address space.
    pub address_space: Option<u64>,
    /// Seconds of processor time.
    pub cpu: Option<u64>,
    /// Bytes of one file.
    pub file: Option<u64>,
}

impl Limits {
    pub fn set(&self) -> Result {
        let limit = |what: Resource, wanted: Option<u64>| {
            let Some(wanted) = wanted else { return Ok(()) };
            // Raising a hard limit needs a capability that containers lack; lowering never does.
            let hard = getrlimit(what).maximum.map_or(wanted, |m| m.min(wanted));
            setrlimit(what, Rlimit { current: Some(hard), maximum: Some(hard) }).map_err(step("set resource limits"))
        };
        limit(Resource::Core, Some(0))?;
        limit(Resource::Nofile, self.descriptors)?;
        limit(Resource::Nproc, self.processes)?;
        limit(Resource::As, self.address_space)?;
        limit(Resource::Cpu, self.cpu)?;
        limit(Resource::Fsize, self.file)
    }
}

/// Becomes a user (and the group of the same number) of this user namespace, in no other group. The process has one thread.
pub fn become_user(uid: u32) -> Result {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    thread::set_thread_groups(&[]).map_err(step("drop the groups"))?;
    thread::set_thread_res_gid(group, group, group).map_err(step("change the group"))?;
    thread::set_thread_res_uid(user, user, user).map_err(step("change the user"))
}

/// Keeps these capabilities in this user namespace and no other.
pub fn keep_capabilities(kept: CapabilitySet) -> Result {
    let all = CapabilitySet::all();
    for capability in all.difference(kept).iter() {
        // EINVAL: this kernel does not know it.
        match thread::remove_capability_from_bounding_set(capability) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
            Err(e) => return Err(step("bound the capabilities")(e)),
        }
    }
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })
        .map_err(step("drop capabilities"))
}

/// Refuses to go on with a capability that the change of user should have taken.
pub fn without_capabilities() -> Result {
    let sets = thread::capabilities(None).map_err(step("look at the capabilities that are left"))?;
    if sets.effective.is_empty() && sets.permitted.is_empty() {
        return Ok(());
    }
    let error = io::Error::from(io::ErrorKind::PermissionDenied);
    Err(step("go on: capabilities are left after the change of user")(error))
}

/// Nothing executed from here on has more privilege, and no one may look into this process. What a filter needs.
pub fn no_way_back() -> Result {
    process::umask(fs::Mode::from_raw_mode(0o077));
    thread::set_no_new_privs(true).map_err(step("bar new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("become undumpable"))
}

/// This process dies with the thread that started it. After every change of user: those undo it.
pub fn die_with_parent() -> Result {
    process::set_parent_process_death_signal(Some(process::Signal::KILL)).map_err(step("be bound to the parent's life"))
}
