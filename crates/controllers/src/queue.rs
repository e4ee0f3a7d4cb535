//! The keyed work queue of a reconciler. A key waits at most once however often it is added; a key that is being worked
//! on and added again waits until that work has ended, so no two workers have the same key. Failed keys come back after
//! a delay that doubles from 5 ms to 60 s. Its size is bounded by the number of keys there are, and by [`LIMIT`].

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Keys that wait before new ones are dropped; the periodic resync brings those back.
const LIMIT: usize = 500_000;
const FIRST_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_secs(60);

pub(crate) struct Queue<K> {
    state: Mutex<State<K>>,
    changed: Notify,
}

struct State<K> {
    ready: VecDeque<K>,
    /// In `ready`.
    waiting: HashSet<K>,
    working: HashSet<K>,
    /// Added while being worked on.
    again: HashSet<K>,
    delayed: BTreeSet<(Instant, K)>,
    due: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash + Ord> Default for Queue<K> {
    fn default() -> Self {
        let state = State {
            ready: VecDeque::new(),
            waiting: HashSet::new(),
            working: HashSet::new(),
            again: HashSet::new(),
            delayed: BTreeSet::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
        };
        Queue { state: Mutex::new(state), changed: Notify::new() }
    }
}

impl<K: Clone + Eq + Hash + Ord> State<K> {
    fn add(&mut self, key: K) {
        if self.working.contains(&key) {
            self.again.insert(key);
        } else if self.waiting.len() < LIMIT && self.waiting.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    /// The earliest of several times wins.
    fn add_at(&mut self, at: Instant, key: K) {
        match self.due.get(&key) {
            Some(sooner) if *sooner <= at => return,
            Some(later) => drop(self.delayed.remove(&(*later, key.clone()))),
            None => {}
        }
        if self.due.len() < LIMIT {
            self.due.insert(key.clone(), at);
            self.delayed.insert((at, key));
        }
    }

    fn wake(&mut self, now: Instant) {
        while let Some((at, key)) = self.delayed.first().cloned().filter(|(at, _)| *at <= now) {
            self.delayed.remove(&(at, key.clone()));
            self.due.remove(&key);
            self.add(key);
        }
    }

    fn take(&mut self) -> Option<K> {
        let key = self.ready.pop_front()?;
        self.waiting.remove(&key);
        self.working.insert(key.clone());
        Some(key)
    }
}

impl<K: Clone + Eq + Hash + Ord> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, key: K) {
        self.lock().add(key);
        self.changed.notify_one();
    }

    #[cfg(test)]
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        self.lock().add_at(Instant::now() + delay, key);
        self.changed.notify_one();
    }

    /// The next key to work on. Give it back with [`Queue::done`]. Cancel-safe.
    pub async fn next(&self) -> K {
        loop {
            let changed = self.changed.notified();
            let sleep = {
                let mut state = self.lock();
                state.wake(Instant::now());
                if let Some(key) = state.take() {
                    if !state.ready.is_empty() {
                        self.changed.notify_one();
                    }
                    return key;
                }
                state.delayed.first().map(|(at, _)| *at)
            };
            match sleep {
                Some(at) => tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => changed.await,
            }
        }
    }

    /// The key's work has ended. `failed` brings it back after its back-off, `after` after that time.
    pub fn done(&self, key: &K, failed: bool, after: Option<Duration>) {
        let mut state = self.lock();
        state.working.remove(key);
        if failed {
            let failures = state.failures.entry(key.clone()).or_insert(0);
            let delay = FIRST_DELAY.saturating_mul(1 << (*failures).min(20)).min(MAX_DELAY);
            *failures = failures.saturating_add(1);
            state.add_at(Instant::now() + delay, key.clone());
        } else {
            state.failures.remove(key);
        }
        if let Some(after) = after {
            state.add_at(Instant::now() + after, key.clone());
        }
        if state.again.remove(key) {
            state.add(key.clone());
        }
        drop(state);
        self.changed.notify_one();
    }

    /// How often the key has failed in a row.
    pub fn failures(&self, key: &K) -> u32 {
        self.lock().failures.get(key).copied().unwrap_or(0)
    }

    /// Nothing waits and nothing is being worked on; delayed keys do not count.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        let state = self.lock();
        state.ready.is_empty() && state.working.is_empty() && state.again.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_waits_once_and_comes_back() {
        let queue = Queue::default();
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert_eq!(queue.next().await, "b", "what is being worked on is not given out");
        queue.done(&"a", false, None);
        assert_eq!(queue.next().await, "a", "it had been added meanwhile");
        queue.done(&"a", false, None);
        queue.done(&"b", false, None);
        assert!(queue.is_idle());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off() {
        let queue = Queue::default();
        queue.add(1);
        let mut delays = Vec::new();
        for _ in 0..16 {
            let begun = Instant::now();
            let key = queue.next().await;
            delays.push(begun.elapsed().as_millis());
            queue.done(&key, true, None);
        }
        assert_eq!(delays[..5], [0, 5, 10, 20, 40]);
        assert_eq!(delays[15], 60_000);
        queue.next().await;
        queue.done(&1, false, Some(Duration::from_secs(7)));
        let begun = Instant::now();
        queue.next().await;
        assert_eq!(begun.elapsed(), Duration::from_secs(7), "success forgets failures");
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_time_wins() {
        let queue = Queue::default();
        queue.add_after(1, Duration::from_secs(9));
        queue.add_after(1, Duration::from_secs(3));
        queue.add_after(1, Duration::from_secs(5));
        let begun = Instant::now();
        queue.next().await;
        assert_eq!(begun.elapsed(), Duration::from_secs(3));
        queue.done(&1, false, None);
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err(), "only once");
    }

    proptest! {
        /// Whatever the order of calls: no key is with two workers, and every key added after its work began is given
        /// out again.
        #[test]
        fn never_twice_never_lost(steps in prop::collection::vec((0..3u8, 0..4u8), 1..80)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let queue = Queue::default();
                let mut working = HashSet::new();
                let mut owed = HashSet::new();
                for (step, key) in steps {
                    match step {
                        0 => { queue.add(key); owed.insert(key); }
                        1 => {
                            if let Ok(key) = tokio::time::timeout(Duration::from_millis(1), queue.next()).await {
                                assert!(working.insert(key), "{key} given out twice");
                                owed.remove(&key);
                            }
                        }
                        _ => if working.remove(&key) { queue.done(&key, false, None) },
                    }
                }
                for key in working { queue.done(&key, false, None); }
                while let Ok(key) = tokio::time::timeout(Duration::from_millis(1), queue.next()).await {
                    owed.remove(&key);
                    queue.done(&key, false, None);
                }
                assert!(owed.is_empty(), "{owed:?} lost");
            });
        }
    }
}
