//! What the engine does that needs `unsafe`: giving memory to KVM, I/O straight into guest memory, giving pages back,
//! waking vCPU threads, a tap's modes, Landlock.

use super::memory::Memory;
use super::virtio::queue::Segment;
use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd: a doorbell between threads, KVM and devices.
pub struct Signal(EventFd);

impl Signal {
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Signal)
    }
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Signal)
    }
    /// A full counter is as good as raised.
    pub fn raise(&self) -> io::Result<()> {
        match self.0.write(1) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
    pub fn clear(&self) {
        let _ = self.0.read();
    }
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the EventFd owns this descriptor and lives as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Shows all of `memory` to the VM, one slot for each region.
pub fn give_memory(vm: &VmFd, memory: &Memory) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the mapping is as long as said, and `run::Vm` keeps `memory` until the VM and its vCPUs are dropped.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}

/// Floating point and vector registers.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than the structure only for features that a process has to ask the kernel for (AMX), which
    // this one never does and its guests are not shown.
    unsafe { vcpu.set_xsave(xsave) }
}

/// Linux takes at most 1024 vectors a call.
const MOST_VECTORS: usize = 1024;

fn vectors(memory: &Memory, segments: &[Segment]) -> io::Result<Vec<libc::iovec>> {
    let outside = || io::Error::new(io::ErrorKind::InvalidInput, "a segment lies outside the guest's memory");
    segments
        .iter()
        .take(MOST_VECTORS)
        .map(|segment| {
            let slice = memory.get_slice(segment.address, segment.len as usize).map_err(|_| outside())?;
            Ok(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        })
        .collect()
}

/// `preadv(2)` into the guest's memory.
pub fn read_at(fd: BorrowedFd<'_>, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<usize> {
    let vectors = vectors(memory, segments)?;
    // SAFETY: each vector was cut from `memory`, which stays mapped for the call; only the kernel writes there, and no
    // Rust reference to guest memory exists anywhere.
    let n = unsafe { libc::preadv(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset as i64) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `pwritev(2)` from the guest's memory.
pub fn write_at(fd: BorrowedFd<'_>, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<usize> {
    let vectors = vectors(memory, segments)?;
    // SAFETY: as in `read_at`; the kernel only reads.
    let n = unsafe { libc::pwritev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset as i64) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Gives pages back to the host; the guest finds what they began as there when it next looks: zeros, or what the snapshot
/// has. Refuses what is not whole pages.
pub fn discard(memory: &Memory, segment: Segment) -> io::Result<()> {
    let whole = segment.address.0.is_multiple_of(4096) && segment.len.is_multiple_of(4096);
    let slice = memory.get_slice(segment.address, segment.len as usize).ok().filter(|_| whole);
    let slice = slice.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the range is whole pages inside `memory`, a private mapping that nothing borrows.
    let result = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Keeps the heap to one arena. For more, the C library looks at files that say how many processors there are and how
/// memory is overcommitted, which the jail ends; and each costs memory.
pub fn bound_heap() {
    // SAFETY: sets a number in the allocator, before this process has another thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

extern "C" fn ignore(_: i32) {}

/// Makes the wake-up signal interrupt system calls and do nothing else.
pub fn prepare_wake() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler does nothing, so it is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Interrupts a thread's system call. A call about to begin is missed: call until it has taken notice.
pub fn wake<T>(thread: &JoinHandle<T>) {
    // SAFETY: the thread is not joined while its handle is borrowed, so the id is valid.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
}

const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// Which offloads (TUN_F_*) the guest takes.
pub fn tap_offloads(tap: &OwnedFd, flags: u32) -> io::Result<()> {
    // SAFETY: the argument is a number, no memory is passed.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Length of the virtio-net header before each frame.
pub fn tap_header(tap: &OwnedFd, length: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which outlives the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// linux/landlock.h, `struct landlock_ruleset_attr` as of ABI 6.
#[repr(C)]
struct Ruleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// Denies every file system access, TCP bind and connect, and signals out of this domain, as far as the kernel knows how
/// to. Returns its Landlock ABI, 0 if it has none.
pub fn landlock_deny_all() -> io::Result<u32> {
    const VERSION_FLAG: u32 = 1;
    // SAFETY: with this flag and no attribute the call only answers a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION_FLAG) };
    if abi < 1 {
        return Ok(0);
    }
    let (rights, size) = match abi {
        1 => (13, 8),
        2 => (14, 8),
        3 => (15, 8),
        4 => (15, 16),
        5 => (16, 16),
        _ => (16, size_of::<Ruleset>()),
    };
    let ruleset = Ruleset {
        handled_access_fs: (1u64 << rights) - 1,
        handled_access_net: if abi >= 4 { 0b11 } else { 0 },
        scoped: if abi >= 6 { 0b11 } else { 0 },
    };
    // SAFETY: the attribute outlives the calls and has at least `size` bytes; the descriptor is made and closed here.
    unsafe {
        let fd = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size, 0u32);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let result = libc::syscall(libc::SYS_landlock_restrict_self, fd, 0u32);
        libc::close(fd as i32);
        if result == 0 { Ok(abi as u32) } else { Err(io::Error::last_os_error()) }
    }
}

/// Closes every descriptor but these and the standard three.
pub fn close_all_but(keep: &mut Vec<RawFd>) -> io::Result<()> {
    keep.extend([0, 1, 2]);
    keep.sort_unstable();
    keep.dedup();
    let mut first = 0u32;
    for fd in keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).chain([u32::MAX]) {
        // SAFETY: this is the forked engine, of one thread; the owners of what is closed are the monitor's objects, which
        // this process never touches nor drops: it leaves by `exit`.
        if fd > first && unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0u32) } != 0 {
            return Err(io::Error::last_os_error());
        }
        first = fd.saturating_add(1);
    }
    Ok(())
}
