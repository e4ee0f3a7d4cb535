//! The role `atoll vmm`: one process per machine that starts the engine in its jail, logs the console, answers on the
//! control socket and records how the machine ended.
//!
//! Order of the start, each step before the one that could be abused without it:
//! read the description (root) -> open disks, tap, log, socket -> fork the engine: namespaces, empty root, own user,
//! exec -> become the machine's user too -> serve. From then on no root is left.

mod console;
mod jail;

use crate::channel::Lines;
use crate::client::{Exit, Request, State};
use crate::engine::{self, Control, SnapshotFiles};
use crate::machine::{Error, Machine, Result};
use crate::{kvm, sys};
use console::Console;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Entry of `atoll vmm RUN_DIR`. Returns when the monitor runs detached (0) or could not start (1, reason on stderr).
pub fn main(args: &[String]) -> i32 {
    let [run_dir] = args else {
        eprintln!("usage: atoll vmm RUN_DIR (started by the node agent)");
        return 2;
    };
    // whoever starts the role closes this when it has put it where it belongs
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    match detach(Path::new(run_dir)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}", chain(&error));
            1
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    text
}

/// Forks the monitor away from whoever started it and reports its start: an empty report is success.
fn detach(run_dir: &Path) -> Result<i32> {
    let (mut report, mut tell) = UnixStream::pair().map_err(Error::io("make report channel", run_dir))?;
    match sys::fork().map_err(Error::io("fork", run_dir))? {
        sys::Fork::Parent { .. } => {
            drop(tell);
            let mut text = String::new();
            report.read_to_string(&mut text).map_err(Error::io("read report", run_dir))?;
            if text == "ok" {
                return Ok(0);
            }
            Err(Error::Monitor(if text.is_empty() { "the monitor died at its start".into() } else { text }))
        }
        sys::Fork::Child => {
            drop(report);
            let code = match run(run_dir, &mut tell) {
                Ok(()) => 0,
                Err(error) => {
                    let _ = tell.write_all(chain(&error).as_bytes());
                    1
                }
            };
            std::process::exit(code)
        }
    }
}

fn run(run_dir: &Path, tell: &mut UnixStream) -> Result<()> {
    let path = run_dir.join("machine.json");
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let machine: Machine =
        serde_json::from_slice(&text).map_err(|e| Error::Monitor(format!("{}: {e}", path.display())))?;
    machine.validate()?;
    rustix::process::setsid().ok();
    quiet_descriptors(run_dir)?;

    let engine = engine::choose(&machine, || match &machine.kvm_cache {
        Some(cache) => kvm::probe_once(cache),
        None => kvm::probe(),
    })?;
    let plan = engine.plan(&machine)?;
    let console =
        Console::open(&machine.console, machine.uid, plan.console.try_clone().map_err(Error::io("clone", run_dir))?)?;
    let state = open_state_dir(&machine)?;
    let socket = run_dir.join("vmm.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(Error::io("listen on", &socket))?;
    std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(Error::io("set mode", &socket))?;

    let control_channel = plan.control.try_clone().map_err(Error::io("clone", run_dir))?;
    let (engine_pid, complaints) = jail::start(&machine, plan)?;
    sys::become_user(machine.uid).map_err(Error::io("change user", run_dir))?;
    let control = match engine.control(&machine, control_channel) {
        Ok(control) => control,
        Err(error) => {
            let (code, _) = sys::wait(engine_pid).unwrap_or((-1, None));
            let said = complaints.last_words();
            return Err(Error::Monitor(format!("{} ended at its start with {code}: {said} ({error})", engine.name())));
        }
    };
    let monitor = Arc::new(Monitor {
        control: Mutex::new(control),
        console,
        held: AtomicBool::new(false),
        state: Mutex::new(State {
            engine: engine.name().into(),
            engine_pid: engine_pid as u32,
            started: now_nanos(),
            paused: false,
            exit: None,
        }),
    });
    monitor.console.pump();
    serve(listener, &monitor)?;
    tell.write_all(b"ok").map_err(Error::io("report", run_dir))?;
    tell.shutdown(std::net::Shutdown::Both).ok();

    let (code, signal) = sys::wait(engine_pid).map_err(Error::io("wait", run_dir))?;
    monitor.console.drain();
    let said = complaints.last_words();
    monitor.end(&state, Exit { code, signal, finished: now_nanos(), message: said })
}

/// stdin, stdout and stderr belonged to whoever started us.
fn quiet_descriptors(run_dir: &Path) -> Result<()> {
    let null =
        std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(Error::io("open", run_dir))?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .map_err(|e| Error::io("redirect", run_dir)(e.into()))
}

fn open_state_dir(machine: &Machine) -> Result<OwnedFd> {
    let dir = &machine.state_dir;
    std::os::unix::fs::chown(dir, Some(machine.uid), Some(machine.uid)).map_err(Error::io("chown", dir))?;
    Ok(std::fs::File::open(dir).map_err(Error::io("open", dir))?.into())
}

struct Monitor {
    control: Mutex<Box<dyn Control>>,
    console: Console,
    /// By a client that copies the disks; the lock of `control` goes first.
    held: AtomicBool,
    state: Mutex<State>,
}

fn now_nanos() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Monitor {
    /// Writes the end down before anyone can be told, then lets every waiting client go.
    fn end(&self, state_dir: &OwnedFd, exit: Exit) -> Result<()> {
        let text = {
            let mut state = lock(&self.state);
            state.exit = Some(exit);
            serde_json::to_vec(&*state).unwrap_or_default()
        };
        let fail = |e: rustix::io::Errno| Error::io("write", "exit.json")(e.into());
        use rustix::fs::{Mode, OFlags, openat, renameat};
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(state_dir, "exit.json.new", flags, Mode::from_raw_mode(0o600)).map_err(fail)?;
        let mut file = std::fs::File::from(file);
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(Error::io("write", "exit.json"))?;
        renameat(state_dir, "exit.json.new", state_dir, "exit.json").map_err(fail)
    }

    fn not_held(&self) -> Result<std::sync::MutexGuard<'_, Box<dyn Control>>> {
        let control = lock(&self.control);
        match self.held.load(Ordering::SeqCst) {
            true => Err(Error::Monitor("its snapshot is being taken; try again when that is done".into())),
            false => Ok(control),
        }
    }

    fn hold(&self) -> Result<()> {
        let mut control = self.not_held()?;
        control.pause()?;
        self.held.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn release(&self) -> Result<()> {
        let mut control = lock(&self.control);
        if !self.held.swap(false, Ordering::SeqCst) || lock(&self.state).paused {
            return Ok(());
        }
        control.resume()
    }

    /// Only what the engine is asked for waits for what it is doing.
    fn answer(&self, request: &Request, files: Vec<OwnedFd>) -> std::result::Result<(), String> {
        let control = || lock(&self.control);
        let done = match request {
            Request::State | Request::Watch | Request::Console => Ok(()),
            Request::PowerButton => control().power_button(),
            Request::Reset => self.not_held().and_then(|mut control| control.reset()),
            Request::Pause => control().pause().inspect(|()| lock(&self.state).paused = true),
            Request::Resume => {
                self.not_held().and_then(|mut control| control.resume().inspect(|()| lock(&self.state).paused = false))
            }
            Request::SoftReboot => self.not_held().and_then(|mut control| control.soft_reboot()),
            Request::Display => match files.into_iter().next() {
                Some(client) => control().display(client),
                None => Err(Error::Monitor("a display needs a socket".into())),
            },
            Request::Hold => self.hold(),
            Request::Release => self.release(),
            Request::Balloon(pages) => control().balloon(*pages),
            Request::Snapshot => snapshot_files(files).and_then(|files| control().snapshot(&files)),
            Request::Kill => {
                let pid = lock(&self.state).engine_pid as i32;
                rustix::process::Pid::from_raw(pid).ok_or(Error::NotRunning).and_then(|pid| {
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL)
                        .map_err(|e| Error::io("kill", "engine")(e.into()))
                })
            }
        };
        done.map_err(|e| chain(&e))
    }
}

