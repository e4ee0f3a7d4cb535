//! Processes executed in running containers. Their streams go straight to the daemon; the shim only starts them and
//! reports their end on the connection that asked. A connection that closes takes its process with it.

use super::containers::{end_child, exit_code, null, pipe_for};
use super::protocol::{Command, Response, Streams};
use super::server::{START_LIMIT, Server, Token};
use crate::error::{Error, Result};
use crate::runtime::{Join, Launch, Progress, Stage, Stdio};
use crate::spec::Process;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

pub struct Exec {
    connection: u32,
    launch: Option<Launch>,
    deadline: Instant,
    pidfd: Option<OwnedFd>,
    /// The daemon's ends, until they are handed over.
    ends: Vec<OwnedFd>,
    streams: Streams,
}

impl Exec {
    pub fn deadline(&self) -> Option<Instant> {
        self.launch.as_ref().map(|_| self.deadline)
    }

    pub fn reap(&mut self) {
        if let Some(pidfd) = self.pidfd.take() {
            end_child(pidfd.as_fd());
        }
    }
}

impl Command {
    fn within(self, container: &Process) -> Process {
        let mut process = container.clone();
        let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
        process.env.retain(|old| !self.env.iter().any(|new| name(new) == name(old)));
        process.env.extend(self.env);
        (process.args, process.terminal, process.console_size) = (self.args, self.terminal, self.console_size);
        process
    }
}

impl Server {
    pub fn exec(&mut self, connection: u32, name: &str, command: Command, wanted: Streams) -> Result<()> {
        self.check_not_paused()?;
        let user_namespace = self.pinned.user.is_some();
        let alone = self.alone;
        let (_, container) = self.running(name)?;
        let (target, cgroup) = container.join_target(name)?;
        let confinement = container.confinement;
        let process = command.within(&container.process);
        let terminal = process.terminal;
        let owner = self.host_ids(process.user.uid, process.user.gid);
        let (mut stdio, mut ends) = (None, Vec::new());
        let mut streams = Streams::default();
        if !terminal {
            let mut make = |wish: bool, reads: bool| -> Result<OwnedFd> {
                if !wish {
                    return null();
                }
                let (read, write) = pipe_for(reads, owner)?;
                let (theirs, ours) = if reads { (read, write) } else { (write, read) };
                ends.push(ours);
                Ok(theirs)
            };
            stdio = Some(Stdio {
                stdin: make(wanted.stdin, true)?,
                stdout: make(wanted.stdout, false)?,
                stderr: make(wanted.stderr, false)?,
            });
            streams = wanted;
        }
        let stage = Stage::prepare(alone, Some(&cgroup), &[])?;
        let join = Join { process, confinement, user_namespace, namespaces: None, seccomp: None, preserved: 0 };
        let launch = stage.join(join, target.as_fd(), stdio.as_ref())?;
        let id = self.id();
        self.watch_fd(launch.socket(), Token::ExecLaunch(id))?;
        let deadline = Instant::now() + START_LIMIT;
        self.execs.insert(id, Exec { connection, launch: Some(launch), deadline, pidfd: None, ends, streams });
        Ok(())
    }

    pub fn exec_progress(&mut self, id: u32) {
        loop {
            let Some(exec) = self.execs.get_mut(&id) else { return };
            let Some(launch) = &mut exec.launch else { return };
            match launch.progress() {
                Progress::Pending => return,
                Progress::Created(pid) => {
                    exec.pidfd = Pid::from_raw(pid as i32).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
                }
                Progress::Mounted | Progress::Ready => {}
                Progress::Executed => return self.exec_started(id),
                Progress::Failed(error) => return self.exec_failed(id, &error),
            }
        }
    }

    fn exec_started(&mut self, id: u32) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        let Some(mut launch) = exec.launch.take() else { return };
        let connection = exec.connection;
        let terminal = launch.terminal.take();
        let ends = std::mem::take(&mut exec.ends);
        let streams = exec.streams;
        self.unwatch(launch.socket());
        if let Some(pidfd) = self.execs.get(&id).and_then(|e| e.pidfd.as_ref())
            && let Err(e) = self.watch_fd(pidfd.as_fd(), Token::ExecProcess(id))
        {
            return self.exec_failed(id, &e);
        }
        let fds: Vec<BorrowedFd<'_>> = terminal.iter().chain(&ends).map(AsFd::as_fd).collect();
        self.respond(connection, &Response::Streams { terminal: terminal.is_some(), streams }, &fds);
        if !self.is_connected(connection) {
            self.abandon_execs(connection);
        }
    }

    pub fn exec_failed(&mut self, id: u32, error: &Error) {
        let Some(mut exec) = self.execs.remove(&id) else { return };
        exec.reap();
        if let Some(launch) = &exec.launch {
            self.unwatch(launch.socket());
        }
        self.refuse_with(exec.connection, error);
    }

    pub fn exec_ended(&mut self, id: u32) {
        let Some(exec) = self.execs.remove(&id) else { return };
        let Some(pidfd) = exec.pidfd else { return };
        let (code, _) = exit_code(pidfd.as_fd());
        self.unwatch(pidfd.as_fd());
        self.respond(exec.connection, &Response::Exited { code }, &[]);
    }

    /// Whoever wanted these processes has gone.
    pub fn abandon_execs(&mut self, connection: u32) {
        let gone: Vec<u32> = self.execs.iter().filter(|(_, e)| e.connection == connection).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(mut exec) = self.execs.remove(&id) {
                if let Some(launch) = &exec.launch {
                    self.unwatch(launch.socket());
                }
                if let Some(pidfd) = &exec.pidfd {
                    self.unwatch(pidfd.as_fd());
                }
                exec.reap();
            }
        }
    }
}
