//! Advances the engine's epoch while requests are under way, so that functions that compute yield; sleeps otherwise: an
//! idle host uses no processor time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use wasmtime::Engine;

const TICK: Duration = Duration::from_millis(5);

pub(super) struct Ticker {
    active: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// Held by a request.
pub(super) struct Ticking(Arc<Ticker>);

impl Ticker {
    pub fn start(engine: Engine) -> std::io::Result<Arc<Ticker>> {
        let ticker = Arc::new(Ticker { active: AtomicUsize::new(0), lock: Mutex::new(()), wake: Condvar::new() });
        let own = ticker.clone();
        std::thread::Builder::new().name("ticker".into()).stack_size(64 << 10).spawn(move || own.run(&engine))?;
        Ok(ticker)
    }

    fn run(&self, engine: &Engine) {
        loop {
            // A poisoned lock protects nothing here.
            let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
            while self.active.load(Ordering::SeqCst) == 0 {
                guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
            }
            drop(guard);
            std::thread::sleep(TICK);
            engine.increment_epoch();
        }
    }

    pub fn enter(self: &Arc<Self>) -> Ticking {
        if self.active.fetch_add(1, Ordering::SeqCst) == 0 {
            let _guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.wake.notify_one();
        }
        Ticking(self.clone())
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}
