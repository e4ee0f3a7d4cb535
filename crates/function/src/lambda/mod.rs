//! The role `atoll lambda-runtime`: what stands between one pod of a Lambda function and the world. The function's process
//! asks it for events on the pod's loopback ([`runtime_api`]); requests to the pod's port become such events ([`front`]).
//!
//! It runs in the function host's jail, outlives the daemon, and works with sockets that the daemon bound in the pod's
//! network namespace: neither the daemon nor the gateway reads what a runtime says. The pod's port listens from when the
//! runtime first asks for an event, so that a function that cannot begin never counts as ready.
//!
//! The daemon talks to it as to a function host: [`crate::wire`].

mod broker;
mod client;
mod event;
mod front;
mod http_server;
mod key;
mod runtime_api;

pub use client::{LambdaClient, launch};
pub use key::Keys;

use crate::error::{Error, Result, io};
use crate::wire::{receive, send};
use crate::{host, jail};
use broker::Broker;
use rustix::net::{SocketFlags, accept_with};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub(crate) const ROLE: &str = "lambda-runtime";
/// Bytes of an event, and of a result that is not streamed.
pub(super) const PAYLOAD: usize = 6 << 20;
/// The header whose value shows that a request is an event already.
pub const INVOKE_KEY: &str = "atoll-invoke-key";
/// The header of an answer to such a request that names the pod.
pub const POD: &str = "atoll-pod";
/// In names that have to have an account's number.
pub const ACCOUNT: &str = "000000000000";
const LIMITS: jail::Limits =
    jail::Limits { processes: Some(64), descriptors: Some(1024), address_space: Some(2 << 30), cpu: None, file: None };
const CONNECTIONS: usize = 16;
const RUNTIME_CONNECTIONS: usize = 32;
const CLIENT_CONNECTIONS: usize = 512;
const BACKLOG: i32 = 512;
const PAUSE: Duration = Duration::from_millis(50);

/// One function's pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LambdaSpec {
    pub name: String,
    /// The pod's name, told to who knows the key.
    pub pod: String,
    pub arn: String,
    /// Of one invocation, milliseconds.
    pub timeout_ms: u64,
    /// Value of [`INVOKE_KEY`]; none if empty.
    pub invoke_key: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    /// With two descriptors: the runtime API's listening socket, and one bound to the pod's port.
    Serve(LambdaSpec),
    /// The function's process ended.
    Exited {
        how: String,
    },
    /// Answered when the function has to be restarted more often than this; at once without.
    Restarts {
        seen: Option<u64>,
    },
    Stop,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Done,
    Restarts { count: u64 },
    Refused { message: String },
}

/// Entry of `atoll lambda-runtime RUN_DIR UID`. Returns 0 when it serves, detached.
pub fn main(args: &[String]) -> i32 {
    host::role(ROLE, args, serve_jailed)
}

fn serve_jailed(socket: OwnedFd, run_dir: &Path, uid: u32) -> Result<()> {
    jail::leave_the_host(run_dir)?;
    jail::drop_privilege(uid, &LIMITS)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io("start", "the runtime"))?;
    let serving = Arc::new(Serving { handle: runtime.handle().clone(), broker: OnceLock::new() });
    let control = serving.clone();
    let controlling = std::thread::Builder::new().name("control".into()).spawn(move || control.accept(&socket));
    let controlling = controlling.map_err(io("start", "a thread"))?;
    host::report_ready()?;
    // Until it is told to stop, and exits.
    runtime.block_on(std::future::pending::<()>());
    drop(controlling);
    Ok(())
}

struct Serving {
    handle: tokio::runtime::Handle,
    broker: OnceLock<Arc<Broker>>,
}

impl Serving {
    fn accept(self: &Arc<Serving>, socket: &OwnedFd) {
        let connections = Arc::new(AtomicUsize::new(0));
        loop {
            let Ok(connection) = accept_with(socket, SocketFlags::CLOEXEC) else {
                std::thread::sleep(PAUSE);
                continue;
            };
            let root = crate::sys::peer_uid(&connection).is_ok_and(|uid| uid == 0);
            if !root || connections.load(Ordering::Relaxed) >= CONNECTIONS {
                continue;
            }
            connections.fetch_add(1, Ordering::Relaxed);
            let (serving, count) = (self.clone(), connections.clone());
            let talk = move || {
                serving.talk(&connection);
                count.fetch_sub(1, Ordering::Relaxed);
            };
            let talking = std::thread::Builder::new().name("control".into()).stack_size(1 << 20).spawn(talk);
            if talking.is_err() {
                connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn talk(&self, connection: &OwnedFd) {
        while let Ok(Some((request, descriptors))) = receive::<Request>(connection) {
            let stop = matches!(request, Request::Stop);
            let reply = self.answer(request, descriptors);
            let sent = send(connection, &reply, &[]);
            if stop {
                // Its answer is out; now the process may end.
                std::process::exit(0);
            }
            if sent.is_err() {
                break;
            }
        }
    }

    fn answer(&self, request: Request, descriptors: Vec<OwnedFd>) -> Reply {
        let broker = self.broker.get();
        match (request, broker) {
            (Request::Stop, _) => Reply::Done,
            (Request::Serve(spec), None) => match self.serve(spec, descriptors) {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused { message: crate::error::chain(&error) },
            },
            // Asked again after the daemon was killed in between.
            (Request::Serve(_), Some(_)) => Reply::Done,
            (Request::Exited { how }, Some(broker)) => {
                broker.exited(&how);
                Reply::Done
            }
            (Request::Restarts { seen }, Some(broker)) => Reply::Restarts { count: broker.wait_restart(seen) },
            (_, None) => Reply::Refused { message: "it does not serve yet".into() },
        }
    }

    fn serve(&self, spec: LambdaSpec, descriptors: Vec<OwnedFd>) -> Result<()> {
        let Ok([runtime_api, port]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            return Err(Error::Protocol("two descriptors are needed: runtime API and port".into()));
        };
        let broker = Arc::new(Broker::new(spec));
        let api = self.listener(runtime_api)?;
        if self.broker.set(broker.clone()).is_err() {
            return Ok(());
        }
        let held = broker.clone();
        self.handle.spawn(async move { held.hold_to_limit().await });
        let own = broker.clone();
        self.handle.spawn(http_server::serve(api, RUNTIME_CONNECTIONS, move |request, _| {
            runtime_api::handle(own.clone(), request)
        }));
        let (handle, begun) = (self.handle.clone(), broker.clone());
        let open = move || {
            begun.wait_begun();
            if rustix::net::listen(port.as_fd(), BACKLOG).is_err() {
                return;
            }
            let listener = Serving { handle: handle.clone(), broker: OnceLock::new() }.listener(port);
            if let Ok(listener) = listener {
                handle.spawn(http_server::serve(listener, CLIENT_CONNECTIONS, move |request, peer| {
                    front::handle(begun.clone(), request, peer)
                }));
            }
        };
        std::thread::Builder::new().name("begin".into()).spawn(open).map_err(io("start", "a thread"))?;
        Ok(())
    }

    fn listener(&self, socket: OwnedFd) -> Result<tokio::net::TcpListener> {
        let listener = std::net::TcpListener::from(socket);
        listener.set_nonblocking(true).map_err(io("configure", "a socket"))?;
        let _runtime = self.handle.enter();
        tokio::net::TcpListener::from_std(listener).map_err(io("poll", "a socket"))
    }
}
