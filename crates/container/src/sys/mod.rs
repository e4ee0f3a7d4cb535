//! The only place with `unsafe`: system calls that `rustix` does not have, or has as unsafe functions.

mod attributes;
mod bpf;
mod exe;
mod landlock;
mod mount;
mod process;
mod seccomp;

pub use attributes::{
    SchedAttr, join_session_keyring, set_affinity, set_domain_name, set_io_priority, set_personality, set_scheduler,
    unshare_cgroup, unshare_time,
};
pub use bpf::{BpfInstruction, attach_device_program, load_device_program};
pub use exe::run_from;
pub use landlock::{LANDLOCK_SCOPES, landlock_abi, scope_abstract_sockets, scope_all};
pub use mount::{MountAttr, mount_setattr};
pub use process::{
    Cloned, SingleThreaded, close_all_but, close_on_exec_from, dup_onto, execve, exit_now, inherit_fd, loopback_up,
    reset_signals, send_signal, set_host_name, signals_as_descriptor, unshare_mounts, wait_for_child_signal,
};
pub use seccomp::{Instruction, load_filter, load_filter_with_listener};
