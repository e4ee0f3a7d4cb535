//! What the host asks for, done by the pod's shim.

use super::channel::{Channel, Input, lock};
use super::{boot, live, logs};
use crate::protocol::{Answer, Failure, IMAGES, Network, Request, SetUp, VOLUMES};
use container::client::{self, Client};
use container::shim::protocol::{Phase, Sandbox};
use network::netlink::{Batch, Socket, route};
use rustix::event::PollFlags;
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use std::time::Duration;

#[derive(Default)]
pub struct Agent {
    sandbox: Mutex<Option<Sandbox>>,
    tails: logs::Tails,
}

type Outcome = Result<Answer, (Failure, String)>;

fn failed(what: &str) -> impl Fn(io::Error) -> (Failure, String) {
    move |e| (Failure::Failed, format!("{what}: {e}"))
}

fn shim(error: container::Error) -> (Failure, String) {
    use container::Error as E;
    let message = error.to_string();
    match error {
        E::NoContainer(name) => (Failure::NoContainer, name),
        E::NotRunning(name) => (Failure::NotRunning, name),
        E::Exec { code, message } => (Failure::Exec(code), message),
        E::Refused(_) => (Failure::Refused, message),
        E::NoShim { .. } | E::Shim(_) | E::Step { .. } => (Failure::Failed, message),
    }
}

impl Agent {
    pub fn is_set_up(&self) -> bool {
        lock(&self.sandbox).is_some()
    }

    fn sandbox(&self) -> Result<Sandbox, (Failure, String)> {
        lock(&self.sandbox).clone().ok_or_else(|| (Failure::Refused, "the pod is not set up yet".to_owned()))
    }

    fn client(&self) -> Result<Client, (Failure, String)> {
        Client::connect(&self.sandbox()?.run_dir).map_err(shim)
    }

    /// Leads one conversation to its end.
    pub fn lead(&self, channel: &Channel, messages: &Receiver<Input>, request: Request) {
        let outcome = match request {
            Request::Exec { name, command, streams } => {
                match self.client().and_then(|c| c.exec(&name, *command, streams).map_err(shim)) {
                    Ok(live) => return live::process(channel, messages, live, streams),
                    Err(error) => Err(error),
                }
            }
            Request::Attach { name, streams } => {
                match self.client().and_then(|c| c.attach(&name, streams).map_err(shim)) {
                    Ok(live) => return live::process(channel, messages, live, streams),
                    Err(error) => Err(error),
                }
            }
            Request::Connect { port } => return live::connect(channel, messages, port),
            Request::Logs { name, attempt } => {
                if !plain(&name) {
                    Err((Failure::Refused, format!("{name:?} is no container's name")))
                } else {
                    self.tails.follow(channel, &name, attempt).map(|()| Answer::Done).map_err(failed("reading the log"))
                }
            }
            Request::Watch { seen } => match self.client().and_then(|c| c.watch(seen).map_err(shim)) {
                Ok(socket) => {
                    if !channel.ready(&socket, PollFlags::IN) {
                        return;
                    }
                    Ok(Answer::Changed)
                }
                Err(error) => Err(error),
            },
            other => self.answer(other),
        };
        match outcome {
            Ok(answer) => channel.answer(&answer),
            Err((kind, message)) => channel.fail(kind, message),
        };
    }

    fn answer(&self, request: Request) -> Outcome {
        match request {
            Request::SetUp(wanted) => self.set_up(*wanted),
            Request::Files(tree) => {
                if !below(&tree.root) {
                    return Err((Failure::Refused, format!("{}: must lie below {VOLUMES}", tree.root.display())));
                }
                tree.write().map_err(failed("writing a volume"))?;
                Ok(Answer::Done)
            }
            Request::Directory { path, sub, mode, group } => {
                directory(Path::new(&path), Path::new(&sub), mode, group).map_err(failed("making a volume"))?;
                Ok(Answer::Done)
            }
            Request::Start(start) => {
                let mut start = *start;
                start.log_path = logs::path(&start.name, start.attempt);
                start.log_max_bytes = logs::MAX_BYTES;
                self.client()?.start(start).map(Answer::Started).map_err(shim)
            }
            Request::List => {
                let (sequence, containers) = self.client()?.list().map_err(shim)?;
                for state in containers.iter().filter(|s| matches!(s.phase, Phase::Exited { .. })) {
                    self.tails.ended(&state.name, state.attempt);
                }
                Ok(Answer::List { sequence, containers })
            }
            Request::Signal { name, signal } => {
                self.client()?.signal(&name, signal).map(|()| Answer::Done).map_err(shim)
            }
            Request::Remove { name } => {
                self.client()?.remove(&self.sandbox()?.dir, &name).map_err(shim)?;
                self.tails.forget(&name);
                if plain(&name) {
                    let _ = fs::remove_dir_all(logs::path(&name, 0).parent().unwrap_or(Path::new("")));
                }
                Ok(Answer::Done)
            }
            Request::Pause => self.client()?.pause().map(|()| Answer::Done).map_err(shim),
            Request::Resume => self.client()?.resume().map(|()| Answer::Done).map_err(shim),
            Request::Woke { clock, seed } => {
                crate::sys::reseed(&seed).and_then(|()| crate::sys::set_clock(clock)).map_err(failed("waking up"))?;
                Ok(Answer::Done)
            }
            Request::Stats { name } => {
                let listed = self.client()?.list().map_err(shim)?.1;
                let state = listed.into_iter().find(|s| s.name == name && s.pid.is_some());
                let state = state.ok_or((Failure::NotRunning, name))?;
                let stats = client::stats(&state.cgroup).map_err(shim)?;
                Ok(Answer::Stats {
                    cpu_nanos: stats.cpu_nanos,
                    memory_bytes: stats.memory_bytes,
                    memory_working_set: stats.memory_working_set,
                    pids: stats.pids,
                })
            }
            Request::Read { path, most } => {
                read(Path::new(&path), most).map(Answer::Text).map_err(failed("reading a file"))
            }
            Request::Resize { .. } => Err((Failure::Refused, "no terminal is open on this channel".into())),
            Request::Exec { .. }
            | Request::Attach { .. }
            | Request::Connect { .. }
            | Request::Logs { .. }
            | Request::Watch { .. } => Err((Failure::Refused, "not a request with one answer".into())),
        }
    }

