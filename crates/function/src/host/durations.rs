//! How long requests took, as Prometheus' histograms count it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the buckets, microseconds; a last one has no bound.
pub const BOUNDS: [u64; 8] = [1_000, 5_000, 25_000, 100_000, 500_000, 1_000_000, 5_000_000, 30_000_000];
/// Requests in each bucket, not in those below it.
pub type Buckets = [u64; BOUNDS.len() + 1];

#[derive(Default)]
pub(super) struct Durations([AtomicU64; BOUNDS.len() + 1], AtomicU64);

impl Durations {
    pub fn observe(&self, time: Duration) {
        let micros = super::invocation::micros(time);
        let bucket = BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS.len());
        if let Some(bucket) = self.0.get(bucket) {
            bucket.fetch_add(1, Relaxed);
        }
        self.1.fetch_add(micros, Relaxed);
    }

    pub fn read(&self) -> Buckets {
        self.0.each_ref().map(|bucket| bucket.load(Relaxed))
    }

    /// Microseconds of all requests together.
    pub fn sum(&self) -> u64 {
        self.1.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_in_one_bucket() {
        let durations = Durations::default();
        for micros in [0, 1_000, 1_001, 31_000_000] {
            durations.observe(Duration::from_micros(micros));
        }
        assert_eq!(durations.read(), [2, 1, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(durations.sum(), 31_002_001);
    }
}
