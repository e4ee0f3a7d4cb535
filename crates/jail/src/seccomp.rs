//! A filter of system calls by list: what is on it is allowed, the rest is answered with `EPERM`.

use crate::{Result, step, sys};

/// What a role may call. The default is nothing.
#[derive(Default)]
pub struct Filter<'a> {
    /// Without regard to arguments.
    pub calls: &'a [i64],
    /// Threads, but no namespaces.
    pub threads: bool,
    /// `socket` with these address families.
    pub sockets: &'a [u32],
    /// `prctl` with these first arguments.
    pub prctl: &'a [u32],
    /// `ioctl` with these requests.
    pub ioctl: &'a [u32],
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// `CLONE_NEW*`.
const NAMESPACES: u32 = 0x7e02_0080;

// linux/bpf_common.h, linux/seccomp.h
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const KILL: u32 = 0x8000_0000;
const DENIED: u32 = ERRNO | libc::EPERM as u32;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENT_0: u32 = 16;
const ARGUMENT_1: u32 = 24;

impl Filter<'_> {
    /// Puts this thread and those it starts under the filter. After [`crate::no_way_back`].
    pub fn apply(&self) -> Result {
        sys::seccomp(&mut self.program()).map_err(step("filter the system calls"))
    }

    fn program(&self) -> Vec<libc::sock_filter> {
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let give = |value| step(RETURN, 0, 0, value);
        let number = |nr: i64| u32::try_from(nr).unwrap_or(u32::MAX);
        let mut program =
            vec![step(LOAD, 0, 0, ARCH), step(EQUAL, 1, 0, ARCHITECTURE), give(KILL), step(LOAD, 0, 0, NUMBER)];
        for nr in self.calls {
            program.extend([step(EQUAL, 0, 1, number(*nr)), give(ALLOW)]);
        }
        if self.threads {
            // The C library falls back to `clone`, whose flags can be seen, if there is no `clone3`.
            program.extend([step(EQUAL, 0, 1, number(libc::SYS_clone3)), give(ERRNO | libc::ENOSYS as u32)]);
            program.extend([
                step(EQUAL, 0, 4, number(libc::SYS_clone)),
                step(LOAD, 0, 0, ARGUMENT_0),
                step(ANY_BIT, 1, 0, NAMESPACES),
                give(ALLOW),
                give(DENIED),
            ]);
        }
        for (nr, offset, values) in [
            (libc::SYS_socket, ARGUMENT_0, self.sockets),
            (libc::SYS_prctl, ARGUMENT_0, self.prctl),
            (libc::SYS_ioctl, ARGUMENT_1, self.ioctl),
        ] {
            let length = values.len() as u8 * 2 + 2;
            program.extend([step(EQUAL, 0, length, number(nr)), step(LOAD, 0, 0, offset)]);
            for value in values {
                program.extend([step(EQUAL, 0, 1, *value), give(ALLOW)]);
            }
            program.push(give(DENIED));
        }
        program.push(give(DENIED));
        program
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(filter: &Filter, nr: i64, argument_0: u32, argument_1: u32) -> u32 {
        let program = filter.program();
        let (mut at, mut accumulator) = (0usize, 0u32);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD => {
                    accumulator = match step.k {
                        NUMBER => nr as u32,
                        ARCH => ARCHITECTURE,
                        ARGUMENT_0 => argument_0,
                        ARGUMENT_1 => argument_1,
                        other => panic!("load of {other}"),
                    }
                }
                EQUAL => at += usize::from(if accumulator == step.k { step.jt } else { step.jf }),
                ANY_BIT => at += usize::from(if accumulator & step.k != 0 { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("instruction {other}"),
            }
        }
    }

    #[test]
    fn what_is_on_the_list_is_allowed_and_nothing_else() {
        let calls = [libc::SYS_read, libc::SYS_futex];
        let (sockets, prctl) = ([libc::AF_INET as u32, libc::AF_INET6 as u32], [libc::PR_SET_NAME as u32]);
        let filter =
            Filter { calls: &calls, threads: true, sockets: &sockets, prctl: &prctl, ioctl: &[0x5421, 0x5451] };
        for nr in calls {
            assert_eq!(verdict(&filter, nr, 0, 0), ALLOW, "{nr}");
        }
        for nr in [libc::SYS_openat, libc::SYS_socket, libc::SYS_execve, libc::SYS_ptrace, libc::SYS_kill] {
            assert_eq!(verdict(&filter, nr, 0, 0), DENIED, "{nr}");
        }
        assert_eq!(verdict(&filter, libc::SYS_socket, libc::AF_INET6 as u32, 0), ALLOW);
        assert_eq!(verdict(&filter, libc::SYS_socket, libc::AF_NETLINK as u32, 0), DENIED);
        assert_eq!(verdict(&filter, libc::SYS_clone, libc::CLONE_VM as u32, 0), ALLOW);
        assert_eq!(verdict(&filter, libc::SYS_clone, libc::CLONE_NEWUSER as u32, 0), DENIED);
        assert_eq!(verdict(&filter, libc::SYS_clone3, 0, 0), ERRNO | libc::ENOSYS as u32);
        assert_eq!(verdict(&filter, libc::SYS_prctl, libc::PR_SET_NAME as u32, 0), ALLOW);
        assert_eq!(verdict(&filter, libc::SYS_prctl, libc::PR_SET_DUMPABLE as u32, 0), DENIED);
        assert_eq!(verdict(&filter, libc::SYS_ioctl, 0, 0x5451), ALLOW);
        assert_eq!(verdict(&filter, libc::SYS_ioctl, 0, 0x5412), DENIED);

        let single = Filter { threads: false, sockets: &[], ..filter };
        assert_eq!(verdict(&single, libc::SYS_clone, libc::CLONE_VM as u32, 0), DENIED);
        assert_eq!(verdict(&single, libc::SYS_clone3, 0, 0), DENIED);
        assert_eq!(verdict(&single, libc::SYS_socket, libc::AF_INET as u32, 0), DENIED);
    }
}
