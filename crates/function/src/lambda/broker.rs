//! Invocations on their way to the runtime and back. A runtime has one at a time.
//!
//! ```text
//!   waiting -> (next) with the runtime -> answered | failed | timed out
//! ```

use super::LambdaSpec;
use bytes::Bytes;
use http::HeaderValue;
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

/// Invocations that may wait, and bytes of events among them.
const WAITING: usize = 128;
const WAITING_BYTES: usize = 64 << 20;

/// What went wrong, in Lambda's terms: the body of the answer to who invoked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub kind: String,
    pub body: Bytes,
}

impl Failure {
    pub fn new(kind: &str, message: &str) -> Failure {
        let body = serde_json::json!({"errorType": kind, "errorMessage": message}).to_string();
        Failure { kind: kind.to_owned(), body: body.into() }
    }
}

pub(super) type Chunks = mpsc::Receiver<Result<Bytes, String>>;

pub(super) enum Answer {
    Whole(Bytes),
    /// With the content type that the runtime gave.
    Stream(Option<HeaderValue>, Chunks),
    Failed(Failure),
}

/// Why an invocation was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    TooMany,
    /// No runtime took it in time.
    NotTaken,
    TimedOut(Failure),
}

pub(super) struct Event {
    pub id: String,
    pub body: Bytes,
    /// `Root=...;Parent=...;Sampled=...`
    pub trace: String,
    pub client_context: Option<HeaderValue>,
}

struct Waiting {
    event: Event,
    taken: oneshot::Sender<Instant>,
    answer: oneshot::Sender<Answer>,
}

/// An invocation that the runtime works on.
struct Current {
    id: String,
    deadline: Instant,
    /// Taken when its answer begins.
    answer: Option<oneshot::Sender<Answer>>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    current: Option<Current>,
    /// The runtime asked for an event at least once.
    begun: bool,
    /// How often the runtime has to be restarted.
    restarts: u64,
}

pub(super) struct Broker {
    pub spec: LambdaSpec,
    state: Mutex<State>,
    arrived: Notify,
    taken: Notify,
    changed: Condvar,
}

/// Longer than its limit a runtime is let be, so that who waits for the answer is the first to know.
const GRACE: Duration = Duration::from_millis(100);

/// What a runtime is given.
pub(super) struct Work {
    pub event: Event,
    pub deadline_ms: u64,
}

impl Broker {
    pub fn new(spec: LambdaSpec) -> Broker {
        Broker { spec, state: Mutex::default(), arrived: Notify::new(), taken: Notify::new(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.spec.timeout_ms)
    }

    /// Has the runtime answer one event.
    pub async fn invoke(&self, event: Event) -> Result<Answer, Refusal> {
        let (id, size) = (event.id.clone(), event.body.len());
        let ((taken, is_taken), (answer, answered)) = (oneshot::channel(), oneshot::channel());
        {
            let mut state = self.lock();
            if state.waiting.len() >= WAITING || state.bytes + size > WAITING_BYTES {
                return Err(Refusal::TooMany);
            }
            state.bytes += size;
            state.waiting.push_back(Waiting { event, taken, answer });
        }
        self.arrived.notify_one();
        let deadline = match tokio::time::timeout(self.timeout(), is_taken).await {
            Ok(Ok(deadline)) => deadline,
            Ok(Err(_)) => return answered.await.map_err(|_| Refusal::NotTaken),
            Err(_) => {
                self.forget_waiting(&id);
                return Err(Refusal::NotTaken);
            }
        };
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(answer) => Ok(answer.unwrap_or_else(|_| Answer::Failed(exited("the runtime went away")))),
            Err(_) => Err(Refusal::TimedOut(self.time_out(&id))),
        }
    }

    fn forget_waiting(&self, id: &str) {
        let mut state = self.lock();
        if let Some(at) = state.waiting.iter().position(|w| w.event.id == id)
            && let Some(gone) = state.waiting.remove(at)
        {
            state.bytes = state.bytes.saturating_sub(gone.event.body.len());
        }
    }

    /// Whoever runs over the limit is restarted: nothing else ends what it does.
    pub fn time_out(&self, id: &str) -> Failure {
        let mut state = self.lock();
        if state.current.as_ref().is_some_and(|current| current.id == id) {
            state.current = None;
            state.restarts += 1;
            self.changed.notify_all();
        }
        let seconds = self.timeout().as_secs_f64();
        Failure::new("Sandbox.Timedout", &format!("RequestId: {id} Error: Task timed out after {seconds:.2} seconds"))
    }

