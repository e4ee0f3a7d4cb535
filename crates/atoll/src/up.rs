//! `atoll up`: everything in one process, wired together here and nowhere else.
//!
//! The order matters: listening sockets are opened in the host's network namespace, then the process moves into the
//! router's, and only then are threads started, so that all of them live there. What has to reach the outside (pulls)
//! goes back to the host's namespace on a thread of its own.

use crate::cli::{Failure, Outcome, Up, explain};
use crate::instance::Instance;
use network::{Cidr, DnsServer, Router, RouterConfig};
use node::boundary::{Boundary, container::ContainerBoundary, microvm::MicrovmBoundary, wasm::WasmBoundary};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

pub const POD_CIDR: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 42, 0, 0), 16);
pub const SERVICE_CIDR: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 43, 0, 0), 16);
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 10);
const CLUSTER_DOMAIN: &str = "cluster.local";

struct Listeners {
    api: TcpListener,
    gateway: TcpListener,
    registry: TcpListener,
}

pub fn run(options: &Up) -> Outcome {
    let begun = Instant::now();
    if !rustix::process::getuid().is_root() {
        return Err(Failure("up: needs root, to give workloads namespaces and users of their own: sudo atoll up".into()));
    }
    logging();
    let instance = Instance::open(&options.data.data_dir)?;
    let _lock = instance.lock()?;
    let listeners = Listeners {
        api: listen("--api-addr", options.api_addr)?,
        gateway: listen("--gateway-addr", options.gateway_addr)?,
        registry: listen("--registry-addr", options.registry_addr)?,
    };
    let router = Arc::new(Router::open(router_config(&instance)?).map_err(explain)?);
    let host_netns = std::fs::File::open("/proc/self/ns/net").map_err(explain)?;
    router.enter_thread().map_err(explain)?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().min(8)))
        .max_blocking_threads(64)
        .thread_keep_alive(std::time::Duration::from_secs(5))
        .enable_all()
        .build()
        .map_err(explain)?;
    let outcome = runtime.block_on(serve(options, &instance, listeners, router, host_netns, begun));
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    outcome
}

pub fn router_config(instance: &Instance) -> Result<RouterConfig, Failure> {
    Ok(RouterConfig {
        data_dir: instance.data_dir.join("network"),
        run_dir: instance.run_dir.clone(),
        pod_cidr: Cidr::new(POD_CIDR.0, POD_CIDR.1).map_err(explain)?,
        service_cidr: Cidr::new(SERVICE_CIDR.0, SERVICE_CIDR.1).map_err(explain)?,
        dns_address: DNS,
    })
}

pub fn boundaries(instance: &Instance) -> Result<Vec<Arc<dyn Boundary>>, Failure> {
    let exe = executable()?;
    Ok(vec![
        Arc::new(ContainerBoundary::new(exe.clone())),
        Arc::new(MicrovmBoundary::new(exe.clone())),
        Arc::new(WasmBoundary::new(exe, instance.data_dir.clone(), instance.run_dir.clone())),
    ])
}

fn executable() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(explain)
}

fn listen(flag: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    let listener = TcpListener::bind(address).map_err(|error| {
        let way_out = match error.kind() {
            std::io::ErrorKind::AddrInUse => "something else listens there; stop it or choose another address",
            std::io::ErrorKind::AddrNotAvailable => "this machine does not have that address",
            _ => "choose another address",
        };
        Failure(format!("{flag} {address}: {error}: {way_out}"))
    })?;
    listener.set_nonblocking(true).map_err(explain)?;
    Ok(listener)
}

fn logging() {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_from_env("ATOLL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,atoll=info,node=info,controllers=info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
