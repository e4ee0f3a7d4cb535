//! How fast a device may work: a bucket for its bytes and one for its operations. What a request costs is known once it was
//! carried out, so a bucket may be overdrawn, and no other request is taken until it is filled again.

use crate::machine::Rate;
use std::time::{Duration, Instant};

/// What a device that rested may do at once: its rate for so long.
const BURST: Duration = Duration::from_millis(100);
/// The longest that one request, however large, holds up the next.
const LONGEST: Duration = Duration::from_secs(60);

struct Bucket {
    /// Tokens a second; 0: any number.
    rate: u64,
    /// When it is filled again.
    filled: Option<Instant>,
}

impl Bucket {
    fn spend(&mut self, tokens: u64, now: Instant) {
        if self.rate == 0 {
            return;
        }
        let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(self.rate);
        let took = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(LONGEST);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let latest = now + LONGEST;
        self.filled = Some((self.filled.map_or(earliest, |at| at.max(earliest)) + took).min(latest));
    }

    fn wait(&self, now: Instant) -> Duration {
        self.filled.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }
}

pub struct Limiter {
    bytes: Bucket,
    operations: Bucket,
}

impl Limiter {
    pub fn new(rate: Rate) -> Self {
        let bucket = |rate| Bucket { rate, filled: None };
        Limiter { bytes: bucket(rate.bytes), operations: bucket(rate.operations) }
    }

    /// An operation on so many bytes was carried out.
    pub fn spend(&mut self, bytes: u64, now: impl FnOnce() -> Instant) {
        if self.bytes.rate != 0 || self.operations.rate != 0 {
            let now = now();
            self.bytes.spend(bytes, now);
            self.operations.spend(1, now);
        }
    }

    /// How long the next operation has to wait; `None`: it need not.
    pub fn wait(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        if self.bytes.filled.is_none() && self.operations.filled.is_none() {
            return None;
        }
        let now = now();
        Some(self.bytes.wait(now).max(self.operations.wait(now))).filter(|wait| !wait.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of `size` bytes one after the other for `seconds`; how many there were.
    fn run(rate: Rate, size: u64, seconds: u64) -> u64 {
        let begin = Instant::now();
        let (mut now, mut count, mut limiter) = (begin, 0, Limiter::new(rate));
        while now < begin + Duration::from_secs(seconds) {
            limiter.spend(size, || now);
            count += 1;
            now += limiter.wait(|| now).unwrap_or(Duration::from_micros(1));
        }
        count
    }

    #[test]
    fn the_tighter_limit_holds_with_a_burst_of_a_tenth_of_a_second() {
        assert_eq!(run(Rate { bytes: 1 << 20, operations: 0 }, 64 << 10, 10), 162);
        assert_eq!(run(Rate { bytes: 0, operations: 100 }, 64 << 10, 10), 1010);
        assert_eq!(run(Rate { bytes: 1 << 20, operations: 4 }, 64 << 10, 10), 41);
    }

    #[test]
    fn a_device_without_limits_never_looks_at_the_clock() {
        let mut limiter = Limiter::new(Rate::default());
        limiter.spend(u64::MAX, || unreachable!());
        assert_eq!(limiter.wait(|| unreachable!()), None);
    }

    #[test]
    fn rest_is_not_saved_up_and_no_request_holds_up_the_next_for_long() {
        let begin = Instant::now();
        let mut limiter = Limiter::new(Rate { bytes: 1, operations: 0 });
        limiter.spend(u64::MAX, || begin);
        assert_eq!(limiter.wait(|| begin), Some(LONGEST - BURST));
        let later = begin + Duration::from_secs(1000);
        assert_eq!(limiter.wait(|| later), None);
        limiter.spend(1, || later);
        assert_eq!(limiter.wait(|| later), Some(Duration::from_millis(900)));
    }
}
