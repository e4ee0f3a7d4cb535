//! The host's own business: which functions it has, and what the daemon asks of it.

use super::context::Context;
use super::function::{Counters, Function, Shared, Wish};
use super::log::Log;
use super::outbound::Outbound;
use super::recorder::Recorder;
use super::ticker::Ticker;
use crate::engine::INSTANCES;
use crate::error::{Error, Result, io};
use crate::wire::{Exit, FunctionSpec, FunctionState, Listing, Reply, Request, VERSION, receive, send};
use rustix::net::{SocketFlags, accept_with};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use wasmtime::Engine;
use wasmtime::component::{Component, Linker};
use wasmtime_wasi_http::p2::bindings::ProxyPre;

/// Connections to the control socket; the daemon needs two.
const CONNECTIONS: usize = 32;
const FUNCTIONS: usize = 1000;
/// Bytes of one component's machine code.
const CODE_LIMIT: u64 = 1 << 30;
const PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Host {
    engine: Engine,
    runtime: Handle,
    linker: Linker<Context>,
    ticker: Arc<Ticker>,
    instances: Arc<Semaphore>,
    recorder: Arc<Recorder>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Number of the last change.
    sequence: u64,
    functions: BTreeMap<String, Entry>,
    code: HashMap<String, Component>,
    retired: bool,
}

struct Entry {
    function: Arc<Function>,
    exit: Option<Exit>,
}

