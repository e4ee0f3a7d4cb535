//! `/metrics`: requests by method and code, this process, and what other rooms count. For whoever may `get` that path.

use super::{Response, Service, bytes};
use api::metrics::{CONTENT_TYPE, Kind, Text};
use http::{Method, StatusCode};
use std::sync::atomic::{AtomicU64, Ordering};

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "other"];
/// Codes that the server answers; others count as the last.
const CODES: [&str; 22] = [
    "101", "200", "201", "202", "204", "304", "400", "401", "403", "404", "405", "406", "408", "409", "410", "413",
    "415", "422", "429", "500", "503", "other",
];

/// Ticks a second in `/proc`, whatever the kernel's own.
const USER_HZ: f64 = 100.0;

/// Requests answered: one counter for each method and code, so that clients cannot make more.
#[derive(Default)]
pub struct Requests([[AtomicU64; CODES.len()]; METHODS.len()]);

impl Requests {
    pub fn count(&self, method: &Method, code: StatusCode) {
        let place = |all: &[&str], wanted: &str| all.iter().position(|one| *one == wanted).unwrap_or(all.len() - 1);
        let counter =
            self.0.get(place(&METHODS, method.as_str())).and_then(|row| row.get(place(&CODES, code.as_str())));
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell(&self, text: &mut Text) {
        const NAME: &str = "atoll_api_requests_total";
        text.family(NAME, Kind::Counter, "Requests that the API has answered; watches and streams when they began.");
        for (method, row) in METHODS.iter().zip(&self.0) {
            for (code, counter) in CODES.iter().zip(row) {
                let count = counter.load(Ordering::Relaxed);
                if count > 0 {
                    text.sample(NAME, &[("method", *method), ("code", *code)], count);
                }
            }
        }
    }
}

pub async fn answer(service: &Service) -> Response {
    let mut text = Text::default();
    service.requests.tell(&mut text);
    process(&mut text);
    if let Some(source) = service.core.metrics() {
        text.append(&source.metrics().await);
    }
    bytes(StatusCode::OK, CONTENT_TYPE, text.into_string().into())
}

/// Under the names that Prometheus' client libraries give them.
fn process(text: &mut Text) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is a name in parentheses; after it the third is the first.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok());
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        let seconds = (user + system) as f64 / USER_HZ;
        text.one("process_cpu_seconds_total", Kind::Counter, "Processor time of this process.", seconds);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    if let Some(kilobytes) = resident {
        let bytes: u64 = kilobytes;
        text.one("process_resident_memory_bytes", Kind::Gauge, "Memory of this process.", bytes * 1024);
    }
    if let Some(threads) = field(20) {
        text.one("process_threads", Kind::Gauge, "Threads of this process.", threads);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        text.one("process_open_fds", Kind::Gauge, "Open file descriptors of this process.", open.count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_in_a_bounded_number_of_series() {
        let requests = Requests::default();
        requests.count(&Method::GET, StatusCode::OK);
        requests.count(&Method::GET, StatusCode::OK);
        requests.count(&Method::from_bytes(b"BREW").unwrap(), StatusCode::IM_A_TEAPOT);
        let mut text = Text::default();
        requests.tell(&mut text);
        let text = text.into_string();
        assert!(text.contains("atoll_api_requests_total{method=\"GET\",code=\"200\"} 2\n"), "{text}");
        assert!(text.contains("atoll_api_requests_total{method=\"other\",code=\"other\"} 1\n"), "{text}");
        let mut text = Text::default();
        process(&mut text);
        let text = text.into_string();
        for name in
            ["process_cpu_seconds_total ", "process_resident_memory_bytes ", "process_open_fds ", "process_threads "]
        {
            assert!(text.contains(name), "{text}");
        }
    }
}
