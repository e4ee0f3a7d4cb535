//! `atoll down`: stops the running `atoll up`, then every workload, from what is on disk alone.

use crate::cli::{Failure, Outcome, explain};
use crate::instance::Instance;
use crate::up;
use rustix::process::{Pid, Signal, kill_process};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the running `atoll up` may take to stop.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run(data_dir: &Path) -> Outcome {
    if !rustix::process::getuid().is_root() {
        return Err(Failure("down: needs root: sudo atoll down".into()));
    }
    let instance = Instance::existing(data_dir)?;
    if let Some(pid) = instance.running() {
        stop(&instance, pid)?;
        println!("stopped atoll up, pid {pid}");
    }
    let _lock = instance.lock()?;
    let router = crate::networks::router(crate::networks::known(&instance)?)?;
    let host = std::fs::File::open("/proc/self/ns/net").map_err(explain)?;
    router.enter_thread().map_err(explain)?;
    let router = Arc::new(router);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(explain)?;
    let stopped = runtime.block_on(up::destroy_all(&instance, router.clone()))?;
    drop(runtime);
    println!("stopped {stopped} {}", if stopped == 1 { "workload" } else { "workloads" });
    if let Some(router) = Arc::into_inner(router) {
        router.set_egress(host.as_fd(), network::Egress::None).map_err(explain)?;
        router.teardown().map_err(explain)?;
    }
    let _ = std::fs::remove_dir_all(&instance.run_dir);
    Ok(())
}

fn stop(instance: &Instance, pid: i32) -> Outcome {
    let process = Pid::from_raw(pid).ok_or_else(|| Failure("the lock file names no process".into()))?;
    kill_process(process, Signal::TERM).map_err(|e| Failure(format!("stop pid {pid}: {e}")))?;
    let until = Instant::now() + PATIENCE;
    while instance.running().is_some() {
        if Instant::now() > until {
            return Err(Failure(format!(
                "atoll up, pid {pid}, did not stop in 30 s; look at its log, or kill -9 {pid} and try again"
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
