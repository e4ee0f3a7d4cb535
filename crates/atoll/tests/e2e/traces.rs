//! What is told of functions: spans, which a collector of the test's own takes, and metrics.

use crate::cluster::{Cluster, Said, json};
use crate::functions::{ANSWER, GREET, component, function};
use crate::{Outcome, Test};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub const TESTS: &[Test] = &[("function_spans_and_metrics", told)];

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// Takes spans and keeps what it got.
struct Collector {
    url: String,
    got: Arc<Mutex<Vec<Value>>>,
    listener: TcpListener,
}

impl Drop for Collector {
    fn drop(&mut self) {
        // whoever waits for connections is told that there will be none
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

impl Collector {
    fn start(c: &Cluster) -> Collector {
        let listener = c.listen();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let got = Arc::<Mutex<Vec<Value>>>::default();
        let (kept, accepting) = (got.clone(), listener.try_clone().unwrap());
        std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                let body = take(stream);
                kept.lock().unwrap().push(body);
            }
        });
        Collector { url, got, listener }
    }

    /// Resource attributes and span of all invocations of a trace.
    fn spans(&self, trace: &str) -> Vec<(Value, Value)> {
        let got = self.got.lock().unwrap();
        let resources = got.iter().flat_map(|body| body["resourceSpans"].as_array().unwrap());
        let spans = resources.flat_map(|resource| {
            let scopes = resource["scopeSpans"].as_array().unwrap().iter();
            let spans = scopes.flat_map(|scope| scope["spans"].as_array().unwrap());
            spans.map(|span| (resource["resource"].clone(), span.clone()))
        });
        spans.filter(|(_, span)| span["traceId"] == trace && attribute(span, "faas.trigger").is_string()).collect()
    }
}

