//! Counters for Prometheus at the API's `/metrics`.

use crate::cluster::{Cluster, json, sleeper};
use crate::{Outcome, Test};
use std::collections::BTreeSet;

pub const TESTS: &[Test] = &[("metrics_over_http", over_http)];

fn over_http(c: &Cluster) -> Outcome {
    let ns = c.namespace("t-metrics");
    c.apply(&sleeper("pod", &ns));
    c.wait_ready(&ns, "pod/pod");
    c.kubectl(&["exec", "-n", &ns, "pod", "--", "nslookup", "-type=a", "nothing.example.org"]);
    let config = json(&c.kubectl(&["config", "view", "--raw", "-o", "json"]).good());
    for (name, pointer) in
        [("m.crt", "/users/0/user/client-certificate-data"), ("m.key", "/users/0/user/client-key-data")]
    {
        let text = config.pointer(pointer).and_then(|value| value.as_str()).expect("a certificate");
        let file = c.scratch(name);
        c.host("sh", &["-c", &format!("echo {text} | base64 -d > {}", file.display())]).good();
    }
    let (certificate, key) = (c.scratch("m.crt"), c.scratch("m.key"));
    let get = |with: &[&str]| {
        let all = [&["-sk", "-m", "20", "-w", "%{http_code}", "https://127.0.0.1:7443/metrics"][..], with].concat();
        c.host("curl", &all).good()
    };
    let text = get(&["--cert", &certificate.to_string_lossy(), "--key", &key.to_string_lossy()]);
    assert!(text.ends_with("200"), "{text}");
    assert!(get(&[]).ends_with("401"), "nobody else reads them");
    let sent = format!("atoll_network_workload_transmit_packets_total{{namespace=\"{ns}\",pod=\"pod\"}} ");
    let sent = text.lines().find_map(|line| line.strip_prefix(&sent)).expect("the pod's counter");
    assert!(sent.parse::<u64>().expect("a number") > 0, "{text}");
    for name in [
        "atoll_api_requests_total{method=\"GET\",code=\"200\"} ",
        "process_resident_memory_bytes ",
        "atoll_network_refused_packets_total ",
        "atoll_network_tracked_connections ",
        "atoll_dns_questions_total{outcome=\"not_allowed\"} ",
    ] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name}: {text}");
    }
    well_formed(text.trim_end_matches("200"));
    assert_eq!(c.kubectl(&["get", "--raw", "/metrics"]).good().lines().next(), text.lines().next());
    Outcome::Passed
}

/// Every sample belongs to the family above it, every family is described once, and no series comes twice.
pub fn well_formed(text: &str) {
    let (mut family, mut families, mut series) = (String::new(), BTreeSet::new(), BTreeSet::new());
    let mut histogram = false;
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["#", "HELP", name, _, ..] => assert!(families.insert((*name).to_owned()), "{name} is described twice"),
            ["#", "TYPE", name, kind] => {
                let counts = name.ends_with("_total");
                assert_eq!(counts, *kind == "counter", "{line}");
                family = (*name).to_owned();
                histogram = *kind == "histogram";
            }
            _ => {
                let (name, value) = line.rsplit_once(' ').expect("a value");
                let of = name.split('{').next().unwrap_or_default();
                let part = of.strip_prefix(family.as_str()).expect("of the family");
                assert!(part.is_empty() != histogram && ["", "_bucket", "_sum", "_count"].contains(&part), "{line}");
                assert!(value.parse::<f64>().is_ok() && series.insert(name.to_owned()), "{line}");
            }
        }
    }
}
