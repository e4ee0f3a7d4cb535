//! What requests want of Services, between who carries requests (the gateway) and who scales what answers them (the
//! autoscaler), in one process.
//!
//! A Service whose endpoints are scaled with its requests is *managed*: a request that finds no endpoint waits in line
//! until there is one. Before its last endpoint is taken away, a Service is *held*: requests wait, and when none is under
//! way any more the endpoint can go without one being lost.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Annotation of a Service some of whose backends may sleep: `NAME=WEIGHT,...`, Services of the same namespace and their
/// shares. Its namespace's workloads reach it through the gateway, which wakes one.
pub const BACKENDS: &str = "serving.atoll.dev/backends";

/// The names and weights that [`BACKENDS`] holds; what is not one is left out.
pub fn backends(text: &str) -> Vec<(String, u32)> {
    let one = |part: &str| {
        let (name, weight) = part.trim().split_once('=')?;
        Some((name.to_owned(), weight.parse().ok()?))
    };
    text.split(',').filter_map(one).collect()
}

/// Requests that may wait for one Service.
pub const LINE: usize = 10_000;

/// Of all Services that anybody asked for.
#[derive(Debug, Default)]
pub struct Demand {
    services: Mutex<HashMap<(String, String), Arc<Load>>>,
    wake: Arc<Notify>,
}

impl Demand {
    /// The load of one Service; the same one every time.
    pub fn of(&self, namespace: &str, service: &str) -> Arc<Load> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (namespace.to_owned(), service.to_owned());
        let fresh = || Arc::new(Load { wake: self.wake.clone(), ..Load::default() });
        services.entry(key).or_insert_with(fresh).clone()
    }

    /// The load of a Service that is gone is forgotten.
    pub fn forget(&self, namespace: &str, service: &str) {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        services.remove(&(namespace.to_owned(), service.to_owned()));
    }

    /// Returns when a request began to wait; one call may stand for many.
    pub async fn wanted(&self) {
        self.wake.notified().await;
    }
}

/// Of one Service.
#[derive(Debug, Default)]
pub struct Load {
    active: AtomicUsize,
    waiting: AtomicUsize,
    arrived: AtomicU64,
    managed: AtomicBool,
    held: AtomicBool,
    changed: Notify,
    wake: Arc<Notify>,
}

/// A request under way, or waiting in line.
#[derive(Debug)]
pub struct Share {
    load: Arc<Load>,
    waits: bool,
}

impl Load {
    /// A request that has an endpoint. It may only be sent if the load is not held *after* this.
    pub fn enter(self: &Arc<Load>) -> Share {
        self.active.fetch_add(1, SeqCst);
        Share { load: self.clone(), waits: false }
    }

    /// A request that has none, and asks for one. `None`: the line is full.
    pub fn stand_in_line(self: &Arc<Load>) -> Option<Share> {
        let before = self.waiting.fetch_add(1, SeqCst);
        let share = Share { load: self.clone(), waits: true };
        if before >= LINE {
            return None;
        }
        self.wake.notify_one();
        Some(share)
    }

    /// Completes at the next change of endpoints or of what is held; made before one looks, it misses none.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Who waits is to look again.
    pub fn notify(&self) {
        self.changed.notify_waiters();
    }

    pub fn is_managed(&self) -> bool {
        self.managed.load(SeqCst)
    }

    pub fn manage(&self, managed: bool) {
        if self.managed.swap(managed, SeqCst) && !managed {
            self.notify();
        }
    }

    pub fn is_held(&self) -> bool {
        self.held.load(SeqCst)
    }

    /// No request is sent from now on. Whether none was under way or waiting; else it is let go again.
    pub fn hold_if_idle(&self) -> bool {
        self.held.store(true, SeqCst);
        let idle = self.wants() == 0;
        if !idle {
            self.release();
        }
        idle
    }

    pub fn release(&self) {
        if self.held.swap(false, SeqCst) {
            self.notify();
        }
    }

    /// Requests under way and waiting.
    pub fn wants(&self) -> usize {
        self.active.load(SeqCst) + self.waiting.load(SeqCst)
    }

    pub fn waiting(&self) -> usize {
        self.waiting.load(SeqCst)
    }

    /// Requests that got an endpoint, ever.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(SeqCst)
    }
}

impl Share {
    /// The request is sent.
    pub fn arrive(&self) {
        self.load.arrived.fetch_add(1, SeqCst);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let counter = if self.waits { &self.load.waiting } else { &self.load.active };
        counter.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_held_only_when_idle() {
        let demand = Demand::default();
        let load = demand.of("n", "s");
        let share = load.enter();
        share.arrive();
        assert!(!load.hold_if_idle() && !load.is_held());
        drop(share);
        assert!(load.hold_if_idle() && demand.of("n", "s").is_held());
        load.release();
        assert!(!load.is_held());
        assert_eq!((load.wants(), load.arrived()), (0, 1));
    }

    #[test]
    fn backends_are_names_with_weights() {
        let read =
            |text| backends(text).into_iter().map(|(name, weight)| format!("{name} {weight}")).collect::<Vec<_>>();
        assert_eq!(read("hello-00001=80,hello-00002=20"), ["hello-00001 80", "hello-00002 20"]);
        assert_eq!(read("a=1, b=x,c,=,d=-1,e=4294967296"), ["a 1"]);
        assert!(read("").is_empty());
    }

    #[test]
    fn the_line_ends_somewhere() {
        let load = Demand::default().of("n", "s");
        let line: Vec<Share> = std::iter::repeat_with(|| load.stand_in_line()).map_while(|share| share).collect();
        assert_eq!((line.len(), load.waiting()), (LINE, LINE));
        drop(line);
        assert_eq!(load.wants(), 0);
    }

    #[tokio::test]
    async fn who_waits_wakes_the_scaler_and_is_told() {
        let demand = Arc::new(Demand::default());
        let load = demand.of("n", "s");
        assert!(load.hold_if_idle());
        let waiter = load.clone();
        let waiting = tokio::spawn(async move {
            loop {
                let changed = waiter.changed();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if !waiter.is_held() {
                    return;
                }
                let _share = waiter.stand_in_line().unwrap();
                changed.await;
            }
        });
        demand.wanted().await;
        load.release();
        waiting.await.unwrap();
        assert_eq!(load.wants(), 0);
    }
}
