//! What is noted of one request, from its arrival to the end of both its answer and its instance: who is last to let go
//! of it ends it.

use super::function::{Counters, Function};
use super::trace::Trace;
use http::{Request, StatusCode};
use spans::{Span, Value};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Bytes of a path, and of a failure, in a span.
const TEXT: usize = 256;

pub(super) struct Invocation {
    pub trace: Trace,
    function: Arc<Function>,
    method: http::Method,
    path: String,
    /// Unix nanoseconds.
    started: i64,
    arrived: Instant,
    cold: AtomicBool,
    queue_micros: AtomicU64,
    run_micros: AtomicU64,
    cpu_nanos: AtomicU64,
    memory: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    /// 0 until there is one.
    status: AtomicU16,
    failure: OnceLock<String>,
}

impl Invocation {
    /// Hands the trace on in the request's headers.
    pub fn begin<B>(function: Arc<Function>, request: &mut Request<B>) -> Arc<Invocation> {
        let trace = Trace::continue_in(request.headers_mut(), function.recorder().wanted());
        Arc::new(Invocation {
            trace,
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            function,
            started: clock::now_nanos(),
            arrived: Instant::now(),
            cold: AtomicBool::new(false),
            queue_micros: AtomicU64::new(0),
            run_micros: AtomicU64::new(0),
            cpu_nanos: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            status: AtomicU16::new(0),
            failure: OnceLock::new(),
        })
    }

    pub fn counters(&self) -> &Counters {
        &self.function.counters
    }

    pub fn age(&self) -> Duration {
        self.arrived.elapsed()
    }

    /// As logs name it.
    pub fn what(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    /// It has its place; `cold` says that the function's code was not used before.
    pub fn admitted(&self, cold: bool) {
        let waited = micros(self.age());
        self.queue_micros.store(waited, Relaxed);
        self.cold.store(cold, Relaxed);
        self.counters().queue_micros.fetch_add(waited, Relaxed);
        self.counters().cold_starts.fetch_add(u64::from(cold), Relaxed);
    }

    /// Its instance ended after so long, with so much memory.
    pub fn ran(&self, time: Duration, memory: u64) {
        let time = micros(time);
        self.run_micros.store(time, Relaxed);
        self.memory.store(memory, Relaxed);
        let counters = self.counters();
        counters.run_micros.fetch_add(time, Relaxed);
        counters.memory_kib_micros.fetch_add((memory >> 10).saturating_mul(time), Relaxed);
        counters.memory_peak.fetch_max(memory, Relaxed);
    }

    pub fn computed(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(0);
        self.cpu_nanos.fetch_add(nanos, Relaxed);
        self.counters().cpu.fetch_add(nanos, Relaxed);
    }

    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
        self.counters().received_bytes.fetch_add(bytes, Relaxed);
    }

    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
        self.counters().sent_bytes.fetch_add(bytes, Relaxed);
    }

    pub fn answered(&self, status: StatusCode) {
        self.status.store(status.as_u16(), Relaxed);
    }

    /// The first reason stays.
    pub fn failed(&self, why: impl ToString) {
        let _ = self.failure.set(why.to_string());
    }

    fn span(&self) -> Span {
        let status = self.status.load(Relaxed);
        let error = match self.failure.get() {
            Some(why) => Some(cut(why.lines().next().unwrap_or_default())),
            None if status == 0 => Some("whoever asked went before the answer".to_owned()),
            None => (status >= 500).then(|| "the function answered so".to_owned()),
        };
        let number = |counter: &AtomicU64| Value::Number(counter.load(Relaxed));
        let mut attributes = vec![
            ("http.request.method", Value::Text(self.method.to_string())),
            ("url.path", Value::Text(cut(&self.path))),
            ("http.request.body.size", number(&self.received)),
            ("http.response.body.size", number(&self.sent)),
            ("faas.trigger", Value::Text("http".to_owned())),
            ("faas.coldstart", Value::Flag(self.cold.load(Relaxed))),
            ("atoll.queue_microseconds", number(&self.queue_micros)),
            ("atoll.run_microseconds", number(&self.run_micros)),
            ("atoll.cpu_microseconds", Value::Number(self.cpu_nanos.load(Relaxed) / 1000)),
            ("atoll.memory_peak_bytes", number(&self.memory)),
        ];
        if status > 0 {
            attributes.push(("http.response.status_code", Value::Number(status.into())));
        }
        let took = i64::try_from(self.age().as_nanos()).unwrap_or(i64::MAX);
        Span {
            trace: self.trace.id,
            id: self.trace.span,
            parent: self.trace.parent,
            state: self.trace.state.clone(),
            name: self.method.to_string(),
            start: self.started,
            end: self.started.saturating_add(took),
            error,
            attributes: attributes.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        }
    }
}

impl Drop for Invocation {
    fn drop(&mut self) {
        self.counters().durations.observe(self.age());
        if self.function.recorder().wanted() {
            self.function.recorder().keep(&self.function.spec.id, self.span());
        }
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn cut(text: &str) -> String {
    text.get(..text.floor_char_boundary(TEXT)).unwrap_or_default().to_owned()
}