fn snapshot_files(files: Vec<OwnedFd>) -> Result<SnapshotFiles> {
    let mut files = files.into_iter().map(std::fs::File::from);
    let (Some(state), Some(memory)) = (files.next(), files.next()) else {
        return Err(Error::Monitor("a snapshot needs files for state and memory".into()));
    };
    Ok(SnapshotFiles { state, memory, base: files.next() })
}

/// Follows a soft reboot to its end.
fn see_through(monitor: &Monitor) {
    const LOOK: std::time::Duration = std::time::Duration::from_millis(50);
    while matches!(lock(&monitor.control).rebooting(), Ok(true)) {
        std::thread::sleep(LOOK);
    }
}

const MOST_CLIENTS: usize = 64;
const LONGEST_REQUEST: usize = 4096;

fn serve(listener: UnixListener, monitor: &Arc<Monitor>) -> Result<()> {
    let monitor = monitor.clone();
    std::thread::Builder::new()
        .name("control".into())
        .stack_size(128 << 10)
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                if Arc::strong_count(&monitor) > MOST_CLIENTS {
                    continue;
                }
                let monitor = monitor.clone();
                let _ = std::thread::Builder::new()
                    .name("client".into())
                    .stack_size(128 << 10)
                    .spawn(move || client(&monitor, stream));
            }
        })
        .map(drop)
        .map_err(Error::io("start thread", "control"))
}

/// One client: a line with a request, a line with the answer. `Watch` is never answered: its connection ends with the
/// monitor. After `Console` the connection is the serial line.
fn client(monitor: &Monitor, stream: UnixStream) {
    let mut holds = false;
    converse(monitor, stream, &mut holds);
    if holds {
        let _ = monitor.release();
    }
}

fn converse(monitor: &Monitor, stream: UnixStream, holds: &mut bool) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = Lines::new(stream);
    loop {
        let Ok(Some((line, files))) = reader.next(LONGEST_REQUEST) else { return };
        let Ok(request) = serde_json::from_slice::<Request>(&line) else { return };
        let done = match request {
            Request::Release if !*holds => Err("this connection does not hold the machine".to_owned()),
            _ => monitor.answer(&request, files),
        };
        match (&request, &done) {
            (Request::Hold, Ok(())) => *holds = true,
            (Request::Release, Ok(())) => *holds = false,
            _ => {}
        }
        let reply = done.map(|()| lock(&monitor.state).clone());
        let Ok(mut text) = serde_json::to_vec(&reply) else { return };
        text.push(b'\n');
        if writer.write_all(&text).is_err() {
            return;
        }
        if matches!(request, Request::SoftReboot) && reply.is_ok() {
            return see_through(monitor);
        }
        if matches!(request, Request::Console) {
            return monitor.console.attach(reader, writer);
        }
    }
}