    fn set_up(&self, wanted: SetUp) -> Outcome {
        let mut held = lock(&self.sandbox);
        if held.is_some() {
            return Ok(Answer::Done);
        }
        // its own clock is all it has otherwise
        let _ = crate::sys::set_clock(wanted.clock);
        for serial in &wanted.images {
            mount_image(serial).map_err(failed(serial))?;
        }
        configure(&wanted.network).map_err(|e| (Failure::Failed, format!("network: {e}")))?;
        let exe = Path::new("/proc/self/exe");
        client::launch(&fs::read_link(exe).unwrap_or(exe.into()), &wanted.sandbox).map_err(shim)?;
        let pid = Client::connect(&wanted.sandbox.run_dir).map_err(shim)?.shim_pid;
        reap(pid).map_err(failed("starting a thread"))?;
        *held = Some(wanted.sandbox);
        Ok(Answer::Done)
    }
}

fn plain(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && name != "." && name != ".."
}

fn below(path: &Path) -> bool {
    path.starts_with(VOLUMES) && !path.components().any(|c| matches!(c, Component::ParentDir))
}

fn mount_image(serial: &str) -> io::Result<()> {
    if !plain(serial) {
        return Err(io::Error::other("is no serial number"));
    }
    let device = boot::disk(serial).ok_or_else(|| io::Error::other("no such disk appeared"))?;
    let target = Path::new(IMAGES).join(serial);
    fs::create_dir_all(&target)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(&device, &target, "erofs", flags, None)?;
    Ok(())
}

/// Loopback, and the only other link there is.
fn configure(wanted: &Network) -> network::Result<()> {
    let mut socket = Socket::route()?;
    let mut batch = Batch::new();
    batch.set_up(route::LOOPBACK);
    if let (Some(address), Some(gateway)) = (wanted.address, wanted.gateway) {
        let found = boot::wait_for(|| Socket::route().ok().and_then(|mut s| route::find_link(&mut s, "eth0").ok()?));
        let index = match found {
            Some(link) => link.index,
            None => route::link_index(&mut socket, "eth0")?,
        };
        batch.set_up(index);
        batch.add_address(index, address);
        if let Some(mac) = wanted.neighbour {
            batch.add_neighbour(index, gateway, mac);
        }
        batch.add_default_route(index, gateway);
        if let (Some(address), Some(gateway)) = (wanted.address6, wanted.gateway6) {
            batch.add_address6(index, address);
            if let Some(mac) = wanted.neighbour {
                batch.add_neighbour6(index, gateway, mac);
            }
            batch.add_default_route6(index, gateway);
        }
    }
    socket.send(batch)
}

/// Whoever loses its parent becomes a child of process 1. The shim is one; without it there is no pod.
fn reap(shim: u32) -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    let body = move || {
        loop {
            match rustix::process::wait(rustix::process::WaitOptions::empty()) {
                Ok(Some((pid, _))) if pid.as_raw_nonzero().get() as u32 == shim => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
        eprintln!("atoll-guest: the shim has ended");
        boot::power_off();
    };
    std::thread::Builder::new().name("reaper".into()).spawn(body).map(drop)
}

/// A directory for containers, as the host has it, and what a `subPath` names below it.
fn directory(path: &Path, sub: &Path, mode: u32, group: u32) -> io::Result<()> {
    let refuse = |path: &Path| Err(io::Error::other(format!("{}: is no plain path below {VOLUMES}", path.display())));
    if !below(path) || sub.components().any(|c| !matches!(c, Component::Normal(_))) {
        return refuse(path);
    }
    let make = |path: &Path| -> io::Result<()> {
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => Ok(()),
            Ok(_) => refuse(path),
            Err(_) => {
                fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
                chown(path, None, Some(group))?;
                fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))
            }
        }
    };
    make(path)?;
    let mut at = PathBuf::from(path);
    for part in sub.components() {
        at.push(part);
        make(&at)?;
    }
    Ok(())
}

fn read(path: &Path, most: u32) -> io::Result<String> {
    if !below(path) {
        return Err(io::Error::other(format!("{}: must lie below {VOLUMES}", path.display())));
    }
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    file.take(u64::from(most)).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