    /// Holds the runtime to its limit, also when who invoked has gone meanwhile; runs as long as the broker.
    pub async fn hold_to_limit(&self) {
        let current = || self.lock().current.as_ref().map(|current| (current.id.clone(), current.deadline + GRACE));
        loop {
            let taken = self.taken.notified();
            match current() {
                Some((id, end)) => {
                    tokio::time::sleep_until(end).await;
                    self.time_out(&id);
                }
                None => taken.await,
            }
        }
    }

    /// The runtime asks for work. One that still had some has lost it.
    pub async fn next(&self) -> Work {
        {
            let mut state = self.lock();
            state.begun = true;
            abandon(&mut state, "Runtime asked for the next event before it answered");
            self.changed.notify_all();
        }
        loop {
            let arrived = self.arrived.notified();
            if let Some(work) = self.take() {
                return work;
            }
            arrived.await;
        }
    }

    fn take(&self) -> Option<Work> {
        let mut state = self.lock();
        while let Some(waiting) = state.waiting.pop_front() {
            state.bytes = state.bytes.saturating_sub(waiting.event.body.len());
            let deadline = Instant::now() + self.timeout();
            // Who invoked may have gone.
            if waiting.taken.send(deadline).is_err() {
                continue;
            }
            let id = waiting.event.id.clone();
            state.current = Some(Current { id, deadline, answer: Some(waiting.answer) });
            self.taken.notify_one();
            let now = u64::try_from(clock::now_nanos() / 1_000_000).unwrap_or(0);
            return Some(Work { event: waiting.event, deadline_ms: now + self.spec.timeout_ms });
        }
        None
    }

    /// Until when the runtime may work on this; `None` if it does not.
    pub fn deadline(&self, id: &str) -> Option<Instant> {
        self.lock().current.as_ref().filter(|current| current.id == id).map(|current| current.deadline)
    }

    /// Ends the invocation.
    pub fn answer(&self, id: &str, answer: Answer) -> bool {
        let mut state = self.lock();
        if state.current.as_ref().is_none_or(|current| current.id != id) {
            return false;
        }
        if let Some(sender) = state.current.take().and_then(|current| current.answer) {
            // Who invoked may have gone.
            let _ = sender.send(answer);
        }
        true
    }

    /// Begins a streamed answer; [`Self::finish`] ends it.
    pub fn begin(&self, id: &str, kind: Option<HeaderValue>) -> Option<mpsc::Sender<Result<Bytes, String>>> {
        let mut state = self.lock();
        let current = state.current.as_mut().filter(|current| current.id == id)?;
        let sender = current.answer.take()?;
        let (chunks, receiver) = mpsc::channel(8);
        let _ = sender.send(Answer::Stream(kind, receiver));
        Some(chunks)
    }

    pub fn finish(&self, id: &str) {
        let mut state = self.lock();
        if state.current.as_ref().is_some_and(|current| current.id == id) {
            state.current = None;
        }
    }

    /// The runtime could not begin: nobody who waits will be served by it.
    pub fn init_failed(&self, failure: &Failure) {
        let mut state = self.lock();
        state.bytes = 0;
        for waiting in std::mem::take(&mut state.waiting) {
            let _ = waiting.answer.send(Answer::Failed(failure.clone()));
        }
    }

    /// The runtime's process ended.
    pub fn exited(&self, how: &str) {
        abandon(&mut self.lock(), how);
    }

