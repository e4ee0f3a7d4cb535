//! The queue and the thread that empties it.

use crate::{Collector, Origin, Span, encode};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Spans that wait.
const QUEUE: usize = 8192;
const BATCH: usize = 512;
/// How long a batch is gathered.
const GATHER: Duration = Duration::from_secs(1);
/// How often a batch is offered to a collector that cannot take it now.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_secs(1);

/// Takes spans of all threads. A clone leads to the same collector.
#[derive(Clone, Debug)]
pub struct Exporter {
    queue: SyncSender<(Arc<Origin>, Span)>,
    counted: Arc<Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// Since the exporter began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Spans that the collector took.
    pub sent: u64,
    /// Spans for which there was no room, or which the collector did not take.
    pub dropped: u64,
}

impl Exporter {
    /// `enter` runs first on the thread that sends, such as to move it into another network namespace.
    pub fn start(
        collector: Collector,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Exporter> {
        let (queue, spans) = sync_channel(QUEUE);
        let counted = Arc::<Counted>::default();
        let own = counted.clone();
        std::thread::Builder::new().name("spans".into()).stack_size(512 << 10).spawn(move || match enter() {
            Ok(()) => export(&collector, &spans, &own),
            Err(error) => tracing::warn!(%error, "spans are not sent"),
        })?;
        Ok(Exporter { queue, counted })
    }

    /// Never waits.
    pub fn offer(&self, origin: &Arc<Origin>, span: Span) {
        if self.queue.try_send((origin.clone(), span)).is_err() {
            self.lost(1);
        }
    }

    /// Counts spans that were lost before they could be offered.
    pub fn lost(&self, count: u64) {
        self.counted.dropped.fetch_add(count, Ordering::Relaxed);
    }

    pub fn numbers(&self) -> Numbers {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Numbers { sent: read(&self.counted.sent), dropped: read(&self.counted.dropped) }
    }
}

/// Until all exporters are gone and the queue is empty.
fn export(collector: &Collector, spans: &Receiver<(Arc<Origin>, Span)>, counted: &Counted) {
    let mut told = false;
    while let Ok(first) = spans.recv() {
        let mut batch = vec![first];
        let until = Instant::now() + GATHER;
        while batch.len() < BATCH {
            match spans.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(span) => batch.push(span),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        let count = batch.len() as u64;
        match deliver(collector, &batch) {
            Ok(()) => {
                counted.sent.fetch_add(count, Ordering::Relaxed);
                told = false;
            }
            Err(why) => {
                counted.dropped.fetch_add(count, Ordering::Relaxed);
                // Once for each time that it is not there.
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(collector = collector.name(), why, "spans are lost");
                }
            }
        }
    }
}

fn deliver(collector: &Collector, batch: &[(Arc<Origin>, Span)]) -> Result<(), String> {
    let body = serde_json::to_vec(&encode::request(batch)).map_err(|e| e.to_string())?;
    let mut why = String::new();
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(PAUSE * attempt);
        }
        why = match collector.post(&body) {
            Ok(200..=299) => return Ok(()),
            // The specification's list of what may be sent again.
            Ok(code @ (429 | 502 | 503 | 504)) => format!("it answers {code}"),
            Ok(code) => return Err(format!("it answers {code}")),
            Err(error) => error.to_string(),
        };
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn span(id: u64) -> Span {
        Span {
            trace: 1,
            id,
            parent: None,
            state: String::new(),
            name: "GET".into(),
            start: 1,
            end: 2,
            error: None,
            attributes: Vec::new(),
        }
    }

    fn request(stream: &mut TcpStream) -> serde_json::Value {
        let mut read = Vec::new();
        loop {
            let mut piece = [0; 4096];
            let count = stream.read(&mut piece).unwrap();
            read.extend_from_slice(&piece[..count]);
            let text = String::from_utf8_lossy(&read);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
            if body.len() == length.parse::<usize>().unwrap() {
                assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{head}");
                return serde_json::from_str(body).unwrap();
            }
        }
    }

    fn spans_of(body: &serde_json::Value) -> usize {
        body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().len()
    }

    fn exporter(listener: &TcpListener) -> Exporter {
        let url = format!("http://{}", listener.local_addr().unwrap());
        Exporter::start(Collector::parse(&url).unwrap(), || Ok(())).unwrap()
    }

    #[test]
    fn a_batch_is_offered_again_to_a_collector_that_is_busy() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let exporter = exporter(&listener);
        (1..=3).for_each(|id| exporter.offer(&Arc::default(), span(id)));
        for answer in ["HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"]
        {
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(spans_of(&request(&mut stream)), 3);
            stream.write_all(answer.as_bytes()).unwrap();
        }
        while exporter.numbers() != (Numbers { sent: 3, dropped: 0 }) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_collector_that_answers_nothing_costs_spans_and_no_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let exporter = exporter(&listener);
        let many = (QUEUE + BATCH) as u64 + 100;
        // All of it at once, though nobody takes any.
        (0..many).for_each(|id| exporter.offer(&Arc::default(), span(id)));
        assert!(exporter.numbers().dropped >= 100, "{:?}", exporter.numbers());
    }
}
