//! Runs a reconciler: its sources fill the queue (watch events, and everything at start and from time to time), its
//! workers empty it.

use crate::context::Context;
use crate::queue::Queue;
use api::informer::{Change, Informer, Key};
use api::object::Object;
use api::status::{Reason, Status, StatusResult};
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What a reconciler says after looking at a key.
pub(crate) type Again = Option<Duration>;

/// Brings the world closer to what one object says. Called with a key only, it reads what it needs; may be called any
/// number of times. `Ok(Some(d))` asks to be called again after `d`; an error brings the key back with back-off.
#[async_trait]
pub(crate) trait Reconcile: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    async fn reconcile(&self, key: &Key) -> StatusResult<Again>;
}

type Map = Box<dyn Fn(&Object) -> Vec<Key> + Send + Sync>;

/// Objects whose changes concern a reconciler, and which keys each concerns.
pub(crate) struct Source {
    informer: Informer,
    map: Map,
    /// A change for which this says no concerns nobody.
    filter: fn(Option<&Object>, Option<&Object>) -> bool,
}

impl Source {
    pub fn new(informer: Informer, map: impl Fn(&Object) -> Vec<Key> + Send + Sync + 'static) -> Source {
        Source { informer, map: Box::new(map), filter: |_, _| true }
    }

    /// The reconciler's own objects.
    pub fn own(informer: Informer) -> Source {
        use api::object::Meta;
        Source::new(informer, |object| vec![Key::new(object.namespace(), object.name())])
    }

    pub fn filtered(mut self, filter: fn(Option<&Object>, Option<&Object>) -> bool) -> Source {
        self.filter = filter;
        self
    }

    fn add_all(&self, queue: &Queue<Key>) {
        for key in self.informer.list().iter().flat_map(|object| (self.map)(object)) {
            queue.add(key);
        }
    }

    fn add(&self, change: &Change, queue: &Queue<Key>) {
        match change {
            Change::Everything => self.add_all(queue),
            Change::Object { old, new, .. } => {
                if (self.filter)(old.as_deref(), new.as_deref()) {
                    // The old state too: what an object no longer belongs to has to look again.
                    for object in [old, new].into_iter().flatten() {
                        (self.map)(object).into_iter().for_each(|key| queue.add(key));
                    }
                }
            }
        }
    }
}

/// Spawns the tasks of a reconciler into `tasks`; they end when `shutdown` becomes true.
pub(crate) fn spawn(
    tasks: &mut JoinSet<()>,
    context: &Arc<Context>,
    reconciler: Arc<dyn Reconcile>,
    sources: Vec<Source>,
    workers: usize,
    shutdown: &watch::Receiver<bool>,
) {
    let queue: Arc<Queue<Key>> = Arc::default();
    let informers: Vec<Informer> = sources.iter().map(|source| source.informer.clone()).collect();
    for source in sources {
        let (queue, resync) = (Arc::clone(&queue), context.config.resync);
        tasks.spawn(until(shutdown.clone(), async move { feed(source, &queue, resync).await }));
    }
    for _ in 0..workers {
        let (queue, reconciler, informers) = (Arc::clone(&queue), Arc::clone(&reconciler), informers.clone());
        tasks.spawn(until(shutdown.clone(), async move {
            for informer in &informers {
                informer.synced().await;
            }
            loop {
                let key = queue.next().await;
                let outcome = reconciler.reconcile(&key).await;
                finish(&*reconciler, &queue, &key, outcome);
            }
        }));
    }
}

fn finish(reconciler: &dyn Reconcile, queue: &Queue<Key>, key: &Key, outcome: StatusResult<Again>) {
    match outcome {
        Ok(again) => queue.done(key, false, again),
        Err(error) => {
            let expected = is_race(&error);
            if expected || queue.failures(key) < 3 {
                tracing::debug!(controller = reconciler.name(), %key, %error, "trying again");
            } else {
                tracing::warn!(controller = reconciler.name(), %key, %error, "failed, trying again");
            }
            queue.done(key, true, None);
        }
    }
}

/// Errors that only mean that someone else was faster.
pub(crate) fn is_race(error: &Status) -> bool {
    matches!(error.reason, Reason::Conflict | Reason::AlreadyExists | Reason::NotFound)
}

async fn feed(source: Source, queue: &Queue<Key>, resync: Duration) {
    let mut changes = source.informer.subscribe();
    source.informer.synced().await;
    source.add_all(queue);
    let mut next = tokio::time::Instant::now() + resync;
    loop {
        tokio::select! {
            change = changes.next() => source.add(&change, queue),
            () = tokio::time::sleep_until(next) => {
                source.add_all(queue);
                next = tokio::time::Instant::now() + resync;
            }
        }
    }
}

/// Runs `work` until `shutdown` becomes true or its sender is gone.
pub(crate) async fn until(mut shutdown: watch::Receiver<bool>, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        _ = shutdown.wait_for(|down| *down) => {}
    }
}
