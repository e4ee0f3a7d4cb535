//! Which system calls each of the engine's threads may make, and what for. Everything else kills the machine: it is a
//! monitor that a guest has taken over.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug)]
pub enum Role {
    /// Builds the VM, serves the control channel, makes and ends the other threads.
    Owner,
    Vcpu,
    /// A device, or the serial port's input.
    Device,
}

type Call = (libc::c_long, &'static str);

/// What any thread of a Rust program needs.
const COMMON: &[Call] = &[
    (libc::SYS_futex, "locks and condition variables"),
    (libc::SYS_read, "eventfds, the console, taps, streams"),
    (libc::SYS_write, "the same; the last words on stderr"),
    (libc::SYS_close, "descriptors that are done with"),
    (libc::SYS_mmap, "heap and stacks, never executable"),
    (libc::SYS_munmap, "heap and stacks"),
    (libc::SYS_mremap, "growing buffers"),
    (libc::SYS_mprotect, "guard pages of stacks, arenas of the heap, never executable"),
    (libc::SYS_brk, "heap"),
    (libc::SYS_madvise, "ended stacks; pages that the balloon gives back"),
    (libc::SYS_sigaltstack, "the guard page's handler of each thread"),
    (libc::SYS_rt_sigprocmask, "making and ending threads"),
    (libc::SYS_rt_sigreturn, "return from the wake-up signal"),
    (libc::SYS_restart_syscall, "after being stopped"),
    (libc::SYS_gettid, "panic messages, waking threads"),
    (libc::SYS_getpid, "waking threads"),
    (libc::SYS_clock_gettime, "timeouts"),
    (libc::SYS_clock_nanosleep, "waiting for the end"),
    (libc::SYS_nanosleep, "waiting for the end"),
    (libc::SYS_sched_yield, "locks"),
    (libc::SYS_exit, "end of a thread"),
    (libc::SYS_exit_group, "end of the machine"),
    (libc::SYS_tgkill, "waking vCPU threads; abort"),
    (libc::SYS_rseq, "registered by the C library at a thread's start"),
    (libc::SYS_set_robust_list, "the same"),
    (libc::SYS_sched_getaffinity, "the size of a thread's stack"),
    (libc::SYS_prctl, "a thread's name and its filter"),
    (libc::SYS_seccomp, "its filter"),
];

const OWNER: &[Call] = &[
    (libc::SYS_ioctl, "KVM: the VM, its memory, its processors, interrupts and doorbells"),
    (libc::SYS_clone3, "threads"),
    (libc::SYS_clone, "threads, with an older C library"),
    (libc::SYS_eventfd2, "doorbells"),
    (libc::SYS_epoll_create1, "a device's thread"),
    (libc::SYS_epoll_ctl, "what a device's thread waits for"),
    (libc::SYS_epoll_wait, "used by threads not yet in their own filter"),
    (libc::SYS_epoll_pwait2, "the same"),
    (libc::SYS_epoll_pwait, "the same"),
    (libc::SYS_poll, "the same"),
    (libc::SYS_ppoll, "the same"),
    (libc::SYS_lseek, "reading the kernel and the initrd"),
    (libc::SYS_fcntl, "copies of descriptors"),
    (libc::SYS_dup, "the same"),
    (libc::SYS_statx, "the size of a disk"),
    (libc::SYS_fstat, "the same"),
    (libc::SYS_rt_sigaction, "the wake-up signal"),
    (libc::SYS_recvfrom, "the control channel"),
    (libc::SYS_sendto, "the control channel"),
    (libc::SYS_recvmsg, "the control channel"),
    (libc::SYS_sendmsg, "the control channel"),
    (libc::SYS_preadv, "kept for the devices' threads, whose filters can only take away"),
    (libc::SYS_pwritev, "the same"),
    (libc::SYS_pread64, "the same"),
    (libc::SYS_pwrite64, "the same"),
    (libc::SYS_fdatasync, "the same"),
    (libc::SYS_fsync, "the same"),
    (libc::SYS_fallocate, "the same"),
    (libc::SYS_ftruncate, "the same"),
    (libc::SYS_getrandom, "the same; hash seeds"),
    (libc::SYS_accept4, "the same"),
    (libc::SYS_shutdown, "the same"),
];

const VCPU: &[Call] = &[
    (libc::SYS_ioctl, "those of VCPU_IOCTLS alone"),
    (libc::SYS_sendto, "the serial port's output"),
    (libc::SYS_clone3, "a device's thread, when its driver is ready"),
    (libc::SYS_clone, "the same, with an older C library"),
    (libc::SYS_eventfd2, "that thread's stop signal"),
    (libc::SYS_epoll_create1, "that thread's set"),
    (libc::SYS_epoll_ctl, "the same"),
    (libc::SYS_fcntl, "copies of its doorbells"),
    // a thread starts in the filter of the one that made it
    (libc::SYS_epoll_wait, "for the device's thread"),
    (libc::SYS_epoll_pwait2, "for the device's thread"),
    (libc::SYS_epoll_pwait, "for the device's thread"),
    (libc::SYS_preadv, "for the device's thread"),
    (libc::SYS_pwritev, "for the device's thread"),
    (libc::SYS_pread64, "for the device's thread"),
    (libc::SYS_pwrite64, "for the device's thread"),
    (libc::SYS_fdatasync, "for the device's thread"),
    (libc::SYS_fallocate, "for the device's thread"),
    (libc::SYS_ftruncate, "for the device's thread"),
    (libc::SYS_getrandom, "for the device's thread"),
    (libc::SYS_recvfrom, "for the device's thread"),
    (libc::SYS_accept4, "for the device's thread"),
    (libc::SYS_shutdown, "for the device's thread"),
];

/// By number: KVM_RUN; KVM_GET_REGS, to say where a guest broke; TUNSETOFFLOAD, when the network's driver is ready; FIONBIO,
/// for the device's thread.
const VCPU_IOCTLS: [u64; 4] = [0xae80, 0x8090_ae81, 0x4004_54d0, libc::FIONBIO];

const DEVICE: &[Call] = &[
    (libc::SYS_epoll_wait, "sleep until there is work"),
    (libc::SYS_epoll_pwait2, "the same"),
    (libc::SYS_epoll_pwait, "the same"),
    (libc::SYS_epoll_ctl, "vsock: what its streams wait for"),
    (libc::SYS_poll, "the serial port's input"),
    (libc::SYS_ppoll, "the same"),
    (libc::SYS_preadv, "disk reads"),
    (libc::SYS_pwritev, "disk writes"),
    (libc::SYS_pread64, "tables of disk images"),
    (libc::SYS_pwrite64, "tables of disk images; zeros"),
    (libc::SYS_fdatasync, "disk flushes"),
    (libc::SYS_fallocate, "discarded and zeroed ranges"),
    (libc::SYS_ftruncate, "a disk image that grows"),
    (libc::SYS_getrandom, "the guest's entropy"),
    (libc::SYS_recvfrom, "streams and the console"),
    (libc::SYS_sendto, "streams and the console"),
    (libc::SYS_accept4, "vsock clients"),
    (libc::SYS_fcntl, "vsock: non-blocking streams"),
    (libc::SYS_ioctl, "vsock: non-blocking streams, FIONBIO alone"),
    (libc::SYS_shutdown, "streams that end"),
];

fn program(role: Role) -> Result<BpfProgram, String> {
    let own = match role {
        Role::Owner => OWNER,
        Role::Vcpu => VCPU,
        Role::Device => DEVICE,
    };
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> =
        COMMON.iter().chain(own).map(|(call, _)| (*call, Vec::new())).collect();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![only(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?]);
    }
    let ioctls: &[u64] = match role {
        Role::Owner => &[],
        Role::Vcpu => &VCPU_IOCTLS,
        Role::Device => &[libc::FIONBIO],
    };
    if !ioctls.is_empty() {
        let allowed = ioctls.iter().map(|number| only(1, SeccompCmpOp::Eq, *number));
        rules.insert(libc::SYS_ioctl, allowed.collect::<Result<_, _>>()?);
    }
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).map_err(|e| e.to_string())
}

