//! A process for a container that runs already.

use super::{Event, Join, Stdio, report, take_streams, warn};
use crate::error::{During, Error, Result};
use crate::process::{self, Constraints, Labels};
use crate::sys::{self, Cloned, SingleThreaded};
use crate::{console, namespaces, wire};
use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// In the set-up process of an exec. `target`: a pidfd of the container's first process.
pub fn join(
    alone: SingleThreaded,
    order: Join,
    target: OwnedFd,
    stdio: Option<Stdio>,
    socket: &UnixStream,
) -> Result<()> {
    let mut kinds = match order.namespaces {
        Some(bits) => ThreadNameSpaceType::from_bits_retain(bits),
        None => {
            ThreadNameSpaceType::MOUNT
                | ThreadNameSpaceType::CONTROL_GROUP
                | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
                | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
                | ThreadNameSpaceType::PROCESS_ID
                | ThreadNameSpaceType::NETWORK
        }
    };
    if order.user_namespace {
        kinds |= ThreadNameSpaceType::USER;
    }
    // While this process is on its way it shows nothing of the host to those in the container.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let labels = Labels::open(&order.process)?;
    if let Some(score) = order.process.oom_score_adj
        && std::fs::write("/proc/self/oom_score_adj", score.to_string()).is_err()
    {
        warn(socket, format!("oom_score_adj: this host does not let it be set to {score}"));
    }
    move_into_thread_name_spaces(target.as_fd(), kinds).during(|| "entering the container".into())?;
    drop(target);
    match alone.clone(libc::CLONE_PARENT as u64, None).during(|| "making a process in the container".into())? {
        Cloned::Parent { pid, .. } => wire::send(socket, &Event::Created { pid }, &[]).during(|| "reporting".into()),
        Cloned::Child => {
            let error = (|| {
                rustix::process::setsid().during(|| "setsid".into())?;
                if order.user_namespace {
                    namespaces::become_root()?;
                }
                let terminal = if order.process.terminal {
                    let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during(|| "/".into())?;
                    Some(console::open(root.as_fd(), &order.process)?)
                } else {
                    None
                };
                take_streams(stdio, terminal, socket)?;
                // Keys of the caller's session stay the caller's.
                if let Err(e) = sys::join_session_keyring(None)
                    && e.raw_os_error() != Some(libc::ENOSYS)
                {
                    warn(socket, format!("session keyring: {e}"));
                }
                let under = Constraints {
                    confinement: order.confinement,
                    seccomp: order.seccomp.as_ref(),
                    preserved: order.preserved,
                    labels: Some(&labels),
                    ..Default::default()
                };
                let ready = process::assume(&order.process, under, &mut |text| warn(socket, text))?;
                if let Some(listener) = &ready.listener {
                    wire::send(socket, &Event::Listener, &[listener.as_fd()])
                        .during(|| "handing the seccomp listener over".into())?;
                }
                Ok(ready)
            })();
            report(socket, &error.map_or_else(|e: Error| e, process::Ready::execute));
            sys::exit_now(127)
        }
    }
}