    /// Blocks until the runtime has begun.
    pub fn wait_begun(&self) {
        let mut state = self.lock();
        while !state.begun {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Blocks until the runtime has to be restarted once more than `seen`; tells at once without.
    pub fn wait_restart(&self, seen: Option<u64>) -> u64 {
        let mut state = self.lock();
        while seen.is_some_and(|seen| state.restarts <= seen) {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.restarts
    }
}

fn abandon(state: &mut State, how: &str) {
    if let Some(current) = state.current.take()
        && let Some(answer) = current.answer
    {
        let _ = answer.send(Answer::Failed(exited(&format!("RequestId: {} Error: {how}", current.id))));
    }
}

fn exited(message: &str) -> Failure {
    Failure::new("Runtime.ExitError", message)
}

/// A UUID of version 4, unpredictable as far as the standard library's hash keys are.
pub(super) fn request_id() -> String {
    let keyed = |salt: u8| RandomState::new().hash_one((clock::now_nanos(), salt));
    let (a, b) = (keyed(0), keyed(1));
    let (high, low) = (a & 0xffff_ffff_ffff_0fff | 0x4000, b & 0x3fff_ffff_ffff_ffff | 0x8000_0000_0000_0000);
    let text = format!("{high:016x}{low:016x}");
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn broker(timeout_ms: u64) -> Arc<Broker> {
        Arc::new(Broker::new(LambdaSpec { timeout_ms, ..LambdaSpec::default() }))
    }

    fn event() -> Event {
        Event { id: request_id(), body: Bytes::from_static(b"{}"), trace: String::new(), client_context: None }
    }

    fn invoke(broker: &Arc<Broker>) -> tokio::task::JoinHandle<Result<Answer, Refusal>> {
        let broker = broker.clone();
        tokio::spawn(async move { broker.invoke(event()).await })
    }

    #[tokio::test]
    async fn one_event_at_a_time_and_answers_find_home() {
        let broker = broker(60_000);
        let (first, second) = (invoke(&broker), invoke(&broker));
        let work = broker.next().await;
        assert!(!broker.answer("another", Answer::Whole(Bytes::new())));
        assert!(broker.answer(&work.event.id, Answer::Whole(Bytes::from_static(b"1"))));
        assert!(!broker.answer(&work.event.id, Answer::Whole(Bytes::new())), "once");
        assert!(matches!(first.await.unwrap(), Ok(Answer::Whole(body)) if body == "1"));
        // The second is lost by a runtime that asks for more.
        broker.next().await;
        let third = invoke(&broker);
        broker.next().await;
        assert!(matches!(second.await.unwrap(), Ok(Answer::Failed(why)) if why.kind == "Runtime.ExitError"));
        broker.exited("Runtime exited with code 1");
        assert!(matches!(third.await.unwrap(), Ok(Answer::Failed(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_over_its_time_is_restarted() {
        let broker = broker(100);
        let late = invoke(&broker);
        let work = broker.next().await;
        let Err(Refusal::TimedOut(failure)) = late.await.unwrap() else { panic!("no timeout") };
        assert!(String::from_utf8_lossy(&failure.body).contains("Task timed out after 0.10 seconds"));
        assert_eq!(broker.wait_restart(Some(0)), 1);
        assert!(!broker.answer(&work.event.id, Answer::Whole(Bytes::new())), "too late");
        // Nobody asks for it.
        assert_eq!(invoke(&broker).await.unwrap().err(), Some(Refusal::NotTaken));
        assert!(broker.lock().waiting.is_empty() && broker.lock().bytes == 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_has_to_wait_for_its_time_to_end() {
        let broker = broker(100);
        let holding = tokio::spawn({
            let broker = broker.clone();
            async move { broker.hold_to_limit().await }
        });
        let gone = invoke(&broker);
        broker.next().await;
        gone.abort();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(broker.lock().restarts, 1);
        let answered = invoke(&broker);
        let work = broker.next().await;
        assert!(broker.answer(&work.event.id, Answer::Whole(Bytes::new())));
        assert!(answered.await.unwrap().is_ok());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(broker.lock().restarts, 1, "what was answered in time is let be");
        holding.abort();
    }

    #[tokio::test]
    async fn only_so_many_wait() {
        let broker = broker(60_000);
        let all: Vec<_> = (0..=WAITING).map(|_| invoke(&broker)).collect();
        while broker.lock().waiting.len() < WAITING {
            tokio::task::yield_now().await;
        }
        assert!(matches!(broker.invoke(event()).await.err(), Some(Refusal::TooMany)));
        broker.init_failed(&Failure::new("Runtime.ImportModuleError", "no module"));
        let mut failed = 0;
        for one in all {
            failed += usize::from(matches!(one.await.unwrap(), Ok(Answer::Failed(_))));
        }
        assert_eq!(failed, WAITING);
    }

    #[test]
    fn request_ids_are_uuids() {
        let id = request_id();
        assert_eq!((id.len(), id.as_bytes()[14], id.split('-').count()), (36, b'4', 5));
        assert!(matches!(id.as_bytes()[19], b'8' | b'9' | b'a' | b'b'));
        assert_ne!(id, request_id());
    }
}
