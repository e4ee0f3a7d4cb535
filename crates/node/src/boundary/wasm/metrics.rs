//! What functions did, for Prometheus: by namespace and Knative Service (else pod), of those that are here now.

use super::{Inner, Usage};
use api::metrics::{Kind, Text};
use function::FunctionStats;
use std::collections::BTreeMap;

/// Functions of one namespace, and of all, that are told of: a namespace that has more hides nothing but its own.
const OF_NAMESPACE: usize = 200;
const OF_ALL: usize = 2000;

/// One function.
struct Row {
    namespace: String,
    name: String,
    used: Usage,
    now: Now,
}

/// Of its pods together.
#[derive(Clone, Copy, Default)]
struct Now {
    active: u64,
    queued: u64,
    memory: u64,
    memory_peak: u64,
}

impl Now {
    fn add(&mut self, stats: &FunctionStats) {
        self.active += stats.in_flight;
        self.queued += stats.waiting;
        self.memory += stats.memory_bytes;
        self.memory_peak = self.memory_peak.max(stats.memory_peak_bytes);
    }
}

impl Inner {
    pub(super) fn metrics(&self) -> Text {
        let (mut rows, mut left_out) = (Vec::new(), 0usize);
        for (namespace, functions) in self.by_namespace() {
            let mut accounts: BTreeMap<String, Now> = BTreeMap::new();
            for (account, _) in &functions {
                accounts.entry(account.clone()).or_default();
            }
            for (account, _, stats) in self.book(&namespace, functions) {
                accounts.entry(account).or_default().add(&stats);
            }
            let sums = self.ledger.sums(&namespace);
            let room = OF_NAMESPACE.min(OF_ALL.saturating_sub(rows.len()));
            left_out += accounts.len().saturating_sub(room);
            for (name, now) in accounts.into_iter().take(room) {
                let used = sums.get(&name).copied().unwrap_or_default();
                rows.push(Row { namespace: namespace.clone(), name, used, now });
            }
        }
        let mut text = told(&rows);
        let help = "Functions that these metrics leave out, because there are too many.";
        text.one("atoll_functions_left_out", Kind::Gauge, help, left_out);
        if let Some(exporter) = self.spans.get() {
            let numbers = exporter.numbers();
            let help = "Spans that the collector took.";
            text.one("atoll_spans_sent_total", Kind::Counter, help, numbers.sent);
            let help = "Spans that were dropped: no room, or no collector that took them.";
            text.one("atoll_spans_dropped_total", Kind::Counter, help, numbers.dropped);
        }
        text
    }
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

fn told(rows: &[Row]) -> Text {
    let mut text = Text::default();
    let mut family = |name: &str, kind: Kind, help: &str, read: fn(&Row) -> f64| {
        let name = format!("atoll_function_{name}");
        text.family(&name, kind, help);
        for row in rows {
            text.sample(&name, &[("namespace", &row.namespace), ("function", &row.name)], read(row));
        }
    };
    use Kind::{Counter, Gauge};
    family("requests_total", Counter, "Requests.", |row| row.used.requests as f64);
    let help = "Requests that failed: traps, limits, no room.";
    family("errors_total", Counter, help, |row| row.used.failures as f64);
    let help = "Requests that were the first since the function's code was loaded.";
    family("cold_starts_total", Counter, help, |row| row.used.cold_starts as f64);
    let help = "Time that requests waited for a place.";
    family("queue_seconds_total", Counter, help, |row| seconds(row.used.queue_micros));
    family("cpu_seconds_total", Counter, "Processor time.", |row| row.used.cpu_nanos as f64 / 1e9);
    let help = "Time that requests had an instance.";
    family("run_seconds_total", Counter, help, |row| seconds(row.used.run_micros));
    family("memory_gib_seconds_total", Counter, "Memory by time, GiB by seconds.", |row| row.used.gib_seconds());
    family("received_bytes_total", Counter, "Bytes of requests' bodies.", |row| row.used.received_bytes as f64);
    family("sent_bytes_total", Counter, "Bytes of answers' bodies.", |row| row.used.sent_bytes as f64);
    let help = "Requests of the function's own.";
    family("outbound_requests_total", Counter, help, |row| row.used.outbound_requests as f64);
    family("active", Gauge, "Requests that have an instance.", |row| row.now.active as f64);
    family("queued", Gauge, "Requests that wait for a place.", |row| row.now.queued as f64);
    family("memory_bytes", Gauge, "Memory of the instances alive.", |row| row.now.memory as f64);
    let help = "The most memory that one instance had.";
    family("memory_peak_bytes", Gauge, help, |row| row.now.memory_peak as f64);
    durations(&mut text, rows);
    text
}

fn durations(text: &mut Text, rows: &[Row]) {
    const NAME: &str = "atoll_function_duration_seconds";
    text.family(NAME, Kind::Histogram, "Time of requests, from arrival to the end of answer and instance.");
    for row in rows {
        let [namespace, function] = [("namespace", row.namespace.as_str()), ("function", row.name.as_str())];
        let labels = [namespace, function];
        let mut count = 0;
        for (index, bucket) in row.used.durations.iter().enumerate() {
            count += bucket;
            let bound = ::function::BOUNDS.get(index).map_or("+Inf".to_owned(), |bound| seconds(*bound).to_string());
            text.sample(&format!("{NAME}_bucket"), &[namespace, function, ("le", &bound)], count);
        }
        text.sample(&format!("{NAME}_sum"), &labels, seconds(row.used.duration_micros));
        text.sample(&format!("{NAME}_count"), &labels, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_add_up() {
        let mut used = Usage { requests: 4, duration_micros: 2_500_000, ..Usage::default() };
        used.durations = [1, 2, 0, 0, 0, 0, 0, 0, 1];
        let row = Row { namespace: "shop".into(), name: "price".into(), used, now: Now::default() };
        let text = told(&[row]).into_string();
        let of = |series: &str| {
            let line = text.lines().find(|line| line.starts_with(&format!("atoll_function_{series}")));
            line.and_then(|line| line.rsplit(' ').next()).map(str::to_owned)
        };
        let bucket =
            |le: &str| of(&format!("duration_seconds_bucket{{namespace=\"shop\",function=\"price\",le=\"{le}\"}}"));
        assert_eq!(bucket("0.001").as_deref(), Some("1"));
        assert_eq!(bucket("0.005").as_deref(), Some("3"));
        assert_eq!(bucket("30").as_deref(), Some("3"));
        assert_eq!(bucket("+Inf").as_deref(), Some("4"));
        assert_eq!(of("duration_seconds_sum").as_deref(), Some("2.5"));
        assert_eq!(of("duration_seconds_count").as_deref(), Some("4"));
        assert_eq!(of("requests_total").as_deref(), Some("4"));
    }
}
