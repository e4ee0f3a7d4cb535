//! Stored responses, bounded in bytes, and who is fetching what: of several requests for the same thing one fetches, the
//! others wait for it.

use super::control::{Directives, Terms};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, StatusCode};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// What a response costs beyond its bytes.
const OVERHEAD: usize = 512;
/// Responses to requests for one target, by what they vary by.
const MAX_VARIANTS: usize = 32;
/// Targets that are known not to be storable: who asks for them does not wait for anybody.
const MAX_PASSED: usize = 4096;

/// A response as it came, and the request that it answers.
#[derive(Debug)]
pub struct Stored {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub terms: Terms,
    /// When it came.
    pub since: Instant,
    /// The rule that it was fetched by.
    pub rule: u64,
    /// Header fields of the request that it depends on, with their values.
    pub vary: Vec<(HeaderName, Vec<u8>)>,
}

impl Stored {
    pub fn age(&self) -> Duration {
        self.terms.age + self.since.elapsed()
    }

    /// RFC 9111, section 4.2, and what the request asks for (section 5.2.1).
    fn is_fresh(&self, wants: &Directives) -> bool {
        let age = self.age();
        !self.terms.always_validate
            && !wants.no_cache
            && self.terms.lifetime > age
            && wants.max_age.is_none_or(|most| age <= Duration::from_secs(most))
            && wants.min_fresh.is_none_or(|left| self.terms.lifetime >= age + Duration::from_secs(left))
    }

    /// Section 4.1.
    fn answers(&self, rule: u64, asked: &HeaderMap) -> bool {
        self.rule == rule && self.vary.iter().all(|(name, value)| value_of(asked, name) == *value)
    }

    fn size(&self, key: &str) -> usize {
        let lines = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum::<usize>();
        let vary = self.vary.iter().map(|(_, value)| value.len() + 64).sum::<usize>();
        OVERHEAD + key.len() + lines + vary + self.body.len()
    }
}

/// All lines of a field as one.
pub fn value_of(headers: &HeaderMap, name: &HeaderName) -> Vec<u8> {
    let lines: Vec<&[u8]> = headers.get_all(name).iter().map(|value| value.as_bytes().trim_ascii()).collect();
    lines.join(&b", "[..])
}

/// Bytes that all stores have together, and how many that may be: policies are tenants'.
#[derive(Clone, Debug)]
pub struct Budget {
    used: Arc<AtomicUsize>,
    most: usize,
}

impl Budget {
    pub fn new(most: usize) -> Budget {
        Budget { used: Arc::default(), most }
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.most);
        self.used.fetch_update(Relaxed, Relaxed, fits).is_ok()
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Relaxed);
    }
}

#[derive(Debug)]
pub struct Store {
    most: usize,
    budget: Budget,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    slots: HashMap<Arc<str>, Slot>,
    /// All that is stored, by key and number: who is first goes first, unless it was used since it was looked at.
    order: VecDeque<(Arc<str>, u64)>,
    passed: HashMap<Arc<str>, Instant>,
    bytes: usize,
    count: usize,
    number: u64,
}

#[derive(Debug, Default)]
struct Slot {
    kept: Vec<Kept>,
    /// Number of the fetch under way, and what ends with it.
    fetching: Option<(u64, watch::Receiver<()>)>,
}

#[derive(Debug)]
struct Kept {
    stored: Arc<Stored>,
    number: u64,
    size: usize,
    used: AtomicBool,
}

/// What there is for a request.
#[derive(Debug)]
pub enum Look {
    Fresh(Arc<Stored>),
    /// This one fetches, with what is there but no longer fresh.
    Fetch(Fetch, Option<Arc<Stored>>),
    /// Another one does.
    Wait(watch::Receiver<()>),
    Nothing,
}

/// The right to store what is fetched; taken away when the target changes meanwhile.
#[derive(Debug)]
pub struct Fetch {
    store: Arc<Store>,
    key: Arc<str>,
    number: u64,
    _ended: watch::Sender<()>,
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let mut inner = self.store.lock();
        if let Some(slot) = inner.slots.get_mut(&self.key)
            && slot.fetching.as_ref().is_some_and(|(number, _)| *number == self.number)
        {
            slot.fetching = None;
            if slot.kept.is_empty() {
                inner.slots.remove(&self.key);
            }
        }
    }
}

