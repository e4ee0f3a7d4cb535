//! What the gateway counts. Names follow Prometheus' conventions, `atoll_gateway_<field>`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }
        impl Counters {
            /// Name and value of every counter and gauge.
            pub fn read(&self) -> Vec<(&'static str, u64)> {
                vec![$((concat!("atoll_gateway_", stringify!($name)), self.$name.load(Relaxed)),)*]
            }
        }
    };
}

counters! {
    connections_total,
    /// Gauge.
    connections_open,
    requests_total,
    /// Gauge.
    requests_active,
    responses_1xx_total,
    responses_2xx_total,
    responses_3xx_total,
    responses_4xx_total,
    responses_5xx_total,
    /// Requests that were malformed or ambiguous.
    refused_total,
    no_route_total,
    access_lines_left_out_total,
    rate_limited_total,
    /// Requests that a policy refused for another reason.
    denied_total,
    no_endpoint_total,
    /// Requests for which no endpoint had room, nor the line of those that wait.
    overflow_total,
    invalid_backend_total,
    upstream_connects_total,
    upstream_connect_failures_total,
    upstream_reused_total,
    upstream_failures_total,
    upstream_timeouts_total,
    retries_total,
    ejections_total,
    upgrades_total,
    /// Connections of workloads to Services that may sleep.
    activated_total,
    /// Gauge.
    activated_open,
    /// Requests that were answered from a cache.
    cache_hits_total,
    /// Those that had to be asked for.
    cache_misses_total,
    /// Stored answers that were asked for again, and were still the current ones.
    cache_validated_total,
    /// Requests that waited for another one's answer.
    cache_waits_total,
    /// Answers that were compressed.
    compressed_total,
    /// Gauge.
    compressions_active,
    mirrored_total,
    /// Gauge.
    mirrors_active,
    /// Copies that were not sent: too many at a time, too large a body, no answer in time.
    mirrors_left_out_total,
    tls_handshakes_total,
    tls_handshake_failures_total,
    tls_passed_through_total,
    /// TLS connections for a name that no listener has.
    tls_unknown_name_total,
    /// Times that the routing table was made anew.
    tables_total,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }
    pub(crate) fn response(&self, status: http::StatusCode) {
        let counter = match status.as_u16() / 100 {
            1 => &self.responses_1xx_total,
            2 => &self.responses_2xx_total,
            3 => &self.responses_3xx_total,
            4 => &self.responses_4xx_total,
            _ => &self.responses_5xx_total,
        };
        Self::add(counter);
    }
}

/// Counts up a gauge while it lives.
pub(crate) struct Level<'a>(&'a AtomicU64);

impl<'a> Level<'a> {
    pub fn up(gauge: &'a AtomicU64) -> Level<'a> {
        gauge.fetch_add(1, Relaxed);
        Level(gauge)
    }
}

impl Drop for Level<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