impl Host {
    pub fn new(engine: Engine, runtime: Handle) -> Result<Arc<Host>> {
        let failed = |e: wasmtime::Error| Error::Start(format!("{e:#}"));
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker).map_err(failed)?;
        wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker).map_err(failed)?;
        let ticker = Ticker::start(engine.clone()).map_err(io("start", "the ticker"))?;
        Ok(Arc::new(Host {
            engine,
            runtime,
            linker,
            ticker,
            instances: Arc::new(Semaphore::new(INSTANCES as usize)),
            recorder: Arc::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn bump(&self, state: &mut State) {
        state.sequence += 1;
        self.changed.notify_all();
    }

    fn answer(self: &Arc<Host>, request: Request, descriptors: Vec<OwnedFd>) -> Reply {
        match request {
            Request::Hello => Reply::Hello { version: VERSION },
            Request::Add(spec) => match self.add(*spec, descriptors) {
                Ok(started) => Reply::Started { started },
                Err(message) => Reply::Refused { message },
            },
            Request::Stop { id, drain_ms, signal } => self.with(&id, |entry| {
                let drain = Duration::from_millis(drain_ms.min(24 * 3600 * 1000));
                entry.function.wish.send_replace(Wish::Stop { until: Instant::now() + drain, signal });
            }),
            Request::Forget { id } => self.forget(&id),
            Request::Log { id } => match descriptors.into_iter().next() {
                Some(file) => self.with(&id, |entry| entry.function.log.replace(file)),
                None => Reply::Refused { message: "a log without its descriptor".into() },
            },
            Request::List => Reply::Listing(self.list()),
            Request::Stats { id } => match self.lock().functions.get(&id) {
                Some(entry) => Reply::Stats(entry.function.stats()),
                None => Reply::Unknown { id },
            },
            Request::Spans => {
                let (spans, dropped) = self.recorder.fetch();
                Reply::Spans { spans, dropped }
            }
            Request::Changed { since } => {
                let mut state = self.lock();
                while state.sequence <= since && !state.retired {
                    state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                }
                Reply::Changed { sequence: state.sequence }
            }
            Request::Retire => {
                let mut state = self.lock();
                if !state.functions.is_empty() {
                    return Reply::Refused { message: format!("it has {} functions", state.functions.len()) };
                }
                state.retired = true;
                self.bump(&mut state);
                Reply::Done
            }
        }
    }

    fn with(&self, id: &str, work: impl FnOnce(&Entry)) -> Reply {
        match self.lock().functions.get(id) {
            Some(entry) => {
                work(entry);
                Reply::Done
            }
            None => Reply::Unknown { id: id.to_owned() },
        }
    }

    fn list(&self) -> Listing {
        let state = self.lock();
        let functions = state
            .functions
            .iter()
            .map(|(id, entry)| FunctionState {
                id: id.clone(),
                started: entry.function.started,
                exit: entry.exit.clone(),
            })
            .collect();
        Listing { sequence: state.sequence, functions }
    }

    fn forget(&self, id: &str) -> Reply {
        let mut state = self.lock();
        match state.functions.remove(id) {
            Some(entry) => {
                entry.function.wish.send_replace(Wish::Stop { until: Instant::now(), signal: Some(9) });
                self.bump(&mut state);
                Reply::Done
            }
            None => Reply::Unknown { id: id.to_owned() },
        }
    }

    /// Adds a function, or finds that it is there already. Refusals are for its author to read.
    fn add(self: &Arc<Host>, spec: FunctionSpec, descriptors: Vec<OwnedFd>) -> std::result::Result<i64, String> {
        let mut descriptors = descriptors.into_iter();
        let (Some(code), Some(listener), Some(log)) = (descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Err("a function needs three descriptors: code, listener and log".into());
        };
        {
            let state = self.lock();
            if state.retired {
                return Err("the host is about to end".into());
            }
            if let Some(entry) = state.functions.get(&spec.id) {
                return Ok(entry.function.started);
            }
            if state.functions.len() >= FUNCTIONS {
                return Err(format!("a namespace may have {FUNCTIONS} functions"));
            }
        }
        let component = self.component(&spec.code, code)?;
        let pre = self
            .linker
            .instantiate_pre(&component)
            .map_err(|e| format!("the component asks for what there is not: {e:#}"))?;
        let pre = ProxyPre::new(pre)
            .map_err(|e| format!("the component does not export wasi:http/incoming-handler@0.2: {e:#}"))?;
        let listener = std::net::TcpListener::from(listener);
        listener.set_nonblocking(true).map_err(|e| format!("listener: {e}"))?;
        let listener = {
            let _runtime = self.runtime.enter();
            tokio::net::TcpListener::from_std(listener).map_err(|e| format!("listener: {e}"))?
        };
        let log = Arc::new(Log::new(log, spec.log_max_bytes));
        let counters = Arc::<Counters>::default();
        let outbound = match (descriptors.next(), descriptors.next()) {
            (Some(connector), Some(roots)) => {
                let _runtime = self.runtime.enter();
                let most = spec.limits.outbound_bytes;
                Some(Arc::new(Outbound::new(connector, roots, most, counters.clone())?))
            }
            _ => None,
        };
        let shared =
            Shared { ticker: self.ticker.clone(), instances: self.instances.clone(), recorder: self.recorder.clone() };
        let function = Arc::new(Function::new(spec, pre, log, counters, outbound, shared));
        let (id, started) = (function.spec.id.clone(), function.started);
        let mut state = self.lock();
        if state.functions.contains_key(&id) {
            return Err("it was added twice at once".into());
        }
        state.functions.insert(id.clone(), Entry { function: function.clone(), exit: None });
        self.bump(&mut state);
        drop(state);
        let host = self.clone();
        self.runtime.spawn(async move {
            let served = tokio::spawn(function.clone().serve(listener)).await;
            let exit = served.unwrap_or_else(|error| Exit {
                code: 255,
                signal: None,
                finished: clock::now_nanos(),
                message: format!("the host failed: {error}"),
            });
            let mut state = host.lock();
            if let Some(entry) = state.functions.get_mut(&id).filter(|e| Arc::ptr_eq(&e.function, &function)) {
                entry.exit = Some(exit);
                host.bump(&mut state);
            }
        });
        Ok(started)
    }

    /// Maps code once, however many functions have it.
    fn component(&self, name: &str, code: OwnedFd) -> std::result::Result<Component, String> {
        if let Some(component) = self.lock().code.get(name) {
            return Ok(component.clone());
        }
        let file = File::from(code);
        let length = file.metadata().map_err(|e| format!("compiled code: {e}"))?.len();
        if length == 0 || length > CODE_LIMIT {
            return Err(format!("compiled code of {length} bytes"));
        }
        let mapped = crate::sys::map_for_ever(&file, length as usize).map_err(|e| format!("compiled code: {e}"))?;
        let component = crate::sys::component(&self.engine, mapped).map_err(|e| format!("compiled code: {e:#}"))?;
        self.lock().code.insert(name.to_owned(), component.clone());
        Ok(component)
    }
}

/// Answers until it is retired. One thread per connection: there are few, and they wait.
pub(super) fn serve(socket: &OwnedFd, host: &Arc<Host>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let accepting = socket.as_fd().try_clone_to_owned();
    let own = host.clone();
    let acceptor = std::thread::Builder::new().name("control".into()).spawn(move || {
        let Ok(accepting) = accepting else { return };
        loop {
            let Ok(connection) = accept_with(&accepting, SocketFlags::CLOEXEC) else {
                std::thread::sleep(PAUSE);
                continue;
            };
            let root = crate::sys::peer_uid(&connection).is_ok_and(|uid| uid == 0);
            if !root || connections.load(Ordering::Relaxed) >= CONNECTIONS {
                continue;
            }
            connections.fetch_add(1, Ordering::Relaxed);
            let (host, count) = (own.clone(), connections.clone());
            let talking = std::thread::Builder::new().name("control".into()).stack_size(1 << 20).spawn(move || {
                while let Ok(Some((request, descriptors))) = receive::<Request>(&connection) {
                    if send(&connection, &host.answer(request, descriptors), &[]).is_err() {
                        break;
                    }
                }
                count.fetch_sub(1, Ordering::Relaxed);
            });
            if talking.is_err() {
                // It was not started, so it will not count down.
                continue;
            }
        }
    });
    if acceptor.is_err() {
        return;
    }
    let mut state = host.lock();
    while !state.retired {
        state = host.changed.wait(state).unwrap_or_else(|e| e.into_inner());
    }
    drop(state);
    // Let the answer to the one who retired it go out.
    std::thread::sleep(PAUSE);
}
