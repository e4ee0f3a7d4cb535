//! The next pod's shim, executed before it is needed. There is one while pods are being started; an idle node has none.

use ::container::client::Waiting;
use ::container::shim::protocol::Sandbox;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long after a pod's sandbox is ready the next pod's shim is executed: the pod's containers are being started now.
const REST: Duration = Duration::from_millis(20);
/// How long after a pod's start one is kept for the next.
const KEPT: Duration = Duration::from_secs(60);

pub struct Shims {
    exe: PathBuf,
    waiting: Mutex<Option<Waiting>>,
    /// Pods started.
    launched: AtomicU64,
}

impl Shims {
    pub fn new(exe: PathBuf) -> Self {
        Self { exe, waiting: Mutex::default(), launched: AtomicU64::new(0) }
    }

    /// Returns when the sandbox's shim is ready, with what is to be dropped later. Blocks.
    pub fn launch(&self, sandbox: &Sandbox) -> ::container::Result<Waiting> {
        self.launched.fetch_add(1, Ordering::Relaxed);
        let mut waiting = match self.take() {
            Some(waiting) => waiting,
            None => Waiting::execute(&self.exe)?,
        };
        waiting.launch(sandbox)?;
        Ok(waiting)
    }

    /// In the background, after a while: one for the next pod, which goes if there is none for long.
    pub fn refill(self: &Arc<Self>, done: Option<Waiting>) {
        let shims = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(REST).await;
            let launched = shims.launched.load(Ordering::Relaxed);
            let (filling, expiring) = (shims.clone(), shims.clone());
            let _ = tokio::task::spawn_blocking(move || {
                drop(done);
                filling.fill();
            })
            .await;
            tokio::time::sleep(KEPT).await;
            if launched == shims.launched.load(Ordering::Relaxed) {
                let _ = tokio::task::spawn_blocking(move || drop(expiring.take())).await;
            }
        });
    }

    fn fill(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.is_none() {
            // Should it fail, the next start tells why.
            *waiting = Waiting::execute(&self.exe).ok();
        }
    }

    fn take(&self) -> Option<Waiting> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        waiting.and_then(|mut shim| shim.is_alive().then_some(shim))
    }
}