impl Store {
    pub fn new(most: usize, budget: Budget) -> Store {
        Store { most, budget, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for a response. `fetches` says that the request may fetch one for others, or wait for one.
    pub fn look(
        self: &Arc<Self>,
        key: &str,
        (rule, asked): (u64, &HeaderMap),
        wants: &Directives,
        fetches: bool,
    ) -> Look {
        let mut inner = self.lock();
        let mut stale = None;
        if let Some(slot) = inner.slots.get(key)
            && let Some(kept) = slot.kept.iter().find(|kept| kept.stored.answers(rule, asked))
        {
            kept.used.store(true, Relaxed);
            if kept.stored.is_fresh(wants) {
                return Look::Fresh(kept.stored.clone());
            }
            stale = Some(kept.stored.clone());
        }
        if !fetches || inner.passed.get(key).is_some_and(|until| *until > Instant::now()) {
            return Look::Nothing;
        }
        if let Some((_, ended)) = inner.slots.get(key).and_then(|slot| slot.fetching.as_ref()) {
            return Look::Wait(ended.clone());
        }
        inner.number += 1;
        let (number, key) = (inner.number, Arc::<str>::from(key));
        let (sender, ended) = watch::channel(());
        inner.slots.entry(key.clone()).or_default().fetching = Some((number, ended));
        Look::Fetch(Fetch { store: self.clone(), key, number, _ended: sender }, stale)
    }

    /// Forgets all that is stored for a target, and what is being fetched for it is not stored.
    pub fn invalidate(&self, key: &str) {
        let mut inner = self.lock();
        if let Some(slot) = inner.slots.remove(key) {
            inner.gone(&slot.kept, &self.budget);
        }
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let bytes = self.lock().bytes;
        self.budget.give(bytes);
    }
}

impl Fetch {
    /// Keeps a response in place of those that answer the same request.
    pub fn store(&self, asked: &HeaderMap, stored: Arc<Stored>) {
        let (store, size) = (&self.store, stored.size(&self.key));
        let mut inner = store.lock();
        let Some(slot) = inner.slots.get_mut(&self.key) else { return };
        if slot.fetching.as_ref().is_none_or(|(number, _)| *number != self.number) {
            return;
        }
        let same = |kept: &mut Kept| kept.stored.answers(stored.rule, asked);
        let mut old: Vec<Kept> = slot.kept.extract_if(.., same).collect();
        if slot.kept.len() >= MAX_VARIANTS {
            old.push(slot.kept.remove(0));
        }
        inner.gone(&old, &store.budget);
        if !inner.make_room(size, store) {
            return;
        }
        inner.number += 1;
        let number = inner.number;
        inner.bytes += size;
        inner.count += 1;
        inner.order.push_back((self.key.clone(), number));
        let kept = Kept { stored, number, size, used: AtomicBool::new(false) };
        inner.slots.entry(self.key.clone()).or_default().kept.push(kept);
    }

    /// Who asks for this for a while need not wait for others: it is not stored.
    pub fn pass(&self, time: Duration) {
        let mut inner = self.store.lock();
        let now = Instant::now();
        if inner.passed.len() >= MAX_PASSED {
            inner.passed.retain(|_, until| *until > now);
            if inner.passed.len() >= MAX_PASSED {
                inner.passed.clear();
            }
        }
        inner.passed.insert(self.key.clone(), now + time);
    }
}

impl Inner {
    fn gone(&mut self, kept: &[Kept], budget: &Budget) {
        let bytes = kept.iter().map(|kept| kept.size).sum::<usize>();
        budget.give(bytes);
        self.bytes -= bytes;
        self.count -= kept.len();
        // What is gone is still in the order; it must not be most of it.
        if self.order.len() > 64 + 2 * self.count {
            let slots = &self.slots;
            let there = |(key, number): &(Arc<str>, u64)| {
                slots.get(key).is_some_and(|slot| slot.kept.iter().any(|kept| kept.number == *number))
            };
            self.order.retain(there);
        }
    }

    /// Takes so many bytes, letting others go for them.
    fn make_room(&mut self, size: usize, store: &Store) -> bool {
        if size > store.most {
            return false;
        }
        while self.bytes + size > store.most || !store.budget.take(size) {
            let Some((key, number)) = self.order.pop_front() else { return false };
            let Some(slot) = self.slots.get_mut(&key) else { continue };
            let Some(index) = slot.kept.iter().position(|kept| kept.number == number) else { continue };
            if slot.kept.get(index).is_some_and(|kept| kept.used.swap(false, Relaxed)) {
                self.order.push_back((key, number));
                continue;
            }
            let old = slot.kept.remove(index);
            if slot.kept.is_empty() && slot.fetching.is_none() {
                self.slots.remove(&key);
            }
            self.gone(&[old], &store.budget);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stored(body: usize, vary: &[(&str, &str)]) -> Arc<Stored> {
        let vary = vary.iter().map(|(name, value)| (name.parse().unwrap(), value.as_bytes().to_vec())).collect();
        Arc::new(Stored {
            status: StatusCode::OK,
            headers: HeaderMap::new(),
            body: vec![0; body].into(),
            terms: Terms { lifetime: Duration::from_secs(60), age: Duration::ZERO, always_validate: false },
            since: Instant::now(),
            rule: 1,
            vary,
        })
    }

    fn asked(language: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("accept-language", language.parse().unwrap());
        headers
    }

    fn look(store: &Arc<Store>, key: &str, headers: &HeaderMap) -> Look {
        store.look(key, (1, headers), &Directives::default(), true)
    }

    fn put(store: &Arc<Store>, key: &str, headers: &HeaderMap, what: Arc<Stored>) {
        match look(store, key, headers) {
            Look::Fetch(fetch, _) => fetch.store(headers, what),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_fetches_the_others_wait_and_find_it() {
        let store = Arc::new(Store::new(1 << 20, Budget::new(1 << 20)));
        let none = HeaderMap::new();
        let Look::Fetch(fetch, None) = look(&store, "a", &none) else { panic!() };
        let Look::Wait(ended) = look(&store, "a", &none) else { panic!() };
        assert!(matches!(look(&store, "b", &none), Look::Fetch(..)), "another one is nobody's business");
        fetch.store(&none, stored(1, &[]));
        assert!(ended.has_changed().is_ok());
        drop(fetch);
        assert!(ended.has_changed().is_err());
        assert!(matches!(look(&store, "a", &none), Look::Fresh(_)));
        assert!(matches!(store.look("a", (2, &none), &Directives::default(), false), Look::Nothing), "another rule's");
        let wants = Directives { no_cache: true, ..Directives::default() };
        assert!(matches!(store.look("a", (1, &none), &wants, true), Look::Fetch(_, Some(_))));
    }

    #[test]
    fn what_changes_meanwhile_is_not_stored() {
        let store = Arc::new(Store::new(1 << 20, Budget::new(1 << 20)));
        let none = HeaderMap::new();
        let Look::Fetch(fetch, _) = look(&store, "a", &none) else { panic!() };
        store.invalidate("a");
        fetch.store(&none, stored(1, &[]));
        let Look::Fetch(newer, _) = look(&store, "a", &none) else { panic!() };
        fetch.store(&none, stored(1, &[]));
        drop(fetch);
        assert!(matches!(look(&store, "a", &none), Look::Wait(_)), "the newer one goes on");
        newer.pass(Duration::from_secs(60));
        drop(newer);
        assert!(matches!(look(&store, "a", &none), Look::Nothing));
        assert_eq!((store.bytes(), store.lock().slots.len()), (0, 0));
    }

    #[test]
    fn requests_that_differ_have_answers_that_differ() {
        let store = Arc::new(Store::new(1 << 20, Budget::new(1 << 20)));
        for (language, body) in [("de", 1), ("en", 2), ("de", 3)] {
            store.lock().slots.values_mut().for_each(|slot| slot.fetching = None);
            let wants = Directives { no_cache: true, ..Directives::default() };
            let Look::Fetch(fetch, _) = store.look("a", (1, &asked(language)), &wants, true) else { panic!() };
            fetch.store(&asked(language), stored(body, &[("accept-language", language)]));
        }
        let body = |language: &str| match look(&store, "a", &asked(language)) {
            Look::Fresh(stored) => stored.body.len(),
            _ => 0,
        };
        assert_eq!((body("de"), body("en"), body("fr")), (3, 2, 0));
        assert_eq!(store.lock().count, 2);
    }

    #[test]
    fn who_is_used_stays_and_all_stores_share_one_budget() {
        let budget = Budget::new(5 * (OVERHEAD + 1001));
        let store = Arc::new(Store::new(3 * (OVERHEAD + 1001), budget.clone()));
        let none = HeaderMap::new();
        for key in ["a", "b", "c"] {
            put(&store, key, &none, stored(1000, &[]));
        }
        assert!(matches!(look(&store, "a", &none), Look::Fresh(_)));
        put(&store, "d", &none, stored(1000, &[]));
        let there = |key| matches!(store.look(key, (1, &none), &Directives::default(), false), Look::Fresh(_));
        assert_eq!(["a", "b", "c", "d"].map(there), [true, false, true, true]);
        put(&store, "e", &none, stored(100_000, &[]));
        assert!(!there("e") && there("d"), "one that is too large costs no other its place");
        let other = Arc::new(Store::new(1 << 20, budget.clone()));
        for key in ["a", "b", "c"] {
            put(&other, key, &none, stored(1000, &[]));
        }
        assert_eq!((store.lock().count, other.lock().count), (3, 2));
        drop((store, other));
        assert_eq!(budget.used.load(Relaxed), 0);
    }

    proptest! {
        #[test]
        fn it_never_holds_more_than_it_may(steps in proptest::collection::vec((0u8..6, 0usize..3000, 0u8..4), 0..200)) {
            let store = Arc::new(Store::new(8000, Budget::new(7000)));
            let none = HeaderMap::new();
            for (key, body, what) in steps {
                let key = key.to_string();
                if what == 0 {
                    store.invalidate(&key);
                } else {
                    let wants = Directives { no_cache: what == 1, ..Directives::default() };
                    if let Look::Fetch(fetch, _) = store.look(&key, (1, &none), &wants, true) {
                        fetch.store(&none, stored(body, &[]));
                    }
                }
                let inner = store.lock();
                let sum: usize = inner.slots.values().flat_map(|slot| &slot.kept).map(|kept| kept.size).sum();
                let count = inner.slots.values().map(|slot| slot.kept.len()).sum::<usize>();
                prop_assert!(inner.bytes == sum && sum <= 7000 && inner.count == count);
                prop_assert!(inner.order.len() <= 64 + 2 * count + 1);
                prop_assert_eq!(store.budget.used.load(Relaxed), sum);
            }
        }
    }
}
