//! The only place with `unsafe`: system calls that `rustix` does not have, or has as unsafe functions.

mod landlock;
mod mount;
mod process;
mod seccomp;

pub use landlock::{forbid_foreign_abstract_sockets, landlock_abi};
pub use mount::{MountAttr, mount_setattr};
pub use process::{
    Cloned, SingleThreaded, close_all_but, close_on_exec_from, dup_onto, execve, exit_now, loopback_up, reset_signals,
    send_signal, set_host_name, unshare_mounts, wait_for_child_signal,
};
pub use seccomp::{Instruction, load_filter};