fn take(mut stream: TcpStream) -> Value {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line == "\r\n" {
            break;
        }
        if let Some(text) = line.to_lowercase().strip_prefix("content-length:") {
            length = text.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn attribute(of: &Value, key: &str) -> Value {
    let all = of["attributes"].as_array().unwrap();
    let found = all.iter().find(|attribute| attribute["key"] == key);
    found.and_then(|attribute| attribute["value"].as_object()?.values().next().cloned()).unwrap_or_default()
}

fn number(of: &Value, key: &str) -> u64 {
    attribute(of, key).as_str().unwrap_or_else(|| panic!("{key}: {of}")).parse().unwrap()
}

fn ask(c: &Cluster, name: &str, trace: &str, data: &str) -> String {
    let (host, parent) = (format!("Host: {name}.t-traces.atoll.local"), format!("traceparent: {trace}"));
    let args = ["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &host, "-H", &parent, "-d", data];
    Said::of(c.inside("curl").args(args).arg("http://127.0.0.1:8080/price?sku=1").output().unwrap()).good()
}

fn told(c: &Cluster) -> Outcome {
    let collector = Collector::start(c);
    c.stop(rustix::process::Signal::TERM);
    c.up_with(&["--otlp-endpoint", &collector.url], &[]);
    let ns = c.namespace("t-traces");
    let file = component(c, "traced.wasm", GREET);
    function(c, &ns, &["deploy", "greet", file.to_str().unwrap()]).good();
    let traps = component(c, "traps.wasm", "(unreachable)");
    function(c, &ns, &["deploy", "traps", traps.to_str().unwrap()]).good();
    // Spans are kept from when they are first fetched.
    c.until("spans are kept, and those of the trace come", || {
        ask(c, "greet", &format!("00-{TRACE}-00f067aa0ba902b7-01"), "four");
        !collector.spans(TRACE).is_empty()
    });
    let (resource, span) = collector.spans(TRACE).remove(0);
    assert_eq!(attribute(&resource, "service.name"), "greet");
    assert_eq!(attribute(&resource, "service.namespace"), "t-traces");
    assert_eq!(attribute(&resource, "service.version"), "greet-00001");
    assert!(attribute(&resource, "k8s.pod.name").as_str().unwrap().starts_with("greet-00001-"), "{resource}");
    assert_eq!((&span["name"], &span["kind"]), (&"POST".into(), &2.into()));
    assert_eq!(span["parentSpanId"].as_str().unwrap().len(), 16, "{span}");
    assert_eq!((attribute(&span, "url.path"), number(&span, "http.response.status_code")), ("/price".into(), 200));
    assert_eq!(number(&span, "atoll.memory_peak_bytes"), 64 << 10, "one page");
    assert!(number(&span, "atoll.run_microseconds") > 0 && !attribute(&span, "atoll.queue_microseconds").is_null());
    let time = |field: &str| span[field].as_str().unwrap().parse::<u64>().unwrap();
    assert!(time("endTimeUnixNano") > time("startTimeUnixNano"), "{span}");

    // A new revision is cold once; a failure is one.
    let other = "5bf92f3577b34da6a3ce929d0e0e4736";
    let file = component(c, "traced2.wasm", ANSWER);
    function(c, &ns, &["deploy", "greet", file.to_str().unwrap()]).good();
    for _ in 0..3 {
        assert_eq!(ask(c, "greet", &format!("00-{other}-00f067aa0ba902b7-01"), ""), "200");
    }
    c.until("all three are told", || collector.spans(other).len() == 3);
    let spans = collector.spans(other);
    let cold = spans.iter().filter(|(_, span)| attribute(span, "faas.coldstart") == true).count();
    assert_eq!(cold, 1, "{spans:?}");
    let third = "6bf92f3577b34da6a3ce929d0e0e4736";
    assert_eq!(ask(c, "traps", &format!("00-{third}-00f067aa0ba902b7-01"), ""), "500");
    c.until("the failure is told", || !collector.spans(third).is_empty());
    let (_, span) = collector.spans(third).remove(0);
    assert_eq!(span["status"]["code"], 2);
    assert!(span["status"]["message"].as_str().unwrap().contains("function failed"), "{span}");

    metrics(c, &ns);
    // A collector that is gone is no trouble to anybody.
    let gone = c.atoll(&["up", "--otlp-endpoint", "https://127.0.0.1:1"]).bad();
    assert!(gone.contains("over http only"), "{gone}");
    c.stop(rustix::process::Signal::TERM);
    c.up_with(&["--otlp-endpoint", "http://127.0.0.1:1"], &[]);
    c.until("it serves", || ask(c, "greet", &format!("00-{other}-00f067aa0ba902b7-01"), "") == "200");
    c.stop(rustix::process::Signal::TERM);
    c.up();
    function(c, &ns, &["rm", "greet", "traps"]).good();
    c.until("what is gone is not told of", || !scrape(c).contains("namespace=\"t-traces\",function="));
    Outcome::Passed
}

fn scrape(c: &Cluster) -> String {
    c.kubectl(&["get", "--raw", "/metrics"]).good()
}

fn metrics(c: &Cluster, ns: &str) {
    let text = scrape(c);
    crate::metrics::well_formed(&text);
    let of = |name: &str, function: &str, more: &str| {
        let series = format!("atoll_function_{name}{{namespace=\"{ns}\",function=\"{function}\"{more}}} ");
        let line =
            text.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_else(|| panic!("{series}: {text}"));
        line.parse::<f64>().unwrap()
    };
    assert!(of("requests_total", "greet", "") >= 4.0);
    assert_eq!((of("requests_total", "traps", ""), of("errors_total", "traps", "")), (1.0, 1.0));
    assert_eq!(of("cold_starts_total", "greet", ""), 2.0, "one for each revision");
    assert_eq!(of("duration_seconds_count", "greet", ""), of("requests_total", "greet", ""));
    assert_eq!(of("duration_seconds_bucket", "greet", ",le=\"+Inf\""), of("requests_total", "greet", ""));
    assert!(of("memory_gib_seconds_total", "greet", "") > 0.0 && of("memory_peak_bytes", "greet", "") >= 65536.0);
    let sent = text.lines().find_map(|line| line.strip_prefix("atoll_spans_sent_total ")).unwrap();
    assert!(sent.parse::<u64>().unwrap() >= 5, "{text}");
    let usage = json(&function(c, ns, &["usage", "-o", "json"]).good());
    assert_eq!(usage[ns]["traps"]["coldStarts"], 1);
}