/// The call is allowed if this argument is like that.
fn only(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value);
    condition.and_then(|c| SeccompRule::new(vec![c])).map_err(|e| e.to_string())
}

static JAILED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// For the owner: from here on, every thread made enters its own filter too.
pub fn begin() -> Result<(), String> {
    JAILED.store(true, std::sync::atomic::Ordering::SeqCst);
    apply(Role::Owner)
}

/// Called by each thread when it starts. A filter that cannot be had is the end: better no machine than an open one.
pub fn enter(role: Role) {
    if JAILED.load(std::sync::atomic::Ordering::SeqCst)
        && let Err(why) = apply(role)
    {
        eprintln!("seccomp filter of {role:?}: {why}");
        std::process::exit(1);
    }
}

fn apply(role: Role) -> Result<(), String> {
    seccompiler::apply_filter(&program(role)?).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_compile_and_every_call_has_its_reason() {
        for role in [Role::Owner, Role::Vcpu, Role::Device] {
            assert!(!program(role).unwrap().is_empty());
        }
        let all = COMMON.iter().chain(OWNER).chain(VCPU).chain(DEVICE);
        assert!(all.clone().all(|(_, reason)| !reason.is_empty()));
        let dangerous = [libc::SYS_execve, libc::SYS_openat, libc::SYS_socket, libc::SYS_ptrace, libc::SYS_unshare];
        assert!(!all.clone().any(|(call, _)| dangerous.contains(call)));
    }
}
